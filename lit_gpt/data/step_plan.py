"""Count a run in optimizer steps: how many there are, and how often it validates."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepPlan:
    """The optimizer steps of a run. Lightning counts batches instead, some of them once for each epoch.

    Attributes:
        accumulate_grad_batches: Batches of each rank in an optimizer step.
        windows_per_step: Windows of all ranks in an optimizer step, which is the global batch size.
        num_batches: Batches of each rank in one pass over the training split.
        steps_per_epoch: Optimizer steps in an epoch.
        validation_interval: Optimizer steps between two validations; a mean, rounded down, where validations are not
            spaced evenly. None if the run does not validate, or validates after a time.
        last_step: Number of the last optimizer step, counted from 1; None if the run has no end.
    """

    accumulate_grad_batches: int
    windows_per_step: int
    num_batches: int
    steps_per_epoch: int
    validation_interval: int | None
    last_step: int | None


def plan_steps(
    num_windows: int,
    batch_size: int,
    world_size: int = 1,
    accumulate_grad_batches: int = 1,
    limit_train_batches: int | float = 1.0,
    val_check_interval: int | float | None = 1.0,
    check_val_every_n_epoch: int | None = 1,
    max_steps: int = -1,
    max_epochs: int | None = -1,
) -> StepPlan:
    """Return the step plan that follows from the size of the data and from settings of the Trainer.

    A pass over the training split has about as many windows as the split, at least one optimizer step, and no
    incomplete step. An epoch is as much of it as `limit_train_batches` says.

    Args:
        num_windows: Windows of the training split, end to end.
        batch_size: Windows in a batch of one rank.
        world_size: Number of ranks.
        accumulate_grad_batches: Batches of each rank in an optimizer step.
        limit_train_batches: Batches of an epoch if int, part of the pass if float.
        val_check_interval: Batches between validations if int, part of an epoch if float; None: no validation.
        check_val_every_n_epoch: Validate in every n-th epoch only; None: count batches over all epochs.
        max_steps: Optimizer steps of the run; -1 for no limit.
        max_epochs: Epochs of the run; -1 or None for no limit.
    """
    windows_per_step = batch_size * world_size * accumulate_grad_batches
    num_batches = max(1, num_windows // windows_per_step) * accumulate_grad_batches
    batches_per_epoch = limit_batches(num_batches, limit_train_batches)
    # rounded up: the Trainer takes a step after the last batch of an epoch
    steps_per_epoch = max(1, math.ceil(batches_per_epoch / accumulate_grad_batches))
    interval: int | None = None
    if isinstance(val_check_interval, float):
        val_check_interval = max(1, int(val_check_interval * batches_per_epoch))
    if val_check_interval is not None and check_val_every_n_epoch is None:
        interval = max(1, val_check_interval // accumulate_grad_batches)
    elif val_check_interval is not None and check_val_every_n_epoch is not None:
        validations = max(1, batches_per_epoch // val_check_interval)  # in every n-th epoch
        interval = max(1, check_val_every_n_epoch * steps_per_epoch // validations)
    limits = [max_steps] if max_steps >= 0 else []
    limits += [max_epochs * steps_per_epoch] if max_epochs is not None and max_epochs >= 0 else []
    last_step = min(limits, default=None)
    return StepPlan(accumulate_grad_batches, windows_per_step, num_batches, steps_per_epoch, interval, last_step)


def limit_batches(num_batches: int, limit: int | float) -> int:
    """Return how many of the batches of a dataloader the Trainer uses: at most `limit` if int, that part if float."""
    return min(num_batches, limit) if isinstance(limit, int) else int(num_batches * limit)
