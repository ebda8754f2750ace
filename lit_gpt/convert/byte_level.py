"""Byte-pair vocabularies as other programs write them: a character for each byte, and a list of merges.

tiktoken's vocabularies are lists of tokens in the order of their merges; the merges follow from that order.
"""

from collections.abc import Iterator, Sequence

from lit_gpt.byte_level import BYTES, CHARACTERS, to_bytes, to_characters
from lit_gpt.tokenizer import encode_below

__all__ = ["BYTES", "CHARACTERS", "merged_pairs", "to_bytes", "to_characters"]


def merged_pairs(tokens: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the two parts from which each token is merged, in the order of the merges.

    Args:
        tokens: The tokens in the order of their merges. One that no merge of two earlier ones makes is left out:
            tiktoken finds it only where it is a whole pre-token.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for rank, token in enumerate(tokens):
        parts = encode_below(token, ranks, max_rank=rank)
        if len(parts) == 2:
            yield tokens[parts[0]], tokens[parts[1]]
