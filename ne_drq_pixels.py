"""Neuroplastic Expansion (NE; Liu, Obando-Ceron, Courville, Pan; ICLR 2025; arXiv 2410.07994) on DrQ, in one file.

NE starts an agent's networks, here the heads, sparse and grows them while they train: it adds the connections with the
largest loss gradient on a cosine schedule, prunes neurons that never fire, and reviews early experience later on.

    python ne_drq_pixels.py --env-id dm_control/walker-walk-v0

NE's lines are fenced, "# --- NE"; the rest is baselines/drq_pixels.py, masks aside. (Section n): docs/algorithm.md.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium[classic-control]==1.4.0", "mujoco==3.17.0",
#     "dm_control==1.0.50; python_version < '3.13'", "shimmy==2.0.1; python_version < '3.13'", "imageio==2.38.1",
#     "moviepy==2.2.1", "tensorboard==2.21.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///

import contextlib
import copy
import ctypes
import dataclasses
import importlib
import json
import math
import os
import signal
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from filelock import FileLock
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    # ===== The run =====
    env_id: str = "dm_control/walker-walk-v0"  # task of DM Control: dm_control/<domain>-<task>-v0
    seed: int = 1  # seed of everything random in the run
    total_timesteps: int = 250_000  # agent steps (decisions of the policy) of the whole run, of action_repeat frames
    cuda: bool = True  # use the GPU if there is one
    torch_threads: int = 1  # CPU threads of PyTorch; results are repeatable for the same number
    bf16: bool = False  # multiply in bfloat16 (autocast) where losses are computed; parameters stay float32
    buffer_on_gpu: bool = True  # with a GPU, keep the replay buffer's frames in its memory, not in main memory
    eval_interval: int = 10_000  # agent steps between evaluations; 0: none
    eval_episodes: int = 10  # episodes of an evaluation, in training and with --evaluate
    checkpoint_interval: int = 50_000  # agent steps between checkpoints, at episode ends; 0: start and end only
    capture_video: bool = False  # record some episodes, in training or of --evaluate, into the run folder's videos/
    track: bool = False  # send the logs to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY say where)
    resume: str | None = None  # go on with the run in this folder, with its own arguments
    evaluate: str | None = None  # play the agent of the run in this folder instead of training
    # ===== DrQ =====
    image_size: int = 84  # height and width of a frame, in pixels
    frame_stack: int = 3  # frames of an observation, one after each of the last agent steps
    action_repeat: int = 2  # frames of the task for which an action is repeated; their rewards are summed
    shift: int = 4  # largest random shift of an observation, in pixels, up, down, left and right; 0: none
    target_augmentations: int = 2  # random shifts that a target is averaged over (K in the paper)
    loss_augmentations: int = 2  # random shifts that the critics' loss is averaged over (M in the paper)
    learning_rate: float = 1e-3  # Adam's learning rate, for everything that learns
    buffer_size: int = 100_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.01  # share of the online network that enters its target at an update
    batch_size: int = 512  # transitions of one gradient step
    replay_ratio: int = 1  # gradient steps after each agent step
    alpha: float = 0.1  # temperature, the weight of the entropy, at the start; it is learned
    learning_starts: int = 1_000  # agent steps with random actions before learning starts
    policy_frequency: int = 2  # critic updates per update of the actor, the temperature and the targets
    feature_dim: int = 50  # features of an observation that the heads see
    hidden_dim: int = 1024  # units of each of the two hidden layers of a head, actor and critics
    neuron_interval: int = 1_000  # gradient steps between two looks at the neurons (section 6)
    # --- NE: arguments ---
    grow: bool = True  # grow connections (section 3)
    prune: bool = True  # prune silent neurons (section 4)
    review: bool = True  # review early experience (section 5)
    initial_density: float = 0.25  # share of a network's connections that are active at the start
    final_density: float = 1.0  # share of them active after the last event, but for what that event itself prunes
    dense_ends: bool = False  # first and last layers stay dense; the densities are those of the layers between
    growth_interval: int = 2_500  # gradient steps between growth and pruning events; a multiple of policy_frequency
    growth_criterion: Literal["gradient", "random"] = "gradient"  # which absent connections grow; random: a control
    omega: float = 0.5  # connections that pruning may take, as a share of those that the schedule has grown so far
    dormant_tau: float = 0.1  # a neuron counts as dormant for the review if its score is at most this
    review_floor: float = 0.5  # lowest review threshold; at 0.5 up to half of the batches review early experience
    review_oldest: float = 0.25  # share of the buffer, its oldest part, that a review draws from

    @property
    def gradient_steps(self):  # of the whole run, T (section 1)
        return self.replay_ratio * (self.total_timesteps - self.learning_starts)

    # --- end NE ---
    def __post_init__(self):
        limits = {"seed": (0, 2**31 - 1), "learning_starts": (0, self.total_timesteps - 1), "eval_interval": (0, 1e18)}
        limits |= {"checkpoint_interval": (0, 1e18), "learning_rate": (1e-9, 1e18), "gamma": (0, 1), "tau": (1e-9, 1)}
        limits |= {"image_size": (15, 480), "shift": (0, 1e18), "alpha": (1e-9, 1e18)}  # MuJoCo's picture: 480 rows
        # --- NE: densities, and events that fit the run (section 3) ---
        share, intervals = (1e-9, 1), (1, self.gradient_steps if self.grow or self.prune else 1e18)
        limits |= {"initial_density": share, "final_density": (self.initial_density, 1), "review_oldest": share}
        limits |= {"review_floor": (0, 1), "growth_interval": intervals}
        if (self.grow or self.prune) and self.growth_interval % max(1, self.policy_frequency):
            raise ValueError(f"--growth-interval must be a multiple of --policy-frequency {self.policy_frequency}")
        # --- end NE ---
        for name, value in vars(self).items():
            low, high = limits.get(name, (1 if type(getattr(Args, name)) is int else 0, 1e18))  # default: ints from 1
            if type(value) in (int, float) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must lie in {low} ... {high}")


def fail(message, code=2):
    """Ends the process with one line on stderr."""
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


class Pixels(gym.Wrapper):
    """A task as DrQ plays it: the last frames, uint8 [3 * frame_stack, size, size], are seen, actions are repeated."""

    def __init__(self, env, size, frame_stack, action_repeat):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(0, 255, (3 * frame_stack, size, size), np.uint8)  # the oldest first
        self.frame_stack, self.action_repeat = frame_stack, action_repeat

    def reset(self, **options):
        _, info = self.env.reset(**options)
        self.frames = np.tile(self.env.render().transpose(2, 0, 1), (self.frame_stack, 1, 1))
        return self.frames, info

    def step(self, action):
        total = 0.0
        for _ in range(self.action_repeat):
            _, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        self.frames = np.concatenate([self.frames[3:], self.env.render().transpose(2, 0, 1)])
        return self.frames, total, terminated, truncated, info


def make_env(args):
    """A DM Control task that is seen in pictures, its actions scaled to -1 ... 1; ends the process otherwise."""
    # the cameras that most work on the suite uses: the first one, of quadruped the one that moves along
    camera = {"height": args.image_size, "width": args.image_size, "camera_id": 2 * ("/quadruped-" in args.env_id)}
    try:
        assert args.env_id.startswith("dm_control/"), "not a task of DM Control"
        env = gym.make(f"shimmy:{args.env_id}", disable_env_checker=True, render_mode="rgb_array", render_kwargs=camera)
        # MuJoCo's largest number, 1e10, stands for no bound
        assert np.abs([env.action_space.low, env.action_space.high]).max() < 1e10, "its actions are not bounded"
        env = Pixels(gym.wrappers.RescaleAction(env, -1.0, 1.0), args.image_size, args.frame_stack, args.action_repeat)
        env.reset(seed=0)  # shows whether there is OpenGL to render with
    except Exception as error:
        fail(f"--env-id {args.env_id}: {error} (tasks are named as dm_control/walker-walk-v0; pictures need OpenGL)")
    return gym.wrappers.RecordEpisodeStatistics(env)


def random_shift(images, shift):
    """Pads each image with its edges, crops it at a place of its own (DrQ, section 3.1): [n, c, h, w] -> the same."""
    n, _, height, width = images.shape
    left, right = (images[..., x, None].expand(-1, -1, -1, shift) for x in (0, -1))
    wide = torch.cat([left, images, right], 3)
    top, bottom = (wide[:, :, y, None].expand(-1, -1, shift, -1) for y in (0, -1))
    crops = torch.cat([top, wide, bottom], 2).unfold(2, height, 1).unfold(3, width, 1)  # all of them, a view
    y, x = torch.randint(2 * shift + 1, (2, n), device=images.device)
    return crops[torch.arange(n, device=images.device), :, y, x]


class Encoder(nn.Module):
    """Four 3x3 convolutions over frames, uint8 [batch, 3 * frame_stack, image_size, image_size] -> [batch, out_dim]."""

    def __init__(self, frame_stack, image_size, channels=32):
        super().__init__()
        first = nn.Conv2d(3 * frame_stack, channels, 3, stride=2)
        self.convs = nn.ModuleList([first, *(nn.Conv2d(channels, channels, 3) for _ in range(3))])
        self.out_dim = channels * ((image_size - 1) // 2 - 6) ** 2

    def forward(self, obs):
        # a GPU convolves faster with the channels last; parameters keep their layout, so checkpoints fit any device
        layout = torch.channels_last if obs.is_cuda else torch.contiguous_format
        h = obs.to(torch.float32, memory_format=layout) / 255
        for conv in self.convs:
            h = F.relu_(conv(h))
        return h.flatten(1)


def make_projection(encoder, feature_dim):
    """From what the convolutions see to a few features in (-1, 1): [batch, out_dim] -> [batch, feature_dim]."""
    return nn.Sequential(nn.Linear(encoder.out_dim, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


# --- NE: masked layers (section 1) ---
class MaskedLinear(nn.Linear):
    """A linear layer with a mask [out, in] of its active connections and a count of those pruned so far (section 4).

    Outside an optimizer step the weight is 0 where the mask is False: forward pass and gradient are the dense ones.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))
        self.register_buffer("pruned", torch.zeros((), dtype=torch.int64))


# --- end NE ---
class MLP(nn.Module):
    """A ReLU network with two hidden layers (section 1), its inputs side by side: [batch, n], ... -> [batch, n_out]."""

    def __init__(self, n_in, hidden_dim, n_out):
        super().__init__()
        self.fc1 = MaskedLinear(n_in, hidden_dim)
        self.fc2 = MaskedLinear(hidden_dim, hidden_dim)
        self.fc3 = MaskedLinear(hidden_dim, n_out)

    def hidden(self, *inputs):
        h1 = F.relu_(self.fc1(torch.cat(inputs, 1)))
        return [h1, F.relu_(self.fc2(h1))]  # each [batch, hidden_dim]

    def forward(self, *inputs):
        return self.fc3(self.hidden(*inputs)[-1])


class Actor(MLP):
    """pi(a | s): [batch, feature_dim] -> mean and log std, side by side, of a Gaussian that tanh squashes."""

    def __init__(self, feature_dim, action_dim, hidden_dim):
        super().__init__(feature_dim, hidden_dim, 2 * action_dim)

    def forward(self, features):
        mean, log_std = super().forward(features).float().chunk(2, 1)  # each [batch, action_dim]
        return torch.cat([mean, -10 + 6 * (torch.tanh(log_std) + 1)], 1)  # log std in [-10, 2]

    def sample(self, features):
        """Draws actions: [batch, feature_dim] -> actions in (-1, 1) [batch, action_dim], their log density [batch]."""
        mean, log_std = self(features).chunk(2, 1)
        noise = torch.randn_like(mean)
        before = mean + log_std.exp() * noise
        log_gaussian = -noise.square() / 2 - log_std - math.log(2 * math.pi) / 2
        log_slope = 2 * (math.log(2) - before - F.softplus(-2 * before))  # log of 1 - tanh(before)^2, stably
        return torch.tanh(before), (log_gaussian - log_slope).sum(1)


def dormant_scores(h):
    """Each neuron's mean |activation| over its layer's (Sokar et al. 2023): [batch, n] -> [n]; zeros if h is all 0."""
    mean_activation = h.abs().mean(0)
    return mean_activation / mean_activation.mean().clamp(min=torch.finfo(h.dtype).tiny)


@torch.no_grad()
def neuron_statistics(hidden):
    """Shares of all hidden neurons (section 6): list of [batch, n_l] -> the values logged under neurons/<net>/."""
    scores = torch.cat([dormant_scores(h) for h in hidden])
    dormant = {f"dormant_ratio_{tau}": float((scores <= tau).float().mean()) for tau in (0, 0.1)}
    return dormant | {"fau": float(torch.cat([(h > 0).float().mean(0) for h in hidden]).mean())}


# --- NE: sparse start (section 2) ---
def masked_layers(network):
    """The masked layers of a network, or of several, first to last -> list of MaskedLinear."""
    return [layer for layer in network.modules() if isinstance(layer, MaskedLinear)]


def erdos_renyi_densities(shapes, density):
    """Densities of layers, min(1, eps * (in + out) / (in * out)), with eps such that together they have `density`.

    shapes: list of (out, in); density in (0, 1], else ValueError -> list of floats. (Mocanu et al. 2018)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie in (0, 1], not {density}")
    sizes, densities = [n_out * n_in for n_out, n_in in shapes], [1.0] * len(shapes)
    sparse = set() if density == 1 else set(range(len(shapes)))
    while sparse:
        left = density * sum(sizes) - sum(size for l, size in enumerate(sizes) if l not in sparse)  # for the sparse
        eps = left / sum(sum(shapes[l]) for l in sparse)
        for l in sparse:
            densities[l] = eps * sum(shapes[l]) / sizes[l]
        saturated = {l for l in sparse if densities[l] > 1}
        sparse = (sparse - saturated) if saturated else set()  # none saturated: done
    return [min(1.0, d) for d in densities]


def connection_counts(layers, density, dense_ends=False):
    """Connections of each layer at an overall `density`; with dense_ends at that of the layers between -> ints."""
    shapes = [tuple(layer.weight.shape) for layer in layers]
    densities = erdos_renyi_densities(shapes[1:-1] if dense_ends else shapes, density)
    densities = [1.0, *densities, 1.0] if dense_ends else densities
    return [max(1, round(d * n_out * n_in)) for d, (n_out, n_in) in zip(densities, shapes, strict=True)]


@torch.no_grad()
def sparse_start_(layers, density, generator, dense_ends=False):
    """Leaves each layer its Erdos-Renyi share of connections, drawn uniformly; their weights stay as they are."""
    for layer, count in zip(layers, connection_counts(layers, density, dense_ends), strict=True):
        layer.mask.fill_(False)
        layer.mask.view(-1)[torch.randperm(layer.mask.numel(), generator=generator)[:count]] = True
        layer.weight.mul_(layer.mask)


def absent_connections(*networks):
    """(weight, its mask as floats) of each layer that is not dense, to mask gradients; anew once masks change."""
    layers = [layer for network in networks for layer in masked_layers(network) if not layer.mask.all()]
    return [(layer.weight, layer.mask.float()) for layer in layers]


# --- NE: elastic growth (section 3) ---
def scheduled_growth(t, total_steps, interval, n_free):
    """Connections that the cosine schedule has added to a layer by gradient step t, of n_free in all -> int.

    total_steps: gradient steps of the run; interval: those between two events, ValueError if the run has no event.
    """
    if not 1 <= interval <= total_steps:
        raise ValueError(f"interval {interval} must lie in 1 ... {total_steps}, the run's gradient steps")
    events, passed = total_steps // interval, max(0, t // interval)
    parts = [1 + math.cos(math.pi * j * interval / total_steps) for j in range(1, events + 1)]
    return n_free if passed >= events else round(n_free * sum(parts[:passed]) / (sum(parts) or 1))  # 0: one event, at T


@torch.no_grad()
def grow_(layer, k, exclude=None, generator=None):
    """Activates the k absent connections, or all, with the largest |weight.grad|, at weight 0 -> number grown.

    exclude: mask [out, in] of connections that may not grow; generator: a CPU one that draws the k at random instead.
    """
    candidates = ~layer.mask if exclude is None else ~layer.mask & ~exclude
    k = max(0, min(k, int(candidates.sum())))
    score = layer.weight.grad.abs() if generator is None else torch.rand(candidates.shape, generator=generator)
    grown = score.to(candidates.device).masked_fill(~candidates, -1.0).flatten().topk(k).indices
    layer.mask.view(-1)[grown] = True
    layer.weight.view(-1)[grown] = 0.0  # its Adam moments are 0 already (section 1)
    return k


# --- NE: dormant pruning (section 4) ---
def adam_moments(optimizer, parameter):
    """Adam's two moments of a parameter, shaped like it; none before the optimizer's first step."""
    state = optimizer.state.get(parameter, {})
    return [state[name] for name in ("exp_avg", "exp_avg_sq") if name in state]


@torch.no_grad()
def prune_dormant_(layers, hidden, optimizer, budget, generator):
    """Prunes silent neurons whole, in random order, while what they cost fits the budget.

    hidden: activations [batch, n_l] of each hidden layer; budget: connections that this call may take; generator: a CPU
    one -> (connections pruned, list of their masks). A pruned neuron's bias becomes its layer's mean activation: it
    fires, so its outgoing connections have a gradient and can grow again, and then its incoming ones.
    """
    silent = [(l, i) for l, h in enumerate(hidden) for i in (dormant_scores(h) <= 0).nonzero().flatten().tolist()]
    taken, spent = [torch.zeros_like(layer.mask) for layer in layers], 0
    for l, i in (silent[index] for index in torch.randperm(len(silent), generator=generator).tolist()):
        incoming, outgoing = (l, i), (l + 1, (slice(None), i))  # (layer, index): row i of layer l, column i of the next
        cost = sum(int(layers[k].mask[where].sum()) for k, where in (incoming, outgoing))
        if cost and spent + cost > budget:  # a neuron without connections costs nothing
            continue
        spent += cost
        for k, where in (incoming, outgoing):
            taken[k][where] |= layers[k].mask[where]
            layers[k].pruned += layers[k].mask[where].sum()
            for tensor in (layers[k].mask, layers[k].weight, *adam_moments(optimizer, layers[k].weight)):
                tensor[where] = 0
        layers[l].bias[i] = float(hidden[l].abs().mean()) or layers[l].in_features ** -0.5  # mean 0: a dead layer
        for moment in adam_moments(optimizer, layers[l].bias):
            moment[i] = 0
    return spent, taken


# --- NE: one event of one network (sections 3 and 4) ---
@torch.no_grad()
def grow_and_prune_(network, target, optimizer, t, args, generator, scoring, probe):
    """Prunes, then grows, between a backward pass and its optimizer step; the target's masks follow.

    t: gradient steps so far; scoring, probe: two batches of the network's inputs -> what happened, by the logged names.
    """
    layers = masked_layers(network)
    grown, pruned, taken = 0, 0, [None] * len(layers)
    start, end = (connection_counts(layers, d, args.dense_ends) for d in (args.initial_density, args.final_density))
    n_free = [max(0, e - s) for s, e in zip(start, end, strict=True)]  # of each layer
    scheduled = [scheduled_growth(t, args.gradient_steps, args.growth_interval, n) for n in n_free]  # of each, by t
    before = network(*probe)
    if args.prune:
        budget = args.omega * sum(scheduled) - sum(int(layer.pruned) for layer in layers)  # .pruned: since the start
        pruned, taken = prune_dormant_(layers, network.hidden(*scoring), optimizer, budget, generator)
    between = network(*probe)
    for l, layer in enumerate(layers if args.grow else []):  # up to A_l(t) = start + scheduled: what was pruned, too
        missing = start[l] + scheduled[l] - int(layer.mask.sum())
        grown += grow_(layer, missing, taken[l], generator if args.growth_criterion == "random" else None)
    for layer, target_layer in zip(layers, masked_layers(target), strict=True):
        target_layer.mask.copy_(layer.mask)
        target_layer.weight.mul_(layer.mask)
    changes = {"output_change_pruning": between - before, "output_change_growth": network(*probe) - between}
    return {"grown": grown, "pruned": pruned} | {name: float(change.abs().max()) for name, change in changes.items()}


# --- NE: experience review (section 5) ---
class ReviewGate:
    """Reviews early experience the more, the less dormancy moves; threshold: its fluctuation rate g / the largest g."""

    def __init__(self, floor=0.5):
        self.floor, self.g, self.g_max, self.threshold, self.previous, self.reviewed = floor, 0.0, 0.0, 1.0, None, 0

    def update(self, dormant, total):
        """Takes a new count of `dormant` neurons among `total`."""
        if self.previous is not None:
            self.g = 0.9 * self.g + 0.1 * abs(dormant - self.previous) / total
            self.g_max = max(self.g_max, self.g)
            self.threshold = max(self.floor, self.g / self.g_max if self.g_max > 0 else 1.0)
        self.previous = dormant

    def review(self, u):
        """u drawn uniformly from [0, 1) -> whether this batch comes from early experience; counts those that do."""
        self.reviewed += u > self.threshold
        return u > self.threshold

    def state_dict(self):
        return vars(self)

    def load_state_dict(self, state):
        vars(self).update(state)


# --- NE: looking at the connections (section 6) ---
def density(network):
    """Active connections over all connections of a network, of several, or of a layer -> float."""
    return float(torch.cat([layer.mask.flatten() for layer in masked_layers(network)]).double().mean())


def connection_statistics(network):
    """Densities, and the share of hidden neurons without an active outgoing connection, as they are logged."""
    by_layer = {f"density_layer{l}": density(layer) for l, layer in enumerate(masked_layers(network), start=1)}
    disconnected = torch.cat([~layer.mask.any(0) for layer in masked_layers(network)[1:]]).float().mean()
    return {"density": density(network), "disconnected": float(disconnected)} | by_layer


# --- end NE ---
@torch.no_grad()
def inputs(batch, encoder, critic_projection, actor_projection):
    """What each head sees of a batch, which is not augmented -> {head's name: tuple of tensors}."""
    seen = [encoder(chunk) for chunk in batch.obs.split(256)]  # in chunks, for activations of 2048 images take GBs
    critics = torch.cat([critic_projection(chunk) for chunk in seen]), batch.actions
    return {"actor": (torch.cat([actor_projection(chunk) for chunk in seen]),), "qf1": critics, "qf2": critics}


Batch = namedtuple("Batch", "obs actions reward next_obs terminated")  # obs, next_obs: uint8 stacks, oldest frame first


class ReplayBuffer:
    """The last `capacity` transitions. Each frame is stored once, stacks are built when they are drawn.

    Frames are numbered from 0 as they come; number n lies at n modulo the length of `frames`, which is on frames_device
    and has room for an eighth more frames than transitions, for an episode has one more: of episodes shorter than eight
    steps the buffer holds fewer than `capacity` transitions. Batches go to `device`.
    """

    def __init__(self, capacity, image_size, frame_stack, action_dim, device, frames_device=None):
        self.frame_stack, self.device = frame_stack, device
        slots = capacity + capacity // 8 + frame_stack + 1
        self.frames = torch.empty(slots, 3, image_size, image_size, dtype=torch.uint8, device=frames_device or device)
        self.rows = torch.empty(capacity, action_dim + 2)  # action, reward, terminated
        self.spans = torch.empty(capacity, 2, dtype=torch.int64)  # numbers of the stack's oldest and newest frame
        self.added = self.dropped = self.frame_count = self.episode_start = 0  # dropped: transitions no longer held

    def __len__(self):
        return self.added - self.dropped

    def add(self, action, reward, next_frame, terminated):
        """Stores what followed the newest frame, in place of the oldest transition if the buffer is full."""
        position, newest = self.added % len(self.rows), self.frame_count - 1
        self.rows.numpy()[position] = np.hstack([action, reward, terminated])
        self.spans.numpy()[position] = max(self.episode_start, newest - self.frame_stack + 1), newest
        self.added += 1
        self.dropped = max(self.dropped, self.added - len(self.rows))
        self.add_frame(next_frame)

    def add_frame(self, frame, first=False):
        """Stores a frame [3, image_size, image_size], `first` or not, and drops transitions that it overwrites."""
        self.episode_start = self.frame_count if first else self.episode_start
        self.frames[self.frame_count % len(self.frames)] = torch.from_numpy(frame)
        self.frame_count += 1
        while len(self) and self.spans[self.dropped % len(self.rows), 0] < self.frame_count - len(self.frames):
            self.dropped += 1

    def sample(self, batch_size, oldest=1.0, generator=None):
        """Draws uniformly, with replacement, from the oldest share of the buffer -> Batch of tensors [batch, ...]."""
        rank = torch.randint(max(1, int(len(self) * oldest)), (batch_size,), generator=generator)  # from 0, the oldest
        index = (self.dropped + rank) % len(self.rows)
        # obs and next_obs overlap: the newest frame of obs, the one after it and those before it make both; in place of
        # what would lie before the episode stands its first frame
        first, newest = self.spans[index].split(1, 1)
        numbers = (newest + torch.arange(1 - self.frame_stack, 2)).maximum(first)  # [batch, frame_stack + 1]
        slots = (numbers % len(self.frames)).flatten().to(self.frames.device)
        frames = self.frames.index_select(0, slots).to(self.device).view(batch_size, -1, *self.frames.shape[2:])
        rows = self.rows[index].to(self.device)
        return Batch(frames[:, :-3], rows[:, :-2], rows[:, -2], frames[:, 3:], rows[:, -1])

    def state_dict(self):
        """What the buffer holds, without a copy of what is in main memory."""
        held = {"frames": self.frame_count, "rows": self.added, "spans": self.added}
        # through numpy: of a tensor's slice the whole tensor would be saved
        state = {name: torch.from_numpy(getattr(self, name)[:n].cpu().numpy()) for name, n in held.items()}
        return state | {"counts": [self.added, self.dropped, self.frame_count]}

    def load_state_dict(self, state):
        for name in ("frames", "rows", "spans"):
            getattr(self, name)[: len(state[name])] = state[name]
        self.added, self.dropped, self.frame_count = state["counts"]


@torch.no_grad()
def evaluate(encoder, actor_projection, actor, env, episodes, seed):
    """Returns of episodes without noise -> list of floats. The seed alone decides where the episodes start."""
    generator, space, returns = torch.Generator().manual_seed(seed + 1000), env.action_space, []
    for episode_seed in torch.randint(2**31 - 1, (episodes,), generator=generator).tolist():
        (obs, _), done = env.reset(seed=episode_seed), False
        while not done:
            features = actor_projection(encoder(torch.from_numpy(obs).to(actor.fc1.weight.device)[None]))
            action = torch.tanh(actor(features)[0, : len(space.low)]).cpu().numpy()  # the mean
            obs, _, terminated, truncated, info = env.step(np.clip(action.astype(space.dtype), space.low, space.high))
            done = terminated or truncated
        returns.append(float(info["episode"]["r"]))
    return returns


stop = []  # signals that have come (handler: last lines); the first one ends the run when the episode ends


def main(args):
    """Trains, goes on with --resume, or plays with --evaluate -> the run's folder."""
    play, script, checkpoint = args.evaluate, Path(__file__).stem, None
    run_name = f"{args.env_id.replace('/', '-')}__{script}__{args.seed}__{time.time_ns() // 1_000_000}"
    folder, args_json = Path(args.resume or play or f"runs/{run_name}"), json.dumps(vars(args), indent=2)
    lock = FileLock(folder / ("play.lock" if play else "lock"), timeout=0)  # one process a run, until it ends
    if (args.resume, play) != (None, None):  # nothing else may be given; args become those of the folder
        given = {"eval_episodes": args.eval_episodes, "capture_video": args.capture_video} if play else {}
        try:
            assert args == Args(resume=None if play else args.resume, evaluate=play, **given), "takes no other argument"
            args = Args(**json.loads(args_json := (folder / "args.json").read_text()) | given)
            lock.acquire()
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
            assert checkpoint["run"] == script + args_json, "checkpoint.pt is another script's, or of other arguments"
        except Exception as error:
            fail(f"--{'resume' if play is None else 'evaluate'} {folder}: damaged, held by another process, or {error}")
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
        for option, size in ((-1, 1 << 30), (-3, 1 << 25)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            ctypes.CDLL(None).mallopt(option, size)  # keeps freed memory: page faults are a fifth of an update's time
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)
    generators = [torch.manual_seed(args.seed), log_generator := torch.Generator().manual_seed(args.seed + 1)]
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env, eval_env = (make_env(args) for _ in range(2))
    action_dim, space = env.action_space.shape[0], env.action_space
    encoder = Encoder(args.frame_stack, args.image_size)
    critic_projection, actor_projection = (make_projection(encoder, args.feature_dim) for _ in range(2))
    actor = Actor(args.feature_dim, action_dim, args.hidden_dim)
    qf1, qf2 = (MLP(args.feature_dim + action_dim, args.hidden_dim, 1) for _ in range(2))
    networks = nn.ModuleDict({"actor": actor, "qf1": qf1, "qf2": qf2}).to(device)  # the heads
    # what the critics' loss trains, and their targets; what the actor's loss trains; the temperature
    critics = nn.ModuleDict({"encoder": encoder, "critic_projection": critic_projection, "qf1": qf1, "qf2": qf2})
    targets = copy.deepcopy(critics.to(device)).requires_grad_(False)
    encoder_target, critic_projection_target, qf1_target, qf2_target = targets.values()
    actors = nn.ModuleDict({"actor_projection": actor_projection, "actor": actor}).to(device)
    temperature = nn.ParameterDict({"log_alpha": torch.tensor(math.log(args.alpha), device=device)})
    log_alpha, eyes = temperature["log_alpha"], [encoder, critic_projection, actor_projection]
    q_parameters, target_parameters = ([p.detach() for p in nets.parameters()] for nets in (critics, targets))
    parameters = [*q_parameters, log_alpha.detach(), *(p.detach() for p in actors.parameters())]
    q_optimizer = torch.optim.Adam(critics.parameters(), lr=args.learning_rate, fused=True)
    actor_optimizer = torch.optim.Adam(actors.parameters(), lr=args.learning_rate, fused=True)
    alpha_optimizer = torch.optim.Adam(temperature.parameters(), lr=args.learning_rate, fused=True)
    state = {"critics": critics, "actors": actors, "temperature": temperature, "targets": targets}
    state |= {"q_optimizer": q_optimizer, "actor_optimizer": actor_optimizer, "alpha_optimizer": alpha_optimizer}
    global_step, actor_loss, frames_on = 0, torch.zeros(()), device if args.buffer_on_gpu else "cpu"
    if not play:  # it takes gigabytes
        rb = ReplayBuffer(args.buffer_size, args.image_size, args.frame_stack, action_dim, device, frames_on)
        state["replay"] = rb
    # --- NE: sparse start (section 2), review gate (section 5) ---
    generators.append(ne_generator := torch.Generator().manual_seed(args.seed + 2))  # DrQ's draws stay as they are
    for network in networks.values():
        sparse_start_(masked_layers(network), args.initial_density, ne_generator, args.dense_ends)
    targets.load_state_dict(critics.state_dict())
    state["gate"] = gate = ReviewGate(args.review_floor)
    # --- end NE ---
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint.pop(name))
        for generator, saved in zip(generators, checkpoint["random"], strict=True):
            generator.set_state(saved)
        global_step, actor_loss = checkpoint["step"], checkpoint["actor_loss"]
    else:
        (folder / "models").mkdir(parents=True)
        (folder / "args.json").write_text(args_json)
        lock.acquire()
    if args.capture_video:
        name, every = ("play", lambda episode: True) if play else ("run", None)  # None: now and then
        env = gym.wrappers.RecordVideo(env, f"{folder}/videos", every, name_prefix=f"{name}-{global_step}")
    if play:
        returns = evaluate(encoder, actor_projection, actor, env, args.eval_episodes, args.seed)
        env.close()
        print(f"{args.env_id}: mean return {np.mean(returns):.2f}, std {np.std(returns):.2f}, {len(returns)} episodes")
        return folder
    if args.track:
        importlib.import_module("wandb").init(id=folder.name, resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(folder, purge_step=global_step + 1)  # what was logged after the checkpoint is void
    bar = tqdm(initial=global_step, total=args.total_timesteps, unit=" steps", mininterval=1, dynamic_ncols=True)

    def log(group, values):
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, global_step)

    def check_finite(what, *values):
        """Ends the run where a tensor, an array or a number is not finite; its last checkpoint stays."""
        if not all((torch if torch.is_tensor(value) else np).isfinite(value).all() for value in values):
            bar.close()
            fail(f"step {global_step}: {what} is not finite; stopped, the last checkpoint in {folder} is good", 1)

    def save_run():
        """Keeps the networks' weights, and replaces the checkpoint by all that it takes to go on from here."""
        check_finite("a weight", *parameters)
        writer.flush()
        models = {**critics, **actors}
        torch.save({name: net.state_dict() for name, net in models.items()}, f"{folder}/models/{global_step}.pt")
        new = {"run": script + args_json, "step": global_step, "actor_loss": actor_loss.detach()}
        new |= {"random": [g.get_state() for g in generators]}
        new |= {name: part.state_dict() for name, part in state.items()}
        torch.save(new, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # whole or not at all

    # with --bf16; a cache would hide the weights from the pass with gradient
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bf16, cache_enabled=False)
    # --- NE: absent connections (section 1) ---
    absent_qf, absent_actor = absent_connections(qf1, qf2), absent_connections(actor)
    # --- end NE ---
    save_run()
    start_step, start_time, save_every = global_step, time.time(), args.checkpoint_interval or args.total_timesteps
    t, done = args.replay_ratio * max(0, global_step - args.learning_starts), True  # t: gradient steps (section 1)
    for global_step in range(start_step + 1, args.total_timesteps + 1):
        if done:
            obs, _ = env.reset(seed=int(torch.randint(2**31 - 1, ())))
            rb.add_frame(obs[-3:], first=True)

        # Act: at random before learning starts, then as the policy draws
        with torch.no_grad():
            if global_step <= args.learning_starts:
                action = 2 * torch.rand(action_dim, device=device) - 1
            else:
                action = actor.sample(actor_projection(encoder(torch.from_numpy(obs).to(device)[None])))[0][0]
        action = np.clip(action.cpu().numpy().astype(space.dtype), space.low, space.high)
        check_finite("an action", action)  # MuJoCo would raise an error
        obs, reward, terminated, truncated, info = env.step(action)
        check_finite("a reward", reward)
        rb.add(action, reward, obs[-3:], terminated)  # not `truncated`: the value of a state cut off there counts
        done = terminated or truncated

        # Learn: replay_ratio gradient steps for each agent step
        while t < args.replay_ratio * (global_step - args.learning_starts):
            t += 1
            # --- NE: experience review (section 5) ---
            review = args.review and gate.review(torch.rand((), generator=ne_generator).item())
            # --- end NE ---
            batch = rb.sample(args.batch_size, args.review_oldest if review else 1.0)

            # Random shifts: M of each observation for the loss, K of each next one for its target (DrQ, algorithm 1)
            shifted = random_shift(batch.obs.repeat(args.loss_augmentations, 1, 1, 1), args.shift)
            next_shifted = random_shift(batch.next_obs.repeat(args.target_augmentations, 1, 1, 1), args.shift)

            # Soft clipped double Q-learning (SAC); the target is the mean over K shifts
            with torch.no_grad(), autocast:
                next_actions, next_log_prob = actor.sample(actor_projection(encoder(next_shifted)))
                next_inputs = critic_projection_target(encoder_target(next_shifted)), next_actions
                qf_next = torch.min(*(qf(*next_inputs).squeeze(1).float() for qf in (qf1_target, qf2_target)))
                soft_values = (qf_next - log_alpha.exp() * next_log_prob).view(args.target_augmentations, -1).mean(0)
                next_values = batch.reward + args.gamma * (1 - batch.terminated) * soft_values
                next_values = next_values.repeat(args.loss_augmentations)

            # The critics' loss trains the convolutions, the critics' projection and both heads
            with autocast:
                critic_inputs = critic_projection(encoder(shifted)), batch.actions.repeat(args.loss_augmentations, 1)
                qf1_values, qf2_values = (qf(*critic_inputs).squeeze(1).float() for qf in (qf1, qf2))
            qf1_loss, qf2_loss = F.mse_loss(qf1_values, next_values), F.mse_loss(qf2_values, next_values)
            q_optimizer.zero_grad()
            (qf1_loss + qf2_loss).backward()
            # --- NE: dormant pruning and elastic growth of the critics (sections 3 and 4) ---
            event = (args.grow or args.prune) and t % args.growth_interval == 0
            if event:
                scoring, probe = (inputs(rb.sample(2048, generator=ne_generator), *eyes) for _ in range(2))
                for name in ("qf1", "qf2"):
                    call = networks[name], targets[name], q_optimizer, t, args, ne_generator, scoring[name], probe[name]
                    log(f"ne/{name}", grow_and_prune_(*call))  # [:2]: a critic's inputs
                absent_qf = absent_connections(qf1, qf2)
            for weight, active in absent_qf:
                weight.grad.mul_(active)  # 0 where absent, so that Adam's moments stay 0 there (section 1)
            # --- end NE ---
            q_optimizer.step()

            # Delayed updates of the actor, the temperature and the targets
            if t % args.policy_frequency == 0:
                with autocast:
                    with torch.no_grad():  # the actor sees through the critics' convolutions, and does not train them
                        seen = encoder(shifted[: args.batch_size])
                        features = critic_projection(seen)
                    actions, log_prob = actor.sample(actor_projection(seen))
                    qf_values = torch.min(*(qf(features, actions).squeeze(1).float() for qf in (qf1, qf2)))
                actor_loss = (log_alpha.detach().exp() * log_prob - qf_values).mean()
                actor_optimizer.zero_grad()
                actor_loss.backward(inputs=list(actors.parameters()))  # no gradient for the critics' parameters
                # --- NE: dormant pruning and elastic growth of the actor (sections 3 and 4) ---
                if event:  # growth_interval is a multiple of policy_frequency
                    # on features from before the critics' step, which has moved the convolutions once
                    call = actor, actor, actor_optimizer, t, args, ne_generator, scoring["actor"], probe["actor"]
                    log("ne/actor", grow_and_prune_(*call))  # it has no target, and stands for it
                    absent_actor = absent_connections(actor)
                for weight, active in absent_actor:
                    weight.grad.mul_(active)
                # --- end NE ---
                actor_optimizer.step()

                # The temperature rises where the entropy, -log_prob, is below its target, -action_dim
                alpha_loss = -log_alpha.exp() * (log_prob.detach().mean() - action_dim)
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                torch._foreach_lerp_(target_parameters, q_parameters, args.tau)
            # --- NE: the review threshold follows the dormant neurons of the critics (section 5) ---
            if args.review and t % args.neuron_interval == 0:
                scoring = inputs(rb.sample(2048, generator=ne_generator), *eyes)
                scores = torch.cat([dormant_scores(h) for qf in (qf1, qf2) for h in qf.hidden(*scoring["qf1"])])
                gate.update(int((scores <= args.dormant_tau).sum()), len(scores))
                log("ne", {"review_threshold": gate.threshold, "review_share": gate.reviewed / args.neuron_interval})
                gate.reviewed = 0
            # --- end NE ---
            if t % args.neuron_interval == 0:
                sample = inputs(rb.sample(2048, generator=log_generator), *eyes)
                for name, network in networks.items():
                    hidden = network.hidden(*sample[name])
                    log(f"neurons/{name}", neuron_statistics(hidden) | connection_statistics(network))
            if t % 100 == 0:
                losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf_loss": (qf1_loss + qf2_loss) / 2}
                losses |= {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean(), "actor_loss": actor_loss}
                losses |= {"alpha": log_alpha.exp()}
                check_finite("a loss or a weight", *losses.values(), *parameters)
                log("losses", {name: value.item() for name, value in losses.items()})
                log("charts", {"SPS": (global_step - start_step) / (time.time() - start_time)})

        if args.eval_interval and global_step % args.eval_interval == 0:
            check_finite("a weight", *parameters)
            returns = evaluate(encoder, actor_projection, actor, eval_env, args.eval_episodes, args.seed)
            log("eval", {"episodic_return": np.mean(returns), "episodic_return_std": np.std(returns)})
        with contextlib.suppress(OSError):  # a screen that is gone must not end the run
            bar.set_description("stopping with this episode; once more: at once" if stop else None, refresh=False)
            bar.update()
        if done:
            log("charts", {"episodic_return": info["episode"]["r"], "episodic_length": info["episode"]["l"]})
            log("charts", {"frames": global_step * args.action_repeat})
            bar.set_postfix_str(f"return={info['episode']['r']:.1f}, density={density(networks):.3f}", refresh=False)
            if stop:
                break
            if global_step // save_every > (global_step - info["episode"]["l"]) // save_every:  # one was due in it
                save_run()

    if not stop:
        rb.added = rb.dropped = rb.frame_count = 0  # len(rb) = 0: a finished run keeps all but its replay
    save_run()
    for used in (writer, env, bar):
        used.close()
    print(f"{f'stopped; go on with: python {sys.argv[0]} --resume' if stop else 'finished:'} {folder}")
    return sys.exit(128 + stop[0]) if stop else folder


if __name__ == "__main__":
    once, hup = "--evaluate" in str(sys.argv), signal.SIGHUP  # once: one signal ends it; else two, SIGHUP aside
    for s in (n for n in (signal.SIGINT, signal.SIGTERM, hup) if signal.getsignal(n) != signal.SIG_IGN):  # not nohup's
        signal.signal(s, lambda n, _: os._exit(128 + n) if once or (n != hup and {*stop} - {hup}) else stop.append(n))
    main(tyro.cli(Args, description=__doc__))
