"""--help: short pages of 80 columns, with the values that a command would use."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEFAULT, Fit

from lit_gpt.benchmark.benchmark import main as bench_main
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.compare import main as compare_main
from lit_gpt.cli.consolidate import main as consolidate_main
from lit_gpt.cli.generate import main as generate_main
from lit_gpt.cli.help import GROUPS, TOPICS, format_value, print_help, split_help
from lit_gpt.cli.help_words import COMMAND_HELP, SENTENCES
from lit_gpt.cli.parser import build_parser, limit_imports, parse_settings
from lit_gpt.cli.prepare import main as prepare_main
from lit_gpt.lines import display_width

SCRIPTS = {
    "bench.py": lambda: bench_main(["--help"], DEFAULT),
    "compare.py": lambda: compare_main(["--help"]),
    "consolidate.py": lambda: consolidate_main(["--help"]),
    "generate.py": lambda: generate_main(["--help"]),
    "prepare.py": lambda: prepare_main(["--help"], DEFAULT),
}


Page = Callable[..., list[str]]


@pytest.fixture
def page(folder: Path, capsys: pytest.CaptureFixture[str]) -> Page:
    """Return a function that returns the lines of a help page."""

    def lines_of(topic: str = "", *args: str) -> list[str]:
        print_help(topic, list(args), DEFAULT)
        return capsys.readouterr().out.splitlines()

    return lines_of


def values_of(page: list[str]) -> dict[str, str]:
    """Return what a page shows as the value of each setting."""
    words = [line.split() for line in page if line.strip().startswith("--")]
    return {line[0].removeprefix("--"): line[1] for line in words if len(line) > 2}


def assert_short(lines: list[str]) -> None:
    assert len(lines) <= 40
    assert max(map(display_width, lines)) <= 80


@pytest.mark.parametrize("command", COMMAND_HELP)
def test_first_page_is_short_and_has_examples_that_parse(page: Page, command: str) -> None:
    lines = page("", command)
    assert_short(lines)
    assert list(values_of(lines)) == list(COMMAND_HELP[command].names)
    examples = [shlex.split(line, comments=True)[2:] for line in lines if line.startswith("  python scripts/fit.py")]
    assert len(examples) == 3
    for example in examples:
        flags = [word for word in example if word.startswith("--")]
        assert {flag.removeprefix("--") for flag in flags} <= set(build_parser("fit", "x").get_defaults().keys())


def test_first_page_of_fit_shows_21_settings(page: Page) -> None:
    assert len(values_of(page())) == 21


def test_group_pages_show_each_setting_once_with_a_sentence(page: Page) -> None:
    names: list[str] = []
    for topic in GROUPS:
        lines = page(topic)
        assert max(map(display_width, lines)) <= 80
        starts = [number for number, line in enumerate(lines) if line.startswith("--")]
        names += [lines[number].split()[0].removeprefix("--") for number in starts]
        for number in starts:
            sentence = lines[number + 1].strip()
            assert re.match(r'["\[A-Z]|cl100k', sentence), sentence
            assert not re.search("`|None|True|False", sentence)
    settings = set(build_parser("fit", "x").get_defaults().keys())
    assert sorted(names) == sorted(settings)
    assert SENTENCES.keys() <= settings


def test_page_of_everything_is_that_of_the_parser(page: Page) -> None:
    assert page("all") == build_parser("fit", "default").format_help().replace(" \b", "").splitlines()


def test_pages_show_the_values_of_config_and_flags(page: Page) -> None:
    args = ["--config", "small.yaml", "--data.batch_size", "7", "--data.files", "missing_诗.csv", "--print_config"]
    settings = parse_settings(build_parser("fit", "small"), CommandLine(args[:-1], DEFAULT))
    for topic in ("", *GROUPS):
        lines = page(topic, *args)
        assert any("(small.yaml, flags)" in line for line in lines)
        values = values_of(lines)
        for name in values.keys() & set(settings.keys()) - {"trainer.val_check_interval", "model.betas", "config"}:
            assert values[name] == format_value(settings[name])
    assert values_of(page("data", *args))["data.batch_size"] == "7"
    assert values_of(page("trainer"))["trainer.val_check_interval"] == "200"  # null stands for it


def test_help_shows_the_values_of_a_checkpoint_and_writes_nothing(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.max_steps", 1, "--name", "poems").status == 0
    files = sorted(path for path in folder.rglob("*"))
    result = fit("--name", "poems", "--ckpt_path", "last", "--data.batch_size", 2, "--help", config=None)
    values = values_of(result.out.splitlines())
    assert (values["model.config.d_model"], values["data.batch_size"], values["name"]) == ("16", "2", "poems")
    assert values_of(fit("validate", "-h", config=None).out.splitlines())["data.files"] == "rows.txt"
    assert sorted(path for path in folder.rglob("*")) == files


def test_help_on_a_wrong_command_shows_defaults_and_the_error(fit: Fit) -> None:
    for flags, problem in ((["--model.lr", 1], "unknown flag --model.lr"), (["validate"], "there is no checkpoint")):
        result = fit(*flags, "--help", config=None)
        assert (result.status, result.err) == (0, "")
        assert "These are the defaults, not the values of your command: " in result.out
        assert problem in result.out
        assert_short(result.out.splitlines())


def test_topic_is_the_word_behind_help() -> None:
    for args in (["--help", "data"], ["-h", "data"], ["--help=data"], ["-h=data"]):
        assert split_help(["validate", *args, "--name", "x"]) == ("data", ["validate", "--name", "x"])
    assert split_help(["--name", "x", "--help", "--seed_everything", "1"])[0] == ""
    assert split_help(["--name", "x"]) == (None, ["--name", "x"])


def test_command_behind_help_is_the_command_whose_help_is_shown() -> None:
    assert split_help(["--help", "validate", "--name", "a"]) == ("", ["validate", "--name", "a"])


def test_unknown_topic_is_one_line_that_names_the_topics(fit: Fit) -> None:
    result = fit("--help", "dat")
    assert (result.status, result.out) == (2, "")
    assert result.err == f"error: --help dat: the topics are {', '.join(TOPICS)}\n"


def test_value_of_a_class_is_its_name_and_of_a_list_its_items() -> None:
    limit_imports([])
    args = [
        "--trainer.callbacks",
        "EarlyStopping",
        "--trainer.callbacks.monitor",
        "loss/val",
        "--data.columns",
        "[a, b]",
    ]
    settings = parse_settings(build_parser("fit", "x"), CommandLine(args, DEFAULT))
    assert format_value(settings.trainer.callbacks) == "[EarlyStopping]"
    assert format_value(settings.data.columns) == "[a, b]"
    assert format_value("\x1b") == r"\x1b"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_of_the_other_scripts_is_short_and_has_examples(
    script: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        SCRIPTS[script]()
    lines = capsys.readouterr().out.splitlines()
    assert_short(lines)
    assert sum(line.startswith(f"  python scripts/{script}") for line in lines) >= 2
    assert "None" not in "".join(lines)
