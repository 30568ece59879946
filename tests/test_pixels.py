"""DrQ, NE-DrQ and the methods beside them, from pixels: each part against a computation of the test's own."""

import contextlib
import copy
import math
import os
import re
import shutil
import signal
import sys
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
import tyro
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

if sys.platform == "linux":
    os.environ.setdefault("MUJOCO_GL", "egl")  # as the scripts do, but before any test imports MuJoCo

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


class Dots(gym.Env):
    """A toy task that looks like one of DM Control: two dots that actions move; a corner tells which and when.

    An episode of `length` frames is cut off, or with `terminates` ends by termination. Reward: the first action.
    """

    action_space = gym.spaces.Box(np.array([-3.0, 0.0]), np.array([1.0, 10.0]), dtype=np.float64)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012, as Gymnasium has it
    length, terminates = 79, False

    def __init__(self, render_mode=None, render_kwargs=None):
        self.render_mode, self.size = render_mode, render_kwargs["height"]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.taken, self.episode = self.np_random.uniform(-1, 1, 2), 0, int(self.np_random.integers(256))
        return self.place, {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is out of bounds"
        self.place = np.clip(self.place + 0.02 * (action - [-1, 5]), -1, 1)
        self.taken += 1
        done = self.taken == self.length
        return self.place, float(action[0]), done and self.terminates, done and not self.terminates, {}

    def render(self):
        y, x = np.mgrid[-1 : 1 : self.size * 1j, -1 : 1 : self.size * 1j]
        blobs = [255 * np.exp(-4 * ((x - place) ** 2 + y**2)) for place in self.place]
        picture = np.stack([*blobs, 255 * (x + 1) / 2], 2).astype(np.uint8)
        picture[0, 0] = self.episode, self.taken, 7
        return picture


gym.register("dm_control/dots-v0", Dots)


def short_args(module, **changes):
    """Arguments of a run of a second: episodes of 40 agent steps, the last of them a frame long, and small networks."""
    values = {
        "env_id": "dm_control/dots-v0",
        "image_size": 15,
        "total_timesteps": 100,
        "learning_starts": 20,
        "batch_size": 8,
        "hidden_dim": 16,
        "feature_dim": 8,
        "shift": 2,
        "buffer_size": 200,
        "eval_interval": 0,
        "neuron_interval": 40,
        "growth_interval": 40,
        "cuda": False,
    }
    return module.Args(**{k: v for k, v in (values | changes).items() if k in module.Args.__dataclass_fields__})


def train(module, **changes):
    """A short run -> (folder, the last weights that it kept, log)."""
    folder = module.main(short_args(module, **changes))
    return folder, harness.weights(folder), harness.events(folder)


@pytest.fixture
def known(monkeypatch):
    """The shared helpers know the scripts of this file."""
    for name, module in SCRIPTS.items():
        monkeypatch.setitem(harness.SCRIPTS, name, module)


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

    def add_frame(self, frame, first):
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
            rb.add_frame(frame, first=True)
        for step in range(length):
            frame = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
            action = rng.normal(size=2).astype(np.float32)
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
        assert np.array_equal(obs, expected[0]) and np.array_equal(action, expected[1])
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
def test_the_buffer_gives_what_one_that_stores_whole_stacks_would(capacity, lengths, frame_stack):
    rng = np.random.default_rng(capacity)
    rb = NE.ReplayBuffer(capacity, 5, frame_stack, 2, torch.device("cpu"))
    naive, counted = Naive(frame_stack), []

    def compare():
        held = naive.held(capacity, len(rb.frames))
        assert len(rb) == len(held) >= 1
        counted.append(len(held))
        if len(naive.transitions) % 13 == 0 or len(naive.transitions) == sum(lengths):
            batch = rb.sample(32 * len(held))
            assert batch.obs.dtype == batch.next_obs.dtype == torch.uint8
            assert batch.obs.shape == batch.next_obs.shape == (32 * len(held), 3 * frame_stack, 5, 5)
            assert check_batch(batch, held) == {item[3] for item in held}
            quarter = held[: max(1, len(held) // 4)]
            assert check_batch(rb.sample(300, oldest=0.25), quarter) == {item[3] for item in quarter}

    fill([rb, naive], lengths, rng, after=compare)
    if min(lengths) >= 8 and sum(lengths) > capacity:
        assert counted[-1] == capacity


def test_a_buffer_of_100_000_transitions_takes_at_most_2_6_gb():
    rb = NE.ReplayBuffer(100_000, 84, 3, 6, torch.device("cpu"), torch.device("meta"))
    assert 2.1e9 < rb.frames.nbytes + rb.rows.nbytes + rb.spans.nbytes < 2.6e9


def test_draws_with_a_generator_leave_the_other_draws_as_they_are():
    rb = NE.ReplayBuffer(40, 5, 3, 2, torch.device("cpu"))
    fill([rb], [30, 30], np.random.default_rng(0))
    before = torch.get_rng_state()
    draws = [rb.sample(50, generator=torch.Generator().manual_seed(seed)).reward.tolist() for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before) and draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("lengths", [[12], [25, 3, 60], [1] * 70])
def test_a_saved_buffer_goes_on_as_it_would_have_and_only_what_it_holds_is_saved(lengths, tmp_path):
    rb, loaded = (NE.ReplayBuffer(40, 5, 3, 2, torch.device("cpu")) for _ in range(2))
    fill([rb], lengths, np.random.default_rng(0))
    state = rb.state_dict()
    assert state["frames"].data_ptr() == rb.frames.data_ptr()  # no second copy
    torch.save(state, tmp_path / "buffer")
    held = min(49, sum(lengths) + len(lengths)) * 75 + min(40, sum(lengths)) * 32
    assert held < (tmp_path / "buffer").stat().st_size < held + 2500
    loaded.load_state_dict(harness.saved(tmp_path / "buffer"))
    assert len(loaded) == len(rb)
    fill([rb, loaded], [5, 1, 20], np.random.default_rng(1))
    batches = [buffer.sample(200, generator=torch.Generator().manual_seed(0)) for buffer in (rb, loaded)]
    assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))


# ===== The task =====


def test_a_task_is_rendered_repeats_actions_and_is_cut_off_at_its_time_limit():
    args = short_args(NE, env_id="dm_control/cartpole-swingup-v0", image_size=24, action_repeat=3, frame_stack=2)
    env = NE.make_env(args)
    stack, _ = env.reset(seed=3)
    assert stack.shape == (6, 24, 24) and stack.dtype == np.uint8 and stack.std() > 5
    camera = env.unwrapped.physics.render(24, 24, camera_id=0).transpose(2, 0, 1)
    assert np.array_equal(stack, np.concatenate([camera, camera]))
    other = gym.make("dm_control/cartpole-swingup-v0", disable_env_checker=True)
    other.reset(seed=3)
    ends, total = [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.wrappers.OrderEnforcing, "render", lambda self: np.zeros((24, 24, 3), np.uint8))
        for _ in range(334):
            _, reward, terminated, truncated, info = env.step(np.ones(1))
            taken = [other.step(np.ones(1))[1:4] for _ in range(3 if len(ends) < 333 else 1)]
            assert reward == pytest.approx(sum(r for r, _, _ in taken))
            ends.append((terminated, truncated))
            total += reward
    assert ends == [(False, False)] * 333 + [(False, True)]  # 1000 frames, and a time limit is no termination
    assert taken[-1][2] and info["episode"]["l"] == 334 and info["episode"]["r"] == pytest.approx(total)
    assert not np.array_equal(env.unwrapped.physics.render(24, 24, camera_id=0).transpose(2, 0, 1), camera)


@pytest.mark.parametrize(("task", "camera"), [("dots-v0", 0), ("quadruped-dots-v0", 2)])
def test_the_camera_is_the_first_one_but_of_quadruped_the_one_that_moves_along(task, camera, monkeypatch):
    seen, make = [], gym.make
    monkeypatch.setitem(gym.registry, f"dm_control/{task}", gym.registry["dm_control/dots-v0"])
    monkeypatch.setattr(gym, "make", lambda name, **options: (seen.append(options), make(name, **options))[1])
    NE.make_env(short_args(NE, env_id=f"dm_control/{task}", image_size=17))
    assert seen[0]["render_kwargs"] == {"height": 17, "width": 17, "camera_id": camera}


@pytest.mark.parametrize("terminates", [True, False])
def test_actions_are_scaled_and_no_longer_repeated_when_the_task_has_ended(terminates, monkeypatch):
    monkeypatch.setattr(Dots, "terminates", terminates)
    monkeypatch.setattr(Dots, "length", 7)
    taken, step = [], Dots.step
    monkeypatch.setattr(Dots, "step", lambda self, action: (taken.append(action.tolist()), step(self, action))[1])
    env = NE.make_env(short_args(NE, action_repeat=3))
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float64)
    env.reset(seed=0)
    ends = [env.step(np.array(action))[1:4] for action in ([-1, -1], [1, 0.5], [0, 1])]
    assert taken == [[-3, 0]] * 3 + [[1, 7.5]] * 3 + [[-1, 10]]
    assert ends == [(-9, False, False), (3, False, False), (-1, terminates, not terminates)]


@pytest.mark.parametrize("terminates", [True, False])
def test_a_run_acts_on_the_last_frames_and_stores_what_came_of_it(terminates, monkeypatch):
    stacks, stored = [], []

    class Encoder(DRQ.Encoder):
        def forward(self, obs):
            if len(obs) == 1:  # not a batch
                assert (obs[0, 2::3, 0, 0] == 7).all()
                stacks.append([(int(a), int(b)) for a, b in zip(obs[0, ::3, 0, 0], obs[0, 1::3, 0, 0], strict=True)])
            return super().forward(obs)

    class Buffer(DRQ.ReplayBuffer):
        def add_frame(self, frame, first=False):
            stored.append(("first" if first else "frame", *frame[:, 0, 0].tolist()))
            super().add_frame(frame, first)

        def add(self, action, reward, frame, terminated):
            stored.append((action.copy(), float(reward), bool(terminated)))
            super().add(action, reward, frame, terminated)

    for name, new in {"Encoder": Encoder, "ReplayBuffer": Buffer}.items():
        monkeypatch.setattr(DRQ, name, new)
    for name, new in {"length": 5, "terminates": terminates}.items():
        monkeypatch.setattr(Dots, name, new)
    train(DRQ, total_timesteps=9, learning_starts=3)
    # an episode of 5 frames is 3 agent steps, of which the last one is a frame long
    for episode in range(3):
        first, *steps = stored[7 * episode : 7 * episode + 7]
        assert first == ("first", first[1], 0, 7)
        assert steps[1::2] == [("frame", first[1], frame, 7) for frame in (2, 4, 5)]
        assert [terminated for *_, terminated in steps[::2]] == [False, False, terminates]
        for (action, reward, _), frames in zip(steps[::2], (2, 2, 1), strict=True):
            assert (np.abs(action) <= 1).all() and reward == pytest.approx(frames * (2 * action[0] - 1), abs=1e-5)
    assert len(stored) == 21
    episodes = stored[7][1], stored[14][1]  # those that the policy plays
    times = ([0, 0, 0], [0, 0, 2], [0, 2, 4])
    assert stacks == [[(episode, time) for time in seen] for episode in episodes for seen in times]


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


@pytest.mark.parametrize("size", [15, 16, 20, 48, 84])
def test_the_encoder_has_the_papers_convolutions(size):
    encoder = NE.Encoder(3, size)
    frames = torch.randint(0, 256, (2, 9, size, size), dtype=torch.uint8)
    h = frames.double() / 255
    for number, stride in ((1, 2), (2, 1), (3, 1), (4, 1)):
        conv = encoder.convs[number - 1]
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
            run.parts |= {f"{name}_target": part for name, part in made.items()}
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
        fake.mse_loss = mse

        def before_step(optimizer, *_):
            if optimizer not in run.optimizers:
                run.optimizers.append(optimizer)
            run.before = run.copies()

        def after_step(optimizer, *_):
            at_step(run, ("critics", "actor", "alpha")[run.optimizers.index(optimizer)], run.before)

        names = {"Encoder": ["encoder"], "make_projection": ["critic_projection", "actor_projection"]}
        names |= {"Actor": ["actor"], "MLP": ["qf1", "qf2"]}
        with monkeypatch.context() as patch:
            patch.setattr(module.Actor, "sample", sample)
            for name, given in names.items():
                patch.setattr(module, name, named(getattr(module, name), *given))
            patch.setattr(module, "copy", SimpleNamespace(deepcopy=duplicate))
            patch.setattr(module, "random_shift", shift)
            patch.setattr(module, "F", fake)
            patch.setattr(module, "ReplayBuffer", Buffer)
            hooks = register_optimizer_step_pre_hook(before_step), register_optimizer_step_post_hook(after_step)
            self.folder = module.main(short_args(module, **changes))
            for hook in hooks:
                hook.remove()

    def copies(self):
        """All parameters, copied -> {part: tensor}."""
        return {
            name: torch.cat([p.detach().flatten() for p in part.parameters()]).clone()
            for name, part in self.parts.items()
        }


def test_each_loss_trains_just_what_it_is_to_train_and_targets_follow(monkeypatch):
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
def test_targets_are_averaged_over_k_shifts_and_the_loss_over_m(k, m, monkeypatch):
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
            q = [nets[name](features, actions[rows]).squeeze(1) for name in ("qf1_target", "qf2_target")]
            value = torch.minimum(*q) - alpha * log_prob[rows]
            targets.append(batch.reward + 0.9 * (1 - batch.terminated) * value)
        target = sum(targets) / k
        for (values, used), name in zip(run.losses, ("qf1", "qf2"), strict=True):
            for number in range(m):
                rows = slice(8 * number, 8 * number + 8)
                torch.testing.assert_close(used[rows], target, atol=1e-5, rtol=1e-5)
                features = nets["critic_projection"](nets["encoder"](views[rows]))
                expected = nets[name](features, batch.actions).squeeze(1)
                torch.testing.assert_close(values[rows], expected, atol=1e-5, rtol=1e-5)
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


def test_the_actor_and_the_temperature_step_along_the_gradients_of_their_losses(monkeypatch):
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
            q = torch.minimum(*(nets[name](features, actions).squeeze(1) for name in ("qf1", "qf2")))
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
            assert float(run.alpha.grad) == pytest.approx(float(value * (entropy - (-2))), rel=1e-3, abs=1e-5)
            run.previous = float(run.alpha.detach().exp())
            assert (run.previous > value) == (float(entropy) < -2)  # minus the number of actions
            checked.append(True)

    Before(DRQ, monkeypatch, at_step, alpha=0.3, total_timesteps=26)
    assert len(checked) == 3


@pytest.mark.parametrize("ratio", [1, 3])
def test_the_replay_ratio_is_the_number_of_gradient_steps_after_each_agent_step(ratio, monkeypatch):
    steps = []
    run = Watched(
        DRQ, monkeypatch, lambda run, which, before: steps.append(which), total_timesteps=28, replay_ratio=ratio
    )
    assert [steps.count(which) for which in ("critics", "actor", "alpha")] == [8 * ratio, 4 * ratio, 4 * ratio]
    assert harness.saved(run.folder / "checkpoint.pt")["step"] == 28


# ===== Whole runs =====


def without_masks(model):
    return {
        net: {k: v for k, v in state.items() if not k.endswith((".mask", ".pruned"))} for net, state in model.items()
    }


def test_ne_switched_off_is_plain_drq_to_the_bit_on_rendered_pictures():
    settings = {"env_id": "dm_control/cartpole-balance-v0", "action_repeat": 25, "buffer_size": 60}
    settings |= {"eval_interval": 50, "eval_episodes": 1, "total_timesteps": 60}
    _, ne, ne_log = train(NE, **settings, **OFF)
    _, drq, drq_log = train(DRQ, **settings)
    assert harness.same(without_masks(ne), drq)
    assert len(drq_log["charts/episodic_return"]) == len(drq_log["eval/episodic_return"]) == 1
    assert drq_log["charts/frames"] == [(40, 1000.0)]
    assert {tag for tag in drq_log if ne_log[tag] != drq_log[tag]} <= {"charts/SPS"}


def test_ne_masks_the_heads_and_their_targets_and_nothing_else_and_logs_its_tags():
    folder, model, log = train(NE, total_timesteps=140, initial_density=0.3, final_density=0.6)
    targets = harness.saved(folder / "checkpoint.pt")["targets"]
    model |= {f"{name}_target": dict(within(targets, name)) for name in {key.split(".")[0] for key in targets}}
    assert {"encoder_target", "critic_projection_target", "qf1_target", "qf2_target"} == {
        name for name in model if "_target" in name
    }
    for name, state in model.items():
        masks = {key for key in state if key.endswith(".mask")}
        heads = name.removesuffix("_target") in HEADS
        assert masks == ({f"fc{layer}.mask" for layer in (1, 2, 3)} if heads else set())
        for key in masks:
            assert not state[key.replace("mask", "weight")][~state[key]].any()
        if heads:
            total = sum(state[key].numel() for key in masks)
            assert sum(int(state[key].sum()) for key in masks) / total == pytest.approx(0.6, abs=0.02)
    assert model["encoder"]["convs.0.weight"].shape == (32, 9, 3, 3)
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


def within(state, name):
    """The entries of a part in the state dict of the whole -> pairs."""
    return [(key.removeprefix(f"{name}."), value) for key, value in state.items() if key.startswith(f"{name}.")]


@with_all_but_most_slow
def test_the_pages_explain_exactly_the_tags_that_are_logged(script):
    often = {"redo_interval": 40, "reset_interval": 40, "eval_interval": 60, "eval_episodes": 1}
    folder = train(SCRIPTS[script], total_timesteps=122, **often)[0]
    assert test_project.logged_tags(folder) == test_project.explained_tags(script)


def test_both_critics_heads_count_for_the_review(monkeypatch):
    totals = []
    update = NE.ReviewGate.update
    monkeypatch.setattr(NE.ReviewGate, "update", lambda self, d, n: (totals.append((d, n)), update(self, d, n)))
    train(NE, grow=False, prune=False)
    assert [total for _, total in totals] == [4 * 16] * 2 and all(0 <= dormant <= 64 for dormant, _ in totals)


def test_evaluation_does_not_disturb_training():
    _, without, silent = train(DRQ)
    _, model, log = train(DRQ, eval_interval=30, eval_episodes=2)
    assert harness.same(model, without)
    assert log["charts/episodic_return"] == silent["charts/episodic_return"]
    assert [step for step, _ in log["eval/episodic_return"]] == [30, 60, 90]


@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_bfloat16_changes_the_products_and_parameters_stay_float32(script):
    (_, half, log), (_, full, _) = (train(SCRIPTS[script], bf16=bf16, total_timesteps=60) for bf16 in (True, False))
    kinds = torch.float32, torch.bool, torch.int64
    assert all(value.dtype in kinds for state in half.values() for value in state.values())
    for name in half:  # everything learns, and not what it learns without
        for key in half[name]:
            assert not key.startswith("convs") or not torch.equal(half[name][key], full[name][key])
    if "ne/actor/grown" in log:
        assert {value for _, value in log["ne/actor/output_change_growth"]} == {0.0}


# {field: a value with which a run ends with other networks}
MATTERS = {"image_size": 16, "frame_stack": 2, "action_repeat": 3, "shift": 1, "target_augmentations": 1}
MATTERS |= {"loss_augmentations": 1, "alpha": 0.2, "feature_dim": 9, "tau": 0.2, "gamma": 0.5, "review": False}
MATTERS |= {"learning_rate": 1e-2, "batch_size": 9, "hidden_dim": 17, "policy_frequency": 4, "buffer_size": 20}


def test_the_settings_of_drq_change_what_is_learned():
    lively = {"review_floor": 0.0, "neuron_interval": 3, "total_timesteps": 36, "growth_interval": 8}
    base = train(NE, **lively)[1]
    for name, value in MATTERS.items():
        other = train(NE, **lively | {name: value})[1]
        assert not all(harness.same(base[net], other[net]) for net in base), name


@pytest.mark.parametrize("spoiled", ["reward", "actor"])
def test_a_reward_or_an_action_that_is_not_finite_ends_the_run_in_one_line(spoiled, monkeypatch, capsys):
    step, sample, seen = Dots.step, NE.Actor.sample, []

    def spoilt(self, action):
        obs, reward, *ends = step(self, action)
        seen.append(action)
        return obs, math.nan if len(seen) == 2 * 50 - 1 and spoiled == "reward" else reward, *ends

    def nowhere(self, features):
        action, log_prob = sample(self, features)
        return action * (math.nan if spoiled == "actor" and len(features) == 1 and len(seen) >= 98 else 1), log_prob

    monkeypatch.setattr(Dots, "step", spoilt)
    monkeypatch.setattr(NE.Actor, "sample", nowhere)
    with pytest.raises(SystemExit) as exit:
        train(NE, checkpoint_interval=30)
    (line,) = re.findall("error: (.*)\n", capsys.readouterr().err)
    what = {"reward": "a reward", "actor": "an action"}[spoiled]
    assert exit.value.code == 1 and re.search(f"step 5[01]: {what} is not finite", line), line
    assert np.isfinite(seen).all()
    assert harness.saved(test_resume.the_folder() / "checkpoint.pt")["step"] == 40


# ===== Interrupting, resuming, playing =====

# Checkpoints at steps 0, 40 and 80, in the midst of counting reviews; 5 episodes' frames overwrite the first ones
SETTINGS = {"total_timesteps": 110, "learning_starts": 22, "growth_interval": 20, "checkpoint_interval": 30}
SETTINGS |= {"eval_interval": 85, "eval_episodes": 1, "buffer_size": 60, "neuron_interval": 15, "review_floor": 0.1}
OFTEN = {
    "reset_drq_pixels": {"reset_interval": 35},
    "redo_drq_pixels": {"redo_interval": 15, "redo_tau": 0.5},
    "injection_drq_pixels": {"injection_step": (35, 82)},
}
_whole = {}


def uninterrupted(script, tmp_path_factory):
    """A run with these settings that was left alone, made once -> its folder; beside it, as killed-<step>, its past."""
    if script not in _whole:
        place, replace = tmp_path_factory.mktemp("uninterrupted"), os.replace

        def replaced(source, target):
            replace(source, target)
            shutil.copytree(Path(target).parent, f"killed-{harness.saved(target)['step']}", dirs_exist_ok=True)

        with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            _whole[script] = place / SCRIPTS[script].main(
                short_args(SCRIPTS[script], **SETTINGS, **OFTEN.get(script, {}))
            )
    return _whole[script]


@pytest.mark.parametrize("step", [0, 40, 80, 110])
@with_all
def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(script, step, tmp_path_factory, known):
    expected = uninterrupted(script, tmp_path_factory)
    folder = Path(shutil.copytree(expected.parent.parent / f"killed-{step}", "copy"))
    before = harness.saved(folder / "checkpoint.pt")["replay"]
    assert len(before["frames"]) == {0: 0, 40: 41, 80: 71, 110: 0}[step]  # a finished run needs no replay any more
    torch.rand(7)
    test_resume.assert_same_run(test_resume.resume_here(script, folder), expected)
    assert test_resume.names(folder) == {"args.json", "events", "checkpoint.pt", "models", "lock"}


def test_the_checkpoints_that_are_resumed_are_in_the_midst_of_counting(tmp_path_factory):
    folder = uninterrupted("ne_drq_pixels", tmp_path_factory).parent.parent / "killed-80"
    gate = harness.saved(folder / "checkpoint.pt")["gate"]
    assert gate["previous"] is not None and gate["reviewed"] > 0


def test_a_signal_ends_the_run_after_its_episode_and_it_can_go_on(tmp_path_factory, known):
    def before():
        taken, step = [], Dots.step

        def stopping(self, action):
            taken.append(action)
            if len(taken) == 2 * 60:
                test_resume.send(signal.SIGTERM)
            return step(self, action)

        Dots.step = stopping

    words = harness.flags(short_args(NE, **SETTINGS))
    process = test_resume.Fork("ne_drq_pixels", *words, before=before)
    assert process.wait() == 128 + signal.SIGTERM, Path("err.txt").read_text()
    folder = test_resume.the_folder()
    assert f"--resume {folder}" in Path("out.txt").read_text()
    assert harness.saved(folder / "checkpoint.pt")["step"] == 80
    test_resume.assert_same_run(
        test_resume.resume_here("ne_drq_pixels", folder), uninterrupted("ne_drq_pixels", tmp_path_factory)
    )


@pytest.mark.slow
@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_a_killed_run_of_a_rendered_task_goes_on_as_if_nothing_had_happened(script, known):
    task = {"env_id": "dm_control/cartpole-balance-v0", "action_repeat": 25}
    args = short_args(SCRIPTS[script], **SETTINGS | task)
    process = test_resume.start(script, *harness.flags(args))
    test_resume.wait_for(process, "runs/*/models/40.pt")
    test_resume.kill(process)
    folder = test_resume.resume(script, test_resume.the_folder())
    test_resume.assert_same_run(folder, SCRIPTS[script].main(args))


def test_what_cannot_be_resumed_or_played_is_refused_in_one_line_and_left_as_it_is(tmp_path_factory, capsys):
    folder = Path(shutil.copytree(uninterrupted("ne_drq_pixels", tmp_path_factory), "copy"))
    whole = (folder / "checkpoint.pt").read_bytes()
    for module, content in ((NE, whole[: len(whole) // 2]), (NE, b""), (DRQ, whole)):
        (folder / "checkpoint.pt").write_bytes(content)
        before = test_resume.contents(folder)
        for option in ("resume", "evaluate"):
            with pytest.raises(SystemExit) as exit:
                module.main(module.Args(**{option: str(folder)}))
            out, err = capsys.readouterr()
            assert exit.value.code == 2 and out == "" and re.fullmatch(f"error: --{option} {folder}.*\n", err), err
        assert test_resume.contents(folder) == before


def test_evaluate_plays_the_saved_agent_prints_the_same_each_time_and_makes_no_buffer(capsys, monkeypatch):
    folder, _, log = train(DRQ, eval_interval=100, eval_episodes=2)
    monkeypatch.delattr(DRQ, "ReplayBuffer")
    printed = []
    for _ in range(2):
        capsys.readouterr()
        DRQ.main(DRQ.Args(evaluate=str(folder), eval_episodes=2))
        printed.append(capsys.readouterr().out)
    mean = float(re.search(r"mean return (-?[\d.]+), std", printed[0])[1])
    assert printed[0] == printed[1] and mean == pytest.approx(log["eval/episodic_return"][-1][1], abs=0.01)


def test_videos_of_training_and_of_playing_are_written():
    folder, model, _ = train(DRQ, capture_video=True, total_timesteps=30)
    assert harness.same(model, train(DRQ, total_timesteps=30)[1])
    DRQ.main(DRQ.Args(evaluate=str(folder), eval_episodes=1, capture_video=True))
    names = sorted(path.name for path in (folder / "videos").glob("*.mp4"))
    assert [name.split("-")[0] for name in names] == ["play", "run"]


# ===== Bad input =====

BAD = [
    ({"image_size": 14}, "15 ... 480"),
    ({"image_size": 481}, "15 ... 480"),
    ({"alpha": 0.0}, "must lie in"),
    ({"alpha": math.nan}, "must lie in"),
    ({"learning_rate": math.inf}, "must lie in"),
    ({"shift": -1}, "must lie in 0 ..."),
    *[
        ({name: 0}, "must lie in 1 ...")
        for name in ("frame_stack", "action_repeat", "target_augmentations", "loss_augmentations", "feature_dim")
    ],
    *[({name: 0}, "must lie in 1 ...") for name in ("hidden_dim", "batch_size", "buffer_size", "replay_ratio")],
    ({"learning_starts": 100}, "0 ... 99"),
    ({"growth_interval": 82}, "1 ... 80"),
    ({"growth_interval": 41}, "multiple of --policy-frequency 2"),
    ({"initial_density": 0.0}, "must lie in"),
    ({"reset_interval": -1}, "must lie in 0"),
    ({"redo_tau": -1.0}, "must lie in 0"),
    ({"injection_step": (0,)}, "must lie in 1"),
]


@pytest.mark.parametrize(("change", "pattern"), BAD, ids=str)
def test_bad_arguments_are_refused_with_a_message_that_names_the_argument(change, pattern, capsys):
    name = next(iter(change))
    module = next(module for module in (NE, *SCRIPTS.values()) if name in module.Args.__dataclass_fields__)
    with pytest.raises(ValueError, match=re.escape(pattern)) as error:
        short_args(module, **change)
    assert f"--{name.replace('_', '-')}" in str(error.value)
    if isinstance(change[name], int):
        with pytest.raises(SystemExit) as exit:
            tyro.cli(module.Args, args=[f"--{name.replace('_', '-')}", str(change[name]), "--total-timesteps", "100"])
        assert exit.value.code == 2 and "Traceback" not in capsys.readouterr().err


TASKS = {
    "dm_control/walker-wlk-v0": "Did you mean.*walker-walk",
    "walker-walk": "not a task of DM Control.*dm_control/walker-walk-v0",
    "HalfCheetah-v4": "not a task of DM Control",
    "": "not a task of DM Control",
    "dm_control/lqr-lqr_2_1-v0": "bounded",
}


def refusal(module, args, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        module.main(args)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and re.fullmatch("error: .*\n", err), (out, err)
    assert list(Path().iterdir()) == []
    return err


@pytest.mark.parametrize("task", TASKS)
def test_what_is_no_task_of_dm_control_with_bounded_actions_is_refused_in_one_line(task, capsys):
    line = refusal(NE, short_args(NE, env_id=task), capsys)
    assert f"--env-id {task}" in line and re.search(TASKS[task], line), line


def test_without_opengl_there_is_one_line_about_it(monkeypatch, capsys):
    def no_opengl(self):
        raise AttributeError("'NoneType' object has no attribute 'eglQueryString'")

    monkeypatch.setattr(Dots, "render", no_opengl)
    line = refusal(DRQ, short_args(DRQ), capsys)
    assert "eglQueryString" in line and "OpenGL" in line


@with_all
def test_every_argument_is_documented(script, known):
    texts = test_arguments.documentation(script)
    assert texts.keys() == SCRIPTS[script].Args.__dataclass_fields__.keys()
    assert all(len(text) > 10 for text in texts.values())


def test_help_explains_every_argument(known):
    test_arguments.test_help_explains_every_argument("ne_drq_pixels")


# ===== The methods beside it =====


def heads_of(module, seed=0):
    """Heads of each kind with targets and an optimizer that has made a step."""
    torch.manual_seed(seed)
    for kind in ("actor", "critic"):
        network = module.Actor(8, 2, 16) if kind == "actor" else module.MLP(8 + 2, 16, 1)
        x = (torch.randn(64, 8),) if kind == "actor" else (torch.randn(64, 8), torch.randn(64, 2))
        target = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        network(*x).square().mean().backward()
        optimizer.step()
        yield kind, network, target, optimizer, x


def test_resets_keep_eyes_and_targets_of_no_head_and_come_while_an_interval_is_left(monkeypatch):
    calls, reset_ = [], RESET.reset_

    def seen(network, optimizer, *given):
        before = copy.deepcopy(network.state_dict())
        drawn = reset_(network, optimizer, *given)
        assert drawn.keys() == before.keys() and not harness.same(dict(network.state_dict()), dict(before))
        assert not any(parameter in optimizer.state for parameter in network.parameters())
        calls.append((type(network), len(optimizer.param_groups[0]["params"]), len(optimizer.state)))
        return drawn

    monkeypatch.setattr(RESET, "reset_", seen)
    folder, _, log = train(RESET, reset_interval=40, total_timesteps=80, tau=1e-9, learning_starts=39)
    assert [step for step, _ in log["reset/number"]] == [40]
    # of the projection, and of the convolutions and the critics' projection, Adam's state stays
    assert calls == [(RESET.Actor, 10, 0), (RESET.MLP, 24, 18), (RESET.MLP, 24, 12)]
    start, targets = harness.saved(folder / "models/0.pt"), harness.saved(folder / "checkpoint.pt")["targets"]
    for name, kept in {"encoder": True, "critic_projection": True, "qf1": False, "qf2": False}.items():
        for key, value in within(targets, name):  # they follow the networks at 1e-9
            assert torch.allclose(value, start[name][key], atol=1e-6) == kept, key


@pytest.mark.parametrize(
    ("what", "last_layers", "drawn"), [("last_layers", 2, {"fc2", "fc3"}), ("optimizers", 1, set())]
)
def test_a_reset_of_less_draws_less(what, last_layers, drawn):
    for _, network, target, optimizer, _ in heads_of(RESET):
        old = copy.deepcopy(network.state_dict())
        target.load_state_dict(RESET.reset_(network, optimizer, what, last_layers), strict=False)
        for key, value in network.state_dict().items():
            layer = key.split(".")[0]
            assert torch.equal(value, old[key]) == (layer not in drawn)
            assert layer not in drawn or torch.equal(value, target.state_dict()[key])
            parameter = network.get_parameter(key)
            assert (parameter in optimizer.state) == (what == "last_layers" and layer not in drawn)


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


def test_redo_recycles_all_three_heads_by_what_each_of_them_sees(monkeypatch):
    calls, recycle = [], REDO.recycle_dormant_
    monkeypatch.setattr(REDO, "recycle_dormant_", lambda *given: (calls.append(given), recycle(*given))[1])
    log = train(REDO, redo_interval=30, redo_tau=0.6)[2]
    for number, net in enumerate(HEADS):
        assert [step for step, _ in log[f"redo/{net}_recycled"]] == [50, 80]
        network, hidden, optimizer, tau, _ = calls[number]
        assert type(network) is (REDO.Actor if net == "actor" else REDO.MLP) and tau == 0.6
        assert [h.shape for h in hidden] == [(2048, 16)] * 2
        assert len(optimizer.param_groups[0]["params"]) == (10 if net == "actor" else 24)


def test_an_injection_leaves_outputs_and_frozen_parts_as_they_are():
    for kind, network, target, optimizer, x in heads_of(INJECTION):
        for number in (1, 2):
            before, before_target = network(*x), target(*x)
            INJECTION.inject_(network, optimizer, *([] if kind == "actor" else [target]))
            torch.testing.assert_close(network(*x), before, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(target(*x), before_target, atol=1e-5, rtol=1e-4)
            assert len(network.frozen) == 2 * number
            frozen = copy.deepcopy(network.frozen.state_dict())
            optimizer.zero_grad()
            network(*x).square().mean().backward()
            optimizer.step()
            assert harness.same(dict(network.frozen.state_dict()), dict(frozen))
            assert not torch.equal(network(*x), before)
        fresh = INJECTION.Actor(8, 2, 16) if kind == "actor" else INJECTION.MLP(8 + 2, 16, 1)
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(*x), network(*x))


def test_an_injection_comes_half_way_into_the_heads_that_are_named():
    for inject, actor_parts, critic_parts in (("both", 2, 2), ("actor", 2, 0), ("critic", 0, 2)):
        _, model, log = train(INJECTION, total_timesteps=60, inject=inject)
        assert log["injection/actor_parts"] == [(30, actor_parts)]
        assert log["injection/critic_parts"] == [(30, critic_parts)]
        for net, state in model.items():
            parts = {key.split(".")[1] for key in state if key.startswith("frozen")}
            assert len(parts) == {"actor": actor_parts, "qf1": critic_parts, "qf2": critic_parts}.get(net, 0)


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
def test_a_run_without_intervention_is_plain_drq_to_the_bit(script):
    never = {"reset_interval": 0, "redo_interval": 0, "inject": "none"}
    assert harness.same(train(SCRIPTS[script], total_timesteps=50, **never)[1], train(DRQ, total_timesteps=50)[1])


# ===== Learning =====


def drawing(env):
    """A cart and a pole as three blobs: where the cart is, where the pole's tip is, and how far the pole leans."""
    (cart, angle), (y, x) = env.unwrapped.physics.data.qpos, np.mgrid[0:20, 0:20]
    lean = np.clip(5 * np.sin(angle), -1, 1)
    places = [(10 + 4 * cart, 15), (10 + 8 * np.sin(angle), 10 - 8 * np.cos(angle)), (10 + 8 * lean, 10)]
    blobs = [np.exp(-((x - blob_x) ** 2 + (y - blob_y) ** 2) / 4) for blob_x, blob_y in places]
    return (255 * np.stack(blobs, 2)).astype(np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["drq_pixels", "ne_drq_pixels"])
def test_the_script_learns_to_balance_a_pole_from_pictures(script, monkeypatch):
    monkeypatch.setattr(gym.wrappers.OrderEnforcing, "render", drawing)
    settings = {"env_id": "dm_control/cartpole-balance-v0", "image_size": 20, "shift": 1, "action_repeat": 8}
    settings |= {"batch_size": 64, "hidden_dim": 256, "feature_dim": 50, "buffer_size": 100_000}
    settings |= {"total_timesteps": 8000, "learning_starts": 500, "neuron_interval": 1000, "growth_interval": 250}
    log = train(SCRIPTS[script], **settings)[2]
    returns = [value for _, value in log["charts/episodic_return"]]
    assert len(returns) == 64 and np.mean(returns[:4]) < 350
    assert np.mean(returns[-10:]) > 500
