"""A learning rate that is best at one width is best at others, with the factors of `width_factors`."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_gpt.model import GPTConfig
from lit_gpt.planning.bare_training import BareTraining, Recipe
from lit_gpt.planning.transfer import width_factors

VOCAB, CONTEXT, BATCH, STEPS = 32, 16, 4, 40
MEASURED = json.loads((Path(__file__).parent.parent / "docs" / "planning_transfer.json").read_text(encoding="utf-8"))
RATES = (0.0015, 0.0045, 0.0135)  # at the reference width, 128


@functools.cache
def draw_batches() -> list[tuple[Tensor, Tensor]]:
    """Return batches of (tokens, targets), (BATCH, CONTEXT) each, of a text in which four tokens can follow each."""
    generator = torch.Generator().manual_seed(1)
    following = torch.randint(VOCAB, (VOCAB, 4), generator=generator)
    batches = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCAB, (BATCH, 1), generator=generator)
        for _ in range(CONTEXT):
            choice = torch.randint(4, (BATCH,), generator=generator)
            tokens = torch.cat([tokens, following[tokens[:, -1], choice][:, None]], dim=1)
        batches.append((tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return batches


def final_loss(width: int, rate: float, factors: dict[str, float]) -> float:
    """Train with Muon and return the mean loss of the last ten steps.

    Args:
        width: d_model.
        rate: The learning rate of the blocks at the reference width; it falls linearly to 0.
        factors: From `width_factors`.
    """
    shape: dict[str, Any] = {"norm": "layernorm", "mlp": "relu2", "tie_embeddings": False, "previous_tokens": 2}
    config = GPTConfig(VOCAB, CONTEXT, d_model=width, num_blocks=2, num_heads=width // 32, **shape)
    rates = {"learning_rate": rate, "embedding_rate": 15.0, "head_rate": 1.5}
    rates = {name: value * factors[name] for name, value in rates.items()}
    recipe = Recipe("muon", **rates, weight_decay=0.0, betas=(0.8, 0.95), warmup_steps=0, decay_share=1.0)
    training = BareTraining(config, recipe, "32-true", torch.device("cpu"))
    losses = [training.step(*batch, 1 - step / STEPS) for step, batch in enumerate(draw_batches())]
    return float(torch.stack(losses[-10:]).mean())


def best_rate(width: int, factors: dict[str, float]) -> float:
    return min(RATES, key=lambda rate: final_loss(width, rate, factors))


@pytest.mark.parametrize("width", [32, 64, 128])
def test_best_rate_stays_in_place_with_the_factors_of_the_width(width: int) -> None:
    assert best_rate(width, width_factors(width)) == RATES[1]


def test_best_rate_moves_without_the_factors_of_the_width() -> None:
    assert best_rate(32, width_factors(128)) == RATES[2]


def test_best_rates_in_planning_transfer_json_agree_under_the_rule_only() -> None:
    best: dict[str, set[float]] = {}
    for rule in ("width factors", "one rate"):
        for width in (64, 256):
            losses: dict[float, list[float]] = {}
            for run in MEASURED:
                if (run["rule"], run["width"], run["depth"]) == (rule, width, 2):
                    losses.setdefault(run["rate"], []).append(run["loss"])
            means = {rate: sum(found) / len(found) for rate, found in losses.items()}
            best.setdefault(rule, set()).add(min(means, key=means.__getitem__))
    assert {rule: len(rates) for rule, rates in best.items()} == {"width factors": 1, "one rate": 2}
