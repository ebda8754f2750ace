"""Helpers for tests that build a corpus."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.cache import Corpus
from lit_gpt.data.config import SPLITS, CorpusConfig, SplitOptions
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.shards import TokenIds
from lit_gpt.data.sources import Source
from lit_gpt.tokenizer import Vocab


def corpus_config(
    tokenizer: str = "byte", vocab: Vocab = "pruned", split: SplitOptions | None = None, **read_options: Any
) -> CorpusConfig:
    return CorpusConfig(ReadOptions(**read_options), split or SplitOptions(), tokenizer, vocab)


def build(path: Path, tokenizer: str = "byte", vocab: Vocab = "pruned", **read_options: Any) -> Corpus:
    """Build the corpus of one file, in the cache beside it."""
    config = corpus_config(tokenizer, vocab, **read_options)
    return open_corpus([Source(str(path))], config, path.parent / "cache")


def documents(corpus: Corpus, ids: TokenIds | None = None) -> list[str]:
    """Return the text of all documents, or of those in `ids`."""
    ids = np.asarray(corpus.ids if ids is None else ids)
    end_of_text = corpus.tokenizer.end_of_text
    *texts, remainder = np.split(ids, np.flatnonzero(ids == end_of_text) + 1)
    assert len(remainder) == 0
    return [corpus.tokenizer.decode(text[:-1]) for text in texts]


def file_contents(corpus: Corpus) -> dict[str, bytes]:
    """Return the content of every file of a corpus."""
    return {path.name: path.read_bytes() for path in sorted(corpus.folder.iterdir())}


def write_table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    """Write a CSV file with the columns text, part and writer."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "part", "writer"), *rows])
    return path


def split_table(path: Path, **options: Any) -> tuple[list[list[str]], dict[str, Any]]:
    """Build the corpus of a table from `write_table`; return the documents of each split and the report."""
    key_column = options.get("column", options.get("group"))
    split = SplitOptions(**options)
    config = corpus_config("byte", split=split, columns=("text",), split_key_column=key_column)
    corpus = open_corpus([Source(str(path))], config, path.parent / "cache")
    return [documents(corpus, corpus.split(name)) for name in SPLITS], corpus.report
