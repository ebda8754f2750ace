"""The cache of corpora: keys, builds that fail, are killed or run in parallel, and locks."""

import contextlib
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from corpora import build, corpus_config, documents, file_contents
from filelock import FileLock

from lit_gpt.data import corpus, tokenize
from lit_gpt.data.config import CorpusConfig, SplitOptions
from lit_gpt.data.corpus import corpus_key, open_corpus
from lit_gpt.data.executors import Executor, ExecutorName, open_executor
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sample import write_sample
from lit_gpt.data.sources import Source
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer, Vocab


@pytest.fixture
def names(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("静夜思\n\nsecond <|endoftext|>\n   \nthird\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("tokenizer", ["cl100k_base", "byte", "char"])
def test_corpus_holds_documents_in_order(names: Path, tokenizer: str) -> None:
    found = build(names, tokenizer)
    expected = ["静夜思", "second <|endoftext|>", "third"]
    assert documents(found) == expected
    report = found.report
    assert (report["rows"], report["documents"], report["empty_rows"], report["rejected"]) == (5, 3, 2, 0)
    assert report["characters"] == sum(map(len, expected))
    assert report["bytes"] == sum(len(text.encode()) for text in expected)
    assert report["tokens"] == len(found.ids)


def test_raw_mode_stores_bytes_of_file_unchanged(names: Path) -> None:
    found = build(names, "byte", mode="raw")
    assert bytes(np.asarray(found.ids, dtype=np.uint8)) == names.read_bytes()


def test_raw_mode_separates_files_by_end_of_text(names: Path) -> None:
    found = open_corpus([Source(str(names))] * 2, corpus_config(mode="raw"), names.parent / "cache")
    text = names.read_bytes()
    assert list(np.asarray(found.ids)) == [*text, found.tokenizer.end_of_text, *text]


# ------------------------------------------------------------------------------------------------------ the cache


def test_corpus_is_found_again_after_file_is_renamed(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(names)
    monkeypatch.setattr(corpus, "_build", lambda *args: pytest.fail("built again"))
    names.rename(names.with_name("renamed.txt"))
    os.utime(names.with_name("renamed.txt"), (0, 0))
    second = build(names.with_name("renamed.txt"))
    np.testing.assert_array_equal(first.ids, second.ids)
    assert second.tokenizer == first.tokenizer


@pytest.mark.parametrize("name", ["report.json", "corpus.json", "ids_00000.bin"])
def test_incomplete_corpus_is_built_again(names: Path, name: str) -> None:
    first = build(names)
    expected = file_contents(first)
    (first.folder / name).write_bytes(expected[name][:4])
    assert file_contents(build(names)) == expected


def test_every_setting_changes_cache_key(names: Path) -> None:
    def key(tokenizer: str = "cl100k_base", vocab: Vocab = "pruned", **read_options: object) -> str:
        return corpus_key([Source(str(names))], corpus_config(tokenizer, vocab, **read_options))

    def split_key(**options: object) -> str:
        split = SplitOptions(**options)  # type: ignore[arg-type]
        return corpus_key([Source(str(names))], corpus_config("cl100k_base", split=split))

    def bpe_key(vocab_size: int) -> str:
        return corpus_key([Source(str(names))], CorpusConfig(ReadOptions(), tokenizer="bpe", vocab_size=vocab_size))

    keys = [
        key(),
        key("byte"),
        key("char"),
        key(vocab="full"),
        bpe_key(300),
        bpe_key(301),
        key(mode="raw"),
        key(columns=("a",)),
        key(template="{text}!"),
        key(delimiter=";"),
        key(quote="'"),
        key(header=False),
        key(format="csv"),
        key(skip_rows=1),
        key(encoding="latin-1"),
        key(split_key_column="a"),
        split_key(val_fraction=0.2),
        split_key(test_fraction=0.2),
        split_key(seed=1),
        split_key(column="a"),
        split_key(group="a"),
        split_key(dedupe=True),
        corpus_key([Source(str(names), "val")], corpus_config("cl100k_base")),
        corpus_key([Source(str(names))] * 2, corpus_config("cl100k_base")),
    ]
    names.write_text("changed", encoding="utf-8")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_default_vocab_size_has_the_cache_key_of_its_number(names: Path) -> None:
    keys = {
        corpus_key([Source(str(names))], CorpusConfig(ReadOptions(), tokenizer="bpe", vocab_size=vocab_size))
        for vocab_size in (None, 4096)
    }
    assert len(keys) == 1


def test_cache_key_is_stable_across_versions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,writer\na,b\n", encoding="utf-8")
    split = SplitOptions(group="writer", dedupe=True)
    config = CorpusConfig(ReadOptions(columns=("text",), split_key_column="writer"), split, "bpe", vocab_size=300)
    assert corpus_key([Source(str(tmp_path / "t.csv"))], config) == "395259488296d23069c35e6e52e74587"


# ---------------------------------------------------------------------------------- builds that fail or are killed


def test_failed_build_leaves_only_the_lock(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 3"):
        build(tmp_path / "t.csv", columns=("a",))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_build_ignores_foreign_files_of_killed_build(names: Path) -> None:
    key = corpus_key([Source(str(names))], corpus_config())
    unfinished = names.parent / "cache" / f"{key}.unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "ids.bin").write_bytes(b"half")
    assert len(build(names).ids) > 4
    assert not unfinished.exists()


def test_full_disk_keeps_finished_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sample(tmp_path / "t.csv")
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 100_000)

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus, "write_shards", no_space)
    with pytest.raises(UserError, match=r"the token cache cannot be written or read \(No space left on device\)"):
        build(tmp_path / "t.csv", columns=("name",))
    assert len(list((tmp_path / "cache").rglob("*.npz"))) > 1


def _build_and_die(path: Path, num_blocks: int, tokenizer: str) -> None:
    """Build until `num_blocks` blocks have been tokenized, then end this process with SIGKILL."""
    original, remaining = tokenize.encode_block, iter(range(num_blocks))

    def encode_or_die(*args: object) -> object:
        if next(remaining, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)  # type: ignore[arg-type]

    tokenize.encode_block = encode_or_die  # type: ignore[assignment]
    corpus.BLOCK_CHARACTERS, tokenize.MAX_BLOCK_ROWS = 20_000, 1000
    build(path, tokenizer, columns=("name",))


@pytest.mark.parametrize("tokenizer", ["cl100k_base", "char", "bpe"])
def test_killed_build_continues_and_writes_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    path = tmp_path / "t.csv"
    write_sample(path)
    with open(path, "a", encoding="utf-8") as file:
        file.write("a,b\n\n ,\n")
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 20_000)
    monkeypatch.setattr(tokenize, "MAX_BLOCK_ROWS", 1000)
    expected = file_contents(build(path, tokenizer, columns=("name",)))
    shutil.rmtree(tmp_path / "cache")
    for num_blocks in (3, 8):
        # rustbpe, which trains "bpe", has threads, and a forked process would lack them
        context = multiprocessing.get_context("spawn" if tokenizer == "bpe" else "fork")
        process = context.Process(target=_build_and_die, args=(path, num_blocks, tokenizer))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    (unfinished,) = (tmp_path / "cache").glob("*.unfinished")
    assert len(list(unfinished.rglob("*.npz"))) == 3 + 8
    (unfinished / "work" / ".half.npz.unfinished").write_bytes(b"half a block")
    encoded: list[int] = []
    original = tokenize.encode_block
    monkeypatch.setattr(tokenize, "encode_block", lambda *args: encoded.append(1) or original(*args))
    assert file_contents(build(path, tokenizer, columns=("name",))) == expected
    assert 0 < len(encoded) < 30 - 3 - 8


def test_damaged_files_of_a_killed_build_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "t.txt"
    path.write_text("\n".join(f"row {i} 第{i}行" for i in range(200)), encoding="utf-8")
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 300)
    expected = file_contents(build(path, "char"))
    generator = random.Random(5)
    for name in ("*.npz", "tokenizer.json", "SHA256SUMS"):
        shutil.rmtree(tmp_path / "cache")
        with monkeypatch.context() as patch:

            def no_space(*args: object) -> None:
                raise OSError(28, "No space left on device")

            patch.setattr(corpus, "merge_blocks", no_space)
            with pytest.raises(UserError, match="No space left"):
                build(path, "char")
        (work,) = (tmp_path / "cache").glob("*.unfinished/work")
        damaged = sorted(work.glob(name))[:3]
        for file in damaged:
            content = bytearray(file.read_bytes())
            content[generator.randrange(len(content) // 4, len(content) // 2)] ^= 1
            file.write_bytes(content)
        (work / "0000000_000099999.npz").write_bytes(damaged[0].read_bytes())  # a block that the text does not have
        caplog.clear()
        assert file_contents(build(path, "char")) == expected
        retrained = f"{work / 'tokenizer.json'} is damaged: training the tokenizer again"
        expected_message = (
            f"{damaged[0]} is damaged (1 of 3): tokenized its rows again" if name == "*.npz" else retrained
        )
        assert [record.getMessage() for record in caplog.records] == [expected_message]


# ------------------------------------------------------------------------------------------- processes and clusters


def test_number_of_processes_does_not_change_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sample(tmp_path / "t.csv")
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 20_000)
    for mode in ("rows", "raw"):
        config = corpus_config("cl100k_base", mode=mode, columns=("name",) if mode == "rows" else None)
        one, two = (
            open_corpus([Source(str(tmp_path / "t.csv"))], config, tmp_path / str(processes), processes)
            for processes in (1, 2)
        )
        assert file_contents(one) == file_contents(two)


@pytest.mark.parametrize(("min_parallel_bytes", "processes", "expected"), [(10, None, 3), (1000, None, 1), (10, 2, 2)])
def test_only_long_text_uses_one_process_per_core(
    names: Path, monkeypatch: pytest.MonkeyPatch, min_parallel_bytes: int, processes: int | None, expected: int
) -> None:
    opened: list[int] = []

    def open_one_process(name: ExecutorName, processes: int) -> AbstractContextManager[Executor]:
        opened.append(processes)
        return open_executor(name, 1)

    monkeypatch.setattr(corpus, "open_executor", open_one_process)
    monkeypatch.setattr(corpus, "available_cores", lambda: 3)
    monkeypatch.setattr(corpus, "MIN_PARALLEL_BYTES", min_parallel_bytes)
    open_corpus([Source(str(names))], corpus_config(), names.parent / "cache", processes)
    assert opened == [expected]


@pytest.mark.filterwarnings("ignore")  # Ray itself warns
def test_ray_writes_same_files_when_worker_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "BLOCK_CHARACTERS", 4_000)
    monkeypatch.setattr(corpus, "TOKENS_PER_SHARD", 20_000)
    for name in ("a.csv", "b.csv"):
        write_sample(Path(name))
    with open("b.csv", "a", encoding="utf-8") as file:
        file.write("a,b\n\n ,\n")
    sources, config = [Source("a.csv"), Source("b.csv")], corpus_config("cl100k_base", columns=("name",))
    local = open_corpus(sources, config, tmp_path / "local")
    killed: list[int] = []

    def kill_one_worker() -> None:
        while not killed and threading.main_thread().is_alive():
            if len(list((tmp_path / "ray").rglob("*.npz"))) > 20:
                for process in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        if process.cmdline()[:1] == ["ray::Map(run_task_row)"]:
                            process.kill()
                            killed.append(process.pid)
                            break

    thread = threading.Thread(target=kill_one_worker)
    thread.start()
    on_cluster = open_corpus(sources, config, tmp_path / "ray", 2, "ray")
    killed.append(0)
    thread.join()
    assert killed[0] > 0
    assert len(file_contents(on_cluster)) > 10
    assert file_contents(on_cluster) == file_contents(local)


@pytest.mark.filterwarnings("ignore")  # Ray itself warns
def test_user_error_of_ray_worker_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "t.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserError, match="has no column 'c'"):
        open_corpus([Source(str(tmp_path / "t.csv"))], corpus_config(columns=("c",)), tmp_path / "cache", 1, "ray")
    assert signal.getsignal(signal.SIGTERM) == handler  # ray.init installs its own


@pytest.mark.filterwarnings("ignore")  # Ray itself warns
def test_unreachable_ray_cluster_is_user_error(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(
        UserError, match=r"RAY_ADDRESS=127.0.0.1:1: no Ray cluster there .*refused.*: start one with ray start --head"
    ):
        open_corpus([Source(str(names))], corpus_config(), names.parent / "cache", executor="ray")


def test_missing_ray_package_is_user_error(names: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install -e '.\[ray\]'"):
        open_corpus([Source(str(names))], corpus_config(), names.parent / "cache", executor="ray")


def test_waiting_for_another_build_is_logged(names: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = corpus_key([Source(str(names))], corpus_config())
    is_locked = threading.Event()

    def hold_lock() -> None:
        (names.parent / "cache").mkdir()
        with FileLock(names.parent / "cache" / f"{key}.lock"):
            is_locked.set()
            time.sleep(1.5)  # open_corpus logs after 1 s

    thread = threading.Thread(target=hold_lock)
    thread.start()
    is_locked.wait()
    with caplog.at_level(logging.WARNING, "lit_gpt"):
        assert len(build(names).ids) > 4
    thread.join()
    messages = [record.message for record in caplog.records]
    assert messages == ["another process is tokenizing the same text: waiting for it to finish"]


def _build_and_count(path: Path, builds: object) -> None:
    original = corpus._build

    def build_and_count(*args: object) -> None:
        builds.put(1)  # type: ignore[attr-defined]
        original(*args)  # type: ignore[arg-type]

    corpus._build = build_and_count  # type: ignore[assignment]
    build(path, "cl100k_base", columns=("name",))


def test_concurrent_processes_build_corpus_once(tmp_path: Path) -> None:
    write_sample(tmp_path / "t.csv")
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else "spawn")
    builds = context.Queue()
    processes = [context.Process(target=_build_and_count, args=(tmp_path / "t.csv", builds)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert builds.get(timeout=5) == 1
    assert builds.empty()
    assert isinstance(build(tmp_path / "t.csv", "cl100k_base", columns=("name",)).tokenizer, BytePairTokenizer)
