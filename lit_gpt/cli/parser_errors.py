"""Rewrite the parser's error messages: one line that says what was found, what is wrong, and what to type."""

import re

from lit_gpt.cli.config_file import LINKED_SETTINGS
from lit_gpt.cli.validation import COMMANDS
from lit_gpt.errors import did_you_mean, shorten


def rewrite_parser_error(message: str, keys: list[str]) -> str:
    """Rewrite an error message of jsonargparse as one line that says what to type.

    Args:
        message: The message; one that is not known is only joined into one line.
        keys: All settings of the command, for a suggestion.
    """
    if match := re.match(r'Parser key "(.+?)":\s*(.*)', message, re.DOTALL):
        # the parser names the linked setting
        key = "seed_everything" if match[1] == "data.seed" else match[1]
        return _rewrite_value_error(key, match[2])
    message = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (-?-?)([^\s=]+)", message):
        dashes, name = match.groups()
        if dashes:
            return f"unknown flag {dashes}{name}{did_you_mean(name, keys)}: see --help"
        commands = ", ".join(COMMANDS)
        return (
            f"unexpected word {name!r}: commands are {commands}; give files as --data.files, and quote a glob or a "
            "text with spaces"
        )
    if match := re.match(r"(?:Group '(.+)' does not accept o|O)ption '(.+?)'", message):
        key = ".".join(filter(None, match.groups()))
        return f"unknown key {key}{did_you_mean(key, keys)}: see --help"
    if match := re.match(r'Linked "(.+?)" must be given', message):
        return f"--{match[1]} follows from {LINKED_SETTINGS[match[1]]}: leave it out"
    if match := re.match(r"argument (--\w+)/\S+: invalid _boolean_type value: '(.*)'", message):
        return f"{match[1]} {shorten_value(match[2])}: give true, false or no value"
    if match := re.match(r"Value not boolean: (.*)\.$", message):
        return f"--preflight {shorten_value(match[1])}: give true, false or no value"
    if match := re.match(r"Unexpected config: (.*)", message):  # `a:` may be a text to the parser
        return f"the config {shorten_value(match[1])} gives no value: write one, or leave it out"
    return message


def _rewrite_value_error(key: str, problem: str) -> str:
    """Rewrite what the parser says about the value of a setting."""
    expected, separator, value = problem.rpartition("\n  Given value: ")  # a union of types: after the errors of each
    if not separator:
        expected, separator, value = problem.partition("Got value: ")
    value, expected = shorten_value(value.partition("\nSubclass types expect")[0]), " ".join(expected.split())
    if denied := re.search(r"Importing '(.+?)' is not allowed, denied by the '(.+?)' entry", expected):
        path, entry = denied.groups()
        package = path.partition(".")[0] if entry == "*" else entry
        return f"--{key}: {path} may not be imported: if you trust it, give --allow_imports {package} too"
    if invalid := re.search(r"Problem with given class_path '.*?': (.*?) Not a valid", expected):
        return f"--{key}: {invalid[1]}"
    if part := re.match(r"NestedArg\(key='(.+?)'", value):
        return f"--{key}.{part[1]}: give --{key} CLASS before it"
    if "Exceeds the limit" in problem:
        return f"--{key}: a number of thousands of digits: give a smaller one"
    if loaded := re.match(r"Unable to load config ['\"]?(.*)['\"]", problem):
        return f"--{key} {shorten_value(loaded[1])}: give its settings, as --{key}.NAME VALUE"
    if not separator:
        return f"--{key}: {' '.join(problem.split())}"
    required = re.search(r"the following arguments are required: (\w+)", expected)
    class_name = re.match(r"Namespace\(class_path='(?:\w+\.)*(\w+)'", value)
    if required and class_name:
        return f"--{key} {class_name[1]}: give --{key}.{required[1]} too"
    return f"--{key} {value}: give {_describe_type(expected)}"


def shorten_value(value: str) -> str:
    """Return a value on one line, as much of it as a message can repeat; in quotes if it is empty or blank."""
    return shorten(" ".join(value.split()) or repr(value))


def _describe_type(expected: str) -> str:
    """Return the choices and types in jsonargparse's description of what it expected, in a few words."""
    expected = expected.partition("Errors:")[0]
    choices = [
        choice.strip("'") for listed in re.findall(r"Literal\[(.*?)\]", expected) for choice in listed.split(", ")
    ]
    types = re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected)
    if re.search(r"\blist\[", expected):
        types.append("list")
    types = ["null" if name == "NoneType" else name for name in types]
    names = ", ".join(dict.fromkeys([*choices, *types]))
    return f"{'one of ' if choices else ''}{names or expected.removeprefix('Expected ')}"
