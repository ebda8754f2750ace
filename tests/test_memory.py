"""Estimates of memory and disk space, compared with runs and with what autograd saves."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Fit, console_line, parse_bytes

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.planning.memory import (
    activation_bytes,
    estimate_memory,
    estimate_memory_of_shape,
    model_without_memory,
    state_bytes,
)

RUN = Path("logs/small/version_0")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_and_checkpoint_estimates_match_a_run(fit: Fit, optimizer: str) -> None:
    flags = ["--model.config.d_model", 64, "--checkpoint.every_n_steps", 3, "--model.optimizer", optimizer]
    result = fit(*flags)
    checkpoint = torch.load(RUN / "last.ckpt", weights_only=True)
    weights = {value.untyped_storage().data_ptr(): value.nbytes for value in checkpoint["state_dict"].values()}
    states = [value for state in checkpoint["optimizer_states"][0]["state"].values() for value in state.values()]
    expected = 2 * sum(weights.values()) + sum(value.nbytes for value in states)  # gradients are as large as weights
    name = {"adamw": "AdamW", "muon": "Muon"}[optimizer]
    state = re.match(rf"(\S+ .B) for weights, gradients and {name}, ", console_line(result.out, "memory"))
    assert state
    assert parse_bytes(state[1]) == pytest.approx(expected, abs=0.05e6)
    files = [path.stat().st_size for path in RUN.glob("*.ckpt")]
    disk = re.match(r"(\S+ .B) for (\d) checkpoints of (\S+ .B); \S+ .B free", console_line(result.out, "disk"))
    assert disk
    assert int(disk[2]) == len(files) == 4
    assert parse_bytes(disk[1]) == pytest.approx(sum(files), rel=0.1, abs=0.05e6)


def test_chunks_of_logits_are_counted_on_a_gpu_only() -> None:
    def estimate(device: str) -> int:
        return estimate_memory(model, "adamw", 4, "32-true", device)[1] - activation_bytes(model, 4, "32-true", device)

    model = model_without_memory(GPTConfig(**SMALL))
    assert estimate("cpu") == 0
    assert estimate("cuda") == 2 * 4 * 64 * 100 * 4  # two chunks of float32 logits, 4 x 64 x 100


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_model_without_memory_needs_what_the_real_one_needs(optimizer: Any) -> None:
    config, before = GPTConfig(**SMALL), torch.get_rng_state()
    counted = model_without_memory(config)
    assert torch.equal(torch.get_rng_state(), before)  # the weights of the run do not depend on what was counted
    for precision in ("32-true", "bf16-mixed"):
        real = estimate_memory(GPT(config), optimizer, 4, precision)
        assert estimate_memory(counted, optimizer, 4, precision) == real
    assert estimate_memory(counted, optimizer, 4, "32-true", shards=2)[0] == state_bytes(counted, optimizer) // 2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_of_a_shape_is_that_of_its_model(device: str, checkpointing: bool) -> None:
    for change in ({"num_blocks": 1}, {"num_blocks": 7, "dropout": 0.1}, {"num_blocks": 4, "tie_embeddings": False}):
        config = GPTConfig(**{**SMALL, **change})
        for arguments in (("muon", 3, "bf16-mixed", device), ("adamw", 8, "32-true", device)):
            expected = estimate_memory(model_without_memory(config, checkpointing), *arguments)
            assert estimate_memory_of_shape(config, *arguments, checkpointing) == expected


SMALL: dict = {"vocab_size": 100, "context_length": 64, "d_model": 64, "num_blocks": 3, "num_heads": 4}
SHAPES: list[dict] = [
    {},
    {"dropout": 0.1},
    {"norm": "layernorm", "mlp": "gelu", "position": "learned", "qk_norm": False},
    {"mlp": "relu2", "num_kv_heads": 1},
    {"norm": "layernorm", "mlp": "relu", "position": "sinusoidal", "bias": True, "context_length": 16},
    {"qk_norm": False, "context_length": 600, "num_blocks": 1},
    {"head_size": 24, "hidden_size": 96, "num_kv_heads": 2, "qkv_bias": True, "mlp": "gelu_tanh"},
]


def saved_bytes(model: GPT, windows: int, precision: str) -> int:
    """The bytes that autograd saves in a forward pass of a batch, without the model itself."""
    model_storages = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def record(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in model_storages:
            saved[storage.data_ptr()] = storage
        return value

    tokens = torch.zeros(windows, model.config.context_length, dtype=torch.int64)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
    with torch.autograd.graph.saved_tensors_hooks(record, lambda value: value), autocast:
        loss = model.loss(tokens, tokens)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation_bytes_match_tensors_saved_by_autograd(shape: dict, precision: str) -> None:
    model = GPT(GPTConfig(**(SMALL | shape)))
    assert activation_bytes(model, 4, precision) == pytest.approx(saved_bytes(model, 4, precision), rel=0.1)


def test_activation_bytes_include_a_new_activation_function() -> None:
    model = GPT(GPTConfig(**SMALL, mlp="relu"))
    before = activation_bytes(model, 4, "32-true")
    for block in model.blocks:
        block.mlp.activation = lambda x: torch.tanh(x) * torch.sigmoid(x)
    after = activation_bytes(model, 4, "32-true")
    assert after > 1.2 * before
    assert after == pytest.approx(saved_bytes(model, 4, "32-true"), rel=0.1)
