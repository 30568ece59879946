"""What the tests share: the scripts, how to run them, how to read what they wrote, and toy tasks."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent

# The methods that test_more_methods.py tests, each a diff of plain TD3 (ne_layer_norm: of NE)
MORE = ["weight_decay", "leaky_relu", "spectral_norm", "l2_init", "crelu", "nap", "hare_tortoise", "shrink_perturb"]
MORE = [f"{name}_td3_continuous" for name in [*MORE, "two_hot", "regrama", "ne_layer_norm"]]

# Each family's scripts by name; the first is the parent of the family's other ones, but of those in PARENTS.
FAMILIES = {
    "continuous": [
        "baselines/td3_continuous.py",
        "ne_td3_continuous.py",
        "baselines/reset_td3_continuous.py",
        "baselines/redo_td3_continuous.py",
        "baselines/injection_td3_continuous.py",
        "baselines/layer_norm_td3_continuous.py",
        "baselines/static_sparse_td3_continuous.py",
        "baselines/rigl_td3_continuous.py",
        *(f"baselines/{name}.py" for name in MORE),
    ],
    "cycling": [
        "baselines/td3_cycling.py",
        "ne_td3_cycling.py",
        "baselines/reset_td3_cycling.py",
        "baselines/redo_td3_cycling.py",
        "baselines/injection_td3_cycling.py",
        "baselines/layer_norm_td3_cycling.py",
    ],
    "pixels": [
        "baselines/drq_pixels.py",
        "ne_drq_pixels.py",
        "baselines/reset_drq_pixels.py",
        "baselines/redo_drq_pixels.py",
        "baselines/injection_drq_pixels.py",
        "baselines/layer_norm_drq_pixels.py",
    ],
}
PARENTS = {"baselines/ne_layer_norm_td3_continuous.py": "ne_td3_continuous.py"}
PARENT = {Path(child).stem: Path(parent).stem for child, parent in PARENTS.items()}  # by the names of scripts
# The functions whose rule a variant of NE changes; the shared tests of these rules leave it out.
OTHER_RULES = {}  # for instance {"ne_mine_td3_continuous": {"scheduled_growth"}}
PATHS = {Path(path).stem: ROOT / path for paths in FAMILIES.values() for path in paths}


def load_script(path):
    """Imports a script by its path, under its file name."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MODULES = {name: load_script(path) for name, path in PATHS.items()}
# The shared tests run the continuous scripts. What a cycling script shares with one of them is the same code to the
# letter (test_drift.py), one visit of it is a run of that script to the bit, and the rest is its own (test_cycling.py).
# So it is with those that learn from pixels, but for the runs (test_pixels.py).
SCRIPTS, CYCLING, PIXELS = (
    {Path(path).stem: MODULES[Path(path).stem] for path in paths} for paths in list(FAMILIES.values())[:3]
)
NE = SCRIPTS["ne_td3_continuous"]
TD3 = SCRIPTS["td3_continuous"]


def scripts_with(*names):
    """Names of the scripts that define all of `names`, none by a rule of its own, for pytest.mark.parametrize."""
    defining = [script for script, module in SCRIPTS.items() if all(hasattr(module, name) for name in names)]
    return [script for script in defining if not OTHER_RULES.get(script, set()) & {*names}]


def short_args(script, **changes):
    """Arguments of a run of a second or two -> the script's Args; a cycling one gets one visit to one task."""
    module = MODULES[script]
    values = {
        "env_id": "Pendulum-v1",
        "total_timesteps": 900,
        "learning_starts": 300,
        "batch_size": 16,
        "hidden_dim": 32,
        "eval_interval": 0,
        "neuron_interval": 100,
        "growth_interval": 50,
        "cuda": False,
    }
    fields, values = module.Args.__dataclass_fields__, values | changes
    if "env_ids" in fields:
        values = {"env_ids": (values["env_id"],), "cycles": 1, "task_steps": values["total_timesteps"]} | values
    return module.Args(**{name: value for name, value in values.items() if name in fields})


def flags(args):
    """The command-line words that make the script's Args equal to `args`."""
    words = []
    for name, field in args.__dataclass_fields__.items():
        value, flag = getattr(args, name), "--" + name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag[2:])
        else:
            words += [flag, *map(str, value if isinstance(value, tuple) else [value])]
    return words


def command(script, *words):
    """The command that runs a script as a user would -> list."""
    return [sys.executable, str(PATHS[script]), *map(str, words)]


def run(script, *words, **options):
    """Runs a script as a user would -> subprocess.CompletedProcess with text."""
    environment = os.environ | options.pop("env", {})
    return subprocess.run(
        command(script, *words), capture_output=True, text=True, timeout=900, env=environment, **options
    )


def events(folder):
    """A run's log without what was logged after a checkpoint that it went on from -> {tag: [(step, value), ...]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    log.Reload()
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def saved(path):
    """A file of tensors that a script wrote -> its contents."""
    return torch.load(path, map_location="cpu", weights_only=True)


def weights(folder):
    """The last weights that a run has kept -> {network's name: state dict}."""
    return saved(max((Path(folder) / "models").glob("*.pt"), key=lambda path: int(path.stem)))


def same(a, b):
    """Whether two saved structures are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


class Counter(gym.Env):
    """A toy task whose observation counts the steps of the episode, so that a mistaken observation shows.

    Observation: [episode number, step in the episode]; reward: the first action. Ends after `length` steps, by
    termination or, with `truncate`, by truncation.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)

    def __init__(self, length=5, truncate=False, low=(-1.0,), high=(1.0,)):
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), dtype=np.float32)
        self.length, self.truncate, self.episode = length, truncate, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.step_number = self.episode + 1, 0
        return np.array([self.episode, 0], np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is out of bounds"
        self.step_number += 1
        done = self.step_number == self.length
        obs = np.array([self.episode, self.step_number], np.float32)
        return obs, float(action[0]), done and not self.truncate, done and self.truncate, {}
