"""Which tokens keep a generated text valid UTF-8.

Tokens of byte vocabularies may be parts of a character. This module knows, for every state inside a character and every
token, whether the token's bytes go on with valid UTF-8 (RFC 3629: no surrogates, no overlong forms) and how many more
tokens the started character needs. The replacement character U+FFFD, which stands for broken bytes, counts as invalid.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

# The states of a text by the bytes that its last character still needs: (lowest and highest next byte, state after it).
# State 0, COMPLETE, is a text of whole characters.
COMPLETE = 0
_CONTINUATIONS = {
    1: ((0x80, 0xBF, COMPLETE),),
    2: ((0x80, 0xBF, 1),),
    3: ((0x80, 0xBF, 2),),
    4: ((0xA0, 0xBF, 1),),  # after E0: lower bytes would be overlong forms
    5: ((0x80, 0x9F, 1),),  # after ED: higher bytes would be surrogates
    6: ((0x90, 0xBF, 2),),  # after F0: lower bytes would be overlong forms
    7: ((0x80, 0x8F, 2),),  # after F4: higher bytes would be beyond U+10FFFF
    8: ((0x80, 0xBE, 1), (0xBF, 0xBF, 9)),  # after EF
    9: ((0x80, 0xBC, COMPLETE), (0xBE, 0xBF, COMPLETE)),  # after EF BF: EF BF BD is U+FFFD
}
_FIRST_BYTES = (
    (0x00, 0x7F, COMPLETE),
    (0xC2, 0xDF, 1),
    (0xE0, 0xE0, 4),
    (0xE1, 0xEC, 2),
    (0xED, 0xED, 5),
    (0xEE, 0xEE, 2),
    (0xEF, 0xEF, 8),
    (0xF0, 0xF0, 6),
    (0xF1, 0xF3, 3),
    (0xF4, 0xF4, 7),
)
NUM_STATES = 1 + len(_CONTINUATIONS)
MAX_UNFINISHED_BYTES = 3  # of a character of four bytes
_UNREACHABLE = NUM_STATES  # more tokens than any state needs


class Utf8Constraint:
    """Keeps generated texts valid UTF-8: tokens that would break a character are not drawn.

    A token is allowed if its bytes continue the text so that the last character can still be completed by the tokens
    that remain; so a text also ends at a whole character. If the prompt ends inside a character that needs more tokens
    than remain, the tokens on the shortest way to its end are allowed. Tokens without bytes, such as the end of text,
    are allowed between characters.

    The states and the tables are on the device of the logits, and nothing waits for it.

    Args:
        tokens: The bytes of each id, V of them. At least one must be a whole character, or have no bytes.
        device: The device of the logits.

    Attributes:
        breaks_characters: Whether any token is no whole number of characters; otherwise every text is valid.
    """

    def __init__(self, tokens: list[bytes], device: torch.device | str = "cpu") -> None:
        next_state, is_valid = token_transitions(tokens)  # (S, V) each
        steps = _steps_to_complete(next_state, is_valid)  # (S,)
        assert (next_state[COMPLETE][is_valid[COMPLETE]] == COMPLETE).any(), "no token is a whole character"
        self.breaks_characters = bool((next_state[COMPLETE] != COMPLETE).any() or not is_valid[COMPLETE].all())
        longest = int(steps[steps < _UNREACHABLE].max())
        steps_after = np.where(is_valid, steps[next_state], _UNREACHABLE).astype(np.uint8)  # (S, V)
        # [how many tokens will follow; the last one also stands for more]: (S, V)
        self._penalties = [
            torch.where(torch.from_numpy(steps_after <= limit[:, None]), 0.0, -torch.inf).to(device)
            for limit in (np.clip(steps - 1, remaining, longest) for remaining in range(longest + 1))
        ]
        # Nothing completes a state that is unreachable; a prompt that ends there is left as it is.
        start = np.where(steps < _UNREACHABLE, np.arange(NUM_STATES), COMPLETE)  # (S,)
        self._next_state = torch.from_numpy(start[next_state].ravel()).to(device)  # (S * V,) int64
        self._vocab_size = len(tokens)

    def start(self, prompts: Tensor, padding: Tensor | None = None) -> Tensor:
        """Return the state after each prompt, (B,) int64.

        Args:
            prompts: (B, T) token ids.
            padding: How many of the first ids of each row are padding, (B,); None if none are.
        """
        length = prompts.shape[1]
        states = prompts.new_zeros(len(prompts))  # (B,)
        for column in range(max(0, length - MAX_UNFINISHED_BYTES), length):
            states = self.advance(states, prompts[:, column])
            if padding is not None:
                states = states.masked_fill(column < padding, COMPLETE)
        return states

    def penalties(self, states: Tensor, remaining: int) -> Tensor:
        """Return what to add to the logits: 0 for tokens that are allowed, -inf for the others, (B, V) float32.

        Args:
            states: (B,), of `start` or `advance`.
            remaining: How many tokens will follow the one that is drawn next.
        """
        penalties = self._penalties[min(remaining, len(self._penalties) - 1)]  # (S, V)
        return penalties.index_select(0, states)

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """Return the states after one more token in each row: (B,), (B,) -> (B,)."""
        # Half the time of indexing a (S, V) tensor with two tensors, which would be 2% of a small model's step.
        return self._next_state.index_select(0, torch.add(tokens, states, alpha=self._vocab_size))


def utf8_constraint(model: GPT, tokenizer: Tokenizer) -> Utf8Constraint | None:
    """Return the constraint that keeps the texts of a model valid UTF-8; None if all its tokens are whole characters.

    Example:
        >>> generate(model, prompts, 100, end=tokenizer.end_of_text, constraint=utf8_constraint(model, tokenizer))
    """
    return _cached_constraint(tokenizer, model.config.vocab_size, model.embedding.weight.device)


@functools.lru_cache(maxsize=4)  # the tables of 100,000 tokens take a tenth of a second and 20 MB
def _cached_constraint(tokenizer: Tokenizer, vocab_size: int, device: torch.device) -> Utf8Constraint | None:
    constraint = Utf8Constraint([tokenizer.token_bytes(token) for token in range(vocab_size)], device)
    return constraint if constraint.breaks_characters else None


# ---------------------------------------------------------------------------------------------------------- automaton


def byte_transitions() -> tuple[np.ndarray, np.ndarray]:
    """Return the state after each byte in each state, (S, 256) int64, and whether it is valid there, (S, 256) bool.

    After an invalid byte, decoders leave out what was started and begin anew: the state is that of this byte alone, or
    COMPLETE if no character begins with it.
    """
    first = np.full(256, COMPLETE)
    is_valid = np.zeros((NUM_STATES, 256), dtype=bool)
    for low, high, after in _FIRST_BYTES:
        first[low : high + 1] = after
        is_valid[COMPLETE, low : high + 1] = True
    next_state = np.tile(first, (NUM_STATES, 1))
    for state, ranges in _CONTINUATIONS.items():
        for low, high, after in ranges:
            next_state[state, low : high + 1] = after
            is_valid[state, low : high + 1] = True
    return next_state, is_valid


def token_transitions(tokens: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return the state after each token in each state, (S, V) uint8, and whether the token is valid there, (S, V) bool.

    A token without bytes is valid between characters only; after it a text begins anew.
    """
    next_state, is_valid = byte_transitions()
    # State s + NUM_STATES is state s after an invalid byte. All 2 S states and a byte index one flat table.
    table = np.tile(next_state, (2, 1)) + NUM_STATES * ~np.vstack((is_valid, np.zeros_like(is_valid)))
    table = table.astype(np.uint8).ravel()
    lengths = np.array([len(token) for token in tokens])  # (V,)
    order = np.argsort(-lengths, kind="stable")  # the tokens that have a byte at some position are the first ones
    longest = lengths.max(initial=0)
    counts = len(tokens) - np.cumsum(np.bincount(lengths, minlength=longest + 1))  # [position]: with a byte there
    values = np.frombuffer(b"".join(tokens), dtype=np.uint8)
    offsets = (np.cumsum(lengths) - lengths)[order]  # (V,)
    states = np.tile(np.arange(NUM_STATES, dtype=np.uint8)[:, None], len(tokens))  # (S, V)
    states[:, counts[0] :] = NUM_STATES  # without bytes
    states[COMPLETE, counts[0] :] = COMPLETE
    for position in range(longest):
        n = counts[position]
        states[:, :n] = table[states[:, :n] * np.uint16(256) + values[offsets[:n] + position]]
    result = np.empty_like(states)
    result[:, order] = states
    return result % NUM_STATES, result < NUM_STATES


def _steps_to_complete(next_state: np.ndarray, is_valid: np.ndarray) -> np.ndarray:
    """Return the fewest tokens from each state to COMPLETE, (S,) int64; _UNREACHABLE if there is no way."""
    successors = [np.unique(next_state[state, is_valid[state]]) for state in range(NUM_STATES)]
    steps = np.full(NUM_STATES, _UNREACHABLE)
    steps[COMPLETE] = 0
    for _ in range(NUM_STATES):  # breadth-first: each round finds the states that are one token further away
        for state in range(1, NUM_STATES):
            steps[state] = min(_UNREACHABLE, 1 + steps[successors[state]].min(initial=_UNREACHABLE))
    return steps
