"""The settings that decide what a corpus contains."""

from dataclasses import dataclass

from lit_gpt.data.read_options import ReadOptions
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Vocab

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SplitConfig:
    """Which documents train, validate and test; the `data.*` flags of the same names.

    Attributes:
        val_fraction: the share that validates; of documents, in a raw text of tokens.
        test_fraction: the share kept for a test.
        seed: None: in order, the last ones are validation's and then the test's; a number: dealt by their text, so that
            equal texts share a part, and a document keeps its part when others come.
        column: holds the part's name instead: train, val or test.
        group: a column; documents with the same in it share a part.
        dedupe: whether a document that came before is left out.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.0
    seed: int | None = None
    column: str | None = None
    group: str | None = None
    dedupe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--data.val_fraction is {self.val_fraction}: give a share between 0 and 1, as 0.1")
        if not 0 <= self.test_fraction < 1 - self.val_fraction:
            raise UserError(
                f"--data.test_fraction is {self.test_fraction}: give a share from 0 up that leaves some to train on"
            )
        if self.column is not None and (self.group is not None or self.seed is not None):
            raise UserError("--data.split_column decides alone: leave out --data.group_column and --data.split_seed")


@dataclass(frozen=True)
class CorpusConfig:
    """Everything but the files that decides a corpus.

    Attributes:
        read_options: how files are read.
        split: how documents are dealt.
        tokenizer: its name, or the path of a .tiktoken file.
        vocab: of a byte-pair vocabulary: "pruned" to what the corpus uses, or "full".
        vocab_size: of one that is learned from the text.
    """

    read_options: ReadOptions
    split: SplitConfig = SplitConfig()
    tokenizer: str = "cl100k_base"
    vocab: Vocab = "pruned"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        by_rows = self.split.seed, self.split.column, self.split.group, self.split.dedupe or None
        if self.read_options.mode == "raw" and any(setting is not None for setting in by_rows):
            raise UserError(
                "--data.mode raw has no rows: leave out data.split_seed, split_column, group_column and dedupe"
            )

    @property
    def tokenizer_name(self) -> str:
        """As it is shown, "cl100k_base pruned"."""
        if self.tokenizer == "bpe":
            return f"bpe {self.vocab_size}"
        prunes = self.tokenizer not in ("byte", "char")
        return f"{self.tokenizer} {self.vocab}" if prunes else self.tokenizer
