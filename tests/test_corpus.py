"""A corpus is found again by its content, never by its name, and never half."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from lit_gpt.data import corpus
from lit_gpt.data.corpus import Corpus, corpus_key, open_corpus
from lit_gpt.data.readers import Reading
from lit_gpt.data.sample import write_sample
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer, TokenizerName, Vocab


def build(path: Path, name: TokenizerName = "byte", vocab: Vocab = "pruned", **reading: object) -> Corpus:
    return open_corpus([path], Reading(**reading), name, vocab, path.parent / "cache")  # type: ignore[arg-type]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("静夜思\n\nsecond <|endoftext|>\n   \nthird\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["cl100k_base", "byte", "char"])
def test_ids_are_the_documents_one_after_another(names: Path, name: TokenizerName) -> None:
    found = build(names, name)
    tokenizer = found.tokenizer
    expected = ["静夜思", "second <|endoftext|>", "third"]
    assert found.counts == {"files": 1, "documents": 3, "empty_rows": 2, "characters": sum(map(len, expected))}
    pieces = np.split(found.ids, found.ends)
    assert [tokenizer.decode(piece[:-1]) for piece in pieces[:-1]] == expected
    assert all(piece[-1] == tokenizer.end_of_text for piece in pieces[:-1])
    assert len(pieces[-1]) == 0


def test_a_raw_file_gives_its_own_ids_and_no_more(names: Path) -> None:
    found = build(names, "byte", mode="raw")
    assert bytes(found.ids.astype(np.uint8)) == names.read_bytes()
    assert list(found.ends) == [len(names.read_bytes())]


def test_between_raw_files_a_text_ends(names: Path) -> None:
    found = open_corpus([names, names], Reading(mode="raw"), "byte", "pruned", names.parent / "cache")
    size = len(names.read_bytes())
    assert list(found.ends) == [size, 2 * size + 1]
    assert found.ids[size] == found.tokenizer.end_of_text


def test_pruned_ids_are_the_full_ids_renamed(tmp_path: Path) -> None:
    write_sample(tmp_path / "t.csv")
    pruned = build(tmp_path / "t.csv", "cl100k_base", "pruned", columns=("name",))
    full = build(tmp_path / "t.csv", "cl100k_base", "full", columns=("name",))
    assert (pruned.ids.dtype, full.ids.dtype) == (np.uint16, np.uint32)
    assert len(pruned.ids) == len(full.ids)
    assert pruned.tokenizer.vocab_size < 2000 < full.tokenizer.vocab_size == 100_277
    for start in range(0, len(full.ids), 9973):
        part = slice(start, start + 300)
        assert [pruned.tokenizer.token_bytes(t) for t in pruned.ids[part]] == [
            full.tokenizer.token_bytes(t) for t in full.ids[part]
        ]


def test_large_files_are_rewritten_block_by_block(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(names, "cl100k_base")
    monkeypatch.setattr(corpus, "BLOCK", 3)
    monkeypatch.setattr(corpus, "FORMAT", 99)  # another key: built anew
    again = build(names, "cl100k_base")
    assert again.key != whole.key
    np.testing.assert_array_equal(again.ids, whole.ids)
    assert again.tokenizer == whole.tokenizer


def test_what_is_built_is_found_again(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(names)
    monkeypatch.setattr(corpus, "_build", lambda *args: pytest.fail("built again"))
    names.rename(names.with_name("renamed.txt"))
    os.utime(names.with_name("renamed.txt"), (0, 0))
    second = build(names.with_name("renamed.txt"))
    np.testing.assert_array_equal(first.ids, second.ids)
    assert second.tokenizer == first.tokenizer


def test_everything_that_decides_the_ids_is_in_the_key(names: Path) -> None:
    def key(name: TokenizerName = "cl100k_base", vocab: Vocab = "pruned", **reading: object) -> str:
        return corpus_key([names], Reading(**reading), name, vocab)  # type: ignore[arg-type]

    keys = [key(), key("byte"), key(vocab="full"), key(mode="raw"), key(template="{text}!"), key(encoding="latin-1")]
    names.write_text("changed", encoding="utf-8")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        build(tmp_path / "t.csv", columns=("a",))
    assert [path.name for path in (tmp_path / "cache").iterdir()] in ([], ["lock"])


def test_rows_without_text_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n , \n,\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text in any of 2 rows"):
        build(tmp_path / "t.csv", template="{a}{b}")
    (tmp_path / "header.csv").write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="no rows, at most a header"):
        build(tmp_path / "header.csv")


def test_what_a_killed_build_left_does_no_harm(names: Path) -> None:
    key = corpus_key([names], Reading(), "byte", "pruned")
    left = names.parent / "cache" / f"{key}.unfinished"
    left.mkdir(parents=True)
    (left / "ids.bin").write_bytes(b"half")
    assert len(build(names).ids) > 4
    assert not left.exists()


def _build_in_process(path: Path, builds: object) -> None:
    original = corpus._build

    def counted(*args: object) -> None:
        builds.put(1)  # type: ignore[attr-defined]
        original(*args)  # type: ignore[arg-type]

    corpus._build = counted  # type: ignore[assignment]
    build(path, "cl100k_base", columns=("name",))


def test_processes_that_want_the_same_corpus_build_it_once(tmp_path: Path) -> None:
    write_sample(tmp_path / "t.csv")
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    builds = context.Queue()
    processes = [context.Process(target=_build_in_process, args=(tmp_path / "t.csv", builds)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert builds.get(timeout=5) == 1
    assert builds.empty()
    assert isinstance(build(tmp_path / "t.csv", "cl100k_base", columns=("name",)).tokenizer, BytePairTokenizer)
