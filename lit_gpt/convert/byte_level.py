"""Byte-pair vocabularies as other programs write them: a character for each byte, and a list of merges.

tiktoken's vocabularies are lists of tokens in the order of their merges; the merges follow from that order.
"""

from collections.abc import Iterator, Sequence

from lit_gpt.tokenizer import encode_below


def _bytes_to_unicode() -> dict[int, str]:
    """Return the character that stands for each byte (Radford et al. 2019): printable ones stand for themselves."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


CHARACTERS = _bytes_to_unicode()
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def to_characters(token: bytes) -> str:
    """Return a token with one printable character for each byte: b" a" -> "Ġa"."""
    return "".join(CHARACTERS[byte] for byte in token)


def to_bytes(token: str) -> bytes:
    """Undo `to_characters`.

    Raises:
        KeyError: A character stands for no byte.
    """
    return bytes(BYTES[character] for character in token)


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
