"""What is printed before a run: warnings about memory, disk space, vocabulary and rows; refusals of --preflight."""

import re
import shutil
from pathlib import Path

import pytest
from conftest import Fit, console_line

import lit_gpt.cli.fit
import lit_gpt.cli.preflight

RUN = Path("logs/small/version_0")


def test_run_that_does_not_fit_prints_warnings(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "warning" not in fit("--trainer.max_steps", 1).out
    monkeypatch.setattr(lit_gpt.cli.preflight, "free_memory", lambda device: 100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100_000))  # type: ignore[attr-defined]
    result = fit("--trainer.max_steps", 1)
    assert result.status == 0
    memory, disk = (text for text in result.out.splitlines() if text.startswith("warning"))
    assert re.search(r"needs \d.\d MB of memory, and 0.1 MB are free: give a smaller --data.batch_size", memory)
    assert re.search(r"needs \d.\d MB of disk, and 0.1 MB are free at logs/small/version_1: make room there", disk)


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["--trainer.max_steps", 2000], True),
        (["--trainer.max_steps", 40], False),  # no more than four epochs
        (["--trainer.max_steps", 2000, "--data.files", "long.txt"], False),
    ],
    ids=["many passes over little text", "few passes", "much text"],
)
def test_preflight_warns_of_a_model_too_large_for_its_text(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, flags: list, warns: bool
) -> None:
    Path("long.txt").write_text("a long row of text, the same again and again\n" * 10_000)
    small = ["--model.config.d_model", 2, "--model.config.num_heads", 1, "--model.config.num_blocks", 1]
    monkeypatch.setattr(lit_gpt.cli.fit, "train", lambda experiment, stop: None)
    out = fit(*flags, *small, "--trainer.logger", "false").out
    assert ("may memorize" in out) == warns
    assert ("20 tokens a parameter (Hoffmann et al. 2022), and after 4 epochs" in out) == warns
    assert ("give --early_stopping.patience 5, a smaller" in out) == warns
    out = fit(*flags, *small, "--trainer.logger", "false", "--early_stopping.patience", 3).out
    assert ("may memorize" in out) == warns
    assert "--early_stopping.patience 5" not in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--preflight", "maybe"], "--preflight maybe: give true, false or no value"),
        (
            ["--preflight", "--trainer.fast_dev_run", "true"],
            "--preflight and --trainer.fast_dev_run do not go together",
        ),
        (
            ["validate", "--preflight", "--ckpt_path", RUN / "last.ckpt"],
            "--preflight measures a training run: leave out",
        ),
    ],
    ids=["no truth", "no run", "no training"],
)
def test_preflight_flag_is_refused_where_it_makes_no_sense(fit: Fit, flags: list, message: str) -> None:
    assert fit().status == 0
    result = fit(*flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert message in result.err


def test_mostly_unused_vocabulary_and_rejected_rows_are_reported(fit: Fit) -> None:
    Path("t.csv").write_text("a,b\n" + "x,some words\n" * 300 + "x\n", encoding="utf-8")
    words = ["--data.files", "t.csv", "--data.columns", "b", "--data.tokenizer", "gpt2", "--trainer.max_steps", 1]
    out = fit(*words, "--data.vocab", "full").out
    (warning,) = (text for text in out.splitlines() if text.startswith("warning     of"))
    assert re.search(
        r"of 50,257 different tokens 3 occur, and 804,112 of [\d,]+ parameters .* --data.vocab pruned", warning
    )
    assert re.search(r"1 rows that cannot be read: see data/cache/\w+/rejected.jsonl", console_line(out, "text"))
    assert "warning     of" not in fit(*words).out
