"""Sparse start (section 2) and growth (section 3)."""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn
from harness import SCRIPTS, saved, scripts_with, short_args

SHAPES = {
    "HalfCheetah critic": [(256, 23), (256, 256), (1, 256)],
    "HalfCheetah actor": [(256, 17), (256, 256), (6, 256)],
    "Humanoid critic": [(256, 393), (256, 256), (1, 256)],
    "Pendulum critic": [(64, 4), (64, 64), (1, 64)],
    "DrQ head": [(1024, 56), (1024, 1024), (1, 1024)],
    "one layer": [(7, 5)],
    "single connections": [(1, 1), (3, 1), (1, 3)],
    "four layers": [(40, 30), (50, 40), (8, 50), (90, 8)],
}


def bisected_densities(shapes, density):
    """min(1, eps (in + out) / (in out)) for the eps that gives the network's density, found by bisection."""
    sizes = np.array([n_out * n_in for n_out, n_in in shapes], dtype=np.float64)
    slopes = np.array([n_out + n_in for n_out, n_in in shapes]) / sizes
    low, high = 0.0, 1 / slopes.min()
    for _ in range(200):
        eps = (low + high) / 2
        if (np.minimum(1, eps * slopes) * sizes).sum() < density * sizes.sum():
            low = eps
        else:
            high = eps
    return np.minimum(1, low * slopes)


def layers_of(module, shapes):
    return [module.MaskedLinear(n_in, n_out) for n_out, n_in in shapes]


def sparse_layer(module, shape=(9, 14), density=0.4, seed=0):
    """A sparse layer with a dense random gradient, no two entries of which are of the same size."""
    generator = torch.Generator().manual_seed(seed)
    [layer] = layers_of(module, [shape])
    module.sparse_start_([layer], density, generator)
    sizes = 1 + torch.randperm(layer.weight.numel(), generator=generator).float()
    signs = torch.randint(0, 2, sizes.shape, generator=generator) * 2 - 1
    layer.weight.grad = (sizes * signs).view_as(layer.weight) / 10
    return layer


# ===== Erdos-Renyi densities =====


@pytest.mark.parametrize("script", scripts_with("erdos_renyi_densities"))
def test_densities_without_saturation_are_the_closed_form(script):
    shapes, density = [(256, 200), (256, 256), (100, 256)], 0.3
    eps = density * sum(o * i for o, i in shapes) / sum(o + i for o, i in shapes)
    expected = [eps * (o + i) / (o * i) for o, i in shapes]
    assert max(expected) < 1
    assert SCRIPTS[script].erdos_renyi_densities(shapes, density) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("density", [1e-4, 0.01, 0.1, 0.25, 0.5, 0.8, 0.97, 0.9999])
@pytest.mark.parametrize("network", SHAPES)
@pytest.mark.parametrize("script", scripts_with("erdos_renyi_densities"))
def test_densities_are_those_that_bisection_finds(script, network, density):
    shapes = SHAPES[network]
    densities = SCRIPTS[script].erdos_renyi_densities(shapes, density)
    assert densities == pytest.approx(bisected_densities(shapes, density), rel=1e-9)
    assert all(0 < d <= 1 for d in densities)
    active = sum(d * o * i for d, (o, i) in zip(densities, shapes, strict=True))
    assert active == pytest.approx(density * sum(o * i for o, i in shapes), rel=1e-9)


@pytest.mark.parametrize("script", scripts_with("erdos_renyi_densities"))
def test_layers_that_saturate_one_after_the_other_are_dense(script):
    shapes, density = [(64, 20), (64, 64), (1, 64)], 0.65
    sizes, ends = [1280, 4096, 64], [84, 128, 65]
    eps = density * sum(sizes) / sum(ends)
    assert [eps * n / size > 1 for n, size in zip(ends, sizes, strict=True)] == [False, False, True]
    eps = (density * sum(sizes) - 64) / (84 + 128)  # what the last layer cannot take saturates the first one
    assert eps * 84 / 1280 > 1
    expected = [1, (density * sum(sizes) - 64 - 1280) / 4096, 1]
    assert SCRIPTS[script].erdos_renyi_densities(shapes, density) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("network", SHAPES)
@pytest.mark.parametrize("script", scripts_with("erdos_renyi_densities"))
def test_density_one_is_exactly_one_everywhere(script, network):
    assert SCRIPTS[script].erdos_renyi_densities(SHAPES[network], 1.0) == [1.0] * len(SHAPES[network])


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.0000001, 2, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("script", scripts_with("erdos_renyi_densities"))
def test_a_density_outside_0_1_is_refused(script, density):
    with pytest.raises(ValueError):
        SCRIPTS[script].erdos_renyi_densities(SHAPES["Pendulum critic"], density)


@pytest.mark.parametrize("density", [1e-5, 0.05, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("network", SHAPES)
@pytest.mark.parametrize("script", scripts_with("connection_counts"))
def test_connections_are_counted_by_density_and_never_none(script, network, density):
    shapes = SHAPES[network]
    counts = SCRIPTS[script].connection_counts(layers_of(SCRIPTS[script], shapes), density)
    exact = bisected_densities(shapes, density) * [n_out * n_in for n_out, n_in in shapes]
    assert all(isinstance(count, int) and count >= 1 for count in counts)
    assert all(abs(count - max(1, n)) <= 0.5 + 1e-6 for count, n in zip(counts, exact, strict=True))


@pytest.mark.parametrize("density", [1e-5, 0.05, 0.25, 0.7, 1.0])
@pytest.mark.parametrize("script", scripts_with("connection_counts"))
def test_dense_ends_leave_the_density_to_the_layers_between(script, density):
    counts = SCRIPTS[script].connection_counts
    for shapes in (SHAPES["HalfCheetah actor"], SHAPES["Humanoid critic"]):
        first, between, last = (n_out * n_in for n_out, n_in in shapes)
        assert counts(layers_of(SCRIPTS[script], shapes), density, True) == [
            first,
            max(1, round(density * between)),
            last,
        ]
    shapes = SHAPES["four layers"]
    between = bisected_densities(shapes[1:-1], density) * [50 * 40, 8 * 50]
    found = counts(layers_of(SCRIPTS[script], shapes), density, dense_ends=True)
    assert found[::3] == [40 * 30, 90 * 8]
    assert all(abs(count - max(1, n)) <= 0.5 + 1e-6 for count, n in zip(found[1:3], between, strict=True))


# ===== Sparse start =====


@pytest.mark.parametrize("density", [0.05, 0.25, 0.6, 1.0])
@pytest.mark.parametrize("script", scripts_with("sparse_start_", "Actor", "MLP"))
def test_sparse_start_keeps_the_exact_number_of_connections_and_the_default_weights(script, density):
    module, generator = SCRIPTS[script], torch.Generator().manual_seed(5)
    low, high = torch.tensor([[-1.0, -2.0], [1.0, 3.0]])
    shapes = {"Actor": [(32, 11), (32, 32), (2, 32)], "MLP": [(32, 13), (32, 32), (1, 32)]}
    torch.manual_seed(3)
    dense = {name: [nn.Linear(n_in, n_out) for n_out, n_in in shapes[name]] for name in shapes}
    torch.manual_seed(3)
    networks = {"Actor": module.Actor(11, low, high, 32), "MLP": module.MLP(13, 32, 1)}
    for name, network in networks.items():
        layers = module.masked_layers(network)
        assert layers == [network.fc1, network.fc2, network.fc3]
        module.sparse_start_(layers, density, generator)
        expected = bisected_densities(shapes[name], density)
        for layer, (n_out, n_in), d, default in zip(layers, shapes[name], expected, dense[name], strict=True):
            active = layer.mask.numpy()
            assert active.dtype == bool and active.shape == (n_out, n_in)
            assert active.sum() == max(1, round(d * n_out * n_in))
            weight, before = layer.weight.detach().numpy(), default.weight.detach().numpy()
            assert (weight[active] == before[active]).all()
            assert (weight[~active] == 0).all()
            assert torch.equal(layer.bias, default.bias)


@pytest.mark.parametrize("script", scripts_with("sparse_start_", "MaskedLinear"))
def test_sparse_start_draws_from_its_generator_only(script):
    module = SCRIPTS[script]
    layers = layers_of(module, SHAPES["Pendulum critic"])
    before = torch.get_rng_state()
    masks = []
    for seed in (1, 1, 2):
        module.sparse_start_(layers, 0.25, torch.Generator().manual_seed(seed))
        masks.append(layers[1].mask.clone())
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("script", scripts_with("sparse_start_", "MaskedLinear"))
def test_sparse_start_draws_connections_uniformly(script):
    module, draws, active = SCRIPTS[script], 4000, 7
    [layer] = layers_of(module, [(4, 5)])
    generator, single, pairs = torch.Generator().manual_seed(0), np.zeros(20), np.zeros((20, 20))
    for _ in range(draws):
        module.sparse_start_([layer], active / 20, generator)
        drawn = layer.mask.numpy().ravel()
        single += drawn
        pairs += np.outer(drawn, drawn)
    p, q = active / 20, active * (active - 1) / (20 * 19)
    assert np.abs(single / draws - p).max() < 4.5 * math.sqrt(p * (1 - p) / draws)
    apart = ~np.eye(20, dtype=bool)
    assert np.abs(pairs[apart] / draws - q).max() < 4.5 * math.sqrt(q * (1 - q) / draws)


@pytest.mark.parametrize("script", scripts_with("sparse_start_", "connection_counts"))
def test_a_sparse_start_with_dense_ends(script):
    module = SCRIPTS[script]
    layers = layers_of(module, SHAPES["Humanoid critic"])
    weights = [layer.weight.detach().clone() for layer in layers]
    module.sparse_start_(layers, 0.1, torch.Generator().manual_seed(0), True)
    assert [int(layer.mask.sum()) for layer in layers] == [256 * 393, round(0.1 * 256 * 256), 256]
    assert all(torch.equal(layer.weight, w * layer.mask) for layer, w in zip(layers, weights, strict=True))


@pytest.mark.parametrize("dense_ends", [False, True])
@pytest.mark.parametrize("script", scripts_with("main", "connection_counts", "grow_and_prune_"))
def test_a_run_starts_with_the_densities_that_it_was_told(script, dense_ends):
    args = short_args(script, total_timesteps=60, learning_starts=10, initial_density=0.3, dense_ends=dense_ends)
    start = saved(SCRIPTS[script].main(args) / "models" / "0.pt")
    assert start.keys() == {"actor", "qf1", "qf2"}
    for name, network in start.items():
        shapes = [(32, 3 if name == "actor" else 4), (32, 32), (1, 32)]
        densities = [1, 0.3, 1] if dense_ends else bisected_densities(shapes, 0.3)
        expected = [round(d * n_out * n_in) for d, (n_out, n_in) in zip(densities, shapes, strict=True)]
        assert [int(network[f"fc{l}.mask"].sum()) for l in (1, 2, 3)] == expected
        assert not any(network[f"fc{l}.weight"][~network[f"fc{l}.mask"]].any() for l in (1, 2, 3))
    assert not torch.equal(start["qf1"]["fc2.mask"], start["qf2"]["fc2.mask"])


@pytest.mark.parametrize("script", scripts_with("sparse_start_", "MaskedLinear"))
def test_every_layer_starts_with_a_connection_at_least(script):
    module = SCRIPTS[script]
    layers = layers_of(module, SHAPES["Pendulum critic"])
    assert (bisected_densities(SHAPES["Pendulum critic"], 1e-5) * [256, 4096, 64] < 0.5).all()
    module.sparse_start_(layers, 1e-5, torch.Generator().manual_seed(0))
    assert [int(layer.mask.sum()) for layer in layers] == [1, 1, 1]


@pytest.mark.parametrize("script", scripts_with("MaskedLinear"))
def test_a_masked_layer_is_a_linear_layer_with_all_connections_until_told_otherwise(script):
    layer, x = SCRIPTS[script].MaskedLinear(5, 3), torch.randn(8, 5)
    assert isinstance(layer, nn.Linear) and layer.mask.dtype == torch.bool and layer.mask.shape == (3, 5)
    assert layer.mask.all() and "mask" in layer.state_dict()
    assert layer.pruned == 0 and layer.pruned.dtype == torch.int64 and "pruned" in layer.state_dict()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


# ===== The schedule of growth =====

RUNS = [(975_000, 10_000), (1_000_000, 10_000), (600, 50), (997, 13), (101, 101), (101, 100), (7, 2), (9, 1), (50, 26)]


@pytest.mark.parametrize("n_free", [0, 1, 2, 97, 4096, 49_131])
@pytest.mark.parametrize(("total_steps", "interval"), RUNS)
@pytest.mark.parametrize("script", scripts_with("scheduled_growth"))
def test_the_schedule_is_the_rounded_running_sum_of_the_cosine(script, total_steps, interval, n_free):
    schedule = SCRIPTS[script].scheduled_growth
    events = interval * np.arange(1, total_steps // interval + 1)
    if len(events) == 1:
        parts = np.array([float(n_free)])  # everything at once
    else:
        alpha = 2 / (1 + np.cos(np.pi * events / total_steps)).sum()
        parts = alpha / 2 * (1 + np.cos(np.pi * events / total_steps)) * n_free
    assert parts.sum() == pytest.approx(n_free)
    before = 0
    for event, expected in zip(events.tolist(), np.cumsum(parts), strict=True):
        for t in {event - interval, event - 1}:
            assert schedule(t, total_steps, interval, n_free) == before
        now = schedule(event, total_steps, interval, n_free)
        assert isinstance(now, int) and before <= now <= n_free
        assert abs(now - expected) <= 0.5 + 1e-6
        before = now
    assert before == n_free
    assert schedule(total_steps, total_steps, interval, n_free) == n_free


@pytest.mark.parametrize("script", scripts_with("scheduled_growth"))
def test_half_way_the_schedule_has_grown_the_closed_form(script):
    # sum of cos(j x) for j = 1 ... m is sin((m + 1/2) x) / (2 sin(x / 2)) - 1/2
    events, n_free, x = 100, 10**9, math.pi / 100
    share = (50 + 1 / (2 * math.tan(x / 2)) - 0.5) / (events - 1)
    assert SCRIPTS[script].scheduled_growth(500_000, 1_000_000, 10_000, n_free) == pytest.approx(n_free * share, abs=2)


@pytest.mark.parametrize("script", scripts_with("scheduled_growth"))
def test_random_schedules_never_fall_and_end_complete(script):
    schedule, rng = SCRIPTS[script].scheduled_growth, np.random.default_rng(0)
    for _ in range(200):
        total_steps, n_free = int(rng.integers(1, 2000)), int(rng.integers(0, 70_000))
        interval = int(rng.integers(1, total_steps + 1))
        last = total_steps // interval * interval
        times = range(0, total_steps + 1, max(1, interval // 2))
        values = [schedule(t, total_steps, interval, n_free) for t in times]
        assert values == sorted(values)
        assert schedule(interval - 1, total_steps, interval, n_free) == 0
        assert {schedule(t, total_steps, interval, n_free) for t in (last, total_steps)} == {n_free}


@pytest.mark.parametrize(("total_steps", "interval"), [(10, 11), (1, 2), (999, 10_000)])
@pytest.mark.parametrize("script", scripts_with("scheduled_growth"))
def test_a_schedule_without_an_event_is_refused(script, total_steps, interval):
    with pytest.raises(ValueError):
        SCRIPTS[script].scheduled_growth(0, total_steps, interval, 100)


# ===== Growing =====


@pytest.mark.parametrize("k", [1, 2, 10, 37])
@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("script", scripts_with("grow_", "MaskedLinear"))
def test_growth_takes_the_largest_absent_gradients(script, excluding, k):
    module = SCRIPTS[script]
    layer = sparse_layer(module)
    exclude = torch.rand(layer.mask.shape, generator=torch.Generator().manual_seed(1)) < 0.4 if excluding else None
    mask, weight = layer.mask.clone(), layer.weight.detach().clone()
    candidates = []
    for i in range(9):
        for j in range(14):
            if not mask[i, j] and not (excluding and exclude[i, j]):
                candidates.append((-abs(float(layer.weight.grad[i, j])), (i, j)))
    expected = {place for _, place in sorted(candidates)[:k]}
    assert len(expected) == k

    assert module.grow_(layer, k, exclude=exclude) == k
    assert {tuple(place) for place in (layer.mask & ~mask).nonzero().tolist()} == expected
    assert layer.mask.dtype == torch.bool and (layer.mask | ~mask).all()
    assert torch.equal(layer.weight, weight)  # the grown ones stand at 0, as they did when absent


@pytest.mark.parametrize("script", scripts_with("grow_", "MaskedLinear"))
def test_growth_takes_all_candidates_if_they_are_too_few(script):
    module = SCRIPTS[script]
    layer = sparse_layer(module)
    mask, exclude = layer.mask.clone(), torch.ones_like(layer.mask)
    exclude[2:4] = False
    expected = sum(not bool(mask[i, j]) for i in (2, 3) for j in range(14))
    assert module.grow_(layer, expected + 5, exclude=exclude) == expected > 0
    assert layer.mask[2:4].all() and torch.equal(layer.mask[4:], mask[4:]) and torch.equal(layer.mask[:2], mask[:2])
    rest = int((~layer.mask).sum())
    assert module.grow_(layer, 10_000) == rest and layer.mask.all()
    assert module.grow_(layer, 3) == 0


@pytest.mark.parametrize("script", scripts_with("grow_", "MaskedLinear"))
def test_connections_without_gradient_grow_last(script):
    module = SCRIPTS[script]
    layer = sparse_layer(module)
    absent = (~layer.mask).nonzero().tolist()
    with_gradient = [absent[n] for n in (0, 20, 40)]
    for place in absent:
        layer.weight.grad[tuple(place)] *= place in with_gradient
    mask = layer.mask.clone()
    assert module.grow_(layer, 8) == 8
    assert all(layer.mask[tuple(place)] for place in with_gradient)
    assert int(layer.mask.sum()) == int(mask.sum()) + 8


@pytest.mark.parametrize("k", [0, -1, -1000])
@pytest.mark.parametrize("script", scripts_with("grow_", "MaskedLinear"))
def test_growing_none_or_fewer_changes_nothing(script, k):
    module = SCRIPTS[script]
    layer = sparse_layer(module)
    mask, weight = layer.mask.clone(), layer.weight.detach().clone()
    assert module.grow_(layer, k) == 0
    assert torch.equal(layer.mask, mask) and torch.equal(layer.weight, weight)


@pytest.mark.parametrize("excluding", [False, True])
@pytest.mark.parametrize("script", scripts_with("grow_", "connection_counts"))
def test_random_growth_draws_uniformly_from_the_candidates(script, excluding):
    module, draws, k, size = SCRIPTS[script], 4000, 5, (5, 6)
    layer = sparse_layer(module, size, density=0.4)
    exclude = torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.3 if excluding else None
    mask = layer.mask.clone()
    candidates = ~mask & ~exclude if excluding else ~mask
    n, generator = int(candidates.sum()), torch.Generator().manual_seed(0)
    assert k < n < 30 and (not excluding or (exclude & ~mask).any())
    single, pairs = torch.zeros(size), torch.zeros(30, 30)
    for _ in range(draws):
        layer.mask.copy_(mask)
        assert module.grow_(layer, k, exclude=exclude, generator=generator) == k
        grown = (layer.mask & ~mask).float()
        single += grown
        pairs += torch.outer(grown.flatten(), grown.flatten())
    assert not single[~candidates].any()
    p, q = k / n, k * (k - 1) / (n * (n - 1))
    assert (single[candidates] / draws - p).abs().max() < 4.5 * math.sqrt(p * (1 - p) / draws)
    apart = torch.outer(candidates.flatten(), candidates.flatten()) & ~torch.eye(30, dtype=torch.bool)
    assert (pairs[apart] / draws - q).abs().max() < 4.5 * math.sqrt(q * (1 - q) / draws)


@pytest.mark.parametrize("script", scripts_with("grow_", "connection_counts"))
def test_random_growth_touches_nothing_but_the_masks_and_its_generator(script):
    module, masks = SCRIPTS[script], []
    for seed in (1, 1, 2):
        layer = sparse_layer(module)
        mask, weight, bias = (tensor.detach().clone() for tensor in (layer.mask, layer.weight, layer.bias))
        gradient, layer.weight.grad = layer.weight.grad, None  # it looks at none
        generator, before = torch.Generator().manual_seed(seed), torch.get_rng_state()
        assert module.grow_(layer, 20, generator=generator) == 20
        masks.append(layer.mask.clone())
        assert int((layer.mask & ~mask).sum()) == 20 and (layer.mask | ~mask).all() and layer.pruned == 0
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)
        assert not torch.equal(generator.get_state(), torch.Generator().manual_seed(seed).get_state())
        layer.weight.grad = gradient
        assert module.grow_(layer, 10_000, generator=generator) == int((~masks[-1]).sum()) and layer.mask.all()
        assert module.grow_(layer, 3, generator=generator) == 0 and layer.weight.grad is gradient
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("script", scripts_with("grow_", "MLP", "Actor"))
def test_growth_leaves_the_function_unchanged_to_the_bit(script):
    module, generator = SCRIPTS[script], torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    obs, actions = torch.randn(300, 5), torch.randn(300, 2)
    low, high = torch.tensor([[-1.0, 0.0], [1.0, 3.0]])
    networks = (module.MLP(7, 48, 1), (obs, actions)), (module.Actor(5, low, high, 48), (obs,))
    for network, inputs in networks:
        layers = module.masked_layers(network)
        module.sparse_start_(layers, 0.2, generator)
        network(*inputs).square().sum().backward()
        before = network(*inputs)
        for k in (1, 40, 10_000):
            assert sum(module.grow_(layer, k) for layer in layers) > 0
            assert torch.equal(network(*inputs), before)
        assert all(layer.mask.all() for layer in layers)


@pytest.mark.parametrize("script", scripts_with("absent_connections", "MLP"))
def test_absent_connections_are_those_whose_gradients_are_zeroed(script):
    module = SCRIPTS[script]
    networks = [module.MLP(7, 16, 1) for _ in range(2)]
    for network in networks:
        module.sparse_start_(module.masked_layers(network), 0.3, torch.Generator().manual_seed(0))
        network(torch.randn(64, 5), torch.randn(64, 2)).sum().backward()
    networks[1].fc2.mask.fill_(True)  # nothing to do for a layer that is dense
    parameters = [(name, p) for network in networks for name, p in network.named_parameters()]
    before = [p.grad.clone() for _, p in parameters]
    layers = [layer for network in networks for layer in module.masked_layers(network)]
    absent = module.absent_connections(*networks)
    sparse = [layer for layer in layers if not layer.mask.all()]
    assert 3 <= len(sparse) < 6
    assert all(weight is layer.weight for (weight, _), layer in zip(absent, sparse, strict=True))
    for weight, mask in absent:
        weight.grad.mul_(mask)
    expected = iter(layer.mask for layer in layers)
    for (name, p), gradient in zip(parameters, before, strict=True):
        masked = name.startswith("fc") and name.endswith("weight")  # a norm's weight is not
        active = next(expected) if masked else torch.ones_like(gradient, dtype=torch.bool)
        assert torch.equal(p.grad[active], gradient[active])
        assert (p.grad[~active] == 0).all()
    assert any((gradient != p.grad).any() for (_, p), gradient in zip(parameters, before, strict=True))
