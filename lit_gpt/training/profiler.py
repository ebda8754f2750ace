"""`--preflight`: measure the memory and the time of a run with a few of its steps."""

import copy
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.data.batches import Batch, EvaluationBatches
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.device import free_memory, peak_memory, reset_peak_memory, synchronize, used_memory
from lit_gpt.figures import format_bytes, format_duration
from lit_gpt.planning.memory import activation_bytes_per_token, processes_sharing_memory
from lit_gpt.planning.speed import Workload, base_model
from lit_gpt.training.module import LitGPT, module_and_data
from lit_gpt.training.pace import format_eta, remaining_validations
from lit_gpt.training.samples import GenerateText

USABLE_SHARE = 0.95  # of the free memory; fragmentation makes the rest unusable

# Time limits in seconds, each for one measurement and TOTAL_SECONDS for all. They are exceeded where a single step,
# batch or text takes longer.
TOTAL_SECONDS = 20.0
STEP_SECONDS = 8.0
VALIDATION_SECONDS = 2.0
TEXT_SECONDS = 1.0
SLOPE_SECONDS = 1.5

WARM_UP_STEPS = 3
MIN_STEPS = 2  # per measurement; the first step of all allocates the optimizer state
MIN_NEW_TOKENS = 16  # with a slow model, the time of the first tokens of a text is extrapolated


def trimmed_mean(values: list[float]) -> float:
    """Return the mean without the lowest and the highest 5%.

    Unlike the median it includes a change of speed during the measurement; unlike the mean it excludes stalls.
    """
    trimmed = len(values) // 20  # at each end
    return statistics.mean(sorted(values)[trimmed : len(values) - trimmed])


@dataclass
class Measurements:
    """What a `RunProfiler` found, in bytes and seconds.

    Attributes:
        batch_size: windows in a forward pass of the run.
        tokens_per_step: tokens in an optimizer step, over all ranks.
        max_steps: the last optimizer step of the run; None: the run has no end.
        validation_interval: optimizer steps between validations; None: the run does not validate.
        validates_at_start: whether the untrained model is validated.
        activation_bytes_per_window: estimated bytes of activations of one more window in a forward pass.
        memory_limit: most bytes the process can use; None: unknown.
        peaks: windows in a forward pass -> peak memory of steps with this batch size.
        full_batch_peak: peak memory of steps with the full batch, validation and text generation; 0: not measured.
        too_large_batch: windows in a batch that was not tried, or failed, because it does not fit into memory.
        measured_seconds: windows in a forward pass -> time of an optimizer step with this batch size.
        step_seconds: time of an optimizer step with the full batch; an estimate if the batch does not fit.
        compile_seconds: time of torch.compile at the start of the run.
        validation_seconds: time of a validation.
        text_seconds: time of the texts that are generated after each validation.
    """

    batch_size: int = 0
    tokens_per_step: int = 0
    max_steps: int | None = None
    validation_interval: int | None = None
    validates_at_start: bool = False
    activation_bytes_per_window: int = 0
    memory_limit: int | None = None
    peaks: dict[int, int] = field(default_factory=dict)
    full_batch_peak: int = 0
    too_large_batch: int | None = None
    measured_seconds: dict[int, float] = field(default_factory=dict)
    step_seconds: float = 0.0
    compile_seconds: float = 0.0
    validation_seconds: float = 0.0
    text_seconds: float = 0.0

    def bytes_per_window(self) -> float:
        """Return the memory of one more window in a batch, from the two largest batches tried.

        Where only one was tried: three times the activations, because the CPU's allocator fragments the memory.
        """
        *_, smaller, larger = 0, 0, *sorted(self.peaks)
        if smaller == 0 or self.peaks[larger] <= self.peaks[smaller]:
            return 3 * self.activation_bytes_per_window
        return (self.peaks[larger] - self.peaks[smaller]) / (larger - smaller)

    def expected_peak(self, windows: int) -> float:
        """Return the expected peak memory of a batch that is larger than those tried."""
        largest = max(self.peaks)
        return self.peaks[largest] + (windows - largest) * self.bytes_per_window()

    def exceeds_limit(self, windows: int, share: float = 1.0) -> bool:
        """Return whether a larger batch is expected to take more than `share` of the memory limit, if it is known."""
        return self.memory_limit is not None and self.expected_peak(windows) > share * self.memory_limit

    def report(self, completed_steps: int) -> list[str]:
        """Return the lines to print.

        Args:
            completed_steps: optimizer steps before the run is resumed.
        """
        if not self.peaks:
            return ["measured    nothing, because not even one window fits into memory"]
        peaks = [f"{format_bytes(peak)} with {windows:,}" for windows, peak in self.peaks.items()]
        return [
            f"measured    {', '.join(peaks)} window{'s'[: max(self.peaks) != 1]} in a batch",
            f"needed      {self._memory_report()}",
            f"time        {self._time_report(completed_steps)}",
        ]

    def _memory_report(self) -> str:
        if self.too_large_batch is not None:
            windows, needed = self.too_large_batch, self.expected_peak(self.too_large_batch)
        else:
            windows, needed = self.batch_size, float(self.full_batch_peak)
        report = f"{format_bytes(needed)} with {windows:,} window{'s'[: windows != 1]}"
        if self.memory_limit is None:
            return report
        fits = self.too_large_batch is None and needed <= self.memory_limit
        largest = max(self.peaks)
        largest_peak = max(self.peaks[largest], self.full_batch_peak)
        limit = max(1, int(largest + (self.memory_limit - largest_peak) / self.bytes_per_window()))
        return (
            f"{report}, {format_bytes(self.memory_limit)} available: {'fits' if fits else 'does not fit'}; "
            f"the largest batch that fits has about {limit:,} window{'s'[: limit != 1]}"
        )

    def _time_report(self, completed_steps: int) -> str:
        if self.too_large_batch is not None and not self.step_seconds:
            return "not measured, because the batch does not fit"
        speed = f"{self.tokens_per_step / self.step_seconds:,.0f} tokens/s"
        if self.max_steps is None:
            return f"{format_duration(self.step_seconds)} a step, {speed}; the run has no last step"
        steps, validations = max(0, self.max_steps - completed_steps), 0
        if self.validation_interval is not None:
            validations = remaining_validations(completed_steps, self.max_steps, self.validation_interval)
        texts = validations
        if completed_steps == 0:  # the untrained model
            texts += 1
            validations += self.validation_interval is not None and self.validates_at_start
        other_seconds = self.compile_seconds + self.text_seconds * texts
        eta = format_eta(steps, self.step_seconds, validations, self.validation_seconds, other_seconds)
        if self.too_large_batch is not None:
            largest = max(self.measured_seconds)
            steps_of = f"steps of {largest:,} window{'s'[: largest != 1]}"
            return f"{eta}, if the batch fitted; estimated from {steps_of}, without generated texts"
        return f"{eta}; {speed}"


class RunProfiler(Callback):
    """Measure the memory and the time of a run by training some steps with batches of different sizes.

    The Trainer takes the steps with all its settings, but without loggers, checkpoints and validations. Validation and
    text generation are measured separately. With gradient accumulation over more than two batches, a measured step has
    two: the time of the others equals that of the first. Where a decision depends on a measurement, rank 0 decides for
    all ranks.

    Args:
        generate: the callback that generates text in the run.
        validate_at_start: whether the run validates the untrained model.

    Attributes:
        completed_steps: optimizer steps before the run is resumed.
        measurements: what was found so far.
    """

    def __init__(self, generate: GenerateText, validate_at_start: bool = True) -> None:
        self.generate = generate
        self.completed_steps = 0
        self.measurements = Measurements(validates_at_start=validate_at_start)
        self._windows = 1  # in each forward pass of the current optimizer step
        self._batch_seconds: list[float] = []  # of each batch of the current optimizer step
        self._batch_start = 0.0  # time.perf_counter()

    def report(self) -> list[str]:
        """Return what was found, as lines to print."""
        return self.measurements.report(self.completed_steps)

    def handle_out_of_memory(self, trainer: Trainer) -> None:
        """Note that the current batch does not fit. The memory limit is then the peak so far."""
        found = self.measurements
        if found.peaks and not found.full_batch_peak:  # otherwise no step fits, or all steps of the run's batch size do
            found.too_large_batch, found.memory_limit = self._windows, peak_memory(self._device)
            self._estimate_seconds(trainer)

    def _estimate_seconds(self, trainer: Trainer) -> None:
        """Estimate the time of steps and validations whose batch does not fit, from steps with smaller batches."""
        found, precision = self.measurements, str(trainer.precision)
        module, data = module_and_data(trainer)
        workload = Workload(
            module.gpt.config,
            data.batch_size,
            module.hparams["optimizer"],
            precision,
            self._accumulate_grad_batches,
            activation_checkpointing=module.hparams["activation_checkpointing"],
        )
        speed = base_model(self._device).calibrated(
            (replace(workload, windows=windows), seconds) for windows, seconds in found.measured_seconds.items()
        )
        found.step_seconds = speed.step_seconds(workload)
        if found.validation_interval is not None:
            splits: list[EvaluationBatches] = [loader.dataset for loader in data.val_dataloader()]  # type: ignore[misc]
            tokens = data.context_length * sum(len(split.starts) for split in splits)
            found.validation_seconds = speed.evaluation_seconds(workload.config, tokens, precision, data.batch_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module, data = module_and_data(trainer)
        self._device, self._start = module.device, time.perf_counter()
        found = self.measurements
        found.batch_size, found.max_steps = data.batch_size, data.plan.last_step
        found.tokens_per_step = data.plan.windows_per_step * data.context_length
        found.validation_interval = data.plan.validation_interval
        found.activation_bytes_per_window = data.context_length * activation_bytes_per_token(
            module.gpt, str(trainer.precision), module.device.type
        )
        free = free_memory(self._device)
        if free is not None:
            sharing = processes_sharing_memory(self._device.type, trainer.num_devices)
            usable = int(USABLE_SHARE * free / sharing)
            found.memory_limit = used_memory(self._device) + usable
        self._take_over(trainer, data)
        self._schedule = self._measure(trainer, module, data)
        self._windows = next(self._schedule)
        self._batch_start = time.perf_counter()

    def _take_over(self, trainer: Trainer, data: TextDataModule) -> None:
        """Make this callback decide when training ends and how large a batch is.

        `RunProfiler` changes attributes of the Trainer, its loops and the data module only here, apart from
        `trainer.should_stop`. They cannot be used for anything else afterwards.
        """
        self._accumulate_grad_batches = trainer.accumulate_grad_batches
        trainer.accumulate_grad_batches = min(2, trainer.accumulate_grad_batches)
        trainer.limit_val_batches = 0
        loop = trainer.fit_loop
        loop.max_epochs = loop.epoch_loop.max_steps = -1  # no limit
        loop.min_epochs = loop.epoch_loop.min_steps = None
        data.on_before_batch_transfer = self._resize_batch  # type: ignore[method-assign]

    def _resize_batch(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Return `self._windows` rows of the batch; rows are repeated where it has fewer."""
        batch_size = len(batch[0])
        if self._windows == batch_size:
            return batch
        rows = torch.arange(self._windows) % batch_size
        return tuple(tensor[rows] for tensor in batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize(self._device)
        self._batch_seconds.append(time.perf_counter() - self._batch_start)
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._windows = next(self._schedule, 0)
            trainer.should_stop = self._windows == 0
            self._batch_seconds = []
        self._batch_start = time.perf_counter()

    def _measure(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> Iterator[int]:
        """Measure everything, in the order of the report.

        This generator and those it delegates to yield the number of windows in a batch before each optimizer step. They
        go on after the step, when `self._batch_seconds` has the time of each of its batches.
        """
        found = self.measurements
        compiled = bool(module.hparams["compile"])

        def without_compilation() -> AbstractContextManager[Any]:  # which would compile again for every batch size
            return torch.compiler.set_stance("force_eager") if compiled else nullcontext()

        with without_compilation():
            yield from self._try_smaller_batches(trainer)
        if found.too_large_batch is not None:
            self._estimate_seconds(trainer)
            return
        yield from self._time_full_batch(trainer, compiled)
        if found.validation_interval is not None:
            found.validation_seconds = self._time_validation(trainer, module, data)
        found.text_seconds = self._time_texts(trainer)
        found.full_batch_peak = peak_memory(self._device)
        with without_compilation():
            yield from self._try_larger_batches(trainer)

    def _try_smaller_batches(self, trainer: Trainer) -> Iterator[int]:
        """Double the batch from one window up to the full batch, or until the next would not fit."""
        found, windows = self.measurements, 1
        while windows < found.batch_size:
            yield from self._measure_peak(windows)
            fits_easily = not found.exceeds_limit(found.batch_size, share=0.5)
            out_of_time = self._elapsed() > TOTAL_SECONDS / 4
            skip = trainer.strategy.broadcast(fits_easily or out_of_time)
            windows = found.batch_size if skip else min(2 * windows, found.batch_size)
            if trainer.strategy.broadcast(found.exceeds_limit(windows)):
                found.too_large_batch = windows
                return

    def _time_full_batch(self, trainer: Trainer, compiled: bool) -> Iterator[int]:
        """Measure the time and the peak memory of optimizer steps with the full batch."""
        found, broadcast = self.measurements, trainer.strategy.broadcast
        reset_peak_memory(self._device)
        warm_up_seconds: list[float] = []  # of each step
        for _ in range(WARM_UP_STEPS):
            yield found.batch_size
            warm_up_seconds.append(sum(self._batch_seconds))
            if broadcast(self._elapsed() > TOTAL_SECONDS / 2):
                break
        batch_seconds: list[list[float]] = []  # of each step
        end = min(time.perf_counter() + STEP_SECONDS, self._start + TOTAL_SECONDS)
        most_steps = sys.maxsize if found.max_steps is None else found.max_steps - self.completed_steps
        while len(batch_seconds) < MIN_STEPS or broadcast(
            len(batch_seconds) < most_steps and time.perf_counter() < end
        ):
            yield found.batch_size
            batch_seconds.append(self._batch_seconds)
        first, last = (trimmed_mean([seconds[i] for seconds in batch_seconds]) for i in (0, -1))
        found.step_seconds = (self._accumulate_grad_batches - 1) * first + last  # the last includes the update
        if compiled:
            found.compile_seconds = max(0.0, sum(warm_up_seconds) - len(warm_up_seconds) * last)
        found.peaks[found.batch_size] = peak_memory(self._device)

    def _try_larger_batches(self, trainer: Trainer) -> Iterator[int]:
        """Double the full batch while it surely fits and is fast, to know better how memory grows with the batch."""
        found, windows = self.measurements, self.measurements.batch_size
        while True:
            seconds = 2 * MIN_STEPS * found.step_seconds * windows / found.batch_size
            worthwhile = (
                found.memory_limit is not None
                and found.expected_peak(2 * windows) < found.memory_limit / 2
                and self._elapsed() + seconds < TOTAL_SECONDS
                and seconds < SLOPE_SECONDS
            )
            if not trainer.strategy.broadcast(worthwhile):
                return
            windows *= 2
            yield from self._measure_peak(windows)

    def _measure_peak(self, windows: int) -> Iterator[int]:
        reset_peak_memory(self._device)
        for _ in range(MIN_STEPS):
            yield windows
        first, last = self._batch_seconds[0], self._batch_seconds[-1]
        self.measurements.measured_seconds[windows] = (self._accumulate_grad_batches - 1) * first + last
        self.measurements.peaks[windows] = peak_memory(self._device)

    def _time_validation(self, trainer: Trainer, module: LitGPT, data: TextDataModule) -> float:
        """Return the seconds of a validation, extrapolated from some batches of the validation split."""
        splits: list[EvaluationBatches] = [loader.dataset for loader in data.val_dataloader()]  # type: ignore[misc]
        batches, seconds, timed_windows = splits[-1], 0.0, 0
        module.eval()
        module.on_validation_epoch_start()
        for number, index in enumerate((0, *range(len(batches)))):  # the first batch twice: once to warm up
            start = time.perf_counter()
            batch = trainer.strategy.batch_to_device(batches[index])
            with torch.no_grad():
                trainer.strategy.validation_step(batch, index, len(splits) - 1)
            synchronize(self._device)
            if number > 0:
                seconds += time.perf_counter() - start
                timed_windows += len(batch[0])
            if trainer.strategy.broadcast(seconds > VALIDATION_SECONDS):
                break
        module.train()
        return seconds / timed_windows * sum(len(split.starts) for split in splits)

    def _time_texts(self, trainer: Trainer) -> float:
        """Return the seconds to generate the texts of all prompts once, extrapolated from those of the first prompt."""
        seconds, generate = 0.0, copy.copy(self.generate)
        max_new_tokens = self.generate.sampling["max_new_tokens"]
        new_tokens = min(MIN_NEW_TOKENS, max_new_tokens)
        for prompt in self.generate.prompts[:1] * 3:  # the first time to warm up
            generate.sampling = {**self.generate.sampling, "max_new_tokens": new_tokens}
            start = time.perf_counter()
            generate.generate_texts(trainer, prompt)
            seconds = (time.perf_counter() - start) * max_new_tokens / new_tokens
            if trainer.strategy.broadcast(seconds < TEXT_SECONDS):
                new_tokens = max_new_tokens  # tokens beyond the context length take longer than the first ones
        return seconds * len(self.generate.prompts)

    def _elapsed(self) -> float:
        return time.perf_counter() - self._start
