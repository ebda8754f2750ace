"""The model in training: its steps, its losses, its optimizer."""

import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor

from lit_gpt.compat import set_logged_step
from lit_gpt.data.batches import Batch
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.errors import UserError
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.optim import MuonAdamW, OptimizerName, Schedule, gradient_norm, learning_rate_factor, parameter_groups
from lit_gpt.sharding import full_tensor, shard_like
from lit_gpt.training.fsdp import shard

SYNC_CHECK_DEVICES = ("cpu",)  # devices that can be asked for a number without waiting
SPLITS = ("train_eval", "val")  # the order of TextDataModule.val_dataloader
# what a callback may watch: there at every validation
METRICS = ("loss/train_eval", "loss/val", "val/perplexity", "val/bits_per_byte")


def is_logging_step(trainer: Trainer, step: int) -> bool:
    """Whether optimizer step `step`, from 1, is one that logs."""
    interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return interval > 0 and step % interval == 0


def log_step_metrics(trainer: Trainer, values: Mapping[str, Tensor | float]) -> None:
    """Hands values of the optimizer step just taken to the loggers; `self.log` costs half a millisecond each."""
    numbers = {tag: float(value) for tag, value in values.items()}
    trainer.callback_metrics.update({tag: torch.tensor(number) for tag, number in numbers.items()})
    for logger in trainer.loggers:
        logger.log_metrics(numbers, trainer.global_step - 1)
        logger.save()


def compile_blocks(gpt: GPT, trainer: Trainer) -> None:
    """Compiles in place, so that names in a checkpoint stay as they are.

    Alone on a CPU, where calls cost as much as what they call, all blocks become one graph, called from C++, with the
    loss in it where there are few logits. Elsewhere blocks share one that is compiled once, and gradients travel while
    those of earlier blocks are taken.
    """
    if trainer.strategy.root_device.type != "cpu" or trainer.world_size > 1:
        for block in gpt.blocks:
            block.compile()
    else:
        options: dict[str, Any] = {"cpp_wrapper": not gpt.blocks.activation_checkpointing}  # torch 2.13 fails with both
        gpt.blocks.compile(options=options)
        eager, compiled = gpt.blocks_loss, torch.compile(gpt.blocks_loss, options=options)

        def blocks_loss(*inputs: Any) -> Tensor:
            # An evaluation takes the loss in chunks, which are not compiled.
            return (compiled if torch.is_grad_enabled() else eager)(*inputs)

        gpt.blocks_loss = blocks_loss  # type: ignore[method-assign, assignment]


class LitGPT(LightningModule):
    """A GPT with its training step, its estimate of the loss on both splits, and its optimizer.

    Args:
        config: the shape of the GPT; its vocab_size comes from the tokenizer.
        optimizer: "adamw", or "muon" for the matrices in the blocks with AdamW for the rest.
        learning_rate: the peak.
        min_learning_rate: where a schedule ends; a tenth of the peak if left out.
        schedule: after warm-up: "constant", "cosine" or "linear".
        warmup_steps: optimizer steps over which the rate climbs.
        decay_share: the last share of all steps, in which a schedule lets it fall.
        embedding_rate: times the learning rate, what embeddings learn at.
        head_rate: the same for a head of its own.
        weight_decay: of matrices.
        betas: AdamW's.
        compile: torch.compile the blocks; slow to start, pays on a GPU and in long runs.
        activation_checkpointing: compute a block's activations anew for its backward pass (Chen et al. 2016): less
            memory, a third more time.
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
        if isinstance(config, dict):  # as a checkpoint holds it
            config = GPTConfig(**config)
        if not 0 < learning_rate < np.inf:
            raise UserError(f"--model.learning_rate is {learning_rate}: give more than 0, as 1e-3")
        for name, value in {
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "min_learning_rate": min_learning_rate or 0,
            "embedding_rate": embedding_rate,
            "head_rate": head_rate,
        }.items():
            if not 0 <= value < np.inf:
                raise UserError(f"--model.{name} is {value}: give 0 or more")
        if min_learning_rate is not None and min_learning_rate > learning_rate:
            raise UserError(
                f"--model.min_learning_rate {min_learning_rate} is above --model.learning_rate {learning_rate}: "
                "the schedule ends there, give less"
            )
        if not 0 < decay_share <= 1:
            raise UserError(f"--model.decay_share is {decay_share}: give a share of the steps above 0, up to 1")
        if not all(0 <= beta < 1 for beta in betas):
            raise UserError(f"--model.betas is {list(betas)}: give two numbers from 0 up to, not including, 1")
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
        self.gpt = GPT(config)
        self.gpt.blocks.activation_checkpointing = activation_checkpointing
        self.learning_rate, self.schedule, self.warmup_steps = learning_rate, schedule, warmup_steps
        self.decay_share, self.rates = decay_share, {"embeddings": embedding_rate, "head": head_rate}
        self.min_learning_rate = learning_rate / 10 if min_learning_rate is None else min_learning_rate
        self.optimizer, self.weight_decay, self.betas = optimizer, weight_decay, betas
        self._loss_sum: Tensor | float = 0.0  # over the forwards of the current optimizer step
        self._to_log: dict[str, Any] = {}  # of the current optimizer step, where it is one that logs
        self.finite: Tensor | bool = True  # losses and gradients so far, where they were not checked at once
        self.updating = False  # from the check of the gradients until the weights have all been moved
        self._evaluated = torch.zeros(0)  # (2, 3): for each split nats, tokens and bytes
        self._bytes_per_token = torch.zeros(0)  # (V,)
        self._compiled = False

    @property
    def is_attached(self) -> bool:
        """Whether the module belongs to a Trainer; `self.trainer` raises if it does not."""
        try:
            return self.trainer is not None
        except RuntimeError:
            return False

    @property
    def data(self) -> TextDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, TextDataModule)
        return data

    def configure_model(self) -> None:
        """Spreads the weights over the devices where the strategy is FSDP2, and draws them if that is still to be done.

        The Trainer calls it again and again.

        Raises:
            UserError: there is no memory for them.
        """
        if self.device_mesh is not None:
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
            self.gpt.seed = strategy.broadcast(self.gpt.seed)  # whose slices make up one model
            self.gpt.init_weights(shard_like)
        if not self.is_attached:  # loaded to be used without a Trainer
            return
        if self.trainer.precision == "64-true":  # the Trainer would when it has read a checkpoint's into float32
            self.gpt.double()
        if self.arguments["compile"] and not self._compiled:
            compile_blocks(self.gpt, self.trainer)
            self._compiled = True

    def cpu(self) -> "LitGPT":
        """Where Lightning leaves it in the end, also of a run that ended before there were weights."""
        return self if self.gpt.embedding.weight.is_meta else super().cpu()

    # ------------------------------------------------------------------------------------------------- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        set_logged_step(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The mean loss of one batch, two times (B, T), in nats per token."""
        accumulation = self.trainer.accumulate_grad_batches
        forward = batch_idx % accumulation  # an epoch is whole optimizer steps
        if self.gpt.config.dropout > 0:
            # the same zeros for the same windows, whoever draws them and whatever ran before
            part = (self.trainer.global_step * accumulation + forward) * self.trainer.world_size + self.global_rank
            seed = int(np.random.SeedSequence([self.data.seed, part]).generate_state(1, np.uint64)[0])
            torch.default_generator.manual_seed(seed)  # torch.manual_seed asks after every kind of device there is
            if self.device.type != "cpu":
                torch.get_device_module(self.device).manual_seed(seed)
        tokens, targets, *documents = batch
        loss = self.gpt.loss(tokens, targets, documents=documents[0] if documents else None)
        self._loss_sum = loss.detach() + (self._loss_sum if forward else 0.0)
        step = self.trainer.global_step + 1  # the one this forward belongs to
        if forward == accumulation - 1 and is_logging_step(self.trainer, step):
            rate = self.learning_rate * self._learning_rate_factor()
            self._to_log = {"loss/train": self._loss_sum / accumulation, "optim/lr": rate}
        if forward == accumulation - 1 and step == self.data.plan.last_step:
            self.trainer.val_check_batch = 1  # the last step validates, whatever the interval
        return loss

    def _learning_rate_factor(self) -> float:
        lowest = self.min_learning_rate / self.learning_rate
        return learning_rate_factor(
            self.trainer.global_step,
            self.schedule,
            self.warmup_steps,
            self.data.plan.last_step or 0,
            lowest,
            self.decay_share,
        )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Sets what flags say and the step decides: nothing of it comes out of a checkpoint."""
        rate = self.learning_rate * self._learning_rate_factor()
        for group in optimizer.param_groups:
            decay = 0.0 if group["name"] == "scales" else self.weight_decay
            rates = {"lr": rate * self.rates.get(group["name"], 1.0), "betas": self.betas, "weight_decay": decay}
            group.update(step=self.trainer.global_step, **rates)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips as the Trainer's flags say, takes the norm from before, and looks whether it is finite.

        On a CPU no step is taken where it is not. Elsewhere to ask would be to wait: it is asked where a step logs and
        before anything is saved, so that nothing is kept of what came after.

        Raises:
            UserError: the loss or a gradient is infinite or not a number.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        sliced = gradient_norm([p.grad for p in parameters if p.grad is not None])
        norm = decides = full_tensor(sliced)  # the same on every rank
        if (
            self.trainer.precision == "16-mixed"
        ):  # whose gradients overflow now and then; its scaler leaves out that step
            decides = self.trainer.strategy.reduce(torch.as_tensor(self._loss_sum), reduce_op="sum")
        finite = torch.isfinite(decides)
        if finite.device.type not in SYNC_CHECK_DEVICES:
            self.finite = finite & self.finite
            if self._to_log:
                self.check_finite(self.trainer.global_step + 1)
        elif not finite:
            raise UserError(self._not_finite(f"step {self.trainer.global_step + 1:,} was not taken, it is"))
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val and (finite.device.type not in SYNC_CHECK_DEVICES or norm > gradient_clip_val):
            torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, sliced)
        if self._to_log:
            self._to_log["optim/grad_norm"] = norm
        self.updating = True

    def check_finite(self, step: int) -> None:
        """Raises UserError where a loss or a gradient was not finite, up to that of `step`."""
        if not self.finite:
            raise UserError(self._not_finite(f"a step up to {step:,} is"))

    def _not_finite(self, what: str) -> str:
        """What is to be said of a step whose loss or gradients are not finite."""
        why = [] if torch.isfinite(torch.as_tensor(self._loss_sum)) else [f"loss {float(self._loss_sum)}"]
        names = {id(p): name for name, p in self.gpt.named_parameters()}
        for group in self.trainer.optimizers[0].param_groups:
            bad = [
                names[id(p)]
                for p in group["params"]
                if p.grad is not None and not full_tensor(torch.isfinite(p.grad).all())
            ]
            if bad:
                why.append(f"gradient of {len(bad)} of {len(group['params'])} {group['name']}, as {bad[0]}")
        return (
            f"{what} not finite ({'; '.join(why) or 'norm of the gradients'}): go on from a checkpoint with a smaller "
            "--model.learning_rate, or --trainer.gradient_clip_val 1"
        )

    def optimizer_zero_grad(self, *args: Any) -> None:
        """Nothing is left to do: they were let go of when they had been used.

        The Trainer would hold them until the next backward pass: as many bytes as the weights, where the peak is.
        """

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self.updating = False
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            for group in self.trainer.optimizers[0].param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
        if self._to_log:
            loss = self.trainer.strategy.reduce(self._to_log["loss/train"], reduce_op="mean")  # over the ranks
            log_step_metrics(self.trainer, {**self._to_log, "loss/train": loss})
            self._to_log = {}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        groups = parameter_groups(self.gpt, self.weight_decay, self.optimizer)
        return MuonAdamW(groups, lr=self.learning_rate, betas=self.betas)

    # ----------------------------------------------------------------------------------------------- evaluation

    def on_validation_epoch_start(self) -> None:
        precise = torch.float32 if self.device.type == "mps" else torch.float64  # Apple's devices have no float64
        self._evaluated = torch.zeros(len(SPLITS), 3, dtype=precise, device=self.device)
        self._bytes_per_token = torch.from_numpy(self.data.tokenizer.bytes_per_token()).to(self.device)

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds up nats, tokens and bytes; they are divided once, at the end."""
        tokens, targets, *documents = batch
        counted = targets != IGNORE_INDEX
        sums = self._evaluated[dataloader_idx]
        sums[0] += self.gpt.loss(tokens, targets, documents=documents[0] if documents else None, reduction="sum")
        sums[1] += counted.sum()
        sums[2] += (self._bytes_per_token[targets.clamp(min=0)] * counted).sum()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def _scored(self) -> tuple[Tensor, Tensor]:
        """Nats per token, and bits per byte, over all ranks: (2,) each, of which a test fills the first."""
        total = self.trainer.strategy.reduce(self._evaluated, reduce_op="sum")
        assert isinstance(total, Tensor)
        nats, tokens, size = total.unbind(dim=1)  # (2,) each
        return (nats / tokens).float(), (nats / size / np.log(2)).float()

    def on_test_epoch_end(self) -> None:
        (loss, _), (bits, _) = self._scored()
        self.log_dict({"loss/test": loss, "test/perplexity": loss.exp(), "test/bits_per_byte": bits})

    def on_validation_epoch_end(self) -> None:
        losses, bits = self._scored()
        if self.trainer.state.fn == "fit" and not torch.isfinite(losses).all():
            values = ", ".join(f"loss/{split} {float(loss)}" for split, loss in zip(SPLITS, losses))
            raise UserError(
                f"after step {self.trainer.global_step:,} the model is not finite ({values}): "
                "go on from a checkpoint with a smaller --model.learning_rate"
            )
        self.log_dict({f"loss/{split}": loss for split, loss in zip(SPLITS, losses)}, add_dataloader_idx=False)
        self.log_dict({"val/perplexity": losses[1].exp(), "val/bits_per_byte": bits[1]})

    # ----------------------------------------------------------------------------------------------- checkpoint

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what makes the file enough by itself: how to build this module, its tokenizer, its data's print."""
        checkpoint["hyper_parameters"] = self.arguments
        checkpoint["tokenizer"] = self.data.tokenizer.state()
        checkpoint["data"] = fingerprint(self.data)
        checkpoint["saved_at"] = time.time()  # seconds since 1970

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "LitGPT":
        """Lightning's, but that nothing in the file is ever executed. `load_model` compares its checksums too.

        Raises:
            UserError: it holds code, or is damaged so that it cannot be opened.
        """
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})
        except (pickle.UnpicklingError, RuntimeError, EOFError):
            raise UserError(
                f"{checkpoint_path} holds code, or is damaged: give a .ckpt file this project wrote"
            ) from None

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Counts the Trainer's loops anew from the step: it may have been saved amid one, or on other devices."""
        if self.is_attached and self.trainer.state.fn == "fit":
            states = checkpoint.setdefault("callbacks", {})
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, EarlyStopping) and callback.state_key in states:
                    states[callback.state_key]["patience"] = callback.patience  # the flag wins
            step, data = checkpoint["global_step"], self.data
            loops = self.trainer.fit_loop.state_dict()
            set_loop_progress(loops, step, data.plan.accumulate_grad_batches, data.plan.steps_per_epoch)
            checkpoint["loops"] = {"fit_loop": loops}


def set_loop_progress(loops: dict[str, Any], step: int, accumulation: int, steps_per_epoch: int) -> None:
    """Sets the state of a fresh fit loop of Lightning's to where `step` whole optimizer steps lead."""

    def put(progress: dict[str, Any], total: int, current: int, begun: int = 0) -> None:
        for part, done in (("total", total), ("current", current)):
            for key in progress[part]:
                progress[part][key] = done + (begun if key in ("ready", "started") else 0)

    epochs, steps = divmod(step, steps_per_epoch)  # whole ones, and those of the epoch begun
    put(loops["epoch_progress"], epochs, epochs, begun=1 if steps else 0)
    put(loops["epoch_loop.batch_progress"], step * accumulation, steps * accumulation)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    put(optimizer["step"], step, steps)
    put(optimizer["zero_grad"], step, steps)


def module_and_data(trainer: Trainer) -> tuple[LitGPT, TextDataModule]:
    """The module and the data of a run."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(module, LitGPT)
    assert isinstance(data, TextDataModule)
    return module, data
