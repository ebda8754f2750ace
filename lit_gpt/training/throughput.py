"""Log tokens per second, model FLOP utilisation and peak memory."""

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.device import peak_flops, peak_memory
from lit_gpt.training.module import LitGPT, log_points, logs_at, parts


class Throughput(Callback):
    """Logs `speed/tokens_per_second` over all devices, `speed/mfu` where the device's peak is known, `memory/peak_gb`.

    The clock stands still while the run validates, writes texts and saves.

    Args:
        saving: the seconds spent saving so far.
    """

    def __init__(self, saving: Callable[[], float] = lambda: 0.0) -> None:
        self.saving = saving
        self._since: float | None = None  # training has run since then, but for
        self._paused_at: float | None = None  # a pause that began then
        self._saved = 0.0  # and but for saves beyond these seconds
        self._step = 0

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self._since is None:
            self._since, self._step, self._saved = time.perf_counter(), trainer.global_step, self.saving()
        elif self._paused_at is not None:
            self._since += time.perf_counter() - self._paused_at
        self._paused_at = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused_at = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        steps = trainer.global_step - self._step
        if steps == 0 or not logs_at(trainer, trainer.global_step):
            return
        assert self._since is not None
        module, data = parts(trainer)
        now, saved = time.perf_counter(), self.saving()
        seconds = now - self._since - (saved - self._saved)
        self._since, self._step, self._saved = now, trainer.global_step, saved
        tokens_per_second = steps * data.windows_per_step * data.context_length / seconds
        values = {"speed/tokens_per_second": tokens_per_second, "memory/peak_gb": peak_memory(module.device) / 1e9}
        peak = peak_flops(module.device)
        if peak is not None:
            values["speed/mfu"] = tokens_per_second * flops_per_token(module) / (peak * trainer.world_size)
        log_points(trainer, values)


def flops_per_token(module: LitGPT) -> float:
    """Operations a trained token costs: 6 a multiplied weight, and causal attention (Kaplan et al. 2020)."""
    config = module.gpt.config
    weights = sum(p.numel() for p in module.gpt.blocks.parameters()) + module.gpt.head.weight.numel()
    return 6 * weights + 6 * config.num_blocks * config.context_length * config.d_model
