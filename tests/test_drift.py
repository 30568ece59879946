"""The scripts of a family are the same code, except for what stands here and between their fences.

A script without its fenced lines, and after the replacements of this table, is its family's parent to the letter,
blank lines and the docstring at its top aside. So a change in one copy alone, of one character, is found.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest
from harness import CYCLING, FAMILIES, MODULES, OTHER_RULES, PARENTS, PATHS, PIXELS, ROOT, SCRIPTS, scripts_with

FENCE = re.compile(r"\s*# --- (?!end )(\w[\w &-]*): .+ ---$")
FENCE_END = re.compile(r"\s*# --- end (\w[\w &-]*) ---$")

# What a method changes outside its fences, in each family whose parent says so: (own words, the parent's, why)
MATH = "import json\nimport math\nimport os", "import json\nimport os", "for a cosine"
LITERAL = "import Path\nfrom typing import Literal", "import Path", "the type of an argument with a few values"
MASKS = [
    ("MaskedLinear(", "nn.Linear(", "layers have a mask"),
    (
        '", neuron_statistics(hidden) | connection_statistics(network))',
        '", neuron_statistics(hidden))',
        "logs densities",
    ),
    (':.1f}, density={density(networks):.3f}", refresh', ':.1f}", refresh', "the bar shows the density"),
]
CHANGES = {
    "ne": [
        *[MATH, LITERAL, *MASKS],
        ("batch_size, oldest=1.0, generator=None", "batch_size, generator=None", "a review draws from the oldest"),
        ("replacement, from the oldest share of the buffer ->", "replacement ->", "as above"),
        ("torch.randint(max(1, int(len(self) * oldest)), ", "torch.randint(len(self), ", "as above"),
        ("(args.batch_size, args.review_oldest if review else 1.0)", "(args.batch_size)", "as above"),
    ],
    "static_sparse": MASKS,
    "rigl": [MATH, *MASKS],
    "reset": [LITERAL],
    "redo": [],
    "injection": [
        LITERAL,
        ("self.hidden(*inputs)[-1]) + frozen_sum(self, *inputs)", "self.hidden(*inputs)[-1])", "h - h2 is added"),
    ],
    "layer_norm": [
        ("(self.norm1(self.fc1(torch.cat(inputs, 1))))", "(self.fc1(torch.cat(inputs, 1)))", "a norm before each ReLU"),
        ("(self.norm2(self.fc2(h1)))", "(self.fc2(h1))", "as above"),
    ],
}
CHANGES |= {
    "weight_decay": [
        ("torch.optim.AdamW(", "torch.optim.Adam(", "decoupled weight decay"),
        (", **settings)", ", lr=args.learning_rate, fused=True)", "as above"),
    ],
    "leaky_relu": [
        (
            "F.leaky_relu_(self.fc1(torch.cat(inputs, 1)), self.slope)",
            "F.relu_(self.fc1(torch.cat(inputs, 1)))",
            "slope",
        ),
        ("F.leaky_relu_(self.fc2(h1), self.slope)", "F.relu_(self.fc2(h1))", "as above"),
    ],
    "spectral_norm": [("(qf.train()(batch.obs", "(qf(batch.obs", "a power iteration")],
    "l2_init": [],
    "crelu": [
        ("nn.Linear(2 * hidden_dim", "nn.Linear(hidden_dim", "a layer sees two values of each unit before it"),
        ("crelu(self", "F.relu_(self", "the activation"),
        ("[batch, 2 * its units]", "[batch, hidden_dim]", "as above"),
    ],
    "nap": CHANGES["layer_norm"],
    "hare_tortoise": [],
    "shrink_perturb": [],
    "two_hot": [
        (
            "(TwoHotCritic(obs_dim + len(low), args.hidden_dim, *bins)",
            "(MLP(obs_dim + len(low), args.hidden_dim, 1)",
            "bins",
        ),
        (
            "= qf1.value(qf1_logits), qf2.value(qf2_logits)",
            "= (qf(batch.obs, batch.actions).squeeze(1) for qf in (qf1, qf2))",
            "the values of the logits that the loss needs",
        ),
        ("qf1.loss(qf1_logits, ", "F.mse_loss(qf1_values, ", "cross-entropy"),
        ("qf2.loss(qf2_logits, ", "F.mse_loss(qf2_values, ", "cross-entropy"),
    ],
    "regrama": [],
    "ne_layer_norm": CHANGES["layer_norm"],
}
CHILDREN = [(child, PARENTS.get(child, paths[0])) for paths in FAMILIES.values() for child in paths[1:]]


def method(child, parent):
    return Path(child).stem.removesuffix("_" + Path(parent).stem.removeprefix("ne_"))


def intended(child, parent):
    """The changes of a script's method that its parent has words for -> list of (own words, the parent's, why)."""
    text = (ROOT / parent).read_text()
    return [change for change in CHANGES[method(child, parent)] if change[1] in text]


# What a script defines otherwise than the continuous script of the same method, and why
OTHERWISE = {
    "cycling": {
        "Args": "env_ids, cycles and task_steps instead of env_id and total_timesteps",
        "make_env": "the argument's name in a message",
        "main": "the visits",
    },
    "pixels": {
        "Args": "pictures, and DrQ's settings",
        "make_env": "a task that is seen in pictures",
        "Actor": "a squashed Gaussian",
        "ReplayBuffer": "stacks of frames",
        "evaluate": "the encoder",
        "main": "DrQ",
    },
}
SAME_METHOD = [(name, name.replace("_cycling", "_continuous"), "cycling") for name in CYCLING]
SAME_METHOD += [(name, name.replace("drq_pixels", "td3_continuous"), "pixels") for name in PIXELS]
# What two continuous scripts may define otherwise
OWN = {"Args", "MLP", "ReplayBuffer", "main"}

# The names of docs/algorithm.md that each script of NE has
NAMES = ["Args", "MaskedLinear", "erdos_renyi_densities", "scheduled_growth", "dormant_scores", "grow_"]
NAMES += ["prune_dormant_", "ReviewGate", "ReplayBuffer", "main"]


def without_docstring(text):
    """A script's text after the docstring at its top."""
    first = ast.parse(text).body[0]
    assert isinstance(first.value, ast.Constant), "a script starts with a docstring"
    return "\n".join(text.splitlines()[first.end_lineno :])


def fences(text):
    """The names of a script's fences -> set."""
    return {found[1] for line in text.splitlines() if (found := FENCE.match(line))}


def without_fences(text, kept=()):
    """The lines that are not between a fence and its end, but for fences named in `kept`, in which others may stand.

    Inside a fence a further one of the same name is a heading.
    """
    lines, inside = [], []
    for line in text.splitlines():
        opening, closing = FENCE.match(line), FENCE_END.match(line)
        if opening and opening[1] not in inside[-1:]:
            assert not inside or inside[-1] in kept, f"a fence opens inside a fence: {line}"
            inside.append(opening[1])
        if set(inside) <= set(kept):
            lines.append(line)
        if closing:
            assert inside[-1:] == [closing[1]], f"a fence closes that is not open: {line}"
            inside.pop()
    assert not inside, f"the fence {inside} stays open"
    return "\n".join(lines)


def as_parent(body, changes=(), kept=()):
    """A script's body without its method and without blank lines -> list of lines; kept: its parent's fences."""
    body = without_fences(body, kept)
    for own, parents, _ in changes:
        body = body.replace(own, parents)
    return [line for line in body.splitlines() if line.strip()]


def bodies(child, parent):
    return [without_docstring((ROOT / path).read_text()) for path in (child, parent)]


@pytest.mark.parametrize(("child", "parent"), CHILDREN)
def test_a_script_without_its_fenced_lines_is_its_parent(child, parent):
    body, parents = bodies(child, parent)
    kept = fences(parents)
    own, parents = as_parent(body, intended(child, parent), kept), as_parent(parents, kept=kept)
    for number, (mine, theirs) in enumerate(zip(own, parents, strict=False)):
        assert mine == theirs, f"{child} departs from {parent} at its {number + 1}th common line"
    assert len(own) == len(parents)


@pytest.mark.parametrize(("child", "parent"), CHILDREN)
def test_a_change_of_one_character_in_either_copy_is_found(child, parent):
    body, parents = bodies(child, parent)
    kept = fences(parents)
    common, changes = as_parent(parents, kept=kept), intended(child, parent)
    for text, of_method in ((body, changes), (parents, [])):
        lines, fenced, tried = text.splitlines(), False, 0
        for number, line in enumerate(lines):
            if found := FENCE.match(line) or FENCE_END.match(line):
                fenced = not FENCE_END.match(line) and found[1] not in kept
            elif line.strip() and not fenced:
                tried += 1
                changed = "\n".join([*lines[:number], line + "#", *lines[number + 1 :]])
                assert as_parent(changed, of_method, kept) != common, line
        assert tried >= len([line for line in common if not FENCE.match(line) and not FENCE_END.match(line)])


@pytest.mark.parametrize(("child", "parent"), CHILDREN)
def test_every_intended_difference_is_still_there(child, parent):
    kept = fences((ROOT / parent).read_text())
    body, parents = (without_fences(text, kept) for text in bodies(child, parent))
    for own, _, reason in intended(child, parent):
        assert reason and own in body and own not in parents, own


def test_every_intended_difference_is_needed_by_a_script():
    needed = {(method(*pair), change) for pair in CHILDREN for change in intended(*pair)}
    assert needed == {(name, change) for name, changes in CHANGES.items() for change in changes}


def test_a_fence_must_close_and_may_have_headings():
    fence, heading, end = "# --- NE: one ---", "    # --- NE: two ---", "# --- end NE ---"
    assert without_fences("\n".join(["a", fence, "b", heading, "c", end, "d"])) == "a\nd"
    inner = ["# --- Mine: three ---", "e", "# --- end Mine ---"]  # in a variant of NE, between the lines of NE
    assert without_fences("\n".join([fence, "b", *inner, "c", end]), {"NE"}) == "\n".join([fence, "b", "c", end])
    for wrong in (
        [fence, "# --- Reset: two ---", end],
        [fence],
        [end],
        [fence, "# --- end Reset ---"],
        [fence, end, end],
    ):
        with pytest.raises(AssertionError):
            without_fences("\n".join(wrong))


def definitions(script):
    """The top-level functions and classes of a script -> {name: its text}."""
    text = PATHS[script].read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}
    return {node.name: "\n".join(text.splitlines()[first[node.name] - 1 : node.end_lineno]) for node in nodes}


def test_what_has_the_same_name_in_two_continuous_scripts_is_the_same_code():
    texts, variants = {}, {Path(child).stem for child in PARENTS}  # of NE: held to their parent above
    for script in SCRIPTS.keys() - variants:
        for name, text in definitions(script).items():
            texts.setdefault(name, {})[script] = text
    for name in texts.keys() - OWN:
        assert len(set(texts[name].values())) == 1, f"{name} differs between {sorted(texts[name])}"
    shared = [name for name in texts.keys() - OWN if 1 < len(texts[name]) < len(SCRIPTS)]
    assert {"MaskedLinear", "grow_", "adam_moments", "connection_counts", "density"} <= set(shared)


@pytest.mark.parametrize(("script", "continuous", "family"), SAME_METHOD)
def test_a_script_is_made_of_the_definitions_of_the_continuous_one(script, continuous, family):
    own, theirs = definitions(script), definitions(continuous)
    assert theirs.keys() <= own.keys()
    assert {name for name in theirs if own[name] != theirs[name]} == OTHERWISE[family].keys()
    if family == "cycling":
        assert own["make_env"].replace("--env-ids", "--env-id") == theirs["make_env"]


def test_each_script_of_the_method_has_the_names_of_the_algorithm():
    for script in ("ne_td3_continuous", "ne_td3_cycling", "ne_drq_pixels"):
        assert all(hasattr(MODULES[script], name) for name in NAMES)


def fields(script):
    """The arguments of a script -> {name: its type, default and text}."""
    lines = re.findall(r"^    (\w+): (.+?) = (.+?)  # (.+)$", definitions(script)["Args"], re.MULTILINE)
    assert {name for name, *_ in lines} == MODULES[script].Args.__dataclass_fields__.keys()
    return {name: tuple(rest) for name, *rest in lines}


# Arguments that say what they say otherwise: of a visit, not of the run; of what is DrQ's own
SAYS_OTHERWISE = {
    "cycling": {"eval_interval", "checkpoint_interval", "learning_starts", "reset_interval", "injection_step"},
    "pixels": {"env_id", "total_timesteps", "learning_rate", "policy_frequency", "hidden_dim"},
}


@pytest.mark.parametrize(("script", "continuous", "family"), SAME_METHOD)
def test_an_argument_means_the_same_in_each_family(script, continuous, family):
    own, theirs = fields(script), fields(continuous)
    for name in own.keys() & theirs.keys():
        (kind, default, text), (their_kind, their_default, their_text) = own[name], theirs[name]
        assert kind == their_kind
        assert default == their_default or family == "pixels"
        assert text.replace("agent step", "environment step") == their_text or name in SAYS_OTHERWISE[family], name
    lacks = {"cycling": {"env_id", "total_timesteps"}, "pixels": {"policy_noise", "noise_clip", "exploration_noise"}}
    assert theirs.keys() - own.keys() == lacks[family]


def test_a_variant_is_left_out_where_a_rule_is_tested_that_it_changes(monkeypatch):
    monkeypatch.setitem(OTHER_RULES, "ne_td3_continuous", {"scheduled_growth"})
    schedule, both = scripts_with("scheduled_growth"), scripts_with("grow_", "scheduled_growth")
    assert schedule and both == schedule and "ne_td3_continuous" not in schedule
    assert "ne_td3_continuous" in scripts_with("grow_", "MaskedLinear")


def test_no_script_imports_one_of_ours():
    ours = set(MODULES) | {"harness", "baselines", "benchmark"}
    for paths in FAMILIES.values():
        for path in paths:
            tree = ast.parse((ROOT / path).read_text())
            imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
            assert not imported & ours


# ===== Sizes =====

# All lines, and lines of code, at most
SIZES = {
    "baselines/td3_continuous.py": (350, 270),
    "ne_td3_continuous.py": (610, 430),
    "baselines/td3_cycling.py": (450, None),
    "ne_td3_cycling.py": (700, None),
    "baselines/drq_pixels.py": (540, None),
    "ne_drq_pixels.py": (780, None),
}
# Lines of a method's fences, blank ones and the fences themselves included, at most
OWN_LINES = dict.fromkeys(["weight_decay", "leaky_relu", "spectral_norm"], 15)
OWN_LINES |= dict.fromkeys(["l2_init", "crelu", "nap", "hare_tortoise", "shrink_perturb"], 35)
OWN_LINES |= dict.fromkeys(["regrama", "two_hot", "ne_layer_norm"], 60)
DOCSTRING, PAGE = 12, 250  # lines at most of the docstring at a script's top, and of a page


def docstrings(tree):
    """The line numbers of all docstrings."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    first = [node.body[0] for node in ast.walk(tree) if isinstance(node, kinds) and ast.get_docstring(node) is not None]
    return {line for text in first for line in range(text.lineno, text.end_lineno + 1)}


def lines_of_code(text):
    """How many lines have a token that is no comment and no docstring."""
    nothing = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type not in nothing]
    code = {line for token in tokens for line in range(token.start[0], token.end[0] + 1)}
    return len(code - docstrings(ast.parse(text)))


def test_lines_of_code_are_counted_without_comments_docstrings_and_blanks():
    text = (
        '"""A\n\nB"""\n\nimport re  # c\n\n# d\n\n\ndef f(\n    a,\n):\n    """E"""\n    x = """\n\n"""\n    return x\n'
    )
    assert lines_of_code(text) == 1 + 3 + 3 + 1


@pytest.mark.parametrize("path", SIZES)
def test_a_script_is_no_longer_than_it_may_be(path):
    text, (lines, code) = (ROOT / path).read_text(), SIZES[path]
    assert len(text.splitlines()) <= lines
    assert code is None or lines_of_code(text) <= code


@pytest.mark.parametrize(("child", "parent"), [pair for pair in CHILDREN if pair[0] not in SIZES])
def test_a_baseline_is_as_long_as_its_parent_and_its_own_lines(child, parent):
    texts = [(ROOT / path).read_text() for path in (child, parent)]
    lines, docs = [len(text.splitlines()) for text in texts], [ast.parse(text).body[0].end_lineno for text in texts]
    assert docs[0] <= DOCSTRING
    fenced = lines[0] - docs[0] - len(without_fences(without_docstring(texts[0]), fences(texts[1])).splitlines())
    changed = sum(own.count("\n") - theirs.count("\n") for own, theirs, _ in intended(child, parent))
    assert lines[0] - docs[0] <= lines[1] - docs[1] + fenced + changed
    assert fenced <= OWN_LINES.get(method(child, parent), fenced)


def test_a_page_is_no_longer_than_it_may_be():
    pages = [path.relative_to(ROOT) for path in ROOT.rglob("*.md")]
    pages = [path for path in pages if not any("results" in part or part[0] == "." for part in path.parts)]
    assert Path("README.md") in pages
    lengths = {str(path): len((ROOT / path).read_text().splitlines()) for path in pages}
    assert not {path: length for path, length in lengths.items() if length > PAGE}
