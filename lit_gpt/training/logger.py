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
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams, scalar

from lit_gpt.compat import event_file_writer
from lit_gpt.errors import UserError

FLUSH_SECONDS = 2.0  # at least, between two flushes by `save`; before a checkpoint the events are always flushed

HISTOGRAM_BINS: Any = 64

# A chart of TensorBoard's Custom Scalars page: training and validation loss in one plot. The tags are regular
# expressions.
LOSS_CHART = {"loss": {"train and validation": ["Multiline", ["loss/train$", "loss/train_eval", "loss/val"]]}}


class StepLogger(TensorBoardLogger):
    """TensorBoard logger whose x axis counts optimizer steps from 1, and whose event files can be truncated.

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
        # files of the previous processes of a resumed run; this process writes a new file
        self._previous_files = {path.name for path in self._event_files()}
        self._last_flush = 0.0  # time.perf_counter()

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
        """Write all values as one event, without Lightning's `epoch`.

        Args:
            metrics: tag -> value.
            step: the optimizer step as Lightning counts it. The event has `step + step_offset`.
        """
        summary = Summary()
        for tag, value in metrics.items():
            if tag != "epoch":
                summary.MergeFrom(scalar(tag, float(value)))
        with self._write_errors_as_user_errors():
            event_file_writer(self.experiment).add_summary(summary, None if step is None else step + self.step_offset)

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
    def log_image(self, tag: str, png: bytes, width: int, height: int, step: int, caption: str = "") -> None:
        """Write a picture.

        Args:
            tag: Its name.
            png: A PNG file.
            width: In pixels.
            height: In pixels.
            step: The optimizer step.
            caption: Markdown, which TensorBoard shows where the mouse is over the sign (i) beside the name.
        """
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        metadata = SummaryMetadata(summary_description=caption)
        summary = Summary(value=[Summary.Value(tag=tag, image=image, metadata=metadata)])
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
        """Write the settings of the run for TensorBoard's HParams page, and `LOSS_CHART`.

        The page shows the last value of `best/loss_val` beside them. Lightning's method shows `hp_metric`, of which it
        writes a point -1 at step 0.

        Args:
            params: Setting -> value, without nested dictionaries.
            *args: Not used.
            **kwargs: Not used.
        """
        with self._write_errors_as_user_errors():
            self.experiment.add_custom_scalars(LOSS_CHART)
            for summary in hparams(params, {"best/loss_val": 0.0}):
                event_file_writer(self.experiment).add_summary(summary)

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
        self._last_flush = time.perf_counter()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the event file. After a failed run, a write error is ignored: the first error is the one to report."""
        with contextlib.suppress(OSError) if status == "failed" else self._write_errors_as_user_errors():
            super().finalize(status)

    def event_file_sizes(self) -> dict[str, int]:
        """Flush all events to the disk and return the size of each event file of the run.

        Returns:
            File name -> bytes.

        Raises:
            UserError: The events cannot be written.
        """
        self.flush()
        sizes = {}
        with self._write_errors_as_user_errors():
            for path in self._event_files():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())  # after a power failure no file may be shorter than the checkpoint says
                sizes[path.name] = path.stat().st_size
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
                for path in (Path(self.log_dir, name) for name in self._previous_files):
                    if path.name not in sizes:
                        path.unlink()
                    elif path.stat().st_size > sizes[path.name]:
                        os.truncate(path, sizes[path.name])
        self._previous_files = set()

    def _event_files(self) -> list[Path]:
        """Return the event files of the run; a symbolic link, which could lead elsewhere, is none."""
        return [path for path in Path(self.log_dir).glob("events.*") if path.is_file() and not path.is_symlink()]

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
