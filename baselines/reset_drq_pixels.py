"""Resets (Nikishin, Schwarzer, D'Oro, Bacon, Courville; ICML 2022; arXiv 2205.07802) on DrQ, in one file.

Every `reset_interval` agent steps the heads (actor, critics and their targets) and Adam's moments of them start afresh,
or their last layers do; convolutions, projections, temperature and the replay buffer stay.

    python baselines/reset_drq_pixels.py --env-id dm_control/walker-walk-v0

The lines between `# --- Reset: ... ---` and `# --- end Reset ---` are the
method's own; without them the file is drq_pixels.py.
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
#     "moviepy==2.2.1",
#     "tensorboard==2.21.0",
#     "tqdm==4.70.1",
#     "tyro==1.0.17",
# ]
# ///

import copy
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
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    # ===== The run =====
    env_id: str = "dm_control/walker-walk-v0"
    """task: dm_control/<domain>-<task>-v0"""
    seed: int = 1
    """seed of everything random in the run"""
    total_timesteps: int = 250_000
    """agent steps (decisions of the policy) of the whole run; each is action_repeat frames of the task"""
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads of PyTorch; results are repeatable for the same number"""
    bf16: bool = False
    """multiply in bfloat16 (autocast) where losses are computed; parameters stay float32"""
    buffer_on_gpu: bool = True
    """with a GPU, keep the replay buffer's frames in its memory; --no-buffer-on-gpu: in main memory"""
    eval_interval: int = 10_000
    """agent steps between evaluations; 0: none"""
    eval_episodes: int = 10
    """episodes of an evaluation, in training and with --evaluate"""
    checkpoint_interval: int = 50_000
    """agent steps between checkpoints, each written at the next episode end; 0: only on SIGINT and SIGTERM"""
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

    # ===== DrQ =====
    image_size: int = 84
    """height and width of a frame, in pixels"""
    frame_stack: int = 3
    """frames of an observation, one after each of the last agent steps"""
    action_repeat: int = 2
    """frames of the task for which an action is repeated; rewards are summed"""
    shift: int = 4
    """largest random shift of an observation, in pixels, up, down, left and right; 0: none"""
    target_augmentations: int = 2
    """random shifts that a target is averaged over (K in the paper)"""
    loss_augmentations: int = 2
    """random shifts that the critics' loss is averaged over (M in the paper)"""
    learning_rate: float = 1e-3
    """Adam's learning rate, for everything that learns"""
    buffer_size: int = 100_000
    """transitions that the replay buffer holds"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.01
    """share of the online network that enters its target at an update"""
    batch_size: int = 512
    """transitions of one gradient step"""
    alpha: float = 0.1
    """temperature, the weight of the entropy, at the start; it is learned"""
    learning_starts: int = 1_000
    """agent steps with random actions before learning starts"""
    policy_frequency: int = 2
    """critic updates per update of the actor, the temperature and the targets"""
    feature_dim: int = 50
    """features of an observation that the heads see"""
    hidden_dim: int = 1024
    """units of each of the two hidden layers of a head, actor and critics"""
    neuron_interval: int = 1_000
    """gradient steps between two looks at the neurons (sections 5 and 6)"""

    # --- Reset: arguments ---
    # ===== Reset =====
    reset_interval: int = 100_000
    """agent steps between two resets, the last one at least as many before the end; 0: none"""
    reset_last_layers: int = 3
    """layers of each head that are reset, counted from the last; 3: all of them"""
    # --- end Reset ---


# ===== Messages, arguments, process =====


def fail(message, code=2):
    """Ends the process with one line on stderr."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def fail_to_render(what, error):
    """Ends the process where OpenGL is missing."""
    sys.unraisablehook = lambda _: None  # a half-made viewer complains when it is deleted
    advice = "if OpenGL is missing: apt-get install libegl1 libgl1; MUJOCO_GL chooses another way to render"
    fail(f"cannot make pictures{what} ({one_line(error)}); {advice}")


def command_line(args):
    """The command that starts a run with these arguments -> str."""
    words = ["python", os.path.relpath(__file__)]
    for field in dataclasses.fields(args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def short_run(args):
    """`args` with what does not fit a short run made to fit, as a command -> str."""
    fitting = dataclasses.replace(args, learning_starts=min(args.learning_starts, args.total_timesteps // 10))
    return command_line(fitting)


def check_args(args):
    """Ends the process with a line that says what to do if an argument makes no sense."""
    positive = "total_timesteps buffer_size batch_size policy_frequency hidden_dim neuron_interval eval_episodes"
    positive += " frame_stack action_repeat target_augmentations loss_augmentations feature_dim torch_threads"
    rules = {name: (getattr(args, name) >= 1, "must be at least 1") for name in positive.split()}
    for name in ("eval_interval", "checkpoint_interval", "learning_starts", "shift"):
        rules[name] = getattr(args, name) >= 0, "must not be negative"
    rules["seed"] = 0 <= args.seed < 2**31, "must lie in 0 ... 2147483647"
    for name in ("learning_rate", "alpha"):
        rules[name] = 0 < getattr(args, name) < math.inf, "must be finite and above 0"
    # four convolutions need 15 pixels, and MuJoCo's picture has 480 rows
    rules["image_size"] = 15 <= args.image_size <= 480, "must lie in 15 ... 480"
    rules["gamma"] = 0 <= args.gamma <= 1, "must lie in [0, 1]"
    rules["tau"] = 0 < args.tau <= 1, "must lie in (0, 1]"
    # --- Reset: arguments ---
    rules["reset_interval"] = args.reset_interval >= 0, "must not be negative"
    rules["reset_last_layers"] = 1 <= args.reset_last_layers <= 3, "must be 1, 2 or 3"
    # --- end Reset ---
    check(args, rules)
    fits = args.batch_size <= args.buffer_size
    rules = {"batch_size": (fits, f"more than --buffer-size {args.buffer_size} can hold; lower it or raise that")}
    learns = args.learning_starts < args.total_timesteps
    advice = "" if learns else f"not below --total-timesteps {args.total_timesteps}; this works: {short_run(args)}"
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
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
    warnings.filterwarnings("ignore", module="gymnasium|glfw|shimmy|dm_control|moviepy|imageio|pygame")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        mujoco = importlib.import_module("mujoco")  # as MUJOCO_GL says, so it may fail
    except Exception as error:
        fail_to_render("", error)
    mujoco.set_mju_user_warning(lambda text: None if "deprecated" in text else print(text, file=sys.stderr))


# ===== The task =====


def make_env(env_id, image_size):
    """Makes a DM Control task that can be rendered; ends the process if that is not possible."""
    # the cameras that most work on the suite uses: the first one, of quadruped the one that moves along
    camera = {"height": image_size, "width": image_size, "camera_id": 2 if "/quadruped-" in env_id else 0}
    try:
        importlib.import_module("shimmy")  # registers the tasks
        if not env_id.startswith("dm_control/"):
            raise gym.error.UnregisteredEnv
        env = gym.make(env_id, disable_env_checker=True, render_mode="rgb_array", render_kwargs=camera)
    except ImportError as error:
        fail(f"--env-id {env_id}: a package is missing ({one_line(error)}); install it or choose another task")
    except Exception as error:
        tasks = {name for name in gym.registry if name.startswith("dm_control/")} - {env_id}
        known = difflib.get_close_matches("dm_control/" + env_id.removeprefix("dm_control/"), tasks, n=2, cutoff=0.7)
        hint = f"did you mean {', '.join(known)}?" if known else "dm_control/walker-walk-v0 is one"
        problem = (
            "no such task of DM Control"
            if isinstance(error, gym.error.UnregisteredEnv)
            else f"cannot be made: {one_line(error)}"
        )
        fail(f"--env-id {env_id}: {problem}; {hint}")

    space = env.action_space
    # MuJoCo's largest number, 1e10, is the bound where there is none
    if not isinstance(space, gym.spaces.Box) or not np.abs([space.low, space.high]).max() < 1e10:
        fail(f"--env-id {env_id}: actions must be bounded, not {space}; choose another task")
    try:
        env.reset(seed=0)
        env.render()
    except Exception as error:
        fail_to_render(f" of {env_id}", error)
    return env


def picture(env):
    """What the task looks like now -> uint8 array [3, image_size, image_size]."""
    return np.ascontiguousarray(env.render().transpose(2, 0, 1))


def repeat_action(env, action, times):
    """Takes an action `times` times, or until the episode ends -> (sum of rewards, terminated, truncated).

    An episode that DM Control ends with discount 0 is terminated, one that reached its time limit is truncated.
    """
    total = 0.0
    for _ in range(times):
        _, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            break
    return total, terminated, truncated


def one_line(error):
    """An exception's message without line breaks -> str."""
    return " ".join(str(error).split())[:200] or type(error).__name__


# ===== The eyes: random shift, convolutions, projections =====


def random_shift(images, shift):
    """Pads each image with its own edges and crops it at a place of its own (DrQ, section 3.1).

    images: uint8 [n, channels, height, width] -> the same shape. Pixel y of a crop is pixel y + dy of the image with
    dy in -shift ... shift, or the edge where that is outside; so one indexing does what padding and cropping would.
    """
    n, channels, height, width = images.shape
    dy, dx = torch.randint(-shift, shift + 1, (2, n, 1), device=images.device)
    rows = (torch.arange(height, device=images.device) + dy).clamp(0, height - 1)  # [n, height]
    columns = (torch.arange(width, device=images.device) + dx).clamp(0, width - 1)  # [n, width]
    image = torch.arange(n, device=images.device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, channels, 1, 1)
    return images[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


class Encoder(nn.Module):
    """Four 3x3 convolutions, the first one with stride 2, over a stack of frames."""

    def __init__(self, frame_stack, image_size, channels=32):
        super().__init__()
        self.conv1 = nn.Conv2d(3 * frame_stack, channels, 3, stride=2)
        self.conv2 = nn.Conv2d(channels, channels, 3)
        self.conv3 = nn.Conv2d(channels, channels, 3)
        self.conv4 = nn.Conv2d(channels, channels, 3)
        self.out_dim = channels * ((image_size - 1) // 2 - 6) ** 2

    def forward(self, obs):
        """uint8 [batch, 3 * frame_stack, image_size, image_size] -> [batch, out_dim]."""
        # a GPU convolves faster with the channels last; parameters keep their layout, so checkpoints fit any device
        layout = torch.channels_last if obs.is_cuda else torch.contiguous_format
        h = obs.to(torch.float32, memory_format=layout) / 255
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = F.relu_(conv(h))
        return h.flatten(1)


def make_projection(encoder, feature_dim):
    """From what the convolutions see to a few features in (-1, 1): [batch, out_dim] -> [batch, feature_dim]."""
    return nn.Sequential(nn.Linear(encoder.out_dim, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


# ===== The heads (section 1) =====


class QNetwork(nn.Module):
    """Q(s, a): a ReLU network with two hidden layers, over features of s."""

    def __init__(self, feature_dim, action_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(feature_dim + action_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, 1)

    def hidden(self, features, actions):
        """[batch, feature_dim], [batch, action_dim] -> the hidden layers' activations, each [batch, hidden_dim]."""
        h1 = F.relu_(self.fc1(torch.cat([features, actions], 1)))
        return [h1, F.relu_(self.fc2(h1))]

    def forward(self, features, actions):
        """[batch, feature_dim], [batch, action_dim] -> [batch]."""
        return self.fc3(self.hidden(features, actions)[-1]).squeeze(1).float()


class Actor(nn.Module):
    """pi(a | s): a ReLU network with two hidden layers, over features of s, to a Gaussian that tanh squashes."""

    def __init__(self, feature_dim, action_dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(feature_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, 2 * action_dim)

    def hidden(self, features):
        """[batch, feature_dim] -> the hidden layers' activations, each [batch, hidden_dim]."""
        h1 = F.relu_(self.fc1(features))
        return [h1, F.relu_(self.fc2(h1))]

    def forward(self, features):
        """[batch, feature_dim] -> mean and log std of the Gaussian, side by side: [batch, 2 * action_dim]."""
        mean, log_std = self.fc3(self.hidden(features)[-1]).float().chunk(2, 1)
        return torch.cat([mean, -10 + 6 * (torch.tanh(log_std) + 1)], 1)  # log std in [-10, 2]

    def sample(self, features):
        """Draws actions: [batch, feature_dim] -> actions in (-1, 1) [batch, action_dim], their log density [batch]."""
        mean, log_std = self(features).chunk(2, 1)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        log_gaussian = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        log_slope = 2 * (math.log(2) - before - F.softplus(-2 * before))  # log of 1 - tanh(before)^2, stably
        return torch.tanh(before), (log_gaussian - log_slope).sum(1)

    def greedy(self, features):
        """The squashed mean: [batch, feature_dim] -> [batch, action_dim]."""
        return torch.tanh(self(features).chunk(2, 1)[0])


def dormant_scores(h):
    """Each neuron's mean |activation| over its layer's (Sokar et al. 2023): [batch, n] -> [n]; zeros if h is all 0."""
    mean_activation = h.abs().mean(0)
    return mean_activation / mean_activation.mean().clamp(min=torch.finfo(h.dtype).tiny)


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


@torch.no_grad()
def inputs(batch, encoder, critic_projection, actor_projection):
    """What each head sees of a batch, which is not augmented -> {head's name: tuple of tensors}."""
    seen = [encoder(chunk) for chunk in batch.obs.split(256)]  # in chunks, for activations of 2048 images take GBs
    features = torch.cat([critic_projection(chunk) for chunk in seen])
    critics = features, batch.actions
    return {"actor": (torch.cat([actor_projection(chunk) for chunk in seen]),), "qf1": critics, "qf2": critics}


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
    obs: torch.Tensor  # uint8 [batch, 3 * frame_stack, image_size, image_size], the oldest frame first
    actions: torch.Tensor  # [batch, action_dim], in [-1, 1]
    reward: torch.Tensor  # [batch]
    next_obs: torch.Tensor  # as obs
    terminated: torch.Tensor  # [batch], 1 where the task ended there, 0 also where it was only cut off


class ReplayBuffer:
    """The last `capacity` transitions. Each frame is stored once, stacks are built when they are drawn.

    Frames are numbered from 0 as they come; number n lies at n modulo the length of `frames`. An episode has a frame
    more than transitions, so there is room for an eighth more frames than transitions; of shorter episodes than eight
    steps the buffer holds fewer than `capacity` transitions. `frames` is on frames_device, batches go to `device`.
    """

    def __init__(self, capacity, image_size, frame_stack, action_dim, device, frames_device=None):
        self.capacity, self.frame_stack, self.device = capacity, frame_stack, device
        slots = frame_slots(capacity, frame_stack)
        self.frames = torch.empty(slots, 3, image_size, image_size, dtype=torch.uint8, device=frames_device or device)
        self.rows = torch.zeros(capacity, action_dim + 2)  # action, reward, terminated
        self.spans = torch.zeros(capacity, 2, dtype=torch.int64)  # numbers of the stack's oldest and newest frame
        self.size = self.position = self.frame_count = self.episode_start = 0

    def __len__(self):
        return self.size

    def start(self, frame):
        """Begins an episode with its first frame, uint8 [3, image_size, image_size]."""
        self.episode_start = self.frame_count
        self.add_frame(frame)

    def add(self, action, reward, next_frame, terminated):
        """Stores what followed the newest frame, in place of the oldest transition if the buffer is full."""
        newest = self.frame_count - 1
        self.rows[self.position] = torch.cat([action, torch.tensor([float(reward), float(terminated)])])
        self.spans[self.position, 0] = max(self.episode_start, newest - self.frame_stack + 1)
        self.spans[self.position, 1] = newest
        self.position = (self.position + 1) % self.capacity
        self.size = min(self.size + 1, self.capacity)
        self.add_frame(next_frame)

    def add_frame(self, frame):
        """Stores a frame, and drops the transitions whose oldest frame it overwrites."""
        self.frames[self.frame_count % len(self.frames)] = torch.from_numpy(frame)
        self.frame_count += 1
        while self.size and self.spans[self.position - self.size, 0] < self.frame_count - len(self.frames):
            self.size -= 1

    def sample(self, batch_size, generator=None):
        """Draws transitions uniformly, with replacement, from all or from a share of them, the oldest -> Batch."""
        among = self.size
        age = torch.randint(among, (batch_size,), generator=generator)
        index = (self.position - self.size + age) % self.capacity
        # obs and next_obs overlap: the newest frame of obs, the one after it and those before it make both; in place of
        # what would lie before the episode stands its first frame
        first, newest = self.spans[index].split(1, 1)
        numbers = (newest + torch.arange(1 - self.frame_stack, 2)).maximum(first)  # [batch, frame_stack + 1]
        slots = (numbers % len(self.frames)).flatten().to(self.frames.device)
        frames = self.frames.index_select(0, slots).to(self.device).view(batch_size, -1, *self.frames.shape[2:])
        rows = self.rows[index].to(self.device)
        return Batch(frames[:, :-3], rows[:, :-2], rows[:, -2], frames[:, 3:], rows[:, -1])

    def parts(self):
        """All that the buffer holds, in pieces -> list of tensors."""
        return [self.rows, self.spans, *self.frames[: self.frame_count].split(1000)]

    def save(self, path):
        """Writes rows and frames to a file, piece by piece."""
        with open(path, "wb") as file:
            for part in self.parts():
                part.cpu().numpy().tofile(file)
            os.fsync(file.fileno())

    def load(self, path, size, position, frame_count):
        """Reads back what `save` wrote; OSError if the file is missing, cut short or too long."""
        self.size, self.position, self.frame_count = size, position, frame_count
        with open(path, "rb") as file:
            for part in self.parts():
                content = torch.empty(part.shape, dtype=part.dtype)
                view = memoryview(content.numpy()).cast("B")
                if file.readinto(view) != len(view):
                    raise OSError(f"{path} is damaged")
                part.copy_(content)
            if file.read(1):
                raise OSError(f"{path} is damaged")


def frame_slots(capacity, frame_stack):
    """Frames that a buffer of `capacity` transitions has room for -> int."""
    return capacity + capacity // 8 + frame_stack + 1


def check_memory(args, action_dim, device):
    """Ends the process if the full buffer would not fit; without a look, that would show hours later."""
    frames = frame_slots(args.buffer_size, args.frame_stack) * 3 * args.image_size**2
    rows = args.buffer_size * (4 * (action_dim + 2) + 16)
    free = free_memory(device)
    if frames + rows > free:
        needed = f"needs {(frames + rows) / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
        place = " on the GPU" if device.type == "cuda" else ""
        remedy = " or --no-buffer-on-gpu" if device.type == "cuda" else " or a smaller --image-size"
        fail(f"--buffer-size {args.buffer_size}: {needed}{place}; choose a smaller one{remedy}")


def free_memory(device):
    """Bytes that are free on a device -> int."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):  # not Linux: at least it must not be more than there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ===== Acting and evaluation =====


def to_task(action, space):
    """An action as the task takes it: tensor [action_dim] in [-1, 1] -> array within the task's bounds."""
    scale, middle = (space.high - space.low) / 2, (space.high + space.low) / 2
    return np.clip(middle + scale * action.numpy().astype(space.dtype), space.low, space.high)


@torch.no_grad()
def evaluate(encoder, actor_projection, actor, env, args, episodes):
    """Returns of episodes without noise -> list of floats. The seed alone decides where the episodes start."""
    device, returns = actor.fc1.weight.device, []
    seeds = torch.randint(2**31 - 1, (episodes,), generator=torch.Generator().manual_seed(args.seed + 1000)).tolist()
    for episode_seed in seeds:
        env.reset(seed=episode_seed)
        frames, episodic_return, done = [picture(env)] * args.frame_stack, 0.0, False
        while not done:
            obs = torch.from_numpy(np.concatenate(frames)).to(device)[None]
            action = actor.greedy(actor_projection(encoder(obs)))[0].cpu()
            reward, terminated, truncated = repeat_action(env, to_task(action, env.action_space), args.action_repeat)
            frames = [*frames[1:], picture(env)]
            episodic_return, done = episodic_return + reward, terminated or truncated
        returns.append(episodic_return)
    return returns


def evaluate_run(args):
    """Plays the agent of the run folder args.evaluate and prints its returns -> the folder."""
    check_only(args, "evaluate", ("eval_episodes", "capture_video", "cuda", "torch_threads"))
    folder = Path(args.evaluate)
    run_args = load_args(folder, "evaluate")
    path = folder / "model.pt" if (folder / "model.pt").exists() else folder / "checkpoint.pt"
    if not path.exists():
        fail(f"--evaluate {folder}: no model.pt and no checkpoint.pt there yet")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env = make_env(run_args.env_id, run_args.image_size)
    if args.capture_video:
        name = f"evaluate-{time.strftime('%Y%m%d-%H%M%S')}"
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), lambda episode: True, name_prefix=name)
    encoder = Encoder(run_args.frame_stack, run_args.image_size).to(device)
    actor_projection = make_projection(encoder, run_args.feature_dim).to(device)
    actor = Actor(run_args.feature_dim, env.action_space.shape[0], run_args.hidden_dim).to(device)
    try:
        saved = load(path, "evaluate")
        for name, part in (("encoder", encoder), ("actor_projection", actor_projection), ("actor", actor)):
            part.load_state_dict(saved[name])
    except (KeyError, TypeError, RuntimeError):
        fail(f"--evaluate {path}: not an agent of this script and task")
    returns = evaluate(encoder, actor_projection, actor, env, run_args, args.eval_episodes)
    env.close()
    print(f"{run_args.env_id}: mean return {np.mean(returns):.2f}, std {np.std(returns):.2f}, {len(returns)} episodes")
    return folder


# ===== Checkpoints =====


def new_run_folder(args):
    """Makes the folder of a new run, with args.json in it -> its path."""
    name = args.env_id.replace("/", "-").replace(":", "-")
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
    return Args(**values)


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
    if args.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--bf16: this GPU has no bfloat16; leave that out")
    env, eval_env = (make_env(args.env_id, args.image_size) for _ in range(2))
    action_dim, space = env.action_space.shape[0], env.action_space

    encoder = Encoder(args.frame_stack, args.image_size).to(device)
    critic_projection, actor_projection = (make_projection(encoder, args.feature_dim).to(device) for _ in range(2))
    actor = Actor(args.feature_dim, action_dim, args.hidden_dim).to(device)
    qf1 = QNetwork(args.feature_dim, action_dim, args.hidden_dim).to(device)
    qf2 = QNetwork(args.feature_dim, action_dim, args.hidden_dim).to(device)
    eyes = encoder, critic_projection, actor_projection
    networks = {"actor": actor, "qf1": qf1, "qf2": qf2}
    online = {"encoder": encoder, "critic_projection": critic_projection, "qf1": qf1, "qf2": qf2}
    targets = {f"{name}_target": copy.deepcopy(net).requires_grad_(False) for name, net in online.items()}
    encoder_target, critic_projection_target, qf1_target, qf2_target = targets.values()
    models = online | targets | {"actor_projection": actor_projection, "actor": actor}
    q_parameters = [p for net in online.values() for p in net.parameters()]
    target_parameters = [p for net in targets.values() for p in net.parameters()]
    actor_parameters = [*actor_projection.parameters(), *actor.parameters()]
    log_alpha = torch.tensor(math.log(args.alpha), device=device, requires_grad=True)
    parameters = [*actor_parameters, *q_parameters, log_alpha]
    q_optimizer = torch.optim.Adam(q_parameters, lr=args.learning_rate, fused=True)
    actor_optimizer = torch.optim.Adam(actor_parameters, lr=args.learning_rate, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.learning_rate, fused=True)
    optimizers = {"q_optimizer": q_optimizer, "actor_optimizer": actor_optimizer, "alpha_optimizer": alpha_optimizer}
    trained = models | optimizers
    frames_device = device if args.buffer_on_gpu else torch.device("cpu")
    check_memory(args, action_dim, frames_device)
    rb = ReplayBuffer(args.buffer_size, args.image_size, args.frame_stack, action_dim, device, frames_device)
    start_step, actor_loss = 0, None

    if checkpoint:
        try:
            for name, part in trained.items():
                part.load_state_dict(checkpoint[name])
            log_alpha.data.copy_(checkpoint["log_alpha"])
            rb.load(folder / checkpoint["buffer"], *checkpoint["buffer_counts"])
            for name in generators.keys() & checkpoint["generators"].keys():  # "cuda" may be new on this machine
                generators[name].set_state(checkpoint["generators"][name])
            start_step, actor_loss = checkpoint["global_step"], checkpoint["actor_loss"]
        except (KeyError, RuntimeError, ValueError, OSError) as error:
            fail(f"--resume {folder}: its checkpoint is damaged or not of this task ({one_line(error)})")
    folder = folder or new_run_folder(args)
    remove_buffers(folder, keep=checkpoint["buffer"] if checkpoint else None)
    cut_events(folder, checkpoint["events"] if checkpoint else {})
    if args.capture_video:
        env = gym.wrappers.RecordVideo(env, str(folder / "videos"), name_prefix=f"train-from-{start_step}")
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
            "log_alpha": log_alpha.detach(),
            "actor_loss": actor_loss,
            "generators": {name: generator.get_state() for name, generator in generators.items()},
            "buffer": f"buffer-{global_step}.bin",
            "buffer_counts": [rb.size, rb.position, rb.frame_count],
            "events": {path.name: path.stat().st_size for path in folder.glob("events.out.tfevents.*")},
        }

    def autocast():
        """Products in bfloat16 with --bf16; no cache, which would hide the weights from the pass with gradient."""
        return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)

    checkpoint_step, start_time, new_episode = start_step, time.time(), True
    gc.collect()
    gc.freeze()  # spares the garbage collector the many objects of the libraries
    steps = range(start_step + 1, args.total_timesteps + 1)
    bar = tqdm(steps, initial=start_step, total=args.total_timesteps, unit=" steps", mininterval=1, dynamic_ncols=True)
    for global_step in bar:
        if new_episode:
            env.reset(seed=int(torch.randint(2**31 - 1, ())))
            frames, episodic_return, episodic_length = [picture(env)] * args.frame_stack, 0.0, 0
            rb.start(frames[-1])

        # Act: at random before learning starts, then as the policy draws
        with torch.no_grad():
            if global_step <= args.learning_starts:
                action = 2 * torch.rand(action_dim, device=device) - 1
            else:
                obs = torch.from_numpy(np.concatenate(frames)).to(device)[None]
                action = actor.sample(actor_projection(encoder(obs)))[0][0]
        action = action.cpu()
        try:
            reward, terminated, truncated = repeat_action(env, to_task(action, space), args.action_repeat)
        except Exception:
            check_finite(parameters)  # a task may refuse what a diverged actor does
            raise
        frames = [*frames[1:], picture(env)]
        rb.add(action, reward, frames[-1], terminated)  # not `truncated`: the value of a state cut off there counts
        new_episode = terminated or truncated
        episodic_return, episodic_length = episodic_return + reward, episodic_length + 1

        if global_step > args.learning_starts:
            t = global_step - args.learning_starts
            batch = rb.sample(args.batch_size)

            # Random shifts: M of each observation for the loss, K of each next one for its target (DrQ, algorithm 1)
            shifted = random_shift(batch.obs.repeat(args.loss_augmentations, 1, 1, 1), args.shift)
            next_shifted = random_shift(batch.next_obs.repeat(args.target_augmentations, 1, 1, 1), args.shift)

            # Soft clipped double Q-learning (SAC); the target is the mean over K shifts
            with torch.no_grad(), autocast():
                next_actions, next_log_prob = actor.sample(actor_projection(encoder(next_shifted)))
                next_features = critic_projection_target(encoder_target(next_shifted))
                qf1_next, qf2_next = qf1_target(next_features, next_actions), qf2_target(next_features, next_actions)
                soft_values = torch.min(qf1_next, qf2_next) - log_alpha.exp() * next_log_prob
                soft_values = soft_values.view(args.target_augmentations, -1).mean(0)
                next_values = batch.reward + args.gamma * (1 - batch.terminated) * soft_values

            # The critics' loss trains the convolutions, the critics' projection and both heads
            with autocast():
                features = critic_projection(encoder(shifted))
                actions = batch.actions.repeat(args.loss_augmentations, 1)
                qf1_values, qf2_values = qf1(features, actions), qf2(features, actions)
            next_values = next_values.repeat(args.loss_augmentations)
            qf1_loss, qf2_loss = F.mse_loss(qf1_values, next_values), F.mse_loss(qf2_values, next_values)
            qf_loss = qf1_loss + qf2_loss
            q_optimizer.zero_grad()
            qf_loss.backward()
            adam_step_(q_optimizer)

            # Delayed updates of the actor, the temperature and the targets
            if t % args.policy_frequency == 0:
                with autocast():
                    with torch.no_grad():  # the actor sees through the critics' convolutions, and does not train them
                        seen = encoder(shifted[: args.batch_size])
                        features = critic_projection(seen)
                    actions, log_prob = actor.sample(actor_projection(seen))
                    qf_values = torch.min(qf1(features, actions), qf2(features, actions))
                actor_loss = (log_alpha.detach().exp() * log_prob - qf_values).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=actor_parameters)  # no gradient for the critics' parameters
                adam_step_(actor_optimizer)
                actor_loss = actor_loss.detach()

                # The temperature rises where the entropy, -log_prob, is below its target, -action_dim
                alpha_loss = -log_alpha.exp() * (log_prob.detach().mean() - action_dim)
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                adam_step_(alpha_optimizer)
                with torch.no_grad():
                    torch._foreach_lerp_(target_parameters, q_parameters, args.tau)

            if t % args.neuron_interval == 0:
                for name, sample in inputs(rb.sample(2048, generator=generators["log"]), *eyes).items():
                    log(f"neurons/{name}", neuron_statistics(networks[name].hidden(*sample)))
            if t % 100 == 0:
                losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf_loss": qf_loss / 2}
                losses |= {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean()}
                losses |= {"alpha": log_alpha.exp()} | ({} if actor_loss is None else {"actor_loss": actor_loss})
                check_finite([*losses.values(), *parameters])
                log("losses", {name: value.item() for name, value in losses.items()})
                log("charts", {"SPS": (global_step - start_step) / (time.time() - start_time)})

        if args.eval_interval and global_step % args.eval_interval == 0:
            check_finite(parameters)
            returns = evaluate(encoder, actor_projection, actor, eval_env, args, args.eval_episodes)
            log("eval", {"episodic_return": np.mean(returns), "episodic_return_std": np.std(returns)})
        # --- Reset: every reset_interval agent steps; the encoder and the buffer stay ---
        steps_left = args.total_timesteps - global_step  # no run ends just after a reset
        if args.reset_interval and global_step % args.reset_interval == 0 and steps_left >= args.reset_interval:
            reset_(actor, actor, actor_optimizer, args.reset_last_layers)  # it has no target
            reset_(qf1, qf1_target, q_optimizer, args.reset_last_layers)
            reset_(qf2, qf2_target, q_optimizer, args.reset_last_layers)
            log("reset", {"number": global_step // args.reset_interval})
        # --- end Reset ---
        if new_episode:
            log("charts", {"episodic_return": episodic_return, "episodic_length": episodic_length})
            log("charts", {"frames": global_step * args.action_repeat})
            shown = {"return": f"{episodic_return:.1f}"}
            bar.set_postfix(shown, refresh=False)
            interval = args.checkpoint_interval
            due = interval and global_step // interval > checkpoint_step // interval
            if (due or stop) and global_step < args.total_timesteps:
                save_checkpoint(folder, state(), rb)
                checkpoint_step = global_step
                if stop:
                    bar.close()
                    env.close()
                    resume = f"python {os.path.relpath(__file__)} --resume {folder}"
                    print(f"stopped at step {global_step}; go on with: {resume}")
                    sys.exit(128 + stop[0])

    final = state()
    writer.close()
    env.close()
    eval_env.close()
    save({name: model.state_dict() for name, model in models.items()}, folder / "model.pt")
    if args.checkpoint_interval:
        save(final, folder / "checkpoint.pt")
    remove_buffers(folder)
    print(f"finished: {folder}")
    return folder


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
