"""The commands and the Python code of README.md run as written, with fewer steps; links of the documentation exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, forked

import lit_gpt.training.profiler

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = {
    "fit.py": [
        *("--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.accelerator", "cpu"),
        *("--data.eval_windows", "2", "--generate.max_new_tokens", "4"),
    ],
    "generate.py": ["--max_new_tokens", "8"],
    "bench.py": ["--turns", "1", "--steps", "1", "--warm_up", "1"],
}

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def commands() -> list[str]:
    """Return every line of a shell block that runs one of our scripts, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if "scripts/" in line]


def hurry() -> None:
    """Make a preflight measure for a moment only."""
    for name in ("STEP_SECONDS", "VALIDATION_SECONDS", "TEXT_SECONDS", "SLOPE_SECONDS"):
        setattr(lit_gpt.training.profiler, name, 0.0)


def test_commands_run_one_after_another(tmp_path: Path) -> None:
    (tmp_path / "poems.csv").write_text(
        "title,author,text\n" + "".join(f'题{i},李白,"床前明月光，\n疑是地上霜。"\n' for i in range(200)),
        encoding="utf-8",
    )
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert len(commands()) >= 6
    for number, command in enumerate(commands()):
        program, script, *words = shlex.split(command)
        assert program in ("python", ".venv/bin/python")
        assert Path(script).parent.name == "scripts"
        short = [] if "validate" in words else SHORT.get(Path(script).name, [])
        # The first command starts as a person starts it. --compare trains vocabularies in threads of a Rust library,
        # which do not survive a fork of this process if an earlier test has started them here.
        if number == 0 or "--compare" in words:
            line = [sys.executable, str(ROOT / script), *words, *short]
            ran = subprocess.run(line, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
            assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        else:
            result = forked(tmp_path, *words, *short, prepare=hurry, script=Path(script).name)
            assert result.status == 0, f"{command}\n{result.err}"


def test_python_code_runs(tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    small = ["--name", "poems", "--data.files", "rows.txt", "--data.tokenizer", "byte", *SHORT["fit.py"]]
    (tmp_path / "rows.txt").write_text("one row\n" * 200)
    (tmp_path / "poems.csv").write_text("text\n" + "one row\n" * 400)
    assert forked(tmp_path, *small).status == 0
    assert len(programs) == 2
    for program in programs:
        line = [sys.executable, "-c", program]
        result = subprocess.run(line, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip()


def test_make_goals_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for goal in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{goal}:", makefile, flags=re.MULTILINE), goal


PAGES = ["README.md", "README.zh-CN.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/performance.md"]
PAGES += ["docs/security.md", "docs/encodings.md"]


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_exist(name: str) -> None:
    path = ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)[^):]*\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_every_promise_of_the_page_on_security_names_tests_that_exist() -> None:
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    section = page.partition("## What is promised")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| **")]
    assert len(rows) >= 8
    for row in rows:
        named = re.findall(r"`(test_\w+|tests/\w+\.py)`", row.rpartition(" | ")[2])
        assert any(name.startswith("test_") for name in named), row
        path = ROOT
        for name in named:
            if name.endswith(".py"):
                path = ROOT / name
                assert path.is_file(), name
            else:
                assert f"\ndef {name}(" in path.read_text(encoding="utf-8"), f"{path} has no {name}"
