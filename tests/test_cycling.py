"""A cycle of tasks: padding, switches, what goes on across them, and what is shown of them."""

import contextlib
import csv
import itertools
import math
import re
import shlex
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

NE, TD3 = CYCLING["ne_td3_cycling"], CYCLING["td3_cycling"]
RESET, INJECTION = CYCLING["reset_td3_cycling"], CYCLING["injection_td3_cycling"]
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
DRAW = NE.draw
with_all = pytest.mark.parametrize("script", CYCLING)
# What the methods share is the same code to the letter; two scripts each time, the others with the slow tests
ALWAYS = ["td3_cycling", "ne_td3_cycling"]
with_some = pytest.mark.parametrize(
    "script", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CYCLING]
)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    """Spares the tests that are not about pictures the second that each takes."""
    for module in CYCLING.values():
        monkeypatch.setattr(module, "draw", lambda *args: None)


def train(script, **changes):
    """A short run of a cycle -> (folder, model, log)."""
    folder = CYCLING[script].main(harness.short_args(script, **CYCLE | changes))
    return folder, harness.saved(folder / "model.pt"), harness.events(folder)


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
        models.append(harness.saved(folder / "model.pt"))
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


def test_an_episode_that_is_cut_off_is_logged_with_its_length():
    log = train("td3_cycling")[2]
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
    states, module = {}, CYCLING[script]

    def record(folder, state, rb):
        copied = module.copy.deepcopy(
            {name: value for name, value in state.items() if name not in ("events", "buffer")}
        )
        states[state["global_step"]] = copied, len(rb)

    monkeypatch.setattr(module, "save_checkpoint", record)
    train(script, checkpoint_interval=1, neuron_interval=20)  # a checkpoint at each end of an episode
    for switch, first_end in ((200, 270), (400, 450), (600, 670)):
        (before, size), (after, fresh_size) = states[switch], states[first_end]  # no learning in between
        assert size == 200 and fresh_size == first_end - switch
        learned = [*NETS, "target_actor", "qf1_target", "qf2_target", "actor_optimizer", "q_optimizer", "actor_loss"]
        learned += ["ne", "reviewed"] if script == "ne_td3_cycling" else []
        a, b = (
            {f"{name}/{path}": v for name in learned for path, v in flat(state[name]).items()}
            for state in (before, after)
        )
        assert a.keys() == b.keys() and len(a) > 50
        changed = {path for path in a if not harness.same(a[path], b[path])}
        bounds = {f"{net}/action_{part}/" for net in ("actor", "target_actor") for part in ("scale", "bias")}
        assert changed == bounds
        space = TASKS[VISITS[switch // 200]].action_space
        for net in ("actor", "target_actor"):
            padding = [0] * (3 - len(space.low))
            assert after[net]["action_scale"].tolist() == [*((space.high - space.low) / 2).tolist(), *padding]
            assert after[net]["action_bias"].tolist() == [*((space.high + space.low) / 2).tolist(), *padding]
    if script == "ne_td3_cycling":
        gate = states[600][0]["ne"]["gate"]
        assert gate["previous"] is not None and gate["g_max"] > 0
        assert not states[200][0]["actor"]["fc2.mask"].all()  # masks that could have been lost


def test_growth_follows_one_schedule_over_all_visits():
    _, model, log = train("ne_td3_cycling", growth_interval=48, prune=False)
    total = 4 * (200 - 80)  # gradient steps of the run
    steps = [200 * visit + step for visit in range(4) for step in range(81, 201)]  # of the run, at t = 1, 2, ...
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


def test_a_visit_is_evaluated_by_its_own_clock_and_at_its_end_on_all_tasks():
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
    only_ends = train("td3_cycling")[2]  # --eval-interval 0
    assert [step for step, _ in only_ends["eval/episodic_return"]] == [200, 400, 600, 800]


def test_the_cycle_is_logged_at_the_first_and_last_step_of_each_visit():
    log = train("td3_cycling")[2]
    ends = [step for visit in range(4) for step in (200 * visit + 1, 200 * visit + 200)]
    assert log["cycle/task"] == list(zip(ends, [0, 0, 1, 1] * 2, strict=True))
    assert log["cycle/number"] == list(zip(ends, [1] * 4 + [2] * 4, strict=True))


@with_some
def test_evaluation_does_not_disturb_training(script):
    _, without, silent = train(script)
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
    module.main(module.Args(evaluate=str(folder), eval_episodes=2, cuda=False))
    printed = re.findall(r"(\S+): mean return (-?[\d.]+), std", capsys.readouterr().out)
    assert [task for task, _ in printed] == [LARGE, SMALL, LARGE]
    np.testing.assert_allclose([float(mean) for _, mean in printed], last, atol=0.01)
    if script in ("td3_cycling", "ne_td3_cycling"):
        seeds = torch.randint(2**31 - 1, (2,), generator=torch.Generator().manual_seed(1001)).tolist()
        for task, mean in zip((LARGE, SMALL), last, strict=False):
            returns = [play(model["actor"], TASKS[task], gym.make(task), seed) for seed in seeds]
            assert mean == pytest.approx(np.mean(returns), rel=1e-3, abs=0.01)


def test_cycle_csv_has_a_row_for_a_random_policy_and_for_each_visit(monkeypatch):
    monkeypatch.setattr(NE, "draw", DRAW)
    folder, _, log = train("ne_td3_cycling", eval_episodes=40)
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
        deviation = width * math.sqrt(length / 12 / 40)
        assert abs(values[0] - length * mean) < 4 * deviation
    picture = (folder / "cycle.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("tasks, cycles", [(1, 1), (1, 3), (2, 1), (5, 2)])
def test_the_picture_can_be_drawn_for_any_cycle(tasks, cycles):
    args = NE.Args(env_ids=(SMALL,) * tasks, cycles=cycles, task_steps=100)
    curves = {"eval/episodic_return": [(100 * visit, 1.0) for visit in range(1, tasks * cycles + 1)]}
    for visits in range(1, tasks * cycles + 1):
        DRAW(Path("cycle.png"), args, curves, [[0.0] * tasks] * (visits + 1))
    assert Path("cycle.png").read_bytes().startswith(b"\x89PNG")


def test_the_three_summary_numbers_are_what_their_definition_says():
    rng = np.random.default_rng(0)
    args = NE.Args(env_ids=("A", "B", "C"), cycles=3, task_steps=100)
    matrix = rng.normal(-500, 100, (10, 3)).tolist()  # all returns are negative
    matrix[0] = [-900.0, -800.0, 0.0]  # never better than random on C
    curve = [
        (step, -1000 + 50 * step / 100 + 30 * math.sin(step)) for v in range(9) for step in (100 * v + 30, 100 * v + 70)
    ]
    curve = sorted(curve + [(100 * v + 100, matrix[v + 1][v % 3]) for v in range(9)])
    relearning, final, retention = NE.summarise(args, {"eval/episodic_return": curve}, matrix)

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


def test_the_summary_is_printed_at_the_end_and_undefined_where_there_is_nothing_to_compare(capsys):
    train("td3_cycling", env_ids=(SMALL,), cycles=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == f"relearning    undefined ({SMALL} undefined)"
    assert re.fullmatch(rf"final return  {SMALL} -?\d+\.\d", lines[-3])
    assert lines[-2] == f"retention     undefined ({SMALL} undefined)" and lines[-1].startswith("finished: ")


# ===== Methods =====


@pytest.mark.parametrize("interval", [0, 300, 100, 250])
@pytest.mark.parametrize("at_switch", [False, True])
def test_resets_come_every_interval_of_the_run_and_at_switches_if_asked_for(interval, at_switch, monkeypatch):
    expected = set()
    for step in range(1, 800):
        if interval and step % interval == 0 and 800 - step >= interval:
            expected.add(step)
        if at_switch and step % 200 == 0:
            expected.add(step)
    log = train("reset_td3_cycling", reset_interval=interval, reset_at_switch=at_switch)[2]
    assert log.get("reset/number", []) == [(step, number) for number, step in enumerate(sorted(expected), start=1)]


def test_a_reset_at_a_switch_comes_after_the_evaluation_of_what_was_learned():
    plain, reset = (
        train(name, **c)[2] for name, c in (("td3_cycling", {}), ("reset_td3_cycling", {"reset_at_switch": True}))
    )
    for task in (LARGE, SMALL):
        tag = f"eval/{task}/episodic_return"
        assert reset[tag][0] == plain[tag][0] and reset[tag][1] != plain[tag][1]


def test_injection_comes_half_way_through_the_whole_run_or_at_the_steps_given():
    assert [step for step, _ in train("injection_td3_cycling")[2]["injection/actor_parts"]] == [400]
    log = train("injection_td3_cycling", injection_step=(150, 650))[2]
    assert log["injection/actor_parts"] == [(150, 2), (650, 4)]


@pytest.mark.parametrize("change", [{"env_ids": (SMALL, LARGE)}, {"cycles": 1}, {"task_steps": 150}], ids=str)
def test_the_arguments_of_the_cycle_change_the_run(change):
    assert not harness.same(train("td3_cycling", **change)[1], train("td3_cycling")[1])


# ===== Interruptions =====

KILLED = {"env_ids": ("Pendulum-v1", "MountainCarContinuous-v0"), "task_steps": 600, "cycles": 2, "hidden_dim": 16}
KILLED |= {"learning_starts": 200, "checkpoint_interval": 200, "eval_interval": 300, "eval_episodes": 1}


class CutOff(Exception):
    """Stands for the end of a process."""


def cut_off(module, step, monkeypatch, args):
    """Runs until just before a step is stored -> folder."""
    add, count = module.ReplayBuffer.add, [0]

    def counted(self, *transition):
        count[0] += 1
        if count[0] == step:
            raise CutOff
        return add(self, *transition)

    with monkeypatch.context() as patched, pytest.raises(CutOff):
        patched.setattr(module.ReplayBuffer, "add", counted)
        module.main(args)
    (folder,) = Path("runs").iterdir()
    return folder


# the step before which the run ends, and its last checkpoint: within a visit, just after a switch, in the next visit
@pytest.mark.parametrize("step, last", [(390, 340), (401, 400), (480, 450)])
@with_some
def test_a_run_cut_off_and_resumed_is_the_same_to_the_bit(script, step, last, monkeypatch, tmp_path):
    args = harness.short_args(script, **CYCLE, checkpoint_interval=10, **OFTEN.get(script, {}) | {"eval_interval": 100})
    (tmp_path / "whole").mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        whole = CYCLING[script].main(args).absolute()
    folder = cut_off(CYCLING[script], step, monkeypatch, args)
    assert harness.saved(folder / "checkpoint.pt")["global_step"] == last
    CYCLING[script].main(CYCLING[script].Args(resume=str(folder)))
    test_resume.assert_same_run(folder, whole)
    assert (folder / "cycle.csv").read_bytes() == (whole / "cycle.csv").read_bytes()


@pytest.mark.parametrize(
    "script", [name if name.startswith("ne") else pytest.param(name, marks=pytest.mark.slow) for name in CYCLING]
)
def test_a_cycle_killed_before_and_after_a_switch_goes_on_as_if_nothing_had_happened(script, tmp_path, monkeypatch):
    monkeypatch.setattr(CYCLING[script], "draw", DRAW)
    args = harness.short_args(script, **KILLED)
    (tmp_path / "whole").mkdir()
    with contextlib.chdir(tmp_path / "whole"):
        whole = CYCLING[script].main(args).absolute()
    points = [(f"runs/*/buffer-{step}.bin", 0.05) for step in ("400", "600", "1[2-7]*", "1800")]
    folder = test_resume.kill_at(script, args, points)
    test_resume.assert_same_run(folder, whole)
    for name in ("cycle.csv", "cycle.png"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


# ===== Bad input =====

GOOD = ["--env-ids", SMALL, LARGE, "--task-steps", "400", "--learning-starts", "300", "--growth-interval", "50"]
GOOD += ["--hidden-dim", "8", "--batch-size", "8", "--cycles", "1", "--eval-episodes", "1"]
REFUSED = [
    (["--env-ids", SMALL, "HalfCheeta-v4"], "--env-ids HalfCheeta-v4: no such task.*did you mean.*HalfCheetah-v4"),
    (["--env-ids", SMALL, "CartPole-v1"], "--env-ids CartPole-v1: actions must be continuous"),
    (["--env-ids", "ToyUnboundedAction-v0", SMALL], "--env-ids ToyUnboundedAction-v0: actions must be bounded"),
    (["--env-ids", "ToyImageObservation-v0", SMALL], "--env-ids ToyImageObservation-v0: .*images"),
    (["--env-ids"], "--env-ids .*name one or more"),
    (["--cycles", "0"], "--cycles 0: must be at least 1"),
    (["--cycles", "-1"], "--cycles -1: must be at least 1"),
    (["--task-steps", "0"], "--task-steps 0: must be at least 1"),
    (["--learning-starts", "400"], "--learning-starts 400: not below --task-steps 400; this works: "),
    (["--resume", "runs/nothing"], "runs/nothing"),
]


@pytest.mark.parametrize(
    "words, pattern", REFUSED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
@with_some
def test_bad_input_is_refused_in_one_line_before_anything_is_created(script, words, pattern, capsys):
    module = CYCLING[script]
    own = [word for word in GOOD if script == "ne_td3_cycling" or word not in ("--growth-interval", "50")]
    with pytest.raises(SystemExit) as exit:
        module.main(tyro.cli(module.Args, args=words if "--resume" in words else own + words))
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and out == "" and re.fullmatch("error: .*\n", err), (out, err)
    assert re.search(pattern, err), err
    assert list(Path().iterdir()) == []


def test_a_growth_interval_may_be_as_long_as_all_visits_together_and_no_longer(capsys):
    args = NE.Args(env_ids=(SMALL, LARGE), cycles=2, task_steps=200, learning_starts=100, growth_interval=400)
    NE.check_args(args)
    with pytest.raises(SystemExit):
        NE.check_args(NE.dataclasses.replace(args, growth_interval=402))
    assert "longer than the 400 gradient steps" in capsys.readouterr().err


@with_some
def test_the_command_that_an_error_line_suggests_works(script, capsys):
    module = CYCLING[script]
    with pytest.raises(SystemExit):
        module.check_args(module.Args(env_ids=(SMALL, LARGE), task_steps=300, cycles=1, seed=3))
    words = shlex.split(capsys.readouterr().err.split("this works: ")[1])
    args = tyro.cli(module.Args, args=words[2:])
    assert words[0] == "python" and Path(words[1]).resolve() == harness.PATHS[script]
    assert args.env_ids == (SMALL, LARGE) and args.task_steps == 300 and args.seed == 3
    module.check_args(args)
    assert module.main(module.dataclasses.replace(args, hidden_dim=8, eval_episodes=1, cuda=False)).is_dir()


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
