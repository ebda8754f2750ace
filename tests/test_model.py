"""The GPT, compared with independent computations of the same numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lit_gpt.kv_cache import KVCache
from lit_gpt.model import GPT, GPTConfig, MultiHeadAttention
from lit_gpt.ops import IGNORE_INDEX

SHAPES: dict[str, dict[str, Any]] = {
    "rope, grouped heads": {"position": "rope", "num_kv_heads": 2},
    "rope, one key head": {"position": "rope", "num_kv_heads": 1, "qk_norm": False},
    "learned": {"position": "learned", "norm": "layernorm", "mlp": "gelu", "qk_norm": False},
    "sinusoidal": {"position": "sinusoidal", "norm": "layernorm", "mlp": "relu", "bias": True, "num_kv_heads": 2},
    "free head": {"mlp": "relu2", "tie_embeddings": False},
    "previous tokens": {"previous_tokens": 2},
    "no position": {"position": "none"},
    "no norm": {"norm": "none"},
    "wide heads": {"head_size": 12, "hidden_size": 40, "num_kv_heads": 2, "rope_base": 500.0, "norm_eps": 1e-3},
    "narrow heads": {"head_size": 6, "norm": "layernorm", "norm_eps": 1e-3, "mlp": "gelu_tanh"},
    "bias of qkv": {"qkv_bias": True, "qk_norm": False},
    "bias of norms": {"norm": "layernorm", "bias": True, "qkv_bias": False, "project_bias": False, "mlp_bias": False},
}


def gpt(**changes: Any) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 37, "context_length": 24, "d_model": 32, "num_blocks": 2, "num_heads": 4}
    model = GPT(GPTConfig(**{**shape, **changes})).eval()
    for parameter in model.previous.parameters():
        nn.init.normal_(parameter, std=0.02)  # they start out as nothing
    if (
        model.config.norm == "none"
    ):  # the initial weights are so small that, without norms, attention adds next to nothing
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 10
    return model


def random_tokens(*shape: int) -> Tensor:
    return torch.randint(37, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("norm", "function"), [("rmsnorm", F.rms_norm), ("layernorm", F.layer_norm)])
def test_qk_norm_is_the_norm_of_the_model(norm: str, function: Callable[..., Tensor]) -> None:
    attention, x = gpt(norm=norm).blocks[0].attention, torch.randn(5, 8) + 1
    for part in (attention.q_norm, attention.k_norm):
        torch.testing.assert_close(part(x), function(x, (8,), eps=part.eps))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_model_is_causal(shape: dict[str, Any]) -> None:
    model, tokens = gpt(**shape), random_tokens(3, 24)
    changed = tokens.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 37
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-6)
    assert (before[:, 10:] - after[:, 10:]).abs().amax(dim=-1).min() > 1e-4  # and every later one does change


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("cuts", [[1] * 24, [7, 1, 1, 15], [24]], ids=str)
def test_cached_logits_match_uncached(shape: dict[str, Any], cuts: list[int]) -> None:
    model, tokens = gpt(**shape), random_tokens(2, 24)
    cache = KVCache(model.config, 2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        pieces = [model(part, cache=cache)[0] for part in tokens.split(cuts, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens)[0], rtol=1e-4, atol=1e-5)
    assert cache.length == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_documents_in_one_window_match_separate_rows(shape: dict[str, Any], dtype: torch.dtype) -> None:
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
def test_gradients_of_documents_in_one_window_match_separate_rows(shape: dict[str, Any]) -> None:
    model, tokens = gpt(**shape), random_tokens(1, 24)
    targets = tokens.roll(-1, 1)
    documents = (torch.arange(24) >= 9).long()[None]
    together = torch.autograd.grad(24 * model.loss(tokens, targets, documents), list(model.parameters()))
    rows = [size * model.loss(tokens[:, part], targets[:, part]) for size, part in ((9, slice(9)), (15, slice(9, 24)))]
    apart = torch.autograd.grad(sum(rows, torch.zeros(())), list(model.parameters()))
    for one, other in zip(together, apart):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_position_matters(shape: dict[str, Any]) -> None:
    logits = gpt(**shape)(torch.tensor([[5, 9, 5, 9, 3]]))[0]
    swapped = gpt(**shape)(torch.tensor([[9, 5, 5, 9, 3]]))[0]
    assert (logits[0, -1] - swapped[0, -1]).abs().max() > 1e-5


def test_initial_loss_is_near_log_of_vocab_size() -> None:
    model = gpt(vocab_size=1000, d_model=64)
    tokens = torch.randint(1000, (8, 24), generator=torch.Generator().manual_seed(2))
    assert abs(model.loss(tokens, tokens.roll(-1, 1)).item() - math.log(1000)) < 0.2


@pytest.mark.parametrize("shape", [*SHAPES.values(), {"norm": "layernorm", "bias": True}], ids=[*SHAPES, "biases"])
def test_initial_weights_follow_gpt2(shape: dict[str, Any]) -> None:
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


def test_blocks_pass_their_input_on_at_first_with_zero_init() -> None:
    model = gpt(zero_init=True)
    assert not any(value.any() for name, value in model.named_parameters() if "project" in name)
    x, inputs = model.prepare_inputs(random_tokens(2, 8))
    torch.testing.assert_close(model.blocks(x, inputs), x, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_initial_weights_depend_only_on_seed(shape: dict[str, Any]) -> None:
    config = GPTConfig(vocab_size=37, d_model=32, num_blocks=2, num_heads=4, **shape)
    torch.manual_seed(5)
    now, another = GPT(config), GPT(config)
    torch.manual_seed(5)
    with torch.device("meta"):
        later = GPT(config)
        assert all(value.is_meta for value in (*later.parameters(), *later.buffers()))
    torch.rand(9)  # what else is drawn meanwhile
    later.to_empty(device="cpu").init_weights()
    assert (later.head.weight is later.embedding.weight) == config.tie_embeddings
    pairs = [dict(model.named_parameters()) | dict(model.named_buffers()) for model in (now, later)]
    for name, value in pairs[0].items():
        assert value.dtype == pairs[1][name].dtype == torch.float32
        assert torch.equal(value, pairs[1][name]), name
    assert not torch.equal(now.embedding.weight, another.embedding.weight)


def test_every_initial_weight_is_drawn_once() -> None:
    class Count(TorchDispatchMode):
        drawn = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default) and not args[0].is_meta:
                self.drawn += args[0].numel()
            return func(*args, **(kwargs or {}))

    with Count() as count:
        model = gpt(tie_embeddings=False)
    assert count.drawn == sum(value.numel() for value in model.parameters() if value.ndim == 2)


@pytest.mark.parametrize("with_documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evaluate_counts_nats_and_correct_targets(dtype: torch.dtype, with_documents: bool) -> None:
    model, tokens = gpt(), random_tokens(6, 24)
    documents = (torch.arange(24) >= 9).long().expand(6, 24) if with_documents else None
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(tokens, documents=documents)[0]
        targets = logits.argmax(dim=-1)  # (B, T)
        targets[:, ::3] = (targets[:, ::3] + 1) % 37
        targets[0, :5] = IGNORE_INDEX
        nats, correct = model.evaluate(tokens, targets, documents)
        with torch.no_grad():
            torch.testing.assert_close(nats, model.loss(tokens, targets, documents) * (6 * 24 - 5))
    expected = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum")
    torch.testing.assert_close(nats.double(), expected, rtol=1e-4, atol=0)
    # In bfloat16 two logits may be equal, and the shape of a product decides how it is rounded.
    assert abs(correct.item() - (6 * 16 - 3)) <= (3 if dtype == torch.bfloat16 else 0)
    assert not nats.requires_grad


@pytest.mark.filterwarnings("default")  # of the compiler
def test_evaluate_of_compiled_blocks_matches_eager_ones() -> None:
    model, tokens = gpt(), random_tokens(6, 24)
    expected = model.evaluate(tokens, tokens.roll(-1, 1))
    model.blocks.compile(backend="eager")
    torch.testing.assert_close(model.evaluate(tokens, tokens.roll(-1, 1)), expected)


def test_one_batch_can_be_overfitted() -> None:
    model = gpt().train()
    tokens, targets = random_tokens(4, 24), random_tokens(4, 24).roll(-1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.loss(tokens, targets)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_dropout_acts_in_training_only() -> None:
    model, tokens = gpt(dropout=0.5), random_tokens(2, 24)
    torch.testing.assert_close(model(tokens)[0], model(tokens)[0], rtol=0, atol=0)
    model.train()
    assert (model(tokens)[0] - model(tokens)[0]).abs().max() > 0.1


def test_activation_checkpointing_changes_no_bit() -> None:
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


def course_attention(attention: MultiHeadAttention, x: Tensor, num_heads: int) -> Tensor:
    """Return the course's `MultiHeadAttention`: its heads one by one, concatenated and projected, (B, T, D).

    The heads get the weights of `attention`. Where the course has no bias (queries, keys, values) ours may be zero.
    """
    D = x.shape[-1]
    heads = []
    for h in range(num_heads):
        head = CourseHead(D, D // num_heads)
        rows = slice(h * D // num_heads, (h + 1) * D // num_heads)
        for linear, weight, bias in zip(
            (head.query, head.key, head.value), attention.qkv.weight.split(D), attention.qkv.bias.split(D)
        ):
            linear.weight, linear.bias = nn.Parameter(weight[rows]), nn.Parameter(bias[rows])
        heads.append(head)
    y = torch.cat([head(x) for head in heads], dim=-1)  # (B, T, D)
    return F.linear(y, attention.project.weight, attention.project.bias)


def course_logits(model: GPT, tokens: Tensor) -> Tensor:
    """The course's formulas, head by head, with the weights of `model`. The bias it has on the head is not ours."""
    D, H = model.config.d_model, model.config.num_heads
    table = torch.zeros(model.config.context_length, D)
    position = torch.arange(model.config.context_length).float().unsqueeze(1)
    divisor = torch.exp(torch.arange(0, D, 2).float() * (-math.log(10000.0) / D))
    table[:, 0::2], table[:, 1::2] = torch.sin(position * divisor), torch.cos(position * divisor)
    x = model.embedding.weight[tokens] + table[: tokens.shape[1]]
    for block in model.blocks:
        normed = F.layer_norm(x, (D,), block.attention_norm.weight, block.attention_norm.bias)
        x = x + course_attention(block.attention, normed, H)
        normed = F.layer_norm(x, (D,), block.mlp_norm.weight, block.mlp_norm.bias)
        hidden = torch.relu(F.linear(normed, block.mlp.up.weight, block.mlp.up.bias))
        x = x + F.linear(hidden, block.mlp.project.weight, block.mlp.project.bias)
    return F.layer_norm(x, (D,), model.norm.weight, model.norm.bias) @ model.head.weight.T


def course_gpt() -> GPT:
    """A small model in the course's shape with random weights, biases included, which start at zero."""
    course = {"position": "sinusoidal", "norm": "layernorm", "mlp": "relu", "bias": True}
    model = gpt(**course, qk_norm=False, tie_embeddings=False, dropout=0.1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def test_attention_matches_heads_of_the_course() -> None:
    model, x = course_gpt(), torch.randn(3, 24, 32)
    attention = model.blocks[0].attention
    inputs = model.prepare_inputs(random_tokens(3, 24))[1]
    torch.testing.assert_close(attention(x, inputs), course_attention(attention, x, 4), rtol=1e-4, atol=1e-4)


def test_model_matches_formulas_of_the_course() -> None:
    model, tokens, targets = course_gpt(), random_tokens(3, 24), random_tokens(3, 24).roll(-1, 1)
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
        ({"mlp": "geglu"}, "mlp is 'geglu': choose one of swiglu, gelu, gelu_tanh, relu, relu2"),
        ({"d_model": 30}, "num_heads 4 does not divide d_model 30: change one, or give head_size"),
        ({"head_size": 0}, "head_size is 0: give 1 or more"),
        ({"head_size": 5}, r"a head is 5 wide \(head_size\): make it even"),
        ({"hidden_size": 0}, "hidden_size is 0: give 1 or more"),
        ({"rope_base": 0.0}, "rope_base is 0.0: give a number above 0"),
        ({"norm_eps": math.nan}, "norm_eps is nan: give a number above 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_config_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gpt(**changes)


def test_more_tokens_than_context_length_are_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens, but context_length is 24: crop them"):
        gpt()(random_tokens(1, 25))


# ---------------------------------------------------------------------------------------------------------- generate


def test_generate_appends_the_likeliest_tokens_with_top_k_of_one() -> None:
    model, prompt = gpt(), random_tokens(2, 5)
    tokens = prompt
    for _ in range(30):  # beyond the context of 24
        logits, _ = model(tokens[:, -24:])
        tokens = torch.cat((tokens, logits[:, -1].argmax(dim=-1, keepdim=True)), dim=1)
    torch.testing.assert_close(model.generate(prompt, 30, top_k=1), tokens)
    torch.testing.assert_close(model.generate(prompt, 0), prompt)


def test_generate_draws_from_the_softmax_at_temperature() -> None:
    model, prompt = gpt(), random_tokens(1, 5).expand(4000, 5)
    drawn = model.generate(prompt, 1, temperature=0.5, generator=torch.Generator().manual_seed(0))[:, -1]
    expected = (model(prompt[:1])[0][0, -1] / 0.5).softmax(dim=-1)  # (V,)
    found = torch.bincount(drawn, minlength=37) / 4000
    assert (found - expected).abs().max() < 4 * (expected * (1 - expected) / 4000).sqrt().max()
