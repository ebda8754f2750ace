"""Progress on the console: durations, remaining validations, remaining time."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Fit, console_line, points

from lit_gpt.training.progress import StepProgress, format_duration, format_eta, remaining_validations


def test_durations_and_eta_are_formatted() -> None:
    assert [format_duration(s) for s in (0.0331, 1.26, 119, 121, 7300, 200_000)] == [
        *("33.1 ms", "1.3 s", "119.0 s", "2.0 min", "2.0 h", "2.3 days")
    ]
    assert format_eta(1000, 0.033, 5, 0.4) == "about 35.0 s: 1,000 steps of 33 ms, 5 validations of 400 ms"
    assert format_eta(10, 3.0, 0, 0.0, 30.0) == "about 60.0 s: 10 steps of 3.0 s"


def test_remaining_validations_matches_enumeration() -> None:
    for step, end, interval in itertools.product(range(10), range(1, 9), range(1, 5)):
        validations = [s for s in range(step + 1, end + 1) if s % interval == 0 or s == end]
        assert remaining_validations(step, end, interval) == len(validations)


def test_long_run_prints_its_remaining_time_once(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--trainer.max_steps", 30, "--trainer.val_check_interval", 12, "--data.global_batch_size", 8]
    assert not [text for text in fit(*flags).out.splitlines() if text.startswith("time")]
    monkeypatch.setattr(StepProgress, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(StepProgress, "LEAST_REMAINING_SECONDS", 0.0)
    eta = console_line(fit(*flags).out, "time")
    assert re.fullmatch(r"about \S+ \w+: 24 steps of \S+ ms, 3 validations of \S+ ms", eta)
    without_eta, with_eta = (points(Path(f"logs/small/version_{n}"))["loss/train"] for n in (0, 1))
    assert without_eta == with_eta


def test_bar_counts_the_steps_of_the_whole_run(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    init_train_tqdm = StepProgress.init_train_tqdm

    def keep(progress: StepProgress) -> Any:
        bars.append(init_train_tqdm(progress))
        assert not bars[-1].disable
        return bars[-1]

    monkeypatch.setattr(StepProgress, "init_train_tqdm", keep)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(StepProgress, "print", lambda *args: None)
    flags = ["--data.batch_size", 40, "--data.global_batch_size", 80, "--model.schedule", "constant"]
    assert "1 to an epoch" in fit(*flags, "--trainer.max_steps", 3).out
    assert fit(*flags, "--ckpt_path", "last").status == 0
    assert [(bar.initial, bar.n, bar.total, bar.unit) for bar in bars] == [(0, 3, 3, "step"), (3, 6, 6, "step")]
