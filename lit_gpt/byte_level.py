"""A printable character for each byte, as byte-pair vocabularies of other programs write their tokens."""


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
