"""Choose a candidate: by the rules alone, and where the time allows by short runs of the best ones."""

import math
from dataclasses import replace

import numpy as np
import torch

from lit_gpt.planning import rules
from lit_gpt.planning.candidates import Candidate
from lit_gpt.planning.pilots import EncodedText, run_pilot
from lit_gpt.planning.text import TextSample
from lit_gpt.tokenizer import Tokenizer

PILOT_CANDIDATES = 6
MIN_PILOT_SECONDS = 2.0  # of one pilot; shorter ones say little
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
    picked: list[Candidate], texts: dict[str, EncodedText], seconds: float, device: torch.device
) -> list[Candidate]:
    """Compare candidates in rounds of short runs; after each round the better half goes on to longer ones.

    A short run favours small models. The measured loss is therefore compared with what the rules expect of the short
    run, and corrects what they expect of the whole run by the same factor (Jamieson and Talwalkar 2016,
    arXiv:1502.07943, for the rounds).

    Args:
        picked: The candidates.
        texts: The encoded sample of each tokenizer, by its name.
        seconds: The time for all rounds.
        device: Where the models are trained.

    Returns:
        The candidates of the last round with corrected expectations, the best one first.
    """
    rounds = max(1, math.ceil(math.log2(len(picked))))
    for _ in range(rounds):
        share = seconds / rounds / len(picked)
        if share < MIN_PILOT_SECONDS or len(picked) == 1:
            break
        measured = [
            _correct_by_pilot(candidate, texts[candidate.tokenizer.name], share, device) for candidate in picked
        ]
        picked = sorted(measured, key=lambda candidate: candidate.bits_per_byte)[: math.ceil(len(measured) / 2)]
    return picked


def _correct_by_pilot(candidate: Candidate, text: EncodedText, seconds: float, device: torch.device) -> Candidate:
    """Return a candidate with the expectation that a short run of it suggests."""
    config = candidate.config
    batch_size = max(1, rules.MIN_TOKENS_PER_STEP // config.context_length)
    per_token = candidate.step_seconds / candidate.tokens_per_step
    tokens_per_step = batch_size * config.context_length
    steps = max(10, int(0.8 * seconds / (per_token * tokens_per_step)))
    recipe = rules.recipe(candidate.recipe.optimizer, config, steps, tokens_per_step, {})
    measured = run_pilot(text, config, recipe, batch_size, steps, seconds, candidate.precision, device)
    expected = rules.expected_bits_per_byte(candidate.tokenizer, config, steps * tokens_per_step)
    whole = rules.expected_bits_per_byte(candidate.tokenizer, config, candidate.steps * candidate.tokens_per_step)
    return replace(candidate, bits_per_byte=whole * measured / expected)
