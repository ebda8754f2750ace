"""Settings that determine a corpus."""

import pytest
from corpora import corpus_config

from lit_gpt.data.config import CorpusConfig, SplitOptions, boundaries
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import Vocab


@pytest.mark.parametrize(
    "options",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"test_fraction": -0.1},
        {"val_fraction": 0.5, "test_fraction": 0.5},
        {"column": "a", "seed": 1},
        {"column": "a", "group": "b"},
        {"column": "a", "val_fraction": 0.2},
        {"column": "a", "test_fraction": 0.1},
    ],
)
def test_invalid_split_options_are_user_errors(options: dict) -> None:
    with pytest.raises(UserError, match="--data"):
        SplitOptions(**options)


@pytest.mark.parametrize("options", [{"seed": 0}, {"column": "a"}, {"group": "a"}, {"dedupe": True}])
def test_raw_mode_refuses_options_of_rows(options: dict) -> None:
    with pytest.raises(UserError, match=r"--data\.mode raw has no rows"):
        corpus_config(split=SplitOptions(**options), mode="raw")


# files for the val and for the test split, options, what is wrong
CONTRADICTIONS = [
    ("val", {"column": "a"}, "split_column already determines every split: leave it out, or --data.val_files"),
    ("test", {"column": "a"}, "split_column already determines every split: leave it out, or --data.test_files"),
    ("val", {"val_fraction": 0.2}, "val_files is the validation split: leave it out, or --data.val_fraction"),
    ("val test", {"val_fraction": 0.2}, "val_files is the validation split: leave it out, or --data.val_fraction"),
    ("test", {"test_fraction": 0.2}, "test_files is the test split: leave it out, or --data.test_fraction"),
    ("val", {"seed": 0}, "split_seed has no effect: leave it out, or divide them with --data.test_fraction"),
    ("val", {"group": "a"}, "group_column has no effect: leave it out, or divide them with --data.test_fraction"),
    ("val test", {"seed": 0}, "split_seed has no effect: leave it out$"),
]


@pytest.mark.parametrize(("files", "options", "message"), CONTRADICTIONS)
def test_files_of_splits_refuse_what_contradicts_them(files: str, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SplitOptions(**options).check_split_files("val" in files, "test" in files)
    SplitOptions(**options).check_split_files(False, False)


@pytest.mark.parametrize(
    ("files", "options"),
    [
        ("val", {"test_fraction": 0.2, "seed": 1}),
        ("val", {"test_fraction": 0.2, "group": "a"}),
        ("test", {"val_fraction": 0.2, "seed": 1, "dedupe": True}),
        ("test", {"group": "a"}),
        ("val test", {"dedupe": True}),
    ],
)
def test_files_of_splits_leave_others_to_the_options(files: str, options: dict) -> None:
    SplitOptions(**options).check_split_files("val" in files, "test" in files)


def test_raw_mode_takes_no_test_split_beside_val_files() -> None:
    with pytest.raises(UserError, match=r"give --data\.test_files in place of --data\.test_fraction"):
        SplitOptions(test_fraction=0.2).check_split_files(True, False, is_raw=True)


@pytest.mark.parametrize(
    "options", [{"columns": ("a",)}, {"template": "{a}"}, {"delimiter": ";"}, {"quote": "none"}, {"header": False}]
)
def test_raw_mode_refuses_options_of_tables(options: dict) -> None:
    with pytest.raises(UserError, match=f"leave out --data.{next(iter(options))}, or give --data.mode rows$"):
        ReadOptions(mode="raw", **options)
    ReadOptions(mode="raw", encoding="utf-8")


def test_boundaries_round_train_down() -> None:
    assert boundaries(8, (0.25, 0.125)) == (5, 7)
    assert boundaries(9, (0.25, 0.125)) == (5, 7)
    assert boundaries(1, (0.25, 0.125)) == (0, 0)
    assert boundaries(7, (0.0, 0.0)) == (7, 7)


@pytest.mark.parametrize(
    ("tokenizer", "vocab", "prunes_vocab", "name"),
    [
        ("cl100k_base", "pruned", True, "cl100k_base pruned"),
        ("cl100k_base", "full", False, "cl100k_base full"),
        ("mine.tiktoken", "pruned", True, "mine.tiktoken pruned"),
        ("bpe", "pruned", False, "bpe 4096"),
        ("byte", "pruned", False, "byte"),
        ("char", "pruned", False, "char"),
    ],
)
def test_only_public_vocabularies_are_pruned(tokenizer: str, vocab: Vocab, prunes_vocab: bool, name: str) -> None:
    config = CorpusConfig(ReadOptions(), tokenizer=tokenizer, vocab=vocab)
    assert (config.prunes_vocab, config.tokenizer_name) == (prunes_vocab, name)


def test_vocab_size_is_for_bpe_only() -> None:
    assert CorpusConfig(ReadOptions(), tokenizer="bpe", vocab_size=300).tokenizer_name == "bpe 300"
    assert [CorpusConfig(ReadOptions(), tokenizer=name).bpe_vocab_size for name in ("bpe", "char")] == [4096, None]
    with pytest.raises(UserError, match=r"--data\.vocab_size 300 is for .*: give --data\.tokenizer bpe"):
        CorpusConfig(ReadOptions(), tokenizer="char", vocab_size=300)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "bpe"])
def test_full_vocabulary_is_for_vocabularies_that_can_be_pruned(tokenizer: str) -> None:
    with pytest.raises(UserError, match=rf"give --data\.vocab pruned with --data\.tokenizer {tokenizer}, or another"):
        CorpusConfig(ReadOptions(), tokenizer=tokenizer, vocab="full")
