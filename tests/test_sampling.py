"""Top-k and top-p keep the right tokens."""

import pytest
import torch

from lit_gpt.sampling import keep_likeliest


def kept(logits: torch.Tensor, top_k: int | None, top_p: float | None) -> list[list[int]]:
    """The kept tokens of each row, likeliest first, found one by one."""
    rows = []
    for row in logits.double().tolist():
        order = sorted(range(len(row)), key=lambda token: -row[token])[:top_k]
        weights = torch.tensor([row[token] for token in order], dtype=torch.float64).exp()
        total, chosen = 0.0, []
        for token, weight in zip(order, (weights / weights.sum()).tolist()):
            if top_p is None or total < top_p:
                chosen.append(token)
            total += weight
        rows.append(chosen)
    return rows


@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 40, 41])
def test_keep_likeliest_keeps_the_tokens_found_one_by_one(top_k: int | None, top_p: float | None) -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.full_like(logits, -torch.inf)
    for row, tokens in enumerate(kept(logits, top_k, top_p)):
        expected[row, tokens] = logits[row, tokens]
    assert torch.equal(keep_likeliest(logits, top_k, top_p), expected)


def test_keep_likeliest_stops_when_the_sum_is_exactly_top_p() -> None:
    logits = torch.zeros(1, 4)  # of probability 1/4 each
    for top_p, count in ((0.25, 1), (0.26, 2), (0.5, 2), (1.0, 4)):
        assert keep_likeliest(logits, top_p=top_p).isfinite().sum() == count


def test_keep_likeliest_keeps_ties_of_the_last_token_of_top_k() -> None:
    assert keep_likeliest(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), top_k=2).isfinite().tolist() == [
        [False, True, True, True]
    ]
