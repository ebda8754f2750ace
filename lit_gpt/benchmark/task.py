"""The work that a benchmark gives to every implementation: model shape, settings, text and device."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.experiment import Experiment, build_experiment
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.model import GPTConfig
from lit_gpt.training.module import LitGPT
from lit_gpt.training.stop import GracefulStop

Row = dict[str, Any]  # one line of results: column -> value


@dataclass
class Task:
    """The work of one implementation.

    Attributes:
        module: our module; all implementations have its model shape and its optimizer settings.
        data: the data module; all implementations train on its training split.
        device: the device to run on.
        precision: the Trainer's precision.
        gradient_clip_val: the norm that gradients are clipped to; 0: no clipping.
        nanogpt: a checkout of nanoGPT; None: there is none.
    """

    module: LitGPT
    data: TextDataModule
    device: torch.device
    precision: str
    gradient_clip_val: float
    nanogpt: Path | None = None

    @property
    def config(self) -> GPTConfig:
        return self.module.gpt.config

    def autocast(self, enabled: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()


def build_run(args: list[str], default_config: Path) -> Experiment:
    """Build what fit.py would run with these command-line arguments, without running it."""
    return build_experiment(CommandLine(args, default_config), GracefulStop())


def build_task(run: Experiment, nanogpt: Path | None = None) -> Task:
    """Return the work of a run."""
    run.datamodule.trainer = run.model.trainer = run.trainer
    return Task(
        module=run.model,
        data=run.datamodule,
        device=run.trainer.strategy.root_device,
        precision=str(run.trainer.precision),
        gradient_clip_val=run.trainer.gradient_clip_val or 0.0,
        nanogpt=nanogpt,
    )
