"""Prepare the arguments of a command for the parser."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.run_checkpoint import CHOICES, LOGS, START, TRAIN, find_checkpoint, no_checkpoint_error
from lit_gpt.cli.validation import COMMANDS, check_run_name
from lit_gpt.cli.yaml_text import MAX_CHARACTERS, LimitError, StrictLoader, check_limits
from lit_gpt.errors import UserError, did_you_mean

SECTIONS = ("data", "model", "trainer", "generate", "checkpoint", "early_stopping")

# Settings that the parser derives from others, and from which.
LINKED_SETTINGS = {
    "model.config.vocab_size": "the tokenizer (data.tokenizer, data.vocab)",
    "data.context_length": "model.config.context_length",
    "data.seed": "seed_everything",
}

# Flags that apply to one command and not to the command that resumes its run.
NOT_RESUMED = ("--ckpt_path", "--name", "--trainer.default_root_dir", "--allow_data_change")


class CommandLine:
    """The arguments of fit.py, completed by what the user left out.

    - The command `fit` may be left out.
    - The first `--config` is the experiment, and later ones overlay it. Without `--config`, the experiment is the
      config saved in the checkpoint of `--ckpt_path`. Without a checkpoint it is default.yaml, unless `--data.files` is
      given: default.yaml names the built-in table.
    - Configs come before flags, so that flags win wherever the user wrote them.
    - `--ckpt_path last`, `best` or `auto` becomes the path of a checkpoint of the run's name (`CHOICES`). It is removed
      if there is none and `fit` may start a run. `validate` and `test` without `--ckpt_path` take `auto`.

    Args:
        args: The arguments as the user gave them, without the program's name.
        default_config: The path of default.yaml.

    Attributes:
        args: The completed arguments, the command first.
        run_name: The default of `--name`: the file name of the experiment.
        root_dir: The value of `trainer.default_root_dir` in the flags or configs; None if it is in neither.
        checkpoint: The checkpoint of the flag `--ckpt_path`, if it had to be opened; it may not be verified yet.
        uses_saved_config: Whether settings come from the config in the checkpoint, below those in `args`.
        allowed_imports: The packages of the flag `--allow_imports`.
        resume_args: The arguments that a command needs to resume the run, except for its name and folder.
        notice: A line to print before the run, or "".

    Raises:
        UserError: A config cannot be read, `--config` has no value, or the checkpoint cannot be used.
    """

    def __init__(self, args: list[str], default_config: Path) -> None:
        command, args = (args[0], args[1:]) if args[:1] and args[0] in COMMANDS else ("fit", args)
        paths, flags = _split_configs(args)
        configs = [read_config(Path(path)) for path in paths]
        self.run_name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(paths[0]).stem if paths else default_config.stem)
        self.root_dir: str | None = _find_setting("trainer.default_root_dir", flags, configs)
        self.resume_args = [*(f"--config={path}" for path in paths), *remove_flags(NOT_RESUMED, flags)]
        self.checkpoint: Checkpoint | None = None
        self.uses_saved_config = False
        self.allowed_imports = [
            name.strip() for value in _find_flags("--allow_imports", flags) for name in value.strip("[]").split(",")
        ]
        self.notice = ""
        checkpoint = choice = _checkpoint_choice(command, flags, configs)
        if choice in CHOICES:
            name = _find_setting("name", flags, configs)
            if name is not None or paths or command == "fit":
                name = check_run_name(name or self.run_name)
            checkpoint = self._find_checkpoint(choice, name, command)
            flags = remove_flags(["--ckpt_path"], flags) + ([f"--ckpt_path={checkpoint}"] if checkpoint else [])
        if not paths and checkpoint:
            self.checkpoint = self.checkpoint or Checkpoint.open(checkpoint, verify=False)
            self.uses_saved_config = True
        elif not paths and _find_flag("--data.files", flags) is None:
            read_config(default_config)
            paths = [str(default_config)]
        self.args = [command, *(f"--config={path}" for path in paths), *flags]

    def gives(self, setting: str) -> bool:
        """Return whether a flag gives a setting, for example "trainer.strategy", or an argument of its class."""
        flags = (arg.partition("=")[0] for arg in self.args)
        return any(flag in (f"--{setting}", f"--{setting}+") or flag.startswith(f"--{setting}.") for flag in flags)

    def _find_checkpoint(self, choice: str, name: str | None, command: str) -> str | None:
        """Open the checkpoint of a choice, see `CHOICES`, and return its path; None: `fit` starts a run.

        Raises:
            UserError: There is none.
        """
        logs, starts = Path(str(self.root_dir or LOGS)), command == "fit" and choice == "auto"
        if choice == "auto":
            choice = "last" if command == "fit" else "best"
        self.checkpoint = find_checkpoint(choice, logs, name)
        if self.checkpoint is not None:
            return str(self.checkpoint.path)
        if starts:
            self.notice = f"no checkpoint of {name!r} under {logs}: starting from the beginning"
            return None
        raise no_checkpoint_error(logs, name, START if command == "fit" else TRAIN)


# ------------------------------------------------------------------------------------------------------------ flags


def _split_configs(args: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the values of `--config` (also `-c`) and all other arguments.

    Raises:
        UserError: `--config` has no value, or a section of the settings has one.
    """
    configs: list[str] = []
    others: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg.startswith("-c") and len(arg) > 2:  # -cFILE
            if Path(arg).suffix not in (".yaml", ".yml"):
                raise UserError(f"{arg}: a flag has two dashes, and a config ends in .yaml")
            arg = f"--config={arg[2:].removeprefix('=')}"
        flag, equals, value = arg.partition("=")
        if flag.startswith("--") and flag.removeprefix("--") in SECTIONS:
            raise UserError(f"{flag} takes no value of its own: give its settings, as {flag}.NAME VALUE")
        if flag not in ("--config", "-c"):
            others.append(arg)
            continue
        if not equals:
            value = next(remaining, "")
            if not value or value.startswith("-"):
                raise UserError(f"{arg} names no file: give --config configs/default.yaml")
        configs.append(value)
    return configs, others


def _find_flags(flag: str, args: list[str]) -> list[str]:
    """Return the values of all occurrences of a flag."""
    values = []
    for arg, following in zip(args, [*args[1:], ""]):
        if arg == flag:
            values.append(following)
        elif arg.startswith(f"{flag}="):
            values.append(arg.partition("=")[2])
    return values


def _find_flag(flag: str, args: list[str]) -> str | None:
    """Return the value of the last occurrence of a flag, or None."""
    values = _find_flags(flag, args)
    return values[-1] if values else None


def _checkpoint_choice(command: str, flags: list[str], configs: list[dict[str, Any]]) -> str | None:
    """Return the flag `--ckpt_path`, a path or one of `CHOICES`; None if the command line needs no checkpoint."""
    if {"-h", "--help"} & set(flags):
        return None
    choice = _find_flag("--ckpt_path", flags)
    if choice is None and command != "fit" and not any("ckpt_path" in config for config in configs):
        return "auto"
    return choice


def remove_flags(flags: Iterable[str], args: list[str]) -> list[str]:
    """Return arguments without some flags and their values."""
    others: list[str] = []
    remaining = iter(args)
    for arg in remaining:
        if arg in flags:
            next(remaining, None)
        elif arg.partition("=")[0] not in flags:
            others.append(arg)
    return others


def _find_setting(key: str, flags: list[str], configs: list[dict[str, Any]]) -> Any:
    """Return the value of a setting from its flag, else from the last config that has it, else None."""
    found = [_find_flag(f"--{key}", flags), *(_get_nested(config, key) for config in reversed(configs))]
    return next((value for value in found if value is not None), None)


# ---------------------------------------------------------------------------------------------------------- configs


def read_config(path: Path) -> dict[str, Any]:
    """Read a config and check it for errors that the parser would ignore.

    Raises:
        UserError: The file does not exist, is not valid YAML, gives a key twice, has a section that is not a mapping, a
            key with dots, or a setting that the parser derives from others or that is a flag only.
    """
    if not path.is_file():
        others = [str(other) for other in path.parent.glob("*.yaml")]
        raise UserError(f"--config {path}: no such file{did_you_mean(str(path), others)}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_CHARACTERS + 1)
        check_limits(text)
        config: Any = yaml.load(text, Loader=StrictLoader)
    except OSError as error:
        raise UserError(f"--config {path} cannot be read ({error.strerror}): give yourself the permission") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        remedy = "" if isinstance(error, LimitError) else ": correct the YAML"
        raise UserError(f"{path}{line}: {error.problem}{remedy}") from None
    except Exception:  # bytes that are not UTF-8, or one of the many errors of PyYAML for a value that does not fit
        raise UserError(f"{path} is not YAML in UTF-8: give a config such as configs/default.yaml") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} has no settings: write them as `trainer:` and, below it, `max_steps: 100`")
    for key in (*SECTIONS, "model.config"):
        section = _get_nested(config, key, default={})
        if not isinstance(section, dict):
            raise UserError(f"{path}: {key} is {section!r}: write its settings below it, one `name: value` a line")
    for dotted in _find_dotted_keys(config):
        raise UserError(f"{path}: {dotted}: write it as {': '.join(dotted.split('.'))}, key below key")
    if "allow_imports" in config:
        raise UserError(f"{path}: allow_imports says what configs may import: give it as a flag, --allow_imports NAME")
    missing = object()
    for key, origin in LINKED_SETTINGS.items():
        if _get_nested(config, key, default=missing) is not missing:
            raise UserError(f"{path}: {key} follows from {origin}: remove it")
    return config


def _get_nested(config: dict[str, Any], key: str, default: Any = None) -> Any:
    """Return `config["a"]["b"]` for the key "a.b", or a default if there is no such value."""
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def _find_dotted_keys(config: dict[Any, Any]) -> Iterator[str]:
    """Yield all keys with a dot. The parser accepts them as nested keys, but the checks of this module do not."""
    for key, value in config.items():
        if "." in str(key):
            yield str(key)
        if isinstance(value, dict):
            yield from _find_dotted_keys(value)
