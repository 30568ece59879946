"""What the seeds say of methods, from the tables runs.csv and curves.csv: differences, injections, aggregates.

Seeds are paired: a seed has the same initial draws in every method. A run is worth the area under its return curve
first, as one evaluation moves by as much as seeds differ.
"""

import functools
import json
import math
import re

import cycling
import numpy as np
import pandas as pd
from rliable import library, metrics
from scipy import stats
from statsmodels.stats.power import TTestPower

MIN_SEEDS = cycling.MIN_SEEDS  # with fewer, no t interval is given
BOOTSTRAP_SEEDS = 5  # and no bootstrap interval
REPS = 10_000  # bootstrap resamples
RUN = ["task", "method", "seed"]
# What a run's return curve is worth: the evaluations that count
MEASURES = {"area": "after learning starts", "last_three": "the last three", "last_one": "the last one"}
PARENTS = ("td3_continuous", "td3_cycling", "drq_pixels")
# Task: return of random actions, and of TD3 after a million steps; from where, report.py's SOURCE says
NORMALISATION = {
    "HalfCheetah-v4": (-289.415, 10574),
    "Hopper-v4": (18.791, 3226),
    "Walker2d-v4": (2.791, 3946),
    "Ant-v4": (-70.288, 3942),
    "Humanoid-v4": (120.423, 5165),
}


def methods_order(name):
    """What sorts the methods: NE, TD3 or another parent, others; settings that are numbers by their size."""
    words = [(0, float(w), "") if re.fullmatch(r"[\d.e+-]*\d", w) else (1, 0, w) for w in re.split("[ =]", name)]
    return not name.startswith("ne_"), name.split()[0].removeprefix("ne_") not in PARENTS, words


def methods_of(runs):
    return list(dict.fromkeys(runs["method"]))


def measure(runs, curves):
    """The runs in the order of their methods, with the columns `script` and MEASURES: means of their evaluations."""
    returns = curves[curves["tag"] == "return"].merge(runs[[*RUN, "settings"]], on=RUN).sort_values("step")
    learning = returns["settings"].map(lambda settings: json.loads(settings).get("learning_starts", 0))
    each = returns.groupby(RUN)["value"]
    scores = pd.DataFrame({"last_three": each.apply(lambda values: values.tail(3).mean()), "last_one": each.last()})
    scores["area"] = returns[returns["step"] > learning].groupby(RUN)["value"].mean()
    scores["area"] = scores["area"].fillna(scores["last_one"])  # not one evaluation after learning starts
    runs = runs.sort_values("method", key=lambda column: column.map(methods_order), kind="stable")
    return runs.assign(script=runs["method"].str.split().str[0]).merge(scores.reset_index(), on=RUN)


def by_seed(runs, task, method, name):
    """A column of a method's runs -> series over seeds."""
    return runs[(runs["task"] == task) & (runs["method"] == method)].set_index("seed")[name].sort_index()


# ===== Two methods =====


@functools.cache
def detectable(n):
    """The mean difference, in standard deviations, that a paired t test at 5 % finds in 80 % of cases with n pairs."""
    return TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8)


def paired(x, y):
    """What two series over seeds say of x - y, by the seeds of both -> dict of what a paired t test gives.

    mean, low, high: the mean difference and its 95 % interval; p: of no difference; effect: the true difference that a
    test at 5 % would find in 80 % of cases, if differences spread as they do here. nan for fewer than MIN_SEEDS pairs.
    """
    pairs = (x - y).dropna()
    found = {"n": len(pairs), "mean": pairs.mean(), **dict.fromkeys(["low", "high", "p", "effect"], math.nan)}
    if len(pairs) < MIN_SEEDS:
        return found
    if pairs.std() == 0:  # two settings that do the same
        return found | {"low": pairs.mean(), "high": pairs.mean(), "p": float(pairs.mean() == 0), "effect": 0.0}
    test = stats.ttest_1samp(pairs, 0)
    ends = test.confidence_interval()._asdict()
    return found | ends | {"p": test.pvalue, "effect": detectable(len(pairs)) * pairs.std()}


def holm(p):
    """p values corrected for each other (Holm 1979); nan stays and does not count -> array."""
    p = np.array(p, dtype=float)
    order = np.argsort(p)[: np.isfinite(p).sum()]  # nan is last
    p[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return p


def differences(runs, of):
    """`of` minus each other method, on each task and for each measure -> {measure: table with a row a comparison}.

    Columns: paired's; `holm`, p corrected for the table's comparisons (Holm 1979); `ahead`, of how many pairs of a run
    of each, whatever the seeds, `of`'s is the better one.
    """
    tables = {}
    for name in MEASURES:
        rows = []
        for task in sorted(runs["task"].unique()):
            for other in methods_of(runs):
                x, y = (by_seed(runs, task, method, name) for method in (of, other))
                ahead = f"{(x.to_numpy()[:, None] > y.to_numpy()).sum()} of {len(x) * len(y)}"
                rows += [{"task": task, "method": other, "ahead": ahead} | paired(x, y)] if other != of else []
        table = pd.DataFrame(rows, columns=["task", "method", "ahead", "n", "mean", "low", "high", "p", "effect"])
        tables[name] = table.assign(holm=holm(table["p"]))
    return tables


def over_tasks(runs, of, over, scale):
    """The areas of two methods over the tasks that both have, paired -> list of tasks, dict of `paired`.

    On one task they are returns; on several they are normalised, and a task without a normalisation is left out.
    """
    counts = runs.groupby(["method", "task"])["seed"].size()
    tasks = sorted(set(counts[of].index) & set(counts[over].index))
    tasks = [task for task in tasks if len(tasks) == 1 or task in scale]
    if not tasks:
        return [], paired(pd.Series(dtype=float), pd.Series(dtype=float))
    size = {task: len(tasks) if len(tasks) == 1 else len(tasks) * (scale[task][1] - scale[task][0]) for task in tasks}
    return tasks, paired(*(sum(by_seed(runs, t, name, "area") / size[t] for t in tasks) for name in (of, over)))


def injections(runs, curves):
    """The runs with an injection beside those of their parent with the same seed and arguments.

    -> list of dicts, one a task and method: task, method, parent, step (of the first injection), not_pairs (seeds whose
    two runs do not agree before it), after: differences of the return from it on, [steps, seeds].
    """
    found = []
    for (task, method), group in runs.groupby(["task", "method"], sort=False):
        settings, script = json.loads(group["settings"].iloc[0]), group["script"].iloc[0]
        parents = runs[(runs["task"] == task) & (runs["script"] == script.removeprefix("injection_"))]
        same = [all(settings.get(k, v) == v for k, v in json.loads(text).items()) for text in parents["settings"]]
        parents = parents[same]
        seeds = sorted(set(group["seed"]) & set(parents["seed"]))
        if not script.startswith("injection_") or not seeds or "total_timesteps" not in settings:
            continue
        step = int(min(np.atleast_1d(settings.get("injection_step") or settings["total_timesteps"] // 2)))
        of = {"task": task, "method": method, "parent": parents["method"].iloc[0], "step": step, "not_pairs": []}
        after = {}
        for seed in seeds:
            of_seed = curves[(curves["task"] == task) & (curves["seed"] == seed)].set_index(["tag", "step"])
            ours, theirs = (of_seed[of_seed["method"] == name]["value"] for name in (method, of["parent"]))
            difference = (ours - theirs).dropna().sort_index()
            before = difference[difference.index.get_level_values("step") < step]
            if before.empty or before.any():
                of["not_pairs"].append(seed)
            else:
                after[seed] = difference["return"].loc[step:]
        found.append(of | {"after": pd.DataFrame(after).dropna()})
    return found


# ===== All methods, over the tasks =====


def iqm(scores):
    """rliable's interquartile mean, made fast (a quarter of the values, rounded down, goes at each end)."""
    scores = np.sort(scores, axis=None)
    cut = len(scores) // 4
    return scores[cut : len(scores) - cut].mean()


def bootstrap(statistics, scores):
    """95 % percentile intervals by the stratified bootstrap over [seeds, tasks] -> [2, n]; nan for few seeds."""
    if len(scores) < BOOTSTRAP_SEEDS:
        return np.full((2, len(statistics(scores))), np.nan)
    np.random.seed(0)  # rliable draws from numpy's global generator
    return library.get_interval_estimates({"": scores}, statistics, reps=REPS)[1][""]


def aggregate(runs, scale):
    """The normalised areas over the tasks where all methods with two seeds anywhere have two: one seed has no rank.

    scale: {task: what counts as 0 and as 1} -> table with a row a method, {task: why it is left out}. Of each task the
    first seeds count, as many as a method has on all.
    """
    counts = runs.groupby(["method", "task"])["seed"].size()
    methods = [method for method in methods_of(runs) if counts[method].max() > 1]
    rows, left_out = [], {}
    for task in sorted(runs["task"].unique()):
        missing = [method for method in methods if counts[method].get(task, 0) < 2]
        if task not in scale:
            left_out[task] = "no normalisation"
        elif missing:
            left_out[task] = f"not two seeds of {', '.join(missing)}"
    tasks = [task for task in sorted(runs["task"].unique()) if task not in left_out]
    for method in methods if tasks else []:
        low, high = np.array([scale[task] for task in tasks]).T
        n = counts[method][tasks].min()
        scores = np.stack([by_seed(runs, task, method, "area").to_numpy()[:n] for task in tasks], axis=1)
        scores = (scores - low) / (high - low)  # [seeds, tasks]

        def statistics(x):
            return np.array([iqm(x), metrics.aggregate_optimality_gap(x), x.mean()])

        rows.append([method, tasks, n, *statistics(scores), *bootstrap(statistics, scores).T.ravel()])
    names = [f"{name}{end}" for name in ("iqm", "gap", "mean") for end in ("_low", "_high")]
    return pd.DataFrame(rows, columns=["method", "tasks", "n", "iqm", "gap", "mean", *names]), left_out
