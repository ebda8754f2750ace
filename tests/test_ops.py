"""The operations of `lit_gpt.ops` compute what `lit_gpt.ops.reference` says, in the model and one by one."""

import importlib
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_model import SHAPES, gpt, random_tokens
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lit_gpt.layers
import lit_gpt.model
from lit_gpt import ops
from lit_gpt.ops import IGNORE_INDEX, reference
from lit_gpt.ops.attention import math_attention
from lit_gpt.ops.cross_entropy import UNCHUNKED_LOSS_BYTES, LinearCrossEntropy
from lit_gpt.ops.dropout import dropout_mask
from lit_gpt.ops.rms_norm import RMSNormFunction, rms_norm_saved_bytes

# The package exports a function of the same name, so the module is not its attribute.
cross_entropy_module = importlib.import_module("lit_gpt.ops.cross_entropy")


# ----------------------------------------------------------------------------------------- the whole seam, in the model


def outputs(model: lit_gpt.model.GPT, documents: Tensor | None, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield logits, mean loss, summed loss and gradients of a model on fixed tokens."""
    length = model.config.context_length
    tokens, targets = random_tokens(4, length), random_tokens(4, length).roll(-1, 1)
    targets[0, -3:] = IGNORE_INDEX
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        yield model(tokens, documents=documents)[0]
        loss = model.loss(tokens, targets, documents)
        yield loss
        yield model.evaluate(tokens, targets, documents)[0]
    yield from torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("unchunked", [0, UNCHUNKED_LOSS_BYTES], ids=["chunked", "unchunked"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_ops_match_reference_in_model(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], dtype: torch.dtype, unchunked: int, documents: bool
) -> None:
    monkeypatch.setattr(cross_entropy_module, "UNCHUNKED_LOSS_BYTES", unchunked)
    model = gpt(**{**shape, "context_length": 40}).train()  # long enough for attention by products in bfloat16
    model = model.double() if dtype == torch.float64 else model
    numbers = (torch.arange(40) // 17).expand(4, 40) if documents else None
    found = list(outputs(model, numbers, dtype))
    for module in (lit_gpt.model, lit_gpt.layers):
        monkeypatch.setattr(module, "ops", reference)
    expected = list(outputs(model, numbers, dtype))
    # sinusoidal positions are fifty times as large as the embeddings, which bfloat16 then rounds away
    bfloat16 = 0.1 if shape.get("position") == "sinusoidal" else 0.03
    within = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: bfloat16}[dtype]
    for ours, plain in zip(found, expected, strict=True):
        assert (ours - plain).double().norm() <= within * plain.double().norm() + 1e-5


def test_reference_defines_every_operation() -> None:
    assert set(ops.__all__) <= set(dir(reference))


# --------------------------------------------------------------------------------------------------------- rms_norm


@pytest.mark.parametrize(
    ("dtype", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)], ids=str
)
def test_rms_norm_matches_float64(dtype: torch.dtype, within: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 4, 5, 32, dtype=torch.float64, generator=generator).to(dtype).transpose(2, 3)
    weight = torch.randn(32, generator=generator).to(dtype)
    x[0, 0, 0] = 0  # where eps decides
    inputs = x.clone().requires_grad_(), weight.requires_grad_()
    exact = [value.detach().double().requires_grad_() for value in inputs]
    y, expected = ops.rms_norm(*inputs, 1e-6), F.rms_norm(exact[0], (32,), exact[1], 1e-6)
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for value, should in zip((y, *torch.autograd.grad(y, inputs, grad)), wanted):
        assert value.dtype == dtype
        torch.testing.assert_close(value.double(), should, rtol=0, atol=within * should.abs().max().item())


def test_rms_norm_saves_its_input_and_one_number_per_row() -> None:
    saved: list[Tensor] = []
    x, weight = torch.randn(7, 32, requires_grad=True), torch.ones(32)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        RMSNormFunction.apply(x, weight, 1e-6)
    counted = sum(tensor.nbytes for tensor in saved if tensor.data_ptr() != weight.data_ptr())
    assert counted == 7 * rms_norm_saved_bytes(32, 4)


# --------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_math_attention_matches_fused_attention(kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 10, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads))
    ours = math_attention(q, k, v, torch.full((10, 10), -torch.inf).triu(1))
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, fused)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(fused.sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "dropout_p", "cached", "length", "math"),
    [
        (torch.float32, 0.0, False, 64, False),
        (torch.float32, 0.1, False, 8, True),
        (torch.float32, 0.1, False, 513, False),
        (torch.bfloat16, 0.0, False, 32, True),
        (torch.bfloat16, 0.0, False, 31, False),
        (torch.bfloat16, 0.0, True, 64, False),
    ],
)
def test_attention_mask_of_floats_selects_math_attention(
    dtype: torch.dtype, dropout_p: float, cached: bool, length: int, math: bool
) -> None:
    mask = ops.prepare_attention_mask(None, torch.zeros(2, length, 8), 2, dtype, dropout_p, cached)
    assert (mask is not None) == math
    if mask is not None:
        assert mask.dtype == dtype
        torch.testing.assert_close(mask.exp(), torch.ones(length, length, dtype=dtype).tril())


# ----------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_mask_zeroes_a_share_and_scales_the_rest(p: float) -> None:
    count = 1001 * 997  # no multiple of four
    torch.manual_seed(3)
    mask = dropout_mask(count, p, torch.float32).view(1001, 997)
    torch.manual_seed(3)
    torch.testing.assert_close(dropout_mask(count, p, torch.float32), mask.flatten(), rtol=0, atol=0)
    assert (dropout_mask(count, p, torch.float32) != mask.flatten()).any()
    zeroed = mask == 0
    assert abs(zeroed.double().mean() - p) < 4 * math.sqrt(p * (1 - p) / count)
    for half in (zeroed[:, ::2], zeroed[:, 1::2], zeroed[::2], zeroed[1::2]):
        assert abs(half.double().mean() - p) < 6 * math.sqrt(p * (1 - p) / count)
    torch.testing.assert_close(mask[~zeroed], torch.full_like(mask, 1 / (1 - p))[~zeroed], rtol=1e-4, atol=0)


@pytest.mark.parametrize("length", [24, 600])  # at the longer one the fused kernel draws its own masks
def test_every_dropout_mask_is_used_once(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    model, tokens = gpt(dropout=1e-9, context_length=600), random_tokens(2, length)
    without = model(tokens)[0]
    zeroed: set[int] = set()  # the numbers of the masks that are all zeros; all others are ones

    def draw(*args: Any) -> tuple[Tensor | None, list[ops.BlockMasks]]:
        first, blocks = ops.draw_dropout_masks(*args)
        drawn = [mask for mask in (first, *(mask for block in blocks for mask in block)) if mask is not None]
        for number, mask in enumerate(drawn):
            mask.fill_(number not in zeroed)
        return first, blocks

    named = {name: getattr(ops, name) for name in ops.__all__}
    monkeypatch.setattr(lit_gpt.model, "ops", SimpleNamespace(**{**named, "draw_dropout_masks": draw}))
    model.train()
    torch.testing.assert_close(model(tokens)[0], without)
    for number in range(1 + (3 if length < 512 else 2) * model.config.num_blocks):
        zeroed = {number}
        assert (model(tokens)[0] - without).abs().max() > 1e-3, number


# -------------------------------------------------------------------------------------------- linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 4 * 64 * 5, 2**25, None], ids=["one row", "five rows", "all rows", "unchunked"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("multiple", [1, 64], ids=["", "padded vocabulary"])
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_chunked_loss_and_gradients_match_logits(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, tied: bool, multiple: int, dtype: torch.dtype, rtol: float
) -> None:
    if chunk is not None:
        monkeypatch.setattr(cross_entropy_module, "UNCHUNKED_LOSS_BYTES", 0)
        monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(LinearCrossEntropy, "VOCAB_MULTIPLE", {"cpu": multiple})
    monkeypatch.setattr(LinearCrossEntropy, "GRAD_ROWS", {"cpu": 7})
    tokens, targets = random_tokens(3, 24), random_tokens(3, 24).roll(-1, 1)
    targets[0, 20:] = IGNORE_INDEX
    model = gpt(tie_embeddings=tied).to(dtype)
    plain = model(tokens, targets)[1]
    assert plain is not None
    expected = torch.autograd.grad(3 * plain, list(model.parameters()))
    loss = model.loss(tokens, targets)
    found = torch.autograd.grad(3 * loss, list(model.parameters()))
    assert loss.dtype == dtype
    torch.testing.assert_close(loss, plain, rtol=rtol / 10, atol=0)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 100)


@pytest.mark.parametrize("probability", [1e-4, 0.5, 0.9, 0.99, 0.999])
def test_bfloat16_gradient_is_accurate_for_confident_predictions(probability: float) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(50, 32), torch.arange(64) % 50
    others = torch.logsumexp((hidden @ weight.T).scatter(1, targets[:, None], -torch.inf), dim=1)  # (64,)
    missing = others + math.log(probability / (1 - probability)) - (hidden * weight[targets]).sum(1)  # in the logit
    hidden = torch.cat((hidden, missing[:, None] * F.one_hot(targets, 50)), dim=1).bfloat16()  # (64, 82)
    weight = torch.cat((weight, torch.eye(50)), dim=1).bfloat16()
    exact = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    logits = (hidden @ weight.T).float()  # rounded to bfloat16, as in the operation
    expected = F.cross_entropy(logits + exact[0] @ exact[1].T - (exact[0] @ exact[1].T).detach(), targets)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = LinearCrossEntropy.apply(*inputs, targets, torch.tensor(1 / 64))
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact)):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_bfloat16_gradient_of_mean_has_right_length() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16().requires_grad_() for n in (768, 50))
    targets = torch.randint(50, (768,), generator=generator)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets), exact)
    loss = LinearCrossEntropy.apply(hidden, weight, targets, torch.tensor(1 / 768))  # in bfloat16 it is 1.002 / 768
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
        assert ((ours * theirs).sum() / theirs.square().sum()).item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_head_is_nearly_exact(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "VOCAB_MULTIPLE", {"cpu": 64})
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 4 * 256 * 50})  # 3 chunks
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator) for n in (150, 256))
    hidden, weight = hidden.to(dtype).requires_grad_(), (0.2 * weight).requires_grad_()
    targets = torch.randint(256, (150,), generator=generator)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    expected = F.cross_entropy(exact[0] @ exact[1].T, targets)
    loss = ops.linear_cross_entropy(hidden, weight, targets, float8=True)
    torch.testing.assert_close(loss.double(), expected, rtol=5e-3, atol=0)
    assert loss != ops.linear_cross_entropy(hidden, weight, targets)  # it is float8 indeed
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, exact)):
        assert (ours.double() - theirs).norm() < 0.06 * theirs.norm()


def test_incoming_gradient_scales_chunked_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_module, "UNCHUNKED_LOSS_BYTES", 0)
    model, tokens, targets = gpt(), random_tokens(2, 8), random_tokens(2, 8).roll(1)
    weights = list(model.parameters())
    full = torch.autograd.grad(model.loss(tokens, targets), weights)
    half = torch.autograd.grad(model.loss(tokens, targets) / 2, weights)
    for one, other in zip(full, half):
        torch.testing.assert_close(other, one / 2)


def test_gradients_of_chunks_are_accumulated_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2000, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randint(5, (2000,))

    def gradient() -> Tensor:
        leaf = weight.clone().requires_grad_()
        return torch.autograd.grad(LinearCrossEntropy.apply(hidden, leaf, targets, torch.tensor(1.0)), leaf)[0]

    expected = gradient()
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 2 * 5})  # one row
    torch.set_default_dtype(torch.bfloat16)  # as under --trainer.precision bf16-true
    try:
        found = gradient()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (found - expected).float().norm() < 0.02 * expected.float().norm()


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates; views and sparse ones aside."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {one.data_ptr() for one in args if isinstance(one, Tensor) and not one.is_sparse}
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and not one.is_sparse and one.data_ptr() not in inputs:
                self.elements = max(self.elements, one.numel())
        return out


def test_training_never_holds_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 4 * 50 * 2000})
    model, tokens = gpt(vocab_size=2000), random_tokens(20, 24)
    with LargestTensor() as largest:
        model.loss(tokens, tokens).backward()
    assert largest.elements <= 50 * 2000 < 20 * 24 * 2000


def test_evaluation_computes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = gpt(vocab_size=5000), random_tokens(20, 24)
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": 4 * 10 * 5000})  # smaller than the head's weight
    with torch.no_grad(), LargestTensor() as largest:
        model.loss(tokens, tokens)
    assert largest.elements < model.head.weight.numel()


# ------------------------------------------------------------------------------------- evaluate_linear_cross_entropy


@pytest.mark.parametrize("chunk", [1, 4 * 64 * 5, 2**25], ids=["one row", "five rows", "all rows"])
@pytest.mark.parametrize("multiple", [1, 64], ids=["", "padded vocabulary"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_evaluation_matches_logits_with_ties(
    monkeypatch: pytest.MonkeyPatch, chunk: int, multiple: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK_BYTES", {"cpu": chunk})
    monkeypatch.setattr(LinearCrossEntropy, "VOCAB_MULTIPLE", {"cpu": multiple})
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(1, 3, (4, 50, 3), generator=generator).to(dtype)
    weight = torch.randint(-2, 0, (37, 3), generator=generator).to(dtype)  # a padded column of zeros would be largest
    logits = hidden.double() @ weight.double().T  # small integers: exact in every dtype, often equal
    targets = torch.randint(37, (4, 50), generator=generator)
    targets[:2] = logits[:2].argmax(dim=-1)
    targets[2] = 36 - logits[2].flip(-1).argmax(dim=-1)  # the last of the largest
    targets[0, :9] = IGNORE_INDEX
    first = [row.index(max(row)) for row in logits.flatten(0, 1).tolist()]
    expected = sum(one == other for one, other in zip(first, targets.flatten().tolist()))
    assert 91 <= expected < 190, "some of the largest are not the first"
    token_losses, plain_losses = torch.empty(2, 4, 50, dtype=torch.float64)
    nats, correct = ops.evaluate_linear_cross_entropy(hidden, weight, targets, token_losses)
    torch.testing.assert_close(token_losses.sum(), nats.double())
    assert nats.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(nats.double(), F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    assert (correct.dtype, correct.item()) == (torch.int64, expected)
    plain_nats, plain_correct = reference.evaluate_linear_cross_entropy(hidden, weight, targets, plain_losses)
    torch.testing.assert_close(plain_nats, nats)
    torch.testing.assert_close(plain_losses, token_losses)
    assert plain_correct == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluation_of_ignored_targets_is_zero(dtype: torch.dtype) -> None:
    hidden, weight = torch.ones(6, 8, dtype=dtype), torch.arange(5.0).flip(0).unsqueeze(-1).expand(5, 8)  # id 0 wins
    nats, correct = ops.evaluate_linear_cross_entropy(hidden, weight, torch.full((6,), IGNORE_INDEX))
    assert nats == 0
    assert correct == 0


def test_loss_without_gradients_is_the_mean_over_counted_targets() -> None:
    hidden, weight, targets = torch.randn(6, 8), torch.randn(5, 8), torch.tensor([0, 1, 4, 3, IGNORE_INDEX, 1])
    expected = F.cross_entropy(hidden @ weight.T, targets)
    with torch.no_grad():
        torch.testing.assert_close(ops.linear_cross_entropy(hidden, weight, targets), expected)
