"""Whole runs: what they store, log, print and write, and that NE switched off is plain TD3."""

import contextlib
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import types
import warnings
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import test_resume
import torch
import toys
from torch.utils.tensorboard import SummaryWriter

NETS = ("actor", "qf1", "qf2")
LOSSES = ("qf1_loss", "qf2_loss", "qf_loss", "actor_loss", "qf1_values", "qf2_values")
with_ne = pytest.mark.parametrize("script", harness.scripts_with("ReviewGate"))
with_all = pytest.mark.parametrize("script", harness.SCRIPTS)


def train(script, **changes):
    """A short run in the current folder -> (folder, the weights it ends with, log)."""
    folder = harness.SCRIPTS[script].main(harness.short_args(script, **changes))
    return folder, harness.weights(folder), harness.events(folder)


_known = {}


def known(script, **changes):
    """The same, made once for the same arguments, in a folder that must not be changed."""
    key = str(harness.short_args(script, **changes)), script
    if key not in _known:
        place = Path(tempfile.mkdtemp())
        with contextlib.chdir(place):
            folder, *rest = train(script, **changes)
        _known[key] = place / folder, *rest
    return _known[key]


def without_masks(model):
    """Weights without what only masked layers have."""
    own = (".mask", ".pruned")
    return {net: {k: v for k, v in state.items() if not k.endswith(own)} for net, state in model.items()}


# ===== NE switched off =====


@pytest.mark.parametrize("buffer_size", [1000, 400], ids=["", "buffer wrapped"])
@with_ne
def test_without_its_three_parts_and_dense_ne_is_plain_td3_to_the_bit(script, buffer_size):
    (parent,) = (
        names[0] for names in harness.FAMILIES.values() if harness.PATHS[script] in [harness.ROOT / n for n in names]
    )
    parent = {"ne_layer_norm_td3_continuous": "layer_norm_td3_continuous"}.get(script, parent)
    settings = {"buffer_size": buffer_size, "eval_interval": 300, "eval_episodes": 2}
    off = {"grow": False, "prune": False, "review": False, "initial_density": 1.0}
    _, ne, ne_log = known(script, **settings, **off)
    _, td3, td3_log = known(Path(parent).stem, **settings)
    assert harness.same(without_masks(ne), td3)
    assert all(value.all() for net in ne.values() for key, value in net.items() if key.endswith(".mask"))
    td3_log = {tag: values for tag, values in td3_log.items() if tag != "charts/SPS"}
    assert len(td3_log["charts/episodic_return"]) == 4 and len(td3_log["eval/episodic_return"]) == 3
    assert {tag: (ne_log[tag], td3_log[tag]) for tag in td3_log if ne_log[tag] != td3_log[tag]} == {}


@pytest.mark.parametrize("change", [{"grow": True}, {"initial_density": 0.5}, {"review": True}], ids=str)
@with_ne
def test_each_part_of_ne_makes_it_differ_from_plain_td3(script, change):
    off = {"grow": False, "prune": False, "review": False, "initial_density": 1.0}
    settings = {"neuron_interval": 20, "learning_rate": 1e-2}
    change = change | ({"initial_density": 0.5} if "grow" in change else {})
    td3 = known("td3_continuous", **settings)[1]
    assert not harness.same(without_masks(known(script, **settings, **off | change)[1]), td3)


@with_ne
def test_ne_leaves_every_draw_of_td3_as_it_is(script, monkeypatch):
    seeds = []
    for name in (script, "td3_continuous"):
        monkeypatch.setattr(toys.RecordedPendulum, "instances", [])
        train(name, env_id="ToyRecordedPendulum-v0", review_floor=0.0, neuron_interval=20)
        seeds.append([seed for env in toys.RecordedPendulum.instances for seed in env.seeds])
    assert seeds[0] == seeds[1] and len(seeds[0]) == 9  # the episodes' seeds come from TD3's generator


# ===== Evaluation =====


@with_all
def test_evaluation_does_not_disturb_training(script):
    _, without, silent = known(script)
    for settings in ({"eval_interval": 350, "eval_episodes": 2}, {"eval_interval": 250, "eval_episodes": 1}):
        _, model, log = known(script, **settings)
        assert harness.same(model, without)
        assert log["charts/episodic_return"] == silent["charts/episodic_return"]
        assert len(log["eval/episodic_return"]) == 900 // settings["eval_interval"]
        assert log.keys() - silent.keys() == {"eval/episodic_return", "eval/episodic_return_std"}


@with_all
def test_evaluation_has_a_task_and_seeds_of_its_own(script, monkeypatch):
    monkeypatch.setattr(toys.RecordedPendulum, "instances", [])
    _, _, log = train(script, env_id="ToyRecordedPendulum-v0", eval_interval=300, eval_episodes=2)
    training, evaluation = sorted(
        (env for env in toys.RecordedPendulum.instances if env.seeds), key=lambda env: -len(env.seeds)
    )
    assert len(training.seeds) == 9 and len(set(training.seeds)) == 9 and None not in training.seeds
    assert len(evaluation.seeds) == 6 and not set(evaluation.seeds) & set(training.seeds)
    assert len(set(evaluation.seeds[:2])) == 2
    assert evaluation.seeds[:2] == evaluation.seeds[2:4] == evaluation.seeds[4:]
    returns = np.reshape(evaluation.returns, (3, 2))
    assert [step for step, _ in log["eval/episodic_return"]] == [300, 600, 900]
    np.testing.assert_allclose([value for _, value in log["eval/episodic_return"]], returns.mean(1), rtol=1e-6)
    np.testing.assert_allclose(
        [value for _, value in log["eval/episodic_return_std"]], returns.std(1), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose([v for _, v in log["charts/episodic_return"]], training.returns, rtol=1e-6)


@with_all
def test_another_seed_starts_its_episodes_elsewhere(script, monkeypatch):
    seeds = []
    for seed in (1, 2):
        monkeypatch.setattr(toys.RecordedPendulum, "instances", [])
        train(script, env_id="ToyRecordedPendulum-v0", eval_interval=300, eval_episodes=2, seed=seed)
        seeds.append({seed for env in toys.RecordedPendulum.instances for seed in env.seeds})
    assert not seeds[0] & seeds[1]


@with_all
def test_a_single_evaluation_episode_has_no_deviation(script):
    log = known(script, eval_interval=250, eval_episodes=1)[2]
    assert log["eval/episodic_return_std"] == [(250, 0.0), (500, 0.0), (750, 0.0)]


def play(state, env, seed):
    """The return of one episode of a saved actor, computed with numpy alone."""
    p = {key: value.double().numpy() for key, value in state.items()}

    def output(x, *layers):
        for l, layer in enumerate(layers, start=1):
            x = p[f"{layer}.weight"] @ x + p[f"{layer}.bias"]
            if layer.startswith("fc") and f"norm{l}.weight" in p:
                x = (x - x.mean()) / np.sqrt(x.var() + 1e-5) * p[f"norm{l}.weight"] + p[f"norm{l}.bias"]
            x = np.maximum(x, 0) if l < 3 else x
        return x

    obs, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        out, part = output(obs, "fc1", "fc2", "fc3"), 0
        while f"frozen.{part}.0.weight" in p:  # what an injection has added and taken away again
            out, part = out + (-1) ** part * output(obs, *(f"frozen.{part}.{l}" for l in (0, 2, 4))), part + 1
        action = np.tanh(out) * 2  # Pendulum's bounds are -2 and 2
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        total, done = total + float(reward), terminated or truncated
    return total


@with_all
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_at_once(script, number):
    folder = known(script)[0]
    (folder / "play.lock").unlink(missing_ok=True)
    words = harness.command(script, "--evaluate", folder, "--eval-episodes", 1_000_000)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not (folder / "play.lock").exists():  # from then on the arguments are read, and handlers are set
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[1]
        assert process.returncode == 128 + number and "Traceback" not in printed
    finally:
        process.kill()


@with_all
def test_evaluate_prints_what_the_saved_actor_scores(script, monkeypatch, capsys):
    module = harness.SCRIPTS[script]
    folder, model, _ = train(script, env_id="ToyRecordedPendulum-v0", hidden_dim=8)
    monkeypatch.setattr(toys.RecordedPendulum, "instances", [])
    before = test_resume.contents(folder)
    printed = []
    for _ in range(2):
        capsys.readouterr()
        module.main(module.Args(evaluate=str(folder), eval_episodes=4))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") == 1
    first, second = (env for env in toys.RecordedPendulum.instances if env.seeds)
    assert first.seeds == second.seeds and len(set(first.seeds)) == 4
    returns = [play(model["actor"], gym.make("ToyRecordedPendulum-v0"), seed) for seed in first.seeds]
    mean, std = map(float, re.search(r"mean[^-\d]*(-?[\d.]+), std[^-\d]*([\d.]+)", printed[0]).groups())
    assert mean == pytest.approx(np.mean(returns), abs=0.1) and std == pytest.approx(np.std(returns), abs=0.1)
    assert test_resume.contents(folder) == before


# ===== Logs =====


def steps_of(log, prefix):
    """The steps at which the tags that start with `prefix` were logged -> {tag: list}."""
    return {tag: [step for step, _ in values] for tag, values in log.items() if tag.startswith(prefix)}


@with_all
def test_every_tag_is_logged_at_its_steps(script):
    log = known(script, eval_interval=250, eval_episodes=1)[2]
    sparse, ne = (hasattr(harness.SCRIPTS[script], name) for name in ("MaskedLinear", "grow_and_prune_"))
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    tags |= {"eval/episodic_return", "eval/episodic_return_std"} | {f"losses/{name}" for name in LOSSES}
    neurons = ["dormant_ratio_0", "dormant_ratio_0.1", "fau"]
    if sparse:
        neurons += ["density", "density_layer1", "density_layer2", "density_layer3", "disconnected"]
    if ne:
        events = ("grown", "pruned", "output_change_pruning", "output_change_growth")
        tags |= {f"ne/{net}/{name}" for net in NETS for name in events} | {"ne/review_threshold", "ne/review_share"}
    tags |= {f"neurons/{net}/{name}" for net in NETS for name in neurons}
    own = () if ne else steps_of(log, script.removesuffix("_td3_continuous") + "/")  # a method's, in its own tests
    assert set(log) - set(own) == tags

    assert set(map(tuple, steps_of(log, "charts/episodic").values())) == {(200, 400, 600, 800)}
    assert [value for _, value in log["charts/episodic_length"]] == [200] * 4
    assert set(map(tuple, steps_of(log, "eval/").values())) == {(250, 500, 750)}
    looks = (400, 500, 600, 700, 800, 900)  # every 100 gradient steps, which begin after step 300
    assert set(map(tuple, steps_of(log, "neurons/").values())) == {looks}
    assert set(map(tuple, steps_of(log, "losses/").values())) == {looks}
    assert steps_of(log, "charts/SPS")["charts/SPS"] == list(looks)
    assert all(value > 0 for _, value in log["charts/SPS"])
    if ne:
        assert set(map(tuple, steps_of(log, "ne/review").values())) == {looks}
        for net in NETS:
            assert set(map(tuple, steps_of(log, f"ne/{net}/").values())) == {tuple(range(350, 901, 50))}


@with_all
def test_losses_and_shares_that_are_logged_are_possible(script):
    log = known(script)[2]
    for tag, values in log.items():
        numbers = [value for _, value in values]
        assert np.isfinite(numbers).all()
        if tag.startswith("neurons/"):
            assert min(numbers) >= 0 and max(numbers) <= 1
    for net in NETS:
        strict, loose = (log[f"neurons/{net}/dormant_ratio_{tau}"] for tau in ("0", "0.1"))
        assert all(a <= b for (_, a), (_, b) in zip(strict, loose, strict=True))
        assert max(value for _, value in log[f"neurons/{net}/fau"]) > 0
    for (_, a), (_, b), (_, mean) in zip(
        *(log[f"losses/{x}"] for x in ("qf1_loss", "qf2_loss", "qf_loss")), strict=True
    ):
        assert mean == pytest.approx((a + b) / 2, rel=1e-5)


@pytest.mark.parametrize("final_density", [1.0, 0.6])
@with_ne
def test_the_last_densities_logged_are_those_of_the_saved_masks(script, final_density):
    _, model, log = known(script, final_density=final_density)  # the last event and the last look are at its last step
    for net in NETS:
        masks = [model[net][f"fc{layer}.mask"] for layer in (1, 2, 3)]
        size = sum(mask.numel() for mask in masks)
        density = sum(int(mask.sum()) for mask in masks) / size
        step, logged = log[f"neurons/{net}/density"][-1]
        assert step == 900 and logged == pytest.approx(density, rel=1e-6)
        for layer, mask in enumerate(masks, 1):
            value = log[f"neurons/{net}/density_layer{layer}"][-1][1]
            assert value == pytest.approx(float(mask.double().mean()), rel=1e-6)
        alone = torch.cat([~masks[1].any(0), ~masks[2].any(0)]).double().mean()
        assert log[f"neurons/{net}/disconnected"][-1][1] == pytest.approx(float(alone), rel=1e-6)
        # at full size nothing can grow in the place of what the last event took
        missing = log[f"ne/{net}/pruned"][-1][1] if final_density == 1 else 0
        assert density == pytest.approx(final_density - missing / size, abs=3 / size)
        start = log[f"neurons/{net}/density"][0][1]
        assert 0.25 < start < density


@with_ne
def test_what_events_grew_and_pruned_adds_up_to_the_change_of_density(script):
    _, model, log = train(script, neuron_interval=50, hidden_dim=64, learning_rate=1e-2)
    pruned = 0
    for net in NETS:
        size = sum(value.numel() for key, value in model[net].items() if key.endswith(".mask"))
        active = [round(value * size) for _, value in log[f"neurons/{net}/density"]]
        changes = [g - p for (_, g), (_, p) in zip(log[f"ne/{net}/grown"], log[f"ne/{net}/pruned"], strict=True)]
        assert np.diff(active).tolist() == changes[1:]
        assert active[0] - changes[0] == pytest.approx(0.25 * size, abs=3)
        assert {value for _, value in log[f"ne/{net}/output_change_growth"]} == {0.0}
        pruned += sum(value for _, value in log[f"ne/{net}/pruned"])
    assert pruned > 0


@pytest.mark.parametrize("script", harness.scripts_with("ReviewGate", "scheduled_growth", "grow_", "prune_dormant_"))
def test_the_review_share_follows_the_threshold(script):  # in a run whose dormant neurons are NE's
    log = train(script, neuron_interval=100, review_floor=0.0, total_timesteps=1500, learning_rate=1e-2)[2]
    thresholds, shares = ([value for _, value in log[f"ne/review_{name}"]] for name in ("threshold", "share"))
    assert thresholds[0] == 1 and shares[0] == 0  # nothing to compare the first count with
    assert min(thresholds) < 0.95
    for threshold, share in zip(thresholds, shares[1:], strict=False):  # the threshold that held for these batches
        assert share == pytest.approx(1 - threshold, abs=0.25)
    off = known(script, review=False)[2]
    assert not [tag for tag in off if tag.startswith("ne/review")] or not any(v for _, v in off["ne/review_share"])


@with_all
def test_the_folder_and_args_json_say_what_was_run(script):
    args = harness.short_args(script, env_id="toys:ToyDictObservation-v0", seed=7, total_timesteps=351)
    folder = harness.SCRIPTS[script].main(args)
    assert re.fullmatch(rf"toys[:-]ToyDictObservation-v0__{script}__7__\d+", folder.name)
    found = harness.SCRIPTS[script].Args(**json.loads((folder / "args.json").read_text()))
    assert json.dumps(vars(found)) == json.dumps(vars(args))  # in JSON, a tuple is a list


@with_all
def test_the_weights_that_are_kept_are_those_of_plain_dense_layers(script):
    model = known(script)[1]
    assert list(model) == ["actor", "qf1", "qf2"]
    for name, state in model.items():
        obs_dim, out = (3, 1) if name == "actor" else (4, 1)
        for layer, shape in (("fc1", (32, obs_dim)), ("fc2", (32, 32)), ("fc3", (out, 32))):
            assert state[f"{layer}.weight"].shape == shape and state[f"{layer}.bias"].shape == shape[:1]
            torch.nn.Linear(shape[1], shape[0]).load_state_dict({k: state[f"{layer}.{k}"] for k in ("weight", "bias")})


@with_all
def test_the_first_weights_that_are_kept_are_those_before_any_learning(script):
    folder, _, _ = known(script)
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["0.pt", "900.pt"]
    first, last = (harness.saved(folder / f"models/{step}.pt") for step in (0, 900))
    assert not any(harness.same(first[net][key], last[net][key]) for net in NETS for key in ("fc1.weight", "fc3.bias"))
    other = known(script, learning_rate=1e-2, neuron_interval=20)[0]
    assert harness.same(harness.saved(other / "models/0.pt"), first)
    if hasattr(harness.SCRIPTS[script], "ReviewGate"):
        for net in NETS:
            masks = [first[net][f"fc{layer}.mask"] for layer in (1, 2, 3)]
            assert sum(int(mask.sum()) for mask in masks) == pytest.approx(0.25 * sum(m.numel() for m in masks), abs=3)
        for net, state in harness.saved(known(script, dense_ends=True)[0] / "models/0.pt").items():
            densities = [float(state[f"fc{layer}.mask"].float().mean()) for layer in (1, 2, 3)]
            assert densities == [1, 0.25, 1], net


# ===== What is stored =====


def recorded(script, monkeypatch, **changes):
    """A short run -> all transitions that it stored: tuples of obs, action, reward, next_obs, terminated."""
    transitions, add = [], harness.SCRIPTS[script].ReplayBuffer.add

    def record(self, *transition):
        transitions.append(tuple(np.array(part, dtype=np.float64) for part in transition))
        return add(self, *transition)

    monkeypatch.setattr(harness.SCRIPTS[script].ReplayBuffer, "add", record)
    train(script, **changes)
    return transitions


@pytest.mark.parametrize("ending", ["Terminated", "Truncated"])
@with_all
def test_the_stored_next_observation_is_the_true_last_one(script, ending, monkeypatch):
    transitions = recorded(script, monkeypatch, env_id=f"ToyCounter{ending}-v0", total_timesteps=402)
    first = transitions[0][0][0]  # number of the first episode
    assert len(transitions) == 402
    for number, (obs, action, reward, next_obs, terminated) in enumerate(transitions):
        episode, step = first + number // 5, number % 5
        assert obs.tolist() == [episode, step]
        assert next_obs.tolist() == [episode, step + 1]  # never the next episode's first, [episode + 1, 0]
        assert bool(terminated) == (ending == "Terminated" and step == 4)
        assert reward == pytest.approx(action[0])


@with_all
def test_each_episode_is_reset_with_a_seed_of_its_own(script, monkeypatch):
    seeds, reset = [], harness.Counter.reset

    def record(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(harness.Counter, "reset", record)
    train(script, env_id="ToyCounterTruncated-v0", total_timesteps=400)
    assert len(seeds) >= 80 and all(isinstance(seed, int) for seed in seeds) and len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("task, obs_dim", [("DictObservation", 8), ("MatrixObservation", 6)])
@with_all
def test_observations_are_flattened(script, task, obs_dim, monkeypatch):
    seen, observe = [], toys.Toy.observe

    def record(self):
        seen.append(observe(self))
        return seen[-1]

    monkeypatch.setattr(toys.Toy, "observe", record)
    transitions = recorded(script, monkeypatch, env_id=f"Toy{task}-v0", total_timesteps=390)
    flat = [np.concatenate([np.ravel(x) for x in (o.values() if isinstance(o, dict) else [o])]) for o in seen]
    expected, after = iter(flat), None
    for number, (obs, _, _, next_obs, _) in enumerate(transitions):
        before = next(expected) if number % 50 == 0 else after
        after = next(expected)
        assert obs.shape == (obs_dim,) and (obs == before.astype(np.float32)).all()
        assert (next_obs == after.astype(np.float32)).all()


@with_all
def test_actions_stay_in_bounds_that_differ(script, monkeypatch):
    transitions = recorded(script, monkeypatch, env_id="ToyLarge-v0", exploration_noise=0.5)
    actions = np.array([action for _, action, *_ in transitions])
    low, high = np.array([-2, 1, 0]), np.array([4, 5, 0.5])
    assert actions.shape == (900, 3) and (actions >= low).all() and (actions <= high).all()
    random = actions[:300]
    assert ((random - low) / (high - low)).mean(0) == pytest.approx([0.5] * 3, abs=0.1)
    assert (np.ptp(random, axis=0) > 0.9 * (high - low)).all()
    assert len(np.unique(actions[300:], axis=0)) > 100


# ===== The process =====


def messages(stderr):
    """What is on stderr but the progress bar -> list of lines."""
    lines = re.split(r"[\r\n]", stderr)
    return [line for line in lines if line.strip() and not re.match(r"\s*\d+%\|", line)]


@with_all
def test_a_task_that_cannot_be_drawn_and_takes_no_render_mode_works(script):
    assert gym.make("ToyWithoutRenderMode-v0").observation_space.shape == (2,)
    assert train(script, env_id="ToyWithoutRenderMode-v0", total_timesteps=351)[1]


ROBOTS = [("td3_continuous", "HalfCheetah-v4"), ("ne_td3_continuous", "dm_control/walker-walk-v0")]
MORE = [(script, task) for script in harness.SCRIPTS for _, task in ROBOTS if (script, task) not in ROBOTS]


@pytest.mark.parametrize("script, task", [*ROBOTS, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)])
def test_robots_train_and_the_script_says_one_word(script, task):
    words = harness.flags(harness.short_args(script, env_id=task, total_timesteps=260, learning_starts=200))
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    assert "error" not in result.stderr.lower().replace("glfwerror", "") and "Traceback" not in result.stderr
    (folder,) = Path("runs").iterdir()
    assert result.stdout == f"finished: {folder}\n"
    assert folder.name.startswith(task.replace("/", "-") + "__")
    assert list(harness.weights(folder)) == list(NETS)


def process_state():
    """Settings of this process that an import could change -> list."""
    tiny = (torch.tensor([1e-40]) * 1).tolist()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    levels = logging.getLogger("absl").level, logging.getLogger().level
    generators = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist()
    settings = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    return [dict(os.environ), tiny, handlers, str(warnings.filters), levels, generators, settings, list(sys.argv)]


@with_all
def test_importing_a_script_does_nothing(script, capsys, monkeypatch):
    spec = importlib.util.spec_from_file_location("imported", harness.PATHS[script])
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "imported", module)
    before = process_state()
    spec.loader.exec_module(module)
    for a, b in zip(before, process_state(), strict=True):
        assert a == b
    assert capsys.readouterr() == ("", "") and list(Path().iterdir()) == []


# ===== Numbers that are not finite =====


class Broken(toys.Toy):
    """In the step number `at` of a process, or in the reset before it, a number is `value`."""

    taken, at, what, value = 0, 0, "", float("nan")

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return self.broken("reset", obs, Broken.taken + 1), info

    def step(self, action):
        Broken.taken += 1
        obs, reward, *rest = super().step(action)
        return self.broken("observation", obs, Broken.taken), self.broken("reward", reward, Broken.taken), *rest

    def broken(self, what, number, taken):
        return number + self.value if what == self.what and taken == self.at else number


class Huge(toys.Toy):
    """Its rewards are finite, their squares are not: the losses overflow, Adam's steps don't."""

    def reward(self, action):
        return 1e25


class Unclosable(toys.Toy):
    def close(self):
        raise RuntimeError("it cannot be closed")


for task in (Broken, Huge, Unclosable):
    gym.register(f"Toy{task.__name__}-v0", entry_point=task)


def stopped(script, capsys, **changes):
    """A run that has to stop because something is not finite -> (its folder, step of the one line, what it says)."""
    capsys.readouterr()
    module = harness.SCRIPTS[script]
    assert test_resume.exit_code(module.main, harness.short_args(script, **changes)) == 1
    out, err = capsys.readouterr()
    (line,) = messages(err)
    folder = test_resume.the_folder()
    step, what = re.fullmatch(rf"error: step (\d+): (.*) not finite; .*{re.escape(str(folder))}.*", line).groups()
    assert out == ""
    return folder, int(step), what


def all_numbers(structure):
    """All floating-point tensors in a saved structure -> list."""
    if isinstance(structure, torch.Tensor):
        return [structure] if structure.is_floating_point() else []
    parts = structure.values() if isinstance(structure, dict) else structure if isinstance(structure, list) else []
    return [tensor for part in parts for tensor in all_numbers(part)]


def good(folder):
    """The step of the checkpoint in a run's folder, all of whose numbers must be finite."""
    checkpoint = harness.saved(folder / "checkpoint.pt")
    numbers = all_numbers(checkpoint)
    assert len(numbers) > 30 and all(torch.isfinite(tensor).all() for tensor in numbers)
    assert len(checkpoint["rows"]) == checkpoint["step"]
    assert all(torch.isfinite(tensor).all() for tensor in all_numbers(harness.weights(folder)))
    assert max(int(path.stem) for path in (folder / "models").iterdir()) == checkpoint["step"]
    return checkpoint["step"]


@pytest.mark.parametrize(
    "what, value, at",
    [
        ("reward", "nan", 50),  # the step before a checkpoint
        ("reward", "-inf", 373),
        ("observation", "inf", 233),
        ("observation", "nan", 350),
        ("reset", "nan", 1),
        ("reset", "inf", 101),
        ("reset", "nan", 351),
    ],
)
@with_all
def test_a_transition_that_is_not_finite_is_refused_when_it_comes(script, what, value, at, monkeypatch, capsys):
    for name, new in {"what": what, "value": float(value), "at": at, "taken": 0}.items():
        monkeypatch.setattr(Broken, name, new)
    settings = {"env_id": "ToyBroken-v0", "total_timesteps": 500, "checkpoint_interval": 50}
    folder, step, named = stopped(script, capsys, **settings)
    assert step == at and what.replace("reset", "observation") in named
    assert good(folder) == (at - 1) // 50 * 50

    monkeypatch.setattr(Broken, "at", 0)  # the task is whole again
    module = harness.SCRIPTS[script]
    module.main(module.Args(evaluate=str(folder), eval_episodes=1))
    assert "nan" not in capsys.readouterr().out
    module.main(module.Args(resume=str(folder)))
    assert harness.saved(folder / "checkpoint.pt")["step"] == 500


@with_all
def test_an_action_that_is_not_finite_never_reaches_the_task(script, monkeypatch, capsys):
    seen, step = [], toys.Toy.step
    monkeypatch.setattr(toys.Toy, "step", lambda self, action: (seen.append(action), step(self, action))[1])
    folder, at, named = stopped(script, capsys, env_id="ToySmall-v0", learning_rate=1e18, total_timesteps=1200)
    assert 300 < at < 310 and "action" in named
    assert len(seen) == at - 1 and np.isfinite(seen).all()
    assert good(folder) == 0


@pytest.mark.slow
@with_all
def test_a_diverged_agent_that_its_task_refuses_gets_one_clear_line(script, capsys):
    task = "dm_control/cartpole-swingup-v0"  # its simulator raises an error when an action is not a number
    folder, at, named = stopped(script, capsys, env_id=task, learning_rate=1e18)
    assert 300 < at < 310 and "action" in named and good(folder) == 0


@with_all
def test_losses_that_are_not_finite_stop_the_run(script, capsys):
    folder, at, named = stopped(script, capsys, env_id="ToyHuge-v0", total_timesteps=500)
    assert at == 400 and "loss" in named
    assert good(folder) == 0


# In a run that starts learning two steps before its end, weights are no numbers any more after these, and no action has
# been chosen by them.
DIVERGED = {"env_id": "ToySmall-v0", "learning_rate": 1e18, "growth_interval": 2}


@with_all
def test_an_agent_whose_weights_are_not_finite_is_not_evaluated(script, monkeypatch, capsys):
    evaluations = []
    monkeypatch.setattr(harness.SCRIPTS[script], "evaluate", lambda *given: evaluations.append(given) or [0.0])
    settings = {"learning_starts": 308, "eval_interval": 310, "total_timesteps": 400}
    folder, at, named = stopped(script, capsys, **DIVERGED | settings)
    assert (at, evaluations) == (310, []) and "weight" in named
    assert good(folder) == 0


@with_all
def test_weights_that_are_not_finite_in_the_end_are_not_saved(script, capsys):
    folder, at, named = stopped(script, capsys, **DIVERGED, learning_starts=308, total_timesteps=310)
    assert at == 310 and "weight" in named
    assert good(folder) == 0


@with_all
def test_a_task_that_cannot_be_closed_costs_nothing_of_the_run(script):
    with pytest.raises(RuntimeError, match="cannot be closed"):
        train(script, env_id="ToyUnclosable-v0", total_timesteps=400)
    folder = test_resume.the_folder()
    assert harness.saved(folder / "checkpoint.pt")["step"] == 400 and (folder / "models/400.pt").exists()
    assert harness.events(folder)["losses/qf_loss"][-1][0] == 400


# ===== Videos =====


def videos(folder):
    """The videos in a run's folder -> list of names; each is an mp4 file."""
    paths = sorted((folder / "videos").glob("*.mp4"))
    assert all(path.read_bytes()[4:8] == b"ftyp" for path in paths)
    return [path.name for path in paths]


@with_all
def test_capture_video_writes_videos_in_training_and_in_evaluation_and_disturbs_nothing(script, monkeypatch, capsys):
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))  # as main sets it
    folder, model, log = train(script, total_timesteps=450, capture_video=True)
    assert videos(folder) == [f"run-0-episode-{number}.mp4" for number in (0, 1)]
    _, without, other = known(script, total_timesteps=450)
    assert harness.same(model, without) and log["charts/episodic_return"] == other["charts/episodic_return"]

    module = harness.SCRIPTS[script]
    module.main(module.Args(evaluate=str(folder), eval_episodes=3, capture_video=True))
    played = [f"play-450-episode-{number}.mp4" for number in range(3)]
    assert videos(folder) == [*played, "run-0-episode-0.mp4", "run-0-episode-1.mp4"]
    assert messages(capsys.readouterr().err) == []


@pytest.mark.slow
@with_all
def test_robots_are_filmed_as_a_user_films_them(script):
    args = harness.short_args(script, env_id="HalfCheetah-v4", total_timesteps=1000, capture_video=True)
    result = harness.run(script, *harness.flags(args))
    assert result.returncode == 0, result.stderr
    folder = test_resume.the_folder()
    assert videos(folder) == ["run-0-episode-0.mp4"]
    words = ["--evaluate", folder, "--eval-episodes", 1, "--capture-video"]  # without a GPU a frame takes a while
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    assert videos(folder) == ["play-1000-episode-0.mp4", "run-0-episode-0.mp4"]


# ===== Weights & Biases =====


@with_all
def test_track_sends_the_logs_of_a_run_and_of_its_rest_to_one_place(script, monkeypatch):
    calls, wandb, module = [], types.ModuleType("wandb"), harness.SCRIPTS[script]
    wandb.init = lambda **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", wandb)

    class Writer(SummaryWriter):  # what it opens before wandb.init never gets there
        def __init__(self, *args, **options):
            calls.append("writer")
            super().__init__(*args, **options)

    monkeypatch.setattr(module, "SummaryWriter", Writer)
    folder = train(script, total_timesteps=351)[0]
    assert calls == ["writer"]
    calls.clear()
    args = harness.short_args(script, track=True, total_timesteps=351)
    folder = module.main(args)
    assert module.main(module.Args(resume=str(folder))) == folder
    options, writer, again, _ = calls
    assert json.dumps(options) == json.dumps(again) and writer == "writer"  # in args.json, a tuple is a list
    assert options["id"] == folder.name and options["resume"] == "allow" and options["sync_tensorboard"] is True
    assert options["config"] == vars(args)
