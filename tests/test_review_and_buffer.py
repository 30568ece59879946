"""Experience review (section 5) and the replay buffer."""

import inspect

import numpy as np
import pytest
import torch
from harness import SCRIPTS, scripts_with, short_args

OBS, ACTIONS = 3, 2
BUFFERS = scripts_with("ReplayBuffer", "Batch")
REVIEWING = scripts_with("ReplayBuffer", "ReviewGate", "Batch")


def transition(number, terminated=False):
    """A transition in which every entry tells its number."""
    obs = [number, number + 0.25, -number]
    return obs, [number + 0.5, -number - 0.5], number * 2.0, [x + 1 for x in obs], terminated


def filled(module, count, capacity):
    """A buffer with `count` transitions added, and the list of those that it should hold, the oldest first."""
    rb, ring = module.ReplayBuffer(capacity, OBS, ACTIONS, torch.device("cpu")), []
    for number in range(count):
        added = transition(number, terminated=number % 3 == 0)
        rb.add(*added)
        ring = [*ring, added][-capacity:]
        assert len(rb) == len(ring)
    return rb, ring


def numbers(batch):
    """Which transitions a batch holds; checks that each row is one of them whole."""
    found = [round(number) for number in batch.obs[:, 0].tolist()]
    expected = [transition(number, terminated=number % 3 == 0) for number in found]
    for column, values in zip(batch, zip(*expected, strict=True), strict=True):
        assert column.dtype == torch.float32
        assert torch.equal(column, torch.tensor(values, dtype=torch.float32))
    return found


# ===== The gate =====


def thresholds_by_hand(counts, totals, floor):
    """The threshold after each count."""
    rates, thresholds = [0.0], []
    for n, (dormant, total) in enumerate(zip(counts, totals, strict=True)):
        if n > 0:
            rates.append(0.9 * rates[-1] + 0.1 * abs(dormant - counts[n - 1]) / total)
        thresholds.append(max(floor, rates[-1] / max(rates)) if max(rates) > 0 else 1.0)
    return thresholds


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("script", scripts_with("ReviewGate"))
def test_the_threshold_is_the_fluctuation_rate_over_its_largest_value(script, seed, floor):
    rng = np.random.default_rng(seed)
    counts = np.repeat(rng.integers(0, 1025, 40), rng.integers(1, 9, 40)).tolist()
    gate = SCRIPTS[script].ReviewGate(floor)
    assert gate.threshold == 1
    expected = thresholds_by_hand(counts, [1024] * len(counts), floor)
    for dormant, threshold in zip(counts, expected, strict=True):
        gate.update(dormant, 1024)
        assert gate.threshold == pytest.approx(threshold, rel=1e-9)
        for u in rng.random(5).tolist():
            assert gate.review(u) == (u > gate.threshold)
    assert floor == 1 or min(expected) < 1


@pytest.mark.parametrize("script", scripts_with("ReviewGate"))
def test_nothing_is_reviewed_before_dormancy_has_moved(script):
    gate = SCRIPTS[script].ReviewGate()
    for dormant in (300, 300, 300):  # the first count alone, and counts that stay, are no fluctuation
        assert gate.threshold == 1 and not gate.review(0.999999)
        gate.update(dormant, 1024)
    gate.update(301, 1024)
    assert gate.threshold == 1  # as high as ever
    gate.update(301, 1024)
    assert gate.threshold == pytest.approx(0.9)


@pytest.mark.parametrize("script", scripts_with("ReviewGate"))
def test_the_threshold_never_falls_below_its_floor(script):
    default, low = SCRIPTS[script].ReviewGate(), SCRIPTS[script].ReviewGate(0.2)
    for gate in (default, low):
        for dormant in [0, 100] + [100] * 60:
            gate.update(dormant, 1024)
    assert default.threshold == 0.5 and low.threshold == 0.2


@pytest.mark.parametrize("script", scripts_with("ReviewGate"))
def test_a_draw_at_the_threshold_does_not_review(script):
    gate = SCRIPTS[script].ReviewGate()
    for dormant in [0, 100] + [100] * 60:
        gate.update(dormant, 1024)
    assert [gate.review(u) for u in (0.0, 0.49, 0.5, np.nextafter(0.5, 1), 0.99)] == [False, False, False, True, True]


# ===== The buffer =====


@pytest.mark.parametrize(("count", "capacity"), [(1, 1), (5, 1), (4, 9), (9, 9), (10, 9), (17, 9), (18, 9), (40, 9)])
@pytest.mark.parametrize("script", BUFFERS)
def test_the_buffer_holds_the_last_transitions_and_returns_them_whole(script, count, capacity):
    rb, ring = filled(SCRIPTS[script], count, capacity)
    batch = rb.sample(400)
    assert [tuple(column.shape) for column in batch] == [(400, OBS), (400, ACTIONS), (400,), (400, OBS), (400,)]
    assert batch._fields == ("obs", "actions", "reward", "next_obs", "terminated")
    assert set(numbers(batch)) == {round(added[0][0]) for added in ring}
    assert set(batch.terminated.tolist()) == {float(added[4]) for added in ring}


@pytest.mark.parametrize("script", BUFFERS)
def test_the_buffer_draws_uniformly_with_replacement(script):
    rb, ring = filled(SCRIPTS[script], 27, 20)
    torch.manual_seed(0)
    drawn, draws = np.zeros(27), 40_000
    for _ in range(10):
        batch = numbers(rb.sample(draws // 10))
        drawn += np.bincount(batch, minlength=27)
    assert drawn[:7].sum() == 0 and len(ring) == 20
    expected = draws / 20
    assert ((drawn[7:] - expected) ** 2 / expected).sum() < 43.8  # chi-square with 19 degrees of freedom: p = 0.001
    pairs = numbers(rb.sample(draws))
    same = np.mean(np.array(pairs[::2]) == np.array(pairs[1::2]))
    assert same == pytest.approx(1 / 20, abs=0.006)


@pytest.mark.parametrize("script", BUFFERS)
def test_a_draw_with_a_generator_leaves_the_other_draws_as_they_are(script):
    rb, _ = filled(SCRIPTS[script], 30, 20)
    before = torch.get_rng_state()
    batches = [numbers(rb.sample(64, generator=torch.Generator().manual_seed(seed))) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert batches[0] == batches[1] != batches[2]
    torch.manual_seed(1)
    assert numbers(rb.sample(64)) == batches[0]


@pytest.mark.parametrize("script", BUFFERS)
def test_arrays_given_to_the_buffer_and_batches_taken_from_it_may_be_changed(script):
    rb = SCRIPTS[script].ReplayBuffer(4, OBS, ACTIONS, torch.device("cpu"))
    obs, actions, reward, next_obs, terminated = transition(3, terminated=True)
    arrays = [np.array(x, dtype=np.float32) for x in (obs, actions, next_obs)]
    rb.add(arrays[0], arrays[1], reward, arrays[2], terminated)
    for array in arrays:
        array[:] = 77
    assert set(numbers(rb.sample(8))) == {3}
    for column in rb.sample(8):
        column.fill_(55)
    assert set(numbers(rb.sample(8))) == {3}


@pytest.mark.parametrize("count", [5, 20, 33])
@pytest.mark.parametrize("script", scripts_with("ReplayBuffer", "save_checkpoint"))
def test_a_saved_buffer_is_the_same_after_loading(script, count, tmp_path):
    rb, ring = filled(SCRIPTS[script], count, 20)
    rb.save(tmp_path / "buffer.bin")
    loaded = SCRIPTS[script].ReplayBuffer(20, OBS, ACTIONS, torch.device("cpu"))
    loaded.load(tmp_path / "buffer.bin", rb.size, rb.position)
    for number in range(count, count + 9):  # goes on as the saved one would
        assert len(loaded) == len(ring)
        assert set(numbers(loaded.sample(500))) == {round(added[0][0]) for added in ring}
        added = transition(number, terminated=number % 3 == 0)
        loaded.add(*added)
        ring = [*ring, added][-20:]


@pytest.mark.parametrize("script", scripts_with("ReplayBuffer", "save_checkpoint"))
def test_a_damaged_buffer_file_is_refused(script, tmp_path):
    rb, _ = filled(SCRIPTS[script], 12, 20)
    rb.save(tmp_path / "whole.bin")
    content = (tmp_path / "whole.bin").read_bytes()
    for name, damaged in {"short": content[:-1], "empty": b"", "half": content[: len(content) // 2]}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(OSError):
            SCRIPTS[script].ReplayBuffer(20, OBS, ACTIONS, torch.device("cpu")).load(tmp_path / name, 12, 12)
    with pytest.raises(OSError):
        SCRIPTS[script].ReplayBuffer(20, OBS, ACTIONS, torch.device("cpu")).load(tmp_path / "none", 12, 12)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 20, 39, 40, 41, 55, 79, 80, 133])
@pytest.mark.parametrize("script", REVIEWING)
def test_the_oldest_quarter_is_the_oldest_by_time_of_insertion(script, count):
    rb, ring = filled(SCRIPTS[script], count, 40)
    quarter = {round(added[0][0]) for added in ring[: max(1, len(ring) // 4)]}
    assert set(numbers(rb.sample(600, oldest=0.25))) == quarter
    assert set(numbers(rb.sample(2000, oldest=1.0))) == {round(added[0][0]) for added in ring}


@pytest.mark.parametrize("script", REVIEWING)
def test_draws_from_the_oldest_quarter_are_uniform(script):
    rb, _ = filled(SCRIPTS[script], 57, 40)
    torch.manual_seed(0)
    drawn = np.bincount(numbers(rb.sample(20_000, oldest=0.25)), minlength=57)
    assert drawn.sum() == drawn[17:27].sum() == 20_000
    assert ((drawn[17:27] - 2000) ** 2 / 2000).sum() < 27.9  # chi-square with 9 degrees of freedom: p = 0.001


# ===== Review in training =====


def recorded_run(script, monkeypatch, **changes):
    """Trains for 240 gradient steps -> (share, numbers of the oldest and the newest in the buffer, the draws' numbers)
    of each batch, and the gate's (dormant, total, threshold) at each count."""
    module, batches, counts = SCRIPTS[script], [], []
    args = short_args(script, total_timesteps=300, learning_starts=60, neuron_interval=20, buffer_size=100, **changes)

    class Buffer(module.ReplayBuffer):
        added = 0

        def add(self, obs, actions, reward, next_obs, terminated):
            super().add(obs, actions, self.added, next_obs, terminated)
            self.added += 1

        def sample(self, *given, **named):
            call = inspect.signature(super().sample).bind(*given, **named)
            batch = super().sample(*given, **named)
            if call.arguments["batch_size"] == args.batch_size:
                span = self.added - len(self), self.added
                batches.append((call.arguments.get("oldest", 1.0), span, batch.reward.long().tolist()))
            return batch

    class Gate(module.ReviewGate):
        def update(self, dormant, total):
            super().update(dormant, total)
            counts.append((len(batches), dormant, total, self.threshold))

    monkeypatch.setattr(module, "ReplayBuffer", Buffer)
    monkeypatch.setattr(module, "ReviewGate", Gate)
    module.main(args)
    return batches, counts


@pytest.mark.parametrize("script", scripts_with("ReplayBuffer", "ReviewGate", "QNetwork"))
def test_reviewing_batches_come_from_the_oldest_quarter_of_the_buffer(script, monkeypatch):
    draws = []

    def review(self, u):
        draws.append(u)
        return u > 0.5

    monkeypatch.setattr(SCRIPTS[script].ReviewGate, "review", review)
    batches, _ = recorded_run(script, monkeypatch)
    assert len(batches) == len(draws) == 240
    assert 0 <= min(draws) < 0.05 and 0.95 < max(draws) < 1 and np.mean(draws) == pytest.approx(0.5, abs=0.06)
    newest = []
    for u, (share, (first, end), drawn) in zip(draws, batches, strict=True):
        assert share == (0.25 if u > 0.5 else 1.0)
        assert min(drawn) >= first and max(drawn) < first + max(1, int((end - first) * share))
        newest.append(max(drawn) >= end - (end - first) // 4)
    assert any(newest)


@pytest.mark.parametrize("script", scripts_with("ReplayBuffer", "ReviewGate", "QNetwork"))
def test_dormant_neurons_of_both_critics_are_counted_at_each_interval(script, monkeypatch):
    module = SCRIPTS[script]
    original = module.QNetwork.__init__

    def with_silent_neurons(self, *given):
        original(self, *given)
        self.fc1.bias.data[:3] = -1000

    monkeypatch.setattr(module.QNetwork, "__init__", with_silent_neurons)
    _, counts = recorded_run(script, monkeypatch, prune=False, grow=False, hidden_dim=24)
    assert [count[0] for count in counts] == list(range(20, 241, 20))
    assert all(total == 4 * 24 and 6 <= dormant < 96 for _, dormant, total, _ in counts)
    expected = thresholds_by_hand([count[1] for count in counts], [96] * len(counts), 0.5)
    assert [count[3] for count in counts] == pytest.approx(expected)


@pytest.mark.parametrize("script", scripts_with("ReplayBuffer", "ReviewGate", "QNetwork"))
def test_without_review_every_batch_is_uniform(script, monkeypatch):
    monkeypatch.setattr(SCRIPTS[script].ReviewGate, "review", lambda self, u: True)
    batches, counts = recorded_run(script, monkeypatch, review=False)
    assert not counts and {share for share, _, _ in batches} == {1.0}
