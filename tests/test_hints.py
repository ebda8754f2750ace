"""What fit.py and prepare.py say about the text: lines as documents, duplicates across the splits, many tokens."""

from pathlib import Path
from typing import Any

import pytest
from conftest import DEFAULT

from lit_gpt.cli.describe_data import duplicates_warning, hint_lines
from lit_gpt.cli.prepare import main as prepare
from lit_gpt.data.config import CorpusConfig, SplitOptions
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sources import Source


def corpus_of(folder: Path, name: str, lines: list[str], **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Build a corpus from the lines of a file; return its report and its hints."""
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    sources = [Source(str(folder / name))]
    config = CorpusConfig(**{"read_options": ReadOptions(), "tokenizer": "byte", **options})
    report = open_corpus(sources, config, folder / "cache", processes=1).report
    return report, hint_lines(report, config, sources)


RAW = ReadOptions(mode="raw")


@pytest.mark.parametrize(
    ("name", "options", "has_hint"),
    [
        ("a.txt", ReadOptions(), True),
        ("a.log", ReadOptions(format="txt"), True),
        ("a.csv", ReadOptions(columns=("text",)), False),
        ("a.txt", ReadOptions(format="csv"), False),
        ("a.txt", RAW, False),
    ],
)
def test_lines_that_are_documents_are_pointed_out(
    tmp_path: Path, name: str, options: ReadOptions, has_hint: bool
) -> None:
    _, hints = corpus_of(tmp_path, name, ["text", *(f"row {i}" for i in range(20))], read_options=options)
    hint = "hint        each line of a .txt file is a document; --data.mode raw reads it as one text"
    assert (hint in hints) == has_hint


@pytest.mark.parametrize(
    ("tokenizer", "text", "hint"),
    [
        ("byte", "床前明月光", " tokens a character are many; with --data.tokenizer bpe or char more text"),
        ("cl100k_base", "帝京篇秦川雄帝宅", "with --data.tokenizer bpe or char more text"),
        ("char", "床前明月光", None),  # the token at the end of each document does not count
        ("char", "a", None),
        ("byte", "plain English", None),
    ],
)
def test_many_tokens_of_a_character_are_pointed_out(
    tmp_path: Path, tokenizer: str, text: str, hint: str | None
) -> None:
    for options in (ReadOptions(columns=("text",)), RAW):
        name = "a.txt" if options == RAW else "a.csv"
        _, hints = corpus_of(tmp_path, name, ["text", *[text] * 300], read_options=options, tokenizer=tokenizer)
        assert (hint in " ".join(hints)) if hint else not hints


def test_advice_does_not_name_the_tokenizer_that_is_in_use(tmp_path: Path) -> None:
    sources, config = [Source("a.csv")], CorpusConfig(ReadOptions(), tokenizer="bpe")
    (hint,) = hint_lines({"documents": 0, "tokens": 140, "characters": 100}, config, sources)
    assert "--data.tokenizer char more" in hint


def test_share_of_duplicates_across_the_splits_is_a_warning_that_dedupe_mends(tmp_path: Path) -> None:
    rows = [f"row {i}" for i in range(180)] + [f"row {i}" for i in range(5)] + [f"other {i}" for i in range(15)]
    options = {"read_options": ReadOptions(columns=("text",))}
    report, _ = corpus_of(tmp_path, "a.csv", ["text", *rows], **options)
    assert duplicates_warning(report) == (
        "5 of 20 validation documents (25.0%) are also training documents, so that their loss says little about new "
        "text: give --data.dedupe true"
    )
    for mended in (SplitOptions(dedupe=True), SplitOptions(seed=1)):
        assert (
            duplicates_warning(corpus_of(tmp_path, "a.csv", ["text", *rows], **options, split_options=mended)[0])
            is None
        )
    halves = SplitOptions(val_fraction=0.05, test_fraction=0.05)
    report, _ = corpus_of(tmp_path, "a.csv", ["text", *rows], **options, split_options=halves)
    assert "5 of 21 validation and test documents" in (duplicates_warning(report) or "")


def test_prepare_prints_the_hints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(["--config", "small.yaml", "--dry_run"], DEFAULT) == 0
    assert "hint        each line of a .txt file is a document;" in capsys.readouterr().out
