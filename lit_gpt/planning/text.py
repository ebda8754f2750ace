"""Look at a text before anything is tokenized: its size, its documents, and how tokenizers divide it."""

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lit_gpt.compat import encoding_pattern
from lit_gpt.data.config import FITTED, CorpusConfig
from lit_gpt.data.readers import with_detected_encoding
from lit_gpt.data.sources import Source
from lit_gpt.data.split import file_fractions
from lit_gpt.data.tokenize import Block, read_blocks
from lit_gpt.errors import UserError
from lit_gpt.planning.ngrams import ngram_losses
from lit_gpt.tokenizer import BytePairTokenizer, CharTokenizer, Tokenizer, open_tokenizer, train_bpe

SAMPLE_CHARACTERS = 2**21
BLOCK_CHARACTERS = 2**18
MIN_CHARACTERS = 2000  # a tenth of them, for validation, is a few sentences
MAX_CHARACTERS = 8192  # different ones, of the tokenizer char
MIN_CHARACTERS_PER_ID = 96  # of the sample; a larger vocabulary has too few examples of most of its ids
NGRAM_TOKENS = 200_000  # in which n-grams are counted
VAL_TOKENS = 30_000  # which are then predicted
PIECE = 512  # tokens
USUAL_FALL = 0.05  # of the loss when twice as many tokens are counted, where the text is too short to measure it
NGRAM_ORDERS = {"char": 6, "byte": 6}  # the highest order, where it is not 3: the shorter the tokens, the more of them


@dataclass(frozen=True)
class TextSample:
    """The documents at the beginning of a text, and what they say about the whole.

    Attributes:
        documents: The documents; in raw mode, parts of the text.
        share: The part of the text that they are, from 0 to 1, by the bytes of the files.
        is_raw: Whether the text has no documents.
        train_fraction: The part of the text in the training split, from 0 to 1.
        seconds: The time to read the documents.
    """

    documents: list[str]
    share: float
    is_raw: bool
    train_fraction: float = 0.9
    seconds: float = 0.0

    @property
    def characters(self) -> int:
        """The characters of the whole text; an estimate if `share` is less than 1."""
        return round(sum(map(len, self.documents)) / self.share)

    @property
    def num_bytes(self) -> int:
        """The bytes of the whole text in UTF-8; an estimate if `share` is less than 1."""
        return round(sum(len(text.encode()) for text in self.documents) / self.share)


def sample_text(sources: list[Source], config: CorpusConfig, max_characters: int = SAMPLE_CHARACTERS) -> TextSample:
    """Read documents until they have `max_characters`, from all training files in equal parts.

    Raises:
        UserError: A file cannot be read, or the text is too short to train on.
    """
    start = time.perf_counter()
    training = [source for source in sources if not source.split]
    options = [with_detected_encoding(source, config.read_options)[0] for source in training]
    documents: list[str] = []
    bytes_read = 0
    for file in range(len(training)):
        wanted = max_characters * (file + 1) // len(training) - sum(map(len, documents))
        blocks = read_blocks(training, options, config.split_options, min(BLOCK_CHARACTERS, max(1, wanted)), file)
        for block in _take(blocks, wanted):
            documents += block.texts
            bytes_read += block.bytes_read
    characters, size = sum(map(len, documents)), sum(source.size() for source in training)
    if characters < MIN_CHARACTERS:
        raise UserError(
            f"the text has {characters:,} characters: give {MIN_CHARACTERS:,} or more, of which a model can learn"
        )
    share = min(1.0, bytes_read / max(1, size))
    train_fraction = 1 - sum(file_fractions(sources, config.split_options))
    seconds = time.perf_counter() - start
    return TextSample(documents, share, config.read_options.mode == "raw", train_fraction, seconds)


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
        bytes_per_character: UTF-8 bytes of the text for each character.
        bytes_per_token: UTF-8 bytes of the text for each token; the ends of documents are tokens of 0 bytes.
        tokens: Tokens of the whole text.
        train_tokens: Tokens of the training split.
        ngram_bits: The loss of the best n-gram model in bits per byte, with counts from `NGRAM_TOKENS` tokens.
        ngram_fall: The part by which this loss falls when twice as many tokens are counted.
        prepare_seconds: The expected time to read and tokenize the whole text.
        document_lengths: Tokens of each document of the sample, sorted, (documents,) int64.
    """

    settings: dict[str, str | int]
    vocab_size: int
    bytes_per_character: float
    bytes_per_token: float
    tokens: int
    train_tokens: int
    ngram_bits: float
    ngram_fall: float
    prepare_seconds: float
    document_lengths: np.ndarray

    @property
    def name(self) -> str:
        """The tokenizer's name for display, such as "bpe 1,024"."""
        size = self.settings.get("data.vocab_size")
        return str(self.settings["data.tokenizer"]) if size is None else f"bpe {size:,}"


def tokenizer_statistics(
    sample: TextSample, tokenizer: Tokenizer, settings: dict[str, str | int], train_seconds: float
) -> TokenizerStatistics:
    """Encode a sample with a tokenizer, count, and predict its end from its beginning by n-gram models.

    Args:
        sample: The text.
        tokenizer: The tokenizer.
        settings: See `TokenizerStatistics`.
        train_seconds: The time in which the tokenizer was trained on the sample.
    """
    start = time.perf_counter()
    ids, lengths = tokenizer.encode_documents(sample.documents)
    encode_seconds = time.perf_counter() - start
    num_bytes = sum(len(text.encode()) for text in sample.documents)
    if tokenizer.name not in FITTED:  # it is pruned to the ids that occur, and to single bytes
        used, ids = np.unique(ids, return_inverse=True)
        vocab_size = max(len(used), 257)
    else:
        vocab_size = tokenizer.vocab_size
    boundary, max_order = int(0.9 * len(ids)), NGRAM_ORDERS.get(tokenizer.name, 3)
    train_ids, val_ids = ids[:boundary].astype(np.int64), ids[boundary:].astype(np.int64)
    bits_per_nat = len(ids) / num_bytes / math.log(2)  # bits per byte for each nat per token
    few, many = (
        bits_per_nat * min(ngram_losses(spread(train_ids, tokens), spread(val_ids, VAL_TOKENS), vocab_size, max_order))
        for tokens in (NGRAM_TOKENS // 4, NGRAM_TOKENS)
    )
    counted = min(len(train_ids), NGRAM_TOKENS)
    doublings = math.log2(counted / min(len(train_ids), NGRAM_TOKENS // 4))
    fall = 1 - (many / few) ** (1 / doublings) if doublings else USUAL_FALL
    return TokenizerStatistics(
        settings,
        vocab_size,
        num_bytes / sum(map(len, sample.documents)),
        num_bytes / len(ids),
        round(len(ids) / sample.share),
        round(len(ids) / sample.share * sample.train_fraction),
        many * (1 - fall) ** math.log2(NGRAM_TOKENS / counted),
        fall,
        (sample.seconds + train_seconds + encode_seconds) / sample.share,
        np.sort(lengths),
    )


def spread(ids: np.ndarray, tokens: int) -> np.ndarray:
    """Return about so many of the ids, in pieces of equal length from all over the text."""
    pieces = ids[: len(ids) // PIECE * PIECE].reshape(-1, PIECE)
    if tokens >= len(ids) or len(pieces) < 2:
        return ids[:tokens]
    return pieces[np.linspace(0, len(pieces) - 1, max(1, tokens // PIECE)).astype(int)].reshape(-1)


def tokenizer_options(
    sample: TextSample, config: CorpusConfig, given: dict[str, Any], vocab_sizes: tuple[int, ...]
) -> list[tuple[TokenizerStatistics, Tokenizer]]:
    """Return the tokenizers to choose from, with how they divide the text.

    The tokenizers of public vocabularies are not among them unless they are given: a vocabulary that is trained on the
    text needs fewer ids for the same number of tokens.

    Args:
        sample: The text.
        config: Its tokenizer counts if "data.tokenizer" is given.
        given: The settings that the person gave.
        vocab_sizes: The vocabulary sizes of the tokenizer bpe to compare, ascending.
    """
    name = config.tokenizer if "data.tokenizer" in given else None
    options: list[tuple[Tokenizer, dict[str, str | int], float]] = []
    if name in (None, "char"):
        start = time.perf_counter()
        characters = "".join(sorted(set().union(*sample.documents)))
        if name == "char" or len(characters) <= MAX_CHARACTERS:
            options.append((CharTokenizer(characters), {"data.tokenizer": "char"}, time.perf_counter() - start))
    if name in (None, "bpe"):
        start = time.perf_counter()
        sizes = [config.bpe_vocab_size] if config.vocab_size is not None else _sizes_for(sample, vocab_sizes)
        trained = _train_bpe(sample, [size for size in sizes if size is not None])
        seconds = time.perf_counter() - start
        options += [
            (tokenizer, {"data.tokenizer": "bpe", "data.vocab_size": size}, seconds) for size, tokenizer in trained
        ]
    if name not in (None, "char", "bpe"):
        options.append((open_tokenizer(name), {"data.tokenizer": name}, 0.0))
    found = [
        (tokenizer_statistics(sample, tokenizer, settings, seconds), tokenizer)
        for tokenizer, settings, seconds in options
    ]
    # it belongs to the text, and single measurements of it differ by a third
    fall = statistics.fmean(measured.ngram_fall for measured, _ in found)
    return [(replace(measured, ngram_fall=fall), tokenizer) for measured, tokenizer in found]


def _sizes_for(sample: TextSample, vocab_sizes: tuple[int, ...]) -> list[int]:
    """Return the vocabulary sizes for which the sample has enough text, at least the smallest one."""
    characters = sum(map(len, sample.documents))
    return [size for size in vocab_sizes if size * MIN_CHARACTERS_PER_ID <= characters] or [vocab_sizes[0]]


def _train_bpe(sample: TextSample, vocab_sizes: list[int]) -> list[tuple[int, BytePairTokenizer]]:
    """Train byte-pair vocabularies of several sizes at once: a smaller one is the beginning of a larger one.

    A size that the text has too few pairs for is left out, unless it is the smallest one.
    """
    largest = train_bpe(sample.documents, max(vocab_sizes))
    tokens, pattern = largest.tokens, encoding_pattern(largest.encoding)
    sizes = [size for size in vocab_sizes if size <= largest.vocab_size]
    if not sizes:
        return [(vocab_sizes[0], largest)]
    return [(size, BytePairTokenizer.from_tokens("bpe", tokens[: size - 1], pattern)) for size in sizes]
