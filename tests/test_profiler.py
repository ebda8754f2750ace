"""`--preflight`: what RunProfiler measures and reports."""

import re
from pathlib import Path

import pytest
import torch
from conftest import Fit, console_line, parse_bytes

import lit_gpt.cli.fit
import lit_gpt.cli.preflight
import lit_gpt.training.profiler
from lit_gpt.training.pace import format_eta
from lit_gpt.training.profiler import Measurements, RunProfiler, trimmed_mean


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the preflight take as few steps as it can."""
    for name in ("STEP_SECONDS", "VALIDATION_SECONDS", "SLOPE_SECONDS"):
        monkeypatch.setattr(lit_gpt.training.profiler, name, 0.0)


@pytest.mark.parametrize("flag", [["--preflight"], ["--preflight", "true"], ["--preflight=true"]], ids=" ".join)
def test_preflight_measures_and_writes_no_files(fit: Fit, quick: None, flag: list[str]) -> None:
    result = fit(*flag, "--generate.num_samples", 2)
    assert (result.status, result.err) == (0, "")
    assert {path.name for path in Path().iterdir()} == {"rows.txt", "small.yaml", "data"}  # data/ has the token cache
    assert re.fullmatch(r"[\d.]+ .B with 1, [\d.]+ .B with 4 windows in a batch", console_line(result.out, "measured"))
    needed = re.fullmatch(
        r"(\S+ .B) with 4 windows, (\S+ .B) available: fits; the largest batch that fits has about [\d,]+ windows",
        console_line(result.out, "needed"),
    )
    assert needed
    assert parse_bytes(needed[1]) < parse_bytes(needed[2])
    time = console_line(result.out, "time")
    assert re.fullmatch(r"about \S+ \w+: 6 steps of \S+ ms, 3 validations of \S+ ms; [\d,]+ tokens/s", time)


@pytest.mark.parametrize(
    ("interval", "at_start", "completed", "validations", "texts"),
    [(3, True, 0, 3, 3), (3, False, 0, 2, 3), (3, True, 3, 1, 1), (None, True, 0, 0, 1)],
)
def test_time_report_counts_validations_and_texts(
    interval: int | None, at_start: bool, completed: int, validations: int, texts: int
) -> None:
    found = Measurements(
        max_steps=6, step_seconds=1.0, validation_interval=interval, validates_at_start=at_start, text_seconds=100.0
    )
    expected = format_eta(6 - completed, 1.0, validations, 0.0, 100.0 * texts)
    assert found._time_report(completed) == f"{expected}; 0 tokens/s"


def test_preflight_of_a_resumed_run_counts_the_remaining_steps(fit: Fit, quick: None) -> None:
    assert fit().status == 0
    before = {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()}
    result = fit("--preflight", "--ckpt_path", "last", "--trainer.max_steps", 20, "--data.global_batch_size", 12)
    assert result.status == 0
    assert ": 14 steps of " in console_line(result.out, "time")
    assert ", 5 validations of " in console_line(result.out, "time")  # at 9, 12, 15, 18 and 20
    assert {path: path.read_bytes() for path in Path("logs").rglob("*") if path.is_file()} == before


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pretend that a process uses 100 MB, and 10 MB for each window; return the number of windows of each batch."""
    batch_sizes = [0]
    resize_batch = RunProfiler._resize_batch

    def record_size(self: RunProfiler, batch: tuple, dataloader_idx: int) -> tuple:
        batch = resize_batch(self, batch, dataloader_idx)
        batch_sizes.append(len(batch[0]))
        return batch

    monkeypatch.setattr(RunProfiler, "_resize_batch", record_size)
    for name in ("used_memory", "peak_memory"):
        monkeypatch.setattr(lit_gpt.training.profiler, name, lambda device: 10**8 + 10**7 * batch_sizes[-1])
    return batch_sizes


def test_batches_grow_until_the_next_would_not_fit(
    fit: Fit, quick: None, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # 95 of 100 MB are usable, enough for 9.5 windows
    monkeypatch.setattr(lit_gpt.training.profiler, "free_memory", lambda device: 10**8)
    result = fit("--preflight", "--data.batch_size", 16)
    assert result.status == 0
    assert list(dict.fromkeys(memory)) == [0, 1, 2, 4, 8]
    assert console_line(result.out, "measured") == (
        "110.0 MB with 1, 120.0 MB with 2, 140.0 MB with 4, 180.0 MB with 8 windows in a batch"
    )
    assert console_line(result.out, "needed") == (
        "260.0 MB with 16 windows, 195.0 MB available: does not fit; the largest batch that fits has about 9 windows"
    )
    assert re.fullmatch(
        r"about \S+ \w+: 6 steps of \S+ m?s, 3 validations of \S+ m?s, if the batch fitted; estimated from steps of "
        "8 windows, without generated texts",
        console_line(result.out, "time"),
    )


def test_batch_that_runs_out_of_memory_is_reported(
    fit: Fit, quick: None, memory: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    resize_batch = RunProfiler._resize_batch

    def fail(self: RunProfiler, batch: tuple, dataloader_idx: int) -> tuple:
        if self._windows > 1:
            raise torch.OutOfMemoryError("out of memory")
        return resize_batch(self, batch, dataloader_idx)

    monkeypatch.setattr(RunProfiler, "_resize_batch", fail)
    result = fit("--preflight")
    assert (result.status, result.err) == (0, "")
    assert console_line(result.out, "measured") == "110.0 MB with 1 window in a batch"
    assert console_line(result.out, "needed").endswith(
        ", 110.0 MB available: does not fit; the largest batch that fits has about 1 window"
    )
    assert console_line(result.out, "time").endswith(
        ", if the batch fitted; estimated from steps of 1 window, without generated texts"
    )


def test_model_that_does_not_fit_is_not_trained(fit: Fit, memory: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lit_gpt.cli.preflight, lit_gpt.cli.fit):
        monkeypatch.setattr(module, "free_memory", lambda device: 1000)
    result = fit("--preflight")
    assert (result.status, memory) == (0, [0])
    assert console_line(result.out, "measured") == "nothing, because not even one window fits into memory"


def test_trimmed_mean_leaves_out_5_percent_at_each_end() -> None:
    assert trimmed_mean([1.0] * 30 + [2.0] * 10 + [50.0]) == pytest.approx((28 * 1.0 + 9 * 2.0) / 37)
