"""Settings that determine the contents of a corpus."""

from dataclasses import dataclass

from lit_gpt.data.read_options import ReadOptions
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Vocab

SPLITS = ("train", "val", "test")  # in the order in which they are stored
DEFAULT_BPE_VOCAB_SIZE = 4096
FITTED = ("bpe", "byte", "char")  # tokenizers from which nothing is pruned


@dataclass(frozen=True)
class SplitOptions:
    """How documents are assigned to the train, val and test split.

    Without `seed`, `column` and `group` the order of the documents is kept: the first ones train, the last ones test.
    The names of these fields are part of the cache key (`corpus_key`): a renamed field makes every cache invalid.

    Attributes:
        val_fraction: Fraction of the documents in the val split; in raw mode, of the tokens. It counts the documents of
            files that are given for no split.
        test_fraction: Fraction of them in the test split.
        seed: Assigns each document by a hash of its text and this seed. Equal texts are in the same split, and a
            document stays in its split when others are added.
        column: Name of the column that holds the split of each row: train, val or test.
        group: Name of a column. Documents with the same value in it are in the same split.
        dedupe: Leave out every document whose text has occurred before.
    """

    val_fraction: float = 0.1
    test_fraction: float = 0.0
    seed: int | None = None
    column: str | None = None
    group: str | None = None
    dedupe: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise UserError(
                f"--data.val_fraction is {self.val_fraction}: give a fraction between 0 and 1, for example 0.1"
            )
        if not 0 <= self.test_fraction < 1 - self.val_fraction:
            raise UserError(
                f"--data.test_fraction is {self.test_fraction}: give a fraction from 0 to less than "
                f"{1 - self.val_fraction:g}, so that some documents are left for training"
            )
        if self.column is not None and (self.group is not None or self.seed is not None or self.has_fractions):
            raise UserError(
                "--data.split_column already determines every split: leave out --data.group_column, split_seed, "
                "val_fraction and test_fraction"
            )

    @property
    def has_fractions(self) -> bool:
        """Whether a fraction differs from its default."""
        return (self.val_fraction, self.test_fraction) != (SplitOptions.val_fraction, SplitOptions.test_fraction)

    def check_split_files(self, has_val_files: bool, has_test_files: bool, is_raw: bool = False) -> None:
        """Check that these options do not contradict files that are given for a split, and divide the other files.

        Raises:
            UserError: They do, or they divide nothing.
        """
        flags = ["--data.val_files"] * has_val_files + ["--data.test_files"] * has_test_files
        if flags and self.column is not None:
            raise UserError(
                f"--data.split_column already determines every split: leave it out, or {' and '.join(flags)}"
            )
        if has_val_files and self.val_fraction != SplitOptions.val_fraction:
            raise UserError("--data.val_files is the validation split: leave it out, or --data.val_fraction")
        if has_test_files and self.test_fraction != SplitOptions.test_fraction:
            raise UserError("--data.test_files is the test split: leave it out, or --data.test_fraction")
        if is_raw and has_val_files and self.test_fraction > 0:
            raise UserError(
                "--data.mode raw cannot take a test split from the training files beside --data.val_files: "
                "give --data.test_files in place of --data.test_fraction"
            )
        is_divided = not has_val_files or (not has_test_files and self.test_fraction > 0)
        unused = ["--data.split_seed"] * (self.seed is not None) + ["--data.group_column"] * (self.group is not None)
        if unused and not is_divided:
            remedy = "" if has_test_files else ", or divide them with --data.test_fraction"
            raise UserError(
                f"{' and '.join(flags)} leave all other documents for training, so that {' and '.join(unused)} has no "
                f"effect: leave it out{remedy}"
            )

    def fractions(self, has_val_files: bool, has_test_files: bool) -> tuple[float, float]:
        """Return the fractions of the val and of the test split among the documents of the other files."""
        return 0.0 if has_val_files else self.val_fraction, 0.0 if has_test_files else self.test_fraction


def boundaries(count: int, fractions: tuple[float, float]) -> tuple[int, int]:
    """Return the index of the first val and of the first test item when `count` items are split in their order.

    Args:
        count: Number of items.
        fractions: Of the val and of the test split.
    """
    val, test = fractions
    return int(count * (1 - val - test)), int(count * (1 - test))


@dataclass(frozen=True)
class CorpusConfig:
    """Everything that determines a corpus, except for its source files.

    Attributes:
        read_options: How files are read.
        split_options: How documents are assigned to splits.
        tokenizer: Name of a tokenizer, or path of a .tiktoken file.
        vocab: Of a byte-pair tokenizer that is not trained on the corpus: "pruned" to the tokens that the corpus
            needs, or "full".
        vocab_size: Vocabulary size of the tokenizer "bpe"; 4096 if None.
    """

    read_options: ReadOptions
    split_options: SplitOptions = SplitOptions()
    tokenizer: str = "cl100k_base"
    vocab: Vocab = "pruned"
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        split = self.split_options
        needs_rows = split.seed is not None or split.column is not None or split.group is not None or split.dedupe
        if self.read_options.mode == "raw" and needs_rows:
            raise UserError(
                "--data.mode raw has no rows: leave out data.split_seed, split_column, group_column and dedupe"
            )

        if self.vocab != "pruned" and self.tokenizer in FITTED:
            raise UserError(
                f"--data.vocab {self.vocab} is for vocabularies that are not made for the text: give --data.vocab "
                f"pruned with --data.tokenizer {self.tokenizer}, or another tokenizer"
            )
        if self.vocab_size is not None and self.tokenizer != "bpe":
            raise UserError(
                f"--data.vocab_size {self.vocab_size} is for a vocabulary that is trained on the text: give "
                "--data.tokenizer bpe, or --data.vocab_size null"
            )

    @property
    def bpe_vocab_size(self) -> int | None:
        """Vocabulary size of the tokenizer "bpe", with None resolved; None for other tokenizers."""
        if self.tokenizer != "bpe":
            return None
        return DEFAULT_BPE_VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    @property
    def prunes_vocab(self) -> bool:
        return self.vocab == "pruned" and self.tokenizer not in FITTED

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name for display, for example "cl100k_base pruned"."""
        if self.tokenizer == "bpe":
            return f"bpe {self.bpe_vocab_size}"
        return self.tokenizer if self.tokenizer in ("byte", "char") else f"{self.tokenizer} {self.vocab}"
