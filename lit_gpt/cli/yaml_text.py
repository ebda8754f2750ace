"""Read and write configs as YAML, within limits: no aliases, a bounded size and depth, and no key twice.

An alias (`*name`) repeats what its anchor (`&name`) marks. Aliases of aliases make a text of 1 KB larger than the
memory of any machine once it is printed or copied, so aliases are refused wherever YAML is read.
"""

import re
from collections.abc import Callable
from typing import Any

import yaml
from jsonargparse import get_loader, set_dumper, set_loader

from lit_gpt.printable import escape_controls

MAX_CHARACTERS = 500_000
MAX_VALUES = 5_000  # the parser takes time quadratic in the length of a list
MAX_DEPTH = 30
MAX_DIGITS = 100  # of a number; int() takes time quadratic in their number

_NUMBER = re.compile(r"[-+]?\d[\da-fA-FxX_:.]*")
_EXPONENT = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")  # a number, without a point too
_EventLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_read_yaml: Callable[[str], Any] = get_loader("yaml")  # the parser's own, which takes 1e-3 for a number


class LimitError(yaml.MarkedYAMLError):
    """A YAML text is larger or deeper than a config can be, or has an alias."""


def load_yaml(text: str) -> Any:
    """Return the value of a YAML text, as the parser reads it.

    Raises:
        yaml.YAMLError: The text is not YAML, or is beyond the limits of this module.
    """
    check_limits(text)
    try:
        return _read_yaml(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML raises errors of many types for a value that does not fit its tag
        raise yaml.YAMLError(str(error)) from None


def check_limits(text: str) -> None:
    """Check that a text is YAML within the limits, without building its value.

    Raises:
        yaml.YAMLError: It is not.
    """
    if len(text) > MAX_CHARACTERS:
        raise LimitError(problem=f"more than {MAX_CHARACTERS:,} characters: give fewer")
    values = depth = 0
    for event in yaml.parse(text, Loader=_EventLoader):
        problem = None
        if isinstance(event, yaml.AliasEvent):
            problem = f"aliases (*{event.anchor}) are not supported: write the value out"
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.implicit[0] and len(event.value) > MAX_DIGITS and _NUMBER.fullmatch(event.value):
                problem = f"a number of {len(event.value):,} digits: give a smaller one, or a text in quotes"
        if depth > MAX_DEPTH:
            problem = f"more than {MAX_DEPTH} levels: give fewer"
        if values > MAX_VALUES:
            problem = f"more than {MAX_VALUES:,} keys and values: give fewer"
        if problem is not None:
            raise LimitError(problem=problem, problem_mark=event.start_mark)


def limit_parser() -> None:
    """Make jsonargparse read and write YAML with the functions of this module, in the whole process."""
    set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
    set_dumper("yaml", dump_yaml)


class StrictLoader(yaml.SafeLoader):
    """A YAML loader that raises an error for a key given twice, of which `SafeLoader` returns the last value.

    To it as to the parser, `1e-3` is a number.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    None, None, "merge keys (<<) are not supported", key_node.start_mark
                )
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)


StrictLoader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


class _PlainDumper(yaml.SafeDumper):
    """A YAML writer without aliases that quotes each text which the parser would take for something else.

    A text with characters that are not printable is in double quotes, where YAML knows Python's escapes.
    """

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.ScalarNode:
        try:
            is_text = load_yaml(data) == data
        except yaml.YAMLError:
            is_text = False
        style = '"' if escape_controls(data, keep="\n") != data else None if is_text else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_text)


def dump_yaml(settings: Any) -> str:
    """Return settings as YAML without aliases and control characters, which `load_yaml` reads back as they are."""
    text = yaml.dump(settings, Dumper=_PlainDumper, default_flow_style=False, sort_keys=False, allow_unicode=True)
    return escape_controls(text, keep="\n")
