"""The planner: the sample of the text, the candidates, the short runs that compare them, and the plan."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_gpt.data.config import CorpusConfig
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.data.sources import find_sources
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig
from lit_gpt.planning import choose, plan, rules
from lit_gpt.planning.bare_training import BareTraining
from lit_gpt.planning.candidates import MEMORY_SHARE, Candidate, Machine, fit_into_memory, list_candidates
from lit_gpt.planning.choose import encode_sample, pick, successive_halving
from lit_gpt.planning.memory import estimate_memory_of_shape
from lit_gpt.planning.ngrams import DISCOUNT, ngram_losses
from lit_gpt.planning.overheads import Overheads
from lit_gpt.planning.pilots import bits_per_byte, run_pilot
from lit_gpt.planning.speed import TRAINER_SECONDS, SpeedModel
from lit_gpt.planning.text import TextSample, TokenizerStatistics, sample_text, tokenizer_options
from lit_gpt.tokenizer import ByteTokenizer, train_bpe

CPU = torch.device("cpu")
ROWS = CorpusConfig(ReadOptions())


def write_rows(path: Path, rows: int) -> None:
    path.write_text("text\n" + "".join(f"row {i} of a table about {i * i} apples\n" for i in range(rows)))


@pytest.fixture
def sample() -> TextSample:
    return TextSample([f"the {i % 7} cats saw {i % 11} dogs near the river" for i in range(2000)], 1.0, False)


def statistics(
    tokens: int = 10**6, vocab_size: int = 1000, name: str = "bpe", length: int = 100
) -> TokenizerStatistics:
    settings: dict[str, str | int] = {"data.tokenizer": name}
    if name == "bpe":
        settings["data.vocab_size"] = vocab_size
    return TokenizerStatistics(
        settings, vocab_size, 1.0, 2.5, tokens, tokens * 9 // 10, 2.0, 0.06, 0.0, np.full(50, length)
    )


def machine(free: int | None = None) -> Machine:
    return Machine(CPU, SpeedModel(), free, has_bfloat16=True)


# ------------------------------------------------------------------------------------------------------ the text


def test_sample_of_a_long_file_estimates_the_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "long.csv", 40_000)
    sources = find_sources(str(tmp_path / "long.csv"))
    part, whole = sample_text(sources, ROWS, 2**18), sample_text(sources, ROWS, 2**30)
    assert part.share < 0.4
    assert whole.share == 1.0
    assert len(whole.documents) == 40_000
    assert part.characters == pytest.approx(whole.characters, rel=0.03)
    assert part.num_bytes == pytest.approx(whole.num_bytes, rel=0.03)


def test_sample_takes_equal_parts_of_all_training_files(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        write_rows(tmp_path / name, 20_000)
    sources = find_sources(str(tmp_path / "*.csv")) + find_sources(str(tmp_path / "a.csv"), "val")
    part = sample_text(sources, ROWS, 2**18)
    first = [number for number, text in enumerate(part.documents) if text.startswith("row 0 ")]
    assert len(first) == 2
    assert first[1] == pytest.approx(len(part.documents) / 2, rel=0.2)
    assert part.train_fraction == 1.0  # validation has a file of its own


def test_text_that_is_too_short_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "short.csv", 10)
    with pytest.raises(UserError, match=r"the text has 3\d\d characters: give 2,000 or more"):
        sample_text(find_sources(str(tmp_path / "short.csv")), ROWS, 2**18)


def test_vocabularies_trained_at_once_equal_those_trained_one_by_one(sample: TextSample) -> None:
    options = tokenizer_options(sample, ROWS, {}, (260, 275))
    assert [stats.name for stats, _ in options] == ["char", "bpe 260", "bpe 275"]
    for (stats, tokenizer), size in zip(options[1:], (260, 275)):
        assert tokenizer == train_bpe(sample.documents, size)
        lengths = [len(tokenizer.encode(text)) + 1 for text in sample.documents]
        assert stats.tokens == sum(lengths)
        assert stats.bytes_per_token == pytest.approx(sample.num_bytes / sum(lengths))
        assert list(stats.document_lengths) == sorted(lengths)
    assert len({stats.ngram_fall for stats, _ in options}) == 1


def test_given_tokenizer_is_the_only_option(sample: TextSample) -> None:
    for settings, name in (({"tokenizer": "byte"}, "byte"), ({"tokenizer": "bpe", "vocab_size": 270}, "bpe 270")):
        config = CorpusConfig(ReadOptions(), **settings)  # type: ignore[arg-type]
        given = {f"data.{key}": value for key, value in settings.items()}
        options = tokenizer_options(sample, config, given, rules.VOCAB_SIZES)
        assert [stats.name for stats, _ in options] == [name]


# ---------------------------------------------------------------------------------------------------- candidates


def test_candidates_keep_what_is_given() -> None:
    given = {
        "model.config.d_model": 192,
        "model.config.num_heads": 6,
        "model.config.context_length": 32,
        "model.config.dropout": 0.3,
        "model.optimizer": "adamw",
        "model.learning_rate": 0.004,
        "data.batch_size": 5,
        "trainer.precision": "32-true",
    }
    found = list_candidates([statistics()], given, machine(), 1000.0)
    assert len({candidate.config.num_blocks for candidate in found}) > 3
    for candidate in found:
        config, recipe = candidate.config, candidate.recipe
        assert (config.d_model, config.num_heads, config.context_length, config.dropout) == (192, 6, 32, 0.3)
        assert (recipe.optimizer, recipe.learning_rate) == ("adamw", 0.004)
        assert (candidate.batch_size, candidate.accumulate, candidate.precision) == (5, 1, "32-true")


def test_candidates_are_sorted_and_fit_into_the_time() -> None:
    found = list_candidates([statistics(), statistics(vocab_size=4000)], {}, machine(), 300.0)
    losses = [candidate.bits_per_byte for candidate in found]
    assert losses == sorted(losses)
    assert all(candidate.steps * candidate.step_seconds <= 300.0 for candidate in found)
    assert all(candidate.steps >= rules.MIN_STEPS for candidate in found)


def test_batch_is_divided_until_it_fits_into_the_memory() -> None:
    candidate = list_candidates([statistics()], {"data.global_batch_size": 64}, machine(), 1000.0)[0]
    state, activations = estimate_memory_of_shape(candidate.config, "muon", 16, candidate.precision)
    fitting = fit_into_memory(candidate, {}, machine(free=int((state + activations) / MEMORY_SHARE) + 1))
    assert fitting is not None
    assert (fitting.batch_size, fitting.accumulate, fitting.activation_checkpointing) == (16, 4, False)
    assert fit_into_memory(candidate, {"data.batch_size": 64}, machine(free=state)) is None
    assert fit_into_memory(candidate, {}, machine(free=state // 2)) is None


def test_longer_time_gives_a_larger_model_and_more_tokens_in_a_step() -> None:
    short, long = (list_candidates([statistics(10**9)], {}, machine(), seconds)[0] for seconds in (60.0, 10**6))
    assert long.config.d_model > short.config.d_model
    assert long.tokens_per_step > short.tokens_per_step


def test_context_is_not_longer_than_documents_and_the_split_need() -> None:
    assert rules.longest_context(statistics(length=190)) == 256
    assert rules.longest_context(statistics(length=12)) == 128
    assert rules.longest_context(statistics(tokens=8000, length=5000)) == 64  # a tenth is 800 tokens


# ------------------------------------------------------------------------------------------------------ short runs


def test_text_that_is_read_again_gets_more_weight_decay_the_rarer_its_ids_are() -> None:
    def decay(epochs: float, tokens_per_id: float) -> float:
        return rules.weight_decay(epochs, tokens_per_id, learning_rate=0.007, steps=1000)

    assert decay(1.0, 500) == 0
    assert 0 < decay(3, 500) < decay(12, 500) < decay(12, 20)
    assert decay(100, 5) == rules.MAX_WEIGHT_DECAY


def test_weight_decay_takes_away_as_much_in_a_pass_whatever_the_steps_and_the_rate() -> None:
    few = rules.weight_decay(5, 500, learning_rate=0.01, steps=400)
    many = rules.weight_decay(5, 500, learning_rate=0.005, steps=1600)
    assert 0.005 * many * 1600 == pytest.approx(0.01 * few * 400, rel=0.01)


def test_larger_model_is_expected_to_help_unless_a_text_is_read_often() -> None:
    text = statistics(tokens=100_000)
    configs = [GPTConfig(1000, context_length=128, d_model=width) for width in (64, 128, 512)]
    once, often = (
        [rules.expected_bits_per_byte(text, config, tokens) for config in configs] for tokens in (90_000, 2_000_000)
    )
    assert once == sorted(once, reverse=True)
    assert often[1] < often[2]


def test_encoded_sample_ends_its_training_part_with_a_document(sample: TextSample) -> None:
    text = encode_sample(sample, ByteTokenizer())
    ids = np.concatenate([text.train_ids, text.val_ids])
    assert bytes(ids[ids < 256].astype(np.uint8)).decode() == "".join(sample.documents)
    assert text.train_ids[-1] == ByteTokenizer.end_of_text
    assert len(text.val_ids) == pytest.approx(0.1 * len(ids), rel=0.02)


def tiny(name: str = "byte", width: int = 32) -> Candidate:
    given = {
        "model.config.d_model": width,
        "model.config.num_blocks": 1,
        "model.config.context_length": 16,
        "data.batch_size": 8,
    }
    return list_candidates([statistics(vocab_size=257, name=name)], given, machine(), 100.0)[0]


def test_pilot_learns_and_reports_bits_per_byte(sample: TextSample) -> None:
    candidate, text = tiny(), encode_sample(sample, ByteTokenizer())
    untrained, trained = (
        run_pilot(text, candidate.config, candidate.recipe, 8, steps, 60.0, "32-true", CPU) for steps in (1, 60)
    )
    assert trained < 0.7 * untrained < 0.7 * 9
    training = BareTraining(candidate.config, candidate.recipe, "32-true", CPU)
    ids = torch.from_numpy(text.val_ids[: 16 * 100 + 1].astype(np.int64))
    text = replace(text, val_ids=text.val_ids[: 16 * 100 + 1])
    with torch.no_grad():
        logits, _ = training.gpt(ids[:-1].view(-1, 16))
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[1:], reduction="sum")
    num_bytes = int((ids[1:] < 256).sum())
    assert bits_per_byte(training, text, 8) == pytest.approx(float(nats) / math.log(2) / num_bytes, rel=1e-5)


def test_pilot_ends_with_its_time(sample: TextSample, monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, text = tiny(), encode_sample(sample, ByteTokenizer())
    steps: list[int] = []
    step = BareTraining.step
    monkeypatch.setattr(BareTraining, "step", lambda self, *args: (steps.append(1), step(self, *args))[1])
    run_pilot(text, candidate.config, candidate.recipe, 8, 10**6, 0.05, "32-true", CPU)
    assert 1 <= len(steps) < 10**5


def test_candidates_for_pilots_have_several_tokenizers() -> None:
    found = list_candidates([statistics(name="char"), statistics(), statistics(vocab_size=2000)], {}, machine(), 300.0)
    picked = pick(found, 6)
    assert len(picked) == 6
    assert len({c.tokenizer.name for c in picked}) == 3
    assert found[0] in picked


def test_successive_halving_corrects_the_rules_by_what_short_runs_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third of four candidates does better than the rules expect, in every round."""
    picked = [replace(tiny(width=width), bits_per_byte=2.0) for width in (32, 64, 96, 128)]
    rounds: list[int] = []

    def pilot(text: Any, config: Any, recipe: Any, batch_size: int, steps: int, *others: Any) -> float:
        rounds.append(config.d_model)
        expected = rules.expected_bits_per_byte(picked[0].tokenizer, config, steps * batch_size * 16)
        return expected * (0.5 if config.d_model == 96 else 1.0)

    monkeypatch.setattr(choose, "run_pilot", pilot)
    best = successive_halving(picked, {"byte": None}, {}, 100.0, CPU)  # type: ignore[dict-item]
    assert len(rounds) == 4 + 2
    assert rounds.count(96) == 2
    candidate = best[0]
    whole = rules.expected_bits_per_byte(
        candidate.tokenizer, candidate.config, candidate.steps * candidate.tokens_per_step
    )
    assert candidate.config.d_model == 96
    assert candidate.bits_per_byte == pytest.approx(math.sqrt(0.5) * whole)


# ------------------------------------------------------------------------------------------------------------ plan


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., plan.Plan]:
    """Return a function that plans for a table of 2,000 rows, on a machine of known speed."""
    write_rows(tmp_path / "rows.csv", 2000)
    monkeypatch.setattr(plan, "measure_machine", lambda *args: SpeedModel())
    monkeypatch.setattr(plan, "measure_step", lambda workload, *args: 0.02)

    def make(seconds: float = 60.0, **given: Any) -> plan.Plan:
        given = {key.replace("__", "."): value for key, value in given.items()}
        sources = find_sources(str(tmp_path / "rows.csv"))
        return plan.make_plan(sources, ROWS, given, seconds, Overheads(), CPU)

    return make


def test_plan_fills_the_time(make: Callable[..., plan.Plan]) -> None:
    made = make(100.0)
    steps = made.settings["trainer.max_steps"] * made.step_seconds
    assert 70.0 < steps < 100.0 - made.validation_seconds
    assert len(made.reasons) <= 10
    assert all(len(what) + len(why) < 117 for what, why in made.reasons)


def test_step_takes_the_mean_of_what_is_measured_and_predicted(
    make: Callable[..., plan.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(100.0).step_seconds
    monkeypatch.setattr(plan, "measure_step", lambda workload, *args: 4 * 0.02 + 3 * TRAINER_SECONDS)
    second = make(100.0).step_seconds
    assert first is not None
    assert second == pytest.approx(2 * first)


def test_plan_leaves_out_what_is_given(make: Callable[..., plan.Plan]) -> None:
    made = make(model__learning_rate=0.5, data__eval_windows=7, model__config__d_model=64)
    assert not {"model.learning_rate", "data.eval_windows", "model.config.d_model"} & made.settings.keys()
    assert made.settings["model.config.num_heads"] == 2


def test_time_that_is_too_short_for_any_model_is_refused(
    make: Callable[..., plan.Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = SpeedModel()
    slow = replace(usual, factors={part: 1e5 * factor for part, factor in usual.factors.items()})
    monkeypatch.setattr(plan, "measure_machine", lambda *args: slow)
    with pytest.raises(UserError, match="60 s are too few for 100 steps"):
        make(60.0)


# --------------------------------------------------------------------------------------------------------- n-grams


def test_ngram_losses_match_counts_in_dictionaries() -> None:
    """Interpolated absolute discounting, written token by token."""
    generator = np.random.default_rng(1)
    ids = np.minimum(generator.geometric(0.4, 400), 6) - 1
    train, val = ids[:300], ids[300:]

    def probability(token: int, context: tuple[int, ...]) -> float:
        if not context:
            return float(((train == token).sum() + 0.5) / (len(train) + 3))
        n = len(context)
        following = [int(train[i]) for i in range(n, len(train)) if tuple(map(int, train[i - n : i])) == context]
        lower = probability(token, context[1:])
        if not following:
            return lower
        known = max(following.count(token) - DISCOUNT, 0) / len(following)
        return known + DISCOUNT * len(set(following)) / len(following) * lower

    losses = ngram_losses(train, val, 6, 3)
    for order, loss in enumerate(losses, 1):
        contexts = [tuple(map(int, ids[i - order + 1 : i])) for i in range(300, 400)]
        expected = [-math.log(probability(int(token), context)) for token, context in zip(val, contexts)]
        assert loss == pytest.approx(np.mean(expected), rel=1e-3)
