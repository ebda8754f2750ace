"""Runs of one name that start at once take one folder each."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
from conftest import Fit, points

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli import fit as fit_module
from lit_gpt.training.run_folder import RunFolder

NUM_RUNS = 8


def test_each_of_many_runs_creates_a_folder_of_its_own(tmp_path: Path) -> None:
    for attempt in range(20):
        start, first = Barrier(NUM_RUNS), tmp_path / str(attempt) / "name" / "version_3"

        def create(number: int, start: Barrier = start, first: Path = first) -> tuple[RunFolder, Path]:
            run_folder = RunFolder()
            start.wait()
            return run_folder, run_folder.create_and_lock(first, is_new=True)

        with ThreadPoolExecutor(NUM_RUNS) as pool:
            runs = list(pool.map(create, range(NUM_RUNS)))
        expected = [f"version_{number}" for number in range(3, 3 + NUM_RUNS)]
        assert sorted((path.name for _, path in runs), key=lambda name: int(name[8:])) == expected
        for run_folder, _ in runs:
            run_folder.release(keep=False)
        assert not (tmp_path / str(attempt)).exists()


def test_folder_is_created_while_other_runs_remove_the_folders_around_it(tmp_path: Path) -> None:
    def create_and_release(number: int) -> bool:
        run_folder = RunFolder()
        folder = run_folder.create_and_lock(tmp_path / "logs" / "name" / "version_0", is_new=True)
        is_there = folder.is_dir()
        run_folder.release(keep=False)
        return is_there

    with ThreadPoolExecutor(NUM_RUNS) as pool:
        assert all(pool.map(create_and_release, range(200)))
    assert not (tmp_path / "logs").exists()


def test_second_of_two_runs_takes_the_next_version(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = Path("logs/small/version_0")

    def check_prompts(experiment: object) -> None:
        taken.mkdir(parents=True)  # another process starts, when this one has found no folder of its name

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "check_prompts", check_prompts)
        result = fit()
    assert result.status == 0, result.err
    run = Path("logs/small/version_1")
    assert f"logs        {run}\n" in result.out
    assert f"last        {run / 'last.ckpt'}\n" in result.out
    assert list(taken.iterdir()) == []
    assert {"config.yaml", "best.ckpt", "last.ckpt"} <= {path.name for path in run.iterdir()}
    assert [step for step, _ in points(run)["loss/train"]] == [1, 2, 3, 4, 5, 6]
    resumed = fit("--ckpt_path", "last", "--trainer.max_steps", 8)
    assert f"resumed     {run / 'last.ckpt'}, step 6\n" in resumed.out
    assert Checkpoint.open(run / "last.ckpt").step == 8
