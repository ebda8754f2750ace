"""A corpus is found again by its content, never by its name, and never half."""

import contextlib
import csv
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.data import corpus, tokenize
from lit_gpt.data.config import CorpusConfig, SplitConfig
from lit_gpt.data.corpus import Corpus, corpus_key, open_corpus
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sample import write_sample
from lit_gpt.data.shards import ShardedArray, TokenIds
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer, Vocab


def recipe(
    name: str = "byte", vocab: Vocab = "pruned", split: SplitConfig | None = None, **reading: object
) -> CorpusConfig:
    return CorpusConfig(ReadOptions(**reading), split or SplitConfig(), name, vocab)  # type: ignore[arg-type]


def build(path: Path, name: str = "byte", vocab: Vocab = "pruned", **reading: object) -> Corpus:
    return open_corpus([Source(str(path))], recipe(name, vocab, **reading), path.parent / "cache")


def documents(corpus: Corpus, ids: TokenIds | None = None) -> list[str]:
    """The texts of all rows, or of those in `ids`."""
    ids = np.asarray(corpus.ids if ids is None else ids)
    end = corpus.tokenizer.end_of_text
    *texts, rest = np.split(ids, np.flatnonzero(ids == end) + 1)
    assert len(rest) == 0
    return [corpus.tokenizer.decode(text[:-1]) for text in texts]


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("静夜思\n\nsecond <|endoftext|>\n   \nthird\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["cl100k_base", "byte", "char"])
def test_ids_are_the_documents_one_after_another(names: Path, name: str) -> None:
    found = build(names, name)
    expected = ["静夜思", "second <|endoftext|>", "third"]
    assert documents(found) == expected
    report = found.report
    assert (report["rows"], report["documents"], report["empty_rows"], report["rejected"]) == (5, 3, 2, 0)
    assert report["characters"] == sum(map(len, expected))
    assert report["bytes"] == sum(len(text.encode()) for text in expected)
    assert report["tokens"] == len(found.ids)


def test_a_raw_file_gives_its_own_ids_and_no_more(names: Path) -> None:
    found = build(names, "byte", mode="raw")
    assert bytes(np.asarray(found.ids, dtype=np.uint8)) == names.read_bytes()


def test_between_raw_files_a_text_ends(names: Path) -> None:
    found = open_corpus([Source(str(names))] * 2, recipe(mode="raw"), names.parent / "cache")
    text = names.read_bytes()
    assert list(np.asarray(found.ids)) == [*text, found.tokenizer.end_of_text, *text]


def test_pruned_ids_are_the_full_ids_renamed(tmp_path: Path) -> None:
    write_sample(tmp_path / "t.csv")
    pruned = build(tmp_path / "t.csv", "cl100k_base", "pruned", columns=("name",))
    full = build(tmp_path / "t.csv", "cl100k_base", "full", columns=("name",))
    assert (pruned.ids.dtype, full.ids.dtype) == (np.uint16, np.uint32)
    assert len(pruned.ids) == len(full.ids)
    assert pruned.tokenizer.vocab_size < 2000 < full.tokenizer.vocab_size == 100_277
    for start in range(0, len(full.ids), 9973):
        part = slice(start, start + 300)
        assert [pruned.tokenizer.token_bytes(t) for t in np.asarray(pruned.ids[part])] == [
            full.tokenizer.token_bytes(t) for t in np.asarray(full.ids[part])
        ]


def test_many_blocks_and_shards_are_one_corpus(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = build(names, "cl100k_base")
    monkeypatch.setattr(corpus, "BLOCK", 3)
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 4)
    monkeypatch.setattr(corpus, "FORMAT", 99)  # another key: built anew
    again = build(names, "cl100k_base")
    assert again.key != whole.key
    assert len(list(again.folder.glob("ids_*.bin"))) == -(-len(whole.ids) // 4)
    np.testing.assert_array_equal(again.ids, whole.ids)
    for part in ("train", "val", "test"):
        np.testing.assert_array_equal(again.split(part), whole.split(part))
    assert again.tokenizer == whole.tokenizer
    assert again.report == whole.report


@given(st.data())
def test_shards_are_taken_from_as_one_array(data: st.DataObject) -> None:
    size, tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 60))
    array = np.arange(tokens, dtype=np.uint16)
    shards = ShardedArray(np.split(array, range(size, tokens, size)), size)
    for _ in range(3):
        assert len(shards) == len(array)
        assert shards.dtype == array.dtype
        np.testing.assert_array_equal(shards, array)
        for shape in ((), (7,), (3, 4)):
            places = np.random.default_rng(0).integers(-len(array), len(array), shape)
            taken = shards[places]
            np.testing.assert_array_equal(taken, array[places])
            assert taken.dtype == array.dtype
        assert shards[-1] == array[-1]
        with pytest.raises(IndexError):
            shards[[0, len(array)]]
        start, stop = sorted(data.draw(st.tuples(*[st.integers(-len(array), len(array) + 3)] * 2)))
        shards, array = shards[start:stop], array[start:stop]
        if not len(array):
            assert len(np.asarray(shards)) == 0
            return


def test_what_is_built_is_found_again(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(names)
    monkeypatch.setattr(corpus, "_build", lambda *args: pytest.fail("built again"))
    names.rename(names.with_name("renamed.txt"))
    os.utime(names.with_name("renamed.txt"), (0, 0))
    second = build(names.with_name("renamed.txt"))
    np.testing.assert_array_equal(first.ids, second.ids)
    assert second.tokenizer == first.tokenizer


def test_everything_that_decides_the_ids_is_in_the_key(names: Path) -> None:
    def key(name: str = "cl100k_base", vocab: Vocab = "pruned", **reading: object) -> str:
        return corpus_key([Source(str(names))], recipe(name, vocab, **reading))

    keys = [key(), key("byte"), key(vocab="full"), key(mode="raw"), key(template="{text}!"), key(encoding="latin-1")]
    names.write_text("changed", encoding="utf-8")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_cache_key_is_stable_across_versions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,writer\na,b\n", encoding="utf-8")
    split = SplitConfig(group="writer", dedupe=True)
    config = CorpusConfig(ReadOptions(columns=("text",), split_key_column="writer"), split, "bpe", vocab_size=300)
    assert corpus_key([Source(str(tmp_path / "t.csv"))], config) == "21ec2ca6905a3e5fb3fa10d3fe25bf05"


def test_a_build_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        build(tmp_path / "t.csv", columns=("a",))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_rows_without_text_are_said(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n , \n,\n", encoding="utf-8")
    with pytest.raises(UserError, match="no text in any of 2 rows"):
        build(tmp_path / "t.csv", template="{a}{b}")
    (tmp_path / "header.csv").write_text("a\n", encoding="utf-8")
    with pytest.raises(UserError, match="no rows, at most a header"):
        build(tmp_path / "header.csv")


def test_what_a_killed_build_left_does_no_harm(names: Path) -> None:
    key = corpus_key([Source(str(names))], recipe())
    left = names.parent / "cache" / f"{key}.unfinished"
    left.mkdir(parents=True)
    (left / "ids.bin").write_bytes(b"half")
    assert len(build(names).ids) > 4
    assert not left.exists()


def contents(corpus: Corpus) -> dict[str, bytes]:
    """Every file of a corpus."""
    return {path.name: path.read_bytes() for path in sorted(corpus.folder.iterdir())}


def _killed(path: Path, blocks: int, tokenizer: str) -> None:
    """Builds until `blocks` blocks have been tokenized, and dies there as it would of SIGKILL."""
    original, made = tokenize.encode, iter(range(blocks))

    def counted(*args: object) -> object:
        if next(made, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)  # type: ignore[arg-type]

    tokenize.encode, corpus.BLOCK, tokenize.RECORDS = counted, 20_000, 1000  # type: ignore[assignment]
    build(path, tokenizer, columns=("name",))


@pytest.mark.parametrize("tokenizer", ["cl100k_base", "char", "bpe"])
def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    path = tmp_path / "t.csv"
    write_sample(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write("a,b\n\n ,\n")
    monkeypatch.setattr(corpus, "BLOCK", 20_000)
    monkeypatch.setattr(tokenize, "RECORDS", 1000)
    straight = contents(build(path, tokenizer, columns=("name",)))
    shutil.rmtree(tmp_path / "cache")
    for blocks in (3, 8):
        # what learns has threads of its own, which a fork would be without
        context = multiprocessing.get_context("spawn" if tokenizer == "bpe" else "fork")
        process = context.Process(target=_killed, args=(path, blocks, tokenizer))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    (left,) = (tmp_path / "cache").glob("*.unfinished")
    assert len(list(left.rglob("*.npz"))) == 3 + 8
    (left / "work" / "half.new").write_bytes(b"half a block")
    encoded: list[int] = []
    original = tokenize.encode
    monkeypatch.setattr(tokenize, "encode", lambda *args: encoded.append(1) or original(*args))
    assert contents(build(path, tokenizer, columns=("name",))) == straight
    assert 0 < len(encoded) < 30 - 3 - 8


def test_processes_that_tokenize_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sample(tmp_path / "t.csv")
    monkeypatch.setattr(corpus, "BLOCK", 20_000)
    for mode in ("rows", "raw"):
        made = recipe("cl100k_base", mode=mode, columns=("name",))
        alone, helped = (
            open_corpus([Source(str(tmp_path / "t.csv"))], made, tmp_path / str(processes), processes)
            for processes in (1, 2)
        )
        assert contents(alone) == contents(helped)


@pytest.mark.filterwarnings("ignore")  # of what Ray itself does
def test_ray_leaves_the_same_files_though_a_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "BLOCK", 4_000)
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 20_000)
    for name in ("a.csv", "b.csv"):
        write_sample(Path(name))
    with open("b.csv", "a", encoding="utf-8") as file:
        file.write("a,b\n\n ,\n")
    files, made = [Source("a.csv"), Source("b.csv")], recipe("cl100k_base", columns=("name",))
    local = open_corpus(files, made, tmp_path / "local")
    killed: list[int] = []

    def kill() -> None:  # a worker that tokenizes, amid the work
        while not killed and threading.main_thread().is_alive():
            if len(list((tmp_path / "ray").rglob("*.npz"))) > 20:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.cmdline()[:1] == ["ray::Map(run_task_row)"]:
                            process.kill()
                            killed.append(process.pid)
                            break

    thread = threading.Thread(target=kill)
    thread.start()
    helped = open_corpus(files, made, tmp_path / "ray", 2, "ray")
    killed.append(0)
    thread.join()
    assert killed[0] > 0
    assert len(contents(helped)) > 10
    assert contents(helped) == contents(local)


@pytest.mark.filterwarnings("ignore")  # of what Ray itself does
def test_what_a_worker_of_ray_raises_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="has no column 'c'"):
        open_corpus([Source(str(tmp_path / "t.csv"))], recipe(columns=("c",)), tmp_path / "cache", 1, "ray")
    assert signal.getsignal(signal.SIGTERM) == before  # Ray's is gone


@pytest.mark.filterwarnings("ignore")  # of what Ray itself does
def test_where_no_cluster_is_the_address_is_said(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster there .*refused.*: start one with ray start --head"
    ):
        open_corpus([Source(str(names))], recipe(), names.parent / "cache", engine="ray")


def test_without_ray_its_engine_says_how_to_install_it(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[ray\]'"):
        open_corpus([Source(str(names))], recipe(), names.parent / "cache", engine="ray")


def table(path: Path, rows: list[tuple[str, str, str]]) -> Path:
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "part", "writer"), *rows])
    return path


ROWS = [(f"poem {i % 90}", ["train", "Validation", "test"][i % 3], f"writer {i % 17}") for i in range(1000)]


def split(path: Path, **how: object) -> tuple[list[list[str]], dict]:
    """The documents of each part, and the report."""
    mark = how.get("column", how.get("group"))
    made = recipe("byte", split=SplitConfig(**how), columns=("text",), split_key_column=mark)  # type: ignore[arg-type]
    found = open_corpus([Source(str(path))], made, path.parent / "cache")
    return [documents(found, found.split(part)) for part in ("train", "val", "test")], found.report


def test_in_order_the_last_rows_validate_and_test(tmp_path: Path) -> None:
    parts, _ = split(table(tmp_path / "t.csv", ROWS), val_fraction=0.2, test_fraction=0.05)
    texts = [text for text, _, _ in ROWS]
    assert parts == [texts[:750], texts[750:950], texts[950:]]


def test_a_column_names_the_part(tmp_path: Path) -> None:
    parts, report = split(table(tmp_path / "t.csv", [*ROWS, ("odd", "other", "x")]), column="part")
    for number, part in enumerate(("train", "Validation", "test")):
        assert parts[number] == [text for text, name, _ in ROWS if name == part]
    assert report["rejected_first"] == [[str(tmp_path / "t.csv"), 1002, "'other' is no part: write train, val or test"]]


def test_dealt_by_seed_equal_texts_share_a_part_and_a_new_row_moves_none(tmp_path: Path) -> None:
    rows = [(f"{i % 4000} poem", "", "") for i in range(5000)]
    parts, report = split(table(tmp_path / "t.csv", rows), seed=1, val_fraction=0.2, test_fraction=0.1)
    assert [round(len(part) / 5000, 1) for part in parts] == [0.7, 0.2, 0.1]
    assert not set(parts[0]) & (set(parts[1]) | set(parts[2]))
    assert (report["duplicates"], report["duplicates_across"]) == (1000, 0)
    more, _ = split(table(tmp_path / "more.csv", [("new", "", ""), *rows]), seed=1, val_fraction=0.2, test_fraction=0.1)
    assert [[text for text in part if text != "new"] for part in more] == parts
    other, _ = split(table(tmp_path / "t.csv", rows), seed=2, val_fraction=0.2, test_fraction=0.1)
    assert other != parts


def test_rows_of_a_group_share_a_part(tmp_path: Path) -> None:
    rows = [(f"poem {i}", "", f"writer {i % 200}") for i in range(2000)]
    parts, _ = split(table(tmp_path / "t.csv", rows), group="writer", val_fraction=0.3)
    writer = {text: name for text, _, name in rows}
    groups = [{writer[text] for text in part} for part in parts]
    assert sum(map(len, parts)) == 2000
    assert len(parts[1]) > 300
    assert not groups[0] & groups[1]


def test_files_of_their_own_validate_and_test(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(f"of {name}\n" * 3, encoding="utf-8")
    files = [Source(str(tmp_path / f"{name}.txt"), part) for name, part in (("a", ""), ("b", "val"), ("c", "test"))]
    for mode in ("rows", "raw"):
        found = open_corpus(files, recipe("byte", mode=mode), tmp_path / "cache")
        for part, name in (("train", "a"), ("val", "b"), ("test", "c")):
            text = found.tokenizer.decode(found.split(part))
            assert text.replace("\n", "") == f"of {name}" * 3


def test_duplicates_are_counted_and_left_out_where_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_gpt.data.split.SORTED", 300)  # several shares
    monkeypatch.setattr("lit_gpt.data.split.RECORDS", 128)
    path, texts = table(tmp_path / "t.csv", ROWS), [text for text, _, _ in ROWS]
    _, report = split(path)
    assert report["duplicates"] == 1000 - 90
    assert report["duplicates_across"] == 100  # every one of the validation's
    assert report["duplicates_first"][0] == [[str(path), 92], [str(path), 2]]
    assert len(report["duplicates_first"]) == 20
    parts, report = split(path, dedupe=True)
    assert parts == [texts[:81], texts[81:90], []]
    assert (report["documents"], report["duplicates_left_out"], report["duplicates_across"]) == (90, 910, 0)


def test_broken_rows_are_reported_each_with_its_line_and_the_rest_is_there(tmp_path: Path) -> None:
    lines, broken, good = [b"id,text"], {}, []
    for i in range(3000):
        text = f"{i},第{i}行 🙂".encode()
        if i % 100 == 37:
            kinds = {
                "3 fields where there are 2 columns": text + b",more",
                "1 fields where there are 2 columns": b"nothing else",
                "bytes ff are not utf-8": text + b"\xff",
                "',' expected after '\"'": b'7,"open' + text,
            }
            reason, text = list(kinds.items())[i // 100 % 4]
            broken[len(lines) + 1] = reason
        else:
            good.append(f"第{i}行 🙂")
        lines.append(text)
        if i % 3 == 0:
            lines.append(f'{i},"two\nlines, of {i}"'.encode())
            good.append(f"two\nlines, of {i}")
    path = tmp_path / "t.csv"
    path.write_bytes(b"\n".join(lines))
    numbers, line = {}, 1
    for number, text in enumerate(lines, start=1):
        numbers[number] = line
        line += 1 + text.count(b"\n")
    found = build(path, columns=("text",))
    assert documents(found) == good
    rejected = [json.loads(note) for note in (found.folder / "rejected.jsonl").read_text("utf-8").splitlines()]
    assert [note["line"] for note in rejected] == [numbers[number] for number in broken]
    assert all(note["reason"].startswith(reason) for note, reason in zip(rejected, broken.values()))
    assert found.report["rejected"] == 30
    assert len(found.report["rejected_first"]) == 20


def test_the_report_counts_what_is_there(tmp_path: Path) -> None:
    texts = ["床前明月光", "🙂🙂 smile", "שלום עולם", "e\u0301te\u0301", "家" * 50]
    (tmp_path / "t.txt").write_text("\n".join(texts), encoding="utf-8")
    found = build(tmp_path / "t.txt", "cl100k_base")
    report = found.report
    counts = np.bincount(found.ids, minlength=found.tokenizer.vocab_size)
    assert report["vocabulary_in_use"] == (counts > 0).sum()
    assert report["tokens_per_character"] == len(found.ids) / sum(map(len, texts))
    assert report["longest"][0] == [str(tmp_path / "t.txt"), 5, 50]
    for token, _, count in report["least_frequent"]:
        assert counts[token] == count == 1
    assert documents(found) == texts


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
