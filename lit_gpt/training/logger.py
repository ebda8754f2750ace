"""TensorBoard logging whose x axis counts optimizer steps."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch.utils.tensorboard import FileWriter, SummaryWriter
from torch.utils.tensorboard.summary import scalar

from lit_gpt.compat import event_file_writer
from lit_gpt.errors import UserError

FLUSH_SECONDS = 2.0  # at least, between two flushes by `save`; before a checkpoint the events are always flushed

HISTOGRAM_BINS: Any = 64

# TensorBoard draws one chart for each tag, with a line and a colour for each run. So that training and validation loss
# share a chart, they are also written under one tag to two sub-runs, which are folders in the run's folder. TensorBoard
# sorts the groups of tags by ASCII and shows the first one at the top of its first page: the capital letter makes it
# this chart. The HParams page shows the scalars of the sub-run "val" beside the settings.
SUB_RUNS = {
    "train": {"loss/train": "Loss"},
    "val": {"loss/val": "Loss", "best/loss_val": "best/loss_val"},
}  # folder -> {tag in the run's own event file: tag in the folder}

# The charts of TensorBoard's Custom Scalars page: title -> tag.
CHARTS = {
    "loss (nats per token)": "Loss",
    "perplexity": "val/perplexity",
    "bits per byte": "val/bits_per_byte",
    "learning rate": "optim/lr",
    "gradient norm": "optim/grad_norm",
    "tokens per second": "speed/tokens_per_second",
    "peak memory (GB)": "memory/peak_gb",
}

# The last chart there: a line with a band around it. Title, then the tags of the line, of its lower and its upper end.
FORECAST_CHART = (
    "forecast of the last loss/val, with its 80% interval",
    ("forecast/loss_val", "forecast/loss_val_low", "forecast/loss_val_high"),
)


class StepLogger(TensorBoardLogger):
    """TensorBoard logger whose x axis counts optimizer steps from 1, and whose event files can be truncated.

    The event file in the run's folder has all tags. `SUB_RUNS` says which of them are written to sub-runs too, without
    step 0: smoothed as TensorBoard does it by default, the high loss of the untrained model would lift the curve of the
    validation, which has few points, far above that of the training.

    A checkpoint stores the sizes of the event files (`event_file_sizes`). A resumed run truncates the files to these
    sizes (`truncate_event_files`), so every point of every curve is there exactly once.

    Args:
        save_dir: Folder of all runs.
        name: Name of the run, a folder in `save_dir`.
        version: Number or name of the folder in it; None: a new one.

    Attributes:
        run_version: The name of the run's folder, if another process has taken the next version in the meantime.
        step_offset: Is added to the steps that Lightning gives to `log_metrics`. Lightning counts them from 0, so it is
            1; it is 0 while the untrained model is validated, whose values belong to step 0.
    """

    def __init__(
        self, save_dir: str | Path = "logs", name: str = "lightning_logs", version: int | str | None = None
    ) -> None:
        self.run_version: str | None = None
        super().__init__(save_dir, name=name, version=version)
        self.step_offset = 1
        self._sub_run_writers: dict[str, FileWriter] = {}  # sub-run -> writer of its event file
        # files of the previous processes of a resumed run; this process writes new ones
        self._previous_files = set(self._event_files())
        self._last_flush = 0.0  # time.perf_counter()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sub_run_writers": {}}  # they have threads

    @property
    def version(self) -> int | str:
        """The version of the run, or the name of its folder."""
        return self.run_version or super().version

    @property
    def experiment(self) -> SummaryWriter:
        """The writer of the event file, which is opened at the first use."""
        with self._write_errors_as_user_errors():
            return super().experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write all values as one event, without Lightning's `epoch`, and those of the sub-runs to their event files.

        Args:
            metrics: tag -> value.
            step: the optimizer step as Lightning counts it. The event has `step + step_offset`.
        """
        summary = Summary()
        for tag, value in metrics.items():
            if tag != "epoch":
                summary.MergeFrom(scalar(tag, float(value)))
        event_step = None if step is None else step + self.step_offset
        with self._write_errors_as_user_errors():
            event_file_writer(self.experiment).add_summary(summary, event_step)
            if event_step != 0:
                for sub_run, tags in SUB_RUNS.items():
                    for tag in [tag for tag in tags if tag in metrics]:
                        summary = scalar(tags[tag], float(metrics[tag]))
                        self._sub_run_writer(sub_run).add_summary(summary, event_step)

    @rank_zero_only
    def log_text(self, tag: str, text: str, step: int) -> None:
        """Write a text, which TensorBoard shows as Markdown.

        Args:
            tag: Its name.
            text: The text.
            step: The optimizer step.
        """
        with self._write_errors_as_user_errors():
            self.experiment.add_text(tag, text, step)

    @rank_zero_only
    def log_image(self, tag: str, png: bytes, width: int, height: int, step: int) -> None:
        """Write a picture.

        Args:
            tag: Its name.
            png: A PNG file.
            width: In pixels.
            height: In pixels.
            step: The optimizer step.
        """
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        summary = Summary(value=[Summary.Value(tag=tag, image=image)])
        with self._write_errors_as_user_errors():
            event_file_writer(self.experiment).add_summary(summary, step)

    @rank_zero_only
    def log_histograms(self, histograms: Mapping[str, np.ndarray], step: int) -> None:
        """Write the distribution of the values of each array.

        Args:
            histograms: tag -> values.
            step: The optimizer step.
        """
        with self._write_errors_as_user_errors():
            for tag, values in histograms.items():
                self.experiment.add_histogram(tag, values, step, bins=HISTOGRAM_BINS)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the settings of the run for TensorBoard's HParams page, and the layout of its Custom Scalars page.

        The settings stand in the sub-run "val". For each run TensorBoard shows them beside the last values of the
        scalars there. It lists first the settings that differ between runs, because no list of settings
        (`hparams_config`) is written. Lightning's method writes one, and a point -1 of `hp_metric` at step 0.

        Args:
            params: Setting -> number or text.
            *args: Not used.
            **kwargs: Not used.
        """
        trial = f"{self.name}/{Path(self.log_dir).name}"
        with self._write_errors_as_user_errors():
            # First: if its folder cannot be created, the folder of a new run is removed, and must have no writer yet.
            self._sub_run_writer("val").add_summary(hparams_pb(params, trial))
            # TensorBoard takes the tags as regular expressions
            charts = {title: ["Multiline", [f"^{tag}$"]] for title, tag in CHARTS.items()}
            charts[FORECAST_CHART[0]] = ["Margin", list(FORECAST_CHART[1])]
            self.experiment.add_custom_scalars({"curves": charts})

    @rank_zero_only
    def save(self) -> None:
        """Flush if the last flush is more than `FLUSH_SECONDS` ago.

        Lightning's method also writes hparams.yaml; here config.yaml holds the settings.
        """
        if time.perf_counter() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    @rank_zero_only
    def flush(self) -> None:
        """Write all queued events to the event file."""
        with self._write_errors_as_user_errors():
            self.experiment.flush()
            for writer in self._sub_run_writers.values():
                writer.flush()
        self._last_flush = time.perf_counter()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event files. After a failed run, a write error is ignored: the first error is the one to report."""
        with contextlib.suppress(OSError) if status == "failed" else self._write_errors_as_user_errors():
            super().finalize(status)
            for writer in self._sub_run_writers.values():
                writer.close()
        self._sub_run_writers = {}

    def event_file_sizes(self) -> dict[str, int]:
        """Flush all events to the disk and return the size of each event file of the run.

        Returns:
            Path of the file in the run's folder -> bytes.

        Raises:
            UserError: The events cannot be written.
        """
        self.flush()
        sizes = {}
        with self._write_errors_as_user_errors():
            for name in self._event_files():
                with open(Path(self.log_dir, name), "rb+") as file:
                    os.fsync(file.fileno())  # after a power failure no file may be shorter than the checkpoint says
                    sizes[name] = os.fstat(file.fileno()).st_size
        return sizes

    @rank_zero_only
    def truncate_event_files(self, sizes: dict[str, int]) -> None:
        """Remove the events that previous processes wrote after a checkpoint: the resumed run writes them again.

        Does nothing when called again, and when no event file is in `sizes`: then the checkpoint is of another run.

        Args:
            sizes: what `event_file_sizes` returned for the checkpoint.

        Raises:
            UserError: A file cannot be truncated or removed.
        """
        if self._previous_files & sizes.keys():
            with self._write_errors_as_user_errors():
                for name in self._previous_files:
                    path = Path(self.log_dir, name)
                    if name not in sizes:
                        path.unlink()
                    elif path.stat().st_size > sizes[name]:
                        os.truncate(path, sizes[name])
        self._previous_files = set()

    def _sub_run_writer(self, sub_run: str) -> FileWriter:
        """Return the writer of a sub-run, which is opened at the first use. A link in its place is removed."""
        if sub_run not in self._sub_run_writers:
            folder = Path(self.log_dir, sub_run)
            if folder.is_symlink():  # it could lead elsewhere
                folder.unlink()
            self._sub_run_writers[sub_run] = FileWriter(str(folder))
        return self._sub_run_writers[sub_run]

    def _event_files(self) -> list[str]:
        """Return the event files of the run and its sub-runs as paths in the run's folder, as "train/events…".

        A symbolic link, which could lead elsewhere, is none.
        """
        run = Path(self.log_dir)
        folders = [run, *(run / sub_run for sub_run in SUB_RUNS if not (run / sub_run).is_symlink())]
        paths = [path for folder in folders for path in folder.glob("events.*")]
        return [path.relative_to(run).as_posix() for path in paths if path.is_file() and not path.is_symlink()]

    @contextlib.contextmanager
    def _write_errors_as_user_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self.log_dir}: the curves cannot be written ({error.strerror or error}): free disk space there, or "
                "choose another folder with --trainer.default_root_dir"
            ) from error


def step_logger(trainer: Trainer) -> StepLogger | None:
    """Return the first StepLogger of a Trainer, or None."""
    return next((logger for logger in trainer.loggers if isinstance(logger, StepLogger)), None)
