"""The GPT computes what it says, each time beside another computation of the same."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lit_gpt.model
from lit_gpt.model import (
    FEW_LOGITS,
    GPT,
    IGNORE,
    GPTConfig,
    KVCache,
    LinearCrossEntropy,
    Masks,
    RMSNorm,
    attention_by_products,
    draw_masks,
    kept,
)

SHAPES: dict[str, dict[str, Any]] = {
    "rope, grouped heads": {"position": "rope", "num_kv_heads": 2},
    "rope, one key head": {"position": "rope", "num_kv_heads": 1, "qk_norm": False},
    "learned": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False},
    "sinusoidal": {"position": "sinusoidal", "norm": "layernorm", "mlp": "relu", "bias": True, "num_kv_heads": 2},
    "free head": {"mlp": "relu2", "tie_embeddings": False},
    "previous tokens": {"previous_tokens": 2},
}


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 37, "context_length": 24, "d_model": 32, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    for parameter in model.previous.parameters():
        nn.init.normal_(parameter, std=0.02)  # they start out as nothing
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "function"), [("rmsnorm", F.rms_norm), ("layernorm", F.layer_norm)])
def test_queries_and_keys_take_the_norm_of_the_model(norm: str, function: Callable[..., Tensor]) -> None:
    attention, x = gpt(norm=norm).blocks[0].attention, torch.randn(5, 8) + 1
    for part in (attention.q_norm, attention.k_norm):
        torch.testing.assert_close(part(x), function(x, (8,), eps=part.eps))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_future_tokens_do_not_change_past_logits(shape: dict[str, Any]) -> None:
    model, tokens = gpt(**shape), random_tokens(3, 24)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 37
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=-1).min() > 1e-4  # and every later one does change


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cuts", [[1] * 24, [7, 1, 1, 15], [24]], ids=str)
def test_cached_logits_are_the_uncached_ones(shape: dict[str, Any], cuts: list[int]) -> None:
    model, tokens = gpt(**shape), random_tokens(2, 24)
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache)[0] for part in tokens.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-5)
    assert cache.length == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_documents_in_one_window_are_as_in_rows_of_their_own(shape: dict[str, Any], dtype: torch.dtype) -> None:
    model, lengths = gpt(**shape, context_length=40), [[11, 1, 28], [40, 0, 0], [3, 30, 7]]
    tokens = random_tokens(3, 40)
    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in lengths])
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        together = model(tokens, documents=documents)[0]
        for row, cuts in enumerate(lengths):
            for alone, part in zip(tokens[row].split(cuts), together[row].split(cuts)):
                if len(alone):
                    expected = model(alone[None])[0][0]
                    tolerance = 1e-5 if dtype == torch.float32 else 0.02
                    torch.testing.assert_close(part, expected, rtol=0, atol=tolerance)
        other = model(tokens)[0]
    assert (other - together)[0, 11:].abs().amax(dim=-1).min() > 1e-3  # it is the mask that does it


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_of_documents_in_one_window_are_as_in_rows_of_their_own(shape: dict[str, Any]) -> None:
    model, tokens = gpt(**shape), random_tokens(1, 24)
    targets = tokens.roll(-1, 1)
    documents = (torch.arange(24) >= 9).long()[None]
    together = torch.autograd.grad(model.loss(tokens, targets, "sum", documents), list(model.parameters()))
    rows = [model.loss(tokens[:, part], targets[:, part], "sum") for part in (slice(9), slice(9, None))]
    apart = torch.autograd.grad(sum(rows, torch.zeros(())), list(model.parameters()))
    for one, other in zip(together, apart):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_place_matters(shape: dict[str, Any]) -> None:
    logits = gpt(**shape)(torch.tensor([[5, 9, 5, 9, 3]]))[0]
    swapped = gpt(**shape)(torch.tensor([[9, 5, 5, 9, 3]]))[0]
    assert (logits[0, -1] - swapped[0, -1]).abs().max() > 1e-5


def test_initial_loss_is_near_that_of_a_uniform_guess() -> None:
    model = gpt(vocab_size=1000, d_model=64)
    tokens = torch.randint(1000, (8, 24), generator=torch.Generator().manual_seed(2))
    assert abs(model.loss(tokens, tokens.roll(-1, 1)).item() - math.log(1000)) < 0.2


@pytest.mark.parametrize("shape", [*SHAPES.values(), {"norm": "layernorm", "bias": True}], ids=[*SHAPES, "biases"])
def test_a_model_starts_as_gpt2_does(shape: dict[str, Any]) -> None:
    model = GPT(GPTConfig(**{"vocab_size": 500, "d_model": 128, "num_blocks": 8, "num_heads": 4, **shape}))
    assert (model.head.weight is model.embedding.weight) == model.config.tie_embeddings
    for name, value in model.named_parameters():
        if name.startswith("previous") or name.endswith("bias"):
            assert not value.any(), name
        elif value.ndim == 1:
            assert (value == 1).all(), name
        else:
            std = 0.02 / math.sqrt(16) if "project" in name else 0.02
            assert value.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(value.mean().item()) < 0.05 * std, name


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_seed_decides_the_weights_whenever_and_in_whatever_memory_they_are_drawn(shape: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=37, d_model=32, num_blocks=2, num_heads=4, **shape)
    torch.manual_seed(5)
    now, another = GPT(config), GPT(config)
    torch.manual_seed(5)
    with torch.device("meta"):
        later = GPT(config)
        assert all(value.is_meta for value in (*later.parameters(), *later.buffers()))
    torch.rand(9)  # what else is drawn meanwhile
    later.to_empty(device="cpu").initialise()
    assert (later.head.weight is later.embedding.weight) == config.tie_embeddings
    pairs = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (now, later)]
    for name, value in pairs[0].items():
        assert value.dtype == pairs[1][name].dtype == torch.float32
        assert torch.equal(value, pairs[1][name]), name
    assert not torch.equal(now.embedding.weight, another.embedding.weight)


def test_every_weight_is_drawn_once() -> None:
    class Count(TorchDispatchMode):
        drawn = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default) and not args[0].is_meta:
                self.drawn += args[0].numel()
            return func(*args, **(kwargs or {}))

    with Count() as count:
        model = gpt(tie_embeddings=False)
    assert count.drawn == sum(value.numel() for value in model.parameters() if value.ndim == 2)


@pytest.mark.parametrize("chunk", [1, 4 * 64 * 5, 2**25, None], ids=["a row", "five rows", "all rows", "at once"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "free head"])
@pytest.mark.parametrize("multiple", [1, 64], ids=["", "padded vocabulary"])
@pytest.mark.parametrize(("kind", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_chunked_loss_and_gradients_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, chunk: int | None, tie: bool, multiple: int, kind: torch.dtype, rtol: float
) -> None:
    if chunk is not None:
        monkeypatch.setattr(lit_gpt.model, "FEW_LOGITS", 0)
        monkeypatch.setattr(LinearCrossEntropy, "CHUNK", {"cpu": chunk})
    monkeypatch.setattr(LinearCrossEntropy, "MULTIPLE", {"cpu": multiple})
    monkeypatch.setattr(LinearCrossEntropy, "COLUMNS", {"cpu": 7})
    tokens, targets = random_tokens(3, 24), random_tokens(3, 24).roll(-1, 1)
    targets[0, 20:] = IGNORE
    model = gpt(tie_embeddings=tie).to(kind)
    plain = model(tokens, targets)[1]
    assert plain is not None
    expected = torch.autograd.grad(3 * plain, list(model.parameters()))
    loss = model.loss(tokens, targets)
    got = torch.autograd.grad(3 * loss, list(model.parameters()))
    assert loss.dtype == kind
    torch.testing.assert_close(loss, plain, rtol=rtol / 10, atol=0)
    torch.testing.assert_close(model.loss(tokens, targets, reduction="sum"), plain * 68, rtol=rtol / 10, atol=0)
    for one, other in zip(got, expected):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 100)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that any operation makes; a view of another is not made.

    Nor is a sparse one, whose values are a tensor of their own.
    """

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {one.data_ptr() for one in args if isinstance(one, Tensor) and not one.is_sparse}
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor) and not one.is_sparse and one.data_ptr() not in given:
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_by_products_is_torchs(key_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, heads, 10, 8, requires_grad=True) for heads in (4, key_heads, key_heads))
    ours = attention_by_products(q, k, v, torch.full((10, 10), -torch.inf).triu(1))
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours.sum(), (q, k, v)), torch.autograd.grad(theirs.sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "within"), [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 8e-3)])
def test_rmsnorm_is_torchs(kind: torch.dtype, within: float) -> None:
    norm, generator = RMSNorm(32).to(kind), torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 3, 4, 5, 32, dtype=torch.float64, generator=generator).to(kind).transpose(2, 3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(32, generator=generator))
        x[0, 0, 0] = 0  # where eps decides
    given = x.clone().requires_grad_(), norm.weight
    exact = [value.detach().double().requires_grad_() for value in given]
    y, expected = norm(given[0]), F.rms_norm(exact[0], (32,), exact[1], norm.eps)
    wanted = (expected, *torch.autograd.grad(expected, exact, grad.double()))
    for value, should in zip((y, *torch.autograd.grad(y, given, grad)), wanted):
        assert value.dtype == kind
        torch.testing.assert_close(value.double(), should, rtol=0, atol=within * should.abs().max().item())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("few", [0, FEW_LOGITS], ids=["chunks", "at once"])
def test_bfloat16_keeps_the_numbers(monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], few: int) -> None:
    """The fast path on a CPU, at a length at which it attends by products, beside plain float32."""
    monkeypatch.setattr(lit_gpt.model, "FEW_LOGITS", few)
    model = gpt(**{**shape, "context_length": 48}).train()
    tokens, targets = random_tokens(8, 48), random_tokens(8, 48).roll(1)
    exact = F.cross_entropy(model(tokens)[0].flatten(0, 1), targets.flatten())
    gradients = torch.autograd.grad(exact, list(model.parameters()))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    torch.testing.assert_close(loss, exact, rtol=2e-3, atol=0)
    bound = 0.1 if shape.get("position") == "sinusoidal" else 0.03  # its waves are fifty times an embedding's size
    for ours, plain in zip(torch.autograd.grad(loss, list(model.parameters())), gradients):
        assert ours.dtype == torch.float32
        assert (ours - plain).norm() < bound * plain.norm() + 1e-5  # a bias of keys has no gradient but rounding


@pytest.mark.parametrize("likelihood", [1e-4, 0.5, 0.9, 0.99, 0.999])
def test_in_bfloat16_what_is_known_well_still_has_a_gradient(likelihood: float) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 32), torch.randn(50, 32), torch.arange(64) % 50
    rest = torch.logsumexp((hidden @ weight.T).scatter(1, targets[:, None], -torch.inf), dim=1)  # (64,)
    more = (
        rest + math.log(likelihood / (1 - likelihood)) - (hidden * weight[targets]).sum(1)
    )  # the target's logit wants
    hidden = torch.cat((hidden, more[:, None] * F.one_hot(targets, 50)), dim=1).bfloat16()  # (64, 82)
    weight = torch.cat((weight, torch.eye(50)), dim=1).bfloat16()
    exact = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    logits = (hidden @ weight.T).float()  # rounded, as ours
    expected = F.cross_entropy(logits + exact[0] @ exact[1].T - (exact[0] @ exact[1].T).detach(), targets)
    given = [hidden.requires_grad_(), weight.requires_grad_()]
    loss = LinearCrossEntropy.apply(*given, targets, torch.tensor(1 / 64))
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for ours, theirs in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, exact)):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


def test_in_bfloat16_the_mean_makes_no_gradient_longer() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16().requires_grad_() for n in (768, 50))
    targets = torch.randint(50, (768,), generator=generator)
    exact = [value.detach().double().requires_grad_() for value in (hidden, weight)]
    wanted = torch.autograd.grad(F.cross_entropy(exact[0] @ exact[1].T, targets), exact)
    loss = LinearCrossEntropy.apply(hidden, weight, targets, torch.tensor(1 / 768))  # in bfloat16 1.002 / 768
    for ours, theirs in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
        assert ((ours * theirs).sum() / theirs.square().sum()).item() == pytest.approx(1, abs=1e-3)


def test_a_gradient_can_be_scaled_and_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lit_gpt.model, "FEW_LOGITS", 0)
    model, tokens, targets = gpt(), random_tokens(2, 8), random_tokens(2, 8).roll(1)
    weights = list(model.parameters())
    once = torch.autograd.grad(model.loss(tokens, targets), weights)
    half = torch.autograd.grad(model.loss(tokens, targets) / 2, weights)
    for whole, part in zip(once, half):
        torch.testing.assert_close(part, whole / 2)


def test_gradients_of_chunks_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(2000, 8).bfloat16(), torch.randn(5, 8).bfloat16(), torch.randint(5, (2000,))

    def gradient() -> Tensor:
        free = weight.clone().requires_grad_()
        loss = LinearCrossEntropy.apply(hidden, free, targets)
        return torch.autograd.grad(loss, free)[0]

    expected = gradient()
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK", {"cpu": 2 * 5})  # a row
    torch.set_default_dtype(torch.bfloat16)  # as under --trainer.precision bf16-true
    try:
        got = gradient()
    finally:
        torch.set_default_dtype(torch.float32)
    assert (got - expected).float().norm() < 0.02 * expected.float().norm()


def test_training_never_holds_the_logits_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK", {"cpu": 4 * 50 * 2000})
    model = gpt(vocab_size=2000)
    tokens = random_tokens(20, 24)
    with LargestTensor() as watched:
        model.loss(tokens, tokens).backward()
    assert watched.elements <= 50 * 2000 < 20 * 24 * 2000


def test_an_evaluation_takes_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = gpt(vocab_size=5000), random_tokens(20, 24)
    monkeypatch.setattr(LinearCrossEntropy, "CHUNK", {"cpu": 4 * 10 * 5000})  # less than the head's matrix has
    with torch.no_grad(), LargestTensor() as watched:
        model.loss(tokens, tokens)
    assert watched.elements < model.head.weight.numel()


def test_one_batch_overfits() -> None:
    model = gpt().train()
    tokens, targets = random_tokens(4, 24), random_tokens(4, 24).roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_zeroes_in_training_only() -> None:
    model, tokens = gpt(dropout=0.5), random_tokens(2, 24)
    torch.testing.assert_close(model(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    model.train()
    assert (model(tokens)[0] - model(tokens)[0]).abs().max() > 0.1


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_zeroes_a_share_and_scales_the_rest(share: float) -> None:
    count = 1001 * 997  # no multiple of four
    torch.manual_seed(3)
    y = kept(count, share, torch.float32).view(1001, 997)
    torch.manual_seed(3)
    torch.testing.assert_close(kept(count, share, torch.float32), y.flatten(), rtol=0, atol=0)
    assert (kept(count, share, torch.float32) != y.flatten()).any()
    zeroed = y == 0
    assert abs(zeroed.double().mean() - share) < 4 * math.sqrt(share * (1 - share) / count)
    for half in (zeroed[:, ::2], zeroed[:, 1::2], zeroed[::2], zeroed[1::2]):
        assert abs(half.double().mean() - share) < 6 * math.sqrt(share * (1 - share) / count)
    torch.testing.assert_close(y[~zeroed], torch.full_like(y, 1 / (1 - share))[~zeroed], rtol=1e-4, atol=0)


def test_activations_computed_anew_change_nothing() -> None:
    model, tokens = gpt(dropout=0.2).train(), random_tokens(2, 24)

    def step() -> tuple[Tensor, int]:
        model.zero_grad()
        torch.manual_seed(1)
        held = 0

        def hold(tensor: Tensor) -> Tensor:
            nonlocal held
            held += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        return torch.cat(
            [loss.detach()[None], *(p.grad.flatten() for p in model.parameters() if p.grad is not None)]
        ), held

    kept_all, most = step()
    model.blocks.activation_checkpointing = True
    anew, fewer = step()
    torch.testing.assert_close(anew, kept_all, rtol=0, atol=0)
    assert fewer < most / 4


@pytest.mark.parametrize("length", [24, 600])  # at the longer one torch's own attention draws for itself
def test_every_mask_is_used_once(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    model, tokens = gpt(dropout=1e-9, context_length=600), random_tokens(2, length)
    straight = model(tokens)[0]
    drawn = draw_masks(model.config, 2, length, torch.float32, length < 512)
    shapes = [None if mask is None else mask.shape for mask in drawn]
    assert len(shapes) == 1 + 3 * model.config.num_blocks
    zeroed = []

    def masks(*args: Any) -> Masks:
        ones = [None if shape is None else torch.ones(shape) for shape in shapes]
        for place in zeroed:
            ones[place].zero_()  # type: ignore[union-attr]
        return ones

    monkeypatch.setattr(lit_gpt.model, "draw_masks", masks)
    model.train()
    torch.testing.assert_close(model(tokens)[0], straight)
    for place in (place for place, shape in enumerate(shapes) if shape is not None):
        zeroed = [place]
        assert (model(tokens)[0] - straight).abs().max() > 1e-3, place


class CourseHead(nn.Module):
    """One head as the course writes it: its own three matrices and a triangle."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, size) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        T = x.shape[1]
        scores = self.query(x) @ self.key(x).transpose(-2, -1) / math.sqrt(self.query.out_features)  # (B, T, T)
        scores = scores.masked_fill(torch.tril(torch.ones(T, T)) == 0, float("-inf"))
        return F.softmax(scores, dim=-1) @ self.value(x)  # (B, T, E)


def course_logits(model: GPT, tokens: Tensor) -> Tensor:
    """The course's formulas, head by head, with the weights of `model`.

    Where the course has no bias (queries, keys, values) ours may be zero; the one it has on the head is not ours.
    """
    D, H = model.config.d_model, model.config.num_heads
    table = torch.zeros(model.config.context_length, D)
    position = torch.arange(model.config.context_length).float().unsqueeze(1)
    divisor = torch.exp(torch.arange(0, D, 2).float() * (-math.log(10000.0) / D))
    table[:, 0::2], table[:, 1::2] = torch.sin(position * divisor), torch.cos(position * divisor)
    x = model.embedding.weight[tokens] + table[: tokens.shape[1]]
    for block in model.blocks:
        normed = F.layer_norm(x, (D,), block.attention_norm.weight, block.attention_norm.bias)
        heads = []
        for h in range(H):
            head = CourseHead(D, D // H)
            rows = slice(h * D // H, (h + 1) * D // H)
            for linear, weight, bias in zip(
                (head.query, head.key, head.value),
                block.attention.qkv.weight.split(D),
                block.attention.qkv.bias.split(D),
            ):
                linear.weight, linear.bias = nn.Parameter(weight[rows]), nn.Parameter(bias[rows])
            heads.append(head(normed))
        x = x + F.linear(torch.cat(heads, -1), block.attention.project.weight, block.attention.project.bias)
        normed = F.layer_norm(x, (D,), block.mlp_norm.weight, block.mlp_norm.bias)
        hidden = torch.relu(F.linear(normed, block.mlp.up.weight, block.mlp.up.bias))
        x = x + F.linear(hidden, block.mlp.project.weight, block.mlp.project.bias)
    return F.layer_norm(x, (D,), model.norm.weight, model.norm.bias) @ model.head.weight.T


def test_the_course_shape_computes_the_course_formulas() -> None:
    course = {"position": "sinusoidal", "norm": "layernorm", "mlp": "relu", "bias": True}
    model = gpt(**course, qk_norm=False, tie_embeddings=False, dropout=0.1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which start at zero
            parameter.normal_(std=0.2)
    tokens, targets = random_tokens(3, 24), random_tokens(3, 24).roll(-1, 1)
    logits, loss = model(tokens, targets)
    expected = course_logits(model, tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, F.cross_entropy(expected.view(-1, 37), targets.view(-1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads 5 does not divide d_model 32"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0: give 1 or more"),
        ({"num_kv_heads": 3}, "num_kv_heads 3 does not divide num_heads 4"),
        ({"d_model": 12}, "a head is 3 wide"),
        ({"d_model": 33, "num_heads": 1, "position": "sinusoidal"}, "d_model is 33: make it even"),
        ({"num_blocks": 0}, "num_blocks is 0: give 1 or more"),
        ({"dropout": 1.0}, "dropout is 1.0: give a probability"),
        ({"mlp": "geglu"}, "mlp is 'geglu': choose one of swiglu, gelu, relu, relu2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_shape_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**changes)


def test_more_tokens_than_the_context_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens, but context_length is 24: crop them"):
        gpt()(random_tokens(1, 25))
