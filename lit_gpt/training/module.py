"""LitGPT: how a GPT is trained, evaluated, and saved under a Lightning Trainer."""

import math
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from lit_gpt.compat import NO_INSTANTIATOR, set_logged_step, set_loop_progress
from lit_gpt.data.batches import Batch, BatchLoader
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.optim import (
    MuonAdamW,
    OptimizerName,
    Schedule,
    gradient_norm,
    keep_groups,
    learning_rate_factor,
    parameter_groups,
)
from lit_gpt.sharding import full_tensor, shard_like
from lit_gpt.training.checks import (
    changed_rate,
    check_arguments,
    check_batch,
    check_callbacks,
    check_data,
    check_float8,
    check_loaders,
    check_schedule,
    describe_nonfinite,
)
from lit_gpt.training.compile import compile_blocks
from lit_gpt.training.init_from import copy_weights
from lit_gpt.training.metrics import TRAIN_METRICS, VAL_SPLITS, is_logging_step, split_metrics

DEFAULT_WARMUP_STEPS = 100
SYNC_CHECK_DEVICES = ("cpu",)  # devices where reading a value does not wait for queued work


class LitGPT(LightningModule):
    """A GPT with its training step, its evaluation, and its optimizer.

    Batches are `(tokens, targets)` or `(tokens, targets, documents)`, each (B, T) int64. They come from TextDataModule
    or from any other DataLoader:

        model = LitGPT(GPTConfig(vocab_size=257))
        Trainer(max_steps=20).fit(model, datamodule=TextDataModule("poems.csv", tokenizer="byte"))

    Without TextDataModule the Trainer counts intervals and resumes as it does for other modules, dropout draws from the
    global random state, bits per byte are not logged, and checkpoints contain no tokenizer.

    Args:
        config: Shape of the GPT. Its vocab_size follows from the tokenizer.
        optimizer: "adamw", or "muon" for the matrices of the blocks with AdamW for all other parameters.
        learning_rate: Highest learning rate of the schedule.
        min_learning_rate: Last learning rate of the schedule. The default is a tenth of `learning_rate`.
        schedule: Learning rate after the warm-up: "constant", "cosine" or "linear".
        warmup_steps: Optimizer steps in which the learning rate rises linearly. The default is 100, or a tenth of the
            steps of a shorter run.
        decay_share: Fraction of the run, at its end, in which the learning rate falls.
        embedding_rate: Factor on the learning rate of the embeddings.
        head_rate: Factor on the learning rate of an output head that is not tied to the embeddings.
        weight_decay: Weight decay of the matrices.
        decay_norms_and_biases: Whether weight decay applies to biases and to the scales of norms, too.
        betas: Decay rates of AdamW's moments.
        momentum_warmup_steps: Optimizer steps in which Muon's momentum rises from 0.85 to 0.95.
        compile: Whether to compile the blocks with torch.compile. It starts slowly and pays on a GPU and in long runs.
        activation_checkpointing: Whether to recompute the activations of a block in the backward pass (Chen et al.
            2016). It needs less memory and a third more time.
        float8_head: Whether the head multiplies float8 numbers in the training steps, on a GPU that can.
        init_from: A model from whose weights training starts: a checkpoint, a folder of Hugging Face, or a .gguf file.
            The command line takes the shape and the tokenizer from there.

    Attributes:
        gpt: The model.
        hparams: The arguments above, as checkpoints hold them; `config` is a dictionary.
        max_steps: The last optimizer step of the run, where the learning rate's schedule ends; None: it has no end.
        finite: Whether losses and gradients were finite so far, where this is not checked at every step.
        receive_token_losses: A callback sets it to a function, which gets the loss of every target of each validation
            batch, (B, T) in nats, and which of them count, (B, T) bool.
        updating: True from the check of the gradients until the end of the batch. The weights may then be partly
            updated, and must not be saved.
    """

    def __init__(
        self,
        config: GPTConfig,
        optimizer: OptimizerName = "adamw",
        learning_rate: float = 2e-3,
        min_learning_rate: float | None = None,
        schedule: Schedule = "cosine",
        warmup_steps: int | None = None,
        decay_share: float = 1.0,
        embedding_rate: float = 1.0,
        head_rate: float = 1.0,
        weight_decay: float = 0.1,
        decay_norms_and_biases: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        momentum_warmup_steps: int = 0,
        compile: bool = False,
        activation_checkpointing: bool = False,
        float8_head: bool = False,
        init_from: str | None = None,
    ) -> None:
        # Without arguments `save_hyperparameters` would take those of a subclass.
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        if isinstance(config, dict):  # from a checkpoint
            config = GPTConfig(**config)
        arguments["config"] = asdict(config)  # plain values, which `torch.load(weights_only=True)` accepts
        check_arguments(arguments)
        self.save_hyperparameters(arguments, logger=False)  # the command line logs them with all other settings
        self.gpt = GPT(config)
        self.gpt.blocks.activation_checkpointing = activation_checkpointing
        self.gpt.float8_head = float8_head
        self.init_from = init_from
        self.finite: Tensor | bool = True
        self.receive_token_losses: Callable[[Tensor, Tensor], Any] | None = None
        self.updating = False
        self._saved_at = 0.0  # when the latest checkpoint of this run was written, in seconds since 1970
        self._compiled = self._batch_checked = False
        self.max_steps: int | None = None
        self._loss_sum: Tensor | float = 0.0  # over the batches of the current optimizer step
        self._loss_count = 1  # of these batches
        self._is_last_of_step = False  # whether the optimizer step follows the current batch
        self._is_logging_step = False  # whether metrics of the current optimizer step are logged
        self._is_monitored = False  # whether a callback monitors a metric of the training steps
        self._eval_metrics: dict[str, MetricCollection] = {}  # split -> its metrics
        self._bytes_per_token: Tensor | None = None  # (V,), if the tokenizer is known

    @property
    def text_data(self) -> TextDataModule | None:
        """The Trainer's TextDataModule; None if the batches come from elsewhere."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return data if isinstance(data, TextDataModule) else None

    @property
    def is_attached(self) -> bool:
        """Whether the module belongs to a Trainer; `self.trainer` raises if it does not."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    # --------------------------------------------------------------------------------------------------------- setup

    def setup(self, stage: str) -> None:
        """Check that the Trainer's callbacks and data fit the model."""
        check_callbacks(self.trainer)
        check_float8(self.gpt, self.trainer.strategy.root_device)
        if self.text_data is not None:
            check_data(self.gpt.config, self.text_data)
        self._batch_checked = False

    def check_first_batch(self, batch: Batch) -> None:
        """Check the first batch of a fit, validate or test: reading its largest id waits for the device."""
        if not self._batch_checked:
            check_batch(self.gpt.config, batch)
            self._batch_checked = True

    def configure_model(self) -> None:
        """Shard the model if the strategy is FSDP2, draw its weights if they are on the meta device, and compile it.

        The Trainer calls it before each fit, validate and test.

        Raises:
            UserError: There is not enough memory for the weights.
        """
        if self.device_mesh is not None:
            from lit_gpt.training.fsdp import shard  # slow to import

            mixed = self.trainer.strategy.root_device.type == "cuda" and self.trainer.precision == "bf16-mixed"
            shard(self.gpt, self.device_mesh["data_parallel"], torch.bfloat16 if mixed else None)
        if self.gpt.embedding.weight.is_meta:
            strategy = self.trainer.strategy
            try:
                self.gpt.to_empty(device=strategy.root_device)
            except RuntimeError as error:
                raise UserError(
                    f"the model does not fit into memory ({error}): give a smaller --model.config"
                ) from None
            self.gpt.seed = strategy.broadcast(self.gpt.seed)  # all ranks draw the same weights
            self.gpt.init_weights(shard_like)
        if not self.is_attached:  # loaded to be used without a Trainer
            return
        if self.init_from is not None:
            copy_weights(self.init_from, self.gpt)
            self.init_from = None  # the Trainer calls this method before each of its loops
        if self.trainer.precision == "64-true":  # the Trainer converts only after it has loaded a checkpoint
            self.gpt.double()
        if self.hparams["compile"] and not self._compiled:
            compile_blocks(self.gpt, self.trainer)
            self._compiled = True

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and the schedule of its learning rate over the steps of the run.

        Raises:
            UserError: The schedule needs a last step, and the run has none.
        """
        groups, betas = self.parameter_groups(), tuple(self.hparams["betas"])
        # With 16-mixed the Trainer unscales the gradients before they are clipped, which a fused step would do again.
        fused = self.trainer.precision != "16-mixed"
        optimizer: torch.optim.Optimizer
        if self.hparams["optimizer"] == "muon":
            optimizer = MuonAdamW(groups, betas, fused, self.hparams["momentum_warmup_steps"])
        else:
            optimizer = torch.optim.AdamW(groups, betas=betas, fused=fused)
        optimizer.register_load_state_dict_pre_hook(keep_groups)
        steps = self.trainer.estimated_stepping_batches
        check_schedule(self.hparams["schedule"], steps)
        self.max_steps = None if steps == math.inf else int(steps)
        scheduler = LambdaLR(optimizer, self.learning_rate_factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the groups of parameters that the optimizer gets; see `lit_gpt.optim.parameter_groups`."""
        names = ("weight_decay", "learning_rate", "embedding_rate", "head_rate", "decay_norms_and_biases")
        return parameter_groups(self.gpt, **{name: self.hparams[name] for name in names})

    def learning_rate_factor(self, step: int) -> float:
        """Return the learning rate of optimizer step `step`, counted from 0, as a fraction of the highest one."""
        hparams, highest, lowest = self.hparams, self.hparams["learning_rate"], self.hparams["min_learning_rate"]
        min_factor = (highest / 10 if lowest is None else lowest) / highest
        schedule, decay_share, max_steps = hparams["schedule"], hparams["decay_share"], self.max_steps or 0
        return learning_rate_factor(step, schedule, self.warmup_steps, max_steps, min_factor, decay_share)

    @property
    def warmup_steps(self) -> int:
        """Optimizer steps in which the learning rate rises, with None resolved; known when the Trainer starts."""
        given: int | None = self.hparams["warmup_steps"]
        if given is not None:
            return given
        return DEFAULT_WARMUP_STEPS if self.max_steps is None else min(DEFAULT_WARMUP_STEPS, self.max_steps // 10)

    def cpu(self) -> "LitGPT":
        """Move the model to the CPU. Lightning calls it at the end, also if a run ends before there are weights."""
        return self if self.gpt.embedding.weight.is_meta else super().cpu()

    # ------------------------------------------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Let the arguments win over the hyperparameters of the optimizer that Lightning restored from a checkpoint.

        Raises:
            UserError: The batches come from another TextDataModule than the Trainer's, or the other way round.
        """
        if self.text_data is not None and not isinstance(self.trainer.train_dataloader, BatchLoader):
            raise UserError("this Trainer still has the TextDataModule of an earlier fit: make a new Trainer")
        check_loaders([self.trainer.train_dataloader], self.text_data)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        self._is_monitored = any(getattr(callback, "monitor", None) in TRAIN_METRICS for callback in callbacks)
        optimizer, scheduler, step = self.trainer.optimizers[0], self.lr_schedulers(), self.trainer.global_step
        assert isinstance(scheduler, LambdaLR)
        for group, given in zip(optimizer.param_groups, self.parameter_groups(), strict=True):
            group["initial_lr"], group["weight_decay"] = given["lr"], given["weight_decay"]
            group["lr"], group["betas"] = given["lr"] * self.learning_rate_factor(step), tuple(self.hparams["betas"])
            group["fused"] = optimizer.defaults["fused"]
        scheduler.base_lrs, scheduler.last_epoch = [group["initial_lr"] for group in optimizer.param_groups], step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        set_logged_step(self.trainer)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the logits (B, T, V) of tokens (B, T), and with targets (B, T) the loss; see `GPT.forward`."""
        logits, loss = self.gpt(tokens, targets)
        return logits, loss

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch in nats per token."""
        self.check_first_batch(batch)
        accumulation = self.trainer.accumulate_grad_batches
        micro_batch = batch_idx % accumulation
        if self.gpt.config.dropout > 0 and self.text_data is not None:
            self._seed_dropout(self.text_data.seed, self.trainer.global_step * accumulation + micro_batch)
        loss = self.gpt.loss(*batch)
        self._loss_sum = loss.detach() + (self._loss_sum if micro_batch else 0.0)
        self._loss_count = micro_batch + 1
        self._is_last_of_step = micro_batch + 1 == accumulation or self.trainer.is_last_batch
        is_due = self._is_monitored or is_logging_step(self.trainer, self.trainer.global_step + 1)
        self._is_logging_step = self._is_last_of_step and is_due
        if self._is_logging_step:  # not at every step, because a call of `self.log` takes a third of a millisecond
            self.log("loss/train", self.step_loss, sync_dist=True)
            self.log("optim/lr", self.trainer.optimizers[0].param_groups[0]["lr"])  # of the blocks
        return loss

    @property
    def step_loss(self) -> Tensor | float:
        """The mean loss of the batches of the current optimizer step, or of the latest one, on this rank."""
        return self._loss_sum / self._loss_count

    def _seed_dropout(self, seed: int, batch_number: int) -> None:
        """Seed the generators from the seed of the run and the number of the batch, over all ranks.

        The dropout masks then depend on neither interruptions nor the number of ranks.
        """
        batch_number = batch_number * self.trainer.world_size + self.global_rank
        batch_seed = int(np.random.SeedSequence([seed, batch_number]).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(batch_seed)  # torch.manual_seed also queries all other kinds of devices
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(batch_seed)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Check that the gradients are finite, and clip them as the Trainer's settings say.

        On a CPU the check comes before the optimizer step, which is not taken if it fails. On other devices it would
        wait for the device at every step, so it comes at logging steps and before checkpoints are saved.

        `self.clip_gradients` would compute the norm a second time, less precisely, and multiply every gradient whatever
        the norm is: with 29 million parameters on two CPU cores it takes 11 ms, and the norm here 5 ms.

        Raises:
            UserError: The loss or a gradient is not finite.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sharded_norm = gradient_norm([p.grad for p in parameters if p.grad is not None])
        norm = checked = full_tensor(sharded_norm)  # equal on all ranks
        if self.trainer.precision == "16-mixed":  # gradients may overflow there: the gradient scaler skips the step
            checked = self.trainer.strategy.reduce(torch.as_tensor(self._loss_sum), reduce_op="sum")
        is_finite = torch.isfinite(checked)
        sync_check = is_finite.device.type in SYNC_CHECK_DEVICES
        if not sync_check:
            self.finite = is_finite & self.finite
            if self._is_logging_step:
                self.check_finite(self.trainer.global_step + 1)
        elif not is_finite:
            raise self._nonfinite_error(f"step {self.trainer.global_step + 1:,} was not taken, it is")
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val and (not sync_check or norm > gradient_clip_val):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, sharded_norm)
        if self._is_logging_step:
            self.log("optim/grad_norm", norm)
        self.updating = True

    def check_finite(self, step: int) -> None:
        """Raise UserError if a loss or gradient of a step up to `step` was not finite."""
        if not self.finite:
            raise self._nonfinite_error(f"a step up to {step:,} is")

    @property
    def nonfinite_remedy(self) -> str:
        """What a person can try when losses, gradients or weights are not finite."""
        clip = "" if self.trainer.gradient_clip_val else ", or --trainer.gradient_clip_val 1"
        return f"go on from a checkpoint with {changed_rate(self.hparams['learning_rate'], 1 / 3)}{clip}"

    def _nonfinite_error(self, step: str) -> UserError:
        optimizer, remedy = self.trainer.optimizers[0], self.nonfinite_remedy
        return UserError(describe_nonfinite(step, self._loss_sum, self.gpt, optimizer, remedy))

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing: `on_train_batch_end` frees the gradients.

        Lightning would hold them until the next backward pass. Freed before the forward pass, their memory is used
        again while it is in the cache: a step of 24 ms on two CPU cores takes 1% less time.
        """

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.updating = False
        if self._is_last_of_step:
            self.trainer.optimizers[0].zero_grad(set_to_none=True)

    # ---------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        loaders: Any = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        check_loaders(loaders, self.text_data)
        self._eval_metrics = {}
        self._bytes_per_token = None
        is_own = all(loader is None or isinstance(loader, BatchLoader) for loader in loaders)  # None: in a trial run
        if self.text_data is not None and is_own:
            self._bytes_per_token = torch.from_numpy(self.text_data.tokenizer.bytes_per_token()).to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of a split with a batch."""
        if self._bytes_per_token is not None:
            self._evaluate(batch, VAL_SPLITS[dataloader_idx])
        else:
            self._evaluate(batch, f"val_{dataloader_idx}" if dataloader_idx else "val")

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of a test split with a batch."""
        self._evaluate(batch, f"test_{dataloader_idx}" if dataloader_idx else "test")

    def _evaluate(self, batch: Batch, split: str) -> None:
        self.check_first_batch(batch)
        targets, num_bytes = batch[1], None
        is_counted = targets != IGNORE_INDEX
        if self._bytes_per_token is not None:
            num_bytes = (self._bytes_per_token[targets.clamp(min=0)] * is_counted).sum()
        if split not in self._eval_metrics:
            self._eval_metrics[split] = split_metrics(split, num_bytes is not None, self.device)
        if self.receive_token_losses is None or split != "val":
            nats, correct = self.gpt.evaluate(*batch)
        else:
            losses = torch.zeros(targets.shape, device=targets.device)  # (B, T)
            documents = batch[2] if len(batch) == 3 else None  # (B, T)
            nats, correct = self.gpt.evaluate(batch[0], targets, documents=documents, token_losses=losses)
            self.receive_token_losses(losses, is_counted)
        self._eval_metrics[split].update(nats=nats, correct=correct, tokens=is_counted.sum(), num_bytes=num_bytes)

    def estimate_loss(self) -> dict[str, Tensor]:
        """Return the mean loss of each evaluated split in nats per token: {"train": …, "val": …}.

        The course's `estimate_loss` loops over random batches of both splits and averages their losses. Here the
        Trainer loops: `TextDataModule.val_dataloader` gives fixed windows of both splits, `validation_step` adds up the
        losses of their tokens, and this method divides the sums. The result depends on neither the batch size nor the
        number of ranks.

        Raises:
            UserError: Nothing has been evaluated.
        """
        if not self._eval_metrics:
            raise UserError("nothing has been evaluated: call trainer.validate(model, datamodule=data) first")
        losses = {split: metrics[f"loss/{split}"].compute() for split, metrics in self._eval_metrics.items()}
        return {"train" if split == "train_eval" else split: loss for split, loss in losses.items()}

    def on_validation_epoch_end(self) -> None:
        losses = self.estimate_loss()
        if self.trainer.state.fn == "fit" and not all(loss.isfinite() for loss in losses.values()):
            raise UserError(
                f"after step {self.trainer.global_step:,} the model is not finite "
                f"({', '.join(f'loss of {split} {float(loss)}' for split, loss in losses.items())}): "
                f"{self.nonfinite_remedy}"
            )
        self._log_metrics()

    def on_test_epoch_end(self) -> None:
        self._log_metrics()

    def _log_metrics(self) -> None:
        for metrics in self._eval_metrics.values():
            self.log_dict(metrics.compute(), add_dataloader_idx=False)

    def predict_step(self, batch: Batch | Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Return the logits (B, V) of the token that follows each window of a batch, its last target if it has any."""
        if isinstance(batch, Tensor):
            batch = (batch,)
        tokens, documents = batch[0], batch[2] if len(batch) == 3 else None  # (B, T)
        lengths = torch.full_like(tokens[:, 0], tokens.shape[1])  # (B,)
        if len(batch) > 1:  # the last window of a split may be shorter
            lengths = (batch[1] != IGNORE_INDEX).sum(dim=1).clamp(min=1)
        hidden = self.gpt.hidden(tokens, documents=documents)  # (B, T, D)
        logits: Tensor = self.gpt.head(hidden[torch.arange(len(tokens)), lengths - 1])  # (B, V)
        return logits

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the tokenizer and a description of the data."""
        self._saved_at = max(time.time(), self._saved_at)  # does not go back where the clock does
        checkpoint["saved_at"] = self._saved_at
        if self.text_data is not None:
            checkpoint["tokenizer"] = self.text_data.tokenizer.state()
            checkpoint["data"] = fingerprint(self.text_data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prepare a checkpoint for resuming: this run's patience, and the progress of the loops from the step alone.

        The checkpoint may have been written in the middle of the loops, or with another batch size or number of ranks.
        """
        if not self.is_attached:
            return
        if self.trainer.state.fn != "fit":  # validation and test begin at their first batch, whatever the file says
            loops = {"validate_loop": self.trainer.validate_loop, "test_loop": self.trainer.test_loop}
            checkpoint["loops"] = {name: loop.state_dict() for name, loop in loops.items()}
            return
        self._saved_at = checkpoint.get("saved_at", 0.0)
        states = checkpoint.setdefault("callbacks", {})
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping) and callback.state_key in states:
                states[callback.state_key]["patience"] = callback.patience
        if self.text_data is not None:
            plan, loops = self.text_data.plan, self.trainer.fit_loop.state_dict()
            set_loop_progress(loops, checkpoint["global_step"], plan.accumulate_grad_batches, plan.steps_per_epoch)
            checkpoint["loops"] = {"fit_loop": loops}

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "LitGPT":
        """Load a module as Lightning does, but never run code from the file, nor a class or function that it names.

        `lit_gpt.load_model` also compares checksums, and returns the tokenizer.

        Raises:
            UserError: The file contains code or is damaged.
        """
        try:
            safe = {**kwargs, "weights_only": True, **NO_INSTANTIATOR}
            return super().load_from_checkpoint(checkpoint_path, *args, **safe)
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise UserError(
                f"{checkpoint_path} holds code, or is damaged: give a .ckpt file this project wrote"
            ) from None


def module_and_data(trainer: Trainer) -> tuple[LitGPT, TextDataModule]:
    """Return the LitGPT and the TextDataModule of a Trainer, for callbacks that need both.

    Raises:
        UserError: The Trainer has others.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, LitGPT) or not isinstance(data, TextDataModule):
        raise UserError("a callback of lit_gpt works with LitGPT and TextDataModule only: leave it out")
    return module, data
