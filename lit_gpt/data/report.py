"""Count what the files and the token ids of a corpus contain, for report.json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.sources import Source
from lit_gpt.data.split import count_leaked, location, longest_documents
from lit_gpt.data.tokenize import read_block
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Tokenizer

MAX_REJECTED = 0.1  # fraction of the rows
NUM_REJECTED = 20  # rejected rows that are listed
NUM_DUPLICATES = 20  # duplicates that are listed
NUM_RAREST = 10  # tokens that are listed


@dataclass
class TextCounts:
    """What the source files contain.

    Attributes:
        documents_per_block: File of each block in order, and the number of its documents.
        rows: Number of rows, blank and rejected rows included; in raw mode of lines.
        empty_rows: Number of rows without text.
        rejected: Number of rows that cannot be read.
        rejected_examples: The first rejected rows as [file, line, reason].
        characters: Number of characters in all documents.
        num_bytes: Number of bytes in all documents in UTF-8.
        used_ids: The token ids that occur.
    """

    documents_per_block: dict[Path, int] = field(default_factory=dict)
    rows: int = 0
    empty_rows: int = 0
    rejected: int = 0
    rejected_examples: list[list[Any]] = field(default_factory=list)
    characters: int = 0
    num_bytes: int = 0
    used_ids: set[int] = field(default_factory=set)

    def check(self, sources: list[Source], is_raw: bool) -> None:
        """Raise UserError if too many rows, or lines in raw mode, are rejected, or if there is no text."""
        if self.rejected > MAX_REJECTED * self.rows:
            file, line, reason = self.rejected_examples[0]
            unit = "lines" if is_raw else "rows"
            raise UserError(f"{file} line {line}: {reason} ({self.rejected:,} of {self.rows:,} {unit} cannot be read)")
        if not self.characters:
            found = f"no text in any of {self.empty_rows} rows" if self.empty_rows else "no rows, at most a header"
            raise UserError(f"{', '.join(map(str, sources))}: {found}: give a file with text in it")


def merge_blocks(sources: list[Source], blocks: list[Path], records_path: Path, rejected_path: Path) -> TextCounts:
    """Count what all blocks contain.

    Args:
        sources: All sources.
        blocks: The files of the blocks, in order.
        records_path: Where to write the records of all documents.
        rejected_path: Where to write the rejected rows, one JSON object per line.

    Raises:
        OSError: A block is damaged, or nothing can be written.
    """
    counts = TextCounts()
    with open(records_path, "xb") as record_file, open(rejected_path, "x", encoding="utf-8") as rejected:
        for path in blocks:
            _, records, metadata = read_block(path)
            record_file.write(records.tobytes())
            counts.documents_per_block[path] = len(records)
            counts.rows += metadata["rows"]
            counts.empty_rows += metadata["empty_rows"]
            counts.rejected += len(metadata["rejected"])
            counts.characters += int(records["characters"].sum(dtype=np.int64))
            counts.num_bytes += metadata["bytes"]
            counts.used_ids.update(metadata["used"])
            for line, reason in metadata["rejected"]:
                row = {"file": str(sources[metadata["file"]]), "line": line, "reason": reason}
                if len(counts.rejected_examples) < NUM_REJECTED:
                    counts.rejected_examples.append(list(row.values()))
                rejected.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def duplicate_report(
    records: Path,
    sources: list[Source],
    config: CorpusConfig,
    splits: np.ndarray,
    is_duplicate: np.ndarray,
    originals: np.ndarray,
) -> dict[str, Any]:
    """Return what the report says about duplicates and long documents.

    In raw mode a record is a block instead of a document, so that all counts are 0.

    Args:
        records: File with the records of all documents.
        sources: All sources.
        config: The settings of the corpus.
        splits: The split of each document, (documents,) uint8.
        is_duplicate: Mask of the duplicates, (documents,) bool.
        originals: The first document with the same text for every document; any in raw mode, (documents,).
    """
    is_raw = config.read_options.mode == "raw"

    def place(document: int) -> list[Any]:
        file, line = location(records, document)
        return [str(sources[file]), line]

    duplicates = int(is_duplicate.sum())
    listed = np.flatnonzero(is_duplicate)[:NUM_DUPLICATES]
    longest = [] if is_raw else longest_documents(records)
    return {
        "duplicates": duplicates,
        "duplicates_left_out": duplicates if config.split_options.dedupe else 0,
        "duplicates_across": 0 if is_raw else count_leaked(originals, splits),
        "duplicates_first": [[place(document), place(int(originals[document]))] for document in listed.tolist()],
        "longest": [[str(sources[file]), line, characters] for file, line, characters in longest],
    }


def vocab_report(tokenizer: Tokenizer, frequencies: np.ndarray) -> dict[str, Any]:
    """Return what the report says about the vocabulary.

    Args:
        tokenizer: The tokenizer, V ids.
        frequencies: How often each id occurs, (V,) int64.
    """
    rarest = [int(token) for token in np.argsort(frequencies, kind="stable") if frequencies[token]][:NUM_RAREST]
    return {
        "vocab_size": tokenizer.vocab_size,
        "vocabulary_in_use": int((frequencies > 0).sum()),
        "least_frequent": [
            [token, tokenizer.token_bytes(token).decode("utf-8", "backslashreplace"), int(frequencies[token])]
            for token in rarest
        ],
    }
