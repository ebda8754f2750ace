"""Forecast the last validation loss while a run trains."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from tqdm import tqdm

from lit_gpt.lines import wrap_line
from lit_gpt.planning.forecast import START_SHARE, Curve, Forecast, KnownCurves, add_point, forecast, quarter_losses
from lit_gpt.training.metrics import is_logging_step
from lit_gpt.training.module import module_and_data
from lit_gpt.training.progress import step_line

MAX_UNREAD = 100  # losses that wait on the device to be read


def describe_forecast(last_step: int, expected: Forecast, bits_per_nat: float | None) -> str:
    """Return a forecast as a text for the console.

    Args:
        last_step: The step that it is about.
        expected: The forecast, in nats per token.
        bits_per_nat: Bits per byte for each nat per token; None if it is not known.
    """
    text = f"{expected.loss:.3f} at step {last_step:,} (80%: {expected.low:.3f} to {expected.high:.3f})"
    bits = "" if bits_per_nat is None else f", {expected.loss * bits_per_nat:.3f} bits/byte"
    return text + bits


class LossForecast(Callback):
    """Forecast the last `loss/val` and its 80% interval, from a tenth of a run on.

    There is a forecast at each validation. Where the first tenth of the run ends without one, the training loss is
    enough for the first forecast. Forecasts are printed, and logged as `forecast/loss_val`, `forecast/loss_val_low`,
    `forecast/loss_val_high` and `forecast/bits_per_byte`. A run that does not validate has none, nor has a run without
    a last step or with fewer than `MIN_STEPS`.

    The training losses so far, at most a thousand, are in the checkpoint: a resumed run forecasts what a run that was
    never stopped would. They are read at logging steps, where the logger waits for the device, too.

    Attributes:
        MIN_STEPS: The shortest run with forecasts.
    """

    MIN_STEPS = 100

    def __init__(self) -> None:
        self._train_curve: Curve = []
        self._unread: list[tuple[int, Tensor]] = []  # the steps after it and their losses, on the device
        self._read_step = 0  # the step of the latest loss
        self._bits_per_nat: float | None = None
        self._forecast_step = 0  # the step of the latest forecast

    # ------------------------------------------------------------------------------------------ state in a checkpoint

    @property
    def state_key(self) -> str:
        return "LossForecast"

    def state_dict(self) -> dict[str, Any]:
        self._read_losses()
        return {
            "train_curve": list(self._train_curve),
            "bits_per_nat": self._bits_per_nat,
            "forecast_step": self._forecast_step,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._train_curve = [(step, loss) for step, loss in state_dict["train_curve"]]
        self._read_step = self._train_curve[-1][0] if self._train_curve else 0
        self._bits_per_nat, self._forecast_step = state_dict["bits_per_nat"], state_dict["forecast_step"]

    # -------------------------------------------------------------------------------------------- hooks of the Trainer

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        """Forecast from the training loss alone if the first tenth of the run has ended without a validation."""
        if self._forecast_step == 0 and self._is_due(trainer):
            self._forecast(trainer, None)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step == self._read_step:  # else more batches of a step would count
            return
        module, _ = module_and_data(trainer)
        self._read_step = step
        self._unread.append((step, torch.as_tensor(module.step_loss)))
        if is_logging_step(trainer, step) or len(self._unread) >= MAX_UNREAD:
            self._read_losses()

    def _read_losses(self) -> None:
        """Move the losses that are still on the device to the curve; waits for the device."""
        if self._unread:
            steps, losses = zip(*self._unread)
            self._unread = []
            for step, loss in zip(steps, torch.stack(losses).tolist()):
                add_point(self._train_curve, step, loss)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        loss = float(metrics["loss/val"])
        if "val/bits_per_byte" in metrics:
            self._bits_per_nat = float(metrics["val/bits_per_byte"]) / loss
        if self._is_due(trainer):
            self._forecast(trainer, loss)

    def _is_due(self, trainer: Trainer) -> bool:
        """Return whether the run is between its first tenth and its last step."""
        last_step = _last_step(trainer) if trainer.enable_validation else None
        if last_step is None or last_step < self.MIN_STEPS:
            return False
        return START_SHARE * last_step <= trainer.global_step < last_step

    def _forecast(self, trainer: Trainer, val_loss: float | None) -> None:
        """Forecast, print and log; do nothing where the training loss is not known well enough."""
        module, data = module_and_data(trainer)
        step, last_step = trainer.global_step, _last_step(trainer)
        assert last_step is not None
        self._read_losses()
        losses = quarter_losses(self._train_curve, step)
        if losses is None or val_loss == 0:
            return
        known = KnownCurves(
            step=step,
            last_step=last_step,
            val_loss=val_loss,
            recent_loss=losses[0],
            earlier_loss=losses[1],
            rate=module.learning_rate_factor(step),
            last_rate=module.learning_rate_factor(last_step - 1),
            epochs=last_step * data.plan.accumulate_grad_batches / data.plan.num_batches,
            optimizer=module.hparams["optimizer"],
        )
        self._forecast_step = step
        follows_losses = val_loss is not None  # on the console
        label = "forecast    loss/val " if follows_losses else step_line(step, "forecast ")
        self._show(trainer, last_step, forecast(known), label)

    def _show(self, trainer: Trainer, last_step: int, expected: Forecast, label: str) -> None:
        """Log a forecast of the loss at the last step, and print it behind a label."""
        metrics = {
            "forecast/loss_val": expected.loss,
            "forecast/loss_val_low": expected.low,
            "forecast/loss_val_high": expected.high,
        }
        if self._bits_per_nat is not None:
            metrics["forecast/bits_per_byte"] = expected.loss * self._bits_per_nat
        for logger in trainer.loggers:
            logger.log_metrics(metrics, trainer.global_step - 1)  # Lightning counts steps from 0
        if trainer.is_global_zero:
            progress_bar = trainer.progress_bar_callback
            print_text = tqdm.write if progress_bar is None else progress_bar.print
            print_text("\n".join(wrap_line(label + describe_forecast(last_step, expected, self._bits_per_nat))))


def _last_step(trainer: Trainer) -> int | None:
    """Return the last step of the run, which `StepsInTime` may change; None if it has no end."""
    return module_and_data(trainer)[1].plan.last_step
