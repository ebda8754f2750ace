"""A GPT, top to bottom.

What it can do: rotary, learned or sinusoidal positions; RMSNorm or LayerNorm; SwiGLU, GELU, ReLU or ReLU² in the
feed-forward; grouped key/value heads; normalised queries and keys; a tied or free output head; documents in one window
that do not see each other; a key/value cache for generation; a training loss that holds the logits of some rows at a
time.

Shape letters:
    B  windows in a batch               D  width, d_model
    T  tokens in a window               H  query heads; K  key/value heads
    S  tokens attended to (cache + T)   E  width of one head, D / H
    V  vocabulary size                  N  tokens in a batch, B * T
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a target that counts in no loss, torch's own default
FEW_LOGITS = 2**21  # bytes in float32 up to which a CPU is faster with all of them than with `LinearCrossEntropy`


@dataclass
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: V, ids the tokenizer can give.
        context_length: T, the tokens the model sees at once.
        d_model: D, the width of the residual stream.
        num_blocks: how many blocks.
        num_heads: H, query heads; divides `d_model`.
        num_kv_heads: K, key/value heads, each shared by H / K query heads (Ainslie et al. 2023); None: as many as query
            heads.
        dropout: probability of zeroing, on embeddings, attention weights and both branches' outputs.
        bias: whether linear layers and LayerNorm carry a bias.
        position: how a token's place enters.
        norm: normalisation before each branch and before the head, and that of `qk_norm`.
        mlp: the feed-forward.
        qk_norm: whether each head's queries and keys are normalised too (Dehghani et al. 2023).
        tie_embeddings: the head shares the embedding's matrix (Press and Wolf 2017).
        previous_tokens: how many tokens back add to a token's embedding, each distance from a table of its own.

    Raises:
        ValueError: a number is out of range, a slot has no such value, or heads do not divide.
    """

    vocab_size: int
    context_length: int = 64
    d_model: int = 128
    num_blocks: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    dropout: float = 0.0
    bias: bool = False
    position: Literal["rope", "learned", "sinusoidal"] = "rope"
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    mlp: Literal["swiglu", "gelu", "relu", "relu2"] = "swiglu"
    qk_norm: bool = True
    tie_embeddings: bool = True
    previous_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_blocks", "num_heads", "num_kv_heads"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} is {number}: give 1 or more")
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"{field.name} is {value!r}: choose one of {', '.join(choices)}")
        if not 0 <= self.previous_tokens < self.context_length:
            raise ValueError(f"previous_tokens is {self.previous_tokens}: give 0 or more, fewer than context_length")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}: give a probability from 0 up to, not including, 1")
        if self.d_model % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide d_model {self.d_model}: change one")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}: change one")
        if self.position == "rope" and self.head_size % 2:
            raise ValueError(
                f"rope turns pairs, but a head is {self.head_size} wide (d_model {self.d_model} / num_heads "
                f"{self.num_heads}): make it even or choose another position"
            )
        if self.position == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"sinusoidal positions come in pairs, but d_model is {self.d_model}: make it even")

    @property
    def kv_heads(self) -> int:
        """K, with None resolved."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """E, the width of one head."""
        return self.d_model // self.num_heads


def wider(kind: torch.dtype) -> torch.dtype:
    """The type in which many numbers of `kind` are added up: float32, or what is wider."""
    return torch.promote_types(kind, torch.float32)


class Linear(nn.Linear):
    """The product is taken in the type of what comes in, whatever type the weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.type_as(x), None if self.bias is None else self.bias.type_as(x))


# ------------------------------------------------------------------------------------------------------- dropout


def kept(count: int, probability: float, kind: torch.dtype) -> Tensor:
    """What `count` numbers on a CPU are multiplied by: 0 with `probability`, else what keeps the mean: (count,).

    Four share a random number of 64 bits, in 2**16 cases of whose 16 each some are zeroed: a third of what torch's own
    takes. As there, what keeps the mean is rounded to `kind`, in bfloat16 by up to 0.2%.
    """
    below = min(round(probability * 2**16), 2**16 - 1)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)[:count]
    return (numbers >= below - 2**15).view(torch.uint8).to(kind).mul_(2**16 / (2**16 - below))


class Dropout(nn.Dropout):
    """Zeroes at random (Srivastava et al. 2014), by a mask that was drawn before or, without one, by its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return x * mask
        return F.dropout(x, self.p) if self.training and self.p else x


# a block has three: for shares (B * H, T, T), for what attention and feed-forward add to the stream (B, T, D) each
Masks = list[Tensor | None]


def draw_masks(config: GPTConfig, batch_size: int, length: int, kind: torch.dtype, shares: bool) -> Masks:
    """All masks of a forward pass on a CPU, drawn at once, in the order they are used.

    One for the embeddings (B, T, D), then a block's three after the other, of which the first is None without `shares`.
    """
    B, T = batch_size, length
    stream, scores = (B, T, config.d_model), (B * config.num_heads, T, T) if shares else (0,)
    shapes = [stream] + [scores, stream, stream] * config.num_blocks
    drawn = kept(sum(map(math.prod, shapes)), config.dropout, kind).split([math.prod(shape) for shape in shapes])
    return [part.view(shape) if len(part) else None for part, shape in zip(drawn, shapes)]


# ---------------------------------------------------------------------------------------------------------- norm


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019. Has a scale, never a bias."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        # without gradients torch's own is as fast, and a compiler makes one loop of it
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            y: Tensor = RootMeanSquare.apply(x, self.weight, self.eps)
            return y
        # of one type, which the fused kernels ask for; they add up in float32 all the same
        return F.rms_norm(x, self.normalized_shape, self.weight.type_as(x), self.eps)


class RootMeanSquare(torch.autograd.Function):
    """What `F.rms_norm` computes, in float32 or more, leaving for the backward pass what came in and a number a row.

    Torch's own, on a CPU, leaves two float32 copies of what came in, and its backward pass takes twice as long.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., D), weight (D,) -> (..., D)."""
        wide = x.to(wider(x.dtype), copy=True)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return wide.mul_(scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        unit, grad = x.to(scale.dtype, copy=True).mul_(scale), grad.to(scale.dtype)  # (..., D) each
        both = grad * unit  # (..., D)
        along = (both @ weight.to(scale.dtype)).unsqueeze(-1).div_(-x.shape[-1])  # (..., 1)
        grad_x = unit.mul_(along).addcmul_(grad, weight).mul_(scale).to(x.dtype)  # (..., D)
        return grad_x, both.flatten(0, -2).sum(0).to(weight.dtype), None


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016."""

    def __init__(self, width: int, bias: bool = False) -> None:
        super().__init__(width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), bias, self.eps)


NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm}


# ------------------------------------------------------------------------------------------------------ position


Places = slice | Tensor
Angles = tuple[Tensor, Tensor] | None  # cosines and sines, of two axes or four: (T, E) or (B, 1, T, E)


class Position(nn.Module):
    """How a token's place enters: added to the embeddings, or as angles that queries and keys turn by. Here neither.

    `places` are those of the T tokens: a slice, or (B, T) where they differ from row to row.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()

    def fill(self, device: torch.device) -> None:
        """Computes the tables it has beside its weights, which no checkpoint holds."""

    def add(self, x: Tensor, places: Places) -> Tensor:
        """Embeddings (B, T, D) -> (B, T, D)."""
        return x

    def angles(self, places: Places) -> Angles:
        """What `turned` takes."""
        return None


class Rotary(Position):
    """Turns pairs (i, i + E/2) of a head by an angle that grows with the place (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(config.context_length, config.head_size), persistent=False)  # (T, E)

    def fill(self, device: torch.device) -> None:
        length, half = len(self.cos), self.cos.shape[1] // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)  # (E/2,)
        angles = torch.outer(torch.arange(length), frequencies)  # (T, E/2)
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device)  # (T, E)
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device)  # (T, E)

    def angles(self, places: Places) -> Angles:
        cos, sin = self.cos[places], self.sin[places]  # (T, E) or (B, T, E)
        return (cos, sin) if cos.ndim == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))


def turned(x: Tensor, angles: Angles) -> Tensor:
    """Queries or keys (B, H, T, E) -> (B, H, T, E)."""
    if angles is None:
        return x
    cos, sin = angles
    wide = x.type_as(cos)
    return (wide * cos).addcmul(wide.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


class Learned(Position):
    """One trained vector a place (GPT-2)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.table = nn.Embedding(config.context_length, config.d_model)

    def add(self, x: Tensor, places: Places) -> Tensor:
        return x + self.table.weight[places]  # (B, T, D)


class Sinusoidal(Position):
    """Fixed waves of growing length, sine on even and cosine on odd channels (Vaswani et al. 2017)."""

    table: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        self.register_buffer("table", torch.empty(config.context_length, config.d_model), persistent=False)  # (T, D)

    def fill(self, device: torch.device) -> None:
        length, width = self.table.shape
        even = torch.arange(0, width, 2, dtype=torch.float32)  # (D/2,)
        angles = torch.outer(torch.arange(length), torch.exp(even * (-math.log(10_000.0) / width)))  # (T, D/2)
        self.table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2).to(device)  # (T, D)

    def add(self, x: Tensor, places: Places) -> Tensor:
        return x + self.table[places]  # (B, T, D)


POSITIONS: dict[str, type[Position]] = {"rope": Rotary, "learned": Learned, "sinusoidal": Sinusoidal}


# ----------------------------------------------------------------------------------------------------- attention


class KVCache:
    """The keys and values of the tokens read so far, one pair of tensors (B, K, context_length, E) a block.

    Passed to `GPT.forward`, which reads it, fills it and moves `length` on. Texts of unequal length stand flush right:
    before a shorter one is padding, which nothing sees.

    Args:
        config: of the model.
        batch_size: B.
        device: where it lies.
        dtype: of the stream.
        padding: (B,) how many tokens at the left of each row are none; None: no row has any.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        padding: Tensor | None = None,
    ) -> None:
        shape = (batch_size, config.kv_heads, config.context_length, config.head_size)
        self.length, self.padding = 0, padding
        self.latest = torch.empty(batch_size, 0, device=device, dtype=torch.long)  # what previous_tokens looks back on
        self.keys = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_blocks)]
        self.values = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.num_blocks)]

    def append(self, block: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores T new keys and values (B, K, T, E); returns all S of them (B, K, S, E)."""
        end = self.length + k.shape[-2]
        self.keys[block][:, :, self.length : end] = k
        self.values[block][:, :, self.length : end] = v
        return self.keys[block][:, :, :end], self.values[block][:, :, :end]


def attention_by_products(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, dropout: Tensor | None = None) -> Tensor:
    """Attention of q (B, H, T, E) on k and v (B, K, T, E), holding (B, H, T, T): -> (B, H, T, E).

    In bfloat16 on a CPU, torch's own takes three to four times as long at a T of 64 and 256, there and back; with
    dropout it holds as much.

    Args:
        q: queries.
        k: keys.
        v: values.
        bias: added to the scores, (T, T) or (B * H, T, T): -inf where a token does not see another.
        dropout: (B * H, T, T) that the shares are multiplied by.
    """
    B, H, T, E = q.shape
    if k.shape[1] < H:
        k, v = (part.repeat_interleave(H // k.shape[1], dim=1) for part in (k, v))  # (B, H, T, E)
    q, k, v = (part.reshape(B * H, T, E) for part in (q, k, v))
    shares = torch.baddbmm(bias, q, k.mT, alpha=1 / math.sqrt(E)).softmax(dim=-1)  # (B * H, T, T)
    if dropout is not None:
        shares = shares * dropout
    return (shares @ v).view(B, H, T, E)


class Attention(nn.Module):
    """Causal attention over H query heads and K key/value heads."""

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.grouped = config.kv_heads < config.num_heads
        self.widths = [config.d_model, config.kv_heads * config.head_size, config.kv_heads * config.head_size]
        self.qkv = Linear(config.d_model, sum(self.widths), bias=config.bias)
        self.q_norm = NORMS[config.norm](config.head_size, config.bias) if config.qk_norm else nn.Identity()
        self.k_norm = NORMS[config.norm](config.head_size, config.bias) if config.qk_norm else nn.Identity()
        self.project = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        cache: KVCache | None,
        seen: Tensor | None,
        dropout: Tensor | None,
    ) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            part.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H or K, T, E)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        q, k = turned(self.q_norm(q), angles), turned(self.k_norm(k), angles)  # (B, H, T, E), (B, K, T, E)
        if cache is not None:
            k, v = cache.append(self.block, k, v)  # (B, K, S, E)
        if seen is not None and seen.is_floating_point():
            y = attention_by_products(q, k, v, seen, dropout)  # (B, H, T, E)
        else:
            causal = seen is None and T > 1  # without a mask, one token sees everything, and many start from nothing
            share = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, dropout_p=share, is_causal=causal, enable_gqa=self.grouped
            )  # (B, H, T, E)
        return self.project(y.transpose(1, 2).reshape(B, T, D))  # (B, T, D)


# -------------------------------------------------------------------------------------------------- feed-forward


class FeedForward(nn.Module):
    """D -> hidden -> D with an activation between."""

    def __init__(self, config: GPTConfig, hidden: int | None = None, gates: int = 1) -> None:
        super().__init__()
        hidden = hidden or 4 * config.d_model
        self.up = Linear(config.d_model, gates * hidden, bias=config.bias)
        self.project = Linear(hidden, config.d_model, bias=config.bias)

    def activation(self, x: Tensor) -> Tensor:
        raise NotImplementedError  # each slot says its own

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.activation(self.up(x)))  # (B, T, D)


class ReLU(FeedForward):
    def activation(self, x: Tensor) -> Tensor:
        return F.relu(x)


class ReLU2(FeedForward):
    """So et al. 2021."""

    def activation(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        return y * y  # `square` goes back through a power, in more passes


class GELU(FeedForward):
    """Hendrycks and Gimpel 2016."""

    def activation(self, x: Tensor) -> Tensor:
        return F.gelu(x)


class SwiGLU(FeedForward):
    """Shazeer 2020. A hidden width of 8/3 D, rounded up to 32, costs what 4 D costs without the gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config, hidden=32 * math.ceil(8 * config.d_model / 3 / 32), gates=2)

    def activation(self, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value


MLPS: dict[str, type[FeedForward]] = {"swiglu": SwiGLU, "gelu": GELU, "relu": ReLU, "relu2": ReLU2}


# ------------------------------------------------------------------------------------------------------- the GPT


class Block(nn.Module):
    """Attention, then feed-forward; each normalised on the way in and added to what it read."""

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__()
        self.attention_norm = NORMS[config.norm](config.d_model, config.bias)
        self.attention = Attention(config, block)
        self.mlp_norm = NORMS[config.norm](config.d_model, config.bias)
        self.mlp = MLPS[config.mlp](config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        cache: KVCache | None,
        seen: Tensor | None,
        masks: Masks,
    ) -> Tensor:
        shares, first, second = masks
        x = x + self.dropout(self.attention(self.attention_norm(x), angles, cache, seen, shares), first)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), second)  # (B, T, D)


# what `Blocks` takes: the stream (B, T, D), angles, cache, what is seen, masks
Given = tuple[Tensor, Angles, KVCache | None, Tensor | None, Masks]


class Blocks(nn.ModuleList):
    """Block after block.

    Attributes:
        activation_checkpointing: compute what is inside a block again for its backward pass, not keep it.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(Block(config, block) for block in range(config.num_blocks))
        self.activation_checkpointing = False

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        cache: KVCache | None,
        seen: Tensor | None,
        masks: Masks,
    ) -> Tensor:
        for i, block in enumerate(self):
            given = (angles, cache, seen, masks[3 * i : 3 * i + 3])
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, *given, use_reentrant=False)  # (B, T, D)
            else:
                x = block(x, *given)  # (B, T, D)
        return x


class GPT(nn.Module):
    """Tokens in, next-token logits out.

    Built under `torch.device("meta")` it has shapes alone, until it gets memory and then weights: by `initialise`, or
    from elsewhere and `complete`.

    Attributes:
        seed: what the weights are drawn from, itself drawn from torch's own generator.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.seed = int(torch.empty((), dtype=torch.int64, device="cpu").random_())
        with torch.device("meta"):  # where torch's own initialisers draw nothing
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.previous = nn.ModuleList(
                nn.Embedding(config.vocab_size, config.d_model) for _ in range(config.previous_tokens)
            )
            self.position = POSITIONS[config.position](config)
            self.dropout = Dropout(config.dropout)
            self.blocks = Blocks(config)
            self.norm = NORMS[config.norm](config.d_model, config.bias)
            self.head = Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        device = torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
            self.initialise()

    @torch.no_grad()
    def initialise(self, part: Callable[[Tensor, Tensor], Tensor] = lambda whole, parameter: whole) -> None:
        """GPT-2's start: N(0, 0.02), and less where 2 * num_blocks branches add up in the residual stream.

        One whole matrix after the other is drawn, on the CPU, so that the weights are the same wherever they lie.

        Args:
            part: what a parameter takes of a whole one, where it is a slice.
        """
        self.complete()
        generator = torch.Generator("cpu").manual_seed(self.seed)
        residual = 0.02 / math.sqrt(2 * self.config.num_blocks)
        for name, parameter in self.named_parameters():
            whole = torch.zeros(parameter.shape, dtype=parameter.dtype, device="cpu")
            if parameter.ndim == 1:
                whole += name.endswith("weight")  # scales; biases are 0
            elif not name.startswith("previous"):
                whole.normal_(std=residual if name.endswith("project.weight") else 0.02, generator=generator)
            parameter.copy_(part(whole, parameter))

    def complete(self) -> None:
        """Gives a model whose weights have got memory what it has beside them: a tied head, tables of positions."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        with torch.device("cpu"):
            self.position.fill(self.embedding.weight.device)

    def embed(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Tensor:
        """Tokens (B, T) -> (B, T, D), with what the tokens before each add to it; before the first there are none."""
        # where the head's gradient has every row anyway, only those of these tokens are added to it
        sparse = self.config.tie_embeddings and tokens.device.type == "cpu"
        x = F.embedding(tokens, self.embedding.weight, sparse=sparse)  # (B, T, D)
        if not self.previous:
            return x
        seen = tokens if cache is None else torch.cat((cache.latest, tokens), dim=1)  # (B, up to n more + T)
        first = 0 if cache is None else cache.length + tokens.shape[1] - seen.shape[1]  # column of the first one seen
        for distance, table in enumerate(self.previous, start=1):
            more = table(seen[:, :-distance])  # (B, …, D)
            if cache is not None and cache.padding is not None:
                columns = first + torch.arange(more.shape[1], device=tokens.device)
                more = more * (columns >= cache.padding[:, None]).unsqueeze(-1)
            if documents is not None:
                more = more * (documents[:, distance:] == documents[:, :-distance]).unsqueeze(-1)
            x = x + F.pad(more, (0, 0, distance, 0))[:, -tokens.shape[1] :]  # (B, T, D)
        if cache is not None:
            cache.latest = seen[:, -len(self.previous) :]
        return x

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """The normalised residual stream the head reads: tokens (B, T) -> (B, T, D).

        Under autocast the whole stream is of its type, so that nothing is cast back and forth: weights are cast once
        for their product, sums inside norms, softmax and products are float32 in the kernels.

        Raises:
            ValueError: T, with what the cache holds, is more than `context_length`.
        """
        given = self._begin(tokens, cache, documents)
        with torch.autocast(tokens.device.type, enabled=False):
            x: Tensor = self.norm(self.blocks(*given))  # (B, T, D)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def _begin(self, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Given:
        """What the blocks take: the stream as it begins (B, T, D), and all they need beside it."""
        start = cache.length if cache is not None else 0
        end = start + tokens.shape[1]
        if end > self.config.context_length:
            raise ValueError(f"{end} tokens, but context_length is {self.config.context_length}: crop them")
        places, seen = self._seen(start, end, cache, documents, tokens.device)
        device, kind = tokens.device.type, self.embedding.weight.dtype
        if torch.is_autocast_enabled(device):
            kind = torch.get_autocast_dtype(device)
        drops = self.training and self.config.dropout > 0
        shortest = 1 if drops else 32 if kind == torch.bfloat16 else math.inf
        by_products = device == "cpu" and cache is None and shortest <= end <= 512
        if by_products:
            seen = self._bias(seen, len(tokens), end, kind)
        masks: Masks = [None] * (1 + 3 * len(self.blocks))
        if drops and device == "cpu":
            masks = draw_masks(self.config, len(tokens), end, kind, by_products)
        x = self.position.add(self.embed(tokens, cache, documents), places)  # (B, T, D)
        x = self.dropout(x, masks[0]).to(kind)  # (B, T, D)
        return x, self.position.angles(places), cache, seen, masks[1:]

    def _seen(
        self, start: int, end: int, cache: KVCache | None, documents: Tensor | None, device: torch.device
    ) -> tuple[Places, Tensor | None]:
        """The places of tokens `start` to `end`, and what each may see, where that is neither all nor a triangle.

        Row t of a mask sees the S - T tokens before and itself: (T, S), or with padding or documents (B, 1, T, S).
        """
        if documents is not None:
            assert cache is None  # a text that is being written is one document
            columns = torch.arange(end, device=device)  # (T,)
            begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))  # (B, T)
            places = columns - (columns * begins).cummax(dim=1).values  # (B, T), from 0 in each document
            same = documents[:, None, :, None] == documents[:, None, None, :]  # (B, 1, T, T)
            return places, same & torch.ones(end, end, dtype=torch.bool, device=device).tril()
        padding = cache.padding if cache is not None else None
        if padding is None and (start == 0 or end - start == 1):
            return slice(start, end), None
        mask = torch.ones(end - start, end, dtype=torch.bool, device=device).tril(start)  # (T, S)
        if padding is None:
            return slice(start, end), mask
        columns = torch.arange(end, device=device)  # (S,)
        places = (columns[start:] - padding[:, None]).clamp(min=0)  # (B, T)
        visible = mask & (columns >= padding[:, None])[:, None, None]  # (B, 1, T, S)
        return places, visible | torch.eye(end, dtype=torch.bool, device=device)[start:]  # padding sees itself: no NaN

    def _bias(self, seen: Tensor | None, batch_size: int, length: int, kind: torch.dtype) -> Tensor:
        """What added to scores leaves those of tokens that are seen: (T, T), or with a mask (B * H, T, T)."""
        if seen is None:
            return torch.full((length, length), -torch.inf, dtype=kind).triu(1)
        shape = (batch_size, self.config.num_heads, length, length)
        return torch.zeros(shape, dtype=kind).masked_fill(~seen, -torch.inf).flatten(0, 1)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of every position, and with targets the loss.

        Args:
            tokens: (B, T) ids.
            targets: (B, T) ids, each the token after; `IGNORE` counts in no loss.
            cache: what came before `tokens`; filled on the way.
            documents: (B, T) which document each token is of; it sees, and counts its place in, its own alone. None:
                all are one.

        Returns:
            Logits (B, T, V) and the mean loss in nats per token, or None without targets.
        """
        logits = self.head(self.hidden(tokens, cache, documents))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, plain_loss(logits, targets)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        reduction: Literal["mean", "sum"] = "mean",
        documents: Tensor | None = None,
    ) -> Tensor:
        """The loss `forward` gives, in nats, without holding more than a chunk of logits: the mean, or the sum."""
        few = tokens.numel() * self.config.vocab_size * torch.float32.itemsize <= FEW_LOGITS
        if few and tokens.device.type == "cpu" and torch.is_grad_enabled():
            given = self._begin(tokens, None, documents)
            with torch.autocast("cpu", enabled=False):
                return self.loss_at_once(given, targets, reduction)
        hidden = self.hidden(tokens, documents=documents).flatten(0, 1)  # (N, D)
        if hidden.dtype == torch.float16:  # too narrow for shares of a vocabulary, and for a mean over many tokens
            hidden = hidden.float()
        targets = targets.flatten()  # (N,)
        # inside an autograd function no one can see that gradients are off: then the head must not ask for one
        weight = self.head.weight if torch.is_grad_enabled() else self.head.weight.detach()  # (V, D)
        scale = 1 / (targets != IGNORE).sum().to(wider(hidden.dtype)) if reduction == "mean" else None
        with torch.autocast(hidden.device.type, enabled=False):  # which on a GPU would take the softmax in float32
            loss: Tensor = LinearCrossEntropy.apply(hidden, weight, targets, scale)
        return loss

    def loss_at_once(self, given: Given, targets: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
        """The loss from what `_begin` gives on, holding all logits: one graph, where blocks are compiled.

        The embeddings are not of it: compiled, their gradients are added up in whatever order threads come.
        """
        return plain_loss(self.head(self.norm(self.blocks(*given))), targets, reduction)


def plain_loss(logits: Tensor, targets: Tensor, reduction: Literal["mean", "sum"] = "mean") -> Tensor:
    """Cross entropy of logits (…, V) with targets (…), in float32 or more: a scalar in nats."""
    wide = logits.flatten(0, -2).to(wider(logits.dtype))  # (N, V)
    return F.cross_entropy(wide, targets.flatten(), ignore_index=IGNORE, reduction=reduction)


class LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy of `hidden @ weight.T`, some rows of logits at a time.

    The gradients are taken in the forward pass, while a chunk's logits are at hand, so that nothing is computed twice
    and no more than a chunk of logits ever lives (as in Liger Kernel, Hsu et al. 2024). Products are taken in hidden's
    type and added up in float32 or more. A target less likely than the least number of that, in float32 e^-87, counts
    as just that.
    """

    # bytes of logits in a chunk, of which two are held: fewer are slower; on a CPU more are fresh memory each time, far
    # slower
    CHUNK: ClassVar = {"cpu": 2**25, "cuda": 2**30}
    COLUMNS: ClassVar = {"cpu": 2**12}  # whose products are added up at once, while they are in the cache
    MULTIPLE: ClassVar = {"cuda": 64}  # of columns, for which products have fast kernels; those added are impossible

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, scale: Tensor | None = None) -> Tensor:
        """hidden (N, D), weight (V, D), targets (N,) -> a scalar in nats, times `scale`."""
        want_hidden, want_weight, *_ = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight: Tensor | None = None
        wide = wider(hidden.dtype)
        total = torch.zeros((), device=hidden.device, dtype=wide)
        kind, vocabulary = weight.dtype, len(weight)
        weight, device = weight.type_as(hidden), weight.device.type
        more = -vocabulary % LinearCrossEntropy.MULTIPLE.get(device, 1)
        if more:
            weight = F.pad(weight, (0, 0, 0, more))  # (V and more, D)
        evaluating = not want_hidden and not want_weight  # then in what they are added up in
        held = len(targets) * len(weight) * (wide if evaluating else hidden.dtype).itemsize  # bytes of all logits
        chunks = math.ceil(held / LinearCrossEntropy.CHUNK.get(device, LinearCrossEntropy.CHUNK["cpu"]))
        rows = max(1, math.ceil(len(targets) / max(1, chunks)))  # of a chunk
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            logits = hidden[chunk] @ weight.T  # (n, V)
            if more:
                logits[:, vocabulary:] = -torch.inf
            if evaluating:
                total += plain_loss(logits, targets[chunk], "sum")
                continue
            counted = (targets[chunk] != IGNORE).unsqueeze(-1)  # (n, 1)
            share = counted if scale is None else counted * scale.to(wide)  # (n, 1)
            grad = logits.softmax(dim=-1)  # (n, V), computed in float32 or more
            del logits
            picked = torch.arange(len(grad), device=grad.device), targets[chunk].clamp(min=0)  # (n,) each
            likely = grad[picked].to(wide)  # (n,)
            grad[picked] = 0  # to scatter into it would copy a whole bfloat16 chunk
            others = grad.sum(dim=-1)  # (n,); from `likely`, which is rounded, 1 - likely is nothing near 1
            grad[picked] = -others
            others, least = others.to(wide), torch.finfo(wide).tiny
            nats = torch.where(others < 0.5, -torch.log1p(-others), -likely.clamp(min=least).log())  # (n,)
            total += (nats * counted.squeeze(-1)).sum()
            if grad_hidden is not None:
                grad_hidden[chunk] = grad @ weight * share  # (n, D)
            if want_weight:
                scaled = (hidden[chunk] * share).type_as(hidden)  # (n, D)
                first = grad_weight is None
                if grad_weight is None:
                    grad_weight = torch.empty_like(weight, dtype=wide)  # (V, D)
                if device == "cuda" or hidden.dtype == wide:
                    narrow: dict[str, Any] = {} if hidden.dtype == wide else {"out_dtype": wide}
                    torch.addmm(grad_weight, grad.T, scaled, beta=0 if first else 1, out=grad_weight, **narrow)
                else:
                    columns = LinearCrossEntropy.COLUMNS.get(device, len(weight))
                    for some, so_far in zip(grad.T.split(columns), grad_weight.split(columns)):
                        so_far.copy_(some @ scaled) if first else so_far.add_((some @ scaled).to(wide))
            del grad  # before the next
        ctx.grads = grad_hidden, None if grad_weight is None else grad_weight[:vocabulary].to(kind)
        return total if scale is None else total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        grads = ctx.grads
        del ctx.grads  # used up, in place: the larger is as large as the embedding
        if grad.device.type != "cpu" or grad != 1:  # elsewhere, to ask would be to wait
            for each in grads:
                if each is not None:
                    each.mul_(grad)
        return *grads, None, None
