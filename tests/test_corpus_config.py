"""Settings that determine a corpus."""

import pytest
from corpora import corpus_config

from lit_gpt.data.config import CorpusConfig, SplitOptions
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


@pytest.mark.parametrize(
    "options", [{"seed": 0}, {"column": "a"}, {"group": "a"}, {"val_fraction": 0.2}, {"test_fraction": 0.1}]
)
def test_files_of_splits_refuse_other_split_options(options: dict) -> None:
    for has_val_files, has_test_files in ((True, False), (True, True)):
        with pytest.raises(UserError, match="already determine every split"):
            SplitOptions(**options).check_split_files(has_val_files, has_test_files)
        SplitOptions(dedupe=True).check_split_files(has_val_files, has_test_files)
    SplitOptions(**options).check_split_files(False, False)


def test_test_files_alone_are_refused() -> None:
    with pytest.raises(UserError, match=r"--data\.test_files without --data\.val_files"):
        SplitOptions().check_split_files(False, True)


@pytest.mark.parametrize(
    "options", [{"columns": ("a",)}, {"template": "{a}"}, {"delimiter": ";"}, {"quote": "none"}, {"header": False}]
)
def test_raw_mode_refuses_options_of_tables(options: dict) -> None:
    with pytest.raises(UserError, match=f"leave out --data.{next(iter(options))}$"):
        ReadOptions(mode="raw", **options)
    ReadOptions(mode="raw", encoding="utf-8")


def test_boundaries_round_train_down() -> None:
    options = SplitOptions(val_fraction=0.25, test_fraction=0.125)
    assert options.boundaries(8) == (5, 7)
    assert options.boundaries(9) == (5, 7)
    assert options.boundaries(1) == (0, 0)


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
