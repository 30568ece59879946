"""Every argument changes something, and --help says what."""

import ast
import os
import re
import tokenize
from pathlib import Path

import harness
import pytest
import torch
from test_methods import OTHER  # the cases of what is a baseline's own
from test_more_methods import OTHER as MORE_OTHER
from test_resume import Fork
from test_runs import known

# Runs that differ in one field: {field: (value, what both runs have besides)}; their networks must differ.
LIVELY = {"learning_rate": 1e-2, "neuron_interval": 20, "review_floor": 0.0}
CHANGES_THE_NETWORKS = {
    "env_id": ("MountainCarContinuous-v0", {}),
    "seed": (2, {}),
    "total_timesteps": (500, {}),
    "learning_rate": (1e-3, {}),
    "buffer_size": (350, {}),
    "gamma": (0.9, {}),
    "tau": (0.01, {}),
    "batch_size": (17, {}),
    "replay_ratio": (2, {}),
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
    "dense_ends": (True, {}),
    "growth_interval": (100, {}),
    "growth_criterion": ("random", {}),
    "omega": (0.1, LIVELY),
    "dormant_tau": (0.5, LIVELY | {"total_timesteps": 700}),
    "review_floor": (1.0, LIVELY),
    "review_oldest": (0.5, LIVELY),
}
# The same for fields that must leave training alone and show in the logs.
CHANGES_THE_LOGS = {
    "neuron_interval": (50, {"review": False}),
    "eval_interval": (300, {"eval_episodes": 1}),
    "eval_episodes": (2, {"eval_interval": 300}),
}
# These are below, in test_runs.py (capture_video, track, evaluate) and in test_resume.py (resume).
OTHERS = {"cuda", "torch_threads", "checkpoint_interval", "capture_video", "track", "resume", "evaluate"}
with_all = pytest.mark.parametrize("script", harness.SCRIPTS)


def train(script, **changes):
    """A short run, made once for the same arguments -> (networks, log, folder)."""
    folder, networks, log = known(script, **{"total_timesteps": 450} | changes)
    return networks, {tag: values for tag, values in log.items() if tag != "charts/SPS"}, folder


def pairs(table):
    return [
        (s, name) for s in harness.SCRIPTS for name in table if name in harness.SCRIPTS[s].Args.__dataclass_fields__
    ]


@with_all
def test_every_argument_has_a_case_here(script):
    fields = set(harness.SCRIPTS[script].Args.__dataclass_fields__)
    own = (OTHER | MORE_OTHER).get(script, {}).keys()
    assert own <= fields <= CHANGES_THE_NETWORKS.keys() | CHANGES_THE_LOGS.keys() | OTHERS | own


@pytest.mark.parametrize("script, name", pairs(CHANGES_THE_NETWORKS))
def test_the_argument_changes_the_trained_networks(script, name):
    value, settings = CHANGES_THE_NETWORKS[name]
    a, *_ = train(script, **settings)
    b, *_ = train(script, **settings | {name: value})
    assert not all(harness.same(a[net], b[net]) for net in a)


@pytest.mark.parametrize("script, name", pairs(CHANGES_THE_LOGS))
def test_the_argument_changes_the_logs_and_not_the_networks(script, name):
    value, settings = CHANGES_THE_LOGS[name]
    a, log_a, _ = train(script, **settings)
    b, log_b, _ = train(script, **settings | {name: value})
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
def test_torch_threads_sets_the_number_of_threads(script, monkeypatch):
    module, before = harness.SCRIPTS[script], torch.get_num_threads()

    def seen(*given):
        raise Seen(torch.get_num_threads())

    monkeypatch.setattr(module.ReplayBuffer, "add", seen)
    try:
        for threads in (2, 1):
            with pytest.raises(Seen, match=str(threads)):
                module.main(harness.short_args(script, torch_threads=threads))
    finally:
        torch.set_num_threads(before)


@with_all
def test_the_checkpoint_interval_decides_how_often_the_run_is_saved(script):
    networks, kept = [], []
    for interval in (0, 400, 200):
        trained, _, folder = train(script, checkpoint_interval=interval)
        networks.append(trained)
        kept.append(sorted(int(path.stem) for path in (folder / "models").iterdir()))
    assert kept == [[0, 450], [0, 400, 450], [0, 200, 400, 450]]
    assert harness.same(networks[0], networks[1]) and harness.same(networks[0], networks[2])


def documentation(script):
    """The comment at the end of each field of Args -> {field: text}; read from the source."""
    path = harness.PATHS[script]
    with tokenize.open(path) as file:
        comments = {
            token.start[0]: token.string
            for token in tokenize.generate_tokens(file.readline)
            if token.type == tokenize.COMMENT
        }
    (args,) = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    fields = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: comments.get(node.end_lineno, "").lstrip("# ") for node in fields}


@with_all
def test_help_explains_every_argument(script):
    process = Fork(script, "--help", before=lambda: os.environ.update(COLUMNS="200", NO_COLOR="1"))
    assert process.wait() == 0 and Path("err.txt").read_text() == ""
    shown = " ".join(re.sub("[│╭╮╰╯─]|, --no-[a-z-]+", " ", Path("out.txt").read_text()).split())
    texts = documentation(script)
    assert texts.keys() == harness.SCRIPTS[script].Args.__dataclass_fields__.keys()
    for name, text in texts.items():
        assert len(text) > 10, name
        flag = "--" + name.replace("_", "-")
        text = re.escape(" ".join(text.split()))
        assert re.search(re.escape(flag) + f" ((?!--[a-z]).)*{text}", shown), name
