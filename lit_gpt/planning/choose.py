"""Choose a candidate: by the rules alone, and where the time allows by short runs of the best ones."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from lit_gpt.planning import rules
from lit_gpt.planning.candidates import Candidate
from lit_gpt.planning.pilots import EncodedText, run_pilot
from lit_gpt.planning.text import TextSample
from lit_gpt.tokenizer import Tokenizer

PILOT_CANDIDATES = 6
MIN_PILOT_SECONDS = 1.3  # of a short run; shorter ones say little
ROUNDS = 2
VALIDATION_SHARE = 0.1  # of the sample


def encode_sample(sample: TextSample, tokenizer: Tokenizer) -> EncodedText:
    """Encode a sample, and split it into its beginning to train on and its end to validate on."""
    ids, lengths = tokenizer.encode_documents(sample.documents)
    ends = np.cumsum(lengths)
    documents = math.ceil(len(ends) * (1 - VALIDATION_SHARE)) - 1
    boundary = int(len(ids) * (1 - VALIDATION_SHARE)) if sample.is_raw or len(ends) < 20 else int(ends[documents])
    return EncodedText(ids[:boundary], ids[boundary:], tokenizer.bytes_per_token())


def pick(candidates: list[Candidate], count: int = PILOT_CANDIDATES) -> list[Candidate]:
    """Return the candidates to compare: the best one, the best of each other tokenizer, then the best others.

    Args:
        candidates: The candidates, the best one first.
        count: How many to return at most.
    """
    best_of_tokenizer: dict[str, Candidate] = {}
    for candidate in candidates:
        best_of_tokenizer.setdefault(candidate.tokenizer.name, candidate)
    picked = list(best_of_tokenizer.values())[: max(2, count * 2 // 3)]
    others = [candidate for candidate in candidates if candidate not in picked]
    return [*picked, *others[: count - len(picked)]]


def successive_halving(
    picked: list[Candidate],
    texts: dict[str, EncodedText],
    given: dict[str, Any],
    seconds: float,
    device: torch.device,
) -> list[Candidate]:
    """Compare candidates in two rounds of short runs; the better half goes on to the longer runs of the second round.

    Args:
        picked: The candidates.
        texts: The encoded sample of each tokenizer, by its name.
        given: The settings that the person gave.
        seconds: The time for all rounds.
        device: Where the models are trained.

    Returns:
        The candidates of the last round with corrected expectations, the best one first (Jamieson and Talwalkar 2016,
        arXiv:1502.07943).
    """
    for _ in range(ROUNDS):
        share = seconds / ROUNDS / len(picked)
        measured = [
            _correct_by_pilot(candidate, texts[candidate.tokenizer.name], given, share, device) for candidate in picked
        ]
        picked = sorted(measured, key=lambda candidate: candidate.bits_per_byte)[: math.ceil(len(measured) / 2)]
    return picked


def _correct_by_pilot(
    candidate: Candidate, text: EncodedText, given: dict[str, Any], seconds: float, device: torch.device
) -> Candidate:
    """Return a candidate with the expectation that a short run of it suggests.

    A short run favours small models. What it reaches is therefore compared with what the rules expect of it, and
    corrects what they expect of the whole run. The rules and a short run are about equally uncertain, so that half of
    the correction is made.
    """
    config = candidate.config
    batch_size = max(1, rules.MIN_TOKENS_PER_STEP // config.context_length)
    per_token = candidate.step_seconds / candidate.tokens_per_step
    tokens_per_step = batch_size * config.context_length
    steps = max(10, int(0.8 * seconds / (per_token * tokens_per_step)))
    recipe = rules.recipe(candidate.recipe.optimizer, config, steps, tokens_per_step, 1.0, given)
    measured = run_pilot(text, config, recipe, batch_size, steps, seconds, candidate.precision, device)
    expected = rules.expected_bits_per_byte(candidate.tokenizer, config, steps * tokens_per_step)
    tokens = candidate.steps * candidate.tokens_per_step
    whole = rules.expected_bits_per_byte(candidate.tokenizer, config, tokens)
    return replace(candidate, bits_per_byte=whole * math.sqrt(measured / expected))
