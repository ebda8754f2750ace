"""The pages of the course name functions that exist, and their experiments are those of docs/experiments.py."""

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

from lit_gpt.runs.summary import RunSummary

PAGES = {"en": ROOT / "docs" / "course.md", "zh": ROOT / "docs" / "zh" / "course.md"}
CLAIMS = json.loads((ROOT / "docs" / "experiments.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/experiments.py as a module."""
    spec = importlib.util.spec_from_file_location("experiments", ROOT / "docs" / "experiments.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["experiments"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def defined_names(path: Path) -> set[str]:
    """Return the functions, classes and methods that a file defines, as `f`, `C` and `C.f`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


def sections(page: Path) -> dict[str, str]:
    """Return the sections of the experiments by their names, which stand in the anchor before each heading."""
    parts = re.split(r'<a id="(\w+)"></a>', page.read_text(encoding="utf-8"))
    return dict(zip(parts[1::2], parts[2::2]))


@pytest.mark.parametrize("language", PAGES)
def test_every_linked_function_is_defined_in_the_linked_file(language: str) -> None:
    page = PAGES[language]
    links = re.findall(r"\[`([\w.]+)`\]\(([^)]+\.py)\)", page.read_text(encoding="utf-8"))
    assert len(links) > 25
    for name, target in links:
        assert name in defined_names(page.parent / target), f"{target} has no {name}"


def test_both_pages_link_to_the_same_functions_and_have_the_same_programs() -> None:
    texts = [page.read_text(encoding="utf-8") for page in PAGES.values()]
    links = [re.findall(r"\[`([\w.]+)`\]\((?:\.\./)+(lit_gpt/[^)]+\.py)\)", text) for text in texts]
    assert sorted(links[0]) == sorted(links[1])
    programs = [re.sub(r" *#.*", "", "".join(re.findall(r"```python\n(.*?)```", text, re.S))) for text in texts]
    assert programs[0] == programs[1]


@pytest.mark.parametrize("language", PAGES)
def test_experiments_of_the_page_are_those_of_the_script(language: str, script: ModuleType) -> None:
    found = sections(PAGES[language])
    assert list(found) == list(script.EXPERIMENTS) == list(CLAIMS)
    for name, section in found.items():
        blocks = "".join(re.findall(r"```bash\n(.*?)```", section, re.S)).replace("\\\n    ", "")
        commands = script.EXPERIMENTS[name].commands or [f"python docs/experiments.py {name}"]
        assert blocks.splitlines() == commands, name
        assert f"images/experiment_{name}.svg" in section
        rows = re.findall(r"\| (-?[\d.]+) \| ±([\d.]+) \|$", section, re.M)
        claims = [(claim["claimed"], claim["within"]) for claim in CLAIMS[name]["outcomes"].values()]
        assert [(float(value), float(within)) for value, within in rows] == claims, name


@pytest.mark.parametrize("name", CLAIMS)
def test_the_last_run_of_every_experiment_is_as_claimed(name: str) -> None:
    experiment = CLAIMS[name]
    assert experiment["minutes"] > 0
    for outcome, claim in experiment["outcomes"].items():
        assert abs(claim["measured"] - claim["claimed"]) <= claim["within"], outcome


def test_well_formed_counts_the_names_of_the_built_in_table(script: ModuleType) -> None:
    names = [row[1] for row in script.generate_rows(50)]
    assert script.well_formed(names) == 1
    assert script.well_formed([names[0], names[0][:-1], "", names[1] + " "]) == 0.25


def test_finished_runs_are_not_repeated_and_others_are_not_measured(tmp_path: Path, script: ModuleType) -> None:
    command = "python scripts/fit.py --name a"
    run = tmp_path / "logs" / "a" / "version_0"
    run.mkdir(parents=True)
    RunSummary("a", str(run), "stopped").write(run)
    with pytest.raises(SystemExit, match="was not trained to its end"):
        script.run_command(command, tmp_path, 1)
    RunSummary("a", str(run), "finished").write(run)
    script.run_command(command, tmp_path, 1)
    (tmp_path / "logs" / "without_zero_grad").mkdir()
    script.train_without_zero_grad(tmp_path, 1)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["summary.json"]


@pytest.mark.parametrize(("value", "holds"), [(1.1, True), (1.3, False), (float("nan"), False)])
def test_outcome_that_is_not_as_claimed_fails(
    tmp_path: Path, script: ModuleType, monkeypatch: pytest.MonkeyPatch, value: float, holds: bool
) -> None:
    experiment = script.Experiment("?", [], lambda folder: {"loss": value}, lambda axes, folder: None)
    monkeypatch.setitem(script.EXPERIMENTS, "new", experiment)
    claims = {"outcomes": {"loss": {"claimed": 1.0, "within": 0.2}}}
    assert script.run_experiment("new", tmp_path, 1, claims) is holds


def test_texts_of_the_experiments(tmp_path: Path, script: ModuleType) -> None:
    script.write_texts(tmp_path)
    table = {row[1] for row in script.generate_rows()}
    names = ("chinese", "few", "keys")
    chinese, few, keys = ((tmp_path / f"{name}.txt").read_text(encoding="utf-8").splitlines() for name in names)
    assert len(few) == 200
    assert 11_000 < len(chinese) < 13_000
    assert set(chinese) | set(few) <= table
    assert not any(re.match("[A-Z][a-z]", name) for name in chinese)
    assert {(len(line), line[0] == line[-1]) for line in keys} == {(28, True)}
