"""Generate several texts of a prompt at once, and find out which of them are rows of the training text."""

import codecs
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.inference.generate import encode_prompt, stream_tokens
from lit_gpt.inference.utf8 import utf8_constraint
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

MAX_TRIES = 10  # texts that are drawn for each one that is asked for, at most
STEPS_PER_CHECK = 16  # whether all texts have ended is asked now and then only, because it waits for the device
IDS_PER_READ = 2**20


@dataclass(frozen=True)
class GeneratedText:
    """A text that a model has continued.

    Attributes:
        prompt: Its beginning, which was given.
        continuation: What the model has written after it.
        seed: The seed that draws it again.
        tokens: The ids that were drawn; the last is the end of text if `is_complete`.
        is_complete: Whether the model has ended the text. Otherwise it has `max_new_tokens`, or was stopped.
        logprobs: The log-probability of each of `tokens`, in nats, see `stream_tokens`; None if not asked for.
    """

    prompt: str
    continuation: str
    seed: int
    tokens: list[int]
    is_complete: bool
    logprobs: list[float] | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return self.prompt + self.continuation


def seeded_generator(model: GPT, seed: int) -> torch.Generator:
    """Return a generator of random numbers on the device of a model."""
    return torch.Generator(device=model.embedding.weight.device).manual_seed(seed)


def generate_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    mode: str,
    num_samples: int = 1,
    seed: int = 1337,
    batch_size: int = 32,
    accept: Callable[[GeneratedText], bool] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    raw_bytes: bool = False,
    **sampling: Any,
) -> Iterator[GeneratedText]:
    """Yield texts that continue `prompt`, drawn in batches.

    The texts have the seeds `seed`, `seed + 1`, … In float32 each is the text that `stream_text` yields with a
    generator of its seed. In bfloat16 batches of another size round differently, which changes a token now and then.

    Example:
        >>> rows = TrainingRows(corpus.split("train"), tokenizer)
        >>> for text in generate_texts(model, tokenizer, "静夜思", "rows", 5, accept=rows.lack, max_new_tokens=100):
        ...     print(text.text)

    Args:
        model: The model, which is in evaluation mode meanwhile.
        tokenizer: The model's tokenizer.
        prompt: May be empty.
        mode: The `data.mode` of training, "rows" or "raw". With "rows", a text ends at the end of its document.
        num_samples: How many texts to yield.
        seed: The seed of the first one.
        batch_size: How many texts are drawn at once.
        accept: A text for which this returns False is not yielded, and another is drawn instead. After `MAX_TRIES`
            times `num_samples` texts no more are drawn.
        should_stop: Asked every few tokens; after True, the texts of this batch end, and no other batch is drawn.
        raw_bytes: See `stream_text`.
        **sampling: `max_new_tokens`, `temperature`, `top_k`, … of `stream_tokens`; `with_logprobs=True` for
            `GeneratedText.logprobs`.
    """
    max_tries = num_samples if accept is None else MAX_TRIES * num_samples
    accepted = tries = 0
    while accepted < num_samples and tries < max_tries and not should_stop():
        expected_tries = math.ceil((num_samples - accepted) * (tries + 1) / (accepted + 1))
        count = min(batch_size, max_tries - tries, expected_tries)
        seeds = list(range(seed + tries, seed + tries + count))
        for text in _draw_batch(model, tokenizer, prompt, mode, seeds, should_stop, raw_bytes, **sampling):
            tries += 1
            if accepted < num_samples and (accept is None or accept(text)):
                accepted += 1
                yield text


def _draw_batch(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    mode: str,
    seeds: list[int],
    should_stop: Callable[[], bool],
    raw_bytes: bool,
    with_logprobs: bool = False,
    **sampling: Any,
) -> list[GeneratedText]:
    """Return a text for each seed."""
    device, end = model.embedding.weight.device, tokenizer.end_of_text if mode == "rows" else -1
    prompts = torch.tensor([encode_prompt(tokenizer, prompt, mode)], device=device).expand(len(seeds), -1)  # (B, T)
    generators = [seeded_generator(model, seed) for seed in seeds]
    new_tokens: list[Tensor] = []
    logprobs: list[Tensor] | None = [] if with_logprobs else None
    has_ended = torch.zeros(len(seeds), dtype=torch.bool, device=device)  # (B,)
    was_training = model.training
    model.eval()
    try:
        constraint = None if raw_bytes else utf8_constraint(model, tokenizer)
        sampling |= {"constraint": constraint, "generator": generators, "logprobs": logprobs}
        steps = stream_tokens(model, prompts, **sampling)
        for step, next_tokens in enumerate(steps, start=1):  # (B,)
            new_tokens.append(next_tokens)
            has_ended |= next_tokens == end
            if step % STEPS_PER_CHECK == 0 and (has_ended.all() or should_stop()):
                break
    finally:
        model.train(was_training)
    rows: list[list[int]] = torch.stack(new_tokens, dim=1).tolist()
    row_logprobs = itertools.repeat(None) if logprobs is None else torch.stack(logprobs, dim=1).tolist()
    texts = []
    for seed, tokens, values in zip(seeds, rows, row_logprobs):
        is_complete = end in tokens
        tokens = tokens[: tokens.index(end) + 1] if is_complete else tokens
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # the end of text has no bytes; a text that was stopped loses the part of a character at its end
        continuation = decoder.decode(b"".join(map(tokenizer.token_bytes, tokens)), final=raw_bytes)
        values = None if values is None else values[: len(tokens)]
        texts.append(GeneratedText(prompt, continuation, seed, tokens, is_complete, values))
    return texts


class TrainingRows:
    """The documents on which a model was trained, to tell which generated texts are new. They are held in memory.

    Args:
        ids: The token ids of the documents, each with its end of text.
        tokenizer: The tokenizer that encoded them.
    """

    def __init__(self, ids: Any, tokenizer: Tokenizer) -> None:
        pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        pieces[tokenizer.end_of_text] = b"\xff"  # a byte that never occurs in UTF-8
        parts = [b"\xff"]
        for start in range(0, len(ids), IDS_PER_READ):
            part = np.asarray(ids[start : start + IDS_PER_READ])
            parts.append(b"".join(map(pieces.__getitem__, part.tolist())))
        self._rows = b"".join(parts)

    def lack(self, text: GeneratedText) -> bool:
        """Return whether no row is equal to a text, or begins with it if the text is not complete."""
        row = b"\xff" + text.text.encode() + (b"\xff" if text.is_complete else b"")
        return row not in self._rows
