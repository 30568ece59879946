"""Arguments that make no sense end a script with one clear line or box, before anything is created."""

import re
from pathlib import Path

import harness
import pytest
import toys  # noqa: F401, it registers tasks
import tyro
from test_resume import ONE, Fork, exit_code

GOOD = {
    "env-id": "Pendulum-v1",
    "total-timesteps": 400,
    "learning-starts": 300,
    "growth-interval": 50,
    "hidden-dim": 8,
    "batch-size": 8,
}
MUJOCO, DM_CONTROL = "end in -v4 or -v5", "dm_control/walker-walk-v0"

# tasks that are refused in one line -> pattern that it must contain, besides the task
TASKS = {
    "HalfCheeta-v4": "Did you mean: `HalfCheetah`",
    "dm_control/walker-wlk-v0": "Did you mean: `walker-walk`",
    "Pendulm-v1": "Did you mean: `Pendulum`",
    "Pendulum-v9": "Pendulum.*v1",
    "Hopper-v3": MUJOCO,
    "Hopper-v2": MUJOCO,
    "walker-walk": DM_CONTROL,
    "qqqqqqqqqqqq": "exist",
    "no_such_module:Task-v0": "no_such_module",
    "not an id": "",
    "": "",
    "CartPole-v1": "Discrete",
    "ToyDiscreteAction-v0": "Discrete",
    "FrozenLake-v1": "Discrete",
    "ToyMatrixAction-v0": "no .*vectors",
    "ToyUnboundedAction-v0": "bounded",
    "ToyHalfBoundedAction-v0": "bounded",
    "dm_control/lqr-lqr_2_1-v0": "bounded",  # to MuJoCo, 1e10 is no bound
    "ToyImageObservation-v0": "8, 8, 3",
}

# what is changed in GOOD -> pattern that the box must contain, besides the argument
TABLE = [
    *[
        ({name: value}, "1 [.]{3}")
        for name in (
            "total-timesteps",
            "buffer-size",
            "batch-size",
            "replay-ratio",
            "policy-frequency",
            "hidden-dim",
            "neuron-interval",
            "eval-episodes",
            "torch-threads",
            "growth-interval",
        )
        for value in (0, -2)
    ],
    *[({name: -1}, "0 [.]{3}") for name in ("eval-interval", "checkpoint-interval", "learning-starts")],
    *[({"learning-rate": value}, "") for value in (0, -1e-3, "inf", "nan")],
    *[({"gamma": value}, "0 [.]{3} 1") for value in (-0.1, 1.1, "nan")],
    *[({"tau": value}, "[.]{3} 1") for value in (0, 1.1, "nan")],
    *[
        ({name: value}, "0 [.]{3}")
        for name in ("policy-noise", "noise-clip", "exploration-noise", "omega", "dormant-tau")
        for value in (-0.1, "inf", "nan")
    ],
    ({"seed": -1}, "0 [.]{3}"),
    ({"seed": 2**40}, "0 [.]{3}"),
    ({"learning-starts": 400}, "[.]{3} 399"),
    ({"learning-starts": 401}, "[.]{3} 399"),
    *[
        ({name: value}, "[.]{3} 1")
        for name in ("initial-density", "final-density", "review-oldest")
        for value in (0, -1, 1.01, "nan")
    ],
    ({"final-density": 0.3, "initial-density": 0.5}, "0.5 [.]{3} 1"),
    *[({"review-floor": value}, "0 [.]{3} 1") for value in (-0.1, 1.01, "nan")],
    ({"growth-interval": 102}, "1 [.]{3} 100"),
    ({"growth-interval": 102, "no-grow": None}, "1 [.]{3} 100"),
    ({"growth-interval": 102, "no-prune": None}, "1 [.]{3} 100"),
    ({"growth-interval": 202, "replay-ratio": 2}, "1 [.]{3} 200"),
    ({"growth-interval": 51}, "multiple of --policy-frequency 2"),
    ({"growth-interval": 50, "policy-frequency": 3}, "multiple of --policy-frequency 3"),
    ({"growth-criterion": "size"}, "gradient.*random"),
    ({"total-timesteps": "1e6"}, "written 1000000 or 1_000_000"),
    ({"hidden-dim": "many"}, "many"),
    ({"no-such-option": 1}, ""),
]


def words_of(options):
    """{option: value, or None for a switch} -> command-line words."""
    return [
        str(word)
        for name, value in options.items()
        for word in ([f"--{name}"] if value is None else [f"--{name}", value])
    ]


def known(script, options):
    """Those of the options that a script has."""
    fields = harness.SCRIPTS[script].Args.__dataclass_fields__
    return {name: value for name, value in options.items() if name.removeprefix("no-").replace("-", "_") in fields}


def case(options):
    return " ".join(words_of(options))


def refusal(script, words, capsys):
    """Calls a script with words that it must refuse -> what is on stderr, in one line."""
    module = harness.SCRIPTS[script]
    assert exit_code(lambda: module.main(tyro.cli(module.Args, args=words))) == 2
    out, err = capsys.readouterr()
    assert out == "" and list(Path().iterdir()) == [] and "Traceback" not in err
    return err if err.startswith("error: ") else " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_task_that_will_not_do_is_refused_in_one_line(script, task, capsys):
    line = refusal(script, words_of(known(script, GOOD) | {"env-id": task}), capsys)
    assert re.fullmatch(f"error: --env-id {re.escape(task)}: .*\n", line) and re.search(TASKS[task], line), line


@pytest.mark.parametrize(
    "script, change, pattern",
    [
        (s, change, pattern)
        for s in harness.SCRIPTS
        for change, pattern in TABLE
        if known(s, change) == change or "no-such-option" in change
    ],
    ids=lambda value: case(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_in_a_box_that_names_the_argument(script, change, pattern, capsys):
    box = refusal(script, words_of(known(script, GOOD) | change), capsys)
    name, value = next(iter(change.items()))
    assert f"--{name}" in box and str(value) in box.replace("multiple", str(value)) and re.search(pattern, box), box


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_the_unchanged_arguments_are_accepted(script):
    module = harness.SCRIPTS[script]
    module.main(tyro.cli(module.Args, args=words_of(known(script, GOOD))))


@pytest.mark.parametrize("folder", ["runs/nothing", ""])
@pytest.mark.parametrize("name", ["resume", "evaluate"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_folder_that_is_no_run_is_refused_in_one_line(script, name, folder, capsys):
    for more in ([], ["--seed", "3"]):
        line = refusal(script, [f"--{name}", folder, *more], capsys)
        assert re.fullmatch(f"error: --{name} {folder}.*\n", line), line


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_evaluate_checks_its_own_arguments(script, capsys):
    box = refusal(script, ["--evaluate", "runs/nothing", "--eval-episodes", "0"], capsys)
    assert "--eval-episodes 0" in box


@pytest.mark.parametrize(
    "words, pattern",
    [
        (["--env-id", "HalfCheeta-v4"], "error: --env-id HalfCheeta-v4: .*Did you mean.*HalfCheetah.*\n"),
        (["--total-timesteps", "1e6"], "(?s).*error.*--total-timesteps.*1_000_000.*"),
        (["--seed", "-1"], "(?s).*error.*--seed -1: must lie in 0.*"),
    ],
)
def test_a_user_sees_one_line_or_one_box(words, pattern):
    assert Fork(ONE, *words).wait() == 2 and Path("out.txt").read_text() == ""
    err = Path("err.txt").read_text()
    assert re.fullmatch(pattern, err) and "Traceback" not in err, err
    assert {path.name for path in Path().iterdir()} == {"out.txt", "err.txt"}


@pytest.mark.parametrize("script", harness.scripts_with("ReviewGate"))
def test_without_growth_and_pruning_any_growth_interval_will_do(script):
    module = harness.SCRIPTS[script]
    for interval in (51, 10_000):
        words = words_of(GOOD | {"growth-interval": interval, "no-grow": None, "no-prune": None})
        module.main(tyro.cli(module.Args, args=words))
