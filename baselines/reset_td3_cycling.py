"""Resets (Nikishin, Schwarzer, D'Oro, Bacon, Courville; ICML 2022; arXiv 2205.07802) on TD3, over a cycle of tasks.

Every `reset_interval` environment steps actor, critics, their targets and their optimizers start afresh, or their
last layers do; the replay buffer stays.

One agent meets the tasks of a cycle in sequence, and the sequence again (section 10). Everything goes on from task
to task but the replay buffer, which starts empty.

    python baselines/reset_td3_cycling.py

The lines between `# --- Reset: ... ---` and `# --- end Reset ---` are the method's own; without them the file is
td3_cycling.py.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "numpy==2.4.6",
#     "gymnasium[classic-control]==1.4.0",
#     "mujoco==3.17.0",
#     "dm_control==1.0.50; python_version < '3.13'",
#     "shimmy==2.0.1; python_version < '3.13'",
#     "imageio==2.38.1",
#     "matplotlib==3.11.2",
#     "moviepy==2.2.1",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import copy
import csv
import ctypes
import dataclasses
import difflib
import gc
import importlib.util
import json
import logging
import math
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ===== The run =====
    env_ids: tuple[str, ...] = ("HalfCheetah-v4", "Humanoid-v4", "Ant-v4", "Hopper-v4")
    """tasks of the cycle, in order: Gymnasium ids, or dm_control/<domain>-<task>-v0"""
    cycles: int = 2
    """how often the cycle is run through"""
    task_steps: int = 500_000
    """environment steps of each visit to a task"""
    seed: int = 1
    """seed of everything random in the run"""
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads of PyTorch; results are repeatable for the same number"""
    eval_interval: int = 10_000
    """environment steps of a visit between evaluations on its task; 0: only at its end, on all tasks"""
    eval_episodes: int = 10
    """episodes of an evaluation, in training and with --evaluate"""
    checkpoint_interval: int = 50_000
    """environment steps between checkpoints, each written at the next episode end; 0: only on SIGINT and SIGTERM"""
    capture_video: bool = False
    """write videos of training episodes (or of --evaluate) into the run folder's videos/"""
    track: bool = False
    """send the logs to Weights & Biases too"""
    wandb_project_name: str = "neuroplastic-expansion"
    """project on Weights & Biases, with --track"""
    wandb_entity: str | None = None
    """user or team on Weights & Biases, with --track"""
    resume: str | None = None
    """go on with the run in this folder, with the arguments that it was started with; takes no other argument"""
    evaluate: str | None = None
    """play the agent saved in this run folder instead of training"""

    # ===== TD3 =====
    learning_rate: float = 3e-4
    """Adam's learning rate, actor and critics"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """share of the online network that enters its target at an update"""
    batch_size: int = 256
    """transitions of one gradient step"""
    policy_noise: float = 0.2
    """standard deviation of the noise on target actions; like the next two, in units of (high - low) / 2"""
    noise_clip: float = 0.5
    """largest absolute noise on a target action"""
    exploration_noise: float = 0.1
    """standard deviation of the noise on the actions taken"""
    learning_starts: int = 25_000
    """environment steps with random actions before learning starts, at each visit to a task"""
    policy_frequency: int = 2
    """critic updates per update of the actor and the targets"""
    hidden_dim: int = 256
    """units of each of the two hidden layers, actor and critics"""
    neuron_interval: int = 1_000
    """gradient steps between two looks at the neurons (sections 5 and 6)"""

    # --- Reset: arguments ---
    # ===== Reset =====
    reset_interval: int = 200_000
    """environment steps of the whole run between two resets, the last one at least as many before the end; 0: none"""
    reset_at_switch: bool = False
    """reset at each switch to another task too"""
    reset_last_layers: int = 3
    """layers of each network that are reset, counted from the last; 3: all of them"""
    # --- end Reset ---

    @property
    def total_timesteps(self):
        """Environment steps of the whole run."""
        return len(self.env_ids) * self.cycles * self.task_steps


# ===== Messages, arguments, process =====


def fail(message, code=2):
    """Ends the process with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def fail_to_render(what, error):
    """Ends the process where OpenGL is missing."""
    sys.unraisablehook = lambda _: None  # a half-made viewer complains when it is deleted
    advice = "if OpenGL is missing: apt-get install libegl1 libgl1; MUJOCO_GL chooses another way to render"
    fail(f"--capture-video: cannot make pictures{what} ({one_line(error)}); {advice}")


def command_line(args):
    """The command that starts a run with these arguments -> str."""
    words = ["python", os.path.relpath(__file__)]
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, tuple | list):
            words += [flag, *map(str, value)]
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def short_run(args):
    """`args` with what does not fit a short run made to fit, as a command -> str."""
    fitting = dataclasses.replace(args, learning_starts=min(args.learning_starts, args.task_steps // 10))
    return command_line(fitting)


def check_args(args):
    """Ends the process with a line that says what to do if an argument makes no sense."""
    positive = "cycles task_steps buffer_size batch_size policy_frequency hidden_dim neuron_interval eval_episodes"
    finite = "policy_noise noise_clip exploration_noise"
    rules = {"env_ids": (len(args.env_ids) >= 1, "names no task; name one or more")}
    rules |= {name: (getattr(args, name) >= 1, "must be at least 1") for name in [*positive.split(), "torch_threads"]}
    rules |= {name: (0 <= getattr(args, name) < math.inf, "must be finite, 0 or more") for name in finite.split()}
    for name in ("eval_interval", "checkpoint_interval", "learning_starts"):
        rules[name] = getattr(args, name) >= 0, "must not be negative"
    rules["seed"] = 0 <= args.seed < 2**31, "must lie in 0 ... 2147483647"
    rules["learning_rate"] = 0 < args.learning_rate < math.inf, "must be finite and above 0"
    rules["gamma"] = 0 <= args.gamma <= 1, "must lie in [0, 1]"
    rules["tau"] = 0 < args.tau <= 1, "must lie in (0, 1]"
    # --- Reset: arguments ---
    rules["reset_interval"] = args.reset_interval >= 0, "must not be negative"
    rules["reset_last_layers"] = 1 <= args.reset_last_layers <= 3, "must be 1, 2 or 3"
    # --- end Reset ---
    check(args, rules)
    fits = args.batch_size <= args.buffer_size
    rules = {"batch_size": (fits, f"more than --buffer-size {args.buffer_size} can hold; lower it or raise that")}
    learns = args.learning_starts < args.task_steps
    advice = "" if learns else f"not below --task-steps {args.task_steps}; this works: {short_run(args)}"
    rules["learning_starts"] = learns, advice
    check(args, rules)
    if args.track and importlib.util.find_spec("wandb") is None:
        fail("--track: the package wandb is missing; install it: pip install wandb")


def check(args, rules):
    """Ends the process at the first broken rule; rules: {argument: (whether it holds, what to do)}."""
    for name, (holds, advice) in rules.items():
        if not holds:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: {advice}")


def check_only(args, argument, allowed):
    """Ends the process if arguments other than the allowed ones are set beside --resume or --evaluate."""
    for field in dataclasses.fields(args):
        if field.name not in (argument, *allowed) and getattr(args, field.name) != field.default:
            fail(f"--{argument} cannot be combined with --{field.name.replace('_', '-')}; leave that out")


def set_process(args):
    """Process settings: threads, arithmetic, memory, rendering, what libraries print."""
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        # glibc gives the 256 kB of an activation back to the system at each free; keep them, page faults are dear
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # so does this, for tasks that pygame draws
    warnings.filterwarnings("ignore", module="gymnasium|glfw|shimmy|dm_control|moviepy|imageio|pygame")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        mujoco = importlib.import_module("mujoco")  # as MUJOCO_GL says, so it may fail
    except Exception as error:
        fail_to_render("", error)
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")


# ===== The task =====


def make_env(env_id, render=False):
    """Makes a task with a flat observation and a flat, bounded action; ends the process if that is not possible."""
    try:
        if env_id.startswith("dm_control/"):
            importlib.import_module("shimmy")  # registers the tasks
        options = {"render_mode": "rgb_array"} if render else {}
        env = gym.make(env_id, disable_env_checker=True, **options)
    except ImportError as error:
        fail(f"--env-ids {env_id}: a package is missing ({one_line(error)}); install it or choose another task")
    except Exception as error:
        known = difflib.get_close_matches(env_id, set(gym.registry) - {env_id}, n=2, cutoff=0.7)
        hint = f"did you mean {', '.join(known)}?" if known else "gymnasium.pprint_registry() prints the known ones"
        problem = (
            "no such task" if isinstance(error, gym.error.UnregisteredEnv) else f"cannot be made: {one_line(error)}"
        )
        fail(f"--env-ids {env_id}: {problem}; {hint}")

    obs_space, action_space = env.observation_space, env.action_space
    for box in obs_space.values() if isinstance(obs_space, gym.spaces.Dict) else [obs_space]:
        if not isinstance(box, gym.spaces.Box):
            fail(f"--env-ids {env_id}: observations must be Boxes, not {obs_space}; choose another task")
        if box.dtype == np.uint8 and len(box.shape) >= 2:
            fail(f"--env-ids {env_id}: observations are images, this script takes vectors; choose a state-based task")
    if not isinstance(action_space, gym.spaces.Box) or not np.issubdtype(action_space.dtype, np.floating):
        fail(f"--env-ids {env_id}: actions must be continuous (a Box), not {action_space}; choose another task")
    if not np.isfinite([action_space.low, action_space.high]).all():
        fail(f"--env-ids {env_id}: actions must be bounded, not {action_space}; choose another task")
    if isinstance(obs_space, gym.spaces.Dict) or len(obs_space.shape) != 1:
        env = gym.wrappers.FlattenObservation(env)
    if len(action_space.shape) != 1:
        flat = gym.spaces.flatten_space(action_space)
        env = gym.wrappers.TransformAction(env, lambda action: action.reshape(action_space.shape), flat)
    if render:
        try:
            env.reset(seed=0)
            env.render()
        except Exception as error:
            fail_to_render(f" of {env_id}", error)
    return env


def one_line(error):
    """An exception's message without line breaks -> str."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def file_name(env_id):
    """A task's id as it stands in names of files and tags -> str."""
    return env_id.replace("/", "-").replace(":", "-")


def pad_box(box, size):
    """A space of vectors with `size` entries: those of `box`, then ones whose bounds are 0 and 0 -> Box."""
    zeros = np.zeros(size - box.shape[0], box.dtype)
    return gym.spaces.Box(np.append(box.low, zeros), np.append(box.high, zeros), dtype=box.dtype)


def make_tasks(env_ids, render=False):
    """Makes the tasks of a cycle, all with observations and actions as large as the largest ones (section 10).

    A smaller observation ends in zeros. Of an action only the task's own entries are sent to it; the bounds of the
    others are 0 and 0, so they are 0 whoever acts.
    """
    envs = [make_env(env_id, render) for env_id in env_ids]
    obs_dim = max(env.observation_space.shape[0] for env in envs)
    action_dim = max(env.action_space.shape[0] for env in envs)

    def pad(env):
        own, zeros = env.action_space.shape[0], np.zeros(obs_dim - env.observation_space.shape[0], np.float32)
        obs_space = pad_box(env.observation_space, obs_dim)
        env = gym.wrappers.TransformObservation(env, lambda obs: np.append(obs, zeros), obs_space)
        return gym.wrappers.TransformAction(env, lambda action: action[:own], pad_box(env.action_space, action_dim))

    return [pad(env) for env in envs]


# ===== Networks (section 1) =====


class QNetwork(nn.Module):
    """Q(s, a): a ReLU network with two hidden layers."""

    def __init__(self, obs_dim, action_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim + action_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, 1)

    def hidden(self, obs, actions):
        """[batch, obs_dim], [batch, action_dim] -> the hidden layers' activations, each [batch, hidden_dim]."""
        h1 = F.relu_(self.fc1(torch.cat([obs, actions], 1)))
        return [h1, F.relu_(self.fc2(h1))]

    def forward(self, obs, actions):
        """[batch, obs_dim], [batch, action_dim] -> [batch]."""
        return self.fc3(self.hidden(obs, actions)[-1]).squeeze(1)


class Actor(nn.Module):
    """pi(s): a ReLU network with two hidden layers, its tanh scaled to the bounds [action_dim] of the actions."""

    def __init__(self, obs_dim, action_low, action_high, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(obs_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, len(action_low))
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (action_low, action_high))
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def hidden(self, obs):
        """[batch, obs_dim] -> the hidden layers' activations, each [batch, hidden_dim]."""
        h1 = F.relu_(self.fc1(obs))
        return [h1, F.relu_(self.fc2(h1))]

    def forward(self, obs):
        """[batch, obs_dim] -> [batch, action_dim]."""
        return torch.tanh(self.fc3(self.hidden(obs)[-1])) * self.action_scale + self.action_bias


@torch.no_grad()
def set_bounds_(actor, space):
    """Scales an actor's tanh to the bounds of a task's padded actions (section 10)."""
    low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (space.low, space.high))
    actor.action_scale.copy_((high - low) / 2)
    actor.action_bias.copy_((high + low) / 2)


def dormant_scores(h):
    """Each neuron's mean |activation| over its layer's (Sokar et al. 2023): [batch, n] -> [n]; zeros if h is all 0."""
    mean_activation = h.abs().mean(0)
    return mean_activation / mean_activation.mean().clamp(min=torch.finfo(h.dtype).tiny)


# --- Reset: when (Nikishin et al. 2022), and at switches if asked for ---
def reset_steps(args):
    """Environment steps after which there is a reset, none of them just before the run's end -> sorted list."""
    total, interval = args.total_timesteps, args.reset_interval
    steps = set(range(interval, total - interval + 1, interval)) if interval else set()
    return sorted(steps | set(range(args.task_steps, total, args.task_steps) if args.reset_at_switch else []))


# --- end Reset ---
# --- Reset: a network, its target and its optimizer start afresh (Nikishin et al. 2022) ---
@torch.no_grad()
def reset_(network, target, optimizer, last_layers):
    """Draws the last layers of a network anew, copies them to its target, and empties the optimizer's state of them."""
    for layer, target_layer in list(zip(network.children(), target.children(), strict=True))[-last_layers:]:
        layer.reset_parameters()
        target_layer.load_state_dict(layer.state_dict())
        for parameter in layer.parameters():
            for value in optimizer.state.get(parameter, {}).values():
                value.zero_()  # both moments and the step count


# --- end Reset ---
# ===== Looking at the neurons (section 6) =====


def inputs(batch):
    """What each network sees of a batch -> {network's name: tuple of tensors}."""
    return {"actor": (batch.obs,), "qf1": (batch.obs, batch.actions), "qf2": (batch.obs, batch.actions)}


@torch.no_grad()
def neuron_statistics(hidden):
    """Shares of all hidden neurons: list of [batch, n_l] -> the values logged under neurons/<net>/."""
    scores = torch.cat([dormant_scores(h) for h in hidden])
    firing = torch.cat([(h > 0).float().mean(0) for h in hidden])
    return {
        "dormant_ratio_0": float((scores <= 0).float().mean()),
        "dormant_ratio_0.1": float((scores <= 0.1).float().mean()),
        "fau": float(firing.mean()),
    }


# ===== Replay buffer =====


class Batch(NamedTuple):
    obs: torch.Tensor  # [batch, obs_dim]
    actions: torch.Tensor  # [batch, action_dim]
    reward: torch.Tensor  # [batch]
    next_obs: torch.Tensor  # [batch, obs_dim]
    terminated: torch.Tensor  # [batch], 1 where the task ended there, 0 also where it was only cut off


class ReplayBuffer:
    """The last `capacity` transitions, each one float32 row in main memory; batches go to `device`."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        self.capacity, self.device = capacity, device
        self.widths = [obs_dim, action_dim, 1, obs_dim, 1]
        self.rows = torch.empty(capacity, sum(self.widths))
        self.columns = np.split(self.rows.numpy(), np.cumsum(self.widths)[:-1], axis=1)
        self.size = self.position = 0

    def __len__(self):
        return self.size

    def add(self, obs, actions, reward, next_obs, terminated):
        """Stores a transition, in place of the oldest one if the buffer is full."""
        for column, value in zip(self.columns, (obs, actions, reward, next_obs, terminated), strict=True):
            column[self.position] = value
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)

    def sample(self, batch_size, generator=None):
        """Draws transitions uniformly, with replacement, from all or from a share of them, the oldest -> Batch."""
        among = self.size
        age = torch.randint(among, (batch_size,), generator=generator)
        start = self.position if self.size == self.capacity else 0  # where the oldest one lies
        rows = self.rows.index_select(0, (start + age) % self.capacity).to(self.device)
        obs, actions, reward, next_obs, terminated = rows.split(self.widths, 1)
        return Batch(obs, actions, reward.squeeze(1), next_obs, terminated.squeeze(1))

    def save(self, path):
        """Writes the rows to a file, straight from the buffer."""
        with open(path, "wb") as file:
            self.rows[: self.size].numpy().tofile(file)
            os.fsync(file.fileno())

    def load(self, path, size, position):
        """Reads back what `save` wrote, straight into the buffer; OSError if the file is missing or cut short."""
        with open(path, "rb") as file:
            content = memoryview(self.rows[:size].numpy()).cast("B")
            if file.readinto(content) != len(content) or file.read(1):
                raise OSError(f"{path} is damaged")
        self.size, self.position = size, position


# ===== Acting and evaluation =====


def to_task(action, space):
    """An action as the task takes it, clipped to its bounds: tensor [action_dim] -> array."""
    return np.clip(action.cpu().numpy().astype(space.dtype), space.low, space.high)


@torch.no_grad()
def evaluate(actor, env, episodes, seed):
    """Returns of episodes without noise -> list of floats. The seed alone decides where the episodes start."""
    device, returns = actor.action_scale.device, []
    seeds = torch.randint(2**31 - 1, (episodes,), generator=torch.Generator().manual_seed(seed + 1000)).tolist()
    for episode_seed in seeds:
        obs, _ = env.reset(seed=episode_seed)
        episodic_return, done = 0.0, False
        while not done:
            action = actor(torch.as_tensor(obs, dtype=torch.float32, device=device)[None])[0]
            obs, reward, terminated, truncated, _ = env.step(to_task(action, env.action_space))
            episodic_return += float(reward)
            done = terminated or truncated
        returns.append(episodic_return)
    return returns


class RandomPolicy:
    """Acts uniformly at random, in the place of an actor, for `evaluate`."""

    def __init__(self, space, seed):
        low, high = (torch.as_tensor(bound, dtype=torch.float32) for bound in (space.low, space.high))
        self.action_scale, self.action_bias = (high - low) / 2, (high + low) / 2
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, obs):
        """[batch, obs_dim] -> [batch, action_dim]."""
        uniform = 2 * torch.rand(len(obs), len(self.action_scale), generator=self.generator) - 1
        return uniform * self.action_scale + self.action_bias


def evaluate_run(args):
    """Plays the agent of the run folder args.evaluate on each of its tasks and prints its returns -> the folder."""
    check_only(args, "evaluate", ("eval_episodes", "capture_video", "cuda", "torch_threads"))
    folder = Path(args.evaluate)
    run_args = load_args(folder, "evaluate")
    path = folder / "model.pt" if (folder / "model.pt").exists() else folder / "checkpoint.pt"
    if not path.exists():
        fail(f"--evaluate {folder}: no model.pt and no checkpoint.pt there yet")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    envs = make_tasks(run_args.env_ids, render=args.capture_video)
    obs_dim, space = envs[0].observation_space.shape[0], envs[0].action_space
    actor = Actor(obs_dim, space.low, space.high, run_args.hidden_dim).to(device)
    try:
        actor.load_state_dict(load(path, "evaluate")["actor"])
    except (KeyError, TypeError, RuntimeError):
        fail(f"--evaluate {path}: not an agent of this script and task")
    for env_id, env in zip(run_args.env_ids, envs, strict=True):
        if args.capture_video:
            name = f"evaluate-{file_name(env_id)}-{time.strftime('%Y%m%d-%H%M%S')}"
            env = gym.wrappers.RecordVideo(env, str(folder / "videos"), lambda episode: True, name_prefix=name)
        set_bounds_(actor, env.action_space)
        returns = evaluate(actor, env, args.eval_episodes, run_args.seed)
        env.close()
        print(f"{env_id}: mean return {np.mean(returns):.2f}, std {np.std(returns):.2f}, {len(returns)} episodes")
    return folder


# ===== What the cycle shows (section 10) =====


def summarise(args, curves, matrix):
    """The three summary numbers of a complete run -> (relearning, final, retention), arrays; nan: undefined.

    curves: {tag: list of (step, value)}; matrix: mean returns on each task, of a random policy and then after each
    visit. relearning [cycles - 1, tasks]: area under a later visit's evaluation curve minus the first visit's;
    final [tasks]: return at the end of the last visit; retention [visits, tasks]: return on a task visited before,
    minus a random policy's. The first and the last are divided by (the task's best evaluation - a random policy's).
    """
    tasks, random, after = len(args.env_ids), np.array(matrix[0]), np.array(matrix[1:])
    best, areas = after.max(0), []
    for visit in range(len(after)):
        points = [
            (step, value) for step, value in curves["eval/episodic_return"] if (step - 1) // args.task_steps == visit
        ]
        steps, values = np.array(points).T
        best[visit % tasks] = max(best[visit % tasks], values.max())
        # the curve's mean height, by trapezoids from its first evaluation to its last
        areas.append(np.trapezoid(values, steps) / (steps[-1] - steps[0]) if len(steps) > 1 else values[0])
    gain = np.where(best > random, best - random, np.nan)  # nan: never better than random
    areas = np.reshape(areas, (args.cycles, tasks))
    visit, task = np.indices(after.shape)
    retention = np.where((visit > task) & (visit % tasks != task), (after - random) / gain, np.nan)
    return (areas[1:] - areas[0]) / gain, np.diagonal(after[-tasks:]), retention


def print_summary(args, curves, matrix):
    """Prints the three summary numbers, and what they are made of."""
    relearning, final, retention = summarise(args, curves, matrix)

    def mean(values):
        return f"{np.nanmean(values):+.2f}" if np.isfinite(values).any() else "undefined"

    def by_task(texts):
        return ", ".join(f"{env_id} {text}" for env_id, text in zip(args.env_ids, texts, strict=True))

    print(f"relearning    {mean(relearning)} ({by_task(map(mean, relearning.T))})")
    print(f"final return  {by_task(f'{value:.1f}' for value in final)}")
    print(f"retention     {mean(retention)} ({by_task(map(mean, retention.T))})")


def write_matrix(path, args, matrix):
    """Writes the mean returns of a random policy and after each visit, a row each, on each task, a column each."""
    with open(f"{path}.tmp", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "cycle", "task", *args.env_ids])
        for visit, returns in enumerate(matrix, start=-1):
            cycle, task = divmod(visit, len(args.env_ids))
            name = "random policy" if visit < 0 else args.env_ids[task]
            rows.writerow([(visit + 1) * args.task_steps, cycle + 1, name, *returns])
    os.replace(f"{path}.tmp", path)


def draw(path, args, curves, matrix):
    """Draws the learning curve of each visit, dormant ratio, density if logged, and the returns after each visit."""
    tasks, visits = len(args.env_ids), len(matrix) - 1
    columns = max(tasks, 3)
    figure = Figure(figsize=(4 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns)
    for axis, env_id, random in zip(axes[0], args.env_ids, matrix[0], strict=False):
        axis.axhline(random, color="grey", linestyle="--", label="random policy")
        axis.set(title=env_id, xlabel="environment steps of the visit", ylabel="evaluation return")
    for visit in range(visits):
        cycle, task = divmod(visit, tasks)
        start, end = visit * args.task_steps, (visit + 1) * args.task_steps
        points = [(step - start, value) for step, value in curves["eval/episodic_return"] if start < step <= end]
        axes[0][task].plot(*zip(*points, strict=True), marker=".", label=f"cycle {cycle + 1}")
    for axis, name, label in (
        (axes[1][0], "dormant_ratio_0.1", "dormant ratio (tau = 0.1)"),
        (axes[1][1], "density", "density"),
    ):
        for net in ("actor", "qf1", "qf2"):
            if points := curves.get(f"neurons/{net}/{name}"):
                axis.plot(*zip(*points, strict=True), label=net)
        for visit in range(visits):
            axis.axvline(visit * args.task_steps, color="lightgrey", zorder=0)
        axis.set(xlabel="environment steps of the run", ylabel=label)
    returns = np.array(matrix)
    spread = np.maximum(returns.max(0) - returns.min(0), 1e-12)
    axes[1][2].imshow((returns - returns.min(0)) / spread, aspect="auto", cmap="Greens", vmax=1.5)
    for (row, column), value in np.ndenumerate(returns):
        axes[1][2].text(column, row, f"{value:.0f}", ha="center", va="center")
    axes[1][2].set_xticks(range(tasks), args.env_ids, rotation=20)
    names = ["random policy", *(f"{args.env_ids[visit % tasks]}, {visit // tasks + 1}" for visit in range(visits))]
    axes[1][2].set_yticks(range(visits + 1), names)
    axes[1][2].set(xlabel="return on", ylabel="after task, cycle")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
        elif axis is not axes[1][2]:
            axis.set_visible(False)
    figure.savefig(f"{path}.tmp", format="png", dpi=80)
    os.replace(f"{path}.tmp", path)


# ===== Checkpoints =====


def new_run_folder(args):
    """Makes the folder of a new run, with args.json in it -> its path."""
    name = "+".join(map(file_name, args.env_ids))[:150]
    stem = folder = Path("runs") / f"{name}__{Path(__file__).stem}__{args.seed}__{int(time.time())}"
    copies = 0
    while True:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run started in the same second
            copies += 1
            folder = stem.with_name(f"{stem.name}-{copies}")
    (folder / "args.tmp").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
    os.replace(folder / "args.tmp", folder / "args.json")
    return folder


def load_args(folder, argument):
    """The arguments that a run was started with -> Args."""
    if not folder.is_dir():
        fail(f"--{argument} {folder}: no such run folder")
    try:
        values = json.loads((folder / "args.json").read_text())
        named = folder.resolve().name.split("__")  # task, script, seed, time, unless the user renamed it
        foreign = len(named) == 4 and named[1] != Path(__file__).stem
        if foreign or set(values) != {field.name for field in dataclasses.fields(Args)}:
            fail(f"--{argument} {folder}: a run of another script, not of {Path(__file__).name}; use that one")
    except (OSError, ValueError, TypeError):
        fail(f"--{argument} {folder}: no readable args.json there; this is not a run folder")
    return Args(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def save(contents, path):
    """Writes a file whole or not at all."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(contents, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.tmp", path)


def load(path, argument):
    """Reads what `save` wrote, without executing anything in it."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:
        fail(f"--{argument} {path}: damaged, or not written by this script")


def save_checkpoint(folder, state, rb):
    """Writes the replay buffer to a file of its own, then the checkpoint that names it, then drops the file before."""
    rb.save(folder / state["buffer"])
    save(state, folder / "checkpoint.pt")
    remove_buffers(folder, keep=state["buffer"])


def remove_buffers(folder, keep=None):
    """Deletes a run's saved buffers, except the one that its checkpoint names."""
    for path in folder.glob("buffer-*.bin"):
        if path.name != keep:
            path.unlink()


def cut_events(folder, sizes):
    """Cuts what was logged after a checkpoint; sizes: bytes of each event file at the checkpoint."""
    for path in folder.glob("events.out.tfevents.*"):
        if path.name in sizes:
            os.truncate(path, sizes[path.name])
        else:
            path.unlink()


@torch.no_grad()
def adam_step_(optimizer):
    """What `optimizer.step()` of a fused Adam does, without its bookkeeping, which takes longer than the update."""
    group = optimizer.param_groups[0]
    if len(optimizer.state) < len(group["params"]):  # its first step, which makes its state
        return optimizer.step()
    state = [optimizer.state[parameter] for parameter in group["params"]]
    moments = [[s[name] for s in state] for name in ("exp_avg", "exp_avg_sq")]
    steps, betas = [s["step"] for s in state], dict(zip(("beta1", "beta2"), group["betas"], strict=True))
    torch._foreach_add_(steps, 1)
    options = {name: group[name] for name in ("lr", "weight_decay", "eps", "amsgrad", "maximize")}
    torch._fused_adam_(group["params"], [p.grad for p in group["params"]], *moments, [], steps, **betas, **options)


# ===== Training =====


def main(args):
    """Trains, or plays with --evaluate -> the run's folder."""
    if args.evaluate is not None:
        set_process(args)
        return evaluate_run(args)
    folder = checkpoint = None
    if args.resume is not None:
        check_only(args, "resume", ())
        folder, args = Path(args.resume), load_args(Path(args.resume), "resume")
        if (folder / "model.pt").exists():
            remove_buffers(folder)
            fail(f"--resume {folder}: this run is finished; play its agent with --evaluate {folder}")
        if (folder / "checkpoint.pt").exists():
            checkpoint = load(folder / "checkpoint.pt", "resume")
            if not isinstance(checkpoint, dict) or checkpoint.get("script") != Path(__file__).stem:
                fail(f"--resume {folder}: its checkpoint.pt is not of {Path(__file__).name}")
    check_args(args)
    set_process(args)

    # a first SIGINT or SIGTERM lets the episode end and writes a checkpoint, a second one leaves at once
    stop, handlers = [], {}

    def on_signal(number, frame):
        stop.append(number)
        for name in handlers:
            signal.signal(name, signal.SIG_DFL)
        os.write(2, b"\nstopping at the end of this episode; once more to leave at once\n")

    if threading.current_thread() is threading.main_thread():
        handlers = {name: signal.signal(name, on_signal) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train(args, folder, checkpoint, stop)
    finally:
        gc.unfreeze()
        for name, handler in handlers.items():
            signal.signal(name, handler)


def train(args, folder, checkpoint, stop):
    """A run from its start, or from a checkpoint; ends after an episode if `stop` is not empty -> the run's folder."""
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.manual_seed(args.seed)
    generators = {"run": torch.default_generator, "log": torch.Generator().manual_seed(args.seed + 1)}
    if device.type == "cuda":
        generators["cuda"] = torch.cuda.default_generators[torch.cuda.current_device()]
    envs, eval_envs = make_tasks(args.env_ids, render=args.capture_video), make_tasks(args.env_ids)
    names, space = [file_name(env_id) for env_id in args.env_ids], envs[0].action_space
    obs_dim, action_dim = envs[0].observation_space.shape[0], space.shape[0]

    actor = Actor(obs_dim, space.low, space.high, args.hidden_dim).to(device)
    qf1 = QNetwork(obs_dim, action_dim, args.hidden_dim).to(device)
    qf2 = QNetwork(obs_dim, action_dim, args.hidden_dim).to(device)
    networks = {"actor": actor, "qf1": qf1, "qf2": qf2}
    target_actor, qf1_target, qf2_target = (copy.deepcopy(net).requires_grad_(False) for net in (actor, qf1, qf2))
    models = networks | {"target_actor": target_actor, "qf1_target": qf1_target, "qf2_target": qf2_target}
    actor_parameters = list(actor.parameters())
    qf_parameters = list(qf1.parameters()) + list(qf2.parameters())
    parameters = actor_parameters + qf_parameters
    target_parameters = [p for net in (target_actor, qf1_target, qf2_target) for p in net.parameters()]
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    q_optimizer = torch.optim.Adam(qf_parameters, lr=args.learning_rate, fused=True)
    trained = models | {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}
    capacity = min(args.buffer_size, args.task_steps)  # a visit stores no more
    try:
        rb = ReplayBuffer(capacity, obs_dim, action_dim, device)
    except RuntimeError:
        gigabytes = capacity * (2 * obs_dim + action_dim + 2) * 4 / 1e9
        fail(f"--buffer-size {args.buffer_size}: needs {gigabytes:.1f} GB, more than there is; choose a smaller one")
    start_step, actor_loss = 0, None
    curves, matrix = {}, []  # what the picture shows; mean returns of a random policy and after each visit

    if checkpoint:
        try:
            for name, part in trained.items():
                part.load_state_dict(checkpoint[name])
            rb.load(folder / checkpoint["buffer"], checkpoint["buffer_size"], checkpoint["buffer_position"])
            for name in generators.keys() & checkpoint["generators"].keys():  # "cuda" may be new on this machine
                generators[name].set_state(checkpoint["generators"][name])
            start_step, actor_loss = checkpoint["global_step"], checkpoint["actor_loss"]
            curves, matrix = checkpoint["curves"], checkpoint["matrix"]
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            fail(f"--resume {folder}: its checkpoint is damaged or not of this task ({one_line(error)})")
    folder = folder or new_run_folder(args)
    remove_buffers(folder, keep=checkpoint["buffer"] if checkpoint else None)
    cut_events(folder, checkpoint["events"] if checkpoint else {})
    if args.capture_video:
        prefix = f"train-from-{start_step}"
        record = [(env, f"{prefix}-{task}-{name}") for task, (env, name) in enumerate(zip(envs, names, strict=True))]
        envs = [gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=name) for env, name in record]
    if args.track:
        options = {"id": folder.name, "name": folder.name, "resume": "allow", "config": dataclasses.asdict(args)}
        wandb = importlib.import_module("wandb")
        wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, sync_tensorboard=True, **options)
    writer = SummaryWriter(folder)
    if not checkpoint:
        table = "".join(f"|{name}|{value}|\n" for name, value in dataclasses.asdict(args).items())
        writer.add_text("hyperparameters", "|argument|value|\n|-|-|\n" + table)

    def log(group, values):
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, global_step)
            if (group, name) == ("eval", "episodic_return") or name in ("dormant_ratio_0.1", "density"):
                curves.setdefault(f"{group}/{name}", []).append((global_step, float(value)))

    def check_finite(tensors):
        if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
            bar.close()
            kept = f"the last good one is {folder}/checkpoint.pt" if checkpoint_step else "none was written before"
            fail(
                f"step {global_step}: a loss or a parameter is not finite; stopped without a checkpoint, {kept}", code=1
            )

    def state():
        """All that it takes to go on from here, at the end of an episode."""
        check_finite(parameters)
        writer.flush()
        return {name: part.state_dict() for name, part in trained.items()} | {
            "script": Path(__file__).stem,
            "global_step": global_step,
            "actor_loss": actor_loss,
            "curves": curves,
            "matrix": matrix,
            "generators": {name: generator.get_state() for name, generator in generators.items()},
            "buffer": f"buffer-{global_step}.bin",
            "buffer_size": rb.size,
            "buffer_position": rb.position,
            "events": {path.name: path.stat().st_size for path in folder.glob("events.out.tfevents.*")},
        }

    # --- Reset: when ---
    resets = reset_steps(args)
    # --- end Reset ---
    checkpoint_step, start_time, new_episode = start_step, time.time(), True
    if not matrix:
        policies = [RandomPolicy(env.action_space, args.seed) for env in eval_envs]
        returns = [
            evaluate(policy, env, args.eval_episodes, args.seed)
            for policy, env in zip(policies, eval_envs, strict=True)
        ]
        matrix.append([float(np.mean(of_task)) for of_task in returns])
    write_matrix(folder / "cycle.csv", args, matrix)
    gc.collect()
    gc.freeze()  # spares the garbage collector the many objects of the libraries
    steps = range(start_step + 1, args.total_timesteps + 1)
    bar = tqdm(steps, initial=start_step, total=args.total_timesteps, unit=" steps", mininterval=1, dynamic_ncols=True)
    for global_step in bar:
        # A visit to a task: all carries over from the one before but the buffer, which starts empty (section 10)
        visit, visit_step = (global_step - 1) // args.task_steps, (global_step - 1) % args.task_steps + 1
        if visit_step == 1 or global_step == start_step + 1:
            cycle, task = divmod(visit, len(envs))
            env, space = envs[task], envs[task].action_space
            low, high = (
                torch.as_tensor(bound, dtype=torch.float32, device=device) for bound in (space.low, space.high)
            )
            for network in (actor, target_actor):
                set_bounds_(network, space)
            if visit_step == 1:
                rb.size = rb.position = 0
                log("cycle", {"task": task, "number": cycle + 1})
        ends = visit_step == args.task_steps

        if new_episode:
            obs, _ = env.reset(seed=int(torch.randint(2**31 - 1, ())))
            obs, episodic_return, episodic_length = np.array(obs, dtype=np.float32), 0.0, 0

        # Act: at random before learning starts, then with exploration noise
        with torch.no_grad():
            if visit_step <= args.learning_starts:
                action = low + (high - low) * torch.rand(action_dim, device=device)
            else:
                action = actor(torch.from_numpy(obs).to(device)[None])[0]
                action += args.exploration_noise * actor.action_scale * torch.randn(action_dim, device=device)
        action = to_task(action, space)
        try:
            next_obs, reward, terminated, truncated, _ = env.step(action)
        except Exception:
            check_finite(parameters)  # a task may refuse what a diverged actor does
            raise
        next_obs = np.array(next_obs, dtype=np.float32)
        rb.add(obs, action, reward, next_obs, terminated)  # not `truncated`: the value of a state cut off there counts
        obs, new_episode = next_obs, terminated or truncated or ends  # the end of a visit cuts the episode off
        episodic_return, episodic_length = episodic_return + float(reward), episodic_length + 1

        if visit_step > args.learning_starts:
            t = visit * (args.task_steps - args.learning_starts) + visit_step - args.learning_starts
            batch = rb.sample(args.batch_size)

            # Target policy smoothing, clipped double Q-learning (TD3, algorithm 1)
            with torch.no_grad():
                noise = (args.policy_noise * torch.randn_like(batch.actions)).clamp(-args.noise_clip, args.noise_clip)
                next_actions = (target_actor(batch.next_obs) + noise * actor.action_scale).clamp(low, high)
                qf1_next, qf2_next = qf1_target(batch.next_obs, next_actions), qf2_target(batch.next_obs, next_actions)
                next_values = batch.reward + args.gamma * (1 - batch.terminated) * torch.min(qf1_next, qf2_next)

            qf1_values, qf2_values = qf1(batch.obs, batch.actions), qf2(batch.obs, batch.actions)
            qf1_loss, qf2_loss = F.mse_loss(qf1_values, next_values), F.mse_loss(qf2_values, next_values)
            qf_loss = qf1_loss + qf2_loss
            q_optimizer.zero_grad()
            qf_loss.backward()
            adam_step_(q_optimizer)

            # Delayed updates of the actor and the targets
            if t % args.policy_frequency == 0:
                actor_loss = -qf1(batch.obs, actor(batch.obs)).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)  # no gradient for the critic's parameters
                adam_step_(actor_optimizer)
                actor_loss = actor_loss.detach()
                with torch.no_grad():
                    torch._foreach_lerp_(target_parameters, parameters, args.tau)

            if t % args.neuron_interval == 0:
                for name, sample in inputs(rb.sample(2048, generator=generators["log"])).items():
                    log(f"neurons/{name}", neuron_statistics(networks[name].hidden(*sample)))
            if t % 100 == 0:
                losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf_loss": qf_loss / 2}
                losses |= {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean()}
                losses |= {} if actor_loss is None else {"actor_loss": actor_loss}
                check_finite([*losses.values(), *parameters])
                log("losses", {name: value.item() for name, value in losses.items()})
                log("charts", {"SPS": (global_step - start_step) / (time.time() - start_time)})

        # Evaluate on the task at hand; at the end of a visit on all of them: what has the agent retained?
        if ends or (args.eval_interval and visit_step % args.eval_interval == 0):
            check_finite(parameters)
            means, player = [], copy.deepcopy(actor)
            for number in range(len(envs)) if ends else [task]:
                set_bounds_(player, eval_envs[number].action_space)
                returns = evaluate(player, eval_envs[number], args.eval_episodes, args.seed)
                means.append(float(np.mean(returns)))
                for group in [f"eval/{names[number]}"] + ["eval"] * (number == task):
                    log(group, {"episodic_return": means[-1], "episodic_return_std": np.std(returns)})
            if ends:
                log("cycle", {"task": task, "number": cycle + 1})
                matrix.append(means)
                write_matrix(folder / "cycle.csv", args, matrix)
                draw(folder / "cycle.png", args, curves, matrix)
        # --- Reset: every reset_interval environment steps, and at switches if asked for; the buffer stays ---
        if global_step in resets:
            reset_(actor, target_actor, actor_optimizer, args.reset_last_layers)
            reset_(qf1, qf1_target, q_optimizer, args.reset_last_layers)
            reset_(qf2, qf2_target, q_optimizer, args.reset_last_layers)
            log("reset", {"number": resets.index(global_step) + 1})
        # --- end Reset ---
        if new_episode:
            log("charts", {"episodic_return": episodic_return, "episodic_length": episodic_length})
            log(f"charts/{names[task]}", {"episodic_return": episodic_return})
            shown = {"task": names[task], "return": f"{episodic_return:.1f}"}
            bar.set_postfix(shown, refresh=False)
            interval = args.checkpoint_interval
            due = interval and global_step // interval > checkpoint_step // interval
            if (due or stop) and global_step < args.total_timesteps:
                save_checkpoint(folder, state(), rb)
                checkpoint_step = global_step
                if stop:
                    bar.close()
                    for env in envs:
                        env.close()
                    resume = f"python {os.path.relpath(__file__)} --resume {folder}"
                    print(f"stopped at step {global_step}; go on with: {resume}")
                    sys.exit(128 + stop[0])

    final = state()
    writer.close()
    for env in (*envs, *eval_envs):
        env.close()
    save({name: model.state_dict() for name, model in models.items()}, folder / "model.pt")
    if args.checkpoint_interval:
        save(final, folder / "checkpoint.pt")
    remove_buffers(folder)
    print_summary(args, curves, matrix)
    print(f"finished: {folder}")
    return folder


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
