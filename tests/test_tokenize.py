"""Blocks of documents and their token ids."""

import array
import hashlib
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from corpora import build, corpus_config, documents, write_table

from lit_gpt.data import tokenize
from lit_gpt.data.config import SplitOptions
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import (
    Block,
    encode_block,
    read_block,
    read_blocks,
    read_texts,
    split_key,
    tokenize_block,
    train_tokenizer,
)
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer, ByteTokenizer, CharTokenizer

ROW_OPTIONS = corpus_config(encoding="utf-8").read_options
RAW_OPTIONS = corpus_config(mode="raw", encoding="utf-8").read_options


def write_lines(path: Path, lines: list[str]) -> Source:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return Source(str(path))


def read_all(sources: list[Source], block_characters: int, file: int = 0) -> list[Block]:
    return list(read_blocks(sources, [ROW_OPTIONS] * len(sources), SplitOptions(), block_characters, file))


# ------------------------------------------------------------------------------------------------- reading blocks


def test_block_ends_when_it_has_enough_characters(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.txt", ["aaaa", "bb", "", "c", "dddddd", "e"])
    blocks = read_all([source], 6)
    assert [block.texts for block in blocks] == [["aaaa", "bb"], ["c", "dddddd"], ["e"]]
    assert [list(block.lines) for block in blocks] == [[1, 2], [4, 5], [6]]
    assert [(block.rows, block.empty_rows) for block in blocks] == [(2, 0), (3, 1), (1, 0)]
    assert [(block.file, block.index) for block in blocks] == [(0, 0), (0, 1), (0, 2)]


def test_block_ends_when_it_has_enough_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenize, "MAX_BLOCK_ROWS", 3)
    source = write_lines(tmp_path / "t.txt", ["a", "", "", "", "", "b", "c"])
    blocks = read_all([source], 1000)
    assert [block.texts for block in blocks] == [["a"], ["b"], ["c"]]
    assert [block.rows for block in blocks] == [3, 3, 1]


def test_blocks_of_second_file_name_it(tmp_path: Path) -> None:
    sources = [write_lines(tmp_path / f"{name}.txt", [name] * 4) for name in "ab"]
    blocks = read_all(sources, 2, file=1)
    assert [(block.texts, block.file, block.index) for block in blocks] == [(["b", "b"], 1, 0), (["b", "b"], 1, 1)]


def test_bytes_read_of_all_blocks_add_up_to_file_size(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "t.txt", ["家" * 500] * 500)
    for options in (ROW_OPTIONS, RAW_OPTIONS):
        blocks = list(read_blocks([source], [options], SplitOptions(), 10_000, 0))
        assert sum(block.bytes_read for block in blocks) == source.size()
    assert len(read_all([source], 10_000)) == 25


def test_raw_block_needs_separator_at_start_of_later_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.data.readers.CHUNK_CHARACTERS", 10)
    sources = [write_lines(tmp_path / f"{name}.txt", [name * 8] * 4) for name in "ab"]
    first, second = (list(read_blocks(sources, [RAW_OPTIONS] * 2, SplitOptions(), 1, file)) for file in (0, 1))
    assert [block.needs_separator for block in first] == [False] * len(first)
    assert [block.needs_separator for block in second] == [True] + [False] * (len(second) - 1)
    assert len(second) > 1
    assert sum(block.rows for block in second) == 4


def test_row_with_unknown_split_is_rejected(tmp_path: Path) -> None:
    path = write_table(tmp_path / "t.csv", [("a", "train", ""), ("b", "other", ""), ("c", " TEST ", "")])
    options = corpus_config(columns=("text",), split_key_column="part", encoding="utf-8").read_options
    (block,) = read_blocks([Source(str(path))], [options], SplitOptions(column="part"), 1000, 0)
    assert (block.texts, list(block.split_keys)) == (["a", "c"], [0, 2])
    assert block.rejected == [(3, "'other' is not a split: write train, val or test")]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("train", 0),
        ("Training", 0),
        ("val", 1),
        ("valid", 1),
        (" VALIDATION ", 1),
        ("dev", 1),
        ("test", 2),
        ("x", None),
    ],
)
def test_split_key_is_index_of_named_split(value: str, expected: int | None) -> None:
    assert split_key(value, SplitOptions(column="part")) == expected


def test_split_key_of_group_is_a_stable_hash() -> None:
    options = SplitOptions(group="writer")
    assert split_key("李白", options) == 0xDE3BE8041D1CD6F2
    assert split_key("李白 ", options) != split_key("李白", options)
    assert split_key("", SplitOptions()) == split_key("李白", SplitOptions()) == 0


# ----------------------------------------------------------------------------------------------- encoding a block


def block_of(texts: list[str], needs_separator: bool = False) -> Block:
    lines, split_keys = array.array("L", range(len(texts))), array.array("Q", [0] * len(texts))
    return Block(texts, lines, split_keys, needs_separator=needs_separator)


def test_documents_end_with_end_of_text() -> None:
    encoded = encode_block(ByteTokenizer(), block_of(["ab", "é", "ab"]), is_raw=False)
    assert encoded.ids.tolist() == [97, 98, 256, 0xC3, 0xA9, 256, 97, 98, 256]
    assert encoded.records["tokens"].tolist() == [3, 3, 3]
    assert encoded.metadata["bytes"] == 6
    # the split of a document depends on its hash, which therefore stays the same across versions
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in ("ab", "é", "ab")]
    np.testing.assert_array_equal(encoded.records["hash"], np.frombuffer(b"".join(digests), "<u8").reshape(3, 2))


@pytest.mark.parametrize("needs_separator", [False, True])
def test_raw_block_has_end_of_text_only_as_separator(needs_separator: bool) -> None:
    encoded = encode_block(ByteTokenizer(), block_of(["é\n"], needs_separator), is_raw=True)
    expected = [*[256] * needs_separator, 0xC3, 0xA9, 10]
    assert encoded.ids.tolist() == expected
    assert (encoded.records["tokens"].tolist(), encoded.metadata["bytes"]) == ([len(expected)], 3)


def test_block_without_documents_has_no_tokens() -> None:
    encoded = encode_block(ByteTokenizer(), Block(rows=2, empty_rows=2), is_raw=False)
    assert (len(encoded.ids), len(encoded.records), encoded.metadata["bytes"]) == (0, 0, 0)


@pytest.mark.parametrize("is_raw", [False, True])
def test_document_that_the_tokenizer_cannot_encode_is_rejected_alone(tmp_path: Path, is_raw: bool) -> None:
    tokenizer = CharTokenizer("abc")
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer.state()))
    source = tmp_path / "t.csv"
    source.write_bytes(b"text\nab\nax\n\xff\nc\n")
    (block,) = read_all([Source(str(source))], 1000)
    if is_raw:
        with pytest.raises(UserError, match="character 'x'"):
            encode_block(tokenizer, block, is_raw)
        return
    for _ in range(2):  # the second time as a build does that continues
        progress = tokenize_block(tmp_path, is_raw, block)
        assert (progress.rows, progress.rejected, progress.was_damaged) == (4, 2, False)
        found = read_block(progress.path)
        assert found.ids.tolist() == [0, 1, 3, 2, 3]
        assert found.records["line"].tolist() == [2, 5]
        (line, reason), other = found.metadata["rejected"]
        assert (line, other[0]) == (3, 4)
        assert reason.startswith("character 'x' (U+0078) is not among the 3 characters")


def test_block_file_is_written_once_and_has_all_records(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(ByteTokenizer().state()))
    source = write_lines(tmp_path / "t.txt", ["ab", "", "c"])
    (block,) = read_all([source], 1000)
    progress = tokenize_block(tmp_path, False, block)
    (path,) = tmp_path.glob("*.npz")
    assert progress == (3, 0, source.size(), path, False)
    with np.load(path) as arrays:
        record, known = arrays["record"], json.loads(str(arrays["known"]))
        assert arrays["ids"].tolist() == [97, 98, 256, 99, 256]
    assert (record["tokens"].tolist(), record["characters"].tolist()) == ([3, 2], [2, 1])
    assert (record["line"].tolist(), record["file"].tolist()) == ([1, 3], [0, 0])
    assert known == {"file": 0, "rows": 3, "empty_rows": 1, "rejected": [], "bytes": 3, "used": [97, 98, 99, 256]}
    written = path.stat().st_ino
    tokenize_block(tmp_path, False, block)
    assert path.stat().st_ino == written
    assert sorted(other.name for other in tmp_path.iterdir()) == sorted(["tokenizer.json", "t.txt", path.name])


def corrupt_members(path: Path, **arrays: object) -> None:
    """Write a block's file with other arrays, whose checksums are right."""
    with np.load(path) as block:
        contents = dict(block)
    np.savez(path, **{**contents, **arrays})


def claim(path: Path, shape: str) -> None:
    """Make the array of ids claim a shape."""
    content = path.read_bytes()
    assert content.count(b"(5,), }   ") == 1
    path.write_bytes(content.replace(b"(5,), }   ", f"({shape},), }}   ".encode()[:10]))


def deflate(path: Path) -> None:
    """Compress the file of a block in which there are 200 million zeros more."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("ids.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u4", "fortran_order": False, "shape": (50_000_000,)})
        for _ in range(200):
            file.write(bytes(10**6))


def change_record(path: Path, name: str, value: int) -> None:
    with np.load(path) as block:
        record = block["record"]
    record[name][0] = value
    corrupt_members(path, record=record)


UNBELIEVED: list[Callable[[Path], object]] = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"PK\x05\x06" + bytes(18)),
    lambda path: path.write_bytes(b"\x93NUMPY" + bytes(200)),
    lambda path: os.truncate(path, path.stat().st_size - 30),
    lambda path: os.truncate(path, 2**40),
    lambda path: corrupt_members(path, ids=np.array([97, 98, 256, 99, 256], dtype=object)),
    lambda path: corrupt_members(path, ids=np.array([97, 98, 256, 99, 256], dtype=np.int64)),
    lambda path: corrupt_members(path, ids=np.array([[97, 98, 256, 99, 256]], dtype=np.uint32)),
    lambda path: corrupt_members(path, ids=np.array([97, 98, 256, 99, 2**32 - 1], dtype=np.uint32)),
    lambda path: corrupt_members(path, ids=np.array([97, 98, 256, 99], dtype=np.uint32)),
    lambda path: corrupt_members(path, ids=np.array([97, 98, 256, 97, 256], dtype=np.uint32)),
    lambda path: corrupt_members(path, record=np.zeros(2, dtype="<u8")),
    lambda path: corrupt_members(path, record=np.zeros(0, dtype=tokenize.DOCUMENT_DTYPE)),
    lambda path: corrupt_members(path, known=np.array("[" * 100_000)),
    lambda path: corrupt_members(path, known=np.array("{}")),
    lambda path: corrupt_members(path, known=np.array(5)),
    *(
        lambda path, name=name: change_record(path, name, 5)
        for name in ("tokens", "characters", "file", "line", "split_key", "hash")
    ),
    lambda path: claim(path, "5e3"),
    lambda path: claim(path, "9" * 9),
    deflate,
]


def test_file_of_a_block_that_is_not_as_written_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(ByteTokenizer().state()))
    (block,) = read_all([write_lines(tmp_path / "t.txt", ["ab", "", "c"])], 1000)
    path = tokenize_block(tmp_path, False, block).path
    expected = read_block(path)
    tracemalloc.start()
    for damage in UNBELIEVED:
        damage(path)
        assert tokenize_block(tmp_path, False, block).was_damaged
        found = read_block(path)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.records, expected.records)
        assert found.metadata == expected.metadata
        assert not tokenize_block(tmp_path, False, block).was_damaged
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_damaged_block_is_an_error_where_its_ids_are_read(tmp_path: Path) -> None:
    (tmp_path / "1.npz").write_bytes(b"PK")
    with pytest.raises(OSError, match=r"1.npz is damaged; the same command makes it again"):
        read_block(tmp_path / "1.npz")


def test_block_files_sort_by_file_and_index(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(ByteTokenizer().state()))
    for file, index in ((10, 0), (9, 10), (9, 9)):
        tokenize_block(tmp_path, False, Block(file=file, index=index))
    files = [json.loads(str(np.load(path)["known"]))["file"] for path in sorted(tmp_path.glob("*.npz"))]
    assert files == [9, 9, 10]
    assert [path.stem[-2:] for path in sorted(tmp_path.glob("*.npz"))] == ["09", "10", "00"]


# --------------------------------------------------------------------------------------------- training a tokenizer


def test_char_vocabulary_covers_every_split(tmp_path: Path) -> None:
    train, val = write_lines(tmp_path / "a.txt", ["ba"]), write_lines(tmp_path / "b.txt", ["c"])
    tokenizer = train_tokenizer([train, Source(val.name, "val")], corpus_config("char"))
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.characters == "abc"


def test_byte_pairs_are_trained_on_train_files_only(tmp_path: Path) -> None:
    train, val = write_lines(tmp_path / "a.txt", ["abab"] * 20), write_lines(tmp_path / "b.txt", ["cdcd"] * 20)
    tokenizer = train_tokenizer([train, Source(val.name, "val")], corpus_config("bpe"))
    assert isinstance(tokenizer, BytePairTokenizer)
    assert b"ab" in tokenizer.tokens
    assert b"cd" not in tokenizer.tokens


def test_byte_pairs_of_long_text_are_trained_on_every_nth_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "t.txt", [f"{i:09}" for i in range(100)])  # 1000 bytes
    monkeypatch.setattr(tokenize, "MAX_TRAINING_BYTES", 250)
    trained_on: list[str] = []
    monkeypatch.setattr(tokenize, "train_bpe", lambda texts, vocab_size: trained_on.extend(texts))
    train_tokenizer([source], corpus_config("bpe"))
    assert trained_on == [f"{i:09}" for i in range(0, 100, 4)]


def test_read_texts_skips_blank_and_rejected_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n ,3\n4\n5,6\n", encoding="utf-8")
    options = corpus_config(columns=("a",)).read_options
    assert list(read_texts([Source(str(tmp_path / "t.csv"))], options)) == ["1", "5"]


def test_rejected_rows_are_listed_with_line_and_reason(tmp_path: Path) -> None:
    lines, reasons, expected = [b"id,text"], {}, []
    for i in range(3000):
        text = f"{i},第{i}行 🙂".encode()
        if i % 100 == 37:
            broken_rows = {
                "3 fields where there are 2 columns": text + b",more",
                "1 fields where there are 2 columns": b"nothing else",
                "bytes ff are not utf-8": text + b"\xff",
                "',' expected after '\"'": b'7,"open' + text,
            }
            reason, text = list(broken_rows.items())[i // 100 % 4]
            reasons[len(lines)] = reason
        else:
            expected.append(f"第{i}行 🙂")
        lines.append(text)
        if i % 3 == 0:
            lines.append(f'{i},"two\nlines, of {i}"'.encode())
            expected.append(f"two\nlines, of {i}")
    path = tmp_path / "t.csv"
    path.write_bytes(b"\n".join(lines))
    first_lines = np.cumsum([1, *(1 + line.count(b"\n") for line in lines)])
    corpus = build(path, columns=("text",))
    assert documents(corpus) == expected
    rejected = [json.loads(row) for row in (corpus.folder / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [row["line"] for row in rejected] == [first_lines[index] for index in reasons]
    assert all(row["reason"].startswith(reason) for row, reason in zip(rejected, reasons.values()))
    assert corpus.report["rejected"] == 30
    assert len(corpus.report["rejected_first"]) == 20
