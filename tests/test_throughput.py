"""Throughput: tokens per second and floating-point operations."""

from pathlib import Path

import pytest
import torch
from conftest import Fit, points
from lightning.pytorch import Trainer

from lit_gpt.data.batches import Batch
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.planning.work import flops_per_token
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")


def test_throughput_counts_all_tokens_of_a_step_and_no_pauses(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock:
        now = 0.0

        def perf_counter(self) -> float:
            return self.now

        monotonic = perf_counter

    clock, training_step = Clock(), LitGPT.training_step

    def third_of_a_second_step(module: LitGPT, batch: Batch, batch_idx: int) -> torch.Tensor:
        clock.now += 1 / 3
        return training_step(module, batch, batch_idx)

    def minute_validation(module: LitGPT) -> None:
        clock.now += 60
        module.log_dict({"loss/val": 1.0, "loss/train_eval": 1.0})

    write = StepCheckpoint._write

    def hour_save(checkpoint: StepCheckpoint, trainer: Trainer, path: Path) -> None:
        clock.now += 3600
        write(checkpoint, trainer, path)

    monkeypatch.setattr("lit_gpt.training.throughput.time", clock)
    monkeypatch.setattr("lit_gpt.training.checkpointing.time", clock)
    monkeypatch.setattr(StepCheckpoint, "_write", hour_save)
    monkeypatch.setattr(LitGPT, "training_step", third_of_a_second_step)
    monkeypatch.setattr(LitGPT, "on_validation_epoch_end", minute_validation)
    flags = ["--data.global_batch_size", 12, "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 3]
    assert fit(*flags, "--checkpoint.every_n_steps", 1).status == 0
    speeds = points(RUN)["speed/tokens_per_second"]
    assert [step for step, _ in speeds] == [3, 6]
    assert [speed for _, speed in speeds] == pytest.approx([12 * 16, 12 * 16])  # three batches of 1/3 s in a step
    assert "speed/mfu" not in points(RUN)  # the peak FLOP/s of a CPU is unknown


def test_mfu_is_the_speed_times_the_operations_of_a_token_over_the_peak(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gpt.training.throughput.peak_flops", lambda device: 1e9)
    assert fit("--data.global_batch_size", 12, "--trainer.log_every_n_steps", 2).status == 0
    flops = flops_per_token(LitGPT.load_from_checkpoint(RUN / "last.ckpt").gpt)
    logged = points(RUN)
    expected = [(step, pytest.approx(speed * flops / 1e9)) for step, speed in logged["speed/tokens_per_second"]]
    assert logged["speed/mfu"] == expected


def test_flops_per_token_counts_matrices_and_causal_attention() -> None:
    config = GPTConfig(
        vocab_size=50, context_length=8, d_model=16, num_blocks=2, num_heads=2, mlp="gelu", norm="layernorm"
    )
    model = GPT(config)
    matrices = 2 * (4 * 16 * 16 + 8 * 16 * 16) + 50 * 16
    norm_weights = 2 * (2 * 16 + 2 * 8)  # of both norms and qk_norm in each block
    assert flops_per_token(model) == 6 * (matrices + norm_weights) + 6 * 2 * 8 * 16
