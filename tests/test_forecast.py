"""The forecast of the last validation loss: its rule, its calibration, and the callback's state."""

import json
import math
import runpy
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Fit, at_step, forked, points
from torture import compare_runs, kill_process_group

from lit_gpt.planning import forecast as rule
from lit_gpt.planning.forecast import Forecast, KnownCurves, add_point, features, forecast, mean_loss
from lit_gpt.runs.curves import Events
from lit_gpt.runs.report import Run, forecasts
from lit_gpt.runs.summary import RunSummary
from lit_gpt.training.forecast import LossForecast, describe_forecast

RUN = Path("logs/small/version_0")
EVERY_40 = ["--trainer.max_steps", 40, "--trainer.val_check_interval", 10]


def known_at(step: int, last_step: int, power: float, floor: float) -> tuple[KnownCurves, float]:
    """Return what is known of a run whose loss is floor + 6 * step ** -power, and its last loss."""
    losses = floor + 6 * np.arange(1, last_step + 1) ** -power
    recent, earlier = losses[step * 3 // 4 : step].mean(), losses[step // 2 : step * 3 // 4].mean()
    known = KnownCurves(step, last_step, losses[step - 1], recent, earlier, 1.0, 1.0, epochs=0.5, optimizer="adamw")
    return known, losses[-1]


@pytest.mark.parametrize("last_step", [160, 20_000])
@pytest.mark.parametrize(("power", "floor"), [(0.25, 0.5), (0.3, 1.0), (0.4, 1.5)])
def test_forecast_of_a_power_law_approaches_its_last_loss(last_step: int, power: float, floor: float) -> None:
    errors, widths = [], []
    for share in (0.1, 0.3, 0.6, 0.9):
        known, end = known_at(round(share * last_step), last_step, power, floor)
        expected = forecast(known)
        assert expected.low < expected.loss < expected.high
        errors.append(abs(expected.loss / end - 1))
        widths.append(expected.high / expected.low)
    assert errors[0] < 0.2
    assert errors[-1] < 0.01
    assert widths == sorted(widths, reverse=True)


def test_nothing_is_uncertain_at_the_last_step() -> None:
    known = KnownCurves(200, 200, 2.5, 2.4, 2.6, rate=0.1, last_rate=0.1, epochs=6.0, optimizer="muon")
    assert not any(features(known))
    assert forecast(known) == Forecast(2.5, 2.5, 2.5)


def test_mean_loss_weights_points_by_the_steps_they_stand_for() -> None:
    losses = np.random.default_rng(1).uniform(1, 5, 101)  # of steps 0 to 100; step 0 is none
    ends = [4, 10, 20, 25, 50, 60, 100]
    curve = [(end, losses[start + 1 : end + 1].mean()) for start, end in zip([0, *ends], ends)]
    assert mean_loss(curve, 50, 100) == pytest.approx(losses[51:101].mean())
    assert mean_loss(curve, 4, 25) == pytest.approx(losses[5:26].mean())
    assert mean_loss(curve, 26, 49) is None


def test_long_training_curve_is_thinned_out_and_keeps_its_means() -> None:
    curve: rule.Curve = []
    for step in range(10, 50_001, 10):
        add_point(curve, step, float(step))
        assert len(curve) <= rule.MAX_POINTS
    assert curve[-1] == (50_000, 50_000.0)
    assert mean_loss(curve, 25_000, 50_000) == pytest.approx(37_500, rel=0.01)
    assert mean_loss(curve, 12_500, 25_000) == pytest.approx(18_750, rel=0.02)


def test_intervals_hold_most_of_the_measured_runs() -> None:
    """The coefficients are fitted on these runs too; docs/planning.md has figures for texts that were left out."""
    runs = json.loads((ROOT / "docs" / "planning_curves.json").read_text())
    inside, errors = [], []
    for run in runs:
        steps, end = run["steps"], run["val_curve"][-1][1]
        for step, loss in run["val_curve"][:-1]:
            recent, earlier = (mean_loss(run["train_curve"], *part) for part in _quarters(step))
            if step < 0.1 * steps or recent is None or earlier is None:
                continue
            rates = (_rate(run, at) for at in (step, steps - 1))
            known = KnownCurves(step, steps, loss, recent, earlier, *rates, run["epochs"], run["optimizer"])
            expected = forecast(known)
            inside.append(expected.low <= end <= expected.high)
            errors.append(abs(math.log(expected.loss / end)))
    assert 0.7 <= np.mean(inside) <= 0.9
    assert np.median(errors) < 0.04


def test_coefficients_are_those_that_the_measured_runs_give() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "planning_forecast.py"))
    runs = json.loads((ROOT / "docs" / "planning_curves.json").read_text())
    for (optimizer, has_validations), known in rule.REGRESSIONS.items():
        found = script["fit"]([row for run in runs for row in script["examples"](run, has_validations)], optimizer)
        for name in ("change", "error", "low", "high"):
            assert getattr(found, name) == pytest.approx(getattr(known, name), abs=0.02, rel=0.02), name


def _quarters(step: int) -> list[tuple[int, int]]:
    return [(step * 3 // 4, step), (step // 2, step * 3 // 4)]


def _rate(run: dict, step: int) -> float:
    """Return the learning rate after `step` steps as a fraction of the highest one."""
    schedule, warmup_steps, min_factor, decay_share = run["schedule"]
    steps = run["steps"]
    if step < warmup_steps or schedule == "constant":
        return min(1.0, (step + 1) / max(1, warmup_steps))
    start = max(warmup_steps, round(steps * (1 - decay_share)))
    done = max(0.0, (step - start) / (steps - start))
    fall = done if schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return 1 - (1 - min_factor) * fall


# ------------------------------------------------------------------------------------------------------------ callback


@pytest.fixture
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossForecast, "MIN_STEPS", 20)


@pytest.mark.usefixtures("short_runs")
def test_killed_and_resumed_run_makes_the_forecasts_of_an_uninterrupted_run(folder: Path) -> None:
    flags = ["--config", "small.yaml", *EVERY_40, "--checkpoint.every_n_steps", 7, "--name"]
    kill = at_step(26, lambda module: kill_process_group())
    assert forked(folder, *flags, "straight").status == 0
    assert forked(folder, *flags, "killed", prepare=kill).status == -signal.SIGKILL
    assert forked(folder, *flags, "killed", "--ckpt_path", "last").status == 0
    straight, killed = (folder / f"logs/{name}/version_0" for name in ("straight", "killed"))
    assert compare_runs(straight, killed) == []
    assert [step for step, _ in points(killed)["forecast/loss_val"]] == [4, 10, 20, 30]


@pytest.mark.usefixtures("short_runs")
def test_forecasts_are_printed_logged_and_compared_with_the_end(fit: Fit) -> None:
    result = fit(*EVERY_40)
    curves = points(RUN)
    names = ("loss_val_low", "loss_val", "loss_val_high", "bits_per_byte")
    low, loss, high, bits = (dict(curves[f"forecast/{name}"])[20] for name in names)
    assert (
        f"forecast    loss/val {loss:.3f} at step 40 (80%: {low:.3f} to {high:.3f}), {bits:.3f} bits/byte" in result.out
    )
    ratio = dict(curves["val/bits_per_byte"])[20] / dict(curves["loss/val"])[20]
    assert bits == pytest.approx(loss * ratio, rel=1e-5)
    low, loss, high = (dict(curves[f"forecast/{name}"])[20] for name in names[:3])
    page = (RUN / "report.html").read_text(encoding="utf-8")
    assert "At 10% of the run the forecast was" in page


@pytest.mark.usefixtures("short_runs")
def test_run_without_validations_has_no_forecast(fit: Fit) -> None:
    result = fit(*EVERY_40, "--trainer.limit_val_batches", 0)
    assert result.status == 0, result.err
    assert "forecast" not in result.out


def test_report_says_whether_the_end_was_inside_the_interval() -> None:
    curves = {
        "forecast/loss_val": [(100, 1.52), (300, 1.47)],
        "forecast/loss_val_low": [(100, 1.44), (300, 1.45)],
        "forecast/loss_val_high": [(100, 1.6), (300, 1.48)],
        "loss/val": [(0, 7.0), (100, 2.0), (300, 1.7), (1000, 1.49)],
    }
    run = Run(RunSummary("a", "logs/a", max_steps=1000), Events(curves))
    shown = forecasts(run)
    assert "At 10% of the run the forecast was 1.520 (1.440 to 1.600); the run ended at 1.490, inside." in shown
    assert "At 30% of the run the forecast was 1.470 (1.450 to 1.480); the run ended at 1.490, above the" in shown
    curves["loss/val"].pop()
    assert "the run did not reach step 1,000" in forecasts(run)
    assert forecasts(Run(run.summary, Events({}))) == ""


def test_line_of_a_forecast_fits_into_80_columns() -> None:
    line = describe_forecast(20_000, Forecast(8.234, 7.123, 9.345), 0.7)
    assert len(f"forecast    loss/val {line}") <= 80
