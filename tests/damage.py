"""Damage checkpoints and token caches, and check that no damage is believed.

    python tests/damage.py --flips 500 --truncations 100                   # each of a file, a folder and a cache
    python tests/damage.py --kinds cache --flips 50 --truncations 10 --seed 1

A random bit of a random file is flipped, or the file is cut off at a random byte. Then it is opened as every command
opens it. The outcome must be one of these, and anything else is an error:

    refused         a UserError of one line that names what is damaged
    rebuilt         a cache that was built again, with one warning, and equals the undamaged one
    read the same   all contents equal those of the undamaged file: tensors, tokenizer, report, ids
"""

import argparse
import collections
import logging
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import ROOT, SMALL, forked
from corpora import build
from torture import is_equal

from lit_gpt import load_model
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.errors import UserError

GOOD = ("refused", "rebuilt", "read the same")
SHARDED = ["--config", str(ROOT / "configs" / "fsdp.yaml"), "--trainer.devices", "2"]


@dataclass
class Target:
    """What is damaged.

    Attributes:
        path: The file or folder.
        read: Opens it and returns all its contents.
    """

    path: Path
    read: Callable[[], Any]

    def files(self) -> list[Path]:
        """Return its files, without empty ones."""
        paths = [self.path, *self.path.rglob("*")]
        return sorted(path for path in paths if path.is_file() and path.stat().st_size)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return everything that a checkpoint holds, and the model that is built from it."""
    contents = Checkpoint.open(path).read()
    model, tokenizer, mode = load_model(path)
    return {**contents, "model": model.state_dict(), "read tokenizer": tokenizer.state(), "read mode": mode}


def read_corpus(table: Path) -> dict[str, Any]:
    """Return everything that the cached corpus of a table holds."""
    corpus = build(table, tokenizer="char")
    ids = torch.from_numpy(np.asarray(corpus.ids).astype(np.int64))
    return {"ids": ids, "tokenizer": corpus.tokenizer.state(), "report": corpus.report}


def make_checkpoint(folder: Path, name: str, flags: list[str]) -> Target:
    """Train a small run and return its last checkpoint."""
    (folder / "small.yaml").write_text(SMALL, encoding="utf-8")
    ended = forked(folder, "--config", "small.yaml", *flags, "--name", name, "--data.files", write_rows(folder))
    assert ended.status == 0, ended.err
    path = folder / "logs" / name / "version_0" / "last.ckpt"
    return Target(path, lambda: read_checkpoint(path))


def write_rows(folder: Path) -> Path:
    path = folder / "rows.txt"
    path.write_text("\n".join(f"row {i} 第{i}行: " + "abcdefghij"[i % 10] * (i % 7) for i in range(120)), "utf-8")
    return path


def make_cache(folder: Path) -> Target:
    """Tokenize a small table and return its cache."""
    table = write_rows(folder)
    build(table, tokenizer="char")
    (path,) = (path for path in (folder / "cache").iterdir() if path.is_dir())
    return Target(path, lambda: read_corpus(table))


KINDS: dict[str, Callable[[Path], Target]] = {
    "file": lambda folder: make_checkpoint(folder, "single", []),
    "folder": lambda folder: make_checkpoint(folder, "sharded", SHARDED),
    "cache": make_cache,
}


def flip(path: Path, rng: random.Random) -> str:
    """Flip a random bit of a file."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)
    return f"bit {bit}"


def truncate(path: Path, rng: random.Random) -> str:
    """Cut a file off at a random byte."""
    content = path.read_bytes()
    size = rng.randrange(len(content))
    path.write_bytes(content[:size])
    return f"cut to {size} of {len(content)} bytes"


class Warnings(logging.Handler):
    """Collects the warnings of lit_gpt instead of printing them."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        logger = logging.getLogger("lit_gpt")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


WARNINGS = Warnings()


def outcome(target: Target, expected: Any, damaged_file: Path) -> str:
    """Open what is damaged and say what came of it: one of GOOD, or what went wrong."""
    damaged = damaged_file.read_bytes()
    WARNINGS.messages.clear()
    try:
        found = target.read()
    except UserError as error:
        is_one_line = "\n" not in str(error) and str(target.path) in str(error)
        return "refused" if is_one_line else f"refused with another message: {error}"
    except BaseException as error:  # torch.distributed raises some that are no Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        return f"{type(error).__name__}: {error}"
    if not is_equal(found, expected):
        return f"read differently: {[key for key in expected if not is_equal(found.get(key), expected[key])]}"
    if damaged_file.exists() and damaged_file.read_bytes() == damaged:
        return "read the same"
    is_reported = len(WARNINGS.messages) == 1 and "\n" not in WARNINGS.messages[0]
    return "rebuilt" if is_reported else f"rebuilt with other warnings: {WARNINGS.messages}"


def damage(target: Target, flips: int, truncations: int, rng: random.Random) -> tuple[collections.Counter, list[str]]:
    """Damage the target in many ways, one after the other.

    Returns:
        How often each kind of damage to each file had each outcome, and a line for every error.
    """
    expected, files = target.read(), target.files()
    backup = target.path.with_name(f"{target.path.name}.backup")
    copy: Callable[[Path, Path], Any] = shutil.copytree if target.path.is_dir() else shutil.copy
    copy(target.path, backup)
    counts: collections.Counter = collections.Counter()
    errors: list[str] = []
    for change in [flip] * flips + [truncate] * truncations:
        path = rng.choice(files)
        where = change(path, rng)
        found = outcome(target, expected, path)
        counts[change.__name__, path.name, found if found in GOOD else "error"] += 1
        if found not in GOOD:
            errors.append(f"{path.name}, {where}: {found}")
        shutil.rmtree(target.path) if target.path.is_dir() else target.path.unlink(missing_ok=True)
        copy(backup, target.path)
    return counts, errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=500, help="of each kind")
    parser.add_argument("--truncations", type=int, default=100, help="of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failures = 0
    for kind in options.kinds:
        with tempfile.TemporaryDirectory() as folder:
            target = KINDS[kind](Path(folder))
            counts, errors = damage(target, options.flips, options.truncations, random.Random(options.seed))
        for change in ("flip", "truncate"):
            for found in (*GOOD, "error"):
                files = {name: number for (how, name, what), number in counts.items() if (how, what) == (change, found)}
                if files:
                    listed = ", ".join(f"{name} {number}" for name, number in sorted(files.items()))
                    print(f"{kind:8}{change:10}{found:15}{sum(files.values()):5}   ({listed})", flush=True)
        for error in errors:
            print(f"  {error[:300]!r}")
        failures += len(errors)
    return int(failures > 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
