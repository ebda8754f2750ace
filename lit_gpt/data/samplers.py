"""The samplers of the dataloaders: which batches of its dataset each epoch has."""

from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING

from torch.utils.data import DistributedSampler, SequentialSampler

from lit_gpt.data.step_plan import StepPlan

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class RankSampler(SequentialSampler, DistributedSampler[int]):
    """Yield all indices of a dataset that has the batches of one rank only.

    The Trainer asks for both base classes. With `overfit_batches` it replaces a sampler that is not a
    SequentialSampler. On several devices it replaces one that is not a DistributedSampler, and would then divide the
    batches of a rank among the ranks.

    Args:
        batches: The dataset.
    """

    def __init__(self, batches: Sized) -> None:
        SequentialSampler.__init__(self, batches)


class EpochSampler(RankSampler):
    """Yield the indices of those training batches of the current epoch that follow the Trainer's `global_step`.

    This makes resuming exact: no state has to be restored. With `overfit_batches`, every epoch has the same indices.

    Args:
        plan: The steps of the run.
        trainer: Its `global_step` decides where iteration starts. None: at the start of the run.
    """

    def __init__(self, plan: StepPlan, trainer: "Trainer | None") -> None:
        self.plan, self.trainer = plan, trainer

    def __len__(self) -> int:
        """Return the number of batches in a pass over the training split, which the Trainer limits to an epoch."""
        return self.plan.num_batches

    def __iter__(self) -> Iterator[int]:
        step = self.trainer.global_step if self.trainer is not None else 0
        epoch, step_in_epoch = divmod(step, self.plan.steps_per_epoch)
        overfits = self.trainer is not None and self.trainer.overfit_batches  # type: ignore[attr-defined]
        first_step = 0 if overfits else epoch * self.plan.steps_per_epoch
        accumulation = self.plan.accumulate_grad_batches
        start, end = first_step + step_in_epoch, first_step + self.plan.steps_per_epoch
        return iter(range(start * accumulation, end * accumulation))
