"""The recipes of CONTRIBUTING.md, followed to the letter: what they name is all that a new part needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from conftest import Fit, weights
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

import lit_gpt.cli.experiment
from lit_gpt.kv_cache import KVCache
from lit_gpt.layers import ACTIVATIONS, NORMS, POSITIONS, Position
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.planning.memory import activation_bytes


class ScaleNorm(nn.Module):
    """Nguyen and Salazar 2019: one scale for the whole vector."""

    def __init__(self, width: int, bias: bool = False, eps: float | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale.type_as(x) * nn.functional.normalize(x, dim=-1)


class Ramp(Position):
    """Add the position itself to the first channel."""

    def forward(self, x: Tensor, positions: slice | Tensor) -> Tensor:
        added = torch.zeros_like(x)
        columns = torch.arange(64)[positions] if isinstance(positions, slice) else positions
        added[..., 0] = columns / 64
        return x + added


def softsign(x: Tensor) -> Tensor:
    return nn.functional.softsign(x)


@dataclass
class Extended(GPTConfig):
    """What a contributor writes into the `Literal` of the field."""

    norm: Literal["rmsnorm", "layernorm", "scalenorm"] = "rmsnorm"  # type: ignore[assignment]
    position: Literal["rope", "learned", "sinusoidal", "ramp"] = "rope"  # type: ignore[assignment]
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2", "softsign"] = "swiglu"  # type: ignore[assignment]


def saved_bytes(model: GPT, tokens: Tensor) -> int:
    """Return the bytes that a forward pass really saves for the backward pass, weights not counted."""
    storages: dict[int, int] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(tokens, tokens)
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("change", [{"norm": "scalenorm"}, {"position": "ramp"}, {"mlp": "softsign"}], ids=str)
def test_new_part_of_the_model_needs_one_entry(monkeypatch: pytest.MonkeyPatch, change: dict[str, str]) -> None:
    monkeypatch.setitem(NORMS, "scalenorm", ScaleNorm)  # type: ignore[arg-type]
    monkeypatch.setitem(POSITIONS, "ramp", Ramp)
    monkeypatch.setitem(ACTIVATIONS, "softsign", softsign)
    config = Extended(37, context_length=24, d_model=32, num_blocks=2, num_heads=4, qk_norm=False, **change)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = GPT(config)
    model.to_empty(device="cpu").init_weights()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    tokens = torch.randint(37, (3, 24), generator=torch.Generator().manual_seed(0))
    cache = KVCache(config, 3, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache)[0] for part in tokens.split([7, 1, 16], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-5)
    model.loss(tokens, tokens).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert activation_bytes(model, 3, "32-true") == pytest.approx(saved_bytes(model, tokens), rel=0.35)


@pytest.mark.parametrize(
    ("field", "entries"),
    [("norm", NORMS), ("position", POSITIONS), ("mlp", ACTIVATIONS)],
    ids=["norm", "position", "mlp"],
)
def test_choices_of_config_are_the_entries(field: str, entries: dict[str, object]) -> None:
    assert set(get_args(get_type_hints(GPTConfig)[field])) == entries.keys()


class StepCounter(Callback):
    """Count optimizer steps, and draw from the global random state, as a careless callback might."""

    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.steps = trainer.global_step
        torch.rand(1)


def test_new_callback_needs_one_line_and_changes_no_weight(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--model.config.dropout", 0.1, "--trainer.max_steps", 4)
    assert fit(*flags, "--name", "without").status == 0
    counter, callbacks = StepCounter(), lit_gpt.cli.experiment.training_callbacks
    monkeypatch.setattr(lit_gpt.cli.experiment, "training_callbacks", lambda *args: [*callbacks(*args), counter])
    assert fit(*flags, "--name", "with").status == 0
    assert counter.steps == 4
    before, after = (weights(Path("logs", name, "version_0", "last.ckpt")) for name in ("without", "with"))
    assert all(torch.equal(before[name], after[name]) for name in before)
