"""Arguments that make no sense end a script with one clear line, before anything is created."""

import re
import shlex
from pathlib import Path

import harness
import pytest
import toys  # noqa: F401, it registers tasks
import tyro

GOOD = {
    "env-id": "Pendulum-v1",
    "total-timesteps": 400,
    "learning-starts": 300,
    "growth-interval": 50,
    "hidden-dim": 8,
    "batch-size": 8,
}

# what is changed in GOOD -> pattern that the line must contain
TABLE = [
    ({"env-id": "HalfCheeta-v4"}, "no such task.*did you mean.*HalfCheetah-v4"),
    ({"env-id": "dm_control/walker-wlk-v0"}, "no such task.*did you mean.*dm_control/walker-walk-v0"),
    ({"env-id": "Pendulm-v1"}, "no such task.*did you mean.*Pendulum-v1"),
    ({"env-id": "Pendulum-v9"}, "Pendulum-v1"),
    ({"env-id": "qqqqqqqqqqqq"}, "no such task"),
    ({"env-id": "no_such_module:Task-v0"}, "no_such_module"),
    ({"env-id": "not an id"}, ""),
    ({"env-id": ""}, ""),
    ({"env-id": "CartPole-v1"}, "actions must be continuous"),
    ({"env-id": "ToyDiscreteAction-v0"}, "actions must be continuous"),
    ({"env-id": "ToyUnboundedAction-v0"}, "actions must be bounded"),
    ({"env-id": "ToyHalfBoundedAction-v0"}, "actions must be bounded"),
    ({"env-id": "ToyImageObservation-v0"}, "images"),
    ({"env-id": "ToyDiscreteObservation-v0"}, "observations must be"),
    ({"env-id": "ToyNestedObservation-v0"}, "observations must be"),
    ({"env-id": "FrozenLake-v1"}, "observations must be|actions must be"),
    *[
        ({name: value}, "at least 1")
        for name in (
            "total-timesteps",
            "buffer-size",
            "batch-size",
            "policy-frequency",
            "hidden-dim",
            "neuron-interval",
            "eval-episodes",
            "torch-threads",
            "growth-interval",
        )
        for value in (0, -1)
    ],
    *[({name: -1}, "negative") for name in ("eval-interval", "checkpoint-interval", "learning-starts")],
    *[({"learning-rate": value}, "above 0") for value in (0, -1e-3, "inf", "nan")],
    *[({"gamma": value}, re.escape("[0, 1]")) for value in (-0.1, 1.1, "nan")],
    *[({"tau": value}, re.escape("(0, 1]")) for value in (0, 1.1, "nan")],
    *[
        ({name: value}, "0 or more")
        for name in ("policy-noise", "noise-clip", "exploration-noise")
        for value in (-0.1, "inf", "nan")
    ],
    ({"seed": -1}, "must lie in"),
    ({"seed": 2**40}, "must lie in"),
    ({"batch-size": 101, "buffer-size": 100}, "--buffer-size 100"),
    ({"learning-starts": 400}, "--total-timesteps 400"),
    ({"learning-starts": 401}, "--total-timesteps 400"),
    *[({name: value}, re.escape("(0, 1]")) for name in ("initial-density", "final-density") for value in (0, -1, 1.01)],
    *[({name: "nan"}, re.escape("(0, 1]")) for name in ("initial-density", "final-density")],
    ({"final-density": 0.3, "initial-density": 0.5}, "--initial-density 0.5"),
    ({"final-density": 0.2}, "--initial-density 0.25"),
    *[({name: value}, re.escape("[0, 1]")) for name in ("omega", "review-floor") for value in (-0.1, 1.01, "nan")],
    ({"growth-interval": 102}, "longer than the.* 100 gradient steps"),
    ({"growth-interval": 102, "no-grow": None}, "longer than the.* 100 gradient steps"),
    ({"growth-interval": 102, "no-prune": None}, "longer than the.* 100 gradient steps"),
    ({"growth-interval": 51}, "multiple of --policy-frequency 2"),
    ({"growth-interval": 50, "policy-frequency": 3}, "multiple of --policy-frequency 3"),
    ({"resume": "runs/nothing"}, "runs/nothing"),
    ({"evaluate": "runs/nothing"}, "no such run folder"),
    ({"resume": ""}, "--resume"),
    ({"evaluate": ""}, "--evaluate"),
    ({"evaluate": "runs/nothing", "seed": 3}, "--seed"),
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
    """Calls a script with words that it must refuse -> the one line on stderr."""
    module = harness.SCRIPTS[script]
    with pytest.raises(SystemExit) as exit:
        module.main(tyro.cli(module.Args, args=words))
    out, err = capsys.readouterr()
    assert exit.value.code == 2, err
    assert out == "" and re.fullmatch("error: .*\n", err), (out, err)
    assert list(Path().iterdir()) == []
    return err


@pytest.mark.parametrize(
    "script, change, pattern",
    [(s, change, pattern) for s in harness.SCRIPTS for change, pattern in TABLE if known(s, change) == change],
    ids=lambda value: case(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_in_one_line_that_names_the_argument(script, change, pattern, capsys):
    alone = "resume" in change or "evaluate" in change
    words = words_of(change if alone else known(script, GOOD) | change)
    line = refusal(script, words, capsys)
    name, value = next(iter(change.items()))
    assert f"--{name}" in line and (alone or f"--{name} {float(value) if value in ('nan', 'inf') else value}" in line)
    assert re.search(pattern, line), line


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_the_unchanged_arguments_are_accepted(script):
    module = harness.SCRIPTS[script]
    module.main(tyro.cli(module.Args, args=words_of(known(script, GOOD))))


@pytest.mark.parametrize(
    "script, value", list(zip(harness.SCRIPTS, ["HalfCheeta-v4", "dm_control/walker-wlk-v0"], strict=False))
)
def test_a_user_sees_the_close_matches_in_one_line(script, value):
    result = harness.run(script, "--env-id", value)
    assert (result.returncode, result.stdout) == (2, "")
    right = {"HalfCheeta-v4": "HalfCheetah-v4", "dm_control/walker-wlk-v0": "dm_control/walker-walk-v0"}[value]
    assert re.fullmatch(f"error: --env-id {value}: .*did you mean .*{right}.*\n", result.stderr), result.stderr
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("words", ["--hidden-dim many", "--no-such-option 1"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_what_is_no_argument_at_all_is_refused(script, words, capsys):
    with pytest.raises(SystemExit) as exit:
        tyro.cli(harness.SCRIPTS[script].Args, args=words.split())
    assert exit.value.code == 2 and words.split()[0] in "".join(capsys.readouterr())


@pytest.mark.parametrize("script", harness.scripts_with("GrowthPlan"))
def test_without_growth_and_pruning_any_growth_interval_will_do(script):
    module = harness.SCRIPTS[script]
    for interval in (51, 10_000):
        words = words_of(GOOD | {"growth-interval": interval, "no-grow": None, "no-prune": None})
        module.main(tyro.cli(module.Args, args=words))


NET = {"env-id": "Pendulum-v1", "hidden-dim": 8, "batch-size": 8, "eval-episodes": 1}
SHORT_RUNS = [
    {"total-timesteps": 10000},
    {"total-timesteps": 3000},
    {"total-timesteps": 500, "seed": 3},
    {"total-timesteps": 60, "gamma": 0.5, "no-cuda": None},
    {"total-timesteps": 10},
    {"total-timesteps": 1},
    {"total-timesteps": 500, "policy-frequency": 3},
    {"total-timesteps": 500, "policy-frequency": 700},
    {"total-timesteps": 500, "learning-starts": 700, "growth-interval": 33},
    {"total-timesteps": 500, "learning-starts": 100},
    {"total-timesteps": 500, "learning-starts": 500, "no-grow": None},
    {"total-timesteps": 500, "learning-starts": 100, "growth-interval": 500, "no-prune": None},
]


class Started(Exception):
    """Ends a run at its first step."""


def started(*args):
    raise Started


def misfits(script, options):
    """Whether a short run's options need other defaults: without growth, only learning_starts may not fit."""
    options = known(script, options)
    return "growth_interval" in dir(harness.SCRIPTS[script].Args) or (
        options.get("learning-starts", 25_000) >= options["total-timesteps"]
    )


@pytest.mark.parametrize(
    "script, options",
    [(script, options) for script in harness.SCRIPTS for options in SHORT_RUNS if misfits(script, options)],
    ids=lambda value: case(value) if isinstance(value, dict) else None,
)
def test_where_defaults_do_not_fit_a_short_run_the_line_gives_a_command_that_works(
    script, options, capsys, monkeypatch
):
    module, options = harness.SCRIPTS[script], known(script, NET | options)
    line = refusal(script, words_of(options), capsys)
    words = shlex.split(re.search("this works: (.*)", line).group(1))
    assert words[0] == "python" and Path(words[1]).name == harness.PATHS[script].name
    given, asked = (tyro.cli(module.Args, args=w) for w in (words[2:], words_of(options)))
    changed = {name for name in vars(asked) if getattr(given, name) != getattr(asked, name)}
    assert changed <= {"learning_starts", "growth_interval", "grow", "prune"}
    if given.total_timesteps <= 500:
        assert (module.main(given) / "model.pt").exists()
    else:
        monkeypatch.setattr(module.ReplayBuffer, "add", started)
        with pytest.raises(Started):
            module.main(given)


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_the_command_that_a_user_is_given_works_as_it_is(script):
    options = {"env-id": "Pendulum-v1", "hidden-dim": 8, "total-timesteps": 300, "seed": 5, "batch-size": 8}
    result = harness.run(script, *words_of(options))
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    words = shlex.split(re.search("this works: (.*)", result.stderr).group(1))
    result = harness.subprocess.run([harness.sys.executable, *words[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (folder,) = Path("runs").iterdir()
    assert f"__{script}__5__" in folder.name


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_evaluate_refuses_a_folder_without_an_agent(script, capsys):
    module = harness.SCRIPTS[script]
    folder = module.main(tyro.cli(module.Args, args=words_of(known(script, GOOD))))
    for damage in (lambda path: path.write_bytes(b"hello"), lambda path: path.unlink()):
        damage(folder / "model.pt")
        for path in folder.glob("checkpoint.pt"):
            path.unlink()
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            module.main(module.Args(evaluate=str(folder)))
        assert exit.value.code == 2
        assert re.fullmatch(f"error: --evaluate {folder}.*\n", capsys.readouterr().err)
