"""A GPT, top to bottom: config, attention, feed-forward, block, GPT.

`layers.py` holds the smaller parts: linear layers, embeddings, norms, activations, positions. Both use `ops/`.

Shape letters:
    B  windows in a batch               D  width of the residual stream, d_model
    T  tokens in a window               H  query heads; K  key/value heads
    S  tokens attended to (cache + T)   E  width of one head, D / H by default
    V  vocabulary size                  N  tokens in a batch, B * T
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args, get_origin

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt import ops
from lit_gpt.kv_cache import KVCache
from lit_gpt.layers import ACTIVATIONS, NORMS, POSITIONS, Dropout, Embedding, Linear, PreviousTokens, apply_rotary_emb
from lit_gpt.sampling import MIN_TEMPERATURE, keep_likeliest


@dataclass
class GPTConfig:
    """The shape of a GPT.

    Attributes:
        vocab_size: V, the number of ids the tokenizer has.
        context_length: T, the number of tokens that the model sees at once.
        d_model: D, the width of the residual stream.
        num_blocks: Number of blocks, the depth of the model.
        num_heads: H, the number of query heads. It divides `d_model`, unless `head_size` is given.
        num_kv_heads: K, the number of key/value heads, each shared by H / K query heads (Ainslie et al. 2023). None: H.
        head_size: E, the width of one head. None: D / H.
        hidden_size: The width of the feed-forward. None: 4 D, and 8/3 D rounded up to a multiple of 32 with a gate.
        dropout: Probability of zeroing embeddings, attention weights and the outputs of attention and feed-forward.
        bias: Whether linear layers and LayerNorm have a bias.
        qkv_bias: Whether the layer that computes queries, keys and values has one. None: as `bias`.
        project_bias: Whether the last layer of attention has one. None: as `bias`.
        mlp_bias: Whether the layers of the feed-forward have one. None: as `bias`.
        position: How the position of a token enters the model. "none": it does not.
        rope_base: "rope" rotates channel pair i of E / 2 by rope_base^(-2 i / E) radians for each token.
        norm: Type of all normalisation layers: before attention, feed-forward and head, and of `qk_norm`. "none":
            nothing is normalised.
        norm_eps: Added to the mean square or the variance in a norm. None: 1e-6 for "rmsnorm", 1e-5 for "layernorm".
        mlp: Activation of the feed-forward. "gelu_tanh" approximates "gelu" by a tanh, as GPT-2 does.
        qk_norm: Whether the queries and keys of each head are normalised (Dehghani et al. 2023).
        tie_embeddings: Whether the head shares the weight of the embedding (Press and Wolf 2017).
        previous_tokens: Number of earlier tokens whose embeddings are added to a token's, from one table per distance.
        zero_init: Whether the matrices whose output is added to the residual stream start at zero.

    Raises:
        ValueError: a number is out of range, a choice is unknown, or the heads do not divide the width.
    """

    vocab_size: int
    context_length: int = 64
    d_model: int = 128
    num_blocks: int = 4
    num_heads: int = 4
    num_kv_heads: int | None = None
    head_size: int | None = None
    hidden_size: int | None = None
    dropout: float = 0.0
    bias: bool = False
    qkv_bias: bool | None = None
    project_bias: bool | None = None
    mlp_bias: bool | None = None
    position: Literal["rope", "learned", "sinusoidal", "none"] = "rope"
    rope_base: float = 10_000.0
    norm: Literal["rmsnorm", "layernorm", "none"] = "rmsnorm"
    norm_eps: float | None = None
    mlp: Literal["swiglu", "gelu", "gelu_tanh", "relu", "relu2"] = "swiglu"
    qk_norm: bool = True
    tie_embeddings: bool = True
    previous_tokens: int = 0
    zero_init: bool = False

    def __post_init__(self) -> None:
        def check(valid: bool, message: str) -> None:
            if not valid:
                raise ValueError(message)

        sizes = ("vocab_size", "context_length", "d_model", "num_blocks", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_size", "hidden_size"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"{name} is {value}: give 1 or more")
        for name, below in (("rope_base", math.inf), ("norm_eps", 1)):
            value = getattr(self, name)
            check(value is None or 0 < value < below, f"{name} is {value}: give a number above 0 and below {below}")
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            valid = get_origin(field.type) is not Literal or value in choices
            check(valid, f"{field.name} is {value!r}: choose one of {', '.join(map(str, choices))}")
        n, p = self.previous_tokens, self.dropout
        D, H, K, E = self.d_model, self.num_heads, self.kv_heads, self.head_width
        check(0 <= n < self.context_length, f"previous_tokens is {n}: give 0 or more, fewer than context_length")
        check(0 <= p < 1, f"dropout is {p}: give a probability from 0 up to, not including, 1")
        divides = self.head_size is not None or D % H == 0
        check(divides, f"num_heads {H} does not divide d_model {D}: change one, or give head_size")
        check(H % K == 0, f"num_kv_heads {K} does not divide num_heads {H}: change one")
        source = f"d_model {D} / num_heads {H}" if self.head_size is None else "head_size"
        heads = f"a head is {E} wide ({source}): make it even or choose another position"
        check(self.position != "rope" or E % 2 == 0, f"rope rotates pairs of channels, but {heads}")
        sinusoidal = f"sinusoidal positions come in pairs of channels, but d_model is {D}: make it even"
        check(self.position != "sinusoidal" or D % 2 == 0, sinusoidal)

    @property
    def kv_heads(self) -> int:
        """K, with None resolved."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        """E, the width of one head."""
        return self.head_size or self.d_model // self.num_heads

    @property
    def attention_width(self) -> int:
        """H * E, the width of all queries and of what the last layer of attention reads."""
        return self.num_heads * self.head_width

    @property
    def hidden_width(self) -> int:
        """The width of the feed-forward, after the gate if there is one."""
        # With a gate, a hidden width of 8/3 D has as many weights as 4 D without it.
        default = 32 * math.ceil(8 * self.d_model / 3 / 32) if self.is_gated else 4 * self.d_model
        return self.hidden_size or default

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward is a gated linear unit."""
        return self.mlp.endswith("glu")

    def has_bias(self, part: Literal["qkv", "project", "mlp"]) -> bool:
        """Whether the linear layers of this part of a block have a bias."""
        own = {"qkv": self.qkv_bias, "project": self.project_bias, "mlp": self.mlp_bias}[part]
        return self.bias if own is None else own

    @property
    def residual_std(self) -> float:
        """The initial standard deviation of matrices whose output is added to the residual stream; GPT-2's, or zero."""
        return 0.0 if self.zero_init else 0.02 / math.sqrt(2 * self.num_blocks)


def new_norm(config: GPTConfig, width: int) -> nn.Module:
    """Return a norm of the model for vectors of this width."""
    return NORMS[config.norm](width, config.bias, config.norm_eps)


# ------------------------------------------------------------------------------------------------------- attention


class BlockInputs(NamedTuple):
    """What the blocks read besides the residual stream.

    Attributes:
        cos_sin: as `Position.cos_sin` returns it.
        attn_mask: as `ops.prepare_attention_mask` returns it.
        dropout_masks: of each block, as `ops.draw_dropout_masks` returns them.
        cache: keys and values of earlier tokens.
    """

    cos_sin: tuple[Tensor, Tensor] | None
    attn_mask: Tensor | None
    dropout_masks: list[ops.BlockMasks]
    cache: KVCache | None


class MultiHeadAttention(nn.Module):
    """Causal attention with H query heads and K key/value heads.

    The course's `Head`, with its own query, key and value matrices, is no class here: `qkv` computes all heads in one
    product. Its weight (H * E + 2 * K * E, D) stacks their matrices, (E, D) each: first the queries of all heads, then
    the keys, then the values. `test_attention_matches_heads_of_the_course` computes the same head by head.
    """

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__()
        self.block, self.head_width = block, config.head_width
        kv_width = config.kv_heads * config.head_width
        self.widths = [config.attention_width, kv_width, kv_width]
        self.qkv = Linear(config.d_model, sum(self.widths), config.has_bias("qkv"))
        self.q_norm = new_norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.k_norm = new_norm(config, config.head_width) if config.qk_norm else nn.Identity()
        bias, std = config.has_bias("project"), config.residual_std
        self.project = Linear(config.attention_width, config.d_model, bias, std)
        self.dropout = Dropout(config.dropout)  # of the attention weights

    def queries_keys_values(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, E), keys and values (B, K, T, E) of the input x (B, T, D)."""
        B, T, _ = x.shape
        q, k, v = (
            part.view(B, T, -1, self.head_width).transpose(1, 2)  # (B, H or K, T, E)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        q = apply_rotary_emb(self.q_norm(q), inputs.cos_sin)  # (B, H, T, E)
        k = apply_rotary_emb(self.k_norm(k), inputs.cos_sin)  # (B, K, T, E)
        return q, k, v

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.queries_keys_values(x, inputs)
        if inputs.cache is not None:
            k, v = inputs.cache.append(self.block, k, v)  # (B, K, S, E)
        mask = inputs.dropout_masks[self.block].attn_weights
        y = ops.scaled_dot_product_attention(q, k, v, inputs.attn_mask, self.dropout.active_p, mask)  # (B, H, T, E)
        return self.project(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, D)


# ---------------------------------------------------------------------------------------------------- feed-forward


class FeedForward(nn.Module):
    """D -> hidden -> D with an activation between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        hidden, bias = config.hidden_width, config.has_bias("mlp")
        self.activation = ACTIVATIONS[config.mlp]
        self.up = Linear(config.d_model, 2 * hidden if config.is_gated else hidden, bias)
        self.project = Linear(hidden, config.d_model, bias, std=config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.activation(self.up(x)))  # (B, T, D)


# ----------------------------------------------------------------------------------------------------------- block


class Block(nn.Module):
    """Attention, then feed-forward: each reads a normalised copy of the stream and adds its output to the stream."""

    def __init__(self, config: GPTConfig, block: int) -> None:
        super().__init__()
        self.block = block
        self.attention_norm = new_norm(config, config.d_model)
        self.attention = MultiHeadAttention(config, block)
        self.mlp_norm = new_norm(config, config.d_model)
        self.mlp = FeedForward(config)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        masks = inputs.dropout_masks[self.block]
        x = x + self.dropout(self.attention(self.attention_norm(x), inputs), masks.attn_output)  # (B, T, D)
        return x + self.dropout(self.mlp(self.mlp_norm(x)), masks.mlp_output)  # (B, T, D)


class Blocks(nn.ModuleList):
    """The blocks, one after another.

    Attributes:
        activation_checkpointing: whether the activations inside a block are computed again for its backward pass
            instead of being saved (Chen et al. 2016).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(Block(config, block) for block in range(config.num_blocks))
        self.activation_checkpointing = False

    def forward(self, x: Tensor, inputs: BlockInputs) -> Tensor:
        for block in self:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, use_reentrant=False)  # (B, T, D)
            else:
                x = block(x, inputs)  # (B, T, D)
        return x


# ------------------------------------------------------------------------------------------------------------- GPT


class GPT(nn.Module):
    """Tokens in, logits of the next token out.

    A model that was built without memory (its weights have `is_meta`) gets it by `to_empty` and `init_weights`, or by
    `load_state_dict(..., assign=True)` and `tie_and_init_buffers`.

    Attributes:
        seed: of the initial weights, itself drawn from PyTorch's global generator.
        float8_head: whether the products of the head in `loss` are computed in float8, see `ops.linear_cross_entropy`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.seed = int(torch.empty((), dtype=torch.int64, device=torch.default_generator.device).random_())
        self.embedding = Embedding(config.vocab_size, config.d_model)
        self.previous = PreviousTokens(config.previous_tokens, config.vocab_size, config.d_model)
        self.position = POSITIONS[config.position](
            config.context_length, config.d_model, config.head_width, config.rope_base
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = Blocks(config)
        self.norm = new_norm(config, config.d_model)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.float8_head = False
        self.tie_and_init_buffers()
        if not self.embedding.weight.is_meta:
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, shard: Callable[[Tensor, Tensor], Tensor] = lambda full, parameter: full) -> None:
        """Draw the weights as GPT-2 does: standard deviation 0.02, less where the output is added to the stream.

        Matrices are drawn one after another on the CPU, so that the weights do not depend on the device.

        Args:
            shard: (full tensor, parameter) -> the part of it that the parameter holds.
        """
        self.tie_and_init_buffers()
        generator = torch.Generator().manual_seed(self.seed)
        for name, module in self.named_modules():
            if hasattr(module, "reset_parameters"):  # PyTorch's convention; norms: scales 1, biases 0
                module.reset_parameters()
            tied = name == "head" and self.config.tie_embeddings
            if isinstance(module, Linear | Embedding) and not tied:
                full = torch.zeros(module.weight.shape, dtype=module.weight.dtype, device=generator.device)
                if module.std:
                    full.normal_(std=module.std, generator=generator)
                module.weight.copy_(shard(full, module.weight))

    def tie_and_init_buffers(self) -> None:
        """Tie the head to the embedding, where they share a weight, and compute the tables of positions."""
        if self.config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.position.reset_buffers(self.embedding.weight.device)

    def prepare_inputs(
        self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None
    ) -> tuple[Tensor, BlockInputs]:
        """Return the embeddings (B, T, D) of tokens (B, T), and what the blocks read besides them; see `forward`."""
        T, config = tokens.shape[1], self.config
        total = T if cache is None else T + cache.length
        if total > config.context_length:
            raise ValueError(f"{total} tokens, but context_length is {config.context_length}: crop them")
        assert cache is None or documents is None, "a text that is being generated is one document"
        positions: slice | Tensor = slice(0, T)
        visible = None
        if cache is not None:
            positions, visible = cache.positions(T), cache.visible(T)
        elif documents is not None:
            positions, visible = ops.document_positions(documents), ops.document_mask(documents)
        x = ops.embedding(tokens, self.embedding.weight, tied=config.tie_embeddings)  # (B, T, D)
        x = self.position(self.previous(x, tokens, cache, documents), positions)  # (B, T, D)
        dtype, p = ops.compute_dtype(self.embedding.weight), self.dropout.active_p
        mask = ops.prepare_attention_mask(visible, x, config.num_heads, dtype, p, cached=cache is not None)
        first, dropout_masks = ops.draw_dropout_masks(x, mask, config.num_heads, config.num_blocks, p, dtype)
        x = self.dropout(x, first).to(dtype)  # (B, T, D)
        return x, BlockInputs(self.position.cos_sin(positions), mask, dropout_masks, cache)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """Return the normalised stream that the head reads, (B, T, D); arguments and errors as in `forward`."""
        x, inputs = self.prepare_inputs(tokens, cache, documents)
        with ops.autocast_disabled(x):
            x = self.norm(self.blocks(x, inputs))  # (B, T, D)
        if cache is not None:
            cache.length += tokens.shape[1]
        return x

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the logits of every position, and with targets the loss.

        This is the contract of the course. `LitGPT.training_step` needs no logits, so it calls `loss`.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, the token after each; `IGNORE_INDEX` counts in no loss.
            cache: keys and values of the tokens before; those of `tokens` are appended.
            documents: (B, T) int64, the number of the document each token belongs to. A token attends to its own
                document and counts its position in it. None: all tokens are one document.

        Returns:
            Logits (B, T, V), and the mean loss in nats per token or None.

        Raises:
            ValueError: there are more tokens, those in the cache included, than `context_length`.
        """
        logits = self.head(self.hidden(tokens, cache, documents))  # (B, T, V)
        return logits, None if targets is None else ops.cross_entropy(logits, targets)

    def loss(self, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the loss that `forward` returns, with less memory: large logits are computed a chunk at a time.

        `test_chunked_loss_and_gradients_match_logits` compares both, and their gradients. Arguments as in `forward`.
        """
        x, inputs = self.prepare_inputs(tokens, documents=documents)
        with ops.autocast_disabled(x):
            return self.blocks_loss(x, inputs, targets)

    def blocks_loss(self, x: Tensor, inputs: BlockInputs, targets: Tensor) -> Tensor:
        """Return the loss, computed from the embedded tokens x (B, T, D): a scalar in nats.

        With `compile`, a single CPU process compiles this method as one graph. The embedding is not part of it, because
        its compiled backward pass adds up gradients in an order that differs between runs.
        """
        hidden = self.norm(self.blocks(x, inputs))  # (B, T, D)
        return ops.linear_cross_entropy(hidden, self.head.weight, targets, self.float8_head)

    @torch.no_grad()
    def evaluate(
        self,
        tokens: Tensor,
        targets: Tensor,
        documents: Tensor | None = None,
        token_losses: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return two scalars to add up over batches: the sum of the losses in nats, and the number of correct targets.

        A target is correct if it has the largest logit. Arguments as in `forward`; `token_losses` (B, T), if given,
        receives the loss of each target.
        """
        hidden = self.hidden(tokens, documents=documents)  # (B, T, D)
        return ops.evaluate_linear_cross_entropy(hidden, self.head.weight, targets, token_losses)

    @torch.no_grad()
    def generate(
        self,
        x: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Append tokens drawn from the model's own predictions: (B, T) -> (B, T + max_new_tokens).

        This is the loop of the course. `lit_gpt.inference` generates the same tokens faster, with a cache.

        Args:
            x: (B, T) int64, at least one token in each row.
            max_new_tokens: how many to append.
            temperature: divides the logits; 0 always takes the likeliest token.
            top_k: draw among the k likeliest tokens only, see `keep_likeliest`.
            top_p: draw among the likeliest tokens up to this total probability only, see `keep_likeliest`.
            generator: of random numbers; None: PyTorch's global one.
        """
        for _ in range(max_new_tokens):
            context = x[:, -self.config.context_length :]  # (B, up to context_length)
            logits, _ = self(context)  # (B, up to context_length, V)
            logits = logits[:, -1].float()  # (B, V), of the last position
            if temperature < MIN_TEMPERATURE:
                next_token = logits.argmax(dim=-1, keepdim=True)  # (B, 1)
            else:
                probs = keep_likeliest(logits / temperature, top_k, top_p).softmax(dim=-1)  # (B, V)
                # A single draw takes V random numbers a row, two with replacement take two: docs/kernels.md
                next_token = torch.multinomial(probs, 2, replacement=True, generator=generator)[:, :1]  # (B, 1)
            x = torch.cat((x, next_token), dim=1)  # (B, T + 1)
        return x
