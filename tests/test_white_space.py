"""Long runs of white space in byte-pair tokenizers."""

import re
import sys
from pathlib import Path

import pytest
import regex
from corpora import build, documents
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiktoken_ext import openai_public

from lit_gpt import white_space
from lit_gpt.compat import encode_pre_token
from lit_gpt.tokenizer import BytePairTokenizer, open_tokenizer, train_bpe
from lit_gpt.vocabularies import get_encoding_offline
from lit_gpt.white_space import WHITE_SPACE, cut_long_runs, encode_run, find_long_runs

CL100K = open_tokenizer("cl100k_base")
assert isinstance(CL100K, BytePairTokenizer)


def o200k_pattern() -> str:
    """Return the pattern of o200k_base, whose vocabulary is in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **options: {})
        return openai_public.o200k_base()["pat_str"]


def tokenizer_with(pattern: str) -> BytePairTokenizer:
    return BytePairTokenizer.from_tokens("t", CL100K.tokens[:5000], pattern)


TOKENIZERS = {
    "cl100k": CL100K,
    "gpt2": tokenizer_with(get_encoding_offline("gpt2")._pat_str),
    "o200k": tokenizer_with(o200k_pattern()),
}


def test_white_space_is_that_of_tiktoken() -> None:
    tokenizer = BytePairTokenizer.from_tokens("t", [bytes([byte]) for byte in range(256)], r"\s")
    characters = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    found = "".join(tokenizer.decode(tokenizer.encoding.encode_ordinary("".join(characters))))
    assert found == "".join(filter(re.compile(f"[{WHITE_SPACE}]").match, characters))


PARTS = [
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "\u3000",
    "\xa0",
    "\x85",
    "\x1c",
    "a",
    "ab",
    "中",
    "7",
    ".",
    "...",
    "/",
    "'s",
    "\u0301",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=120, deadline=None)
@example(parts=["a", " ", " ", " ", " "])
@example(parts=["...", "\n", "\n", " ", " ", " ", "/"])
@example(parts=[" ", " ", " ", "\n", "\n", "\n", "\n"])
@example(parts=["...", "\n", "\n", "\n", " ", " ", " "])
@example(parts=["...", " ", " ", "\n", " ", " ", " ", " "])
@given(parts=st.lists(st.sampled_from(PARTS), max_size=20))
def test_cut_text_has_the_ids_of_the_whole(name: str, parts: list[str]) -> None:
    tokenizer, text = TOKENIZERS[name], "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(white_space, "LONG_RUN", 3)
        assert "".join(part for part, _ in cut_long_runs(text, tokenizer.encoding._pat_str)) == text
        assert tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(text)
        ids, lengths = tokenizer.encode_documents(["a", text, text])
        expected = [tokenizer.encoding.encode_ordinary(document) for document in ("a", text, text)]
        assert ids.tolist() == [token for document in expected for token in [*document, tokenizer.end_of_text]]
        assert lengths.tolist() == [len(document) + 1 for document in expected]


@given(parts=st.lists(st.sampled_from(PARTS), max_size=30), length=st.integers(1, 6))
def test_find_long_runs_matches_regular_expression(parts: list[str], length: int) -> None:
    text = "".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(white_space, "LONG_RUN", length)
        assert list(find_long_runs(text)) == [
            match.span() for match in re.finditer(f"[{WHITE_SPACE}]{{{length},}}", text)
        ]


@pytest.mark.parametrize(
    ("name", "run", "end"),
    [("cl100k", " ", "y"), ("cl100k", "\u3000\t", "y"), ("gpt2", " ", "y"), ("o200k", " ", "y"), ("o200k", " ", "")],
)
def test_more_than_a_million_blanks_are_encoded(
    name: str, run: str, end: str, capfd: pytest.CaptureFixture[str]
) -> None:
    pattern, text = TOKENIZERS[name].encoding._pat_str, f"x{run * (1_100_000 // len(run))}{end}"
    tokenizer = BytePairTokenizer.from_tokens("t", [bytes([byte]) for byte in range(256)], pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert capfd.readouterr().err == ""  # where a panic of Rust is printed


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("character", [" ", "\n", "\t", "\r", "\u3000", "\xa0", "\u2003"], ids=ascii)
def test_ids_of_a_run_of_one_character_follow_from_a_part_of_it(name: str, character: str) -> None:
    encoding = TOKENIZERS[name].encoding
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(white_space, "LONG_RUN", 2**9)
        for length in [*range(1020, 1160, 19), 1535, 1536, 1537, 2048, 4095, 10_001]:
            assert encode_run(encoding, character * length) == encode_pre_token(encoding, character * length), length
        mixed = " " * 5000 + character + " " * 3001
        assert encode_run(encoding, mixed) == encode_pre_token(encoding, mixed)


def test_pre_tokens_of_long_runs_are_those_of_another_engine() -> None:
    run = " " * 70_000
    for pattern in (tokenizer.encoding._pat_str for tokenizer in TOKENIZERS.values()):
        for text in (f"x{run}y", f"x.\n{run}", f"{run}\n{run}7", f"a {run}\t\n中{run}.b"):
            pre_tokens = regex.findall(pattern, text)
            parts = list(cut_long_runs(text, pattern))
            for part, is_pre_token in parts:
                found = [part] if is_pre_token else regex.findall(pattern, part)
                assert found == pre_tokens[: len(found)]
                del pre_tokens[: len(found)]


def test_bpe_is_trained_on_long_runs() -> None:
    tokenizer = train_bpe(["x" + " " * 1_100_000 + "y", "abab"], 300)
    assert b"    " in tokenizer.tokens


def test_row_with_a_long_run_of_blanks_is_a_document(tmp_path: Path) -> None:
    text = "before" + " " * 1_100_000 + "after"
    (tmp_path / "t.csv").write_text(f"text\none\n{text}\ntwo\n", encoding="utf-8")
    for tokenizer in ("cl100k_base", "bpe"):
        assert documents(build(tmp_path / "t.csv", tokenizer)) == ["one", text, "two"]
