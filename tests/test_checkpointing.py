"""StepCheckpoint: which checkpoints a run writes, and when. StopEarly: when a run stops."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from conftest import Fit, points

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.logger import StepLogger

RUN = Path("logs/small/version_0")


def test_run_writes_config_and_checkpoints(fit: Fit) -> None:
    flags = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 2, "--trainer.max_steps", 7]
    assert fit(*flags).status == 0
    files = sorted(path.name for path in RUN.iterdir() if not path.name.startswith("events."))
    assert files == ["best.ckpt", "config.yaml", "last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]
    steps = {name: Checkpoint.open(RUN / name).step for name in files if name.endswith("ckpt")}
    assert steps == {"best.ckpt": 7, "last.ckpt": 7, "step_00000004.ckpt": 4, "step_00000006.ckpt": 6}


def test_run_resumed_from_an_earlier_checkpoint_keeps_its_own_checkpoints(fit: Fit) -> None:
    saving = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 3]
    resuming = ["--ckpt_path", RUN / "step_00000002.ckpt", "--trainer.max_steps"]
    assert fit(*saving).status == 0
    assert fit(*saving, *resuming, 4).status == 0
    assert sorted(path.name for path in RUN.glob("step_*")) == [f"step_0000000{n}.ckpt" for n in (2, 4, 6)]
    assert fit("--checkpoint.every_n_steps", 1, "--checkpoint.keep", 1, *resuming, 5).status == 0
    assert sorted(path.name for path in RUN.glob("step_*")) == ["step_00000005.ckpt", "step_00000006.ckpt"]


def test_next_run_removes_unfinished_files_of_a_killed_process(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    unfinished = RUN / ".step_00000002.ckpt.unfinished"
    unfinished.touch()
    assert fit("--trainer.max_steps", 3, "--ckpt_path", RUN / "last.ckpt").status == 0
    assert not unfinished.exists()


def test_only_rank_zero_stores_event_file_sizes() -> None:
    checkpoint: dict[str, Any] = {}
    trainer: Any = SimpleNamespace(is_global_zero=False, logger=StepLogger("logs", "small"))
    StepCheckpoint().on_save_checkpoint(trainer, None, checkpoint)  # type: ignore[arg-type]
    assert checkpoint == {}


def test_best_checkpoint_is_the_step_of_the_lowest_validation_loss(fit: Fit) -> None:
    flags = ["--model.learning_rate", 20.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]
    result = fit(*flags, "--trainer.max_steps", 20)
    logged = points(RUN)
    losses = dict(logged["loss/val"])
    best = min(losses, key=losses.__getitem__)
    assert best < 20  # with this learning rate the loss rises in the end
    assert Checkpoint.open(RUN / "best.ckpt").step == best
    assert logged["best/loss_val"][-1] == (best, losses[best])
    assert f"loss/val {losses[best]:.4f} at step {best}" in result.out


def test_validation_step_is_saved_after_its_validation(fit: Fit) -> None:
    flags = ["--model.schedule", "constant", "--checkpoint.every_n_steps", 3, "--trainer.max_steps"]
    assert fit(*flags, 3).status == 0
    saved = Checkpoint.open(RUN / "step_00000003.ckpt").callbacks["StepCheckpoint"]
    assert (saved["best_step"], saved["best_loss"]) == points(RUN)["loss/val"][0]
    assert fit(*flags, 6, "--ckpt_path", RUN / "step_00000003.ckpt").status == 0
    assert [step for step, _ in points(RUN)["loss/val"]] == [3, 6]  # neither repeated nor skipped


# ------------------------------------------------------------------------------------------------------ early stopping

UNSTABLE = ["--model.learning_rate", 1.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]


def test_early_stopping_ends_the_run_and_keeps_the_best_checkpoint(fit: Fit) -> None:
    flags = [*UNSTABLE, "--early_stopping.patience", 3]
    result = fit(*flags, "--trainer.max_steps", 60)
    losses = dict(points(RUN)["loss/val"])
    best = min(losses, key=losses.__getitem__)
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
        assert fit(*flags, steps, "--ckpt_path", "last").status == 0
    assert points(RUN)["loss/val"] == straight
