"""The metrics of an evaluation, compared with sums over all tokens."""

import math

import pytest
import torch
from torch import Tensor

from lit_gpt.training.metrics import VAL_METRICS, split_metrics

CPU = torch.device("cpu")
# nats, tokens, correct, num_bytes of three batches; the second one has padding only
BATCHES = [(30.25, 12, 3, 40), (0.0, 0, 0, 0), (7.5, 4, 2, 11)]


def update(metrics: torch.nn.Module, batch: tuple[float, int, int, int]) -> None:
    nats, tokens, correct, num_bytes = map(torch.tensor, batch)
    metrics.update(nats=nats, tokens=tokens, correct=correct, num_bytes=num_bytes)  # type: ignore[operator]


def test_split_metrics_are_sums_over_tokens_divided_once() -> None:
    metrics = split_metrics("val", has_bytes=True, device=CPU)
    for batch in BATCHES:
        update(metrics, batch)
    computed: dict[str, Tensor] = metrics.compute()
    assert {tag: value.item() for tag, value in computed.items()} == {
        "loss/val": pytest.approx(37.75 / 16),
        "val/perplexity": pytest.approx(math.exp(37.75 / 16), rel=1e-6),
        "val/accuracy": pytest.approx(5 / 16),
        "val/bits_per_byte": pytest.approx(37.75 / math.log(2) / 51),
    }
    assert all(value.dtype == torch.float32 for value in computed.values())


def test_sums_of_many_small_losses_keep_their_precision() -> None:
    """In float32, adding 1 to 2**24 changes nothing."""
    metrics = split_metrics("val", has_bytes=False, device=CPU)
    update(metrics, (2.0**24, 2**24, 0, 0))
    for _ in range(1000):
        update(metrics, (3.0, 1, 0, 0))
    numerator = metrics["loss/val"].numerator
    assert isinstance(numerator, Tensor)
    assert numerator.item() == 2**24 + 3000


def test_windows_of_the_training_split_have_the_loss_only() -> None:
    tags = [*split_metrics("train_eval", True, CPU).keys(), *split_metrics("val", True, CPU).keys()]
    assert sorted(tags) == sorted(VAL_METRICS)
    assert "val/bits_per_byte" not in split_metrics("val", has_bytes=False, device=CPU)
