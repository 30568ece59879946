import signal

import pytest
from harness import MORE, SCRIPTS

# Ignored where pytest was started in the background; the processes that tests start and interrupt would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The scripts whose shared tests run each time. The shared code of the other ones is the same to the letter, which
# test_drift.py checks each time; what is their own, these files do. All of the rest is marked slow.
METHODS = {"test_methods.py", "test_more_methods.py"}
ALWAYS = {"td3_continuous", "ne_td3_continuous"}
# Of these, all but the arguments is tested in test_more_methods.py alone: the suite does not grow with their number.
ALONE = set(MORE) - {"ne_layer_norm_td3_continuous"}


def pytest_collection_modifyitems(config, items):
    kept, alone = [], []
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else []
        others = {value for value in values if isinstance(value, str) and value in SCRIPTS and value not in ALWAYS}
        shared = others and item.path.name not in METHODS
        if shared:
            item.add_marker(pytest.mark.slow)
        (alone if shared and ALONE & others and item.path.name != "test_arguments.py" else kept).append(item)
    config.hook.pytest_deselected(items=alone)
    items[:] = kept


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder, where its runs/ go."""
    monkeypatch.chdir(tmp_path)
