"""Datasets whose items are whole batches, and the DataLoader for them.

A batch is `(tokens, targets)`, or `(tokens, targets, documents)` where attention must not cross documents, each
(B, T) int64. It depends only on its index and on the arguments of its dataset. Worker processes import this module, so
it does not import Lightning.
"""

import atexit
import multiprocessing
import signal
import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_gpt.data.shards import TokenIds
from lit_gpt.data.windows import WINDOW_SAMPLERS, read_windows
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.processes import signals_blocked

MIN_EVALUATION_TOKENS = 4096  # per batch; without gradients, smaller batches are slower

Batch = tuple[Tensor, ...]


class TrainBatches(Dataset[Batch]):
    """Item i is the i-th training batch of a rank, counted from the start of the run over all epochs.

    Args:
        ids: Token ids of the training split.
        context_length: T, tokens in a window.
        sampling: How windows are drawn: "random" or "shuffled".
        seed: Seed of the sampling.
        batch_size: B, windows in a batch.
        accumulate_grad_batches: Batches of each rank in an optimizer step.
        rank: Rank that the batches are for.
        world_size: Number of ranks.
        end_of_text: Id that separates documents. If given, batches contain `documents`.
    """

    def __init__(
        self,
        ids: TokenIds,
        context_length: int,
        sampling: str,
        seed: int,
        batch_size: int,
        accumulate_grad_batches: int,
        rank: int = 0,
        world_size: int = 1,
        end_of_text: int | None = None,
    ) -> None:
        self.ids, self.context_length = ids, context_length
        self.draw_starts, self.seed = WINDOW_SAMPLERS[sampling], seed
        self.batch_size, self.accumulate_grad_batches = batch_size, accumulate_grad_batches
        self.rank, self.world_size = rank, world_size
        self.end_of_text = end_of_text

    def __getitem__(self, index: int) -> Batch:
        return self.get_batch(*divmod(index, self.accumulate_grad_batches))

    def get_batch(self, step: int, micro_batch: int = 0) -> Batch:
        """Return a training batch of this rank: the `get_batch` of the course, as a pure function of seed and step.

        Every rank draws the window starts of the global batch, which has
        `batch_size * world_size * accumulate_grad_batches` windows, and takes its own part of them.

        Args:
            step: Optimizer step, from 0.
            micro_batch: Number of the batch in the optimizer step, from 0 to `accumulate_grad_batches - 1`.
        """
        windows_per_micro_batch = self.batch_size * self.world_size
        global_batch_size = windows_per_micro_batch * self.accumulate_grad_batches
        starts = self.draw_starts(self.seed, step, global_batch_size, len(self.ids), self.context_length)
        first = micro_batch * windows_per_micro_batch + self.rank * self.batch_size
        starts = starts[first : first + self.batch_size]  # (B,)
        return _make_batch(*read_windows(self.ids, starts, self.context_length), self.end_of_text)


class EvaluationBatches(Dataset[Batch]):
    """Fixed windows in order, distributed over the ranks in turn.

    All ranks have the same number of windows. Positions after the end of the split have the target IGNORE_INDEX.

    Args:
        ids: Token ids of a split.
        starts: First token of each window, (N,) int64.
        context_length: T, tokens in a window.
        batch_size: Windows in a batch; more where they have fewer than MIN_EVALUATION_TOKENS tokens together.
        rank: Rank that the batches are for.
        world_size: Number of ranks.
        end_of_text: Id that separates documents. If given, batches contain `documents`.
    """

    def __init__(
        self,
        ids: TokenIds,
        starts: np.ndarray,
        context_length: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        end_of_text: int | None = None,
    ) -> None:
        self.ids, self.context_length, self.end_of_text = ids, context_length, end_of_text
        self.batch_size = max(batch_size, MIN_EVALUATION_TOKENS // context_length)
        padding = -len(starts) % world_size
        starts = np.concatenate((starts, np.full(padding, len(ids))))  # a window after the end has no targets
        self.starts = starts[rank::world_size]  # (ceil(N / world_size),)

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, index: int) -> Batch:
        starts = self.starts[index * self.batch_size : (index + 1) * self.batch_size]  # (B,)
        last = len(self.ids) - 1
        positions = starts[:, None] + np.arange(self.context_length + 1)  # (B, T + 1)
        windows = self.ids[positions.clip(max=last)].astype(np.int64)  # (B, T + 1)
        targets = np.where(positions[:, 1:] <= last, windows[:, 1:], IGNORE_INDEX)  # (B, T)
        return _make_batch(windows[:, :-1], targets, self.end_of_text)


def _make_batch(tokens: np.ndarray, targets: np.ndarray, end_of_text: int | None) -> Batch:
    """Return `(tokens, targets)` as tensors, with `documents` where `end_of_text` is given.

    `documents` numbers the documents of each window from its first token; the end-of-text id begins a document.
    """
    x, y = torch.from_numpy(np.ascontiguousarray(tokens)), torch.from_numpy(np.ascontiguousarray(targets))  # (B, T)
    return (x, y) if end_of_text is None else (x, y, (x == end_of_text).cumsum(dim=1))


def skip_worker_seeding(worker_id: int) -> None:
    """Do nothing, as the `worker_init_fn` of workers whose batches need no random state.

    Without a `worker_init_fn` Lightning sets its own, and every worker imports Lightning.
    """


class BatchLoader(DataLoader):
    """A DataLoader whose items are whole batches.

    Its workers do not receive SIGINT and SIGTERM: the training process does, and needs them to finish its step.
    """

    def __iter__(self) -> Any:
        """Yield the batches. The sampler decides where to start when the first batch is asked for, and not before.

        The Trainer may create the iterator before it has read the step from a checkpoint: a learning rate schedule
        that asks for `trainer.estimated_stepping_batches` needs the loader.

        Raises:
            RuntimeError: A worker is gone.
        """
        if self.num_workers == 0 and not self.pin_memory:
            for index in self.sampler:  # 0.1 ms a batch faster than DataLoader's iterator
                yield self.dataset[index]
        else:
            try:
                yield from self._start_iterator()
            except (ConnectionError, EOFError) as error:  # the worker was killed while it handed over a batch
                raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error

    def state_dict(self) -> dict[str, Any]:
        """Return nothing. By these two methods the Trainer knows that the loader can continue within an epoch."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the sampler continues at the step of the Trainer."""

    def _start_iterator(self) -> Any:
        """Return the iterator of a DataLoader, whose workers do not receive SIGINT and SIGTERM."""
        if self.num_workers == 0:
            return super().__iter__()
        children = set(multiprocessing.active_children())
        with signals_blocked(signal.SIGINT, signal.SIGTERM):
            iterator = super().__iter__()  # starts the workers
        if not _workers:
            atexit.register(_kill_workers)
        _workers.update(set(multiprocessing.active_children()) - children)
        return iterator


_workers: "weakref.WeakSet[Any]" = weakref.WeakSet()  # the worker processes that BatchLoader has started


def _kill_workers() -> None:
    """Kill the workers that still run when the interpreter exits.

    multiprocessing would send them SIGTERM, which they block, and wait for them forever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # DataLoader's handler would report them as failed
    for worker in _workers:
        worker.kill()
