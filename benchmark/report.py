"""Reads the event files of many runs: two CSV files, and from them tables with intervals (report.md) and pictures.

python benchmark/report.py runs                      # every run anywhere below runs/, into runs/report/
python benchmark/report.py benchmark/results/NAME    # draws a published result again, from its CSV files alone
python benchmark/report.py benchmark/results/NAME runs --out benchmark/results/NAME    # adds runs to it
python benchmark/report.py --readme                  # draws all that the pages show, and puts the tables there

A run is a folder <task>__<script>__<seed>__<unix time> with event files: this project's, or another one's with the same
tags (charts/episodic_return). Runs of a cycle of tasks have a section of their own, by benchmark/cycling.py. Where a
published.csv (task,name,step,mean,std) lies beside the two CSV files, its curves are drawn with the runs' own.
"""

import argparse
import ast
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
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.util.tensor_util import make_ndarray

matplotlib.use("Agg")
sys.path.append(str(Path(__file__).resolve().parent))
import compare
import cycling
import matplotlib.pyplot as plt
from compare import MIN_SEEDS, NORMALISATION, RUN, methods_of, methods_order

matplotlib.rcParams["svg.hashsalt"] = "report"  # the same data give the same file
ROOT = Path(__file__).resolve().parent.parent
BINS = 20  # training returns are averaged within so many equal parts of the run
POINTS = 50  # of a curve of neurons in curves.csv, at most
PAGES = ("README.md", "docs/*.md", "baselines/README.md", "benchmark/*.md")
SCORE = "(area - random) / (TD3 at 1M steps - random)"
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
JOB = ["command", "versions", "machine", "commit"]
RUN_COLUMNS = ["task", "method", "seed", "steps", "final_return", "returns", "wall_clock_s", "steps_per_s", "settings"]
RUN_COLUMNS += ["at_once", "events", *EVENTS]
CURVE_COLUMNS = [*RUN, "tag", "step", "value"]
PUBLISHED_COLUMNS = ["task", "name", "step", "mean", "std"]
RETURNS = f"""\
Area: mean of the evaluations after learning starts, with its 95 % t interval over the seeds, from {MIN_SEEDS} on. Last
three, last one: mean of these evaluations, over the seeds. Dormant: share of the hidden neurons with a dormant score
of at most 0.1, at the last look, mean over the seeds. Density: active / all connections then, mean over actor and
critics and over the seeds; `-`: not logged. Steps per second and minutes of wall-clock time, evaluations included:
medians.
"""
DIFFERENCES = f"""\
Mean over the seeds that both have, in pairs, with its 95 % t interval; p of a paired t test and, in parentheses, by
Holm's correction for the column. The area counts; the other two show whether its answer hangs on the measure. Ahead: of
all pairs of a run of each, whatever the seeds, by area. 80 % power: the true difference of areas that so many pairs
find in 80 % of cases, before the correction. A method with fewer than {MIN_SEEDS} pairs has no row.
"""
INJECTION = """\
Until its injection a run is its parent's run with the same seed, to the bit; so the difference after it is what new
plasticity does. Mean over the seeds, with its 95 % t interval.
"""
AGGREGATE = f"""\
In parentheses: percentile intervals of the stratified bootstrap ({compare.REPS:_} resamples; rliable), from
{compare.BOOTSTRAP_SEEDS} seeds on. On one task they cover about 90 % with five seeds and 93 % with ten, not 95. One
seed has no rank: methods with one are left out.
"""
CYCLES = """
Relearning: area of a later visit's evaluation curve minus that of the task's first visit; retention: what is left of a
task's gain after visits to other ones; both as shares of the task's gain, its highest evaluation minus the return of
random actions. Final return: after the last visit to the task. Mean over the seeds, from three seeds on with its 95 %
t interval, then each seed.
"""
HEADINGS = {
    "returns": "Returns",
    "differences": "Differences",
    "injection": "Injection: would new plasticity have helped?",
    "aggregate": "Aggregate over the tasks",
    "events": "What the events of NE did",
    "cycles": "Cycles",
}
PICTURES = ["learning_curves", "differences", "injection", "aggregate", "neurons", "sensitivity"]


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
    began, ended = logs["wall_time"].min(), logs["wall_time"].max()
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
    run |= {"began": began, "ended": ended}
    for name in ("learning_starts", "injection_step"):
        np.array(args.get(name) or 0, dtype=int)  # ValueError or TypeError if it is odd
    run |= {"steps_per_s": spans["step"] / spans["wall_time"] if spans["wall_time"] else math.nan}
    return run | {key: job.get(key, "") for key in JOB} | {"logs": logs.sort_values("step", kind="stable")}


def read_published(folder):
    """The runs of a folder with runs.csv and curves.csv -> list of dicts like read_run's."""
    runs, curves = load(folder)[:2]
    logged = {"dormant_actor": "neurons/actor/dormant_ratio_0.1", "dormant_qf": "neurons/qf1/dormant_ratio_0.1"}
    logged, curves = logged | {"density": "neurons/actor/density"}, dict(list(curves.groupby(RUN)))
    found = []
    for row in runs.fillna(dict.fromkeys(JOB, "")).to_dict("records"):
        of_return = {"return": "eval/episodic_return" if row["returns"] == "evaluation" else "charts/episodic_return"}
        logs = curves[tuple(row[name] for name in RUN)].replace({"tag": logged | of_return})
        args = json.loads(row["settings"])
        run = {"folder": folder, "own": bool(args), "script": row["method"].split()[0], "time": 0, "args": args}
        found.append(row | run | {"total": row["steps"], "began": math.nan, "ended": math.nan, "logs": logs})
    return found


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


def runs_at_once(run, runs):
    """How many of the runs, this one among them, went at the same time on its machine, at most."""
    same = [other for other in runs if other["machine"] == run["machine"]]
    starts = [other["began"] for other in same if run["began"] <= other["began"] <= run["ended"]]
    return max(sum(other["began"] <= start <= other["ended"] for other in same) for start in starts)


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


def defaults_of(script):
    """What the arguments of a script of this repository are by default -> {argument: value}; of another one {}."""
    paths = [path for path in (ROOT / f"{script}.py", ROOT / "baselines" / f"{script}.py") if path.exists()]
    classes = [node for path in paths for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef)]
    fields = [item for node in classes if node.name == "Args" for item in node.body if isinstance(item, ast.AnnAssign)]
    return {field.target.id: ast.literal_eval(field.value) for field in fields}


def name_methods(runs):
    """Gives each run its `method`: the script's name and what differs.

    An argument that a run lacks, since the script did not have it then, counts as the script's default of today, or,
    if there is none, as no difference.
    """
    for task, script in {(run["task"], run["script"]) for run in runs}:
        group = [run for run in runs if (run["task"], run["script"]) == (task, script) and run["own"]]
        names = dict.fromkeys(name for run in group for name in run["args"])  # in the script's order
        defaults = {name: value for name, value in defaults_of(script).items() if name in names}
        complete = [defaults | run["args"] for run in group]
        # a run read twice counts once
        once = {json.dumps([run["seed"], run["args"]]): args for run, args in zip(group, complete, strict=True)}
        values = {name: [args[name] for args in once.values() if name in args] for name in names}
        varied = [name for name in names if len(set(map(json.dumps, values[name]))) > 1]
        usual = {name: most_common(values[name]) for name in varied}
        for run, own in zip(group, complete, strict=True):
            args = {name: own[name] for name in varied if name in own}
            run["method"] = script + "".join(f" {n}={value}" for n, value in args.items() if usual[n] != (value, True))
    for run in runs:
        if not run["own"]:
            run["method"] = run["script"]


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


def is_published(folder):
    return all((folder / name).exists() for name in ("runs.csv", "curves.csv"))


def collect(sources, out, unfinished=False):
    """Reads all runs below some folders, but for those in `out`, and writes runs.csv and curves.csv there.

    A source may be a folder with these two files, too.
    """
    runs, cycles, folders = [], [], set()
    for folder in sources:
        if is_published(folder):
            if (folder / "cycles.md").exists():
                fail(f"{folder} has cycles, which are kept as a table: give the folder of their runs")
            runs += read_published(folder)
            continue
        below = {path.parent for path in folder.rglob("events.out.tfevents.*") if path.is_file()}
        if not below:
            fail(f"no run in {folder}: there is no events.out.tfevents.* below it; give the folder of your runs")
        inside = folder.resolve() in out.resolve().parents
        folders |= {path for path in below if not (inside and out.resolve() in path.resolve().parents)}
    for path in sorted(folders):
        try:
            run = read_run(path)
            (cycles if "cycles" in run else runs).append(run)
        except Exception as error:  # whatever odd files make the readers raise
            say(f"skipped {path}: {error}")
    for run in runs:
        run["at_once"] = run["at_once"] if "at_once" in run else runs_at_once(run, runs)
    runs = runs if unfinished else finished(runs)
    name_methods(runs)
    curves, kept = [], []
    for task in sorted({run["task"] for run in runs}):
        of_task = without_duplicates([run for run in runs if run["task"] == task])
        evaluated = all("eval/episodic_return" in set(run["logs"]["tag"]) for run in of_task)
        for run in of_task:
            returns = "evaluation" if evaluated else "training"
            of_run = curves_of(run, returns, max(run["steps"] for run in of_task))
            if "return" not in of_run:
                say(f"skipped {run['folder']}: it has no charts/episodic_return, and others of {task} no evaluations")
                continue
            if run.get("returns") != returns:  # a published run has its last return with all digits
                run["final_return"] = of_run["return"]["value"].iloc[-1]
            run |= {"returns": returns, "settings": json.dumps(run["args"])}
            kept.append(events_of(run["logs"]) | run)
            for short, curve in of_run.items():
                curves.append(curve.assign(task=task, method=run["method"], seed=run["seed"], tag=short))
    if not kept and not cycles:
        fail(f"no run in {', '.join(map(str, sources))} can be used, for the reasons above")
    out.mkdir(parents=True, exist_ok=True)
    collect_cycles(cycles, out)
    kept, curves = kept or pd.DataFrame(columns=RUN_COLUMNS + JOB), curves or [pd.DataFrame(columns=CURVE_COLUMNS)]
    for name, frame, columns, digits in (
        ("runs.csv", pd.DataFrame(kept), RUN_COLUMNS + JOB, "%.9g"),
        ("curves.csv", pd.concat(curves).sort_values(["tag", "step"]), CURVE_COLUMNS, "%.6g"),
    ):
        frame = frame[columns].sort_values(RUN, kind="stable")
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


# ===== Tables, all from the two =====


def load(folder):
    """The two CSV files of a folder -> runs, curves, and their checksum, published.csv's with them."""
    frames = []
    for name, columns in (("runs.csv", RUN_COLUMNS + JOB), ("curves.csv", CURVE_COLUMNS)):
        try:
            frame = pd.read_csv(folder / name, dtype=dict.fromkeys(["task", "method", "settings", *JOB], str))
        except (OSError, ValueError) as error:
            fail(f"{folder / name} cannot be read: {error}")
        if missing := [column for column in columns if column not in frame]:
            fail(f"{folder / name} has no column {', '.join(missing)}; write it again from the event files")
        frames.append(frame)
    if (twice := frames[0][RUN].duplicated()).any():
        row = frames[0][twice].iloc[0]
        fail(f"{folder / 'runs.csv'} has {row['method']} on {row['task']} with seed {row['seed']} twice")
    files = [folder / f"{name}.csv" for name in ("runs", "curves", "published")]
    checksum = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()
    return *frames, checksum


def rename(runs, curves, names):
    """Calls methods otherwise: "METHOD=NEW NAME" each -> the two tables."""
    new = dict(word.rpartition("=")[::2] for word in names)
    if unknown := [name for name in new if name not in methods_of(runs)]:
        fail(f"--names: no method {unknown[0]!r}; there is {', '.join(map(repr, methods_of(runs)))}")
    renamed = runs.replace({"method": new})
    if renamed["method"].nunique() < runs["method"].nunique():
        fail("--names gives two methods the same name")
    return renamed, curves.replace({"method": new})


def number(value):
    """A return for reading: whole if it is large."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def markdown(head, rows):
    lines = [f"| {' | '.join(map(str, line))} |\n" for line in [head, *rows]]
    return "".join([lines[0], "|---" * len(head) + "|\n", *lines[1:]])


def with_interval(value, low, high, show=number):
    return f"{show(value)} ({'too few seeds' if math.isnan(low) else f'{show(low)} to {show(high)}'})"


def range_text(values):
    low, high = min(values), max(values)
    return f"{low:_}" if low == high else f"{low:_} to {high:_}"


def plural(values, noun):
    return f"{range_text(values)} {noun}{'s' * (max(values) > 1)}"


def returns_section(runs, curves):
    """Markdown: for each task a table with a row a method."""
    parts = []
    last = curves.sort_values("step").groupby([*RUN, "tag"])["value"].last()
    last = last.groupby(["task", "method", "tag"]).mean()  # over seeds
    head = ["method", "seeds", "area: mean (95 % interval)", "each seed", "last three", "last one"]
    head += ["dormant, actor", "dormant, critics", "density", "steps/s", "minutes"]
    for task, of_task in runs.groupby("task"):
        rows = []
        for method in methods_of(of_task):
            of_method = of_task[of_task["method"] == method].sort_values("seed")
            values = of_method["area"].to_numpy()
            area = with_interval(*cycling.interval(values[:, None])[:, 0]) if len(values) > 1 else number(values[0])
            neurons = [last.get((task, method, tag), math.nan) for tag in NEURONS]
            speeds = [of_method["steps_per_s"].median(), of_method["wall_clock_s"].median() / 60]
            rows.append(
                [f"`{method}`", len(values), area, ", ".join(map(number, values))]
                + [number(of_method[measure].mean()) for measure in ("last_three", "last_one")]
                + ["-" if math.isnan(value) else f"{value:.3f}" for value in neurons]
                + ["-" if math.isnan(value) else f"{value:.0f}" for value in speeds]
            )
        if of_task["returns"].iloc[0] == "evaluation":
            what = "Return of the evaluations, without exploration noise"
        else:
            what = f"Training return, with exploration noise, mean of each 1/{BINS} of the steps"
        parts += [f"**{task}**, {plural(of_task['steps'], 'step')}. {what}.\n", markdown(head, rows)]
    parts.append(RETURNS)
    unknown, most = runs["at_once"].isna().any(), runs["at_once"].max()
    if unknown or most > 1:
        shared = "What else some of these machines did is not known. " if unknown else ""
        shared += f"Up to {most:.0f} of these runs went on one machine at once. " if most > 1 else ""
        parts.append(f"{shared}So the steps/s compare nothing.\n")
    return "\n".join(parts)


def verdict(low, high, words):
    return words[0] if low > 0 else words[1] if high < 0 else words[2]


def differences_section(tables, primary, of, over):
    """Markdown: the primary question with its answer, then a table of all comparisons."""
    (tasks, found), parts, rows = primary, [], []
    if tasks and found["n"] > 1:
        where = tasks[0] if len(tasks) == 1 else f"{', '.join(tasks)}; normalised, mean over the tasks"
        answer = "too few pairs of seeds for an answer"
        if found["n"] >= MIN_SEEDS:
            answer = verdict(found["low"], found["high"], ["yes", "no, it is smaller", "they cannot be told apart"])
            answer += f" (p = {found['p']:.2g}, paired t test, not corrected as it is asked first). A true "
            answer += f"difference of {number(found['effect'])} would have been found in 80 % of cases"
        parts.append(
            f"**Primary question** ({where}): is the area of `{of}` larger than that of `{over}`? Difference "
            f"{with_interval(found['mean'], found['low'], found['high'])}, {plural([found['n']], 'pair')} of seeds: "
            f"{answer}.\n"
        )
    for of_measures in zip(*(table.itertuples() for table in tables.values()), strict=True):
        first = of_measures[0]
        if first.n < MIN_SEEDS:
            continue
        row = [f"`{first.method}`", first.task, first.n, first.ahead]
        for each in of_measures:
            row += [with_interval(each.mean, each.low, each.high), f"{each.p:.2g} ({each.holm:.2g})"]
        rows.append([*row[:6], number(first.effect), *row[6:]])
    if rows:
        head = [f"`{of}` minus", "task", "pairs", "ahead", "area", "p (Holm)", "80 % power"]
        parts += [markdown([*head, "last three", "p (Holm)", "last one", "p (Holm)"], rows), DIFFERENCES]
    return "\n".join(parts)


def injection_section(found):
    """Markdown: a line for each method with an injection."""
    lines = []
    for of in found:
        after = of["after"].loc[of["after"].index > of["step"]].mean()  # over the evaluations, a value a seed
        what = f"- {of['task']}, `{of['method']}` and `{of['parent']}`, injection at step {of['step']:_}: "
        if of["not_pairs"]:
            seeds = ", ".join(map(str, of["not_pairs"]))
            lines.append(f"{what}the runs with seed {seeds} do not agree before it, so are not pairs: left out.\n")
        if len(after):
            mean, low, high = cycling.interval(after.to_numpy()[:, None])[:, 0]
            told = verdict(low, high, ["it helped", "it hurt", "whether it helped cannot be told"])
            each = ", ".join(map(number, after))
            lines.append(
                f"{what}difference of the mean return after it {with_interval(mean, low, high)}: **{told}** (each "
                f"seed: {each}).\n"
            )
    return "\n".join([INJECTION, "".join(lines)]) if lines else ""


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


def aggregate_section(runs, table, left_out, given):
    lines = [f"Left out: {', '.join(f'{task} ({reason})' for task, reason in left_out.items())}.\n"] if left_out else []
    if table.empty:
        return "\n".join(["No task with a normalisation and two seeds of all methods that have two seeds.\n", *lines])
    tasks = table["tasks"][0]
    text = f"Tasks: {', '.join(tasks)}. Normalised score: {SCORE}; {SOURCE}."
    text += "".join(f" Given for {task}: {low:g} is 0, {high:g} is 1." for task, (low, high) in given.items())
    rows = []
    for row in table.itertuples():
        values = [(row.iqm, row.iqm_low, row.iqm_high), (row.gap, row.gap_low, row.gap_high)]
        values.append((row.mean, row.mean_low, row.mean_high))
        rows.append([f"`{row.method}`", row.n, *(with_interval(*value, "{:.3f}".format) for value in values)])
    counts = runs[runs["task"].isin(tasks)].groupby(["method", "task"]).size().groupby("method").agg(["min", "max"])
    if fewer := [f"`{row.Index}`: {row.min}" for row in counts.itertuples() if 1 < row.min < row.max]:
        lines.append(f"With more seeds on one task than on another, the first count: {'; '.join(fewer)}.\n")
    return "\n".join(
        [f"{text}\n", AGGREGATE, markdown(["method", "seeds a task", "IQM", "optimality gap", "mean"], rows), *lines]
    )


def latex(sections):
    """The Markdown tables of {section: text} -> LaTeX, for the package booktabs."""
    tables = []
    for section, text in sections.items():
        for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
            head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines())
            frame = pd.DataFrame(rows, columns=[name.replace("`", "") for name in head]).replace("`", "", regex=True)
            tables.append(frame.to_latex(index=False, escape=True, caption=HEADINGS[section]))
    return "\n".join(tables)


def compute(runs, curves, of=None, over=None, given=None):
    """-> {section: Markdown}, and the numbers that the pictures show.

    of, over: the methods of the primary question; given: {task: returns that count as 0 and as 1}.
    """
    methods, given = methods_of(runs), given or {}
    for method in (of, over):
        if method is not None and method not in methods:
            fail(f"no method {method!r}; there is {', '.join(map(repr, methods))}")
    of = of or methods[0]  # NE's, if there is one
    others = [name for name in methods if name != of]
    parents = [name for name in others if name in set(runs["method"][runs["script"].isin(compare.PARENTS)])]
    over, scale = over or next(iter(parents + others), None), NORMALISATION | given
    if of == over:
        fail(f"--of and --over are both {of!r}: give two methods")
    tables, injected = compare.differences(runs, of), compare.injections(runs, curves)
    primary = compare.over_tasks(runs, of, over, scale) if over else ([], {})
    scores, left_out = compare.aggregate(runs, scale)
    sections = {
        "returns": returns_section(runs, curves),
        "differences": differences_section(tables, primary, of, over),
        "injection": injection_section(injected),
        "aggregate": aggregate_section(runs, scores, left_out, given),
        "events": events_section(runs),
    }
    return sections, {"of": of, "differences": tables, "injections": injected, "aggregate": scores}


# ===== Pictures; each function gives the figure, or says why there is none =====


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


def finish(figure, panels, title, legend=False):
    """Adds what all pictures have -> the figure."""
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
    return figure


def save(figure, file, checksum, formats):
    """Writes a figure as PNG, marked with the checksum of its data, and in other formats."""
    for end in formats:
        date = {"pdf": "CreationDate", "svg": "Date"}[end]
        figure.savefig(file.with_suffix(f".{end}"), metadata={date: None})
    figure.savefig(drawn := io.BytesIO(), dpi=100)
    plt.close(figure)
    (info := PngInfo()).add_text("Data", checksum)
    image = Image.open(drawn).convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    image.save(file.with_suffix(".png"), pnginfo=info, optimize=True)


def over_steps(curves, task, method, tag):
    """A method's curves -> table with a row a step, a column a seed."""
    chosen = curves[(curves["task"] == task) & (curves["method"] == method) & (curves["tag"] == tag)]
    return chosen.pivot(index="step", columns="seed", values="value")


BANDS = f"mean over the seeds, with its 95 % t band from {MIN_SEEDS} seeds on; thin: one seed"


def draw_seeds(panel, seeds, style, label=None):
    """Draws a table with a column a seed: the mean over the seeds, its band, and thin lines where there is no band."""
    if 1 < seeds.shape[1] < MIN_SEEDS:
        panel.plot(seeds.index, seeds, **style, linewidth=0.8, alpha=0.6)
    seeds = seeds.dropna()  # the steps that all seeds have
    if len(seeds):
        mean, low, high = cycling.interval(seeds.to_numpy().T)
        look = style | {"linewidth": 2 if seeds.shape[1] > 1 else 1, "marker": "." if len(seeds) == 1 else None}
        panel.plot(seeds.index, mean, **look, label=label)
        panel.fill_between(seeds.index, low, high, color=style["color"], alpha=0.15, linewidth=0)


def steps_axis(panel):
    panel.set_xlabel("environment steps")
    panel.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))


def draw_curves(runs, curves, published):
    """published: table with task, name, step, mean, std; what others have published of a task, drawn in grey."""
    tasks, counts = sorted(runs["task"].unique()), runs.groupby(["method", "task"]).size()
    figure, panels = grid(len(tasks), 3, width=8 if len(tasks) == 1 else 4.2)
    for task, panel in zip(tasks, panels, strict=True):
        for method, style in styles(methods_of(runs)).items():
            seeds, label = over_steps(curves, task, method, "return"), f"{method} ({plural(counts[method], 'seed')})"
            if not seeds.empty:
                draw_seeds(panel, seeds, style, label)
        for name, curve in published[published["task"] == task].groupby("name"):
            panel.plot(curve["step"], curve["mean"], color="grey", linestyle="--", label=name)
            low, high = curve["mean"] - curve["std"], curve["mean"] + curve["std"]
            panel.fill_between(curve["step"], low, high, color="grey", alpha=0.15, linewidth=0)
        kind = runs[runs["task"] == task]["returns"].iloc[0]
        panel.set(title=task, ylabel=f"return ({kind})")
        steps_axis(panel)
    return finish(figure, panels, BANDS if counts.max() > 1 else "one seed", legend=True)


def draw_points(panel, style, methods, values, lows, highs):
    """A row a method: its value with its interval; hollow where the seeds are too few for one."""
    for y, (method, value, low, high) in enumerate(zip(methods, values, lows, highs, strict=True)):
        color = style[method]["color"]
        panel.plot(value, y, "D", color=color, markerfacecolor="white" if math.isnan(low) else color)
        panel.hlines(y, low, high, color=color, linewidth=3)
    panel.set_yticks(range(len(methods)), methods)
    panel.set_ylim(len(methods) - 0.4, -0.6)


def draw_aggregate(table, style):
    if table.empty:
        return "no task with a normalisation and two seeds of all methods that have two seeds"
    figure, (panel,) = grid(1, 1, width=7, height=0.35 * len(table) + 0.8)
    draw_points(panel, style, list(table["method"]), table["iqm"], table["iqm_low"], table["iqm_high"])
    panel.set_xlabel("IQM of the normalised score (higher is better)")
    few = f"\nhollow: fewer than {compare.BOOTSTRAP_SEEDS} seeds, so no interval" * any(table["iqm_low"].isna())
    return finish(figure, [panel], f"normalised score: {SCORE}\n{', '.join(table['tasks'][0])}{few}")


def draw_differences(table, of, style):
    table = table[table["n"] >= MIN_SEEDS]
    if table.empty:
        return f"no two methods with {MIN_SEEDS} pairs of seeds on a task"
    groups = list(table.groupby("task"))
    figure, panels = grid(len(groups), 1, width=7, height=0.35 * max(len(group) for _, group in groups) + 0.8)
    for (task, group), panel in zip(groups, panels, strict=True):
        panel.axvline(0, color="black", linewidth=1, linestyle="--")
        draw_points(panel, style, list(group["method"]), group["mean"], group["low"], group["high"])
        panel.set(title=task, xlabel="difference of areas, paired by seed")
    return finish(figure, panels, f"{of} minus ...: mean and 95 % t interval, not corrected")


def draw_injections(found):
    found = [of for of in found if len(of["after"])]
    if not found:
        return "no pairs of a run with an injection and its parent's with the same seed"
    figure, panels = grid(len(found), 3)
    for of, panel in zip(found, panels, strict=True):
        panel.axhline(0, color="black", linewidth=1, linestyle="--")
        draw_seeds(panel, of["after"], {"color": "C0"})
        panel.set_title(f"{of['task']}\n{of['method']}", fontsize="medium")
        panel.set_ylabel("difference of returns")
        steps_axis(panel)
    return finish(figure, panels, f"with the injection minus without, from it on, paired by seed; {BANDS}")


def draw_neurons(runs, curves):
    if not curves["tag"].isin(NEURONS).any():
        return "nothing about neurons was logged"
    tasks = sorted(runs["task"].unique())
    labels = ["dormant share, actor", "dormant share, critics", "density"]
    figure, panels = grid(3 * len(tasks), 3, width=3.5, height=2.4)
    for row, task in enumerate(tasks):
        for panel, tag, label in zip(panels[3 * row :], NEURONS, labels, strict=False):
            for method, style in styles(methods_of(runs)).items():
                draw_seeds(panel, over_steps(curves, task, method, tag), style, method)
            panel.set(title=task, ylabel=label)
            panel.set_ylim(0, 1.03 if tag == "density" else None)
            steps_axis(panel)
    title = f"dormant share: hidden neurons with a score of at most 0.1; density: active / all connections; {BANDS}"
    return finish(figure, panels, title, legend=True)


def varied_arguments(runs):
    """The numeric arguments with three or more values, all others at their most common one.

    -> list of (task, script, argument, base value or None, table of values and runs).
    """
    found = []
    for (task, script), group in runs.groupby(["task", "script"]):
        settings = pd.DataFrame(list(group["settings"].map(json.loads)), index=group.index, dtype=object)
        usual = {name: most_common(list(settings[name])) for name in settings}
        usual = {name: value for name, value in usual.items() if settings[name].map(json.dumps).nunique() > 1}
        for name in usual:
            others = [other for other in usual if other != name]
            at_base = [all(usual[other] == (row[other], True) for other in others) for _, row in settings.iterrows()]
            values = settings[name][at_base]
            numeric = values.map(lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)).all()
            if numeric and values.nunique() >= 3:
                base = usual[name][0] if usual[name][1] else None
                found.append((task, script, name, base, group[at_base].assign(value=values)))
    return found


def draw_sensitivity(found):
    if not found:
        return "no numeric argument was varied alone over three values"
    figure, panels = grid(len(found), 3)
    for panel, (task, script, name, base, group) in zip(panels, found, strict=True):
        values = sorted(group["value"].unique())
        panel.plot(group["value"].map(values.index), group["area"], "o", alpha=0.5, label="each seed")
        means = group.groupby("value")["area"].mean()
        panel.plot(range(len(values)), [means[value] for value in values], "_k", markersize=18, label="mean")
        if base in values:
            panel.axvline(values.index(base), color="0.5", linestyle=":", label="base value")
        panel.set_xticks(range(len(values)), [f"{value:g}" for value in values])
        areas = pd.concat([other["area"] for of_task, *_, other in found if of_task == task])
        margin = 0.05 * np.ptp(areas) or 1
        panel.set(xlim=(-0.5, len(values) - 0.5), ylim=(areas.min() - margin, areas.max() + margin))
        panel.set(xlabel=name, ylabel=f"area ({group['returns'].iloc[0]})")
        text = f"{plural(group['steps'], 'step')}, {plural(group.groupby('value').size(), 'seed')}"
        panel.set_title(f"{task}, {script}\n{text}", fontsize="medium")
    return finish(figure, panels, "one argument varied, all others at their base value", legend=True)


# ===== The report =====


def draw(folder, of=None, over=None, names=(), given=None, also=()):
    """Writes report.md and the pictures of the CSV files in a folder, into the same -> {section: Markdown}.

    of, over, given: compute's; names: rename's; also: of "pdf", "svg", "tex", what to write beside.
    """
    (runs, curves, checksum), sections, missing = load(folder), {}, {}
    published = pd.DataFrame(columns=PUBLISHED_COLUMNS)
    if (file := folder / "published.csv").exists():
        published = pd.read_csv(file, comment="#")
        if list(published) != PUBLISHED_COLUMNS:
            fail(f"{file}: its columns must be {','.join(PUBLISHED_COLUMNS)}")
    if len(runs):
        runs, curves = rename(compare.measure(runs, curves), curves, names)
        sections, numbers = compute(runs, curves, of, over, given)
    for path in (folder / f"{name}.{end}" for name in [*PICTURES, "report"] for end in ("png", "pdf", "svg", "tex")):
        path.unlink(missing_ok=True)  # one of other data must not stay
    if len(runs):
        style = styles(methods_of(runs))
        figures = [
            draw_curves(runs, curves, published),
            draw_differences(numbers["differences"]["area"], numbers["of"], style),
            draw_injections(numbers["injections"]),
            draw_aggregate(numbers["aggregate"], style),
            draw_neurons(runs, curves),
            draw_sensitivity(varied_arguments(runs)),
        ]
        for name, figure in zip(PICTURES, figures, strict=True):
            if isinstance(figure, str):
                missing[name] = figure
            else:
                save(figure, folder / name, checksum, sorted({"pdf", "svg"} & set(also)))
    if (folder / "cycles.md").exists():
        sections["cycles"] = (folder / "cycles.md").read_text()
    about = "each run, with its command, versions, machine and commit where they are known"
    parts = ["# Report\n", f"Drawn by `benchmark/report.py` from `runs.csv` ({about}) and `curves.csv`.\n"]
    for name, heading in HEADINGS.items():
        parts += [f"## {heading}\n", sections[name]] if sections.get(name) else []
    parts.append("## Pictures\n")
    pictures = [folder / f"{name}.png" for name in PICTURES if name not in missing] if len(runs) else []
    pictures += sorted(folder.glob("cycle_*.png"))
    parts += [f"![{path.stem.replace('_', ' ')}]({path.name})\n" for path in pictures]
    parts += [f"Without `{name}.png`: {reason}.\n" for name, reason in missing.items()]
    (folder / "report.md").write_text("\n".join(parts))
    if "tex" in also:
        (folder / "report.tex").write_text(latex(sections))
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
        before = page.read_text()
        if (text := block.sub(functools.partial(fill, page=page), before)) != before:
            filled[page] = text
    for page, text in filled.items():
        page.write_text(text)


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs, or of runs.csv and curves.csv")
    parser.add_argument("--out", type=Path, help="folder to write into; default: FOLDER/report, or that of the CSVs")
    parser.add_argument("--of", metavar="METHOD", help="method that is compared with all others; default: NE")
    parser.add_argument("--over", metavar="METHOD", help="its other in the primary question; default: NE's parent")
    parser.add_argument("--names", nargs="+", default=[], metavar="METHOD=NAME", help="how methods are called")
    parser.add_argument("--normalise", nargs=3, action="append", default=[], metavar=("TASK", "ZERO", "ONE"),
                        help="a task's returns that count as 0 and as 1; may be given several times")  # fmt: skip
    parser.add_argument("--also", nargs="+", choices=["pdf", "svg", "tex"], default=[],
                        help="beside PNG: pictures as PDF or SVG, tables as LaTeX (report.tex)")  # fmt: skip
    parser.add_argument("--unfinished", action="store_true", help="take in runs that ended before most of their task")
    parser.add_argument("--readme", action="store_true", help="redraw what the pages show, put the tables there")
    args = parser.parse_args(words)
    if args.readme:
        pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
        return fill_pages(pages, ROOT / "benchmark" / "results")
    if not args.folders:
        fail("give a folder of runs")
    for folder in args.folders:
        if not folder.is_dir():
            fail(f"there is no folder {folder}; give that of your runs")
    try:
        given = {task: (float(low), float(high)) for task, low, high in args.normalise}
    except ValueError as error:
        fail(f"--normalise: {error}")
    if odd := [task for task, ends in given.items() if not np.isfinite(ends).all() or ends[0] == ends[1]]:
        fail(f"--normalise: {odd[0]} needs two different numbers")
    first, alone = args.folders[0], len(args.folders) == 1
    if not alone and not args.out:
        fail("several folders need --out, the folder to write into")
    out = args.out or (first if is_published(first) else first / "report")
    if not alone or not is_published(first):
        collect(args.folders, out, args.unfinished)
    elif out.resolve() != first.resolve():
        out.mkdir(parents=True, exist_ok=True)
        for path in [*first.glob("*.csv"), *first.glob("cycle*")]:
            shutil.copyfile(path, out / path.name)
    draw(out, args.of, args.over, args.names, given, args.also)
    print(f"{out / 'report.md'}, with its pictures and CSV files")


if __name__ == "__main__":
    main()
