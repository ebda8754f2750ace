"""Advice on the learning rate: which curves call for it, what it says, and that a resumed run says the same."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Fit

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.runs.summary import read_summary
from lit_gpt.training.advice import MAX_POINTS, LossCurve, Recipe, advise

RUN = Path("logs/small/version_0")
RECIPE = Recipe(
    learning_rate=0.002, warmup_steps=0, least_steps=100, max_steps=400, uniform=7.0, unigram=5.8, bigram=2.0
)


def curve_of(losses: list[float], every: int = 10) -> LossCurve:
    curve = LossCurve()
    for number, loss in enumerate(losses, start=1):
        curve.add(number * every, loss)
    return curve


def noisy(losses: np.ndarray, deviation: float) -> list[float]:
    return list(losses + np.random.default_rng(0).normal(0, deviation, len(losses)))


def text_of(losses: list[float], recipe: Recipe = RECIPE) -> str:
    advice = advise(curve_of(losses), recipe)
    return "" if advice is None else advice.text


# --------------------------------------------------------------------------------------------------------- the curve


def test_curve_has_the_means_of_all_losses_in_a_few_points() -> None:
    losses = list(np.random.default_rng(1).normal(3, 1, 1000))
    curve = curve_of(losses)
    assert len(curve.losses) < MAX_POINTS
    assert curve.steps == [10 * curve.width * (n + 1) for n in range(len(curve.losses))]
    parts = [losses[start : start + curve.width] for start in range(0, 1000, curve.width)]
    assert curve.losses == pytest.approx([np.mean(part) for part in parts if len(part) == curve.width])
    assert curve.total == pytest.approx(sum(losses[len(curve.losses) * curve.width :]))


# ------------------------------------------------------------------------------------------------------ the decision


def test_loss_that_rises_above_its_lowest_value_calls_for_a_third_of_the_rate() -> None:
    losses = noisy(np.r_[np.linspace(6, 2.5, 20), np.linspace(4, 5, 10)], 0.1)
    text = text_of(losses)
    assert "loss/train rose from 2.8" in text
    assert "at step 200 to 4.7" in text
    assert text.endswith(
        ": the learning rate is too high; try --model.learning_rate 0.00067, a third, or --model.warmup_steps 100"
    )


def test_loss_above_a_uniform_guess_calls_for_a_tenth_of_the_rate() -> None:
    text = text_of(noisy(np.full(20, 30.0), 5))
    assert "above the 7.00 of a uniform guess" in text
    assert "try --model.learning_rate 0.0002, a tenth" in text


def test_loss_that_stays_at_the_frequencies_of_tokens_calls_for_a_tenth_of_the_rate() -> None:
    losses = noisy(np.r_[6.9, 6.1, np.full(18, 5.9)], 0.15)
    assert "loss/train has been near 5.9" in text_of(losses)
    assert "about the 5.80 of a model that knows only how frequent each token is" in text_of(losses)
    assert "try --model.learning_rate 0.0002, a tenth" in text_of(losses)


def test_loss_that_falls_slowly_from_a_uniform_guess_calls_for_ten_times_the_rate() -> None:
    for end in (6.99, 6.6, 6.2):
        text = text_of(noisy(np.linspace(7, end, 20), 0.02))
        assert "loss/train falls slowly" in text
        assert "try --model.learning_rate 0.02, ten times" in text


def test_loss_that_falls_as_fast_at_the_end_calls_for_more_steps_or_three_times_the_rate() -> None:
    losses = noisy(np.linspace(7, 3, 40), 0.05)
    assert text_of(losses[:-1]) == ""
    text = text_of(losses)
    assert "loss/train fell by 1.74 in the first half of the steps, and by 2.03 in the second" in text
    assert text.endswith("try --trainer.max_steps 800, or --model.learning_rate 0.006, three times as much")
    assert text_of(noisy(3 + 4 * np.exp(-np.arange(40) / 15), 0.05)) == ""
    recovers = np.r_[
        6.5, 5.5, np.linspace(4.6, 4.5, 18), np.linspace(4.5, 2.0, 20)
    ]  # when the schedule lowers the rate
    assert text_of(noisy(recovers, 0.05)) == ""


def test_stall_is_no_news_before_its_time_nor_where_tokens_do_not_depend_on_each_other() -> None:
    losses = noisy(np.full(20, 5.9), 0.1)
    assert text_of(losses)
    assert text_of(losses, Recipe(0.002, 0, 300, 400, 7.0, 5.8, 2.0)) == ""
    assert text_of([*losses, *np.full(5, 5.79)], Recipe(0.002, 0, 100, 400, 7.0, 5.8, 5.8)) == ""


@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.5])
def test_noise_alone_is_no_news(deviation: float) -> None:
    for end in (1.0, 2.5, 4.0):
        for seed in range(4):
            noise = np.random.default_rng(seed).normal(0, deviation, 1000)
            losses = end + (7 - end) * np.exp(-np.arange(1000) / 30) + noise
            curve = LossCurve()
            for number, loss in enumerate(losses, start=1):
                assert not curve.add(number, loss) or advise(curve, RECIPE) is None, (end, seed, number)


# -------------------------------------------------------------------------------------------------------------- a run


def test_run_that_diverges_says_so_once_and_at_its_end_and_keeps_it(fit: Fit) -> None:
    flags = ["--model.optimizer", "muon", "--model.schedule", "constant", "--model.warmup_steps", 0]
    flags += ["--model.learning_rate", 9, "--trainer.val_check_interval", 100, "--generate.prompts", "[]"]
    result = fit(*flags, "--trainer.max_steps", 20)
    assert result.status == 0
    said = [line for line in result.out.splitlines() if line.startswith("advice ")]
    assert len(said) == 2
    text = said[0].removeprefix("advice").strip()
    assert "above the 5.55 of a uniform guess: the learning rate is too high" in text
    assert "try --model.learning_rate 0.9, a tenth, or --model.warmup_steps 100" in text
    assert said[1].endswith(text)  # at the end of the run
    assert read_summary(RUN).advice == text
    assert text in (RUN / "report.html").read_text(encoding="utf-8")


def test_resumed_run_says_what_a_run_says_that_was_never_stopped(fit: Fit) -> None:
    flags = ["--model.optimizer", "muon", "--model.schedule", "constant", "--model.warmup_steps", 0]
    flags += ["--model.learning_rate", 9, "--trainer.val_check_interval", 100, "--generate.prompts", "[]"]
    flags += ["--trainer.log_every_n_steps", 1]
    assert fit(*flags, "--trainer.max_steps", 16, "--name", "whole").status == 0
    assert "advice" not in fit(*flags, "--trainer.max_steps", 7).out
    resumed = fit(*flags, "--trainer.max_steps", 16, "--ckpt_path", "last").out
    assert resumed.count("advice ") == 2
    whole = Path("logs/whole/version_0")
    assert read_summary(RUN).advice == read_summary(whole).advice != ""
    states = [Checkpoint.open(run / "last.ckpt").callbacks["LearningRateAdvice"] for run in (RUN, whole)]
    assert states[0] == states[1]
    assert states[0]["holds"] is True
