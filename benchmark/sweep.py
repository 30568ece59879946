"""Runs scripts on tasks and seeds, many at a time, through Ray: on this machine, or on a cluster with --address.

    python benchmark/sweep.py --scripts ne_td3_continuous.py baselines/td3_continuous.py \\
        --env-ids HalfCheetah-v4 Hopper-v4 --seeds 10 -- --total-timesteps 100000
    python benchmark/sweep.py --scripts ne_td3_continuous.py --env-ids Hopper-v4 --grid initial-density 0.1 0.25 0.5

What stands after -- goes to the scripts, an argument that only some of them have to those alone. A cycling script takes
all of --env-ids as its cycle. Each run has a folder of its own in --runs, with its log (log.txt), how it came about
(job.json) and what the script writes (runs/). A run whose process, worker or node dies is started again and goes on
from its checkpoint. Ctrl-C or SIGTERM: each run writes a checkpoint, then the sweep ends. The same command, given again
after an interruption, skips what is finished and goes on with the rest; with more seeds or tasks it runs what is new.
On a cluster, the repository and --runs must have the same path on all nodes, on a file system that they share.
"""

import argparse
import ast
import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import ray
from rich.console import Console
from rich.live import Live
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "dm_control")


class Died(Exception):
    """A run's process was killed; worth another try, unlike one that ended by itself."""


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


# ===== What is to be run =====


def arguments_of(script):
    """The arguments that a script takes, from its class Args -> {name: type}."""
    try:
        tree = ast.parse(script.read_text())
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        fail(f"--scripts {script}: cannot be read as a script ({error}); give the path of a Python file")
    fields = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    if not fields:
        fail(f"--scripts {script}: has no class Args; give one of the training scripts")
    return {item.target.id: ast.unparse(item.annotation) for item in fields[0] if isinstance(item, ast.AnnAssign)}


def parse_settings(words):
    """Words of a command line -> {argument: its words}: --gamma 0.9 gives {"gamma": ["--gamma", "0.9"]}."""
    settings = {}
    for word in words:
        if word.startswith("--"):
            flag, *value = word.split("=", 1)
            name = flag[2:].replace("-", "_")
            settings[name.removeprefix("no_")] = current = [flag, *value]
        elif settings:
            current.append(word)
        else:
            fail(f"{word}: arguments of the scripts, after --, start with --name")
    return settings


def grid_point(name, kind, value):
    """A value of a grid's axis as words of a command line -> list."""
    flag = name.replace("_", "-")
    if kind == "bool":
        if value not in ("True", "False"):
            fail(f"--grid {flag} {value}: is either True or False")
        return [f"--{flag}" if value == "True" else f"--no-{flag}"]
    return [f"--{flag}", value]


def all_jobs(args, words):
    """Every run of the sweep -> list of dicts: folder, script, words (of its command line), task, seed, settings."""
    shared, axes = parse_settings(words), {axis[0].replace("-", "_"): axis[1:] for axis in args.grid}
    takes = {Path(script).resolve(): arguments_of(Path(script)) for script in args.scripts}
    for name, where in [*((n, f"--{n}") for n in shared), *((n, f"--grid {n}") for n in axes)]:
        if name in ("env_id", "env_ids", "seed", "resume", "evaluate"):
            fail(f"{where.replace('_', '-')}: is set by the sweep; leave it out")
        if not any(name in known for known in takes.values()):
            fail(f"{where.replace('_', '-')}: none of the scripts has this argument")
        if name in shared and name in axes:
            fail(f"{where.replace('_', '-')}: stands after -- and in --grid; leave one out")
    jobs = {}
    for script, known in takes.items():
        tasks = [args.env_ids] if "env_ids" in known else [[env_id] for env_id in args.env_ids]
        own = {name: values for name, values in axes.items() if name in known}
        for point in itertools.product(*own.values()):
            varied = {name: grid_point(name, known[name], v) for name, v in zip(own, point, strict=True)}
            settings = {name: value for name, value in (shared | varied).items() if name in known}
            words = [word for name in sorted(settings) for word in settings[name]]
            for task, seed in itertools.product(tasks, range(1, args.seeds + 1)):
                flag = "--env-ids" if "env_ids" in known else "--env-id"
                label = "+".join(task).replace("/", "-").replace(":", "-")
                key = hashlib.sha256(json.dumps([task, words]).encode()).hexdigest()[:8]
                name = f"{label[:120]}__{script.stem}__{seed}__{key}"
                jobs[name] = {
                    "folder": str(Path(args.runs).resolve() / name),
                    "script": str(script),
                    "words": [flag, *task, "--seed", str(seed), *words],
                    "task": label,
                    "seed": seed,
                    "settings": " ".join(word for setting in varied.values() for word in setting),
                }
    return list(jobs.values())


# ===== One run, on a worker =====


def before_a_run():
    """Makes the process that becomes a run heed signals; on Linux it gets SIGHUP when its worker dies."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)  # what a shell or nohup had the sweep ignore
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGHUP)  # PR_SET_PDEATHSIG


def provenance(job):
    """How a run comes about: its command, versions, machine and commit -> dict."""
    git = ["git", "-c", f"safe.directory={ROOT}", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = commit and subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()).group(1)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "command": shlex.join(["python", os.path.relpath(job["script"], ROOT), *job["words"]]),
        "versions": versions,
        "machine": f"{model}, {os.cpu_count()} cores",
        "commit": commit + "+changes" * bool(changed),
    }


def until_free(lock, seconds=120):
    """Takes the lock of a run's folder, waiting for a process that holds it to end -> whether that was possible."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def is_finished(folder):
    """Whether a run in a job's folder has kept its last step's weights."""
    for path in Path(folder).glob("runs/*/args.json"):
        with contextlib.suppress(ValueError, KeyError):  # not whole: killed while it began
            args = json.loads(path.read_text())
            steps = args.get("total_timesteps") or len(args["env_ids"]) * args["cycles"] * args["task_steps"]
            if (path.parent / "models" / f"{steps}.pt").exists():
                return True
    return False


def run(job, gpus):
    """Starts a job's run, or goes on with it -> (exit code, what its log says); Died if its process was killed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ray cancels through it, even if it was ignored
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        if not until_free(lock):
            return 2, "another process is at this run; stop the other sweep first"
        if is_finished(folder):
            return 0, ""
        begun = sorted(folder.glob("runs/*/checkpoint.pt"), key=os.path.getmtime)
        words = ["--resume", str(begun[-1].parent.relative_to(folder))] if begun else job["words"]
        (folder / "job.tmp").write_text(json.dumps(provenance(job), indent=2) + "\n")
        os.replace(folder / "job.tmp", folder / "job.json")
        environment = os.environ | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
        command = [sys.executable, job["script"], *words]
        with open(folder / "log.txt", "a") as log:
            print(f"\n$ {shlex.join(command)}", file=log, flush=True)
            process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the sweep
                pass_fds=[lock.fileno()],  # the run is locked for as long as its process lives
                preexec_fn=before_a_run,
            )
            try:
                while (code := process.poll()) is None:  # a wait in the kernel would not notice being cancelled
                    time.sleep(0.2)
            except KeyboardInterrupt:  # cancelled: let it write a checkpoint
                process.send_signal(signal.SIGHUP)  # unlike a second SIGTERM it never ends a run at once
                process.wait()
                raise
        if code < 0:
            raise Died(f"{signal.Signals(-code).name}")
        lines = tail(folder)
        return code, next((line.strip("│ ") for line in lines[::-1] if re.search("error.*:", line, re.I)), lines[-1])


# ===== Progress =====


def tail(folder):
    """Last lines of a run's log, a progress bar's states counted as lines -> list of at least one."""
    try:
        with open(Path(folder) / "log.txt", "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 2000))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    except OSError:
        lines = []
    return [line.strip() for line in lines if line.strip()] or [""]


def progress(folder):
    """How far a run is, from its progress bar -> {step, total, left, rate, return}, empty if it has not begun."""
    pattern = (
        r"(?P<step>\d+)/(?P<total>\d+) \[[\d:]+<(?P<left>[\d:?]+),\s*"
        r"(?P<rate>[\d.?]+( steps/s|s/ steps))(.*return=(?P<ret>[-\d.]+))?"
    )
    for line in reversed(tail(folder)):
        if line.startswith("$"):
            return {}
        if found := re.search(pattern, line):
            return found.groupdict()
    return {}


def count(jobs, states):
    """How many runs there are in which state -> str."""
    finished, failed = (list(states.values()).count(state) for state in ("finished", "failed"))
    begun = sum(bool(progress(job["folder"])) for job in jobs if job["folder"] not in states)
    waiting = len(jobs) - finished - failed - begun
    return f"{len(jobs)} runs: {finished} finished, {begun} begun, {waiting} waiting, {failed} failed"


def live_table(jobs, states):
    """Runs that have begun and are not finished -> rich table."""
    table = Table(title=count(jobs, states), title_justify="left", box=None)
    for column in ("task", "script", "settings", "seed", "step", "of", "return", "speed", "left"):
        table.add_column(column, justify="left" if column in ("task", "script", "settings") else "right")
    for job in jobs:
        if job["folder"] not in states and (now := progress(job["folder"])):
            cells = [job["task"], Path(job["script"]).stem, job["settings"], str(job["seed"])]
            table.add_row(*cells, *(now[key] or "" for key in ("step", "total", "ret", "rate", "left")))
    return table


# ===== The sweep =====

stopping = []  # signals that came; an exception could be lost in Ray's callbacks


def stop(number, frame):
    """The first signal stops the sweep, a second one at once."""
    if stopping:
        os._exit(128 + number)
    stopping.append(number)


def start_ray(args):
    """Connects to the cluster, or makes one of this machine; from then on signals stop the sweep in order."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as fast as a run that is started by hand
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if sys.platform == "linux":  # where a run heeds the end of its worker by itself, with a checkpoint
        os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")
    if args.address not in (None, "auto"):  # Ray itself would try for a quarter of an hour
        host, _, port = args.address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        except (OSError, ValueError, OverflowError):
            fail(f"--address {args.address}: nothing answers there; give what `ray start` printed, or auto")
    try:
        ray.init(address=args.address or "local", log_to_driver=False, logging_level="error")
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        if args.address is None:
            fail(f"Ray does not start: {reason}")
        token = "" if "RAY_AUTH_MODE" in os.environ else ", or it asks for a token: then set RAY_AUTH_MODE=token"
        fail(f"--address {args.address}: no Ray cluster there ({reason}){token}")
    for name, needed in (("CPU", args.cpus_per_run), ("GPU", args.gpus_per_run)):
        largest = max(node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"])
        if needed > largest:
            fail(f"--{name.lower()}s-per-run {needed:g}: no machine has more than {largest:g}")
    for number in (signal.SIGINT, signal.SIGTERM):  # now: Ray has set a handler of its own
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:  # as in a script's background
            signal.signal(number, stop)


def sweep(jobs, args):
    """Runs the jobs -> ({folder: state}, {folder: why its run failed}); ends the process after a signal."""
    states = {job["folder"]: "finished" for job in jobs if is_finished(job["folder"])}
    left = [job for job in jobs if job["folder"] not in states]
    console, failures = Console(), {}
    if not left:
        return states, failures
    start_ray(args)
    resources = {"num_cpus": args.cpus_per_run, "num_gpus": args.gpus_per_run}
    remote = ray.remote(**resources, max_retries=args.retries, retry_exceptions=[Died])(run)
    refs = {remote.remote(job, args.gpus_per_run): job for job in left}
    shown = time.monotonic()
    live = Live(live_table(jobs, states), console=console, refresh_per_second=1, transient=True)
    with live if console.is_terminal else contextlib.nullcontext():
        while refs and not stopping:
            done, _ = ray.wait(list(refs), timeout=1)
            for ref in done:
                job = refs.pop(ref)
                try:
                    code, line = ray.get(ref)
                except ray.exceptions.RayError as error:  # it died more often than it may be started again
                    code, line = 1, f"its process died again and again ({type(error).__name__})"
                states[job["folder"]] = "failed" if code else "finished"
                if code:
                    failures[job["folder"]] = line
                if not console.is_terminal:
                    said = f"{states[job['folder']]}: {Path(job['folder']).name}"
                    print(f"{said} {line}" if code else said, flush=True)
            if console.is_terminal:
                live.update(live_table(jobs, states))
            elif time.monotonic() - shown > 60:
                shown = time.monotonic()
                print(count(jobs, states), flush=True)
    if stopping:
        print("stopping: each run writes a checkpoint at the end of its episode", file=sys.stderr, flush=True)
        for ref in refs:
            ray.cancel(ref)
        for job in refs.values():
            with contextlib.suppress(FileNotFoundError), open(Path(job["folder"]) / "lock") as lock:
                until_free(lock)
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(128 + stopping[0])
    return states, failures


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    parser.add_argument("--scripts", nargs="+", required=True, metavar="FILE", help="training scripts")
    parser.add_argument("--env-ids", nargs="+", required=True, metavar="TASK", help="tasks, as in --env-id")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 1 ... N (default: 1)")
    parser.add_argument("--runs", default="runs", help="folder of the runs (default: runs)")
    axis = "another axis: an argument of the scripts and its values; may be given several times"
    parser.add_argument("--grid", nargs="+", action="append", default=[], metavar=("NAME", "VALUE"), help=axis)
    parser.add_argument("--address", help="address of a Ray cluster (default: this machine alone)")
    parser.add_argument("--cpus-per-run", type=float, default=1, help="cores that a run takes (default: 1)")
    gpus = "GPUs that a run takes, may be a fraction (default: 0, runs on the CPU)"
    parser.add_argument("--gpus-per-run", type=float, default=0, help=gpus)
    retries = "how often a run that died may be started again within one sweep (default: 3)"
    parser.add_argument("--retries", type=int, default=3, help=retries)
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    args, unknown = parser.parse_known_args(words[:cut])
    if unknown:
        fail(f"{shlex.join(unknown)}: not the sweep's; arguments of the scripts stand at the end, after --")
    for name, low in (("seeds", 1), ("retries", 0), ("cpus_per_run", 0), ("gpus_per_run", 0)):
        if not getattr(args, name) >= low:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least {low}")
    for axis in args.grid:
        if len(axis) < 2:
            fail(f"--grid {axis[0]}: needs values, as in --grid initial-density 0.1 0.25 0.5")
    jobs = all_jobs(args, words[cut + 1 :])

    states, failures = sweep(jobs, args)
    print(count(jobs, states))
    for folder, line in failures.items():
        print(f"failed: {folder}/log.txt: {line}")
    if "finished" in states.values():
        print(f"next: python benchmark/report.py {args.runs}")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
