"""Batches of `(tokens, targets)`, each (B, T) int64, every one a pure function of its place.

A process that prepares batches imports this, and nothing of Lightning.
"""

import multiprocessing
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from lit_gpt.data.shards import Ids
from lit_gpt.data.windows import STARTS, gather
from lit_gpt.model import IGNORE

if TYPE_CHECKING:
    from lit_gpt.data.datamodule import TextDataModule

EVALUATION_TOKENS = 4096  # without gradients a batch may be larger than a small training batch, and is faster so

Batch = tuple[Tensor, Tensor]


class TrainBatches(Dataset[Batch]):
    """Item i is this rank's i-th batch since the run began, over all epochs: a pure function of i."""

    def __init__(self, data: "TextDataModule") -> None:
        self.ids, self.length = data.train_ids, data.context_length
        self.starts, self.seed = STARTS[data.sampling], data.seed
        self.batch_size, self.accumulation = data.batch_size, data.accumulation
        self.windows_per_step = data.windows_per_step
        self.rank, self.world_size = (data.trainer.global_rank if data.trainer else 0), data.world_size
        self.batches = data.steps_per_epoch * data.accumulation

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> Batch:
        step, forward = divmod(index, self.accumulation)
        starts = self.starts(self.seed, step, self.windows_per_step, len(self.ids), self.length)  # (global batch,)
        first = (forward * self.world_size + self.rank) * self.batch_size
        return _tensors(*gather(self.ids, starts[first : first + self.batch_size], self.length))


class RunSampler(SequentialSampler):
    """The batches of the current epoch that are still to come, read off the Trainer's step.

    A sequential sampler by type, which is what `overfit_batches` asks for: then every epoch has the same batches.
    """

    def __init__(self, data: "TextDataModule") -> None:
        self.data = data

    def __len__(self) -> int:
        return self.data.steps_per_epoch * self.data.accumulation

    def __iter__(self) -> Iterator[int]:
        trainer = self.data.trainer
        assert trainer is not None
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        start = 0 if overfit else trainer.global_step * self.data.accumulation
        return iter(range(start, (start // len(self) + 1) * len(self)))


class EvaluationBatches(Dataset[Batch]):
    """Fixed windows in order, dealt to the ranks in turn; what is beyond the split has no targets.

    Every rank has equally many batches, if need be one whose targets count in no loss.
    """

    def __init__(
        self, ids: Ids, starts: np.ndarray, length: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.ids, self.length = ids, length
        self.batch_size = max(batch_size, EVALUATION_TOKENS // length)
        share = -(-len(starts) // world_size)
        starts = np.concatenate((starts, np.full(share * world_size - len(starts), len(ids))))
        self.starts = starts[rank::world_size]  # (share,)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size]  # (n,)
        last = len(self.ids) - 1
        places = starts[:, None] + np.arange(self.length + 1)  # (n, T + 1)
        windows = self.ids[places.clip(max=last)].astype(np.int64)  # (n, T + 1)
        targets = np.where(places[:, 1:] <= last, windows[:, 1:], IGNORE)  # (n, T)
        return _tensors(windows[:, :-1], targets)


def _tensors(tokens: np.ndarray, targets: np.ndarray) -> Batch:
    return torch.from_numpy(np.ascontiguousarray(tokens)), torch.from_numpy(np.ascontiguousarray(targets))


def workers(count: int) -> dict[str, Any]:
    """What a DataLoader is told of `count` processes that prepare its batches.

    They are not copies of this process: one with threads, copied, may hold locks that no one opens.
    """
    if not count:
        return {}
    known = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in known else "spawn")
    context.set_forkserver_preload([__name__])
    return {
        "num_workers": count,
        "persistent_workers": True,
        "multiprocessing_context": context,
        "worker_init_fn": _leave_signals,
    }


def _leave_signals(worker: int) -> None:
    """A worker lives as long as the process it works for, which hears Ctrl-C and SIGTERM and may still want batches."""
    signal.set_wakeup_fd(-1)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
