"""Advice on the learning rate: what the training loss shows, and what to try.

`advise` decides from the curve of the training loss alone. The callback `LearningRateAdvice` collects the curve and
prints the first advice that it calls for; summary.json and report.html have it too.

There is no advice about overfitting here: `Overfitting` in `lit_gpt.training.progress` reports it.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.lines import wrap_line
from lit_gpt.planning.ngrams import ngram_losses
from lit_gpt.training.checks import changed_rate
from lit_gpt.training.metrics import is_logging_step
from lit_gpt.training.module import LitGPT, module_and_data

Kind = Literal["diverged", "too high", "too low"]

MAX_POINTS = 64  # of a curve; two points become one when there are as many
MIN_POINTS = 8  # before there is any advice
MIN_STEPS = 100  # after the warm-up, before a loss that does not fall means anything
MIN_PART = 0.25  # likewise, of the run
MIN_TOKENS = 20  # likewise, for each token of the vocabulary that occurs
RISE = 0.15  # of the lowest loss: a loss that stays so far above it has diverged
RISE_NATS = 0.3  # likewise, in nats per token
LEARNED = 0.25  # of the way from single tokens to pairs of tokens: a model that has not come so far stalls
DEPENDENT = 0.97  # of the loss of single tokens: if that of pairs is higher, tokens hardly depend on each other
LITTLE = 0.1  # of the way from a uniform guess to another loss: nearly there, or nearly not begun
EVEN = 0.75  # a loss falls evenly if it falls by so much of what it fell before in as many steps
EARLY = 0.5  # of the steps: a loss that reached its level before has stopped falling
SAMPLED_IDS = 2**19  # from which the frequencies of tokens are estimated
SAMPLED_PARTS = 64  # of the text, evenly spaced


# --------------------------------------------------------------------------------------------------------- the curve


@dataclass
class LossCurve:
    """The training loss over a whole run in at most `MAX_POINTS` points, each the mean of equally many logged losses.

    A logged loss is that of one batch, so single ones are noisy. The points do not depend on interruptions.

    Attributes:
        width: Logged losses in a point. It doubles when there are `MAX_POINTS` points.
        steps: The last step of each point.
        losses: The mean loss of each point, in nats per token.
        total: Sum of the logged losses that are in no point yet.
        count: Their number.
    """

    width: int = 1
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    total: float = 0.0
    count: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Add a logged loss; return whether it completes a point."""
        self.total, self.count = self.total + loss, self.count + 1
        if self.count < self.width:
            return False
        self.steps.append(step)
        self.losses.append(self.total / self.width)
        self.total, self.count = 0.0, 0
        if len(self.losses) == MAX_POINTS:
            self.width *= 2
            self.steps = self.steps[1::2]
            self.losses = [(a + b) / 2 for a, b in zip(self.losses[::2], self.losses[1::2])]
        return True


# ------------------------------------------------------------------------------------------------------- the decision


@dataclass(frozen=True)
class Recipe:
    """What advice needs to know about a run, besides its curve.

    Attributes:
        learning_rate: `--model.learning_rate`.
        warmup_steps: Steps in which the rate rises.
        least_steps: Steps before a loss that does not fall means anything.
        max_steps: The last step; None if the run has no end.
        uniform: The loss of a uniform guess, ln(vocabulary), in nats per token.
        unigram: The loss of a model that knows only how frequent each token is.
        bigram: The loss of a model that knows only which token follows which.
    """

    learning_rate: float
    warmup_steps: int
    least_steps: int
    max_steps: int | None
    uniform: float
    unigram: float
    bigram: float


@dataclass(frozen=True)
class Advice:
    """What was seen in a curve, and what to try."""

    kind: Kind
    text: str


def advise(curve: LossCurve, recipe: Recipe) -> Advice | None:
    """Return the advice that the curve of a run calls for, if there is any."""
    if len(curve.losses) < MIN_POINTS:
        return None
    return find_divergence(curve, recipe) or find_stall(curve, recipe) or find_early_end(curve, recipe)


def find_divergence(curve: LossCurve, recipe: Recipe) -> Advice | None:
    """Return advice if the last eighth of the curve, and five points at least, lie far above an earlier part of it."""
    steps, losses = curve.steps, curve.losses
    num_recent = max(5, len(losses) // 8)
    recent = losses[-num_recent:]
    lowest, then = recipe.uniform, 0  # of the untrained model
    for end in range(num_recent, len(losses) - num_recent + 1):
        mean = sum(losses[end - num_recent : end]) / num_recent
        if mean < lowest:
            lowest, then = mean, steps[end - 1]
    if min(recent) <= lowest + max(RISE * lowest, RISE_NATS):
        return None
    now = f"{sum(recent) / num_recent:.2f} at step {steps[-1]:,}"
    seen = f"loss/train rose from {lowest:.2f} at step {then:,} to {now}"
    if then == 0:
        seen = f"loss/train is {now}, above the {lowest:.2f} of a uniform guess"
    remedy = changed_rate(recipe.learning_rate, 1 / 3 if lowest < learned_loss(recipe) else 1 / 10)
    warm_up = "" if recipe.warmup_steps else ", or --model.warmup_steps 100"
    return Advice("diverged", f"{seen}: the learning rate is too high; try {remedy}{warm_up}")


def find_stall(curve: LossCurve, recipe: Recipe) -> Advice | None:
    """Return advice if a good part of the run has taught the model little more than how frequent each token is.

    With a rate that is too high the loss falls to about that level early and stays. With one that is far too low it
    falls smoothly and has not come there.
    """
    step, num_recent = curve.steps[-1], max(3, len(curve.losses) // 4)
    recent = sum(curve.losses[-num_recent:]) / num_recent
    if step < recipe.least_steps or not learned_loss(recipe) < recent < recipe.uniform:
        return None
    rate, little = recipe.learning_rate, LITTLE * (recipe.uniform - recipe.unigram)
    level = recent + LITTLE * (recipe.uniform - recent)
    reached = next(step for step, loss in zip(curve.steps, curve.losses) if loss <= level)
    unigram = f"the {recipe.unigram:.2f} of a model that knows only how frequent each token is"
    if reached < EARLY * step and recent < recipe.uniform - little:
        is_at_unigram = recent < recipe.unigram + little
        if not is_at_unigram or recipe.bigram > DEPENDENT * recipe.unigram:  # or there is little more to learn
            return None
        seen = f"loss/train has been near {recent:.2f} since step {reached:,}, about {unigram}"
        return Advice("too high", f"{seen}: the learning rate is too high; try {changed_rate(rate, 1 / 10)}")
    if recipe.unigram < recent and max(curve.losses) < recipe.uniform + little:
        seen = f"loss/train falls slowly and is {recent:.2f} at step {step:,}, above {unigram}"
        return Advice("too low", f"{seen}: the learning rate is too low; try {changed_rate(rate, 10)}")
    return None


def find_early_end(curve: LossCurve, recipe: Recipe) -> Advice | None:
    """Return advice at the end of a run whose loss has fallen about evenly from the first step to the last.

    A loss that falls fast, stays, and falls again is another case: the rate was too high until the schedule lowered it.
    """
    if recipe.max_steps is None or not is_complete(curve, recipe) or curve.steps[-1] < recipe.least_steps:
        return None
    num, width = len(curve.losses), max(1, len(curve.losses) // 8)
    quarter, half, end = (sum(curve.losses[i - width : i]) / width for i in (num // 4, num // 2, num))
    first, second = recipe.uniform - half, half - end
    falls_evenly = 0 < recipe.uniform - quarter < (quarter - half) / EVEN and second > EVEN * first
    if not falls_evenly or second < RISE_NATS:
        return None
    seen = f"loss/train fell by {first:.2f} in the first half of the steps, and by {second:.2f} in the second"
    remedy = f"--trainer.max_steps {2 * recipe.max_steps}, or {changed_rate(recipe.learning_rate, 3)}"
    return Advice("too low", f"{seen}: the run ends early, or its learning rate is low; try {remedy}")


def is_complete(curve: LossCurve, recipe: Recipe) -> bool:
    """Return whether the curve gets no more points, because the run is at its end."""
    return recipe.max_steps is not None and curve.steps[-1] + curve.steps[0] > recipe.max_steps


def learned_loss(recipe: Recipe) -> float:
    """Return the loss below which a model knows more than how frequent each token is."""
    return recipe.unigram - LEARNED * max(0.0, recipe.unigram - recipe.bigram)


# ------------------------------------------------------------------------------------------------------- the callback


class LearningRateAdvice(Callback):
    """Print once, above the progress bar, what the training loss says about the learning rate.

    It looks at the loss on logging steps only, which have computed it for the logger. Its state is in the checkpoint,
    so a resumed run says the same as one that was never stopped.

    Attributes:
        given: The advice that the run has given; "" for none.
        holds: Whether the curve still calls for it.
    """

    def __init__(self) -> None:
        self.given, self.holds = "", False
        self._kind = ""
        self._curve = LossCurve()
        self._recipe: Recipe | None = None
        self._step = 0  # the last logging step that was seen

    # ------------------------------------------------------------------------------------------ state in a checkpoint

    def state_dict(self) -> dict[str, Any]:
        return {"curve": asdict(self._curve), "kind": self._kind, "given": self.given, "holds": self.holds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        curve = LossCurve(**state_dict["curve"])
        curve.steps, curve.losses = [int(step) for step in curve.steps], [float(loss) for loss in curve.losses]
        self._curve = curve
        self._kind, self.given, self.holds = (state_dict[name] for name in ("kind", "given", "holds"))

    # -------------------------------------------------------------------------------------------- hooks of the Trainer

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._recipe = trainer.global_step, describe_recipe(*module_and_data(trainer))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        step = trainer.global_step
        if step == self._step or not is_logging_step(trainer, step):
            return
        self._step = step
        loss = float(trainer.callback_metrics.get("loss/train", math.nan))
        if math.isfinite(loss) and self._curve.add(step, loss):
            self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        """Look at the curve, which has a new point."""
        assert self._recipe is not None
        recipe = with_last_step(self._recipe, module_and_data(trainer)[1].plan.last_step)
        advice = advise(self._curve, recipe)
        self.holds = advice is not None and self._kind in ("", advice.kind)
        if advice is not None and not self._kind:
            self._kind, self.given = advice.kind, advice.text
            # the lines at the end of the run repeat it
            if trainer.progress_bar_callback is not None and not is_complete(self._curve, recipe):
                trainer.progress_bar_callback.print("\n".join(wrap_line(f"advice      {advice.text}")))


def describe_recipe(module: LitGPT, data: TextDataModule) -> Recipe:
    """Return what advice needs to know about a run, except for its last step."""
    ids, length = data.train_ids, SAMPLED_IDS // SAMPLED_PARTS
    starts = range(0, max(1, len(ids) - length), max(length, len(ids) // SAMPLED_PARTS))
    parts = [*starts[::2], *starts[1::2]]  # what counts tokens, and what is scored, come from all parts of the text
    sample = np.concatenate([np.asarray(ids[start : start + length], dtype=np.int64) for start in parts])
    uniform, half = math.log(data.model_vocab_size), len(sample) // 2
    unigram, bigram = uniform, uniform  # of a text that is too short to count its tokens
    if half > 1:
        unigram, bigram = ngram_losses(sample[:half], sample[half:], data.model_vocab_size, 2)
    tokens_per_step = data.plan.windows_per_step * data.context_length
    vocabulary_steps = MIN_TOKENS * data.corpus.report["vocabulary_in_use"] // tokens_per_step
    warmup_steps = module.warmup_steps
    return Recipe(
        learning_rate=module.hparams["learning_rate"],
        warmup_steps=warmup_steps,
        least_steps=max(warmup_steps + MIN_STEPS, vocabulary_steps),
        max_steps=None,
        uniform=uniform,
        unigram=unigram,
        bigram=bigram,
    )


def with_last_step(recipe: Recipe, last_step: int | None) -> Recipe:
    """Return a recipe with its last step, which a run with a budget may change."""
    least_steps = max(recipe.least_steps, round(MIN_PART * (last_step or 0)))
    return replace(recipe, max_steps=last_step, least_steps=least_steps)
