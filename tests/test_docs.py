"""Commands, code and links of the documentation: those of README.md run; all others have run, and still parse."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import DEFAULT, ROOT, forked
from docs_commands import NOTES, Block, few_steps, make_folder, noted_commands, pages, read_blocks

import lit_gpt.training.profiler
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.parser import StrictParser, build_parser, limit_imports, limit_parser, parse_settings

PAGES = {page.relative_to(ROOT).as_posix(): page for page in pages()}
MARKDOWN = {**PAGES, "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md"}
LANGUAGES = {"bash", "powershell", "python", "text", "yaml", "json", "dockerfile", "csv"}
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def hurry() -> None:
    """Make a preflight measure for a moment only."""
    for name in ("STEP_SECONDS", "VALIDATION_SECONDS", "TEXT_SECONDS", "SLOPE_SECONDS"):
        setattr(lit_gpt.training.profiler, name, 0.0)


def script_words(command: str) -> tuple[str, list[str]] | None:
    """Return the name of the script of ours that a command runs, and its arguments; None if it runs none."""
    command = re.split(r" (?=[|>&;])", command.replace("scripts\\", "scripts/"), maxsplit=1)[0]
    words = shlex.split(command.replace("$DATA", "--data.files x.csv"))
    for number, word in enumerate(words):
        if re.fullmatch(r"scripts/\w+\.py", word):
            return word.removeprefix("scripts/"), words[number + 1 :]
    return None


# ------------------------------------------------------------------------------------------------ docs_commands.py


def test_commands_are_lines_without_comments_and_with_their_continuations() -> None:
    text = "one \\\n    two  # why\n# a remark\n\nthree '#4' --five '#'\n"
    assert Block("bash", text).commands() == ["one two", "three '#4' --five '#'"]
    assert Block("bash", "cat > a <<'END'\nb\nEND\n").commands() == ["cat > a <<'END'\nb\nEND"]


def test_marks_before_a_block_belong_to_it_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marked = "<!-- not run: no -->\n<!-- before: b -->\n```bash\nx\n```\n"
    page.write_text(f"{marked}<!-- full -->\n\n 1. y\n   ```bash\n   z\n   ```\n")
    assert read_blocks(page) == [Block("bash", "x\n", not_run="no", before=["b"]), Block("bash", "z\n")]
    assert noted_commands(page) == {"x": "no", "z": ""}


def test_few_steps_are_added_where_the_command_ends() -> None:
    fit = "python scripts/fit.py --name a"
    assert few_steps(f"{fit} | tail -1") == f"{few_steps(fit)} | tail -1"
    assert "--trainer.max_steps 4" in few_steps(fit)
    assert "--trainer.max_steps 8" in few_steps(f"{fit} --ckpt_path last")
    assert few_steps(f"{fit} --budget 3m") == few_steps(fit)
    plan = "python scripts/fit.py --budget 3m --plan"
    for unchanged in (
        plan,
        "python scripts/fit.py validate",
        "python scripts/fit.py --help",
        "tensorboard --logdir logs",
    ):
        assert few_steps(unchanged) == unchanged


# -------------------------------------------------------------------------------------------------- README.md runs


def test_commands_of_readme_run_one_after_another(tmp_path: Path) -> None:
    make_folder(tmp_path)
    blocks = [block for block in read_blocks(PAGES["README.md"]) if block.language == "bash" and not block.not_run]
    commands = [few_steps(command) for block in blocks for command in block.commands()]
    found = [words for command in commands if (words := script_words(command))]
    assert len(found) >= 3
    for number, (script, words) in enumerate(found):
        if number == 0:  # the first command starts as a person starts it
            line = [sys.executable, f"scripts/{script}", *words]
            ran = subprocess.run(line, cwd=tmp_path, env=ONE_THREAD, capture_output=True, text=True, timeout=120)
            assert ran.returncode == 0, f"{words}\n{ran.stderr}"
        else:
            result = forked(tmp_path, *words, prepare=hurry, script=script)
            assert result.status == 0, f"{words}\n{result.err}"


def test_make_goals_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    goals = [
        command.split()[1] for page in PAGES.values() for command in noted_commands(page) if command[:5] == "make "
    ]
    for goal in goals:
        assert re.search(rf"^{goal}:", makefile, flags=re.MULTILINE), goal


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (
        [command for block in read_blocks(PAGES[name]) if block.language == "bash" for command in block.commands()]
        for name in ("README.md", "README.zh-CN.md")
    )
    assert chinese == english


@pytest.mark.parametrize(("name", "limit"), [("README.md", 120), ("README.zh-CN.md", 130)])
def test_readme_is_short_and_counts_lines_of_code_rightly(name: str, limit: int) -> None:
    lines = PAGES[name].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= limit
    files = [match for line in lines if (match := re.match(r"\| \[(lit_gpt/[\w/]+\.py)\].*?\| (\d+) \|", line))]
    assert len(files) == 5
    for path, claimed in (match.groups() for match in files):
        actual = len((ROOT / path).read_text(encoding="utf-8").splitlines())
        assert int(claimed) == pytest.approx(actual, rel=0.05), path


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_figures_of_speed_are_those_of_the_page_on_performance(name: str) -> None:
    performance = PAGES["docs/performance.md"].read_text(encoding="utf-8")
    (table,) = re.findall(r"^\|.*\| LitGPT \|\n(?:\|.*\n)+", PAGES[name].read_text(encoding="utf-8"), re.MULTILINE)
    figures = re.findall(r"(?<=\| )\d[^|]*(?= \|)", table.replace("到", "to"))
    assert 5 <= len(figures) <= 10
    for figure in figures:
        assert f"| {figure} " in performance, figure


# ------------------------------------------------------------------------------------------------ all pages


@pytest.mark.parametrize("name", PAGES)
def test_every_command_has_run(name: str) -> None:
    notes = json.loads(NOTES.read_text(encoding="utf-8")).get(name, {"commands": {}})["commands"]
    assert {block.language for block in read_blocks(PAGES[name])} <= LANGUAGES
    commands = noted_commands(PAGES[name])
    advice = f"run: python tests/docs_commands.py {name}"
    assert list(notes) == list(commands), advice
    for command, not_run in commands.items():
        expected = [f"not run: {not_run}"] if not_run else ["ok", "ok with few steps"]
        assert notes[command] in expected, f"{command}: {notes[command]}: {advice}"


def test_flags_of_every_command_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = [block for page in PAGES.values() for block in read_blocks(page)]
    commands = [command for block in blocks if block.language in ("bash", "powershell") for command in block.commands()]
    lines = {(script, *words) for script, words in filter(None, map(script_words, commands))}
    assert len(lines) >= 10
    limit_parser()
    limit_imports([])
    parser = build_parser("fit", "docs")
    helps: dict[str, set[str]] = {"fit.py": {"--help", "--print_config", "--version"}}
    parsed: set[str] = set()  # flags and configs; a command that has no other ones would only take time
    for script, *words in sorted(lines, key=len, reverse=True):
        flags = {word for word in words if re.fullmatch(r"--[a-z]\w*", word)}
        if script == "fit.py" and not flags & helps[script]:
            parts = {word for word in words if word.startswith("--") or word.endswith(".yaml")}
            if not parts <= parsed:
                check_flags_of_fit(parser, words)
            parsed |= parts
        elif script != "fit.py":
            if script not in helps:
                printed = forked(tmp_path, "--help", script=script).out
                helps[script] = {"--config", *re.findall(r"--[a-z]\w*", printed)}
            assert flags <= helps[script], f"{script} has no {', '.join(flags - helps[script])}"


def check_flags_of_fit(parser: StrictParser, words: list[str]) -> None:
    """Parse the flags of a command of fit.py, without those that need a file or a package of the reader."""
    words = [word for word in words if word not in ("fit", "validate", "test")]
    for place in reversed([place for place, word in enumerate(words) if word in ("--ckpt_path", "--config")]):
        if words[place] == "--ckpt_path" or not words[place + 1].startswith("configs/"):
            words = words[:place] + words[place + 2 :]
    if "--allow_imports" not in words:
        parse_settings(parser, CommandLine(words, DEFAULT))


def test_settings_named_in_the_text_exist() -> None:
    settings = set(build_parser("fit", "docs").get_defaults().keys())
    pattern = r"--((?:data|model|trainer|generate|checkpoint|early_stopping)(?:\.\w+)+)"
    for name, page in MARKDOWN.items():
        for setting in re.findall(pattern, page.read_text(encoding="utf-8")):
            parts = setting.split(".")
            prefixes = {".".join(parts[:end]) for end in range(2, len(parts) + 1)}
            assert prefixes & settings, f"{name} names --{setting}"


# ------------------------------------------------------------------------------------------------ links


def without_code(text: str) -> str:
    """Return Markdown without its blocks of code and its code between backticks."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^ *```.*?^ *```", "", text, flags=re.M | re.S))


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    seen: Counter[str] = Counter()
    found = set(re.findall(r'<a (?:id|name)="([^"]+)"', text))
    for heading in re.findall(r"^#{1,6} +(.*?) *#*$", text, flags=re.M):
        heading = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_lead_to_files_and_headings_that_exist(name: str) -> None:
    page = MARKDOWN[name]
    text = without_code(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", text):
        target = target[0] or target[1]
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), target


# ------------------------------------------------------------------------------------------------ security


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
