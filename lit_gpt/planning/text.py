"""Look at a text before anything is tokenized: its size, its documents, and how tokenizers divide it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.readers import with_detected_encoding
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import Block, read_blocks
from lit_gpt.tokenizer import BytePairTokenizer, CharTokenizer, Tokenizer, open_tokenizer, train_bpe

SAMPLE_CHARACTERS = 2**21
BLOCK_CHARACTERS = 2**18
MIN_CHARACTERS = 2000  # a tenth of them, for validation, is a few sentences


@dataclass(frozen=True)
class TextSample:
    """The documents at the beginning of a text, and what they say about the whole.

    Attributes:
        documents: The documents; in raw mode, parts of the text.
        share: The part of the text that they are, from 0 to 1, by the bytes of the files.
        is_raw: Whether the text has no documents.
    """

    documents: list[str]
    share: float
    is_raw: bool

    @property
    def characters(self) -> int:
        """The characters of the whole text; an estimate if `share` is less than 1."""
        return round(sum(map(len, self.documents)) / self.share)

    @property
    def num_bytes(self) -> int:
        """The bytes of the whole text in UTF-8; an estimate if `share` is less than 1."""
        return round(sum(len(text.encode()) for text in self.documents) / self.share)


def sample_text(
    sources: list[Source], config: CorpusConfig, max_characters: int = SAMPLE_CHARACTERS
) -> TextSample:
    """Read documents until they have `max_characters`, from all files in equal parts.

    Raises:
        UserError: A file cannot be read.
    """
    options = [with_detected_encoding(source, config.read_options)[0] for source in sources]
    documents: list[str] = []
    bytes_read = 0
    for file in range(len(sources)):
        wanted = max_characters * (file + 1) // len(sources) - sum(map(len, documents))
        blocks = read_blocks(sources, options, config.split_options, min(BLOCK_CHARACTERS, max(1, wanted)), file)
        for block in _take(blocks, wanted):
            documents += block.texts
            bytes_read += block.bytes_read
    total = sum(source.size() for source in sources)
    return TextSample(documents, min(1.0, bytes_read / max(1, total)), config.read_options.mode == "raw")


def _take(blocks: Iterator[Block], characters: int) -> Iterator[Block]:
    """Yield blocks until they have so many characters."""
    for block in blocks:
        yield block
        characters -= sum(map(len, block.texts))
        if characters <= 0:
            return


@dataclass(frozen=True)
class TokenizerStatistics:
    """How a tokenizer divides a text.

    Attributes:
        settings: The settings that select it, such as {"data.tokenizer": "bpe", "data.vocab_size": 1024}.
        vocab_size: V, the end of text included.
        bytes_per_token: UTF-8 bytes of the text for each token; the ends of documents are tokens of 0 bytes.
        tokens: Tokens of the whole text.
        unigram_bits: Bits per byte of the entropy of single tokens.
        document_lengths: Tokens of each document of the sample, sorted, (documents,) int64.
    """

    settings: dict[str, str | int]
    vocab_size: int
    bytes_per_token: float
    tokens: int
    unigram_bits: float
    document_lengths: np.ndarray

    @property
    def name(self) -> str:
        """The tokenizer's name for display, such as "bpe 1,024"."""
        size = self.settings.get("data.vocab_size")
        return str(self.settings["data.tokenizer"]) if size is None else f"bpe {size:,}"


def tokenizer_statistics(sample: TextSample, tokenizer: Tokenizer, settings: dict[str, str | int]) -> TokenizerStatistics:
    """Encode a sample with a tokenizer and count."""
    ids, lengths = tokenizer.encode_documents(sample.documents)
    counts = np.unique(ids, return_counts=True)[1]
    probabilities = counts / len(ids)
    bits_per_token = -float((probabilities * np.log2(probabilities)).sum())
    num_bytes = sum(len(text.encode()) for text in sample.documents)
    is_pruned = isinstance(tokenizer, BytePairTokenizer) and tokenizer.name != "bpe"
    return TokenizerStatistics(
        settings,
        max(len(counts), 256) + 1 if is_pruned else tokenizer.vocab_size,
        num_bytes / len(ids),
        round(len(ids) / sample.share),
        bits_per_token * len(ids) / num_bytes,
        np.sort(lengths),
    )


def bpe_family(sample: TextSample, vocab_sizes: list[int]) -> list[tuple[int, BytePairTokenizer]]:
    """Train byte-pair vocabularies of several sizes at once: a smaller one is the beginning of a larger one.

    Args:
        sample: The text.
        vocab_sizes: The sizes. One that the text has too few pairs for is left out.
    """
    largest = train_bpe(sample.documents, max(vocab_sizes))
    tokens, pattern = largest.tokens, largest.pattern
    sizes = [size for size in vocab_sizes if size <= largest.vocab_size]
    return [(size, BytePairTokenizer.from_tokens("bpe", tokens[: size - 1], pattern)) for size in sizes]
