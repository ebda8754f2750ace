"""Every private attribute of another library that this package uses, in one place.

Each function says why public API does not suffice. Each has a test in tests/test_compat.py that fails when the library
renames the attribute or changes its meaning. Heavy libraries are imported inside the functions, so that importing this
module stays cheap.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.tensorboard import FileWriter, SummaryWriter


# --------------------------------------------------------------------------------------------------------- lightning


def set_logged_step(trainer: "Trainer") -> None:
    """Make Lightning log metrics of the current optimizer step at x = `trainer.global_step`.

    `self.log` and callbacks such as LearningRateMonitor take their x axis from a counter of the training loop. After a
    resume at a step that validates, Lightning increments this counter once too often, and no public setter exists.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


# ------------------------------------------------------------------------------------------------------------- torch


def fused_adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """Update `parameters` and both moments in place by step number `step` (from 1) of AdamW, in one kernel.

    The public `torch.optim.AdamW(fused=True)` calls the same kernel, but it keeps one step counter for each parameter.
    `MuonAdamW` keeps one for each parameter group, and its checkpoints have this format.
    """
    step_tensor = torch.full((), step, dtype=torch.float32, device=parameters[0].device)
    torch._fused_adamw_(
        parameters,
        gradients,
        exp_avgs,
        exp_avg_sqs,
        [],  # running maxima of AMSGrad, which is off
        [step_tensor] * len(parameters),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=1e-8,
        amsgrad=False,
        maximize=False,
    )


# ------------------------------------------------------------------------------------------------------- tensorboard


def event_file_writer(writer: "SummaryWriter") -> "FileWriter":
    """Return the writer of the event file, which takes many values as one event; open a new file if it was closed.

    The public `SummaryWriter.add_scalar` writes one event for each value. The public attribute `file_writer` is None
    after `close`, as in `trainer.validate()` after `trainer.fit()`.
    """
    return writer._get_file_writer()
