"""Progress on the console: the bar, the lines of validations, the remaining time, the notice about overfitting."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Fit, console_line, forked, in_terminal, points

from lit_gpt.figures import format_duration
from lit_gpt.lines import display_width
from lit_gpt.training.pace import Pace, format_eta, remaining_validations
from lit_gpt.training.progress import Overfitting, StepProgress, format_bar


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


def test_time_of_a_step_is_a_median_over_at_least_ten_steps_without_pauses() -> None:
    pace = Pace()
    for step in range(10):
        pace.record(step, 2.0 * step)
        assert pace.step_seconds is None
    pace.record(10, 500.0)  # a slow step, as one that saves a checkpoint
    assert pace.step_seconds == 2.0
    pace.pause()  # of a thousand seconds
    pace.record(11, 1500.0)
    pace.record(61, 1550.0)  # fifty steps share their time
    assert pace.step_seconds == 1.0
    for step in range(62, 62 + Pace().max_steps):  # old steps are forgotten
        pace.record(step, 1550.0 + 3.0 * (step - 61))
    assert pace.step_seconds == 3.0


@pytest.mark.parametrize(
    ("losses", "reports"),  # of each validation: step, loss/val, loss/train_eval
    [
        ([(0, 7.0, 7.0), (200, 4.0, 3.9), (400, 3.5, 3.0), (600, 3.6, 2.5), (800, 3.9, 2.0)], [600]),
        ([(0, 7.0, 7.0), (200, 4.0, 3.9), (400, 4.03, 3.5)], []),  # within the margin
        ([(0, 7.0, 7.0), (200, 4.0, 3.9), (400, 5.0, 5.1)], []),  # both rise: the run diverges
        ([(200, 3.5, 3.0), (400, 3.6, 2.9), (600, 3.4, 2.8), (800, 3.5, 2.0)], [400]),  # said once
    ],
)
def test_rising_validation_loss_beside_a_falling_training_loss_is_reported_once(
    losses: list[tuple[int, float, float]], reports: list[int]
) -> None:
    overfitting = Overfitting()
    found = {step: overfitting.check(step, val, train) for step, val, train in losses}
    assert [step for step, report in found.items() if report] == reports


def test_overfitting_of_a_resumed_run_counts_from_the_lowest_loss_before() -> None:
    overfitting = Overfitting()
    overfitting.resume(200, 3.5)
    assert overfitting.check(600, 3.9, 2.5) == ""  # what the training loss was at step 200 is not known
    assert "8.6% above its lowest value, 3.5000 at step 200" in overfitting.check(800, 3.8, 2.0)


def test_resumed_run_knows_its_lowest_loss(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fit("--trainer.max_steps", 3, "--model.schedule", "constant").out
    resumed: list[str] = []
    keep = lambda self, step, loss: resumed.append(f"loss/val {loss:.4f} at step {step}")  # noqa: E731
    monkeypatch.setattr(Overfitting, "resume", keep)
    assert fit("--trainer.max_steps", 4, "--model.schedule", "constant", "--ckpt_path", "last").status == 0
    assert len(resumed) == 1
    assert console_line(first, "best").endswith(resumed[0])


def test_overfitting_run_says_at_which_step_it_was_best_and_what_to_do(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Overfitting, "check", lambda self, step, val, train: "loss/val rises" if step == 3 else "")
    assert console_line(fit().out, "overfitting") == (
        "loss/val rises; best.ckpt keeps that step: give --early_stopping.patience 5, more --model.config.dropout, a "
        "smaller model or more text"
    )
    out = fit("--early_stopping.patience", 3).out
    assert "keeps that step: give more --model.config.dropout, a smaller model" in console_line(out, "overfitting")


def test_run_without_a_progress_bar_prints_its_losses(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--trainer.max_steps", 3, "--trainer.enable_progress_bar", "false"]
    status, printed = in_terminal(folder, *flags)
    assert status == 0
    assert "%|" not in printed
    assert len(re.findall(r"^step +[03] loss/train_eval \d\.\d{4}   loss/val \d", printed, re.MULTILINE)) == 2


def test_remaining_time_is_printed_once_and_at_each_validation(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--trainer.max_steps", 40, "--trainer.val_check_interval", 20, "--data.global_batch_size", 8]
    assert not [text for text in fit(*flags).out.splitlines() if text.startswith("time")]
    monkeypatch.setattr(StepProgress, "TIMED_SECONDS", 0.0)
    monkeypatch.setattr(StepProgress, "LEAST_REMAINING_SECONDS", 0.0)
    out = fit(*flags).out
    assert re.fullmatch(r"about \S+ \w+: 25 steps of \S+ ms, 2 validations of \S+ ms", console_line(out, "time"))
    first, second = re.findall(r"^step +[24]0 .* bits/byte (.+)$", out, re.MULTILINE)
    assert re.fullmatch(r"[\d,]+ tokens/s, about \S+ m?s left", first)
    assert re.fullmatch(r"[\d,]+ tokens/s", second)
    without_eta, with_eta = (points(Path(f"logs/small/version_{n}"))["loss/train"] for n in (0, 1))
    assert without_eta == with_eta


def test_bar_format_says_what_is_known_and_fits() -> None:
    assert format_bar(0, 300, None, None, None) == "step 0/300 {percentage:3.0f}%|{bar}|"
    known = "step 120/300 {percentage:3.0f}%|{bar}| loss 4.1200  9,752 tokens/s  21.0 s left"
    assert format_bar(120, 300, 4.12, 9752.3, 21.0) == known
    assert format_bar(120, None, 4.12, 9752.3, None) == "step 120 | loss 4.1200  9,752 tokens/s"
    largest = format_bar(999_999, 1_000_000, 11.5157, 1_234_567.0, 1e6).replace("{percentage:3.0f}", "100")
    assert len(largest.replace("{bar}", "")) <= 80


def test_bar_counts_the_steps_of_the_whole_run(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    init_train_tqdm = StepProgress.init_train_tqdm

    def keep(progress: StepProgress) -> Any:
        bars.append(init_train_tqdm(progress))
        assert not bars[-1].disable
        return bars[-1]

    monkeypatch.setattr(StepProgress, "init_train_tqdm", keep)
    monkeypatch.setattr(StepProgress, "WARM_UP_STEPS", 0)
    monkeypatch.setattr(StepProgress, "DRAWING_SECONDS", 0.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr(StepProgress, "print", lambda *args: None)
    flags = ["--data.batch_size", 40, "--data.global_batch_size", 80, "--model.schedule", "constant"]
    assert "1 to an epoch" in fit(*flags, "--trainer.max_steps", 3).out
    assert fit(*flags, "--ckpt_path", "last").status == 0
    assert [(bar.initial, bar.n, bar.total, bar.unit) for bar in bars] == [(0, 3, 3, "step"), (3, 6, 6, "step")]


def draw_always() -> None:
    StepProgress.DRAWING_SECONDS = StepProgress.TIMED_SECONDS = StepProgress.LEAST_REMAINING_SECONDS = 0.0


def lines_of_terminal(printed: str) -> list[str]:
    """Return what the terminal has shown in one line each, bars included."""
    return [line.rstrip() for line in re.split(r"[\r\n]+|\x1b\[A", printed) if line.strip()]


def without_times(text: str) -> str:
    """Leave out what differs between two runs."""
    return re.sub(r"[\d.,]+ (tokens/s|m?s|GB free|TB free)\b|version_\d", "_", text)


def test_terminal_of_80_columns_shows_bars_and_the_lines_of_a_pipe(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--trainer.max_steps", 30, "--trainer.val_check_interval", 20]
    flags += ["--generate.max_new_tokens", 60, "--generate.prompts", "['', 床前明月光]"]
    piped = forked(folder, *flags, prepare=draw_always)
    status, printed = in_terminal(folder, *flags, prepare=draw_always)
    assert (piped.status, piped.err, status) == (0, "", 0), printed
    bars = [line for line in lines_of_terminal(printed) if "%|" in line]
    lines = [line for line in lines_of_terminal(printed) if "%|" not in line]
    assert all(display_width(line) <= 80 for line in lines_of_terminal(printed))
    for pattern in (
        r"step 2\d/30 +\d\d%\|.+\| loss \d\.\d{4}  [\d,]+ tokens/s  \S+ m?s left",
        r"validating \d/2 +\d+%\|.+\| .+ left",
        r"sampling \d+/60 +\d+%\|.+\| .+ left",
    ):
        assert any(re.fullmatch(pattern, bar) for bar in bars), (pattern, "\n".join(set(bars)))
    raw = (folder / "out.txt").read_text(encoding="utf-8")
    assert "\r" not in raw + piped.out
    expected = without_times(piped.out)
    for line in lines:
        assert without_times(line).lstrip().removesuffix(" \\") in expected, line


def test_validate_shows_a_bar_in_a_terminal_and_few_lines_in_a_pipe(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    flags = ["validate", "--ckpt_path", "logs/small/version_0/last.ckpt", "--data.eval_windows", 2000]
    status, printed = in_terminal(folder, *flags)
    assert status == 0
    assert any(re.fullmatch(r"validating \d/2 .+ left", line) for line in lines_of_terminal(printed))
    out = forked(folder, *flags).out
    assert [line.split()[0] for line in out.splitlines()] == [
        *("checkpoint", "loss/train_eval", "loss/val", "val/accuracy", "val/bits_per_byte", "val/perplexity")
    ]
    out = forked(folder, *flags, prepare=lambda: setattr(StepProgress, "LINE_SECONDS", 0.0)).out
    assert "evaluated   1 of 2 batches\n" in out
