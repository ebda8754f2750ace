"""Turn the chosen candidate into the settings of a run, and into the reasons for them."""

from typing import Any

from lit_gpt.convert.architectures import architecture_of
from lit_gpt.convert.gguf_config import gguf_architecture
from lit_gpt.errors import UserError
from lit_gpt.figures import format_count
from lit_gpt.model import GPTConfig
from lit_gpt.planning.candidates import Candidate
from lit_gpt.planning.memory import parameter_count
from lit_gpt.planning.text import TextSample

# Parts of GPTConfig that a plan states although they are the defaults, so that the settings say what was chosen.
CONFIG_FIELDS = (
    *("context_length", "d_model", "num_blocks", "num_heads", "dropout", "norm", "mlp", "tie_embeddings"),
    "previous_tokens",
)
RECIPE_FIELDS = (
    *("optimizer", "learning_rate", "embedding_rate", "head_rate", "weight_decay", "betas", "warmup_steps"),
    "decay_share",
)


def candidate_settings(candidate: Candidate, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that train a candidate, without those that the person gave and the number of steps."""
    settings: dict[str, Any] = dict(candidate.tokenizer.settings)
    windows = candidate.batch_size * candidate.accumulate
    settings |= {"data.batch_size": candidate.batch_size, "data.sampling": "shuffled"}
    if candidate.accumulate > 1:
        settings["data.global_batch_size"] = windows
    settings |= {f"model.config.{name}": getattr(candidate.config, name) for name in CONFIG_FIELDS}
    settings |= {f"model.{name}": getattr(candidate.recipe, name) for name in RECIPE_FIELDS}
    settings["model.betas"] = list(candidate.recipe.betas)
    settings |= {"model.schedule": "linear", "model.min_learning_rate": 0.0}
    if candidate.compile:
        settings["model.compile"] = True
    if candidate.activation_checkpointing:
        settings["model.activation_checkpointing"] = True
    settings |= {"trainer.precision": candidate.precision, "trainer.gradient_clip_val": None}
    return {key: value for key, value in settings.items() if key not in given}


def describe_choice(
    candidate: Candidate, candidates: list[Candidate], sample: TextSample, pilots: int
) -> list[tuple[str, str]]:
    """Return the rows of the plan's table about the model and its training.

    Args:
        candidate: The chosen candidate.
        candidates: All candidates.
        sample: The text.
        pilots: How many candidates were compared in short runs.
    """
    config, tokenizer, recipe = candidate.config, candidate.tokenizer, candidate.recipe
    parameters = parameter_count(config)
    tokens = candidate.steps * candidate.tokens_per_step
    epochs = tokens / tokenizer.train_tokens
    size = f"{'about ' if sample.share < 1 else ''}{format_count(sample.num_bytes)} bytes"
    how = f"the best of {pilots} short runs" if pilots else "by the rules of docs/planning.md"
    rows = [
        ("text", f"{size}, {format_count(tokenizer.tokens)} tokens"),
        (
            f"tokenizer   {tokenizer.name}",
            f"{tokenizer.bytes_per_token:.2f} bytes a token{_compare_tokenizers(candidate, candidates)}",
        ),
        (f"context     {config.context_length}", _describe_lengths(candidate, sample)),
        (
            f"model       {config.num_blocks} blocks of {config.d_model}",
            f"{format_count(parameters)} parameters, {how}",
        ),
        (
            f"optimizer   {'Muon' if recipe.optimizer == 'muon' else 'AdamW'}",
            f"learning rate {recipe.learning_rate:g}, falling to 0 in the last {100 * recipe.decay_share:.0f}%",
        ),
        (
            f"batch       {candidate.batch_size * candidate.accumulate} windows",
            f"{candidate.tokens_per_step:,} tokens a step; {candidate.precision}",
        ),
        (
            f"decay       {recipe.weight_decay:g}",
            f"of the weights, and dropout {config.dropout:g}: the text is read {epochs:.1f} times",
        ),
        ("export", _describe_export(config)),
    ]
    return rows


def _describe_export(config: GPTConfig) -> str:
    """Return to which formats scripts/export.py can write a model of this shape."""
    formats = ["a web page"]
    for name, find_architecture in (("Hugging Face", architecture_of), ("llama.cpp", gguf_architecture)):
        try:
            find_architecture(config)
            formats.append(name)
        except UserError:
            pass
    more = "" if len(formats) == 3 else "; docs/formats.md has the flags that add others"
    return f"to {', '.join(formats)}{more}"


def _compare_tokenizers(candidate: Candidate, candidates: list[Candidate]) -> str:
    """Return how much higher the loss is expected with the best other tokenizers."""
    best: dict[str, float] = {}
    for other in candidates:
        name = other.tokenizer.name
        best[name] = min(best.get(name, other.bits_per_byte), other.bits_per_byte)
    chosen = best.pop(candidate.tokenizer.name)
    others = sorted(best.items(), key=lambda item: item[1])
    shown = others[:1] + [other for other in others[1:] if other[0] == "char"]
    compared = ", ".join(f"{name} {100 * (loss / chosen - 1):+.0f}%" for name, loss in shown)
    limit = "; it knows no other characters" if candidate.tokenizer.name == "char" else ""
    return (f"; expected loss with {compared}" if compared else "") + limit


def _describe_lengths(candidate: Candidate, sample: TextSample) -> str:
    if sample.is_raw:
        return "tokens; the text has no documents"
    lengths = candidate.tokenizer.document_lengths
    share = (lengths <= candidate.config.context_length).mean()
    return f"tokens; {100 * share:.0f}% of the documents fit into it"
