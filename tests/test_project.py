"""The project around the scripts: requirements, pages, citation."""

import difflib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import tyro
from harness import (
    CYCLING,
    FAMILIES,
    MODULES,
    NE,
    PARENTS,
    PATHS,
    PIXELS,
    ROOT,
    SCRIPTS,
    events,
    load_script,
    short_args,
)
from PIL import Image
from scipy import optimize, stats

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "baselines" / "README.md", *sorted((ROOT / "benchmark").glob("*.md"))]
TEXTS = {path: path.read_text() for path in PAGES}
README = TEXTS[ROOT / "README.md"]
RESULTS = ROOT / "benchmark" / "results"


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


def commands(text):
    """The lines of a page's bash blocks, continued ones in one -> list."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```$", text)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def table(page, heading, number=0):
    """The cells of a table below a heading of a page, its two top rows aside -> list of lists."""
    section = re.split(r"(?m)^#+ ", (ROOT / page).read_text().split(f"\n## {heading}\n")[1])[0]
    lines = re.findall(r"(?m)(?:^\|.*\n)+", section)[number].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


METHODS = [
    row
    for heading in ("One task, states", "Over a cycle of tasks", "From pixels")
    for row in table("baselines/README.md", heading)
]


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
    assert sorted(block["dependencies"]) == sorted(requirements(ROOT / "requirements.txt"))


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
    assert sum(line != "" and "import" not in line for line in code.splitlines()) == 5
    assert code.count('"runs/RUN_FOLDER/models/1000000.pt"') == 1
    torch.manual_seed(0)
    actor = NE.Actor(17, torch.full((6,), -1.0), torch.full((6,), 1.0), 256)
    NE.sparse_start_(NE.masked_layers(actor), 0.25, torch.Generator().manual_seed(0))
    torch.save({"actor": actor.state_dict()}, tmp_path / "1000000.pt")

    # what follows the five lines prints what they saw (the task has not moved since) and did
    code = code.replace('"runs/RUN_FOLDER/models/1000000.pt"', repr(str(tmp_path / "1000000.pt")))
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


def test_the_readmes_two_command_lines_set_up_and_run_all_that_they_need():
    set_up = "python3 -m venv .venv && . .venv/bin/activate && pip install -r "
    assert block("start-run") == set_up + "requirements.txt && python ne_td3_continuous.py\n"
    assert block("start-test") == set_up + 'tests/requirements.txt && pytest -m "not slow" -n auto\n'


def test_the_readmes_short_run_has_events_evaluations_and_looks_at_the_neurons():
    (line,) = block("short-run").replace("\\\n", " ").splitlines()
    python, script, *words = line.split()
    assert [python, script] == ["python", "ne_td3_continuous.py"]
    args = tyro.cli(NE.Args, args=words)
    assert args.gradient_steps // args.growth_interval == 15
    assert args.gradient_steps // args.neuron_interval == 15
    assert args.total_timesteps // args.eval_interval == 4


def test_the_pages_results_are_what_the_report_draws_from_the_published_tables(tmp_path):
    report, again = load_script(ROOT / "benchmark" / "report.py"), tmp_path / "results"
    pages = [tmp_path / str(number) for number in range(len(PAGES))]
    for page, text in zip(pages, TEXTS.values(), strict=True):
        page.write_text(text)
    shutil.copytree(RESULTS, again)
    report.fill_pages(pages, again)
    for page, (path, text) in zip(pages, TEXTS.items(), strict=True):
        assert page.read_text() == text, f"{path}: run benchmark/report.py --readme"
    published = {path.parent.name for path in RESULTS.glob("*/runs.csv")}
    shown = {name for text in TEXTS.values() for name in re.findall(r"<!-- report (\S+) ", text)}
    linked = set(re.findall(r"\(results/(\w+)/report\.md\)", TEXTS[ROOT / "benchmark" / "README.md"]))
    assert shown <= published == linked
    tables = {name for text in TEXTS.values() for name in re.findall(r"<!-- table (\S+) ", text)}
    assert tables == {path.stem for path in RESULTS.glob("*.csv")}
    for name in published - shown:
        report.draw(again / name)
    for name in published:
        assert {path.name for path in (RESULTS / name).iterdir()} == {path.name for path in (again / name).iterdir()}
        for path in (RESULTS / name).iterdir():
            assert same_file(path, again / name / path.name), f"{path}: run benchmark/report.py {RESULTS / name}"


def same_file(path, other):
    """Whether two files are the same to the byte, or two pictures nearly so and of the same data."""
    if path.suffix != ".png":
        return path.read_bytes() == other.read_bytes()
    ours, new = Image.open(path), Image.open(other)
    if ours.info.get("Data") != new.info.get("Data") or ours.size != new.size:
        return False
    return np.abs(np.asarray(ours.convert("L"), float) - np.asarray(new.convert("L"), float)).mean() < 1


def test_the_readmes_picture_is_drawn_from_the_published_curves(tmp_path):
    picture = load_script(ROOT / "benchmark" / "picture.py")
    picture.draw(pd.read_csv(RESULTS / "td3_100k" / "curves.csv"), tmp_path / "again.png", "HalfCheetah-v4")
    assert same_file(ROOT / "docs" / "ne_halfcheetah.png", tmp_path / "again.png"), "run benchmark/picture.py"


def test_the_readmes_three_lines_of_results_are_the_published_numbers():
    runs, curves = (pd.read_csv(RESULTS / "td3_100k" / f"{name}.csv") for name in ("runs", "curves"))
    text = " ".join(README.split("**Results so far**")[1].split("\n## ")[0].split())
    evaluations = curves[(curves["tag"] == "return") & (curves["step"] > 10_000)]  # after learning starts
    areas = {name: of.groupby("seed")["value"].mean() for name, of in evaluations.groupby("method")}
    others = "td3_continuous", "static_sparse_td3_continuous", "ne_td3_continuous grow=False"
    ne = areas["ne_td3_continuous"].to_numpy()
    td3, static, kept = (areas[name].to_numpy() for name in others)
    assert f"learning starts: {ne.mean():.0f} and {td3.mean():.0f}, difference {(ne - td3).mean():.0f} " in text
    test = stats.ttest_rel(ne, td3)
    low, high = test.confidence_interval(0.95)
    assert f"(95 % interval {low:.0f} to {high:.0f})" in text and test.pvalue > 0.05
    t = stats.t.ppf(0.975, 4)
    shift = optimize.brentq(lambda x: stats.nct.sf(t, 4, x) - 0.8, 2, 6)
    told = shift * (ne - td3).std(ddof=1) / 5**0.5
    assert f"would have shown one of {told:.0f} in 80 % of cases." in text
    assert f"network ({static.mean():.0f})" in text and stats.ttest_rel(ne, static).pvalue > 0.05
    assert f"NE without growth is behind ({kept.mean():.0f})" in text and stats.ttest_rel(ne, kept).pvalue < 0.01
    assert runs["steps"].eq(100_000).all() and len(ne) == 5

    long, published = (pd.read_csv(RESULTS / "td3_1m" / f"{name}.csv", comment="#") for name in ("curves", "published"))
    last = long[(long["tag"] == "return") & (long["step"] > 900_000)].groupby("method")["value"].agg(["size", "mean"])
    assert last["size"].eq(20).all() and long.groupby("method")["seed"].nunique().eq(2).all()
    means = [
        *last.loc[["ne_td3_continuous", "td3_continuous"], "mean"],
        published.query("step > 900_000")["mean"].mean(),
    ]
    assert "two seeds of each" in text
    assert "over the last ten evaluations NE {:.0f}, TD3 {:.0f}, published TD3 {:.0f};".format(*means) in text
    whole = long[(long["tag"] == "return") & (long["step"] > 25_000)].groupby("method")["value"].mean()
    assert "over all of training {:.0f} and {:.0f}.".format(*whole[["ne_td3_continuous", "td3_continuous"]]) in text
    probed = pd.read_csv(RESULTS / "probe_1m" / "probe.csv")
    ends = probed[probed["step"] == 1_000_000]
    assert len(ends) == 12 and (ends["loss"] < ends["fresh_dense_loss"].fillna(ends["fresh_loss"])).all()


def markdown_rows(text):
    """The rows of a text's first table -> list of lists of cells."""
    first = re.findall(r"(?m)(?:^\|.*\n)+", text)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in first.splitlines()[2:]]


# whose tags a row of the README's table is about, by the end of its last column
SPARSE = ("ne_", "static_sparse_td3_continuous", "rigl_td3_continuous")
OWNERS = {", sparse networks": SPARSE, ", NE": ("ne_",), ", ReDo": ("redo_",), ", Reset": ("reset_",)}
OWNERS |= {", ReGraMa": ("regrama_",), ", Shrink & Perturb": ("shrink_perturb_",)}
OWNERS |= {", Injection": ("injection_",), ", RigL": ("rigl_",), ", cycling": tuple(CYCLING)}


def logged_tags(folder):
    """The tags of a run's log, as the pages write them -> set."""
    shortened = {"/(actor|qf1|qf2)(?=/|_recycled)": "/<net>", r"layer\d$": "layer<l>", "critic_parts": "actor_parts"}
    shortened |= {"/Pendulum-v1/": "/<task>/"}
    logged = set(events(folder))
    for pattern, short in shortened.items():
        logged = {re.sub(pattern, short, tag) for tag in logged}
    return logged


def explained_tags(script):
    """The tags that the pages' tables have for a script -> set."""
    rows = [(tag.strip("`"), when) for tag, _, when in table("docs/logs.md", "Tags")]
    assert len(rows) == len(set(rows))
    owners = {tag: next((own for end, own in OWNERS.items() if when.endswith(end)), ("",)) for tag, when in rows}
    tags = {tag for tag, own in owners.items() if script.startswith(own)}
    return tags | ({tag.strip("`") for tag, *_ in table("docs/pixels.md", "Tags")} if script in PIXELS else set())


@pytest.mark.parametrize("script", SCRIPTS | CYCLING)
def test_the_pages_explain_exactly_the_tags_that_are_logged(script):
    often = {"redo_interval": 100, "reset_interval": 300, "rigl_interval": 100, "regrama_interval": 100}
    often |= {"shrink_perturb_interval": 300}
    folder = MODULES[script].main(short_args(script, eval_interval=300, eval_episodes=1, **often))
    assert logged_tags(folder) == explained_tags(script)
    rows = [row[0].strip("`").split("/")[0] for row in table("docs/logs.md", "The run's folder")]
    assert all(any(fnmatch(path.name, row) for row in rows) for path in folder.iterdir())


def test_the_readmes_tags_are_those_of_the_page_about_logs():
    short = {tag for row in table("README.md", "What you see") for tag in re.findall(r"`([^`]+)`", row[0])}
    assert short <= {row[0].strip("`") for row in table("docs/logs.md", "Tags")}


def test_what_the_audit_table_names_exists():
    rows = table("docs/audit.md", "Audit table")
    assert len(rows) >= 20
    for *details, names in rows:
        assert len(details) == 5 and all(details)
        assert re.search(r"\]\([\w./]+#[\w-]+\)", details[-1]), f"no link to a section: {details}"
        for name in re.findall(r"`([^`]+)`", names) or pytest.fail(f"no function: {details}"):
            assert (ROOT / name).is_file() if name.endswith(".py") else hasattr(NE, name), name


def test_what_the_readmes_list_of_rules_and_the_list_of_names_name_exists():
    rows = [row[1] for row in table("README.md", "Make your own method")]
    rows += [row[0] for row in table("docs/algorithm.md", "11. Names")]
    names = {name for row in rows for name in re.findall(r"`(\w+)[(`]", row)}
    assert len(names) >= 12 and all(hasattr(NE, name) for name in names)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_argument_that_a_page_names_exists(page):
    others = r"(tensorboard --logdir|ray start --head|ray start --address|pip install|uv run).*"  # other programs'
    text = re.sub(others, "", TEXTS[page])
    flags = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])", text)}
    fields = {name for module in MODULES.values() for name in module.Args.__dataclass_fields__}
    known = fields | {f"no_{name}" for name in fields}
    for path in (ROOT / "benchmark").glob("*.py"):
        known |= {flag.replace("-", "_") for flag in re.findall(r'add_argument\(\s*"--([\w-]+)"', path.read_text())}
    assert flags - known <= {"help"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_of_a_page_names_a_file_and_arguments_that_it_has(page):
    for line in commands(TEXTS[page]):
        for found in re.finditer(r"(?:python|uv run) ((?:\w+/)?\w+\.py)([^&;|]*)", line):
            assert (ROOT / found[1]).is_file(), line
            words = [word for word in found[2].replace("$seed", "1").split() if "$" not in word]
            if Path(found[1]).stem in MODULES and "runs/RUN_FOLDER" not in words:
                tyro.cli(MODULES[Path(found[1]).stem].Args, args=words)


def anchors(text):
    """What the headings of a page are linked by -> set."""
    text = re.sub(r"(?ms)^```.*?^```$", "", text)
    words = [heading.lower() for heading in re.findall(r"(?m)^#+ (.+)$", text)]
    return {re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", TEXTS[page])
    assert page == PAGES[0] or "README.md" in page.name or any("README.md" in link for link in links)
    for link in links:
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page}: {link}"


def test_every_page_is_found_from_the_readme():
    links = {(ROOT / link.partition("#")[0]).resolve() for link in re.findall(r"\]\(([^)\s]+)\)", README)}
    assert set(PAGES[1:]) <= links


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_page_is_at_most_120_columns_wide_but_for_its_tables_and_what_is_generated(page):
    text = re.sub(r"(?ms)^<!-- report .*?^<!-- end report -->$", "", TEXTS[page])
    assert not [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]


def test_the_algorithm_has_every_section_and_all_that_a_script_refers_to():
    sections = re.findall(r"(?m)^## (\d+)\. ", TEXTS[ROOT / "docs" / "algorithm.md"])
    assert sections == [str(number) for number in range(1, 12)]
    for path in PATHS.values():
        for numbers in re.findall(r"\(sections? ([\d, and]+)\)", path.read_text()):
            assert set(re.findall(r"\d+", numbers)) <= set(sections), path


def test_the_pages_name_every_script():
    paths = {path for paths in FAMILIES.values() for path in paths}
    assert sorted(row[0].strip("`") for row in METHODS) == sorted(paths)
    assert {path for path in paths if "/" not in path} <= set(re.findall(r"`(\w+\.py)`", README))


def test_the_table_of_methods_gives_the_length_of_each_ones_diff():
    for path, *_, lines in METHODS:
        path = path.strip("`")
        parent = PARENTS.get(path) or next(paths[0] for paths in FAMILIES.values() if path in paths)
        texts = [(ROOT / name).read_text().splitlines() for name in (parent, path)]
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
