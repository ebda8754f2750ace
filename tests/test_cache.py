"""A corpus in the cache: every damaged file is found when it is opened, and the corpus is built again."""

import json
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import build, documents, file_contents

from lit_gpt.data import cache, corpus
from lit_gpt.data.cache import Corpus, DamagedCorpusError, load_corpus, write_corpus_digests
from lit_gpt.files import remove

FILES = ("SHA256SUMS", "corpus.json", "ids_00000.bin", "ids_00001.bin", "rejected.jsonl", "report.json")
ROWS = [f"row {i} 第{i}行" for i in range(60)]


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """Return a small corpus in two shards, with a rejected row."""
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 300)
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{row},\n" for row in ROWS) + "1,2,3\n", encoding="utf-8")
    return build(path, "cl100k_base", columns=("a",))


def open_again(built: Corpus) -> Corpus:
    return build(built.folder.parent.parent / "t.csv", "cl100k_base", columns=("a",))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace(path: Path, create: Callable[[Path], object]) -> None:
    path.unlink()
    create(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 2),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "a folder": lambda path: replace(path, Path.mkdir),
    "a pipe": lambda path: replace(path, os.mkfifo),
    "a link": lambda path: replace(
        path.rename(path.with_name("elsewhere")), lambda moved: path.symlink_to("/dev/zero")
    ),
    "garbage": lambda path: path.write_bytes(b'{"a": [' * 2000),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
}


def test_corpus_has_the_files_that_are_damaged_below(built: Corpus) -> None:
    assert tuple(file_contents(built)) == FILES
    assert built.report["rejected"] == 1
    assert documents(built) == ROWS


def test_every_damaged_file_is_named(built: Corpus) -> None:
    contents = file_contents(built)
    for name in FILES:
        path = built.folder / name
        for damage in DAMAGES.values():
            damage(path)
            # where a digest is damaged, the file that has another one is named
            with pytest.raises(DamagedCorpusError, match=" is missing" if name == "SHA256SUMS" else f"^{name} is"):
                load_corpus(built.folder)
            remove(path)
            path.write_bytes(contents[name])


REBUILT = dict(zip(FILES, ["removed", "garbage", "a bit", "a pipe", "a link", "a folder"], strict=True))


@pytest.mark.parametrize(("name", "damage"), list(REBUILT.items()))
def test_damaged_corpus_is_built_again_with_one_line(
    built: Corpus, caplog: pytest.LogCaptureFixture, name: str, damage: str
) -> None:
    expected = file_contents(built)
    DAMAGES[damage](built.folder / name)
    assert file_contents(open_again(built)) == expected
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"{built.folder} is damaged ({name} is missing or damaged): tokenizing the text again"]


def test_any_flipped_bit_or_truncation_is_found(built: Corpus) -> None:
    generator = random.Random(1)
    contents = file_contents(built)
    for name in FILES:
        path, content = built.folder / name, contents[name]
        for _ in range(60):
            changed = bytearray(content)
            changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
            path.write_bytes(changed)
            with pytest.raises(DamagedCorpusError):
                load_corpus(built.folder)
        for _ in range(20):
            path.write_bytes(content[: generator.randrange(len(content))])
            with pytest.raises(DamagedCorpusError):
                load_corpus(built.folder)
        path.write_bytes(content)
    assert load_corpus(built.folder) is not None


def test_folder_that_is_none_is_replaced(built: Corpus) -> None:
    expected = file_contents(built)
    for create in (lambda path: path.write_text("x"), os.mkfifo, lambda path: path.symlink_to(".")):
        shutil.rmtree(
            built.folder
        ) if built.folder.is_dir() and not built.folder.is_symlink() else built.folder.unlink()
        create(built.folder)
        assert file_contents(open_again(built)) == expected


def test_cache_of_an_earlier_version_without_digests_is_built_again(built: Corpus) -> None:
    expected = file_contents(built)
    (built.folder / "SHA256SUMS").unlink()
    assert file_contents(open_again(built)) == expected


# ---------------------------------------------------------------------------------- crafted files with right digests


def change_json(name: str, keys: tuple[str | int, ...], value: Any) -> Callable[[Path], None]:
    """Return a function that changes a value in corpus.json or report.json."""

    def change(folder: Path) -> None:
        content = inner = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / name).write_text(json.dumps(content), encoding="utf-8")

    return change


NUMBERS = [10**400, -1, 2**63, 1.5, float("nan"), float("inf"), True, None, "1", [], {}]
TOKENIZERS = [
    *(None, [], "byte", {}, {"name": "byte "}, {"name": ["byte"]}, {"name": "/etc/passwd", "pieces": None}),
    *({"name": "char"}, {"name": "char", "characters": "aa"}, {"name": "char", "characters": "\ud800"}),
    {"name": "char", "characters": ["a"]},
]
CRAFTED = [
    *(
        change_json("corpus.json", ("dtype",), value)
        for value in ("<f4", ">u2", "O", "u8", "", 2, None, ["<u2"], "<u4")
    ),
    *(change_json("corpus.json", ("tokenizer",), value) for value in TOKENIZERS),
    change_json("corpus.json", ("tokenizer",), {"name": "char", "characters": "abc"}),  # fewer ids than the text
    *(change_json("corpus.json", ("tokenizer", "vocab_size"), value) for value in NUMBERS),
    *(change_json("corpus.json", ("tokenizer", "end_of_text"), value) for value in (*NUMBERS, 0)),
    *(change_json("corpus.json", ("tokenizer", "pattern"), value) for value in ("(", "", None, 1)),
    *(change_json("corpus.json", ("tokenizer", "pieces"), value) for value in ({}, [], ["YQ=="] * 300, [1] * 300)),
    *(change_json("corpus.json", ("tokenizer", "pieces", 5), value) for value in ("", "!", "YQ==", 5, None)),
    *(change_json("report.json", ("parts", "train", "tokens"), value) for value in (*NUMBERS, 0)),
    *(change_json("report.json", ("documents",), value) for value in NUMBERS),
    *(
        change_json("report.json", ("rejected_first",), value)
        for value in ([["a", 1]], [1], [["a", "b", "c"]], {}, None)
    ),
    *(change_json("report.json", ("files", 0, "name"), value) for value in (1, None, ["a"])),
    *(change_json("report.json", ("parts",), value) for value in ([], {}, {"train": 1}, None)),
    lambda folder: (folder / "report.json").write_text("[1]"),
    lambda folder: (folder / "report.json").write_text('{"rows": ' + "9" * 5000 + "}"),
    lambda folder: (folder / "corpus.json").write_text("[" * 200_000),
    lambda folder: (folder / "ids_00000.bin").write_bytes(b"\xff" * 600),
    lambda folder: (folder / "ids_00000.bin").write_bytes(b"\0" * 602),
    lambda folder: (folder / "ids_00001.bin").write_bytes(b"\0"),
    lambda folder: (folder / "ids_00002.bin").write_bytes(b"\0" * 100),
    lambda folder: [path.unlink() for path in folder.glob("ids_*.bin")],
    lambda folder: os.truncate(folder / "corpus.json", 2**40),  # sparse: its digest is not computed
]


def test_crafted_corpus_with_right_digests_is_not_believed(built: Corpus) -> None:
    contents = file_contents(built)
    for number, craft in enumerate(CRAFTED):
        shutil.rmtree(built.folder)
        built.folder.mkdir()
        for name, content in contents.items():
            (built.folder / name).write_bytes(content)
        craft(built.folder)
        if (built.folder / "corpus.json").stat().st_size < 2**30:
            write_corpus_digests(built.folder)
        try:
            load_corpus(built.folder)
        except DamagedCorpusError:
            continue
        pytest.fail(f"CRAFTED[{number}] was read")


@pytest.mark.parametrize(
    "line",
    ["x  report.json", f"{'0' * 64}  ../report.json", f"{'0' * 64}  /etc/passwd", f"{'0' * 64} report.json", "\0"],
)
def test_crafted_digests_are_not_believed(built: Corpus, line: str) -> None:
    path = built.folder / "SHA256SUMS"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DamagedCorpusError, match="SHA256SUMS"):
        load_corpus(built.folder)


# ------------------------------------------------------------------------------------------------------------ costs


def test_only_a_bounded_number_of_bytes_of_a_large_corpus_is_compared(
    built: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = sum((built.folder / name).stat().st_size for name in ("corpus.json", "report.json"))
    monkeypatch.setattr(cache, "MAX_COMPARED_BYTES", small + 600)
    compared: list[list[str]] = []
    original = cache.damaged_files

    def record(folder: Path, needed: list[str], names: list[str]) -> list[str]:
        compared.append(names)
        return original(folder, needed, names)

    monkeypatch.setattr(cache, "damaged_files", record)
    for first in (0, 1):
        monkeypatch.setattr(time, "time_ns", lambda: first)  # noqa: B023
        assert load_corpus(built.folder) is not None
    assert compared == [["corpus.json", "report.json", f"ids_0000{i}.bin"] for i in (0, 1)]
    for name in ("ids_00000.bin", "ids_00001.bin", "rejected.jsonl"):  # of all others, the size or at least the kind
        content = (built.folder / name).read_bytes()
        replace(built.folder / name, os.mkfifo)
        with pytest.raises(DamagedCorpusError):
            load_corpus(built.folder)
        replace(built.folder / name, lambda path: path.write_bytes(content))  # noqa: B023


def test_workers_that_read_batches_do_not_compare_digests(built: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    pickled = pickle.dumps(built.split("val"))
    monkeypatch.setattr(cache, "damaged_files", lambda *args: pytest.fail("compared again"))
    np.testing.assert_array_equal(pickle.loads(pickled), built.split("val"))


def test_digests_are_compared_once_by_a_process_that_finds_the_corpus(
    built: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    original = cache.damaged_files
    monkeypatch.setattr(cache, "damaged_files", lambda folder, *args: calls.append(folder) or original(folder, *args))
    open_again(built)
    assert calls == [built.folder]
