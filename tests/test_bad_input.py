"""Arguments that make no sense end a script with one clear message and exit code 2, before anything is created."""

import json
import re
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
COUNTS = ["total-timesteps", "buffer-size", "batch-size", "policy-frequency", "hidden-dim", "neuron-interval"]
COUNTS += ["eval-episodes", "torch-threads", "growth-interval", "replay-ratio"]
SHARES = ["initial-density", "final-density", "review-oldest"]

# what is changed in GOOD -> pattern that the message must contain
TABLE = [
    ({"env-id": "HalfCheeta-v4"}, "Did you mean.*HalfCheetah"),
    ({"env-id": "dm_control/walker-wlk-v0"}, "Did you mean.*walker-walk"),
    ({"env-id": "Pendulum-v9"}, "Pendulum"),
    ({"env-id": "Hopper-v3"}, "-v4 or -v5"),
    ({"env-id": "walker-walk"}, "dm_control/walker-walk-v0"),
    ({"env-id": "no_such_module:Task-v0"}, "no_such_module"),
    ({"env-id": "not an id"}, ""),
    ({"env-id": ""}, ""),
    ({"env-id": "CartPole-v1"}, "Discrete"),
    ({"env-id": "ToyDiscreteAction-v0"}, "Discrete"),
    ({"env-id": "ToyMatrixAction-v0"}, "vectors"),
    ({"env-id": "ToyUnboundedAction-v0"}, "inf"),
    ({"env-id": "ToyHalfBoundedAction-v0"}, "inf"),
    ({"env-id": "ToyImageObservation-v0"}, "vectors"),
    *[({name: value}, "1 [.]{3}|multiple of") for name in COUNTS for value in (0, -1)],
    *[({name: -1}, "0 [.]{3}") for name in ("eval-interval", "checkpoint-interval", "learning-starts", "seed")],
    *[({"learning-rate": value}, "must lie in") for value in (0, -1e-3, "inf", "nan")],
    *[({name: value}, "[.]{3} 1( |$)") for name in ("gamma", "tau") for value in (-0.1, 1.1, "nan")],
    ({"tau": 0}, "must lie in"),
    *[
        ({name: value}, "must lie in 0 [.]{3}")
        for name in ("policy-noise", "noise-clip", "exploration-noise", "omega", "dormant-tau")
        for value in (-0.1, "inf", "nan")
    ],
    ({"seed": 2**40}, str(2**31 - 1)),
    ({"learning-starts": 400}, "0 [.]{3} 399"),
    *[({name: value}, "must lie in") for name in SHARES for value in (0, -1, 1.01, "nan")],
    *[({"review-floor": value}, "0 [.]{3} 1") for value in (-0.1, 1.01, "nan")],
    ({"final-density": 0.3, "initial-density": 0.5}, "must lie in 0[.]5"),
    ({"growth-interval": 102}, "1 [.]{3} 100"),
    ({"growth-interval": 102, "no-grow": None}, "1 [.]{3} 100"),
    ({"growth-interval": 102, "no-prune": None}, "1 [.]{3} 100"),
    ({"growth-interval": 51}, "multiple of --policy-frequency 2"),
    ({"growth-interval": 50, "policy-frequency": 3}, "multiple of --policy-frequency 3"),
    ({"growth-criterion": "size"}, "gradient.*random"),
    ({"hidden-dim": "many"}, "many"),
    ({"total-timesteps": "1e6"}, "1000000 or 1_000_000"),
    ({"no-such-option": 1}, ""),
    ({"resume": "runs/nothing"}, "runs/nothing"),
    ({"evaluate": "runs/nothing"}, "runs/nothing"),
    ({"resume": ""}, "No such file"),
    ({"evaluate": ""}, "No such file"),
    ({"evaluate": "runs/nothing", "resume": "runs/nothing"}, ""),
    ({"evaluate": "runs/nothing", "seed": 3}, "own arguments"),
    ({"evaluate": "runs/nothing", "eval-episodes": 0}, "eval-episodes"),
    ({"resume": "runs/nothing", "eval-episodes": 3}, "own arguments"),
]
NO_ARGUMENT = {"no-such-option"}


def words_of(options):
    """{option: value, or None for a switch} -> command-line words."""
    return [
        str(word)
        for name, value in options.items()
        for word in ([f"--{name}"] if value is None else [f"--{name}", value])
    ]


def known(script, options):
    """Those of the options that a script has, and those that none has."""
    fields = harness.SCRIPTS[script].Args.__dataclass_fields__
    has = {name for name in options if name.removeprefix("no-").replace("-", "_") in fields} | NO_ARGUMENT
    return {name: value for name, value in options.items() if name in has}


def case(options):
    return " ".join(words_of(options))


def refusal(script, words, capsys):
    """Calls a script with words that it must refuse -> what it says on stderr, without tyro's box and line breaks."""
    module = harness.SCRIPTS[script]
    with pytest.raises(SystemExit) as exit:
        module.main(tyro.cli(module.Args, args=words))
    out, err = capsys.readouterr()
    assert exit.value.code == 2, err
    assert out == "" and "Traceback" not in err
    assert list(Path().iterdir()) == []
    return " ".join(re.sub("[│╭╮╰╯─]", " ", err).split())


@pytest.mark.parametrize(
    "script, change, pattern",
    [(s, change, pattern) for s in harness.SCRIPTS for change, pattern in TABLE if known(s, change) == change],
    ids=lambda value: case(value) if isinstance(value, dict) else None,
)
def test_bad_input_is_refused_with_a_message_that_names_the_argument(script, change, pattern, capsys):
    alone = "resume" in change or "evaluate" in change
    said = refusal(script, words_of(change if alone else known(script, GOOD) | change), capsys)
    said = said.split(" For full helptext")[0]
    assert alone or f"--{next(iter(change))}" in said
    assert re.search(pattern, said), said


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_the_unchanged_arguments_are_accepted(script):
    module = harness.SCRIPTS[script]
    module.main(tyro.cli(module.Args, args=words_of(known(script, GOOD))))


@pytest.mark.parametrize("script", harness.scripts_with("ReviewGate"))
def test_without_growth_and_pruning_any_growth_interval_will_do(script):
    module = harness.SCRIPTS[script]
    for interval in (51, 10_000):
        words = words_of(GOOD | {"growth-interval": interval, "no-grow": None, "no-prune": None})
        assert tyro.cli(module.Args, args=words).growth_interval == interval


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_whole_numbers_may_stand_for_others(script):
    args = harness.short_args(script, exploration_noise=0, policy_noise=0, omega=0)
    assert args.exploration_noise == 0


@pytest.mark.parametrize("name", ["checkpoint.pt", "args.json"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_folder_with_damaged_files_is_refused_in_one_line(script, name, capsys):
    module = harness.SCRIPTS[script]
    folder = module.main(harness.short_args(script, total_timesteps=400))
    capsys.readouterr()
    (folder / name).write_bytes((folder / name).read_bytes()[:50])
    for option in ("resume", "evaluate"):
        with pytest.raises(SystemExit) as exit:
            module.main(module.Args(**{option: str(folder)}))
        assert exit.value.code == 2
        assert re.fullmatch(f"error: --{option} .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_checkpoint_of_other_arguments_or_of_another_script_is_refused(script, capsys):
    module = harness.SCRIPTS[script]
    folder = module.main(harness.short_args(script, total_timesteps=400))
    args = json.loads((folder / "args.json").read_text())
    (folder / "args.json").write_text(json.dumps(args | {"gamma": 0.5}, indent=2))
    other = harness.SCRIPTS["td3_continuous" if script != "td3_continuous" else "layer_norm_td3_continuous"]
    foreign = other.main(harness.short_args(other.__name__, total_timesteps=400))
    for run in (folder, foreign):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            module.main(module.Args(resume=str(run)))
        assert exit.value.code == 2
        assert re.fullmatch("error: --resume .*\n", capsys.readouterr().err)
