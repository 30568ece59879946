"""Measures the plasticity of saved runs: each saved network of a run is copied and fits new targets in 500 steps.

    python benchmark/probe.py runs/RUN_FOLDER                                  # over all its saved steps
    python benchmark/probe.py runs/HalfCheetah-v4__*/runs/*                    # of a sweep: means of each method
    python benchmark/probe.py runs/RUN_FOLDER --against runs/OTHER_FOLDER      # beside the same steps of another run
    python benchmark/probe.py --report                                         # report again, from probe.csv alone

Runs are those of the scripts for one task with states. The measure is the mean loss over the 500 steps: the lower, the
more plastic. A network that fits nothing has about 1, the variance of the targets around its output.
"""

import argparse
import copy
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

matplotlib.use("Agg")
sys.path.append(str(Path(__file__).resolve().parent))
import matplotlib.pyplot as plt
import report as reports
from random_labels import ROOT, TD3, effective_rank, fail, hessian_eigenvalue, load_script, markdown, put_on_page

RESULTS = ROOT / "benchmark" / "results"
PAGES = {"probe": "plasticity.md", "probe_1m": "million_steps.md"}  # folder of results: the page that shows its table

INPUTS, DRAWS, BATCH, STEPS = 512, 3, 256, 500
PLAYED = 2000  # environment steps of a run that the inputs are drawn from
SATURATED = 0.97  # |tanh| from which an action counts as saturated
MEASURES = ["hessian", "gradient_cosine", "effective_rank", "weight_norm", "dormant", "fau", "max_q", "saturated"]
BESIDE = ["fresh", "fresh_dense", "first", "against"]  # networks whose loss stands beside
KEYS = ["task", "method", "run", "seed", "step", "at", "network", "targets"]
COLUMNS = [*KEYS, "loss", *(f"{name}_loss" for name in BESIDE), *MEASURES]


# ===== A run =====


@dataclasses.dataclass
class Run:
    folder: Path
    script: ModuleType
    args: object  # the script's Args
    env: object
    networks: dict  # {step: {"actor", "qf1", "qf2": network}}, by rising step
    method: str = ""

    @property
    def marks(self):
        """{saved step: the multiple of the checkpoint interval it stands for}; checkpoints wait for an episode."""
        interval, marks = self.args.checkpoint_interval or self.args.total_timesteps, {}
        for step in self.networks:
            mark = step // interval * interval
            marks[step] = step if mark in marks.values() else mark
        return marks

    def chosen(self, steps):
        """The saved steps that are probed: the earliest, and those of `steps` or, without any, all -> list."""
        first = next(iter(self.networks))
        return [step for step, mark in self.marks.items() if not steps or step == first or {step, mark} & set(steps)]


def build(script, args, env, spectral):
    """A run's networks, as its script's main makes them -> {name: network}; spectral: critics have a spectral norm."""
    obs_dim, space = env.observation_space.shape[0], env.action_space
    low, high = torch.tensor(np.stack([space.low, space.high]), dtype=torch.float32)  # [action_dim] each
    networks = {"actor": script.Actor(obs_dim, low, high, args.hidden_dim)}
    for name in ("qf1", "qf2"):
        of = obs_dim + len(low), args.hidden_dim
        two_hot = hasattr(script, "TwoHotCritic")
        networks[name] = (
            script.TwoHotCritic(*of, args.two_hot_bins, args.two_hot_limit) if two_hot else script.MLP(*of, 1)
        )
        if spectral:
            nn.utils.parametrizations.spectral_norm(networks[name].fc2)
    return {name: network.eval() for name, network in networks.items()}


def fresh(run, dense=False):
    """Networks that a run of the same script could have started with, of another seed -> {name: network}."""
    spectral = any(hasattr(nets["qf1"].fc2, "parametrizations") for nets in run.networks.values())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(10_000 + run.args.seed)
        networks = build(run.script, run.args, run.env, spectral)
    if hasattr(run.script, "sparse_start_") and not dense:
        generator = torch.Generator().manual_seed(10_000 + run.args.seed)
        density = run.args.initial_density if hasattr(run.args, "initial_density") else run.args.density
        for network in networks.values():
            run.script.sparse_start_(run.script.masked_layers(network), density, generator, run.args.dense_ends)
    return networks


def script_name(folder):
    """A run's script: its checkpoint begins with it; without a checkpoint, what the folder's name says."""
    if (folder / "checkpoint.pt").exists():  # mmap: the replay need not be read
        checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True, mmap=True)
        return checkpoint["run"].partition("{")[0]
    name = re.fullmatch(r".+__(\w+?)__\d+__\d+", folder.resolve().name)
    return (
        name[1] if name else fail(f"{folder}: it has no checkpoint.pt, and its name does not say which script it is of")
    )


def read_run(folder):
    """A run's folder -> Run; ends the process if it is none, or of a script with other networks."""
    if not (folder / "args.json").is_file():
        fail(f"{folder}: not the folder of a run, it has no args.json")
    files = {int(path.stem): path for path in (folder / "models").glob("*.pt") if path.stem.isdigit()}
    if not files:
        fail(f"{folder}: there is no saved network in its models/")
    try:
        name, networks = script_name(folder), {}
        paths = [path for path in (f"{name}.py", f"baselines/{name}.py") if (ROOT / path).is_file()]
        if not paths or not name.endswith("td3_continuous"):
            fail(f"{folder}: a run of {name}; runs of this repository's *td3_continuous.py can be probed")
        script = load_script(paths[0])
        args = script.Args(**json.loads((folder / "args.json").read_text()))
        env = script.make_env(args.env_id)
        for step in sorted(files):
            states = torch.load(files[step], map_location="cpu", weights_only=True)
            networks[step] = build(script, args, env, any("parametrizations" in key for key in states["qf1"]))
            for name, network in networks[step].items():
                network.load_state_dict(states[name])
    except Exception as error:  # whatever a damaged file raises
        fail(f"{folder}: damaged, or not of this version of its script: {type(error).__name__}: {error}")
    return Run(folder, script, args, env, networks)


def play(run, number):
    """Observations and actions of a run -> tensor [about PLAYED, obs_dim + action_dim].

    Each saved actor has an equal part and acts as in training: at random before learning starts, then with exploration
    noise. So the rows resemble a replay buffer's, which a finished run has no more. Seeded by run.args.seed and number.
    """
    rng, space, rows = np.random.default_rng([run.args.seed, number]), run.env.action_space, []
    for step, networks in run.networks.items():
        actor, done = networks["actor"], True
        for _ in range(math.ceil(PLAYED / len(run.networks))):
            if done:
                obs, _ = run.env.reset(seed=int(rng.integers(2**31 - 1)))
            if step <= run.args.learning_starts:
                action = rng.uniform(space.low, space.high)
            else:
                with torch.no_grad():
                    action = actor(torch.from_numpy(obs)[None])[0].numpy()
                action = action + run.args.exploration_noise * (space.high - space.low) / 2 * rng.normal(
                    size=len(action)
                )
            action = np.clip(action.astype(space.dtype), space.low, space.high)
            rows.append(np.concatenate([obs, action]))
            obs, _, terminated, truncated, _ = run.env.step(action)
            done = terminated or truncated
    return torch.tensor(np.array(rows), dtype=torch.float32)


def task_inputs(runs):
    """The inputs of all networks of runs of one task -> observations [INPUTS, obs_dim], actions [INPUTS, action_dim].

    The same for all runs, a part of each: with inputs of its own, a run that sees little would have a harder task, and
    with those of one run that one would be at home.
    """
    rows = torch.cat([play(run, number) for number, run in enumerate(runs)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:INPUTS]]
    return rows.split([rows.shape[1] - len(runs[0].env.action_space.low), len(runs[0].env.action_space.low)], 1)


# ===== The probe =====


def output(script, network, inputs):
    """What is fitted -> [n, n_out]: a critic's value; an actor's output before its tanh.

    Behind the tanh most targets could not be reached, and a saturated unit not moved: the probe would measure the
    saturation, which has a column of its own, and not the network.
    """
    return script.MLP.forward(network, *inputs) if isinstance(network, script.Actor) else network(*inputs)


def losses(script, network, inputs, y):
    """Loss that the fit descends, and squared error that is measured, for targets y [n, n_out] -> two tensors [].

    They are the same but for two-hot critics, which descend their cross-entropy: the squared error of bins that span
    millions blows up (mean loss of a fresh one: 2e8).
    """
    if hasattr(network, "bins"):
        logits = script.MLP.forward(network, *inputs)
        return network.loss(logits, y.squeeze(1)), F.mse_loss(network.value(logits), y)
    error = F.mse_loss(output(script, network, inputs), y)
    return error, error


def new_targets(kind, present, inputs, draw):
    """Targets for an output `present` [n, n_out], the same draw for all networks -> [n, n_out].

    noise: the output + N(0, 1). sine (Lyle et al. 2023): its mean over the inputs + sin(1e5 f(x)), f a fresh network;
    there a network must unlearn its own output too, so that the loss grows with that output's spread.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw)
        if kind == "noise":
            return present + torch.randn(present.shape)
        f = load_script(TD3).MLP(sum(x.shape[1] for x in inputs), 256, present.shape[1])
        return present.mean(0) + torch.sin(1e5 * f(*inputs).detach())


def absent_connections(script, network):
    """(weight, float mask) of each layer with absent connections; none for scripts without masks."""
    return script.absent_connections(network) if hasattr(script, "absent_connections") else []


def fit(script, network, inputs, y, learning_rate, draw):
    """Mean squared error over STEPS steps of Adam, each before its step, on batches of a copy's inputs -> float."""
    network = copy.deepcopy(network).train()  # spectral norm: a pass is a power iteration, as in training
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, fused=True)
    absent, generator = absent_connections(script, network), torch.Generator().manual_seed(draw)
    total = 0.0
    for _ in range(STEPS):
        batch = torch.randperm(len(y), generator=generator)[:BATCH]
        loss, error = losses(script, network, [x[batch] for x in inputs], y[batch])
        optimizer.zero_grad()
        loss.backward()
        for weight, mask in absent:
            weight.grad.mul_(mask)
        optimizer.step()
        total += float(error.detach())
    return total / STEPS


def mean_loss(network, script, inputs, learning_rate, kind):
    """The measure: mean of `fit` over DRAWS draws of targets -> float."""
    present = output(script, network, inputs).detach()
    ys = [new_targets(kind, present, inputs, draw) for draw in range(DRAWS)]
    return float(np.mean([fit(script, network, inputs, y, learning_rate, draw) for draw, y in enumerate(ys)]))


def gradient_cosine(script, network, inputs, y, masks):
    """Mean |cosine| between the gradients of two inputs' losses -> float; absolute, as noise draws the signs."""
    parameters, rows = list(network.parameters()), []
    for k in range(len(y)):
        loss, _ = losses(script, network, [x[k : k + 1] for x in inputs], y[k : k + 1])
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([(g if m is None else g * m).flatten() for g, m in zip(grads, masks, strict=True)]))
    rows = F.normalize(torch.stack(rows))
    gram = (rows @ rows.T).abs()
    return float((gram.sum() - gram.trace()) / (len(y) * (len(y) - 1)))


def measure(script, network, inputs, kind):
    """What stands beside the measure -> {name of MEASURES: float}; the loss: of the first draw, before a step."""
    hidden, present = [h.detach() for h in network.hidden(*inputs)], output(script, network, inputs).detach()
    y = new_targets(kind, present, inputs, 0)
    parameters, mask_of = list(network.parameters()), {id(w): mask for w, mask in absent_connections(script, network)}
    masks = [mask_of.get(id(parameter)) for parameter in parameters]
    neurons = script.neuron_statistics(hidden)
    actor = isinstance(network, script.Actor)
    half = [x[: len(y) // 2] for x in inputs], y[: len(y) // 2]  # of the inputs, for the gradients: memory
    return {
        "hessian": hessian_eigenvalue(losses(script, network, inputs, y)[0], parameters, masks),
        "gradient_cosine": gradient_cosine(script, network, *half, masks),
        "effective_rank": effective_rank(hidden[-1]),
        "weight_norm": math.hypot(*(float(l.weight.detach().norm()) for l in (network.fc1, network.fc2, network.fc3))),
        "dormant": neurons["dormant_ratio_0.1"],
        "fau": neurons["fau"],
        "max_q": math.nan if actor else float(present.abs().max()),
        "saturated": float((present.tanh().abs() > SATURATED).float().mean()) if actor else math.nan,
    }


def probe(runs, against, steps, kind, keep):
    """Probes the runs of one task, `against` (None, or one of them) first, and gives each row of COLUMNS to `keep`.

    steps: the saved steps that are probed besides the earliest, or None for all.
    """
    inputs, loss_against = task_inputs(runs), {}  # {(mark, network): loss}
    for run in sorted(runs, key=lambda run: run is not against):
        starts = {"fresh": fresh(run)}
        if hasattr(run.script, "sparse_start_"):
            starts["fresh_dense"] = fresh(run, dense=True)
        for name in starts["fresh"]:
            own = run.script, inputs[: 1 if name == "actor" else 2], run.args.learning_rate, kind
            beside = {start: mean_loss(networks[name], *own) for start, networks in starts.items()}
            for step in run.chosen(steps):
                mark, network = run.marks[step], run.networks[step][name]
                loss = mean_loss(network, *own)
                beside.setdefault("first", loss)
                if run is against:
                    loss_against[mark, name] = loss
                values = beside | {"against": loss_against.get((mark, name), math.nan)}
                row = [run.args.env_id, run.method, run.folder.name, run.args.seed, step, mark, name, kind]
                row = dict(zip(KEYS, row, strict=True)) | {f"{key}_loss": value for key, value in values.items()}
                keep(row | {"loss": loss} | measure(run.script, network, own[1], kind))


# ===== The report, from the CSV alone =====


def number(value):
    return "" if math.isnan(value) else f"{value:.3g}"


def draw(table, file):
    """A task's measures over the steps, a panel each: thin lines are single runs, thick ones the mean of a method."""
    figure, panels = plt.subplots(4, 4, figsize=(17, 13), sharex=True, layout="constrained")
    for rows, (part, own) in zip((panels[:2], panels[2:]), table.groupby("part"), strict=False):
        left = "saturated" if part == "actor" else "max_q"
        names = ["loss", *MEASURES[:6], left]
        for panel, name in zip(rows.flat, names, strict=True):
            for k, (method, of_method) in enumerate(own.groupby("method")):
                for _, one in of_method.groupby("run"):
                    panel.plot(one["at"], one[name], color=f"C{k}", alpha=0.35, linewidth=0.8)
                mean = of_method.groupby("at")[name].mean()
                panel.plot(mean, color=f"C{k}", linewidth=2, marker=".", label=method)
                if name == "loss":
                    panel.axhline(of_method["fresh_loss"].mean(), color=f"C{k}", linestyle=":")
            panel.set_title(f"{part}: {name}")
            if name in ("loss", "hessian", "max_q", "weight_norm"):
                panel.set_yscale("log" if (own[name] > 0).all() else "symlog")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    for panel in panels[-1]:
        panel.set_xlabel("environment steps")
    figure.suptitle(f"{table['task'].iloc[0]}: mean loss while new targets are fitted; dotted: of a fresh network")
    figure.savefig(file, dpi=80)
    plt.close(figure)


def read_table(folder):
    """probe.csv of a folder -> its table, a run's two critics as one, and which targets were fitted."""
    try:
        table = pd.read_csv(folder / "probe.csv")
        if missing := [name for name in COLUMNS if name not in table]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        if table.empty:
            raise ValueError("it has no rows")
    except (OSError, ValueError) as error:
        fail(f"{folder / 'probe.csv'} cannot be read: {error}")
    table["part"] = table["network"].where(table["network"] == "actor", "critics")
    means = table.groupby(["task", "part", "method", "run", "at"])[COLUMNS[len(KEYS) :]].mean()
    return means.reset_index(), table["targets"].iloc[0]


def short_table(folder):
    """The last saved step of each method, for a page: each run's loss and what stands beside -> Markdown."""
    table, _ = read_table(folder)
    table, rows = table[table["at"] == table["at"].max()], []
    for method, own in table.groupby("method"):
        rows.append([f"`{method}`"])
        for part in ("critics", "actor"):
            runs = own[own["part"] == part]
            fresh = runs["fresh_dense_loss"].fillna(runs["fresh_loss"])  # a script without a sparse start has one
            over = number(runs["loss"].mean() / fresh.mean())
            rows[-1] += [", ".join(map(number, runs["loss"])), over, number(runs["dormant"].mean())]
        rows[-1].append(number(runs["saturated"].mean()))
    columns = [f"{part}: {name}" for part in ("critics", "actor") for name in ("loss of each run", "/fresh", "dormant")]
    return markdown(["method", *columns, "saturated"], rows)


def report(folder):
    """Writes report.md and a picture for each task from probe.csv -> the text."""
    table, kind = read_table(folder)
    numbers = COLUMNS[len(KEYS) :]
    what = {"noise": "its own output + N(0, 1)", "sine": "its mean output + sin(1e5 f(x)), f a fresh network"}[kind]
    text = [
        "# Probe",
        f"Each saved network fits {what}, on {INPUTS} inputs; loss: mean squared error over {STEPS} steps of Adam with "
        f"the run's learning rate, batches of {BATCH}, {DRAWS} draws. The inputs are the same for all networks of a "
        f"task: {PLAYED} environment steps of each run, an equal part by each saved actor as it acted in training, "
        "seeded. /fresh: over the loss of a fresh network of the script (dense: without its sparse start), /first: of "
        "the run's earliest saved step, /against: of the same step of the run given. Means over runs; of the critics, "
        "over both. Hessian and gradient cosine (absolute): of the loss before the first step. max_q: largest |Q| on "
        f"the inputs; saturated: share of actions with |tanh| > {SATURATED}.",
    ]
    head = ["method", "step", "runs", "loss", *("/" + name.replace("_", " ") for name in BESIDE)]
    head += [name.replace("_", " ") for name in MEASURES]
    for task, of_task in table.groupby("task"):
        for part, own in of_task.groupby("part"):
            rows = []
            for (method, at), group in own.groupby(["method", "at"]):
                mean = group[numbers].mean()
                ratios = [number(mean["loss"] / mean[f"{name}_loss"]) for name in BESIDE]
                cells = [number(mean["loss"]), *ratios, *(number(mean[name]) for name in MEASURES)]
                rows.append([f"`{method}`", str(at), str(len(group)), *cells])
            text += [f"## {task}: {part}", markdown(head, rows)]
        name = "probe_" + re.sub(r"[^\w.-]+", "_", task) + ".png"
        draw(of_task, folder / name)
        text.append(f"![Measures over the steps, {task}]({name})")
    text = "\n\n".join(text) + "\n"
    (folder / "report.md").write_text(text)
    return text


def read_runs(args):
    """The runs of the command line -> ({task: list of Run}, the one of --against or None)."""
    folders = {path.resolve(): path for path in [*args.runs, *([args.against] if args.against else [])]}
    runs = {path: read_run(folder) for path, folder in folders.items()}
    against, tasks = args.against and runs[args.against.resolve()], {}
    for run in runs.values():
        tasks.setdefault(run.args.env_id, []).append(run)
    if against and len(tasks) > 1:
        fail(f"--against {args.against}: all runs must be of one task, these are of {', '.join(tasks)}")
    for run in runs.values():
        saved = [step for pair in run.marks.items() for step in pair]
        if missing := [step for step in args.steps or [] if step not in saved]:
            fail(f"--steps {missing[0]}: not saved by {run.folder}; it has {', '.join(map(str, run.networks))}")
        if against and not set(run.marks.values()) & set(against.marks.values()):
            fail(f"--against {args.against}: it has no saved step in common with {run.folder}")
    named = [
        {
            "task": run.args.env_id,
            "script": run.script.__name__,
            "seed": run.args.seed,
            "own": True,
            "args": {k: v for k, v in vars(run.args).items() if not reports.NOT_THE_METHOD.fullmatch(k)},
        }
        for run in runs.values()
    ]
    reports.name_methods(named)
    for run, name in zip(runs.values(), named, strict=True):
        run.method = name["method"]
    return tasks, against


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs, with models/")
    parser.add_argument("--against", type=Path, metavar="RUN", help="a run whose same steps stand beside")
    parser.add_argument("--steps", nargs="+", type=int, help="saved steps, besides the earliest (default: all)")
    parser.add_argument("--targets", choices=["noise", "sine"], default="noise")
    parser.add_argument("--out", type=Path, default=Path("runs/probe"), help="folder of results (default: runs/probe)")
    parser.add_argument("--report", action="store_true", help="table and pictures again from --out, probe nothing")
    args = parser.parse_args(argv)
    if bool(args.runs) == args.report:
        fail("give the folders of runs, or --report alone")
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    rows = []

    try:
        if args.runs:
            tasks, against = read_runs(args)
            args.out.mkdir(parents=True, exist_ok=True)
            total = 3 * sum(len(run.chosen(args.steps)) for runs in tasks.values() for run in runs)
            with tqdm(total=total, unit=" networks", dynamic_ncols=True) as bar:

                def keep(row):
                    rows.append(row)
                    table = pd.DataFrame(rows).reindex(columns=COLUMNS)
                    table.to_csv(args.out / "probe.csv", index=False, float_format="%.6g")
                    bar.update()

                for runs in tasks.values():
                    probe(runs, against, args.steps, args.targets, keep)
        print(report(args.out))
        for name, page in PAGES.items():
            if args.out.resolve() == RESULTS / name:
                put_on_page(name, short_table(args.out), ROOT / "benchmark" / page)
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    except KeyboardInterrupt:
        print(f"stopped; {args.out / 'probe.csv'} has the {len(rows)} networks that were probed", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
