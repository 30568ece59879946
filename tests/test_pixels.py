"""DrQ, NE-DrQ and the methods beside them, from pixels: each part against a computation of the test's own."""

import contextlib
import copy
import inspect
import math
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import harness
import numpy as np
import pytest
import test_arguments
import test_project
import test_resume
import torch
import torch.nn.functional as F

SCRIPTS = harness.PIXELS
NE, DRQ = SCRIPTS["ne_drq_pixels"], SCRIPTS["drq_pixels"]
RESET, REDO = SCRIPTS["reset_drq_pixels"], SCRIPTS["redo_drq_pixels"]
INJECTION, LAYER_NORM = SCRIPTS["injection_drq_pixels"], SCRIPTS["layer_norm_drq_pixels"]
HEADS = ("actor", "qf1", "qf2")
OFF = {"grow": False, "prune": False, "review": False, "initial_density": 1.0}
with_all = pytest.mark.parametrize("script", SCRIPTS)
# of all scripts, but only NE each time: the others share its code to the letter, but for what is their own
ne_first = [pytest.param(name, marks=[] if name == "ne_drq_pixels" else [pytest.mark.slow]) for name in SCRIPTS]
with_all_but_most_slow = pytest.mark.parametrize("script", ne_first)


# ===== Short runs =====


def short_args(module, **changes):
    """Arguments of a run of a few seconds: episodes of 40 agent steps, small pictures, small heads."""
    values = {
        "env_id": "dm_control/cartpole-balance-v0",
        "image_size": 20,
        "action_repeat": 25,
        "total_timesteps": 100,
        "learning_starts": 20,
        "batch_size": 8,
        "hidden_dim": 16,
        "feature_dim": 8,
        "eval_interval": 0,
        "neuron_interval": 40,
        "growth_interval": 40,
        "cuda": False,
    }
    return module.Args(**{k: v for k, v in (values | changes).items() if k in module.Args.__dataclass_fields__})


def sketch(env):
    """A picture that is made from the task's state, a hundred times faster than rendering."""
    size, state = env.unwrapped.render_kwargs["height"], env.unwrapped.physics.get_state()
    waves = np.sin(np.outer(np.arange(1, 3 * size * size + 1) % 97, state).sum(1))
    return (127 + 120 * waves).astype(np.uint8).reshape(3, size, size)


def draw(patch):
    """Makes all scripts sketch tasks, not render them."""
    for module in SCRIPTS.values():
        patch.setattr(module, "picture", sketch)
        patch.setattr(module, "make_env", unrendered(module.make_env))


@pytest.fixture
def drawn(monkeypatch):
    """Tasks are sketched, not rendered."""
    draw(monkeypatch)


def unrendered(make_env):
    def making(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gym.wrappers.OrderEnforcing, "render", lambda self: None)
            return make_env(*arguments)

    return making


def train(module, **changes):
    """A short run -> (folder, model, log)."""
    folder = module.main(short_args(module, **changes))
    return folder, harness.saved(folder / "model.pt"), harness.events(folder)


# ===== Random shift =====


@pytest.mark.parametrize(("shift", "size"), [(4, 20), (2, 9), (0, 5), (4, 3)])
def test_a_random_shift_is_a_crop_of_the_image_padded_with_its_edges(shift, size):
    torch.manual_seed(shift)
    images = torch.randint(0, 256, (300, 6, size, size + 1), dtype=torch.uint8)
    before, shifted = images.clone(), NE.random_shift(images, shift)
    assert shifted.shape == images.shape and shifted.dtype == torch.uint8 and torch.equal(images, before)
    places = []
    for image, result in zip(images.numpy(), shifted.numpy(), strict=True):
        padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)), mode="edge")
        crops = {
            (y, x): padded[:, y : y + size, x : x + size + 1]
            for y in range(2 * shift + 1)
            for x in range(2 * shift + 1)
        }
        places.append([place for place, crop in crops.items() if np.array_equal(crop, result)])
    assert all(places)
    if size > 2 * shift:
        assert all(len(found) == 1 for found in places)
        seen = np.array([found[0] for found in places])
        for axis in (0, 1):  # every shift, each about as often
            counts = np.bincount(seen[:, axis], minlength=2 * shift + 1)
            assert len(counts) == 2 * shift + 1 and counts.min() > 300 / (2 * shift + 1) / 3
        assert shift == 0 or abs(np.corrcoef(seen.T)[0, 1]) < 0.2


def test_a_random_shift_draws_from_the_usual_generator_and_is_repeatable():
    images = torch.randint(0, 256, (50, 3, 12, 12), dtype=torch.uint8)
    torch.manual_seed(1)
    first = NE.random_shift(images, 4)
    assert not torch.equal(first, NE.random_shift(images, 4))
    torch.manual_seed(1)
    assert torch.equal(first, NE.random_shift(images, 4))


# ===== Replay buffer =====


class Naive:
    """Stores whole stacks, and which frames they are made of."""

    def __init__(self, frame_stack):
        self.k, self.transitions, self.frames = frame_stack, [], 0

    def start(self, frame):
        self.stack, self.numbers = [frame] * self.k, [self.frames] * self.k
        self.frames += 1

    def add(self, action, reward, frame, terminated):
        obs, first = np.concatenate(self.stack), self.numbers[0]
        self.stack, self.numbers = [*self.stack[1:], frame], [*self.numbers[1:], self.frames]
        self.frames += 1
        self.transitions.append((first, obs, action, reward, np.concatenate(self.stack), float(terminated)))

    def held(self, capacity, slots):
        """The last `capacity` of those whose frames are among the last `slots`."""
        return [item for item in self.transitions[-capacity:] if item[0] >= self.frames - slots]


def fill(buffers, lengths, rng, size=5, after=None):
    """Plays episodes of these lengths into all of the buffers; a transition's reward is its number."""
    number = 0
    for length in lengths:
        frame = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
        for rb in buffers:
            rb.start(frame)
        for step in range(length):
            frame = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
            action = torch.from_numpy(rng.normal(size=2).astype(np.float32))
            for rb in buffers:
                rb.add(action, number, frame, step == length - 1 and number % 2 == 0)
            number += 1
            if after:
                after()


def check_batch(batch, held):
    """Each row is one of the held transitions, whole -> their rewards, which are their numbers."""
    by_number = {item[3]: item for item in held}
    for obs, action, reward, next_obs, terminated in zip(*batch, strict=True):
        _, *expected = by_number[int(reward)]
        assert np.array_equal(obs, expected[0]) and torch.equal(action, expected[1])
        assert np.array_equal(next_obs, expected[3]) and terminated == expected[4]
    return {int(reward) for reward in batch.reward}


@pytest.mark.parametrize("frame_stack", [1, 3, 4])
@pytest.mark.parametrize(
    ("capacity", "lengths"),
    [
        (40, [7, 30]),
        (40, [25, 3, 60, 41, 9]),  # the ring wraps in the middle of episodes
        (40, [1] * 90),  # a frame more for each transition: frames run out before transitions do
        (40, [2, 1, 3] * 40),
        (7, [30, 1, 1, 1, 9]),
        (1, [1, 1, 5, 2]),
    ],
)
@pytest.mark.parametrize("module", [NE, DRQ], ids=lambda module: module.__name__)
def test_the_buffer_gives_what_one_that_stores_whole_stacks_would(module, capacity, lengths, frame_stack):
    rng = np.random.default_rng(capacity)
    rb = module.ReplayBuffer(capacity, 5, frame_stack, 2, torch.device("cpu"))
    naive, counted = Naive(frame_stack), []

    def compare():
        held = naive.held(capacity, len(rb.frames))
        assert len(rb) == len(held) >= 1
        counted.append(len(held))
        if len(naive.transitions) % 7 == 0 or len(naive.transitions) == sum(lengths):
            batch = rb.sample(32 * len(held))
            assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8
            assert batch.obs.shape == batch.next_obs.shape == (32 * len(held), 3 * frame_stack, 5, 5)
            assert check_batch(batch, held) == {item[3] for item in held}
            if module is NE:
                quarter = held[: max(1, len(held) // 4)]
                assert check_batch(rb.sample(300, oldest=0.25), quarter) == {item[3] for item in quarter}

    fill([rb, naive], lengths, rng, after=compare)
    if min(lengths) >= 8 and sum(lengths) > capacity:
        assert counted[-1] == capacity


def test_a_buffer_of_100_000_transitions_takes_at_most_2_6_gb_and_check_memory_knows_how_much(monkeypatch, capsys):
    rb = NE.ReplayBuffer(100_000, 84, 3, 6, torch.device("cpu"), torch.device("meta"))
    size = rb.frames.nbytes + rb.rows.nbytes + rb.spans.nbytes
    assert 2.1e9 < size < 2.6e9
    monkeypatch.setattr(NE, "free_memory", lambda device: size)
    NE.check_memory(NE.Args(), 6, torch.device("cpu"))
    monkeypatch.setattr(NE, "free_memory", lambda device: size - 1)
    with pytest.raises(SystemExit):
        NE.check_memory(NE.Args(), 6, torch.device("cpu"))
    assert "needs 2.4 GB" in capsys.readouterr().err


def test_draws_with_a_generator_leave_the_other_draws_as_they_are():
    rb = NE.ReplayBuffer(40, 5, 3, 2, torch.device("cpu"))
    fill([rb], [30, 30], np.random.default_rng(0))
    before = torch.get_rng_state()
    draws = [rb.sample(50, generator=torch.Generator().manual_seed(seed)).reward.tolist() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("lengths", [[12], [25, 3, 60], [1] * 70])
def test_a_saved_buffer_is_the_same_after_loading_and_a_damaged_one_is_refused(lengths, tmp_path):
    rb, loaded = (NE.ReplayBuffer(40, 5, 3, 2, torch.device("cpu")) for _ in range(2))
    fill([rb], lengths, np.random.default_rng(0))
    rb.save(tmp_path / "whole")
    counts = rb.size, rb.position, rb.frame_count
    loaded.load(tmp_path / "whole", *counts)
    fill([rb, loaded], [5, 1, 20], np.random.default_rng(1))  # goes on as the saved one would
    batches = [buffer.sample(200, generator=torch.Generator().manual_seed(0)) for buffer in (rb, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
    content = (tmp_path / "whole").read_bytes()
    for name, damaged in {"short": content[:-1], "long": content + b"x", "empty": b""}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(OSError):
            NE.ReplayBuffer(40, 5, 3, 2, torch.device("cpu")).load(tmp_path / name, *counts)


# ===== The task =====


def test_a_task_is_rendered_repeats_actions_and_is_cut_off_at_its_time_limit():
    NE.set_process(NE.Args())
    env = NE.make_env("dm_control/cartpole-swingup-v0", 30)  # without OpenGL this says which package to install
    env.reset(seed=3)
    first = NE.picture(env)
    assert first.shape == (3, 30, 30) and first.dtype == np.uint8 and first.std() > 5
    camera = env.unwrapped.physics.render(30, 30, camera_id=0)
    assert np.array_equal(first, camera.transpose(2, 0, 1))
    other = gym.make("dm_control/cartpole-swingup-v0", disable_env_checker=True)
    other.reset(seed=3)
    action, ends = env.action_space.high, []
    for _ in range(334):
        reward, terminated, truncated = NE.repeat_action(env, action, 3)
        taken = [other.step(action)[1:4] for _ in range(3 if len(ends) < 333 else 1)]
        assert reward == pytest.approx(sum(r for r, _, _ in taken))
        ends.append((terminated, truncated))
    assert ends == [(False, False)] * 333 + [(False, True)]  # 1000 frames, and a time limit is no termination
    assert taken[-1][2]
    assert not np.array_equal(NE.picture(env), first)


def test_an_action_is_no_longer_repeated_when_the_task_has_ended():
    steps = [(1.0, False, False), (2.0, True, False), (4.0, False, False)]
    env = SimpleNamespace(step=lambda action: (None, *steps.pop(0), {}))
    assert NE.repeat_action(env, None, 3) == (3.0, True, False) and len(steps) == 1


def test_actions_are_scaled_to_the_tasks_bounds():
    space = gym.spaces.Box(np.array([-1.0, 0.0, -3.0]), np.array([1.0, 10.0, -1.0]), dtype=np.float64)
    assert NE.to_task(torch.tensor([-1.0, -1.0, -1.0]), space).tolist() == [-1, 0, -3]
    assert NE.to_task(torch.tensor([0.3, 0.5, 1.0]), space).tolist() == pytest.approx([0.3, 7.5, -1])


@pytest.mark.parametrize("truncate", [True, False])
@pytest.mark.parametrize("module", [NE, DRQ], ids=lambda module: module.__name__)
def test_a_run_acts_on_the_last_frames_and_stores_what_came_of_it(module, truncate, monkeypatch):
    task, stacks, stored = harness.Counter(5, truncate, low=(-3.0,), high=(1.0,)), [], []

    def number(env):
        return np.full((3, 20, 20), 10 * env.episode + env.step_number, np.uint8)

    class Encoder(module.Encoder):
        def forward(self, obs):
            if len(obs) == 1:  # not a batch
                stacks.append(obs[0, ::3, 0, 0].tolist())
            return super().forward(obs)

    class Buffer(module.ReplayBuffer):
        def start(self, frame):
            stored.append(int(frame[0, 0, 0]))
            super().start(frame)

        def add(self, action, reward, frame, terminated):
            stored.append((float(action), float(reward), int(frame[0, 0, 0]), bool(terminated)))
            super().add(action, reward, frame, terminated)

    replaced = {"make_env": lambda *given: task, "picture": number, "Encoder": Encoder, "ReplayBuffer": Buffer}
    for name, new in replaced.items():
        monkeypatch.setattr(module, name, new)
    train(module, action_repeat=2, total_timesteps=9, learning_starts=3, growth_interval=6)
    # an episode of 5 frames is 3 agent steps, of which the last one is a frame long
    for episode in range(3):
        first, *steps = stored[4 * episode : 4 * episode + 4]
        assert first == 10 * episode
        assert [frame - first for _, _, frame, _ in steps] == [2, 4, 5]
        assert [terminated for *_, terminated in steps] == [False, False, not truncate]
        for (action, reward, _, _), frames in zip(steps, (2, 2, 1), strict=True):
            assert -1 <= action <= 1 and reward == pytest.approx(frames * (2 * action - 1), abs=1e-5)
    assert stacks == [[a + b for b in shown] for a in (10, 20) for shown in ([0, 0, 0], [0, 0, 2], [0, 2, 4])]


# ===== Networks =====


def test_the_actors_log_density_is_that_of_a_squashed_gaussian_and_its_log_std_is_bounded():
    torch.manual_seed(0)
    actor, features = NE.Actor(8, 3, 16), torch.randn(500, 8)
    torch.nn.init.normal_(actor.fc3.weight)
    mean, log_std = actor(features).double().chunk(2, 1)
    assert log_std.min() >= -10 and log_std.max() <= 2 and log_std.min() < -8 and log_std.max() > 1
    raw = actor.fc3(actor.hidden(features)[-1]).double().chunk(2, 1)[1]
    torch.testing.assert_close(log_std, -4 + 6 * torch.tanh(raw), atol=1e-5, rtol=1e-5)
    torch.manual_seed(5)
    actions, log_prob = actor.sample(features)
    torch.manual_seed(5)
    before = mean + log_std.exp() * torch.randn(500, 3)
    torch.testing.assert_close(actions.double(), torch.tanh(before), atol=1e-5, rtol=1e-4)
    normal = torch.distributions.Normal(mean, log_std.exp())
    squashed = torch.distributions.TransformedDistribution(
        normal, torch.distributions.transforms.TanhTransform(cache_size=1)
    )
    expected = squashed.log_prob(squashed.transforms[0](before)).sum(1)
    torch.testing.assert_close(log_prob.double(), expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(actor.greedy(features), torch.tanh(actor(features)[:, :3]))


@pytest.mark.parametrize("size", [15, 16, 20, 48, 84])
def test_the_encoder_has_the_papers_convolutions(size):
    encoder = NE.Encoder(3, size)
    frames = torch.randint(0, 256, (2, 9, size, size), dtype=torch.uint8)
    h = frames.double() / 255
    for number, stride in ((1, 2), (2, 1), (3, 1), (4, 1)):
        conv = getattr(encoder, f"conv{number}")
        assert conv.weight.shape == (32, 9 if number == 1 else 32, 3, 3)
        h = F.conv2d(h, conv.weight.double(), conv.bias.double(), stride=stride).clamp(min=0)
    assert encoder.out_dim == h[0].numel()
    torch.testing.assert_close(encoder(frames).double(), h.flatten(1), atol=1e-5, rtol=1e-4)
    projection = NE.make_projection(encoder, 50)
    linear, norm = projection[0], projection[1]
    expected = torch.tanh(F.layer_norm(linear(encoder(frames)), (50,), norm.weight, norm.bias))
    torch.testing.assert_close(projection(encoder(frames)), expected)


def test_heads_see_features_of_each_observation_in_its_place():
    encoder = NE.Encoder(1, 15)
    projections = [NE.make_projection(encoder, 4) for _ in range(2)]
    obs = torch.randint(0, 256, (600, 3, 15, 15), dtype=torch.uint8)
    batch = NE.Batch(obs, torch.randn(600, 2), None, None, None)
    seen = NE.inputs(batch, encoder, *projections)
    assert list(seen) == list(HEADS)
    for number in (0, 255, 256, 599):
        critic, actor = (projection(encoder(obs[number : number + 1]))[0] for projection in projections)
        torch.testing.assert_close(seen["qf1"][0][number], critic)
        torch.testing.assert_close(seen["actor"][0][number], actor)
    assert all(torch.equal(seen[qf][1], batch.actions) for qf in ("qf1", "qf2"))


# ===== One update, watched =====


class Watched:
    """A run whose networks, optimizer steps, draws and losses are seen."""

    def __init__(self, module, monkeypatch, at_step, **changes):
        self.parts, self.optimizers, self.shifted, self.losses, self.samples, run = {}, [], [], [], [], self
        fake = SimpleNamespace(**vars(F))

        def named(make, *names):
            def making(*arguments):
                name = next(name for name in names if name not in run.parts)
                run.parts[name] = make(*arguments)
                return run.parts[name]

            return making

        def duplicate(original):
            made = copy.deepcopy(original)
            for name, part in list(run.parts.items()):
                if part is original:
                    run.parts.setdefault(f"{name}_target", made)
            return made

        def shift(images, pixels):
            run.shifted.append(original_shift(images, pixels))
            return run.shifted[-1]

        def mse(values, targets):
            run.losses.append((values.detach(), targets))
            return F.mse_loss(values, targets)

        def sample(self, features):
            run.samples.append((torch.get_rng_state(), *original_sample(self, features)))
            return run.samples[-1][1:]

        class Buffer(module.ReplayBuffer):
            def sample(self, batch_size, *given, **options):
                batch = super().sample(batch_size, *given, **options)
                if batch_size == 8:  # some of the episodes ended there
                    run.batch = batch = batch._replace(terminated=(torch.arange(8) % 3 == 0).float())
                return batch

        original_shift, original_sample = module.random_shift, module.Actor.sample
        fake.mse_loss, step = mse, module.adam_step_

        def adam_step_(optimizer):
            if optimizer not in run.optimizers:
                run.optimizers.append(optimizer)
            before = run.copies()
            step(optimizer)
            at_step(run, ("critics", "actor", "alpha")[run.optimizers.index(optimizer)], before)

        names = {"Encoder": ["encoder"], "make_projection": ["critic_projection", "actor_projection"]}
        names |= {"Actor": ["actor"], "QNetwork": ["qf1", "qf2"]}
        with monkeypatch.context() as patch:
            patch.setattr(module.Actor, "sample", sample)
            for name, given in names.items():
                patch.setattr(module, name, named(getattr(module, name), *given))
            patch.setattr(module, "copy", SimpleNamespace(deepcopy=duplicate))
            patch.setattr(module, "random_shift", shift)
            patch.setattr(module, "F", fake)
            patch.setattr(module, "ReplayBuffer", Buffer)
            patch.setattr(module, "adam_step_", adam_step_)
            self.folder = module.main(short_args(module, **changes))

    def copies(self):
        """All parameters, copied -> {part: tensor}."""
        return {
            name: torch.cat([p.detach().flatten() for p in part.parameters()]).clone()
            for name, part in self.parts.items()
        }


def test_each_loss_trains_just_what_it_is_to_train_and_targets_follow(monkeypatch, drawn):
    seen, waiting = [], []

    def at_step(run, which, before):
        after = run.copies()
        if waiting and which == "critics":  # targets moved since the temperature's step, by tau, and nothing else did
            old = waiting.pop()
            for name in ("encoder", "critic_projection", "qf1", "qf2"):
                expected = old[f"{name}_target"].lerp(old[name], 0.3)
                torch.testing.assert_close(before[f"{name}_target"], expected, atol=1e-6, rtol=1e-6)
                assert not torch.equal(before[f"{name}_target"], old[f"{name}_target"])
                assert torch.equal(before[name], old[name])
        if which == "alpha":
            waiting.append(after)
        seen.append((which, {name for name in after if not torch.equal(before[name], after[name])}))

    run = Watched(DRQ, monkeypatch, at_step, total_timesteps=40, tau=0.3)
    changed = {"critics": {"encoder", "critic_projection", "qf1", "qf2"}, "actor": {"actor_projection", "actor"}}
    for which, names in seen:
        assert names == changed.get(which, set())
    assert [which for which, _ in seen] == ["critics", "critics", "actor", "alpha"] * 10
    assert set(run.parts) == {*changed["critics"], *changed["actor"]} | {f"{n}_target" for n in changed["critics"]}
    assert [len(optimizer.param_groups[0]["params"]) for optimizer in run.optimizers] == [8 + 4 + 6 + 6, 4 + 6, 1]


@pytest.mark.parametrize(("k", "m"), [(2, 2), (1, 1), (3, 2)])
def test_targets_are_averaged_over_k_shifts_and_the_loss_over_m(k, m, monkeypatch, drawn):
    checked = []

    def at_step(run, which, before):
        if which != "critics" or checked:
            return
        nets, batch = run.start, run.batch  # the networks as they were before the first update
        views, next_views = run.shifted
        assert len(views) == 8 * m and len(next_views) == 8 * k
        (_, actions, log_prob), alpha = run.samples[-1], 0.3
        targets = []
        for number in range(k):
            rows = slice(8 * number, 8 * number + 8)
            features = nets["critic_projection_target"](nets["encoder_target"](next_views[rows]))
            q = [nets[name](features, actions[rows]) for name in ("qf1_target", "qf2_target")]
            value = torch.minimum(*q) - alpha * log_prob[rows]
            targets.append(batch.reward + 0.9 * (1 - batch.terminated) * value)
        target = sum(targets) / k
        for (values, used), name in zip(run.losses, ("qf1", "qf2"), strict=True):
            for number in range(m):
                rows = slice(8 * number, 8 * number + 8)
                torch.testing.assert_close(used[rows], target, atol=1e-5, rtol=1e-5)
                features = nets["critic_projection"](nets["encoder"](views[rows]))
                torch.testing.assert_close(values[rows], nets[name](features, batch.actions), atol=1e-5, rtol=1e-5)
            assert len(values) == len(used) == 8 * m
        checked.append(True)

    class First(Watched):
        def copies(self):
            if not hasattr(self, "start"):
                self.start = {name: copy.deepcopy(part) for name, part in self.parts.items()}
            return super().copies()

    settings = {"target_augmentations": k, "loss_augmentations": m, "alpha": 0.3, "gamma": 0.9, "total_timesteps": 22}
    First(DRQ, monkeypatch, at_step, **settings)
    assert checked


def test_the_actor_and_the_temperature_step_along_the_gradients_of_their_losses(monkeypatch, drawn):
    checked, plain_sample = [], DRQ.Actor.sample

    class Before(Watched):
        def copies(self):
            self.held = {name: copy.deepcopy(part) for name, part in self.parts.items()}
            return super().copies()

    def at_step(run, which, before):
        if which == "actor":  # the actor before its step, the critics after theirs
            nets = run.held
            actor, projection = nets["actor"], nets["actor_projection"]
            view = run.shifted[-2][:8]
            state, torch_state = run.samples[-1][0], torch.get_rng_state()
            torch.set_rng_state(state)
            seen = nets["encoder"](view).detach()
            actions, run.log_prob = plain_sample(actor, projection(seen))
            torch.set_rng_state(torch_state)
            features = nets["critic_projection"](seen).detach()
            q = torch.minimum(nets["qf1"](features, actions), nets["qf2"](features, actions))
            alpha = run.alpha.detach().exp() if checked else 0.3
            loss = (alpha * run.log_prob - q).mean()
            parameters = [*projection.parameters(), *actor.parameters()]
            expected = torch.autograd.grad(loss, parameters)
            actual = [*run.parts["actor_projection"].parameters(), *run.parts["actor"].parameters()]
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a.grad, b, atol=1e-5, rtol=1e-3)
        if which == "alpha":
            (run.alpha,) = run.optimizers[2].param_groups[0]["params"]
            entropy = -run.log_prob.detach().mean()
            value = 0.3 if not checked else run.previous
            assert float(run.alpha.grad) == pytest.approx(float(value * (entropy - (-1))), rel=1e-3, abs=1e-5)
            run.previous = float(run.alpha.detach().exp())
            assert (run.previous > value) == (float(entropy) < -1)  # cartpole has one action
            checked.append(True)

    Before(DRQ, monkeypatch, at_step, alpha=0.3, total_timesteps=26)
    assert len(checked) == 3


# ===== Whole runs =====


def without_masks(model):
    return {net: {k: v for k, v in state.items() if not k.endswith(".mask")} for net, state in model.items()}


def test_ne_switched_off_is_plain_drq_to_the_bit_on_rendered_pictures():
    settings = {"eval_interval": 50, "eval_episodes": 1, "buffer_size": 60}
    _, ne, ne_log = train(NE, **settings, **OFF)
    _, drq, drq_log = train(DRQ, **settings)
    assert harness.same(without_masks(ne), drq)
    assert len(drq_log["charts/episodic_return"]) == 2 and len(drq_log["eval/episodic_return"]) == 2
    assert drq_log["charts/frames"] == [(40, 1000.0), (80, 2000.0)]
    assert {tag for tag in drq_log if ne_log[tag] != drq_log[tag]} <= {"charts/SPS"}


def test_ne_masks_the_heads_and_nothing_else_and_logs_its_tags(drawn):
    _, model, log = train(NE, total_timesteps=140, initial_density=0.3, final_density=0.6)
    for name, state in model.items():
        masks = {key for key in state if key.endswith(".mask")}
        heads = name.removesuffix("_target") in HEADS
        assert masks == ({f"fc{layer}.mask" for layer in (1, 2, 3)} if heads else set())
        for key in masks:
            assert not state[key.replace("mask", "weight")][~state[key]].any()
        if heads:
            total = sum(state[key].numel() for key in masks)
            assert sum(int(state[key].sum()) for key in masks) / total == pytest.approx(0.6, abs=0.02)
    assert model["encoder"]["conv1.weight"].shape == (32, 9, 3, 3)
    for net in HEADS:
        assert [step for step, _ in log[f"ne/{net}/grown"]] == [60, 100, 140]
        assert {value for _, value in log[f"ne/{net}/output_change_growth"]} == {0.0}
        assert log[f"neurons/{net}/density"][-1][1] == pytest.approx(0.6, abs=0.02)
        for name in ("dormant_ratio_0", "dormant_ratio_0.1", "fau", "disconnected"):
            assert [step for step, _ in log[f"neurons/{net}/{name}"]] == [60, 100, 140]
    assert [step for step, _ in log["ne/review_threshold"]] == [60, 100, 140]
    names = ("qf1_loss", "qf2_loss", "qf_loss", "qf1_values", "qf2_values", "actor_loss", "alpha")
    assert {tag for tag in log if tag.startswith("losses/")} == {f"losses/{name}" for name in names}
    assert [step for step, _ in log["losses/alpha"]] == [120]


@with_all_but_most_slow
def test_the_readme_explains_exactly_the_tags_that_are_logged(script, drawn):
    often = {"redo_interval": 40, "reset_interval": 40, "eval_interval": 60, "eval_episodes": 1}
    folder = train(SCRIPTS[script], total_timesteps=122, **often)[0]
    assert test_project.logged_tags(folder) == test_project.explained_tags(script)


def test_both_critics_heads_count_for_the_review(monkeypatch, drawn):
    totals = []
    update = NE.ReviewGate.update
    monkeypatch.setattr(NE.ReviewGate, "update", lambda self, d, n: (totals.append((d, n)), update(self, d, n)))
    train(NE, grow=False, prune=False)
    assert [total for _, total in totals] == [4 * 16] * 2 and all(0 <= dormant <= 64 for dormant, _ in totals)


@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_evaluation_does_not_disturb_training(script, drawn):
    _, without, silent = train(SCRIPTS[script])
    _, model, log = train(SCRIPTS[script], eval_interval=30, eval_episodes=2)
    assert harness.same(model, without)
    assert log["charts/episodic_return"] == silent["charts/episodic_return"]
    assert [step for step, _ in log["eval/episodic_return"]] == [30, 60, 90]


@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_bfloat16_changes_the_products_and_parameters_stay_float32(script, drawn):
    (_, half, log), (_, full, _) = (train(SCRIPTS[script], bf16=bf16, total_timesteps=60) for bf16 in (True, False))
    assert all(value.dtype in (torch.float32, torch.bool) for state in half.values() for value in state.values())
    for name in half:  # everything learns, and not what it learns without
        for key in half[name]:
            assert not key.startswith("conv") or not torch.equal(half[name][key], full[name][key])
    if "ne/actor/grown" in log:
        assert {value for _, value in log["ne/actor/output_change_growth"]} == {0.0}


SETTINGS = {"total_timesteps": 90, "learning_starts": 22, "growth_interval": 20, "checkpoint_interval": 30}
SETTINGS |= {"eval_interval": 85, "eval_episodes": 1}


@pytest.fixture
def known(monkeypatch):
    """The shared helpers know the scripts of this file."""
    for name, module in SCRIPTS.items():
        monkeypatch.setitem(harness.SCRIPTS, name, module)


OFTEN = {
    "reset_drq_pixels": {"reset_interval": 35},
    "redo_drq_pixels": {"redo_interval": 15, "redo_tau": 0.5},
    "injection_drq_pixels": {"injection_step": (35, 82)},
}


@with_all_but_most_slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, known):
    args = short_args(SCRIPTS[script], **SETTINGS, **OFTEN.get(script, {"buffer_size": 50}))
    process = test_resume.start(script, *harness.flags(args))
    test_resume.wait_for(process, "runs/*/buffer-80.bin")
    time.sleep(0.1)
    test_resume.kill(process)
    folder = test_resume.resume(script, test_resume.the_folder())
    expected = SCRIPTS[script].main(args)
    test_resume.assert_same_run(folder, expected)
    names = {re.sub("events.*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "checkpoint.pt", "model.pt"}


LONG = {"action_repeat": 2, "total_timesteps": 530, "growth_interval": 100}  # an episode of 500 agent steps


@pytest.mark.parametrize(
    ("script", "changes", "ends"),
    [
        ("drq_pixels", {}, (40, 80)),
        pytest.param("drq_pixels", LONG, (500,), marks=pytest.mark.slow),
        pytest.param("ne_drq_pixels", LONG, (500,), marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_after_its_episode_and_it_can_go_on(script, changes, ends, known):
    args = short_args(SCRIPTS[script], **SETTINGS | {"checkpoint_interval": 0, "eval_interval": 0} | changes)
    process = test_resume.start(script, *harness.flags(args))
    test_resume.wait_for(process, "runs/*/events*")
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    folder = test_resume.the_folder()
    step = int(re.search(r"step (\d+); go on with", Path("out.txt").read_text())[1])
    assert step in ends
    test_resume.resume(script, folder)
    test_resume.assert_same_run(folder, SCRIPTS[script].main(args))


# Runs a script whose tasks hardly move any more once there is a file named "wait"
WAITING = """
import os, runpy, sys, time
import gymnasium as gym
sys.argv, step = sys.argv[1:], gym.wrappers.OrderEnforcing.step
def waiting(self, action):
    time.sleep(0.2 * os.path.exists("wait"))
    return step(self, action)
gym.wrappers.OrderEnforcing.step = waiting
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once_and_the_checkpoint_before_it_stays_usable(number, known):
    args = short_args(NE, **SETTINGS)
    process = test_resume.start("ne_drq_pixels", *harness.flags(args), code=WAITING)
    test_resume.wait_for(process, "runs/*/checkpoint.pt")
    Path("wait").touch()
    time.sleep(0.5)  # an episode takes minutes now
    process.send_signal(number)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(number)
    assert process.wait(timeout=30) == -number
    assert "Traceback" not in Path("err.txt").read_text()
    folder = test_resume.resume("ne_drq_pixels", test_resume.the_folder())
    test_resume.assert_same_run(folder, NE.main(args))


class CutOff(Exception):
    """Ends a run."""


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A run that was cut off after its checkpoint -> (name of the script, folder that must not be changed)."""
    place, save_checkpoint = tmp_path_factory.mktemp("interrupted"), NE.save_checkpoint

    def save_and_leave(*given):
        save_checkpoint(*given)
        raise CutOff

    with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        draw(patch)
        patch.setattr(NE, "save_checkpoint", save_and_leave)
        NE.main(short_args(NE, **SETTINGS))
    (folder,) = (place / "runs").iterdir()
    return "ne_drq_pixels", folder


@pytest.mark.parametrize("damage", test_resume.REFUSED)
def test_what_cannot_be_resumed_is_refused_in_one_line_and_left_as_it_is(
    damage, interrupted, capsys, drawn, known, monkeypatch
):
    def another_task(folder):
        test_resume.edit(folder / "args.json", "cartpole-balance", "reacher-easy")

    monkeypatch.setitem(test_resume.REFUSED, "another task", another_task)
    test_resume.test_what_cannot_be_resumed_is_refused_in_one_line_and_left_as_it_is(damage, interrupted, capsys)


@pytest.mark.parametrize(
    "case",
    [
        test_resume.test_a_run_of_another_script_is_refused,
        test_resume.test_a_run_of_another_script_is_refused_before_its_first_checkpoint_too,
        test_resume.test_a_checkpoint_of_another_script_is_refused,
        test_resume.test_resume_takes_no_other_argument,
    ],
    ids=lambda case: case.__name__,
)
def test_what_holds_for_other_scripts_holds_here(case, interrupted, capsys, drawn, known):
    case(interrupted, capsys)


def test_a_finished_run_says_that_it_is_finished(capsys, drawn, known):
    folder = train(NE, total_timesteps=62)[0]
    before = test_resume.contents(folder)
    assert "finished" in test_resume.refusal("ne_drq_pixels", capsys, resume=str(folder))
    assert test_resume.contents(folder) == before


def test_a_resumed_run_cuts_its_log_and_drops_what_is_left_of_another_checkpoint(interrupted, drawn):
    folder = Path(shutil.copytree(interrupted[1], "copy"))
    (log,) = folder.glob("events*")
    with log.open("ab") as file:
        file.write(log.read_bytes()[:-7])
    (folder / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
    (folder / "buffer-999.bin").write_bytes(b"half of a buffer")
    assert NE.main(NE.Args(resume=str(folder))) == folder
    test_resume.assert_same_run(folder, NE.main(short_args(NE, **SETTINGS)))
    names = {re.sub("events.*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "checkpoint.pt", "model.pt"}


def test_a_resumed_run_goes_on_with_what_review_and_pruning_have_counted(interrupted, drawn, monkeypatch):
    folder, states = Path(shutil.copytree(interrupted[1], "copy")), []
    test_resume.edit(folder / "args.json", '"neuron_interval": 40', '"neuron_interval": 1000')  # the gate stays put
    checkpoint = harness.saved(folder / "checkpoint.pt")
    assert checkpoint["global_step"] == 40
    checkpoint["ne"]["gate"] |= {"g": 0.25, "g_max": 0.5, "previous": 3}
    for number, net in enumerate(HEADS):
        checkpoint["ne"][net]["pruned"] = 5 + number
    torch.save(checkpoint | {"reviewed": 1000}, folder / "checkpoint.pt")
    monkeypatch.setattr(NE, "save_checkpoint", lambda folder, state, rb: states.append(state))
    NE.main(NE.Args(resume=str(folder)))
    assert states[0]["global_step"] == 80 and states[0]["ne"]["gate"] == checkpoint["ne"]["gate"]
    assert 1008 < states[0]["reviewed"] < 1032  # about half of the 40 batches since then
    assert all(states[0]["ne"][net]["pruned"] >= 5 + number for number, net in enumerate(HEADS))


def test_evaluate_plays_the_saved_agent_and_prints_the_same_each_time(drawn, capsys):
    folder, _, log = train(DRQ, eval_interval=100, eval_episodes=2)
    printed = []
    for _ in range(2):
        capsys.readouterr()
        DRQ.main(DRQ.Args(evaluate=str(folder), eval_episodes=2, cuda=False))
        printed.append(capsys.readouterr().out)
    mean = float(re.search(r"mean return (-?[\d.]+), std", printed[0])[1])
    assert printed[0] == printed[1] and mean == pytest.approx(log["eval/episodic_return"][-1][1], abs=0.01)


def test_a_video_of_training_is_written():
    folder, _, _ = train(DRQ, capture_video=True, total_timesteps=30, action_repeat=2)
    assert [path.suffix for path in (folder / "videos").iterdir()].count(".mp4") >= 1


# ===== Bad input =====

BAD = [
    ({"env_id": "dm_control/walker-wlk-v0"}, "no such task.*did you mean.*dm_control/walker-walk-v0"),
    ({"env_id": "walker-walk"}, "no such task.*did you mean.*dm_control/walker-walk-v0"),
    ({"env_id": "HalfCheetah-v4"}, "no such task of DM Control"),
    ({"env_id": ""}, "no such task"),
    ({"env_id": "dm_control/lqr-lqr_2_1-v0"}, "bounded"),
    ({"buffer_size": 100_000_000}, r"needs [\d.]+ GB, and [\d.]+ GB are free"),
    ({"image_size": 14}, "15 ... 480"),
    ({"image_size": 481}, "15 ... 480"),
    ({"alpha": 0.0}, "above 0"),
    ({"alpha": math.nan}, "above 0"),
    ({"learning_rate": math.inf}, "above 0"),
    ({"shift": -1}, "negative"),
    *[
        ({name: 0}, "at least 1")
        for name in ("frame_stack", "action_repeat", "target_augmentations", "loss_augmentations", "feature_dim")
    ],
    *[({name: 0}, "at least 1") for name in ("hidden_dim", "batch_size", "buffer_size", "total_timesteps")],
    ({"batch_size": 101, "buffer_size": 100}, "--buffer-size 100"),
    ({"learning_starts": 100}, "this works: python .*drq_pixels.py"),
    ({"growth_interval": 82}, "longer than the 80 gradient steps; this works"),
    ({"growth_interval": 41}, "multiple of --policy-frequency 2"),
    ({"initial_density": 0.0}, "must lie in"),
    ({"resume": "runs/nothing"}, "no such run folder"),
    ({"reset_interval": -1}, "negative"),
    ({"redo_tau": -1.0}, "0 or more"),
    ({"injection_step": (0,)}, "must lie in"),
]


def refusal(module, args, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        module.main(args)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and re.fullmatch("error: .*\n", err), (out, err)
    assert list(Path().iterdir()) == []
    return err


@pytest.mark.parametrize(("change", "pattern"), BAD, ids=str)
def test_bad_input_is_refused_in_one_line_that_names_the_argument(change, pattern, capsys, drawn):
    name = next(iter(change))
    module = next(module for module in (NE, *SCRIPTS.values()) if name in module.Args.__dataclass_fields__)
    args = module.Args(**change) if "resume" in change else short_args(module, **change)
    line = refusal(module, args, capsys)
    assert f"--{name.replace('_', '-')}" in line and re.search(pattern, line), line


def test_without_opengl_the_line_names_the_package(monkeypatch, capsys):
    def no_opengl(self):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(gym.wrappers.OrderEnforcing, "render", no_opengl)
    line = refusal(DRQ, short_args(DRQ), capsys)
    assert "apt-get install libegl1" in line and "cartpole-balance" in line


# ===== Arguments and drift =====


@with_all
def test_every_argument_is_documented(script, known):
    texts = test_arguments.documentation(script)
    assert texts.keys() == SCRIPTS[script].Args.__dataclass_fields__.keys()
    assert all(len(text) > 10 for text in texts.values())


def test_help_explains_every_argument(known):
    test_arguments.test_help_explains_every_argument("ne_drq_pixels")


def test_what_is_the_same_in_the_td3_scripts_is_the_same_to_the_letter():
    names = "MaskedLinear erdos_renyi_densities scheduled_growth dormant_scores grow_ prune_dormant_ ReviewGate"
    names += " adam_moments connection_counts sparse_start_ sparse_weights zero_absent_gradients_ GrowthPlan"
    names += " grow_and_prune_ neuron_statistics connection_statistics masked_layers density adam_step_ save load"
    names += " cut_events remove_buffers save_checkpoint new_run_folder load_args check check_only one_line fail"
    names += " command_line main reset_ recycle_dormant_ freeze_ frozen_sum inject_ make_room_ trained_layers"
    for name in names.split():
        sources = {
            name_of: inspect.getsource(getattr(module, name))
            for name_of, module in (harness.SCRIPTS | SCRIPTS).items()
            if hasattr(module, name)
        }
        for method in ("injection_", ""):  # command_line has lines of its own in Injection
            group = {text for script, text in sources.items() if script.startswith("injection_") == bool(method)}
            assert len(group) <= 1, name


# ===== The methods beside it =====


def heads_of(module, seed=0):
    """Heads of each kind with targets and an optimizer that has made a step."""
    torch.manual_seed(seed)
    for kind in ("actor", "critic"):
        network = module.Actor(8, 2, 16) if kind == "actor" else module.QNetwork(8, 2, 16)
        x = (torch.randn(64, 8),) if kind == "actor" else (torch.randn(64, 8), torch.randn(64, 2))
        target = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        network(*x).square().mean().backward()
        optimizer.step()
        yield kind, network, target, optimizer, x


def test_a_reset_draws_heads_anew_and_an_actor_without_target_stands_for_its_own():
    for kind, network, target, optimizer, _ in heads_of(RESET):
        old = copy.deepcopy(network.state_dict())
        RESET.reset_(network, network if kind == "actor" else target, optimizer, 2)
        for key, value in network.state_dict().items():
            assert torch.equal(value, old[key]) == key.startswith("fc1")
            assert kind == "actor" or key.startswith("fc1") or torch.equal(value, target.state_dict()[key])
        for key, parameter in network.named_parameters():
            assert bool(optimizer.state[parameter]["exp_avg"].any()) == key.startswith("fc1")


def test_resets_keep_the_encoder_and_come_while_an_interval_is_left(monkeypatch, drawn):
    calls, reset_ = [], RESET.reset_
    monkeypatch.setattr(RESET, "reset_", lambda *given: (calls.append(given), reset_(*given)))
    log = train(RESET, reset_interval=30, total_timesteps=100)[2]
    assert [step for step, _ in log["reset/number"]] == [30, 60]
    kinds = [(type(network), network is target) for network, target, _, _ in calls]
    assert kinds == [(RESET.Actor, True), (RESET.QNetwork, False), (RESET.QNetwork, False)] * 2


def test_recycling_is_what_a_slow_computation_says():
    for kind, network, _, optimizer, x in heads_of(REDO):
        with torch.no_grad():
            network.fc1.bias[:4], network.fc2.bias[:3] = -100, -100
            hidden = [h.clone() for h in network.hidden(*x)]
        old = copy.deepcopy(network.state_dict())
        dormant = [[i for i in range(16) if float(h[:, i].abs().mean() / h.abs().mean()) <= 0.1] for h in hidden]
        assert dormant[0][:4] == [0, 1, 2, 3] and dormant[1][:3] == [0, 1, 2] and kind
        count = REDO.recycle_dormant_(network, hidden, optimizer, 0.1, torch.Generator().manual_seed(0))
        assert count == sum(map(len, dormant))
        for l, layer in enumerate((network.fc1, network.fc2, network.fc3)):
            for row in range(layer.weight.shape[0]):
                fresh = l < 2 and row in dormant[l]
                assert bool(layer.bias[row] == 0) == fresh
                for column in range(layer.weight.shape[1]):
                    cut = l > 0 and column in dormant[l - 1]
                    value = layer.weight[row, column].item()
                    before = float(old[f"fc{l + 1}.weight"][row, column])
                    assert value == 0 if cut else (value != before if fresh else value == before)


def test_redo_recycles_all_three_heads(drawn):
    log = train(REDO, redo_interval=30, redo_tau=0.6)[2]
    for net in HEADS:
        assert [step for step, _ in log[f"redo/{net}_recycled"]] == [50, 80]


def test_an_injection_leaves_outputs_and_frozen_parts_as_they_are():
    for kind, network, target, optimizer, x in heads_of(INJECTION):
        for number in (1, 2):
            before, before_target = network(*x), target(*x)
            INJECTION.inject_(network, copy.deepcopy(network) if kind == "actor" else target, optimizer)
            torch.testing.assert_close(network(*x), before, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(target(*x), before_target, atol=1e-5, rtol=1e-4)
            assert len(network.frozen) == 2 * number
            frozen = copy.deepcopy(network.frozen.state_dict())
            optimizer.zero_grad()
            network(*x).square().mean().backward()
            optimizer.step()
            assert harness.same(dict(network.frozen.state_dict()), dict(frozen))
            assert not torch.equal(network(*x), before)
        fresh = INJECTION.Actor(8, 2, 16) if kind == "actor" else INJECTION.QNetwork(8, 2, 16)
        INJECTION.make_room_(fresh, network.state_dict())
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(*x), network(*x))


def test_the_hidden_layers_of_the_heads_are_normalised():
    for kind, network, _, _, x in heads_of(LAYER_NORM):
        h, inputs = torch.cat(x, 1), network.hidden(*x)
        for layer, norm, actual in zip((network.fc1, network.fc2), (network.norm1, network.norm2), inputs, strict=True):
            z = layer(h)
            z = (z - z.mean(1, keepdim=True)) / (z.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            h = (z * norm.weight + norm.bias).clamp(min=0)
            torch.testing.assert_close(actual, h, atol=1e-5, rtol=1e-4)
        assert kind and network.norm1.normalized_shape == (16,)


@pytest.mark.parametrize("script", ["reset_drq_pixels", "redo_drq_pixels", "injection_drq_pixels"])
def test_a_run_without_intervention_is_plain_drq_to_the_bit(script, drawn):
    never = {"reset_interval": 0, "redo_interval": 0, "inject": "none"}
    assert harness.same(train(SCRIPTS[script], total_timesteps=50, **never)[1], train(DRQ, total_timesteps=50)[1])


# ===== Learning =====


def drawing(env):
    """A cart and a pole as three blobs: where the cart is, where the pole's tip is, and how far the pole leans."""
    (cart, angle), (y, x) = env.unwrapped.physics.data.qpos, np.mgrid[0:20, 0:20]
    lean = np.clip(5 * np.sin(angle), -1, 1)
    places = [(10 + 4 * cart, 15), (10 + 8 * np.sin(angle), 10 - 8 * np.cos(angle)), (10 + 8 * lean, 10)]
    blobs = [np.exp(-((x - blob_x) ** 2 + (y - blob_y) ** 2) / 4) for blob_x, blob_y in places]
    return (255 * np.stack(blobs)).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_the_script_learns_to_balance_a_pole_from_pictures(script, monkeypatch):
    monkeypatch.setattr(SCRIPTS[script], "picture", drawing)
    settings = {"shift": 1, "action_repeat": 8, "batch_size": 64, "hidden_dim": 256, "feature_dim": 50}
    settings |= {"total_timesteps": 8000, "learning_starts": 500, "neuron_interval": 1000, "growth_interval": 250}
    log = train(SCRIPTS[script], **settings)[2]
    returns = [value for _, value in log["charts/episodic_return"]]
    assert len(returns) == 64 and np.mean(returns[:4]) < 350
    assert np.mean(returns[-10:]) > 500
