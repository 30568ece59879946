import pytest


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Runs each test in an empty folder, where its runs/ go."""
    monkeypatch.chdir(tmp_path)
