"""The same work done by others, for the benchmark: a bare loop around our own model, nanoGPT, LitGPT, transformers.

Each is run as its own README or example runs it on that kind of device: on a CPU in float32 and not compiled, on a GPU
in bfloat16, nanoGPT compiled. Shapes are equal (V, T, D, blocks, heads); what is inside a block is each one's own.
"""

import importlib.util
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import stream_tokens
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.training.module import LitGPT

Loss = Callable[..., Tensor]  # the tensors of a batch -> nats per token


@dataclass
class Task:
    """What all are given.

    Attributes:
        module: ours; its shape and settings are everybody's.
        data: the text; its training split is drawn from.
        device: where it runs.
        precision: ours, in the Trainer's words.
        clip: the norm gradients are cut down to; 0 for none.
        nanogpt: a checkout of nanoGPT.
    """

    module: LitGPT
    data: TextDataModule
    device: torch.device
    precision: str
    clip: float
    nanogpt: Path | None = None

    @property
    def config(self) -> GPTConfig:
        return self.module.gpt.config

    def autocast(self, wanted: bool) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if wanted else nullcontext()


class Peer:
    """One way of training and of writing. `precision` says in which type it multiplies."""

    def __init__(self, task: Task) -> None:
        self.task, self.config, self.device = task, task.config, task.device
        self.precision = "bf16-mixed" if self.device.type == "cuda" else "32-true"

    @cached_property
    def model(self) -> nn.Module:
        raise NotImplementedError

    @property
    def vocab_size(self) -> int:
        """V; on a GPU rounded up, as the others do, to what its products have fast kernels for."""
        size = self.config.vocab_size
        return size + -size % 64 if self.device.type == "cuda" else size

    def optimizer(self) -> torch.optim.Optimizer:
        module = self.task.module
        rest: dict[str, Any] = {"betas": module.betas, "weight_decay": module.weight_decay}
        return torch.optim.AdamW(self.model.parameters(), lr=module.learning_rate, **rest)

    def loss(self) -> Loss:
        raise NotImplementedError

    def batches(self) -> Callable[[], tuple[Tensor, ...]]:
        """Windows drawn as nanoGPT draws them, which scripts of the others copy."""
        ids, length, count = np.asarray(self.task.data.train_ids), self.config.context_length, self.task.data.batch_size

        def draw() -> tuple[Tensor, ...]:
            starts = torch.randint(len(ids) - length, (count,))
            x, y = (
                torch.stack(
                    [torch.from_numpy(np.asarray(ids[s + shift : s + shift + length], dtype=np.int64)) for s in starts]
                )
                for shift in (0, 1)
            )
            if self.device.type == "cuda":
                return tuple(t.pin_memory().to(self.device, non_blocking=True) for t in (x, y))
            return x, y

        return draw

    def trainer(self) -> Callable[[], None]:
        """A function that takes one optimizer step on one global batch."""
        loss, optimizer, draw = self.loss(), self.optimizer(), self.batches()
        forwards = self.task.data.plan.accumulate_grad_batches
        mixed = self.precision == "bf16-mixed"

        def step() -> None:
            for _ in range(forwards):
                batch = draw()
                with self.task.autocast(mixed):
                    value = loss(*batch) / forwards
                value.backward()
            if self.task.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return step

    def write(self, prompts: Tensor, max_new_tokens: int, cache: bool) -> None:
        """Draws `max_new_tokens` after prompts (B, T) at temperature 1.

        Raises:
            NotImplementedError: it has no way of doing that with a cache, or without.
        """
        raise NotImplementedError


class Bare(Peer):
    """Our model and our optimizer in the plainest loop: what Lightning adds is what it takes less."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.precision = task.precision

    @cached_property
    def model(self) -> nn.Module:
        self.task.module.configure_model()
        return self.task.module.gpt.to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        self.model  # noqa: B018  on its device first
        return self.task.module.configure_optimizers()

    def loss(self) -> Loss:
        model = self.model
        assert isinstance(model, GPT)
        return lambda tokens, targets, documents=None: model.loss(tokens, targets, documents=documents)

    def batches(self) -> Callable[[], tuple[Tensor, ...]]:
        batches, count = self.task.data.train_batches(), iter(range(sys.maxsize))

        def draw() -> tuple[Tensor, ...]:
            return tuple(tensor.to(self.device) for tensor in batches[next(count)])

        return draw

    def write(self, prompts: Tensor, max_new_tokens: int, cache: bool) -> None:
        assert isinstance(self.model, GPT)
        for _ in stream_tokens(self.model, prompts, max_new_tokens, use_cache=cache):
            pass


def load_nanogpt(checkout: Path | None) -> ModuleType:
    """The module `model` of a checkout of nanoGPT.

    Raises:
        UserError: it is none.
    """
    if checkout is None or not (checkout / "model.py").is_file():
        raise UserError(f"--nanogpt {checkout}: give a checkout of nanoGPT, the folder its model.py is in")
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
        module = load_nanogpt(self.task.nanogpt)
        return module.GPT(
            module.GPTConfig(block_size=c.context_length, vocab_size=self.vocab_size, bias=c.bias, **shape)
        ).to(self.device)

    def optimizer(self) -> torch.optim.Optimizer:
        ours, model = self.task.module, self.model
        optimizer: torch.optim.Optimizer = model.configure_optimizers(  # type: ignore[operator]
            ours.weight_decay, ours.learning_rate, ours.betas, self.device.type
        )
        return optimizer

    def loss(self) -> Loss:
        model = torch.compile(self.model) if self.device.type == "cuda" else self.model
        return lambda tokens, targets: model(tokens, targets)[1]

    def write(self, prompts: Tensor, max_new_tokens: int, cache: bool) -> None:
        if cache:
            super().write(prompts, max_new_tokens, cache)
        self.model.generate(prompts, max_new_tokens)  # type: ignore[operator]


class Transformers(Peer):
    @cached_property
    def model(self) -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        c = self.config
        rates: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        shape: dict[str, Any] = {
            "n_positions": c.context_length,
            "n_embd": c.d_model,
            "n_layer": c.num_blocks,
            "n_head": c.num_heads,
        }
        # no token ends a text: all write equally many
        config = GPT2Config(vocab_size=self.vocab_size, bos_token_id=None, eos_token_id=None, **shape, **rates)
        model: nn.Module = GPT2LMHeadModel(config)
        return model.to(self.device)

    def loss(self) -> Loss:
        return lambda tokens, targets: self.model(input_ids=tokens, labels=tokens).loss  # it shifts them itself

    def write(self, prompts: Tensor, max_new_tokens: int, cache: bool) -> None:
        kept: dict[str, Any] = {"use_cache": cache, "max_new_tokens": max_new_tokens, "do_sample": True, "top_k": 0}
        self.model.generate(prompts, attention_mask=torch.ones_like(prompts), **kept)  # type: ignore[operator]


class LitGPTPeer(Peer):
    @cached_property
    def model(self) -> nn.Module:
        from litgpt import GPT as TheirGPT
        from litgpt import Config

        c = self.config
        shape = {"n_layer": c.num_blocks, "n_head": c.num_heads, "n_embd": c.d_model, "block_size": c.context_length}
        theirs = TheirGPT(Config(**shape, vocab_size=c.vocab_size, padded_vocab_size=self.vocab_size, bias=c.bias))
        theirs.apply(theirs._init_weights)
        return theirs.to(self.device)

    def loss(self) -> Loss:
        return lambda tokens, targets: F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def write(self, prompts: Tensor, max_new_tokens: int, cache: bool) -> None:
        from litgpt.generate.base import generate

        if len(prompts) > 1 or not cache:
            super().write(prompts, max_new_tokens, cache)
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
