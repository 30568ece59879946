"""The scripts of a family are the same code, except for what stands here and between their fences.

A script without its fenced lines, and after the replacements of this table, is its family's parent to the letter,
blank lines and the docstring at its top aside. So a change in one copy alone, of one character, is found.
"""

import ast
import inspect
import itertools
import re

import pytest
from harness import CYCLING, FAMILIES, MODULES, PATHS, ROOT

FENCE = re.compile(r"\s*# --- (?!end )(\w[\w ]*): .+ ---$")
FENCE_END = re.compile(r"\s*# --- end (\w[\w ]*) ---$")

# (script, what it says, what its parent says, why)
INTENDED = [
    ("ne_td3_continuous.py", "MaskedLinear(", "nn.Linear(", "NE's layers have a mask"),
    ("ne_td3_continuous.py", "batch_size, oldest=1.0, generator", "batch_size, generator", "NE reviews the oldest"),
    (
        "ne_td3_continuous.py",
        "rb.sample(args.batch_size, oldest)",
        "rb.sample(args.batch_size)",
        "NE reviews the oldest",
    ),
    ("baselines/static_sparse_td3_continuous.py", "MaskedLinear(", "nn.Linear(", "its layers have a mask"),
    ("baselines/rigl_td3_continuous.py", "MaskedLinear(", "nn.Linear(", "its layers have a mask"),
    (
        "baselines/layer_norm_td3_continuous.py",
        "self.norm1(self.fc1(torch.cat([obs, actions], 1)))",
        "self.fc1(torch.cat([obs, actions], 1))",
        "the norm stands between a layer and its ReLU",
    ),
    ("baselines/layer_norm_td3_continuous.py", "self.norm1(self.fc1(obs))", "self.fc1(obs)", "as above"),
    ("baselines/layer_norm_td3_continuous.py", "self.norm2(self.fc2(h1))", "self.fc2(h1)", "as above"),
    (
        "baselines/injection_td3_continuous.py",
        "import Literal, NamedTuple",
        "import NamedTuple",
        "the type of --inject",
    ),
    (
        "baselines/injection_td3_continuous.py",
        "(self.fc3(self.hidden(obs, actions)[-1]) + frozen_sum(self, obs, actions)).squeeze(1)",
        "self.fc3(self.hidden(obs, actions)[-1]).squeeze(1)",
        "h - h2 is added to the output",
    ),
    ("baselines/injection_td3_continuous.py", " + frozen_sum(self, obs)", "", "h - h2 is added before the tanh"),
]

# The cycling scripts depart from the continuous ones of the same method alike.
INTENDED += [
    (cycling, *entry)
    for path, *entry in INTENDED
    if (cycling := path.replace("_continuous", "_cycling")) in FAMILIES["cycling"]
]

# What a cycling script defines otherwise than the continuous script of the same method, and why
IN_A_CYCLE = {
    "Args": "env_ids, cycles and task_steps instead of env_id and total_timesteps",
    "command_line": "an argument of several words",
    "short_run": "a visit is short, not the run",
    "check_args": "the new arguments",
    "make_env": "the argument's name in messages",
    "evaluate_run": "plays each task",
    "new_run_folder": "the name of several tasks",
    "load_args": "tuples come back from JSON as lists",
    "train": "the visits",
}
SAME_METHOD = [(name, name.replace("_cycling", "_continuous")) for name in CYCLING]

INTENDED += [
    ("ne_drq_pixels.py", "MaskedLinear(", "nn.Linear(", "NE's layers have a mask"),
    ("ne_drq_pixels.py", "batch_size, oldest=1.0, generator", "batch_size, generator", "NE reviews the oldest"),
    ("ne_drq_pixels.py", "rb.sample(args.batch_size, oldest)", "rb.sample(args.batch_size)", "NE reviews the oldest"),
    (
        "baselines/layer_norm_drq_pixels.py",
        "self.norm1(self.fc1(torch.cat([features, actions], 1)))",
        "self.fc1(torch.cat([features, actions], 1))",
        "the norm stands between a layer and its ReLU",
    ),
    ("baselines/layer_norm_drq_pixels.py", "self.norm1(self.fc1(features))", "self.fc1(features)", "as above"),
    ("baselines/layer_norm_drq_pixels.py", "self.norm2(self.fc2(h1))", "self.fc2(h1)", "as above"),
    (
        "baselines/injection_drq_pixels.py",
        "import Literal, NamedTuple",
        "import NamedTuple",
        "the type of --inject",
    ),
    (
        "baselines/injection_drq_pixels.py",
        "(self.fc3(self.hidden(features, actions)[-1]) + frozen_sum(self, features, actions)).squeeze(1)",
        "self.fc3(self.hidden(features, actions)[-1]).squeeze(1)",
        "h - h2 is added to the output",
    ),
    (
        "baselines/injection_drq_pixels.py",
        "(self.fc3(self.hidden(features)[-1]) + frozen_sum(self, features)).float()",
        "self.fc3(self.hidden(features)[-1]).float()",
        "h - h2 is added to the output",
    ),
]

# Section 11: what every script that has the name must define alike, across families.
SHARED = ["MaskedLinear", "erdos_renyi_densities", "scheduled_growth", "dormant_scores", "grow_", "prune_dormant_"]
SHARED += ["ReviewGate", "adam_moments"]

CHILDREN = [(child, paths[0]) for paths in FAMILIES.values() for child in paths[1:]]


def without_docstring(text):
    """A script's text after the docstring at its top."""
    first = ast.parse(text).body[0]
    assert isinstance(first.value, ast.Constant), "a script starts with a docstring"
    return "\n".join(text.splitlines()[first.end_lineno :])


def without_fences(text):
    """The lines that are not between a fence and its end."""
    kept, inside = [], None
    for line in text.splitlines():
        if opening := FENCE.match(line):
            assert inside is None, f"a fence opens inside a fence: {line}"
            inside = opening[1]
        elif closing := FENCE_END.match(line):
            assert inside == closing[1], f"a fence closes that is not open: {line}"
            inside = None
        elif inside is None:
            kept.append(line)
    assert inside is None, f"the fence {inside} stays open"
    return "\n".join(kept)


def as_parent(script, body):
    """What a script's body would be without its method, blank lines left out -> list of lines."""
    body = without_fences(body)
    for name, own, parents, _ in INTENDED:
        if name == script:
            body = body.replace(own, parents)
    return [line for line in body.splitlines() if line.strip()]


@pytest.mark.parametrize(("child", "parent"), CHILDREN)
def test_a_script_without_its_fenced_lines_is_its_parent(child, parent):
    own, parents = (as_parent(path, without_docstring((ROOT / path).read_text())) for path in (child, parent))
    for number, (mine, theirs) in enumerate(zip(own, parents, strict=False)):
        assert mine == theirs, f"{child} departs from {parent} at its {number + 1}th common line"
    assert len(own) == len(parents)


@pytest.mark.parametrize(("child", "parent"), CHILDREN)
def test_a_change_of_one_character_in_either_copy_is_found(child, parent):
    bodies = {path: without_docstring((ROOT / path).read_text()) for path in (child, parent)}
    common = as_parent(parent, bodies[parent])
    for path, body in bodies.items():
        lines, fenced, tried = body.splitlines(), False, 0
        for number, line in enumerate(lines):
            if FENCE.match(line) or FENCE_END.match(line):
                fenced = not FENCE_END.match(line)
            elif line.strip() and not fenced:
                tried += 1
                changed = as_parent(path, "\n".join([*lines[:number], line + "#", *lines[number + 1 :]]))
                assert changed != common, line
        assert tried == len(common)


@pytest.mark.parametrize("entry", INTENDED, ids=lambda entry: entry[1])
def test_every_intended_difference_is_still_there(entry):
    script, own, parents, reason = entry
    assert reason
    parent = next(parent for child, parent in CHILDREN if child == script)
    assert own in (ROOT / script).read_text()
    assert parents in (ROOT / parent).read_text()
    assert own not in (ROOT / parent).read_text()


@pytest.mark.parametrize("name", SHARED)
def test_what_the_algorithm_names_is_the_same_code_in_all_scripts(name):
    sources = {script: inspect.getsource(getattr(m, name)) for script, m in MODULES.items() if hasattr(m, name)}
    assert sources
    assert len(set(sources.values())) == 1, f"{name} differs between {sorted(sources)}"


def definitions(script):
    """The top-level functions and classes of a script -> {name: its text}."""
    text = PATHS[script].read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


@pytest.mark.parametrize(("cycling", "continuous"), SAME_METHOD)
def test_a_cycling_script_is_made_of_the_definitions_of_the_continuous_one(cycling, continuous):
    own, theirs = definitions(cycling), definitions(continuous)
    assert theirs.keys() <= own.keys()
    assert {name for name in theirs if own[name] != theirs[name]} == IN_A_CYCLE.keys()
    assert own["make_env"].replace("--env-ids", "--env-id") == theirs["make_env"]


def fields(script):
    """The arguments of a script -> {name: its type, default and text}."""
    body = next(node for node in ast.parse(PATHS[script].read_text()).body if getattr(node, "name", "") == "Args").body
    return {
        field.target.id: ast.dump(field) + ast.dump(text)
        for field, text in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
    }


@pytest.mark.parametrize(("cycling", "continuous"), SAME_METHOD)
def test_an_argument_means_the_same_in_a_cycle(cycling, continuous):
    own, theirs = fields(cycling), fields(continuous)
    assert theirs.keys() - own.keys() == {"env_id", "total_timesteps"}
    changed = {name for name in own.keys() & theirs.keys() if own[name] != theirs[name]}
    texts = {"eval_interval", "learning_starts", "reset_interval", "injection_step"}  # "of a visit", "of the whole run"
    assert changed == texts & own.keys()
    for name in changed:
        assert getattr(MODULES[cycling].Args, name) == getattr(MODULES[continuous].Args, name)


def test_no_script_imports_one_of_ours():
    ours = set(MODULES) | {"harness", "baselines", "benchmark"}
    for paths in FAMILIES.values():
        for path in paths:
            tree = ast.parse((ROOT / path).read_text())
            imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not imported & ours
