"""What a person types: which config is read, who wins, and what cannot be meant."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from lightning.pytorch.cli import LightningArgumentParser

from lit_gpt.checkpoint.store import newest_checkpoint, open_checkpoint
from lit_gpt.cli.validation import COMMANDS, check_run_name
from lit_gpt.errors import UserError, did_you_mean

LOGS = Path("logs")


SECTIONS = ("data", "model", "trainer", "generate", "checkpoint", "early_stopping")


# keys that follow from others: target -> who decides
LINKED = {
    "model.config.vocab_size": "the tokenizer (data.tokenizer, data.vocab)",
    "data.context_length": "model.config.context_length",
    "data.seed": "seed_everything",
}


class CommandLine:
    """The words of the command line, put in order for the parser.

    `fit` may be left out. The first --config is the experiment and later ones overlay it; without one it is the config
    saved in the checkpoint of --ckpt_path, or default.yaml. With --data.files
    default.yaml is not read. Configs go to the front, so that flags win wherever they
    stand. `--ckpt_path last` becomes the newest checkpoint of the run's name, or nothing where there is none.

    Attributes:
        args: for the parser.
        run_name: of the run, where neither config nor flag says it: the experiment's file name.
        checkpoint_config: the checkpoint's config, to be read first.
        notice: what is to be told before anything else.
        root_dir: where runs go, where flags or configs say it.
        resume_args: what of the words still counts when the run goes on.
    """

    def __init__(self, words: list[str], default_config: Path) -> None:
        command, words = (words[0], words[1:]) if words[:1] and words[0] in COMMANDS else ("fit", words)
        configs, flags = _split_configs(words)
        helped = bool({"-h", "--help"} & set(flags))
        self.run_name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(configs[0]).stem if configs else default_config.stem)
        self.notice = ""
        contents = [check_config(Path(config)) for config in configs]
        checkpoint = _value_of("--ckpt_path", flags)
        self.root_dir: str | None = _value_of("--trainer.default_root_dir", flags)
        for config in contents:
            self.root_dir = self.root_dir or config.get("trainer", {}).get("default_root_dir")
        once = ("--ckpt_path", "--name", "--trainer.default_root_dir", "--allow_data_change")
        self.resume_args = [*(f"--config={config}" for config in configs), *flags]
        for flag in once:
            self.resume_args = _without(flag, self.resume_args)
        if checkpoint == "last" and not helped:
            checkpoint = self._last(contents, flags, command)
            flags = _without("--ckpt_path", flags) + ([f"--ckpt_path={checkpoint}"] if checkpoint else [])
        self.checkpoint_config: str | None = None
        if not configs and checkpoint and not helped:
            self.checkpoint_config = open_checkpoint(Path(checkpoint), mmap=True).get("config")
            if self.checkpoint_config is None:
                raise UserError(f"{checkpoint} was not written by fit.py and holds no config: give --config")
        elif not configs and _value_of("--data.files", flags) is None:  # its column is that of the built-in table
            configs = [str(default_config)]
            check_config(default_config)
        self.args = [command, *(f"--config={config}" for config in configs), *flags]

    def _last(self, configs: list[dict[str, Any]], flags: list[str], command: str) -> str | None:
        """The newest checkpoint of the name that flags, configs or the experiment's file say."""
        name = self.run_name
        for config in configs:
            name = config.get("name", name)
        name, logs = check_run_name(_value_of("--name", flags) or name), Path(str(self.root_dir or LOGS))
        newest, warning = newest_checkpoint(logs, name)
        if warning:
            print(f"warning: {warning}", file=sys.stderr)
        path = newest and newest.path
        if path is None and command != "fit":
            raise UserError(f"--ckpt_path last: there is no checkpoint of {name!r} under {logs}: train one first")
        if path is None:
            self.notice = f"no checkpoint of {name!r} under {logs}: starting from the beginning"
        return str(path) if path else None


def _split_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """`--config X` and `--config=X` (`-c` too) apart from everything else."""
    configs, others, waiting = [], [], iter(words)
    for word in waiting:
        if word.startswith("-c") and len(word) > 2:  # as -cFILE
            if Path(word).suffix not in (".yaml", ".yml"):
                raise UserError(f"{word}: a flag has two dashes, and a config ends in .yaml")
            word = f"--config={word[2:].removeprefix('=')}"
        flag, equals, value = word.partition("=")
        if flag.removeprefix("--") in SECTIONS and flag.startswith("--"):
            raise UserError(f"{flag} takes no value of its own: give its settings, as {flag}.NAME VALUE")
        if flag not in ("--config", "-c"):
            others.append(word)
        elif equals:
            configs.append(value)
        else:
            value = next(waiting, "")
            if not value or value.startswith("-"):
                raise UserError(f"{word} names no file: give --config configs/default.yaml")
            configs.append(value)
    return configs, others


def _value_of(flag: str, words: list[str]) -> str | None:
    """The last value given to `flag`."""
    value = None
    for word, after in zip(words, [*words[1:], ""]):
        if word == flag:
            value = after
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _without(flag: str, words: list[str]) -> list[str]:
    """`words` but for `flag` and its value."""
    kept, waiting = [], iter(words)
    for word in waiting:
        if word == flag:
            next(waiting, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def check_config(path: Path) -> dict[str, Any]:
    """What a config says, once it is sure that the parser will pass over nothing in it.

    That would be: no such file, broken YAML, a key given twice, a key that is linked.

    Raises:
        UserError: it is one of these.
    """
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.yaml")]
        raise UserError(f"--config {path}: no such file{did_you_mean(str(path), beside)}")
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = yaml.load(file, Loader=_StrictLoader)
        nested: list[str] = list(_dotted(content)) if isinstance(content, dict) else []
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}: mend the YAML") from None
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, RecursionError):
        raise UserError(f"{path} is not YAML in UTF-8: give a config such as configs/default.yaml") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: write them as `trainer:` and, below it, `max_steps: 100`")
    for key in SECTIONS:
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {content[key]!r}: write its settings below it, one `name: value` a line")
    for dotted in nested:
        raise UserError(f"{path}: {dotted}: write it as {': '.join(dotted.split('.'))}, key below key")
    for key, decider in LINKED.items():
        found: Any = content
        for part in key.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        if found != {}:
            raise UserError(f"{path}: {key} follows from {decider}: take it out")
    return content


def _dotted(content: dict[Any, Any]) -> Iterator[str]:
    """The keys of nested sections that hold a dot, which the parser would take and the checks here would not see."""
    for key, value in content.items():
        if "." in str(key):
            yield str(key)
        if isinstance(value, dict):
            yield from _dotted(value)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where the usual loader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merges = [key.start_mark for key, _ in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if merges:
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read here", merges[0])
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class StrictParser(LightningArgumentParser):
    """A parser that takes keys in full only, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message) from ex


def rewrite_parser_error(message: str, keys: list[str]) -> str:
    """A parser's message as a person would put it."""
    message = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (-?-?)([^\s=]+)", message):
        dashes, word = match.groups()
        if dashes:
            return f"unknown flag {dashes}{word}{did_you_mean(word, keys)}: see --help"
        commands = ", ".join(COMMANDS)
        return f"unexpected word {word!r}: commands are {commands}; a glob or a text with spaces goes in quotes"
    if match := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        return f"unknown key {match[1]}{did_you_mean(match[1], keys)}: see --help"
    if match := re.match(r'Linked "(.+?)" must be given', message):
        return f"--{match[1]} follows from {LINKED[match[1]]}: leave it out"
    if match := re.match(r"argument (--\w+)/\S+: invalid _boolean_type value: '(.*)'", message):
        return f"{match[1]} {match[2]}: it stands alone, or give true or false"
    if match := re.match(r'Parser key "(.+?)": (.*?)(?:Got value|Given value): ?(.*)', message):
        key, expected, got = match.groups()
        key = "seed_everything" if key == "data.seed" else key
        if problem := re.search(r"Problem with given class_path '.*?': (.*?) Not a valid", expected):
            return f"--{key}: {problem[1]}"
        choices = [choice for listed in re.findall(r"Literal\[(.*?)\]", expected) for choice in listed.split(", ")]
        kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected.partition("Errors:")[0])
        kinds = ["null" if kind == "NoneType" else kind for kind in kinds]
        wanted = ", ".join(
            dict.fromkeys([*(choice.strip("'") for choice in choices), *kinds])
        ) or expected.removeprefix("Expected ")
        return f"--{key} {got}: give {'one of ' if choices else ''}{wanted}"
    return message
