"""What a run leaves in its folder, and that watching it changes nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Fit, points, texts, weights
from lightning.pytorch import Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_gpt.checkpoint.store import open_checkpoint
from lit_gpt.data.datamodule import Batch
from lit_gpt.model import GPTConfig
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.module import LitGPT
from lit_gpt.training.throughput import flops_per_token

RUN = Path("logs/small/version_0")


def test_a_run_leaves_its_config_its_checkpoints_and_its_curves(fit: Fit) -> None:
    flags = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 2, "--trainer.max_steps", 7]
    assert fit(*flags).status == 0
    kept = sorted(path.name for path in RUN.iterdir() if not path.name.startswith("events."))
    assert kept == ["best.ckpt", "config.yaml", "last.ckpt", "step_00000004.ckpt", "step_00000006.ckpt"]
    steps = {name: open_checkpoint(RUN / name)["global_step"] for name in kept if name.endswith("ckpt")}
    assert steps == {"best.ckpt": 7, "last.ckpt": 7, "step_00000004.ckpt": 4, "step_00000006.ckpt": 6}


def test_a_run_resumed_further_back_keeps_the_checkpoints_it_writes(fit: Fit) -> None:
    every = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 3]
    back = ["--ckpt_path", RUN / "step_00000002.ckpt", "--trainer.max_steps"]
    assert fit(*every).status == 0
    assert fit(*every, *back, 4).status == 0
    assert sorted(path.name for path in RUN.glob("step_*")) == [f"step_0000000{n}.ckpt" for n in (2, 4, 6)]
    assert fit("--checkpoint.every_n_steps", 1, "--checkpoint.keep", 1, *back, 5).status == 0
    assert sorted(path.name for path in RUN.glob("step_*")) == ["step_00000005.ckpt", "step_00000006.ckpt"]


def test_a_process_that_was_killed_leaves_nothing_half_written_for_long(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    left = RUN / ".step_00000002.ckpt.unfinished"
    left.touch()
    assert fit("--trainer.max_steps", 3, "--ckpt_path", RUN / "last.ckpt").status == 0
    assert not left.exists()


def test_only_the_first_process_looks_at_the_event_files() -> None:
    saved: dict[str, Any] = {}
    trainer: Any = SimpleNamespace(is_global_zero=False, logger=StepLogger("logs", "small"))
    StepCheckpoint().on_save_checkpoint(trainer, None, saved)  # type: ignore[arg-type]
    assert saved == {}


def test_best_is_the_step_of_the_lowest_validation_loss(fit: Fit) -> None:
    flags = ["--model.learning_rate", 20.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]
    result = fit(*flags, "--trainer.max_steps", 20)
    logged = points(RUN)
    losses = dict(logged["loss/val"])
    best = min(losses, key=losses.__getitem__)
    assert best < 20  # at such a rate it does not end at its best
    assert open_checkpoint(RUN / "best.ckpt")["global_step"] == best
    assert logged["best/loss_val"][-1] == (best, losses[best])
    assert f"loss/val {losses[best]:.4f} at step {best}" in result.out


def test_a_step_that_validates_is_saved_after_its_validation(fit: Fit) -> None:
    stop = ["--model.schedule", "constant", "--checkpoint.every_n_steps", 3, "--trainer.max_steps"]
    assert fit(*stop, 3).status == 0
    saved = open_checkpoint(RUN / "step_00000003.ckpt")["callbacks"]["StepCheckpoint"]
    assert (saved["best_step"], saved["best_loss"]) == points(RUN)["loss/val"][0]
    assert fit(*stop, 6, "--ckpt_path", RUN / "step_00000003.ckpt").status == 0
    assert [step for step, _ in points(RUN)["loss/val"]] == [3, 6]  # neither repeated nor skipped


def test_generated_text_leaves_no_trace_in_the_run(fit: Fit) -> None:
    dropout = ["--model.config.dropout", 0.2]
    assert fit("--name", "with", *dropout).status == 0
    assert fit("--name", "without", *dropout, "--generate.prompts", "[]").status == 0
    ours, theirs = (points(Path(f"logs/{name}/version_0")) for name in ("with", "without"))
    for tag in ("loss/train", "loss/train_eval", "loss/val", "optim/grad_norm"):
        assert ours[tag] == theirs[tag]
    one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("with", "without"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert texts(Path("logs/without/version_0")) == {}


def test_text_is_written_at_the_start_at_validations_and_at_the_end(fit: Fit) -> None:
    result = fit("--trainer.max_steps", 7, "--generate.prompts", "['第', row]", "--generate.max_new_tokens", 5)
    written = texts(RUN)
    assert sorted(written) == [0, 3, 6, 7]
    assert all("row" in text for text in written.values())
    assert result.out.count("\n  | 第") == result.out.count("\n  | row") == 4


def test_the_same_run_writes_the_same_texts(fit: Fit) -> None:
    for name in ("a", "b"):
        assert fit("--name", name).status == 0
    assert texts(Path("logs/a/version_0")) == texts(Path("logs/b/version_0"))


def test_tensorboard_finds_the_overlay_and_the_hyperparameters(fit: Fit) -> None:
    assert fit("--model.learning_rate", 0.002).status == 0
    events = EventAccumulator(str(RUN), size_guidance={"tensors": 0}).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    chart = layout.category[0].chart[0]
    assert list(chart.multiline.tag) == ["loss/train$", "loss/train_eval", "loss/val"]
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert start.hparams["model.learning_rate"].number_value == 0.002
    assert start.hparams["data.files"].string_value == "rows.txt"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["best/loss_val"]


def test_speed_counts_all_tokens_of_a_step(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        monotonic = perf_counter

    clock, training_step = Clock(), LitGPT.training_step

    def a_third_of_a_second(module: LitGPT, batch: Batch, batch_idx: int) -> torch.Tensor:
        clock.now += 1 / 3
        return training_step(module, batch, batch_idx)

    def a_minute(module: LitGPT) -> None:
        clock.now += 60
        module.log_dict({"loss/val": 1.0, "loss/train_eval": 1.0})

    write = StepCheckpoint._write

    def an_hour(checkpoint: StepCheckpoint, trainer: Trainer, path: Path) -> None:
        clock.now += 3600
        write(checkpoint, trainer, path)

    monkeypatch.setattr("lit_gpt.training.throughput.time", clock)
    monkeypatch.setattr("lit_gpt.training.checkpointing.time", clock)
    monkeypatch.setattr(StepCheckpoint, "_write", an_hour)
    monkeypatch.setattr(LitGPT, "training_step", a_third_of_a_second)
    monkeypatch.setattr(LitGPT, "on_validation_epoch_end", a_minute)
    flags = ["--data.global_batch_size", 12, "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 3]
    assert fit(*flags, "--checkpoint.every_n_steps", 1).status == 0
    speeds = points(RUN)["speed/tokens_per_second"]
    assert [step for step, _ in speeds] == [3, 6]
    assert [speed for _, speed in speeds] == pytest.approx([12 * 16, 12 * 16])  # three forwards a step
    assert "speed/mfu" not in points(RUN)  # no peak is known of this processor


def test_operations_a_token_follow_the_shape() -> None:
    config = GPTConfig(
        vocab_size=50, context_length=8, d_model=16, num_blocks=2, num_heads=2, mlp="gelu", norm="layernorm"
    )
    model = LitGPT(config)
    matrices = 2 * (4 * 16 * 16 + 8 * 16 * 16) + 50 * 16
    scales = 2 * (2 * 16 + 2 * 8)  # norms and normalised heads: too few to matter
    assert flops_per_token(model) == 6 * (matrices + scales) + 6 * 2 * 8 * 16
