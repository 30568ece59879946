"""Reads the event files of many runs: two CSV files, and from them tables with intervals (report.md) and pictures.

python benchmark/report.py runs                      # every run anywhere below runs/, into runs/report/
python benchmark/report.py benchmark/results/NAME    # draws a published result again, from its CSV files alone
python benchmark/report.py --readme                  # does so for all that the pages show, and puts the tables there

A run is a folder <task>__<script>__<seed>__<unix time> with event files: this project's, or another one's with the same
tags (charts/episodic_return). Runs of a cycle of tasks have a section of their own, by benchmark/cycling.py.
"""

import argparse
import csv
import functools
import hashlib
import io
import json
import math
import re
import shutil
import sys
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rliable import library, metrics
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

matplotlib.use("Agg")
sys.path.append(str(Path(__file__).resolve().parent))
import cycling
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
MIN_SEEDS = 5  # with fewer, no interval is given
REPS = 10_000  # bootstrap resamples of a number in a table
BAND_REPS = 2_000  # and of each point of a learning curve
BINS = 20  # training returns are averaged within so many equal parts of the run
POINTS = 50  # of a curve of neurons in curves.csv, at most
# Task: return of random actions, and of TD3 after a million steps; from where, SOURCE says
NORMALISATION = {
    "HalfCheetah-v4": (-289.415, 10574),
    "Hopper-v4": (18.791, 3226),
    "Walker2d-v4": (2.791, 3946),
    "Ant-v4": (-70.288, 3942),
    "Humanoid-v4": (120.423, 5165),
}
PAGES = ("README.md", "docs/*.md", "baselines/README.md", "benchmark/README.md")
SCORE = "(return - random) / (TD3 at 1M steps - random)"
SOURCE = (
    "TD3 scores of the TD7 paper as listed in SimbaV2's code (DAVIAN-Robotics/SimbaV2 @86899c2, "
    "`scale_rl/envs/mujoco.py`), attributed there, not checked against the paper; gym 0.25, MuJoCo 2.3.3"
)
# Arguments that do not make another method: which run it is, where it runs, what is looked at
NOT_THE_METHOD = re.compile(
    "seed|env_id|track|wandb.*|cuda|torch_threads|capture_video|resume|evaluate|checkpoint_interval|eval_.*"
)
TAGS = re.compile(r"(charts|eval)/episodic_return|neurons/\w+/(dormant_ratio_0\.1|density)|ne/.*")
# Short name: the tags whose mean over the networks it is
NEURONS = {
    "dormant_actor": r"neurons/actor/dormant_ratio_0\.1",
    "dormant_qf": r"neurons/qf[12]/dormant_ratio_0\.1",
    "density": r"neurons/(actor|qf[12])/density",
}
# What the events of a run of NE did: the tags, and what a run's number is made of
EVENTS = {
    "grown": (r"ne/\w+/grown", "sum"),
    "pruned": (r"ne/\w+/pruned", "sum"),
    "change_by_growth": (r"ne/\w+/output_change_growth", "max"),
    "change_by_pruning": (r"ne/\w+/output_change_pruning", "max"),
    "review_share": (r"ne/review_share", "mean"),
}
PARENTS = ("td3_continuous", "td3_cycling", "drq_pixels")
JOB = ["command", "versions", "machine", "commit"]
RUN_COLUMNS = ["task", "method", "seed", "steps", "final_return", "returns", "wall_clock_s", "steps_per_s", "settings"]
RUN_COLUMNS += ["events", *EVENTS]
CURVE_COLUMNS = ["task", "method", "seed", "tag", "step", "value"]
CYCLES = """
Relearning: area of a later visit's evaluation curve minus that of the task's first visit; retention: what is left of a
task's gain after visits to other ones; both as shares of the task's gain, its highest evaluation minus the return of
random actions. Final return: after the last visit to the task. Mean over the seeds, from three seeds on with its 95 %
t interval, then each seed.
"""
HEADINGS = {
    "returns": "Returns",
    "aggregate": "Aggregate over the tasks",
    "improvement": "Probability of improvement",
    "events": "What the events of NE did",
    "cycles": "Cycles",
}
PICTURES = ["learning_curves.png", "aggregate.png", "improvement.png", "neurons.png", "sensitivity.png"]


def say(text):
    print(text, file=sys.stderr)


def fail(text):
    say(f"error: {text}")
    sys.exit(2)


# ===== From event files to two tables =====


def read_json(path):
    """A file's JSON object; an empty one if there is no such file."""
    try:
        return dict(json.loads(path.read_text())) if path.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error


def read_logs(folder):
    """A run's scalars -> table of file, tag, step, value and wall_time, without what a resumed run has made void."""
    rows = []
    for file, path in enumerate(sorted(folder.glob("events.out.tfevents.*"))):
        for event in EventFileLoader(str(path)).Load():
            if event.session_log.status == event.session_log.START:  # what SummaryWriter(purge_step=...) writes
                rows = [row for row in rows if row[2] < event.step]
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    rows.append((file, value.tag, event.step, make_ndarray(value.tensor).item(), event.wall_time))
    return pd.DataFrame(rows, columns=["file", "tag", "step", "value", "wall_time"])


def read_run(folder):
    """A run folder -> dict with its `logs` (tag, step, value). ValueError says why the run cannot be used."""
    name = re.fullmatch(r"(.+)__(.+)__(\d+)__(\d+)(-\d+)?", folder.name)
    if not name:
        raise ValueError("its name is not <task>__<script>__<seed>__<unix time>")
    args = read_json(folder / "args.json")
    run = {"folder": folder, "own": bool(args), "script": name[2], "time": int(name[4])}
    run["args"] = {key: value for key, value in args.items() if not NOT_THE_METHOD.fullmatch(key)}
    if "env_ids" in args:
        cycling.numbers(cycle := cycling.read(folder))  # ValueError if it has not ended
        of = f"{plural([cycle['cycles']], 'cycle')} with {plural([cycle['task_steps']], 'step')} a visit"
        task = f"{', '.join(cycle['tasks'])}: {of}"
        return run | cycle | {"task": task, "steps": len(cycle["returns"]) - 1}
    logs = read_logs(folder)
    if logs.empty:
        raise ValueError("no scalars in its event files")
    spans = logs.groupby("file")[["step", "wall_time"]].agg(np.ptp).sum()  # a resumed run has several files
    steps, logs = int(logs["step"].max()), logs[logs["tag"].map(lambda tag: bool(TAGS.fullmatch(tag)))]
    returns = logs[logs["tag"].str.endswith("/episodic_return")]
    if returns.empty:
        raise ValueError("no charts/episodic_return in its event files")
    if not np.isfinite(returns["value"]).all():
        raise ValueError(f"a return at step {returns['step'][~np.isfinite(returns['value'])].min()} is not finite")
    job = read_json(folder.parent.parent / "job.json")
    job = {key: value if isinstance(value, str) else json.dumps(value) for key, value in job.items()}
    run |= {"task": str(args.get("env_id", name[1])), "seed": int(args.get("seed", name[3])), "steps": steps}
    run |= {"total": int(args.get("total_timesteps", 0)), "wall_clock_s": spans["wall_time"]}
    run |= {"steps_per_s": spans["step"] / spans["wall_time"] if spans["wall_time"] else math.nan}
    return run | {key: job.get(key, "") for key in JOB} | {"logs": logs.sort_values("step", kind="stable")}


def most_common(values):
    """The most common of some values -> (value, whether no other is as common); of several, the largest by its text."""
    counts = pd.Series(list(map(json.dumps, values))).value_counts().sort_index(ascending=False)
    best = counts[counts == counts.max()].index
    return json.loads(best[0]), len(best) == 1


def events_of(logs):
    """What NE's events did in a run -> {column: number}; the number of events is that of the steps with one."""
    of_tags = {short: logs[logs["tag"].str.fullmatch(tags)] for short, (tags, _) in EVENTS.items()}
    numbers = {
        short: of_tags[short]["value"].agg(how) if len(of_tags[short]) else math.nan
        for short, (_, how) in EVENTS.items()
    }
    return {"events": of_tags["grown"]["step"].nunique()} | numbers


def finished(runs):
    """The runs that have ended and reached the most common last step of their task; says which have not."""
    ended, kept = [], []
    for run in runs:
        ended_there = run["folder"] / "models" / f"{run['total']}.pt"
        if run["own"] and not ended_there.exists() and run["steps"] < run["total"]:
            say(f"left out {run['folder']}: at step {run['steps']} of {run['total']}; --unfinished takes it in")
        else:
            ended.append(run)
    for task in sorted({run["task"] for run in ended}):
        of_task = [run for run in ended if run["task"] == task]
        last = pd.Series([run["steps"] for run in of_task]).mode().max()
        for run in of_task:
            # another project's last log may be that of its last episode, up to a hundredth short of the last step
            if run["steps"] >= (last if run["own"] else 0.99 * last):
                kept.append(run)
            else:
                say(f"left out {run['folder']}: at step {run['steps']} of {last}; --unfinished takes it in")
    return kept


def name_methods(runs):
    """Gives each run its `method`, the script's name and what differs, and its `settings`, what differs anywhere."""
    for task, script in {(run["task"], run["script"]) for run in runs}:
        group = [run for run in runs if (run["task"], run["script"]) == (task, script) and run["own"]]
        names = dict.fromkeys(name for run in group for name in run["args"])  # in the script's order
        usual = {name: most_common([run["args"].get(name) for run in group]) for name in names}
        varied = [name for name in names if len({json.dumps(run["args"].get(name)) for run in group}) > 1]
        for run in group:
            run["settings"] = {name: run["args"].get(name) for name in varied}
            differs = [f" {n}={value}" for n, value in run["settings"].items() if usual[n] != (value, True)]
            run["method"] = script + "".join(differs)
    for run in runs:
        if not run["own"]:
            run["method"], run["settings"] = run["script"], {}


def without_duplicates(runs):
    """One run for each task, method and seed: the one that went furthest, of these the newest."""
    best = {}
    for run in sorted(runs, key=lambda run: (run["steps"], run["time"], run["folder"].name)):
        best.setdefault((run["task"], run["method"], run["seed"]), []).append(run)
    for (task, method, seed), same in best.items():
        if len(same) > 1:
            say(f"{len(same)} runs of {method} on {task} with seed {seed}: kept {same[-1]['folder']}, the furthest")
    return [same[-1] for same in best.values()]


def curves_of(run, returns, last):
    """A run's curves -> {short tag: steps and values}. `last`: last step of the task, which the bins divide."""
    logs = run["logs"]
    if returns == "evaluation":
        curve = logs[logs["tag"] == "eval/episodic_return"]
    else:
        curve = logs[logs["tag"] == "charts/episodic_return"]
        ends = np.ceil(np.maximum(curve["step"], 1) * BINS / last) * last / BINS  # of an episode's bin
        curve = curve.groupby(ends.round().astype(int))["value"].mean().reset_index()
    curves = {"return": curve}
    for short, tags in NEURONS.items():
        of_nets = logs[logs["tag"].str.fullmatch(tags)]
        curve = of_nets.groupby("step")["value"].mean().reset_index()
        thinned = np.linspace(0, len(curve) - 1, min(POINTS, len(curve))).round().astype(int)
        curves[short] = curve.iloc[thinned]
    return {short: curve[["step", "value"]] for short, curve in curves.items() if len(curve)}


def collect(folder, out, unfinished=False):
    """Reads all runs below a folder, but for those in `out`, and writes runs.csv and curves.csv there."""
    folders = {path.parent for path in folder.rglob("events.out.tfevents.*") if path.is_file()}
    if not folders:
        fail(f"no run in {folder}: there is no events.out.tfevents.* anywhere below it; give the folder of your runs")
    runs, cycles = [], []
    if folder.resolve() in out.resolve().parents:
        folders = {path for path in folders if out.resolve() not in path.resolve().parents}
    for path in sorted(folders):
        try:
            run = read_run(path)
            (cycles if "cycles" in run else runs).append(run)
        except Exception as error:  # whatever odd files make the readers raise
            say(f"skipped {path}: {error}")
    runs = runs if unfinished else finished(runs)
    name_methods(runs)
    curves, kept = [], []
    for task in sorted({run["task"] for run in runs}):
        of_task = without_duplicates([run for run in runs if run["task"] == task])
        evaluated = all("eval/episodic_return" in set(run["logs"]["tag"]) for run in of_task)
        for run in of_task:
            run["returns"] = "evaluation" if evaluated else "training"
            of_run = curves_of(run, run["returns"], max(run["steps"] for run in of_task))
            if "return" not in of_run:
                say(f"skipped {run['folder']}: it has no charts/episodic_return, and others of {task} no evaluations")
                continue
            run["final_return"] = of_run["return"]["value"].iloc[-1]
            run["settings"] = json.dumps(run["settings"])
            kept.append(run | events_of(run["logs"]))
            for short, curve in of_run.items():
                curves.append(curve.assign(task=task, method=run["method"], seed=run["seed"], tag=short))
    if not kept and not cycles:
        fail(f"no run in {folder} can be used, for the reasons above")
    out.mkdir(parents=True, exist_ok=True)
    collect_cycles(cycles, out)
    kept, curves = kept or pd.DataFrame(columns=RUN_COLUMNS + JOB), curves or [pd.DataFrame(columns=CURVE_COLUMNS)]
    for name, frame, columns, digits in (
        ("runs.csv", pd.DataFrame(kept), RUN_COLUMNS + JOB, "%.9g"),
        ("curves.csv", pd.concat(curves).sort_values(["tag", "step"]), CURVE_COLUMNS, "%.6g"),
    ):
        frame = frame[columns].sort_values(["task", "method", "seed"], kind="stable")
        frame.to_csv(out / name, index=False, float_format=digits, lineterminator="\n")


def collect_cycles(runs, out):
    """Writes cycles.md, a table for each cycle of tasks, and a picture for each of its methods; removes older ones."""
    for old in (out / "cycles.md", *out.glob("cycle_*.png")):
        old.unlink(missing_ok=True)
    name_methods(runs)
    parts = []
    for task in sorted({run["task"] for run in runs}):
        of_task, methods = without_duplicates([run for run in runs if run["task"] == task]), {}
        for run in sorted(of_task, key=lambda run: methods_order(run["method"])):
            methods.setdefault(run["method"], []).append(run)
        for number, (method, of_method) in enumerate(methods.items(), 1):
            name = re.sub(r"[^\w.-]+", "_", f"{task.split(':')[0]}_{number}_{method}")
            cycling.draw(out / f"cycle_{name}.png", of_method)
        table = cycling.table({f"`{method}`": of_method for method, of_method in methods.items()})
        parts += [f"**{task}**.\n", table]
    if parts:
        (out / "cycles.md").write_text("\n".join([*parts, CYCLES]))


# ===== Numbers, all from the two tables =====


def load(folder):
    """The two CSV files of a folder -> runs, curves, and their checksum."""
    frames = []
    for name, columns in (("runs.csv", RUN_COLUMNS + JOB), ("curves.csv", CURVE_COLUMNS)):
        try:
            frame = pd.read_csv(folder / name, dtype=dict.fromkeys(["task", "method", "settings", *JOB], str))
        except (OSError, ValueError) as error:
            fail(f"{folder / name} cannot be read: {error}")
        if missing := [column for column in columns if column not in frame]:
            fail(f"{folder / name} has no column {', '.join(missing)}; write it again from the event files")
        frames.append(frame)
    checksum = hashlib.sha256((folder / "runs.csv").read_bytes() + (folder / "curves.csv").read_bytes()).hexdigest()
    return *frames, checksum


def methods_order(name):
    """What sorts the methods: NE, TD3 or another parent, others; settings that are numbers by their size."""
    words = [(0, float(w), "") if re.fullmatch(r"[\d.e+-]*\d", w) else (1, 0, w) for w in re.split("[ =]", name)]
    return not name.startswith("ne_"), name.split()[0] not in PARENTS, words


def methods_of(runs):
    return sorted(runs["method"].unique(), key=methods_order)


def iqm(scores, axis=None):
    """rliable's interquartile mean, made fast (a quarter of the values, rounded down, goes at each end)."""
    scores = np.sort(scores, axis=axis)
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean(axis=0)


def improvement(x, y):
    """rliable's probability that a run of x ends above one of y, made fast; ties count half."""
    return np.mean((x[:, None] > y) + 0.5 * (x[:, None] == y))


def interval(statistics, *scores, reps=None):
    """95 % percentile intervals by the stratified bootstrap over [seeds, tasks, ...] -> (lows, highs)."""
    np.random.seed(0)  # rliable draws from numpy's global generator
    scores = {"": scores[0] if len(scores) == 1 else scores}
    return library.get_interval_estimates(scores, statistics, reps=reps or REPS)[1][""]


def final_scores(runs, method, tasks):
    """The final returns of a method -> [seeds, tasks], of each task the first seeds, as many as all have."""
    columns = [
        runs[(runs["method"] == method) & (runs["task"] == task)].sort_values("seed")["final_return"].to_numpy()
        for task in tasks
    ]
    return np.stack([column[: min(map(len, columns))] for column in columns], axis=1)


def aggregate(runs):
    """The normalised scores over the tasks that all methods have.

    -> table with a row a method, {task: why it is left out}, {method: scores [seeds, tasks]}.
    """
    methods, left_out = methods_of(runs), {}
    for task in sorted(runs["task"].unique()):
        missing = [method for method in methods if not ((runs["task"] == task) & (runs["method"] == method)).any()]
        if task not in NORMALISATION:
            left_out[task] = "no normalisation"
        elif missing:
            left_out[task] = f"no runs of {', '.join(missing)}"
    tasks = [task for task in sorted(runs["task"].unique()) if task not in left_out]
    rows, scores = [], {}
    for method in methods if tasks else []:
        low, high = np.array([NORMALISATION[task] for task in tasks]).T
        scores[method] = (final_scores(runs, method, tasks) - low) / (high - low)

        def statistics(x):
            return np.array([iqm(x), metrics.aggregate_optimality_gap(x), x.mean()])

        enough = len(scores[method]) >= MIN_SEEDS
        ends = interval(statistics, scores[method]) if enough else np.full((2, 3), np.nan)
        rows.append([method, tasks, len(scores[method]), *statistics(scores[method]), *ends.T.ravel()])
    names = [f"{name}{end}" for name in ("iqm", "gap", "mean") for end in ("_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "tasks", "n", "iqm", "gap", "mean", *names]), left_out, scores


def improvements(runs, method):
    """The probability that a run of `method` ends above one of each other method, where both have seeds to compare."""
    rows, counts = [], runs.groupby(["method", "task"]).size()
    several = {name: {task for of, task in counts.index[counts > 1] if of == name} for name in methods_of(runs)}
    for other in methods_of(runs):
        tasks = sorted(several[method] & several[other])  # one run says nothing about the next one
        if other == method or not tasks:
            continue
        x, y = final_scores(runs, method, tasks), final_scores(runs, other, tasks)
        enough = min(len(x), len(y)) >= MIN_SEEDS
        if enough:
            low, high = interval(lambda *s: np.array([improvement(*s)]), x, y)[:, 0]
            rows.append([other, tasks, len(x), len(y), improvement(x, y), low, high])
        else:  # without an interval, which takes as many seeds on each task, all runs count
            each = [[final_scores(runs, name, [task]) for name in (method, other)] for task in tasks]
            counts_of = [" + ".join(str(len(pair[k])) for pair in each) for k in (0, 1)]
            rows.append([other, tasks, *counts_of, np.mean([improvement(*pair) for pair in each]), np.nan, np.nan])
    return pd.DataFrame(rows, columns=["method", "tasks", "n", "m", "probability", "low", "high"])


# ===== Tables =====


def number(value):
    """A return for reading: whole if it is large."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(head, rows):
    lines = [f"| {' | '.join(map(str, line))} |\n" for line in [head, *rows]]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def between(low, high, n, show="{:.2f}".format):
    return f"{show(low)} to {show(high)}" if n >= MIN_SEEDS else "too few seeds"


def range_text(values):
    low, high = min(values), max(values)
    return f"{low:_}" if low == high else f"{low:_} to {high:_}"


def plural(values, noun):
    return f"{range_text(values)} {noun}{'s' * (max(values) > 1)}"


def returns_section(runs, curves):
    """Markdown: for each task a table with a row a method."""
    parts = []
    last = curves.sort_values("step").groupby(["task", "method", "seed", "tag"])["value"].last()
    last = last.groupby(["task", "method", "tag"]).mean()  # over seeds
    head = ["method", "seeds", "return: mean", "each seed", "IQM (95 % interval)"]
    head += ["dormant, actor", "dormant, critics", "density", "steps/s", "minutes"]
    for task, of_task in runs.groupby("task"):
        rows = []
        for method in methods_of(of_task):
            of_method = of_task[of_task["method"] == method].sort_values("seed")
            values, n = of_method["final_return"].to_numpy(), len(of_method)
            ends = interval(lambda x: np.array([iqm(x)]), values[:, None])[:, 0] if n >= MIN_SEEDS else (None, None)
            middle = between(*ends, n, number)
            neurons = [last.get((task, method, tag), math.nan) for tag in NEURONS]
            speeds = [of_method["steps_per_s"].median(), of_method["wall_clock_s"].median() / 60]
            rows.append(
                [f"`{method}`", n, number(values.mean()), ", ".join(map(number, values))]
                + [f"{number(iqm(values))} ({middle})" if n >= MIN_SEEDS else middle]
                + ["-" if math.isnan(value) else f"{value:.3f}" for value in neurons]
                + ["-" if math.isnan(value) else f"{value:.0f}" for value in speeds]
            )
        if of_task["returns"].iloc[0] == "evaluation":
            what = "Return of the last evaluation, without exploration noise"
        else:
            what = f"Training return, with exploration noise, mean of the last 1/{BINS} of the steps"
        parts += [f"**{task}**, {plural(of_task['steps'], 'step')}. {what}.\n", markdown(head, rows)]
    parts += [
        f"IQM: mean of the middle half of the seeds, with a 95 % stratified bootstrap interval (percentile, {REPS:_} "
        f"resamples; rliable), from {MIN_SEEDS} seeds on. Dormant: share of the hidden neurons with a dormant score of "
        "at most 0.1, at the last look, mean over the seeds. Density: active / all connections then, mean over actor "
        "and critics and over the seeds; `-`: not logged. Steps per second and minutes of wall-clock time, evaluations "
        "included: medians.\n"
    ]
    return "\n".join(parts)


def events_section(runs):
    """Markdown: what NE's events did, a row a task and method; empty where no run has any."""
    rows = []
    for task, of_task in runs[runs["events"] > 0].groupby("task"):
        for method in methods_of(of_task):
            of_method = of_task[of_task["method"] == method]
            whole = [range_text(of_method[name].astype(int)) for name in ("events", "grown", "pruned")]
            changes = [f"{of_method[name].max():.2g}" for name in ("change_by_growth", "change_by_pruning")]
            shares = {round(100 * share) for share in of_method["review_share"].dropna()}
            share = f"{range_text(shares)} %" if shares else "-"
            rows.append([f"`{method}`", task, len(of_method), *whole, *changes, share])
    if not rows:
        return ""
    head = ["method", "task", "seeds", "events", "grown", "pruned", "change by growth", "by pruning", "reviewed"]
    text = (
        "Events of a run, connections that they added and took in all its networks together (least to most over the "
        "seeds), the largest change of an output by growth and by pruning at any event of any seed, on a batch apart "
        "from the scoring batch, and the share of the batches that reviewed early experience.\n"
    )
    return "\n".join([text, markdown(head, rows)])


def aggregate_section(table, left_out):
    lines = [f"Left out: {', '.join(f'{task} ({reason})' for task, reason in left_out.items())}.\n"] if left_out else []
    if table.empty:
        return "\n".join(["No task that all methods have and that has a normalisation.\n", *lines])
    text = f"Tasks: {', '.join(table['tasks'][0])}. Normalised score: {SCORE}; {SOURCE}.\n"
    rows = []
    for row in table.itertuples():
        values = [(row.iqm, row.iqm_low, row.iqm_high), (row.gap, row.gap_low, row.gap_high)]
        values.append((row.mean, row.mean_low, row.mean_high))
        rows.append([f"`{row.method}`", row.n])
        rows[-1] += [f"{value:.3f} ({between(low, high, row.n, '{:.3f}'.format)})" for value, low, high in values]
    head = ["method", "seeds a task", "IQM", "optimality gap", "mean"]
    return "\n".join([text, markdown(head, rows), *lines])


def seeds_note(runs, tasks):
    """Says which methods have fewer seeds on some of the tasks, so that only the first ones count."""
    counts = runs[runs["task"].isin(tasks)].groupby(["method", "task"]).size().groupby("method").agg(["min", "max"])
    fewer = [f"`{row.Index}`: {row.min}" for row in counts.itertuples() if row.min < row.max]
    note = f"Where a method has more seeds on one task than on another, the first count: {'; '.join(fewer)}.\n"
    return note if fewer else ""


def improvement_section(table, method, methods):
    without = [f"`{other}`" for other in methods if other not in (method, *table["method"])]
    note = (
        f"No probability of improvement, as no task has two seeds of both: {', '.join(without)}.\n" if without else ""
    )
    if table.empty:
        return "There is only one method, so no probability of improvement.\n" if len(methods) == 1 else note
    text = (
        f"Probability that a run of `{method}` ends above a run of the other method, mean over the tasks where both "
        "have two seeds or more; ties count half. Seeds: on each of these tasks. Where there is an interval, the first "
        "seeds count, as many as a method has on all of them.\n"
    )
    rows = []
    for row in table.itertuples():
        few = "too few seeds" if math.isnan(row.low) else f"{row.low:.2f} to {row.high:.2f}"
        rows.append([f"`{row.method}`", ", ".join(row.tasks), row.n, row.m, f"{row.probability:.2f}", few])
    head = ["over", "tasks", "its seeds", "the other's", "probability", "95 % interval"]
    return "\n".join([text, markdown(head, rows), *[note] * bool(note)])


def compute(runs, curves, of=None):
    """-> {section: Markdown}, and the numbers that the pictures show."""
    methods = methods_of(runs)
    if of is not None and of not in methods:
        fail(f"no method {of!r}; there is {', '.join(map(repr, methods))}")
    of = of or next((name for name in methods if name.startswith("ne_") and " " not in name), methods[0])
    scores, left_out, each = aggregate(runs)
    over = improvements(runs, of)
    sections = {
        "returns": returns_section(runs, curves),
        "aggregate": aggregate_section(scores, left_out),
        "improvement": improvement_section(over, of, methods),
        "events": events_section(runs),
    }
    if not scores.empty and (note := seeds_note(runs, scores["tasks"][0])):
        sections["aggregate"] += "\n" + note
    return sections, {"aggregate": scores, "each": each, "improvement": over, "of": of}


# ===== Pictures; each function returns why there is none, if so =====


def styles(methods):
    """Colours (Petroff's ten, made for the colour-blind) and lines of the methods -> {method: keyword arguments}."""
    colors, lines = matplotlib.color_sequences["petroff10"], ["-", "--", ":", "-."]
    return {m: {"color": colors[i % 10], "linestyle": lines[i // 5 % 4]} for i, m in enumerate(methods)}


def grid(number, columns, width=4.2, height=3.2):
    """A figure with a panel for each of some number of things -> figure, list of panels."""
    columns = min(columns, number)
    rows = math.ceil(number / columns)
    size = (max(width * columns, 6), height * rows + 0.9)
    figure, panels = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for panel in panels.flat[number:]:
        panel.set_axis_off()
    return figure, list(panels.flat[:number])


def finish(figure, panels, file, checksum, title, legend=False):
    """Adds what all pictures have and writes the file, marked with the checksum of its data."""
    for panel in panels:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    across = int(figure.get_figwidth() * 13)  # characters
    figure.suptitle("\n".join(textwrap.fill(line, across) for line in title.splitlines()), fontsize="medium")
    if legend:
        labelled = [panel.get_legend_handles_labels() for panel in panels]
        entries = {label: handle for handles, labels in labelled for handle, label in zip(handles, labels, strict=True)}
        columns = max(1, across // (8 + max(map(len, entries))))
        figure.set_figheight(figure.get_figheight() + 0.22 * (math.ceil(len(entries) / columns) - 1))
        figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, frameon=False)
    figure.savefig(drawn := io.BytesIO(), dpi=100)
    plt.close(figure)
    (info := PngInfo()).add_text("Data", checksum)
    image = Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(file, pnginfo=info, optimize=True)


def over_steps(curves, task, method, tag):
    """A method's curves -> table with a row a step that all seeds have, a column a seed."""
    chosen = curves[(curves["task"] == task) & (curves["method"] == method) & (curves["tag"] == tag)]
    return chosen.pivot(index="step", columns="seed", values="value")


def steps_axis(panel):
    panel.set_xlabel("environment steps")
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def draw_curves(runs, curves, file, checksum):
    methods, tasks = methods_of(runs), sorted(runs["task"].unique())
    counts = runs.groupby(["method", "task"]).size()
    figure, panels = grid(len(tasks), 3, width=8 if len(tasks) == 1 else 4.2)
    for task, panel in zip(tasks, panels, strict=True):
        for method, style in styles(methods).items():
            seeds = over_steps(curves, task, method, "return")
            if seeds.empty:
                continue
            label = f"{method} ({plural(counts[method], 'seed')})"
            if seeds.shape[1] < MIN_SEEDS:
                panel.plot(seeds.index, seeds, **style, linewidth=0.8, alpha=0.6)
            seeds = seeds.dropna()
            scores = seeds.to_numpy().T[:, None]  # [seeds, 1 task, steps]
            if len(scores) >= MIN_SEEDS and len(seeds):
                low, high = interval(lambda x: iqm(x[:, 0], axis=0), scores, reps=BAND_REPS)
                panel.fill_between(seeds.index, low, high, color=style["color"], alpha=0.15, linewidth=0)
                panel.plot(seeds.index, iqm(scores[:, 0], axis=0), **style, linewidth=2, label=label)
            else:
                panel.plot(seeds.index, seeds.mean(axis=1), **style, linewidth=2, label=label)
        kind = runs[runs["task"] == task]["returns"].iloc[0]
        panel.set(title=task, ylabel=f"return ({kind})")
        steps_axis(panel)
    few = "mean over the seeds, each seed thin" if counts.min() < MIN_SEEDS else ""
    few = "one seed" if counts.max() == 1 else few
    many = "IQM over the seeds, 95 % bootstrap band" if counts.max() >= MIN_SEEDS else ""
    either = f"{many}; with fewer than {MIN_SEEDS} seeds: {few}" if few and many else few or many
    finish(figure, panels, file, checksum, either, legend=True)


def draw_points(panel, style, methods, values, lows, highs, dots=None):
    """A row a method: its value with its interval, or hollow, with the runs as dots, where the seeds are too few."""
    for y, (method, value, low, high) in enumerate(zip(methods, values, lows, highs, strict=True)):
        color = style[method]["color"]
        few = math.isnan(low)
        if few and dots is not None:
            panel.plot(dots[method], np.full(len(dots[method]), y), ".", color=color, alpha=0.6)
        panel.plot(value, y, "D", color=color, markerfacecolor="white" if few else color)
        panel.hlines(y, low, high, color=color, linewidth=3)
    panel.set_yticks(range(len(methods)), methods)
    panel.set_ylim(len(methods) - 0.4, -0.6)


def few_text(table, dots):
    few = table.filter(regex="low$").isna().any(axis=1)
    return f"\nhollow: fewer than {MIN_SEEDS} seeds, so no interval{dots}" if few.any() else ""


def draw_aggregate(table, each, style, file, checksum):
    if table.empty:
        return "no task that all methods have and that has a normalisation"
    methods, tasks = list(table["method"]), table["tasks"][0]
    figure, panels = grid(2, 2, height=0.35 * len(methods) + 1)
    dots = {method: scores.ravel() for method, scores in each.items()}
    draw_points(panels[0], style, methods, table["iqm"], table["iqm_low"], table["iqm_high"], dots)
    panels[0].set_xlabel("IQM of the normalised score (higher is better)")
    dots = {method: np.maximum(0, 1 - scores) for method, scores in dots.items()}
    draw_points(panels[1], style, methods, table["gap"], table["gap_low"], table["gap_high"], dots)
    panels[1].set_xlabel("optimality gap (lower is better)")
    panels[1].tick_params(labelleft=False)
    title = f"normalised score: {SCORE}\n{', '.join(tasks)}{few_text(table, '; dots: each run')}"
    finish(figure, panels, file, checksum, title)


def draw_improvement(table, of, style, file, checksum):
    if table.empty:
        return "no two methods with two seeds each on a task"
    figure, (panel,) = grid(1, 1, width=7, height=0.35 * len(table) + 0.8)
    panel.axvline(0.5, color="black", linewidth=1, linestyle="--")
    draw_points(panel, style, list(table["method"]), table["probability"], table["low"], table["high"])
    panel.set(xlim=(-0.02, 1.02), xlabel="probability of improvement (0.5: neither is better)")
    finish(figure, [panel], file, checksum, f"{of} over ...{few_text(table, '')}")


def draw_neurons(runs, curves, file, checksum):
    if not curves["tag"].isin(NEURONS).any():
        return "nothing about neurons was logged"
    methods, tasks = methods_of(runs), sorted(runs["task"].unique())
    labels = ["dormant share, actor", "dormant share, critics", "density"]
    figure, panels = grid(3 * len(tasks), 3, width=3.5, height=2.4)
    for row, task in enumerate(tasks):
        for panel, tag, label in zip(panels[3 * row :], NEURONS, labels, strict=False):
            for method, style in styles(methods).items():
                seeds = over_steps(curves, task, method, tag).dropna()
                if len(seeds):
                    dot = "." if len(seeds) == 1 else None
                    panel.plot(seeds.index, seeds.mean(axis=1), **style, linewidth=1.8, marker=dot, label=method)
            panel.set(title=task, ylabel=label, ylim=(0, 1.03 if tag == "density" else None))
            steps_axis(panel)
    title = (
        "dormant share: hidden neurons with a score of at most 0.1; density: active / all connections; mean over seeds"
    )
    finish(figure, panels, file, checksum, title, legend=True)


def varied_arguments(runs):
    """The numeric arguments with three or more values, all others at their most common one.

    -> list of (task, script, argument, base value or None, table of values and runs).
    """
    found = []
    for (task, script), group in runs.groupby(["task", runs["method"].str.split().str[0]]):
        settings = pd.DataFrame(list(group["settings"].map(json.loads)), index=group.index, dtype=object)
        usual = {name: most_common(settings[name]) for name in settings}
        for name in settings:
            others = [other for other in settings if other != name]
            at_base = [all(usual[other] == (row[other], True) for other in others) for _, row in settings.iterrows()]
            values = settings[name][at_base]
            numeric = values.map(lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)).all()
            if numeric and values.nunique() >= 3:
                base = usual[name][0] if usual[name][1] else None
                found.append((task, script, name, base, group[at_base].assign(value=values)))
    return found


def draw_sensitivity(found, file, checksum):
    if not found:
        return "no numeric argument was varied alone over three values"
    figure, panels = grid(len(found), 3)
    for panel, (task, script, name, base, group) in zip(panels, found, strict=True):
        values = sorted(group["value"].unique())
        panel.plot(group["value"].map(values.index), group["final_return"], "o", alpha=0.5, label="each seed")
        means = group.groupby("value")["final_return"].mean()
        panel.plot(range(len(values)), [means[value] for value in values], "_k", markersize=18, label="mean")
        if base in values:
            panel.axvline(values.index(base), color="0.5", linestyle=":", label="base value")
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        returns = pd.concat([other["final_return"] for of_task, *_, other in found if of_task == task])
        margin = 0.05 * np.ptp(returns) or 1
        panel.set(xlim=(-0.5, len(values) - 0.5), ylim=(returns.min() - margin, returns.max() + margin))
        panel.set(xlabel=name, ylabel=f"final return ({group['returns'].iloc[0]})")
        text = f"{plural(group['steps'], 'step')}, {plural(group.groupby('value').size(), 'seed')}"
        panel.set_title(f"{task}, {script}\n{text}", fontsize="medium")
    finish(figure, panels, file, checksum, "one argument varied, all others at their base value", legend=True)


# ===== The report =====


def draw(folder, of=None):
    """Writes report.md and the pictures of the CSV files in a folder, into the same -> {section: Markdown}."""
    (runs, curves, checksum), sections, missing = load(folder), {}, {}
    for name in PICTURES:
        (folder / name).unlink(missing_ok=True)  # one of other data must not stay
    if len(runs):
        sections, numbers = compute(runs, curves, of)
        style, over = styles(methods_of(runs)), numbers["improvement"]
        reasons = [  # why there is no such picture
            draw_curves(runs, curves, folder / PICTURES[0], checksum),
            draw_aggregate(numbers["aggregate"], numbers["each"], style, folder / PICTURES[1], checksum),
            draw_improvement(over, numbers["of"], style, folder / PICTURES[2], checksum),
            draw_neurons(runs, curves, folder / PICTURES[3], checksum),
            draw_sensitivity(varied_arguments(runs), folder / PICTURES[4], checksum),
        ]
        missing = {name: reason for name, reason in zip(PICTURES, reasons, strict=True) if reason}
    if (folder / "cycles.md").exists():
        sections["cycles"] = (folder / "cycles.md").read_text()
    about = "each run, with its command, versions, machine and commit where they are known"
    parts = ["# Report\n", f"Drawn by `benchmark/report.py` from `runs.csv` ({about}) and `curves.csv`.\n"]
    for name, heading in HEADINGS.items():
        parts += [f"## {heading}\n", sections[name]] if sections.get(name) else []
    parts.append("## Pictures\n")
    drawn = [folder / name for name in PICTURES if (folder / name).exists()] + sorted(folder.glob("cycle_*.png"))
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in drawn]
    parts += [f"Without `{name}`: {reason}.\n" for name, reason in missing.items()]
    (folder / "report.md").write_text("\n".join(parts))
    return sections


def table_of(path):
    """A CSV file as a Markdown table; its lines that start with # say how it was made."""
    try:
        rows = list(csv.reader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    except OSError as error:
        fail(f"{path} cannot be read: {error}")
    return markdown(rows[0], rows[1:])


def fill_pages(pages, results):
    """Redraws the results that pages show and puts their sections between the markers; all pages, or none.

    <!-- report NAME SECTION --> ... <!-- end report -->: NAME is a folder of `results`.
    <!-- table NAME --> ... <!-- end table -->: NAME.csv of `results` as it is.
    """
    start = r"(?P<start>^<!-- (?P<kind>report|table) (?P<name>\S+)(?: (?P<section>\S+))? -->\n)"
    end = r"(?:(?:(?!^<!-- (?:report|table) ).)*?(?P<end>^<!-- end (?P=kind) -->$))?"
    block, drawn, filled = re.compile(start + end, re.MULTILINE | re.DOTALL), {}, {}

    def fill(found, page):
        kind, name, section = found["kind"], found["name"], found["section"]
        if not found["end"]:
            fail(f"{page.name} has a <!-- {kind} ... --> without its <!-- end {kind} -->")
        if kind == "table":
            return found["start"] + table_of(results / f"{name}.csv") + found["end"]
        if not (results / name).is_dir():
            fail(f"{page.name} shows the result {name}, but there is no folder {results / name}")
        drawn[name] = drawn.get(name) or draw(results / name)
        if section not in drawn[name]:
            fail(f"{page.name} shows the section {section} of {name}; there is {', '.join(drawn[name])}")
        return found["start"] + drawn[name][section] + found["end"]

    for page in pages:
        filled[page] = block.sub(functools.partial(fill, page=page), page.read_text())
    for page, text in filled.items():
        page.write_text(text)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="folder of runs, or of runs.csv and curves.csv")
    parser.add_argument("--out", type=Path, help="folder to write into; default: FOLDER/report, or that of the CSVs")
    parser.add_argument("--of", metavar="METHOD", help="method whose probability of improvement is shown; default: NE")
    parser.add_argument("--unfinished", action="store_true", help="take in runs that ended before most of their task")
    parser.add_argument("--readme", action="store_true", help="redraw what the pages show, put the tables there")
    args = parser.parse_args(words)
    if args.readme:
        pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
        return fill_pages(pages, ROOT / "benchmark" / "results")
    if args.folder is None or not args.folder.is_dir():
        fail(f"there is no folder {args.folder}; give that of your runs" if args.folder else "give a folder of runs")
    published = all((args.folder / name).exists() for name in ("runs.csv", "curves.csv"))
    out = args.out or (args.folder if published else args.folder / "report")
    if not published:
        collect(args.folder, out, args.unfinished)
    elif out.resolve() != args.folder.resolve():
        out.mkdir(parents=True, exist_ok=True)
        for path in [*args.folder.glob("*.csv"), *args.folder.glob("cycle*")]:
            shutil.copyfile(path, out / path.name)
    draw(out, args.of)
    print(f"{out / 'report.md'}, with its pictures and CSV files")


if __name__ == "__main__":
    main()
