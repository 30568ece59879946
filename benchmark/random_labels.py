"""Measures plasticity: a network learns images with random labels, then with labels drawn anew, and so on.

    python benchmark/random_labels.py --seeds 3 --methods plain ne layer_norm      # a first look
    python benchmark/random_labels.py                                              # every method, 30 seeds
    python benchmark/random_labels.py --report                                     # tables and pictures from the CSV

Plain networks stop being able to learn; the loss that is left at the end of a task says how far that has gone. The
methods are the scripts' own functions and classes. A start goes on where an earlier one in the same folder was ended.
"""

import argparse
import copy
import dataclasses
import fcntl
import functools
import gzip
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import signal
import sys
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.preprocessing import scale
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrizations
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results" / "random_labels"
CSV, LAST = "runs.csv.gz", 3  # tasks at the end that are averaged
PIXELS, HIDDEN, CLASSES, LEARNING_RATE, DENSITY = 64, 64, 10, 1e-3, 0.25
# interval: gradient steps between two events of the methods that act at intervals
VARIANTS = {
    "mild": {"images": 128, "batch": 32, "steps": 500, "tasks": 30, "interval": 150},
    "severe": {"images": 256, "batch": 64, "steps": 500, "tasks": 40, "interval": 200},
}


# ===== The methods: what is done at which moment =====


@dataclasses.dataclass
class Row:
    group: str  # the panel of the picture
    script: str  # the file whose MLP and rules are used
    what: str  # for the report
    adam: Callable = torch.optim.Adam
    # Rules, functions of a run `r`: its script, network, optimizer, x [n, 64] (all images), generator, t and total
    # (gradient steps), steps (of a task), interval, and `drawn`, a copy of the network as it was drawn.
    start: Callable | None = None  # before the optimizer is made
    task: Callable | None = None  # at the start of each task but the first
    half: Callable | None = None  # at the start of the task that opens the second half
    loss: Callable | None = None  # what is added to the loss
    grow: Callable | None = None  # every interval, between the backward pass and the optimizer step
    event: Callable | None = None  # every interval, between two steps
    step: Callable | None = None  # after each optimizer step


def sparse(r):
    r.script.sparse_start_(r.script.masked_layers(r.network), DENSITY, r.generator)


def expand(r, horizon=1.0, **settings):
    """NE's event, on a schedule that ends with the share `horizon` of the run; there is no event after it."""
    if r.t <= horizon * r.total:
        steps = {"total_timesteps": int(horizon * r.total), "learning_starts": 0, "growth_interval": r.interval}
        args = r.script.Args(**steps, initial_density=DENSITY, policy_frequency=1, **settings)
        r.script.grow_and_prune_(r.network, r.network, r.optimizer, r.t, args, r.generator, [r.x], [r.x])


def rigl(r):
    if r.t % r.steps:  # what was dropped at the last step of a task would be missed when the task is measured
        r.script.drop_and_grow_(r.network, r.optimizer, 0.3 / 2 * (1 + math.cos(math.pi * r.t / r.total)))


@torch.no_grad()
def redo(r, restart=False):
    hidden = r.network.hidden(r.x)
    if r.script.recycle_dormant_(r.network, hidden, r.optimizer, 0.1, r.generator) and restart:
        for state in r.optimizer.state.values():
            state["step"].zero_()


def keep_norms(r):
    r.norms = r.script.weight_norms(r.network)


TD3, NE, RESET = "baselines/td3_continuous.py", "ne_td3_continuous.py", "baselines/reset_td3_continuous.py"
REDO, NE_NORM = "baselines/redo_td3_continuous.py", "baselines/ne_layer_norm_td3_continuous.py"
# Strengths are the scripts' defaults but for weight decay, whose default does nothing in so few steps; none is tuned.
# "each task": at the start of each task but the first; "each event": every `interval` gradient steps, as NE.
ROWS = {
    "plain": Row("reset", TD3, "nothing"),
    "fresh": Row("reset", RESET, "each task: network and Adam start afresh; the reference",
                 task=lambda r: r.script.reset_(r.network, r.optimizer)),
    "reset_last_layer": Row("reset", RESET, "each task: last layer and Adam's state of it start afresh",
                            task=lambda r: r.script.reset_(r.network, r.optimizer, "last_layers")),
    "reset_optimizer": Row("reset", RESET, "each task: Adam starts afresh",
                           task=lambda r: r.script.reset_(r.network, r.optimizer, "optimizers")),
    "adam_eps": Row("reset", TD3, "Adam with eps 1e-3, beta2 0.9",
                    adam=partial(torch.optim.Adam, eps=1e-3, betas=(0.9, 0.9))),
    "shrink_perturb": Row("regularise", "baselines/shrink_perturb_td3_continuous.py",
                          "each task: 0.8 of itself + 0.2 of a fresh network; Adam starts afresh",
                          task=lambda r: r.script.shrink_perturb_([r.network], r.optimizer, 0.8, 0.2)),
    "hare_tortoise": Row("regularise", "baselines/hare_tortoise_td3_continuous.py",
                         "each task: set to its moving average of decay 0.999",
                         task=lambda r: r.script.follow_(r.drawn, r.network, 1.0, True),
                         step=lambda r: r.script.follow_(r.drawn, r.network, 0.999, False)),
    "weight_decay": Row("regularise", "baselines/weight_decay_td3_continuous.py", "AdamW, weight decay 0.1",
                        adam=partial(torch.optim.AdamW, weight_decay=0.1)),
    "l2_init": Row("regularise", "baselines/l2_init_td3_continuous.py", "strength 1e-3",
                   loss=lambda r: 1e-3 * r.script.l2_init(r.network, r.drawn)),
    "layer_norm": Row("architecture", "baselines/layer_norm_td3_continuous.py", "a norm in both hidden layers"),
    "nap": Row("architecture", "baselines/nap_td3_continuous.py", "norms; each step: weights before them rescaled",
               start=keep_norms, step=lambda r: r.script.project_(r.norms)),
    "spectral_norm": Row("architecture", "baselines/spectral_norm_td3_continuous.py", "of the second hidden layer",
                         start=lambda r: parametrizations.spectral_norm(r.network.fc2)),
    "crelu": Row("architecture", "baselines/crelu_td3_continuous.py", "narrower layers, as many parameters"),
    "leaky_relu": Row("architecture", "baselines/leaky_relu_td3_continuous.py", "slope 0.01"),
    "redo": Row("recycle", REDO, "each event: neurons of score at most 0.1 on all images", event=redo),
    "redo_restart": Row("recycle", REDO, "as redo; where a neuron was recycled, Adam's step count starts at 0",
                        event=partial(redo, restart=True)),
    "regrama": Row("recycle", "baselines/regrama_td3_continuous.py",
                   "each event: neurons of gradient score at most 0.01 in the last batch, at most 5 % of a layer",
                   event=lambda r: r.script.recycle_inactive_(r.network, r.optimizer, 0.01, 0.05, r.generator)),
    "injection": Row("recycle", "baselines/injection_td3_continuous.py", "once, half-way",
                     half=lambda r: r.script.inject_(r.network, r.optimizer)),
    "static_sparse": Row("sparse", "baselines/static_sparse_td3_continuous.py", "density 0.25", start=sparse),
    "rigl": Row("sparse", "baselines/rigl_td3_continuous.py",
                "density 0.25; each event within a task: moves a share of 0.3, on a cosine to 0",
                start=sparse, grow=rigl),
    "ne": Row("NE", NE, "density 0.25 to 1, omega 0.5, scored on all images, no review", start=sparse, grow=expand),
    "ne_random": Row("NE", NE, "as ne; the connections that grow are drawn at random",
                     start=sparse, grow=partial(expand, growth_criterion="random")),
    "ne_no_prune": Row("NE", NE, "as ne, without pruning", start=sparse, grow=partial(expand, prune=False)),
    "ne_half": Row("NE", NE, "as ne; the schedule ends half-way, and with it all events",
                   start=sparse, grow=partial(expand, horizon=0.5)),
    "ne_half_no_prune": Row("NE", NE, "as ne_half, without pruning",
                            start=sparse, grow=partial(expand, horizon=0.5, prune=False)),
    "ne_omega_0.1": Row("NE", NE, "as ne, with omega 0.1", start=sparse, grow=partial(expand, omega=0.1)),
    "ne_omega_5": Row("NE", NE, "as ne, with omega 5", start=sparse, grow=partial(expand, omega=5.0)),
    "ne_layer_norm": Row("NE", NE_NORM, "as ne, with a norm in both hidden layers", start=sparse, grow=expand),
}  # fmt: skip


# ===== One run =====


@functools.cache
def load_script(path):
    """A script of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def images(n):
    """n of scikit-learn's digits, the same ones each time, each pixel standardised over them -> [n, 64]."""
    data = load_digits().data
    return torch.tensor(scale(data[np.random.default_rng(0).permutation(len(data))[:n]]), dtype=torch.float32)


def hessian_eigenvalue(loss, parameters, masks, iterations=20):
    """Eigenvalue of the largest magnitude of a loss's Hessian, by power iteration -> float.

    masks: those of the parameters, float or None; connections that are absent are no directions.
    """

    def active(values):
        return [v if mask is None else v * mask for v, mask in zip(values, masks, strict=True)]

    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    generator, value = torch.Generator().manual_seed(0), 0.0
    v = active([torch.randn(p.shape, generator=generator) for p in parameters])
    for _ in range(iterations):
        norm = torch.stack(torch._foreach_norm(v)).norm()
        if norm == 0:
            return 0.0
        v = torch._foreach_div(v, norm)
        hv = active(torch.autograd.grad(gradient, parameters, v, retain_graph=True, materialize_grads=True))
        value, v = sum(float((a * b).sum()) for a, b in zip(v, hv, strict=True)), hv
    return value


def gradient_cosine(network, x, y, masks):
    """Mean cosine between the gradients of two different samples' losses, parameters as above -> float."""
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(values, x, y):
        return F.cross_entropy(functional_call(network, values, (x[None],)), y[None])

    each = vmap(grad(loss), (None, 0, 0))(parameters, x, y).values()  # [n, *shape] of each parameter
    each = [(g if mask is None else g * mask).flatten(1) for g, mask in zip(each, masks, strict=True)]
    norms = torch.stack([g.norm(dim=1) for g in each]).norm(dim=0)  # [n]
    weights = 1 / norms.clamp(min=torch.finfo(norms.dtype).tiny)
    total = sum(float((weights @ g).square().sum()) for g in each)  # of all pairs, a sample with itself included
    return (total - int((norms > 0).sum())) / (len(x) * (len(x) - 1))


def effective_rank(features):
    """exp of the entropy of the singular values of features [n, n_l] (Roy & Vetterli 2007) -> float."""
    singular = torch.linalg.svdvals(features)
    shares = singular / singular.sum().clamp(min=torch.finfo(singular.dtype).tiny)
    return float(torch.special.entr(shares).sum().exp())


def measure(network, x, y, absent):
    """What is measured at the end of a task on all its images, x [n, 64] and labels y [n] -> dict of floats.

    absent: (weight, float mask) of each layer with absent connections.
    """
    hidden, logits = network.hidden(x), network(x)
    loss = F.cross_entropy(logits, y)
    if not loss.isfinite():
        return dict.fromkeys(MEASURES, math.nan)
    neurons = load_script(TD3).neuron_statistics([h.detach() for h in hidden])
    parameters, mask_of = list(network.parameters()), {id(weight): mask for weight, mask in absent}
    masks = [mask_of.get(id(parameter)) for parameter in parameters]
    weights = [layer.weight.detach() for layer in (network.fc1, network.fc2, network.fc3)]
    return {
        "loss": loss.item(),
        "accuracy": float((logits.argmax(1) == y).float().mean()),
        "dormant": neurons["dormant_ratio_0.1"],
        "fau": neurons["fau"],
        "weight_norm": float(sum(weight.square().sum() for weight in weights) ** 0.5),
        "effective_rank": effective_rank(hidden[-1].detach()),
        "hessian": hessian_eigenvalue(loss, parameters, masks),
        "gradient_cosine": gradient_cosine(network, x, y, masks),
    }


MEASURES = ["loss", "accuracy", "dormant", "fau", "weight_norm", "effective_rank", "hessian", "gradient_cosine"]
SCATTERED = MEASURES[2:]
KEYS = ["variant", "method", "seed"]
COLUMNS = [*KEYS, "task", *MEASURES, "online_loss", "density", "pruned", "step_us"]


def adam_step(optimizer, parameters):
    """optimizer.step() of a fused Adam or AdamW, to the bit, without its bookkeeping: a fifth of a training step."""
    states = [optimizer.state.get(parameter) for parameter in parameters]
    if not all(states):  # the first step, or after a reset
        return optimizer.step()
    settings = optimizer.param_groups[0]
    update = torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_
    moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
    counts = [state["step"] for state in states]
    torch._foreach_add_(counts, 1)
    with torch.no_grad():
        update(parameters, [p.grad for p in parameters], *moments, [], counts, lr=settings["lr"],
               beta1=settings["betas"][0], beta2=settings["betas"][1], weight_decay=settings["weight_decay"],
               eps=settings["eps"], amsgrad=False, maximize=False)  # fmt: skip


def train(variant, settings, name, seed):
    """A network learns task after task by the method `name` -> rows of COLUMNS, one for each task.

    variant: its name; settings: its values, as in VARIANTS.
    The seed alone gives the initial weights, the labels and the order of the batches, the same for every method.
    step_us: CPU microseconds of a training step, measuring apart.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    n, batch, steps, tasks, interval = settings.values()
    row, x, rows, absent = ROWS[name], images(n), [], []
    torch.manual_seed(1000 * seed)
    draws, own = (torch.Generator().manual_seed(1000 * seed + k) for k in (1, 2))
    script = load_script(row.script)
    network = script.MLP(PIXELS, HIDDEN, CLASSES)
    r = SimpleNamespace(script=script, network=network, x=x, generator=own, t=0, total=steps * tasks)
    r.steps, r.interval, r.drawn = steps, interval, copy.deepcopy(network).requires_grad_(False)
    if row.start:
        row.start(r)
    r.optimizer = optimizer = row.adam(network.parameters(), lr=LEARNING_RATE, fused=True)
    parameters, masked = list(network.parameters()), hasattr(script, "absent_connections")
    if masked:
        absent = script.absent_connections(network)
    for task in range(tasks):
        y = torch.randint(CLASSES, (len(x),), generator=draws)
        order = [torch.randperm(len(x), generator=draws) for _ in range(math.ceil(steps * batch / len(x)))]
        order = torch.cat(order)[: steps * batch].view(steps, batch)
        online, start = torch.zeros(()), time.process_time()
        network.train()  # spectral norm: a pass is a power iteration too
        if row.task and task:
            row.task(r)
        if row.half and task == tasks // 2:
            row.half(r)
        for inputs, labels in zip(x[order], y[order], strict=True):
            if row.event and r.t and r.t % interval == 0:
                row.event(r)  # not before the end of a task has been measured
            r.t += 1
            loss = F.cross_entropy(network(inputs), labels)
            for parameter in parameters:
                parameter.grad = None
            (loss + row.loss(r) if row.loss else loss).backward()
            if row.grow and r.t % interval == 0:
                row.grow(r)
                absent = script.absent_connections(network)
            for weight, mask in absent:
                weight.grad.mul_(mask)
            adam_step(optimizer, parameters)
            if row.step:
                row.step(r)
            online += loss.detach()
        step_us = (time.process_time() - start) / steps * 1e6
        network.eval()
        size = PIXELS * HIDDEN + HIDDEN * HIDDEN + HIDDEN * CLASSES
        rest = {"online_loss": float(online) / steps, "step_us": step_us}
        rest["density"] = script.density(network) if masked else 1.0
        rest["pruned"] = sum(int(layer.pruned) for layer in script.masked_layers(network)) / size if masked else 0.0
        values = {"variant": variant, "method": name, "seed": seed, "task": task + 1, **rest}
        rows.append(values | measure(network, x, y, absent))
    return rows


# ===== All runs =====


def fail(message):
    """Ends the process with one line on stderr."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    sys.exit(2)


def read_runs(file):
    """The table of COLUMNS that --out holds."""
    try:
        return pd.read_csv(file) if file.stat().st_size else pd.DataFrame(columns=COLUMNS)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        fail(f"{file} cannot be read: {error}")


def check_settings(folder, methods):
    """Refuses a folder whose runs had other settings, and writes down what those of this start are."""
    new = {"variants": VARIANTS, "methods": {name: ROWS[name].what for name in methods}}
    file = folder / "settings.json"
    try:
        old = json.loads(file.read_text()) if (folder / CSV).stat().st_size else new
        changed = [name for name, what in new["methods"].items() if old["methods"].get(name, what) != what]
        changed += ["variants"] if old["variants"] != VARIANTS else []
        new["methods"] = old["methods"] | new["methods"]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        fail(f"{file} cannot be read ({error}); give another folder")
    if changed:
        fail(f"--out {folder} holds runs of other settings ({', '.join(changed)}); give another folder")
    new |= {"torch": torch.__version__, "python": platform.python_version(), "processor": platform.processor()}
    (folder / "settings.tmp").write_text(json.dumps(new, indent=2) + "\n")
    os.replace(folder / "settings.tmp", file)


def end_with_parent():
    """Ends a worker whose parent was killed."""
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def run_all(jobs, workers, keep):
    """Runs the jobs, train's arguments, and gives each one's rows to `keep` as it ends."""
    if workers == 1:
        for job in jobs:
            keep(train(*job))
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers inherit this: Ctrl-C is the parent's
        futures = [pool.submit(train, *job) for job in jobs]
        signal.signal(signal.SIGINT, handler)
        try:
            for future in as_completed(futures):
                keep(future.result())
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run(args):
    """Runs what --out does not yet hold; each run is appended when it has ended, whole or not at all."""
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / CSV, "ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            fail(f"--out {args.out} is in use by another process")
        check_settings(args.out, args.methods)
        kept = read_runs(args.out / CSV)
        kept = set(kept[KEYS].itertuples(index=False, name=None))
        variants = VARIANTS if args.variant == "both" else [args.variant]
        keys = [(v, name, seed) for seed in range(1, args.seeds + 1) for v in variants for name in args.methods]
        jobs = [(v, VARIANTS[v], name, seed) for v, name, seed in keys if (v, name, seed) not in kept]
        bar = tqdm(total=len(keys), initial=len(keys) - len(jobs), unit=" runs", dynamic_ncols=True)

        def keep(rows):
            size = file.tell()
            text = pd.DataFrame(rows)[COLUMNS].to_csv(index=False, header=not size, float_format="%.5g")
            data = gzip.compress(text.encode(), mtime=0)
            try:
                whole = file.write(data) == len(data)
            except OSError:
                whole = False
            if not whole:
                file.truncate(size)
                fail(f"{args.out / CSV} cannot be written: is the disk full?")
            bar.set_postfix_str("{variant} {method} {seed}".format(**rows[0]), refresh=False)
            bar.update()

        with bar:
            run_all(jobs, min(args.workers, max(1, len(jobs))), keep)


# ===== The report =====


def interval(values):
    """Mean of values and half of its 95 % t interval; the half is nan for a single one."""
    n = len(values)
    half = stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return float(np.mean(values)), float(half)


def holm(p):
    """p values adjusted for each other (Holm 1979); nan is left alone -> array."""
    p = np.array(p, dtype=float)
    order = [i for i in np.argsort(p) if not np.isnan(p[i])]
    p[order] = np.maximum.accumulate([min(1.0, p[i] * (len(order) - rank)) for rank, i in enumerate(order)])
    return p


def summarise(runs):
    """Table of COLUMNS -> a row a run: first and best loss, its trend in ten tasks, means of the last LAST tasks."""

    def of_run(run):
        run = run.sort_values("task")
        values = run[[*MEASURES, "density"]].tail(LAST).mean()
        values["first"], values["best"] = run["loss"].iloc[0], run["loss"].min()
        values["trend"] = 10 * np.polyfit(run["task"], run["loss"], 1)[0]
        values["pruned"], values["step_us"] = run["pruned"].iloc[-1], run["step_us"].mean()
        return values

    return pd.DataFrame({key: of_run(run) for key, run in runs.groupby(["method", "seed"])}).T


def differences(losses, methods, against):
    """Paired differences of the last loss: a method less each of `against`, over the seeds that both have.

    losses: {method: series over seeds} -> {(method, other): (mean, half of its interval, p, tellable)}; p by Holm over
    all of these; tellable: the difference that a t test of as many seeds finds in 80 % of cases. One seed: nan.
    """
    found = {}
    for key in ((m, other) for m in methods for other in against if m != other and other in losses):
        values = (losses[key[0]] - losses[key[1]]).dropna()
        if len(values):
            mean, half = interval(values)
            p = stats.ttest_1samp(values, 0).pvalue if half > 0 else math.nan
            quantiles = stats.t.ppf([0.975, 0.8], len(values) - 1)
            found[key] = [mean, half, p, half * quantiles.sum() / quantiles[0]]
    for values, p in zip(found.values(), holm([values[2] for values in found.values()]), strict=True):
        values[2] = p
    return found


def rank_correlations(table):
    """Spearman's correlation of each measure with the loss -> {measure: (methods, runs, seeds)}, floats.

    Over the methods' means, over all runs, and over the seeds of one method (mean over the methods where both vary).
    """

    def spearman(t, name):
        varies = len(t) > 2 and t[name].nunique() > 1 and t["loss"].nunique() > 1
        return stats.spearmanr(t[name], t["loss"]).statistic if varies else math.nan

    methods = table.groupby("method")
    within = {name: pd.Series([spearman(seeds, name) for _, seeds in methods]).mean() for name in SCATTERED}
    return {name: (spearman(methods.mean(), name), spearman(table, name), within[name]) for name in SCATTERED}


def draw_curves(runs, variant, file):
    """Loss at the end of each task, a panel for each group of methods, with plain and fresh in all of them."""
    curves = runs.pivot_table("loss", ["method", "task"], "seed")
    curves = {name: curve.droplevel("method") for name, curve in curves.groupby("method")}
    groups = dict.fromkeys(row.group for row in ROWS.values())
    figure, panels = plt.subplots(2, 3, figsize=(15, 8), sharex=True, sharey=True, layout="constrained")
    for panel, group in zip(panels.flat, groups, strict=True):
        names = [name for name, row in ROWS.items() if name in curves and row.group == group]
        names = [name for name in ("plain", "fresh") if name in curves and name not in names] + names
        for k, name in enumerate(names):
            color = {"plain": "black", "fresh": "0.6"}.get(name, f"C{k}")
            low, middle, high = (curves[name].quantile(share, axis=1) for share in (0.25, 0.5, 0.75))
            panel.plot(middle, color=color, label=name)
            panel.fill_between(low.index, low, high, color=color, alpha=0.15, linewidth=0)
        panel.axhline(math.log(CLASSES), color="0.8", linestyle=":")  # chance
        panel.set(title=group, yscale="log")
        panel.legend(fontsize="x-small")
    figure.supxlabel("task")
    figure.supylabel("loss at the end of a task")
    figure.suptitle(f"{variant}: median and quartiles over {runs['seed'].nunique()} seeds; dotted: chance")
    figure.savefig(file, dpi=80)
    plt.close(figure)


def draw_measures(table, variant, file):
    """Each measure against the loss, means of the last three tasks, a point a run."""
    correlations, methods = rank_correlations(table), table.index.get_level_values("method")
    groups = methods.map(lambda name: ROWS[name].group)
    figure, panels = plt.subplots(2, 3, figsize=(15, 8), sharey=True, layout="constrained")
    for panel, name in zip(panels.flat, SCATTERED, strict=True):
        for group in dict.fromkeys(row.group for row in ROWS.values()):
            panel.scatter(table[name][groups == group], table["loss"][groups == group], s=8, alpha=0.6, label=group)
        over_methods, over_runs, _ = correlations[name]
        panel.set_title(f"Spearman: {over_methods:.2f} over methods, {over_runs:.2f} over runs", fontsize="medium")
        panel.set(yscale="log", xlabel=name)
        if name == "hessian":
            panel.set_xscale("symlog", linthresh=0.01)
        else:
            panel.locator_params(axis="x", nbins=6)
    panels[0, 0].legend(fontsize="x-small")
    figure.supylabel("loss")
    figure.suptitle(f"{variant}: means of the last {LAST} tasks, a point a run")
    figure.savefig(file, dpi=80)
    plt.close(figure)


def number(mean, half=math.nan):
    if math.isnan(mean):
        return ""
    digits = 0 if abs(mean) >= 100 else 2 if abs(mean) >= 0.1 else 4
    text = f"{mean:.{digits}f}"
    return text if math.isnan(half) else f"{text} [{number(mean - half)}, {number(mean + half)}]"


def difference(found, key):
    if key not in found:
        return ""
    mean, half, p, _ = found[key]
    return number(mean, half) + ("" if math.isnan(p) else ", p < 0.0001" if p < 1e-4 else f", p = {p:.2g}")


def markdown(head, rows):
    lines = ["| " + " | ".join(cells) + " |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def report_variant(runs, variant, folder):
    """Draws a variant's pictures -> its part of the report, a list of paragraphs."""
    table = summarise(runs)
    table.index.names = ["method", "seed"]
    methods = [name for name in ROWS if name in table.index.get_level_values("method")]
    losses = {name: table.loc[name]["loss"] for name in methods}
    means = table.groupby("method").mean()
    settings = "{images} images, batches of {batch}, {steps} steps a task, {tasks} tasks, events every {interval} steps"
    text = [f"## {variant}", settings.format(**VARIANTS[variant]) + "."]

    one = differences(losses, [name for name in methods if name == "ne"], ["fresh"])
    if one:
        text.append(
            "**Primary question: does NE keep plasticity?** Loss of NE less that of a fresh network, last "
            f"{LAST} tasks: {difference(one, ('ne', 'fresh'))} (this one comparison, not adjusted)."
        )

    head = ["method", "seeds", "first task", "best task", f"last {LAST} tasks [95 %]", "trend in 10 tasks", "accuracy"]
    head += ["dormant", "FAU", "weight norm", "effective rank", "Hessian", "gradient cosine", "µs a step"]
    rows = []
    for name in methods:
        cells = [number(means[column][name]) for column in ("first", "best")] + [number(*interval(losses[name]))]
        cells += [number(means[column][name]) for column in ("trend", "accuracy", *SCATTERED)]
        rows.append([f"`{name}`", str(len(losses[name])), *cells, f"{means['step_us'][name]:.0f}"])
    text += [f"Loss, four columns; from accuracy on: means of the last {LAST} tasks.", markdown(head, rows)]

    found = differences(losses, methods, ["plain", "fresh"])
    rows = []
    for name in methods:
        tellable = found.get((name, "fresh"), [math.nan])[-1]
        cells = [difference(found, (name, "plain")), difference(found, (name, "fresh")), number(tellable)]
        rows.append([f"`{name}`", *cells])
    text += [
        f"Differences of the loss of the last {LAST} tasks, paired by seed: below 0, the method is the better one. "
        "Intervals are 95 % t intervals, not adjusted; p is adjusted by Holm over the "
        f"{len(found)} comparisons of this table. Last column: the difference to fresh that a single test finds in "
        "80 % of cases.",
        markdown(["method", "less plain [95 %]", "less fresh [95 %]", "could be told"], rows),
    ]

    parts = [name for name in methods if ROWS[name].group in ("NE", "sparse")]
    found = differences(losses, parts, ["ne"])
    if found:
        rows = []
        for name in parts:
            cells = [number(*interval(losses[name])), difference(found, (name, "ne"))]
            rows.append([f"`{name}`", *cells, *(number(means[column][name]) for column in ("density", "pruned"))])
        text += [
            f"The parts of NE: differences to `ne` as above, Holm over the {len(found)} comparisons of this table. "
            "Pruned: connections that pruning took in the whole run, over all connections.",
            markdown(["method", "loss [95 %]", "less ne [95 %]", "density", "pruned"], rows),
        ]

    rows = [[name, *map(number, values)] for name, values in rank_correlations(table).items()]
    text += [
        f"Spearman's correlation of each measure with the loss, last {LAST} tasks: over the methods' means, over all "
        "runs, and over the seeds of one method (mean over the methods).",
        markdown(["measure", "methods", "runs", "seeds of a method"], rows),
    ]
    draw_curves(runs, variant, folder / f"curves_{variant}.png")
    draw_measures(table, variant, folder / f"measures_{variant}.png")
    text += [f"![Loss at the end of each task, {variant}](curves_{variant}.png)"]
    return [*text, f"![Each measure against the loss, {variant}](measures_{variant}.png)"]


def report(folder):
    """Writes report.md and its pictures from a folder's CSV file alone."""
    runs = read_runs(folder / CSV)
    runs = runs[runs["variant"].isin(VARIANTS) & runs["method"].isin(ROWS)]
    broken = runs[~np.isfinite(runs["loss"].astype(float))]
    broken = set(broken[KEYS].itertuples(index=False, name=None))
    runs = runs[[key not in broken for key in runs[KEYS].itertuples(index=False, name=None)]]
    if runs.empty:
        fail(f"{folder / CSV} holds no run that can be reported")
    text = [
        "# Random labels",
        "A network learns images with random labels, task after task. Loss and accuracy are those of all images at "
        f"the end of a task; the loss of chance is {math.log(CLASSES):.2f}. This page and its pictures come from "
        f"`{CSV}` alone:",
        "```bash\npython benchmark/random_labels.py --report\n```",
    ]
    if broken:
        names = ", ".join(" ".join(map(str, key)) for key in sorted(broken))
        text.append(f"Left out, because their loss was not finite: {names}.")
    for variant, own in ((variant, runs[runs["variant"] == variant]) for variant in VARIANTS):
        text += report_variant(own, variant, folder) if len(own) else []
    present = {name: row for name, row in ROWS.items() if name in set(runs["method"])}
    hours = sum(own["step_us"].sum() * VARIANTS[variant]["steps"] for variant, own in runs.groupby("variant")) / 3.6e9
    text += [
        "## What each method does",
        f"Networks {PIXELS}-{HIDDEN}-{HIDDEN}-{CLASSES}, Adam with learning rate {LEARNING_RATE}. Strengths are the "
        "scripts' defaults (weight decay apart); none is tuned. Each task: at the start of each task but the first.",
        markdown(
            ["method", "what", "its code"],
            [[f"`{name}`", row.what, f"`{row.script}`"] for name, row in present.items()],
        ),
        "µs a step: CPU time of training, measuring apart, on whatever else the machine was doing. In all, training "
        f"took {hours:.1f} CPU hours.",
    ]
    (folder / "report.md").write_text("\n\n".join(text) + "\n")


def short_table(folder):
    """The loss of the last tasks and the dormant share by method, mild beside severe -> Markdown."""
    runs = read_runs(folder / CSV)
    tables = {variant: summarise(runs[runs["variant"] == variant]) for variant in VARIANTS}
    means = {variant: table.groupby(level=0).mean() for variant, table in tables.items()}
    head, rows = ["method"], []
    for variant in VARIANTS:
        head += [f"{variant}: loss [95 %]", "accuracy", "dormant", "seeds"]
    for name in (name for name in ROWS if all(name in table.index for table in tables.values())):
        rows.append([f"`{name}`"])
        for variant, table in tables.items():
            losses = table.loc[name]["loss"]
            cells = [number(means[variant][column][name]) for column in ("accuracy", "dormant")]
            rows[-1] += [number(*interval(losses)), *cells, str(len(losses))]
    return markdown(head, rows)


def put_on_page(name, table, page=ROOT / "benchmark/plasticity.md"):
    """Puts a table between the markers <!-- name --> and <!-- end name --> of the page."""
    before, rest = page.read_text().split(f"<!-- {name} -->\n")
    after = rest.partition(f"<!-- end {name} -->")[2]
    page.write_text(f"{before}<!-- {name} -->\n{table}\n<!-- end {name} -->{after}")


def interrupt(number, _):
    raise KeyboardInterrupt(number)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("--methods", nargs="+", metavar="METHOD", default=list(ROWS), help=", ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=30, metavar="N", help="seeds 1 to N (default: 30)")
    parser.add_argument("--variant", choices=[*VARIANTS, "both"], default="both")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: cores)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    parser.add_argument("--report", action="store_true", help="write tables and pictures again from --out, run nothing")
    args = parser.parse_args(argv)
    unknown = [name for name in args.methods if name not in ROWS]
    if unknown:
        fail(f"--methods {' '.join(unknown)}: there is no such method; choose from {' '.join(ROWS)}")
    if min(args.seeds, args.workers) < 1:
        fail("--seeds and --workers must be at least 1")
    args.methods = list(dict.fromkeys(args.methods))
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        if not args.report:
            run(args)
        report(args.out)
        if args.out == RESULTS:
            put_on_page("random labels", short_table(args.out))
    except KeyboardInterrupt as stop:
        print("stopped; the same command goes on with the runs that are left", file=sys.stderr)
        sys.exit(128 + stop.args[0])
    except BrokenProcessPool:
        fail("a worker was killed (out of memory?); the same command goes on with the runs that are left")
    except OSError as error:
        fail(f"--out {args.out}: {error}")
    print(args.out / "report.md")


if __name__ == "__main__":
    main()
