"""What all tokenizers have in common."""

from collections.abc import Iterable
from typing import Any

import numpy as np

ENDOFTEXT = "<|endoftext|>"  # tiktoken's name of the end-of-text id


class Tokenizer:
    """The interface of all tokenizers.

    Attributes:
        name: The value of `data.tokenizer` that selects it; "file" for a .tiktoken file.
        vocab_size: V, the number of ids, `end_of_text` included.
        end_of_text: The id that ends a document.
    """

    name: str
    vocab_size: int
    end_of_text: int

    @property
    def begin_of_text(self) -> int:
        """The id before a document: the end of the one before, except in vocabularies that have an id for it."""
        return self.end_of_text

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without `end_of_text`."""
        raise NotImplementedError

    def encode_documents(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode documents and end each with `end_of_text`.

        Returns:
            The ids of all documents one after another, uint32; and the number of ids of each, (len(texts),) int64.
        """
        documents = [np.array([*self.encode(text), self.end_of_text], dtype=np.uint32) for text in texts]
        return np.concatenate(documents), np.array([len(ids) for ids in documents])

    def token_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one id; they may be a part of a character. `end_of_text` has none."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """Return the tokenizer as data that JSON can represent; `from_state` restores it."""
        return {"name": self.name}

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not valid UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", errors="replace")

    def bytes_per_token(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, (V,) int64."""
        return np.array([len(self.token_bytes(token)) for token in range(self.vocab_size)])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.state() == other.state()

    def __hash__(self) -> int:
        return hash((self.name, self.vocab_size))
