"""benchmark/report.py: from event files to CSV files, tables and pictures."""

import dataclasses
import json
import shutil

import harness
import numpy as np
import pandas as pd
import pytest
from harness import ROOT, events, load_script
from PIL import Image
from rliable import metrics
from scipy import stats
from torch.utils.tensorboard import SummaryWriter

report = load_script(ROOT / "benchmark" / "report.py")
compare = report.compare
NE, TD3 = "ne_td3_continuous", "td3_continuous"
CHEETAH, HOPPER = "HalfCheetah-v4", "Hopper-v4"


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(compare, "REPS", 300)


def write_events(folder, logs, start=0.0):
    """Writes an event file: {tag: [(step, value), ...]}, a hundred steps a second."""
    with SummaryWriter(folder) as writer:
        for tag, points in logs.items():
            for step, value in points:
                writer.add_scalar(tag, value, step, walltime=start + step / 100)


def write_run(runs, task, script, seed, final, time=1700000000, last=1000, logs=None, own=True, **args):
    """Writes a run with three evaluations, the last one `final` -> its folder."""
    folder = runs / f"{task}__{script}__{seed}__{time}"
    evaluations = [(last // 4, 0.0), (last // 2, final / 2), (last, final)]
    write_events(folder, {"eval/episodic_return": evaluations} if logs is None else logs)
    if own:
        args = {"env_id": task, "seed": seed, "total_timesteps": 1000, "omega": 0.5, "grow": True} | args
        (folder / "args.json").write_text(json.dumps(args))
    return folder


def read(runs, **options):
    """Collects the runs -> runs, curves, as they stand in the CSV files."""
    report.collect([runs], runs / "report", **options)
    return report.load(runs / "report")[:2]


def measured(runs, **options):
    """As read, with what the runs are worth."""
    runs, curves = read(runs, **options)
    return compare.measure(runs, curves), curves


def rows(section, first):
    """The cells of the rows of a section's tables whose first cell is `first` -> list of lists."""
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    return [row for row in table if row[0] == first]


def some_runs(folder, seeds=2, tasks=((CHEETAH, 1000), (HOPPER, 100))):
    """NE and TD3 on some tasks, with returns about so large, and with neurons -> the folder."""
    neurons = {"neurons/actor/dormant_ratio_0.1": 0.3, "neurons/qf1/dormant_ratio_0.1": 0.1}
    neurons |= {"neurons/qf2/dormant_ratio_0.1": 0.2}
    for task, size in tasks:
        for script, better in ((NE, 1.5), (TD3, 1)):
            for seed in range(1, seeds + 1):
                final = size * better * seed
                logs = {"eval/episodic_return": [(step, final * step / 1000) for step in (250, 500, 1000)]}
                logs |= {tag: [(step, value * seed) for step in (500, 1000)] for tag, value in neurons.items()}
                write_run(folder, task, script, seed, final, logs=logs)
    return folder


# ===== Numbers =====


def test_the_quick_iqm_is_rliables_and_the_mean_of_the_middle_half():
    random = np.random.default_rng(0)
    for shape in [(5, 1), (8, 1), (5, 5), (7, 3), (1, 1), (3, 1)]:
        scores = random.normal(size=shape)
        assert compare.iqm(scores) == pytest.approx(metrics.aggregate_iqm(scores))
        middle = sorted(scores.ravel())[scores.size // 4 : scores.size - scores.size // 4]
        assert compare.iqm(scores) == pytest.approx(sum(middle) / len(middle))


def test_the_area_is_the_mean_of_the_evaluations_after_learning_starts_beside_the_last_three_and_the_last(tmp_path):
    steps, values = range(100, 1001, 100), [5.0, 900, -30, 70, 10, 40, 20, 80, 60, 90]
    logs = {"eval/episodic_return": list(zip(steps, values, strict=True))}
    write_run(tmp_path, CHEETAH, NE, 1, 0, logs=logs, learning_starts=200)
    write_run(tmp_path, CHEETAH, NE, 2, 0, logs=logs, learning_starts=1000)  # none after it: the last one stands
    write_run(tmp_path, CHEETAH, "other", 1, 0, logs=logs, own=False)  # nothing is known: all of them
    runs, _ = measured(tmp_path)
    runs = runs.set_index(["script", "seed"])
    assert runs.loc[(NE, 1), "area"] == pytest.approx(sum(values[2:]) / 8)
    assert runs.loc[(NE, 2), "area"] == 90 and runs.loc[("other", 1), "area"] == pytest.approx(sum(values) / 10)
    assert runs["last_three"].tolist() == pytest.approx([(80 + 60 + 90) / 3] * 3) and (runs["last_one"] == 90).all()


def test_a_table_gives_each_seeds_area_and_from_three_seeds_on_the_t_interval_of_the_mean(tmp_path):
    values = [100.0, 900, 300, 500, 700, 200, 400, 4000]
    for seed, value in enumerate(values, 1):
        write_run(tmp_path, CHEETAH, NE, seed, value)
    for seed in (1, 2):
        write_run(tmp_path, CHEETAH, TD3, seed, 100.0 * seed)
    write_run(tmp_path, CHEETAH, "one", 1, 300.0)
    sections, _ = report.compute(*measured(tmp_path))
    areas = np.array(values) / 2  # of evaluations 0, half, all
    low, high = stats.t.interval(0.95, 7, areas.mean(), stats.sem(areas))
    ((_, n, area, each, three, one, *_),) = rows(sections["returns"], f"`{NE}`")
    assert (n, area) == ("8", f"{areas.mean():.0f} ({report.number(low)} to {high:.0f})")
    assert each == "50, 450, 150, 250, 350, 100, 200, 2000"
    assert three == f"{areas.mean():.0f}" and one == f"{np.mean(values):.0f}"
    ((_, n, area, each, *_),) = rows(sections["returns"], f"`{TD3}`")
    assert (n, area, each) == ("2", "75 (too few seeds)", "50, 100")
    assert rows(sections["returns"], "`one`")[0][1:4] == ["1", "150", "150"]
    assert "**HalfCheetah-v4**, 1_000 steps. Return of the evaluations" in sections["returns"]


def test_bootstrap_intervals_are_the_same_each_time_and_those_of_a_plain_bootstrap(monkeypatch):
    scores = np.random.default_rng(2).normal(size=(6, 2))
    monkeypatch.setattr(compare, "REPS", 4000)

    def mean(x):
        return np.array([x.mean()])

    ends = compare.bootstrap(mean, scores)[:, 0]
    np.testing.assert_array_equal(ends, compare.bootstrap(mean, scores)[:, 0])
    drawn = np.random.default_rng(3).integers(0, 6, (4000, 6, 2))  # each task's seeds apart
    means = scores[drawn, [0, 1]].mean((1, 2))
    np.testing.assert_allclose(ends, np.percentile(means, [2.5, 97.5]), atol=0.04)
    assert np.isnan(compare.bootstrap(mean, scores[:4])).all()


def test_differences_are_those_of_a_paired_t_test_over_the_seeds_of_both():
    random = np.random.default_rng(4)
    for n in (3, 5, 10):
        x, y = pd.Series(random.normal(1, 2, n + 1), range(n + 1)), pd.Series(random.normal(size=n), range(1, n + 1))
        found, d = compare.paired(x, y), x.to_numpy()[1:] - y.to_numpy()  # x's seed 0 has no pair
        half = stats.t.ppf(0.975, n - 1) * d.std(ddof=1) / np.sqrt(n)
        assert found["n"] == n and found["p"] == pytest.approx(stats.ttest_rel(x[1:], y).pvalue)
        np.testing.assert_allclose([found[k] for k in ("mean", "low", "high")], d.mean() + half * np.array([0, -1, 1]))

        of, end = found["effect"] / d.std(ddof=1) * np.sqrt(n), stats.t.ppf(0.975, n - 1)
        power = stats.nct.sf(end, n - 1, of) + np.nan_to_num(stats.nct.cdf(-end, n - 1, of))
        assert power == pytest.approx(0.8, abs=1e-4)
    few = compare.paired(x[:3], y)
    assert few["n"] == 2 and all(np.isnan(few[name]) for name in ("low", "high", "p", "effect"))
    alike = compare.paired(y, y)
    assert (alike["mean"], alike["low"], alike["high"], alike["p"], alike["effect"]) == (0, 0, 0, 1, 0)


def test_p_values_are_corrected_by_holm_over_the_comparisons_of_the_table():
    random = np.random.default_rng(5)
    names = [NE, "a", "b", "c"]
    runs = pd.DataFrame([(CHEETAH, name, seed) for name in names for seed in range(6)], columns=compare.RUN)
    for name in compare.MEASURES:
        runs[name] = random.normal(size=24) + 1.5 * (runs["method"] == NE)
    runs = pd.concat([runs, runs[:1].assign(method="once")])
    for name, table in compare.differences(runs, NE).items():
        of = {method: group.set_index("seed")[name] for method, group in runs.groupby("method")}
        p = {method: stats.ttest_rel(of[NE], of[method]).pvalue for method in names[1:]}
        holm, worst = {}, 0.0
        for rank, method in enumerate(sorted(p, key=p.get)):  # the smallest times 3, the next times 2, ...
            worst = holm[method] = max(worst, min(1.0, (3 - rank) * p[method]))
        table = table.set_index("method")
        assert list(table.index) == ["a", "b", "c", "once"]
        np.testing.assert_allclose(table.loc[names[1:], "holm"], [holm[method] for method in names[1:]])
        assert np.isnan(table.loc["once", "holm"]) and np.isnan(table.loc["once", "p"])
        ahead = sum(x > y for x in of[NE] for y in of["b"])
        assert table.loc["b", "ahead"] == f"{ahead} of 36"


def test_the_published_comparison_gives_the_known_numbers():
    """Of NE, its three ablations, TD3 and static sparse networks, five seeds each, as scipy computes them."""
    runs, curves, _ = report.load(ROOT / "benchmark" / "results" / "td3_100k")
    runs = compare.measure(runs, curves)
    runs = runs[~runs["method"].str.contains("grow=False review=False|growth_criterion")]
    tables = {name: table.set_index("method") for name, table in compare.differences(runs, NE).items()}
    area, last = ({name: compare.by_seed(runs, CHEETAH, name, of) for name in runs["method"]} for of in compare.MEASURES
                  if of != "last_three")  # fmt: skip
    static = "static_sparse_td3_continuous"
    assert [round(area[name].mean()) for name in (NE, static, TD3)] == [2360, 2259, 2296]
    assert tables["area"].loc[static, "ahead"] == "18 of 25"
    assert stats.mannwhitneyu(area[NE], area[static]).pvalue == pytest.approx(0.31, abs=0.005)
    assert stats.mannwhitneyu(last[NE], last[static]).pvalue == pytest.approx(0.016, abs=0.0005)
    assert tables["last_one"].loc[static, ["p", "holm"]].tolist() == pytest.approx([0.0157, 0.063], abs=0.0005)
    assert tables["area"]["p"].notna().sum() == 5
    row = rows(report.compute(runs, curves)[0]["differences"], f"`{static}`")[0]
    assert row[4:7] == ["101 (-77.4 to 279)", "0.19 (0.76)", "242"] and row[-1] == "0.016 (0.063)"


def test_one_primary_question_stands_above_the_table_and_a_method_with_one_seed_has_no_row(tmp_path):
    finals = {NE: [500.0, 600, 700, 800], TD3: [100.0, 180, 320, 380], "one_td3": [9000.0]}
    for script, values in finals.items():
        for seed, value in enumerate(values, 1):
            write_run(tmp_path, CHEETAH, script, seed, value)
    tables = measured(tmp_path)
    sections, numbers = report.compute(*tables)
    text, d = sections["differences"], (np.array(finals[NE]) - finals[TD3]) / 2
    low, high = stats.t.interval(0.95, 3, d.mean(), stats.sem(d))
    assert text.startswith(f"**Primary question** (HalfCheetah-v4): is the area of `{NE}` larger than that of `{TD3}`?")
    assert f"Difference {d.mean():.0f} ({low:.0f} to {high:.0f}), 4 pairs of seeds: yes (p = " in text
    assert f"A true difference of {report.number(numbers['differences']['area']['effect'][0])} would have" in text
    assert text.index("Primary question") < text.index(f"| `{NE}` minus") and not rows(text, "`one_td3`")
    row = rows(text, f"`{TD3}`")[0]
    p = stats.ttest_1samp(d, 0).pvalue
    assert row[1:6] == [CHEETAH, "4", "16 of 16", f"{d.mean():.0f} ({low:.0f} to {high:.0f})", f"{p:.2g} ({p:.2g})"]
    assert "no, it is smaller" in report.compute(*tables, of=TD3, over=NE)[0]["differences"]
    assert "Primary question" not in report.compute(*tables, over="one_td3")[0]["differences"]  # one pair: no answer
    write_run(tmp_path, CHEETAH, "one_td3", 2, 1.0)
    assert "too few pairs of seeds" in report.compute(*measured(tmp_path), over="one_td3")[0]["differences"]


def test_over_several_tasks_the_primary_question_is_of_the_mean_normalised_difference(tmp_path):
    random, given = np.random.default_rng(6), {CHEETAH: (100.0, 300.0), HOPPER: (0.0, 10.0)}
    values = {(task, name): random.normal(size=4) for task in (CHEETAH, HOPPER, "Pendulum-v1") for name in (NE, TD3)}
    for (task, name), of in values.items():
        for seed, value in enumerate(of, 1):
            write_run(tmp_path, task, name, seed, value)
    runs, _ = measured(tmp_path)
    tasks, found = compare.over_tasks(runs, NE, TD3, given)
    d = {task: (values[task, NE] - values[task, TD3]) / 2 for task in given}
    d = (d[CHEETAH] / 200 + d[HOPPER] / 10) / 2
    assert tasks == [CHEETAH, HOPPER]  # Pendulum has no normalisation
    assert found["mean"] == pytest.approx(d.mean(), rel=1e-4)  # the CSV file has six digits
    assert found["p"] == pytest.approx(stats.ttest_1samp(d, 0).pvalue, rel=1e-4)
    assert compare.over_tasks(runs, NE, TD3, {})[0] == []


def test_the_aggregate_is_over_normalised_tasks_that_all_methods_have_with_the_first_seeds(tmp_path):
    returns = {
        (CHEETAH, NE): [5000.0, 12000, 3000],
        (HOPPER, NE): [1000.0, 2000],
        (CHEETAH, TD3): [4000.0, 2000],
        (HOPPER, TD3): [500.0, 4000],
        (CHEETAH, "once"): [99999.0],
        ("Ant-v4", NE): [1.0, 2.0],
        ("Pendulum-v1", NE): [-150.0, -160.0],
        ("Pendulum-v1", TD3): [-150.0, -160.0],
    }
    for (task, script), values in returns.items():
        for seed, value in enumerate(values, 1):
            write_run(tmp_path, task, script, seed, value)
    runs, curves = measured(tmp_path)
    sections, _ = report.compute(runs, curves)
    for method in (NE, TD3):
        scores = []
        for task, (low, high) in ((CHEETAH, (-289.415, 10574)), (HOPPER, (18.791, 3226))):
            scores += [(value / 2 - low) / (high - low) for value in returns[task, method][:2]]
        gap = sum(max(0, 1 - score) for score in scores) / 4
        iqm, mean = sum(sorted(scores)[1:3]) / 2, sum(scores) / 4
        expected = [f"{value:.3f} (too few seeds)" for value in (iqm, gap, mean)]
        assert rows(sections["aggregate"], f"`{method}`") == [[f"`{method}`", "2", *expected]]
    assert not rows(sections["aggregate"], "`once`")  # one seed has no rank
    assert "Tasks: HalfCheetah-v4, Hopper-v4." in sections["aggregate"]
    left = "Left out: Ant-v4 (not two seeds of td3_continuous), Pendulum-v1 (no normalisation)."
    assert left in sections["aggregate"]
    assert f"more seeds on one task than on another, the first count: `{NE}`: 2." in sections["aggregate"]
    assert "SimbaV2" in sections["aggregate"] and "not checked against the paper" in sections["aggregate"]
    assert "about 90 % with five seeds" in sections["aggregate"]
    given = report.compute(runs, curves, given={"Pendulum-v1": (-1200, -150)})[0]["aggregate"]
    assert "Tasks: HalfCheetah-v4, Hopper-v4, Pendulum-v1." in given and "-1200 is 0, -150 is 1." in given


def test_with_five_seeds_the_aggregate_has_intervals_around_its_values(tmp_path):
    for seed, value in enumerate(np.random.default_rng(4).uniform(1000, 9000, 6), 1):
        write_run(tmp_path, CHEETAH, NE, seed, float(value))
    (row,) = report.compute(*measured(tmp_path))[1]["aggregate"].itertuples()
    assert row.iqm_low < row.iqm < row.iqm_high and row.gap_low < row.gap < row.gap_high
    assert row.mean_low < row.mean < row.mean_high


# ===== Injection =====

INJECTION = "injection_td3_continuous"


def write_pair(runs, seed, effect, before=0.0, **args):
    """Writes a run of TD3 and one with an injection at step 500 whose return differs by `effect` after it."""
    random, steps = np.random.default_rng(seed), range(100, 1001, 100)
    curve = random.normal(100, 10, 10)
    other = [value + (effect if step > 500 else before) for step, value in zip(steps, curve, strict=True)]
    for script, values in ((TD3, curve), (INJECTION, other)):
        dormant = [(step, 0.25 if step < 500 or script == TD3 else 0.5) for step in steps]
        logs = {
            "eval/episodic_return": list(zip(steps, values, strict=True)),
            "neurons/actor/dormant_ratio_0.1": dormant,
        }
        write_run(runs, CHEETAH, script, seed, 0, logs=logs, **(args if script == INJECTION else {}))


def test_an_injections_effect_is_the_difference_to_its_parents_run_with_the_same_seed_after_it(tmp_path):
    effects = {1: 30.0, 2: 50.0, 3: 70.0, 4: 20.0}
    for seed, effect in effects.items():
        write_pair(tmp_path, seed, effect)
    write_run(tmp_path, CHEETAH, TD3, 9, 1.0)  # without a partner
    (found,) = compare.injections(*measured(tmp_path))
    assert (found["method"], found["parent"], found["step"], found["not_pairs"]) == (INJECTION, TD3, 500, [])
    assert list(found["after"].index) == [500, 600, 700, 800, 900, 1000] and list(found["after"]) == [1, 2, 3, 4]
    np.testing.assert_allclose(found["after"].loc[600:], [list(effects.values())] * 5, atol=2e-3)  # CSV: six digits
    assert (found["after"].loc[500] == 0).all()
    report.main([str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    of = list(effects.values())
    low, high = stats.t.interval(0.95, 3, np.mean(of), stats.sem(of))
    assert f"injection at step 500: difference of the mean return after it {np.mean(of):.1f}".rstrip("0.") in text
    assert f"({low:.3g} to {high:.3g}): **it helped** (each seed: 30, 50, 70, 20)." in text
    assert "](injection.png)" in text


def test_what_an_injection_did_is_told_by_its_interval_alone(tmp_path):
    for name, effects, told in (
        ("hurt", (-30, -50, -40), "it hurt"),
        ("unclear", (-30, 50, 40), "cannot be told"),
        ("few", (30, 31), "(too few seeds): **whether it helped cannot be told**"),
    ):
        for seed, effect in enumerate(effects, 1):
            write_pair(tmp_path / name, seed, effect, injection_step=[700, 500], inject="critic")
        runs, curves = measured(tmp_path / name)
        assert compare.injections(runs, curves)[0]["step"] == 500
        assert told in report.compute(runs, curves)[0]["injection"]


def test_runs_that_do_not_agree_before_the_injection_are_not_pairs(tmp_path):
    write_pair(tmp_path, 1, 30.0)
    write_pair(tmp_path, 2, 30.0, before=1.0)
    runs, curves = measured(tmp_path)
    (found,) = compare.injections(runs, curves)
    assert found["not_pairs"] == [2] and list(found["after"]) == [1]
    assert "the runs with seed 2 do not agree before it, so are not pairs: left out" in report.injection_section(
        [found]
    )
    neurons = curves[(curves["tag"] == "dormant_actor") & (curves["step"] < 500)].index
    curves.loc[neurons[0], "value"] += 0.125  # one look at the neurons is enough to tell
    assert compare.injections(runs, curves)[0]["not_pairs"] == [1, 2]
    other = tmp_path / "other"
    write_pair(other, 1, 30.0, omega=0.1)  # another argument: there is no parent
    assert compare.injections(*measured(other)) == []


# ===== From event files =====


def test_runs_without_evaluations_make_the_whole_task_use_training_returns_in_twenty_bins(tmp_path):
    random = np.random.default_rng(5)
    points = [(int(step), float(random.normal())) for step in np.sort(random.choice(np.arange(1, 1000), 60, False))]
    points.append((1000, 7.0))
    foreign = write_run(
        tmp_path, CHEETAH, "td3_continuous_action", 3, 0, logs={"charts/episodic_return": points}, own=0
    )
    ours = {"charts/episodic_return": [(500, 1.0), (960, 2.0), (1000, 4.0)], "eval/episodic_return": [(1000, 99.0)]}
    write_run(tmp_path, CHEETAH, TD3, 1, 0, logs=ours)
    write_run(tmp_path, HOPPER, TD3, 1, 50.0)
    runs, curves = read(tmp_path)
    assert not (foreign / "args.json").exists()
    runs = runs.set_index(["task", "method"])
    assert runs.loc[CHEETAH, "returns"].tolist() == ["training"] * 2
    assert runs.loc[(HOPPER, TD3), "returns"] == "evaluation"
    assert runs.loc[(CHEETAH, TD3), "final_return"] == 3.0
    assert runs.loc[(CHEETAH, "td3_continuous_action"), "seed"] == 3
    expected = []
    for end in range(50, 1001, 50):
        inside = [value for step, value in points if end - 50 < step <= end]
        if inside:
            expected.append((end, sum(inside) / len(inside)))
    curve = curves[curves["method"] == "td3_continuous_action"]
    assert set(curve["tag"]) == {"return"}
    np.testing.assert_allclose(curve[["step", "value"]], expected, rtol=1e-5)
    sections, _ = report.compute(*measured(tmp_path))
    assert "**HalfCheetah-v4**, 1_000 steps. Training return, with exploration noise" in sections["returns"]
    assert "**Hopper-v4**, 1_000 steps. Return of the evaluations" in sections["returns"]


def test_a_resumed_runs_event_files_are_one_curve_and_their_times_are_summed(tmp_path):
    folder = write_run(tmp_path, CHEETAH, NE, 1, 0, logs={"eval/episodic_return": [(100, 1.0), (500, 2.0)]})
    write_events(folder, {"eval/episodic_return": [(600, 3.0), (1000, 4.0)]}, start=100_000)
    folder.rename(f"{folder}-1")  # the name where two runs start in the same second
    runs, curves = read(tmp_path)
    assert curves[["step", "value"]].to_numpy().tolist() == [[100, 1], [500, 2], [600, 3], [1000, 4]]
    (run,) = runs.itertuples()
    assert (run.steps, run.final_return) == (1000, 4)
    assert run.wall_clock_s == pytest.approx(4 + 4, abs=1e-3)
    assert run.steps_per_s == pytest.approx((400 + 400) / 8, abs=0.1)


def test_what_a_resumed_run_has_made_void_does_not_count(tmp_path):
    folder = write_run(tmp_path, CHEETAH, NE, 1, 0, logs={"eval/episodic_return": [(100, 1.0), (500, 2.0), (700, 9.0)]})
    with SummaryWriter(folder, purge_step=601) as writer:  # it went on from step 600
        for step, value in ((700, 3.0), (1000, 4.0)):
            writer.add_scalar("eval/episodic_return", value, step, walltime=1000 + step / 100)
    runs, curves = read(tmp_path)
    assert curves[["step", "value"]].to_numpy().tolist() == [[100, 1], [500, 2], [700, 3], [1000, 4]]
    assert events(folder)["eval/episodic_return"] == list(curves[["step", "value"]].itertuples(index=False, name=None))
    assert runs["wall_clock_s"].tolist() == pytest.approx([4 + 3], abs=1e-3)


def test_neuron_curves_are_means_over_the_networks_and_thinned_with_their_ends_kept(tmp_path):
    steps, logs = range(10, 1001, 10), {"eval/episodic_return": [(1000, 5.0)]}
    for number, net in enumerate(("actor", "qf1", "qf2")):
        logs[f"neurons/{net}/dormant_ratio_0.1"] = [(step, step / 12345 + number) for step in steps]
        logs[f"neurons/{net}/density"] = [(step, step / 2000 + number / 10) for step in steps]
        logs[f"neurons/{net}/density_layer1"] = [(step, 77.0) for step in steps]
        logs[f"neurons/{net}/dormant_ratio_0"] = [(step, 77.0) for step in steps]
    write_run(tmp_path, CHEETAH, NE, 1, 0, logs=logs)
    _, curves = read(tmp_path)
    expected = {
        "dormant_actor": lambda step: step / 12345,
        "dormant_qf": lambda step: step / 12345 + 1.5,
        "density": lambda step: step / 2000 + 0.1,
    }
    assert set(curves["tag"]) == {"return", *expected}
    for tag, value in expected.items():
        curve = curves[curves["tag"] == tag]
        assert len(curve) == 50 and curve["step"].iloc[0] == 10 and curve["step"].iloc[-1] == 1000
        np.testing.assert_allclose(curve["value"], value(curve["step"].to_numpy()), rtol=1e-5)
    lines = (tmp_path / "report" / "curves.csv").read_text().splitlines()[1:]
    assert all(len(line.split(",")[-1].replace("0.", "").replace(".", "").lstrip("0")) <= 6 for line in lines)


def test_the_table_has_the_mean_of_the_last_look_at_the_neurons_and_the_median_speed(tmp_path):
    runs, curves = measured(some_runs(tmp_path))
    runs["wall_clock_s"], runs["steps_per_s"] = 600 * runs["seed"], 100 * runs["seed"]
    sections, _ = report.compute(runs, curves)
    for row in rows(sections["returns"], f"`{TD3}`"):  # 0.3, and the mean of 0.1 and 0.2; times seeds 1 and 2
        assert row[6:9] == ["0.450", "0.225", "-"]
        assert row[9:] == ["150", "15"]


def test_what_the_events_did_is_counted_over_networks_and_events_and_stands_for_ne_alone(tmp_path):
    random = np.random.default_rng(0)
    expected = {}
    for seed in (1, 2):
        logs = {"eval/episodic_return": [(1000, 5.0)]}
        for net in ("actor", "qf1", "qf2"):
            for what in ("grown", "pruned"):
                values = random.integers(0, 50, 4)
                expected[seed, what] = expected.get((seed, what), 0) + values.sum()
                logs[f"ne/{net}/{what}"] = list(zip((100, 200, 300, 400), map(float, values), strict=True))
            values = random.random(4)
            expected[seed, "change"] = max(expected.get((seed, "change"), 0), *values)
            logs[f"ne/{net}/output_change_pruning"] = list(zip((100, 200, 300, 400), values, strict=True))
            logs[f"ne/{net}/output_change_growth"] = [(step, 0.0) for step in (100, 200, 300, 400)]
        logs["ne/review_share"] = [(100, 0.0), (300, 0.1), (500, 0.2 * seed)]
        logs["ne/review_threshold"] = [(100, 77.0)]
        write_run(tmp_path, CHEETAH, NE, seed, 0, logs=logs)
        write_run(tmp_path, CHEETAH, TD3, seed, 0)
    runs, _ = read(tmp_path)
    for run in runs[runs["method"] == NE].itertuples():
        assert (run.events, run.grown, run.pruned) == (4, expected[run.seed, "grown"], expected[run.seed, "pruned"])
        assert run.change_by_pruning == pytest.approx(expected[run.seed, "change"]) and run.change_by_growth == 0
        assert run.review_share == pytest.approx((0.1 + 0.2 * run.seed) / 3)
    assert runs[runs["method"] == TD3][["grown", "pruned", "review_share"]].isna().all(axis=None)
    section = report.events_section(runs)
    (row,) = rows(section, f"`{NE}`")
    ends = {what: sorted(expected[seed, what] for seed in (1, 2)) for what in ("grown", "pruned")}
    assert row[1:6] == [CHEETAH, "2", "4", *(f"{low} to {high}" for low, high in ends.values())]
    assert row[6:] == ["0", f"{max(expected[seed, 'change'] for seed in (1, 2)):.2g}", "10 to 17 %"]
    runs["review_share"] = np.nan  # as with --no-review
    assert rows(report.events_section(runs), f"`{NE}`")[0][8] == "-"
    assert not rows(section, f"`{TD3}`") and report.events_section(runs[runs["method"] == TD3]) == ""


def test_a_method_is_the_script_and_the_arguments_that_differ_from_the_most_common_ones(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, CHEETAH, NE, seed, 1.0, eval_episodes=seed, cuda=seed > 1, torch_threads=seed)
    write_run(tmp_path, CHEETAH, NE, 4, 1.0, grow=False)
    write_run(tmp_path, CHEETAH, NE, 5, 1.0, grow=False, omega=0.1)
    write_run(tmp_path, CHEETAH, TD3, 1, 1.0, omega=0.1)  # no most common value: both carry it
    write_run(tmp_path, CHEETAH, TD3, 2, 1.0, omega=0.2)
    write_run(tmp_path, HOPPER, NE, 1, 1.0, omega=7)  # another task: nothing differs there
    runs, _ = read(tmp_path)
    methods = {(run.task, run.method, run.seed) for run in runs.itertuples()}
    assert methods == {
        *((CHEETAH, NE, seed) for seed in (1, 2, 3)),
        (CHEETAH, f"{NE} grow=False", 4),
        (CHEETAH, f"{NE} omega=0.1 grow=False", 5),
        (CHEETAH, f"{TD3} omega=0.1", 1),
        (CHEETAH, f"{TD3} omega=0.2", 2),
        (HOPPER, NE, 1),
    }
    settings = runs.set_index(["task", "method", "seed"])["settings"].map(json.loads)
    usual = {"total_timesteps": 1000, "omega": 0.5, "grow": True}  # all that makes the method, so that it can be merged
    assert settings[CHEETAH, NE, 1] == usual
    assert settings[CHEETAH, f"{NE} omega=0.1 grow=False", 5] == usual | {"omega": 0.1, "grow": False}
    assert settings[HOPPER, NE, 1] == usual | {"omega": 7}


def test_published_curves_are_drawn_with_the_runs_of_their_task(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    for task in (CHEETAH, HOPPER):
        write_run(tmp_path, task, TD3, 1, 1000.0)
    folder = tmp_path / "report"
    read(tmp_path)
    report.draw(folder)
    before = report.load(folder)[2]
    lines = ["# where it is from", "task,name,step,mean,std", f"{CHEETAH},theirs,0,10,1", f"{CHEETAH},theirs,500,30,2"]
    (folder / "published.csv").write_text("\n".join(lines))
    drawn.clear()
    report.draw(folder)
    cheetah, hopper = ({line.get_label(): line for line in panel.lines} for panel in drawn[0].axes)
    assert "theirs" in cheetah and "theirs" not in hopper
    np.testing.assert_array_equal(cheetah["theirs"].get_xydata(), [[0, 10], [500, 30]])
    band = np.unique(drawn[0].axes[0].collections[-1].get_paths()[0].vertices, axis=0)
    np.testing.assert_array_equal(band, [[0, 9], [0, 11], [500, 28], [500, 32]])
    assert report.load(folder)[2] != before  # so that a picture without them counts as an old one
    (folder / "published.csv").write_text("step,mean\n1,2\n")
    with pytest.raises(SystemExit):
        report.draw(folder)
    assert "its columns must be task,name,step,mean,std" in capsys.readouterr().err


def test_no_two_of_twenty_methods_are_drawn_alike_and_titles_fit_into_their_pictures(tmp_path, monkeypatch):
    styles = report.styles([str(number) for number in range(20)]).values()
    assert len({(style["color"], style["linestyle"]) for style in styles}) == 20
    drawn = []
    monkeypatch.setattr(report.plt, "close", drawn.append)
    for script, seeds in ((NE, 5), (TD3, 2)):  # so that the titles explain bands and thin lines
        for seed in range(1, seeds + 1):
            write_run(tmp_path, CHEETAH, script, seed, 1000.0 * seed)
    read(tmp_path)
    report.draw(tmp_path / "report")
    assert len(drawn) == 2  # curves, aggregate
    for figure in drawn:
        title = figure._suptitle.get_window_extent()
        assert title.x0 >= 0 and title.x1 <= figure.bbox.width


def test_methods_stand_in_order_ne_first_then_td3_and_settings_by_their_size():
    order = [
        NE,
        f"{NE} omega=0.5",
        f"{NE} omega=10",
        "ne_layer_norm_td3_continuous",
        TD3,
        f"{TD3} grow=False",
        "redo_td3_continuous",
        "zzz",
    ]
    assert sorted(order, key=compare.methods_order) == order
    assert compare.methods_of(pd.DataFrame({"method": order + order[::-1]})) == order


def test_of_runs_with_the_same_seed_the_furthest_then_the_newest_counts(tmp_path, capsys):
    write_run(tmp_path, CHEETAH, NE, 1, 10.0, time=1)
    newest = write_run(tmp_path / "deeper" / "still", CHEETAH, NE, 1, 30.0, time=3)
    write_run(tmp_path, CHEETAH, NE, 1, 20.0, time=2)
    write_run(tmp_path, HOPPER, NE, 1, 5.0, time=1, last=2000)
    write_run(tmp_path, HOPPER, NE, 1, 6.0, time=2)
    write_run(tmp_path, HOPPER, NE, 2, 7.0)
    runs, _ = read(tmp_path)
    assert runs[["task", "seed", "final_return"]].to_numpy().tolist() == [
        [CHEETAH, 1, 30],
        [HOPPER, 1, 5],
        [HOPPER, 2, 7],
    ]
    (cheetah, hopper) = capsys.readouterr().err.splitlines()
    assert cheetah.startswith(f"3 runs of {NE} on {CHEETAH} with seed 1") and str(newest) in cheetah
    assert hopper.startswith(f"2 runs of {NE} on {HOPPER} with seed 1")


def test_an_unfinished_run_counts_only_with_unfinished(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path, CHEETAH, NE, seed, 10.0)
    short = write_run(tmp_path, CHEETAH, NE, 3, 10.0, last=996)
    runs, _ = read(tmp_path)
    assert runs["seed"].tolist() == [1, 2]
    assert capsys.readouterr().err == f"left out {short}: at step 996 of 1000; --unfinished takes it in\n"
    runs, _ = read(tmp_path, unfinished=True)
    assert runs["seed"].tolist() == [1, 2, 3]
    assert "996 to 1_000 steps" in report.compute(*measured(tmp_path, unfinished=True))[0]["returns"]


def test_interrupted_runs_are_no_result_even_where_none_has_ended(tmp_path, capsys):
    short = [write_run(tmp_path, CHEETAH, NE, seed, 10.0, last=400) for seed in (1, 2)]
    with pytest.raises(SystemExit):
        read(tmp_path)
    err = capsys.readouterr().err
    assert all(f"left out {run}: at step 400 of 1000; --unfinished takes it in" in err for run in short)
    (short[1] / "models").mkdir()
    (short[1] / "models" / "1000.pt").touch()  # ended, though the last steps were not logged
    assert read(tmp_path)[0]["seed"].tolist() == [2]


def test_another_projects_run_may_end_with_its_last_episode_shortly_before_the_last_step(tmp_path, capsys):
    for seed in (1, 2):
        write_run(tmp_path, CHEETAH, TD3, seed, 10.0)
    write_run(tmp_path, CHEETAH, "td3_continuous_action", 1, 10.0, last=992, own=False)
    short = write_run(tmp_path, CHEETAH, "td3_continuous_action", 2, 10.0, last=988, own=False)
    runs, _ = read(tmp_path)
    assert runs[["method", "seed"]].to_numpy().tolist() == [[TD3, 1], [TD3, 2], ["td3_continuous_action", 1]]
    assert capsys.readouterr().err.startswith(f"left out {short}: ")


def test_what_cannot_be_used_is_skipped_with_a_line_each(tmp_path, capsys):
    write_run(tmp_path, CHEETAH, NE, 1, 10.0)
    odd = tmp_path / "my_run"
    write_events(odd, {"eval/episodic_return": [(1000, 1.0)]})
    mute = write_run(tmp_path, CHEETAH, NE, 2, 10.0, logs={"losses/qf_loss": [(1000, 1.0)]})
    broken = tmp_path / f"{CHEETAH}__{NE}__3__1"
    broken.mkdir()
    (broken / "events.out.tfevents.1.x").write_bytes(b"this is no event file" * 100)
    reasons = {odd: "its name is not", mute: "no charts/episodic_return", broken: "no scalars"}
    odd_arguments = ['{"seed": null}', '{"total_timesteps": "many"}', '{"env_ids": 3}', '{"learning_starts": "late"}']
    for seed, content in enumerate(["{", "[1]", *odd_arguments, '{"injection_step": ["soon"]}'], 4):
        folder = write_run(tmp_path, CHEETAH, NE, seed, 10.0)
        (folder / "args.json").write_text(content)
        reasons[folder] = "args.json cannot be read" if seed < 6 else ""
    reasons[write_run(tmp_path, CHEETAH, TD3, 1, float("nan"))] = "a return at step 500 is not finite"
    reasons[write_run(tmp_path / "job" / "runs", CHEETAH, TD3, 2, 10.0)] = "job.json cannot be read"
    (tmp_path / "job" / "job.json").write_text("[")
    runs, _ = read(tmp_path)
    assert runs[["method", "seed"]].to_numpy().tolist() == [[NE, 1]]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(reasons)
    for path, reason in reasons.items():
        (line,) = (line for line in lines if line.startswith(f"skipped {path}: "))
        assert reason in line


def write_cycle(runs, script, seed, visits=4, **args):
    """Writes a run of two cycles of two tasks with an evaluation in each half of a visit -> its folder."""
    values = {"eval/episodic_return": [(step, float(seed * step)) for step in range(50, 100 * visits + 1, 50)]}
    folder = write_run(runs, "a+b", script, seed, 0, logs=values, env_ids=["a", "b"], cycles=2, task_steps=100, **args)
    table = [[100 * visit, "", "", 10.0 * visit, 5.0 * seed * visit] for visit in range(visits + 1)]
    lines = [["step", "cycle", "task", "a", "b"], *table]
    (folder / "cycle.csv").write_text("".join(f"{','.join(map(str, line))}\n" for line in lines))
    return folder


def test_runs_of_a_cycle_have_a_section_with_a_row_a_number_and_method_and_a_picture_a_method(tmp_path, capsys):
    for script, seeds in (("td3_cycling", 1), ("ne_td3_cycling", 3)):
        for seed in range(1, seeds + 1):
            write_cycle(tmp_path, script, seed)
    write_cycle(tmp_path, "ne_td3_cycling", 4, omega=0.1)
    short = write_cycle(tmp_path, "ne_td3_cycling", 5, visits=3)
    report.main([str(tmp_path)])
    assert f"skipped {short}: 3 of 4 visits have ended" in capsys.readouterr().err
    text = (tmp_path / "report" / "report.md").read_text()
    assert "**a, b: 2 cycles with 100 steps a visit**" in text
    methods = ["ne_td3_cycling", "ne_td3_cycling omega=0.1", "td3_cycling"]
    final = rows(text, "final return")
    assert [row[1] for row in final] == [f"`{method}`" for method in methods]
    assert (
        final[0][2:4] == ["3", ""] and final[0][4].startswith("30.0 (") and final[0][5].endswith(": 20.0, 40.0, 60.0")
    )
    pictures = {path.name for path in (tmp_path / "report").glob("cycle_*.png")}
    assert len(pictures) == 3 and all(f"]({name})" in text for name in pictures)
    write_run(tmp_path, CHEETAH, NE, 1, 10.0)  # beside other runs it says the same, and a copy too
    report.main([str(tmp_path)])
    report.main([str(tmp_path / "report"), "--out", str(tmp_path / "copy")])
    section = text.split("## Cycles")[1].split("## Pictures")[0]
    for folder in ("report", "copy"):
        again = (tmp_path / folder / "report.md").read_text()
        assert section in again and "## Returns" in again and "cycle_" in again
        assert {path.name for path in (tmp_path / folder).glob("cycle_*.png")} == pictures


def test_the_jobs_command_versions_machine_and_commit_stand_in_runs_csv(tmp_path):
    job = {"command": 'python x.py --a "b, c"', "versions": {"torch": "2.13"}, "machine": "m", "commit": "abc"}
    write_run(tmp_path / "job 1" / "runs", CHEETAH, NE, 1, 10.0)
    (tmp_path / "job 1" / "job.json").write_text(json.dumps(job))
    write_run(tmp_path / "other", CHEETAH, NE, 2, 10.0)
    runs, _ = read(tmp_path)
    assert runs.loc[0, ["command", "machine", "commit"]].tolist() == ['python x.py --a "b, c"', "m", "abc"]
    assert json.loads(runs.loc[0, "versions"]) == {"torch": "2.13"}
    assert runs.loc[1, ["command", "versions", "machine", "commit"]].isna().all()


@pytest.mark.parametrize("out", [".", "runs", "runs/report", "elsewhere"])
def test_the_report_may_go_into_any_folder_and_is_not_taken_for_runs(tmp_path, out):
    write_run(tmp_path / "runs", CHEETAH, NE, 1, 10.0)
    write_run(tmp_path / "runs" / "report", CHEETAH, NE, 2, 10.0)
    report.collect([tmp_path / "runs"], tmp_path / out)
    assert len(report.load(tmp_path / out)[0]) == (1 if out == "runs/report" else 2)


# ===== The report =====


def test_a_published_result_is_drawn_again_from_its_csv_files_alone_to_the_same_bytes(tmp_path, capsys):
    some_runs(tmp_path / "runs", seeds=5, tasks=[(CHEETAH, 1000)])
    report.main([str(tmp_path / "runs")])
    drawn, again, other = tmp_path / "runs" / "report", tmp_path / "results" / "first", tmp_path / "other"
    names = ["learning_curves.png", "differences.png", "aggregate.png", "neurons.png", "report.md"]
    assert sorted(path.name for path in drawn.iterdir()) == sorted([*names, "runs.csv", "curves.csv"])
    again.mkdir(parents=True)
    for name in ("runs.csv", "curves.csv"):
        shutil.copy(drawn / name, again / name)
    (again / "sensitivity.png").write_bytes(b"of other data")
    report.main([str(again)])
    report.main([str(again), "--out", str(other)])
    assert not (again / "sensitivity.png").exists()
    assert "Without `sensitivity.png`: " in (drawn / "report.md").read_text()
    checksum = report.load(drawn)[2]
    for name in names:
        assert (again / name).read_bytes() == (drawn / name).read_bytes() == (other / name).read_bytes(), name
        if name.endswith(".png"):
            assert Image.open(again / name).text == {"Data": checksum}
            assert (again / name).stat().st_size < 150_000
            assert f"]({name})" in (again / "report.md").read_text()
    assert report.draw(again)["returns"] in (again / "report.md").read_text()
    report.collect([tmp_path / "runs"], other)
    for name in ("runs.csv", "curves.csv"):
        assert (other / name).read_bytes() == (drawn / name).read_bytes()
    assert capsys.readouterr().err == ""


def test_with_one_method_and_seed_there_is_no_comparison_and_no_aggregate(tmp_path):
    write_run(tmp_path, "Pendulum-v1", TD3, 1, -150.0)
    report.main([str(tmp_path)])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "## Differences" not in text and "No task with a normalisation and two seeds" in text
    for name in ("differences.png", "aggregate.png", "injection.png", "neurons.png", "sensitivity.png"):
        assert f"Without `{name}`: " in text and not (tmp_path / "report" / name).exists()


def test_pictures_can_be_pdf_and_svg_too_and_tables_latex_and_both_go_when_they_are_not_asked_for(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, CHEETAH, NE, seed, 10.0 * seed)
        write_run(tmp_path, CHEETAH, TD3, seed, 9.0 * seed)
    out, words = tmp_path / "report", [str(tmp_path), "--names", f"{NE}=NE_1", "--also", "pdf", "svg", "tex"]
    report.main(words)
    pictures = sorted(path.stem for path in out.glob("*.png"))
    for end, first in (("pdf", b"%PDF"), ("svg", b"<?xml")):
        assert sorted(path.stem for path in out.glob(f"*.{end}")) == pictures
        assert all(path.read_bytes().startswith(first) for path in out.glob(f"*.{end}"))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    report.main([str(out), *words[1:]])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    text, table = (out / "report.tex").read_text(), (out / "report.md").read_text()
    assert text.count("\\begin{tabular}") == text.count("\\toprule") == table.count("\n|---") and "`" not in text
    cells = rows(table, "`NE_1`")[0][1:]
    assert "NE\\_1 & " + " & ".join(cells) + r" \\" in text
    report.main([str(out)])
    assert {path.suffix for path in out.iterdir()} == {".png", ".csv", ".md"}


def test_methods_are_called_by_the_names_that_are_given_and_keep_their_order(tmp_path, capsys):
    for seed in (1, 2, 3):
        write_run(tmp_path, CHEETAH, NE, seed, 10.0 * seed)
        write_run(tmp_path, CHEETAH, NE, seed, 9.0 * seed, time=2, grow=False)
        write_run(tmp_path, CHEETAH, TD3, seed, 8.0 * seed)
    write_run(tmp_path, CHEETAH, NE, 4, 10.0)
    report.main([str(tmp_path), "--names", f"{NE}=zz, ours", f"{NE} grow=False=sparse", f"{TD3}=aa"])
    text = (tmp_path / "report" / "report.md").read_text()
    found = [line.split("|")[1].strip() for line in text.split("## Differences")[0].splitlines() if "| `" in line]
    assert found == ["`zz, ours`", "`sparse`", "`aa`"] and NE not in text.replace("benchmark", "")
    assert "is the area of `zz, ours` larger than that of `aa`?" in text
    for names, line in (([f"{NE}=a", f"{TD3}=a"], "two methods the same name"), (["nobody=a"], "no method 'nobody'")):
        with pytest.raises(SystemExit) as ended:
            report.main([str(tmp_path), "--names", *names])
        assert ended.value.code == 2 and line in capsys.readouterr().err


def test_published_runs_and_new_ones_become_one_comparison_with_the_names_that_all_of_them_need(tmp_path, capsys):
    first, second, both = tmp_path / "first", tmp_path / "second", tmp_path / "both"
    for seed in (1, 2, 3):
        write_run(first, CHEETAH, NE, seed, 100.0 * seed + 1 / 3)
        write_run(first, CHEETAH, NE, seed + 3, 100.0)
        write_run(first, CHEETAH, TD3, seed, 10.0 * seed)
        write_run(second, CHEETAH, NE, seed, 50.0 * seed, grow=False, new=1)  # the first runs do not know `new`
    for folder in (first, second):
        report.collect([folder], folder / "csv")
    assert set(report.load(second / "csv")[0]["method"]) == {NE}
    report.collect([first / "csv", second], both)
    runs, curves, _ = report.load(both)
    assert set(runs["method"]) == set(curves["method"]) == {NE, f"{NE} grow=False", TD3}
    for folder, kept in ((first, [NE, TD3]), (second, [f"{NE} grow=False"])):
        alone = report.load(folder / "csv")
        for old, new, keys in ((alone[0], runs, ["seed"]), (alone[1], curves, ["seed", "tag", "step"])):
            for method in kept:
                was = old[old["method"] == method.split()[0]].drop(columns="method").sort_values(keys)
                now = new[new["method"] == method].drop(columns="method").sort_values(keys)
                pd.testing.assert_frame_equal(
                    was.reset_index(drop=True), now.reset_index(drop=True), check_dtype=False, check_exact=True
                )
    report.main([str(both), str(second), "--out", str(tmp_path / "again")])  # read twice is read once
    assert "2 runs of" in capsys.readouterr().err and (tmp_path / "again" / "report.md").exists()
    for name in ("runs.csv", "curves.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (both / name).read_bytes()


def test_an_argument_that_older_runs_lack_counts_as_the_default_of_the_script(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, CHEETAH, NE, seed, 1.0)  # from before there was --growth-criterion, or --dense-ends
        write_run(tmp_path, CHEETAH, NE, seed + 3, 1.0)
        write_run(tmp_path, CHEETAH, NE, seed, 1.0, time=1, growth_criterion="random", dense_ends=False)
        write_run(tmp_path, CHEETAH, NE, 1, 1.0, time=2, growth_criterion="random", dense_ends=True)
        write_run(tmp_path, CHEETAH, "my_ne", seed, 1.0)  # nobody knows the defaults of this one
        write_run(tmp_path, CHEETAH, "my_ne", seed + 3, 1.0, growth_criterion="random")
    assert read(tmp_path)[0].groupby("method")["seed"].agg(sorted).to_dict() == {
        NE: [1, 2, 3, 4, 5, 6],
        f"{NE} growth_criterion=random": [1, 2, 3],
        f"{NE} growth_criterion=random dense_ends=True": [1],
        "my_ne": [1, 2, 3, 4, 5, 6],
    }


def test_the_defaults_of_a_script_are_those_that_it_runs_with():
    for name, module in harness.SCRIPTS.items():
        assert report.defaults_of(name) == dataclasses.asdict(module.Args()), name
    assert report.defaults_of("my_ne") == {}


def test_steps_per_second_of_runs_at_the_same_time_on_a_machine_carry_a_warning(tmp_path):
    def write(name, machine, begin, seed):
        folder = tmp_path / name / f"job {machine} {seed}"
        run = folder / "runs" / f"{CHEETAH}__{NE}__{seed}__{seed}"
        write_events(run, {"eval/episodic_return": [(0, 0.0), (1000, 5.0)]}, start=begin)  # ten seconds
        (run / "args.json").write_text(json.dumps({"env_id": CHEETAH, "seed": seed, "total_timesteps": 1000}))
        (folder / "job.json").write_text(json.dumps({"machine": machine}))

    for seed, (machine, begin) in enumerate([("a", 0), ("a", 8), ("a", 16), ("b", 0), ("b", 20)], 1):
        write("shared", machine, begin, seed)
        write("alone", machine, 100 * begin, seed)
    runs, curves = measured(tmp_path / "shared")
    assert runs["at_once"].tolist() == [2, 2, 2, 1, 1]
    assert "Up to 2 of these runs went on one machine at once. So the steps/s" in report.returns_section(runs, curves)
    runs, curves = measured(tmp_path / "alone")
    assert runs["at_once"].tolist() == [1] * 5 and "steps/s compare" not in report.returns_section(runs, curves)
    runs["at_once"] = np.nan
    assert "did is not known. So the steps/s compare nothing." in report.returns_section(runs, curves)


def test_sensitivity_is_shown_for_numeric_arguments_varied_alone_over_three_values(tmp_path):
    for seed in (1, 2):
        for number, changes in enumerate(({}, {"omega": 0.1}, {"omega": 2}, {"grow": False}, {"tau": 1}, {"tau": 2})):
            write_run(tmp_path, CHEETAH, NE, seed, 100.0 * seed, time=number, **{"tau": 0} | changes)
    both = {"omega": 0.3, "grow": False, "tau": 0}
    write_run(tmp_path, CHEETAH, NE, 1, 100.0, time=99, **both)
    found = report.varied_arguments(measured(tmp_path)[0])
    shown = {name: (task, script, base, sorted(group["value"])) for task, script, name, base, group in found}
    assert shown == {
        "omega": (CHEETAH, NE, 0.5, [0.1, 0.1, 0.5, 0.5, 2, 2]),
        "tau": (CHEETAH, NE, 0, [0, 0, 1, 1, 2, 2]),
    }
    report.save(report.draw_sensitivity(found), tmp_path / "sensitivity", "checksum", [])
    assert Image.open(tmp_path / "sensitivity.png").text == {"Data": "checksum"}


def test_the_differences_are_nes_unvaried_or_the_methods_asked_for(tmp_path):
    for seed in (1, 2, 3):
        write_run(tmp_path, CHEETAH, "a_script", seed, 1.0 * seed)
        write_run(tmp_path, CHEETAH, NE, seed, 10.0 * seed)
    for seed in (1, 2):
        write_run(tmp_path, CHEETAH, NE, seed, 5.0, time=3, grow=False)
    tables = measured(tmp_path)
    sections, numbers = report.compute(*tables)
    assert numbers["of"] == NE and f"area of `{NE}` larger than that of `{NE} grow=False`?" in sections["differences"]
    sections, _ = report.compute(*tables, of="a_script", over=NE)
    assert rows(sections["differences"], f"`{NE}`")[0][3] == "0 of 9"
    assert not rows(sections["differences"], f"`{NE} grow=False`")


def test_bad_input_ends_with_one_clear_line_and_exit_code_2(tmp_path, capsys):
    write_run(tmp_path / "runs", CHEETAH, NE, 1, 10.0)
    write_events(tmp_path / "names" / "odd", {"eval/episodic_return": [(1, 1.0)]})
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "runs.csv").write_text("task,method\na,b\n")
    (tmp_path / "torn" / "curves.csv").write_text("")
    report.collect([tmp_path / "runs"], tmp_path / "twice")
    lines = (tmp_path / "twice" / "runs.csv").read_text().splitlines()
    (tmp_path / "twice" / "runs.csv").write_text("\n".join([*lines, lines[-1]]))
    for words, line in {
        (): "error: give a folder of runs",
        ("nowhere",): "error: there is no folder nowhere; give",
        ("empty",): "error: no run in empty: there is no events.out.tfevents.*",
        ("runs", "--of", NE, "--over", NE): f"error: --of and --over are both '{NE}'",
        ("runs", "--normalise", "Pendulum-v1", "low", "1"): "error: --normalise: could not convert string to float",
        ("runs", "--normalise", "Pendulum-v1", "1", "1"): "error: --normalise: Pendulum-v1 needs two different numbers",
        ("runs", "runs"): "error: several folders need --out",
        ("twice",): f"error: twice/runs.csv has {NE} on {CHEETAH} with seed 1 twice",
        ("names",): "error: no run in names can be used, for the reasons above",
        ("torn",): "error: torn/runs.csv has no column seed, steps",
        ("runs", "--of", "nobody"): f"error: no method 'nobody'; there is '{NE}'",
    }.items():
        with pytest.raises(SystemExit) as ended:
            report.main(list(words))
        assert ended.value.code == 2
        lines = [text for text in capsys.readouterr().err.splitlines() if not text.startswith("skipped ")]
        assert len(lines) == 1 and lines[0].startswith(line), lines


def test_the_pages_sections_are_replaced_by_those_of_the_published_csv_files(tmp_path):
    some_runs(tmp_path / "runs", tasks=[(CHEETAH, 1000)])
    results = tmp_path / "results"
    report.collect([tmp_path / "runs"], results / "first")
    (results / "speed.csv").write_text('# the command\n# the machine\ntask,"steps/s, median"\nHopper-v4,10\n"a, b",\n')
    pages = [tmp_path / "README.md", tmp_path / "other.md"]
    blocks = [f"<!-- report first {name} -->\n{{}}<!-- end report -->" for name in ("returns", "differences")]
    text = f"# Title\n\n{blocks[0]}\n\nBetween, \\1 stays.\n\n{blocks[1]}\nEnd.\n"
    pages[0].write_text(text.format("old | table\n", ""))
    pages[1].write_text("Before.\n<!-- table speed -->\nold\n<!-- end table -->\n" + blocks[1].format("old\n"))
    report.fill_pages(pages, results)
    sections = report.draw(results / "first")
    assert pages[0].read_text() == text.format(sections["returns"], sections["differences"])
    assert sections["returns"] in (results / "first" / "report.md").read_text()
    table = "| task | steps/s, median |\n|---|---|\n| Hopper-v4 | 10 |\n| a, b |  |\n"
    other = f"Before.\n<!-- table speed -->\n{table}<!-- end table -->\n" + blocks[1].format(sections["differences"])
    assert pages[1].read_text() == other
    before = [page.read_bytes() for page in pages]
    report.fill_pages(pages, results)
    assert [page.read_bytes() for page in pages] == before


@pytest.mark.parametrize(
    "text, line",
    [
        ("<!-- table nothing -->\nold\n<!-- end table -->", "nothing.csv cannot be read"),
        ("<!-- report nothing returns -->\nold\n<!-- end report -->", "no folder"),
        ("<!-- report first gains -->\nold\n<!-- end report -->", "there is returns, differences, injection"),
        ("<!-- report first returns -->\nold\n", "without its <!-- end report -->"),
        ("<!-- table a -->\n<!-- table b -->\n<!-- end table -->", "without its <!-- end table -->"),
    ],
)
def test_pages_that_show_what_is_not_there_are_left_as_they_are(tmp_path, capsys, text, line):
    write_run(tmp_path / "runs", CHEETAH, NE, 1, 10.0)
    report.collect([tmp_path / "runs"], tmp_path / "results" / "first")
    pages, good = (
        [tmp_path / "first.md", tmp_path / "second.md"],
        "<!-- report first returns -->\n<!-- end report -->\n",
    )
    for page, content in zip(pages, (good, text), strict=True):
        page.write_text(content)
    with pytest.raises(SystemExit) as ended:
        report.fill_pages(pages, tmp_path / "results")
    assert ended.value.code == 2 and [page.read_text() for page in pages] == [good, text]
    assert line in capsys.readouterr().err
