"""NE with LayerNorm on TD3, in one file: NE (arXiv 2410.07994) in networks with a norm before each ReLU.

Only the rule that brings a pruned neuron back differs from NE: a bias before a norm does not make a neuron fire.

    python baselines/ne_layer_norm_td3_continuous.py --env-id HalfCheetah-v4

Without the lines between its "# --- NE-LayerNorm" fences it is ne_td3_continuous.py. (Section n): docs/algorithm.md.
"""

# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "numpy==2.4.6", "gymnasium[classic-control]==1.4.0", "mujoco==3.17.0",
#     "dm_control==1.0.50; python_version < '3.13'", "shimmy==2.0.1; python_version < '3.13'", "imageio==2.38.1",
#     "moviepy==2.2.1", "tensorboard==2.21.0", "tqdm==4.70.1", "tyro==1.0.17"]
# ///

import contextlib
import copy
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
    env_id: str = "HalfCheetah-v4"  # task: a Gymnasium id, or dm_control/<domain>-<task>-v0
    seed: int = 1  # seed of everything random in the run
    total_timesteps: int = 1_000_000  # environment steps of the whole run; written 1000000 or 1_000_000
    cuda: bool = True  # use the GPU if there is one
    torch_threads: int = 1  # CPU threads of PyTorch; results are repeatable for the same number
    eval_interval: int = 10_000  # environment steps between evaluations; 0: none
    eval_episodes: int = 10  # episodes of an evaluation, in training and with --evaluate
    checkpoint_interval: int = 50_000  # environment steps between checkpoints, at episode ends; 0: start and end only
    capture_video: bool = False  # record some episodes, in training or of --evaluate, into the run folder's videos/
    track: bool = False  # send the logs to Weights & Biases too (WANDB_PROJECT, WANDB_ENTITY say where)
    resume: str | None = None  # go on with the run in this folder, with its own arguments
    evaluate: str | None = None  # play the agent of the run in this folder instead of training
    # ===== TD3 =====
    learning_rate: float = 3e-4  # Adam's learning rate, actor and critics
    buffer_size: int = 1_000_000  # transitions that the replay buffer holds
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the online network that enters its target at an update
    batch_size: int = 256  # transitions of one gradient step
    replay_ratio: int = 1  # gradient steps after each environment step
    policy_noise: float = 0.2  # standard deviation of the noise on target actions, in units of (high - low) / 2
    noise_clip: float = 0.5  # largest absolute noise on a target action, in the same units
    exploration_noise: float = 0.1  # standard deviation of the noise on the actions taken, in the same units
    learning_starts: int = 25_000  # environment steps with random actions before learning starts
    policy_frequency: int = 2  # critic updates per update of the actor and the targets
    hidden_dim: int = 256  # units of each of the two hidden layers, actor and critics
    neuron_interval: int = 1_000  # gradient steps between two looks at the neurons (section 6)
    # --- NE: arguments ---
    grow: bool = True  # grow connections (section 3)
    prune: bool = True  # prune silent neurons (section 4)
    review: bool = True  # review early experience (section 5)
    initial_density: float = 0.25  # share of a network's connections that are active at the start
    final_density: float = 1.0  # share of them active after the last event, but for what that event itself prunes
    dense_ends: bool = False  # first and last layers stay dense; the densities are those of the layers between
    growth_interval: int = 10_000  # gradient steps between growth and pruning events; a multiple of policy_frequency
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


def make_env(env_id, **options):
    """A task whose observations (float32) and actions are vectors, the actions bounded (1e10: no bound); or an exit."""
    try:
        env = gym.make("shimmy:" * env_id.startswith("dm_control/") + env_id, disable_env_checker=True, **options)
        seen, space = env.observation_space, env.action_space
        vectors = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and len(seen.shape or ()) != 3
        assert vectors and (np.abs([space.low, space.high]) < 1e10).all(), f"{seen} and {space}: no (bounded) vectors"
    except Exception as error:
        fail(f"--env-id {env_id}: {error} (MuJoCo tasks end in -v4 or -v5; DM Control: dm_control/walker-walk-v0)")
    env = env if len(seen.shape or ()) == 1 else gym.wrappers.FlattenObservation(env)
    env = gym.wrappers.TransformObservation(env, lambda obs: np.array(obs, np.float32), None)  # a copy: tasks reuse it
    return gym.wrappers.RecordEpisodeStatistics(env)


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
        # --- NE-LayerNorm: a norm in each hidden layer ---
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        # --- end NE-LayerNorm ---

    def hidden(self, *inputs):
        h1 = F.relu_(self.norm1(self.fc1(torch.cat(inputs, 1))))
        return [h1, F.relu_(self.norm2(self.fc2(h1)))]  # each [batch, hidden_dim]

    def forward(self, *inputs):
        return self.fc3(self.hidden(*inputs)[-1])


class Actor(MLP):
    """pi(s): [batch, obs_dim] -> [batch, action_dim]; low, high: bounds of the actions, tensors [action_dim]."""

    def __init__(self, obs_dim, low, high, hidden_dim):
        super().__init__(obs_dim, hidden_dim, len(low))
        self.register_buffer("action_scale", (high - low) / 2)
        self.register_buffer("action_bias", (high + low) / 2)

    def forward(self, obs):
        return torch.tanh(super().forward(obs)) * self.action_scale + self.action_bias


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


# --- NE-LayerNorm: how a pruned neuron fires again in spite of the norm ---
@torch.no_grad()
def revive_(network, optimizer, hidden, before):
    """Lets pruned neurons fire: pre-activation the layer's mean one, offset in the norm the layer's mean activation.

    Pruned are those that were silent and have no active connection left. Normalised, such a neuron is near 0, so that
    its offset decides. hidden, before: (pre-)activations [batch, n_l] of each hidden layer before pruning.
    """
    layers = masked_layers(network)
    for l, norm in enumerate((network.norm1, network.norm2)):
        pruned = (dormant_scores(hidden[l]) <= 0) & ~layers[l].mask.any(1) & ~layers[l + 1].mask.any(0)
        layers[l].bias[pruned] = before[l].mean()
        norm.bias[pruned] = float(hidden[l].mean()) or layers[l].in_features ** -0.5  # mean 0: a dead layer
        for moment in adam_moments(optimizer, norm.bias):
            moment[pruned] = 0


# --- end NE-LayerNorm ---
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
        # --- NE-LayerNorm: what the layers do before pruning ---
        hidden = network.hidden(*scoring)
        before_norm = [network.fc1(torch.cat(scoring, 1)), network.fc2(hidden[0])]
        # --- end NE-LayerNorm ---
        pruned, taken = prune_dormant_(layers, network.hidden(*scoring), optimizer, budget, generator)
        # --- NE-LayerNorm: the revival rule ---
        revive_(network, optimizer, hidden, before_norm)
        # --- end NE-LayerNorm ---
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
Batch = namedtuple("Batch", "obs actions reward next_obs terminated")  # an actor sees [:1] of it, a critic [:2]


class ReplayBuffer:
    """The last `capacity` transitions, each one float32 row in main memory; batches go to `device`."""

    def __init__(self, capacity, obs_dim, action_dim, device):
        self.widths, self.device = [obs_dim, action_dim, 1, obs_dim, 1], device
        self.rows, self.added = torch.empty(capacity, sum(self.widths)), 0

    def __len__(self):
        return min(self.added, len(self.rows))

    def add(self, obs, actions, reward, next_obs, terminated):
        """Stores a transition, in place of the oldest one if the buffer is full."""
        self.rows.numpy()[self.added % len(self.rows)] = np.hstack([obs, actions, reward, next_obs, terminated])
        self.added += 1

    def sample(self, batch_size, oldest=1.0, generator=None):
        """Draws uniformly, with replacement, from the oldest share of the buffer -> Batch of tensors [batch, ...]."""
        rank = torch.randint(max(1, int(len(self) * oldest)), (batch_size,), generator=generator)  # from 0, the oldest
        rows = self.rows.index_select(0, (self.added - len(self) + rank) % len(self.rows)).to(self.device)
        obs, actions, reward, next_obs, terminated = rows.split(self.widths, 1)
        return Batch(obs, actions, reward.squeeze(1), next_obs, terminated.squeeze(1))


@torch.no_grad()
def evaluate(actor, env, episodes, seed):
    """Returns of episodes without noise -> list of floats. The seed alone decides where the episodes start."""
    generator, space, returns = torch.Generator().manual_seed(seed + 1000), env.action_space, []
    for episode_seed in torch.randint(2**31 - 1, (episodes,), generator=generator).tolist():
        (obs, _), done = env.reset(seed=episode_seed), False
        while not done:
            action = actor(torch.from_numpy(obs).to(actor.action_scale.device)[None])[0].cpu().numpy()
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
            checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
            assert checkpoint["run"] == script + args_json, "checkpoint.pt is another script's, or of other arguments"
        except Exception as error:
            fail(f"--{'resume' if play is None else 'evaluate'} {folder}: damaged, held by another process, or {error}")
    if args.capture_video and sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")  # renders without a display
    torch.set_num_threads(args.torch_threads)
    torch.set_flush_denormal(True)
    generators = [torch.manual_seed(args.seed), log_generator := torch.Generator().manual_seed(args.seed + 1)]
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    env = make_env(args.env_id, **{"render_mode": "rgb_array"} if args.capture_video else {})
    eval_env, obs_dim, space = make_env(args.env_id), env.observation_space.shape[0], env.action_space
    low, high = torch.tensor(np.stack([space.low, space.high]), dtype=torch.float32, device=device)  # [action_dim]
    actor = Actor(obs_dim, low, high, args.hidden_dim)
    qf1, qf2 = (MLP(obs_dim + len(low), args.hidden_dim, 1) for _ in range(2))
    networks = nn.ModuleDict({"actor": actor, "qf1": qf1, "qf2": qf2}).to(device)
    targets = copy.deepcopy(networks).requires_grad_(False)
    target_actor, qf1_target, qf2_target = targets.values()
    parameters, target_parameters = list(networks.parameters()), list(targets.parameters())
    actor_optimizer = torch.optim.Adam(actor.parameters(), lr=args.learning_rate, fused=True)
    q_optimizer = torch.optim.Adam([*qf1.parameters(), *qf2.parameters()], lr=args.learning_rate, fused=True)
    state = {"networks": networks, "targets": targets, "actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}
    rb, global_step, actor_loss = ReplayBuffer(args.buffer_size, obs_dim, len(low), device), 0, torch.zeros(())
    # --- NE: sparse start (section 2), review gate (section 5) ---
    generators.append(ne_generator := torch.Generator().manual_seed(args.seed + 2))  # TD3's draws stay as they are
    for network in networks.values():
        sparse_start_(masked_layers(network), args.initial_density, ne_generator, args.dense_ends)
    targets.load_state_dict(networks.state_dict())
    state["gate"] = gate = ReviewGate(args.review_floor)
    # --- end NE ---
    if checkpoint:
        for name, part in state.items():
            part.load_state_dict(checkpoint[name])
        for generator, saved in zip(generators, checkpoint["random"], strict=True):
            generator.set_state(saved)
        global_step, actor_loss, rb.added = (checkpoint[name] for name in ("step", "actor_loss", "added"))
        rb.rows[: len(rb)] = checkpoint.pop("rows")
    else:
        (folder / "models").mkdir(parents=True)
        (folder / "args.json").write_text(args_json)
        lock.acquire()
    if args.capture_video:
        name, every = ("play", lambda episode: True) if play else ("run", None)  # None: now and then
        env = gym.wrappers.RecordVideo(env, f"{folder}/videos", every, name_prefix=f"{name}-{global_step}")
    if play:
        returns = evaluate(actor, env, args.eval_episodes, args.seed)
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
        torch.save({name: net.state_dict() for name, net in networks.items()}, f"{folder}/models/{global_step}.pt")
        new = {"run": script + args_json, "step": global_step, "actor_loss": actor_loss.detach(), "added": rb.added}
        # through numpy: of a tensor's slice the whole tensor would be saved
        new |= {"rows": torch.from_numpy(rb.rows.numpy()[: len(rb)]), "random": [g.get_state() for g in generators]}
        new |= {name: part.state_dict() for name, part in state.items()}
        torch.save(new, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")  # whole or not at all

    # --- NE: absent connections (section 1) ---
    absent_qf, absent_actor = absent_connections(qf1, qf2), absent_connections(actor)
    # --- end NE ---
    save_run()
    start_step, start_time, save_every = global_step, time.time(), args.checkpoint_interval or args.total_timesteps
    t, done = args.replay_ratio * max(0, global_step - args.learning_starts), True  # t: gradient steps (section 1)
    for global_step in range(start_step + 1, args.total_timesteps + 1):
        if done:
            obs, _ = env.reset(seed=int(torch.randint(2**31 - 1, ())))

        # Act: at random before learning starts, then with exploration noise
        with torch.no_grad():
            if global_step <= args.learning_starts:
                action = low + (high - low) * torch.rand(len(low), device=device)
            else:
                action = actor(torch.from_numpy(obs).to(device)[None])[0]
                action += args.exploration_noise * actor.action_scale * torch.randn(len(low), device=device)
        action = np.clip(action.cpu().numpy().astype(space.dtype), space.low, space.high)
        check_finite("an observation or an action", obs, action)
        next_obs, reward, terminated, truncated, info = env.step(action)
        check_finite("an observation or a reward", next_obs, reward)
        rb.add(obs, action, reward, next_obs, terminated)  # not `truncated`: the value of a state cut off there counts
        obs, done = next_obs, terminated or truncated

        # Learn: replay_ratio gradient steps for each environment step
        while t < args.replay_ratio * (global_step - args.learning_starts):
            t += 1
            # --- NE: experience review (section 5) ---
            review = args.review and gate.review(torch.rand((), generator=ne_generator).item())
            # --- end NE ---
            batch = rb.sample(args.batch_size, args.review_oldest if review else 1.0)

            # Target policy smoothing, clipped double Q-learning (TD3, algorithm 1)
            with torch.no_grad():
                noise = (args.policy_noise * torch.randn_like(batch.actions)).clamp(-args.noise_clip, args.noise_clip)
                next_actions = (target_actor(batch.next_obs) + noise * actor.action_scale).clamp(low, high)
                qf_next = torch.min(*(qf(batch.next_obs, next_actions) for qf in (qf1_target, qf2_target))).squeeze(1)
                next_values = batch.reward + args.gamma * (1 - batch.terminated) * qf_next
            qf1_values, qf2_values = (qf(batch.obs, batch.actions).squeeze(1) for qf in (qf1, qf2))
            qf1_loss, qf2_loss = F.mse_loss(qf1_values, next_values), F.mse_loss(qf2_values, next_values)
            for p in parameters:
                p.grad = None  # zero_grad() of both optimizers, without its bookkeeping (2 % of a step)
            (qf1_loss + qf2_loss).backward()
            # --- NE: dormant pruning and elastic growth of the critics (sections 3 and 4) ---
            event = (args.grow or args.prune) and t % args.growth_interval == 0
            if event:
                scoring, probe = (rb.sample(2048, generator=ne_generator) for _ in range(2))
                for name in ("qf1", "qf2"):
                    call = networks[name], targets[name], q_optimizer, t, args, ne_generator, scoring[:2], probe[:2]
                    log(f"ne/{name}", grow_and_prune_(*call))  # [:2]: a critic's inputs
                absent_qf = absent_connections(qf1, qf2)
            for weight, active in absent_qf:
                weight.grad.mul_(active)  # 0 where absent, so that Adam's moments stay 0 there (section 1)
            # --- end NE ---
            q_optimizer.step()

            # Delayed updates of the actor and the targets
            if t % args.policy_frequency == 0:
                actor_loss = -qf1(batch.obs, actor(batch.obs)).mean()
                actor_loss.backward(inputs=list(actor.parameters()))  # no gradient for the critic's parameters
                # --- NE: dormant pruning and elastic growth of the actor (sections 3 and 4) ---
                if event:  # growth_interval is a multiple of policy_frequency
                    call = actor, target_actor, actor_optimizer, t, args, ne_generator, scoring[:1], probe[:1]
                    log("ne/actor", grow_and_prune_(*call))  # [:1]: the actor's input
                    absent_actor = absent_connections(actor)
                for weight, active in absent_actor:
                    weight.grad.mul_(active)
                # --- end NE ---
                actor_optimizer.step()
                torch._foreach_lerp_(target_parameters, [p.detach() for p in parameters], args.tau)  # actor and critics
            # --- NE: the review threshold follows the dormant neurons of the critics (section 5) ---
            if args.review and t % args.neuron_interval == 0:
                scoring = rb.sample(2048, generator=ne_generator)
                scores = torch.cat([dormant_scores(h) for qf in (qf1, qf2) for h in qf.hidden(*scoring[:2])])
                gate.update(int((scores <= args.dormant_tau).sum()), len(scores))
                log("ne", {"review_threshold": gate.threshold, "review_share": gate.reviewed / args.neuron_interval})
                gate.reviewed = 0
            # --- end NE ---
            if t % args.neuron_interval == 0:
                sample = rb.sample(2048, generator=log_generator)
                for name, network in networks.items():
                    hidden = network.hidden(*sample[: 1 if name == "actor" else 2])
                    log(f"neurons/{name}", neuron_statistics(hidden) | connection_statistics(network))
            if t % 100 == 0:
                losses = {"qf1_loss": qf1_loss, "qf2_loss": qf2_loss, "qf_loss": (qf1_loss + qf2_loss) / 2}
                losses |= {"qf1_values": qf1_values.mean(), "qf2_values": qf2_values.mean(), "actor_loss": actor_loss}
                check_finite("a loss or a weight", *losses.values(), *parameters)
                log("losses", {name: value.item() for name, value in losses.items()})
                log("charts", {"SPS": (global_step - start_step) / (time.time() - start_time)})

        if args.eval_interval and global_step % args.eval_interval == 0:
            check_finite("a weight", *parameters)
            returns = evaluate(actor, eval_env, args.eval_episodes, args.seed)
            log("eval", {"episodic_return": np.mean(returns), "episodic_return_std": np.std(returns)})
        with contextlib.suppress(OSError):  # a screen that is gone must not end the run
            bar.set_description("stopping with this episode; once more: at once" if stop else None, refresh=False)
            bar.update()
        if done:
            log("charts", {"episodic_return": info["episode"]["r"], "episodic_length": info["episode"]["l"]})
            bar.set_postfix_str(f"return={info['episode']['r']:.1f}, density={density(networks):.3f}", refresh=False)
            if stop:
                break
            if global_step // save_every > (global_step - info["episode"]["l"]) // save_every:  # one was due in it
                save_run()

    rb.added = rb.added if stop else 0  # len(rb) = 0: a finished run keeps all but its replay
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
