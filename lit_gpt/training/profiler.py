"""`--preflight`: measure the memory and the time of a run with a few of its steps."""

import copy
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.data.batches import Batch, EvaluationBatches
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.device import free_memory, peak_memory, reset_peak_memory, synchronize, used_memory
from lit_gpt.training.memory import (
    activation_bytes,
    format_bytes,
    processes_sharing_memory,
)
from lit_gpt.training.module import LitGPT, module_and_data
from lit_gpt.training.progress import format_duration, format_eta, remaining_validations
from lit_gpt.training.samples import GenerateText

USABLE = 0.95  # of the memory that is free; the rest is for what the allocator cannot put together


# of --preflight, in seconds: what it may take, where steps are slow, and what of it each figure may
SECONDS = 20.0


STEP_SECONDS = 8.0


VALIDATION_SECONDS = 2.0


TEXT_SECONDS = 1.0


SLOPE_SECONDS = 1.5


WARM_UP = 3


FEWEST = 2


WRITTEN = 16  # tokens, by which the time of texts is known


def trimmed_mean(values: list[float]) -> float:
    """The mean of the middle nine tenths: a machine that is now faster and now slower is told by it, a stall is not."""
    few = len(values) // 20
    return statistics.mean(sorted(values)[few : len(values) - few])


class RunProfiler(Callback):
    """Takes steps of a run that is not made, of batches that grow, and knows then what the run would need.

    The steps are the Trainer's, with all its settings, but for logs, checkpoints and validations; evaluation and texts
    are tried by themselves. A step of many forwards is known by two of them. Of processes that share the work, the
    first decides.

    Args:
        generate: what writes texts in the run.
        step: optimizer steps the run has taken already.

    Attributes:
        peaks: windows in a forward -> the most bytes the process held meanwhile.
        peak: the most it held with whole batches, in validation and while it wrote.
        allowed: how many it may hold; None: not known.
        refused: windows that were not tried, since they would not fit.
        step_seconds: of one optimizer step with whole batches.
        start_seconds: that compiling took.
        validation_seconds: of one validation.
        text_seconds: of the texts that are written after it.
    """

    def __init__(self, generate: GenerateText, completed_steps: int = 0) -> None:
        self.generate, self.completed_steps = generate, completed_steps
        self.peaks: dict[int, int] = {}
        self.peak = 0
        self.allowed: int | None = None
        self.refused: int | None = None
        self.step_seconds = self.start_seconds = self.validation_seconds = self.text_seconds = 0.0
        self.windows = self._kept = 0  # in a forward of the run, and bytes kept of each by the formula
        self._windows = 1  # in a forward of this step
        self._seconds: list[float] = []  # of each forward of this step, the last with the update
        self._since = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _, data = module_and_data(trainer)
        data.on_before_batch_transfer = self._cut  # type: ignore[method-assign]
        self._steps, self._interval = data.max_steps, data.validation_interval
        self._tokens = data.windows_per_step * data.context_length  # of an optimizer step

    def _cut(self, batch: Batch, dataloader_idx: int) -> Batch:
        batch_size = len(batch[0])
        if self._windows == batch_size:
            return batch
        rows = torch.arange(self._windows) % batch_size  # some of the batch, or all of it more than once
        return tuple(tensor[rows] for tensor in batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = module_and_data(trainer)
        self._device = module.device
        self._forwards = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = min(2, self._forwards)
        loop = trainer.fit_loop
        loop.epoch_loop.max_steps, loop.max_epochs = -1, -1  # this callback says when it is enough
        loop.epoch_loop.min_steps = loop.min_epochs = None
        self._validates, trainer.limit_val_batches = trainer.limit_val_batches != 0, 0
        free = free_memory(self._device)
        if free is not None:
            self.allowed = used_memory(self._device) + int(USABLE * free / processes_sharing_memory(trainer))
        self._plan = self._stages(trainer, module, data)
        self._windows = next(self._plan)
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize(self._device)
        self._seconds.append(time.perf_counter() - self._since)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._windows = next(self._plan, 0)
            trainer.should_stop = self._windows == 0
            self._seconds = []
        self._since = time.perf_counter()

    def _stages(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> Iterator[int]:
        """Before each step, how many windows its forwards take; what the step showed is kept when it is done."""
        agreed, begun, whole = trainer.strategy.broadcast, time.perf_counter(), data.batch_size
        self.windows, windows, compiles = whole, 1, bool(module.arguments["compile"])
        one, two = (activation_bytes(module.gpt, n, str(trainer.precision), self._device.type) for n in (1, 2))
        self._kept = two - one
        if compiles:  # which every other shape would need anew
            torch.compiler.set_stance("force_eager")
        while windows < whole:
            yield from self._try(windows)
            ample = self.allowed is None or self.expected(whole) < self.allowed / 2
            slow = time.perf_counter() - begun > SECONDS / 4
            windows = whole if agreed(ample or slow) else min(2 * windows, whole)
            if agreed(self.allowed is not None and self.expected(windows) > self.allowed):
                self.refused = windows
                return
        if compiles:
            torch.compiler.set_stance("default")
        reset_peak_memory(self._device)
        first: list[float] = []
        for _ in range(WARM_UP):
            yield whole
            first.append(sum(self._seconds))
            if agreed(time.perf_counter() - begun > SECONDS / 2):
                break
        taken: list[list[float]] = []
        since = time.perf_counter()
        most = sys.maxsize if self._steps is None else self._steps - self.completed_steps  # no more than the run takes
        while len(taken) < FEWEST or agreed(
            len(taken) < most and time.perf_counter() < min(since + STEP_SECONDS, begun + SECONDS)
        ):
            yield whole
            taken.append(self._seconds)
        before, last = (trimmed_mean([seconds[place] for seconds in taken]) for place in (0, -1))
        self.step_seconds = (self._forwards - 1) * before + last
        if compiles:
            self.start_seconds = max(0.0, sum(first) - len(first) * last)
        self.peaks[whole] = peak_memory(self._device)
        self.validation_seconds = self._evaluate(trainer, module, data) if self._validates else 0.0
        self.text_seconds = self._write(trainer)
        self.peak = peak_memory(self._device)
        if compiles:
            torch.compiler.set_stance("force_eager")
        while agreed(
            self.allowed is not None
            and self.expected(2 * windows) < self.allowed / 2
            and time.perf_counter() - begun + 2 * FEWEST * self.step_seconds * windows / whole < SECONDS
            and 2 * FEWEST * self.step_seconds * windows / whole < SLOPE_SECONDS
        ):
            windows *= 2
            yield from self._try(windows)
        if compiles:
            torch.compiler.set_stance("default")

    def _try(self, windows: int) -> Iterator[int]:
        """Steps with so many windows, for the memory they take."""
        reset_peak_memory(self._device)
        for _ in range(FEWEST):  # the very first makes the optimizer's state
            yield windows
        self.peaks[windows] = peak_memory(self._device)

    def _evaluate(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> float:
        """Seconds a validation takes, known by some batches of the second split; those of the first are like them."""
        splits: list[EvaluationBatches] = [loader.dataset for loader in data.val_dataloader()]  # type: ignore[misc]
        batches, seconds, known = splits[-1], 0.0, 0
        module.eval()
        module.on_validation_epoch_start()
        for turn, index in enumerate((0, *range(len(batches)))):  # the first one twice, to get ready
            since = time.perf_counter()
            batch = trainer.strategy.batch_to_device(batches[index])
            with torch.no_grad():
                trainer.strategy.validation_step(batch, index, len(splits) - 1)
            synchronize(self._device)
            if turn:
                seconds, known = seconds + time.perf_counter() - since, known + len(batch[0])
            if trainer.strategy.broadcast(seconds > VALIDATION_SECONDS):
                break
        module.train()
        return seconds / known * sum(len(split.starts) for split in splits)

    def _write(self, trainer: Trainer) -> float:
        """Seconds the texts of one time take, known by those of one prompt, or by their first tokens."""
        seconds, some = 0.0, copy.copy(self.generate)
        whole = self.generate.sampling["max_new_tokens"]
        length = min(WRITTEN, whole)
        for prompt in self.generate.prompts[:1] * 3:  # once to get ready
            some.sampling = {**self.generate.sampling, "max_new_tokens": length}
            since = time.perf_counter()
            some.generate_texts(trainer, prompt)
            seconds = (time.perf_counter() - since) * whole / length
            if trainer.strategy.broadcast(seconds < TEXT_SECONDS):
                length = whole  # those beyond the context take longer
        return seconds * len(self.generate.prompts)

    def handle_out_of_memory(self) -> None:
        """There was no memory for the batches that were just tried: what is held now is all there is."""
        if not self.peak:
            self.refused, self.allowed = self._windows, peak_memory(self._device)

    def slope(self) -> float:
        """Bytes a window more takes, by the two largest batches tried.

        Until there are two: what the forward pass keeps of it, three times, since a CPU's memory is handed out in
        pieces that do not fit together.
        """
        *_, smaller, larger = 0, 0, *sorted(self.peaks)
        if smaller == 0 or self.peaks[larger] <= self.peaks[smaller]:
            return 3 * self._kept
        return (self.peaks[larger] - self.peaks[smaller]) / (larger - smaller)

    def expected(self, windows: int) -> float:
        """Bytes the process would hold with batches of more windows than were tried."""
        largest = max(self.peaks)
        return self.peaks[largest] + (windows - largest) * self.slope()

    def report(self) -> str:
        """What was found."""
        if not self.peaks:
            return "measured    nothing, since not even one window fits"
        each = [f"{format_bytes(peak)} with {windows:,}" for windows, peak in self.peaks.items()]
        lines = [f"measured    {', '.join(each)} window{'s'[: max(self.peaks) != 1]} in a batch"]
        needed, place = self.expected(self.refused) if self.refused else self.peak, ""
        if self.allowed is not None:
            largest = max(self.peaks)
            held = max(self.peaks[largest], self.peak)
            most = max(1, int(largest + (self.allowed - held) / self.slope()))
            verdict = "does not fit" if self.refused or needed > self.allowed else "fits"
            place = f" of {format_bytes(self.allowed)}: {verdict}; the largest batch that fits is of about {most:,}"
        lines.append(f"needed      {format_bytes(needed)} with {self.refused or self.windows:,}{place}")
        if self.refused:
            lines.append("time        not measured, since the batch does not fit")
            return "\n".join(lines)
        pace = f"{self._tokens / self.step_seconds:,.0f} tokens/s"
        if self._steps is None:
            lines.append(f"time        {format_duration(self.step_seconds)} a step, {pace}; no end is set")
            return "\n".join(lines)
        steps, times = max(0, self._steps - self.completed_steps), 0
        if self._validates and self._interval is not None:
            times = remaining_validations(self.completed_steps, self._steps, self._interval)
        more = self.start_seconds + self.text_seconds * (1 + times)
        told = format_eta(steps, self.step_seconds, times, self.validation_seconds, more)
        lines.append(f"time        {told}; {pace}")
        return "\n".join(lines)
