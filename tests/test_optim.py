"""Learning rate schedule, parameter groups, and optimizer steps, compared with torch and with their formulas."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz

from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import (
    MuonAdamW,
    gradient_norm,
    learning_rate_factor,
    muon_momentum,
    newton_schulz,
    parameter_groups,
)


def test_learning_rate_rises_linearly_from_above_zero() -> None:
    factors = [learning_rate_factor(step, "cosine", 4, 100, 0.1) for step in range(5)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_learning_rate_follows_its_schedule_after_the_warmup(schedule: str, middle: float, end: float) -> None:
    def factor(step: int) -> float:
        return learning_rate_factor(step, schedule, 10, 110, 0.1)  # type: ignore[arg-type]

    assert [factor(10), factor(60), factor(110), factor(500)] == pytest.approx([1.0, middle, end, end])


def test_cosine_schedule_matches_the_formula() -> None:
    assert learning_rate_factor(25, "cosine", 0, 100, 0.0) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_learning_rate_without_warmup_starts_at_its_highest_value() -> None:
    assert learning_rate_factor(0, "linear", 0, 10, 0.1) == 1.0


def test_learning_rate_falls_in_the_last_part_of_the_run() -> None:
    rates = [learning_rate_factor(step, "linear", 2, 10, 0.0, decay_share=0.5) for step in range(11)]
    assert rates == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_weight_decay_applies_to_matrices_and_on_request_to_all() -> None:
    model = GPT(GPTConfig(vocab_size=10, d_model=16, num_heads=2, num_blocks=1, bias=True, norm="layernorm"))
    groups = parameter_groups(model, 0.1, 0.01)
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    decayed = [id(p) for group in groups for p in group["params"] if group["weight_decay"] == 0.1]
    assert set(decayed) == {id(p) for p in matrices}
    assert [group["weight_decay"] for group in groups if group["name"] == "scales"] == [0.0]
    groups = parameter_groups(model, 0.1, 0.01, decay_norms_and_biases=True)
    assert {group["weight_decay"] for group in groups} == {0.1}
    everything = [id(p) for group in groups for p in group["params"]]
    assert sorted(everything) == sorted(id(p) for p in model.parameters())


def test_gradient_norm_of_large_gradients_matches_float64() -> None:
    gradients = [torch.randn(shape) for shape in ((64,), (40_000, 256), (100, 7), (256, 5_000))]
    gradients[3] = gradients[3].T
    exact = torch.cat([g.double().flatten() for g in gradients]).norm().item()
    assert gradient_norm(gradients).item() == pytest.approx(exact, rel=1e-5)


# --------------------------------------------------------------------------------------------------------- Muon


def make_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(GPTConfig(vocab_size=20, context_length=8, d_model=16, num_heads=2, num_blocks=3, tie_embeddings=False))


def make_muon(model: GPT, momentum_warmup_steps: int = 0) -> MuonAdamW:
    groups = parameter_groups(model, 0.1, 0.01)
    return MuonAdamW(groups, betas=(0.9, 0.95), momentum_warmup_steps=momentum_warmup_steps)


def train(model: GPT, steps: int, *optimizers: torch.optim.Optimizer) -> list[float]:
    """Train on one batch; return the losses."""
    tokens = torch.randint(20, (4, 9), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps):
        model.zero_grad()
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    return losses


def test_muon_is_for_the_matrices_of_the_blocks_only() -> None:
    model = make_gpt()
    blocks, embeddings, head, scales = parameter_groups(model, 0.1, 0.01)
    inner = [m.weight for m in model.blocks.modules() if isinstance(m, nn.Linear)]
    assert [id(p) for p in blocks["params"]] == [id(p) for p in inner]
    assert [id(p) for p in embeddings["params"]] == [id(model.embedding.weight)]
    assert [id(p) for p in head["params"]] == [id(model.head.weight)]
    groups = (blocks, embeddings, head, scales)
    assert [group["name"] for group in groups] == ["blocks", "embeddings", "head", "scales"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.1, 0.0]


def test_muon_step_matches_torch_muon_and_adamw() -> None:
    ours = make_gpt()
    theirs = copy.deepcopy(ours)
    blocks, *rest = parameter_groups(theirs, 0.1, 0.01)
    reference = (
        torch.optim.Muon(blocks["params"], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{k: g[k] for k in ("params", "weight_decay")} for g in rest], lr=0.01, betas=(0.9, 0.95)),
    )
    assert train(ours, 1, make_muon(ours)) == train(theirs, 1, *reference)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            one, other, rtol=0, atol=5e-4
        )  # the step itself is 8e-3; rounding to bfloat16 differs


@pytest.mark.parametrize("momentum_warmup_steps", [0, 5])
def test_muon_is_deterministic_and_resumes_from_its_state_dict(momentum_warmup_steps: int) -> None:
    one, other = make_gpt(), make_gpt()
    losses = train(one, 6, make_muon(one, momentum_warmup_steps))
    assert losses == train(other, 6, make_muon(other, momentum_warmup_steps))
    stopped = make_gpt()
    optimizer = make_muon(stopped, momentum_warmup_steps)
    first = train(stopped, 3, optimizer)
    resumed = copy.deepcopy(stopped)
    again = make_muon(resumed, momentum_warmup_steps)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert first + train(resumed, 3, again) == losses


def test_momentum_of_muon_rises_in_its_warmup() -> None:
    assert [muon_momentum(step, 4) for step in range(6)] == pytest.approx([0.85, 0.875, 0.9, 0.925, 0.95, 0.95])
    assert muon_momentum(0, 0) == 0.95
    first, second = make_gpt(), make_gpt()
    losses = train(first, 4, make_muon(first))
    warmed = train(second, 4, make_muon(second, momentum_warmup_steps=100))
    assert losses[0] == warmed[0]
    assert losses[3] != warmed[3]


def test_muon_overfits_one_batch() -> None:
    model = make_gpt()
    losses = train(model, 60, make_muon(model))
    assert losses[-1] < 0.1 < 2.5 < losses[0]


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 48, 16), (2, 16, 64)])
def test_newton_schulz_returns_nearly_orthogonal_matrices(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    result = newton_schulz([matrices])[0].float()
    values = torch.linalg.svdvals(result)
    assert 0.5 < values.min() < values.max() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    nearest = left @ right  # the orthogonal factor of the polar decomposition
    cosine = (result * nearest).sum((-2, -1)) / result.norm(dim=(-2, -1)) / nearest.norm(dim=(-2, -1))
    assert cosine.min() > 0.97


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(128, 128), (384, 128), (128, 512)])
def test_newton_schulz_error_is_at_most_twice_that_of_torch(shape: tuple[int, int], decay: float) -> None:
    torch.manual_seed(4)
    left, _, right = torch.linalg.svd(torch.randn(4, *shape, dtype=torch.float64), full_matrices=False)
    matrices = left * torch.arange(1, 129) ** -decay @ right  # singular values 1, 2^-decay, 3^-decay, …
    exact = matrices / matrices.norm(dim=(-2, -1), keepdim=True)
    wide = shape[0] <= shape[1]
    for _ in range(5):
        gram = exact @ exact.mT if wide else exact.mT @ exact
        polynomial = -4.7750 * gram + 2.0315 * gram @ gram
        exact = 3.4445 * exact + (polynomial @ exact if wide else exact @ polynomial)
    matrices = matrices.float()
    theirs = [_zeropower_via_newtonschulz(one, (3.4445, -4.7750, 2.0315), 5, 1e-7) for one in matrices]
    assert (newton_schulz([matrices])[0] - exact).norm() < 2 * (torch.stack(theirs) - exact).norm()


def test_newton_schulz_treats_each_matrix_independently() -> None:
    generator = torch.Generator().manual_seed(3)
    stacks = [torch.randn(shape, generator=generator) for shape in ((3, 16, 8), (2, 24, 8), (1, 8, 32))]
    stacks[0][1] *= 100
    for together, stack in zip(newton_schulz(stacks), stacks, strict=True):
        for one, alone in zip(together, stack, strict=True):
            torch.testing.assert_close(one, newton_schulz([alone[None]])[0][0], rtol=0, atol=0.02)
