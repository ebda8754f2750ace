"""The Python API works without the command line, as docs and docstrings show it."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fit, points, weights
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lit_gpt import GPTConfig, LitGPT, TextDataModule, UserError
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.optim import learning_rate_factor

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:It is recommended to use `self.log",  # the metrics are equal on all ranks already
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
    "ignore:.*`isinstance.treespec, LeafSpec.` is deprecated",
)

VOCAB_SIZE = 257  # of the tokenizer byte
SHAPE: dict[str, Any] = {"context_length": 16, "d_model": 16, "num_blocks": 2, "num_heads": 2}


def make_model(vocab_size: int = VOCAB_SIZE, dropout: float = 0.0, **arguments: Any) -> LitGPT:
    torch.manual_seed(1)
    return LitGPT(GPTConfig(vocab_size=vocab_size, dropout=dropout, **SHAPE), **arguments)


def make_data(**arguments: Any) -> TextDataModule:
    return TextDataModule("rows.txt", **{"tokenizer": "byte", "context_length": 16, "batch_size": 4, **arguments})


def make_trainer(**arguments: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1}
    return Trainer(accelerator="cpu", **{"max_steps": 6, "logger": False, **quiet, **arguments})


def make_loader(vocab_size: int = 50, examples: int = 40, batch_size: int = 4) -> DataLoader:
    ids = torch.randint(vocab_size, (examples, 17), generator=torch.Generator().manual_seed(2))
    ids[0, 0] = vocab_size - 1
    return DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=batch_size)


def csv_column(folder: Path, tag: str) -> list[tuple[int, float]]:
    """Return the (step, value) of a metric in CSVLogger's file."""
    with open(folder / "metrics.csv", newline="") as file:
        return [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row[tag]]


def logged_losses(folder: Path) -> dict[str, str]:
    """Return the column loss/train of CSVLogger's file by step."""
    lines = (folder / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    return {row["step"]: row["loss/train"] for row in rows if row["loss/train"]}


# ------------------------------------------------------------------------------------------------- TextDataModule


def test_data_module_gives_batches_without_a_trainer(folder: Path) -> None:
    data = make_data(global_batch_size=12)
    data.prepare_data()
    assert list(Path("data/cache").glob("*/corpus.json"))
    data.setup("fit")
    tokens, targets = next(iter(data.train_dataloader()))
    assert tokens.shape == targets.shape == (4, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert len(list(data.train_dataloader())) == data.plan.steps_per_epoch * 3
    assert [len(loader) for loader in data.val_dataloader()] == [1, 1]
    tokens, targets, documents = next(iter(make_data(document_mask=True).train_dataloader()))
    assert documents.shape == tokens.shape


def test_fit_with_stock_callbacks_and_loggers(folder: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="loss/val", save_last=True, dirpath="checkpoints")
    trainer = make_trainer(
        max_steps=16,
        val_check_interval=8,
        logger=[CSVLogger("logs", name="csv", version=0), TensorBoardLogger("logs", name="tensorboard")],
        callbacks=[checkpoint, EarlyStopping("loss/val", patience=5)],
    )
    model, data = make_model(), make_data()
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 16
    assert list(logged_losses(Path("logs/csv/version_0"))) == [str(step) for step in range(16)]
    assert set(trainer.callback_metrics) >= {"loss/train", "loss/train_eval", "loss/val", "val/bits_per_byte"}
    assert checkpoint.best_model_score == trainer.callback_metrics["loss/val"]
    loaded = LitGPT.load_from_checkpoint("checkpoints/last.ckpt")
    for one, other in zip(loaded.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)
    (validated,) = make_trainer().validate(loaded, datamodule=make_data(), verbose=False)[:1]
    assert validated["loss/val"] == pytest.approx(float(trainer.callback_metrics["loss/val"]))


@pytest.mark.parametrize(
    ("settings", "validated"),
    [
        ({}, [10, 20]),
        ({"accumulate_grad_batches": 2}, [5, 10]),
        ({"check_val_every_n_epoch": 2}, [20]),
        ({"val_check_interval": 0.5}, [5, 10, 15, 20]),
        ({"val_check_interval": 4}, [4, 8, 14, 18]),  # counted in each epoch
        ({"val_check_interval": 4, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}, [2, 4, 6, 8, 10]),
        ({"limit_val_batches": 1}, [10, 20]),
        ({"limit_val_batches": 0}, []),
        ({"overfit_batches": 4}, [4, 8]),
    ],
    ids=str,
)
def test_default_trainer_validates_and_ends_as_its_settings_say(
    folder: Path, settings: dict[str, Any], validated: list[int]
) -> None:
    few = {"max_epochs": 2, "limit_train_batches": 10, "max_steps": -1, "enable_checkpointing": False}
    data, trainer, model = make_data(), make_trainer(**{**few, **settings}), make_model(min_learning_rate=0.0)
    found: list[int] = []
    original = model.on_validation_epoch_end

    def on_validation_epoch_end() -> None:
        original()
        if not trainer.sanity_checking:
            found.append(trainer.global_step)

    model.on_validation_epoch_end = on_validation_epoch_end  # type: ignore[method-assign]
    before = dict(vars(trainer))
    trainer.fit(model, datamodule=data)
    assert found == validated
    assert trainer.global_step == data.plan.last_step == trainer.estimated_stepping_batches
    kept = ("accumulate_grad_batches", "val_check_interval", "check_val_every_n_epoch", "limit_train_batches")
    assert [getattr(trainer, name) for name in kept] == [before[name] for name in kept]


def test_trainer_must_accumulate_the_global_batch(folder: Path) -> None:
    message = r"global_batch_size 8 is 2 batches of 4 windows .*: give Trainer\(accumulate_grad_batches=2\)"
    with pytest.raises(UserError, match=message):
        make_trainer(enable_checkpointing=False).fit(make_model(), datamodule=make_data(global_batch_size=8))


def test_stock_parts_reach_the_losses_of_fit_py(fit: Fit) -> None:
    """Only parts of Lightning besides LitGPT and TextDataModule: the same losses at every step, bit for bit."""
    assert fit("--model.config.dropout", 0.2, "--data.global_batch_size", 8).status == 0
    expected = points(Path("logs/small/version_0"))

    seed_everything(1337)
    model = LitGPT(GPTConfig(vocab_size=VOCAB_SIZE, dropout=0.2, **SHAPE), learning_rate=1e-3, warmup_steps=2)
    data = TextDataModule("rows.txt", tokenizer="byte", context_length=16, batch_size=4, eval_windows=8)
    checkpoint = ModelCheckpoint(monitor="loss/val", dirpath="stock/checkpoints")
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=6,  # batches, which is 3 optimizer steps
        log_every_n_steps=1,
        logger=CSVLogger("stock", name="", version=0),
        callbacks=[checkpoint],
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    for tag in ("loss/train", "loss/val", "loss/train_eval"):
        logged = [(step + 1, value) for step, value in csv_column(Path("stock/version_0"), tag)]
        assert logged == [(step, value) for step, value in expected[tag] if step > 0], tag
    best = LitGPT.load_from_checkpoint(checkpoint.best_model_path)
    for name, value in weights(Path("logs/small/version_0/best.ckpt")).items():
        assert torch.equal(value, best.state_dict()[name])


def test_run_resumed_from_a_stock_checkpoint_equals_one_that_was_not_stopped(folder: Path) -> None:
    weights = []
    for max_steps, ckpt_path in ((9, None), (5, None), (9, "resumed.ckpt")):
        model = make_model(dropout=0.1, schedule="constant")
        trainer = make_trainer(
            max_steps=max_steps, val_check_interval=4, accumulate_grad_batches=2, enable_checkpointing=False
        )
        trainer.fit(model, datamodule=make_data(), ckpt_path=ckpt_path)
        trainer.save_checkpoint("resumed.ckpt")
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[2]))
    assert not all(torch.equal(one, other) for one, other in zip(weights[1], weights[2]))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_run_of_epochs_resumes_exactly(folder: Path, num_workers: int) -> None:
    """The learning rate schedule asks for the loader before the Trainer knows the step of the checkpoint."""
    weights = []
    for limit, ckpt_path in ((3, None), (2, None), (3, "resumed.ckpt")):
        model, data = make_model(dropout=0.1, schedule="constant"), make_data(num_workers=num_workers)
        settings = {"limit_train_batches": 4, "accumulate_grad_batches": 2, "enable_checkpointing": False}
        steps = 3 if limit == 2 else -1  # stops in the second epoch
        trainer = make_trainer(max_epochs=limit, max_steps=steps, **settings)
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        trainer.save_checkpoint("resumed.ckpt")
        weights.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(weights[0], weights[2]))
    assert not all(torch.equal(one, other) for one, other in zip(weights[1], weights[2]))


def test_same_trainer_can_fit_further(folder: Path) -> None:
    trainer, data = make_trainer(max_steps=3, enable_checkpointing=False, val_check_interval=2), make_data()
    model = make_model(schedule="constant")
    trainer.fit(model, datamodule=data)
    trainer.fit_loop.epoch_loop.max_steps = 5
    trainer.fit(model, datamodule=data)
    assert (trainer.global_step, data.plan.last_step, data.plan.validation_interval) == (5, 5, 2)


def test_validate_and_test_log_the_metrics_of_their_split(folder: Path) -> None:
    data = make_data(test_fraction=0.2)
    validated = make_trainer().validate(make_model(), datamodule=data, verbose=False)
    assert validated[0].keys() == {
        *("loss/train_eval", "loss/val", "val/perplexity", "val/bits_per_byte", "val/accuracy")
    }
    (tested,) = make_trainer().test(make_model(), datamodule=data, verbose=False)
    assert tested.keys() == {"loss/test", "test/perplexity", "test/bits_per_byte", "test/accuracy"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"accumulate_grad_batches": 4, "limit_train_batches": 5},
            "limit_train_batches 5 is an epoch of 5 batches",
        ),
        ({"limit_train_batches": 0}, "limit_train_batches 0 of 35 batches is none: give more"),
        ({"max_steps": -1, "max_epochs": -1}, "schedule cosine needs an end: give --trainer.max_steps"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_of_the_trainer_that_contradict_the_step_plan_are_refused(
    folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(**settings, enable_checkpointing=False).fit(make_model(), datamodule=make_data())


def test_two_ranks_with_default_settings_train_as_one(folder: Path) -> None:
    """On two ranks Lightning's distributed sampler is the default; each rank must still get its own windows."""
    weights = []
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        quiet = {"enable_checkpointing": False, "accumulate_grad_batches": 2 // devices}
        model, trainer = make_model(), make_trainer(devices=devices, strategy=strategy, **quiet)
        trainer.fit(model, datamodule=make_data(global_batch_size=8))
        weights.append([p.detach() for p in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_adamw_of_torch_and_a_lambda_lr_of_every_step_train_the_model(folder: Path) -> None:
    trainer, model = (
        make_trainer(max_steps=20, enable_checkpointing=False),
        make_model(learning_rate=0.1, warmup_steps=2),
    )
    trainer.fit(model, datamodule=make_data())
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is True
    assert (type(config.scheduler), config.interval) == (torch.optim.lr_scheduler.LambdaLR, "step")
    assert config.scheduler.last_epoch == 20
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * learning_rate_factor(20, "cosine", 2, 20, 0.1))


def test_estimate_loss_returns_the_losses_of_both_splits(folder: Path) -> None:
    trainer, model = make_trainer(enable_checkpointing=False), make_model()
    (logged,) = trainer.validate(model, datamodule=make_data(), verbose=False)[:1]
    losses = model.estimate_loss()
    assert {split: loss.item() for split, loss in losses.items()} == {
        "train": logged["loss/train_eval"],
        "val": logged["loss/val"],
    }


def test_forward_returns_logits_and_loss_as_the_gpt_does(folder: Path) -> None:
    model = make_model(50).eval()
    tokens, targets = next(iter(make_loader()))
    logits, loss = model(tokens, targets)
    assert torch.equal(logits, model.gpt(tokens)[0])
    assert loss.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    assert model(tokens)[1] is None


def test_predict_returns_the_logits_of_the_token_after_each_window(folder: Path) -> None:
    model, loader = make_model(50), make_loader(examples=8, batch_size=4)
    predicted = make_trainer(enable_checkpointing=False).predict(model, loader)
    assert predicted is not None
    for logits, (tokens, _) in zip(predicted, loader, strict=True):
        torch.testing.assert_close(logits, model.eval().gpt(tokens)[0][:, -1])


def test_predict_uses_the_windows_of_the_validation_split(folder: Path) -> None:
    model, data = make_model(), make_data(eval_windows=6)
    (predicted,) = make_trainer(enable_checkpointing=False).predict(model, data) or []
    ((tokens, _),) = data.val_dataloader()[1]
    assert len(tokens) == 6
    torch.testing.assert_close(predicted, model.eval().gpt(tokens)[0][:, -1])


def test_hyperparameters_are_saved_as_plain_values(folder: Path) -> None:
    trainer = make_trainer(enable_checkpointing=False)
    trainer.fit(make_model(learning_rate=0.01), datamodule=make_data())
    trainer.save_checkpoint("run.ckpt")
    hparams = torch.load("run.ckpt", weights_only=True)["hyper_parameters"]
    assert hparams["learning_rate"] == 0.01
    assert hparams["config"]["vocab_size"] == 257
    loaded = LitGPT.load_from_checkpoint("run.ckpt")
    assert loaded.hparams == trainer.lightning_module.hparams


def test_subclass_passes_its_own_arguments_on(folder: Path) -> None:
    class Slow(LitGPT):
        def __init__(self, config: GPTConfig, learning_rate: float = 1.0) -> None:
            super().__init__(config, learning_rate=learning_rate / 1000, weight_decay=0.0)

    model = Slow(make_model().gpt.config)
    assert (model.hparams["learning_rate"], model.hparams["weight_decay"]) == (1e-3, 0.0)
    assert model.parameter_groups()[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    "callback",
    [
        lambda: EarlyStopping("loss/train", patience=9),
        lambda: ModelCheckpoint("checkpoints", monitor="loss/train", every_n_train_steps=4),
        lambda: ModelCheckpoint("checkpoints", monitor="loss/train"),
    ],
    ids=["early stopping", "checkpoint of a step", "checkpoint of an epoch"],
)
def test_loss_train_can_be_monitored_whatever_the_logging_interval(folder: Path, callback: Callable[[], Any]) -> None:
    few: dict[str, Any] = {"max_steps": -1, "max_epochs": 2, "limit_train_batches": 5}
    trainer = make_trainer(**few, log_every_n_steps=50, callbacks=[callback()])
    trainer.fit(make_model(), datamodule=make_data())
    assert trainer.global_step == 10
    last = make_trainer(**few, enable_checkpointing=False)
    last.fit(make_model(), datamodule=make_data())
    assert trainer.callback_metrics["loss/train"] == last.callback_metrics["loss/train"]


def test_dataloaders_of_the_data_module_need_it(folder: Path) -> None:
    data, model = make_data(), make_model()
    message = "dataloaders of a TextDataModule do not work alone: give the Trainer datamodule=data"
    with pytest.raises(UserError, match=message):
        make_trainer(enable_checkpointing=False).fit(model, data.train_dataloader())
    with pytest.raises(UserError, match=message):
        make_trainer().validate(model, data.val_dataloader())


def test_default_warmup_is_a_tenth_of_a_short_run(folder: Path) -> None:
    trainer, model = make_trainer(max_steps=20, enable_checkpointing=False), make_model(learning_rate=0.1)
    rates: list[float] = []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    trainer.callbacks.append(Record())  # type: ignore[attr-defined]
    trainer.fit(model, datamodule=make_data())
    assert rates == pytest.approx([0.1 * learning_rate_factor(step, "cosine", 2, 20, 0.1) for step in range(20)])
    assert make_model(schedule="constant").learning_rate_factor(49) == 0.5  # of 100 steps where no end is known


def test_estimate_loss_without_an_evaluation_is_a_user_error(folder: Path) -> None:
    with pytest.raises(UserError, match="nothing has been evaluated"):
        make_model().estimate_loss()


def test_predict_sees_documents_and_ends_at_the_last_target(folder: Path) -> None:
    model, data = make_model().eval(), make_data(document_mask=True, eval_windows=None)
    predicted = make_trainer(enable_checkpointing=False).predict(model, datamodule=data)
    assert predicted is not None
    *_, (tokens, targets, documents) = data.predict_dataloader()
    length = int((targets[-1] != IGNORE_INDEX).sum())
    assert 0 < length < 16  # the last window of the split is cut short
    logits = model.eval().gpt(tokens, documents=documents)[0]
    torch.testing.assert_close(predicted[-1][-1], logits[-1, length - 1])
    torch.testing.assert_close(predicted[-1][0], logits[0, -1])


# ---------------------------------------------------------------------------------------------- other dataloaders


def test_fit_on_another_dataloader(folder: Path) -> None:
    checkpoint = ModelCheckpoint(monitor="loss/val", dirpath="checkpoints", save_last=True)
    trainer = make_trainer(max_steps=-1, max_epochs=3, logger=CSVLogger("logs", version=0), callbacks=[checkpoint])
    model, loader = make_model(50, dropout=0.1, warmup_steps=1), make_loader()
    trainer.fit(model, loader, make_loader(examples=8))
    assert trainer.global_step == 30
    assert "loss/val" in trainer.callback_metrics
    assert not {"loss/train_eval", "val/bits_per_byte"} & set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["optim/lr"]) < 2e-3 / 9  # the schedule ends with the run
    loaded = LitGPT.load_from_checkpoint("checkpoints/last.ckpt")
    (validated,) = make_trainer().validate(loaded, make_loader(examples=8), verbose=False)
    tokens, targets = next(iter(make_loader(examples=8, batch_size=8)))
    expected = F.cross_entropy(loaded.eval().gpt(tokens)[0].flatten(0, 1), targets.flatten()).item()
    assert validated == {
        "loss/val": pytest.approx(expected, rel=1e-5),
        "val/perplexity": pytest.approx(torch.tensor(expected).exp().item(), rel=1e-4),
        "val/accuracy": (loaded.gpt(tokens)[0].argmax(dim=-1) == targets).float().mean().item(),
    }


def test_incomplete_last_step_of_an_epoch_uses_its_own_gradients_only(folder: Path) -> None:
    """An epoch of 10 batches, 4 to a step, ends with a step of 2 batches."""
    model = make_model(50, schedule="constant", warmup_steps=0)
    expected = make_model(50, schedule="constant", warmup_steps=0)
    optimizer = torch.optim.AdamW(expected.parameter_groups(), betas=(0.9, 0.95))
    batches = list(make_loader())
    losses = []
    for _ in range(2):
        for start in (0, 4, 8):
            step = [expected.gpt.loss(*batch) for batch in batches[start : start + 4]]
            (torch.stack(step).sum() / 4).backward()
            losses.append(torch.stack(step).mean().item())
            optimizer.step()
            optimizer.zero_grad()
    logger = CSVLogger("logs", name="", version=0)
    trainer = make_trainer(max_steps=6, accumulate_grad_batches=4, logger=logger, enable_checkpointing=False)
    trainer.fit(model, make_loader())
    assert [float(loss) for loss in logged_losses(Path("logs/version_0")).values()] == pytest.approx(losses, rel=1e-5)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_validate_on_other_dataloaders_after_a_fit_with_text_data(folder: Path) -> None:
    trainer, model = make_trainer(enable_checkpointing=False), make_model()
    trainer.fit(model, datamodule=make_data())
    first, second = trainer.validate(model, [make_loader(), make_loader(60)], verbose=False)
    assert {*first, *second} == {f"loss/{split}" for split in ("val", "val_1")} | {
        f"{split}/{metric}" for split in ("val", "val_1") for metric in ("perplexity", "accuracy")
    }
    trainer.fit_loop.epoch_loop.max_steps = 9
    with pytest.raises(UserError, match="still has the TextDataModule of an earlier fit: make a new Trainer"):
        trainer.fit(model, make_loader())


# ------------------------------------------------------------------------------------------------- wrong vocab_size


@pytest.mark.parametrize("entry", ["fit", "validate", "test"])
def test_vocab_size_must_be_the_tokenizers(folder: Path, entry: str) -> None:
    message = r"vocab_size is 99, but the tokenizer byte has 257 ids: give GPTConfig\(vocab_size=257\)"
    with pytest.raises(UserError, match=message):
        getattr(make_trainer(enable_checkpointing=False), entry)(make_model(99), datamodule=make_data())


@pytest.mark.parametrize("entry", ["fit", "validate", "test"])
def test_largest_id_of_another_dataloader_must_be_below_vocab_size(folder: Path, entry: str) -> None:
    message = r"vocab_size is 49, but a batch has the id 49: give GPTConfig\(vocab_size=...\) .*, 50 or more"
    with pytest.raises(UserError, match=message):
        getattr(make_trainer(enable_checkpointing=False), entry)(make_model(49), make_loader())


def test_context_length_of_the_data_must_not_exceed_the_models(folder: Path) -> None:
    message = "context_length is 16 in GPTConfig and 32 in TextDataModule: give both the same"
    with pytest.raises(UserError, match=message):
        make_trainer(enable_checkpointing=False).fit(make_model(), datamodule=make_data(context_length=32))


def test_batch_of_another_form_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"a batch is not \(tokens, targets\)"):
        make_trainer(enable_checkpointing=False).fit(make_model(), DataLoader(torch.zeros(8, 17, dtype=torch.int64)))


# ------------------------------------------------------------------------------------------------------ the others


def test_learning_rate_finder_is_refused(folder: Path) -> None:
    tuner = Tuner(make_trainer(enable_checkpointing=False))
    with pytest.raises(UserError, match=r"Tuner.lr_find does not work with LitGPT.*: give learning_rate"):
        tuner.lr_find(make_model(), datamodule=make_data())


def test_batch_size_finder_is_refused(folder: Path) -> None:
    tuner = Tuner(make_trainer(enable_checkpointing=False))
    with pytest.raises(UserError, match=r"Tuner.scale_batch_size does not work with LitGPT.*: give batch_size"):
        tuner.scale_batch_size(make_model(), datamodule=make_data())


def test_generate_is_a_function_at_every_access() -> None:
    import lit_gpt.inference.generate
    from lit_gpt import generate

    def check(function: Any) -> None:
        config = GPTConfig(vocab_size=5, **SHAPE)
        prompt: list[list[int]] = [[1, 2]]
        assert [len(row) for row in function(lit_gpt.GPT(config).eval(), prompt, max_new_tokens=3)] == [3]

    check(generate)
    check(lit_gpt.generate)
    assert lit_gpt.generate is lit_gpt.inference.generate.generate


def test_module_is_usable_without_a_trainer() -> None:
    model = make_model(50)
    tokens, targets = next(iter(make_loader()))
    loss: Tensor = model.gpt.loss(tokens, targets)
    assert not model.is_attached
    assert loss.isfinite()
