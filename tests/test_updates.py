"""TD3's updates, computed again by hand from a real run, and the invariant of masks (section 1)."""

import copy
import itertools
import math
from types import SimpleNamespace
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from harness import MORE, SCRIPTS, Counter, events, scripts_with, short_args

# Without the methods of test_more_methods.py: their updates are not TD3's, and what is theirs is computed there.
TRAINING = [name for name in scripts_with("main", "Actor", "MLP", "ReplayBuffer") if name not in MORE]
BY_HAND = [script for script in TRAINING if script != "layer_norm_td3_continuous"]  # the networks below have no norms
LOW, HIGH = np.float64([-1, -0.5, 2]), np.float64([3, 0.25, 2.5])
SCALE, BIAS = (HIGH - LOW) / 2, (HIGH + LOW) / 2
OBS, ACTIONS = 2, 3
NAMES = ("actor", "qf1", "qf2")


class Lopsided(Counter):
    """Counter with bounds that differ between the dimensions of an action; keeps the actions that it was given."""

    actions: ClassVar[list] = []

    def __init__(self, render_mode=None):
        super().__init__(low=LOW, high=HIGH)

    def step(self, action):
        self.actions.append(np.array(action, dtype=np.float64))
        return super().step(action)


gym.register("Lopsided-v0", entry_point=Lopsided)


def snapshot(network):
    """A network's parameters and masks, as arrays; float64."""
    return {name: value.detach().numpy().astype(np.float64) for name, value in network.state_dict().items()}


def gradients(network):
    return {name: None if p.grad is None else p.grad.numpy().copy() for name, p in network.named_parameters()}


class Recording:
    """What happened in a run of `main`.

    steps: of each gradient step the batch, the random state after it was drawn, and all networks before the step
    (`networks`; the last entry of `after` is the end of the run), after the critics' Adam step (`critics`), and at the
    actor's Adam step, if there was one; acts: (observation, the actor then, random state) of each action with noise.
    """

    def __init__(self, script, monkeypatch, before_start=None, at_adam_step=None, **changes):
        self.module, self.steps, self.acts, self.networks, self.targets = SCRIPTS[script], [], [], {}, {}
        values = {"total_timesteps": 120, "learning_starts": 20, "hidden_dim": 8, "growth_interval": 10}
        values |= {"learning_rate": 1e-2, "prune": False, "inject": "none", "env_id": "Lopsided-v0"}
        self.args, self.clipped_targets = short_args(script, **(values | changes)), 0
        module, Lopsided.actions = self.module, []
        deepcopy, adam_step = copy.deepcopy, torch.optim.Adam.step

        def made(kind, network):
            names = [name for name in NAMES if name.startswith(kind) and name not in self.networks]
            self.networks[names[0]] = network
            if before_start:
                before_start(network)
            if kind == "actor":
                network.register_forward_hook(acting)
            return network

        def acting(network, inputs, output):
            if len(inputs[0]) == 1 and network is self.networks["actor"]:
                self.acts.append((inputs[0][0].double().numpy(), snapshot(network), torch.get_rng_state()))

        def copied(thing, *rest):
            result = deepcopy(thing, *rest)
            if isinstance(thing, torch.nn.ModuleDict):
                assert dict(thing) == self.networks
                self.targets |= result
            return result

        class Buffer(module.ReplayBuffer):
            def sample(buffer, batch_size, *given, **named):
                batch = super().sample(batch_size, *given, **named)
                if batch_size == self.args.batch_size:
                    arrays = SimpleNamespace(**{k: v.double().numpy() for k, v in batch._asdict().items()})
                    networks, rng = self.all_networks(), torch.get_rng_state()
                    self.steps.append(SimpleNamespace(batch=arrays, rng=rng, networks=networks, actor=None))
                return batch

        def step(optimizer, *given):
            step, before = self.steps[-1], self.all_networks()
            now = {name: gradients(self.networks[name]) for name in NAMES}
            adam_step(optimizer, *given)
            of_actor = optimizer.param_groups[0]["params"][0] is self.networks["actor"].fc1.weight
            done = SimpleNamespace(before=before, gradients=now, after=self.all_networks())
            setattr(step, "actor" if of_actor else "critics", done)
            if at_adam_step:
                at_adam_step(self, NAMES[:1] if of_actor else NAMES[1:], optimizer)

        actor, q_network = module.Actor, module.MLP
        monkeypatch.setattr(module, "Actor", lambda *given: made("actor", actor(*given)))
        monkeypatch.setattr(module, "MLP", lambda *given: made("q", q_network(*given)))
        monkeypatch.setattr(module.copy, "deepcopy", copied)
        monkeypatch.setattr(module, "ReplayBuffer", Buffer)
        monkeypatch.setattr(torch.optim.Adam, "step", step)
        self.folder = module.main(self.args)
        self.end = self.all_networks()
        self.after = [step.networks for step in self.steps[1:]] + [self.end]
        learning = self.args.total_timesteps - self.args.learning_starts
        assert len(self.steps) == self.args.replay_ratio * learning

    def all_networks(self):
        return {name: snapshot(network) for name, network in self.networks.items()} | {
            f"target {name}": snapshot(network) for name, network in self.targets.items()
        }


# ===== The networks and their gradients, by hand =====


def forward(p, x):
    """A ReLU network with two hidden layers -> their activations, the output."""
    h1 = np.maximum(x @ p["fc1.weight"].T + p["fc1.bias"], 0)
    h2 = np.maximum(h1 @ p["fc2.weight"].T + p["fc2.bias"], 0)
    return h1, h2, h2 @ p["fc3.weight"].T + p["fc3.bias"]


def backward(p, x, d_output):
    """The gradient of the parameters and of the input, by the chain rule."""
    h1, h2, _ = forward(p, x)
    d2 = (d_output @ p["fc3.weight"]) * (h2 > 0)
    d1 = (d2 @ p["fc2.weight"]) * (h1 > 0)
    result = {}
    for name, d, h in (("fc1", d1, x), ("fc2", d2, h1), ("fc3", d_output, h2)):
        mask = p.get(f"{name}.mask", np.ones_like(p[f"{name}.weight"]))
        result |= {f"{name}.weight": d.T @ h * mask, f"{name}.bias": d.sum(0)}
    return result, d1 @ p["fc1.weight"]


def q_value(p, obs, actions):
    return forward(p, np.concatenate([obs, actions], 1))[2][:, 0]


def policy(p, obs):
    return np.tanh(forward(p, obs)[2]) * SCALE + BIAS


def randn(rng_state, *shape):
    generator = torch.Generator()
    generator.set_state(rng_state)
    return torch.randn(*shape, generator=generator).double().numpy()


def target_values(recording, step):
    """y = r + gamma (1 - terminated) min(Q1', Q2')(s', clip(pi'(s') + clip(noise)))."""
    args, batch, networks = recording.args, step.batch, step.networks
    noise = np.clip(args.policy_noise * randn(step.rng, *batch.actions.shape), -args.noise_clip, args.noise_clip)
    noisy = policy(networks["target actor"], batch.next_obs) + noise * SCALE
    actions = np.clip(noisy, LOW, HIGH)
    recording.clipped_targets += (noisy != actions).sum()
    values = [q_value(networks[f"target {name}"], batch.next_obs, actions) for name in ("qf1", "qf2")]
    return batch.reward + args.gamma * (1 - batch.terminated) * np.minimum(*values)


def critic_by_hand(recording, step, name):
    """-> loss, mean value, gradients of one critic."""
    batch, p = step.batch, step.networks[name]
    values = q_value(p, batch.obs, batch.actions)
    errors = values - target_values(recording, step)
    inputs = np.concatenate([batch.obs, batch.actions], 1)
    masked = p | {key: value for key, value in step.critics.before[name].items() if key.endswith("mask")}
    return (errors**2).mean(), values.mean(), backward(masked, inputs, 2 * errors[:, None] / len(errors))[0]


def actor_by_hand(step):
    """-> loss, gradients of the actor, against the critics after their step."""
    obs, p, q = step.batch.obs, step.actor.before["actor"], step.actor.before["qf1"]
    actions = policy(p, obs)
    _, d_inputs = backward(q, np.concatenate([obs, actions], 1), np.full((len(obs), 1), -1 / len(obs)))
    d_output = d_inputs[:, OBS:] * SCALE * (1 - ((actions - BIAS) / SCALE) ** 2)
    return -q_value(q, obs, actions).mean(), backward(p, obs, d_output)[0]


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        size = np.abs(expected[name]).max()
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4 * size + 1e-9), name


def test_the_gradients_by_hand_are_those_of_finite_differences():
    rng = np.random.default_rng(0)
    shapes = {"fc1": (8, OBS), "fc2": (8, 8), "fc3": (1, 8)}
    p = {f"{name}.weight": rng.normal(size=shape) for name, shape in shapes.items()}
    p |= {f"{name}.bias": rng.normal(size=shape[0]) for name, shape in shapes.items()}
    x, d_output = rng.normal(size=(5, OBS)), rng.normal(size=(5, 1))
    by_hand, d_x = backward(p, x, d_output)
    for array, gradient in [(p[name], by_hand[name]) for name in p] + [(x, d_x)]:
        for place in np.ndindex(array.shape):
            values = []
            for change in (1e-6, -2e-6):
                array[place] += change
                values.append((forward(p, x)[2] * d_output).sum())
            array[place] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(gradient[place], rel=1e-4, abs=1e-7)


# ===== Gradients, losses, steps =====

NOISES = [{"policy_noise": 0.0}, {"policy_noise": 0.5, "noise_clip": 0.4}, {"policy_noise": 1.5, "noise_clip": 1.4}]


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("script", BY_HAND)
def test_critics_and_actor_learn_by_the_gradients_of_td3(script, noise, monkeypatch):
    recording = Recording(script, monkeypatch, learning_rate=1e-3, **noise)
    logged = {tag: dict(values) for tag, values in events(recording.folder).items()}
    terminated = np.concatenate([step.batch.terminated for step in recording.steps])
    assert 0.1 < terminated.mean() < 0.3
    for t, step in enumerate(recording.steps, start=1):
        critics = {name: critic_by_hand(recording, step, name) for name in ("qf1", "qf2")}
        for name, (_, _, gradient) in critics.items():
            assert_same_gradients(step.critics.gradients[name], gradient)
        assert (step.actor is not None) == (t % 2 == 0)
        if step.actor:
            actor_loss, gradient = actor_by_hand(step)
            assert_same_gradients(step.actor.gradients["actor"], gradient)
        if t % 100 == 0:
            losses = {name: logged[f"losses/{name}"][20 + t] for name in ("qf1_loss", "qf2_loss", "actor_loss")}
            assert losses["qf1_loss"] == pytest.approx(critics["qf1"][0], rel=1e-4)
            assert losses["qf2_loss"] == pytest.approx(critics["qf2"][0], rel=1e-4)
            assert losses["actor_loss"] == pytest.approx(actor_loss, rel=1e-4)
            assert logged["losses/qf1_values"][20 + t] == pytest.approx(critics["qf1"][1], rel=1e-4)
            assert logged["losses/qf2_values"][20 + t] == pytest.approx(critics["qf2"][1], rel=1e-4)
    assert noise["policy_noise"] < 1 or recording.clipped_targets > 1000


@pytest.mark.parametrize("script", TRAINING)
def test_every_optimizer_step_is_the_textbook_adam(script, monkeypatch):
    recording = Recording(script, monkeypatch, total_timesteps=60)
    for names, part in ((NAMES[1:], "critics"), (NAMES[:1], "actor")):
        steps = [getattr(step, part) for step in recording.steps if getattr(step, part)]
        assert len(steps) == 40 if part == "critics" else 20
        for name in names:
            for key in steps[0].gradients[name]:
                m = v = np.zeros(1)
                for n, step in enumerate(steps, start=1):
                    gradient = step.gradients[name][key].astype(np.float64)
                    m = 0.9 * m + 0.1 * gradient
                    v = 0.999 * v + 0.001 * gradient**2
                    change = -1e-2 * (m / (1 - 0.9**n)) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8)
                    found = step.after[name][key] - step.before[name][key]
                    assert found == pytest.approx(change, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("script", TRAINING)
def test_targets_start_as_exact_copies_and_follow_by_polyak_averaging(script, monkeypatch):
    recording = Recording(script, monkeypatch, tau=0.03)
    assert list(recording.targets) == list(NAMES)
    for name in NAMES:
        online, target = recording.steps[0].networks[name], recording.steps[0].networks[f"target {name}"]
        assert online.keys() == target.keys() and all((online[key] == target[key]).all() for key in online)
        own = {p.data_ptr() for p in recording.networks[name].parameters()}
        assert not own & {p.data_ptr() for p in recording.targets[name].parameters()}
        for t, (step, after) in enumerate(zip(recording.steps, recording.after, strict=True), start=1):
            for key, before in step.networks[f"target {name}"].items():
                if not key.endswith(("weight", "bias")):
                    continue
                expected = before + (t % 2 == 0) * 0.03 * (after[name][key] - before)
                assert after[f"target {name}"][key] == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("script", TRAINING)
def test_actor_and_targets_learn_at_every_third_step_only(script, monkeypatch):
    recording = Recording(
        script, monkeypatch, total_timesteps=50, policy_frequency=3, growth_interval=6, rigl_interval=6
    )
    for t, (step, after) in enumerate(zip(recording.steps, recording.after, strict=True), start=1):
        changed = {
            name
            for name, before in step.networks.items()
            if any((before[key] != after[name][key]).any() for key in before if key.endswith(("weight", "bias")))
        }
        delayed = {"actor", "target actor", "target qf1", "target qf2"} if t % 3 == 0 else set()
        assert changed == {"qf1", "qf2"} | delayed


@pytest.mark.parametrize("script", TRAINING)
def test_a_replay_ratio_takes_so_many_gradient_steps_after_each_environment_step(script, monkeypatch):
    changes = {"total_timesteps": 50, "replay_ratio": 3, "policy_frequency": 2, "neuron_interval": 10}
    recording = Recording(script, monkeypatch, **changes)
    assert len(recording.steps) == 3 * len(recording.acts) == 90
    assert [step.actor is not None for step in recording.steps] == [t % 2 == 0 for t in range(1, 91)]
    for (_, acting, _), step in zip(recording.acts, recording.steps[::3], strict=True):  # three steps between actions
        assert all((acting[key] == value).all() for key, value in step.networks["actor"].items())
    assert all((a.batch.reward != b.batch.reward).any() for a, b in itertools.pairwise(recording.steps))
    log = events(recording.folder)
    assert [step for step, _ in log["neurons/actor/fau"]] == [20 + math.ceil(t / 3) for t in range(10, 91, 10)]


@pytest.mark.parametrize("script", TRAINING)
def test_the_actors_update_leaves_the_critics_and_their_gradients_alone(script, monkeypatch):
    recording, compared = Recording(script, monkeypatch), 0
    for step in recording.steps:
        for name in NAMES[1:] if step.actor else ():
            for key, gradient in step.critics.gradients[name].items():
                assert (step.actor.gradients[name][key] == gradient).all()
                assert (step.actor.after[name][key] == step.critics.after[name][key]).all()
                compared += 1
    assert compared == 50 * 2 * len(list(recording.networks["qf1"].parameters()))


@pytest.mark.parametrize("script", TRAINING)
def test_targets_take_no_gradient(script, monkeypatch):
    recording = Recording(script, monkeypatch, total_timesteps=30)
    for target in recording.targets.values():
        assert all(p.grad is None for p in target.parameters())


# ===== Acting =====


@pytest.mark.parametrize("script", TRAINING)
def test_actions_before_learning_starts_are_uniform_between_the_bounds(script, monkeypatch):
    Recording(script, monkeypatch, learning_starts=3000, total_timesteps=3010)
    actions = (np.array(Lopsided.actions[:3000]) - LOW) / (HIGH - LOW)
    assert actions.shape == (3000, ACTIONS)
    for dimension in actions.T:
        ranks = np.arange(1, 3001) / 3000
        assert np.abs(np.sort(dimension) - ranks).max() < 1.95 / math.sqrt(3000)  # Kolmogorov-Smirnov: p = 0.001
        assert np.abs(np.corrcoef(dimension[:-1], dimension[1:])[0, 1]) < 0.06
    assert np.abs(np.corrcoef(actions.T) - np.eye(ACTIONS)).max() < 0.06


@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("script", BY_HAND)
def test_exploration_noise_is_in_units_of_half_the_range_and_clipped_to_the_bounds(script, noise, monkeypatch):
    recording = Recording(script, monkeypatch, exploration_noise=noise)
    actions = Lopsided.actions[20:]
    assert len(actions) == len(recording.acts) == 100
    clipped = 0
    for action, (obs, actor, rng) in zip(actions, recording.acts, strict=True):
        expected = policy(actor, obs[None])[0] + noise * SCALE * randn(rng, ACTIONS)
        clipped += ((expected < LOW) | (expected > HIGH)).sum()
        assert action == pytest.approx(np.clip(expected, LOW, HIGH), abs=1e-5)
    assert noise < 1 or clipped > 30


@pytest.mark.parametrize("script", TRAINING)
def test_the_actor_acts_on_the_latest_observation_and_its_latest_weights(script, monkeypatch):
    recording = Recording(script, monkeypatch)
    counted = [(episode, step) for episode in range(24) for step in range(5)][20:]
    assert [tuple(obs) for obs, _, _ in recording.acts] == counted
    for (_, acting, _), step in zip(recording.acts, recording.steps, strict=True):
        assert all((acting[key] == value).all() for key, value in step.networks["actor"].items())


# ===== The invariant =====


@pytest.mark.parametrize("script", scripts_with("main", "Actor", "MLP", "grow_and_prune_"))
def test_absent_connections_and_their_moments_are_zero_after_every_step(script, monkeypatch):
    lost, grown, previous, moved, seen = {}, {}, {}, {}, dict.fromkeys(NAMES, 0)

    def silence(network):
        with torch.no_grad():
            network.fc1.bias[:8] = -1000
            network.fc2.bias[5:11] = -1000

    def check(recording, names, optimizer):
        for name in names:
            seen[name] += 1
            for l, layer in enumerate(recording.module.masked_layers(recording.networks[name])):
                key, absent, mask = (name, l), ~layer.mask, layer.mask.clone()
                tensors = layer.weight, *(optimizer.state[layer.weight][m] for m in ("exp_avg", "exp_avg_sq"))
                assert len(tensors) == 3 and not any(tensor[absent].any() for tensor in tensors)
                if key in previous:
                    lost[name] = lost.get(name, 0) + int((previous[key][0] & ~mask).sum())
                    grown[name] = grown.get(name, 0) + int((~previous[key][0] & mask).sum())
                    moved[key] = bool((previous[key][1] != layer.weight).any())
                previous[key] = mask, layer.weight.detach().clone()

    changes = {"total_timesteps": 360, "learning_starts": 60, "hidden_dim": 32, "growth_interval": 30, "prune": True}
    recording = Recording(script, monkeypatch, before_start=silence, at_adam_step=check, **changes)
    assert seen == {"actor": 150, "qf1": 300, "qf2": 300}
    assert all(lost[name] > 50 and grown[name] > 500 for name in NAMES) and all(moved.values())
    for step in [step.networks for step in recording.steps] + [recording.end]:
        for name in NAMES:
            online, target = step[name], step[f"target {name}"]
            for layer in ("fc1", "fc2", "fc3"):
                assert (online[f"{layer}.mask"] == target[f"{layer}.mask"]).all()
                assert not online[f"{layer}.weight"][online[f"{layer}.mask"] == 0].any()
                assert not target[f"{layer}.weight"][target[f"{layer}.mask"] == 0].any()
