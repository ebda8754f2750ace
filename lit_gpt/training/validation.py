"""Validate before the first step of a run and after its last one."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

from lit_gpt.compat import set_logged_step
from lit_gpt.training.logger import StepLogger


class StartEndValidation(Callback):
    """Validate the untrained model, as the course does, and the model after the last step, whatever the interval.

    Lightning itself validates at its interval only. This callback has to come before all others but `StepsInTime`, so
    that they see at the start of a batch whether its step is the last one.

    The last step is also a logging step, because Lightning logs when a run is about to stop.

    Args:
        at_start: Whether to validate the untrained model. A resumed run does not do it again.
    """

    def __init__(self, at_start: bool = True) -> None:
        self.at_start = at_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_untrained = trainer.global_step == 0 and trainer.ckpt_path is None
        if self.at_start and is_untrained and trainer.enable_validation:
            validate_untrained(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        set_logged_step(trainer)  # before callbacks such as LearningRateMonitor log at the start of the batch
        steps = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        if steps and trainer.global_step + 1 == trainer.estimated_stepping_batches:
            trainer.should_stop = True  # after this batch; Lightning validates a run that is about to stop


def validate_untrained(trainer: Trainer) -> None:
    """Validate before the first step, and log the values at step 0.

    EarlyStopping does not see it: patience counts from the first validation of a trained model, and `loss/train` does
    not exist yet.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, StepLogger)]
    for logger in loggers:
        logger.step_offset = 0
    try:
        _validate(trainer)
    finally:
        for logger in loggers:
            logger.step_offset = 1


def validate_between_steps(trainer: Trainer) -> None:
    """Validate when a step has begun, and log the values at the step before it; EarlyStopping does not see it."""
    set_logged_step(trainer, trainer.global_step - 1)
    _validate(trainer)


def _validate(trainer: Trainer) -> None:
    """Run the validation loop inside `trainer.fit`, as Lightning does after a step."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    trainer.callbacks = [callback for callback in callbacks if not isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]
    try:
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
    finally:
        trainer.callbacks = callbacks  # type: ignore[attr-defined]
