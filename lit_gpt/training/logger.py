"""TensorBoard logging whose x axis counts optimizer steps."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.summary import hparams, scalar

from lit_gpt.errors import UserError

FLUSH_SECONDS = 2.0  # for those who watch; what a checkpoint counts on is flushed with it


OVERLAY = {"loss": {"train and validation": ["Multiline", ["loss/train$", "loss/train_eval", "loss/val"]]}}


class StepLogger(TensorBoardLogger):
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
    def log_settings(self, settings: dict[str, Any]) -> None:
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

    def event_file_sizes(self) -> dict[str, int]:
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
    def truncate_event_files(self, sizes: dict[str, int]) -> None:
        """Takes out what an earlier process wrote after a checkpoint with these `sizes`: it will be written again."""
        if self._earlier & sizes.keys():  # else they are not the files of the run the checkpoint is of
            for path in (Path(self.log_dir, name) for name in self._earlier):
                if path.name not in sizes:
                    path.unlink()
                elif path.stat().st_size > sizes[path.name]:
                    os.truncate(path, sizes[path.name])
        self._earlier = set()
