"""TensorBoard's embedding projector: the vectors of tokens, with their texts.

`SummaryWriter.add_embedding` would write the same files one number at a time (0.3 s for 2,000 tokens), neither
atomically nor without following links.
"""

import unicodedata
from pathlib import Path

import numpy as np

from lit_gpt.data.shards import ShardedArray
from lit_gpt.files import atomic_write, write_error
from lit_gpt.inference.token_texts import token_text
from lit_gpt.tokenizer import Tokenizer

MAX_TOKENS = 2000  # in the projector, the most frequent ones; t-SNE in the browser takes a minute for more
MAX_COUNTED_TOKENS = 2**20  # of the training text, evenly spaced, to see which tokens are frequent

VECTORS, TOKENS, CONFIG = "projector_vectors.bytes", "projector_tokens.tsv", "projector_config.pbtxt"
KINDS = {"L": "letters", "N": "digits", "P": "punctuation", "S": "symbols", "Z": "blank", "C": "blank"}


def frequent_tokens(ids: ShardedArray, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the most frequent ids of a text, at most `MAX_TOKENS`, and how often each occurs in the counted part."""
    size = min(len(ids), MAX_COUNTED_TOKENS)
    counts = np.bincount(ids[np.arange(size) * len(ids) // size], minlength=vocab_size)  # (V,)
    tokens = np.argsort(-counts, kind="stable")[:MAX_TOKENS]
    tokens = tokens[counts[tokens] > 0]
    return tokens, counts[tokens]


def token_kind(tokenizer: Tokenizer, token: int) -> str:
    """Return what a token consists of, by which the projector can colour it: Chinese, letters, digits, …"""
    try:
        text = tokenizer.token_bytes(token).decode("utf-8")
    except UnicodeDecodeError:
        return "part of a character"
    if not text:
        return "end of text"
    first = text.strip()[:1] or text[0]
    if "CJK UNIFIED" in unicodedata.name(first, ""):
        return "Chinese"
    return KINDS.get(unicodedata.category(first)[0], "symbols")


def write_projector(folder: Path, tokenizer: Tokenizer, ids: ShardedArray, embedding: np.ndarray) -> None:
    """Write the vectors of the most frequent tokens, and their texts, into the folder of a run.

    Args:
        folder: The folder of the event file.
        tokenizer: The model's tokenizer.
        ids: Of the training text.
        embedding: (V, D) float32.

    Raises:
        UserError: A file cannot be written.
    """
    tokens, counts = frequent_tokens(ids, len(embedding))
    vectors = np.ascontiguousarray(embedding[tokens], dtype="<f4")  # (N, D)
    rows = [
        f"{token_text(tokenizer, token)}\t{token}\t{count}\t{token_kind(tokenizer, token)}"
        for token, count in zip(tokens.tolist(), counts.tolist())
    ]
    table = "\n".join(["token\tid\tcount\tkind", *rows]) + "\n"
    rows_number, width = vectors.shape
    config = (
        f'embeddings {{\n  tensor_name: "token embeddings"\n  tensor_shape: {rows_number}\n  tensor_shape: {width}\n'
        f'  tensor_path: "{VECTORS}"\n  metadata_path: "{TOKENS}"\n}}\n'
    )
    _write(folder / VECTORS, vectors.tobytes())
    _write(folder / TOKENS, table.encode())
    _write(folder / CONFIG, config.encode())  # the last one, because it names the others


def _write(path: Path, content: bytes) -> None:
    try:
        atomic_write(path, lambda file: file.write(content))
    except OSError as error:
        raise write_error(path, error) from error
