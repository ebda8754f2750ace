"""StepCheckpoint: which checkpoints a run writes, and when. StopEarly: when a run stops."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import Fit, points
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from lit_gpt import GPTConfig, LitGPT, TextDataModule, UserError
from lit_gpt.checkpoint.runs import newest_checkpoint, set_aside_later_checkpoints
from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.training.checkpoint_io import AtomicCheckpointIO
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.progress import StepProgress
from lit_gpt.training.validation import StartEndValidation

RUN = Path("logs/small/version_0")


def test_run_writes_config_and_checkpoints(fit: Fit) -> None:
    flags = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 2, "--trainer.max_steps", 7]
    assert fit(*flags).status == 0
    files = sorted(path.name for path in RUN.iterdir() if path.is_file() and not path.name.startswith("events."))
    checkpoints = ["best.ckpt", "last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]
    assert files == sorted([*checkpoints, "config.yaml", "report.html", "summary.json"])
    steps = {name: Checkpoint.open(RUN / name).step for name in files if name.endswith("ckpt")}
    assert steps == {"best.ckpt": 7, "last.ckpt": 7, "step_00000004.ckpt": 4, "step_00000006.ckpt": 6}


def test_run_resumed_at_an_earlier_step_sets_the_later_checkpoints_aside(fit: Fit) -> None:
    saving = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 3]
    resuming = ["--ckpt_path", RUN / "step_00000002.ckpt", "--trainer.max_steps"]
    assert fit(*saving, "--trainer.val_check_interval", 2).status == 0
    before = {name: (RUN / name).read_bytes() for name in ("best.ckpt", "last.ckpt", "step_00000004.ckpt")}
    result = fit(*saving, *resuming, 2)
    assert "later       step_00000006.ckpt, last.ckpt, best.ckpt, step_00000004.ckpt: they move" in result.out
    assert all((RUN / name).read_bytes() == content for name, content in before.items())  # nothing was saved
    assert fit(*saving, *resuming, 3).status == 0
    assert {path.name for path in RUN.glob("*.ckpt")} == {"last.ckpt", "best.ckpt", "step_00000002.ckpt"}
    assert all(Checkpoint.open(path).step <= 3 for path in RUN.glob("*.ckpt"))
    assert all((RUN / "abandoned_0" / name).read_bytes() == content for name, content in before.items())
    assert fit(*saving, *resuming, 4, "--ckpt_path", "last").status == 0
    assert not (RUN / "abandoned_1").exists()
    assert fit("--checkpoint.every_n_steps", 1, "--checkpoint.keep", 1, *resuming, 5).status == 0
    assert [path.name for path in RUN.glob("step_*")] == ["step_00000005.ckpt"]
    assert (RUN / "abandoned_1" / "last.ckpt").exists()
    assert Checkpoint.open(RUN / "best.ckpt").callbacks["StepCheckpoint"]["best_step"] <= 5


def test_best_checkpoint_gets_its_name_again_when_a_later_one_is_set_aside(fit: Fit) -> None:
    flags = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 9, "--trainer.val_check_interval", 2]
    assert fit(*flags).status == 0
    assert Checkpoint.open(RUN / "best.ckpt").step == 6
    # with this learning rate no later validation is better
    worse = ["--model.learning_rate", 1.0, "--model.schedule", "constant", "--trainer.max_steps", 5]
    assert fit(*flags, *worse, "--ckpt_path", RUN / "step_00000004.ckpt").status == 0
    assert Checkpoint.open(RUN / "best.ckpt").step == 4
    assert (RUN / "best.ckpt").read_bytes() == (RUN / "step_00000004.ckpt").read_bytes()


def test_time_of_a_checkpoint_never_goes_back_with_the_clock(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(2e9, -3600)
    monkeypatch.setattr("lit_gpt.training.module.time.time", lambda: next(clock))
    flags = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 9]
    assert fit(*flags, "--trainer.max_steps", 4).status == 0
    assert fit(*flags, "--trainer.max_steps", 6, "--ckpt_path", "last").status == 0
    saved = [Checkpoint.open(path) for path in RUN.glob("*.ckpt")]
    assert len({checkpoint.saved_at for checkpoint in saved}) == 1  # that of the first
    newest, _ = newest_checkpoint(Path("logs"))
    assert newest is not None
    assert (newest.path, newest.step) == (RUN / "last.ckpt", 6)


def test_later_step_of_a_run_is_newer_where_a_clock_was_set_back(fit: Fit) -> None:
    """As runs of an earlier version have them: best.ckpt is older in steps, and newer by its clock."""
    assert fit("--checkpoint.every_n_steps", 4).status == 0
    contents = Checkpoint.open(RUN / "step_00000004.ckpt").read()
    for time, name in ((0.0, "step_00000004.ckpt"), (3600.0, "best.ckpt")):
        save_checkpoint({**contents, "saved_at": contents["saved_at"] + time}, RUN / name)
    before = (RUN / "last.ckpt").read_bytes()
    assert fit("--ckpt_path", "last").status == 0
    assert (RUN / "last.ckpt").read_bytes() == before
    newest, _ = newest_checkpoint(Path("logs"))
    assert newest is not None
    assert newest.path == RUN / "last.ckpt"


@pytest.mark.parametrize("after", [False, True])
def test_process_killed_between_two_renames_loses_no_checkpoint(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    assert fit("--checkpoint.every_n_steps", 1, "--checkpoint.keep", 9, "--trainer.max_steps", 4).status == 0
    straight = {path.name: path.read_bytes() for path in RUN.glob("*.ckpt")}
    rename = Path.rename
    for count in range(1, 6):
        calls = 0

        def killed_rename(path: Path, target: Path, count: int = count) -> Path:
            nonlocal calls
            calls += 1
            if calls == count and not after:
                raise KeyboardInterrupt
            renamed = rename(path, target)
            if calls == count:
                raise KeyboardInterrupt
            return renamed

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", killed_rename)
            with pytest.raises(KeyboardInterrupt):
                set_aside_later_checkpoints(RUN, 1)
        for name, content in straight.items():
            (found,) = [path for path in (RUN / name, RUN / "abandoned_0" / name) if path.exists()]
            assert found.read_bytes() == content
        newest, warning = newest_checkpoint(RUN.parent.parent)
        assert newest is not None
        assert warning == ""
        best_step = newest.callbacks["StepCheckpoint"]["best_step"]
        steps = [Checkpoint.open(path).step for path in RUN.glob("*.ckpt")]
        assert newest.step == max(steps)
        assert best_step <= newest.step
        for path in (RUN / "abandoned_0").iterdir():
            rename(path, RUN / path.name)
        (RUN / "abandoned_0").rmdir()


def test_next_run_removes_unfinished_files_of_a_killed_process(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    unfinished = RUN / ".step_00000002.ckpt.unfinished"
    unfinished.touch()
    assert fit("--trainer.max_steps", 3, "--ckpt_path", RUN / "last.ckpt").status == 0
    assert not unfinished.exists()


def test_only_rank_zero_stores_event_file_sizes() -> None:
    checkpoint: dict[str, Any] = {}
    trainer: Any = SimpleNamespace(is_global_zero=False, loggers=[StepLogger("logs", "small")], callback_metrics={})
    StepCheckpoint().on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    assert "events" not in checkpoint


def test_best_checkpoint_is_the_step_of_the_lowest_validation_loss(fit: Fit) -> None:
    flags = ["--model.learning_rate", 20.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]
    result = fit(*flags, "--trainer.max_steps", 20)
    logged = points(RUN)
    losses = dict(logged["loss/val"][1:])
    best = min(losses, key=losses.__getitem__)
    assert losses[best] > logged["loss/val"][0][1]  # the untrained model is better, and no candidate
    assert best < 20  # with this learning rate the loss rises in the end
    assert Checkpoint.open(RUN / "best.ckpt").step == best
    assert logged["best/loss_val"][-1] == (best, losses[best])
    assert f"loss/val {losses[best]:.4f} at step {best}" in result.out


def test_validation_step_is_saved_after_its_validation(fit: Fit) -> None:
    flags = ["--model.schedule", "constant", "--checkpoint.every_n_steps", 3, "--trainer.max_steps"]
    assert fit(*flags, 3).status == 0
    saved = Checkpoint.open(RUN / "step_00000003.ckpt").callbacks["StepCheckpoint"]
    assert (saved["best_step"], saved["best_loss"]) == points(RUN)["loss/val"][1]
    assert fit(*flags, 6, "--ckpt_path", RUN / "step_00000003.ckpt").status == 0
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, 3, 6]  # neither repeated nor skipped


# --------------------------------------------------------------------------------------- as Lightning's ModelCheckpoint


BARE_TRAINER_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:You're resuming from a checkpoint that ended before the epoch ended",
    "ignore:It is recommended to use `self.log",
)


def make_run(folder: Path, max_steps: int, *callbacks: Callback, **options: Any) -> tuple[Trainer, TextDataModule]:
    """Return a Trainer that validates every three steps, with our checkpoint callback and others, and its data."""
    checkpoint = StepCheckpoint(every_n_steps=2)
    checkpoint.dirpath = str(folder / "run")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    intervals = {"max_epochs": -1, "max_steps": max_steps, "val_check_interval": 3, "check_val_every_n_epoch": None}
    trainer = Trainer(
        accelerator="cpu",
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        callbacks=[StartEndValidation(), checkpoint, *callbacks],
        **{**quiet, **intervals, **options},
    )
    return trainer, TextDataModule("rows.txt", tokenizer="byte", context_length=16, batch_size=4)


def make_model() -> LitGPT:
    torch.manual_seed(1)
    config = GPTConfig(vocab_size=257, context_length=16, d_model=16, num_blocks=1, num_heads=2)
    return LitGPT(config, schedule="constant", warmup_steps=0, learning_rate=0.1)


@BARE_TRAINER_WARNINGS
def test_trainer_finds_best_and_last_checkpoint(folder: Path) -> None:
    trainer, data = make_run(folder, 7)
    model = make_model()
    trainer.fit(model, datamodule=data)
    run = folder / "run"
    checkpoint: Any = trainer.checkpoint_callback
    assert isinstance(checkpoint, ModelCheckpoint)
    assert checkpoint.dirpath == str(run)
    assert checkpoint.best_model_path == str(run / "best.ckpt")
    assert checkpoint.last_model_path == str(run / "last.ckpt")
    best = Checkpoint.open(run / "best.ckpt")
    assert best.callbacks["StepCheckpoint"]["best_loss"] == float(checkpoint.best_model_score)
    (scored,) = (metrics for metrics in trainer.validate(model, data, ckpt_path="best", verbose=False)[:1])
    assert scored["loss/val"] == float(checkpoint.best_model_score)
    assert trainer.ckpt_path == str(run / "best.ckpt")

    resumed, data = make_run(folder, 9)
    resumed.fit(make_model(), datamodule=data, ckpt_path="last")
    assert (resumed.ckpt_path, resumed.global_step) == (str(run / "last.ckpt"), 9)
    checkpoint = resumed.checkpoint_callback
    resumed.validate(make_model(), data, ckpt_path="best", verbose=False)
    assert resumed.ckpt_path == checkpoint.best_model_path == str(run / "best.ckpt")
    assert float(resumed.callback_metrics["loss/val"]) == float(checkpoint.best_model_score)


@BARE_TRAINER_WARNINGS
@pytest.mark.parametrize("change", ["moved", "newer"])
def test_best_checkpoint_of_another_step_is_not_taken_for_the_best(folder: Path, change: str) -> None:
    first, data = make_run(folder, 4)
    first.fit(make_model(), datamodule=data)
    run, resumed_from = folder / "run", folder / "elsewhere.ckpt"
    if change == "newer":  # the run went on from here, and wrote another best.ckpt
        resumed_from = run / "step.ckpt"
    shutil.copy(run / "last.ckpt", resumed_from)
    if change == "newer":
        second, data = make_run(folder, 9)
        second.fit(make_model(), datamodule=data, ckpt_path=resumed_from)
        assert Checkpoint.open(run / "best.ckpt").step > 4
    found: list[str] = []

    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            checkpoint: Any = trainer.checkpoint_callback
            found.append(checkpoint.best_model_path)
            trainer.should_stop = True

    trainer, data = make_run(folder, 12, Record())
    trainer.fit(make_model(), datamodule=data, ckpt_path=resumed_from)
    assert found[0] == ""


@BARE_TRAINER_WARNINGS
def test_best_checkpoint_is_known_right_after_a_resume(folder: Path) -> None:
    class Record(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
            checkpoint: Any = trainer.checkpoint_callback
            found.append((checkpoint.best_model_path, checkpoint.last_model_path, checkpoint.best_model_score))
            trainer.should_stop = True

    found: list[Any] = []
    first, data = make_run(folder, 4)
    first.fit(make_model(), datamodule=data)
    score = first.checkpoint_callback.best_model_score  # type: ignore[union-attr]
    shutil.copytree(folder / "run", folder / "old")
    shutil.rmtree(folder / "run")
    resumed, data = make_run(folder, 9, Record())  # in another folder than the checkpoint's
    resumed.fit(make_model(), datamodule=data, ckpt_path=folder / "old" / "last.ckpt")
    assert found[0] == (str(folder / "old" / "best.ckpt"), str(folder / "old" / "last.ckpt"), score)


def test_loggers_are_told_of_each_save(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Uploader(DummyLogger):
        def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
            paths = (checkpoint_callback.best_model_path, checkpoint_callback.last_model_path)
            saved.append(tuple(Path(path).name for path in paths))

    saved: list[tuple[str, ...]] = []
    trainer: Any = SimpleNamespace(
        global_step=2,
        is_global_zero=True,
        loggers=[Uploader()],
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    checkpoint = StepCheckpoint()
    checkpoint.dirpath = str(folder)
    module = SimpleNamespace(gpt=torch.nn.Linear(1, 1), check_finite=lambda step: None)
    monkeypatch.setattr("lit_gpt.training.checkpointing.module_and_data", lambda trainer: (module, None))
    monkeypatch.setattr(StepCheckpoint, "_write", lambda self, trainer, path: path.touch())
    checkpoint.save_last_step(trainer)
    trainer.global_step, checkpoint.best_step, checkpoint.best_model_score = 3, 3, torch.tensor(1.0)
    checkpoint.save_last_step(trainer)
    assert saved == [("", "last.ckpt"), ("best.ckpt", "last.ckpt")]


def test_folder_that_cannot_be_written_to_is_reported_before_the_first_step(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise UserError("the disk is full")

    monkeypatch.setattr("lit_gpt.training.checkpoint_io.save_checkpoint", fail)
    result = fit("--checkpoint.every_n_steps", 100, "--validate_at_start", "false")
    assert (result.status, result.err) == (2, "error: the disk is full\n")
    assert "step      0 untrained; a uniform guess" in result.out
    assert "step      3" not in result.out
    assert not RUN.exists()


@BARE_TRAINER_WARNINGS
def test_end_of_an_epoch_saves_nothing_of_its_own(folder: Path) -> None:
    trainer, data = make_run(folder, -1, max_epochs=2, val_check_interval=1.0, check_val_every_n_epoch=1)
    data.batch_size = 40
    trainer.fit(make_model(), datamodule=data)
    assert trainer.current_epoch == 2
    assert trainer.global_step > 4
    files = sorted(path.name for path in (folder / "run").iterdir())
    assert files == ["best.ckpt", "last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_own_model_checkpoint_works_beside_ours(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder(StepProgress):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_train_start(trainer, pl_module)
            orders.append([type(callback).__name__ for callback in trainer.checkpoint_callbacks])

    orders: list[list[str]] = []
    monkeypatch.setattr("lit_gpt.cli.experiment.StepProgress", Recorder)
    class_path = "lightning.pytorch.callbacks.ModelCheckpoint"
    arguments = {"dirpath": "mine", "monitor": "loss/train", "save_top_k": 1, "every_n_train_steps": 2}
    callbacks = [{"class_path": class_path, "init_args": {**arguments, "filename": "best_train"}}]
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    assert fit("--config", "mine.yaml", "--name", "straight").status == 0
    assert [path.name for path in Path("mine").iterdir()] == ["best_train.ckpt"]
    assert Path("logs/straight/version_0/best.ckpt").exists()
    assert orders == [["StepCheckpoint", "ModelCheckpoint"]]  # so trainer.checkpoint_callback is ours
    for steps in (4, 6):
        resumed = ["--trainer.max_steps", steps, "--model.schedule", "constant", "--ckpt_path", "auto"]
        assert fit("--config", "mine.yaml", *resumed).status == 0
    assert [step for step, _ in points(RUN)["loss/train"]] == [1, 2, 3, 4, 5, 6]
    assert fit("validate", "--ckpt_path", "mine/best_train.ckpt", config=None).status == 0


# ------------------------------------------------------------------------------------------------------ early stopping

UNSTABLE = ["--model.learning_rate", 1.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]


def test_early_stopping_ends_the_run_and_keeps_the_best_checkpoint(fit: Fit) -> None:
    flags = [*UNSTABLE, "--early_stopping.patience", 3]
    result = fit(*flags, "--trainer.max_steps", 60)
    losses = dict(points(RUN)["loss/val"])
    best = min(losses.keys() - {0}, key=losses.__getitem__)  # patience counts from the first trained model
    assert max(losses) == best + 3 < 60
    assert f"stopped     at step {best + 3}, loss/val has not fallen for 3 validations" in result.out
    assert Checkpoint.open(RUN / "best.ckpt").step == best
    again = fit(*flags, "--trainer.max_steps", 60, "--ckpt_path", "last")
    assert "already complete: loss/val has not fallen for 3 validations; raise --early_stopping.patience" in again.out
    assert dict(points(RUN)["loss/val"]) == losses
    further = fit(*UNSTABLE, "--early_stopping.patience", 4, "--trainer.max_steps", 60, "--ckpt_path", "last")
    assert further.status == 0
    assert max(dict(points(RUN)["loss/val"])) > best + 3


def test_early_stopping_counts_validations_across_a_resume(fit: Fit) -> None:
    flags = [*UNSTABLE, "--early_stopping.patience", 3, "--trainer.max_steps"]
    assert fit(*flags, 60, "--name", "straight").status == 0
    straight = points(Path("logs/straight/version_0"))["loss/val"]
    for steps in (len(straight) - 2, 60):
        assert fit(*flags, steps, "--ckpt_path", "auto").status == 0
    assert points(RUN)["loss/val"] == straight


def test_early_stopping_on_training_loss_counts_across_a_resume(fit: Fit) -> None:
    """It reads `loss/train` at a validation, where the last logged value may be older than the checkpoint."""
    arguments = {"monitor": "loss/train", "patience": 2}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": arguments}]
    Path("stop.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}), encoding="utf-8")
    flags = ["--config", "stop.yaml", *UNSTABLE, "--trainer.log_every_n_steps", 5, "--trainer.val_check_interval", 6]
    flags += ["--checkpoint.every_n_steps", 1, "--checkpoint.keep", 99, "--trainer.max_steps"]
    assert fit(*flags, 80, "--name", "straight").status == 0
    straight = points(Path("logs/straight/version_0"))
    last = straight["loss/val"][-1][0]
    assert last < 80
    assert last % 5 != 0  # so it reads a value that was logged before the checkpoint
    assert fit(*flags, 80, "--ckpt_path", f"logs/straight/version_0/step_{last - 1:08d}.ckpt").status == 0
    assert points(RUN)["loss/val"] == straight["loss/val"][-1:]


def test_checkpoint_that_is_removed_is_in_its_own_folder(tmp_path: Path) -> None:
    """The state of Lightning's ModelCheckpoint in a crafted checkpoint can name a file outside its folder."""
    own, other = tmp_path / "run" / "own.ckpt", tmp_path / "other.txt"
    own.parent.mkdir()
    own.touch()
    other.touch()
    AtomicCheckpointIO().remove_checkpoint(own)
    AtomicCheckpointIO().remove_checkpoint(own.parent / ".." / other.name)
    assert not own.exists()
    assert other.exists()
