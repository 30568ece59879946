"""Interrupting and resuming a run: nothing is lost, nothing is logged twice, and what cannot be resumed is refused."""

import contextlib
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import harness
import pytest
import torch
import toys

LAST = [list(harness.SCRIPTS)[-1]]
SETTINGS = {
    "total_timesteps": 2400,
    "learning_starts": 200,
    "hidden_dim": 16,
    "growth_interval": 100,
    "checkpoint_interval": 400,
    "eval_interval": 500,
    "eval_episodes": 1,
}


def start(script, *words, code=None):
    """Starts a script in the current folder -> process; its output goes to out.txt and err.txt."""
    command = harness.command(script, *words)
    if code:
        command[1:2] = ["-c", code, command[1]]
    environment = os.environ | toys.ENVIRONMENT
    with open("out.txt", "w") as out, open("err.txt", "w") as err:
        return subprocess.Popen(command, stdout=out, stderr=err, env=environment)


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


def the_folder():
    """The only run folder."""
    (folder,) = Path("runs").iterdir()
    return folder


def resume(script, folder):
    """Resumes a run as a user would -> its folder."""
    result = harness.run(script, "--resume", folder, env=toys.ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == f"finished: {folder}"
    return folder


_uninterrupted = {}


def uninterrupted(script, tmp_path_factory, **changes):
    """The folder of a run with these settings that was left alone; made once."""
    key = script, *sorted(changes.items())
    if key not in _uninterrupted:
        place = tmp_path_factory.mktemp("uninterrupted")
        with contextlib.chdir(place):
            folder = harness.SCRIPTS[script].main(harness.short_args(script, **SETTINGS | changes))
        _uninterrupted[key] = place / folder
    return _uninterrupted[key]


def logged(folder):
    """Everything in a run's log that does not depend on the clock, in the order of steps."""
    scalars = harness.events(folder)
    speeds = scalars.pop("charts/SPS", [])
    scalars["steps of charts/SPS"] = [(step, 0) for step, _ in speeds]
    return {tag: sorted(values) for tag, values in scalars.items()}


def assert_same_run(folder, expected):
    """Two runs ended with the same networks, to the bit, and the same log."""
    a, b = harness.saved(folder / "model.pt"), harness.saved(expected / "model.pt")
    assert [key for key in b if not harness.same(a.get(key), b[key])] == []
    assert a.keys() == b.keys()
    a, b = logged(folder), logged(expected)
    assert a.keys() == b.keys()
    assert {tag: (a[tag], b[tag]) for tag in b if a[tag] != b[tag]} == {}


def contents(folder):
    """All files under a folder -> {path: bytes}."""
    return {path: path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_the_same_seed_gives_the_same_run_to_the_bit(script, tmp_path_factory):
    args = harness.short_args(script, **SETTINGS)
    harness.SCRIPTS[script].torch.rand(7)  # what was drawn before does not matter
    folder = harness.SCRIPTS[script].main(args)
    expected = uninterrupted(script, tmp_path_factory)
    assert_same_run(folder, expected)
    assert len(logged(folder)["charts/episodic_return"]) == 12


def kill_at(script, args, points):
    """Runs with a kill at each of the points -> folder. A point: (file to wait for, seconds to wait then)."""
    words = harness.flags(args)
    for pattern, delay in points:
        process = start(script, *words)
        wait_for(process, pattern)
        time.sleep(delay)
        kill(process)
        words = ["--resume", the_folder()]
    return resume(script, the_folder())


@pytest.mark.parametrize("script", LAST)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    folder = kill_at(script, harness.short_args(script, **SETTINGS), [("runs/*/buffer-[89]*.bin", 0.1)])
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["events*", "buffer-400.bin", "buffer-1200.bin", "buffer-2000.bin"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_run_killed_anywhere_goes_on_as_if_nothing_had_happened(script, pattern, tmp_path_factory):
    delay = random.Random(pattern).uniform(0, 0.2)
    folder = kill_at(script, harness.short_args(script, **SETTINGS), [(f"runs/*/{pattern}", delay)])
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_run_killed_again_and_again_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    patterns = ["events*", "buffer-400.bin", "buffer-800.bin", "buffer-1600.bin", "buffer-2000.bin"]
    points = [(f"runs/*/{pattern}", random.Random(pattern).uniform(0, 0.1)) for pattern in patterns]
    folder = kill_at(script, harness.short_args(script, **SETTINGS), points)
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


@pytest.mark.slow
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_killed_run_whose_buffer_has_wrapped_goes_on_as_if_nothing_had_happened(script, tmp_path_factory):
    args = harness.short_args(script, **SETTINGS, buffer_size=700)
    folder = kill_at(script, args, [("runs/*/buffer-1600.bin", 0.1)])
    assert_same_run(folder, uninterrupted(script, tmp_path_factory, buffer_size=700))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dm_control/cartpole-swingup-v0", "Hopper-v4"])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_simulated_robot_resumes_as_if_nothing_had_happened(script, task, tmp_path_factory):
    settings = {"env_id": task, "checkpoint_interval": 1000}
    args = harness.short_args(script, **SETTINGS | settings)
    folder = kill_at(script, args, [("runs/*/buffer-*.bin", 0.2)])
    assert_same_run(folder, uninterrupted(script, tmp_path_factory, **settings))


# Ends the process, as `kill -9` would, just before its {number}th change of the files that match {files}
KILLED_AT_A_FILE = """
import os, runpy, signal, sys
count, sys.argv = 0, sys.argv[1:]
def hook(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.truncate", "shutil.rmtree"):
        paths = " ".join(str(argument) for argument in arguments)
        if "runs" + os.sep in paths and {files!r} in paths:
            count += 1
            if count == {number}:
                os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", LAST)
def test_a_run_killed_just_before_its_model_is_saved_can_be_resumed(script, tmp_path_factory):
    settings = {"total_timesteps": 1000}
    code = KILLED_AT_A_FILE.format(files="model.pt", number=1)
    process = start(script, *harness.flags(harness.short_args(script, **SETTINGS | settings)), code=code)
    assert process.wait() == -signal.SIGKILL, Path("err.txt").read_text()
    assert_same_run(resume(script, the_folder()), uninterrupted(script, tmp_path_factory, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_run_killed_before_any_change_of_its_files_can_be_resumed(script, tmp_path_factory):
    settings = {"total_timesteps": 1000}
    words = harness.flags(harness.short_args(script, **SETTINGS | settings))
    expected = uninterrupted(script, tmp_path_factory, **settings)
    for number in range(2, 50):  # the first one gives the folder its args.json
        shutil.rmtree("runs", ignore_errors=True)
        process = start(script, *words, code=KILLED_AT_A_FILE.format(files="", number=number))
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, Path("err.txt").read_text()
        folder = the_folder()
        if not (folder / "model.pt").exists():
            resume(script, folder)
        assert_same_run(folder, expected)
    assert number > 4


@pytest.fixture(scope="module", params=harness.SCRIPTS)
def interrupted(request, tmp_path_factory):
    """A run that was killed after its checkpoint -> (name of the script, folder that must not be changed)."""
    place = tmp_path_factory.mktemp("interrupted")
    with contextlib.chdir(place):
        process = start(request.param, *harness.flags(harness.short_args(request.param, **SETTINGS)))
        wait_for(process, "runs/*/checkpoint.pt")
        time.sleep(0.05)
        kill(process)
        for path in Path().glob("runs/*/*.tmp"):
            path.unlink()
        return request.param, place / the_folder()


def test_what_a_kill_left_of_an_unfinished_checkpoint_does_no_harm(interrupted, tmp_path_factory):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    (folder / "checkpoint.pt.tmp").write_bytes(b"half of a checkpoint")
    (folder / "buffer-999.bin").write_bytes(b"half of a buffer")
    module = harness.SCRIPTS[script]
    assert module.main(module.Args(resume=str(folder))) == folder
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))
    names = {re.sub("events.*", "events", path.name) for path in folder.iterdir()}
    assert names == {"args.json", "events", "checkpoint.pt", "model.pt"}


def test_what_was_logged_after_the_checkpoint_is_cut(interrupted, tmp_path_factory):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    (log,) = folder.glob("events*")
    complete = log.read_bytes()
    with log.open("ab") as file:  # a second copy of the records, the last of them cut in the middle
        file.write(complete[: -len(complete) // 3])
    shutil.copy(log, folder / "events.out.tfevents.9999999999.resumed.1.0")  # of a resumed run that was killed, too
    module = harness.SCRIPTS[script]
    module.main(module.Args(resume=str(folder)))
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))


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


def buffer_of(folder):
    """The buffer file that belongs to the checkpoint."""
    files = sorted(folder.glob("buffer-*.bin"), key=lambda path: path.stat().st_mtime)
    for path in files[1:]:  # of a checkpoint that was not complete
        path.unlink()
    return files[0]


REFUSED = {
    "a truncated checkpoint": lambda folder: truncate(folder / "checkpoint.pt"),
    "an empty checkpoint": lambda folder: truncate(folder / "checkpoint.pt", 0),
    "text as checkpoint": lambda folder: (folder / "checkpoint.pt").write_text("hello"),
    "a pickle that runs code": lambda folder: (folder / "checkpoint.pt").write_bytes(pickle.dumps(Evil())),
    "a torch file that runs code": lambda folder: torch.save({"actor": Evil()}, folder / "checkpoint.pt"),
    "a torch file of something else": lambda folder: torch.save({"a": torch.ones(1)}, folder / "checkpoint.pt"),
    "a list as checkpoint": lambda folder: torch.save([1, 2], folder / "checkpoint.pt"),
    "a missing buffer": lambda folder: buffer_of(folder).unlink(),
    "a truncated buffer": lambda folder: truncate(buffer_of(folder)),
    "a buffer that is too long": lambda folder: buffer_of(folder).open("ab").write(b"more"),
    "another size of networks": lambda folder: edit(folder / "args.json", '"hidden_dim": 16', '"hidden_dim": 17'),
    "another task": lambda folder: edit(folder / "args.json", "Pendulum-v1", "MountainCarContinuous-v0"),
    "no args.json": lambda folder: (folder / "args.json").unlink(),
    "a broken args.json": lambda folder: truncate(folder / "args.json"),
    "an args.json of something else": lambda folder: (folder / "args.json").write_text('{"a": 1}'),
    "a list as args.json": lambda folder: (folder / "args.json").write_text("[1, 2]"),
    "no folder": lambda folder: shutil.rmtree(folder),
    "a file as folder": lambda folder: (shutil.rmtree(folder), folder.write_text("hello")),
}


def refusal(script, capsys, **values):
    """Calls main with arguments that it must refuse -> the one line on stderr."""
    module = harness.SCRIPTS[script]
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        module.main(module.Args(**values))
    out, err = capsys.readouterr()
    assert exit.value.code == 2, err
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), (out, err)
    return err


@pytest.mark.parametrize("damage", REFUSED)
def test_what_cannot_be_resumed_is_refused_in_one_line_and_left_as_it_is(damage, interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    REFUSED[damage](folder)
    before = contents(".")
    line = refusal(script, capsys, resume=str(folder))
    assert "--resume copy" in line
    assert contents(".") == before and not Path("executed").exists()


def test_a_run_of_another_script_is_refused(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    before = contents(folder)
    for other in harness.SCRIPTS:
        if other != script:
            assert "another script" in (line := refusal(other, capsys, resume=str(folder))) or other in line
            assert "another script" in (line := refusal(other, capsys, evaluate=str(folder))) or "script" in line
    assert contents(folder) == before


def test_a_run_of_another_script_is_refused_before_its_first_checkpoint_too(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, source.name))
    for path in [*folder.glob("*.pt"), *folder.glob("*.bin")]:
        path.unlink()
    before = contents(folder)
    for other in harness.SCRIPTS:
        if other != script:
            assert other in refusal(other, capsys, resume=str(folder))
    assert contents(folder) == before


def test_a_checkpoint_of_another_script_is_refused(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    checkpoint = harness.saved(folder / "checkpoint.pt")
    assert checkpoint["script"] == script
    torch.save(checkpoint | {"script": "other"}, folder / "checkpoint.pt")
    before = contents(folder)
    assert "checkpoint.pt" in refusal(script, capsys, resume=str(folder))
    assert contents(folder) == before


def test_resume_takes_no_other_argument(interrupted, capsys):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    before = contents(".")
    assert "--seed" in refusal(script, capsys, resume=str(folder), seed=2)
    assert "--cuda" in refusal(script, capsys, resume=str(folder), cuda=False)
    assert "--total-timesteps" in refusal(script, capsys, resume=str(folder), total_timesteps=5000)
    assert "--resume" in refusal(script, capsys, resume=str(folder), evaluate=str(folder))
    assert contents(".") == before


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_finished_run_says_that_it_is_finished(script, capsys, tmp_path_factory):
    folder = uninterrupted(script, tmp_path_factory)
    before = contents(folder)
    assert "finished" in refusal(script, capsys, resume=str(folder))
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["a truncated checkpoint", "a pickle that runs code", "no args.json"])
def test_a_refused_resume_is_one_line_on_the_screen(damage, interrupted):
    script, source = interrupted
    folder = Path(shutil.copytree(source, "copy"))
    REFUSED[damage](folder)
    result = harness.run(script, "--resume", folder)
    assert result.returncode == 2 and result.stdout == ""
    assert re.fullmatch("error: --resume copy.*\n", result.stderr), result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_signal_ends_the_run_after_its_episode_and_says_how_to_go_on(script, number, tmp_path_factory):
    args = harness.short_args(script, **SETTINGS | {"checkpoint_interval": 0})
    process = start(script, *harness.flags(args))
    wait_for(process, "runs/*/events*")
    time.sleep(0.4)
    process.send_signal(number)
    assert process.wait() not in (0, -number)
    folder = the_folder()
    out, err = Path("out.txt").read_text(), Path("err.txt").read_text()
    assert "Traceback" not in err and not (folder / "model.pt").exists()
    assert sorted(path.suffix for path in folder.glob("[bc]*")) == [".bin", ".pt"]

    step, words = re.search(r"step (\d+); go on with: (.*)", out).groups()
    assert 0 < int(step) < args.total_timesteps
    assert int(step) == logged(folder)["charts/episodic_return"][-1][0]  # the end of an episode
    words = shlex.split(words)
    assert (
        words[0] == "python"
        and Path(words[1]).resolve() == harness.PATHS[script]
        and words[2:] == ["--resume", str(folder)]
    )
    result = subprocess.run([sys.executable, *words[1:]], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert_same_run(folder, uninterrupted(script, tmp_path_factory))
    assert not list(folder.glob("*.bin"))


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_second_signal_leaves_at_once(script):
    args = harness.short_args(script, env_id="toys:ToyEndless-v0", total_timesteps=10_000_000, buffer_size=1000)
    process = start(script, *harness.flags(args))
    wait_for(process, "runs/*/events*")
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # its episode has no end
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert "Traceback" not in Path("err.txt").read_text()
    assert not list(the_folder().glob("[bcm]*"))


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_finished_run_leaves_no_buffer_and_no_unfinished_file(script, tmp_path_factory):
    names = {re.sub("events.*", "events", p.name) for p in uninterrupted(script, tmp_path_factory).iterdir()}
    assert names == {"args.json", "events", "checkpoint.pt", "model.pt"}


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_checkpoint_interval_of_zero_writes_no_checkpoint(script):
    folder = harness.SCRIPTS[script].main(harness.short_args(script, checkpoint_interval=0))
    assert {re.sub("events.*", "events", path.name) for path in folder.iterdir()} == {"args.json", "events", "model.pt"}


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_a_checkpoint_is_written_at_the_first_episode_end_after_each_interval(script, monkeypatch):
    module, steps = harness.SCRIPTS[script], []
    save = module.ReplayBuffer.save

    def recorded(self, path):
        steps.append(int(re.fullmatch(r"buffer-(\d+)\.bin", Path(path).name).group(1)))
        save(self, path)
        assert Path(path).stat().st_size == len(self) * 4 * (3 + 1 + 1 + 3 + 1)

    monkeypatch.setattr(module.ReplayBuffer, "save", recorded)
    module.main(harness.short_args(script, total_timesteps=1500, checkpoint_interval=350))
    assert steps == [400, 800, 1200, 1400]  # intervals end at 350, 700, 1050 and 1400, episodes every 200 steps


@pytest.mark.parametrize("script", harness.SCRIPTS)
def test_two_runs_that_start_in_the_same_second_get_two_folders(script, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000 + next(ticks) * 1e-6)
    args = harness.short_args(script, total_timesteps=400)
    folders = [harness.SCRIPTS[script].main(args) for _ in range(3)]
    assert len(set(folders)) == 3 and set(folders) == set(Path("runs").iterdir())
    assert all((folder / "model.pt").exists() for folder in folders)
