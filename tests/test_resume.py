"""Interrupting and resuming a run: nothing is lost, nothing is logged twice, and what cannot be resumed is refused."""

import contextlib
import gc
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import harness
import pytest
import torch
import toys
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# So that whatever a checkpoint holds matters to what comes after it: checkpoints at steps 300, 600 and 900, in gradient
# steps 180, 480 and 780, stand in the midst of counting reviews, the first before the actor's loss is logged.
SETTINGS = {
    "env_id": "toys:ToyRecordedPendulum-v0",  # episodes of 100 steps
    "total_timesteps": 1000,
    "learning_starts": 120,
    "learning_rate": 1e-2,
    "hidden_dim": 24,
    "policy_frequency": 70,
    "growth_interval": 70,
    "omega": 0.3,
    "reset_interval": 350,
    "redo_interval": 70,
    "redo_tau": 0.6,
    "rigl_interval": 70,
    "neuron_interval": 40,
    "review_floor": 0.1,
    "checkpoint_interval": 300,
    "eval_interval": 250,
    "eval_episodes": 1,
}
SAVED = [0, 300, 600, 900, 1000]
with_all = pytest.mark.parametrize("script", harness.SCRIPTS)
# What a signal or a kill meets is the same in all scripts (test_drift.py), so one of them will do each time.
ONE = "ne_td3_continuous"
with_one = pytest.mark.parametrize(
    "script", [ONE, *(pytest.param(s, marks=pytest.mark.slow) for s in harness.SCRIPTS if s != ONE)]
)


# ===== Processes =====


def start(script, *words, code=None):
    """Starts a script in the current folder -> process; its output goes to out.txt and err.txt."""
    command = harness.command(script, *words)
    if code:
        command[1:2] = ["-c", code, command[1]]
    environment = os.environ | toys.ENVIRONMENT
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


class Fork:
    """A script as a user runs it, in a fork of this process, which has everything imported: that saves seconds.

    Its output goes to out.txt and err.txt; `before` is called in it first. As subprocess.Popen.
    """

    def __init__(self, script, *words, before=lambda: None):
        gc.collect()  # no lock of an earlier run of this process goes into the new one
        self.returncode, self.pid = None, os.fork()
        if self.pid == 0:
            code = 1
            try:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                for number, name in ((1, "out.txt"), (2, "err.txt")):
                    os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)
                tqdm.set_lock(threading.RLock())  # its own, which it may die with
                sys.argv = harness.command(script, *words)[1:]
                before()
                runpy.run_path(sys.argv[0], run_name="__main__")
                code = 0
            except SystemExit as exit:
                code = exit.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):
                    sys.stdout.flush()
                os._exit(code)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=120):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(Path("err.txt").read_text())
            time.sleep(0.005)
        return self.returncode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def wait_for(process, pattern):
    """Waits until a file that matches `pattern` is there, while the process runs -> its path."""
    while process.poll() is None:
        if found := sorted(Path().glob(pattern)):
            return found[0]
        time.sleep(0.002)
    raise AssertionError(f"the run ended before {pattern} was there: {Path('err.txt').read_text()}")


def kill(process):
    """Kills a run as `kill -9` does."""
    process.kill()
    assert process.wait() == -signal.SIGKILL, "the run had ended before it was killed"


def at_step(number, action):
    """Makes the toy Pendulum call `action` in the `number`th step from now on, in whatever task."""
    taken, step = 0, toys.RecordedPendulum.step

    def counted(self, *arguments):
        nonlocal taken
        taken += 1
        if taken == number:
            action()
        return step(self, *arguments)

    toys.RecordedPendulum.step = counted


def send(*numbers):
    """Sends the signals to this process, one by one."""
    for number in numbers:
        os.kill(os.getpid(), number)
        time.sleep(0.001)  # Python notices it here


def killed(script, *words, before):
    """Runs a script in a fork that kills itself."""
    process = Fork(script, *words, before=before)
    assert process.wait() == -signal.SIGKILL, Path("err.txt").read_text()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


# ===== Runs =====


def the_folder():
    """The only run folder."""
    (folder,) = Path("runs").iterdir()
    return folder


def age(folder):
    """Gives the logs names of long ago: TensorBoard reads them in the order of names that begin with the second."""
    for number, path in enumerate(sorted(folder.glob("events*"))):
        path.rename(folder / f"events.out.tfevents.{number:010}.a.1.0")
    return folder


def resume(script, folder):
    """Resumes a run as a user would -> its folder."""
    result = harness.run(script, "--resume", folder, env=toys.ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"finished: {folder}"
    return folder


def resume_here(script, folder):
    """Resumes a run in this process -> its folder."""
    module = harness.SCRIPTS[script]
    assert module.main(module.Args(resume=str(age(folder)))) == folder
    return folder


class LateWriter(SummaryWriter):
    """Writes when it must, no sooner, as a slow disk may."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.waiting = []

    def add_scalar(self, *scalar):
        self.waiting.append(scalar)

    def flush(self):
        while self.waiting:
            super().add_scalar(*self.waiting.pop(0))
        super().flush()

    def close(self):
        self.flush()
        super().close()


_whole = {}


def uninterrupted(script, tmp_path_factory, **changes):
    """A run with these settings that was left alone, made once -> its folder.

    Beside it, as killed-<step>, is what a kill just after the checkpoint of that step would have left.
    """
    key = script, *sorted(changes.items())
    if key not in _whole:
        place, replace = tmp_path_factory.mktemp("uninterrupted"), os.replace

        def replaced(source, target):
            replace(source, target)
            step = harness.saved(target)["step"]
            shutil.copytree(Path(target).parent, f"killed-{step}", dirs_exist_ok=True)

        with contextlib.chdir(place), pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replaced)
            patch.setattr(harness.SCRIPTS[script], "SummaryWriter", LateWriter)
            folder = harness.SCRIPTS[script].main(harness.short_args(script, **SETTINGS | changes))
        _whole[key] = place / folder
    return _whole[key]


def killed_after(script, step, tmp_path_factory, **changes):
    """A run that was killed just after the checkpoint of this step -> the name of its folder, a copy, here."""
    source = uninterrupted(script, tmp_path_factory, **changes).parent.parent / f"killed-{step}"
    return Path(shutil.copytree(source, "copy"))


def logged(folder):
    """Everything in a run's log that does not depend on the clock, in the order of steps."""
    scalars = harness.events(folder)
    scalars["steps of charts/SPS"] = [(step, 0) for step, _ in scalars.pop("charts/SPS", [])]
    return scalars


def assert_same_run(folder, expected):
    """Two runs ended with the same networks, to the bit, kept the same ones on their way, and logged the same."""
    kept = {path.name for path in (expected / "models").iterdir()}
    assert kept <= {path.name for path in (folder / "models").iterdir()}
    for name in kept:
        a, b = harness.saved(folder / "models" / name), harness.saved(expected / "models" / name)
        assert a.keys() == b.keys() and [net for net in b if not harness.same(a[net], b[net])] == [], name
    a, b = harness.saved(folder / "checkpoint.pt"), harness.saved(expected / "checkpoint.pt")
    assert [key for key in b if not harness.same(a[key], b[key])] == []
    a, b = logged(folder), logged(expected)
    assert a.keys() == b.keys()
    assert {tag: (a[tag], b[tag]) for tag in b if a[tag] != b[tag]} == {}


def contents(folder):
    """All files under a folder, but locks -> {path: bytes}."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".lock")
    return {path: path.read_bytes() for path in paths if path.name != "lock"}


def names(folder):
    """The files and folders in a run's folder -> set."""
    return {re.sub("events.*", "events", path.name) for path in folder.iterdir()}


# ===== A run that goes on is the run that was left alone =====


@with_all
def test_the_same_seed_gives_the_same_run_to_the_bit(script, tmp_path_factory):
    torch.rand(7)  # what was drawn before does not matter
    folder = harness.SCRIPTS[script].main(harness.short_args(script, **SETTINGS))
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


@with_all
def test_what_is_kept_of_a_run(script, tmp_path_factory):
    folder = uninterrupted(script, tmp_path_factory)
    assert names(folder) == {"args.json", "events", "checkpoint.pt", "models", "lock"}
    assert sorted(int(path.stem) for path in (folder / "models").iterdir()) == SAVED
    checkpoint = harness.saved(folder / "checkpoint.pt")
    assert checkpoint["step"] == 1000 and len(checkpoint["rows"]) == 0  # a finished run needs no replay any more
    assert harness.same(harness.weights(folder), {net: state_of(checkpoint, net) for net in harness.weights(folder)})
    for step in SAVED[1:-1]:
        killed_then = folder.parent.parent / f"killed-{step}"
        assert len(harness.saved(killed_then / "checkpoint.pt")["rows"]) == step
        assert (killed_then / f"models/{step}.pt").read_bytes() == (folder / f"models/{step}.pt").read_bytes()
        assert list(logged(killed_then)["charts/episodic_return"])[-1][0] == step  # no log before the checkpoint lacks
    assert len(logged(folder)["charts/episodic_return"]) == 10 and len(logged(folder)["eval/episodic_return"]) == 4


def state_of(checkpoint, net):
    """A network's state dict in a checkpoint."""
    return {k.removeprefix(f"{net}."): v for k, v in checkpoint["networks"].items() if k.startswith(f"{net}.")}


@pytest.mark.parametrize("step", [0, 300, 900])
@with_all
def test_a_run_goes_on_from_its_checkpoint_as_if_nothing_had_happened(script, step, tmp_path_factory):
    folder = killed_after(script, step, tmp_path_factory)
    if step == 300:  # what had been logged since then, the last record half, is void
        log = max(uninterrupted(script, tmp_path_factory).glob("events*"))
        (old,) = folder.glob("events*")
        old.write_bytes(log.read_bytes()[:-100])
        (folder / "checkpoint.tmp").write_bytes(b"half of a checkpoint")
        (folder / "models/600.pt").write_bytes(b"half of the weights")
    torch.rand(7)
    assert_same_run(resume_here(script, folder), uninterrupted(script, tmp_path_factory))
    assert names(folder) == {"args.json", "events", "checkpoint.pt", "models", "lock"}


def test_the_checkpoints_that_are_resumed_are_in_the_midst_of_everything(tmp_path_factory):
    folder = uninterrupted(ONE, tmp_path_factory)
    early, late = (harness.saved(folder.parent.parent / f"killed-{step}/checkpoint.pt") for step in (300, 900))
    assert sum(int(value) for key, value in early["networks"].items() if key.endswith(".pruned")) > 0
    actor_losses = dict(logged(folder)["losses/actor_loss"])
    assert actor_losses[320] == pytest.approx(float(early["actor_loss"]))  # of gradient step 140, logged at 200
    assert late["gate"]["reviewed"] > 0 and late["gate"]["threshold"] < 1


@with_all
def test_a_run_with_a_replay_ratio_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    settings = {"replay_ratio": 2, "total_timesteps": 450, "checkpoint_interval": 200, "policy_frequency": 35}
    settings["rigl_interval"] = 70
    folder = killed_after(script, 200, tmp_path_factory, **settings)
    assert_same_run(resume_here(script, folder), uninterrupted(script, tmp_path_factory, **settings))


@pytest.mark.slow
@with_all
def test_a_run_whose_buffer_has_wrapped_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    for step in (300, 600):
        folder = killed_after(script, step, tmp_path_factory, buffer_size=350)
        assert_same_run(resume_here(script, folder), uninterrupted(script, tmp_path_factory, buffer_size=350))
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dm_control/cartpole-swingup-v0", "Hopper-v4"])
@with_all
def test_a_simulated_robot_resumes_as_if_nothing_had_happened(script, task, tmp_path_factory):
    settings = {"env_id": task, "total_timesteps": 2400, "checkpoint_interval": 1000}
    words = harness.flags(harness.short_args(script, **SETTINGS | settings))
    process = start(script, *words)
    wait_for(process, "runs/*/models/1*.pt")
    time.sleep(0.2)
    kill(process)
    assert_same_run(resume(script, the_folder()), uninterrupted(script, tmp_path_factory, **settings))


@with_all
def test_a_finished_run_that_is_resumed_stays_as_it_is(script, tmp_path_factory, capsys):
    folder = killed_after(script, 1000, tmp_path_factory)
    capsys.readouterr()
    assert_same_run(resume_here(script, folder), uninterrupted(script, tmp_path_factory))
    assert capsys.readouterr().out == f"finished: {folder}\n"


# ===== Kills =====


def killed_at_save(number, when):
    """Ends the process, as `kill -9` would, at the `number`th time that a run is saved: in the midst of a file, ..."""

    def before():
        save, replace, saves = torch.save, os.replace, 0

        def half(new, path):
            nonlocal saves
            saves += "models" in str(path)
            save(new, path)
            if saves == number and when in str(path):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        def replaced(source, target):
            if saves == number and when == "before it is in place":
                die()
            replace(source, target)
            if saves == number and when == "in place":
                die()

        torch.save, os.replace = half, replaced

    return before


WHEN = ["models", "checkpoint", "before it is in place", "in place"]
EACH = [(number, when) for number in range(2, 6) for when in WHEN]
FAST = [(2, "models"), (2, "checkpoint"), (3, "before it is in place"), (4, "in place"), (5, "models")]


@pytest.mark.parametrize(
    "number, when", [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in EACH]
)
@with_one
def test_a_run_killed_while_it_is_saved_goes_on_as_if_nothing_had_happened(script, number, when, tmp_path_factory):
    words = harness.flags(harness.short_args(script, **SETTINGS))
    killed(script, *words, before=killed_at_save(number, when))
    folder, step = the_folder(), SAVED[number - 1 - (when != "in place")]
    assert harness.saved(folder / "checkpoint.pt")["step"] == step
    assert harness.saved(folder / f"models/{step}.pt")["actor"]
    assert_same_run(resume_here(script, folder), uninterrupted(script, tmp_path_factory))


@pytest.mark.parametrize("step", [1, pytest.param(121, marks=pytest.mark.slow), 777])
@with_one
def test_a_run_killed_at_any_step_goes_on_as_if_nothing_had_happened(script, step, tmp_path_factory):
    words = harness.flags(harness.short_args(script, **SETTINGS))
    killed(script, *words, before=lambda: at_step(step, die))
    assert_same_run(resume_here(script, the_folder()), uninterrupted(script, tmp_path_factory))


@pytest.mark.slow
@with_all
def test_a_run_killed_again_and_again_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    words = harness.flags(harness.short_args(script, **SETTINGS))
    for step in (250, 310, 290, 120, 404):  # steps after the last checkpoint, evaluation included
        killed(script, *words, before=lambda step=step: at_step(step, die))
        words = ["--resume", age(the_folder())]
    assert_same_run(resume_here(script, the_folder()), uninterrupted(script, tmp_path_factory))


def test_a_run_killed_before_its_first_checkpoint_was_whole_is_refused(capsys):
    words = harness.flags(harness.short_args(ONE, **SETTINGS))
    killed(ONE, *words, before=killed_at_save(1, "checkpoint"))
    before = contents(".")
    assert "checkpoint.pt" in refusal(ONE, capsys, resume=str(the_folder()))
    assert contents(".") == before


@pytest.mark.parametrize("before_it", ["fresh", "resumed"])
@with_one
def test_a_second_process_beside_a_running_one_is_refused_and_hurts_neither(
    script, before_it, tmp_path_factory, capsys
):
    def hold():
        Path("running").touch()
        while not Path("go").exists():
            time.sleep(0.002)

    words = harness.flags(harness.short_args(script, **SETTINGS))
    if before_it == "resumed":
        killed(script, *words, before=lambda: at_step(450, die))
        words = ["--resume", age(the_folder())]
    process = Fork(script, *words, before=lambda: at_step(150, hold))
    wait_for(process, "running")
    before = contents(".")
    line = refusal(script, capsys, resume=str(the_folder()))
    assert f"--resume {the_folder()}" in line and "by another process" in line
    module = harness.SCRIPTS[script]
    module.main(module.Args(evaluate=str(the_folder()), eval_episodes=1))  # to look on is allowed
    assert contents(".") == before
    Path("go").touch()
    assert process.wait() == 0, Path("err.txt").read_text()
    assert_same_run(the_folder(), uninterrupted(script, tmp_path_factory))


# ===== Signals =====


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT,),
        (signal.SIGTERM,),
        (signal.SIGHUP, signal.SIGHUP),  # a terminal that closes sends it twice
        (signal.SIGHUP, signal.SIGTERM),  # a sweep whose processes are all told to stop: first its worker dies
    ],
    ids=["SIGINT", "SIGTERM", "SIGHUP twice", "SIGHUP and SIGTERM"],
)
@with_one
def test_a_signal_ends_the_run_after_its_episode_and_says_how_to_go_on(script, numbers, tmp_path_factory):
    words = harness.flags(harness.short_args(script, **SETTINGS))
    process = Fork(script, *words, before=lambda: at_step(650, lambda: send(*numbers)))  # 200 steps are of evaluations
    assert process.wait() == 128 + numbers[0], Path("err.txt").read_text()
    folder, out = the_folder(), Path("out.txt").read_text()
    assert "Traceback" not in Path("err.txt").read_text()
    checkpoint = harness.saved(folder / "checkpoint.pt")
    assert checkpoint["step"] == 500 == len(checkpoint["rows"]) and (folder / "models/500.pt").exists()
    assert logged(folder)["charts/episodic_return"][-1][0] == 500  # the end of an episode

    python, *words = shlex.split(re.search("go on with: (.*)\n", out).group(1))
    assert python == "python" and Path(words[0]).resolve() == harness.PATHS[script]
    assert words[1:] == ["--resume", str(folder)]
    age(folder)
    if numbers == (signal.SIGINT,):  # as a user would
        result = subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, env=os.environ | toys.ENVIRONMENT
        )
        assert result.returncode == 0, result.stderr
    else:
        resume_here(script, folder)
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


@pytest.mark.parametrize("numbers", [(signal.SIGINT, signal.SIGINT), (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)])
@with_one
def test_a_second_signal_ends_the_run_at_once(script, numbers, tmp_path_factory):
    def second():
        send(*numbers[:-1])
        at_step(20, lambda: (Path("twenty").touch(), send(numbers[-1])))

    words = harness.flags(harness.short_args(script, **SETTINGS | {"eval_interval": 0}))
    process = Fork(script, *words, before=lambda: at_step(430, second))
    assert process.wait() == 128 + numbers[-1] and Path("twenty").exists()
    assert "Traceback" not in Path("err.txt").read_text() and Path("out.txt").read_text() == ""
    assert harness.saved(the_folder() / "checkpoint.pt")["step"] == 300


@with_one
def test_a_run_under_nohup_does_not_end_with_its_terminal(script, tmp_path_factory):
    def before():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
        at_step(150, lambda: send(signal.SIGHUP))

    words = harness.flags(harness.short_args(script, **SETTINGS | {"total_timesteps": 400}))
    process = Fork(script, *words, before=before)
    assert process.wait() == 0, Path("err.txt").read_text()
    assert Path("out.txt").read_text() == f"finished: {the_folder()}\n"


@with_one
def test_a_screen_that_is_gone_does_not_end_the_run_before_it_is_saved(script, tmp_path_factory):
    def before():
        reading, writing = os.pipe()
        for number in (1, 2):
            os.dup2(writing, number)
        os.close(writing)
        # drawn at each step, not each second
        sys.modules["tqdm"].tqdm = lambda **options: tqdm(**options | {"mininterval": 0})
        at_step(50, lambda: os.close(reading))

    words = harness.flags(harness.short_args(script, **SETTINGS))
    Fork(script, *words, before=before).wait()
    assert_same_run(the_folder(), uninterrupted(script, tmp_path_factory))


# ===== What cannot be resumed =====


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


def truncate(path, size=None):
    os.truncate(path, path.stat().st_size // 2 if size is None else size)


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


REFUSED = {
    "a truncated checkpoint": lambda folder: truncate(folder / "checkpoint.pt"),
    "an empty checkpoint": lambda folder: truncate(folder / "checkpoint.pt", 0),
    "no checkpoint": lambda folder: (folder / "checkpoint.pt").unlink(),
    "text as checkpoint": lambda folder: (folder / "checkpoint.pt").write_text("hello"),
    "a pickle that runs code": lambda folder: (folder / "checkpoint.pt").write_bytes(pickle.dumps(Evil())),
    "a torch file that runs code": lambda folder: torch.save({"actor": Evil()}, folder / "checkpoint.pt"),
    "a torch file of something else": lambda folder: torch.save({"a": torch.ones(1)}, folder / "checkpoint.pt"),
    "a list as checkpoint": lambda folder: torch.save([1, 2], folder / "checkpoint.pt"),
    "another size of networks": lambda folder: edit(folder / "args.json", '"hidden_dim": 24', '"hidden_dim": 17'),
    "another learning rate": lambda folder: edit(folder / "args.json", "0.01", "0.02"),
    "another task": lambda folder: edit(folder / "args.json", "toys:ToyRecordedPendulum-v0", "Pendulum-v1"),
    "no args.json": lambda folder: (folder / "args.json").unlink(),
    "a broken args.json": lambda folder: truncate(folder / "args.json"),
    "an args.json of something else": lambda folder: (folder / "args.json").write_text('{"a": 1}'),
    "a list as args.json": lambda folder: (folder / "args.json").write_text("[1, 2]"),
    "no folder": lambda folder: shutil.rmtree(folder),
    "a file as folder": lambda folder: (shutil.rmtree(folder), folder.write_text("hello")),
}


def exit_code(function, *arguments):
    """Calls what ends the process -> exit code; nothing holds on to what the call has left, such as a lock."""
    try:
        function(*arguments)
    except SystemExit as exit:
        return exit.code
    raise AssertionError("it went on")


def refusal(script, capsys, **values):
    """Calls main with arguments that it must refuse -> the one line on stderr."""
    module = harness.SCRIPTS[script]
    capsys.readouterr()
    code = exit_code(module.main, module.Args(**values))
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return err


@pytest.fixture(scope="module", params=harness.SCRIPTS)
def interrupted(request, tmp_path_factory):
    """A run that was killed after its checkpoint -> (name of the script, folder that must not be changed)."""
    return request.param, uninterrupted(request.param, tmp_path_factory).parent.parent / "killed-600"


@pytest.mark.parametrize("damage", REFUSED)
def test_what_cannot_be_resumed_is_refused_in_one_line_and_left_as_it_is(damage, interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    REFUSED[damage](folder)
    before = contents(".")
    for name in ("resume", "evaluate"):
        assert f"--{name} copy" in refusal(script, capsys, **{name: str(folder)})
        assert contents(".") == before and not Path("executed").exists()


def test_a_run_of_another_script_is_refused(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    before = contents(folder)
    for other in harness.SCRIPTS:
        if other != script:
            assert "--resume copy" in refusal(other, capsys, resume=str(folder))
            assert "--evaluate copy" in refusal(other, capsys, evaluate=str(folder))
    assert contents(folder) == before


def test_a_checkpoint_of_another_script_is_refused(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    checkpoint = harness.saved(folder / "checkpoint.pt")
    assert checkpoint["run"].startswith(script)
    torch.save(checkpoint | {"run": "other" + checkpoint["run"].removeprefix(script)}, folder / "checkpoint.pt")
    before = contents(folder)
    assert "another script" in refusal(script, capsys, resume=str(folder))
    assert contents(folder) == before


def test_a_checkpoint_with_a_weight_that_is_not_finite_is_one_line_and_stays(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy")).resolve()  # its log is closed after the test
    checkpoint = harness.saved(folder / "checkpoint.pt")
    checkpoint["networks"]["qf2.fc2.weight"][3, 4] = torch.nan
    torch.save(checkpoint, folder / "checkpoint.pt")
    before, module = (folder / "checkpoint.pt").read_bytes(), harness.SCRIPTS[script]
    assert exit_code(module.main, module.Args(resume=str(folder))) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"error: step {checkpoint['step']}: a weight is not finite; .*", line)
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_resume_takes_no_other_argument(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    before = contents(".")
    for other in ({"seed": 2}, {"cuda": False}, {"total_timesteps": 2_000_000}, {"evaluate": str(folder)}):
        assert "takes no other argument" in refusal(script, capsys, resume=str(folder), **other), other
    for other in ({"seed": 2}, {"cuda": False}, {"eval_interval": 5}, {"track": True}):
        assert "takes no other argument" in refusal(script, capsys, evaluate=str(folder), **other), other
    assert contents(".") == before


def test_a_refused_resume_is_one_line_on_the_screen(tmp_path_factory):
    folder = killed_after(ONE, 300, tmp_path_factory)
    REFUSED["a truncated checkpoint"](folder)
    assert Fork(ONE, "--resume", folder).wait() == 2 and Path("out.txt").read_text() == ""
    assert re.fullmatch("error: --resume copy.*\n", Path("err.txt").read_text())


# ===== When and where =====


@with_all
def test_a_checkpoint_interval_of_zero_saves_at_the_start_and_at_the_end_alone(script, monkeypatch):
    saves, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (saves.append(paths), replace(*paths)))
    folder = harness.SCRIPTS[script].main(harness.short_args(script, total_timesteps=500, checkpoint_interval=0))
    assert {path.name for path in (folder / "models").iterdir()} == {"0.pt", "500.pt"} and len(saves) == 2


@with_all
def test_a_checkpoint_is_written_at_the_first_episode_end_after_each_interval(script):
    args = harness.short_args(script, total_timesteps=1500, learning_starts=1400, checkpoint_interval=350)
    folder = harness.SCRIPTS[script].main(args)
    steps = sorted(int(path.stem) for path in (folder / "models").iterdir())
    assert steps == [0, 400, 800, 1200, 1400, 1500]  # intervals end at 350, 700, 1050, 1400, episodes every 200 steps


@with_all
def test_two_runs_that_start_in_the_same_second_get_two_folders(script, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time_ns", lambda: 1_700_000_000_000_000_000 + next(ticks) * 1_000_000)
    args = harness.short_args(script, total_timesteps=351)
    folders = [harness.SCRIPTS[script].main(args) for _ in range(2)]
    assert len(set(folders)) == 2 and set(folders) == set(Path("runs").iterdir())
    assert all((folder / "models/351.pt").exists() for folder in folders)
