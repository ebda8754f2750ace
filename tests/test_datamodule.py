"""Batches of TextDataModule: independent of workers and ranks, exact on resuming, complete in evaluation."""

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
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write 200 rows of text into a new working folder, which also takes the token cache."""
    monkeypatch.chdir(tmp_path)
    lines = [f"row {i}: " + "abcdefghij"[i % 10] * (i % 7) for i in range(200)]
    Path("rows.txt").write_text("\n".join(lines), encoding="utf-8")
    return "rows.txt"


def make_data(
    files: str,
    rank: int = 0,
    world_size: int = 1,
    step: int = 0,
    limit_train_batches: int | float = 1.0,
    overfit_batches: int | float = 0.0,
    **changes: object,
) -> TextDataModule:
    """Return a data module attached to a stand-in for a Trainer, which accumulates as the data module says."""
    settings: dict[str, object] = {"tokenizer": "byte", "context_length": 16, "batch_size": 4, **changes}
    data = TextDataModule(files, **settings)  # type: ignore[arg-type]
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        global_rank=rank,
        world_size=world_size,
        global_step=step,
        accumulate_grad_batches=1,
        overfit_batches=overfit_batches,
        limit_train_batches=overfit_batches or limit_train_batches,
        limit_val_batches=1.0,
        fast_dev_run=False,
        val_check_interval=1.0,
        check_val_every_n_epoch=None,
        max_steps=-1,
        max_epochs=-1,
    )
    data.trainer.accumulate_grad_batches = data.batches_per_step  # type: ignore[union-attr]
    return data


def test_last_tenth_of_the_rows_is_the_validation_split(rows: str) -> None:
    data = make_data(rows)
    assert data.tokenizer.decode(data.train_ids).endswith("row 179: jjjj")
    assert data.tokenizer.decode(data.val_ids).startswith("row 180: ")
    assert data.train_ids[-1] == data.val_ids[-1] == data.tokenizer.end_of_text


def test_last_tenth_of_a_raw_text_is_the_validation_split(rows: str) -> None:
    data = make_data(rows, mode="raw")
    text = Path(rows).read_bytes()
    assert bytes(np.asarray(data.train_ids, dtype=np.uint8)) == text[: int(len(text) * 0.9)]
    assert bytes(np.asarray(data.val_ids, dtype=np.uint8)) == text[int(len(text) * 0.9) :]


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_batches_do_not_depend_on_num_workers(rows: str, sampling: str) -> None:
    def batches(num_workers: int) -> list[Batch]:
        return list(make_data(rows, sampling=sampling, num_workers=num_workers).train_dataloader())

    without_workers, with_workers = batches(0), batches(2)
    assert len(without_workers) == len(with_workers) > 20
    for (x, y), (other_x, other_y) in zip(without_workers, with_workers):
        assert torch.equal(x, other_x)
        assert torch.equal(y, other_y)
        assert torch.equal(x[:, 1:], y[:, :-1])
        assert x.shape == y.shape == (4, 16)


def test_workers_are_not_forked_and_receive_no_token_ids(rows: str) -> None:
    batches = make_data(rows).train_batches()
    sent = pickle.dumps(batches)
    assert len(sent) < 1000 < len(batches.ids)
    for one, other in zip(batches[3], pickle.loads(sent)[3]):
        assert torch.equal(one, other)
    assert make_data(rows, num_workers=1).train_dataloader().multiprocessing_context.get_start_method() != "fork"


def test_workers_do_not_import_lightning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # for the worker that is started
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_steps", 1, "--data.num_workers", 1)
    assert ended.status == 0
    imported = {line.rpartition("|")[2].strip() for line in ended.err.splitlines() if line.startswith("import time:")}
    assert "lit_gpt.data.batches" in imported
    assert "lightning" not in imported


@pytest.mark.parametrize("sampling", ["random", "shuffled"])
def test_two_ranks_share_the_windows_of_one_rank(rows: str, sampling: str) -> None:
    alone = make_data(rows, sampling=sampling, global_batch_size=16)
    pair = [make_data(rows, rank, 2, sampling=sampling, global_batch_size=16) for rank in (0, 1)]
    assert len(alone.train_dataloader()) == 2 * len(pair[0].train_dataloader()) == 2 * len(pair[1].train_dataloader())
    whole, (first, second) = alone.train_batches(), [one.train_batches() for one in pair]
    for i in range(10):
        torch.testing.assert_close(first[i][0], whole[2 * i][0])
        torch.testing.assert_close(second[i][0], whole[2 * i + 1][0])


def test_train_dataloader_continues_at_the_global_step(rows: str) -> None:
    all_batches = list(make_data(rows, global_batch_size=8).train_dataloader())
    steps = len(all_batches) // 2
    resumed = list(make_data(rows, global_batch_size=8, step=5).train_dataloader())
    assert len(resumed) == len(all_batches) - 10
    for (x, _), (expected, _) in zip(resumed, all_batches[10:]):
        assert torch.equal(x, expected)
    next_epoch = list(make_data(rows, global_batch_size=8, step=steps).train_dataloader())
    assert len(next_epoch) == len(all_batches)
    assert not torch.equal(next_epoch[0][0], all_batches[0][0])


@pytest.mark.parametrize("limit", [6, 0.18])
def test_limited_epochs_follow_each_other(rows: str, limit: int | float) -> None:
    all_batches = make_data(rows, global_batch_size=8).train_batches()
    for step, expected in ((0, range(6)), (2, range(4, 6)), (3, range(6, 12)), (7, range(14, 18))):
        data = make_data(rows, step=step, limit_train_batches=limit, global_batch_size=8)
        loader = data.train_dataloader()
        assert (len(loader), data.plan.steps_per_epoch) == (34, 3)  # Lightning limits the length of the loader
        for (x, _), index in zip(loader, expected, strict=True):
            assert torch.equal(x, all_batches[index][0])


@pytest.mark.parametrize("overfit_batches", [6, 0.18])
def test_overfitted_epochs_have_the_same_batches(rows: str, overfit_batches: int | float) -> None:
    for step, expected in ((0, range(6)), (3, range(6)), (7, range(2, 6))):
        data = make_data(rows, step=step, overfit_batches=overfit_batches, global_batch_size=8)
        assert list(data.train_dataloader().sampler) == list(expected)


def test_get_batch_draws_what_training_draws(rows: str) -> None:
    data = TextDataModule(rows, tokenizer="byte", context_length=16, batch_size=4, global_batch_size=8)
    trained = list(data.train_dataloader())
    for step in range(5):
        for tensor, expected in zip(data.get_batch("train", step), trained[2 * step], strict=True):
            assert torch.equal(tensor, expected)
    with pytest.raises(UserError, match="get_batch has no split 'test': give train or val"):
        data.get_batch("test")  # type: ignore[arg-type]


def test_get_batch_draws_windows_of_the_validation_split(rows: str) -> None:
    data = TextDataModule(rows, tokenizer="byte", context_length=16, batch_size=64)
    x, y = data.get_batch("val", 3)
    assert x.shape == y.shape == (64, 16)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(data.val_ids), 17)
    found = {tuple(window) for window in windows.tolist()}
    assert all((*tokens, targets[-1]) in found for tokens, targets in zip(x.tolist(), y.tolist()))
    assert not torch.equal(x, data.get_batch("val", 4)[0])


def test_batches_do_not_use_the_global_random_state(rows: str) -> None:
    before = torch.get_rng_state()
    data = make_data(rows)
    for loader in [data.train_dataloader(), *data.val_dataloader()]:
        list(loader)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_batches_have_every_token_of_the_split_once(rows: str, world_size: int) -> None:
    loaders = [make_data(rows, rank, world_size, eval_windows=None).val_dataloader()[1] for rank in range(world_size)]
    assert len({len(loader) for loader in loaders}) == 1  # otherwise the ranks would wait for each other
    targets = torch.cat([y[y != IGNORE_INDEX] for loader in loaders for _, y in loader])
    expected = np.asarray(make_data(rows).val_ids)[1:]
    assert sorted(targets.tolist()) == sorted(expected.tolist())
    if world_size == 1:
        np.testing.assert_array_equal(targets.numpy(), expected)


def test_both_splits_are_evaluated_on_eval_windows_windows(rows: str) -> None:
    training, validation = make_data(rows, eval_windows=10).val_dataloader()
    assert sum(len(x) for x, _ in training) == sum(len(x) for x, _ in validation) == 10


@pytest.mark.parametrize(("context_length", "most"), [(2, 256), (64, None)])
def test_whole_validation_split_comes_with_at_most_256_training_windows(
    rows: str, context_length: int, most: int | None
) -> None:
    data = make_data(rows, eval_windows=None, val_fraction=0.4, context_length=context_length)
    training, validation = (sum(len(x) for x, _ in loader) for loader in data.val_dataloader())
    assert training == (most or validation)
    assert validation == -(-(len(data.val_ids) - 1) // context_length)


def test_positions_after_the_end_of_the_split_have_no_target() -> None:
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
        ({"limit_train_batches": 3, "global_batch_size": 8}, "limit_train_batches 3 is an epoch of 3 batches, not a"),
        (
            {"overfit_batches": 3, "global_batch_size": 8},
            "overfit_batches 3 is an epoch of 3 batches, not a multiple of 2",
        ),
        ({"limit_train_batches": 0.001}, "limit_train_batches 0.001 of 34 batches is none: give more"),
        ({"context_length": 1000}, "the validation split has [0-9]+ tokens, fewer than one window of 1001"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_user_errors(rows: str, settings: dict[str, object], message: str) -> None:
    def use() -> int:
        data = make_data(rows, **settings)
        data.check_trainer(data.trainer)  # type: ignore[arg-type]
        return data.model_vocab_size

    with pytest.raises(UserError, match=message):
        use()
