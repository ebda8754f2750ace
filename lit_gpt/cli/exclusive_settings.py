"""Settings that exclude each other: the one that is given later wins.

A config may give `data.columns`, and a flag `--data.template`. Together they would be refused, although it is clear
what is meant: the flag. So a flag or a later config removes from the earlier configs what it stands for, and what has
no effect beside it, as `data.vocab` beside `--data.tokenizer byte`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lit_gpt.cli.config_values import get_setting, has_setting, pop_setting
from lit_gpt.data.config import FITTED
from lit_gpt.data.readers import READERS, TABLE_SETTINGS, TEXT_SETTINGS

# Each group has two sides. A setting of one side replaces all settings of the other.
GROUPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("data.columns",), ("data.template",)),
    (
        ("data.split_column",),
        ("data.split_seed", "data.group_column", "data.val_fraction", "data.test_fraction"),
    ),
    (("data.split_column",), ("data.val_files", "data.test_files")),
    (("data.val_files",), ("data.val_fraction",)),
    (("data.test_files",), ("data.test_fraction",)),
    (("data.global_batch_size",), ("trainer.accumulate_grad_batches",)),
    (("trainer.check_val_every_n_epoch",), ("trainer.val_check_interval",)),
    (("trainer.max_steps",), ("trainer.max_epochs",)),
)

# Settings beside which others may have no effect, see `_without_effect`.
DECIDING = ("data.mode", "data.format", "data.tokenizer", "data.val_files", "data.test_files")
ROW_SETTINGS = ("split_seed", "split_column", "group_column", "dedupe")  # of the section data, for documents in rows

LIMITS = ("trainer.max_steps", "trainer.max_epochs", "trainer.max_time")  # the flag --budget stands for them
NO_LIMIT = -1  # of the steps or epochs of a run
NOT_GIVEN = (None, NO_LIMIT, "null", str(NO_LIMIT))


def remove_replaced(configs: list[dict[str, Any]], flags: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Remove the settings that a later setting of the same group replaces, or that have no effect beside a later one.

    `trainer.max_epochs` also replaces the default of `trainer.max_steps`.

    Args:
        configs: The configs, those that win last; changed in place.
        flags: The settings that flags give, by name. They win over all configs.
        defaults: The defaults of all settings. A config that was saved by a run gives all settings; those that have
            their defaults replace nothing.
    """
    for group in GROUPS:
        for number in reversed(range(len(configs) + 1)):
            for side, other in (group, group[::-1]):
                if any(_gives(configs, flags, number, key, defaults) for key in side):
                    _remove(configs[:number], other)
    for key in DECIDING:
        giving = [number for number, config in enumerate(configs) if has_setting(config, key)]
        winner = len(configs) if key in flags else max(giving, default=0)
        _remove(configs[:winner], _without_effect(key, lambda key: _winning_value(configs, flags, key, defaults)))
    if flags.get("budget") not in NOT_GIVEN:
        _remove(configs, LIMITS)
    numbers = range(len(configs) + 1)
    has_steps = "trainer.max_steps" in flags or any(has_setting(config, "trainer.max_steps") for config in configs)
    if not has_steps and any(_gives(configs, flags, number, "trainer.max_epochs", defaults) for number in numbers):
        configs.insert(0, {"trainer": {"max_steps": NO_LIMIT}})


def _remove(configs: list[dict[str, Any]], keys: Iterable[str]) -> None:
    """Remove settings from those configs that have them."""
    for config in configs:
        for key in keys:
            if has_setting(config, key):
                pop_setting(config, key)


def _without_effect(deciding: str, value_of: Callable[[str], Any]) -> list[str]:
    """Return the settings that have no effect beside the value of another one.

    Args:
        deciding: One of `DECIDING`.
        value_of: Returns the value that a setting has for the command.
    """
    value, names = value_of(deciding), []
    reader = READERS.get(f".{value}")
    if deciding == "data.mode" and value == "raw":
        names = ["format", *TABLE_SETTINGS, *ROW_SETTINGS]
    elif deciding == "data.format" and reader is not None:
        used = (*reader.settings, *(() if reader.binary else TEXT_SETTINGS))
        names = [name for name in (*TABLE_SETTINGS, *TEXT_SETTINGS) if name not in used]
        names += ["delimiter"] * (value == "tsv") + ["split_column", "group_column"] * (value == "txt")
    elif deciding == "data.tokenizer":
        names = ["vocab"] * (value in FITTED) + ["vocab_size"] * (value != "bpe")
    elif deciding in ("data.val_files", "data.test_files") and value_of("data.val_files") is not None:
        is_divided = value_of("data.test_files") is None and value_of("data.test_fraction") not in (0, "0", "0.0")
        names = [] if is_divided else ["split_seed", "group_column"]
    return [f"data.{name}" for name in names]


def _winning_value(configs: list[dict[str, Any]], flags: dict[str, Any], key: str, defaults: Mapping[str, Any]) -> Any:
    """Return the value that a setting has for the command."""
    values = [get_setting(config, key) for config in configs if has_setting(config, key)]
    value = flags[key] if key in flags else next(reversed(values), None)
    return defaults[key] if value in NOT_GIVEN else value


def _gives(
    configs: list[dict[str, Any]], flags: dict[str, Any], number: int, key: str, defaults: Mapping[str, Any]
) -> bool:
    """Return whether a config, or the flags for the number after the last config, give a setting a value that holds.

    A value does not hold if a later config or a flag gives the same setting, be it null.
    """
    if number == len(configs):
        return flags.get(key) not in NOT_GIVEN
    if key in flags or any(has_setting(config, key) for config in configs[number + 1 :]):
        return False
    value = get_setting(configs[number], key)
    return value not in NOT_GIVEN and value != defaults[key]
