"""Symbolic links where this package creates files: none is followed, and what it leads to stays unchanged."""

import os
import shutil
from pathlib import Path

import pytest
from conftest import Fit
from corpora import build, corpus_config, documents
from user_errors import RUN, assert_user_error

from lit_gpt.data.corpus import corpus_key
from lit_gpt.data.sources import Source
from lit_gpt.files import atomic_replace, atomic_write, remove


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Return a folder with a file in it, to which links lead."""
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "file").write_text("keep")
    return folder


def plant(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def assert_unchanged(target: Path) -> None:
    assert [path.name for path in target.iterdir()] == ["file"]
    assert (target / "file").read_text() == "keep"


WORK = ("records.bin", "splits.bin", "new_ids.npy", "tokenizer.json", "0000000_000000000.npz", "0000000_000000001.npz")
PLACES = {
    "cache": ("KEY", ".KEY.old", "KEY.lock", "KEY.unfinished"),
    "unfinished": (
        *("KEY.unfinished/work", "KEY.unfinished/rejected.jsonl", "KEY.unfinished/corpus.json"),
        *("KEY.unfinished/report.json", "KEY.unfinished/ids_00000.bin", "KEY.unfinished/ids_00001.bin"),
        "KEY.unfinished/SHA256SUMS",
    ),
    "work": tuple(str(Path("KEY.unfinished", "work", name)) for name in WORK),
}


@pytest.mark.parametrize("leads_to", [".", "file", "missing"])
@pytest.mark.parametrize("place", PLACES)
def test_build_of_corpus_follows_no_link(tmp_path: Path, target: Path, place: str, leads_to: str) -> None:
    (tmp_path / "t.txt").write_text("a\nb\n", encoding="utf-8")
    key = corpus_key([Source(str(tmp_path / "t.txt"))], corpus_config())
    for name in PLACES[place]:
        plant(tmp_path / "cache" / name.replace("KEY", key), target / leads_to)
    corpus = build(tmp_path / "t.txt")
    assert documents(corpus) == ["a", "b"]
    assert_unchanged(target)
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert not any(path.name in ("ids_00001.bin", "work") for path in corpus.folder.iterdir())


def test_atomic_write_replaces_a_link(tmp_path: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, leads_to in enumerate((".", "file", "missing")):
        path = tmp_path / f"{number}.txt"
        path.symlink_to(target / leads_to)
        atomic_write(path, lambda file: file.write(b"new"))
        assert (path.is_symlink(), path.read_bytes()) == (False, b"new")

    class Uuid:
        hex = "guessed"

    monkeypatch.setattr("uuid.uuid4", Uuid)
    (tmp_path / ".x.guessed.unfinished").symlink_to(target / "file")
    with pytest.raises(FileExistsError):
        atomic_write(tmp_path / "x", lambda file: file.write(b"new"))
    assert_unchanged(target)


def test_atomic_replace_of_a_folder_replaces_links(tmp_path: Path, target: Path) -> None:
    for number, leads_to in enumerate((".", "file", "missing")):
        new, path = tmp_path / "new", tmp_path / str(number)
        new.mkdir()
        path.symlink_to(target / leads_to)
        (tmp_path / f".{number}.old").symlink_to(target / leads_to)
        atomic_replace(new, path)
        assert (path.is_dir(), path.is_symlink()) == (True, False)
        assert not os.path.lexists(tmp_path / f".{number}.old")
    assert_unchanged(target)


def test_remove_follows_no_link(tmp_path: Path, target: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner").symlink_to(target)
    (tmp_path / "outer").symlink_to(target)
    for name in ("folder", "outer", "missing"):
        remove(tmp_path / name)
        assert not os.path.lexists(tmp_path / name)
    assert_unchanged(target)


def test_run_resumed_in_place_follows_no_link(fit: Fit, target: Path) -> None:
    for name in ("logs", "data"):  # the user's own links to folders elsewhere
        Path(f"{name}_elsewhere").mkdir()
        Path(name).symlink_to(f"{name}_elsewhere")
    assert fit("--trainer.max_steps", 3).status == 0
    assert Path("logs_elsewhere", *RUN.parts[1:], "last.ckpt").is_file()
    assert list(Path("data_elsewhere/cache").iterdir())
    names = [
        name for stem in ("config.yaml", "last.ckpt", "best.ckpt") for name in (f".{stem}.old", f".{stem}.unfinished")
    ]
    replaced = [RUN / name for name in ("config.yaml", "best.ckpt", "summary.json", "report.html")]
    for path in replaced:
        path.unlink()
    events = RUN / "events.out.tfevents.1.planted"
    for path in (*(RUN / name for name in names), *replaced, events, RUN / "val" / events.name):
        path.symlink_to(target / "file")
    shutil.rmtree(RUN / "train")
    (RUN / "train").symlink_to(target)
    result = fit("--ckpt_path", RUN / "last.ckpt", "--trainer.max_steps", 6)
    assert (result.status, result.err) == (0, "")
    assert_unchanged(target)
    assert not any(path.is_symlink() for path in (*replaced, RUN / "train"))


def test_link_at_the_lock_of_a_run_is_refused(fit: Fit, target: Path) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    (RUN / ".lock").symlink_to(target / "file")
    result = fit("--ckpt_path", RUN / "last.ckpt", "--trainer.max_steps", 6)
    assert_user_error(
        result, f"{RUN} cannot be written to (Too many levels of symbolic links): remove what is in the way"
    )
    assert_unchanged(target)
