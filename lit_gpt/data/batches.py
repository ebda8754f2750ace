"""Batches of `(tokens, targets)`, each (B, T) int64, every one a pure function of its place.

A process that prepares batches imports this, and nothing of Lightning.
"""

import signal
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_gpt.data.shards import Ids
from lit_gpt.data.windows import STARTS, gather
from lit_gpt.model import IGNORE

EVALUATION_TOKENS = 4096  # without gradients a batch may be larger than a small training batch, and is faster so

Batch = tuple[Tensor, Tensor]


class TrainBatches(Dataset[Batch]):
    """Item i is a rank's i-th batch since the run began, over all epochs.

    Args:
        ids: of the training split.
        length: T.
        sampling: "random" or "shuffled".
        seed: of the sampling.
        batch_size: B, windows of one forward.
        accumulation: forwards of every rank in an optimizer step.
        rank: whose batches they are.
        world_size: how many ranks there are.
    """

    def __init__(
        self,
        ids: Ids,
        length: int,
        sampling: str,
        seed: int,
        batch_size: int,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.ids, self.length, self.starts, self.seed = ids, length, STARTS[sampling], seed
        self.batch_size, self.accumulation = batch_size, accumulation
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, index: int) -> Batch:
        step, forward = divmod(index, self.accumulation)
        together = self.batch_size * self.world_size  # windows of one forward, on all ranks
        count = together * self.accumulation  # of the global batch
        starts = self.starts(self.seed, step, count, len(self.ids), self.length)  # (count,)
        first = forward * together + self.rank * self.batch_size
        return _tensors(*gather(self.ids, starts[first : first + self.batch_size], self.length))


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


def nothing_to_seed(worker: int) -> None:
    """What a worker does first: no batch draws from a random state. Lightning's own would have it import Lightning."""


class Loader(DataLoader):
    """Starts its workers so that they hear neither Ctrl-C nor SIGTERM; without any, batches come the short way.

    A worker lives as long as the process it works for, which hears them and may still want batches.
    """

    def _get_iterator(self) -> Any:
        if not self.num_workers and not self.pin_memory:  # torch's own iterator takes 0.1 ms more for a batch
            return (self.dataset[i] for i in self.sampler)
        if not self.num_workers or not hasattr(signal, "pthread_sigmask"):
            return super()._get_iterator()
        resource_tracker.ensure_running()  # which, when it starts, unblocks them
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # workers inherit it
        try:
            return super()._get_iterator()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
