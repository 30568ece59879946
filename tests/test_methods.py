"""The methods NE is compared with: each one's steps against computations of the test's own, and in short runs."""

import copy
import functools
import gc
import itertools
import math
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import harness
import numpy as np
import pytest
import torch
import tyro
from harness import SCRIPTS
from torch import nn

RESET = SCRIPTS["reset_td3_continuous"]
REDO = SCRIPTS["redo_td3_continuous"]
INJECTION = SCRIPTS["injection_td3_continuous"]
LAYER_NORM = SCRIPTS["layer_norm_td3_continuous"]
RIGL = SCRIPTS["rigl_td3_continuous"]
BASELINES = sorted(path.stem for path in (harness.ROOT / "baselines").glob("*_continuous.py"))
BASELINES = [script for script in BASELINES if script not in harness.MORE]  # these have tests of their own
KINDS = ["actor", "critic"]
NETS = ["actor", "qf1", "qf2"]
OBS, LOW, HIGH = 3, torch.tensor([-1, 0.0]), torch.tensor([3, 0.5])
LAYERS = ["fc1", "fc2", "fc3"]

# How often each method steps in, so that it does so in every quarter of a run of 400 steps, 100 of them random
OFTEN = {
    "reset_td3_continuous": {"reset_interval": 50, "reset_what": "last_layers", "reset_last_layers": 2},
    "redo_td3_continuous": {"redo_interval": 20, "redo_tau": 0.6},
    "injection_td3_continuous": {"injection_step": (150, 350)},
    "rigl_td3_continuous": {"rigl_interval": 20},
}


# ===== Networks that have learned a little =====


def noise(n, *widths):
    return [torch.randn(n, width) for width in widths]


def inputs_of(kind, n=64):
    """Random inputs of a network."""
    return noise(n, OBS) if kind == "actor" else noise(n, OBS, len(LOW))


def learned(module, kind, hidden=24, steps=6, density=None, seed=0):
    """A network and its target after some updates, and the optimizer, which serves another network too if a critic."""
    torch.manual_seed(seed)

    def make():
        return module.Actor(OBS, LOW, HIGH, hidden) if kind == "actor" else module.MLP(OBS + len(LOW), hidden, 1)

    network, other = make(), make()
    if density:
        module.sparse_start_(module.masked_layers(network), density, torch.Generator().manual_seed(seed))
    target = copy.deepcopy(network).requires_grad_(False)
    parameters = [*network.parameters(), *(other.parameters() if kind == "critic" else [])]
    optimizer = torch.optim.Adam(parameters, lr=1e-2, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        for net in (network, other) if kind == "critic" else (network,):
            x = inputs_of(kind)
            (net(*x) - x[0].sum(1, keepdim=True).sin()).square().mean().backward()
        for weight, mask in module.absent_connections(network) if density else []:
            weight.grad.mul_(mask)
        optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), network.parameters(), strict=True):
            slow.lerp_(fast, 0.3)
    return network, target, optimizer, other


def layers_of(network):
    return [getattr(network, name) for name in LAYERS]


def moments(optimizer, parameter):
    return [optimizer.state[parameter][name] for name in ("exp_avg", "exp_avg_sq")]


def copies(tensors):
    return [tensor.detach().clone() for tensor in tensors]


def optimizer_state(optimizer, parameters):
    """Moments and step counts of these parameters, copied."""
    return [copies(optimizer.state[p][name] for name in ("exp_avg", "exp_avg_sq", "step")) for p in parameters]


def arrays(state):
    """A state dict's tensors -> {name: float64 array}."""
    return {name: value.numpy().astype(np.float64) for name, value in state.items()}


def perceptron(weights, x):
    """What a ReLU network with two hidden layers makes of x -> the hidden activations, the output."""
    (w1, b1), (w2, b2), (w3, b3) = weights
    h1 = np.maximum(x @ w1.T + b1, 0)
    h2 = np.maximum(h1 @ w2.T + b2, 0)
    return [h1, h2], h2 @ w3.T + b3


def weights_of(state, names=LAYERS):
    return [(state[f"{name}.weight"], state[f"{name}.bias"]) for name in names]


def output_of(state, x):
    """A network's output by its saved state alone, frozen parts included; x: list of arrays."""
    state, x = arrays(state), np.concatenate([np.asarray(part, np.float64) for part in x], 1)
    total = perceptron(weights_of(state), x)[1]
    parts = len({name.split(".")[1] for name in state if name.startswith("frozen.")})
    for number in range(parts):
        frozen = perceptron(weights_of(state, [f"frozen.{number}.{place}" for place in (0, 2, 4)]), x)[1]
        total = total + frozen if number % 2 == 0 else total - frozen
    if "action_scale" in state:
        return np.tanh(total) * state["action_scale"] + state["action_bias"]
    return total


# ===== Short runs that are watched =====


class Run:
    """A run of `main` in this process: its networks, targets, optimizers and buffer, and the calls in it.

    around: {name of a function of the script: callback(run, call, *arguments)}; the callback calls `call()`.
    at_step: callback(run, call, optimizer) in place of each step of an optimizer.
    before_add: callback(run) at each environment step, before the transition is stored.
    """

    def __init__(self, script, monkeypatch, around=None, before_add=None, at_step=None, **changes):
        self.module, self.networks, self.targets, self.optimizers = SCRIPTS[script], {}, {}, {}
        self.script, self.writer, self.buffer, self.step, run = script, None, None, 0, self
        module, values = self.module, {"total_timesteps": 400, "learning_starts": 100, "hidden_dim": 12}
        self.args = harness.short_args(script, **(values | {"checkpoint_interval": 0} | changes))

        class Buffer(module.ReplayBuffer):
            def __init__(self, *arguments):
                super().__init__(*arguments)
                run.buffer, run.drawn = self, {}

            def add(self, *arguments):
                run.step += 1
                if before_add:
                    before_add(run)
                super().add(*arguments)

            def sample(self, batch_size, *rest, **options):
                batch = run.drawn[batch_size] = super().sample(batch_size, *rest, **options)
                return batch

        def deepcopy(original):
            duplicate = copy.deepcopy(original)
            if isinstance(original, nn.ModuleDict):
                run.networks, run.targets = dict(original.items()), dict(duplicate.items())
            return duplicate

        def optimizer(*arguments, **options):
            made = torch.optim.Adam(*arguments, **options)
            run.optimizers["critic" if "actor" in run.optimizers else "actor"] = made
            if at_step:
                step = made.step
                made.step = lambda: at_step(run, step, made)
            return made

        def writer(*arguments, **options):
            run.writer = summary_writer(*arguments, **options)
            return run.writer

        summary_writer, fake_torch = module.SummaryWriter, SimpleNamespace(**vars(torch))
        fake_torch.optim = SimpleNamespace(Adam=optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(module, "ReplayBuffer", Buffer)
            patch.setattr(module, "copy", SimpleNamespace(deepcopy=deepcopy))
            patch.setattr(module, "torch", fake_torch)
            patch.setattr(module, "SummaryWriter", writer)
            for name, callback in (around or {}).items():
                patch.setattr(module, name, self.watched(getattr(module, name), callback))
            try:
                self.folder = module.main(self.args).resolve()
            finally:
                if self.writer:
                    self.writer.close()

    def watched(self, function, callback):
        def calling(*arguments, **options):
            return callback(self, lambda: function(*arguments, **options), *arguments, **options)

        return calling

    @property
    def t(self):
        """The gradient step that the run is at."""
        return self.step - self.args.learning_starts

    def name_of(self, network):
        return next(name for name, own in self.networks.items() if own is network)

    def optimizer_of(self, name):
        return self.optimizers["actor" if name == "actor" else "critic"]

    def everything(self):
        """All parameters of networks and targets, in one tensor."""
        nets = [*self.networks.values(), *self.targets.values()]
        return torch.cat([p.detach().flatten() for net in nets for p in net.parameters()])

    def returns(self):
        return harness.events(self.folder)["charts/episodic_return"]

    def model(self):
        return harness.weights(self.folder)


_usual = {}


def usual(script, monkeypatch):
    """A run whose method steps in OFTEN, made once; its `steps` say what the optimizers held at each of their steps."""

    def at_step(run, call, optimizer):
        held = [p for group in optimizer.param_groups for p in group["params"]]
        nets = ["actor"] if optimizer is run.optimizers["actor"] else ["qf1", "qf2"]
        learning = [p for net in nets for p in run.networks[net].parameters() if p.requires_grad]
        before = copies(held)
        call()
        changed = any(not torch.equal(a, b) for a, b in zip(before, held, strict=True))
        in_state = [id(p) for p in optimizer.state]
        steps.append((run.step, [id(p) for p in held], [id(p) for p in learning], in_state, changed))

    if script not in _usual:
        steps = []
        _usual[script] = Run(script, monkeypatch, at_step=at_step, **OFTEN.get(script, {}))
        _usual[script].steps = steps
    return _usual[script]


# ===== Until the first intervention, and without one =====

_watched = {}


def watched_states(script, monkeypatch, **changes):
    """A run of 500 steps with all parameters as they were before each of them; made once."""
    key = script, *sorted(changes.items())
    if key not in _watched:
        states = []

        def look(run):
            states.append(run.everything())

        run = Run(script, monkeypatch, None, look, total_timesteps=500, **changes)
        run.states, run.rows = states, run.buffer.rows[:250]
        run.early_returns = [value for step, value in run.returns() if step <= 250]
        _watched[key] = run
    return _watched[key]


FIRST = [  # what makes the method step in at the end of environment step 250 for the first time
    ("reset_td3_continuous", {"reset_interval": 250}),
    ("redo_td3_continuous", {"redo_interval": 150, "redo_tau": 0.6}),
    ("injection_td3_continuous", {}),
]


@pytest.mark.parametrize(("script", "changes"), FIRST, ids=[script for script, _ in FIRST])
def test_a_run_is_plain_td3_to_the_bit_until_its_first_intervention(script, changes, monkeypatch):
    plain, own = (
        watched_states(name, monkeypatch, **options) for name, options in (("td3_continuous", {}), (script, changes))
    )
    assert torch.equal(plain.rows, own.rows)
    assert plain.early_returns == own.early_returns != []
    assert len(plain.states) == len(own.states) == 500
    for step in range(250):
        assert torch.equal(plain.states[step], own.states[step]), f"departs in step {step}"
    assert not torch.equal(plain.states[250], own.states[250]), "the method never stepped in"


NEVER = [
    ("reset_td3_continuous", {"reset_interval": 0}),
    ("reset_td3_continuous", {}),
    ("redo_td3_continuous", {"redo_interval": 0}),
    ("redo_td3_continuous", {}),
    ("injection_td3_continuous", {"inject": "none"}),
    ("injection_td3_continuous", {"inject": "none", "injection_step": (200,)}),
]


@pytest.mark.parametrize(("script", "changes"), NEVER)
def test_a_run_without_intervention_is_plain_td3_to_the_bit(script, changes, monkeypatch):
    plain, own = usual("td3_continuous", monkeypatch), Run(script, monkeypatch, **changes)
    assert harness.same(plain.model(), own.model())
    assert plain.returns() == own.returns() != []
    assert torch.equal(plain.buffer.rows[:400], own.buffer.rows[:400])


def test_rigl_without_updates_is_static_sparse_training_to_the_bit(monkeypatch):
    static = usual("static_sparse_td3_continuous", monkeypatch)
    rigl = Run("rigl_td3_continuous", monkeypatch, rigl_interval=0)
    assert harness.same(static.model(), rigl.model())
    assert static.returns() == rigl.returns() != []
    tags = [harness.events(run.folder).keys() for run in (static, rigl)]
    assert tags[0] == tags[1]


# ===== What the optimizers hold =====


@pytest.mark.parametrize("script", BASELINES)
def test_the_optimizers_hold_just_the_parameters_that_learn(script, monkeypatch):
    steps = usual(script, monkeypatch).steps
    for step, held, learning, in_state, changed in steps:
        assert sorted(held) == sorted(learning), f"at step {step}"
        assert sorted(in_state) == sorted(learning), f"at step {step}"
        assert changed, f"step {step} changes nothing"
    assert [step for step, *_ in steps] == sorted([*range(101, 401), *range(102, 401, 2)])


@pytest.mark.parametrize("script", BASELINES)
def test_targets_are_apart_from_their_networks_and_have_no_gradient(script, monkeypatch):
    run = usual(script, monkeypatch)
    held = {id(p) for o in run.optimizers.values() for group in o.param_groups for p in group["params"]}
    assert run.targets.keys() == set(NETS)
    for name, target in run.targets.items():
        for own, slow in zip(run.networks[name].parameters(), target.parameters(), strict=True):
            assert own.data_ptr() != slow.data_ptr()
            assert not slow.requires_grad
            assert slow.grad is None
            assert id(slow) not in held


# ===== Reset =====


WHAT = [("networks", 1, 0), ("last_layers", 1, 2), ("last_layers", 2, 1), ("last_layers", 3, 0), ("optimizers", 1, 0)]


@pytest.mark.parametrize(("what", "last", "first"), WHAT)
@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_draws_layers_anew_and_empties_the_optimizer_of_them_alone(kind, what, last, first):
    network, target, optimizer, other = learned(RESET, kind, hidden=64)
    before, parameters = copies(network.parameters()), list(network.parameters())
    target_before, others = copies(target.parameters()), copies(other.parameters())
    state = optimizer_state(optimizer, parameters)
    other_state = optimizer_state(optimizer, other.parameters()) if kind == "critic" else []
    torch.manual_seed(7)
    drawn = RESET.reset_(network, optimizer, what, last)
    assert harness.same(copies(target.parameters()), target_before)
    target.load_state_dict(drawn, strict=False)

    assert [id(p) for p in network.parameters()] == [id(p) for p in parameters]
    for number, (layer, slow) in enumerate(zip(layers_of(network), layers_of(target), strict=True)):
        for place, (own, its_target) in enumerate(zip(layer.parameters(), slow.parameters(), strict=True)):
            index, bound = 2 * number + place, 1 / math.sqrt(layer.in_features)
            if number < first:
                now = optimizer_state(optimizer, [own])[0]
                assert harness.same(now, state[index])
                assert all(bool(value.any()) for value in now)
            else:
                assert own not in optimizer.state
            if number < first or what == "optimizers":
                assert torch.equal(own, before[index])
                assert torch.equal(its_target, target_before[index])
                assert not torch.equal(own, its_target)
            else:
                assert (own != before[index]).all()
                assert own.abs().max() <= bound
                assert torch.equal(own, its_target)
                assert own.data_ptr() != its_target.data_ptr()
                if own.numel() >= 1000:
                    assert own.abs().max() > 0.99 * bound
                    assert float(own.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert harness.same(copies(other.parameters()), others)
    if kind == "critic":
        assert harness.same(optimizer_state(optimizer, other.parameters()), other_state)


@pytest.mark.parametrize(("what", "last", "first"), WHAT)
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimizer_steps_after_a_reset_are_those_of_a_new_adam(kind, what, last, first):
    network, _, optimizer, _ = learned(RESET, kind)
    RESET.reset_(network, optimizer, what, last)
    fresh = copy.deepcopy(network)
    new = torch.optim.Adam(fresh.parameters(), lr=1e-2, fused=True)
    for _ in range(3):
        for own, its in zip(network.parameters(), fresh.parameters(), strict=True):
            own.grad = torch.randn_like(own)
            its.grad = own.grad.clone()
        optimizer.step()
        new.step()
    for number, (own, its) in enumerate(zip(layers_of(network), layers_of(fresh), strict=True)):
        assert torch.equal(own.weight, its.weight) == (number >= first)
        assert torch.equal(own.bias, its.bias) == (number >= first)


def test_a_reset_before_the_first_optimizer_step_is_possible():
    network, _, optimizer, _ = learned(RESET, "actor", steps=0)
    before = copies(network.parameters())
    RESET.reset_(network, optimizer)
    assert all((a != b).all() for a, b in zip(before, network.parameters(), strict=True))


@pytest.mark.parametrize(
    ("total", "interval", "expected"),
    [(350, 100, [100, 200]), (400, 100, [100, 200, 300]), (399, 100, [100, 200]), (199, 100, []), (200, 100, [100])],
)
def test_resets_come_at_multiples_of_the_interval_while_an_interval_is_left(total, interval, expected, monkeypatch):
    calls = []

    def at_reset(run, call, network, optimizer, what, last):
        name, rows = run.name_of(network), run.buffer.rows[: run.step].clone()
        assert optimizer is run.optimizer_of(name)
        drawn = call()
        assert len(run.buffer) == run.step
        assert torch.equal(run.buffer.rows[: run.step], rows)
        calls.append((run.step, name, what, last))
        return drawn

    def look(run):
        if run.step - 1 in expected:
            for name, network in run.networks.items():
                pairs = zip(layers_of(network), layers_of(run.targets[name]), strict=True)
                assert [torch.equal(own.weight, slow.weight) for own, slow in pairs] == [False, True, True]

    options = {"total_timesteps": total, "learning_starts": 50, "reset_interval": interval}
    options |= {"reset_what": "last_layers", "reset_last_layers": 2}
    run = Run("reset_td3_continuous", monkeypatch, {"reset_": at_reset}, look, **options)
    assert calls == [(step, name, "last_layers", 2) for step in expected for name in NETS]
    assert run.step == total
    logged = harness.events(run.folder).get("reset/number", [])
    assert logged == [(step, number) for number, step in enumerate(expected, start=1)]


@pytest.mark.parametrize("what", ["networks", "last_layers", "optimizers"])
def test_a_run_resets_what_it_is_told_to(what, monkeypatch):
    before = {}

    def at_reset(run, call, network, *rest):
        before[run.name_of(network)] = [
            copies(net.parameters()) for net in (network, run.targets[run.name_of(network)])
        ]
        return call()

    def look(run):
        if run.step != 151:
            return
        assert before.keys() == set(NETS)
        for name, network in run.networks.items():
            target, optimizer = run.targets[name], run.optimizer_of(name)
            own_before, slow_before = before[name]
            drawn = {"networks": 0, "last_layers": 4, "optimizers": 6}[what]  # the first parameter that is
            for place, (own, slow) in enumerate(zip(network.parameters(), target.parameters(), strict=True)):
                assert torch.equal(own, own_before[place]) == (place < drawn)
                assert torch.equal(slow, slow_before[place] if place < drawn else own)
                assert (own in optimizer.state) == (what == "last_layers" and place < 4)
        before.clear()

    Run("reset_td3_continuous", monkeypatch, {"reset_": at_reset}, look, reset_interval=150, reset_what=what)
    assert not before


def test_what_to_reset_is_one_of_three_words(capsys):
    assert tyro.cli(RESET.Args, args=["--reset-what", "optimizers"]).reset_what == "optimizers"
    with pytest.raises(SystemExit) as ending:
        tyro.cli(RESET.Args, args=["--reset-what", "buffer"])
    assert ending.value.code == 2
    assert "last_layers" in capsys.readouterr().err


# ===== ReDo =====


def numpy_scores(h):
    """mean_batch |h_i| over the layer's mean, in float64."""
    mean = np.abs(np.asarray(h, np.float64)).mean(0)
    return mean / mean.mean() if mean.mean() > 0 else mean


def check_recycled(before, after, dormant, moments_before, moments_after):
    """Asserts layer by layer what a recycling did; before, after: [(weight, bias), ...], dormant: masks as arrays."""
    nothing = np.zeros(0, bool)
    for number in range(3):
        (w, b), (w_now, b_now) = before[number], after[number]
        rows = dormant[number] if number < 2 else np.zeros(len(w), bool)
        columns = dormant[number - 1] if number > 0 else np.zeros(w.shape[1], bool)
        assert rows.shape != nothing.shape
        for i, j in itertools.product(range(w.shape[0]), range(w.shape[1])):
            if columns[j]:
                assert w_now[i, j] == 0, "an outgoing connection of a dormant neuron, whatever else it is"
            elif rows[i]:
                assert w_now[i, j] != w[i, j]
                assert 0 < abs(w_now[i, j]) <= 1 / math.sqrt(w.shape[1])
            else:
                assert w_now[i, j] == w[i, j]
            for old, new in zip(moments_before[number][0], moments_after[number][0], strict=True):
                assert new[i, j] == (0 if rows[i] or columns[j] else old[i, j])
        for i in range(len(b)):
            assert b_now[i] == (0 if rows[i] else b[i])
            for old, new in zip(moments_before[number][1], moments_after[number][1], strict=True):
                assert new[i] == (0 if rows[i] else old[i])


def layer_arrays(network):
    return [(layer.weight.detach().numpy().copy(), layer.bias.detach().numpy().copy()) for layer in layers_of(network)]


def moment_arrays(network, optimizer):
    return [
        [[m.numpy().copy() for m in moments(optimizer, p)] for p in (layer.weight, layer.bias)]
        for layer in layers_of(network)
    ]


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("kind", KINDS)
def test_recycling_is_what_a_slow_computation_says(kind, tau):
    network, _, optimizer, other = learned(REDO, kind)
    x = inputs_of(kind, 500)
    with torch.no_grad():
        network.fc1.bias[[2, 5, 11]] = -50.0  # never fire
        network.fc2.bias[[0, 5, 23]] = -50.0
        network.fc1.weight[7] *= 1e-3  # hardly fires
        network.fc1.bias[7] = 1e-3
        hidden = network.hidden(*x)
    slow, _ = perceptron(weights_of(arrays(network.state_dict())), np.concatenate(x, 1).astype(np.float64))
    scores = [numpy_scores(h) for h in slow]
    assert min(np.abs(s - tau)[s > 0].min() for s in scores) > 1e-5, "no score is a matter of rounding"
    dormant = [s <= tau for s in scores]
    assert all(rows.any() and not rows.all() for rows in dormant)

    before, old = layer_arrays(network), moment_arrays(network, optimizer)
    others, steps = copies(other.parameters()), [float(s["step"]) for s in optimizer.state.values()]
    with torch.no_grad():
        outputs = network(*x)
    random_state = torch.get_rng_state()
    number = REDO.recycle_dormant_(network, hidden, optimizer, tau, torch.Generator().manual_seed(3))
    assert number == sum(rows.sum() for rows in dormant)
    check_recycled(before, layer_arrays(network), dormant, old, moment_arrays(network, optimizer))
    assert [float(s["step"]) for s in optimizer.state.values()] == steps
    assert set(steps) == {6.0}
    assert harness.same(copies(other.parameters()), others)
    assert torch.equal(torch.get_rng_state(), random_state), "TD3's own draws must stay as they are"
    with torch.no_grad():
        assert torch.allclose(network(*x), outputs, atol=1e-5) == (tau == 0)


def test_a_neuron_whose_score_is_tau_is_recycled_and_the_score_is_over_the_layers_mean():
    network, _, optimizer, _ = learned(REDO, "actor", hidden=4)
    first, second = torch.tensor([[0.0, 4, 8, 4]] * 5), torch.tensor([[3.0, 0, 0, 1], [3, 0, 0, 1]])
    before = layer_arrays(network)
    number = REDO.recycle_dormant_(network, [first, second], optimizer, 1.0, torch.Generator().manual_seed(3))
    dormant = [np.array([True, True, False, True]), np.array([False, True, True, True])]
    assert number == 6
    zeroed = [(w == 0) for w, _ in layer_arrays(network)]
    assert not zeroed[0].any()
    assert (zeroed[1] == dormant[0][None]).all()
    assert (zeroed[2] == dormant[1][None]).all()
    changed = [(a != b).any(1) for (a, _), (b, _) in zip(before[:1], layer_arrays(network)[:1], strict=True)]
    assert (changed[0] == dormant[0]).all()


def test_recycled_weights_spread_as_at_the_start():
    network, _, optimizer, _ = learned(REDO, "critic", hidden=64)
    silent = [torch.zeros(5, 64), torch.ones(5, 64)]
    REDO.recycle_dormant_(network, silent, optimizer, 0.0, torch.Generator().manual_seed(3))
    bound = 1 / math.sqrt(OBS + len(LOW))
    weight = network.fc1.weight.detach()
    assert 0.95 * bound < weight.abs().max() <= bound
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert float(weight.mean()) == pytest.approx(0, abs=0.1 * bound)


def test_redo_recycles_each_network_by_its_activations_before_anything_changed(monkeypatch):
    calls, state = [], {}

    def at_recycling(run, call, network, hidden, optimizer, tau, generator):
        name = run.name_of(network)
        if name == "actor":
            state["before"] = {net: arrays(run.networks[net].state_dict()) for net in NETS}
            state["targets"] = {net: copies(run.targets[net].parameters()) for net in NETS}
        batch = run.drawn[2048]
        assert len(batch.obs) == 2048
        known = {tuple(row) for row in run.buffer.rows[: run.step, :3].tolist()}
        assert {tuple(row) for row in batch.obs.tolist()} <= known
        x = [batch.obs] if name == "actor" else [batch.obs, batch.actions]
        expected, _ = perceptron(weights_of(state["before"][name]), np.concatenate(x, 1).astype(np.float64))
        for h, slow in zip(hidden, expected, strict=True):
            assert np.allclose(h.detach().numpy(), slow, atol=1e-4)
        assert optimizer is run.optimizer_of(name)
        dormant = [numpy_scores(h.detach()) <= tau for h in hidden]
        before, old = layer_arrays(network), moment_arrays(network, optimizer)
        number = call()
        check_recycled(before, layer_arrays(network), dormant, old, moment_arrays(network, optimizer))
        for net in NETS:
            assert harness.same(copies(run.targets[net].parameters()), state["targets"][net])
        calls.append((run.t, name, tau, number))
        return number

    options = {"redo_interval": 70, "redo_tau": 0.6}
    run = Run("redo_td3_continuous", monkeypatch, around={"recycle_dormant_": at_recycling}, **options)
    assert [call[:3] for call in calls] == [(t, name, 0.6) for t in (70, 140, 210, 280) for name in NETS]
    assert sum(call[3] for call in calls) > 0
    logged = harness.events(run.folder)
    for net in NETS:
        assert logged[f"redo/{net}_recycled"] == [(100 + t, number) for t, name, _, number in calls if name == net]


def test_redo_that_recycles_nothing_draws_nothing_from_td3s_randomness(monkeypatch):
    around = {"recycle_dormant_": lambda run, call, *rest: 0}
    own = Run("redo_td3_continuous", monkeypatch, around, redo_interval=20)
    assert len(harness.events(own.folder)["redo/qf1_recycled"]) == 15
    assert harness.same(usual("td3_continuous", monkeypatch).model(), own.model())


def test_redo_works_before_the_actors_first_optimizer_step(monkeypatch):
    run = Run("redo_td3_continuous", monkeypatch, total_timesteps=110, redo_interval=1, redo_tau=0.6)
    assert [step for step, _ in harness.events(run.folder)["redo/actor_recycled"]] == list(range(101, 111))


# ===== Plasticity Injection =====


@pytest.mark.parametrize("kind", KINDS)
def test_injection_leaves_outputs_as_they_are_once_and_again(kind):
    network, target, optimizer, other = learned(INJECTION, kind)
    x = inputs_of(kind, 300)
    others = copies(other.parameters())
    other_state = optimizer_state(optimizer, other.parameters()) if kind == "critic" else []
    for number in (1, 2):
        with torch.no_grad():
            before = network(*x), target(*x)
        assert not torch.allclose(*before, atol=1e-3)
        h, target_h = copies(network.parameters()), copies(target.parameters())
        assert len(h) == len(target_h) == 6
        INJECTION.inject_(network, optimizer, target)
        with torch.no_grad():
            after = network(*x), target(*x)
        for old, new, net in zip(before, after, (network, target), strict=True):
            assert torch.allclose(old, new, atol=2e-6)
            assert np.allclose(new.numpy(), output_of(net.state_dict(), x), atol=1e-5)
        assert len(network.frozen) == len(target.frozen) == 2 * number
        h1 = copies(p for layer in layers_of(network) for p in layer.parameters())
        assert harness.same(copies(network.frozen[-2].buffers()), h)
        assert harness.same(copies(network.frozen[-1].buffers()), h1)
        assert harness.same(copies(target.frozen[-2].buffers()), target_h)
        assert harness.same(copies(target.frozen[-1].buffers()), h1)
        assert harness.same(copies(p for layer in layers_of(target) for p in layer.parameters()), h1)
        for layer, was in zip(layers_of(network), h[::2], strict=True):
            assert (layer.weight != was).all()
            assert layer.weight.abs().max() <= 1 / math.sqrt(layer.in_features)
            for parameter in layer.parameters():
                assert parameter.requires_grad
                assert parameter not in optimizer.state
        assert not any(value.requires_grad for net in (network, target) for value in net.frozen.buffers())
        assert len(list(network.parameters())) == len(list(target.parameters())) == 6
        assert not any(p.requires_grad for p in target.parameters())
        if number == 1:  # h1 learns before the second time
            frozen = copies(network.frozen.buffers())
            learn_with_other(network, other, optimizer, kind)
            assert harness.same(copies(network.frozen.buffers()), frozen)
            assert not harness.same(copies(network.fc1.parameters()), h1[:2])
            with torch.no_grad():
                assert not torch.allclose(network(*x), before[0], atol=1e-3)
                assert np.allclose(network(*x).numpy(), output_of(network.state_dict(), x), atol=1e-5)
            other_state = optimizer_state(optimizer, other.parameters()) if kind == "critic" else []
            others = copies(other.parameters())
    assert harness.same(copies(other.parameters()), others)
    if kind == "critic":
        assert harness.same(optimizer_state(optimizer, other.parameters()), other_state)


def learn_with_other(network, other, optimizer, kind):
    for _ in range(5):
        x = inputs_of(kind)
        optimizer.zero_grad()
        network(*x).square().mean().backward()
        if kind == "critic":
            other(*x).square().mean().backward()
        optimizer.step()


def test_h1_steps_as_with_a_new_adam_after_an_injection():
    network, target, optimizer, _ = learned(INJECTION, "actor")
    INJECTION.inject_(network, optimizer, target)
    h1 = [p for layer in layers_of(network) for p in layer.parameters()]
    fresh = [p.detach().clone().requires_grad_() for p in h1]
    new = torch.optim.Adam(fresh, lr=1e-2, fused=True)
    for _ in range(3):
        for own, its in zip(h1, fresh, strict=True):
            own.grad = torch.randn_like(own)
            its.grad = own.grad.clone()
        optimizer.step()
        new.step()
    assert harness.same(copies(h1), copies(fresh))


def test_frozen_parts_pass_gradients_on_to_the_actor():
    actor, target, optimizer, _ = learned(INJECTION, "actor", hidden=6)
    critic, critic_target, critic_optimizer, other = learned(INJECTION, "critic", hidden=6, seed=1)
    for net, its_target, its_optimizer, second, kind in (
        (actor, target, optimizer, actor, "actor"),
        (critic, critic_target, critic_optimizer, other, "critic"),
    ):
        INJECTION.inject_(net, its_optimizer, its_target)
        learn_with_other(net, second, its_optimizer, kind)
    actor, critic, obs = actor.double(), critic.double(), torch.randn(16, OBS, dtype=torch.float64)

    def loss():
        return -critic(obs, actor(obs)).mean()

    learning = [p for p in actor.parameters() if p.requires_grad]
    for parameter in [*actor.parameters(), *critic.parameters()]:
        parameter.grad = None
    loss().backward()
    frozen = [value for net in (actor, critic) for value in net.frozen.buffers()]
    assert frozen
    assert all(value.grad is None for value in frozen)
    for parameter in learning:
        flat, slope = parameter.detach().view(-1), parameter.grad.view(-1)
        for place in range(flat.numel()):
            with torch.no_grad():
                values = []
                for shift in (1e-6, -2e-6):
                    flat[place] += shift
                    values.append(float(loss()))
                flat[place] += 1e-6
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(float(slope[place]), abs=1e-6)
    assert any(p.grad.abs().max() > 1e-3 for p in learning)


@pytest.mark.parametrize("inject", ["actor", "critic", "both"])
def test_a_run_injects_what_it_is_told_to_half_way(inject, monkeypatch):
    calls, frozen, first = [], {}, {}
    chosen = {"actor": ["actor"], "critic": ["qf1", "qf2"], "both": NETS}[inject]

    def at_injection(run, call, network, optimizer, target):
        name, sample = run.name_of(network), run.buffer.sample(200)
        assert target is run.targets[name]
        assert optimizer is run.optimizer_of(name)
        x = [sample.obs] if name == "actor" else [sample.obs, sample.actions]
        with torch.no_grad():
            before = network(*x), target(*x)
            call()
            for old, new in zip(before, (network(*x), target(*x)), strict=True):
                assert torch.allclose(old, new, atol=1e-5 * max(1, float(old.abs().max())))
        calls.append((run.step, name))
        for net, key in ((network, "online"), (target, "target")):
            frozen[name, key] = copies(net.frozen.buffers())
            first[name, key] = copies(p for layer in layers_of(net) for p in layer.parameters())

    def at_step(run, call, optimizer):
        call()
        for net in (*run.networks.values(), *run.targets.values()):
            assert not any(
                value.requires_grad or value.grad is not None or value in optimizer.state
                for value in net.frozen.buffers()
            )

    run = Run("injection_td3_continuous", monkeypatch, {"inject_": at_injection}, at_step=at_step, inject=inject)
    assert calls == [(200, name) for name in chosen]
    for name in NETS:
        for net, key in ((run.networks[name], "online"), (run.targets[name], "target")):
            assert len(net.frozen) == (2 if name in chosen else 0)
            if name in chosen:
                assert harness.same(copies(net.frozen.buffers()), frozen[name, key])
                h1 = [p for layer in layers_of(net) for p in layer.parameters()]
                assert not any(torch.equal(now, was) for now, was in zip(h1, first[name, key], strict=True))
    logged = harness.events(run.folder)
    assert logged["injection/actor_parts"] == [(200, 2 * ("actor" in chosen))]
    assert logged["injection/critic_parts"] == [(200, 2 * ("qf1" in chosen))]


def test_injections_come_at_the_steps_given(monkeypatch):
    calls = []

    def at_injection(run, call, *rest):
        call()
        calls.append((run.step, run.name_of(rest[0])))

    run = Run("injection_td3_continuous", monkeypatch, around={"inject_": at_injection}, injection_step=(1, 170, 400))
    assert calls == [(step, name) for step in (1, 170, 400) for name in NETS]
    x = noise(50, 3)
    with torch.no_grad():
        assert np.allclose(run.networks["actor"](*x).numpy(), output_of(run.model()["actor"], x), atol=1e-5)


def test_injection_steps_are_read_from_the_command_line():
    assert tyro.cli(INJECTION.Args, args=[]).injection_step == ()
    assert tyro.cli(INJECTION.Args, args=["--injection-step", "100", "200"]).injection_step == (100, 200)


def test_the_agent_of_an_injected_run_can_be_evaluated(monkeypatch, capsys):
    run = Run("injection_td3_continuous", monkeypatch, injection_step=(150, 300))
    capsys.readouterr()
    agents = []

    def at_evaluation(actor, env, episodes, seed):
        agents.append(actor)
        return evaluate(actor, env, episodes, seed)

    evaluate = INJECTION.evaluate
    monkeypatch.setattr(INJECTION, "evaluate", at_evaluation)
    INJECTION.main(INJECTION.Args(evaluate=str(run.folder), eval_episodes=2))
    (agent,), x, state = agents, noise(100, 3), run.model()["actor"]
    assert sum(name.startswith("frozen.3.") for name in state) == 6
    with torch.no_grad():
        assert np.allclose(agent(*x).numpy(), output_of(state, x), atol=1e-5)
    returns = evaluate(run.networks["actor"], INJECTION.make_env("Pendulum-v1"), 2, run.args.seed)
    assert f"mean return {np.mean(returns):.2f}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_takes_a_saved_ones_frozen_parts_with_its_state_dict(kind):
    network, _, optimizer, _ = learned(INJECTION, kind)
    for _ in range(2):
        INJECTION.inject_(network, optimizer)
    several, (fresh, *_) = nn.ModuleDict({"a": network}), learned(INJECTION, kind, seed=1)
    for new, old in ((fresh, network), (nn.ModuleDict({"a": learned(INJECTION, kind, seed=2)[0]}), several)):
        new.load_state_dict(old.state_dict())
        assert harness.same(new.state_dict(), old.state_dict())
        assert not {v.data_ptr() for v in new.state_dict().values()} & {v.data_ptr() for v in old.state_dict().values()}
    x = inputs_of(kind)
    with torch.no_grad():
        assert torch.equal(fresh(*x), network(*x))


# ===== LayerNorm =====


def normalised(state, x):
    """The hidden activations and the raw output of a network with LayerNorm."""
    h, hidden = x, []
    for number in (1, 2):
        z = h @ state[f"fc{number}.weight"].T + state[f"fc{number}.bias"]
        z = (z - z.mean(1, keepdims=True)) / np.sqrt(z.var(1, keepdims=True) + 1e-5)
        h = np.maximum(z * state[f"norm{number}.weight"] + state[f"norm{number}.bias"], 0)
        hidden.append(h)
    return hidden, h @ state["fc3.weight"].T + state["fc3.bias"]


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_layers_are_normalised_before_their_relu_and_the_output_is_not(kind):
    network, *_ = learned(LAYER_NORM, kind)
    with torch.no_grad():
        for norm in (network.norm1, network.norm2):
            norm.weight.add_(torch.randn_like(norm.weight) / 2)
            norm.bias.add_(torch.randn_like(norm.bias))
    x = inputs_of(kind, 100)
    hidden, output = normalised(arrays(network.state_dict()), np.concatenate(x, 1).astype(np.float64))
    with torch.no_grad():
        for own, slow in zip(network.hidden(*x), hidden, strict=True):
            assert np.allclose(own.numpy(), slow, atol=1e-4)
        scale, bias = ((HIGH - LOW) / 2).numpy(), ((HIGH + LOW) / 2).numpy()
        expected = np.tanh(output) * scale + bias if kind == "actor" else output
        assert np.allclose(network(*x).numpy(), expected, atol=1e-4)
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if "norm" in name}
    assert shapes == {f"norm{n}.{part}": (24,) for n in (1, 2) for part in ("weight", "bias")}


def test_layer_norms_gains_and_biases_learn_and_targets_follow(monkeypatch):
    run = Run("layer_norm_td3_continuous", monkeypatch)
    for nets in (run.networks, run.targets):
        for net in nets.values():
            for norm in (net.norm1, net.norm2):
                assert (norm.weight != 1).any()
                assert (norm.bias != 0).any()
    held = [p for o in run.optimizers.values() for group in o.param_groups for p in group["params"]]
    assert len(held) == 3 * 10


def test_layer_norm_starts_with_td3s_linear_layers(monkeypatch):
    plain, own = (
        harness.saved(Run(name, monkeypatch, total_timesteps=2, learning_starts=1).folder / "models/0.pt")
        for name in ("td3_continuous", "layer_norm_td3_continuous")
    )
    for net in plain:
        assert all(torch.equal(value, own[net][name]) for name, value in plain[net].items())


# ===== Masks =====


def erdos_renyi_counts(shapes, density):
    """Connections per layer, the common factor found by bisection."""
    sizes = [rows * columns for rows, columns in shapes]

    def shares(eps):
        return [min(1.0, eps * (rows + columns) / (rows * columns)) for rows, columns in shapes]

    low, high = 0.0, float(sum(sizes))
    for _ in range(200):
        middle = (low + high) / 2
        total = sum(share * size for share, size in zip(shares(middle), sizes, strict=True))
        low, high = (middle, high) if total < density * sum(sizes) else (low, middle)
    return [share * size for share, size in zip(shares(high), sizes, strict=True)]


def assert_absent_is_zero(run):
    """The invariant of masks: weights and Adam's moments are exactly 0 where the mask is False."""
    for name, network in run.networks.items():
        for layer, slow in zip(layers_of(network), layers_of(run.targets[name]), strict=True):
            absent = ~layer.mask
            assert torch.equal(layer.mask, slow.mask)
            for tensor in (layer.weight, slow.weight):
                assert not tensor[absent].any()
            state = run.optimizer_of(name).state.get(layer.weight, {})
            for moment in (state[key] for key in ("exp_avg", "exp_avg_sq") if key in state):
                assert not moment[absent].any()


@pytest.mark.parametrize("density", [0.1, 0.25, 0.7, 1.0])
def test_static_masks_have_erdos_renyi_counts_and_never_change(density, monkeypatch):
    masks = []

    def look(run):
        masks.append({name: copies(layer.mask for layer in layers_of(net)) for name, net in run.networks.items()})
        assert_absent_is_zero(run)

    options = {"density": density, "hidden_dim": 20, "neuron_interval": 100}
    run = Run("static_sparse_td3_continuous", monkeypatch, before_add=look, **options)
    assert_absent_is_zero(run)
    logged = harness.events(run.folder)
    for name, network in run.networks.items():
        layers = layers_of(network)
        counts = [int(layer.mask.sum()) for layer in layers]
        exact = erdos_renyi_counts([tuple(layer.weight.shape) for layer in layers], density)
        assert all(abs(count - share) <= 0.5 + 1e-6 for count, share in zip(counts, exact, strict=True))
        overall = sum(counts) / sum(layer.mask.numel() for layer in layers)
        assert overall == pytest.approx(density, abs=1.5 / sum(layer.mask.numel() for layer in layers))
        assert logged[f"neurons/{name}/density"] == [(step, pytest.approx(overall)) for step in (200, 300, 400)]
        for number, (layer, count) in enumerate(zip(layers, counts, strict=True), start=1):
            assert logged[f"neurons/{name}/density_layer{number}"][0][1] == pytest.approx(count / layer.mask.numel())
        silent = [not bool(layer.mask[:, neuron].any()) for layer in layers[1:] for neuron in range(20)]
        assert logged[f"neurons/{name}/disconnected"][-1][1] == pytest.approx(np.mean(silent))
        assert all(int((layer.weight != 0).sum()) == count for layer, count in zip(layers, counts, strict=True))
    assert len(masks) == 400
    assert all(harness.same(mask, masks[0]) for mask in masks)
    assert harness.same(masks[0], {n: copies(layer.mask for layer in layers_of(t)) for n, t in run.targets.items()})
    critics = [[layer.mask for layer in layers_of(run.networks[name])] for name in ("qf1", "qf2")]
    assert density == 1 or not all(torch.equal(a, b) for a, b in zip(*critics, strict=True))


@pytest.mark.parametrize("script", ["static_sparse_td3_continuous", "rigl_td3_continuous"])
def test_dense_ends_leave_the_first_and_the_last_layer_dense(script, monkeypatch):
    run = Run(script, monkeypatch, dense_ends=True, density=0.3, total_timesteps=300, hidden_dim=20)
    assert_absent_is_zero(run)
    for network in run.networks.values():
        first, between, last = (layer.mask.float().mean() for layer in layers_of(network))
        assert first == last == 1
        assert float(between) == pytest.approx(0.3, abs=1 / 400)


def test_static_sparse_training_at_density_1_is_plain_td3_to_the_bit(monkeypatch):
    plain, own = usual("td3_continuous", monkeypatch), Run("static_sparse_td3_continuous", monkeypatch, density=1.0)
    for net, state in plain.model().items():
        assert all(torch.equal(value, own.model()[net][name]) for name, value in state.items())
    assert plain.returns() == own.returns()


# ===== RigL =====


def expected_moves(weight, mask, gradient, share):
    """Which connections are dropped and which grow, by sorting -> two sets of (row, column)."""
    places = list(itertools.product(*map(range, mask.shape)))
    active, absent = [p for p in places if mask[p]], [p for p in places if not mask[p]]
    k = min(round(share * len(active)), len(absent))
    dropped = sorted(active, key=lambda place: abs(float(weight[place])))[:k]
    grown = sorted(absent, key=lambda place: -abs(float(gradient[place])))[:k]
    return set(dropped), set(grown)


def check_moves(network, target, optimizer, share, call):
    """Asserts, layer by layer, that the call moves what `expected_moves` says -> number of connections moved."""
    layers, before = layers_of(network), []
    for layer in layers:
        weight, mask, gradient = layer.weight.detach().clone(), layer.mask.clone(), layer.weight.grad.clone()
        before.append((weight, mask, copies(moments(optimizer, layer.weight)), layer.bias.detach().clone()))
        before[-1] += (expected_moves(weight, mask, gradient, share), gradient)
    target_before, steps = copies(layer.weight for layer in layers_of(target)), optimizer_steps(optimizer)
    moved, total = call(), 0
    for layer, slow, was_slow, (weight, mask, old, bias, (dropped, grown), _) in zip(
        layers, layers_of(target), target_before, before, strict=True
    ):
        assert not dropped & grown
        assert len(dropped) == len(grown)
        total += len(grown)
        expected = mask.clone()
        for place in dropped:
            expected[place] = False
        for place in grown:
            expected[place] = True
        assert torch.equal(layer.mask, expected)
        assert layer.mask.sum() == mask.sum()
        kept = mask & expected
        assert torch.equal(layer.weight.detach(), torch.where(kept, weight, 0.0))
        for new, was in zip(moments(optimizer, layer.weight), old, strict=True):
            assert torch.equal(new, torch.where(kept, was, 0.0))
        assert torch.equal(layer.bias.detach(), bias)
        assert torch.equal(slow.mask, expected)
        assert torch.equal(slow.weight, torch.where(kept, was_slow, 0.0))
    assert optimizer_steps(optimizer) == steps
    assert moved == total
    return moved


def optimizer_steps(optimizer):
    return [float(state["step"]) for state in optimizer.state.values()]


@pytest.mark.parametrize(("density", "share"), [(0.25, 0.3), (0.8, 0.9), (0.5, 1.0), (0.25, 0.0), (1.0, 0.3)])
@pytest.mark.parametrize("kind", KINDS)
def test_rigl_drops_the_smallest_weights_and_grows_the_largest_gradients(kind, density, share):
    network, target, optimizer, _ = learned(RIGL, kind, density=density)
    x = inputs_of(kind, 200)
    optimizer.zero_grad()
    network(*x).square().mean().backward()
    masks = copies(layer.mask for layer in layers_of(network))
    call = functools.partial(RIGL.drop_and_grow_, network, optimizer, share, target)
    moved = check_moves(network, target, optimizer, share, call)
    assert (moved > 0) == (share > 0 and density < 1)
    counts = [(int(mask.sum()), int((~mask).sum())) for mask in masks]
    assert moved == sum(min(round(share * active), absent) for active, absent in counts)
    if (density, share) == (0.8, 0.9):
        assert moved == sum(absent for _, absent in counts), "as many as are absent, no more"


def test_rigl_updates_a_run_by_its_cosine_and_with_the_dense_gradient(monkeypatch):
    calls, grown = [], {}

    def at_update(run, call, network, optimizer, share, target):
        name = run.name_of(network)
        assert target is run.targets[name]
        assert optimizer is run.optimizer_of(name)
        absent = [layer.weight.grad[~layer.mask] for layer in layers_of(network) if not layer.mask.all()]
        assert absent
        assert any(bool(gradient.any()) for gradient in absent), "the gradient of absent connections must be there"
        masks = copies(layer.mask for layer in layers_of(network))
        moved = [None]

        def moving():
            moved[0] = call()
            return moved[0]

        check_moves(network, target, optimizer, share, moving)
        grown[name] = [
            layer.mask & ~mask & (layer.weight.grad != 0) for layer, mask in zip(layers_of(network), masks, strict=True)
        ]
        calls.append((run.t, name, share, moved[0]))
        return moved[0]

    def at_step(run, call, optimizer):
        call()
        for name in ["actor"] if optimizer is run.optimizers["actor"] else ["qf1", "qf2"]:
            for layer, mask in zip(layers_of(run.networks[name]), grown.pop(name, []), strict=False):
                assert layer.weight[mask].all(), "a grown connection takes part in that step already"

    around = {"drop_and_grow_": at_update}
    run = Run("rigl_td3_continuous", monkeypatch, around, assert_absent_is_zero, at_step, rigl_interval=60)
    assert_absent_is_zero(run)
    expected = [(t, name) for t in (60, 120, 180, 240, 300) for name in ("qf1", "qf2", "actor")]
    assert [call[:2] for call in calls] == expected
    for t, _, share, _ in calls:
        assert share == pytest.approx(0.15 * (1 + math.cos(math.pi * t / 300)), abs=1e-12)
    assert not grown
    assert all(moved > 0 for t, _, _, moved in calls if t < 240)
    assert [moved for t, _, _, moved in calls if t == 300] == [0, 0, 0]
    logged = harness.events(run.folder)
    for net in NETS:
        assert logged[f"rigl/{net}/moved"] == [(100 + t, moved) for t, name, _, moved in calls if name == net]
        densities = logged[f"neurons/{net}/density"]
        assert len(densities) == 3
        assert len({value for _, value in densities}) == 1


@pytest.mark.parametrize("replay_ratio", [1, 3])
def test_rigls_cosine_ends_with_the_runs_gradient_steps(replay_ratio, monkeypatch):
    shares = []

    def at_update(run, call, network, optimizer, share, target):
        shares.append(share)
        return call()

    changes = {"total_timesteps": 200, "rigl_interval": 50, "replay_ratio": replay_ratio}
    Run("rigl_td3_continuous", monkeypatch, {"drop_and_grow_": at_update}, **changes)
    parts = 2 * replay_ratio  # two updates in 100 gradient steps
    assert len(shares) == 3 * parts
    assert shares[::3] == pytest.approx([0.15 * (1 + math.cos(math.pi * n / parts)) for n in range(1, parts + 1)])


# ===== Outside of TD3 =====


@pytest.mark.parametrize("script", ["reset", "redo", "injection", "rigl"])
def test_a_method_steps_in_in_supervised_learning_too(script):
    module = SCRIPTS[f"{script}_td3_continuous"]
    torch.manual_seed(0)
    network, generator = module.MLP(6, 24, 4), torch.Generator().manual_seed(0)
    if script == "rigl":
        module.sparse_start_(module.masked_layers(network), 0.4, generator)
        active = module.density(network)
    optimizer, x = torch.optim.Adam(network.parameters(), lr=1e-2), torch.randn(128, 6)
    labels, losses = x[:, :4].argmax(1), []

    def backward():
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        losses.append(loss.item())

    for step in range(60):
        backward()
        if step == 30:
            before, output = copies(network.parameters()), network(x).detach()
            if script == "reset":
                assert network.load_state_dict(module.reset_(network, optimizer)) == ([], [])
                assert not optimizer.state
                backward()
                assert losses[-1] > 1.2, "as at the start"
            elif script == "redo":
                assert module.recycle_dormant_(network, network.hidden(x), optimizer, 0.6, generator) > 0
                backward()
            elif script == "injection":
                module.inject_(network, optimizer)
                assert torch.allclose(network(x), output, atol=1e-5)
                backward()
            else:
                assert module.drop_and_grow_(network, optimizer, 0.3) > 0
                assert module.density(network) == active
            changed = [not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True)]
            assert all(changed[place] for place in (0, 2)), "the weights of a layer"
        for weight, mask in module.absent_connections(network) if script == "rigl" else []:
            weight.grad.mul_(mask)
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert script != "rigl" or all(not layer.weight[~layer.mask].any() for layer in module.masked_layers(network))


# ===== Arguments =====

BAD = [
    ("reset_td3_continuous", "reset_interval", -1),
    ("reset_td3_continuous", "reset_last_layers", 0),
    ("reset_td3_continuous", "reset_last_layers", 4),
    ("redo_td3_continuous", "redo_interval", -1),
    *[("redo_td3_continuous", "redo_tau", value) for value in (-0.1, math.nan, math.inf)],
    *[("injection_td3_continuous", "injection_step", value) for value in ((0,), (-5,), (901,), (100, 5000))],
    *[("static_sparse_td3_continuous", "density", value) for value in (0.0, 2.0, -1.0, math.nan)],
    *[("rigl_td3_continuous", "density", value) for value in (0.0, 2.0, -1.0, math.nan)],
    ("rigl_td3_continuous", "rigl_interval", -2),
    ("rigl_td3_continuous", "rigl_interval", 7),
    *[("rigl_td3_continuous", "rigl_share", value) for value in (-0.1, 1.1, math.nan)],
]


@pytest.mark.parametrize(("script", "name", "value"), BAD)
def test_a_senseless_argument_ends_the_run_with_its_name(script, name, value, capsys):
    values, option = value if isinstance(value, tuple) else (value,), f"--{name.replace('_', '-')}"
    with pytest.raises(ValueError, match=option):
        harness.short_args(script, **{name: value})
    with pytest.raises(SystemExit) as ending:
        tyro.cli(
            SCRIPTS[script].Args, args=["--total-timesteps", "900", "--learning-starts", "9", option, *map(str, values)]
        )
    assert ending.value.code == 2
    assert option in capsys.readouterr().err


def test_what_to_inject_is_one_of_four_words(capsys):
    assert [tyro.cli(INJECTION.Args, args=["--inject", w]).inject for w in ("actor", "none")] == ["actor", "none"]
    with pytest.raises(SystemExit) as ending:
        tyro.cli(INJECTION.Args, args=["--inject", "critics"])
    assert ending.value.code == 2
    assert "actor" in capsys.readouterr().err


OTHER = {  # settings that differ from the method's settings in OFTEN, one own argument at a time
    "reset_td3_continuous": {"reset_interval": 100, "reset_what": "optimizers", "reset_last_layers": 1},
    "redo_td3_continuous": {"redo_interval": 50, "redo_tau": 0.01},
    "injection_td3_continuous": {"inject": "critic", "injection_step": (150,)},
    "layer_norm_td3_continuous": {},
    "static_sparse_td3_continuous": {"density": 0.5, "dense_ends": True},
    "rigl_td3_continuous": {"density": 0.5, "dense_ends": True, "rigl_interval": 50, "rigl_share": 0.6},
}


@pytest.mark.parametrize("script", OTHER)
def test_every_own_argument_changes_something(script, monkeypatch):
    parent = SCRIPTS[harness.PARENT.get(script, "td3_continuous")]
    own = SCRIPTS[script].Args.__dataclass_fields__.keys() - parent.Args.__dataclass_fields__.keys()
    assert own == OTHER[script].keys()
    settings = OFTEN.get(script, {})
    model = usual(script, monkeypatch).model()
    assert not harness.same(model, usual("td3_continuous", monkeypatch).model())
    for name, value in OTHER[script].items():
        changed = Run(script, monkeypatch, **(settings | {name: value})).model()
        assert not harness.same(model, changed), f"{name} changes nothing"


# ===== Whole runs =====


class CutOff(Exception):
    """Stands for the end of a process."""


@pytest.mark.parametrize("script", BASELINES)
def test_a_run_cut_off_after_interventions_and_resumed_is_the_same_to_the_bit(script, monkeypatch):
    whole = usual(script, monkeypatch)

    def cut_off(run):
        if run.step == 270:
            raise CutOff

    with pytest.raises(CutOff):
        Run(script, monkeypatch, before_add=cut_off, checkpoint_interval=200, **OFTEN.get(script, {}))
    folder = max(Path("runs").resolve().iterdir())
    assert folder != whole.folder
    assert harness.saved(folder / "checkpoint.pt")["step"] == 200
    gc.collect()  # of the run that was cut off, which else holds its lock
    for path in folder.glob("events*"):  # else names of one second may sort .10 before .9, the later part first
        path.rename(folder / "events.out.tfevents.0000000001.a.1.0")
    SCRIPTS[script].main(SCRIPTS[script].Args(resume=str(folder)))
    assert harness.same(harness.weights(folder), whole.model())
    ends, logged = (harness.events(path) for path in (whole.folder, folder))
    assert ends.keys() == logged.keys()
    assert all(logged[tag] == ends[tag] for tag in ends if tag != "charts/SPS")


@pytest.mark.parametrize(
    "script", [pytest.param(name, marks=[] if name.startswith("redo") else pytest.mark.slow) for name in BASELINES]
)
def test_every_script_runs_and_resumes_after_a_kill(script):
    values = {"total_timesteps": 1000, "learning_starts": 100, "hidden_dim": 8, "checkpoint_interval": 200}
    values |= OFTEN.get(script, {}) | ({"injection_step": (150, 700)} if script.startswith("injection") else {})
    args = harness.short_args(script, **values)
    whole = SCRIPTS[script].main(args)

    with open("err.txt", "w") as err:
        process = subprocess.Popen(harness.command(script, *harness.flags(args)), stdout=subprocess.DEVNULL, stderr=err)
    while process.poll() is None and {p.parents[1] for p in Path("runs").glob("*/models/[46]00.pt")} <= {whole}:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9, f"the run had ended before it was killed: {Path('err.txt').read_text()}"
    (folder,) = set(Path("runs").iterdir()) - {whole}
    assert not (folder / "models/1000.pt").exists()
    assert 200 <= harness.saved(folder / "checkpoint.pt")["step"] <= 600

    result = harness.run(script, "--resume", folder)
    assert result.returncode == 0, result.stderr
    assert harness.same(harness.weights(folder), harness.weights(whole))
    returns = [harness.events(path)["charts/episodic_return"] for path in (whole, folder)]
    assert returns[0] == returns[1]
    assert [step for step, _ in returns[0]] == [200, 400, 600, 800, 1000]


# What a short run needs: the defaults are for a million steps. Plain TD3 takes 7000 of them, so a reset or an injection
# half-way, which costs a few thousand again, gets 15_000.
SHORT = {
    "reset_td3_continuous": {"total_timesteps": 15_000, "reset_interval": 7500},
    "injection_td3_continuous": {"total_timesteps": 15_000},
    "rigl_td3_continuous": {"rigl_interval": 500},
}


@pytest.mark.slow
@pytest.mark.parametrize("script", OTHER)
def test_the_method_solves_pendulum(script):
    values = {"env_id": "Pendulum-v1", "seed": 1, "total_timesteps": 10_000, "learning_starts": 1000, "cuda": False}
    values |= {"eval_interval": 0, "checkpoint_interval": 0} | SHORT.get(script, {})
    values |= {"growth_interval": 1000} if hasattr(SCRIPTS[script].Args, "growth_interval") else {}  # a variant of NE
    folder = SCRIPTS[script].main(SCRIPTS[script].Args(**values))
    logged = harness.events(folder)
    returns = [value for _, value in logged["charts/episodic_return"]]
    assert len(returns) == values["total_timesteps"] // 200
    assert np.mean(returns[-10:]) > -250
    own = {"reset": "reset/number", "injection": "injection/actor_parts", "redo": "redo/actor_recycled"}
    own |= {"rigl": "rigl/actor/moved"}
    tag = own.get(script.removesuffix("_td3_continuous"))
    assert tag is None or logged[tag]
