"""SHA256SUMS: every change of a file in the folder is found, and nothing outside the folder is read."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from lit_gpt.digests import DIGESTS_FILE, damaged_files, read_digests, sha256, sha256_of_all, write_digests

CONTENTS = {".metadata": b"", "a.bin": b"abc", "b-0_1.bin": bytes(range(256)) * 5000}


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A folder with three files and their digests."""
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    write_digests(tmp_path, sha256_of_all(tmp_path / name for name in CONTENTS))
    return tmp_path


def test_written_digests_are_those_of_sha256sum_and_are_read_back(sums: Path) -> None:
    checked = subprocess.run(["sha256sum", "--strict", "-c", DIGESTS_FILE], cwd=sums, capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert checked.stdout.splitlines() == [f"{name}: OK" for name in CONTENTS]
    assert read_digests(sums)["a.bin"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert damaged_files(sums, needed=CONTENTS) == []
    assert damaged_files(Path(shutil.copytree(sums, sums / "copy")), needed=CONTENTS) == []


def test_damaged_files_names_every_file_that_was_changed_or_is_missing(sums: Path) -> None:
    content = bytearray(CONTENTS["b-0_1.bin"])
    content[777_777] ^= 16
    (sums / "b-0_1.bin").write_bytes(content)
    (sums / "a.bin").unlink()
    (sums / "new.bin").touch()
    assert damaged_files(sums) == ["a.bin", "b-0_1.bin"]
    assert damaged_files(sums, needed=["new.bin"]) == ["a.bin", "b-0_1.bin", "new.bin"]


def test_flipped_bits_and_any_truncation_of_the_digests_is_found(sums: Path) -> None:
    path = sums / DIGESTS_FILE
    content = path.read_bytes()
    for position in range(0, 8 * len(content), 5):  # every bit of a byte occurs
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert damaged_files(sums, needed=CONTENTS), position
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert damaged_files(sums, needed=CONTENTS), length
    path.unlink()
    assert damaged_files(sums) == [DIGESTS_FILE]


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/file", ".", "..", "", "a\\b", "a b", "ä"])
def test_digests_name_only_files_inside_the_folder(sums: Path, name: str) -> None:
    path = sums / DIGESTS_FILE
    path.write_text(path.read_text() + f"{'0' * 64}  {name}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"no digest|ascii"):
        read_digests(sums)
    with pytest.raises(AssertionError):
        write_digests(sums, {name: "0" * 64})


def test_sha256_opens_regular_files_only(sums: Path) -> None:
    os.mkfifo(sums / "pipe")
    (sums / "link").symlink_to(sums / "a.bin")
    (sums / "folder").mkdir()
    for name in ("pipe", "link", "folder", "missing"):
        with pytest.raises(OSError, match=name):
            sha256(sums / name)
    (sums / "a.bin").unlink()
    (sums / "a.bin").symlink_to("b-0_1.bin")
    assert damaged_files(sums) == ["a.bin"]
    os.replace(sums / "pipe", sums / DIGESTS_FILE)
    assert damaged_files(sums) == [DIGESTS_FILE]
