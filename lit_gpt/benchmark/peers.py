"""Other implementations of the same work: our model in a plain loop, nanoGPT, LitGPT, transformers.

Each runs as its own README or example runs it on the device: on a CPU in float32 and not compiled, on a GPU in
bfloat16, nanoGPT compiled. All have the same shape (V, T, D, blocks, heads); what is inside a block is their own.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.benchmark.task import Task
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import stream_tokens
from lit_gpt.inference.utf8 import Utf8Constraint
from lit_gpt.model import GPT
from lit_gpt.optim import MuonAdamW

LossFunction = Callable[..., Tensor]  # tokens (B, T), targets (B, T), documents (B, T) if there are -> nats per token


class Peer:
    """An implementation of training and of text generation.

    Subclasses define `model`, `loss_function` and, where they can, `generate`.

    Args:
        task: the work.

    Attributes:
        precision: the precision it computes in, as the Trainer names it.
    """

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.device = task, task.config, task.device
        self.precision = "bf16-mixed" if self.device.type == "cuda" else "32-true"

    @cached_property
    def model(self) -> nn.Module:
        """The model, on the device."""
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """V; on a GPU rounded up to a multiple of 64, as the other projects do: matrix products are faster then."""
        size = self.config.vocab_size
        return size + -size % 64 if self.device.type == "cuda" else size

    def optimizer(self) -> torch.optim.Optimizer:
        hparams = self.task.module.hparams
        options = {name: hparams[name] for name in ("betas", "weight_decay")}
        return torch.optim.AdamW(self.model.parameters(), lr=hparams["learning_rate"], **options)

    def loss_function(self) -> LossFunction:
        raise NotImplementedError

    def batch_function(self) -> Callable[[], tuple[Tensor, ...]]:
        """Return a function that draws the next batch, as nanoGPT's `get_batch` does."""
        ids, length = np.asarray(self.task.data.train_ids), self.config.context_length
        batch_size = self.task.data.batch_size

        def stack_windows(starts: Tensor) -> Tensor:
            windows = [torch.from_numpy(np.asarray(ids[s : s + length], dtype=np.int64)) for s in starts]
            return torch.stack(windows)  # (B, T)

        def get_batch() -> tuple[Tensor, ...]:
            starts = torch.randint(len(ids) - length, (batch_size,))  # (B,)
            batch = stack_windows(starts), stack_windows(starts + 1)
            if self.device.type == "cuda":
                return tuple(tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch)
            return batch

        return get_batch

    def make_step(self) -> Callable[[], None]:
        """Return a function that takes one optimizer step on one global batch."""
        loss_function, optimizer, get_batch = self.loss_function(), self.optimizer(), self.batch_function()
        accumulation = self.task.data.plan.accumulate_grad_batches
        mixed = self.precision == "bf16-mixed"

        def step() -> None:
            for _ in range(accumulation):
                batch = get_batch()
                with self.task.autocast(mixed):
                    loss = loss_function(*batch) / accumulation
                loss.backward()
            if self.task.gradient_clip_val:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.task.gradient_clip_val)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def generate(self, prompts: Tensor, max_new_tokens: int, use_cache: bool) -> None:
        """Sample `max_new_tokens` tokens after prompts (B, T) at temperature 1.

        Raises:
            NotImplementedError: The implementation cannot do this with, or without, a KV cache.
        """
        raise NotImplementedError


class Bare(Peer):
    """Our model and optimizer in a plain loop. Its difference to our training is the cost of Lightning.

    Attributes:
        constraint: See `stream_tokens`.
    """

    constraint: Utf8Constraint | None = None

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.precision = task.precision

    @cached_property
    def model(self) -> nn.Module:
        self.task.module.configure_model()
        return self.task.module.gpt.to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        self.model  # noqa: B018  the optimizer needs the parameters on the device
        module = self.task.module
        groups, hparams = module.parameter_groups(), module.hparams
        if hparams["optimizer"] == "muon":
            return MuonAdamW(groups, hparams["betas"], momentum_warmup_steps=hparams["momentum_warmup_steps"])
        return torch.optim.AdamW(groups, betas=hparams["betas"], fused=True)

    def loss_function(self) -> LossFunction:
        model = self.model
        assert isinstance(model, GPT)
        return lambda tokens, targets, documents=None: model.loss(tokens, targets, documents=documents)

    def batch_function(self) -> Callable[[], tuple[Tensor, ...]]:
        batches, indices = self.task.data.train_batches(), iter(range(sys.maxsize))

        def get_batch() -> tuple[Tensor, ...]:
            return tuple(tensor.to(self.device) for tensor in batches[next(indices)])

        return get_batch

    def generate(self, prompts: Tensor, max_new_tokens: int, use_cache: bool) -> None:
        assert isinstance(self.model, GPT)
        for _ in stream_tokens(self.model, prompts, max_new_tokens, use_cache=use_cache, constraint=self.constraint):
            pass


def load_nanogpt(checkout: Path | None) -> ModuleType:
    """Import model.py of a checkout of nanoGPT.

    Raises:
        UserError: The folder has no model.py.
    """
    if checkout is None or not (checkout / "model.py").is_file():
        raise UserError(f"--nanogpt {checkout} has no model.py: give the folder of a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class NanoGPT(Peer):
    @cached_property
    def model(self) -> nn.Module:
        c = self.config
        shape = {"n_layer": c.num_blocks, "n_head": c.num_heads, "n_embd": c.d_model, "dropout": c.dropout}
        nanogpt = load_nanogpt(self.task.nanogpt)
        config = nanogpt.GPTConfig(block_size=c.context_length, vocab_size=self.vocab_size, bias=c.bias, **shape)
        model: nn.Module = nanogpt.GPT(config)
        return model.to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        hparams, model = self.task.module.hparams, self.model
        optimizer: torch.optim.Optimizer = model.configure_optimizers(  # type: ignore[operator]
            hparams["weight_decay"], hparams["learning_rate"], hparams["betas"], self.device.type
        )
        return optimizer

    def loss_function(self) -> LossFunction:
        model = torch.compile(self.model) if self.device.type == "cuda" else self.model
        return lambda tokens, targets: model(tokens, targets)[1]

    def generate(self, prompts: Tensor, max_new_tokens: int, use_cache: bool) -> None:
        if use_cache:
            raise NotImplementedError
        self.model.generate(prompts, max_new_tokens)  # type: ignore[operator]


class Transformers(Peer):
    @cached_property
    def model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        shape: dict[str, Any] = {
            "n_positions": c.context_length,
            "n_embd": c.d_model,
            "n_layer": c.num_blocks,
            "n_head": c.num_heads,
        }
        # without an end-of-sequence token all texts have the same length
        config = GPT2Config(vocab_size=self.vocab_size, bos_token_id=None, eos_token_id=None, **shape, **dropout)
        model: nn.Module = GPT2LMHeadModel(config)
        return model.to(self.device)

    def loss_function(self) -> LossFunction:
        return lambda tokens, targets: self.model(input_ids=tokens, labels=tokens).loss  # it shifts the labels itself

    def generate(self, prompts: Tensor, max_new_tokens: int, use_cache: bool) -> None:
        options: dict[str, Any] = {"use_cache": use_cache, "max_new_tokens": max_new_tokens}
        self.model.generate(  # type: ignore[operator]
            prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, **options
        )


class LitGPTPeer(Peer):
    @cached_property
    def model(self) -> nn.Module:
        from litgpt import GPT as LitGPTModel
        from litgpt import Config

        c = self.config
        shape = {"n_layer": c.num_blocks, "n_head": c.num_heads, "n_embd": c.d_model, "block_size": c.context_length}
        config = Config(**shape, vocab_size=c.vocab_size, padded_vocab_size=self.vocab_size, bias=c.bias)
        model: nn.Module = LitGPTModel(config)

        def init_weights(module: nn.Module) -> None:  # as LitGPT does for pretraining
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

        return model.apply(init_weights).to(self.device)

    def loss_function(self) -> LossFunction:
        return lambda tokens, targets: F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def generate(self, prompts: Tensor, max_new_tokens: int, use_cache: bool) -> None:
        from litgpt.generate.base import generate

        if len(prompts) > 1 or not use_cache:
            raise NotImplementedError
        with self.device:
            self.model.set_kv_cache(batch_size=1)  # type: ignore[operator]
        generate(self.model, prompts[0], prompts.shape[1] + max_new_tokens)
        self.model.clear_kv_cache()  # type: ignore[operator]


PEERS: dict[str, type[Peer]] = {
    "bare": Bare,
    "nanogpt": NanoGPT,
    "litgpt": LitGPTPeer,
    "transformers": Transformers,
}


def peer_names(options: argparse.Namespace) -> list[str]:
    """Return the names of the other projects that the options ask for and that are installed."""
    names = ["nanogpt"] if options.nanogpt else []
    return names + [name for name in ("litgpt", "transformers") if options.peers and importlib.util.find_spec(name)]
