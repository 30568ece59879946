"""benchmark/probe.py: which networks it reads, what they fit and how, the measures beside, the command line."""

import itertools
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from harness import MODULES, NE, ROOT, TD3, load_script, same, saved, short_args
from torch import nn

probe = load_script(ROOT / "benchmark" / "probe.py")
PLAIN, SPARSE = "td3_continuous", "ne_td3_continuous"
KINDS = [PLAIN, SPARSE, "rigl_td3_continuous", "injection_td3_continuous", "layer_norm_td3_continuous"]
KINDS += ["crelu_td3_continuous", "spectral_norm_td3_continuous", "two_hot_td3_continuous"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{script: folder of a short run of it on Pendulum-v1}, saved at 0, 200, 400 and 450."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("runs"))
        settings = {"total_timesteps": 450, "learning_starts": 250, "checkpoint_interval": 200, "growth_interval": 20}
        return {name: MODULES[name].main(short_args(name, **settings)).resolve() for name in KINDS}


@pytest.fixture
def quick(monkeypatch):
    """Makes a probe a matter of a second."""
    for name, value in {"STEPS": 4, "DRAWS": 2, "INPUTS": 24, "BATCH": 8, "PLAYED": 40}.items():
        monkeypatch.setattr(probe, name, value)


def some_inputs(n=24):
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 3, generator=generator), torch.randn(n, 1, generator=generator)]


def numbers(state):
    return {name: value.double().numpy() for name, value in state.items()}


def by_hand(script, state, x):
    """A saved network's output, before an actor's tanh or a distribution's softmax: x [n, n_in] -> [n, n_out]."""
    s = numbers(state)

    def layers(prefix, names):
        h = x
        for k, name in enumerate(names):
            if weight := "parametrizations" * (f"{prefix}{name}.weight" not in s):
                raw, u, v = (s[f"{name}.{weight}.weight.{part}"] for part in ("original", "0._u", "0._v"))
                h = h @ (raw / (u @ raw @ v)).T + s[f"{name}.bias"]
            else:
                h = h @ s[f"{prefix}{name}.weight"].T + s[f"{prefix}{name}.bias"]
            if f"norm{k + 1}.weight" in s and k < 2:
                h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
                h = h * s[f"norm{k + 1}.weight"] + s[f"norm{k + 1}.bias"]
            if k < 2:
                h = np.maximum(np.hstack([h, -h]) if script.startswith("crelu") else h, 0)
        return h

    out, part = layers("", ["fc1", "fc2", "fc3"]), 0
    while f"frozen.{part}.0.weight" in s:
        out, part = out + (-1) ** part * layers(f"frozen.{part}.", ["0", "2", "4"]), part + 1
    return out


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[name.removesuffix("_td3_continuous") for name in KINDS])
def test_a_runs_networks_are_those_that_it_saved(runs, kind):
    name, inputs = KINDS[kind], some_inputs()
    run = probe.read_run(runs[name])
    assert list(run.networks) == [0, 200, 400, 450] and run.script.__name__ == name
    for step, networks in run.networks.items():
        states = saved(runs[name] / "models" / f"{step}.pt")
        for network, state in states.items():
            own = inputs[: 1 if network == "actor" else 2]
            expected = by_hand(name, state, torch.cat(own, 1).double().numpy())
            found = probe.output(run.script, networks[network], own).detach()
            if "bins" in state:
                logits = run.script.MLP.forward(networks[network], *own).detach()
                assert torch.equal(found, networks[network].value(logits))
                found = logits
            np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert name != "injection_td3_continuous" or len(run.networks[450]["qf1"].frozen) == 2


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=[name.removesuffix("_td3_continuous") for name in KINDS])
def test_every_network_fits_and_is_left_as_it_was(runs, kind, quick):
    run, inputs = probe.read_run(runs[KINDS[kind]]), some_inputs()
    for name, network in run.networks[450].items():
        own, before = inputs[: 1 if name == "actor" else 2], [v.clone() for v in network.state_dict().values()]
        loss = probe.mean_loss(network, run.script, own, 1e-3, "noise")
        values = probe.measure(run.script, network, own, "noise")
        assert same(before, list(network.state_dict().values()))
        assert 0 < loss < 1e3 and list(values) == probe.MEASURES
        assert math.isnan(values["max_q"]) == (name == "actor") != math.isnan(values["saturated"])
        assert all(np.isfinite(value) for key, value in values.items() if key not in ("max_q", "saturated"))


def test_a_fit_is_adam_on_the_squared_error_that_leaves_absent_connections_at_zero(quick):
    torch.manual_seed(3)
    network, inputs, rate, losses = NE.MLP(4, 6, 2), some_inputs(), 3e-3, []
    NE.sparse_start_(NE.masked_layers(network), 0.5, torch.Generator().manual_seed(0))
    y = torch.randn(24, 2)
    found = probe.fit(NE, network, inputs, y, rate, draw=7)

    names = [f"fc{k}.{what}" for k in (1, 2, 3) for what in ("weight", "bias")]
    p = {name: numbers(network.state_dict())[name].copy() for name in names}
    masks = {name: p[name] != 0 if name.endswith("weight") else True for name in names}
    first, second = ({name: np.zeros_like(v) for name, v in p.items()} for _ in range(2))
    x, y, generator = torch.cat(inputs, 1).double().numpy(), y.double().numpy(), torch.Generator().manual_seed(7)
    for t in range(1, probe.STEPS + 1):
        batch = torch.randperm(24, generator=generator)[: probe.BATCH].numpy()
        h = [x[batch]]
        for k in (1, 2):
            h.append(np.maximum(h[-1] @ p[f"fc{k}.weight"].T + p[f"fc{k}.bias"], 0))
        error = h[2] @ p["fc3.weight"].T + p["fc3.bias"] - y[batch]
        losses.append((error**2).mean())
        back, grads = 2 * error / error.size, {}
        for k in (3, 2, 1):
            grads[f"fc{k}.weight"], grads[f"fc{k}.bias"] = back.T @ h[k - 1], back.sum(0)
            back = back @ p[f"fc{k}.weight"] * (h[k - 1] > 0)
        for name in names:
            g = grads[name] * masks[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g**2
            p[name] -= rate * first[name] / (1 - 0.9**t) / (np.sqrt(second[name] / (1 - 0.999**t)) + 1e-8)
    assert len(set(losses)) == probe.STEPS and found == pytest.approx(np.mean(losses), rel=1e-4)


def test_targets_are_the_output_with_noise_or_a_wild_function_the_same_draw_for_all():
    inputs, present = some_inputs(512), torch.linspace(-9, 40, 512)[:, None]
    noise = [probe.new_targets("noise", present, inputs, draw) - present for draw in (0, 1)]
    assert torch.allclose(noise[0], probe.new_targets("noise", 0 * present, inputs, 0), atol=1e-5)
    assert not torch.allclose(*noise) and all(abs(n.mean()) < 0.15 and abs(n.std() - 1) < 0.1 for n in noise)
    sine = probe.new_targets("sine", present, inputs, 0)
    assert torch.equal(sine, probe.new_targets("sine", present.flip(0), inputs, 0))  # of the output, the mean alone
    torch.manual_seed(0)
    f = TD3.MLP(4, 256, 1)(*inputs).detach()
    assert torch.allclose(sine, 15.5 + torch.sin(1e5 * f), atol=1e-4)
    assert abs((sine - 15.5).std() - 0.5**0.5) < 0.1


@pytest.mark.parametrize("name", ["actor", "qf1"])
def test_the_more_neurons_are_silenced_the_larger_the_measure(name, monkeypatch):
    monkeypatch.setattr(probe, "STEPS", 150)
    torch.manual_seed(1)
    network = TD3.Actor(3, -torch.ones(1), torch.ones(1), 128) if name == "actor" else TD3.MLP(4, 128, 1)
    inputs, measures = some_inputs(256)[: 1 if name == "actor" else 2], []
    order = torch.randperm(128)
    for share in (0, 0.5, 0.9):
        with torch.no_grad():
            for layer in (network.fc1, network.fc2):
                silent = order[: int(share * 128)]
                layer.weight[silent], layer.bias[silent] = 0, -1
        values = probe.measure(TD3, network, inputs, "noise")
        assert values["dormant"] >= int(share * 128) / 128
        measures.append(probe.mean_loss(network, TD3, inputs, 1e-3, "noise"))
    assert measures[0] < 0.97 * measures[1] < 0.97**2 * measures[2]


def test_the_measures_beside_agree_with_their_definitions(monkeypatch):
    torch.manual_seed(2)
    network, inputs = NE.MLP(4, 5, 1), some_inputs(40)
    NE.sparse_start_(NE.masked_layers(network), 0.6, torch.Generator().manual_seed(1))
    y = probe.new_targets("noise", network(*inputs).detach(), inputs, 0)
    values = probe.measure(NE, network, inputs, "noise")
    parameters = dict(network.named_parameters())
    active = torch.cat([(p != 0).flatten() for p in parameters.values()])  # biases are never 0

    def loss(flat, x, y):
        parts = flat.split([p.numel() for p in parameters.values()])
        state = {k: part.view(p.shape) for (k, p), part in zip(parameters.items(), parts, strict=True)}
        return F.mse_loss(torch.func.functional_call(network, state, (x,)), y)

    x, flat = torch.cat(inputs, 1), torch.cat([p.detach().flatten() for p in parameters.values()])
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, x, y), flat)[active][:, active]
    assert values["hessian"] == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=0.02)
    jacobian = torch.autograd.functional.jacobian
    g = torch.stack([jacobian(lambda w, k=k: loss(w, x[[k]], y[[k]]), flat) for k in range(20)])[:, active].numpy()
    cosines = np.abs(g @ g.T) / np.outer(*[np.linalg.norm(g, axis=1)] * 2)
    assert values["gradient_cosine"] == pytest.approx(cosines[~np.eye(20, dtype=bool)].mean(), rel=1e-3)
    h = network.hidden(*inputs)[-1].detach().numpy()
    p = np.linalg.svd(h, compute_uv=False)
    p = p[p > 1e-6 * p.max()] / p.sum()
    assert values["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)
    weights = [v.detach().numpy() for k, v in parameters.items() if k.endswith("weight")]
    assert values["weight_norm"] == pytest.approx(math.sqrt(sum((w**2).sum() for w in weights)), rel=1e-5)
    assert values["max_q"] == pytest.approx(network(*inputs).abs().max().item())
    actor = TD3.Actor(3, -torch.ones(2), torch.ones(2), 5)
    with torch.no_grad():
        actor.fc3.weight.zero_()
        actor.fc3.bias.copy_(torch.tensor([2.2, 1.9]))  # tanh: 0.976, 0.956
    assert probe.measure(TD3, actor, inputs[:1], "noise")["saturated"] == 0.5


def test_inputs_are_as_in_training_and_the_same_for_all_runs_of_a_task(runs, monkeypatch):
    monkeypatch.setattr(probe, "PLAYED", 400)
    pair = [probe.read_run(runs[name]) for name in (PLAIN, SPARSE)]
    rows = [probe.play(run, number) for number, run in enumerate(pair)]
    assert torch.equal(rows[0], probe.play(pair[0], 0)) and rows[0].shape == (400, 4)
    assert torch.allclose(rows[0][:, :2].norm(dim=1), torch.ones(400), atol=1e-5)  # Pendulum: cosine and sine
    at_random, acted = rows[0][:200, 3], rows[0][300:]  # saved at 0, 200 (before learning starts), 400 and 450
    assert 0.95 < at_random.std() / (4 / 12**0.5) < 1.05
    with torch.no_grad():
        noise = acted[:, 3] - pair[0].networks[450]["actor"](acted[:, :3])[:, 0]
    assert 0.15 < noise[acted[:, 3].abs() < 1.9].std() < 0.25  # 0.1 of the half range, 2
    obs, actions = probe.task_inputs(pair)
    drawn = torch.cat([obs, actions], 1)
    own = [[any(torch.equal(row, other) for other in part) for row in drawn] for part in rows]
    assert drawn.shape == (512, 4) and 200 < sum(own[0]) < 312 and sum(own[0]) + sum(own[1]) == 512
    assert len(drawn.unique(dim=0)) == 512


def test_fresh_networks_start_as_their_script_starts_them(runs):
    for name in KINDS:
        run = probe.read_run(runs[name])
        start, found = run.networks[0], probe.fresh(run)
        for key, network in found.items():
            state, other = network.state_dict(), start[key].state_dict()
            assert state.keys() == other.keys()
            for part in state:
                if part.endswith("weight") and "norm" not in part:
                    assert int((state[part] != 0).sum()) == int((other[part] != 0).sum())
            assert not same(list(state.values()), list(other.values()))
    run = probe.read_run(runs[SPARSE])
    assert all(run.script.density(network) == 1 for network in probe.fresh(run, dense=True).values())


def test_a_step_stands_for_the_checkpoint_that_waited_for_its_episode(runs):
    run = probe.read_run(runs[PLAIN])
    run.networks = dict.fromkeys([0, 217, 350, 405, 450])  # 350: stopped by hand
    assert run.marks == {0: 0, 217: 200, 350: 350, 405: 400, 450: 450}
    assert run.chosen([400]) == [0, 405] and run.chosen(None) == list(run.networks)


def test_rows_stand_beside_fresh_networks_the_first_step_and_another_run(runs, quick, tmp_path, capsys):
    out = tmp_path / "out"
    words = [str(runs[PLAIN]), "--against", str(runs[SPARSE]), "--steps", "400", "--out", str(out)]
    probe.main(words)
    table = pd.read_csv(out / "probe.csv")
    assert list(table) == probe.COLUMNS and len(table) == 2 * 3 * 2
    table = table.set_index(["method", "step", "network"])
    for name in ("actor", "qf1", "qf2"):
        for step in (0, 400):
            plain, sparse = table.loc[PLAIN, step, name], table.loc[SPARSE, step, name]
            assert plain["first_loss"] == table.loc[PLAIN, 0, name]["loss"]
            assert plain["against_loss"] == sparse["loss"] != plain["loss"]
            assert math.isnan(plain["fresh_dense_loss"]) and sparse["fresh_dense_loss"] != sparse["fresh_loss"]
    # one network computed apart
    pair = [probe.read_run(runs[name]) for name in (SPARSE, PLAIN)]
    lines, text = capsys.readouterr().out, (out / "report.md").read_text()
    inputs = probe.task_inputs(pair[::-1])
    network = pair[1].networks[400]["qf1"]
    loss = probe.mean_loss(network, pair[1].script, inputs, pair[1].args.learning_rate, "noise")
    assert table.loc[PLAIN, 400, "qf1"]["loss"] == pytest.approx(loss, rel=1e-4)
    critics = table.sort_index().loc[PLAIN, 400].loc[["qf1", "qf2"], ["loss", "fresh_loss"]].mean()
    row = [line for line in text.splitlines() if line.startswith(f"| `{PLAIN}` | 400")][1]
    assert f"| {critics['loss']:.3g} | {critics['loss'] / critics['fresh_loss']:.3g} |" in row
    assert text in lines and (out / "probe_Pendulum-v1.png").exists()
    (out / "report.md").unlink()
    probe.main(["--report", "--out", str(out)])
    assert (out / "report.md").read_text() == text


def test_the_short_table_has_each_runs_last_loss_over_a_fresh_dense_network(tmp_path):
    row, rows = dict.fromkeys(probe.COLUMNS, math.nan) | {"task": "A-v0", "targets": "noise"}, []
    for method, seed, dense in [("ne", 1, 0.5), ("ne", 2, 0.7), ("td3", 1, math.nan)]:
        for network, step in itertools.product(("actor", "qf1", "qf2"), (0, 90)):
            own = {"method": method, "run": f"{method}{seed}", "seed": seed, "step": step, "at": step}
            own |= {"network": network, "fresh_loss": 2.0, "fresh_dense_loss": dense, "dormant": 0.1 * seed}
            own |= {"loss": (seed if network == "actor" else 10 * seed + int(network[-1])) + (step == 0) * 1000}
            rows.append(row | own | {"saturated": 0.25 if network == "actor" else math.nan})
    pd.DataFrame(rows).to_csv(tmp_path / "probe.csv", index=False)
    ne, td3 = probe.short_table(tmp_path).splitlines()[2:]
    assert ne == f"| `ne` | 11.5, 21.5 | {33 / 1.2:.3g} | 0.15 | 1, 2 | {3 / 1.2:.3g} | 0.15 | 0.25 |"
    assert td3 == "| `td3` | 11.5 | 5.75 | 0.1 | 1 | 0.5 | 0.1 | 0.25 |"


@pytest.mark.parametrize("name", probe.PAGES)
def test_the_committed_report_and_the_pages_table_are_those_of_the_committed_networks(name, tmp_path, capsys):
    again, page = tmp_path / "again", ROOT / "benchmark" / probe.PAGES[name]
    again.mkdir()
    shutil.copy(probe.RESULTS / name / "probe.csv", again)
    probe.main(["--report", "--out", str(again)])
    assert (again / "report.md").read_text() == (probe.RESULTS / name / "report.md").read_text(), "run with --report"
    shutil.copy(page, again)
    probe.put_on_page(name, probe.short_table(again), again / page.name)
    assert (again / page.name).read_text() == page.read_text(), "run with --report"


def test_an_interruption_keeps_what_was_probed(runs, quick, monkeypatch, capsys):
    measured, measure = [], probe.measure

    def interrupted(*args):
        measured.append(args)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(probe, "measure", interrupted)
    with pytest.raises(SystemExit) as end:
        probe.main([str(runs[PLAIN]), "--out", "out"])
    assert end.value.code == 130 and len(pd.read_csv("out/probe.csv")) == 2


def bad(name, runs, folder):
    """Makes a bad command line -> its words."""
    shutil.copytree(runs[PLAIN], folder)
    if name == "no models":
        shutil.rmtree(folder / "models")
    elif name == "damaged model":
        (folder / "models" / "200.pt").write_bytes(b"PK")
    elif name == "odd args":
        (folder / "args.json").write_text("[]")
    elif name == "other widths":
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"hidden_dim": 31}))
    elif name == "other task":
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"env_id": "Toy"}))
    elif name == "other script":
        checkpoint = saved(folder / "checkpoint.pt")
        torch.save(checkpoint | {"run": "td3_cycling{}"}, folder / "checkpoint.pt")
    elif name == "no script":
        (folder / "checkpoint.pt").unlink()
    return {
        "not a run": ["."],
        "nothing": [],
        "step": [str(folder), "--steps", "77"],
        "report": ["--report", "--out", "nowhere"],
        "run and report": [str(folder), "--report"],
    }.get(name, [str(folder)])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not a run", "not the folder of a run"),
        ("no models", "no saved network"),
        ("damaged model", "damaged"),
        ("odd args", "damaged"),
        ("other widths", "size mismatch"),
        ("other task", "Toy"),
        ("other script", "td3_cycling"),
        ("no script", "its name does not say"),
        ("nothing", "folders of runs"),
        ("run and report", "folders of runs"),
        ("step", "--steps 77: not saved by"),
        ("report", "cannot be read"),
    ],
)
def test_bad_input_ends_with_one_line(name, message, runs, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        probe.main(bad(name, runs, tmp_path / "copy"))
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0] and not (tmp_path / "runs").exists()


def test_runs_of_two_tasks_have_nothing_against_each_other(runs, monkeypatch, capsys):
    monkeypatch.chdir(runs[PLAIN].parent.parent)
    other = TD3.main(short_args(PLAIN, env_id="MountainCarContinuous-v0", total_timesteps=2, learning_starts=1))
    with pytest.raises(SystemExit) as end:
        probe.main([str(runs[PLAIN]), "--against", str(other)])
    lines = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and "all runs must be of one task" in lines[-1]


def test_a_run_without_its_checkpoint_is_known_by_its_name(runs, tmp_path):
    folder = tmp_path / runs[SPARSE].name
    shutil.copytree(runs[SPARSE], folder)
    (folder / "checkpoint.pt").unlink()
    assert probe.read_run(folder).script.__name__ == SPARSE
    assert isinstance(probe.read_run(folder).networks[0]["actor"], nn.Module)
