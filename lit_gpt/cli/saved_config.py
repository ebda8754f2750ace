"""Take settings from the config that a checkpoint contains.

Whoever wrote the checkpoint wrote its config, so it is not trusted: the parser may import what a config names, and call
it. Only plain values of settings that are known here get to the parser. Everything else is left out, and said.
"""

import math
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.config_file import LINKED_SETTINGS
from lit_gpt.cli.text_settings import setting_types
from lit_gpt.cli.yaml_text import load_yaml
from lit_gpt.errors import UserError, shorten

# Settings that never come from a checkpoint: they run code of any class, or say where to write.
NEVER_TAKEN = {
    *("trainer.callbacks", "trainer.plugins", "trainer.profiler", "trainer.model_registry"),
    *("config", "ckpt_path", "allow_data_change", "allow_imports", "preflight", "budget", "plan"),
}

STRATEGY_NAMES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true")
STRATEGY_CLASSES = ("lightning.pytorch.strategies.DDPStrategy", "lit_gpt.training.fsdp.FSDP2")  # those in configs/
STRATEGY_TEXTS = ("process_group_backend", "start_method", "timeout")  # of their arguments, those that may be a text
ACCELERATOR_NAMES = ("auto", "cpu", "gpu", "cuda", "mps")

# Settings that may name a file; a URL would be opened.
FILE_SETTINGS = ("data.files", "data.val_files", "data.test_files", "data.tokenizer")

MAX_SHOWN = 5  # settings that are left out


def read_saved_config(checkpoint: Checkpoint) -> dict[Any, Any]:
    """Return the config that a checkpoint contains, as it stands there.

    Raises:
        UserError: It contains none, or what it contains is not YAML, or not the config of a run.
    """
    text: Any = checkpoint.config_text
    if not isinstance(text, str):
        raise UserError(f"{checkpoint.path} was not written by fit.py and contains no config: give --config")
    try:
        config = load_yaml(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{checkpoint.path}: its config cannot be read ({problem}): give --config") from None
    if not isinstance(config, dict):
        raise UserError(f"{checkpoint.path}: its config has no settings: give --config")
    return config


def take_settings(checkpoint: Checkpoint, is_given: Callable[[str], bool]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings of a checkpoint's config that need no trust.

    Args:
        checkpoint: The checkpoint, with a config.
        is_given: Whether a flag gives the setting of this name, for example "trainer.strategy".

    Returns:
        The settings, as nested as in a config; and the names of those left out, except for those that a flag gives.

    Raises:
        UserError: The config cannot be read, or it names a URL and no flag does.
    """
    checks = setting_checks()
    checks["trainer.default_root_dir"] = lambda value: value is None or _contains_run(value, checkpoint.path)
    taken: dict[str, Any] = {}
    left_out: list[str] = []
    for key, value in _flatten(read_saved_config(checkpoint), checks):
        if is_given(key):
            continue
        if key in FILE_SETTINGS and (url := _find_url(value)):
            raise UserError(f"{checkpoint.path}: --{key} is the URL {url}: give --{key} too, to read it from there")
        if key in checks and checks[key](value):
            section = taken
            *parents, name = key.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
            section[name] = value
        elif value is not None:
            left_out.append(key)
    return taken, left_out


def describe_left_out(checkpoint: Checkpoint, names: list[str]) -> str:
    """Return the line that says which settings of a checkpoint's config do not apply."""
    shown = ", ".join(f"--{shorten(name)}" for name in names[:MAX_SHOWN])
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    return (
        f"warning: {checkpoint.path}: left out of its config, which may only give plain values: {shown}{more}; to use "
        "them, give these flags or --config"
    )


# ------------------------------------------------------------------------------------------------- what is accepted


def setting_checks() -> dict[str, Callable[[Any], bool]]:
    """Return for each setting that a checkpoint may give, by its name, a function that accepts its values.

    A setting whose type has a class is not among them, unless it has a function of its own.
    """
    checks: dict[str, Callable[[Any], bool]] = {
        name: partial(_is_plain_value, hint=hint)
        for name, hint in setting_types().items()
        if _is_plain_type(hint) and name not in NEVER_TAKEN and name not in LINKED_SETTINGS
    }
    checks["trainer.strategy"] = _is_known_strategy
    checks["trainer.accelerator"] = lambda value: value in ACCELERATOR_NAMES
    checks["trainer.logger"] = lambda value: value is None or isinstance(value, bool)
    return checks


def _is_plain_type(hint: Any) -> bool:
    """Return whether a type is made of numbers, texts, and lists or dictionaries of them."""
    origin = get_origin(hint)
    if origin is Literal:
        return True
    if origin in (Union, UnionType, list, tuple, dict):
        return all(_is_plain_type(inner) for inner in get_args(hint))
    return hint in (bool, int, float, str, timedelta, NoneType)


def _is_plain_value(value: Any, hint: Any) -> bool:
    """Return whether a value from YAML is one of a plain type. The parser would also convert a text to a number."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin in (Union, UnionType):
        return any(_is_plain_value(value, option) for option in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(_is_plain_value(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_plain_value(key, inner[0]) and _is_plain_value(item, inner[1]) for key, item in value.items()
        )
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    return type(value) is (str if hint is timedelta else hint)


def _is_known_strategy(value: Any) -> bool:
    """Return whether a value of `trainer.strategy` is a known name, or a known class with plain arguments."""
    if isinstance(value, str):
        return value in STRATEGY_NAMES
    if not isinstance(value, dict) or not value.keys() <= {"class_path", "init_args"}:
        return False
    arguments = value.get("init_args") or {}
    return (
        value.get("class_path") in STRATEGY_CLASSES
        and isinstance(arguments, dict)
        and all(
            isinstance(argument, bool | int | float | None) or (name in STRATEGY_TEXTS and isinstance(argument, str))
            for name, argument in arguments.items()
        )
    )


def _contains_run(folder: Any, checkpoint: Path) -> bool:
    """Return whether a checkpoint is in a run below this folder: the path of the checkpoint says so, too."""
    parents = checkpoint.resolve().parents
    return isinstance(folder, str) and len(parents) > 2 and Path(os.path.expanduser(folder)).resolve() == parents[2]


def _find_url(value: Any) -> str | None:
    """Return the first URL of a setting that takes one path or a list of paths."""
    paths = value if isinstance(value, list) else [value]
    return next((path for path in paths if isinstance(path, str) and "://" in path), None)


def _flatten(config: dict[Any, Any], names: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a config by name.

    A key with a dot in it is not what the parser understands by it, so it gets a name that no setting has.

    Args:
        config: The config, or one of its sections.
        names: The names of all settings, which say what is a section.
        prefix: What precedes the names in this section, as "trainer.".
    """
    for key, value in config.items():
        name = f"{prefix}{key}"
        is_section = any(other.startswith(f"{name}.") for other in names)
        if is_section and isinstance(value, dict) and "." not in str(key):
            yield from _flatten(value, names, f"{name}.")
        else:
            yield name.replace(".", "/") if "." in str(key) else name, value
