"""benchmark/random_labels.py: what a method does at which moment, measures, statistics, starting and stopping."""

import contextlib
import gzip
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, load_script
from scipy import stats
from sklearn.datasets import load_digits
from torch import nn

labels = load_script(ROOT / "benchmark" / "random_labels.py")
SMALL = {"images": 32, "batch": 16, "steps": 12, "tasks": 4, "interval": 5}
LAYERS, KEYS = ["fc1", "fc2", "fc3"], ["variant", "method", "seed"]
SPARSE = [name for name, row in labels.ROWS.items() if row.start is labels.sparse]
NE = [name for name, row in labels.ROWS.items() if row.group == "NE"]


@pytest.fixture
def trained(monkeypatch):
    """A function that trains -> its rows, and for each task a copy of the network's state as it is measured."""
    measure = labels.measure

    def train(name, seed=1, rate=1e-3, **settings):
        states = []

        def measured(network, *rest):
            assert not network.training  # measuring iterates no spectral norm
            states.append({key: value.detach().clone() for key, value in network.state_dict().items()})
            return measure(network, *rest)

        monkeypatch.setattr(labels, "LEARNING_RATE", rate)
        monkeypatch.setattr(labels, "measure", measured)
        return labels.train("mild", SMALL | settings, name, seed), states

    return train


def drawn(seed, number):
    """The weights of networks drawn one after the other from a seed -> list of state dicts."""
    torch.manual_seed(1000 * seed)
    shapes = {"fc1": (64, 64), "fc2": (64, 64), "fc3": (64, 10)}
    networks = [nn.ModuleDict({name: nn.Linear(*of) for name, of in shapes.items()}) for _ in range(number)]
    return [network.state_dict() for network in networks]


def equal(state, other, layers=LAYERS):
    names = [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]
    return all(torch.equal(state[name], other[name]) for name in names)


# ===== What is trained =====


def test_images_are_digits_drawn_once_and_standardised():
    x = labels.images(128).numpy()
    assert x.shape == (128, 64) and np.array_equal(x, labels.images(128).numpy())
    varies = x.std(0) > 0
    np.testing.assert_allclose(x.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(x[:, varies].std(0), 1, atol=1e-5)
    digits = load_digits().data  # each row, up to scale and offset of the pixels, is one of the digits, and none twice
    chosen = digits[np.random.default_rng(0).permutation(len(digits))[:128]]
    np.testing.assert_allclose(x * chosen.std(0) + chosen.mean(0), chosen, atol=1e-4)
    assert len(np.unique(chosen, axis=0)) == 128


def drawn_tasks(seed, tasks=4):
    """Labels of all images and batches of indices of each task of a run of SMALL -> list of (y, [batch, ...])."""
    generator, drawn = torch.Generator().manual_seed(1000 * seed + 1), []
    for _ in range(tasks):
        y = torch.randint(10, (32,), generator=generator)
        order = torch.cat([torch.randperm(32, generator=generator) for _ in range(6)])  # 12 batches of 16
        drawn.append((y, [order[16 * k : 16 * (k + 1)] for k in range(12)]))
    return drawn


@pytest.mark.parametrize(("name", "pull"), [("plain", 0.0), ("l2_init", 1e-3)])
def test_plain_is_adam_on_cross_entropy_with_new_labels_in_each_task(trained, name, pull):
    rows, _ = trained(name, seed=3, rate=0.01)
    x = labels.images(32)
    torch.manual_seed(3000)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    initial = [parameter.detach().clone() for parameter in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01, foreach=False, fused=False)
    for task, (row, (y, batches)) in enumerate(zip(rows, drawn_tasks(3), strict=True), start=1):
        losses = []
        for of in batches:
            loss = -network(x[of]).log_softmax(1)[range(16), y[of]].mean()
            losses.append(loss.item())
            far = sum(((p - p0) ** 2).sum() for p, p0 in zip(network.parameters(), initial, strict=True))
            optimizer.zero_grad()
            (loss + pull * far).backward()
            optimizer.step()
        logits = network(x).detach()
        assert (row["variant"], row["method"], row["seed"], row["task"]) == ("mild", name, 3, task)
        assert row["online_loss"] == pytest.approx(np.mean(losses), rel=1e-3)
        assert row["loss"] == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-3)
        assert row["accuracy"] == pytest.approx((logits.argmax(1) == y).float().mean().item())


@pytest.mark.parametrize("name", labels.ROWS)
def test_every_method_repeats_itself_and_gives_every_column(trained, name):
    rows, again = trained(name, tasks=2)[0], trained(name, tasks=2)[0]
    other = trained(name, seed=2, tasks=2)[0]
    assert all(set(row) == set(labels.COLUMNS) and np.isfinite([row[c] for c in labels.MEASURES]).all() for row in rows)
    for row, same in zip(rows, again, strict=True):
        assert row | {"step_us": 0} == same | {"step_us": 0}
    assert rows[0]["loss"] != other[0]["loss"]


@pytest.mark.parametrize("name", ["fresh", "reset_last_layer", "reset_optimizer", "shrink_perturb", "hare_tortoise"])
def test_what_acts_at_a_tasks_start_leaves_the_first_one_as_plain_has_it(trained, name):
    (rows, states), (plain, plain_states) = trained(name), trained("plain")
    assert equal(states[0], plain_states[0]) and rows[0]["loss"] == plain[0]["loss"]
    assert all(row["loss"] != other["loss"] for row, other in zip(rows[1:], plain[1:], strict=True))


# ===== The rules, with a learning rate of 0 so that nothing else moves =====


def test_networks_layers_and_mixtures_are_drawn_anew_in_each_task(trained):
    first, *fresh = drawn(1, 4)
    assert all(equal(state, first) for state in trained("plain", rate=0.0)[1])
    for state, expected in zip(trained("fresh", rate=0.0)[1], [first, *fresh], strict=True):
        assert equal(state, expected)
    states = trained("reset_last_layer", rate=0.0)[1]
    assert all(equal(state, first, LAYERS[:2]) for state in states)
    assert len({float(state["fc3.weight"].sum()) for state in states}) == 4
    mixed = first
    for state, new in zip(trained("shrink_perturb", rate=0.0)[1][1:], fresh, strict=True):
        mixed = {key: 0.8 * value + 0.2 * new[key] for key, value in mixed.items()}
        for key, value in mixed.items():
            torch.testing.assert_close(state[key], value)


def test_injection_comes_once_half_way_and_leaves_the_function_alone(trained):
    rows, states = trained("injection", rate=0.0)
    assert [sum(key.endswith(".0.weight") for key in state) for state in states] == [0, 0, 2, 2]
    plain = trained("plain", rate=0.0)[0]
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=1e-5)
    assert not torch.equal(states[2]["fc1.weight"], states[1]["fc1.weight"])


@contextlib.contextmanager
def after_each_step(note):
    """Within it, calls note(optimizer) after each of Adam's steps."""
    step = labels.adam_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labels, "adam_step", lambda optimizer, *rest: (step(optimizer, *rest), note(optimizer)))
        yield


def steps_of_adam(name, trained):
    """Adam's step count after each step of a run, and what its settings are -> list, dict."""
    counts, groups = [], []

    def note(optimizer):
        counts.append(int(next(iter(optimizer.state.values()))["step"]))
        groups.append((type(optimizer).__name__, optimizer.param_groups[0]))

    with after_each_step(note):
        trained(name)
    return counts, groups[0]


def test_optimizers_start_afresh_where_they_should_and_have_their_settings(trained):
    counts, (kind, group) = steps_of_adam("plain", trained)
    assert counts == list(range(1, 49)) and kind == "Adam"
    assert (group["lr"], group["eps"], group["betas"]) == (1e-3, 1e-8, (0.9, 0.999))
    for name in ("fresh", "reset_optimizer", "shrink_perturb"):
        assert steps_of_adam(name, trained)[0] == 4 * list(range(1, 13)), name
    _, (kind, group) = steps_of_adam("adam_eps", trained)
    assert (kind, group["eps"], group["betas"]) == ("Adam", 1e-3, (0.9, 0.9))
    _, (kind, group) = steps_of_adam("weight_decay", trained)
    assert (kind, group["weight_decay"]) == ("AdamW", 0.1)
    # neurons of a low score are there from the start, so that the first event, after 5 steps, recycles some
    assert steps_of_adam("redo", trained)[0] == list(range(1, 49))
    restarted = steps_of_adam("redo_restart", trained)[0]
    assert restarted[:6] == [1, 2, 3, 4, 5, 1]


@pytest.mark.parametrize("name", ["plain", "adam_eps", "weight_decay"])
def test_adams_step_is_that_of_the_paper_and_starts_afresh_without_a_state(name):
    rng, rate = np.random.default_rng(0), 0.01
    parameters = [nn.Parameter(torch.tensor(rng.normal(size=shape), dtype=torch.float32)) for shape in ((3, 2), (3,))]
    optimizer = labels.ROWS[name].adam(parameters, lr=rate, fused=True)
    (beta1, beta2), eps = ((0.9, 0.9), 1e-3) if name == "adam_eps" else ((0.9, 0.999), 1e-8)
    decay = 0.1 if name == "weight_decay" else 0.0
    values = [p.detach().numpy().astype(np.float64) for p in parameters]
    moments = [[np.zeros(v.shape), np.zeros(v.shape), 0] for v in values]
    for step in range(8):
        if step == 5:  # as a method that resets one layer
            del optimizer.state[parameters[1]]
            moments[1] = [np.zeros(3), np.zeros(3), 0]
        for k, p in enumerate(parameters):
            g = rng.normal(size=p.shape)
            p.grad = torch.tensor(g, dtype=torch.float32)
            m, v, t = moments[k]
            m, v, t = moments[k] = [beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2, t + 1]
            update = m / (1 - beta1**t) / (np.sqrt(v / (1 - beta2**t)) + eps)
            values[k] = values[k] * (1 - rate * decay) - rate * update
        labels.adam_step(optimizer, parameters)
        for p, value in zip(parameters, values, strict=True):
            np.testing.assert_allclose(p.detach().numpy(), value, rtol=1e-4, atol=1e-6)


def test_hare_meets_tortoise_at_a_tasks_start(trained):
    """The weights of the second task's start are the average of those after each of the first task's steps."""
    weights = []

    def note(optimizer):
        weights.append(optimizer.param_groups[0]["params"][0].detach().clone())

    with after_each_step(note):
        trained("hare_tortoise", tasks=1)
        first, average = len(weights), drawn(1, 1)[0]["fc1.weight"]
        for weight in weights:
            average = 0.999 * average + 0.001 * weight
        trained("hare_tortoise", tasks=2)
    assert first == 12 and torch.equal(weights[first + 11], weights[11])
    # Adam moves a weight by at most a few learning rates a step; the way back to the average is longer than that
    assert (weights[first + 12] - average).abs().max() < 4e-3 < (weights[11] - average).abs().max()


def redrawn(state, other):
    """Neurons of the first and of the second hidden layer all of whose incoming weights differ -> list of two sets."""
    return [set((state[w] != other[w]).all(1).nonzero().flatten().tolist()) for w in ("fc1.weight", "fc2.weight")]


def test_redo_recycles_what_is_dormant_on_all_images_and_not_before_a_measurement(trained):
    rows, states = trained("redo", rate=0.0, interval=12)  # events would be at the ends of tasks: they come after
    first = drawn(1, 1)[0]
    p, h, dormant = {name: value.numpy() for name, value in first.items()}, labels.images(32).numpy(), []
    for layer in LAYERS[:2]:
        h = np.maximum(h @ p[f"{layer}.weight"].T + p[f"{layer}.bias"], 0)
        dormant.append(set(np.flatnonzero(h.mean(0) <= 0.1 * h.mean()).tolist()))
    assert equal(states[0], first) and redrawn(states[1], first) == dormant and dormant[1]
    assert rows[0]["dormant"] == trained("plain", rate=0.0)[0][0]["dormant"] > rows[1]["dormant"]


def test_regrama_recycles_at_most_a_twentieth_by_the_last_batchs_gradient(trained):
    _, states = trained("regrama", rate=0.0, interval=11)  # once in the first task, before its last step
    first, (y, batches) = drawn(1, 1)[0], drawn_tasks(1)[0]
    x = labels.images(32)[batches[10]]
    weights = [first[f"{layer}.{kind}"].clone().requires_grad_() for layer in LAYERS for kind in ("weight", "bias")]
    w1, b1, w2, b2, w3, b3 = weights
    logits = torch.relu(torch.relu(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    lowest = []
    for gradient in torch.autograd.grad(F.cross_entropy(logits, y[batches[10]]), [w1, w2]):
        scores = gradient.abs().mean(1) / gradient.abs().mean()
        lowest.append({i for i in scores.argsort().tolist()[:3] if scores[i] <= 0.01})
    assert redrawn(states[0], first) == lowest and lowest[1]


def test_norms_stay_with_nap_and_the_spectral_norm_is_one(trained):
    expected = [float(drawn(1, 1)[0][f"{layer}.weight"].norm()) for layer in LAYERS[:2]]
    for state in trained("nap", rate=0.01)[1]:
        assert [float(state[f"{layer}.weight"].norm()) for layer in LAYERS[:2]] == pytest.approx(expected, rel=1e-5)
    state = trained("spectral_norm", steps=100)[1][-1]
    raw, u, v = (state[f"fc2.parametrizations.weight.{key}"] for key in ("original", "0._u", "0._v"))
    sigma = float(torch.linalg.matrix_norm(raw, 2))  # which the iteration follows, a pass of training at a time
    assert float(u @ raw @ v) == pytest.approx(sigma, rel=0.1) and sigma > 1.3


# ===== Sparse networks =====


@pytest.mark.parametrize("name", SPARSE)
def test_absent_connections_stay_absent_and_the_density_is_the_methods(trained, name):
    rows, states = trained(name, rate=0.01)
    for row, state in zip(rows, states, strict=True):
        masks = [state[f"{layer}.mask"] for layer in LAYERS]
        assert all((state[f"{layer}.weight"][~state[f"{layer}.mask"]] == 0).all() for layer in LAYERS)
        assert row["density"] == pytest.approx(sum(int(mask.sum()) for mask in masks) / 8832)
        pruned = sum(int(state[f"{layer}.pruned"]) for layer in LAYERS)
        assert row["pruned"] == pytest.approx(pruned / 8832)
    if name in NE:
        return
    assert [row["density"] for row in rows] == pytest.approx([0.25] * 4, abs=1e-3)
    still = all(torch.equal(states[0][f"{layer}.mask"], state[f"{layer}.mask"]) for layer in LAYERS for state in states)
    assert still == (name == "static_sparse")
    first, *later = trained("rigl", interval=12)[1]  # nothing is dropped at a task's last step, before it is measured
    assert all(torch.equal(first[f"{layer}.mask"], state[f"{layer}.mask"]) for layer in LAYERS for state in later)


@pytest.mark.parametrize("name", NE)
def test_ne_grows_on_its_schedule(trained, name):
    """Density by the cosine: share of what is to grow, (1 + cos) of the events so far over that of all events."""
    rows, _ = trained(name, steps=25)
    total = 50 if "half" in name else 100
    parts = [1 + math.cos(math.pi * t / total) for t in range(5, total + 1, 5)]
    for row in rows:
        share = sum(parts[: row["task"] * 5]) / sum(parts)
        # what an event has pruned grows at the next one
        assert row["density"] == pytest.approx(0.25 + 0.75 * share, abs=0.03 if row["pruned"] else 1e-3)


def test_the_variants_of_ne_are_what_they_are_called(trained):
    runs = {name: trained(name, steps=50, rate=0.02) for name in NE}
    pruned = {name: [row["pruned"] for row in rows] for name, (rows, _) in runs.items()}
    assert set(pruned["ne_no_prune"] + pruned["ne_half_no_prune"]) == {0.0} and pruned["ne"][-1] > 0
    assert pruned["ne_half"][1] > 0 and len(set(pruned["ne_half"][1:])) == 1  # nothing after the half
    assert pruned["ne_omega_0.1"][-1] <= 0.075 < pruned["ne"][-1] <= 0.375 < pruned["ne_omega_5"][-1]
    assert "norm1.weight" in runs["ne_layer_norm"][1][0]


@pytest.mark.parametrize("name", ["ne", "ne_random"])
def test_only_one_variant_of_ne_grows_at_random(trained, monkeypatch, name):
    script, drawn_at_random = labels.load_script(labels.NE), []
    grow = script.grow_

    def noted(layer, k, exclude, generator):
        drawn_at_random.append(generator is not None)
        return grow(layer, k, exclude=exclude, generator=generator)

    monkeypatch.setattr(script, "grow_", noted)
    trained(name)
    assert len(drawn_at_random) == 3 * (48 // 5) and set(drawn_at_random) == {name == "ne_random"}


# ===== Measures =====


def small_network(seed=0, dead=False):
    torch.manual_seed(seed)
    network, x, y = labels.load_script(labels.TD3).MLP(5, 6, 4), torch.randn(9, 5), torch.randint(4, (9,))
    if dead:
        nn.init.constant_(network.fc2.bias, -100)
    return network, x, y


def mask_of(network, seed=0):
    torch.manual_seed(seed)
    masks = [(torch.rand_like(layer.weight) < 0.5).float() for layer in (network.fc1, network.fc2)]
    for layer, mask in zip((network.fc1, network.fc2), masks, strict=True):
        layer.weight.data.mul_(mask)
    return [(network.fc1.weight, masks[0]), (network.fc2.weight, masks[1])]


def sample_gradients(network, x, y):
    """One gradient after the other -> [n, parameters]."""
    rows = []
    for inputs, label in zip(x, y, strict=True):
        gradient = torch.autograd.grad(F.cross_entropy(network(inputs[None]), label[None]), list(network.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradient]).numpy().astype(np.float64))
    return np.array(rows)


@pytest.mark.parametrize("sparse", [False, True])
def test_measures_are_those_of_numpy(sparse):
    network, x, y = small_network()
    absent = mask_of(network) if sparse else []
    p = {name: value.detach().numpy().astype(np.float64) for name, value in network.named_parameters()}
    h1 = np.maximum(x.numpy() @ p["fc1.weight"].T + p["fc1.bias"], 0)
    h2 = np.maximum(h1 @ p["fc2.weight"].T + p["fc2.bias"], 0)
    logits = h2 @ p["fc3.weight"].T + p["fc3.bias"]
    losses = np.log(np.exp(logits).sum(1)) - logits[range(9), y]
    scores = np.concatenate([h.mean(0) / h.mean() for h in (h1, h2)])
    singular = np.linalg.svd(h2, compute_uv=False)
    shares = singular[singular > 1e-9] / singular.sum()

    active = np.concatenate([np.ones_like(value).ravel() for value in p.values()])
    if sparse:
        active[:30] = absent[0][1].numpy().ravel()
        active[36:72] = absent[1][1].numpy().ravel()
    gradients = sample_gradients(network, x, y) * active
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    cosines = unit @ unit.T
    sizes, shapes = [value.size for value in p.values()], [value.shape for value in p.values()]

    def loss_of(flat):
        parts = [v.view(shape) for v, shape in zip(flat.split(sizes), shapes, strict=True)]
        out = torch.func.functional_call(network, dict(zip(p, parts, strict=True)), (x,))
        return F.cross_entropy(out, y)

    flat = torch.cat([value.detach().flatten() for value in network.parameters()])
    hessian = torch.autograd.functional.hessian(loss_of, flat).numpy()[np.ix_(active > 0, active > 0)]
    eigenvalues = np.linalg.eigvalsh(hessian)
    expected = {
        "loss": losses.mean(),
        "accuracy": (logits.argmax(1) == y.numpy()).mean(),
        "dormant": (scores <= 0.1).mean(),
        "fau": np.concatenate([(h > 0).mean(0) for h in (h1, h2)]).mean(),
        "weight_norm": math.sqrt(sum((p[f"{layer}.weight"] ** 2).sum() for layer in LAYERS)),
        "effective_rank": math.exp(-(shares * np.log(shares)).sum()),
        "gradient_cosine": cosines[~np.eye(9, dtype=bool)].mean(),
    }
    measured = labels.measure(network, x, y, absent)
    generator = torch.Generator().manual_seed(0)
    v = np.concatenate([torch.randn(shape, generator=generator).numpy().ravel() for shape in shapes])[active > 0]
    for _ in range(20):
        v = v / np.linalg.norm(v)
        value, v = v @ hessian @ v, hessian @ v
    assert measured.pop("hessian") == pytest.approx(value, rel=1e-3)
    assert measured == pytest.approx(expected, rel=1e-4, abs=1e-6)
    parameters, masks = list(network.parameters()), {id(weight): mask for weight, mask in absent}
    masks = [masks.get(id(parameter)) for parameter in parameters]
    exact = labels.hessian_eigenvalue(F.cross_entropy(network(x), y), parameters, masks, iterations=500)
    assert exact == pytest.approx(eigenvalues[np.abs(eigenvalues).argmax()], rel=1e-3)


def test_a_dead_network_and_one_without_finite_loss_are_measured_too():
    network, x, y = small_network(dead=True)
    measured = labels.measure(network, x, y, [])
    assert np.isfinite(list(measured.values())).all() and measured["dormant"] >= 0.5
    nn.init.constant_(network.fc3.bias, math.nan)
    assert all(math.isnan(value) for value in labels.measure(network, x, y, []).values())


# ===== Statistics =====


def test_holm_is_the_textbooks_and_leaves_what_is_missing_alone():
    np.testing.assert_allclose(labels.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(labels.holm([0.9, math.nan, 0.6]), [1, math.nan, 1])
    assert len(labels.holm([])) == 0


def test_differences_are_paired_with_t_intervals_and_a_power_of_80_percent():
    generator = np.random.default_rng(0)
    base = pd.Series(generator.normal(size=30), index=range(1, 31))
    losses = {"a": base + generator.normal(0.3, 0.5, 30), "b": base, "c": base[:1]}
    found = labels.differences(losses, ["a", "c"], ["b", "c"])
    test = stats.ttest_rel(losses["a"], losses["b"])
    mean, half, p, tellable = found["a", "b"]
    assert (mean - half, mean + half) == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert p == pytest.approx(test.pvalue)  # the only one: a pair of one seed has none
    assert np.isnan(found["c", "b"][1:]).all() and np.isnan(found["a", "c"][1:]).all()
    error = (losses["a"] - losses["b"]).std(ddof=1) / math.sqrt(30)
    assert stats.nct.sf(stats.t.ppf(0.975, 29), 29, tellable / error) == pytest.approx(0.8, abs=0.01)


def made_up(methods, seeds, tasks=5):
    """Runs whose loss is 1 + seed / 10 + task * slope, with a slope and an offset of their method -> table."""
    rows = []
    for method, (offset, slope) in methods.items():
        for seed in range(1, seeds + 1):
            for task in range(1, tasks + 1):
                values = dict.fromkeys(labels.COLUMNS, 0.5 + 0.01 * seed * task)
                values |= {"variant": "mild", "method": method, "seed": seed, "task": task, "density": 1, "pruned": 0}
                rows.append(values | {"loss": offset + 0.1 * seed + slope * task, "step_us": 100.0})
    return pd.DataFrame(rows)[labels.COLUMNS]


def write(folder, table):
    folder.mkdir(exist_ok=True)
    (folder / labels.CSV).write_bytes(gzip.compress(table.to_csv(index=False).encode()))
    return folder


def test_a_run_is_summed_up_by_first_best_trend_and_last_tasks():
    table = labels.summarise(made_up({"plain": (1.0, 0.2), "ne": (3.0, -0.1)}, 2))
    of = table.loc["plain", 2]
    assert (of["first"], of["best"], of["trend"], of["loss"]) == pytest.approx((1.4, 1.4, 2.0, 1.2 + 0.2 * 4))
    of = table.loc["ne", 1]
    assert (of["first"], of["best"], of["trend"], of["loss"]) == pytest.approx((3.0, 2.6, -1.0, 3.1 - 0.1 * 4))


def test_the_report_comes_from_the_csv_alone(tmp_path):
    table = made_up({"plain": (1.0, 0.2), "fresh": (1.0, 0.0), "ne": (1.5, 0.1)}, 3)
    noise = np.random.default_rng(0).normal(0, 0.01, len(table))
    labels.main(["--report", "--out", str(write(tmp_path / "a", table.assign(loss=table["loss"] + noise)))])
    text = (tmp_path / "a" / "report.md").read_text()
    for picture in ("curves_mild.png", "measures_mild.png"):
        assert picture in text and (tmp_path / "a" / picture).stat().st_size > 1000
    assert "severe" not in text
    differences = [line for line in text.splitlines() if line.startswith("| `ne` | ")][1].split(" | ")
    assert float(differences[1].split()[0]) == pytest.approx(0.1, abs=0.03)  # 1.5 + 0.4 less 1.0 + 0.8
    assert float(differences[2].split()[0]) == pytest.approx(0.9, abs=0.03)
    assert "p < 0.0001" in differences[2] or "p = " in differences[2]


def test_one_seed_gets_no_interval_and_a_run_without_finite_loss_is_named(tmp_path):
    table = made_up({"plain": (1.0, 0.2), "ne": (1.5, 0.1)}, 1)
    broken = made_up({"redo": (1.0, 0.0)}, 1)
    broken.loc[2:, "loss"] = math.nan
    labels.main(["--report", "--out", str(write(tmp_path / "a", pd.concat([table, broken])))])
    text = (tmp_path / "a" / "report.md").read_text()
    assert "mild redo 1" in text and "| `redo`" not in text and "nan" not in text
    assert "p =" not in text and "p <" not in text


def test_the_committed_report_and_the_pages_table_are_those_of_the_committed_runs(tmp_path):
    again, page = tmp_path / "again", ROOT / "benchmark" / "plasticity.md"
    again.mkdir()
    shutil.copy(labels.RESULTS / labels.CSV, again)
    labels.report(again)
    assert (again / "report.md").read_text() == (labels.RESULTS / "report.md").read_text(), "run with --report"
    shutil.copy(page, again)
    labels.put_on_page("random labels", labels.short_table(again), again / page.name)
    assert (again / page.name).read_text() == page.read_text(), "run with --report"


def test_the_short_table_has_the_means_of_the_last_three_tasks(tmp_path):
    table = made_up({"plain": (1.0, 0.2), "ne": (1.5, 0.1)}, 4)
    table["dormant"] += 0.1  # apart from all other measures
    table["accuracy"] += 0.2
    write(tmp_path / "a", pd.concat([table.assign(variant=variant) for variant in labels.VARIANTS]))
    rows = [line.split(" | ") for line in labels.short_table(tmp_path / "a").splitlines()[2:]]
    assert [row[0] for row in rows] == ["| `plain`", "| `ne`"]
    for row in rows:
        own = table[table["method"] == row[0][3:-1]]
        last = own[own["task"] > own["task"].max() - 3]
        for cell in (row[1], row[5]):
            assert float(cell.split(" [")[0]) == pytest.approx(last["loss"].mean(), abs=0.01)
        assert float(row[2]) == pytest.approx(last["accuracy"].mean(), abs=0.01)
        assert float(row[3]) == pytest.approx(last["dormant"].mean(), abs=0.01)
        assert row[4].strip(" |") == "4"


# ===== Starting, stopping, going on =====


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small tasks, and a function that starts the program in this process -> its table."""
    sizes = {"images": 16, "batch": 8, "steps": 4, "tasks": 3, "interval": 2}
    monkeypatch.setattr(labels, "VARIANTS", {"mild": sizes, "severe": sizes | {"tasks": 4}})
    monkeypatch.setattr(labels, "report", lambda folder: None)

    def start(*argv):
        labels.main(["--workers", "1", "--out", str(tmp_path / "out"), *argv])
        return pd.read_csv(tmp_path / "out" / labels.CSV)

    start.file = tmp_path / "out" / labels.CSV
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield start
    for number, handler in handlers:
        signal.signal(number, handler)


def keys(table):
    return list(dict.fromkeys(table[KEYS].itertuples(index=False, name=None)))


def test_runs_come_in_the_order_of_their_seeds_and_only_once(small):
    table = small("--methods", "plain", "ne", "--seeds", "2")
    variants = ("mild", "severe")
    expected = [(v, m, s) for s in (1, 2) for v in variants for m in ("plain", "ne")]
    assert keys(table) == expected and len(table) == 2 * 2 * (3 + 4)
    again = small("--methods", "ne", "plain", "redo", "--seeds", "3", "--variant", "mild")
    assert again[: len(table)].equals(table)
    new = [("mild", "redo", 1), ("mild", "redo", 2), *(("mild", m, 3) for m in ("ne", "plain", "redo"))]
    assert keys(again) == expected + new
    direct = labels.train("mild", labels.VARIANTS["mild"], "ne", 3)
    stored = again[(again["method"] == "ne") & (again["seed"] == 3)]
    np.testing.assert_allclose(stored["loss"], [row["loss"] for row in direct], rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_keeps_whole_runs_and_goes_on(small, monkeypatch, capfd, number):
    train, calls = labels.train, []

    def interrupted(*job):
        calls.append(job)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
        return train(*job)

    arguments = "--methods", "plain", "ne", "redo", "--seeds", "2", "--variant", "mild"
    monkeypatch.setattr(labels, "train", interrupted)
    with pytest.raises(SystemExit) as stopped:
        small(*arguments)
    assert stopped.value.code == 128 + number and "stopped; the same command goes on" in capfd.readouterr().err
    assert keys(pd.read_csv(small.file)) == [("mild", "plain", 1), ("mild", "ne", 1)]
    table = small(*arguments)
    assert keys(table) == [("mild", m, s) for s in (1, 2) for m in ("plain", "ne", "redo")] and len(table) == 6 * 3


def test_runs_of_other_settings_are_refused_and_stay_as_they_are(small, monkeypatch, capfd):
    small("--methods", "plain", "redo", "--seeds", "1")
    before = small.file.read_bytes()
    row = labels.dataclasses.replace(labels.ROWS["redo"], what="something else")
    for name, value in {"VARIANTS": labels.VARIANTS | {"mild": SMALL}, "ROWS": labels.ROWS | {"redo": row}}.items():
        with monkeypatch.context() as patch:
            patch.setattr(labels, name, value)
            assert refusal(small, capfd, "--methods", "redo", "--seeds", "2").count("other settings") == 1
            if name == "ROWS":  # plain is what it was
                small("--methods", "plain", "--seeds", "1")
    (small.file.parent / "settings.json").unlink()
    assert "settings.json" in refusal(small, capfd, "--methods", "plain")
    assert small.file.read_bytes() == before


def refusal(start, capfd, *argv):
    """Starts what must end with exit code 2 and one line -> the line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        start(*argv)
    error = capfd.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("error: "), error
    return error


@pytest.mark.parametrize(
    ("argv", "pattern"),
    [
        (["--methods", "plain", "nee"], "--methods nee: .*choose from plain"),
        (["--seeds", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--seeds", "many"], "--seeds"),
        (["--variant", "medium"], "--variant.*mild"),
        (["--out", "/dev/null/folder"], "/dev/null/folder"),
        (["--tasks", "3"], "--tasks"),
    ],
)
def test_bad_input_is_one_line(small, capfd, argv, pattern):
    assert re.search(pattern, refusal(small, capfd, *argv))
    assert not small.file.exists()


def test_a_report_of_nothing_is_one_line(tmp_path, capfd):
    assert labels.CSV in refusal(labels.main, capfd, ["--report", "--out", str(tmp_path)])


def test_a_damaged_file_and_one_in_use_are_one_line(small, capfd):
    small("--methods", "plain", "--seeds", "1", "--variant", "mild")
    whole = small.file.read_bytes()
    with open(small.file, "rb") as file:
        labels.fcntl.flock(file, labels.fcntl.LOCK_EX)
        assert "in use" in refusal(small, capfd, "--methods", "plain")
    small.file.write_bytes(whole[:-20])
    assert "cannot be read" in refusal(small, capfd, "--methods", "plain")
    assert small.file.read_bytes() == whole[:-20]


def test_ctrl_c_ends_all_workers_with_one_line_and_whole_runs(tmp_path):
    """In a terminal, Ctrl-C goes to the program and to its workers at the same moment."""
    code = (
        "import random_labels as r\n"
        "r.VARIANTS = {'mild': {'images': 16, 'batch': 8, 'steps': 40, 'tasks': 3, 'interval': 10}}\n"
        "r.main(['--workers', '2', '--seeds', '900', '--methods', 'plain', 'ne', '--variant', 'mild', '--out', 'out'])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT / "benchmark")}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env=environment, text=True, start_new_session=True
    )
    file, until = tmp_path / "out" / labels.CSV, time.monotonic() + 120
    while not (file.exists() and file.stat().st_size) and time.monotonic() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1].replace("\r", "\n")
    assert process.returncode == 130 and "Traceback" not in error and error.count("stopped;") == 1, error
    table = pd.read_csv(file)
    assert len(table) and (table.groupby(KEYS).size() == 3).all()
    with pytest.raises(ProcessLookupError):  # soon no worker is left in its group
        for _ in range(100):
            os.killpg(process.pid, 0)
            time.sleep(0.1)
