"""Settings of which one stands for another: the one that is given later wins.

A config may give `data.columns`, and a flag `--data.template`. Together they would be refused, although it is clear
what is meant: the flag. So a flag or a later config removes from the earlier configs what it stands for.
"""

from collections.abc import Mapping
from typing import Any

from lit_gpt.cli.config_values import get_setting, has_setting, pop_setting

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

NO_LIMIT = -1  # of the steps or epochs of a run
NOT_GIVEN = (None, NO_LIMIT, "null", str(NO_LIMIT))


def remove_replaced(configs: list[dict[str, Any]], flags: dict[str, Any], defaults: Mapping[str, Any]) -> None:
    """Remove the settings that a later setting of the same group replaces.

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
                    for config in configs[:number]:
                        for key in other:
                            if has_setting(config, key):
                                pop_setting(config, key)
    numbers = range(len(configs) + 1)
    has_steps = "trainer.max_steps" in flags or any(has_setting(config, "trainer.max_steps") for config in configs)
    if not has_steps and any(_gives(configs, flags, number, "trainer.max_epochs", defaults) for number in numbers):
        configs.insert(0, {"trainer": {"max_steps": NO_LIMIT}})


def _gives(
    configs: list[dict[str, Any]], flags: dict[str, Any], number: int, key: str, defaults: Mapping[str, Any]
) -> bool:
    """Return whether a config, or the flags for the number after the last config, give a setting a value."""
    if number == len(configs):
        return flags.get(key) not in NOT_GIVEN
    value = get_setting(configs[number], key)
    return value not in NOT_GIVEN and value != defaults[key]
