"""Text stays text: a flag, a config, the saved config.yaml and the config in a checkpoint give what was typed.

`python tests/test_text_settings.py 20000` tries 20,000 sets of settings.
"""

import functools
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from conftest import DEFAULT, Fit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace
from user_errors import assert_user_error

from lit_gpt import UserError
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.config_file import read_config
from lit_gpt.cli.experiment import SaveConfig, resume_command
from lit_gpt.cli.parser import StrictParser, build_parser, limit_imports, parse_settings
from lit_gpt.cli.text_settings import split_text_flags, text_of_flag, text_settings
from lit_gpt.cli.validation import check_values
from lit_gpt.cli.yaml_text import dump_yaml, limit_parser, load_yaml

# Two are not saved, and the model that the third names is opened at once.
NAMES = sorted(text_settings().keys() - {"ckpt_path", "budget", "model.init_from"})
LISTS = [name for name in NAMES if text_settings()[name].may_be_list]

# Texts that YAML takes for something else, or that need quotes in it.
ODD_WORDS = r"""
null Null ~ yes no true False on 2020 -1 +1 1e5 1_000 0o17 017 0x1F 3e-4 1. .5 .inf -.INF
.nan = << - ? # : 12:30:45 2020-01-01 { {a} {{ } [ [a [a] ] &x *x !tag % @ ` | > , ' " \ \n
--- ... ~/x ./~ None [] [,] [a,] a\ 'x' "x" it's a: 😀 静夜思 [[a]]
"""
ODD = [
    *ODD_WORDS.split(),
    '', ' ', '\n', ' a', 'a ', '\ta', 'a\n', '\na', 'a\n\nb', '\r\n', '2020-01-01 12:00:00', '# {name}', 'a #b',
    'a: b', ': a', '- x', '{a: 1}', '[a] b', '&x a', '!!int 3', '!!binary aGk=', '%YAML 1.2', '|-\n a', '--- a',
    '\ufeffa', '\x1b[0m', '\x7f', '\x85', '\u2028', '\u202e', '\ufffe', '\uffff', '\ue000x', "1" * 200, "a" * 300,
    '[title, 2020, null, ~]', '["a, b", \'c\']', '[a, {b: c}]', '[!!int 3]', '[a #b\n]', '[a: b]',
]  # fmt: skip
TEXTS = (
    st.sampled_from(ODD)
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    | st.text("[]{}#&*!|>'\"%@`,:?-~\\ \n\ta1e.=<_😀\x85", max_size=12)
)


@functools.cache
def parser() -> StrictParser:
    limit_parser()
    limit_imports([])
    return build_parser("fit", "default")


def parse(*words: str, checkpoint: Any = None) -> Namespace:
    """Return the settings of a command line, as `load_settings` does before it looks at their values."""
    arguments = CommandLine([*words], DEFAULT)
    arguments.checkpoint, arguments.uses_saved_config = checkpoint, checkpoint is not None
    if checkpoint is not None:
        arguments.configs = []
    return parse_settings(parser(), arguments)


def check_round_trip(typed: dict[str, str]) -> None:
    """Check that texts pass through a flag, config.yaml, a config and a checkpoint as they are.

    Args:
        typed: Setting -> the value of its flag.
    """
    parsed = parse(*(f"--{name}={value}" for name, value in typed.items()))
    check_values(parsed)
    expected = {name: parsed[name] for name in typed}
    for name, value in typed.items():
        if value == "null" and text_settings()[name].may_be_none:
            assert parsed[name] is None
        elif name in LISTS and value.strip().startswith("[") and value.strip().endswith("]"):
            assert isinstance(parsed[name], list) or parsed[name] == value
        else:
            assert parsed[name] == value
    saved = SaveConfig(parser(), parsed, Mock()).text
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.yaml")
        path.write_text(saved, encoding="utf-8")
        again = parse("--config", str(path))
    assert {name: again[name] for name in typed} == expected
    # a checkpoint may give no URLs, no names that are no folder, and its own folder only
    resumed = parse(checkpoint=Mock(config_text=saved, path=Path("logs/name/version_0/last.ckpt")))
    names = typed.keys() - {"trainer.default_root_dir", "trainer.model_registry"}
    assert {name: resumed[name] for name in names} == {name: expected[name] for name in names}


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXTS)))
def test_text_is_the_same_in_a_flag_config_yaml_and_a_checkpoint(typed: dict[str, str]) -> None:
    check_round_trip(typed)


def test_odd_texts_are_the_same_in_a_flag_config_yaml_and_a_checkpoint() -> None:
    for start in range(0, len(ODD), len(NAMES)):
        check_round_trip(dict(zip(NAMES, ODD[start : start + len(NAMES)])))


@pytest.mark.parametrize("value", ["a\0b", "[a, 'b\ud800']", "\udce9"])
def test_text_that_no_config_can_hold_is_refused(value: str) -> None:
    parsed = parse(f"--generate.prompts={value}")
    with pytest.raises(UserError, match=r"^--generate.prompts .*(: remove it|: set the terminal to UTF-8)$"):
        check_values(parsed)


# The independent description of what a value in brackets means.
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[title, 2020, null, ~]", ["title", "2020", "null", "~"]),
        ("[yes, 1e5, 0x10, 1_000, 12:30:45, 2020-01-01]", ["yes", "1e5", "0x10", "1_000", "12:30:45", "2020-01-01"]),
        ("[\"#\", '~', \"a, b\", 'it''s', \"\\n\"]", ["#", "~", "a, b", "it's", "\n"]),
        (" [a,b ,  c] ", ["a", "b", "c"]),
        ("[a b, 静夜思, 😀 x]", ["a b", "静夜思", "😀 x"]),
        ("[!!int 3, a\nb]", ["!!int 3", "a\nb"]),
        ("[a,]", ["a"]),
        ("[]", []),
        ("[unclosed", "[unclosed"),
        ("[a] b]", "[a] b]"),
        ("[a] [b]", "[a] [b]"),
        ("[[a]]", "[[a]]"),
        ("[a: b]", "[a: b]"),
        ("[{a}]", "[{a}]"),
        ("[#]", "[#]"),
        ("#", "#"),
        ("a, b", "a, b"),
    ],
)
def test_list_in_brackets_is_split_and_its_items_stay_text(value: str, expected: list[str] | str) -> None:
    assert parse(f"--data.columns={value}").data.columns == expected
    assert parse("--data.columns", value).data.columns == expected


@given(st.lists(st.text("abc1e.-_~ é😀", min_size=1).map(str.strip).filter(lambda text: text[:1] not in ("", "-"))))
def test_items_without_quotes_are_what_was_typed(items: list[str]) -> None:
    assert text_of_flag(f"[{', '.join(items)}]", text_settings()["data.columns"]) == items


def test_text_settings_are_those_that_the_parser_reads_as_text() -> None:
    def is_text(hint: Any) -> bool:
        return set(re.findall(r"\w+(?=\b)", str(hint).replace("<class 'str'>", "str"))) <= TEXT_WORDS and "str" in str(
            hint
        )

    actions = {action.dest: getattr(action, "_typehint", action.type) for action in parser()._actions}
    assert text_settings().keys() == {key for key, hint in actions.items() if is_text(hint)} - {"allow_imports"}


TEXT_WORDS = {"str", "list", "None", "NoneType", "typing", "Union", "Optional", "pathlib", "Path"}


@pytest.mark.parametrize(
    ("config", "key", "expected"),
    [
        ("name: 3e-4", "name", "3e-4"),
        ("name: 2020-01-01", "name", "2020-01-01"),
        ("trainer: {default_root_dir: 1e5}", "trainer.default_root_dir", "1e5"),
        ("data: {columns: 2020}", "data.columns", "2020"),
        ("data: {columns: [title, 2020, null, ~, yes, '#', =, <<]}", "data.columns", None),
        ("data:\n  columns:\n  - 2020\n  -\n  - null\n", "data.columns", ["2020", "", "null"]),
        ("data: {delimiter: ~}", "data.delimiter", "~"),
        ("data: {delimiter: =}", "data.delimiter", "="),
        ("data: {delimiter: null}", "data.delimiter", None),
        ("data: {delimiter: }", "data.delimiter", None),
        ("data: {template: 'null'}", "data.template", "null"),
        ("data: {template: '[a, b]'}", "data.template", "[a, b]"),
        ("data: {columns: '[a, b]'}", "data.columns", "[a, b]"),
        ("data: {encoding: !!str 437}", "data.encoding", "437"),
    ],
)
def test_text_in_a_config_is_what_is_written(folder: Path, config: str, key: str, expected: Any) -> None:
    Path("overlay.yaml").write_text(config, encoding="utf-8")
    if "<<" in config:
        expected = ["title", "2020", "null", "~", "yes", "#", "=", "<<"]
    assert parse("--config", "overlay.yaml")[key] == expected


@pytest.mark.parametrize("value", [word for word in ODD_WORDS.split() if word[0] not in "{[]*&!|>,'\"@`%="])
def test_other_values_of_a_config_reach_the_parser_as_it_would_read_them(folder: Path, value: str) -> None:
    Path("overlay.yaml").write_text(f"trainer:\n  strategy:\n    any: {value}\n", encoding="utf-8")
    text = Path("overlay.yaml").read_text(encoding="utf-8")
    try:
        expected = load_yaml(text)
    except yaml.YAMLError:
        return
    read = load_yaml(dump_yaml(read_config(Path("overlay.yaml"))))
    assert str(read) == str(expected)  # nan is not equal to itself


@pytest.mark.parametrize(
    "config",
    ["data: {template: {name}}", "data: {template: [a]}", "data: {columns: [[a]]}", "name: !!timestamp 2001-99-99"],
)
def test_value_of_a_config_that_is_no_text_is_refused(fit: Fit, config: str) -> None:
    Path("overlay.yaml").write_text(config, encoding="utf-8")
    assert_user_error(fit("--config", "overlay.yaml"), "overlay.yaml line 1: YAML does not take this value of")


def test_text_of_a_config_that_is_a_comment_is_refused(fit: Fit) -> None:
    Path("overlay.yaml").write_text("data:\n  template: # {name}\n  columns:\n  # all\n  - text\n", encoding="utf-8")
    message = "overlay.yaml line 2: to YAML, data.template has a comment and no value: put it in quotes, or write null"
    assert_user_error(fit("--config", "overlay.yaml"), message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name"], "--name has no value: give one, or leave it out"),
        (["--data.template", "--name"], "--data.template --name: write --data.template=--name if this is its value"),
        (["--data.quote", "-x"], "--data.quote -x: write --data.quote=-x if this is its value"),
        (["--data.template", "-- {a}"], "write --data.template='-- {a}' if this is its value"),
        (["--data.columns=[*a]"], "--data.columns: aliases (*a) are not supported"),
    ],
)
def test_flag_without_a_text_is_refused(fit: Fit, words: list[str], message: str) -> None:
    assert_user_error(fit(*words), message)


@pytest.mark.parametrize("name", ["-x", "3e-4", "null", "2020"])
def test_command_that_resumes_a_run_names_it_as_it_was_typed(folder: Path, name: str) -> None:
    words = shlex.split(resume_command(CommandLine([f"--name={name}"], DEFAULT), name, Path("2020")))
    given = {text.key: text.value for text in split_text_flags(words[2:])[0]}
    assert given == {"name": name, "trainer.default_root_dir": "2020", "ckpt_path": "last"}


def test_flag_with_plus_adds_to_a_list(folder: Path) -> None:
    words = ["--data.columns", "2020", "--data.columns+", "#", "--data.columns+=[a, ~]"]
    assert parse(*words).data.columns == ["2020", "#", "a", "~"]
    assert split_text_flags(words)[1] == []


def test_text_that_begins_with_a_dash_and_has_a_space_is_no_flag(folder: Path) -> None:
    assert parse("--data.template", "-c {name}").data.template == "-c {name}"
    assert parse("--data.template", "- {name}").data.template == "- {name}"


@pytest.mark.parametrize("value", ["0,1", "auto", "2", "[0, 1]"])
def test_settings_that_are_not_only_text_are_read_by_the_parser(value: str) -> None:
    assert parse(f"--trainer.devices={value}").trainer.devices == {"2": "2", "[0, 1]": [0, 1]}.get(value, value)


def test_columns_with_odd_names_are_trained_on_resumed_and_validated(fit: Fit) -> None:
    names = ["#", "~", "2020", "yes", "1e5", "null", "[a", "a: b"]
    rows = ["\t".join(f"{name} {number}" for name in names) for number in range(60)]
    Path("odd.tsv").write_text("\n".join(["\t".join(names), *rows]), encoding="utf-8")
    for number, columns in enumerate(["~", "[2020, yes, 1e5, null, '[a']"]):
        flags = ["--data.files", "odd.tsv", f"--data.columns={columns}", "--name", f"3e-{number}"]
        assert fit(*flags, "--trainer.max_steps", 1).status == 0
        resumed = fit("--name", f"3e-{number}", "--ckpt_path", "last", "--trainer.max_steps", 2, config=None)
        assert resumed.status == 0, resumed.err
        assert [line for line in resumed.out.splitlines() if line.startswith("changed")] == [
            "changed     trainer.max_steps 1 -> 2"
        ]
    path = "logs/3e-1/version_0/config.yaml"
    columns = ["2020", "yes", "1e5", "null", "[a"]
    assert yaml.safe_load(Path(path).read_text(encoding="utf-8"))["data"]["columns"] == columns
    assert parse("--config", path).data.columns == columns


if __name__ == "__main__":
    many = given(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXTS)))(check_round_trip)
    settings(max_examples=int(sys.argv[1]), deadline=None, suppress_health_check=list(HealthCheck), database=None)(
        many
    )()
