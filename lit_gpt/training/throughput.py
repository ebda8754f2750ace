"""Log tokens per second, model FLOPs utilization and peak memory."""

import time
from collections.abc import Callable
from typing import Any

from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.device import peak_flops, peak_memory
from lit_gpt.planning.work import flops_per_token
from lit_gpt.training.metrics import is_logging_step
from lit_gpt.training.module import module_and_data


class StepThroughput(Callback):
    """Log `speed/tokens_per_second` over all devices, `memory/peak_gb`, and `speed/mfu` where the peak FLOP/s is known.

    Lightning's `Throughput` computes the rates. Its callback `ThroughputMonitor` is not used: it waits for the device
    in every batch, counts the time for checkpoints, and its table of peak FLOP/s has no plain "NVIDIA H200" and gives
    H100 and H200 the rate for sparse matrices, which is twice that of dense ones.

    The time for validation, generated text and checkpoints is not counted.

    Args:
        checkpoint_seconds: Returns the time spent writing checkpoints since the start of the run, in seconds.

    Attributes:
        mean_tokens_per_second: From the first step of this command to the latest logging step; None before.
    """

    def __init__(self, checkpoint_seconds: Callable[[], float] = lambda: 0.0) -> None:
        self.checkpoint_seconds = checkpoint_seconds
        self.mean_tokens_per_second: float | None = None
        self._throughput: Throughput | None = None  # None: no step has started
        self._start = 0.0  # time.perf_counter() at the first batch, plus the length of all pauses
        self._start_step = 0  # of this command
        self._measured_step = 0  # when the rates were computed last
        self._validation_start: float | None = None  # None: no validation since the last batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self._throughput is None:
            module, _ = module_and_data(trainer)
            self._throughput = Throughput(peak_flops(module.device), trainer.world_size, window_size=2)
            self._start = time.perf_counter() - self.checkpoint_seconds()
            self._start_step = self._measured_step = trainer.global_step
            self._throughput.update(time=0.0, batches=0, samples=0, lengths=0, flops=0)
        elif self._validation_start is not None:
            self._start += time.perf_counter() - self._validation_start
        self._validation_start = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validation_start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step == self._measured_step or not is_logging_step(trainer, step):
            return
        assert self._throughput is not None
        module, data = module_and_data(trainer)
        windows_per_step = data.plan.windows_per_step // trainer.world_size  # of one device
        tokens_per_step = windows_per_step * data.context_length
        steps, seconds = step - self._start_step, time.perf_counter() - self._start - self.checkpoint_seconds()
        self.mean_tokens_per_second = steps * tokens_per_step * trainer.world_size / seconds
        self._throughput.update(
            time=seconds,
            batches=steps,
            samples=steps * windows_per_step,
            lengths=steps * tokens_per_step,
            flops=int((step - self._measured_step) * tokens_per_step * flops_per_token(module.gpt)),
        )
        self._measured_step = step
        rates = self._throughput.compute()
        metrics = {
            "speed/tokens_per_second": rates["device/items_per_sec"] * trainer.world_size,
            "memory/peak_gb": peak_memory(module.device) / 1e9,
        }
        if "device/mfu" in rates:
            metrics["speed/mfu"] = rates["device/mfu"]
        pl_module.log_dict(metrics, on_step=True, on_epoch=False)
