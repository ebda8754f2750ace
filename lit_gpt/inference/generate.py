"""Generate text from a model and a prompt."""

import codecs
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_gpt.compat import pack_linear_weight, packed_linear
from lit_gpt.device import supports_bfloat16
from lit_gpt.errors import UserError
from lit_gpt.inference.utf8 import Utf8Constraint, utf8_constraint
from lit_gpt.kv_cache import KVCache
from lit_gpt.layers import Linear
from lit_gpt.model import GPT
from lit_gpt.sampling import MIN_TEMPERATURE, keep_likeliest
from lit_gpt.sharding import is_sharded
from lit_gpt.tokenizer import Tokenizer

# ------------------------------------------------------------------------------------------------------- token ids


def stream_tokens(
    model: GPT,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    use_cache: bool = True,
    logprobs: list[Tensor] | None = None,
    constraint: Utf8Constraint | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, `max_new_tokens` times.

    While all tokens fit into the context, a KV cache saves the model from computing earlier tokens again. Beyond that,
    the last `context_length` tokens are computed again for every new one. Without a constraint, the tokens are those of
    `GPT.generate`: in float32, an equal generator draws equal ones. Nothing here waits for the device.

    Args:
        model: A model in evaluation mode; in training mode dropout stays on.
        prompts: (B, T) token ids, or B lists of token ids with different lengths; at least one id in each row.
        max_new_tokens: How many tokens to generate for each row.
        temperature: See `sample_token`, also for `top_k`, `top_p` and `generator`.
        top_k: See `sample_token`.
        top_p: See `sample_token`.
        generator: See `sample_token`.
        use_cache: Whether to use the KV cache.
        logprobs: A list to which the log-probability of every token that is yielded is appended, (B,) float32, in nats.
            It is that of the model, before `constraint`, `temperature`, `top_k` and `top_p`.
        constraint: Keeps prompt and new tokens together valid UTF-8, see `utf8_constraint`. None: any token may follow.

    Raises:
        UserError: `temperature`, `top_k` or `top_p` is out of range.
    """
    check_sampling(temperature, top_k, top_p)

    def sample(logits: Tensor, penalties: Tensor | None) -> Tensor:  # (B, V), (B, V) -> (B,)
        tokens = sample_token(logits, temperature, top_k, top_p, generator, penalties)
        if logprobs is not None:
            logprobs.append(logits.float().log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0])
        return tokens

    # As a decorator, the mode holds while the generator runs, but not while its consumer does. FSDP2 keeps tensors that
    # it creates for training, and a tensor that was created in inference mode can never be trained.
    without_gradients = torch.no_grad() if is_sharded(model) else torch.inference_mode()
    yield from without_gradients(_decode)(model, prompts, max_new_tokens, sample, use_cache, constraint)


def _decode(
    model: GPT,
    prompts: Tensor | list[list[int]],
    max_new_tokens: int,
    sample: Callable[[Tensor, Tensor | None], Tensor],
    use_cache: bool,
    constraint: Utf8Constraint | None,
) -> Iterator[Tensor]:
    context_length, weight = model.config.context_length, model.embedding.weight
    tokens, padding = (prompts, None) if isinstance(prompts, Tensor) else pad_left(prompts, weight.device)
    if constraint is not None:
        states = constraint.start(tokens, padding)  # (B,)
    cropped_length = max(0, tokens.shape[1] - context_length)
    tokens = tokens[:, cropped_length:]  # (B, T)
    if padding is not None:
        padding = (padding - cropped_length).clamp(min=0)  # (B,)

    def new_cache() -> KVCache:
        return KVCache(model.config, len(tokens), weight.device, weight.dtype, padding)

    cache, uncached = new_cache(), tokens  # uncached: (B, up to T)
    for remaining in reversed(range(max_new_tokens)):
        if not use_cache or cache.length + uncached.shape[1] > context_length:
            cache, uncached = new_cache(), tokens
        hidden = model.hidden(uncached, cache)  # (B, up to T, D)
        penalties = None if constraint is None else constraint.penalties(states, remaining)  # (B, V)
        next_tokens = sample(model.head(hidden[:, -1]), penalties)  # (B,)
        yield next_tokens
        if constraint is not None:
            states = constraint.advance(states, next_tokens)
        uncached = next_tokens[:, None]  # (B, 1)
        if padding is not None and tokens.shape[1] == context_length:
            padding = (padding - 1).clamp(min=0)
        tokens = torch.cat((tokens, uncached), dim=1)[:, -context_length:]  # (B, T)


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    penalties: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row, in the way of `GPT.generate`.

    Args:
        logits: (B, V) logits of the last position.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_k: Draw among the k likeliest tokens only, see `keep_likeliest`.
        top_p: Draw among the likeliest tokens up to this total probability only, see `keep_likeliest`.
        generator: The random number generator; the global one by default. With a list of B, each row draws from its
            own, so that its tokens do not depend on the other rows.
        penalties: (B, V) float32, added to the logits: 0, or -inf for a token that must not be drawn. None: all are 0.
            It is overwritten.

    Returns:
        (B,) int64 token ids.
    """
    if temperature < MIN_TEMPERATURE:
        return (logits if penalties is None else penalties.add_(logits)).argmax(dim=-1)  # (B,)
    # With penalties one call converts, divides and adds, in place: a call takes 1% to 2% of a small model's step, and
    # new memory for 16 rows of 100,000 floats as long as drawing from them.
    scaled = logits.float() / temperature if penalties is None else penalties.add_(logits, alpha=1 / temperature)
    probs = keep_likeliest(scaled, top_k, top_p).softmax(dim=-1)  # (B, V)
    if isinstance(generator, list):
        draws = [torch.multinomial(row, 2, True, generator=own) for row, own in zip(probs, generator, strict=True)]
        return torch.stack(draws)[:, 0]  # (B,)
    return torch.multinomial(probs, 2, replacement=True, generator=generator)[:, 0]  # (B,); why two: see GPT.generate


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Check the arguments of `sample_token`.

    Raises:
        UserError: One of them is out of range.
    """
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature is {temperature}: give 0 (always the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: give 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: give a probability above 0, up to 1")


def pad_left(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Pad rows of token ids with zeros on the left.

    Returns:
        (B, T) int64 token ids; and the number of padding tokens in each row, (B,) int64, or None if no row has any.
    """
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)  # (B, T)
    padding = torch.tensor([longest - len(row) for row in rows], device=device)  # (B,)
    return tokens, padding if min(map(len, rows)) < longest else None


def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    end: int | None = None,
    track: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
    **sampling: Any,
) -> list[list[int]]:
    """Return the token ids that continue each prompt.

    Example:
        >>> prompt = encode_prompt(tokenizer, "静夜思", mode)
        >>> constraint = utf8_constraint(model, tokenizer)
        >>> (continuation,) = generate(model, [prompt], 100, end=tokenizer.end_of_text, constraint=constraint)
        >>> tokenizer.decode(continuation)

    Args:
        model: See `stream_tokens`.
        prompts: Token ids of any lengths from 1.
        max_new_tokens: The maximum length of a continuation.
        end: The id that ends a continuation, which does not include it; None if no id does.
        track: Yields the tokens that it gets, and may show progress meanwhile, as `tqdm` does.
        **sampling: Further arguments of `stream_tokens`.
    """
    new_tokens: list[Tensor] = []
    is_complete = torch.zeros(len(prompts), dtype=torch.bool, device=model.embedding.weight.device)  # (B,)
    tokens = stream_tokens(model, prompts, max_new_tokens, **sampling)
    for step, next_tokens in enumerate(track(tokens), start=1):
        new_tokens.append(next_tokens)
        if end is not None:
            is_complete |= next_tokens == end
            if step % 16 == 0 and is_complete.all():  # only now and then, because it waits for the device
                break
    rows: list[list[int]] = torch.stack(new_tokens, dim=1).tolist() if new_tokens else [[] for _ in prompts]
    return [row[: row.index(end)] if end in row else row for row in rows]


# ------------------------------------------------------------------------------------------------------------ text


def encode_prompt(tokenizer: Tokenizer, prompt: str, mode: str) -> list[int]:
    """Return the token ids from which generation starts, as texts start in training.

    Args:
        tokenizer: The model's tokenizer.
        prompt: May be empty.
        mode: The `data.mode` of training. With "rows", a document begins after the end of another one; with "raw", an
            empty prompt stands for the beginning of a line.

    Raises:
        UserError: The tokenizer has no token for a character of the prompt.
    """
    if mode == "rows":
        return [tokenizer.begin_of_text, *tokenizer.encode(prompt)]
    try:
        return tokenizer.encode(prompt or "\n")
    except UserError:
        if prompt:
            raise
        return [0]  # the training text has no line ends: start after an arbitrary character


def stream_text(
    model: GPT, tokenizer: Tokenizer, prompt: str, mode: str, raw_bytes: bool = False, **sampling: Any
) -> Iterator[str]:
    """Yield the text that continues `prompt`, each character as soon as all its bytes are generated.

    Args:
        model: The model, which is in evaluation mode meanwhile.
        tokenizer: The model's tokenizer.
        prompt: May be empty.
        mode: The `data.mode` of training, "rows" or "raw". With "rows", the text ends at the end of its document.
        raw_bytes: Whether the model may also generate bytes that form no character; each part of them becomes U+FFFD.
            By default it generates whole characters only.
        **sampling: Further arguments of `stream_tokens`; `max_new_tokens` is required.
    """
    constraint = None if raw_bytes else utf8_constraint(model, tokenizer)
    was_training = model.training
    model.eval()
    try:
        prompt_ids = torch.tensor([encode_prompt(tokenizer, prompt, mode)], device=model.embedding.weight.device)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for next_token in stream_tokens(model, prompt_ids, constraint=constraint, **sampling):  # (1,)
            token = int(next_token.item())
            if mode == "rows" and token == tokenizer.end_of_text:
                break
            yield decoder.decode(tokenizer.token_bytes(token))
        yield decoder.decode(b"", final=True)
    finally:
        model.train(was_training)


# ------------------------------------------------------------------------------------------------- fast inference


def prepare_for_inference(model: GPT) -> GPT:
    """Convert a model in place so that it generates faster; it cannot be trained afterwards.

    Where the device multiplies bfloat16 matrices in hardware, weights become bfloat16, which halves the bytes to read
    for every token. On a CPU, linear layers also store their weights in the layout of oneDNN, which doubles the speed
    for a few rows. Elsewhere the model stays as it is.

    Returns:
        The same model.
    """
    device = model.embedding.weight.device
    if supports_bfloat16(device):
        for parameter in model.parameters():  # buffers, such as the tables of positions, stay in float32
            parameter.data = parameter.data.bfloat16()
        if device.type == "cpu" and torch.backends.mkldnn.is_available():
            for module in list(model.modules()):
                for name, child in module.named_children():
                    if isinstance(child, Linear):
                        setattr(module, name, PackedLinear(child))
    return model


class PackedLinear(nn.Module):
    """A `Linear` for inference on a CPU, with its bfloat16 weights in the layout of torch and in that of oneDNN.

    oneDNN with packed weights is faster for several rows, and torch's own kernel for one row: with 6 blocks and
    D = 384, oneDNN would generate a tenth fewer tokens per second. torch uses its own kernel only while oneDNN is
    disabled, and this flag holds for the whole process. `_disable_onednn` makes it safe to generate in several threads;
    bfloat16 products of other threads, such as a training loop, may be slower meanwhile.
    """

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias  # (D_out, D_in), (D_out,)
        self.packed_weight = pack_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > x.shape[-1]:  # several rows
            return packed_linear(x, self.packed_weight, self.bias)  # (..., D_out)
        with _disable_onednn:
            return F.linear(x, self.weight, self.bias)  # (..., D_out)


class _DisableOneDNN:
    """A context manager that disables oneDNN while at least one thread is inside, and then restores the flag."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads_inside = 0
        self._was_enabled = True
        self._onednn: Any = torch.backends.mkldnn

    def __enter__(self) -> None:
        with self._lock:
            if self._threads_inside == 0:
                self._was_enabled, self._onednn.enabled = self._onednn.enabled, False
            self._threads_inside += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._threads_inside -= 1
            if self._threads_inside == 0:
                self._onednn.enabled = self._was_enabled


_disable_onednn = _DisableOneDNN()
