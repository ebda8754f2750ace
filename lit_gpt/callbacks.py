"""What a person watches of a run: its curves, its progress, its speed, and the text it writes."""

import contextlib
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams, scalar
from tqdm import tqdm

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.generate import check_sampling, generate, prompt_tokens, shown
from lit_gpt.module import LitGPT, log_points, logs_at

# dense bfloat16 operations a second, as the makers state them
PEAK_FLOPS = {  # of the first that is in a device's name
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
}

FLUSH_SECONDS = 2.0  # for those who watch; what a checkpoint counts on is flushed with it

OVERLAY = {"loss": {"train and validation": ["Multiline", ["loss/train$", "loss/train_eval", "loss/val"]]}}


def parts(trainer: Trainer) -> tuple[LitGPT, TextDataModule]:
    """The module and the data of a run."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, LitGPT)
    assert isinstance(data, TextDataModule)
    return module, data


class RunLogger(TensorBoardLogger):
    """TensorBoard events whose x axis counts optimizer steps, with one chart of both losses."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._earlier = {path.name for path in Path(self.log_dir).glob("events.*")}  # of a run that is resumed
        self._flushed = 0.0  # when it last was

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"{self.log_dir}: the curves cannot be written ({error.strerror}): make room") from error

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes step N at N, where Lightning counts N - 1, and leaves its `epoch` out; all values in one event."""
        event = Summary()
        for tag, value in metrics.items():
            if tag != "epoch":
                event.MergeFrom(scalar(tag, float(value)))
        with self._writing():
            self.experiment._get_file_writer().add_summary(event, None if step is None else step + 1)

    @rank_zero_only
    def start(self, settings: dict[str, Any]) -> None:
        """Writes the chart that overlays the losses, and the settings, tied to `best/loss_val`."""
        self.experiment.add_custom_scalars(OVERLAY)
        for summary in hparams(settings, {"best/loss_val": 0.0}):
            self.experiment._get_file_writer().add_summary(summary)

    @rank_zero_only
    def save(self) -> None:
        """Flushes, once in a while; config.yaml holds the settings already."""
        if time.perf_counter() - self._flushed > FLUSH_SECONDS:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        with self._writing():
            self.experiment.flush()
        self._flushed = time.perf_counter()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        with contextlib.suppress(OSError) if status == "failed" else self._writing():
            super().finalize(status)

    def sizes(self) -> dict[str, int]:
        """The bytes of every event file of the run, once all points so far are in them.

        Raises:
            UserError: they could not be written.
        """
        self.flush()
        sizes = {}
        for path in Path(self.log_dir).glob("events.*"):
            with open(path, "rb+") as file:
                os.fsync(file.fileno())  # a power cut must not leave less than the checkpoint says
            sizes[path.name] = path.stat().st_size
        return sizes

    @rank_zero_only
    def cut_back(self, sizes: dict[str, int]) -> None:
        """Takes out what an earlier process wrote after a checkpoint with these `sizes`: it will be written again."""
        if self._earlier & sizes.keys():  # else they are not the files of the run the checkpoint is of
            for path in (Path(self.log_dir, name) for name in self._earlier):
                if path.name not in sizes:
                    path.unlink()
                elif path.stat().st_size > sizes[path.name]:
                    os.truncate(path, sizes[path.name])
        self._earlier = set()


def validations_left(step: int, end: int, interval: int) -> int:
    """How many follow after optimizer step `step`: every `interval` steps, and after the last."""
    return 0 if step >= end else -(-end // interval) - step // interval


def told_time(
    steps: int, step_seconds: float, validations: int, validation_seconds: float, more_seconds: float = 0.0
) -> str:
    """`about 35 s: 1,000 steps of 33 ms, 5 validations of 400 ms`; `more_seconds` count too."""
    seconds = steps * step_seconds + validations * validation_seconds + more_seconds
    validating = f", {validations:,} validation{'s'[: validations != 1]} of {told_seconds(validation_seconds)}"
    return f"about {told_seconds(seconds)}: {steps:,} steps of {told_seconds(step_seconds)}" + (
        validating if validations else ""
    )


def told_seconds(seconds: float) -> str:
    """In the unit of which there are not too many."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


class StepProgress(ProgressBar):
    """A bar over the optimizer steps of the whole run, a line at every validation, and one on the time that is left.

    That one comes once some steps have been timed; a validation yet to come counts as a third of training on so much
    text, a forward pass without its backward pass (Kaplan et al. 2020).
    """

    WARM_UP, TIMED_SECONDS, WORTH_SECONDS = 5, 2.0, 20.0  # steps before the clock, its least time, the least told of

    def __init__(self) -> None:
        super().__init__()
        self.bar: tqdm | None = None
        self.enabled = True
        self._timed_from: int | None = None  # the step the clock waits for; None: what is left has been told
        self._since = 0.0

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self.enabled:
            tqdm.write(" ".join(map(str, args)), file=sys.stdout)
            sys.stdout.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        quiet = not self.enabled or not sys.stderr.isatty()
        self.bar = tqdm(initial=trainer.global_step, total=steps, unit="step", disable=quiet, dynamic_ncols=True)
        self.print(f"step {trainer.global_step:>6,}   {'untrained' if trainer.global_step == 0 else 'resumed'}")
        self._timed_from = trainer.global_step + self.WARM_UP

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if self.bar is not None and logs_at(trainer, trainer.global_step):
            self.bar.update(trainer.global_step - self.bar.n)
        if self._timed_from is not None and (args[-1] + 1) % trainer.accumulate_grad_batches == 0:
            self._time(trainer, trainer.global_step - self._timed_from)

    def _time(self, trainer: Trainer, steps: int) -> None:
        """Says what time is left, when `steps` have taken long enough for it to be known."""
        module, data = parts(trainer)
        end, now = data.max_steps, time.perf_counter()
        if steps <= 0:
            self._since = now
        elif now > self._since + self.TIMED_SECONDS:
            synchronize(module.device)  # once: what was queued before the clock was started is little
            step_seconds = (time.perf_counter() - self._since) / steps
            self._timed_from = None
            if end is None or (end - trainer.global_step) * step_seconds < self.WORTH_SECONDS:
                return
            times, seconds = 0, 0.0
            if trainer.enable_validation and data.validation_interval is not None:
                times = validations_left(trainer.global_step, end, data.validation_interval)
                windows = sum(len(loader.dataset.starts) for loader in trainer.val_dataloaders or [])
                seconds = windows / (data.batch_size * data.accumulation) * step_seconds / 3
            self.print(f"time        {told_time(end - trainer.global_step, step_seconds, times, seconds)}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is None or trainer.sanity_checking:
            return
        if self._timed_from is not None:  # the clock does not count what has just been done
            self._timed_from = trainer.global_step + 1
        losses = trainer.callback_metrics
        speed = losses.get("speed/tokens_per_second")
        self.print(
            f"step {trainer.global_step:>6,}   loss/train_eval {losses['loss/train_eval']:.4f}   "
            f"loss/val {losses['loss/val']:.4f}" + (f"   {speed:,.0f} tokens/s" if speed is not None else "")
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.update(trainer.global_step - self.bar.n)
            self.bar.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.bar is not None:
            self.bar.close()


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


def peak_flops(device: torch.device) -> float | None:
    """The most bfloat16 operations a second `device` can do, where known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in PEAK_FLOPS.items() if model in name), None)


def synchronize(device: torch.device) -> None:
    """Waits for what `device` was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes held so far: on the device, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class GenerateText(Callback):
    """Writes text at the start, at validations and at the end: to the console and to TensorBoard, under `samples/`.

    It draws from a generator of its own, so that a run's losses are the same with and without it.

    Args:
        prompts: what to go on from; [] for no text at all.
        num_samples: texts a prompt.
        max_new_tokens: their length at most.
        temperature: 0 takes the likeliest token always.
        top_k: draw among the k likeliest tokens only.
    """

    def __init__(
        self,
        prompts: list[str] | str = "",
        num_samples: int = 3,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = None,
    ) -> None:
        if num_samples < 1 or max_new_tokens < 1:
            raise UserError(
                f"--generate.num_samples is {num_samples} and --generate.max_new_tokens {max_new_tokens}: "
                "give 1 or more; --generate.prompts [] turns the texts off"
            )
        check_sampling(temperature, top_k)
        self.prompts = [prompts] if isinstance(prompts, str) else prompts
        self.num_samples = num_samples
        self.sampling: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
        }
        self._written_step = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.ckpt_path is None:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, data = parts(trainer)
        if self._written_step != trainer.global_step == data.max_steps:  # not where a run is only interrupted
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Every rank draws the same texts, since the model may be spread over them; the first one shows them."""
        step = self._written_step = trainer.global_step
        for number, prompt in enumerate(self.prompts, start=1):
            texts = [shown(text) for text in self.texts(trainer, prompt)]
            if not trainer.is_global_zero:
                continue
            between = "\n\n" if any("\n" in text for text in texts) else "\n"
            bar = trainer.progress_bar_callback
            (print if bar is None else bar.print)(between.join(textwrap.indent(text, "  | ", bool) for text in texts))
            if isinstance(trainer.logger, RunLogger):
                markdown = "\n\n".join(f"```\n{text}\n```" for text in texts)
                trainer.logger.experiment.add_text(f"samples/prompt_{number}", markdown, step)

    def texts(self, trainer: Trainer, prompt: str) -> list[str]:
        """`num_samples` texts, prompts included; they depend on the weights, the seed and the step alone."""
        module, data = parts(trainer)
        generator = torch.Generator(device=module.device).manual_seed(data.seed + trainer.global_step)
        rows = data.recipe.reading.mode == "rows"
        start = prompt_tokens(data.tokenizer, prompt, rows)
        end = data.tokenizer.end_of_text if rows else None
        was_training = module.gpt.training
        module.gpt.eval()
        # compiled blocks would be compiled anew for every length of the cache, and in the end for training no more
        with torch.compiler.set_stance("force_eager"):
            written = generate(module.gpt, [start] * self.num_samples, end=end, generator=generator, **self.sampling)
        module.gpt.train(was_training)
        return [prompt + data.tokenizer.decode(row) for row in written]
