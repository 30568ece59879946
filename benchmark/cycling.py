"""What a run over a cycle of tasks shows: three numbers, a picture, and both over seeds.

    python benchmark/cycling.py runs/*__ne_td3_cycling__*

reads each run's cycle.csv and event log, draws its cycle.png, and prints the numbers of all of them as one method's, a
seed each; of several runs it draws runs/ne_td3_cycling.png too.

R(v, i): the evaluation on task i after visit v; random(i): the return of a random policy; gain(i): the highest
evaluation on task i in the run, minus random(i). Relearning and retention are undefined where gain(i) is not above 0.

- relearning: (area of a later visit - area of the task's first visit) / gain(i); an area is the mean height of the
  visit's evaluation curve, by trapezoids from its first evaluation to its last.
- final return: R(v, i) at the end of the last visit to i.
- retention: (R(v, i) - random(i)) / gain(i) for visits v to another task after i was visited.
"""

import csv
import json
import os
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

NETS = ("actor", "qf1", "qf2")
CURVES = [
    "eval/episodic_return",
    *(f"neurons/{net}/{name}" for net in NETS for name in ("dormant_ratio_0.1", "density")),
]
MIN_SEEDS = 3  # with fewer, no interval is given


# ===== One run =====


def read(folder):
    """A run's folder -> dict: what its args.json says of the cycle, its `returns` and its `curves`.

    returns [1 + visits, tasks]: mean returns of a random policy, then after each visit that has ended;
    curves: {tag: array [points, 2] of steps and values}. OSError, ValueError or KeyError if it is no run of a cycle.
    """
    args = json.loads((Path(folder) / "args.json").read_text())
    with open(Path(folder) / "cycle.csv", newline="") as file:
        rows = [row[3:] for row in csv.reader(file)][1:]  # after step, cycle and task
    log = EventAccumulator(str(folder), size_guidance={"scalars": 0})  # leaves out what a resumed run has made void
    log.Reload()
    tags = [tag for tag in CURVES if tag in log.Tags()["scalars"]]
    curves = {tag: np.array([(event.step, event.value) for event in log.Scalars(tag)]) for tag in tags}
    run = {"tasks": args["env_ids"], **{name: args[name] for name in ("cycles", "task_steps", "seed")}}
    return run | {"returns": np.array(rows, float), "curves": curves}


def of_visit(run, visit):
    """The evaluations of a visit on its own task -> array [points, 2]: steps of the visit, returns."""
    curve = run["curves"]["eval/episodic_return"] - [visit * run["task_steps"], 0]
    return curve[(curve[:, 0] > 0) & (curve[:, 0] <= run["task_steps"])]


def summarise(run):
    """A complete run -> relearning [cycles - 1, tasks], final return [tasks], retention [visits, tasks]."""
    tasks, random, after = len(run["tasks"]), run["returns"][0], run["returns"][1:]
    if len(after) < tasks * run["cycles"]:
        raise ValueError(f"{len(after)} of {tasks * run['cycles']} visits have ended")
    best, areas = after.max(0), []
    for visit in range(len(after)):
        steps, values = of_visit(run, visit).T
        best[visit % tasks] = max(best[visit % tasks], values.max())
        areas.append(np.trapezoid(values, steps) / np.ptp(steps) if len(steps) > 1 else values[0])
    gain = np.where(best > random, best - random, np.nan)
    areas, (visit, task) = np.reshape(areas, (run["cycles"], tasks)), np.indices(after.shape)
    retention = np.where((visit > task) & (visit % tasks != task), (after - random) / gain, np.nan)
    return (areas[1:] - areas[0]) / gain, np.diagonal(after[-tasks:]), retention


def mean(values):
    """The mean without what is undefined; nan if all of it is."""
    values = np.asarray(values)[np.isfinite(values)]
    return values.mean() if len(values) else np.nan


def numbers(run):
    """A complete run -> {"relearning", "final return", "retention": array [1 + tasks]: mean of all, then by task}."""
    relearning, final, retention = summarise(run)
    return {
        "relearning": np.array([mean(relearning), *map(mean, relearning.T)]),
        "final return": np.array([np.nan, *final]),  # a mean over tasks says nothing
        "retention": np.array([mean(retention), *map(mean, retention.T)]),
    }


# ===== Several seeds =====


def interval(values):
    """Each column's mean and 95 % t interval, over the seeds where it is defined: [seeds, n] -> mean, low, high, [n].

    The interval is nan for fewer than three seeds.
    """
    ends = np.full((3, values.shape[1]), np.nan)
    for column, x in enumerate(values.T):
        x = x[np.isfinite(x)]
        ends[0, column] = mean(x)
        if len(x) >= MIN_SEEDS:
            half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x))
            ends[1:, column] = x.mean() - half, x.mean() + half
    return ends


def table(methods):
    """{method's name: list of complete runs, a seed each, of one cycle} -> Markdown, a row for each number and method.

    A cell: the mean, its interval from three seeds on, then each seed's number.
    """
    tasks = next(iter(methods.values()))[0]["tasks"]
    rows = [["number", "method", "seeds", "all tasks", *tasks], ["---"] * (4 + len(tasks))]
    of_runs = {
        method: [numbers(run) for run in sorted(runs, key=lambda run: run["seed"])] for method, runs in methods.items()
    }
    for name in ("relearning", "final return", "retention"):

        def show(value, form=".1f" if name == "final return" else "+.2f"):
            return f"{value:{form}}" if np.isfinite(value) else "undefined"

        for method, of_run in of_runs.items():
            values, cells = np.stack([of[name] for of in of_run]), []
            for column, (middle, low, high) in zip(values.T, interval(values).T, strict=True):
                between = f" ({show(low)} to {show(high)})" if np.isfinite(low) else ""
                each = f": {', '.join(map(show, column))}" if len(column) > 1 and np.isfinite(middle) else ""
                cells.append(show(middle) + between + each)
            cells[0] = "" if name == "final return" else cells[0]
            rows.append([name, method, len(of_run), *cells])
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


# ===== A picture =====


def plot(axis, curves, label):
    """One line for one seed; for several each seed thin, their mean, and its interval from three seeds on."""
    steps = sorted(set.intersection(*(set(curve[:, 0]) for curve in curves)))
    values = np.stack([curve[np.isin(curve[:, 0], steps), 1] for curve in curves])
    middle, low, high = interval(values)
    (line,) = axis.plot(steps, middle, label=label, marker="." if len(steps) < 30 else None)
    if len(curves) > 1:
        axis.plot(steps, values.T, color=line.get_color(), linewidth=0.5, alpha=0.5)
    if len(curves) >= MIN_SEEDS:
        axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, linewidth=0)


def draw(path, runs):
    """Draws the curve of each visit, dormant ratio, density if logged, and the returns after each visit.

    runs: one or more of a method, with different seeds and the same cycle. What has not ended yet is left out.
    """
    names, task_steps, tasks = runs[0]["tasks"], runs[0]["task_steps"], len(runs[0]["tasks"])
    visits = min(len(run["returns"]) for run in runs) - 1
    returns = np.mean([run["returns"][: visits + 1] for run in runs], axis=0)
    columns = max(tasks, 3)
    figure = Figure(figsize=(4 * columns, 7), layout="constrained")
    axes = figure.subplots(2, columns)
    for axis, env_id, random in zip(axes[0], names, returns[0], strict=False):
        axis.axhline(random, color="grey", linestyle="--", label="random policy")
        axis.set(title=env_id, xlabel="environment steps of the visit", ylabel="evaluation return")
    for visit in range(visits):
        plot(axes[0][visit % tasks], [of_visit(run, visit) for run in runs], f"cycle {visit // tasks + 1}")
    for axis, name, label in (
        (axes[1][0], "dormant_ratio_0.1", "dormant ratio (tau = 0.1)"),
        (axes[1][1], "density", "density"),
    ):
        for tag, net in ((f"neurons/{net}/{name}", net) for net in NETS):
            if all(tag in run["curves"] for run in runs):
                plot(axis, [run["curves"][tag] for run in runs], net)
        for visit in range(visits):
            axis.axvline(visit * task_steps, color="lightgrey", zorder=0)
        axis.set(xlabel="environment steps of the run", ylabel=label)
    spread = np.maximum(np.ptp(returns, axis=0), 1e-12)
    axes[1][2].imshow((returns - returns.min(0)) / spread, aspect="auto", cmap="Greens", vmax=1.5)
    for (row, column), value in np.ndenumerate(returns):
        axes[1][2].text(column, row, f"{value:.0f}", ha="center", va="center")
    axes[1][2].set_xticks(range(tasks), names, rotation=20)
    labels = ["random policy", *(f"{names[visit % tasks]}, {visit // tasks + 1}" for visit in range(visits))]
    axes[1][2].set_yticks(range(visits + 1), labels)
    axes[1][2].set(xlabel="return on", ylabel="after task, cycle")
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
        elif axis is not axes[1][2]:
            axis.set_visible(False)
    figure.savefig(f"{path}.tmp", format="png", dpi=80)
    os.replace(f"{path}.tmp", path)


def main(folders):
    runs = []
    for folder in map(Path, folders):
        try:
            runs.append(read(folder))
            draw(folder / "cycle.png", runs[-1:])
            numbers(runs[-1])
        except (OSError, ValueError, KeyError) as error:
            sys.exit(f"error: {folder} is not a finished run of a cycle: {error}")
    if len({(*run["tasks"], run["task_steps"], run["cycles"]) for run in runs}) != 1:
        sys.exit("error: give the folders of one or more runs of the same cycle")
    method = folder.resolve().name.split("__")[1]
    if len(runs) > 1:
        draw(folder.parent / f"{method}.png", runs)
    print(table({method: runs}), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
