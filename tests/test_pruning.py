"""Dormant pruning (section 4), and the events of growth and pruning (sections 3 and 4)."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import SCRIPTS, events, saved, scripts_with, short_args

PRUNING = scripts_with("prune_dormant_", "MaskedLinear", "sparse_start_")
EVENTS = scripts_with("grow_and_prune_", "scheduled_growth", "grow_", "prune_dormant_", "connection_counts", "MLP")
SIZES = [6, 14, 11, 3]
SILENT = [[1, 4, 5, 9, 13], [0, 3, 7, 10]]  # of each hidden layer


def activations(layers, x):
    """[batch, in] -> the hidden layers' activations and the output."""
    hidden = []
    for layer in layers[:-1]:
        x = F.relu(F.linear(x, layer.weight, layer.bias))
        hidden.append(x)
    return hidden, F.linear(x, layers[-1].weight, layers[-1].bias)


def silence(layers, neurons, bias=-100.0):
    """Gives neurons of each hidden layer a bias with which they never fire."""
    with torch.no_grad():
        for layer, silent in zip(layers, neurons, strict=False):
            layer.bias[silent] = bias


class Case:
    """A sparse network with silent neurons, an Adam that has made three steps, and a scoring batch."""

    def __init__(self, module, density=0.6, silent=SILENT, steps=3):
        torch.manual_seed(0)
        self.layers = [module.MaskedLinear(n_in, n_out) for n_in, n_out in itertools.pairwise(SIZES)]
        module.sparse_start_(self.layers, density, torch.Generator().manual_seed(3))
        self.parameters = [p for layer in self.layers for p in (layer.weight, layer.bias)]
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3)
        for _ in range(steps):
            for layer in self.layers:
                layer.weight.grad = torch.randn_like(layer.weight) * layer.mask
                layer.bias.grad = torch.randn_like(layer.bias)
            self.optimizer.step()
        for layer in self.layers[:-1]:
            layer.bias.data += 1.0  # the others fire
        silence(self.layers, silent)
        self.x = torch.randn(200, SIZES[0])
        with torch.no_grad():
            self.hidden, self.output = activations(self.layers, self.x)
        assert [(h == 0).all(0).nonzero().flatten().tolist() for h in self.hidden] == silent

    def contents(self):
        """Copies of masks, parameters and Adam's moments, as arrays."""
        state = self.optimizer.state
        moments = [[state[p][name].numpy().copy() for p in self.parameters if p in state] for name in MOMENTS]
        parameters = [p.detach().numpy().copy() for p in self.parameters]
        return [layer.mask.numpy().copy() for layer in self.layers], parameters, *moments


MOMENTS = ("exp_avg", "exp_avg_sq")


def pruned_by_hand(masks, silent, budget, seed):
    """Loops over single connections -> masks afterwards, what was pruned, its number, the pruned neurons."""
    masks, pruned = [mask.copy() for mask in masks], [np.zeros_like(mask) for mask in masks]
    neurons = [(l, i) for l, layer in enumerate(silent) for i in layer]
    spent, taken = 0, []
    for n in torch.randperm(len(neurons), generator=torch.Generator().manual_seed(seed)).tolist():
        l, i = neurons[n]
        connections = [(l, i, j) for j in range(masks[l].shape[1]) if masks[l][i, j]]
        connections += [(l + 1, j, i) for j in range(masks[l + 1].shape[0]) if masks[l + 1][j, i]]
        if connections and spent + len(connections) > budget:
            continue
        for k, row, column in connections:
            masks[k][row, column], pruned[k][row, column] = False, True
        spent += len(connections)
        taken.append((l, i))
    return masks, pruned, spent, taken


# ===== Dormancy =====


@pytest.mark.parametrize("script", scripts_with("dormant_scores"))
def test_a_dormant_score_is_the_mean_activation_over_that_of_the_layer(script):
    h = torch.randn(50, 9, generator=torch.Generator().manual_seed(0)) * torch.tensor([0, 1e-6, 0.1, 1, 1, 1, 2, 9, 0])
    size = np.abs(h.numpy().astype(np.float64))
    expected = size.mean(0) / size.mean()
    scores = SCRIPTS[script].dormant_scores(h)
    assert scores.shape == (9,)
    assert scores.numpy() == pytest.approx(expected, rel=1e-5)
    assert (scores.numpy() == 0).tolist() == (expected == 0).tolist()
    assert float(scores.mean()) == pytest.approx(1)


@pytest.mark.parametrize("script", scripts_with("dormant_scores"))
def test_the_scores_of_a_dead_layer_are_zeros(script):
    assert SCRIPTS[script].dormant_scores(torch.zeros(20, 7)).tolist() == [0.0] * 7


@pytest.mark.parametrize("script", scripts_with("neuron_statistics"))
def test_neuron_statistics_are_shares_of_all_hidden_neurons(script):
    h1 = torch.tensor([[0.0, 2.0, 0.01, 1.0], [0.0, 0.0, 0.0, 1.0]])  # scores 0, 2, 0.01, 2: two at most 0.1
    h2 = torch.zeros(2, 6)
    statistics = SCRIPTS[script].neuron_statistics([h1, h2])
    expected = {"dormant_ratio_0": 7 / 10, "dormant_ratio_0.1": 8 / 10, "fau": 4 / 20}
    assert statistics == pytest.approx(expected)


@pytest.mark.parametrize("script", scripts_with("connection_statistics", "MaskedLinear"))
def test_connection_statistics_count_active_connections_and_neurons_without_outgoing_ones(script):
    module = SCRIPTS[script]
    layers = [module.MaskedLinear(2, 3), module.MaskedLinear(3, 4), module.MaskedLinear(4, 1)]
    layers[0].mask[:] = torch.tensor([[1, 0], [0, 0], [1, 1]])
    layers[1].mask[:] = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 1]])  # neuron 1 leads nowhere
    layers[2].mask[:] = torch.tensor([[1, 0, 0, 0]])  # neurons 1, 2, 3 lead nowhere
    expected = {"density": 8 / 22, "density_layer1": 3 / 6, "density_layer2": 4 / 12, "density_layer3": 1 / 4}
    network = torch.nn.Sequential(*layers)
    assert module.connection_statistics(network) == pytest.approx(expected | {"disconnected": 4 / 7})
    assert module.density(layers[1]) == pytest.approx(1 / 3)
    assert module.density(torch.nn.ModuleDict({"a": network, "b": layers[0]})) == pytest.approx(8 / 22)
    assert module.density(torch.nn.ModuleList([network, module.MaskedLinear(2, 4)])) == pytest.approx(16 / 30)


# ===== Pruning neurons =====


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [math.inf, 1000, 60, 41.5, 27, 13, 6, 1, 0.5, 0, -7])
@pytest.mark.parametrize("script", PRUNING)
def test_silent_neurons_are_pruned_whole_in_random_order_as_the_budget_allows(script, budget, seed):
    module = SCRIPTS[script]
    case = Case(module)
    # a neuron that costs nothing: its connections are absent already
    free = case.layers[0].mask[9], case.layers[1].mask[:, 9]
    for connections in free:
        connections[:] = False
    for layer in case.layers:
        for tensor in (layer.weight.data, *(case.optimizer.state[layer.weight][name] for name in MOMENTS)):
            tensor.mul_(layer.mask)
    rng = torch.get_rng_state()
    masks, parameters, *moments = case.contents()
    expected, taken_masks, cost, taken = pruned_by_hand(masks, SILENT, budget, seed)
    assert (0, 9) in taken

    generator = torch.Generator().manual_seed(seed)
    spent, pruned = module.prune_dormant_(case.layers, case.hidden, case.optimizer, budget, generator)
    now, parameters_now, *moments_now = case.contents()

    assert spent == cost <= max(0, budget)
    for was_taken, by_hand in zip(pruned, taken_masks, strict=True):
        assert was_taken.dtype == torch.bool and (was_taken.numpy() == by_hand).all()
    for mask, by_hand in zip(now, expected, strict=True):
        assert (mask == by_hand).all()
    assert [int(layer.pruned) for layer in case.layers] == [mask.sum() for mask in taken_masks]
    for l, i in taken:
        parameters[2 * l + 1][i] = case.hidden[l].double().mean()
        for moment in moments:
            moment[2 * l + 1][i] = 0
    for l, mask in enumerate(taken_masks):
        parameters[2 * l][mask] = 0
        for moment in moments:
            moment[2 * l][mask] = 0
    for p, by_hand in zip(parameters_now, parameters, strict=True):
        assert p == pytest.approx(by_hand, rel=1e-5, abs=0)
    for p, m in zip((*moments_now[0], *moments_now[1]), (*moments[0], *moments[1]), strict=True):
        assert (p == m).all()
    assert all(int(case.optimizer.state[p]["step"]) == 3 for p in case.parameters)
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("script", PRUNING)
def test_a_connection_between_two_silent_neurons_is_paid_for_once(script):
    case = Case(SCRIPTS[script])
    shared = sum(bool(case.layers[1].mask[j, i]) for i in SILENT[0] for j in SILENT[1])
    rows = [int(case.layers[l].mask[SILENT[l]].sum()) for l in (0, 1)]
    columns = [int(case.layers[l + 1].mask[:, SILENT[l]].sum()) for l in (0, 1)]
    distinct = sum(rows) + sum(columns) - shared
    assert shared > 0
    spent, pruned = SCRIPTS[script].prune_dormant_(
        case.layers, case.hidden, case.optimizer, distinct, torch.Generator().manual_seed(0)
    )
    assert spent == distinct == sum(int(mask.sum()) for mask in pruned)


@pytest.mark.parametrize("script", PRUNING)
def test_pruning_passes_over_a_neuron_that_does_not_fit(script):
    module = SCRIPTS[script]
    case = Case(module, density=1.0, silent=[[2], [5]])
    # the first layer's neuron costs 6 + 11 connections, the second layer's 14 + 3, or 13 + 3 after the other one
    case.layers[1].mask[5, 3:] = False
    case.layers[1].weight.data.mul_(case.layers[1].mask)
    for seed in range(8):
        trial = copy.deepcopy(case)
        spent, _ = module.prune_dormant_(
            trial.layers, trial.hidden, trial.optimizer, 16, torch.Generator().manual_seed(seed)
        )
        assert spent == 6  # 3 in, 3 out: the cheap one, wherever in the order it stands
        assert trial.layers[0].mask[2].all() and trial.layers[0].bias[2].item() == -100


@pytest.mark.parametrize("script", PRUNING)
def test_only_silent_neurons_are_pruned(script):
    case = Case(SCRIPTS[script], silent=[[], []])
    case.hidden[0][:, 3] = 0
    case.hidden[0][7, 3] = 1e-20  # fires once, hardly
    before = case.contents()
    spent, pruned = SCRIPTS[script].prune_dormant_(
        case.layers, case.hidden, case.optimizer, math.inf, torch.Generator().manual_seed(0)
    )
    assert spent == 0 and not any(mask.any() for mask in pruned)
    for now, then in zip(case.contents(), before, strict=True):
        assert all((a == b).all() for a, b in zip(now, then, strict=True))


@pytest.mark.parametrize("script", PRUNING)
def test_every_order_of_pruning_occurs(script):
    module, first = SCRIPTS[script], set()
    for seed in range(40):
        case = Case(module, density=1.0)
        costs = [SIZES[0] + SIZES[2], SIZES[1] + SIZES[3]]
        _, pruned = module.prune_dormant_(
            case.layers, case.hidden, case.optimizer, max(costs), torch.Generator().manual_seed(seed)
        )
        [(l, i)] = [(l, i) for l in (0, 1) for i in SILENT[l] if not case.layers[l].mask[i].any()]
        assert pruned[l][i].all()
        first.add((l, i))
    assert first == {(l, i) for l in (0, 1) for i in SILENT[l]}


@pytest.mark.parametrize("script", PRUNING)
def test_a_pruned_neuron_of_a_dead_layer_gets_the_bias_of_a_fresh_one(script):
    case = Case(SCRIPTS[script], silent=[list(range(SIZES[1])), []])
    case.hidden[1] += 0.5
    SCRIPTS[script].prune_dormant_(case.layers, case.hidden, case.optimizer, math.inf, torch.Generator().manual_seed(0))
    assert case.layers[0].bias.detach().numpy() == pytest.approx(np.full(SIZES[1], 1 / math.sqrt(SIZES[0])))


@pytest.mark.parametrize("script", PRUNING)
def test_pruning_leaves_the_output_on_the_scoring_batch_unchanged(script):
    case = Case(SCRIPTS[script])
    spent, _ = SCRIPTS[script].prune_dormant_(
        case.layers, case.hidden, case.optimizer, math.inf, torch.Generator().manual_seed(0)
    )
    hidden, output = activations(case.layers, case.x)
    assert spent > 0 and torch.equal(output, case.output)
    assert all((h[:, silent] > 0).all() for h, silent in zip(hidden, SILENT, strict=True))


@pytest.mark.parametrize("script", PRUNING)
def test_pruning_works_before_the_optimizer_has_made_a_step(script):
    case = Case(SCRIPTS[script], steps=0)
    masks = case.contents()[0]
    expected, _, cost, _ = pruned_by_hand(masks, SILENT, 30, 0)
    spent, _ = SCRIPTS[script].prune_dormant_(
        case.layers, case.hidden, case.optimizer, 30, torch.Generator().manual_seed(0)
    )
    assert spent == cost > 0
    assert all((layer.mask.numpy() == mask).all() for layer, mask in zip(case.layers, expected, strict=True))
    assert not case.optimizer.state


# ===== Events =====


class Run:
    """A network with its target and optimizer, made to learn something, with an event at each `interval`."""

    def __init__(self, script, kind, monkeypatch, hidden_dim=32, steps=500, interval=50, **changes):
        self.module, self.kind = SCRIPTS[script], kind
        self.args = short_args(
            script, total_timesteps=steps + 7, learning_starts=7, growth_interval=interval, **changes
        )
        self.steps, self.interval = steps, interval
        torch.manual_seed(1)
        low, high = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])
        make = {"MLP": (4, hidden_dim, 1), "Actor": (4, low, high, hidden_dim)}[kind]
        self.network = getattr(self.module, kind)(*make)
        self.layers = self.module.masked_layers(self.network)
        self.generator = torch.Generator().manual_seed(2)
        self.module.sparse_start_(self.layers, self.args.initial_density, self.generator, self.args.dense_ends)
        self.start = [int(layer.mask.sum()) for layer in self.layers]
        self.target = copy.deepcopy(self.network).requires_grad_(False)
        with torch.no_grad():
            for p in self.target.parameters():
                p += 0.01  # a target lags behind; nothing of it is 0
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        self.scoring = self.inputs(0.1 * torch.randn(256, 4))
        self.probe = self.inputs(20 * torch.randn(256, 4))
        self.x = torch.randn(128, 4)
        self.y = torch.sin(3 * self.x[:, :1]) + self.x[:, 1:2] * self.x[:, 2:3]
        self.calls, original = [], self.module.prune_dormant_

        def recorded(layers, hidden, optimizer, budget, generator):
            spent, pruned = original(layers, hidden, optimizer, budget, generator)
            self.calls.append((budget, spent, [mask.clone() for mask in pruned], self.masks()))
            return spent, pruned

        monkeypatch.setattr(self.module, "prune_dormant_", recorded)

    def inputs(self, x):
        return (x[:, :3], x[:, 3:]) if self.kind == "MLP" else (x,)

    def masks(self):
        return [layer.mask.clone() for layer in self.layers]

    def silence(self, count, seed):
        """Neurons that are silent on the scoring batch, not on the probe -> their numbers in each hidden layer."""
        width = self.layers[0].out_features
        rng = np.random.default_rng(seed)
        neurons = [sorted(rng.choice(width, count, replace=False).tolist()) for _ in range(2)]
        silence(self.layers, neurons, bias=-2.0)
        return neurons

    def backward(self):
        """The gradient of a regression."""
        self.optimizer.zero_grad()
        output = self.network(*self.inputs(self.x))
        F.mse_loss(output, self.y.expand_as(output)).backward()

    def event(self, t):
        return self.module.grow_and_prune_(
            self.network, self.target, self.optimizer, t, self.args, self.generator, self.scoring, self.probe
        )

    def step(self):
        for layer in self.layers:
            layer.weight.grad[~layer.mask] = 0
        self.optimizer.step()

    def n_free(self):
        """What each layer is to grow, by the definition."""
        if self.args.dense_ends:
            return [0, round(self.args.final_density * self.layers[1].weight.numel()) - self.start[1], 0]
        sizes = [layer.weight.numel() for layer in self.layers]
        slopes = [sum(layer.weight.shape) / layer.weight.numel() for layer in self.layers]
        low, high = 0.0, 1 / min(slopes)
        for _ in range(100):
            eps = (low + high) / 2
            total = sum(min(1, eps * slope) * size for slope, size in zip(slopes, sizes, strict=True))
            low, high = (eps, high) if total < self.args.final_density * sum(sizes) else (low, eps)
        ends = [round(min(1, low * slope) * size) for slope, size in zip(slopes, sizes, strict=True)]
        return [max(0, end - start) for end, start in zip(ends, self.start, strict=True)]

    def scheduled(self, t):
        events = self.interval * np.arange(1, self.steps // self.interval + 1)
        parts = 1 + np.cos(np.pi * events / self.steps)
        share = parts[: t // self.interval].sum() / parts.sum()
        return [round(n * share) for n in self.n_free()]

    def output(self, x):
        """The network's output, by numpy in double precision."""
        h = torch.cat(self.inputs(x), 1).double().numpy()
        weights = [(l.weight.detach().double().numpy(), l.bias.detach().double().numpy()) for l in self.layers]
        for number, (weight, bias) in enumerate(weights):
            h = h @ weight.T + bias
            if norm := number < 2 and getattr(self.network, f"norm{number + 1}", None):
                gain, offset = (p.detach().double().numpy() for p in norm.parameters())
                h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5) * gain + offset
            h = np.maximum(h, 0) if number < 2 else h
        if self.kind == "Actor":
            return np.tanh(h) * np.array([1.0, 1.5]) + np.array([0.0, 1.5])
        return h


CHANGES = [{}, {"final_density": 0.6}, {"omega": 1.7}, {"growth_criterion": "random"}]
CHANGES += [{"dense_ends": True, "final_density": 0.8}]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_events_reach_the_scheduled_number_of_connections_within_the_pruning_budget(script, kind, changes, monkeypatch):
    run, taken, reached, beyond = Run(script, kind, monkeypatch, **changes), 0, [], False
    omega = changes.get("omega", 0.5)
    for t in range(run.interval, run.steps + 1, run.interval):
        run.silence(5, seed=t)
        run.backward()
        before, scheduled = run.masks(), run.scheduled(t)
        done = run.event(t)
        budget, spent, pruned, after_pruning = run.calls[-1]
        assert budget == pytest.approx(omega * sum(scheduled) - taken)
        taken += spent
        assert taken <= omega * sum(scheduled)
        beyond |= taken > sum(scheduled)
        after = run.masks()
        for start, added, a, b, c, d in zip(run.start, scheduled, before, pruned, after_pruning, after, strict=True):
            assert torch.equal(c, a & ~b)
            assert not (d & b).any()  # what was pruned does not grow back at this event
            assert not (c & ~d).any()
            aim = min(start + added, int((~b).sum()))
            assert int(d.sum()) == max(aim, int(c.sum()))
            reached.append(int(d.sum()) == start + added)
        assert done["pruned"] == spent == sum(int(mask.sum()) for mask in pruned)
        assert done["grown"] == sum(int((d & ~c).sum()) for c, d in zip(after_pruning, after, strict=True))
        run.step()
    assert taken > 0 and sum(call[1] > 0 for call in run.calls) >= 4
    # a layer falls short only where what was just pruned is all that it could still grow
    assert all(reached[1::3][: 3 if omega > 1 else 5])
    assert beyond == (omega > 1)


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_without_pruning_every_layer_has_exactly_the_scheduled_connections(script, kind, monkeypatch):
    run = Run(script, kind, monkeypatch, prune=False, steps=503)
    biases = None
    for t in range(50, 501, 50):
        run.silence(5, seed=t)
        run.backward()
        before, biases = run.masks(), [layer.bias.clone() for layer in run.layers]
        done = run.event(t)
        expected = [start + added for start, added in zip(run.start, run.scheduled(t), strict=True)]
        assert [int(layer.mask.sum()) for layer in run.layers] == expected
        assert not any((b & ~layer.mask).any() for b, layer in zip(before, run.layers, strict=True))
        assert all(torch.equal(b, layer.bias) for b, layer in zip(biases, run.layers, strict=True))
        assert done["pruned"] == done["output_change_pruning"] == 0
        run.step()
    assert not run.calls and all(layer.mask.all() for layer in run.layers)


@pytest.mark.parametrize("script", EVENTS)
def test_without_growth_pruning_works_alone_with_the_budget_of_the_schedule(script, monkeypatch):
    run, taken = Run(script, "MLP", monkeypatch, grow=False, omega=0.3), 0
    for t in range(50, 251, 50):
        run.silence(6, seed=t)
        run.backward()
        before = run.masks()
        done = run.event(t)
        assert run.calls[-1][0] == pytest.approx(0.3 * sum(run.scheduled(t)) - taken)
        assert not any((layer.mask & ~b).any() for b, layer in zip(before, run.layers, strict=True))
        lost = sum(int((b & ~layer.mask).sum()) for b, layer in zip(before, run.layers, strict=True))
        assert done["grown"] == 0 and done["pruned"] == lost
        taken += lost
        run.step()
    assert taken > 0


@pytest.mark.parametrize("prune", [True, False])
@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_an_event_grows_the_largest_gradients_that_it_has_not_just_pruned(script, kind, prune, monkeypatch):
    run = Run(script, kind, monkeypatch, prune=prune)
    run.silence(6, seed=0)
    run.backward()
    before = run.masks()
    run.event(100)
    pruned = run.calls[0][2] if prune else [torch.zeros_like(mask) for mask in before]
    for mask, taken, layer in zip(before, pruned, run.layers, strict=True):
        grown = layer.mask & ~mask
        left = ~mask & ~layer.mask
        assert not (grown & taken).any()
        if grown.any() and left.any():
            size = layer.weight.grad.abs()
            assert float(size[grown].min()) >= float(size[left].max())
        assert (layer.weight[~layer.mask] == 0).all() and (layer.weight[grown] == 0).all()
    assert sum(int((layer.mask & ~mask).sum()) for mask, layer in zip(before, run.layers, strict=True)) > 100


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_random_growth_is_as_much_growth_from_the_generator_of_the_event(script, kind, monkeypatch):
    grown, left_out, rng = {}, 0, torch.get_rng_state()
    for criterion in ("gradient", "random", "random"):
        run = Run(script, kind, monkeypatch, growth_criterion=criterion, prune=False)
        run.backward()
        before, expected, drawn = run.masks(), torch.Generator(), torch.get_rng_state()
        expected.set_state(run.generator.get_state())
        run.event(100)
        assert torch.equal(torch.get_rng_state(), drawn)
        assert torch.equal(run.generator.get_state(), expected.get_state()) == (criterion == "gradient")
        now = [layer.mask & ~mask for mask, layer in zip(before, run.layers, strict=True)]
        grown.setdefault(criterion, []).append(now)
        for new, mask, layer in zip(now, before, run.layers, strict=True):
            left, size = ~mask & ~new, layer.weight.grad.abs()
            left_out += criterion == "random" and bool(new.any() and left.any() and size[left].max() > size[new].min())
    torch.set_rng_state(rng)
    [by_gradient], [first, again] = grown["gradient"], grown["random"]
    assert left_out and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert [int(new.sum()) for new in by_gradient] == [int(new.sum()) for new in first]


@pytest.mark.parametrize("script", EVENTS)
def test_what_pruning_has_taken_is_in_the_state_of_the_network(script, monkeypatch):
    run = Run(script, "MLP", monkeypatch)
    for t in (50, 100):
        run.silence(6, seed=t)
        run.backward()
        run.event(t)
    taken = sum(call[1] for call in run.calls)
    state = copy.deepcopy(run.network.state_dict())
    assert taken == sum(int(value) for name, value in state.items() if name.endswith("pruned")) > 0
    again = Run(script, "MLP", monkeypatch)
    again.network.load_state_dict(state)
    again.backward()
    again.event(150)
    assert again.calls[-1][0] == pytest.approx(0.5 * sum(run.scheduled(150)) - taken)


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_an_event_gives_the_target_the_masks_and_clears_its_absent_weights(script, kind, monkeypatch):
    run = Run(script, kind, monkeypatch)
    run.silence(6, seed=0)
    run.backward()
    before = {name: p.clone() for name, p in run.target.named_parameters()}
    assert run.event(50)["pruned"] > 0
    for name in ("fc1", "fc2", "fc3"):
        mask, layer = getattr(run.network, name).mask, getattr(run.target, name)
        assert torch.equal(layer.mask, mask) and layer.mask is not mask
        assert (layer.weight[~mask] == 0).all()
        assert torch.equal(layer.weight[mask], before[f"{name}.weight"][mask])
        assert torch.equal(layer.bias, before[f"{name}.bias"])


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_an_event_reports_the_largest_change_of_an_output(script, kind, monkeypatch):
    run, probe = Run(script, kind, monkeypatch), None
    for t in (50, 100):
        run.silence(5, seed=t)
        run.backward()
        probe = torch.cat(run.probe, 1)
        before, before_scoring = run.output(probe), run.output(torch.cat(run.scoring, 1))
        done = run.event(t)
        assert done["grown"] > 0 and done["pruned"] > 0
        assert done["output_change_growth"] == 0
        # the grown connections stand at 0: the network now is the pruned one
        assert done["output_change_pruning"] == pytest.approx(np.abs(run.output(probe) - before).max(), rel=1e-4)
        assert done["output_change_pruning"] > 1e-3
        # A norm divides by what its whole layer does, so there a pruned neuron's new pre-activation moves the others.
        same = run.output(torch.cat(run.scoring, 1)) == pytest.approx(before_scoring, abs=1e-6)
        assert same == (not hasattr(run.network, "norm1"))
        run.step()


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_a_grown_connection_learns_from_the_same_step_on(script, kind, monkeypatch):
    run = Run(script, kind, monkeypatch)
    for _ in range(3):
        run.backward()
        run.step()
    run.backward()
    before = run.masks()
    run.event(50)
    gradients = [layer.weight.grad.clone() for layer in run.layers]
    run.step()
    for mask, gradient, layer in zip(before, gradients, run.layers, strict=True):
        grown = layer.mask & ~mask
        moves = gradient[grown].abs() > 1e-7
        # Adam's fourth step from moments 0: m = 0.1 g, v = 0.001 g^2, with the bias corrections of step 4
        size = 1e-3 * (0.1 / (1 - 0.9**4)) / math.sqrt(0.001 / (1 - 0.999**4))
        expected = -gradient[grown].sign() * size
        assert layer.weight[grown][moves].detach().numpy() == pytest.approx(expected[moves].numpy(), rel=1e-2)
    assert sum(int((layer.mask & ~mask).sum()) for mask, layer in zip(before, run.layers, strict=True)) > 50


@pytest.mark.parametrize("kind", ["MLP", "Actor"])
@pytest.mark.parametrize("script", EVENTS)
def test_pruned_neurons_come_back(script, kind, monkeypatch):
    """In both hidden layers, though the first and the last layer start dense: their own schedule adds nothing."""
    run = Run(script, kind, monkeypatch, hidden_dim=64, steps=400, interval=20)
    assert run.layers[0].mask.all() and run.layers[2].mask.all() and run.n_free()[::2] == [0, 0]
    neurons, lost = run.silence(4, seed=0), [set(), set()]
    for t in range(1, 261):
        run.backward()
        if t % 20 == 0:
            run.event(t)
        run.step()
        for l in (0, 1) if t <= 100 else ():
            without = ~run.layers[l].mask.any(1) & ~run.layers[l + 1].mask.any(0)
            lost[l] |= {i for i in neurons[l] if without[i]}
    assert not run.layers[1].mask.all()
    for l in (0, 1):
        back = {i for i in lost[l] if run.layers[l].mask[i].any() and run.layers[l + 1].mask[:, i].any()}
        assert lost[l] and back == lost[l]


# ===== Events in training =====


@pytest.mark.parametrize("changes", [{}, {"replay_ratio": 3}, {"grow": False}, {"prune": False}], ids=str)
@pytest.mark.parametrize("script", scripts_with("main", "grow_and_prune_", "connection_counts", "MLP"))
def test_each_network_has_its_events_on_two_batches_of_2048_of_its_own_inputs(script, changes, monkeypatch):
    module, calls, networks, ring = SCRIPTS[script], [], {}, []
    args = short_args(script, total_timesteps=160, learning_starts=40, buffer_size=70, **changes)
    original, deepcopy = module.grow_and_prune_, copy.deepcopy

    def copied(thing, *rest):
        result = deepcopy(thing, *rest)
        if isinstance(thing, torch.nn.ModuleDict):
            networks.update({id(thing[name]): (name, result[name]) for name in thing})
        return result

    class Buffer(module.ReplayBuffer):
        def add(self, obs, actions, *rest):
            ring.append(np.float32([*obs, *actions]))
            super().add(obs, actions, *rest)

    def recorded(network, target, optimizer, t, given, generator, scoring, probe):
        name, its_target = networks[id(network)]
        rng = torch.get_rng_state()
        assert target is its_target and given is args
        assert any(p is network.fc2.weight for p in optimizer.param_groups[0]["params"])
        assert t > 50 or network.fc2.weight.grad[~network.fc2.mask].any()  # the dense gradient
        width = 3 if name == "actor" else 4
        held = {row[:width].tobytes() for row in np.array(ring[-70:])}
        for batch in (scoring, probe):
            rows = torch.cat(batch, 1).numpy()
            assert rows.shape == (2048, width)
            assert {row.tobytes() for row in rows} == held  # all that the buffer holds: 2048 draws of 70
        assert not torch.equal(scoring[0], probe[0])
        result = original(network, target, optimizer, t, given, generator, scoring, probe)
        assert torch.equal(torch.get_rng_state(), rng)
        calls.append((name, t, len(ring), result, [int(l.mask.sum()) for l in module.masked_layers(network)]))
        return result

    monkeypatch.setattr(module.copy, "deepcopy", copied)
    monkeypatch.setattr(module, "ReplayBuffer", Buffer)
    monkeypatch.setattr(module, "grow_and_prune_", recorded)
    folder = module.main(args)
    total = 120 * args.replay_ratio
    times = range(50, total + 1, 50)
    assert [call[:3] for call in calls] == [
        (name, t, 40 + math.ceil(t / args.replay_ratio)) for t in times for name in ("qf1", "qf2", "actor")
    ]
    log = events(folder)
    for number, name in enumerate(("qf1", "qf2", "actor")):
        of = calls[number::3]
        for value in ("grown", "pruned", "output_change_pruning", "output_change_growth"):
            assert log[f"ne/{name}/{value}"] == [(call[2], pytest.approx(call[3][value])) for call in of]
        start = int(saved(folder / "models" / "0.pt")[name]["fc2.mask"].sum())
        for _, t, _, result, active in of if args.grow else ():
            aim = start + module.scheduled_growth(t, total, 50, 32 * 32 - start)
            assert aim - result["pruned"] <= active[1] <= aim  # what has just been pruned may not be back
        assert aim == 32 * 32 if args.grow else not any(result["grown"] for *_, result, _ in of)
