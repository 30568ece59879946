"""Experience review (section 5) and the replay buffer."""

import copy
import inspect

import numpy as np
import pytest
import torch
import toys  # noqa: F401, it registers tasks
from harness import SCRIPTS, events, scripts_with, short_args

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


@pytest.mark.parametrize("script", scripts_with("ReviewGate"))
def test_a_gate_counts_its_reviews_and_goes_on_from_its_state(script):
    gate, rng = SCRIPTS[script].ReviewGate(0.3), np.random.default_rng(0)
    for dormant in rng.integers(0, 100, 30).tolist() + [50] * 9:
        gate.update(dormant, 100)
    draws = rng.random(1000).tolist()
    assert sum(gate.review(u) for u in draws) == gate.reviewed == sum(u > gate.threshold for u in draws) > 0
    again = SCRIPTS[script].ReviewGate()
    again.load_state_dict(copy.deepcopy(gate.state_dict()))
    for dormant in rng.integers(0, 100, 30).tolist() + [50] * 40:
        for each in (gate, again):
            each.update(dormant, 100)
        assert (again.threshold, again.review(0.4), again.reviewed) == (gate.threshold, gate.review(0.4), gate.reviewed)
    assert again.threshold == 0.3


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
@pytest.mark.parametrize("script", BUFFERS)
def test_a_buffer_made_of_its_rows_and_their_number_goes_on_as_it_was(script, count):
    rb, ring = filled(SCRIPTS[script], count, 20)
    again = SCRIPTS[script].ReplayBuffer(20, OBS, ACTIONS, torch.device("cpu"))
    again.rows[: len(rb)], again.added = rb.rows[: len(rb)].clone(), rb.added
    assert rb.added == count
    for number in range(count, count + 9):
        assert len(again) == len(ring)
        assert set(numbers(again.sample(500))) == {round(added[0][0]) for added in ring}
        added = transition(number, terminated=number % 3 == 0)
        again.add(*added)
        ring = [*ring, added][-20:]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 8, 20, 39, 40, 41, 55, 79, 80, 133])
@pytest.mark.parametrize("script", REVIEWING)
def test_the_oldest_share_is_the_oldest_by_time_of_insertion(script, count):
    rb, ring = filled(SCRIPTS[script], count, 40)
    quarter = {round(added[0][0]) for added in ring[: max(1, len(ring) // 4)]}
    assert set(numbers(rb.sample(600, oldest=0.25))) == quarter
    tenth, most = ({round(added[0][0]) for added in ring[: max(1, int(len(ring) * share))]} for share in (0.1, 0.8))
    assert set(numbers(rb.sample(200, oldest=0.1))) == tenth
    assert set(numbers(rb.sample(2000, 0.8, torch.Generator().manual_seed(0)))) == most
    assert set(numbers(rb.sample(2000, oldest=1.0))) == {round(added[0][0]) for added in ring}


@pytest.mark.parametrize("script", REVIEWING)
def test_draws_from_the_oldest_quarter_are_uniform(script):
    rb, _ = filled(SCRIPTS[script], 57, 40)
    torch.manual_seed(0)
    drawn = np.bincount(numbers(rb.sample(20_000, oldest=0.25)), minlength=57)
    assert drawn.sum() == drawn[17:27].sum() == 20_000
    assert ((drawn[17:27] - 2000) ** 2 / 2000).sum() < 27.9  # chi-square with 9 degrees of freedom: p = 0.001


# ===== Storing in training =====


@pytest.mark.parametrize("script", scripts_with("main", "ReplayBuffer", "MLP"))
def test_an_observation_that_its_task_changes_in_place_is_stored_as_it_was(script, monkeypatch):
    module, stored = SCRIPTS[script], []

    class Buffer(module.ReplayBuffer):
        def __init__(self, *given):
            super().__init__(*given)
            stored.append(self)

    monkeypatch.setattr(module, "ReplayBuffer", Buffer)
    module.main(short_args(script, env_id="ToyInPlace-v0", total_timesteps=80, learning_starts=30))
    [rb] = stored
    obs, actions, reward, next_obs, terminated = (column.numpy() for column in rb.rows[:80].split([2, 1, 1, 2, 1], 1))
    expected = np.float32([(episode, step) for episode in range(12) for step in range(7)][:80])
    assert (obs == expected).all()
    assert (next_obs == np.add(expected, [0, 1])).all()
    assert (reward == actions).all() and not terminated.any()


# ===== Review in training =====


class Recording:
    """A run of 240 gradient steps, and what it drew.

    batches: of each batch that is learned from, the share of the buffer, the numbers of its oldest transition and of
    its next one, and the numbers drawn; draws: the u of each decision to review; counts: at each count of dormant
    neurons, how many batches came before, what the gate was told, its threshold, and what this recording counts;
    looks: of all other batches the size and the generator.
    """

    def __init__(self, script, monkeypatch, decide=None, silent=(0, 0), **changes):
        module, self.batches, self.counts, self.draws, self.looks = SCRIPTS[script], [], [], [], []
        changes = {"total_timesteps": 300, "learning_starts": 60, "neuron_interval": 20, "buffer_size": 100} | changes
        self.args, deepcopy, recording = short_args(script, **changes), copy.deepcopy, self
        networks, last = {}, []

        class Buffer(module.ReplayBuffer):
            def add(self, obs, actions, reward, next_obs, terminated):
                super().add(obs, actions, self.added, next_obs, terminated)

            def sample(self, *given, **named):
                call = inspect.signature(super().sample).bind(*given, **named)
                batch, span = super().sample(*given, **named), (self.added - len(self), self.added)
                if call.arguments["batch_size"] == recording.args.batch_size:
                    recording.batches.append((call.arguments.get("oldest", 1.0), span, batch.reward.long().tolist()))
                else:
                    recording.looks.append((len(batch.obs), call.arguments["generator"]))
                last[:] = [batch, set(range(*span))]
                return batch

        def copied(thing, *rest):
            if isinstance(thing, torch.nn.ModuleDict):
                networks.update(thing)
                for name, count in zip(("qf1", "qf2"), silent, strict=True):
                    thing[name].fc1.bias.data[:count] = -1000
            return deepcopy(thing, *rest)

        def dormant():
            """Counts the dormant neurons of both critics on the batch drawn last, by numpy."""
            [batch, held], found = last, []
            assert len(batch.obs) == 2048 and set(batch.reward.long().tolist()) == held
            for name in ("qf1", "qf2"):
                h = torch.cat([batch.obs, batch.actions], 1).double().numpy()
                p = {key: value.double().numpy() for key, value in networks[name].state_dict().items()}
                for l in (1, 2):
                    h = h @ p[f"fc{l}.weight"].T + p[f"fc{l}.bias"]
                    if f"norm{l}.weight" in p:
                        h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
                        h = h * p[f"norm{l}.weight"] + p[f"norm{l}.bias"]
                    h = np.maximum(h, 0)
                    found.append((h.mean(0) / h.mean() <= recording.args.dormant_tau).sum())
            return sum(found)

        monkeypatch.setattr(module, "ReplayBuffer", Buffer)
        monkeypatch.setattr(module.copy, "deepcopy", copied)
        if hasattr(module, "ReviewGate"):

            class Gate(module.ReviewGate):
                def update(self, count, total):
                    super().update(count, total)
                    recording.counts.append((len(recording.batches), count, total, self.threshold, dormant()))

                def review(self, u):
                    recording.draws.append(u)
                    return super().review(u) if decide is None else decide(u)

            monkeypatch.setattr(module, "ReviewGate", Gate)
        self.folder = module.main(self.args)


REVIEWED = scripts_with("main", "ReplayBuffer", "ReviewGate", "MLP")


@pytest.mark.parametrize("oldest", [0.25, 0.6])
@pytest.mark.parametrize("script", REVIEWED)
def test_reviewing_batches_come_from_the_oldest_share_of_the_buffer(script, oldest, monkeypatch):
    changes = {} if oldest == 0.25 else {"review_oldest": oldest}
    recording, newest = Recording(script, monkeypatch, decide=lambda u: u > 0.5, **changes), []
    draws, batches = recording.draws, recording.batches
    assert len(batches) == len(draws) == 240
    assert 0 <= min(draws) < 0.05 and 0.95 < max(draws) < 1 and np.mean(draws) == pytest.approx(0.5, abs=0.06)
    for u, (share, (first, end), drawn) in zip(draws, batches, strict=True):
        assert share == (oldest if u > 0.5 else 1.0)
        assert min(drawn) >= first and max(drawn) < first + max(1, int((end - first) * share))
        newest.append(max(drawn) >= end - (end - first) // 4)
    assert any(newest)


@pytest.mark.parametrize("changes", [{}, {"dormant_tau": 0.0}, {"dormant_tau": 0.5, "review_floor": 0.95}], ids=str)
@pytest.mark.parametrize("script", REVIEWED)
def test_dormant_neurons_of_both_critics_are_counted_at_each_interval(script, changes, monkeypatch):
    changes = changes | {"prune": False, "grow": False, "hidden_dim": 24}
    recording = Recording(script, monkeypatch, silent=(3, 9), **changes)
    counts, floor = recording.counts, changes.get("review_floor", 0.5)
    assert [count[0] for count in counts] == list(range(20, 241, 20))
    assert all(total == 4 * 24 and 12 <= dormant < 96 for _, dormant, total, _, _ in counts)
    assert [dormant for _, dormant, *_ in counts] == [by_hand for *_, by_hand in counts]
    expected = thresholds_by_hand([count[1] for count in counts], [96] * len(counts), floor)
    assert [count[3] for count in counts] == pytest.approx(expected)
    assert floor == 0.5 or floor in expected

    log, thresholds = events(recording.folder), [1.0, *expected]
    steps = range(80, 301, 20)
    assert log["ne/review_threshold"] == [(n, pytest.approx(e)) for n, e in zip(steps, expected, strict=True)]
    reviewed = np.array([u > thresholds[n // 20] for n, u in enumerate(recording.draws)])
    shares = reviewed.reshape(12, 20).mean(1)
    assert log["ne/review_share"] == [(n, pytest.approx(e)) for n, e in zip(steps, shares, strict=True)]
    assert [share < 1 for share, _, _ in recording.batches] == reviewed.tolist() and any(reviewed)


@pytest.mark.parametrize("script", REVIEWED)
def test_without_review_every_batch_is_uniform(script, monkeypatch):
    recording = Recording(script, monkeypatch, decide=lambda u: True, review=False)
    assert not recording.counts and {share for share, _, _ in recording.batches} == {1.0}


@pytest.mark.parametrize("script", REVIEWED)
def test_what_looks_events_and_review_draw_leaves_the_draws_of_td3_as_they_are(script, monkeypatch):
    ne = Recording(script, monkeypatch, decide=lambda u: False, growth_criterion="random", growth_interval=30)
    assert len(ne.draws) == 240 and len(ne.counts) == 12
    drawn = [generator for size, generator in ne.looks if size == 2048]
    assert len(ne.looks) == len(drawn) == 12 + 12 + 8 + 8  # the neurons, the gate, and two batches of an event
    assert sorted(drawn.count(generator) for generator in set(drawn)) == [12, 28]  # looks at neurons disturb nothing
    td3 = Recording("td3_continuous", monkeypatch, neuron_interval=120)
    assert td3.batches == ne.batches and len(td3.batches) == 240 and len(td3.looks) == 2
