"""The help of fit.py: the settings that people change most on one page, and a page for each group of settings.

The pages show the values that the same command without `--help` would use. Their lists and sentences come from the
parser, so a new setting appears without a change here.
"""

import re
from argparse import Action
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from jsonargparse import Namespace

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.help_words import COMMAND_HELP, SENTENCES, SHORT_WORDS
from lit_gpt.cli.intervals import resolve_validation_interval
from lit_gpt.cli.messages import print_page
from lit_gpt.cli.parser import StrictParser, build_parser, limit_imports, parse_settings
from lit_gpt.cli.text_settings import setting_types
from lit_gpt.cli.validation import COMMANDS
from lit_gpt.cli.yaml_text import limit_parser
from lit_gpt.compat import parser_actions
from lit_gpt.errors import UserError
from lit_gpt.lines import COLUMNS, cut_line, pad_line, wrap_text
from lit_gpt.printable import escape_controls

HELP_FLAGS = ("-h", "--help")

# The groups of settings. A setting of no other group, as --name or --generate.prompts, is of the group `run`.
GROUPS = ("data", "model", "trainer", "run")
TOPICS = (*GROUPS, "all")

VALUE_COLUMNS = 18
MAX_FLAG_COLUMNS = 34
MAX_CHOICES = 6  # that are listed
TYPE_NAMES: dict[Any, str] = {
    bool: "true|false",
    int: "int",
    float: "float",
    str: "text",
    Path: "text",
    NoneType: "null",
}


class Values(NamedTuple):
    """The settings of a command, and where their values come from.

    Attributes:
        parser: The parser of the command.
        settings: The values by the names of their settings.
        source: The files that gave values, as "course.yaml, flags".
        problem: Why these are the defaults instead of what the command gives; "" if they are not.
    """

    parser: StrictParser
    settings: Namespace
    source: str
    problem: str


def split_help(args: list[str]) -> tuple[str | None, list[str]]:
    """Split `--help`, or `-h`, and its topic from the other arguments.

    Returns:
        The topic, "" if none is given, and None without `--help`; and the other arguments.

    Raises:
        UserError: The topic is unknown.
    """
    for place, arg in enumerate(args):
        flag, equals, topic = arg.partition("=")
        if flag not in HELP_FLAGS:
            continue
        rest = args[place + 1 :]
        if not equals and rest and not rest[0].startswith("-"):
            topic = rest.pop(0)
        if topic in COMMANDS:  # as in fit.py --help validate
            return "", [topic, *args[:place], *rest]
        if topic not in ("", *TOPICS):
            raise UserError(f"--help {topic}: the topics are {', '.join(TOPICS)}")
        return topic, [*args[:place], *rest]
    return None, args


def print_help(topic: str, args: list[str], default_config: Path) -> None:
    """Print the help of a command.

    Args:
        topic: One of TOPICS, or "" for the settings that people change most.
        args: The arguments of the command, without `--help`.
        default_config: The path of default.yaml.
    """
    command = args[0] if args and args[0] in COMMANDS else "fit"
    values = values_in_force(command, args, default_config)
    if topic == "all":
        # jsonargparse writes a backspace between --print_config and its [=flags]
        lines: Iterable[str] = values.parser.format_help().replace(" \b", "").splitlines()
    elif topic:
        lines = group_page(topic, values)
    else:
        lines = overview_page(command, values)
    print_page(lines)


def values_in_force(command: str, args: list[str], default_config: Path) -> Values:
    """Return the values that a command would use: of its flags, else its configs or its checkpoint, else the defaults.

    Nothing is built, and no data are read. Help is also for those whose command has a mistake: then these are the
    defaults.
    """
    limit_parser()
    args = [arg for arg in args if arg.partition("=")[0] != "--print_config"]
    try:
        return _parse_values(command, CommandLine(args, default_config))
    except UserError as error:
        return _parse_values(command, CommandLine([], default_config), problem=str(error))


def _parse_values(command: str, arguments: CommandLine, problem: str = "") -> Values:
    limit_imports(arguments.allowed_imports)
    parser = build_parser(command, arguments.run_name)
    settings = parse_settings(parser, arguments)
    resolve_validation_interval(settings.trainer)
    paths = [arg.removeprefix("--config=") for arg in arguments.args if arg.startswith("--config=")]
    source = [str(arguments.checkpoint.path)] if arguments.uses_saved_config and arguments.checkpoint else []
    source += [Path(path).name for path in paths] or ([] if source else ["the defaults"])
    has_flags = len(arguments.args) > 1 + len(paths)
    return Values(parser, settings, ", ".join([*source, *(["flags"] if has_flags else [])]), problem)


# -------------------------------------------------------------------------------------------------------------- pages


def overview_page(command: str, values: Values) -> Iterator[str]:
    """Yield the lines of the first page: what the command does, examples, and the settings that people change most."""
    usage, description, examples, names = COMMAND_HELP[command]
    yield f"usage: {usage}"
    yield ""
    yield from wrap_text(description, "")
    yield ""
    yield from examples
    yield ""
    yield from wrap_text(f"settings and their values ({values.source}):", "")
    flag_columns = max(len(name) for name in names) + 5
    for name in names:
        value = pad_line(cut_line(format_value(values.settings[name]), VALUE_COLUMNS), VALUE_COLUMNS)
        yield f"  {f'--{name}':{flag_columns - 2}}{value} {SHORT_WORDS[name]}".rstrip()
    yield ""
    yield f"more settings: --help {', --help '.join(GROUPS)}"
    yield "all flags, also those of callbacks and loggers: --help all"
    yield from _problem_lines(values)


def group_page(topic: str, values: Values) -> Iterator[str]:
    """Yield the lines of the page of a group: each setting with its value, its type and what it does."""
    yield from wrap_text(f"settings of {topic} and their values ({values.source}):", "")
    actions = [action for action in _setting_actions(values.parser) if group_of(action.dest) == topic]
    flag_columns = min(max(len(action.dest) for action in actions) + 3, MAX_FLAG_COLUMNS)
    for action in actions:
        value = pad_line(format_value(values.settings[action.dest]), VALUE_COLUMNS)
        yield ""
        yield cut_line(f"{f'--{action.dest}':{flag_columns}} {value}  {describe_type(action)}", COLUMNS).rstrip()
        yield from wrap_text(describe_setting(action), "    ")
    yield from _problem_lines(values)


def _problem_lines(values: Values) -> Iterator[str]:
    if values.problem:
        yield ""
        yield from wrap_text(f"These are the defaults, not the values of your command: {values.problem}", "")


# ----------------------------------------------------------------------------------------------------------- settings


def _setting_actions(parser: StrictParser) -> list[Action]:
    """Return the parser's actions of all settings that have a value and a flag, in its order."""
    names = set(parser.get_defaults().keys())
    return [
        action
        for action in parser_actions(parser)
        if action.dest in names and any(option.startswith("--") for option in action.option_strings)
    ]


def group_of(name: str) -> str:
    """Return the group of a setting, for example "data" for "data.files"."""
    section = name.partition(".")[0]
    return section if section in GROUPS else "run"


def format_value(value: Any) -> str:
    """Return a value as it can be typed behind its flag; of a class only its name."""
    if isinstance(value, Namespace | dict) and "class_path" in value:
        return escape_controls(value["class_path"]).rpartition(".")[2]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(format_value, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return escape_controls(str(value)) or "''"


def describe_type(action: Action) -> str:
    """Return what a setting accepts, as "int|null" or "rows|raw"."""
    hint = setting_types().get(action.dest)
    if hint is not None:
        return "|".join(dict.fromkeys(_type_names(hint)))
    choices = action.metavar if isinstance(action.metavar, str) else ""
    return choices.strip("{}").replace(",", "|") if choices.startswith("{") else "text"


def _type_names(hint: Any) -> Iterator[str]:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal and len(inner) <= MAX_CHOICES:
        yield from map(str, inner)
    elif origin is Literal:
        yield from (TYPE_NAMES[type(choice)] for choice in inner)
    elif origin in (Union, UnionType):
        for option in inner:
            yield from _type_names(option)
    elif hint in TYPE_NAMES:
        yield TYPE_NAMES[hint]
    else:
        yield "list" if origin in (list, tuple) else "class"


def describe_setting(action: Action) -> str:
    """Return the sentences about a setting, from the docstring of what it belongs to, with YAML's words for values."""
    text = " ".join(SENTENCES.get(action.dest, action.help or "").split())
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text).replace("`", "")  # reStructuredText
    for word, typed in (("None", "null"), ("True", "true"), ("False", "false")):
        text = re.sub(rf"\b{word}\b", typed, text)
    return escape_controls(text)
