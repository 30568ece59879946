"""Whole runs: what they store, log, print and write, and that NE switched off is plain TD3."""

import importlib.machinery
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import gymnasium as gym
import harness
import numpy as np
import pytest
import torch
import toys

NETS = ("actor", "qf1", "qf2")
LOSSES = ("qf1_loss", "qf2_loss", "qf_loss", "actor_loss", "qf1_values", "qf2_values")
with_ne = pytest.mark.parametrize("script", harness.scripts_with("ReviewGate"))
with_all = pytest.mark.parametrize("script", harness.SCRIPTS)


def train(script, **changes):
    """A short run -> (folder, model, log)."""
    folder = harness.SCRIPTS[script].main(harness.short_args(script, **changes))
    return folder, harness.saved(folder / "model.pt"), harness.events(folder)


def without_masks(model):
    return {net: {k: v for k, v in state.items() if not k.endswith(".mask")} for net, state in model.items()}


# ===== NE switched off =====


@pytest.mark.parametrize("buffer_size", [1000, 400], ids=["", "buffer wrapped"])
@with_ne
def test_without_its_three_parts_and_dense_ne_is_plain_td3_to_the_bit(script, buffer_size):
    (parent,) = (
        names[0] for names in harness.FAMILIES.values() if harness.PATHS[script] in [harness.ROOT / n for n in names]
    )
    settings = {"buffer_size": buffer_size, "eval_interval": 300, "eval_episodes": 2}
    off = {"grow": False, "prune": False, "review": False, "initial_density": 1.0}
    _, ne, ne_log = train(script, **settings, **off)
    _, td3, td3_log = train(Path(parent).stem, **settings)
    assert harness.same(without_masks(ne), td3)
    assert all(value.all() for net in ne.values() for key, value in net.items() if key.endswith(".mask"))
    del td3_log["charts/SPS"]
    assert len(td3_log["charts/episodic_return"]) == 4 and len(td3_log["eval/episodic_return"]) == 3
    assert {tag: (ne_log[tag], td3_log[tag]) for tag in td3_log if ne_log[tag] != td3_log[tag]} == {}


@pytest.mark.parametrize("change", [{"grow": True}, {"initial_density": 0.5}, {"review": True}], ids=str)
@with_ne
def test_each_part_of_ne_makes_it_differ_from_plain_td3(script, change):
    off = {"grow": False, "prune": False, "review": False, "initial_density": 1.0}
    settings = {"neuron_interval": 20, "learning_rate": 1e-2}
    change = change | ({"initial_density": 0.5} if "grow" in change else {})
    td3 = train("td3_continuous", **settings)[1]
    assert not harness.same(without_masks(train(script, **settings, **off | change)[1]), td3)


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
    _, without, silent = train(script)
    for settings in ({"eval_interval": 70, "eval_episodes": 1}, {"eval_interval": 300, "eval_episodes": 3}):
        _, model, log = train(script, **settings)
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
    log = train(script, eval_interval=450, eval_episodes=1)[2]
    assert log["eval/episodic_return_std"] == [(450, 0.0), (900, 0.0)]


def play(state, env, seed):
    """The return of one episode of a saved actor, computed with numpy alone."""
    weights = {key: value.double().numpy() for key, value in state.items()}
    obs, _ = env.reset(seed=seed)
    total, done = 0.0, False
    while not done:
        x = obs
        for layer in ("fc1", "fc2"):
            x = np.maximum(weights[f"{layer}.weight"] @ x + weights[f"{layer}.bias"], 0)
        action = np.tanh(weights["fc3.weight"] @ x + weights["fc3.bias"]) * 2  # Pendulum's bounds are -2 and 2
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        total, done = total + float(reward), terminated or truncated
    return total


@with_all
def test_evaluate_prints_what_the_saved_actor_scores(script, monkeypatch, capsys):
    module = harness.SCRIPTS[script]
    folder, model, _ = train(script, env_id="ToyRecordedPendulum-v0", hidden_dim=8)
    monkeypatch.setattr(toys.RecordedPendulum, "instances", [])
    before = {path: path.read_bytes() for path in folder.iterdir()}
    printed = []
    for _ in range(2):
        capsys.readouterr()
        module.main(module.Args(evaluate=str(folder), eval_episodes=4, cuda=False))
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] and printed[0].count("\n") == 1
    first, second = (env for env in toys.RecordedPendulum.instances if env.seeds)
    assert first.seeds == second.seeds and len(set(first.seeds)) == 4
    returns = [play(model["actor"], gym.make("ToyRecordedPendulum-v0"), seed) for seed in first.seeds]
    mean, std = map(float, re.search(r"mean[^-\d]*(-?[\d.]+), std[^-\d]*([\d.]+)", printed[0]).groups())
    assert mean == pytest.approx(np.mean(returns), abs=0.1) and std == pytest.approx(np.std(returns), abs=0.1)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


# ===== Logs =====


def steps_of(log, prefix):
    """The steps at which the tags that start with `prefix` were logged -> {tag: list}."""
    return {tag: [step for step, _ in values] for tag, values in log.items() if tag.startswith(prefix)}


@with_all
def test_every_tag_is_logged_at_its_steps(script):
    log = train(script, eval_interval=250, eval_episodes=1)[2]
    sparse = hasattr(harness.SCRIPTS[script], "MaskedLinear")
    tags = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    tags |= {"eval/episodic_return", "eval/episodic_return_std"} | {f"losses/{name}" for name in LOSSES}
    neurons = ["dormant_ratio_0", "dormant_ratio_0.1", "fau"]
    if sparse:
        neurons += ["density", "density_layer1", "density_layer2", "density_layer3", "disconnected"]
        events = ("grown", "pruned", "output_change_pruning", "output_change_growth")
        tags |= {f"ne/{net}/{name}" for net in NETS for name in events} | {"ne/review_threshold", "ne/review_share"}
    tags |= {f"neurons/{net}/{name}" for net in NETS for name in neurons}
    assert set(log) == tags

    assert set(map(tuple, steps_of(log, "charts/episodic").values())) == {(200, 400, 600, 800)}
    assert [value for _, value in log["charts/episodic_length"]] == [200] * 4
    assert set(map(tuple, steps_of(log, "eval/").values())) == {(250, 500, 750)}
    looks = (400, 500, 600, 700, 800, 900)  # every 100 gradient steps, which begin after step 300
    assert set(map(tuple, steps_of(log, "neurons/").values())) == {looks}
    assert set(map(tuple, steps_of(log, "losses/").values())) == {looks}
    assert steps_of(log, "charts/SPS")["charts/SPS"] == list(looks)
    assert all(value > 0 for _, value in log["charts/SPS"])
    if sparse:
        assert set(map(tuple, steps_of(log, "ne/review").values())) == {looks}
        for net in NETS:
            assert set(map(tuple, steps_of(log, f"ne/{net}/").values())) == {tuple(range(350, 901, 50))}


@with_all
def test_losses_and_shares_that_are_logged_are_possible(script):
    log = train(script)[2]
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
    _, model, log = train(script, final_density=final_density)  # the last event and the last look are at its last step
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
        assert density == pytest.approx(final_density, abs=3 / size)
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


@with_ne
def test_the_review_share_follows_the_threshold(script):
    log = train(script, neuron_interval=100, review_floor=0.0, total_timesteps=1500, learning_rate=1e-2)[2]
    thresholds, shares = ([value for _, value in log[f"ne/review_{name}"]] for name in ("threshold", "share"))
    assert thresholds[0] == 1 and shares[0] == 0  # nothing to compare the first count with
    assert min(thresholds) < 0.95
    for threshold, share in zip(thresholds, shares[1:], strict=False):  # the threshold that held for these batches
        assert share == pytest.approx(1 - threshold, abs=0.25)
    off = train(script, review=False)[2]
    assert not [tag for tag in off if tag.startswith("ne/review")] or not any(v for _, v in off["ne/review_share"])


@with_all
def test_the_folder_and_args_json_say_what_was_run(script):
    args = harness.short_args(script, env_id="toys:ToyDictObservation-v0", seed=7, total_timesteps=400)
    folder = harness.SCRIPTS[script].main(args)
    assert re.fullmatch(rf"toys[:-]ToyDictObservation-v0__{script}__7__\d+", folder.name)
    assert harness.SCRIPTS[script].Args(**json.loads((folder / "args.json").read_text())) == args


@with_all
def test_the_model_has_plain_dense_weights(script):
    model = train(script)[1]
    assert set(model) == {"actor", "qf1", "qf2", "target_actor", "qf1_target", "qf2_target"}
    shapes = {"actor": (3, 1), "target_actor": (3, 1)}
    for name, state in model.items():
        obs_dim, out = shapes.get(name, (4, 1))
        for layer, shape in (("fc1", (32, obs_dim)), ("fc2", (32, 32)), ("fc3", (out, 32))):
            assert state[f"{layer}.weight"].shape == shape and state[f"{layer}.bias"].shape == shape[:1]
            torch.nn.Linear(shape[1], shape[0]).load_state_dict({k: state[f"{layer}.{k}"] for k in ("weight", "bias")})


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
def test_a_matrix_of_actions_with_bounds_of_their_own_works(script, monkeypatch):
    transitions = recorded(script, monkeypatch, env_id="ToyMatrixAction-v0", exploration_noise=0.5)
    actions = np.array([action for _, action, *_ in transitions])
    low, high = np.array([-1, 0, 2, -5]), np.array([1, 3, 4, 10])
    assert actions.shape == (900, 4) and (actions >= low).all() and (actions <= high).all()
    random = actions[:300]
    assert ((random - low) / (high - low)).mean(0) == pytest.approx([0.5] * 4, abs=0.1)
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
    assert (train(script, env_id="ToyWithoutRenderMode-v0", total_timesteps=400)[0] / "model.pt").exists()


@pytest.mark.parametrize("task", ["dm_control/walker-walk-v0", "HalfCheetah-v4"])
@with_all
def test_robots_train_without_a_word_from_the_libraries(script, task):
    words = harness.flags(harness.short_args(script, env_id=task, total_timesteps=500, learning_starts=200))
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    assert messages(result.stderr) == []
    (folder,) = Path("runs").iterdir()
    assert result.stdout.splitlines() == [f"finished: {folder}"]
    assert folder.name.startswith(task.replace("/", "-") + "__")
    assert (folder / "model.pt").exists()


IMPORT = """
import gc, importlib.util, json, logging, os, signal, sys, warnings
import gymnasium, numpy, torch, tqdm, tyro
from torch.utils.tensorboard import SummaryWriter
def state():
    tiny = (torch.tensor([1e-40]) * 1).tolist()
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    levels = logging.getLogger("absl").level, logging.getLogger().level
    generators = torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()
    return [dict(os.environ), torch.get_num_threads(), tiny, str(handlers), str(warnings.filters), levels, generators,
        gc.get_freeze_count(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled(), sys.argv]
before = state()
spec = importlib.util.spec_from_file_location("script", sys.argv[1])
sys.modules["script"] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
for a, b in zip(before, state()):
    assert a == b, (a, b)
"""


@with_all
def test_importing_a_script_does_nothing(script):
    command = [sys.executable, "-c", IMPORT, str(harness.PATHS[script])]
    result = harness.subprocess.run(command, capture_output=True, text=True, cwd=".")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert list(Path().iterdir()) == []


def all_numbers(structure):
    """All floating-point tensors in a saved structure -> list."""
    if isinstance(structure, torch.Tensor):
        return [structure] if structure.is_floating_point() else []
    parts = structure.values() if isinstance(structure, dict) else structure if isinstance(structure, list) else []
    return [tensor for part in parts for tensor in all_numbers(part)]


@with_all
def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(script):
    args = harness.short_args(script, env_id="toys:ToyNanReward-v0", total_timesteps=3000, checkpoint_interval=200)
    result = harness.run(script, *harness.flags(args), env=toys.ENVIRONMENT)
    assert result.returncode == 1, result.stderr
    errors = messages(result.stderr)
    assert len(errors) == 1 and errors[0].startswith("error: ") and "finite" in errors[0]
    (folder,) = Path("runs").iterdir()
    assert str(folder / "checkpoint.pt") in errors[0]
    assert not (folder / "model.pt").exists() and not list(folder.glob("*.tmp"))
    checkpoint = harness.saved(folder / "checkpoint.pt")
    numbers = all_numbers(checkpoint)
    assert len(numbers) > 30 and all(torch.isfinite(tensor).all() for tensor in numbers)
    assert len(list(folder.glob("buffer-*.bin"))) == 1
    evaluation = harness.run(script, "--evaluate", folder, "--eval-episodes", 1, env=toys.ENVIRONMENT)
    assert evaluation.returncode == 0 and "nan" not in evaluation.stdout, evaluation.stderr


@with_all
def test_a_learning_rate_that_destroys_the_networks_is_noticed(script, capsys):
    module = harness.SCRIPTS[script]
    with pytest.raises(SystemExit) as exit:
        module.main(harness.short_args(script, learning_rate=1e30, total_timesteps=1200))
    assert exit.value.code == 1
    (folder,) = Path("runs").iterdir()
    assert len(re.findall("error: .*finite", capsys.readouterr().err)) == 1
    assert not (folder / "model.pt").exists() and not (folder / "checkpoint.pt").exists()


@with_all
def test_numbers_that_stop_being_finite_after_the_last_log_are_noticed_at_the_end(script, capsys):
    module = harness.SCRIPTS[script]
    settings = {"learning_starts": 610, "total_timesteps": 650, "growth_interval": 10, "batch_size": 512}
    with pytest.raises(SystemExit) as exit:  # fewer gradient steps than there are between two logs
        module.main(harness.short_args(script, env_id="ToyNanReward-v0", **settings))
    assert exit.value.code == 1
    (folder,) = Path("runs").iterdir()
    assert not (folder / "model.pt").exists()


# ===== Videos =====


def videos(folder):
    """The videos in a run's folder -> list of paths; each is an mp4 file."""
    paths = sorted((folder / "videos").glob("*.mp4"))
    assert all(path.read_bytes()[4:8] == b"ftyp" for path in paths)
    return paths


@pytest.mark.parametrize("task", ["Pendulum-v1", pytest.param("HalfCheetah-v4", marks=pytest.mark.slow)])
@with_all
def test_capture_video_writes_videos_in_training_and_in_evaluation(script, task):
    small = {"total_timesteps": 410 if task == "Pendulum-v1" else 1000, "env_id": task, "capture_video": True}
    result = harness.run(script, *harness.flags(harness.short_args(script, **small)))
    assert result.returncode == 0, result.stderr
    assert messages(result.stderr) == []
    (folder,) = Path("runs").iterdir()
    training = videos(folder)
    assert training
    episodes = 2 if task == "Pendulum-v1" else 1  # without a GPU a thousand frames take a minute
    words = ["--evaluate", folder, "--eval-episodes", episodes, "--capture-video", "--no-cuda"]
    result = harness.run(script, *words)
    assert result.returncode == 0, result.stderr
    assert messages(result.stderr) == []
    assert len(videos(folder)) == len(training) + episodes


@with_all
def test_rendering_does_not_disturb_training(script):
    settings = {"total_timesteps": 500}
    assert harness.same(train(script, **settings, capture_video=True)[1], train(script, **settings)[1])


NO_OSMESA = """
import ctypes, ctypes.util
def hidden(name):
    return "osmesa" in str(name).lower()
class CDLL(ctypes.CDLL):
    def __init__(self, name, *args, **kwargs):
        if hidden(name):
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        super().__init__(name, *args, **kwargs)
find = ctypes.util.find_library
ctypes.CDLL, ctypes.util.find_library = CDLL, lambda name: None if hidden(name) else find(name)
"""


@with_all
def test_without_opengl_one_line_names_the_package_to_install(script):
    Path("site").mkdir()
    Path("site/sitecustomize.py").write_text(NO_OSMESA)
    words = harness.flags(harness.short_args(script, env_id="HalfCheetah-v4", capture_video=True))
    result = harness.run(script, *words, env={"MUJOCO_GL": "osmesa", "PYTHONPATH": str(Path("site").resolve())})
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch(r"error: --capture-video.*install.*lib(egl|osmesa).*\n", result.stderr), result.stderr
    assert not Path("runs").exists()


# ===== Weights & Biases =====


@with_all
def test_track_without_the_package_says_how_to_install_it(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    module = harness.SCRIPTS[script]
    with pytest.raises(SystemExit) as exit:
        module.main(harness.short_args(script, track=True))
    assert exit.value.code == 2
    assert re.fullmatch("error: --track.*wandb.*pip install wandb.*\n", capsys.readouterr().err)
    assert not Path("runs").exists()


@with_all
def test_track_sends_the_logs_to_the_project_and_entity(script, monkeypatch):
    calls, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **options: calls.append(options)
    wandb.finish = lambda *args, **options: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    settings = {"track": True, "wandb_project_name": "my-project", "wandb_entity": "me", "total_timesteps": 400}
    folder = train(script, **settings)[0]
    (options,) = calls
    assert (options["project"], options["entity"]) == ("my-project", "me")
    assert options["sync_tensorboard"] is True and options["name"] == folder.name
    assert options["config"]["total_timesteps"] == 400


def test_a_diverged_agent_that_its_task_refuses_gets_one_clear_line(tmp_path):
    words = harness.flags(harness.short_args("ne_td3_continuous", learning_rate=1e30))
    task = "dm_control/cartpole-swingup-v0"  # its simulator raises an error when an action is not a number
    words[words.index("--env-id") + 1] = task
    result = harness.run("ne_td3_continuous", *words)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: step 30")
