"""Log tokens per second, model FLOPs utilization and peak memory."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.device import peak_flops, peak_memory
from lit_gpt.training.metrics import is_logging_step
from lit_gpt.training.module import LitGPT, module_and_data


class Throughput(Callback):
    """Log `speed/tokens_per_second` over all devices, `memory/peak_gb`, and `speed/mfu` where the peak FLOP/s is known.

    The time for validation, generated text and checkpoints is not counted.

    Args:
        checkpoint_seconds: returns the time spent writing checkpoints since the start of the run, in seconds.
    """

    def __init__(self, checkpoint_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        # the state at the last logged step; None: no step has started
        self._start: float | None = None  # time.perf_counter(), moved forward by the length of each validation since
        self._start_step = 0
        self._start_checkpoint_seconds = 0.0
        self._validation_start: float | None = None  # None: no validation since the last batch

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._start is None:
            self._start_interval(trainer, time.perf_counter(), self.checkpoint_seconds())
        elif self._validation_start is not None:
            self._start += time.perf_counter() - self._validation_start
        self._validation_start = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = trainer.global_step - self._start_step
        if steps == 0 or not is_logging_step(trainer, trainer.global_step):
            return
        assert self._start is not None
        module, data = module_and_data(trainer)
        now, checkpoint_seconds = time.perf_counter(), self.checkpoint_seconds()
        seconds = now - self._start - (checkpoint_seconds - self._start_checkpoint_seconds)
        self._start_interval(trainer, now, checkpoint_seconds)
        tokens_per_second = steps * data.plan.windows_per_step * data.context_length / seconds
        metrics = {"speed/tokens_per_second": tokens_per_second, "memory/peak_gb": peak_memory(module.device) / 1e9}
        peak = peak_flops(module.device)
        if peak is not None:
            metrics["speed/mfu"] = tokens_per_second * flops_per_token(module) / (peak * trainer.world_size)
        for tag, value in metrics.items():
            pl_module.log(tag, value)

    def _start_interval(self, trainer: Trainer, now: float, checkpoint_seconds: float) -> None:
        self._start, self._start_step, self._start_checkpoint_seconds = now, trainer.global_step, checkpoint_seconds


def flops_per_token(module: LitGPT) -> float:
    """Return the floating-point operations of the forward and the backward pass for one training token.

    6 for each parameter of the blocks and the head, and `6 * num_blocks * context_length * d_model` for causal
    attention, of which each token attends to half of the context on average (Kaplan et al. 2020, section 2.1).
    """
    config = module.gpt.config
    parameters = sum(p.numel() for p in module.gpt.blocks.parameters()) + module.gpt.head.weight.numel()
    return 6 * parameters + 6 * config.num_blocks * config.context_length * config.d_model
