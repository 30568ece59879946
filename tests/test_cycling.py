"""A cycle of tasks: padding, switches, what goes on across them, and what is shown of them."""

import contextlib
import csv
import gc
import itertools
import math
import os
import re
import shutil
import time
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import test_resume
import torch
import toys
import tyro
from harness import CYCLING

cycling = harness.load_script(harness.ROOT / "benchmark" / "cycling.py")
NE, TD3 = CYCLING["ne_td3_cycling"], CYCLING["td3_cycling"]
NETS = ["actor", "qf1", "qf2"]
LARGE, SMALL = "ToyLarge-v0", "ToySmall-v0"
TASKS = {LARGE: toys.Large, SMALL: toys.Small}
# Two tasks, twice, 200 steps each, the first 80 of them random: visits end after 200, 400, 600 and 800 steps
CYCLE = {"env_ids": (LARGE, SMALL), "cycles": 2, "task_steps": 200, "learning_starts": 80, "eval_episodes": 2}
VISITS = [LARGE, SMALL, LARGE, SMALL]
# How often the methods step in, so that they do in a run of a few hundred steps
OFTEN = {
    "reset_td3_cycling": {"reset_interval": 300, "reset_at_switch": True},
    "redo_td3_cycling": {"redo_interval": 20},
    "injection_td3_cycling": {"injection_step": (150, 350)},
}
with_all = pytest.mark.parametrize("script", CYCLING)
# What the methods share is the same code to the letter; two scripts each time, the others with the slow tests
ALWAYS = ["td3_cycling", "ne_td3_cycling"]
with_some = pytest.mark.parametrize(
    "script", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CYCLING]
)
with_one = pytest.mark.parametrize(
    "script", [name if name == "ne_td3_cycling" else pytest.param(name, marks=pytest.mark.slow) for name in CYCLING]
)


def train(script, **changes):
    """A short run of a cycle -> (folder, weights, log)."""
    folder = CYCLING[script].main(harness.short_args(script, **CYCLE | changes))
    return folder, harness.weights(folder), harness.events(folder)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """As `train`, but each run is made once, for tests that only look at it."""
    runs = {}

    def get(script, **changes):
        key = script, *sorted(changes.items())
        if key not in runs:
            with contextlib.chdir(tmp_path_factory.mktemp("trained")):
                folder, *rest = train(script, **changes)
                runs[key] = folder.absolute(), *rest
        return runs[key]

    return get


def rows(folder):
    """The rows of a run's cycle.csv -> list of dicts."""
    with open(folder / "cycle.csv", newline="") as file:
        return list(csv.DictReader(file))


# ===== One visit =====


@with_all
def test_one_visit_is_a_run_of_the_continuous_script_to_the_bit(script):
    alone = script.replace("_cycling", "_continuous")
    settings = {"total_timesteps": 800, "eval_interval": 200, "eval_episodes": 2, "buffer_size": 500}
    settings |= {"reset_interval": 300, "redo_interval": 50}
    logs, models = [], []
    for name in (script, alone):
        folder = harness.MODULES[name].main(harness.short_args(name, **settings))
        models.append(harness.weights(folder))
        logs.append(harness.events(folder))
    assert harness.same(*models)
    cycling, continuous = logs
    del continuous["charts/SPS"]
    assert len(continuous["charts/episodic_return"]) == 4 and len(continuous["eval/episodic_return"]) == 4
    assert {tag for tag in continuous if cycling[tag] != continuous[tag]} == set()
    own = {"cycle/task", "cycle/number", "charts/Pendulum-v1/episodic_return", "charts/SPS"}
    own |= {"eval/Pendulum-v1/episodic_return", "eval/Pendulum-v1/episodic_return_std"}
    assert cycling.keys() - continuous.keys() == own


# ===== Padding (section 10) =====


def test_a_padded_task_sees_its_own_entries_and_shows_zeros_after_them():
    large, small = TD3.make_tasks((LARGE, SMALL))
    for env, task in ((large, toys.Large), (small, toys.Small)):
        n_obs, n_actions = task.observation_space.shape[0], task.action_space.shape[0]
        for box, own, size in (
            (env.observation_space, task.observation_space, 5),
            (env.action_space, task.action_space, 3),
        ):
            assert box.shape == (size,) and box.dtype == own.dtype
            for bound, expected in ((box.low, own.low), (box.high, own.high)):
                assert bound.tolist() == [*expected.tolist(), *[0] * (size - len(expected))]
        obs, _ = env.reset(seed=1)
        assert obs.shape == (5,) and (obs[:n_obs] != 0).all() and (obs[n_obs:] == 0).all()
        received, step = [], env.unwrapped.step
        env.unwrapped.step = lambda action, step=step, received=received: (received.append(action), step(action))[1]
        action = np.append(task.action_space.sample(), np.full(3 - n_actions, 7, np.float32))
        obs, *_ = env.step(action)
        assert received[0].tolist() == action[:n_actions].tolist()
        assert obs.shape == (5,) and (obs[n_obs:] == 0).all()


def stored(script, monkeypatch, **changes):
    """A short run -> the transitions that it stored, in order: tuples of obs, action, reward, next_obs, terminated."""
    transitions, add = [], CYCLING[script].ReplayBuffer.add

    def record(self, *transition):
        transitions.append(tuple(np.array(part, dtype=np.float64) for part in transition))
        return add(self, *transition)

    monkeypatch.setattr(CYCLING[script].ReplayBuffer, "add", record)
    train(script, **changes)
    return transitions


@pytest.mark.parametrize("script", ["td3_cycling", "ne_td3_cycling"])
def test_what_is_stored_is_padded_with_zeros_and_within_the_bounds_of_its_task(script, monkeypatch):
    transitions = stored(script, monkeypatch, exploration_noise=3.0)
    assert len(transitions) == 800
    for number, (obs, action, reward, next_obs, terminated) in enumerate(transitions):
        task = TASKS[VISITS[number // 200]]
        n_obs, n_actions = task.observation_space.shape[0], task.action_space.shape[0]
        for observed in (obs, next_obs):
            assert observed.shape == (5,) and task.observation_space.contains(observed[:n_obs].astype(np.float32))
            assert (observed[n_obs:] == 0).all()
        assert action.shape == (3,) and (action[n_actions:] == 0).all()
        assert task.action_space.contains(action[:n_actions].astype(np.float32))
        assert reward == pytest.approx(action[0]) and not terminated
    for start in range(0, 800, 200):  # the task's whole range is used, at random and by the noisy actor alike
        space = TASKS[VISITS[start // 200]].action_space
        for part in (slice(start, start + 80), slice(start + 80, start + 200)):
            own = np.array([action for _, action, *_ in transitions[part]])[:, : len(space.low)]
            assert (own.min(0) < space.low + 0.1 * (space.high - space.low)).all()
            assert (own.max(0) > space.high - 0.1 * (space.high - space.low)).all()


# ===== Switches (section 10) =====


def test_the_end_of_a_visit_cuts_the_episode_off_and_the_next_task_starts_afresh(monkeypatch):
    monkeypatch.setattr(toys.Small, "length", 300)  # longer than a visit
    transitions = stored("td3_cycling", monkeypatch, env_ids=(SMALL, LARGE), gamma=0.5)
    assert not any(terminated for *_, terminated in transitions)
    for number, (_, _, _, next_obs, _) in enumerate(transitions[:-1], start=1):
        follows = np.array_equal(transitions[number][0], next_obs)
        length = 50 if (number - 1) // 200 % 2 else 200  # Large has episodes of 50 steps
        assert follows == (number % length != 0)


def test_an_episode_that_is_cut_off_is_logged_with_its_length(trained):
    log = trained("td3_cycling")[2]
    ends = [50, 100, 150, 200, 270, 340, 400, 450, 500, 550, 600, 670, 740, 800]
    assert [step for step, _ in log["charts/episodic_return"]] == ends
    assert [length for _, length in log["charts/episodic_length"]] == np.diff([0, *ends]).tolist()
    for task in (LARGE, SMALL):
        own = [entry for entry in log["charts/episodic_return"] if VISITS[(entry[0] - 1) // 200] == task]
        assert log[f"charts/{task}/episodic_return"] == own


@with_some
def test_the_buffer_starts_empty_at_each_visit_and_learning_after_random_steps(script, monkeypatch):
    sizes, sample = [], CYCLING[script].ReplayBuffer.sample

    def record(self, batch_size, *args, **kwargs):
        batch = sample(self, batch_size, *args, **kwargs)
        if batch_size == 16:
            obs = batch.obs[:, 2:]  # Small has two entries
            sizes.append((len(self), bool((obs == 0).all()), bool((obs != 0).all())))
        return batch

    monkeypatch.setattr(CYCLING[script].ReplayBuffer, "sample", record)
    train(script, **OFTEN.get(script, {}))
    expected = [(size, task == SMALL, task == LARGE) for task in VISITS for size in range(81, 201)]
    assert sizes == expected


def flat(value):
    """All tensors and numbers in a nested structure -> {path: value}."""
    items = enumerate(value) if isinstance(value, (list, tuple)) else value.items() if isinstance(value, dict) else ()
    if not items:
        return {"": value}
    return {f"{key}/{path}": leaf for key, part in items for path, leaf in flat(part).items()}


@pytest.mark.parametrize("script", ALWAYS)
def test_everything_but_the_buffer_goes_on_across_a_switch(script, monkeypatch):
    states, replace = {}, os.replace

    def replaced(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint.pt":
            state = harness.saved(target)
            states[state["step"]] = state

    monkeypatch.setattr(os, "replace", replaced)
    train(script, checkpoint_interval=1, neuron_interval=20)  # a checkpoint at each end of an episode
    for switch, first_end in ((200, 270), (400, 450), (600, 670)):
        before, after = states[switch], states[first_end]  # no learning in between
        assert before["added"] == 0 and after["added"] == len(after["rows"]) == first_end - switch
        learned = ["networks", "targets", "actor_optimizer", "q_optimizer", "actor_loss"]
        learned += ["gate"] if script == "ne_td3_cycling" else []
        a, b = (
            {f"{name}/{path}": v for name in learned for path, v in flat(state[name]).items()}
            for state in (before, after)
        )
        assert a.keys() == b.keys() and len(a) > 50
        changed = {path for path in a if not harness.same(a[path], b[path])}
        bounds = {f"{nets}/actor.action_{part}/" for nets in ("networks", "targets") for part in ("scale", "bias")}
        assert changed == bounds
        space = TASKS[VISITS[switch // 200]].action_space
        for nets in (after["networks"], after["targets"]):
            padding = [0] * (3 - len(space.low))
            assert nets["actor.action_scale"].tolist() == [*((space.high - space.low) / 2).tolist(), *padding]
            assert nets["actor.action_bias"].tolist() == [*((space.high + space.low) / 2).tolist(), *padding]
    if script == "ne_td3_cycling":
        gate = states[600]["gate"]
        assert gate["previous"] is not None and gate["g_max"] > 0
        assert not states[200]["networks"]["actor.fc2.mask"].all()  # masks that could have been lost


@pytest.mark.parametrize("replay_ratio", [1, 3])
def test_growth_follows_one_schedule_over_all_visits(replay_ratio):
    _, model, log = train("ne_td3_cycling", growth_interval=48, prune=False, replay_ratio=replay_ratio)
    total = 4 * (200 - 80) * replay_ratio  # gradient steps of the run
    steps = [200 * visit + step for visit in range(4) for step in range(81, 201)]
    steps = [step for step in steps for _ in range(replay_ratio)]  # of the run, at t = 1, 2, ...
    events = list(range(48, total + 1, 48))
    parts = [1 + math.cos(math.pi * t / total) for t in events]
    for net in NETS:
        masks = [model[net][f"fc{layer}.mask"] for layer in (1, 2, 3)]
        free = sum(mask.numel() for mask in masks)
        start = 0.25 * free
        grown = log[f"ne/{net}/grown"]
        assert [step for step, _ in grown] == [steps[t - 1] for t in events]
        shares = np.cumsum(parts) / sum(parts)
        np.testing.assert_allclose(np.cumsum([n for _, n in grown]), shares * (free - start), atol=4)
        assert all(mask.all() for mask in masks)


def test_dormancy_is_looked_at_every_so_many_gradient_steps_of_the_run():
    log = train("ne_td3_cycling", neuron_interval=50)[2]
    steps = [200 * visit + step for visit in range(4) for step in range(81, 201)]
    looks = [steps[t - 1] for t in range(50, 481, 50)]
    for tag in ("neurons/actor/dormant_ratio_0", "neurons/qf1/density", "ne/review_threshold"):
        assert [step for step, _ in log[tag]] == looks


# ===== Evaluation and what is written =====


def test_a_visit_is_evaluated_by_its_own_clock_and_at_its_end_on_all_tasks(trained):
    log = train("td3_cycling", eval_interval=90)[2]
    own = [200 * visit + step for visit in range(4) for step in (90, 180, 200)]
    assert [step for step, _ in log["eval/episodic_return"]] == own
    for task in (LARGE, SMALL):
        expected = [s for s in own if s % 200 == 0 or VISITS[(s - 1) // 200] == task]
        assert [step for step, _ in log[f"eval/{task}/episodic_return"]] == expected
        logged = dict(log[f"eval/{task}/episodic_return"])
        for step, value in log["eval/episodic_return"]:
            if VISITS[(step - 1) // 200] == task:
                assert logged[step] == value
    only_ends = trained("td3_cycling")[2]  # --eval-interval 0
    assert [step for step, _ in only_ends["eval/episodic_return"]] == [200, 400, 600, 800]


def test_the_cycle_is_logged_at_the_first_and_last_step_of_each_visit(trained):
    log = trained("td3_cycling")[2]
    ends = [step for visit in range(4) for step in (200 * visit + 1, 200 * visit + 200)]
    assert log["cycle/task"] == list(zip(ends, [0, 0, 1, 1] * 2, strict=True))
    assert log["cycle/number"] == list(zip(ends, [1] * 4 + [2] * 4, strict=True))


@with_some
def test_evaluation_does_not_disturb_training(script, trained):
    _, without, silent = trained(script)
    _, model, log = train(script, eval_interval=60, eval_episodes=3)
    assert harness.same(model, without)
    assert log["charts/episodic_return"] == silent["charts/episodic_return"]


def play(state, task, env, seed):
    """The return of one episode of a saved actor on a task, computed with numpy alone."""
    weights = {key: value.double().numpy() for key, value in state.items()}
    low, high = task.action_space.low.astype(float), task.action_space.high.astype(float)
    obs, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        x = np.append(obs, np.zeros(5 - len(obs)))
        for layer in ("fc1", "fc2"):
            x = np.maximum(weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"], 0)
        tanh = np.tanh(weights["fc3.weight"] @ x + weights["fc3.bias"])[: len(low)]
        action = (tanh + 1) / 2 * (high - low) + low
        obs, reward, terminated, truncated, _ = env.step(
            np.clip(action.astype(np.float32), low, high).astype(np.float32)
        )
        total, done = total + float(reward), terminated or truncated
    return total


@with_some
def test_the_last_row_of_the_matrix_is_what_the_saved_agent_scores_on_every_task(script, capsys):
    folder, model, _ = train(script, env_ids=(LARGE, SMALL, LARGE), cycles=1, task_steps=150)
    last = [float(value) for value in next(csv.reader([(folder / "cycle.csv").read_text().splitlines()[-1]]))[3:]]
    capsys.readouterr()
    module = CYCLING[script]
    module.main(module.Args(evaluate=str(folder), eval_episodes=2))
    printed = re.findall(r"(\S+): mean return (-?[\d.]+), std", capsys.readouterr().out)
    assert [task for task, _ in printed] == [LARGE, SMALL, LARGE]
    np.testing.assert_allclose([float(mean) for _, mean in printed], last, atol=0.01)
    if script in ("td3_cycling", "ne_td3_cycling"):
        seeds = torch.randint(2**31 - 1, (2,), generator=torch.Generator().manual_seed(1001)).tolist()
        for task, mean in zip((LARGE, SMALL), last, strict=False):
            returns = [play(model["actor"], TASKS[task], gym.make(task), seed) for seed in seeds]
            assert mean == pytest.approx(np.mean(returns), rel=1e-3, abs=0.01)


def test_cycle_csv_has_a_row_for_a_random_policy_and_for_each_visit():
    folder, _, log = train("ne_td3_cycling", eval_episodes=10)
    table = rows(folder)
    assert [(row["step"], row["cycle"], row["task"]) for row in table] == [
        ("0", "0", "random policy"),
        ("200", "1", LARGE),
        ("400", "1", SMALL),
        ("600", "2", LARGE),
        ("800", "2", SMALL),
    ]
    for task in (LARGE, SMALL):
        values = [float(row[task]) for row in table]
        assert values[1:] == pytest.approx([v for _, v in log[f"eval/{task}/episodic_return"]], rel=1e-6)
        space, length = TASKS[task].action_space, TASKS[task].length  # the reward is the first action
        mean, width = (space.low[0] + space.high[0]) / 2, space.high[0] - space.low[0]
        deviation = width * math.sqrt(length / 12 / 10)
        assert abs(values[0] - length * mean) < 4 * deviation
    assert sorted(int(path.stem) for path in (folder / "models").iterdir()) == [0, 200, 400, 600, 800]
    assert not list(folder.glob("*.tmp"))


def test_each_task_of_a_cycle_has_its_own_videos():
    cycle = {"env_ids": ("Pendulum-v1",) * 2, "cycles": 1, "task_steps": 100}
    folder, *_ = train("td3_cycling", **cycle, eval_episodes=1, capture_video=True)
    TD3.main(TD3.Args(evaluate=str(folder), eval_episodes=1, capture_video=True))
    names = {path.name for path in (folder / "videos").glob("*.mp4")}
    starts = {f"run-0-{task}-Pendulum" for task in (0, 1)} | {f"play-200-{task}-Pendulum" for task in (0, 1)}
    assert names == {f"{start}-v1-episode-0.mp4" for start in starts}


# ===== What a run shows =====


def a_run(tasks, cycles, curve, returns, seed=1, **curves):
    """What cycling.read gives of a run with visits of 100 steps."""
    curves = {"eval/episodic_return": np.array(curve, float)} | curves
    run = {"tasks": list(tasks), "cycles": cycles, "task_steps": 100, "seed": seed}
    return run | {"returns": np.array(returns), "curves": curves}


@pytest.mark.parametrize("tasks, cycles", [(1, 1), (1, 3), (2, 1), (5, 2)])
def test_the_picture_can_be_drawn_for_any_cycle(tasks, cycles):
    curve = [(100 * visit, 1.0) for visit in range(1, tasks * cycles + 1)]
    for visits in {1, tasks * cycles}:
        returns = [[0.0] * tasks] * (visits + 1)
        runs = [a_run([SMALL] * tasks, cycles, curve, returns, seed) for seed in range(3)]
        for n in {1, 3}:
            cycling.draw(Path("cycle.png"), runs[:n])
            assert Path("cycle.png").read_bytes().startswith(b"\x89PNG")
            Path("cycle.png").unlink()


def test_the_three_summary_numbers_are_what_their_definition_says():
    rng = np.random.default_rng(0)
    matrix = rng.normal(-500, 100, (10, 3)).tolist()  # all returns are negative
    matrix[0] = [-900.0, -800.0, 0.0]  # never better than random on C
    curve = [
        (step, -1000 + 50 * step / 100 + 30 * math.sin(step)) for v in range(9) for step in (100 * v + 30, 100 * v + 70)
    ]
    curve = sorted(curve + [(100 * v + 100, matrix[v + 1][v % 3]) for v in range(9)])
    run = a_run("ABC", 3, curve, matrix)
    relearning, final, retention = cycling.summarise(run)

    def area(visit):
        points = [(step, value) for step, value in curve if 100 * visit < step <= 100 * visit + 100]
        assert len(points) == 3
        whole = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in itertools.pairwise(points))
        return whole / (points[-1][0] - points[0][0])

    for task in range(3):
        visits = [task, task + 3, task + 6]
        seen = [value for step, value in curve if (step - 1) // 100 in visits] + [row[task] for row in matrix[1:]]
        gain = max(seen) - matrix[0][task]
        for cycle in (1, 2):
            expected = (area(visits[cycle]) - area(task)) / gain if gain > 0 else math.nan
            np.testing.assert_allclose(relearning[cycle - 1, task], expected, rtol=1e-9)
        assert final[task] == matrix[task + 7][task]
        for visit in range(9):
            learned_before = visit > task and visit % 3 != task
            expected = (matrix[visit + 1][task] - matrix[0][task]) / gain if learned_before and gain > 0 else math.nan
            np.testing.assert_allclose(retention[visit, task], expected, rtol=1e-9)
    assert np.isnan(relearning[:, 2]).all() and np.isfinite(relearning[:, :2]).all()
    numbers = cycling.numbers(run)
    for name, values in (("relearning", relearning), ("retention", retention)):
        np.testing.assert_allclose(numbers[name][0], np.nanmean(values))
        np.testing.assert_allclose(numbers[name][1:3], np.nanmean(values[:, :2], axis=0))
        assert np.isnan(numbers[name][3])
    np.testing.assert_array_equal(numbers["final return"], [np.nan, *final])


def test_what_is_shown_of_a_run_is_what_it_logged(capsys):
    folder, _, log = train("ne_td3_cycling", eval_interval=70, env_ids=(SMALL, LARGE, SMALL), cycles=1)
    run = cycling.read(folder)
    assert run["tasks"] == [SMALL, LARGE, SMALL] and (run["cycles"], run["task_steps"], run["seed"]) == (1, 200, 1)
    table = rows(folder)
    assert run["returns"][:, 1].tolist() == [float(row[LARGE]) for row in table]
    for tag, curve in run["curves"].items():
        assert curve.tolist() == [list(point) for point in log[tag]]
    assert {"eval/episodic_return", "neurons/qf2/dormant_ratio_0.1", "neurons/actor/density"} <= run["curves"].keys()
    assert cycling.of_visit(run, 1)[:, 0].tolist() == [70, 140, 200]
    cycling.main([folder])
    assert "| final return | ne_td3_cycling | 1 |  | " in capsys.readouterr().out
    picture = (folder / "cycle.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_run_that_has_not_ended_has_no_summary_but_a_picture(capsys):
    folder, *_ = train("td3_cycling", cycles=1)
    lines = (folder / "cycle.csv").read_text().splitlines(keepends=True)
    (folder / "cycle.csv").write_text("".join(lines[:-1]))
    with pytest.raises(SystemExit, match="1 of 2 visits have ended"):
        cycling.main([folder])
    assert (folder / "cycle.png").exists()
    with pytest.raises(SystemExit, match="nothing is not a finished run"):
        cycling.main(["nothing"])


def test_seeds_are_shown_by_their_mean_interval_and_each_one():
    curve = [(step, 1.0) for step in (50, 100, 150, 200)]
    finals = [3.0, 5.0, 10.0]
    runs = [a_run([SMALL, LARGE], 1, curve, [[0, 0], [9, 0], [2, x]], seed) for seed, x in enumerate(finals, start=1)]
    middle, low, high = cycling.interval(np.array([[x, math.nan] for x in finals]))
    half = 4.302653 * np.std(finals, ddof=1) / math.sqrt(3)  # Student's t with 2 degrees of freedom, 97.5th percentile
    np.testing.assert_allclose([middle[0], low[0], high[0]], [6, 6 - half, 6 + half], rtol=1e-6)
    assert np.isnan([middle[1], low[1], high[1]]).all()
    assert np.isnan(cycling.interval(np.array([[1.0], [2.0]]))[1:]).all()  # two seeds are too few
    table = cycling.table({"TD3": runs[::-1], "NE": runs[:2], "ReDo": runs[:1]}).splitlines()
    assert table[0] == f"| number | method | seeds | all tasks | {SMALL} | {LARGE} |"
    cells = {tuple(cell[:2]): cell[2:] for cell in (row.strip("| ").split(" | ") for row in table[2:])}
    assert len(cells) == 9
    assert cells["final return", "TD3"][-1] == f"6.0 ({6 - half:.1f} to {6 + half:.1f}): 3.0, 5.0, 10.0"
    assert cells["final return", "NE"][-1] == "4.0: 3.0, 5.0" and cells["final return", "ReDo"][-1] == "3.0"
    assert cells["retention", "ReDo"][1:] == ["+0.22", "+0.22", "undefined"]  # 2 of 9 after the visit to the other task
    assert cells["relearning", "TD3"][1] == "undefined"  # of a single cycle
    runs[0]["returns"][1:, 0] = -1  # never better than random on the first task
    runs[0]["curves"] = {"eval/episodic_return": np.array([(100, -1.0), (200, 1.0)])}
    assert cycling.table({"NE": runs[:2]}).count("+0.22: undefined, +0.22") == 2


# ===== Methods =====


@pytest.mark.parametrize("interval", [0, 300, 100, 250, 900])
@pytest.mark.parametrize("at_switch", [False, True])
def test_resets_come_every_interval_of_the_run_and_at_switches_if_asked_for(interval, at_switch):
    expected = set()
    for step in range(1, 800):
        if interval and step % interval == 0 and 800 - step >= interval:
            expected.add(step)
        if at_switch and step % 200 == 0:
            expected.add(step)
    reset = {"reset_interval": interval, "reset_at_switch": at_switch}
    args = harness.short_args("reset_td3_cycling", **CYCLE | reset)
    assert CYCLING["reset_td3_cycling"].reset_steps(args) == sorted(expected)
    if (interval, at_switch) == (300, True):
        log = train("reset_td3_cycling", **reset)[2]
        assert log["reset/number"] == [(200, 1), (300, 2), (400, 3), (600, 4)]


def test_a_reset_at_a_switch_comes_after_the_evaluation_of_what_was_learned(trained):
    plain, reset = (
        trained(name, **c)[2] for name, c in (("td3_cycling", {}), ("reset_td3_cycling", {"reset_at_switch": True}))
    )
    for task in (LARGE, SMALL):
        tag = f"eval/{task}/episodic_return"
        assert reset[tag][0] == plain[tag][0] and reset[tag][1] != plain[tag][1]


def test_injection_comes_half_way_through_the_whole_run_or_at_the_steps_given():
    assert [step for step, _ in train("injection_td3_cycling")[2]["injection/actor_parts"]] == [400]
    log = train("injection_td3_cycling", injection_step=(150, 650))[2]
    assert log["injection/actor_parts"] == [(150, 2), (650, 4)]


@pytest.mark.parametrize("change", [{"env_ids": (SMALL, LARGE)}, {"cycles": 1}, {"task_steps": 150}], ids=str)
def test_the_arguments_of_the_cycle_change_the_run(change, trained):
    assert not harness.same(train("td3_cycling", **change)[1], trained("td3_cycling")[1])


# ===== Interruptions =====


def resumed(script, folder):
    """Goes on with a run -> its folder."""
    module = CYCLING[script]
    return module.main(module.Args(resume=str(test_resume.age(folder))))


def assert_same_cycle(folder, whole):
    test_resume.assert_same_run(folder, whole)
    assert (folder / "cycle.csv").read_bytes() == (whole / "cycle.csv").read_bytes()


@with_one
def test_a_run_cut_off_and_resumed_is_the_same_to_the_bit(script, monkeypatch):
    steps = [340, 400, 450]  # within a visit, at a switch, in the next visit
    replace, settings = os.replace, OFTEN.get(script, {}) | {"eval_interval": 100, "checkpoint_interval": 10}

    def replaced(source, target):
        replace(source, target)
        if Path(target).name == "checkpoint.pt" and (step := harness.saved(target)["step"]) in steps:
            shutil.copytree(Path(target).parent, f"killed-{step}", dirs_exist_ok=True)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replaced)
        whole, *_ = train(script, **settings)
    for step in steps:
        folder = Path(f"killed-{step}")
        if step != 400:  # what was written after the checkpoint is void
            (log,) = folder.glob("events*")
            log.write_bytes(next(whole.glob("events*")).read_bytes())
            shutil.copy(whole / "cycle.csv", folder)
        assert_same_cycle(resumed(script, folder), whole)


@with_one
def test_a_cycle_killed_before_and_after_a_switch_goes_on_as_if_nothing_had_happened(script):
    args = harness.short_args(script, **CYCLE, checkpoint_interval=100)
    whole, words = CYCLING[script].main(args).rename("whole"), harness.flags(args)
    for step, delay in ((100, 0.1), (400, 0), (500, 0.2)):
        process = test_resume.Fork(script, *words)
        test_resume.wait_for(process, f"runs/*/models/{step}.pt")
        time.sleep(delay)
        test_resume.kill(process)
        words = ["--resume", test_resume.age(test_resume.the_folder())]
    assert_same_cycle(resumed(script, test_resume.the_folder()), whole)


def test_a_signal_at_the_end_of_a_visit_ends_the_run_there(trained, monkeypatch):
    whole, *_ = trained("td3_cycling")
    evaluate, evaluated = TD3.evaluate, []

    def counted(*args):
        evaluated.append(args)
        if len(evaluated) == 2 + 2 + 1:  # random, the end of the first visit, the end of the second one
            TD3.stop.append(15)
        return evaluate(*args)

    with monkeypatch.context() as patched, pytest.raises(SystemExit) as exit:
        patched.setattr(TD3, "evaluate", counted)
        patched.setattr(TD3, "stop", [])
        TD3.main(harness.short_args("td3_cycling", **CYCLE))
    assert exit.value.code == 128 + 15
    folder = test_resume.the_folder()
    assert harness.saved(folder / "checkpoint.pt")["step"] == 400 and len(rows(folder)) == 3
    del exit
    gc.collect()  # the run's lock
    assert_same_cycle(resumed("td3_cycling", folder), whole)


# ===== Bad input =====

GOOD = ["--env-ids", SMALL, LARGE, "--task-steps", "400", "--learning-starts", "300"]
REFUSED = [
    (["--env-ids", SMALL, "HalfCheeta-v4"], "--env-ids HalfCheeta-v4: .*Did you mean.*HalfCheetah"),
    (["--env-ids", SMALL, "CartPole-v1"], "--env-ids CartPole-v1: .*Discrete"),
    (["--env-ids", "ToyUnboundedAction-v0", SMALL], "--env-ids ToyUnboundedAction-v0: .*bounded"),
    (["--env-ids", "ToyImageObservation-v0", SMALL], "--env-ids ToyImageObservation-v0: .*vectors"),
    (["--env-ids"], "--env-ids: name one task or more"),
    (["--cycles", "0"], "--cycles 0: must lie in 1 "),
    (["--cycles", "-1"], "--cycles -1: must lie in 1 "),
    (["--task-steps", "0"], "--task-steps 0: must lie in 1 "),
    (["--learning-starts", "400"], "--learning-starts 400: must lie in 0 ... 399"),
    (["--resume", "runs/nothing"], "--resume runs/nothing: "),
]


@pytest.mark.parametrize(
    "words, pattern", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
@with_some
def test_bad_input_is_refused_before_anything_is_created(script, words, pattern, capsys):
    module = CYCLING[script]
    own = [] if "--resume" in words else GOOD + (["--growth-interval", "50"] if script == "ne_td3_cycling" else [])
    with pytest.raises(SystemExit) as exit:
        module.main(tyro.cli(module.Args, args=own + words))
    out, err = capsys.readouterr()
    text = " ".join(word for word in err.split() if word != "│")  # tyro puts a box around it
    assert exit.value.code == 2 and out == "" and re.search(pattern, text), (out, err)
    assert list(Path().iterdir()) == []


def test_a_growth_interval_may_be_as_long_as_all_visits_together_and_no_longer():
    settings = {"env_ids": (SMALL, LARGE), "cycles": 2, "task_steps": 200, "learning_starts": 100}
    assert NE.Args(**settings, growth_interval=400).gradient_steps == 400
    assert NE.Args(**settings, growth_interval=800, replay_ratio=2).gradient_steps == 800
    with pytest.raises(ValueError, match=re.escape("--growth-interval 402: must lie in 1 ... 400")):
        NE.Args(**settings, growth_interval=402)


def test_a_run_that_diverges_ends_in_one_line(capsys):
    with pytest.raises(SystemExit) as exit:
        train("td3_cycling", env_ids=("ToyNanReward-v0", SMALL), task_steps=900)
    assert exit.value.code == 1 and "not finite" in capsys.readouterr().err


def test_help_explains_every_argument(capsys):
    for module in CYCLING.values():
        with pytest.raises(SystemExit):
            tyro.cli(module.Args, args=["--help"])
        text = capsys.readouterr().out
        for name in module.Args.__dataclass_fields__:
            assert f"-{name.replace('_', '-')}" in text
