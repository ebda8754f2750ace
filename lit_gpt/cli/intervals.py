"""The Trainer's intervals as fit.py counts them: in optimizer steps, whereas the Trainer counts batches."""

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_gpt.data.datamodule import TextDataModule

DEFAULT_VAL_CHECK_INTERVAL = 200  # optimizer steps

# The arguments of the Trainer that fit.py defines itself: type and help. Lightning's type of a limit is
# `Union[float, int]` to the parser, which then reads 1, one batch, as 1.0, all batches.
TRAINER_ARGUMENTS: dict[str, tuple[Any, str]] = {
    "limit_train_batches": (int | float | None, "Batches of an epoch if int, part of the training split if float."),
    "limit_val_batches": (int | float | None, "Batches of a validation if int, part of its windows if float. 0: none."),
    "limit_test_batches": (int | float | None, "Batches of a test if int, part of its windows if float."),
    "overfit_batches": (int | float, "Repeat this many batches if int, this part of the data if float."),
    "val_check_interval": (
        int | float | str | None,
        "Optimizer steps between validations if int, part of an epoch if float. null: "
        f"{DEFAULT_VAL_CHECK_INTERVAL}, or the end of every n-th epoch with check_val_every_n_epoch.",
    ),
    "check_val_every_n_epoch": (int | None, "Validate at the end of every n-th epoch, instead of val_check_interval."),
}


def resolve_validation_interval(settings: Namespace) -> None:
    """Write the default of `val_check_interval` into the settings under `trainer`: what a run used is then saved.

    It is every n-th epoch's end where `check_val_every_n_epoch` is given, and otherwise a number of optimizer steps.
    """
    if settings.val_check_interval is None:
        settings.val_check_interval = 1.0 if settings.check_val_every_n_epoch else DEFAULT_VAL_CHECK_INTERVAL


def apply_step_plan(trainer: Trainer, data: TextDataModule, settings: Namespace) -> None:
    """Make the Trainer accumulate batches and validate as the settings say, which count windows and optimizer steps.

    The Trainer has to be constructed, because the number of its devices decides how many batches make up a step.

    Args:
        trainer: Changed in place.
        data: The data module; it is attached to the Trainer, whose settings its step plan follows.
        settings: The settings under `trainer`.

    Raises:
        UserError: The settings contradict each other.
    """
    data.trainer = trainer
    trainer.accumulate_grad_batches = data.batches_per_step
    data.check_trainer(trainer)
    interval, plan = settings.val_check_interval, data.plan
    if isinstance(interval, float):
        interval = max(1, int(interval * (settings.check_val_every_n_epoch or 1) * plan.steps_per_epoch))
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]  # which sets both to validate once, at its end
        trainer.val_check_interval = interval * plan.accumulate_grad_batches
        trainer.check_val_every_n_epoch = None  # count these batches over all epochs
