"""Prepare the arguments of a command for the parser."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.config_file import SECTIONS, read_config
from lit_gpt.cli.config_values import get_setting, has_setting
from lit_gpt.cli.run_checkpoint import CHOICES, START, TRAIN, find_checkpoint, no_checkpoint_error
from lit_gpt.cli.text_settings import split_text_flags
from lit_gpt.cli.validation import COMMANDS, check_run_name
from lit_gpt.convert.load import is_imported
from lit_gpt.errors import UserError
from lit_gpt.files import expand_path
from lit_gpt.runs.find import LOGS

# Flags that apply to one command and not to the command that resumes its run.
NOT_RESUMED = ("--ckpt_path", "--name", "--trainer.default_root_dir", "--allow_data_change", "--budget")


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
        given_args: The same, without default.yaml, which the user did not name.
        configs: The settings of each config in `args`, the first one first.
        text_flags: The flags in `args` that give text settings.
        other_flags: All other flags in `args`.
        run_name: The default of `--name`: the file name of the experiment.
        root_dir: The value of `trainer.default_root_dir` in the flags or configs; None if it is in neither.
        checkpoint: The checkpoint of the flag `--ckpt_path`, if it had to be opened; it may not be verified yet.
        reads_default_config: Whether the only config is default.yaml, which the user did not name.
        uses_saved_config: Whether settings come from the config in the checkpoint, below those in `args`.
        allowed_imports: The packages of the flag `--allow_imports`.
        resume_args: The arguments that a command needs to resume the run, except for its name and folder.
        notice: A line to print before the run, or "".
        init_from: The value of `model.init_from` in the flags or configs; None if it is in neither.

    Raises:
        UserError: A config cannot be read, `--config` has no value, or the checkpoint cannot be used.
    """

    def __init__(self, args: list[str], default_config: Path) -> None:
        command, args = (args[0], args[1:]) if args[:1] and args[0] in COMMANDS else ("fit", args)
        paths, flags = _split_configs(args)
        configs = [read_config(expand_path(path)) for path in paths]
        self.run_name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(paths[0]).stem if paths else default_config.stem)
        root_dir = _find_setting("trainer.default_root_dir", flags, configs)
        self.root_dir: str | None = None if root_dir is None else os.path.expanduser(root_dir)
        self.resume_args = [*(f"--config={path}" for path in paths), *remove_flags(NOT_RESUMED, flags)]
        self.checkpoint: Checkpoint | None = None
        self.uses_saved_config = self.reads_default_config = False
        self.allowed_imports = [
            name.strip() for value in _find_flags("--allow_imports", flags) for name in value.strip("[]").split(",")
        ]
        self.notice = ""
        flags = _take_imported(command, flags)
        init_from = _find_setting("model.init_from", flags, configs)
        self.init_from: str | None = None if init_from == "null" else init_from
        checkpoint = choice = _checkpoint_choice(command, flags, configs, is_given=self.init_from is not None)
        if choice in CHOICES:
            name = _find_setting("name", flags, configs)
            if name is not None or paths or command == "fit":
                name = check_run_name(self.run_name if name is None else name)
            checkpoint = self._find_checkpoint(choice, name, command)
            flags = remove_flags(["--ckpt_path"], flags) + ([f"--ckpt_path={checkpoint}"] if checkpoint else [])
        self.given_args = [command, *(f"--config={path}" for path in paths), *flags]
        if not paths and checkpoint:
            self.checkpoint = self.checkpoint or Checkpoint.open(expand_path(checkpoint), verify=False)
            self.uses_saved_config = True
        elif not paths and _find_flag("--data.files", flags) is None:
            if command != "fit":  # the built-in table would say nothing about the model
                raise UserError(
                    f"{self.init_from} comes without a text: give --data.files, the text to {command} it on"
                )
            configs = [read_config(default_config)]
            paths = [str(default_config)]
            self.reads_default_config = True
        self.configs = configs
        self.text_flags, self.other_flags = split_text_flags(flags)
        self.args = [command, *(f"--config={path}" for path in paths), *flags]

    def add_flags(self, flags: list[str]) -> None:
        """Add flags of the form `--name=value`, which the user did not give, behind all others."""
        texts, others = split_text_flags(flags)
        self.text_flags, self.other_flags = [*self.text_flags, *texts], [*self.other_flags, *others]
        self.args = [*self.args, *flags]
        if any(arg.startswith("--config=") for arg in self.resume_args):  # else the checkpoint gives them
            self.resume_args = [*self.resume_args, *flags]

    @property
    def explicit_args(self) -> list[str]:
        """The arguments without default.yaml, the flags that were added by `add_flags` included."""
        return [arg for arg in self.args[1:] if not (self.reads_default_config and arg.startswith("--config="))]

    @property
    def gives_checkpoint(self) -> bool:
        """Whether a flag or a config gives `ckpt_path`, and it is not `--ckpt_path auto` that has found none."""
        flag = _find_flag("--ckpt_path", self.other_flags + [f"--{text.key}={text.value}" for text in self.text_flags])
        values = [flag, *(config.get("ckpt_path") for config in self.configs)]
        return any(value not in (None, "null", "None") for value in values)

    def gives(self, setting: str) -> bool:
        """Return whether a flag gives a setting, for example "trainer.strategy", or an argument of its class."""
        flags = (arg.partition("=")[0] for arg in self.args)
        return any(flag in (f"--{setting}", f"--{setting}+") or flag.startswith(f"--{setting}.") for flag in flags)

    def _find_checkpoint(self, choice: str, name: str | None, command: str) -> str | None:
        """Open the checkpoint of a choice, see `CHOICES`, and return its path; None: `fit` starts a run.

        Raises:
            UserError: There is none.
        """
        logs, starts = Path(self.root_dir or LOGS), command == "fit" and choice == "auto"
        if choice == "auto":
            choice = "last" if command == "fit" else "best"
        self.checkpoint = find_checkpoint(choice, logs, name)
        if self.checkpoint is not None:
            path = str(self.checkpoint.path)
            return f"./{path}" if path.startswith("~") else path  # a folder called ~ here is not the home folder
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
        if arg.startswith("-c") and len(arg) > 2 and " " not in arg:  # -cFILE; with a space it is the value of a flag
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


def _take_imported(command: str, flags: list[str]) -> list[str]:
    """Return flags in which a model of another program is given as `--model.init_from`, and not as `--ckpt_path`.

    Raises:
        UserError: A run would have to resume from it.
    """
    path = _find_flag("--ckpt_path", flags)
    if path is None or path in CHOICES or not is_imported(expand_path(path)):
        return flags
    if command == "fit":
        raise UserError(
            f"--ckpt_path {path} is a model of another program, which no run can resume: give --model.init_from {path}"
        )
    return [*remove_flags(["--ckpt_path"], flags), f"--model.init_from={path}"]


def _checkpoint_choice(command: str, flags: list[str], configs: list[dict[str, Any]], is_given: bool) -> str | None:
    """Return the flag `--ckpt_path`, a path or one of `CHOICES`; None if the command line needs no checkpoint.

    Args:
        command: The command.
        flags: Its flags.
        configs: Its configs.
        is_given: Whether the model is given otherwise.

    Raises:
        UserError: Two flags give the weights.
    """
    choice = _find_flag("--ckpt_path", flags)
    choice = None if choice == "null" else choice
    resumes = command == "fit" and choice in CHOICES  # the command that has begun the run, with its shape and tokenizer
    if choice is not None and not resumes and _find_flag("--model.init_from", flags) is not None:
        raise UserError("--ckpt_path and --model.init_from both say where the weights are: leave one out")
    if choice is None and command != "fit" and not is_given and not any("ckpt_path" in config for config in configs):
        return "auto"
    return choice


def find_values(flags: list[str]) -> dict[str, str]:
    """Return the values of flags as they were typed, by the names of their settings."""
    values = {}
    for arg, following in zip(flags, [*flags[1:], ""]):
        flag, equals, value = arg.partition("=")
        if flag.startswith("--"):
            values[flag.removeprefix("--")] = value if equals else following
    return values


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
    """Return the value of a text setting from its last flag, else from the last config that has it, else None."""
    given = [text.value for text in split_text_flags(flags)[0] if text.key == key]
    saved = [get_setting(config, key) for config in configs if has_setting(config, key)]
    return next(iter([*reversed(given), *reversed(saved)]), None)
