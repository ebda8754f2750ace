"""Count a run in optimizer steps: how many there are, and after which of them the run validates."""

from dataclasses import dataclass

from lit_gpt.errors import UserError


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a run. Lightning counts batches instead, some of them once for each epoch.

    Attributes:
        accumulate_grad_batches: Batches of each rank in an optimizer step.
        windows_per_step: Windows of all ranks in an optimizer step, which is the global batch size.
        steps_per_epoch: Optimizer steps in an epoch.
        validation_interval: Optimizer steps between two validations.
        last_step: Number of the last optimizer step, counted from 1; None if the run has no end.
    """

    accumulate_grad_batches: int
    windows_per_step: int
    steps_per_epoch: int
    validation_interval: int
    last_step: int | None

    def validates_after(self, step: int) -> bool:
        """Return whether the run validates after optimizer step `step`, counted from 1."""
        return step % self.validation_interval == 0 or step == self.last_step


def plan_steps(
    num_windows: int,
    batch_size: int,
    global_batch_size: int | None = None,
    world_size: int = 1,
    accumulate_grad_batches: int = 1,
    overfit_batches: int = 0,
    val_check_interval: int | float = 1.0,
    max_steps: int = -1,
    max_epochs: int | None = -1,
) -> StepPlan:
    """Return the step plan that follows from the settings of the data and of the Trainer.

    An epoch has about as many windows as the training split, at least one optimizer step, and no incomplete step.

    Args:
        num_windows: Windows of the training split, end to end.
        batch_size: Windows in a batch of one rank.
        global_batch_size: Windows in an optimizer step over all ranks; decides `accumulate_grad_batches` if given.
        world_size: Number of ranks.
        accumulate_grad_batches: The Trainer's setting; counts without `global_batch_size`.
        overfit_batches: Batches of an epoch that repeats the same few batches; 0 for all.
        val_check_interval: Optimizer steps between validations if int, part of an epoch if float.
        max_steps: Optimizer steps of the run; -1 for no limit.
        max_epochs: Epochs of the run; -1 or None for no limit.

    Raises:
        UserError: A global batch, or `overfit_batches`, is not a whole number of batches or optimizer steps.
    """
    windows_per_batch = batch_size * world_size
    if global_batch_size is not None:
        if global_batch_size % windows_per_batch:
            raise UserError(
                f"--data.global_batch_size {global_batch_size} is not a multiple of {windows_per_batch}, "
                f"--data.batch_size {batch_size} on {world_size} device(s): change one of them"
            )
        accumulate_grad_batches = global_batch_size // windows_per_batch
    if overfit_batches % accumulate_grad_batches:
        raise UserError(
            f"--trainer.overfit_batches {overfit_batches} is not a multiple of {accumulate_grad_batches}, the "
            "batches of an optimizer step: change one of them"
        )
    windows_per_step = windows_per_batch * accumulate_grad_batches
    steps_per_epoch = max(1, num_windows // windows_per_step)
    if overfit_batches:
        steps_per_epoch = min(steps_per_epoch, overfit_batches // accumulate_grad_batches)
    if isinstance(val_check_interval, float):
        val_check_interval = max(1, int(val_check_interval * steps_per_epoch))
    limits = [max_steps] if max_steps >= 0 else []
    limits += [max_epochs * steps_per_epoch] if max_epochs is not None and max_epochs >= 0 else []
    return StepPlan(
        accumulate_grad_batches, windows_per_step, steps_per_epoch, val_check_interval, min(limits, default=None)
    )
