"""The schedule takes the values its formula says; decay falls on matrices only."""

import math

import pytest
from torch import nn

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import learning_rate_factor, parameter_groups


def test_warm_up_climbs_in_equal_strides_and_never_starts_at_zero() -> None:
    factors = [learning_rate_factor(step, "cosine", 4, 100, 0.1) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_after_warm_up_the_rate_follows_its_schedule(schedule: str, middle: float, end: float) -> None:
    def factor(step: int) -> float:
        return learning_rate_factor(step, schedule, 10, 110, 0.1)  # type: ignore[arg-type]

    assert [factor(10), factor(60), factor(110), factor(500)] == pytest.approx([1.0, middle, end, end])


def test_a_cosine_falls_as_a_cosine() -> None:
    assert learning_rate_factor(25, "cosine", 0, 100, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_no_warm_up_starts_at_the_peak() -> None:
    assert learning_rate_factor(0, "linear", 0, 10, 0.1) == 1.0


def test_weight_decay_falls_on_matrices_only() -> None:
    model = GPT(GPTConfig(vocab_size=10, d_model=16, num_heads=2, num_blocks=1, bias=True, norm="layernorm"))
    decayed, rest = parameter_groups(model, weight_decay=0.1, optimizer="adamw")
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert {id(p) for p in decayed["params"]} == {id(p) for p in matrices}
    everything = [id(p) for group in (decayed, rest) for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())
