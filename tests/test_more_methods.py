"""The methods of harness.MORE: each rule against a computation of the test's own, outside of TD3 and in short runs."""

import copy
import gc
import math
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
import tyro
from harness import MODULES, MORE, same, short_args
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

WEIGHT_DECAY, LEAKY_RELU, SPECTRAL_NORM, L2_INIT, CRELU, NAP = MORE[:6]
HARE_TORTOISE, SHRINK_PERTURB, TWO_HOT, REGRAMA, NE_LAYER_NORM = MORE[6:]
TD3, NETS, LINEAR = "td3_continuous", ["actor", "qf1", "qf2"], ["fc1", "fc2", "fc3"]

# Settings with which a method's own lines matter throughout a run of 400 steps, 100 of them random
OFTEN = {
    LEAKY_RELU: {"leaky_relu_slope": 0.3},
    NAP: {"nap_anneal": True},
    HARE_TORTOISE: {"tortoise_decay": 0.9, "tortoise_interval": 7},
    SHRINK_PERTURB: {"shrink_perturb_interval": 50},
    REGRAMA: {"regrama_interval": 20, "regrama_tau": 0.5, "regrama_most": 0.4},
    NE_LAYER_NORM: {"learning_rate": 0.05, "omega": 5.0},
}


# ===== Networks and runs =====


def learned(module, n_in=4, hidden=24, n_out=1, steps=5, seed=0):
    """A network and its optimizer, which serves another network too, after a few steps -> network, other, optimizer."""
    torch.manual_seed(seed)
    network, other = (module.MLP(n_in, hidden, n_out) for _ in range(2))
    optimizer = torch.optim.Adam([*network.parameters(), *other.parameters()], lr=1e-2)
    for _ in range(steps):
        backward(network, optimizer, other)
        optimizer.step()
    return network, other, optimizer


def backward(network, optimizer, *others):
    """One gradient of a regression for each of the networks -> its loss for the first."""
    n_in, optimizer_losses = network.fc1.in_features, []
    optimizer.zero_grad()
    for net in (network, *others):
        x = torch.randn(64, n_in)
        loss = (net(x) - x.sum(1, keepdim=True).sin()).square().mean()
        loss.backward()
        optimizer_losses.append(loss.item())
    return optimizer_losses[0]


def array(tensor):
    return tensor.detach().numpy().astype(np.float64)


def arrays(network):
    """Parameters and buffers of a network -> {name: float64 array}, copies."""
    return {name: array(value.clone()) for name, value in network.state_dict().items()}


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def adam_state(optimizer, parameters):
    return [{key: value.clone() for key, value in optimizer.state[p].items()} for p in parameters]


def layer_norm(z, gain, offset):
    centred = z - z.mean(1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5) * gain + offset


def numpy_hidden(p, x, activation, norms=False):
    """The hidden activations of a network with the arrays p -> list of two."""
    hidden = []
    for number in (1, 2):
        z = x @ p[f"fc{number}.weight"].T + p[f"fc{number}.bias"]
        if norms:
            z = layer_norm(z, p[f"norm{number}.weight"], p[f"norm{number}.bias"])
        hidden.append(x := activation(z))
    return hidden


def check_forward(network, activation, norms=False):
    x, p = torch.randn(32, network.fc1.in_features), arrays(network)
    hidden = numpy_hidden(p, array(x), activation, norms)
    for own, truth in zip(network.hidden(x), hidden, strict=True):
        assert np.allclose(array(own), truth, atol=1e-4)
    assert np.allclose(array(network(x)), hidden[1] @ p["fc3.weight"].T + p["fc3.bias"], atol=1e-4)


def relu(z):
    return np.maximum(z, 0)


def settings(script, **changes):
    values = {"total_timesteps": 400, "learning_starts": 100, "hidden_dim": 12, "checkpoint_interval": 0}
    return short_args(script, **values | changes)


class Run:
    """A run of a script's main in this process.

    before_step, after_step: callbacks(run, name) around each step of an optimizer, name: actor or critic; around: {name
    of a function of the script: callback(run, call, *arguments)}. copied: the deep copies of all networks, in order.
    """

    def __init__(self, script, monkeypatch, before_step=None, after_step=None, around=None, **changes):
        self.module, self.args, self.copied, self.t, hooks = MODULES[script], settings(script, **changes), [], 0, []

        def deepcopy(original):
            duplicate = copy.deepcopy(original)
            if isinstance(original, nn.ModuleDict):
                self.networks = original
                self.copied.append(duplicate)
            return duplicate

        def hook(callback, counts):
            def call(optimizer, *_):
                held = {id(p) for p in optimizer.param_groups[0]["params"]}
                name = "actor" if id(self.networks["actor"].fc1.weight) in held else "critic"
                self.t += counts and name == "critic"  # the gradient step, from 1
                setattr(self, name, optimizer)
                if callback:
                    callback(self, name)

            return call

        def watched(function, callback):
            return lambda *arguments: callback(self, lambda: function(*arguments), *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(self.module, "copy", SimpleNamespace(deepcopy=deepcopy))
            for name, callback in (around or {}).items():
                patch.setattr(self.module, name, watched(getattr(self.module, name), callback))
            hooks.append(register_optimizer_step_pre_hook(hook(before_step, True)))
            hooks.append(register_optimizer_step_post_hook(hook(after_step, False)))
            try:
                self.folder = self.module.main(self.args).resolve()
            finally:
                for handle in hooks:
                    handle.remove()

    def start(self):
        """The weights that the run started with."""
        return harness.saved(self.folder / "models/0.pt")

    def result(self):
        return harness.weights(self.folder), harness.events(self.folder)["charts/episodic_return"]


_made = {}


def usual(script, monkeypatch):
    """A run with the settings of OFTEN, made once."""
    if script not in _made:
        _made[script] = Run(script, monkeypatch, **OFTEN.get(script, {}))
    return _made[script]


# ===== All of them =====

OFF = [
    (WEIGHT_DECAY, {"weight_decay": 0.0}),
    (LEAKY_RELU, {"leaky_relu_slope": 0.0}),
    (L2_INIT, {"l2_init_strength": 0.0}),
    (HARE_TORTOISE, {"tortoise_interval": 0}),
    (SHRINK_PERTURB, {"shrink_perturb_interval": 0}),
    (SHRINK_PERTURB, {}),
    (REGRAMA, {"regrama_interval": 0}),
    (REGRAMA, {"regrama_interval": 20, "regrama_most": 0.0}),
]


@pytest.mark.parametrize(("script", "off"), OFF)
def test_a_method_that_is_off_is_plain_td3_to_the_bit(script, off, monkeypatch):
    plain, own = usual(TD3, monkeypatch), Run(script, monkeypatch, **off)
    assert same(own.result(), plain.result())
    random = [harness.saved(run.folder / "checkpoint.pt")["random"] for run in (own, plain)]
    assert same(random[0][:2], random[1])


@pytest.mark.parametrize("script", MORE)
def test_a_run_cut_off_and_resumed_is_the_same_to_the_bit(script, monkeypatch):
    class CutOff(Exception):
        """Stands for the end of a process."""

    def cut_off(run, name):
        if run.t == 170:
            raise CutOff

    whole = usual(script, monkeypatch)
    assert not same(whole.result(), usual(TD3, monkeypatch).result())
    with pytest.raises(CutOff):
        Run(script, monkeypatch, cut_off, checkpoint_interval=200, **OFTEN.get(script, {}))
    folder = max(Path("runs").resolve().glob(f"*__{script}__*"))
    assert folder != whole.folder
    assert harness.saved(folder / "checkpoint.pt")["step"] == 200
    gc.collect()  # of the run that was cut off, which else holds its lock
    MODULES[script].main(MODULES[script].Args(resume=str(folder)))
    assert same(harness.weights(folder), whole.result()[0])
    ends, logged = (harness.events(path) for path in (whole.folder, folder))
    assert ends.keys() == logged.keys()
    assert all(logged[tag] == ends[tag] for tag in ends if tag != "charts/SPS")
    ends, logged = (harness.saved(path / "checkpoint.pt") for path in (whole.folder, folder))
    assert all(same(ends[name], logged[name]) for name in ends if name != "run")


@pytest.mark.parametrize(
    ("script", "tag"),
    [(SHRINK_PERTURB, "shrink_perturb/number"), (REGRAMA, "regrama/qf1_recycled"), (NE_LAYER_NORM, "ne/qf1/pruned")],
)
def test_a_cut_off_run_had_interventions_before_and_after(script, tag, monkeypatch):
    steps = [step for step, value in harness.events(usual(script, monkeypatch).folder)[tag] if value]
    assert min(steps) <= 200 < max(steps)


BAD = [
    *[(WEIGHT_DECAY, "weight_decay", value) for value in (-0.1, math.nan)],
    *[(LEAKY_RELU, "leaky_relu_slope", value) for value in (-0.1, math.inf)],
    *[(L2_INIT, "l2_init_strength", value) for value in (-1e-3, math.nan)],
    *[(HARE_TORTOISE, "tortoise_decay", value) for value in (-0.1, 1.1, math.nan)],
    (HARE_TORTOISE, "tortoise_interval", -1),
    (SHRINK_PERTURB, "shrink_perturb_interval", -1),
    *[(SHRINK_PERTURB, "shrink", value) for value in (-0.1, 1.1, math.nan)],
    *[(SHRINK_PERTURB, "perturb", value) for value in (-0.1, math.inf)],
    *[(TWO_HOT, "two_hot_bins", value) for value in (1, 0, -5)],
    *[(TWO_HOT, "two_hot_limit", value) for value in (0.0, -3.0, 81.0, math.nan)],
    *[(REGRAMA, "regrama_interval", value) for value in (-2, 7)],
    *[(REGRAMA, "regrama_tau", value) for value in (-0.1, math.nan)],
    *[(REGRAMA, "regrama_most", value) for value in (-0.1, 1.1)],
    (NE_LAYER_NORM, "growth_interval", 7),
]


@pytest.mark.parametrize(("script", "name", "value"), BAD)
def test_a_senseless_argument_ends_the_run_with_its_name(script, name, value, capsys):
    option, words = f"--{name.replace('_', '-')}", ["--total-timesteps", "900", "--learning-starts", "9"]
    with pytest.raises(ValueError, match=option):
        short_args(script, **{name: value})
    with pytest.raises(SystemExit) as ending:
        tyro.cli(MODULES[script].Args, args=[*words, option, str(value)])
    assert ending.value.code == 2
    assert option in capsys.readouterr().err


OTHER = {  # settings that differ from those in OFTEN, one own argument at a time
    WEIGHT_DECAY: {"weight_decay": 0.1},
    LEAKY_RELU: {"leaky_relu_slope": 0.2},
    SPECTRAL_NORM: {},
    L2_INIT: {"l2_init_strength": 0.1},
    CRELU: {},
    NAP: {"nap_anneal": False},
    HARE_TORTOISE: {"tortoise_decay": 0.8, "tortoise_interval": 11},
    SHRINK_PERTURB: {"shrink_perturb_interval": 100, "shrink": 0.7, "perturb": 0.1},
    TWO_HOT: {"two_hot_bins": 51, "two_hot_limit": 10.0},
    REGRAMA: {"regrama_interval": 40, "regrama_tau": 0.01, "regrama_most": 0.1},
    NE_LAYER_NORM: {},
}


@pytest.mark.parametrize("script", OTHER)
def test_every_own_argument_changes_something(script, monkeypatch):
    parent = harness.PARENT.get(script, TD3)
    fields = (harness.SCRIPTS[name].Args.__dataclass_fields__.keys() for name in (script, parent))
    assert set.difference(*map(set, fields)) == OTHER[script].keys()
    model = usual(script, monkeypatch).result()[0]
    for name, value in OTHER[script].items():
        changed = Run(script, monkeypatch, **OFTEN.get(script, {}) | {name: value}).result()[0]
        assert not same(model, changed), f"{name} changes nothing"


@pytest.mark.slow
@pytest.mark.parametrize("script", MORE)
def test_the_method_solves_pendulum(script):
    values = {"total_timesteps": 10_000, "learning_starts": 1000, "batch_size": 256, "hidden_dim": 256}
    values |= {"neuron_interval": 1000, "growth_interval": 1000, "checkpoint_interval": 0}
    longer = {SHRINK_PERTURB: {"shrink_perturb_interval": 7500}, TWO_HOT: {}}
    values |= {"total_timesteps": 15_000} | longer[script] if script in longer else {}
    folder = MODULES[script].main(short_args(script, **values))
    returns = [value for _, value in harness.events(folder)["charts/episodic_return"]]
    assert len(returns) == values["total_timesteps"] // 200
    assert np.mean(returns[-10:]) > -250


# ===== Weight decay =====


def test_weight_decay_is_decoupled_from_adams_moments_in_every_parameter(monkeypatch):
    checked = []

    def before(run, name):
        run.expected = []
        for p in getattr(run, name).param_groups[0]["params"]:
            m, v, t = (getattr(run, name).state[p].get(key, 0) for key in ("exp_avg", "exp_avg_sq", "step"))
            g, m, v, t = array(p.grad), np.asarray(m, np.float64), np.asarray(v, np.float64), int(t) + 1
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            run.expected.append(array(p) * (1 - 1e-3 * 5.0) - 1e-3 * step)

    def after(run, name):
        held = getattr(run, name).param_groups[0]["params"]
        own = [run.networks[net] for net in (["actor"] if name == "actor" else ["qf1", "qf2"])]
        assert [id(p) for p in held] == [id(p) for net in own for p in net.parameters()]
        for p, truth in zip(held, run.expected, strict=True):
            assert np.allclose(array(p), truth, atol=1e-6)
        checked.append(name)

    changes = {"learning_rate": 1e-3, "weight_decay": 5.0, "total_timesteps": 200}
    Run(WEIGHT_DECAY, monkeypatch, before, after, **changes)
    assert checked.count("critic") == 2 * checked.count("actor") == 100


# ===== Leaky ReLU =====


def test_negative_inputs_of_a_hidden_unit_are_multiplied_by_the_slope():
    network = learned(MODULES[LEAKY_RELU])[0]
    check_forward(network, lambda z: np.where(z > 0, z, 0.01 * z))
    network.slope = 0.3
    check_forward(network, lambda z: np.where(z > 0, z, 0.3 * z))
    with torch.no_grad():
        network.fc1.bias.fill_(-100)
    network(torch.randn(8, 4)).sum().backward()
    assert network.fc1.weight.grad.any(1).all(), "a unit that is never positive learns"


def test_the_slope_is_that_of_all_networks_and_targets(monkeypatch):
    run = usual(LEAKY_RELU, monkeypatch)
    assert [net.slope for nets in (run.networks, *run.copied) for net in nets.values()] == [0.3] * 6


# ===== Spectral norm =====


def unit(x):
    return x / np.linalg.norm(x)


def test_critics_have_spectral_norm_1_in_the_second_layer_and_one_power_iteration_a_step(monkeypatch):
    vectors = {}

    def of(net):
        part = net.fc2.parametrizations.weight
        return [array(value) for value in (part.original, part[0]._u, part[0]._v)]

    def before(run, name):
        assert not hasattr(run.networks["actor"].fc2, "parametrizations")
        assert not any(part.training for net in ("qf1", "qf2") for part in run.copied[0][net].modules())
        for net in ("qf1", "qf2") if name == "critic" else ():
            w, u, v = of(run.networks[net])
            if run.t > 1:
                old = vectors[net]
                assert np.allclose(u, unit(w @ old), atol=1e-5), "one iteration, by the weight of this pass"
                assert np.allclose(v, unit(w.T @ unit(w @ old)), atol=1e-5)
                target = of(run.copied[0][net])
                assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(target, run.target[net], strict=True))
            else:
                run.target = {n: of(run.copied[0][n]) for n in ("qf1", "qf2")}
            vectors[net] = v

    def after(run, name):
        if name == "actor":  # the delayed update comes next
            for net, (w, _, _) in run.target.items():
                new, u, v = of(run.networks[net])
                run.target[net] = [0.995 * w + 0.005 * new, u, v]

    run = Run(SPECTRAL_NORM, monkeypatch, before, after, learning_rate=3e-3)
    for net in ("qf1", "qf2"):
        for nets in (run.networks, run.copied[0]):
            w, u, v = of(nets[net])
            x, p = np.random.default_rng(0).normal(size=(8, 4)), arrays(nets[net])
            p["fc2.weight"] = w / (u @ w @ v)
            if nets is run.networks:  # a target's weight is divided by what the network's vectors make of it
                assert np.linalg.norm(p["fc2.weight"], 2) == pytest.approx(1, abs=0.05)
            truth = numpy_hidden(p, x, relu)[1] @ p["fc3.weight"].T + p["fc3.bias"]
            assert np.allclose(array(nets[net](torch.tensor(x, dtype=torch.float32))), truth, atol=1e-4)
        assert np.linalg.norm(of(run.networks[net])[0], 2) > 1.04, "the raw weight is free"


def test_spectral_norm_takes_nothing_from_td3s_draws(monkeypatch):
    own, plain = (usual(script, monkeypatch).start() for script in (SPECTRAL_NORM, TD3))
    for net in ("qf1", "qf2"):
        assert torch.equal(own[net].pop("fc2.parametrizations.weight.original"), plain[net]["fc2.weight"])
        assert all(torch.equal(value, plain[net][name]) for name, value in own[net].items() if name in plain[net])
    assert same(own["actor"], plain["actor"])
    first = [usual(script, monkeypatch).result()[1][0] for script in (SPECTRAL_NORM, TD3)]
    random = [
        harness.saved(usual(script, monkeypatch).folder / "checkpoint.pt")["random"] for script in (SPECTRAL_NORM, TD3)
    ]
    assert same(*random)
    assert first[0] != first[1]


# ===== L2 Init =====


def test_l2_init_is_the_squared_distance_to_the_initial_parameters():
    module = MODULES[L2_INIT]
    torch.manual_seed(0)
    network, initial = module.MLP(4, 24, 3), module.MLP(4, 24, 3).requires_grad_(False)
    value = module.l2_init(network, initial)
    value.backward()
    pairs = [(p, array(p), array(p0)) for p, p0 in zip(network.parameters(), initial.parameters(), strict=True)]
    assert value.item() == pytest.approx(sum(((p - p0) ** 2).sum() for _, p, p0 in pairs), rel=1e-5)
    assert all(np.allclose(array(own.grad), 2 * (p - p0), atol=1e-5) for own, p, p0 in pairs)
    assert all(p.grad is None for p in initial.parameters())


def test_l2_init_pulls_every_network_of_a_run_to_its_own_initial_values(monkeypatch):
    gradients = []

    def before(run, name):
        (start,) = Path("runs").glob("*/models/0.pt")
        start = harness.saved(start)
        for net in ["actor"] if name == "actor" else ["qf1", "qf2"]:
            for key, p in run.networks[net].named_parameters():
                gradients.append((run.t, array(p.grad), array(p) - array(start[net][key])))

    Run(L2_INIT, monkeypatch, before, l2_init_strength=1e10, total_timesteps=110)
    assert len(gradients) == 10 * 12 + 5 * 6
    for t, gradient, moved in gradients:
        if t > 2:  # by then the pull is all that counts
            assert np.abs(moved).max() > 1e-7
            assert np.allclose(gradient, 2e10 * moved, atol=1e-2 * np.abs(gradient).max())


# ===== CReLU =====


def test_crelu_hands_on_both_parts_of_what_a_unit_gives():
    def both(z):
        return np.concatenate([np.maximum(z, 0), np.maximum(-z, 0)], 1)

    network = MODULES[CRELU].MLP(4, 24, 3)
    check_forward(network, both)
    assert [h.shape[1] for h in network.hidden(torch.randn(2, 4))] == [network.fc2.in_features, network.fc3.in_features]


@pytest.mark.parametrize("shape", [(3, 12, 1), (17, 256, 6), (23, 256, 1), (4, 1, 2), (400, 64, 1), (2, 9, 1)])
def test_a_crelu_network_has_as_nearly_as_it_can_the_parameters_of_a_relu_one(shape):
    def count(network):
        return sum(p.numel() for p in network.parameters())

    def with_width(w):
        n_in, _, n_out = shape
        layers = nn.Linear(n_in, w), nn.Linear(2 * w, w), nn.Linear(2 * w, n_out)
        return sum(map(count, layers))

    wanted, network = count(MODULES[TD3].MLP(*shape)), MODULES[CRELU].MLP(*shape)
    assert abs(count(network) - wanted) == min(abs(with_width(w) - wanted) for w in range(1, 2 * shape[1] + 2))
    assert count(network) == with_width(network.fc1.out_features)


# ===== NaP =====


def test_nap_normalises_before_each_relu_and_projection_only_scales_the_weight_matrices_before_a_norm():
    module = MODULES[NAP]
    network, other, optimizer = learned(module)
    with torch.no_grad():
        for p in (*network.norm1.parameters(), *network.norm2.parameters()):
            p.add_(torch.randn_like(p))
    check_forward(network, relu, norms=True)
    norms, others, start = module.weight_norms(network), copies(other.parameters()), arrays(network)
    for _ in range(5):
        backward(network, optimizer)
        optimizer.step()
    before = arrays(network)
    state = adam_state(optimizer, network.parameters())
    module.project_(norms)
    for name, now in arrays(network).items():
        if name in [f"{layer}.weight" for layer in LINEAR[:-1]]:
            scale = np.sqrt((start[name] ** 2).sum() / (before[name] ** 2).sum())
            assert abs(scale - 1) > 1e-4
            assert np.allclose(now, scale * before[name], atol=1e-6)
        else:
            assert (now == before[name]).all(), name
    assert same(adam_state(optimizer, network.parameters()), state)
    assert same(copies(other.parameters()), others)


def test_weights_of_a_nap_run_keep_their_norms(monkeypatch):
    seen = []

    def norms(states, layers=LINEAR[:-1]):
        return [np.linalg.norm(np.asarray(states[net][f"{layer}.weight"])) for net in NETS for layer in layers]

    def before(run, name):
        if name == "critic":
            seen.append(norms({net: arrays(run.networks[net]) for net in NETS}))
        assert getattr(run, name).param_groups[0]["lr"] == 1e-2

    run = Run(NAP, monkeypatch, before, total_timesteps=200, learning_rate=1e-2)
    start, end = run.start(), run.result()[0]
    assert len(seen) == 100
    assert np.allclose([*seen, norms(end)], norms(start), rtol=1e-5)
    assert (np.abs(np.subtract(norms(start, LINEAR[-1:]), norms(end, LINEAR[-1:]))) > 1e-3).all()
    assert not same(start["qf1"]["norm1.weight"], end["qf1"]["norm1.weight"]), "gains learn"


def test_naps_learning_rate_may_fall_linearly_to_0(monkeypatch):
    rates = []

    def before(run, name):
        rates.append((name, run.t, getattr(run, name).param_groups[0]["lr"]))

    Run(NAP, monkeypatch, before, total_timesteps=200, nap_anneal=True, replay_ratio=2)
    assert [(name, t) for name, t, _ in rates if name == "actor"] == [("actor", t) for t in range(2, 201, 2)]
    for _, t, rate in rates:
        assert rate == pytest.approx(3e-4 * (1 - t / 200), abs=1e-12)


# ===== Hare & Tortoise =====


def test_the_tortoise_follows_and_the_hare_is_set_to_it_when_they_meet():
    module = MODULES[HARE_TORTOISE]
    hare, tortoise, optimizer = learned(module)
    state = adam_state(optimizer, hare.parameters())
    for meet in (False, True):
        fast, slow = arrays(hare), arrays(tortoise)
        module.follow_(tortoise, hare, 0.8, meet)
        for name, now in arrays(tortoise).items():
            assert np.allclose(now, 0.8 * slow[name] + 0.2 * fast[name], atol=1e-6)
            assert (arrays(hare)[name] == (now if meet else fast[name])).all()
    assert same(adam_state(optimizer, hare.parameters()), state)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(hare.parameters(), tortoise.parameters(), strict=True))


def test_in_a_run_hare_and_tortoise_meet_every_interval_and_targets_and_moments_stay(monkeypatch):
    def state(run):
        return {net: arrays(run.networks[net]) for net in NETS}

    def moments(run):
        both = [run.critic, *([run.actor] if hasattr(run, "actor") else [])]
        return [copies(v for p in o.state.values() for v in p.values()) for o in both]

    def before(run, name):
        if name == "actor":
            return
        if run.t == 1:
            run.slow = state(run)
        else:
            met = (run.t - 1) % 7 == 0
            for net in NETS:
                for key, fast in run.after[net].items():
                    run.slow[net][key] = 0.9 * run.slow[net][key] + 0.1 * fast
                    truth = run.slow[net][key] if met else fast
                    assert np.allclose(arrays(run.networks[net])[key], truth, atol=0 if not met else 1e-5), run.t
                    assert np.allclose(arrays(run.copied[1][net])[key], run.slow[net][key], atol=1e-5)
                    target = arrays(run.copied[0][net])[key]
                    assert np.allclose(target, run.target[net][key], atol=1e-5)
            assert same(moments(run), run.moments)

    def after(run, name):
        run.after, run.moments = state(run), moments(run)
        if run.t == 1:
            run.target = {net: arrays(run.copied[0][net]) for net in NETS}
        if name == "actor":
            for net in NETS:
                for key, fast in run.after[net].items():
                    run.target[net][key] = 0.995 * run.target[net][key] + 0.005 * fast

    Run(HARE_TORTOISE, monkeypatch, before, after, total_timesteps=150, learning_rate=1e-2, **OFTEN[HARE_TORTOISE])


# ===== Shrink & Perturb =====


def test_shrink_and_perturb_mixes_a_network_and_its_target_with_a_fresh_one():
    module = MODULES[SHRINK_PERTURB]
    network, other, optimizer = learned(module)
    target = copy.deepcopy(other).requires_grad_(False)
    before, others, held = (
        [arrays(net) for net in (network, target)],
        copies(other.parameters()),
        list(network.parameters()),
    )
    other_state = adam_state(optimizer, other.parameters())
    torch.manual_seed(7)
    module.shrink_perturb_([network, target], optimizer, 0.7, 0.4)
    torch.manual_seed(7)
    fresh = arrays(module.MLP(4, 24, 1))
    for net, old in zip((network, target), before, strict=True):
        for name, now in arrays(net).items():
            assert np.allclose(now, 0.7 * old[name] + 0.4 * fresh[name], atol=1e-6), name
    assert all(a is b for a, b in zip(held, network.parameters(), strict=True))
    assert not any(p in optimizer.state for p in held), "Adam starts anew"
    assert same(copies(other.parameters()), others)
    assert same(adam_state(optimizer, other.parameters()), other_state)
    unchanged = arrays(network)
    module.shrink_perturb_([network], optimizer, 1.0, 0.0)
    assert all((now == unchanged[name]).all() for name, now in arrays(network).items())
    backward(network, optimizer)
    optimizer.step()
    assert {int(optimizer.state[p]["step"]) for p in held} == {1}


@pytest.mark.parametrize(("total", "expected"), [(400, [100, 200, 300]), (399, [100, 200]), (199, [])])
def test_shrink_and_perturb_comes_while_an_interval_is_left_to_each_network_and_its_target(
    total, expected, monkeypatch
):
    calls = []

    def watch(run, call, networks, optimizer, shrink, perturb):
        name = next(name for name in NETS if run.networks[name] is networks[0])
        assert networks[1] is run.copied[0][name]
        assert len(networks) == 2
        if run.t:
            assert optimizer is (run.actor if name == "actor" else run.critic)
        calls.append((run.t, name, shrink, perturb))
        call()

    changes = {"shrink_perturb_interval": 100, "learning_starts": 90, "total_timesteps": total}
    run = Run(SHRINK_PERTURB, monkeypatch, around={"shrink_perturb_": watch}, **changes)
    assert calls == [(step - 90, name, 0.8, 0.2) for step in expected for name in NETS]
    logged = harness.events(run.folder).get("shrink_perturb/number", [])
    assert logged == [(step, step // 100) for step in expected]


# ===== Two-hot =====

VALUES = [0, 0.1, -0.3, 1, -7.77, 123.4, -999, 54321, 4.8e8, -4.8e8, 1e12, -1e12]


def numpy_bins(limit, n):
    centres = [-limit + 2 * limit * i / (n - 1) for i in range(n)]
    return np.array([math.copysign(math.exp(abs(c)) - 1, c) for c in centres])


@pytest.mark.parametrize(("n", "limit"), [(101, 20.0), (2, 3.0), (10, 5.0)])
def test_a_two_hot_distribution_has_its_value_as_expectation_in_two_neighbouring_bins(n, limit):
    module, truth = MODULES[TWO_HOT], numpy_bins(limit, n)
    critic = module.TwoHotCritic(4, 8, n, limit)
    assert np.allclose(array(critic.bins), truth, rtol=1e-9, atol=1e-9)
    values = torch.tensor([*VALUES, *truth], dtype=torch.float64)
    own = module.two_hot(values, critic.bins).numpy()
    assert own.shape == (len(values), n)
    for value, row in zip(values.tolist(), own, strict=True):
        value, brute = min(max(value, truth[0]), truth[-1]), np.zeros(n)
        for k in range(n - 1):
            if truth[k] <= value <= truth[k + 1]:
                brute[k + 1] = (value - truth[k]) / (truth[k + 1] - truth[k])
                brute[k] = 1 - brute[k + 1]
                break
        assert np.allclose(row, brute, atol=1e-7)
        assert row.min() >= 0
        assert row.sum() == pytest.approx(1, abs=1e-12)
        assert row @ truth == pytest.approx(value, rel=1e-9, abs=1e-6)


def test_a_critics_value_is_the_expected_symexp_bin_and_that_of_what_it_learns_is_the_target():
    module, truth = MODULES[TWO_HOT], numpy_bins(20.0, 101)
    critic, x = module.TwoHotCritic(4, 24, 101, 20.0), torch.randn(16, 4)
    assert critic(x[:, :3], x[:, 3:]).abs().max() < 1e-3, "starts at 0"
    with torch.no_grad():
        critic.fc3.weight.normal_()
    logits = module.MLP.forward(critic, x)
    p = np.exp(array(logits))
    p /= p.sum(1, keepdims=True)
    assert np.allclose(array(critic(x))[:, 0], p @ truth, rtol=1e-4)
    assert critic(x).shape == (16, 1)
    assert critic(x).dtype == torch.float32
    values = torch.linspace(-300, 300, 16)
    share = module.two_hot(values.double(), critic.bins).numpy()
    loss = critic.loss(logits, values)
    assert loss.item() == pytest.approx(-(share * np.log(p)).sum(1).mean(), rel=1e-4)
    loss.backward()
    assert critic.fc1.weight.grad.any()
    # where the loss is least, p is the target's distribution, and the value the target itself: no bias
    values = torch.tensor(VALUES[:8], dtype=torch.float64)
    least = module.two_hot(values, critic.bins).clamp(min=1e-300).log().float().clamp(min=-80)
    assert np.allclose(array(critic.value(least))[:, 0], values, rtol=1e-4, atol=1e-4)


def test_a_run_learns_two_hot_critics_by_cross_entropy_to_the_same_targets(monkeypatch):
    module, calls, loss = MODULES[TWO_HOT], [], MODULES[TWO_HOT].TwoHotCritic.loss

    def watch(critic, logits, values):
        truth = module.MLP.forward(critic, *drawn[-1][:2])
        assert torch.equal(logits, truth), "this critic's own logits of the batch"
        calls.append((critic, logits.shape, values.detach().clone(), loss(critic, logits, values)))
        return calls[-1][-1]

    drawn, sample = [], module.ReplayBuffer.sample

    def draw(buffer, *arguments, **options):
        drawn.append(sample(buffer, *arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(module.ReplayBuffer, "sample", draw)
    monkeypatch.setattr(module.TwoHotCritic, "loss", watch)
    run = Run(TWO_HOT, monkeypatch, two_hot_bins=11, two_hot_limit=6.0, total_timesteps=200)
    assert len(calls) == 200
    for first, second in zip(calls[::2], calls[1::2], strict=True):
        assert first[0] is run.networks["qf1"]
        assert second[0] is run.networks["qf2"]
        assert first[1] == second[1] == (16, 11)
        assert torch.equal(first[2], second[2])
    assert all(len(net.bins) == 11 for nets in (run.networks, run.copied[0]) for net in (nets["qf1"], nets["qf2"]))
    assert float(run.networks["qf1"].bins[-1]) == pytest.approx(math.exp(6) - 1)
    logged = harness.events(run.folder)["losses/qf1_loss"]
    assert [value for _, value in logged] == [pytest.approx(calls[-2][3].item(), rel=1e-5)]


# ===== ReGraMa =====


def numpy_scores(gradient):
    mean = np.abs(gradient).mean(1)
    return mean / mean.mean()


@pytest.mark.parametrize(("tau", "most"), [(0.01, 0.05), (0.8, 0.25), (0.8, 1.0), (1e9, 0.1), (0.0, 1.0)])
def test_neurons_with_the_least_gradient_are_recycled(tau, most):
    module, generator = MODULES[REGRAMA], torch.Generator().manual_seed(3)
    network, other, optimizer = learned(module, hidden=40)
    with torch.no_grad():
        network.fc1.bias[[3, 8]] = -50  # never fire: no gradient
        network.fc2.bias[[5, 30]] = -50
    backward(network, optimizer, other)
    before, moments = arrays(network), adam_state(optimizer, network.parameters())
    others, other_state = copies(other.parameters()), adam_state(optimizer, other.parameters())
    gradients = copies(p.grad for p in network.parameters())
    chosen, drawn = [], torch.get_rng_state()
    for layer in (network.fc1, network.fc2):
        scores = numpy_scores(array(layer.weight.grad))
        assert np.allclose(array(module.gradient_scores(layer)), scores, atol=1e-5)
        lowest = np.argsort(scores, kind="stable")[: int(most * 40)]
        chosen.append(sorted(i for i in lowest if scores[i] <= tau))
    if most == 1.0 or tau == 0.01:
        assert {3, 8} & set(chosen[0])
    number = module.recycle_inactive_(network, optimizer, tau, most, generator)
    assert number == sum(map(len, chosen)) > 0
    now = arrays(network)
    for l, layer in enumerate(LINEAR):
        rows, columns = (chosen[l] if l < 2 else []), (chosen[l - 1] if l else [])
        own, kept = now[f"{layer}.weight"], before[f"{layer}.weight"].copy()
        fresh = np.zeros(own.shape, bool)
        fresh[rows] = True
        fresh[:, columns] = False
        kept[:, columns] = 0
        assert (own[~fresh] == kept[~fresh]).all()
        assert (own[fresh] != before[f"{layer}.weight"][fresh]).all()
        assert np.abs(own[fresh]).max(initial=0) <= 1 / math.sqrt(own.shape[1])
        biases = before[f"{layer}.bias"].copy()
        biases[rows] = 0
        assert (now[f"{layer}.bias"] == biases).all()
        for place, part in enumerate(("weight", "bias")):
            old, new = moments[2 * l + place], optimizer.state[getattr(getattr(network, layer), part)]
            assert new["step"] == old["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                truth = old[key].clone()
                truth[rows] = 0
                if part == "weight":
                    truth[:, columns] = 0
                assert torch.equal(new[key], truth)
    assert same(copies(p.grad for p in network.parameters()), gradients)
    assert same(copies(other.parameters()), others)
    assert same(adam_state(optimizer, other.parameters()), other_state)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_run_recycles_each_network_by_its_own_training_gradient_and_leaves_targets(monkeypatch):
    calls = []

    def before(run, name):
        run.gradients = getattr(run, "gradients", {})
        for net in ["actor"] if name == "actor" else ["qf1", "qf2"]:
            run.gradients[net] = copies(p.grad for p in run.networks[net].parameters())

    def watch(run, call, network, optimizer, tau, most, generator):
        name = next(name for name in NETS if run.networks[name] is network)
        assert optimizer is (run.actor if name == "actor" else run.critic)
        assert same(copies(p.grad for p in network.parameters()), run.gradients[name])
        target = copies(run.copied[0].parameters())
        number = call()
        assert same(copies(run.copied[0].parameters()), target)
        calls.append((run.t, name, tau, most, number))
        return number

    run = Run(REGRAMA, monkeypatch, before, around={"recycle_inactive_": watch}, **OFTEN[REGRAMA])
    assert [call[:4] for call in calls] == [(t, name, 0.5, 0.4) for t in range(20, 301, 20) for name in NETS]
    assert sum(call[4] for call in calls) > 0
    logged = harness.events(run.folder)
    for name in NETS:
        assert [value for _, value in logged[f"regrama/{name}_recycled"]] == [c[4] for c in calls if c[1] == name]


# ===== NE with LayerNorm =====


def test_hidden_layers_of_ne_are_normalised_before_their_relu():
    network = learned(MODULES[NE_LAYER_NORM])[0]
    with torch.no_grad():
        for p in (*network.norm1.parameters(), *network.norm2.parameters()):
            p.add_(torch.randn_like(p))
    check_forward(network, relu, norms=True)


def pruning_event(monkeypatch, revive=True):
    """A network with three silent neurons in each layer, and how it is after an event that pruned them."""
    module = MODULES[NE_LAYER_NORM]
    network, _, optimizer = learned(module, hidden=32)
    module.sparse_start_(module.masked_layers(network), 0.5, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for norm in (network.norm1, network.norm2):
            norm.bias[[2, 9, 20]] = -30.0
            norm.weight.mul_(1.5)
    backward(network, optimizer)
    if not revive:
        monkeypatch.setattr(module, "revive_", lambda *_: None)
    return module, network, optimizer


def ne_args(module, **changes):
    args = module.Args(total_timesteps=1000, learning_starts=0, growth_interval=10, policy_frequency=1, omega=1e4)
    vars(args).update(initial_density=0.5, **changes)
    return args


def test_a_pruned_neuron_gets_the_mean_preactivation_and_the_mean_activation_as_offset(monkeypatch):
    module, network, optimizer = pruning_event(monkeypatch)
    x, p, target = torch.randn(256, 4), arrays(network), copy.deepcopy(network)
    hidden = numpy_hidden(p, array(x), relu, norms=True)
    before = [z @ p[f"fc{n}.weight"].T + p[f"fc{n}.bias"] for n, z in ((1, array(x)), (2, hidden[0]))]
    silent = [np.flatnonzero(h.max(0) == 0) for h in hidden]
    assert all({2, 9, 20} <= set(gone) for gone in silent)
    of = network, target, optimizer, 500, ne_args(module, grow=False), torch.Generator().manual_seed(2)
    done = module.grow_and_prune_(*of, (x,), (x,))
    assert done["pruned"] > 0
    now = arrays(network)
    for l, gone in enumerate(silent, start=1):
        assert not now[f"fc{l}.mask"][gone].any()
        assert not now[f"fc{l + 1}.mask"][:, gone].any()
        assert np.allclose(now[f"fc{l}.bias"][gone], before[l - 1].mean(), atol=1e-5)
        assert np.allclose(now[f"norm{l}.bias"][gone], hidden[l - 1].mean(), atol=1e-5)
        kept = np.setdiff1d(np.arange(32), gone)
        for name in (f"fc{l}.bias", f"norm{l}.bias"):
            assert (now[name][kept] == p[name][kept]).all()
            for key in ("exp_avg", "exp_avg_sq"):
                part = getattr(network, name.split(".")[0]).bias
                assert not optimizer.state[part][key][gone].any()
                assert optimizer.state[part][key][kept].any()
        assert (now[f"norm{l}.weight"] == p[f"norm{l}.weight"]).all()
        fires = (network.hidden(x)[l - 1][:, gone] > 0).float().mean(0)
        assert (fires > 0.9).all(), "fires on nearly all inputs"


@pytest.mark.parametrize("revive", [True, False])
def test_pruned_neurons_come_back_in_each_layer_by_the_revival_rule_alone(revive, monkeypatch):
    module, network, optimizer = pruning_event(monkeypatch, revive)
    target, generator, x = copy.deepcopy(network), torch.Generator().manual_seed(2), torch.randn(256, 4)
    args, neurons, back = ne_args(module), torch.tensor([2, 9, 20]), [set(), set()]
    for t in range(1, 601):
        backward(network, optimizer)
        if t % 10 == 0:
            module.grow_and_prune_(network, target, optimizer, t, args, generator, (x,), (x,))
        for weight, mask in module.absent_connections(network):
            weight.grad.mul_(mask)
        optimizer.step()
        if t == 10:
            layers = module.masked_layers(network)
            assert not any(layer.weight[neurons].any() for layer in layers[:2]), "pruned"
        for l, h in enumerate(network.hidden(x) if t % 50 == 0 else []):
            (own, following), fires = layers[l : l + 2], h[:, neurons].amax(0) > 0
            connected = own.weight[neurons].any(1) & following.weight[:, neurons].any(0)
            back[l] |= set(neurons[fires & connected].tolist())
    assert back == ([{2, 9, 20}] * 2 if revive else [set(), set()])
