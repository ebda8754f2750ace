"""LitGPT: how a GPT is trained, evaluated, and saved under a Lightning Trainer."""

import pickle
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lit_gpt.compat import set_logged_step, set_loop_progress
from lit_gpt.data.batches import Batch, BatchLoader
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, BlockInputs, GPTConfig
from lit_gpt.ops import IGNORE_INDEX, Reduction
from lit_gpt.ops.cross_entropy import holds_all_logits
from lit_gpt.optim import MuonAdamW, OptimizerName, Schedule, gradient_norm, learning_rate_factor, parameter_groups
from lit_gpt.sharding import full_tensor, shard_like
from lit_gpt.training.checks import check_arguments, check_batch, check_callbacks, check_data, describe_nonfinite
from lit_gpt.training.metrics import VAL_SPLITS, compute_metrics, is_logging_step, log_step_metrics

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
        warmup_steps: Optimizer steps in which the learning rate rises linearly.
        decay_share: Fraction of all optimizer steps, at the end, in which the learning rate falls.
        embedding_rate: Factor on the learning rate of the embeddings.
        head_rate: Factor on the learning rate of an output head that is not tied to the embeddings.
        weight_decay: Weight decay of matrices. Other parameters have none.
        betas: Decay rates of AdamW's moments.
        compile: Compile the blocks with torch.compile. Starts slowly; pays on a GPU and in long runs.
        activation_checkpointing: Recompute the activations of a block in the backward pass (Chen et al. 2016). Needs
            less memory and a third more time.

    Attributes:
        gpt: The model.
        arguments: The arguments above, as checkpoints hold them.
        finite: Whether losses and gradients were finite so far, where this is not checked at every step.
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
        warmup_steps: int = 100,
        decay_share: float = 1.0,
        embedding_rate: float = 1.0,
        head_rate: float = 1.0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        compile: bool = False,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(config, dict):  # from a checkpoint
            config = GPTConfig(**config)
        self.arguments = {
            "config": asdict(config),
            "optimizer": optimizer,
            "learning_rate": learning_rate,
            "min_learning_rate": min_learning_rate,
            "schedule": schedule,
            "warmup_steps": warmup_steps,
            "decay_share": decay_share,
            "embedding_rate": embedding_rate,
            "head_rate": head_rate,
            "weight_decay": weight_decay,
            "betas": list(betas),
            "compile": compile,
            "activation_checkpointing": activation_checkpointing,
        }
        check_arguments(self.arguments)
        self.gpt = GPT(config)
        self.gpt.blocks.activation_checkpointing = activation_checkpointing
        self.learning_rate, self.schedule, self.warmup_steps = learning_rate, schedule, warmup_steps
        self.min_learning_rate = learning_rate / 10 if min_learning_rate is None else min_learning_rate
        self.decay_share, self.rate_factors = decay_share, {"embeddings": embedding_rate, "head": head_rate}
        self.optimizer, self.weight_decay, self.betas = optimizer, weight_decay, betas
        self.finite: Tensor | bool = True
        self.updating = False
        self._compiled = self._batch_checked = False
        self._last_step: int | None = None  # of the run
        self._step_before_batch = 0
        self._loss_sum: Tensor | float = 0.0  # over the batches of the current optimizer step
        self._step_metrics: dict[str, Any] = {}  # of the current optimizer step, if it is a logging step
        self._eval_sums: dict[int, Tensor] = {}  # dataloader index -> (3,): nats, tokens, bytes
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
        if self.trainer.precision == "64-true":  # the Trainer converts only after it has loaded a checkpoint
            self.gpt.double()
        if self.arguments["compile"] and not self._compiled:
            compile_blocks(self.gpt, self.trainer)
            self._compiled = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer. `on_before_optimizer_step` sets its learning rate, so there is no scheduler."""
        groups = parameter_groups(self.gpt, self.weight_decay, self.optimizer)
        return MuonAdamW(groups, lr=self.learning_rate, betas=self.betas)

    def cpu(self) -> "LitGPT":
        """Move the model to the CPU. Lightning calls it at the end, also if a run ends before there are weights."""
        return self if self.gpt.embedding.weight.is_meta else super().cpu()

    # ------------------------------------------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Find the last step of the run, which the learning rate schedule needs.

        Raises:
            UserError: The run has no end, or the batches do not come from the Trainer's TextDataModule.
        """
        data, trainer = self.text_data, self.trainer
        if data is not None and not isinstance(trainer.train_dataloader, BatchLoader):
            raise UserError("this Trainer still has the TextDataModule of an earlier fit: make a new Trainer")
        if data is not None:
            self._last_step = data.plan.last_step
        else:
            steps = trainer.estimated_stepping_batches
            self._last_step = int(steps) if np.isfinite(steps) else None
        if self._last_step is None and self.schedule != "constant":
            raise UserError(
                f"--model.schedule {self.schedule} needs an end: give --trainer.max_steps or --trainer.max_epochs, or "
                "--model.schedule constant"
            )

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        set_logged_step(self.trainer)
        self._step_before_batch = self.trainer.global_step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch in nats per token."""
        self.check_first_batch(batch)
        accumulation = self.trainer.accumulate_grad_batches
        micro_batch = batch_idx % accumulation
        if self.gpt.config.dropout > 0 and self.text_data is not None:
            self._seed_dropout(self.text_data.seed, self.trainer.global_step * accumulation + micro_batch)
        loss = self.gpt.loss(*batch)  # type: ignore[arg-type]
        self._loss_sum = loss.detach() + (self._loss_sum if micro_batch else 0.0)
        if micro_batch + 1 == accumulation or self.trainer.is_last_batch:  # then the optimizer step follows
            step = self.trainer.global_step + 1
            if is_logging_step(self.trainer, step):
                self._step_metrics = {"loss/train": self._loss_sum / (micro_batch + 1), "optim/lr": self._current_rate}
            if step == self._last_step and self.text_data is not None:
                self.trainer.val_check_batch = 1  # validate after the last step, whatever the interval
        return loss

    def _seed_dropout(self, seed: int, batch_number: int) -> None:
        """Seed the generators from the seed of the run and the number of the batch, over all ranks.

        The dropout masks then depend on neither interruptions nor the number of ranks.
        """
        batch_number = batch_number * self.trainer.world_size + self.global_rank
        batch_seed = int(np.random.SeedSequence([seed, batch_number]).generate_state(1, np.uint64)[0])
        torch.default_generator.manual_seed(batch_seed)  # torch.manual_seed also queries all other kinds of devices
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(batch_seed)

    @property
    def _current_rate(self) -> float:
        """The learning rate of the current optimizer step, before the factors of embeddings and head."""
        return self.learning_rate * learning_rate_factor(
            self.trainer.global_step,
            self.schedule,
            self.warmup_steps,
            self._last_step or 0,
            self.min_learning_rate / self.learning_rate,
            self.decay_share,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Set all hyperparameters of the optimizer from the arguments and the step: none comes from a checkpoint."""
        rate = self._current_rate
        for group in optimizer.param_groups:
            group["lr"] = rate * self.rate_factors.get(group["name"], 1.0)
            group["betas"] = self.betas
            group["weight_decay"] = 0.0 if group["name"] == "scales" else self.weight_decay
            group["step"] = self.trainer.global_step

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Check that the gradients are finite, and clip them as the Trainer's settings say.

        On a CPU the check comes before the optimizer step, which is not taken if it fails. On other devices it would
        wait for the device at every step, so it comes at logging steps and before checkpoints are saved.

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
            if self._step_metrics:
                self.check_finite(self.trainer.global_step + 1)
        elif not is_finite:
            raise self._nonfinite_error(f"step {self.trainer.global_step + 1:,} was not taken, it is")
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val and (not sync_check or norm > gradient_clip_val):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, sharded_norm)
        if self._step_metrics:
            self._step_metrics["optim/grad_norm"] = norm
        self.updating = True

    def check_finite(self, step: int) -> None:
        """Raise UserError if a loss or gradient of a step up to `step` was not finite."""
        if not self.finite:
            raise self._nonfinite_error(f"a step up to {step:,} is")

    def _nonfinite_error(self, step: str) -> UserError:
        return UserError(describe_nonfinite(step, self._loss_sum, self.gpt, self.trainer.optimizers[0]))

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Do nothing: `on_train_batch_end` frees the gradients.

        Lightning would hold them until the next backward pass, where they raise the peak of memory.
        """

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.updating = False
        if self.trainer.global_step > self._step_before_batch:  # the optimizer has used the gradients
            for group in self.trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        if self._step_metrics:
            loss = self.trainer.strategy.reduce(self._step_metrics["loss/train"], reduce_op="mean")  # over the ranks
            log_step_metrics(self.trainer, {**self._step_metrics, "loss/train": loss})
            self._step_metrics = {}

    # ---------------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        self._eval_sums = {}
        self._bytes_per_token = None
        if self._evaluates_text_data():
            assert self.text_data is not None
            self._bytes_per_token = torch.from_numpy(self.text_data.tokenizer.bytes_per_token()).to(self.device)

    def _evaluates_text_data(self) -> bool:
        """Return whether the evaluated batches come from the Trainer's TextDataModule."""
        loaders: Any = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        loaders = loaders if isinstance(loaders, list) else [loaders]
        own = all(loader is None or isinstance(loader, BatchLoader) for loader in loaders)  # None: in a trial run
        return self.text_data is not None and own

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add the nats, tokens and bytes of a batch to the sums of its split; `estimate_loss` divides them once."""
        self.check_first_batch(batch)
        targets = batch[1]
        is_counted = targets != IGNORE_INDEX
        if dataloader_idx not in self._eval_sums:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's devices have no float64
            self._eval_sums[dataloader_idx] = torch.zeros(3, dtype=dtype, device=self.device)
        sums = self._eval_sums[dataloader_idx]
        sums[0] += self.gpt.loss(*batch, reduction="sum")  # type: ignore[arg-type, misc]
        sums[1] += is_counted.sum()
        if self._bytes_per_token is not None:
            sums[2] += (self._bytes_per_token[targets.clamp(min=0)] * is_counted).sum()

    def estimate_loss(self, split: str) -> dict[str, Tensor]:
        """Return the loss of each evaluated split, over all ranks, with its perplexity and bits per byte.

        The course's `estimate_loss` loops over random batches of both splits and averages their losses. Here the
        Trainer loops: `TextDataModule.val_dataloader` gives fixed windows of both splits, `validation_step` adds up
        the losses of their tokens, and this method divides the sums. The result depends on neither the batch size nor
        the number of ranks.

        Args:
            split: "val" or "test".
        """
        sums = torch.stack([self._eval_sums[i] for i in sorted(self._eval_sums)])  # (splits, 3)
        total = self.trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        names: Sequence[str] = [split, *(f"{split}_{i}" for i in range(1, len(total)))]
        if split == "val" and self._bytes_per_token is not None:
            names = VAL_SPLITS
        return compute_metrics(total, names)

    def on_validation_epoch_end(self) -> None:
        metrics = self.estimate_loss("val")
        losses = {tag: float(value) for tag, value in metrics.items() if tag.startswith("loss/")}
        if self.trainer.state.fn == "fit" and not np.isfinite(list(losses.values())).all():
            raise UserError(
                f"after step {self.trainer.global_step:,} the model is not finite "
                f"({', '.join(f'{tag} {loss}' for tag, loss in losses.items())}): "
                "go on from a checkpoint with a smaller --model.learning_rate"
            )
        self.log_dict(metrics, add_dataloader_idx=False)

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.validation_step(batch, batch_idx, dataloader_idx)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.estimate_loss("test"), add_dataloader_idx=False)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the arguments of this module, the tokenizer, and a description of the data."""
        checkpoint["hyper_parameters"] = self.arguments
        checkpoint["saved_at"] = time.time()  # seconds since 1970
        if self.text_data is not None:
            checkpoint["tokenizer"] = self.text_data.tokenizer.state()
            checkpoint["data"] = fingerprint(self.text_data)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Prepare a checkpoint for resuming: this run's patience, and the progress of the loops from the step alone.

        The checkpoint may have been written in the middle of the loops, or with another batch size or number of ranks.
        """
        if not self.is_attached or self.trainer.state.fn != "fit":
            return
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
        """Load a module as Lightning does, but never run code from the file.

        `lit_gpt.load_model` also compares checksums, and returns the tokenizer.

        Raises:
            UserError: The file contains code or is damaged.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise UserError(
                f"{checkpoint_path} holds code, or is damaged: give a .ckpt file this project wrote"
            ) from None


def compile_blocks(gpt: GPT, trainer: Trainer) -> None:
    """Compile the blocks in place, so that the names in checkpoints do not change.

    With one CPU process, all blocks and the loss are compiled as one graph; `cpp_wrapper` lowers the overhead of calls.
    On a GPU or with several ranks, each block is compiled: they share the compiled code, and DDP or FSDP can reduce the
    gradients of one block while the backward pass of the previous block runs.
    """
    if trainer.strategy.root_device.type != "cpu" or trainer.world_size > 1:
        for block in gpt.blocks:
            block.compile()
        return
    options: dict[str, Any] = {"cpp_wrapper": not gpt.blocks.activation_checkpointing}  # torch 2.13 fails with both
    gpt.blocks.compile(options=options)
    eager, compiled = gpt.blocks_loss, torch.compile(gpt.blocks_loss, options=options)

    def blocks_loss(x: Tensor, inputs: BlockInputs, targets: Tensor, reduction: Reduction) -> Tensor:
        # The chunks of a large loss take their gradients by hand, which a compiler cannot follow.
        function = compiled if holds_all_logits(targets, gpt.head.weight) else eager
        return function(x, inputs, targets, reduction)

    gpt.blocks_loss = blocks_loss  # type: ignore[method-assign]


def module_and_data(trainer: Trainer) -> tuple[LitGPT, TextDataModule]:
    """Return the LitGPT and the TextDataModule of a Trainer, for callbacks that need both.

    Raises:
        UserError: The Trainer has others.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(module, LitGPT) or not isinstance(data, TextDataModule):
        raise UserError("a callback of lit_gpt works with LitGPT and TextDataModule only: leave it out")
    return module, data
