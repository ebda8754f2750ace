"""Tests of lit_gpt.data.batches."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from lit_gpt.data.batches import BatchLoader, EvaluationBatches, TrainBatches
from lit_gpt.data.windows import random_starts

IDS = np.random.default_rng(0).integers(0, 5, 200).astype(np.uint16)


def train_batches(end_of_text: int | None = None) -> TrainBatches:
    return TrainBatches(IDS, 16, "random", 1337, batch_size=4, accumulate_grad_batches=3, end_of_text=end_of_text)


def test_get_batch_returns_the_windows_drawn_for_seed_and_step() -> None:
    starts = random_starts(1337, 5, 12, len(IDS), 16)
    for micro_batch in range(3):
        tokens, targets = train_batches().get_batch(5, micro_batch)
        for row, start in enumerate(starts[4 * micro_batch : 4 * micro_batch + 4]):
            assert tokens[row].tolist() == IDS[start : start + 16].tolist()
            assert targets[row].tolist() == IDS[start + 1 : start + 17].tolist()
        for found, expected in zip(train_batches()[5 * 3 + micro_batch], (tokens, targets)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("split", ["train", "evaluation"])
def test_documents_count_the_end_of_text_ids_in_the_window(split: str) -> None:
    evaluation = [EvaluationBatches(IDS, np.array([0, 16, 184]), 16, 1, end_of_text=end) for end in (None, 3)]
    plain, masked = [train_batches(), train_batches(3)] if split == "train" else evaluation
    tokens, targets, documents = masked[0]
    assert torch.equal(tokens, plain[0][0])
    assert torch.equal(targets, plain[0][1])
    assert documents.dtype == torch.int64
    for row, numbers in zip(tokens.tolist(), documents.tolist()):
        assert numbers == [row[: i + 1].count(3) for i in range(16)]


class BlockedSignals(Dataset[torch.Tensor]):
    """Item i says whether SIGINT and SIGTERM are blocked in the process that prepares it."""

    def __getitem__(self, index: int) -> torch.Tensor:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return torch.tensor([signum in blocked for signum in (signal.SIGINT, signal.SIGTERM)])

    def __len__(self) -> int:
        return 2


@pytest.mark.parametrize("persistent", [False, True], ids=["", "persistent"])
def test_workers_block_sigint_and_sigterm_and_the_training_process_does_not(persistent: bool) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    loader = BatchLoader(
        BlockedSignals(),
        batch_size=None,
        num_workers=1,
        persistent_workers=persistent,
        multiprocessing_context="spawn",
    )
    for _ in range(2 if persistent else 1):
        assert torch.stack(list(loader)).all()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
    assert not torch.stack(list(BatchLoader(BlockedSignals(), batch_size=None))).any()


def test_batches_without_workers_bypass_the_iterator_of_data_loader() -> None:
    batches = [np.zeros(2), np.ones(2)]  # DataLoader's iterator would convert them to tensors
    loader = BatchLoader(batches, batch_size=None)  # type: ignore[arg-type]
    for _ in range(2):
        assert all(found is expected for found, expected in zip(loader, batches, strict=True))


WORKER_SCRIPT = """
from lit_gpt import TextDataModule

if __name__ == "__main__":
    data = TextDataModule("rows.txt", tokenizer="byte", context_length=8, batch_size=2, num_workers=1)
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    print(next(batches)[0].shape)
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be blocked here")
def test_script_with_a_running_worker_exits(tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("one row\n" * 200)
    (tmp_path / "script.py").write_text(WORKER_SCRIPT)
    command = [sys.executable, "script.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "torch.Size([2, 8])\n", "")


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_worker_killed_while_it_hands_over_a_batch_is_reported_as_lost(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def batches(loader: BatchLoader) -> Iterator[int]:
        yield 7
        raise error

    monkeypatch.setattr(BatchLoader, "_start_iterator", batches)
    iterator = iter(BatchLoader(train_batches(), batch_size=None, num_workers=1))
    assert next(iterator) == 7
    with pytest.raises(RuntimeError, match="DataLoader worker exited unexpectedly"):
        next(iterator)
