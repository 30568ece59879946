"""The project around the scripts: requirements, README, citation."""

import difflib
import json
import re
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from harness import CYCLING, FAMILIES, MODULES, NE, PATHS, PIXELS, ROOT, SCRIPTS, events, load_script, short_args
from PIL import Image

README = (ROOT / "README.md").read_text()


def requirements(path):
    """A requirements file -> its lines, without comments and blank ones."""
    lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    return [line for line in lines if line]


def metadata(path):
    """A script's inline metadata, read as PEP 723 says -> dict."""
    blocks = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", path.read_text())
    assert len(blocks) == 1
    return tomllib.loads("\n".join(line[2:] for line in blocks[0].splitlines()))


def block(marker):
    """The README's code block right below <!-- marker --> -> its text."""
    blocks = re.findall(rf"(?ms)^<!-- {marker} -->\n```\w+\n(.*?)^```$", README)
    assert len(blocks) == 1
    return blocks[0]


def table(heading, number=0):
    """The cells of a table below a heading of the README, its two top rows aside -> list of lists."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"(?m)(?:^\|.*\n)+", section)[number].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


METHODS = table("Methods") + table("A cycle of tasks") + table("From pixels")


def project_files():
    """The files of the project, without those that git ignores -> list of paths."""
    if (ROOT / ".git").exists():
        listed = subprocess.run(
            ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        if listed.returncode == 0:
            return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    ours = [name for name in ROOT.iterdir() if name.name not in (".git", ".venv", "runs", "wandb")]
    files = [path for name in ours for path in ([name] if name.is_file() else name.rglob("*")) if path.is_file()]
    return [path for path in files if not re.search(r"__pycache__|_cache/", path.as_posix())]


@pytest.mark.parametrize("script", MODULES)
def test_a_scripts_inline_metadata_equals_requirements_txt(script):
    block = metadata(PATHS[script])
    assert block["requires-python"] == ">=3.11"
    assert len(block["dependencies"]) == len(set(block["dependencies"]))
    needed = [line for line in requirements(ROOT / "requirements.txt") if not line.startswith("matplotlib")]
    if "import matplotlib" in (text := PATHS[script].read_text()) or "from matplotlib" in text:  # for its picture
        needed.append(next(line for line in requirements(ROOT / "requirements.txt") if line.startswith("matplotlib")))
    assert sorted(block["dependencies"]) == sorted(needed)


@pytest.mark.parametrize(
    ("folder", "base"),
    [("", None), ("benchmark", "-r ../requirements.txt"), ("tests", "-r ../benchmark/requirements.txt")],
)
def test_requirements_are_pinned_and_build_on_those_of_the_scripts(folder, base):
    lines = requirements(ROOT / folder / "requirements.txt")
    if base:
        assert lines.pop(0) == base
    pinned = r"[a-z][\w-]*(\[[\w-]+\])?==\d+(\.\d+)+(; python_version < '3\.\d+')?"
    assert lines and all(re.fullmatch(pinned, line, re.IGNORECASE) for line in lines)


def test_the_readmes_five_lines_load_a_model_and_act(tmp_path):
    code = block("load-model")
    assert sum(line != "" for line in code.splitlines()) == 5
    assert code.count('"runs/RUN_FOLDER/model.pt"') == 1
    torch.manual_seed(0)
    actor = NE.Actor(17, np.full(6, -1.0), np.full(6, 1.0), 256)
    NE.sparse_start_(NE.masked_layers(actor), 0.25, torch.Generator().manual_seed(0))
    torch.save({"actor": actor.state_dict()}, tmp_path / "model.pt")

    # what follows the five lines prints what they saw (the task has not moved since) and did
    code = code.replace('"runs/RUN_FOLDER/model.pt"', repr(str(tmp_path / "model.pt")))
    code += "import json\nprint(json.dumps([env.unwrapped._get_obs().tolist(), action.tolist()]))\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    obs, action = (np.array(values) for values in json.loads(done.stdout.splitlines()[-1]))

    state = {name: value.numpy().astype(np.float64) for name, value in actor.state_dict().items()}
    h = obs
    for layer in ("fc1", "fc2"):
        h = np.maximum(0, state[f"{layer}.weight"] @ h + state[f"{layer}.bias"])
    expected = np.tanh(state["fc3.weight"] @ h + state["fc3.bias"])  # HalfCheetah's actions lie in [-1, 1]
    assert action.shape == (6,) and np.abs(action).max() <= 1
    np.testing.assert_allclose(action, expected, atol=1e-5)


def test_the_readmes_start_blocks_set_up_and_run_all_that_they_need():
    run, tests = block("start-run").splitlines(), block("start-test").splitlines()
    set_up = ["python3 -m venv .venv", ". .venv/bin/activate"]
    assert run == [*set_up, "pip install -r requirements.txt", "python ne_td3_continuous.py --env-id HalfCheetah-v4"]
    assert tests == [*set_up, "pip install -r tests/requirements.txt", 'python -m pytest -m "not slow" -n auto']


def test_the_readmes_results_are_what_the_report_draws_from_the_published_tables(tmp_path):
    report, results = load_script(ROOT / "benchmark" / "report.py"), ROOT / "benchmark" / "results"
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copytree(results, tmp_path / "results")
    report.fill_readme(tmp_path / "README.md", tmp_path / "results")
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text(), "run benchmark/report.py --readme"
    drawn = [path for table in sorted(results.glob("*/runs.csv")) for path in sorted(table.parent.iterdir())]
    assert {path.parent.name for path in drawn} == set(
        re.findall(r"<!-- report (\S+) ", (ROOT / "README.md").read_text())
    )
    for folder in {path.parent for path in drawn}:
        again = tmp_path / folder.relative_to(results.parent)
        assert {path.name for path in folder.iterdir()} == {path.name for path in again.iterdir()}
    for path in drawn:
        again = tmp_path / path.relative_to(results.parent)
        if path.suffix == ".png":
            ours, new = Image.open(path), Image.open(again)
            assert ours.info["Data"] == new.info["Data"] and ours.size == new.size, path
            assert np.abs(np.asarray(ours.convert("L"), float) - np.asarray(new.convert("L"), float)).mean() < 1, path
        else:
            assert path.read_bytes() == again.read_bytes(), path


# whose tags a row of the README's table is about, by the end of its last column
SPARSE = ("ne_", "static_sparse_td3_continuous", "rigl_td3_continuous")
OWNERS = {", sparse networks": SPARSE, ", NE": ("ne_",), ", ReDo": ("redo_",), ", Reset": ("reset_",)}
OWNERS |= {", Injection": ("injection_",), ", RigL": ("rigl_",), ", cycling": tuple(CYCLING)}


def logged_tags(folder):
    """The tags of a run's log, as the README writes them -> set."""
    shortened = {"/(actor|qf1|qf2)(?=/|_recycled)": "/<net>", r"layer\d$": "layer<l>", "critic_parts": "actor_parts"}
    shortened |= {"/Pendulum-v1/": "/<task>/"}
    logged = set(events(folder))
    for pattern, short in shortened.items():
        logged = {re.sub(pattern, short, tag) for tag in logged}
    return logged - {"hyperparameters/text_summary"}


def explained_tags(script):
    """The tags that the README's tables have for a script -> set."""
    rows = [(tag.strip("`"), when) for tag, _, when in table("What you see")]
    assert len(rows) == len(set(rows))
    owners = {tag: next((own for end, own in OWNERS.items() if when.endswith(end)), ("",)) for tag, when in rows}
    tags = {tag for tag, own in owners.items() if script.startswith(own)}
    return tags | ({tag.strip("`") for tag, *_ in table("From pixels", 1)} if script in PIXELS else set())


@pytest.mark.parametrize("script", SCRIPTS | CYCLING)
def test_the_readme_explains_exactly_the_tags_that_are_logged(script):
    often = {"redo_interval": 100, "reset_interval": 300, "rigl_interval": 100}
    folder = MODULES[script].main(short_args(script, eval_interval=300, eval_episodes=1, **often))
    assert logged_tags(folder) == explained_tags(script)


def test_what_the_audit_table_names_exists():
    rows = table("Audit table")
    assert len(rows) >= 20
    for *details, names in rows:
        assert len(details) == 4 and all(details)
        for name in re.findall(r"`([^`]+)`", names) or pytest.fail(f"no function: {details}"):
            assert (ROOT / name).is_file() if "/" in name else hasattr(NE, name), name


def test_every_argument_that_the_readme_names_exists():
    others = r"(tensorboard --logdir|ray start --head|python benchmark/).*"  # other programs' arguments
    text = re.sub(others, "", README)
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])", text)}
    fields = {name for module in MODULES.values() for name in module.Args.__dataclass_fields__}
    known = fields | {f"no_{name}" for name in fields}
    for path in (ROOT / "benchmark").glob("*.py"):
        known |= {flag.replace("-", "_") for flag in re.findall(r'add_argument\(\s*"--([\w-]+)"', path.read_text())}
    assert flags - known == {"help"}


def test_the_readme_has_every_section_that_a_script_refers_to():
    sections = set(re.findall(r"(?m)^### (\d+)\. ", README))
    for path in PATHS.values():
        for numbers in re.findall(r"\(sections? ([\d, and]+)\)", path.read_text()):
            assert set(re.findall(r"\d+", numbers)) <= sections, path


def test_the_readme_names_every_script():
    paths = [path for paths in FAMILIES.values() for path in paths]
    assert sorted(row[0].strip("`") for row in METHODS) == sorted(paths)


def test_the_readme_gives_the_length_of_each_methods_diff():
    for path, *_, lines in METHODS:
        parent = next(paths[0] for paths in FAMILIES.values() if path.strip("`") in paths)
        texts = [(ROOT / name).read_text().splitlines() for name in (parent, path.strip("`"))]
        common = sum(
            match.size for match in difflib.SequenceMatcher(None, *texts, autojunk=False).get_matching_blocks()
        )
        # diff and difflib may match a few lines differently
        assert abs(len(texts[0]) + len(texts[1]) - 2 * common - int(lines)) <= 12, path


def test_the_citation_names_the_software_and_both_papers():
    text = (ROOT / "CITATION.cff").read_text()
    own, references = text.split("\nreferences:\n")
    for key in ("cff-version: 1.2.0", "message: ", "type: software", "title: ", "authors:", "license: MIT"):
        assert sum(line.startswith(key) for line in own.splitlines()) == 1, key
    assert '  - name: "the contributors of this repository"' in own
    papers = re.split(r"(?m)^  - ", references)[1:]
    for paper, title, arxiv, names in zip(
        papers,
        ("Neuroplastic Expansion in Deep Reinforcement Learning", "Addressing Function Approximation Error in"),
        ("2410.07994", "1802.09477"),
        (["Liu", "Obando-Ceron", "Courville", "Pan"], ["Fujimoto", "Hoof", "Meger"]),
        strict=True,
    ):
        assert paper.startswith("type: conference-paper\n")
        assert f'    title: "{title}' in paper and f'value: "arXiv:{arxiv}"' in paper
        assert re.findall(r"family-names: (.+)", paper) == names
    assert "Copyright (c) 2026 the contributors of this repository" in (ROOT / "LICENSE").read_text()


def test_no_file_names_a_path_of_one_machine():
    files = project_files()
    assert {ROOT / "README.md", *PATHS.values()} <= set(files)
    pattern = re.compile(r"(?<![\w./<>~-])/(?:work|root|home|opt|mnt|Users)\b(?=[/\s\"'`):,;.]|$)")
    for path in files:
        text = path.read_bytes().decode("utf-8", errors="ignore")
        if "\0" not in text:  # not a picture
            found = pattern.search(text)
            assert found is None, f"{path}: {found}"
