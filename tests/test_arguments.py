"""Every argument changes something, and --help says what."""

import ast
import importlib.machinery
import re
import shutil
import sys
import types
from pathlib import Path

import harness
import pytest
import torch
from test_methods import OTHER as OWN  # the cases of what is a baseline's own

# Runs that differ in one field: {field: (value, what both runs have besides)}; their networks must differ.
LIVELY = {"learning_rate": 1e-2, "hidden_dim": 64, "neuron_interval": 20}
CHANGES_THE_NETWORKS = {
    "env_id": ("MountainCarContinuous-v0", {}),
    "seed": (2, {}),
    "total_timesteps": (700, {}),
    "learning_rate": (1e-3, {}),
    "buffer_size": (350, {}),
    "gamma": (0.9, {}),
    "tau": (0.01, {}),
    "batch_size": (17, {}),
    "policy_noise": (0.3, {}),
    "noise_clip": (0.1, {}),
    "exploration_noise": (0.2, {}),
    "learning_starts": (310, {}),
    "policy_frequency": (5, {}),
    "hidden_dim": (33, {}),
    "grow": (False, {}),
    "prune": (False, LIVELY),
    "review": (False, LIVELY),
    "initial_density": (0.5, {}),
    "final_density": (0.5, {}),
    "growth_interval": (100, {}),
    "omega": (0.1, LIVELY),
    "review_floor": (1.0, LIVELY),
}
# The same for fields that must leave training alone and show in the logs.
CHANGES_THE_LOGS = {
    "neuron_interval": (50, {"review": False}),
    "eval_interval": (300, {"eval_episodes": 1}),
    "eval_episodes": (3, {"eval_interval": 300}),
}
OTHERS = {
    "cuda",
    "torch_threads",
    "checkpoint_interval",
    "capture_video",
    "track",
    "wandb_project_name",
    "wandb_entity",
    "resume",
    "evaluate",
}
with_all = pytest.mark.parametrize("script", harness.SCRIPTS)
_runs = {}


def train(script, **changes):
    """A short run, made once for the same arguments -> (networks, log)."""
    args = harness.short_args(script, **{"total_timesteps": 600} | changes)
    key = script, str(args)
    if key not in _runs:
        folder = harness.SCRIPTS[script].main(args)
        log = harness.events(folder)
        log.pop("charts/SPS")
        _runs[key] = harness.saved(folder / "model.pt"), log
    return _runs[key]


def pairs(table):
    return [
        (s, name) for s in harness.SCRIPTS for name in table if name in harness.SCRIPTS[s].Args.__dataclass_fields__
    ]


@with_all
def test_every_argument_has_a_case_here(script):
    fields = set(harness.SCRIPTS[script].Args.__dataclass_fields__)
    assert fields - (CHANGES_THE_NETWORKS.keys() | CHANGES_THE_LOGS.keys() | OTHERS) == OWN.get(script, {}).keys()


@pytest.mark.parametrize("script, name", pairs(CHANGES_THE_NETWORKS))
def test_the_argument_changes_the_trained_networks(script, name):
    value, settings = CHANGES_THE_NETWORKS[name]
    a, _ = train(script, **settings)
    b, _ = train(script, **settings | {name: value})
    assert not all(harness.same(a[net], b[net]) for net in a)


@pytest.mark.parametrize("script, name", pairs(CHANGES_THE_LOGS))
def test_the_argument_changes_the_logs_and_not_the_networks(script, name):
    value, settings = CHANGES_THE_LOGS[name]
    a, log_a = train(script, **settings)
    b, log_b = train(script, **settings | {name: value})
    assert harness.same(a, b)
    assert log_a != log_b
    assert log_a["charts/episodic_return"] == log_b["charts/episodic_return"]


class Seen(Exception):
    """Ends a run where a test has seen enough."""


@pytest.mark.parametrize("cuda, expected", [(True, "(?i)cuda"), (False, "cpu")])
@with_all
def test_cuda_decides_where_networks_go_if_there_is_a_gpu(script, cuda, expected, monkeypatch):
    module = harness.SCRIPTS[script]

    def seen(self, device):
        raise Seen(torch.device(device).type)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.nn.Module, "to", seen)
    with pytest.raises((Seen, AssertionError), match=expected):  # the latter from a PyTorch that was built without CUDA
        module.main(harness.short_args(script, cuda=cuda))


@with_all
def test_torch_threads_sets_the_number_of_threads(script):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            harness.SCRIPTS[script].main(harness.short_args(script, total_timesteps=400, torch_threads=threads))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@with_all
def test_the_checkpoint_interval_decides_how_often_the_buffer_is_written(script, monkeypatch):
    module, count = harness.SCRIPTS[script], []
    save = module.ReplayBuffer.save
    monkeypatch.setattr(module.ReplayBuffer, "save", lambda self, path: (count.append(path), save(self, path)))
    counts = []
    for interval in (0, 400, 200):
        count.clear()
        module.main(harness.short_args(script, checkpoint_interval=interval))
        counts.append(len(count))
    assert counts == [0, 2, 4]


@with_all
def test_capture_video_adds_a_folder_of_videos(script):
    for capture in (False, True):
        args = harness.short_args(script, total_timesteps=400, capture_video=capture)
        assert (harness.SCRIPTS[script].main(args) / "videos").is_dir() == capture


@with_all
def test_track_and_its_two_arguments_reach_weights_and_biases(script, monkeypatch):
    calls, wandb = [], types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    wandb.init = lambda **options: calls.append((options["project"], options["entity"]))
    wandb.finish = lambda *args, **options: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for settings in ({}, {"track": True}, {"track": True, "wandb_project_name": "p", "wandb_entity": "e"}):
        harness.SCRIPTS[script].main(harness.short_args(script, total_timesteps=400, **settings))
    assert calls == [("neuroplastic-expansion", None), ("p", "e")]


@with_all
def test_resume_and_evaluate_use_the_folder_instead_of_a_new_one(script, monkeypatch, capsys):
    module = harness.SCRIPTS[script]
    folder = module.main(harness.short_args(script))
    capsys.readouterr()
    assert module.main(module.Args(evaluate=str(folder), eval_episodes=1)) == folder
    assert "mean return" in capsys.readouterr().out
    begun = Path(shutil.copytree(folder, "begun"))  # as if killed before its first checkpoint
    for path in [*begun.glob("*.pt"), *begun.glob("events*")]:
        path.unlink()
    assert module.main(module.Args(resume=str(begun))) == begun
    assert harness.same(harness.saved(begun / "model.pt"), harness.saved(folder / "model.pt"))
    assert len(list(Path("runs").iterdir())) == 1


def documentation(script):
    """The text under each field of Args -> {field: text}; read from the source."""
    tree = ast.parse(harness.PATHS[script].read_text())
    (args,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Args")
    texts = {}
    for node, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            texts[node.target.id] = after.value.value if is_text else ""
    return texts


@with_all
def test_help_explains_every_argument(script):
    result = harness.run(script, "--help", env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.returncode == 0 and result.stderr == ""
    shown = " ".join(re.sub("[│╭╮╰╯─]|, --no-[a-z-]+", " ", result.stdout).split())
    texts = documentation(script)
    assert texts.keys() == harness.SCRIPTS[script].Args.__dataclass_fields__.keys()
    for name, text in texts.items():
        assert len(text) > 10, name
        flag = "--" + name.replace("_", "-")
        text = re.escape(" ".join(text.split()))
        assert re.search(re.escape(flag) + f" ((?!--[a-z]).)*{text}", shown), name
