"""Batches are the same for any number of workers and devices, and evaluation scores every token once."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import forked

from lit_gpt.data.batches import Batch, EvaluationBatches
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.ops import IGNORE_INDEX


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """200 rows of text; the working folder takes the cache."""
    monkeypatch.chdir(tmp_path)
    rows = [f"row {i}: " + "abcdefghij"[i % 10] * (i % 7) for i in range(200)]
    Path("rows.txt").write_text("\n".join(rows), encoding="utf-8")
    return "rows.txt"


def module(files: str, rank: int = 0, world_size: int = 1, step: int = 0, **changes: object) -> TextDataModule:
    """A data module attached to what it needs of a Trainer."""
    settings: dict[str, object] = {"tokenizer": "byte", "context_length": 16, "batch_size": 4, **changes}
    data = TextDataModule(files, **settings)  # type: ignore[arg-type]
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        accumulate_grad_batches=1,
        overfit_batches=0,
        limit_train_batches=1.0,
        fast_dev_run=False,
        val_check_interval=1.0,
        check_val_every_n_epoch=None,
        max_steps=-1,
        max_epochs=-1,
    )
    return data


def test_the_last_tenth_of_the_rows_validates(numbers: str) -> None:
    data = module(numbers)
    assert data.tokenizer.decode(data.train_ids).endswith("row 179: jjjj")
    assert data.tokenizer.decode(data.val_ids).startswith("row 180: ")
    assert data.train_ids[-1] == data.val_ids[-1] == data.tokenizer.end_of_text


def test_the_last_tenth_of_a_raw_text_validates(numbers: str) -> None:
    data = module(numbers, mode="raw")
    text = Path(numbers).read_bytes()
    assert bytes(np.asarray(data.train_ids, dtype=np.uint8)) == text[: int(len(text) * 0.9)]
    assert bytes(np.asarray(data.val_ids, dtype=np.uint8)) == text[int(len(text) * 0.9) :]


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_any_number_of_workers_gives_the_same_batches(numbers: str, sampling: str) -> None:
    def batches(num_workers: int) -> list[Batch]:
        return list(module(numbers, sampling=sampling, num_workers=num_workers).train_dataloader())

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) > 20
    for (x, y), (other_x, other_y) in zip(alone, helped):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape == y.shape == (4, 16)


def test_a_worker_is_no_copy_of_this_process_and_is_sent_no_ids(numbers: str) -> None:
    batches = module(numbers).train_batches()
    sent = pickle.dumps(batches)
    assert len(sent) < 1000 < len(batches.ids)
    for one, other in zip(batches[3], pickle.loads(sent)[3]):
        assert torch.equal(one, other)
    assert module(numbers, num_workers=1).train_dataloader().multiprocessing_context.get_start_method() != "fork"


def test_a_worker_imports_nothing_of_lightning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # heard by what is started from here: the worker
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_steps", 1, "--data.num_workers", 1)
    assert ended.status == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.err.splitlines() if line.startswith("import time:")}
    assert "lit_gpt.data.batches" in imported
    assert "lightning" not in imported


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_two_devices_share_the_windows_one_device_takes_in_turn(numbers: str, sampling: str) -> None:
    alone = module(numbers, sampling=sampling, global_batch_size=16)
    pair = [module(numbers, rank, 2, sampling=sampling, global_batch_size=16) for rank in (0, 1)]
    assert len(alone.train_dataloader()) == 2 * len(pair[0].train_dataloader()) == 2 * len(pair[1].train_dataloader())
    whole, (first, second) = alone.train_batches(), [one.train_batches() for one in pair]
    for i in range(10):
        torch.testing.assert_close(first[i][0], whole[2 * i][0])
        torch.testing.assert_close(second[i][0], whole[2 * i + 1][0])


def test_a_run_goes_on_where_its_step_says(numbers: str) -> None:
    all_batches = list(module(numbers, global_batch_size=8).train_dataloader())
    steps = len(all_batches) // 2
    resumed = list(module(numbers, global_batch_size=8, step=5).train_dataloader())
    assert len(resumed) == len(all_batches) - 10
    for (x, _), (expected, _) in zip(resumed, all_batches[10:]):
        assert torch.equal(x, expected)
    next_epoch = list(module(numbers, global_batch_size=8, step=steps).train_dataloader())
    assert len(next_epoch) == len(all_batches)
    assert not torch.equal(next_epoch[0][0], all_batches[0][0])


def test_batches_leave_the_global_random_state_alone(numbers: str) -> None:
    before = torch.get_rng_state()
    data = module(numbers)
    for loader in [data.train_dataloader(), *data.val_dataloader()]:
        list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_evaluation_scores_every_token_of_the_split_once(numbers: str, world_size: int) -> None:
    loaders = [module(numbers, rank, world_size, eval_windows=None).val_dataloader()[1] for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1  # else ranks would wait for each other
    targets = torch.cat([y[y != IGNORE_INDEX] for loader in loaders for _, y in loader])
    expected = np.asarray(module(numbers).val_ids)[1:]
    assert sorted(targets.tolist()) == sorted(expected.tolist())
    if world_size == 1:
        np.testing.assert_array_equal(targets.numpy(), expected)


def test_both_splits_are_estimated_on_equally_many_windows(numbers: str) -> None:
    training, validation = module(numbers, eval_windows=10).val_dataloader()
    assert sum(len(x) for x, _ in training) == sum(len(x) for x, _ in validation) == 10


@pytest.mark.parametrize(("context_length", "most"), [(2, 256), (64, None)])
def test_beside_a_whole_validation_split_at_most_256_windows_of_training_are_estimated(
    numbers: str, context_length: int, most: int | None
) -> None:
    data = module(numbers, eval_windows=None, val_fraction=0.4, context_length=context_length)
    training, validation = (sum(len(x) for x, _ in loader) for loader in data.val_dataloader())
    assert training == (most or validation)
    assert validation == -(-(len(data.val_ids) - 1) // context_length)


def test_a_short_last_window_has_targets_only_where_there_is_text() -> None:
    ids = np.arange(20, dtype=np.uint16)
    x, y = EvaluationBatches(ids, np.array([0, 8, 16]), context_length=8, batch_size=1)[0]
    assert y[2].tolist() == [17, 18, 19, *[IGNORE_INDEX] * 5]
    assert x[2, :4].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "--data.batch_size is 0: give 1 or more"),
        ({"val_fraction": 1.0}, "--data.val_fraction is 1.0: give a fraction between 0 and 1"),
        ({"global_batch_size": 6}, "--data.global_batch_size 6 is not a multiple of 4"),
        ({"context_length": 1000}, "the validation split has [0-9]+ tokens, fewer than one window of 1001"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_are_said(numbers: str, settings: dict[str, object], message: str) -> None:
    def use() -> int:
        data = module(numbers, **settings)
        data.plan  # noqa: B018
        return data.model_vocab_size

    with pytest.raises(UserError, match=message):
        use()
