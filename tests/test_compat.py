"""Each entry of lit_gpt/compat.py: the private attribute still exists and still means what the package relies on."""

from pathlib import Path

import pytest
import torch
from conftest import event_files, points
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from lit_gpt import compat


class Regression(LightningModule):
    """One weight; logs `loss` at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StepRecorder(Logger):
    """Keeps the x values of all metrics."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(step)

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("corrected", [False, True])
def test_set_logged_step_decides_where_lightning_logs(corrected: bool) -> None:
    class Module(Regression):
        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            if batch_idx == 2:
                self.trainer.fit_loop.epoch_loop._batches_that_stepped = 90  # a wrong count, as after some resumes
            if corrected:
                compat.set_logged_step(self.trainer)

    logger = StepRecorder()
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(4, 1)))
    assert logger.steps == ([0, 1, 2, 3] if corrected else [0, 1, 90, 91])


def test_fused_adamw_takes_the_steps_of_torch_adamw() -> None:
    torch.manual_seed(0)
    ours = [torch.randn(3, 5), torch.randn(7)]
    theirs = [p.clone().requires_grad_() for p in ours]
    optimizer = torch.optim.AdamW(theirs, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    exp_avgs, exp_avg_sqs = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    for step in (1, 2, 3):
        gradients = [torch.randn_like(p) for p in ours]
        compat.fused_adamw_(ours, gradients, exp_avgs, exp_avg_sqs, step, 0.01, (0.9, 0.95), 0.1)
        for p, gradient in zip(theirs, gradients):
            p.grad = gradient
        optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_event_file_writer_writes_one_event_and_opens_a_new_file_after_close(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in (1, 2):
        summary = Summary()
        for tag in ("a", "b"):
            summary.MergeFrom(scalar(tag, float(step)))
        compat.event_file_writer(writer).add_summary(summary, step)
        writer.close()
    assert len(event_files(tmp_path)) == 2
    assert points(tmp_path) == {"a": [(1, 1.0), (2, 2.0)], "b": [(1, 1.0), (2, 2.0)]}
