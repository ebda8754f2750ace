"""A sample of tests/damage.py, and runs that meet damaged files."""

import random
from pathlib import Path

import pytest
from conftest import ROOT, Fit
from damage import Target, damage, make_cache, read_checkpoint

FSDP = ["--config", ROOT / "configs" / "fsdp.yaml", "--trainer.devices", 1]
FOLDER_FILES = {".metadata", "shards.json", "__0_0.distcp", "rest.pt", "SHA256SUMS"}


@pytest.mark.parametrize(
    ("flags", "files"), [([], {"last.ckpt"}), (FSDP, FOLDER_FILES)], ids=["checkpoint file", "checkpoint folder"]
)
def test_no_damage_of_a_checkpoint_is_believed(fit: Fit, flags: list[object], files: set[str]) -> None:
    assert fit(*flags, "--trainer.max_steps", 1, "--name", "run").status == 0
    path = Path("logs/run/version_0/last.ckpt")
    target = Target(path, lambda: read_checkpoint(path))
    assert {file.name for file in target.files()} == files
    counts, errors = damage(target, flips=20, truncations=8, rng=random.Random(1))
    assert errors == []
    assert sum(counts.values()) == 28
    assert counts.total() - sum(number for (*_, found), number in counts.items() if found == "refused") <= 8


def test_no_damage_of_a_cache_is_believed(folder: Path) -> None:
    counts, errors = damage(make_cache(folder), flips=12, truncations=6, rng=random.Random(1))
    assert errors == []
    assert {found for _, _, found in counts} == {"rebuilt"}


def test_last_names_damaged_checkpoints_and_resumes_from_the_newest_undamaged_one(fit: Fit) -> None:
    for number, flags in enumerate(([], FSDP)):
        name = f"run{number}"
        run = Path("logs") / name / "version_0"
        assert fit(*flags, "--trainer.max_steps", 4, "--checkpoint.every_n_steps", 2, "--name", name).status == 0
        undamaged = run / "step_00000002.ckpt"
        damaged = [path for path in run.glob("*.ckpt") if path != undamaged]
        for path in damaged:
            largest = max(Target(path, dict).files(), key=lambda file: file.stat().st_size)
            content = bytearray(largest.read_bytes())
            content[len(content) // 2] ^= 1
            largest.write_bytes(content)
        resumed = fit(*flags, "--trainer.max_steps", 5, "--name", name, "--ckpt_path", "last")
        assert resumed.status == 0, resumed.err
        assert f"resumed     {undamaged}, step 2" in resumed.out
        assert damaged
        assert all(str(path) in resumed.err for path in damaged)
