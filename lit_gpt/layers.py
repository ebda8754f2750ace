"""The layers below a block: linear layers, embeddings, dropout, norms, activations and positions.

They differ from PyTorch's modules in two ways: they compute with `lit_gpt.ops`, and they draw no weights when they are
built. `GPT.init_weights` draws all weights, each with the standard deviation `std` of its layer. For the shape letters
see `model.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt import ops
from lit_gpt.kv_cache import KVCache


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, whatever the dtype of the weights.

    Args:
        in_features: D_in.
        out_features: D_out.
        bias: whether there is a bias.
        std: the standard deviation of the initial weights.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, std: float = 0.02) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the bias to zero; `GPT.init_weights` draws the weight."""
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)  # (..., D_out)


class Embedding(nn.Embedding):
    """A trained vector for each id or position; `std` is the standard deviation of the initial weights."""

    def __init__(self, num_embeddings: int, embedding_dim: int, std: float = 0.02) -> None:
        self.std = std
        super().__init__(num_embeddings, embedding_dim)

    def reset_parameters(self) -> None:
        """Leave the weight as it is: `GPT.init_weights` draws it."""


class Dropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014), with a mask that was drawn before or with one of its own."""

    @property
    def active_p(self) -> float:
        """The probability now: `p` in training, 0 in evaluation."""
        return self.p if self.training else 0.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return ops.dropout(x, self.active_p, mask)


# ----------------------------------------------------------------------------------------------------------- norms


class RMSNorm(nn.RMSNorm):
    """Root mean square normalisation (Zhang and Sennrich 2019). It has a scale and never a bias."""

    eps: float

    def __init__(self, width: int, bias: bool = False, eps: float | None = None) -> None:
        super().__init__(width, eps=1e-6 if eps is None else eps)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)  # (..., D)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016)."""

    def __init__(self, width: int, bias: bool = False, eps: float | None = None) -> None:
        super().__init__(width, eps=1e-5 if eps is None else eps, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.type_as(x)
        return F.layer_norm(x, self.normalized_shape, self.weight.type_as(x), bias, self.eps)  # (..., D)


# Without norms a deep model learns slowly or not at all: docs/course.md measures it.
NORMS = {"rmsnorm": RMSNorm, "layernorm": LayerNorm, "none": nn.Identity}


# ----------------------------------------------------------------------------------------------------- activations


def swiglu(x: Tensor) -> Tensor:
    """Gated SiLU (Shazeer 2020): (..., 2 * hidden) -> (..., hidden)."""
    gate, value = x.chunk(2, dim=-1)
    return F.silu(gate) * value


def relu2(x: Tensor) -> Tensor:
    """The square of ReLU (So et al. 2021), as a product: the gradient of `square` takes more passes over memory."""
    y = F.relu(x)
    return y * y


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its approximate form, with a tanh instead of the error function (Hendrycks and Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {
    "swiglu": swiglu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
}


# ------------------------------------------------------------------------------------------------------- positions

Positions = slice | Tensor  # of T tokens: a slice, or (B, T) where rows differ
CosSin = tuple[Tensor, Tensor] | None  # (T, E) each, or (B, 1, T, E)


class Position(nn.Module):
    """How positions enter: added to the embeddings, or as angles by which queries and keys are rotated."""

    def __init__(self, context_length: int, d_model: int, head_width: int, rope_base: float) -> None:
        super().__init__()

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the tables of positions on `device`. They are no weights, and no checkpoint holds them."""

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        """Add to the embeddings: (B, T, D) -> (B, T, D)."""
        return x

    def cos_sin(self, positions: Positions) -> CosSin:
        """Return what `apply_rotary_emb` takes."""
        return None


class Rotary(Position):
    """Rotate channels (i, i + E/2) of each head by an angle proportional to the position (Su et al. 2021)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, context_length: int, d_model: int, head_width: int, rope_base: float) -> None:
        super().__init__(context_length, d_model, head_width, rope_base)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(context_length, head_width), persistent=False)  # (T, E)
        self.base = rope_base

    def reset_buffers(self, device: torch.device) -> None:
        length, half = len(self.cos), self.cos.shape[1] // 2
        frequencies = self.base ** (-torch.arange(half, dtype=torch.float32, device=device) / half)  # (E/2,)
        angles = torch.outer(torch.arange(length, device=device), frequencies)  # (T, E/2)
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)  # (T, E)
        self.sin = torch.cat((-angles.sin(), angles.sin()), dim=-1)  # (T, E)

    def cos_sin(self, positions: Positions) -> CosSin:
        cos, sin = self.cos[positions], self.sin[positions]  # (T, E) or (B, T, E)
        return (cos, sin) if cos.ndim == 2 else (cos.unsqueeze(1), sin.unsqueeze(1))


def apply_rotary_emb(x: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotate queries or keys (B, H, T, E) -> (B, H, T, E), computed in the dtype of the angles."""
    if cos_sin is None:
        return x
    cos, sin = cos_sin
    wide = x.type_as(cos)
    return (wide * cos).addcmul(wide.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)


class Learned(Position):
    """Add one trained vector for each position (Radford et al. 2019)."""

    def __init__(self, context_length: int, d_model: int, head_width: int, rope_base: float) -> None:
        super().__init__(context_length, d_model, head_width, rope_base)
        self.table = Embedding(context_length, d_model)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        return x + self.table.weight[positions]  # (B, T, D)


class Sinusoidal(Position):
    """Add fixed waves of growing length, sine on even channels and cosine on odd ones (Vaswani et al. 2017)."""

    table: Tensor

    def __init__(self, context_length: int, d_model: int, head_width: int, rope_base: float) -> None:
        super().__init__(context_length, d_model, head_width, rope_base)
        self.register_buffer("table", torch.empty(context_length, d_model), persistent=False)  # (T, D)

    def reset_buffers(self, device: torch.device) -> None:
        length, width = self.table.shape
        even = torch.arange(0, width, 2, dtype=torch.float32, device=device)  # (D/2,)
        frequencies = torch.exp(even * (-math.log(10_000.0) / width))  # (D/2,)
        angles = torch.outer(torch.arange(length, device=device), frequencies)  # (T, D/2)
        self.table = torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)  # (T, D)

    def forward(self, x: Tensor, positions: Positions) -> Tensor:
        return x + self.table[positions]  # (B, T, D)


POSITIONS: dict[str, type[Position]] = {
    "rope": Rotary,
    "learned": Learned,
    "sinusoidal": Sinusoidal,
    "none": Position,  # only causality tells earlier tokens from later ones (Kazemnejad et al. 2023)
}


class PreviousTokens(nn.ModuleList):
    """Add embeddings of the n preceding tokens to each token's, from one table (V, D) per distance, initially zero."""

    def __init__(self, distances: int, vocab_size: int, d_model: int) -> None:
        super().__init__(Embedding(vocab_size, d_model, std=0.0) for _ in range(distances))

    def forward(self, x: Tensor, tokens: Tensor, cache: KVCache | None, documents: Tensor | None) -> Tensor:
        if len(self) == 0:
            return x
        history, is_token = (tokens, None) if cache is None else cache.append_tokens(tokens, len(self))
        for distance, embedding in enumerate(self, start=1):
            added = embedding(history[:, :-distance])  # (B, ..., D)
            if is_token is not None:
                added = added * is_token[:, :-distance].unsqueeze(-1)
            if documents is not None:
                added = added * (documents[:, distance:] == documents[:, :-distance]).unsqueeze(-1)
            x = x + F.pad(added, (0, 0, distance, 0))[:, -tokens.shape[1] :]  # (B, T, D)
        return x
