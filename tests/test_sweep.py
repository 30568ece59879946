"""benchmark/sweep.py: which runs it makes of its arguments, and that neither deaths nor interruptions change them."""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import harness
import psutil
import pytest
from ray.cluster_utils import Cluster

SWEEP = harness.ROOT / "benchmark" / "sweep.py"
sweep = harness.load_script(SWEEP)
NE, TD3 = harness.PATHS["ne_td3_continuous"], harness.PATHS["td3_continuous"]
SIZES = {"total_timesteps": 5400, "checkpoint_interval": 200, "eval_interval": 1000}
SHORT = {script: harness.short_args(script, **SIZES) for script in ("td3_continuous", "ne_td3_continuous")}


def jobs(*words, scripts=(NE, TD3), env_ids=("Hopper-v4",), seeds=1, grid=()):
    args = SimpleNamespace(scripts=scripts, env_ids=list(env_ids), seeds=seeds, grid=list(grid), runs="runs")
    return sweep.all_jobs(args, list(words))


def command_lines(found):
    """What the scripts would make of the jobs' words -> list of (script, Args as a dict)."""
    modules = {str(path): harness.MODULES[name] for name, path in harness.PATHS.items()}
    parse = harness.NE.tyro.cli
    return [(Path(job["script"]).stem, vars(parse(modules[job["script"]].Args, args=job["words"]))) for job in found]


# ===== Which runs =====


def test_every_script_meets_every_task_and_seed_once_in_a_folder_of_its_own():
    found = jobs("--gamma", "0.9", env_ids=["Hopper-v4", "dm_control/walker-walk-v0"], seeds=3)
    runs = {(script, args["env_id"], args["seed"]) for script, args in command_lines(found)}
    assert runs == {
        (script, task, seed)
        for script in ("ne_td3_continuous", "td3_continuous")
        for task in ("Hopper-v4", "dm_control/walker-walk-v0")
        for seed in (1, 2, 3)
    }
    assert len(found) == len({job["folder"] for job in found}) == 12
    assert all(args["gamma"] == 0.9 for _, args in command_lines(found))
    assert all(Path(job["folder"]).parent == Path.cwd() / "runs" for job in found)


def test_an_argument_goes_to_the_scripts_that_have_it():
    found = command_lines(jobs("--growth-interval", "500", "--no-review", "--learning-starts=77"))
    ne, td3 = (args for _, args in found)
    assert ne["growth_interval"] == 500 and ne["review"] is False and ne["learning_starts"] == 77
    assert td3["learning_starts"] == 77 and "growth_interval" not in td3


def test_a_grid_runs_all_combinations_of_what_a_script_has():
    grid = [["initial-density", "0.1", "0.5"], ["tau", "0.01", "0.02"], ["prune", "True", "False"]]
    found = command_lines(jobs(grid=grid))
    ne = [(a["initial_density"], a["tau"], a["prune"]) for script, a in found if script == "ne_td3_continuous"]
    td3 = [args["tau"] for script, args in found if script == "td3_continuous"]
    assert sorted(ne) == sorted((d, t, p) for d in (0.1, 0.5) for t in (0.01, 0.02) for p in (False, True))
    assert td3 == [0.01, 0.02]


def test_a_cycling_script_takes_all_tasks_as_its_cycle():
    found = command_lines(jobs(scripts=[harness.PATHS["td3_cycling"]], env_ids=["Hopper-v4", "Ant-v4"], seeds=2))
    assert [(args["env_ids"], args["seed"]) for _, args in found] == [(("Hopper-v4", "Ant-v4"), s) for s in (1, 2)]


def test_a_runs_folder_depends_on_its_own_arguments_alone():
    def folders(*words, **options):
        return {(Path(job["script"]).stem, job["seed"]): job["folder"] for job in jobs(*words, **options)}

    ne, td3 = ("ne_td3_continuous", 1), ("td3_continuous", 1)
    plain, other, more = folders(), folders("--growth-interval", "500"), folders(seeds=2, scripts=[TD3])
    assert plain[td3] == other[td3] == more[td3] and plain[ne] != other[ne]
    assert plain[ne] == folders(env_ids=["Ant-v4", "Hopper-v4"])[ne]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scripts", "nowhere.py"], "--scripts nowhere.py: cannot be read"),
        (["--scripts", str(harness.ROOT / "tests" / "toys.py")], "has no class Args"),
        (["--seeds", "0"], "--seeds 0: must be at least 1"),
        (["--retries", "-1"], "--retries -1: must be at least 0"),
        (["--grid", "omega"], "--grid omega: needs values"),
        (["--grid", "omegga", "1"], "--grid omegga: none of the scripts has this argument"),
        (["--grid", "grow", "yes"], "--grid grow yes: is either True or False"),
        (["--grid", "seed", "1", "2"], "--grid seed: is set by the sweep"),
        (["--grid", "gamma", "1", "--", "--gamma", "1"], "stands after -- and in --grid"),
        (
            ["--total-timesteps", "900"],
            "--total-timesteps 900: not the sweep's; arguments of the scripts stand at the end, after --",
        ),
        (["--seed", "3"], "--seed 3: not the sweep's"),
        (["--", "--gama", "1"], "--gama: none of the scripts has this argument"),
        (["--", "--resume", "runs/x"], "--resume: is set by the sweep"),
        (["--address", "nowhere"], "--address nowhere: nothing answers there"),
        (["--address", "127.0.0.1:1"], "--address 127.0.0.1:1: nothing answers there"),
        (["--address", "127.0.0.1:99999"], "--address 127.0.0.1:99999: nothing answers there"),
        (["--", "gamma"], "gamma: arguments of the scripts, after --, start with --name"),
    ],
)
def test_bad_input_is_refused_in_one_line(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--scripts", str(NE), "--env-ids", "Hopper-v4", *words])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_a_cluster_that_does_not_let_the_sweep_in_is_told_with_the_tokens_variable(monkeypatch, capsys):
    def refuse(**_):
        raise ConnectionError("Failed to connect\nto Ray cluster")

    monkeypatch.setattr(sweep.ray, "init", refuse)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        words = ["sweep.py", "--scripts", str(NE), "--env-ids", "Hopper-v4", "--address", address]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as end:
            sweep.main()
    line = (
        f"error: --address {address}: no Ray cluster there (Failed to connect to Ray cluster), or it asks for a token"
    )
    assert end.value.code == 2 and capsys.readouterr().err == f"{line}: then set RAY_AUTH_MODE=token\n"


# ===== Deaths and interruptions =====


def start(*options, scripts=("td3_continuous", "ne_td3_continuous"), more=(), sigint=signal.SIG_DFL):
    """Starts a sweep over Pendulum as a user would, with SIG_IGN in the background of a shell's script -> process."""
    words = [word for word in harness.flags(SHORT[scripts[-1]]) if word not in ("--env-id", "Pendulum-v1")]
    paths = [str(harness.PATHS.get(script, script)) for script in scripts]
    command = [sys.executable, str(SWEEP), "--scripts", *paths, "--env-ids", "Pendulum-v1", *options, "--", *words]
    with open("out.txt", "a") as out:  # what the tests run in may ignore SIGINT itself
        heed = functools.partial(signal.signal, signal.SIGINT, sigint)
        return subprocess.Popen([*command, *more], stdout=out, stderr=out, preexec_fn=heed)


def until(condition, process=None, seconds=300):
    """Waits until `condition()` holds -> what it gave."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end and (process is None or process.poll() is None), Path("out.txt").read_text()
        time.sleep(0.05)
    return found


def training():
    """Processes of scripts that run below this test's folder -> list."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            script = process.cmdline()[1:2]
            if script in ([str(NE)], [str(TD3)]) and Path.cwd() in Path(process.cwd()).parents:
                found.append(process)
    return found


def numbers(folder):
    """What a run has learned and logged, but for its speed -> (weights, logs)."""
    log = harness.events(folder)
    return harness.weights(folder), {tag: values for tag, values in log.items() if tag != "charts/SPS"}


def assert_undisturbed(script):
    """Checks the run of a sweep in runs/ against the script, run here without Ray."""
    found = list(Path("runs").glob(f"*__{script}__1__*/runs/*"))
    assert len(found) == 1
    model, log = numbers(found[0])
    Path("alone").mkdir(exist_ok=True)
    os.chdir("alone")
    args = harness.MODULES[script].Args(**json.loads((Path("..") / found[0] / "args.json").read_text()))
    expected, logged = numbers(harness.MODULES[script].main(args))
    os.chdir("..")
    assert harness.same(model, expected) and log == logged


def starts():
    """How often each run was started -> {script: count}."""
    logs = {path.parent.name.split("__")[1]: path.read_text() for path in Path("runs").glob("*/log.txt")}
    return {script: sum(line.startswith("$ ") for line in log.splitlines()) for script, log in logs.items()}


def begun():
    """How many runs have a checkpoint from after their start."""
    kept = [path for path in Path("runs").glob("*/runs/*/models/*.pt") if path.stem != "0"]
    return len({path.parent for path in kept})


def test_a_sweep_that_was_killed_goes_on_and_ends_with_the_same_numbers():
    first = start()
    until(lambda: begun() == 2, first)
    assert len(training()) == 2
    first.kill()
    until(lambda: not training(), seconds=60)  # no orphan goes on beside the next sweep
    second = start()
    assert second.wait(400) == 0, Path("out.txt").read_text()
    assert starts() == {"ne_td3_continuous": 2, "td3_continuous": 2}
    assert_undisturbed("ne_td3_continuous")
    assert start().wait(200) == 0 and starts() == {"ne_td3_continuous": 2, "td3_continuous": 2}  # nothing is run again
    job = json.loads(next(Path("runs").glob("*__td3*/job.json")).read_text())
    assert job["command"].startswith("python baselines/td3_continuous.py --env-id Pendulum-v1 --seed 1 ")
    assert job["versions"]["torch"] == harness.torch.__version__ and job["machine"]


@pytest.mark.slow
def test_when_a_node_dies_its_run_goes_on_on_another_with_the_same_numbers():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        node = cluster.add_node(num_cpus=1)
        process = start("--address", cluster.address)
        until(lambda: begun() == 2, process)
        cluster.remove_node(node, allow_graceful=False)
        assert process.wait(400) == 0, Path("out.txt").read_text()
    finally:
        cluster.shutdown()
    assert sorted(starts().values()) == [1, 2]
    for script in starts():
        assert_undisturbed(script)


def test_a_run_that_fails_is_not_tried_again_while_one_whose_process_or_worker_is_killed_is():
    broken = Path("broken.py")
    broken.write_text("class Args:\n    env_id: str\n    seed: int\n\n\nraise ValueError('it is broken')\n")
    process = start("--cpus-per-run", "0.5", scripts=[broken.resolve(), "td3_continuous", "ne_td3_continuous"])
    until(lambda: begun() == 2, process)
    runs = {Path(run.cmdline()[1]).stem: run for run in training()}
    runs["td3_continuous"].kill()
    runs["ne_td3_continuous"].parent().kill()
    assert process.wait(300) == 1
    assert "ValueError: it is broken" in Path("out.txt").read_text()
    # an orphan would have finished alone
    assert starts() == {"broken": 1, "td3_continuous": 2, "ne_td3_continuous": 2}
    for script in ("td3_continuous", "ne_td3_continuous"):
        assert_undisturbed(script)


@pytest.mark.parametrize(
    ("number", "to_all", "sigint"),
    [
        (signal.SIGINT, False, signal.SIG_DFL),
        (signal.SIGTERM, False, signal.SIG_IGN),
        (signal.SIGTERM, True, signal.SIG_DFL),  # as systemd does, to Ray's processes and the runs too
    ],
)
def test_an_interrupted_sweep_has_its_runs_write_checkpoints(number, to_all, sigint):
    long = ["--total-timesteps", "1000000"]  # not finished before the signal, however fast the machine
    process = start(scripts=["td3_continuous"], more=["--checkpoint-interval", "0", *long], sigint=sigint)
    until(lambda: list(Path("runs").glob("*/runs/*/checkpoint.pt")), process)
    assert begun() == 0
    ray, run = psutil.Process(process.pid).children(recursive=True) if to_all else [], training()[0]
    worker = run.ppid()
    for told in [process, *(one for one in ray if one != run)]:
        told.send_signal(number)
    if to_all:
        until(lambda: run.ppid() != worker)  # the hard case: it heeds the end of its worker before it is told itself
        run.send_signal(number)
    assert process.wait(200) == 128 + number and "the same command goes on" in Path("out.txt").read_text()
    assert begun() == 1 and not training()


@pytest.mark.parametrize("content", ["", "{}", '{"total_timesteps": 900}'])
def test_a_run_that_was_killed_while_it_began_is_not_finished(content):
    Path("runs/x/models").mkdir(parents=True)
    Path("runs/x/args.json").write_text(content)
    Path("runs/x/models/0.pt").touch()
    assert not sweep.is_finished(".")
    Path("runs/x/models/900.pt").touch()
    assert sweep.is_finished(".") == ("900" in content)


# ===== Progress =====


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (" 12%|#1  | 2345/20000 [00:10<01:20, 221.50 steps/s, return=-3.5, density=0.25]", "2345 20000 01:20 -3.5"),
        ("100%|####| 20/20 [1:00:10<00:00,  3.10s/ steps]", "20 20 00:00 None"),
        ("  0%|    | 0/20 [00:00<?, ? steps/s]", "0 20 ? None"),
    ],
)
def test_progress_is_read_from_a_runs_bar(line, expected, tmp_path):
    (tmp_path / "log.txt").write_text(f"\n$ python script.py\nsome words\r  0%| | 0/9 [00:00<?, ? steps/s]\r{line}")
    found = sweep.progress(tmp_path)
    assert f"{found['step']} {found['total']} {found['left']} {found['ret']}" == expected
    with open(tmp_path / "log.txt", "a") as log:
        log.write("\n$ python script.py --resume runs/x\n")  # started again: not yet at work
    assert sweep.progress(tmp_path) == {}
