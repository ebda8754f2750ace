"""The rules by which a run is planned. Each was fitted on measured runs; docs/planning.md has the figures."""

import math
from typing import Any

import numpy as np
import torch

from lit_gpt.model import GPTConfig
from lit_gpt.optim import OptimizerName
from lit_gpt.planning.bare_training import Recipe
from lit_gpt.planning.text import TokenizerStatistics
from lit_gpt.planning.transfer import width_factors

VOCAB_SIZES = (512, 1024, 2048, 4096, 8192)  # of the tokenizer bpe; the sample is too short to judge larger ones
MIN_STEPS = 100
MIN_TOKENS_PER_STEP = 1024
MAX_TOKENS_PER_STEP = {"cpu": 2**15, "cuda": 2**18}
WANTED_STEPS = 2000  # where the time allows more of them, a step has more tokens

# Tokens of the training text for each id above which tables of earlier tokens lower the loss. With fewer tokens, the
# tables are learned by heart.
PREVIOUS_TOKENS_MIN_COUNT = 350

DROPOUTS = ((10, 0.0), (20, 0.1), (math.inf, 0.2))  # (passes over the text, dropout for fewer of them)
DECAY_PER_PASS = 0.6  # highest learning rate * weight decay * steps, for each pass over the text after the first
MAX_WEIGHT_DECAY = 2.0
COMMON_TOKENS = 70  # tokens of the training text for each id; with fewer, weight decay is stronger
USEFUL_REPETITIONS = 2.0  # of the text, as if it were so many times as long
PARAMETERS_PER_TOKEN = 3.0  # of the blocks, that are useful where a text is read twice
MAX_REPETITIONS = 3.0  # more of them do not lower the number of useful parameters
EXCESS_WEIGHT = 0.006  # what twice as many parameters as are useful cost, as a part of the loss
DECAY_SHARE = 0.5  # of the run, at its end, in which the learning rate falls
MUON_RATE = 0.007  # for a width of 128, 600 steps and 1,024 tokens in a step
MUON_FACTORS = {"embedding_rate": 15.0, "head_rate": 1.5}  # for a width of 128
CONTEXT_WEIGHT = 0.016  # what a context of twice or half the best length costs, as a part of the loss
REFERENCE = 8e5, 6e5  # parameters and tokens of a run
NGRAM_FACTOR = 0.8  # the loss at its end, over that of the best n-gram model
VOCAB_WEIGHT = 0.006  # the part of the loss by which twice as many byte pairs lower it, beyond what n-grams say
SPLIT_CHARACTERS_FACTOR = 1.06  # on the loss where byte pairs divide characters, as those of Chinese
REFERENCE_FALL = 0.08  # `ngram_fall` of a text on which the loss of a model falls as the power law says


def architecture(width: int, tokenizer: TokenizerStatistics) -> dict[str, Any]:
    """Return the parts of a GPTConfig that do not depend on its depth.

    Heads are about 64 wide, because many narrow ones cost more time; a single one raises the loss.
    """
    has_enough_tokens = tokenizer.train_tokens / tokenizer.vocab_size >= PREVIOUS_TOKENS_MIN_COUNT
    return {
        "num_heads": max(2, width // 64),
        "norm": "layernorm",
        "mlp": "relu2",
        "tie_embeddings": False,
        "previous_tokens": 2 if has_enough_tokens else 0,
    }


def longest_context(tokenizer: TokenizerStatistics) -> int:
    """Return the longest context that the text makes use of, a power of two.

    Nearly all documents should fit. Documents may be the lines of one text, so that a context of several short ones
    helps, too. In the validation split, a tenth of the text, there should be 8 windows at least.
    """
    fits_documents = 2 ** math.ceil(math.log2(float(np.quantile(tokenizer.document_lengths, 0.9)) + 1))
    fits_split = 2 ** int(math.log2(max(16, tokenizer.tokens / 10 / 8)))
    return max(16, min(max(128, fits_documents), fits_split))


def compile_pays(device: torch.device, seconds: float) -> bool:
    """Return whether compiling, which takes half a minute, is worth it: on a GPU in runs of five minutes or more."""
    return device.type == "cuda" and seconds >= 300


def tokens_per_step(tokens: int, device: torch.device) -> int:
    """Return how many tokens a step should have if so many are trained on in all: a power of two."""
    wanted = 2 ** round(math.log2(max(1, tokens / WANTED_STEPS)))
    return max(MIN_TOKENS_PER_STEP, min(wanted, MAX_TOKENS_PER_STEP.get(device.type, 2**15)))


def dropout(epochs: float) -> float:
    """Return the dropout of a run that reads its text so many times: weight decay is better where it suffices."""
    return next(p for most, p in DROPOUTS if epochs < most)


def weight_decay(epochs: float, tokens_per_id: float, learning_rate: float, steps: int) -> float:
    """Return the weight decay of a run that reads its text so many times: none where each token is seen once.

    Learning rate times weight decay is the part of a weight that a step takes away. It is chosen for a number of
    passes over the text, not of steps (Wang and Aitchison 2024, arXiv:2405.13698).

    Args:
        epochs: Passes over the text.
        tokens_per_id: Tokens of the training text for each id of the vocabulary. The fewer they are, the more of them
            the embeddings and the head learn by heart.
        learning_rate: The highest one.
        steps: Optimizer steps.
    """
    rare = max(1.0, COMMON_TOKENS / tokens_per_id) ** 0.25
    decay = DECAY_PER_PASS * (epochs - 1) * rare / (learning_rate * steps)
    return min(MAX_WEIGHT_DECAY, max(0.0, round(decay, 2)))


def recipe(
    optimizer: OptimizerName,
    config: GPTConfig,
    steps: int,
    tokens_per_step: int,
    epochs: float,
    given: dict[str, Any],
) -> Recipe:
    """Return how a model is trained.

    The best rate of Muon falls with the number of steps and rises with the tokens in a step; docs/planning.md has the
    measurements. `width_factors` carries the rates over to other widths.
    """
    chosen: dict[str, Any]
    if optimizer == "muon":
        factors = width_factors(config.d_model)
        rate = MUON_RATE * (600 / max(100, steps)) ** 0.3 * min(2.0, math.sqrt(tokens_per_step / 1024))
        rate *= factors["learning_rate"]
        chosen = {"betas": (0.8, 0.95), "warmup_steps": 0}
        chosen |= {name: float(f"{MUON_FACTORS[name] * factors[name]:.3g}") for name in MUON_FACTORS}
    else:
        rate = 4e-3 * math.sqrt(128 / config.d_model)
        chosen = {"embedding_rate": 1.0, "head_rate": 1.0, "betas": (0.9, 0.95), "warmup_steps": min(100, steps // 10)}
    chosen |= {"learning_rate": float(f"{rate:.2g}"), "decay_share": DECAY_SHARE}
    tokens_per_id = steps * tokens_per_step / epochs / config.vocab_size
    rate = given.get("model.learning_rate") or chosen["learning_rate"]
    chosen["weight_decay"] = weight_decay(epochs, tokens_per_id, rate, steps)
    fixed = {name: value for name in chosen if (value := given.get(f"model.{name}")) is not None}
    return Recipe(optimizer, **{**chosen, **fixed})


def expected_bits_per_byte(tokenizer: TokenizerStatistics, config: GPTConfig, tokens: int) -> float:
    """Return the expected loss on the validation split at the end of a run, in bits per byte.

    On the same text and after equally many tokens, the losses with several tokenizers are proportional to those of the
    best n-gram models. From there the loss falls like a sum of powers of the parameters and of the tokens (Hoffmann et
    al. 2022, arXiv:2203.15556), faster on a text on which that of n-grams falls faster, too. Tokens that are read again
    count less the more often they are (Muennighoff et al. 2023, arXiv:2305.16264).

    The losses of two candidates on the same text can be compared. Their level is a guess.
    """
    unique = max(1, tokenizer.train_tokens)
    repetitions = max(0.0, tokens / unique - 1)
    useful = min(tokens, unique) + unique * USEFUL_REPETITIONS * (1 - math.exp(-repetitions / USEFUL_REPETITIONS))
    parameters = 12 * config.num_blocks * config.d_model**2  # of the blocks
    most = _most_parameters(unique, repetitions)
    useful_parameters = parameters if math.isinf(most) else most * (1 - math.exp(-parameters / most))
    excess = 1 + EXCESS_WEIGHT * math.log2(max(1.0, parameters / most))
    fallen = _power_law(useful_parameters, useful) / _power_law(*REFERENCE)
    speed = min(1.2, max(0.5, math.sqrt(tokenizer.ngram_fall / REFERENCE_FALL)))
    tokens_factor = 1.0
    if tokenizer.settings["data.tokenizer"] == "bpe":
        tokens_factor -= VOCAB_WEIGHT * math.log2(tokenizer.vocab_size / 1024)
    if tokenizer.settings["data.tokenizer"] != "char" and tokenizer.bytes_per_character > 2.5:
        tokens_factor *= SPLIT_CHARACTERS_FACTOR
    context = 1 + CONTEXT_WEIGHT * math.log2(config.context_length / _best_context(tokenizer, tokens)) ** 2
    return NGRAM_FACTOR * tokenizer.ngram_bits * tokens_factor * fallen**speed * context * excess


def _most_parameters(unique: float, repetitions: float) -> float:
    """Return how many parameters of the blocks lower the loss: more of them learn a text by heart that is read again.

    Args:
        unique: Tokens of the training text.
        repetitions: How often it is read after the first time.
    """
    counted = min(repetitions, MAX_REPETITIONS)
    return PARAMETERS_PER_TOKEN * unique / math.sqrt(counted) if counted else math.inf


def _power_law(parameters: float, tokens: float) -> float:
    return 10 + 220 * parameters**-0.34 + 410 * tokens**-0.28


def _best_context(tokenizer: TokenizerStatistics, tokens: int) -> float:
    """Return the context length with the lowest loss, a real number."""
    return min(float(longest_context(tokenizer)), 128 * (tokens / 6e5) ** 0.3)
