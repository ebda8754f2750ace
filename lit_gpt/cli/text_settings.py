"""The settings that are texts, as columns, templates, names and paths. Their values are what was typed.

YAML takes `2020`, `~`, `yes` and `1e5` for something else than a text, and the parser reads every flag as YAML, and
texts in configs once more. Texts therefore do not pass through the parser: they are taken out of flags and configs
before it reads these, and put into its result. Only the word `null` is no text, where a setting may be None.
"""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml
from lightning.pytorch import Trainer

from lit_gpt.cli.config_values import has_setting, pop_setting
from lit_gpt.cli.intervals import TRAINER_ARGUMENTS
from lit_gpt.cli.validation import CONSTRUCTORS
from lit_gpt.cli.yaml_text import LimitError, check_limits
from lit_gpt.errors import UserError, shorten

# Settings that belong to no constructor, and hold for more than one command.
COMMON_SETTINGS = {
    "seed_everything": int,
    "name": str,
    "timeout": int,
    "validate_at_start": bool,
    "visualize": bool,
    "attention_heads": list[list[int]] | None,
}

TEXT_TAG, NULL_TAG = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"


class TextType(NamedTuple):
    """The type of a text setting.

    Attributes:
        may_be_none: Whether it may also be None.
        may_be_list: Whether it may also be a list of texts.
    """

    may_be_none: bool
    may_be_list: bool


class TextFlag(NamedTuple):
    """A flag that gives a text setting; `appends` says whether it adds to a list, as `--data.files+ more.csv`."""

    key: str
    value: str | list[str] | None
    appends: bool


def setting_types() -> dict[str, Any]:
    """Return the types of all settings that hold for more than one command, by their names."""
    types = {f"{section}.{name}": hint for section, made in CONSTRUCTORS.items() for name, hint in _hints(made).items()}
    types |= {f"trainer.{name}": hint for name, hint in _hints(Trainer.__init__).items()}
    types |= {f"trainer.{name}": hint for name, (hint, _) in TRAINER_ARGUMENTS.items()}
    return types | COMMON_SETTINGS


def _hints(constructor: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(constructor).items() if name != "return"}


@functools.cache
def text_settings() -> dict[str, TextType]:
    """Return the settings that are texts or lists of texts, by their names."""
    types = {**setting_types(), "ckpt_path": str | None, "budget": str | None}
    return {key: text for key, hint in types.items() if (text := _text_type(hint)) is not None}


def _text_type(hint: Any) -> TextType | None:
    """Return what values a type accepts; None if it accepts others than texts, lists of texts, paths and None."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if str not in options or not set(options) <= {str, Path, NoneType, list[str]}:
        return None
    return TextType(NoneType in options, list[str] in options)


# ------------------------------------------------------------------------------------------------------------ flags


def split_text_flags(args: list[str]) -> tuple[list[TextFlag], list[str]]:
    """Split flags into those that give text settings, and all other arguments.

    Raises:
        UserError: A text is missing, or a list of texts is larger than a config may be.
    """
    texts: list[TextFlag] = []
    others: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        flag, equals, value = arg.partition("=")
        key = flag.removeprefix("--").removesuffix("+")
        if key not in text_settings() or not flag.startswith("--"):
            others.append(arg)
            continue
        if not equals:
            value = next(remaining, "--")
            if value == "--":
                raise UserError(f"{flag} has no value: give one, or leave it out")
            if value.startswith("--") or (value.startswith("-") and len(value) > 1 and " " not in value):
                quoted = shorten(shlex.quote(value))
                raise UserError(f"{flag} {shorten(value)}: write {flag}={quoted} if this is its value")
        try:
            texts.append(TextFlag(key, text_of_flag(value, text_settings()[key]), flag.endswith("+")))
        except LimitError as error:
            raise UserError(f"{flag}: {error.problem}") from None
    return texts, others


def text_of_flag(value: str, kind: TextType) -> str | list[str] | None:
    """Return the text, or the texts, that a flag gives.

    Args:
        value: What was typed.
        kind: The type of the setting.

    Raises:
        LimitError: It is a list that is larger or deeper than a config can be, or that has an alias.
    """
    if value == "null" and kind.may_be_none:
        return None
    return _split_list(value) if kind.may_be_list else value


def _split_list(value: str) -> str | list[str]:
    """Split a list in brackets by YAML's rules: `[title, "a, b"]`. Anything else is one text.

    Items without quotes are what was typed, also where YAML would read a number.
    """
    stripped = value.strip()
    if not (stripped.startswith("[") and stripped.endswith("]")):
        return value
    try:
        check_limits(stripped)
        node = yaml.compose(stripped, Loader=yaml.SafeLoader)
    except LimitError:
        raise
    except (yaml.YAMLError, UnicodeEncodeError):  # `[unclosed]]` is a text; half a surrogate pair is refused later
        return value
    is_list = isinstance(node, yaml.SequenceNode) and node.end_mark.index == len(stripped)
    if not is_list or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return value
    return [item.value if item.style else stripped[item.start_mark.index : item.end_mark.index] for item in node.value]


# ---------------------------------------------------------------------------------------------------------- configs


def keep_texts(root: yaml.Node | None, text: str, source: str) -> None:
    """Make the text settings of a config texts to YAML, whatever else it would take them for.

    Args:
        root: The config as a tree; its tags are changed in place.
        text: The config.
        source: What to call the config in an error.

    Raises:
        UserError: A text setting has a value that is no text, or nothing but a comment, as `template: # {name}`.
    """
    for key, node in _settings(root):
        kind = text_settings().get(key)
        if kind is None:
            continue
        is_list = kind.may_be_list and isinstance(node, yaml.SequenceNode)
        for item in node.value if is_list else [node]:
            if not _is_text(item, text):
                place = f"{source} line {item.start_mark.line + 1}"
                raise UserError(f"{place}: YAML does not take this value of {key} for a text: put it in quotes")
            if item.value == "" and not item.style and re.match(r"[ \t]+#", text[item.end_mark.index :]):
                place = f"{source} line {item.start_mark.line + 1}"
                raise UserError(f"{place}: to YAML, {key} has a comment and no value: put it in quotes, or write null")
            is_null = not item.style and (item.value == "" or (item.value == "null" and kind.may_be_none))
            item.tag = NULL_TAG if is_null and not is_list else TEXT_TAG


def _is_text(node: yaml.Node, text: str) -> bool:
    """Return whether a value is a single word or text, and has no tag before it that says otherwise, as `!!binary`."""
    has_properties = text[node.start_mark.index : node.start_mark.index + 1] in ("!", "&")
    return isinstance(node, yaml.ScalarNode) and (node.tag == TEXT_TAG or not has_properties)


def _settings(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, yaml.Node]]:
    """Yield the names and values of all settings below a mapping, and of its sections."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        if isinstance(key, yaml.ScalarNode):
            yield f"{prefix}{key.value}", value
            yield from _settings(value, f"{prefix}{key.value}.")


def pop_texts(config: dict[str, Any]) -> dict[str, Any]:
    """Remove the text settings from a config, and return them by name."""
    return {key: pop_setting(config, key) for key in text_settings() if has_setting(config, key)}
