"""Train the short runs behind the rules of lit_gpt/planning/rules.py, and compare the rules with them.

    python docs/planning_rules.py measure shakespeare=tinyshakespeare.txt names=data/mingcheng.csv    # hours
    python docs/planning_rules.py compare shakespeare=tinyshakespeare.txt names=data/mingcheng.csv    # a minute

`measure` adds to docs/planning_runs.json what is missing there for the texts that are named; several processes can
share the work. A run trains in a plain loop, without the Trainer. Its loss is that of the whole validation split.
The learning rate falls in the last 85% of a run, or in the part that `decay_share` says in docs/planning_runs.json.

`compare` prints for every run by how much its loss differs from the expected one. The losses of a text may all differ
by the same factor, because the rules are made to compare candidates: that factor is taken out.
"""

import argparse
import fcntl
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt import GPTConfig, TextDataModule
from lit_gpt.device import configure_malloc
from lit_gpt.optim import learning_rate_factor
from lit_gpt.planning import rules
from lit_gpt.planning.bare_training import BareTraining, Recipe
from lit_gpt.planning.pilots import EncodedText, bits_per_byte
from lit_gpt.planning.text import TokenizerStatistics, sample_text, tokenizer_statistics

RUNS = Path(__file__).with_name("planning_runs.json")
USUAL: dict[str, Any] = {
    "context": 128,
    "width": 128,
    "blocks": 4,
    "batch": 8,
    "steps": 600,
    "dropout": 0.0,
    "previous_tokens": 0,
    "learning_rate": 0.008,
    "embedding_rate": 15.0,
    "head_rate": 1.5,
    "weight_decay": 0.0,
}


def experiments() -> Iterator[dict[str, Any]]:
    """Yield the runs for each text, as differences from `USUAL`."""
    for tokenizer in ("char", "bpe 1024", "bpe 4096", "bpe 8192"):
        yield {"tokenizer": tokenizer}
    yield {"tokenizer": "bpe 4096", "steps": 200, "learning_rate": 0.012}
    for dropout in (0.0, 0.1, 0.25):
        yield {"tokenizer": "bpe 4096", "steps": 1200, "learning_rate": 0.0065, "dropout": dropout}
    yield {"tokenizer": "bpe 4096", "width": 64, "learning_rate": 0.0113, "embedding_rate": 10.6, "head_rate": 2.12}
    yield {"tokenizer": "bpe 4096", "width": 256, "learning_rate": 0.0057, "embedding_rate": 21.2, "head_rate": 1.06}


def load_runs() -> list[dict[str, Any]]:
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.exists() else []


def open_text(path: str, tokenizer: str, run: dict[str, Any]) -> TextDataModule:
    """Return the data of a run. A table of several columns has one called text."""
    name, _, size = tokenizer.partition(" ")
    with Path(path).open(encoding="utf-8") as file:
        columns = "text" if "text" in file.readline().strip().split(",")[1:] else None
    return TextDataModule(
        path,
        columns=columns,
        tokenizer=name,
        vocab_size=int(size) if size else None,
        context_length=run["context"],
        batch_size=run["batch"],
        sampling="shuffled",
    )


# ------------------------------------------------------------------------------------------------------- measurement


def measure(texts: dict[str, str]) -> None:
    """Train every run of `experiments` that the file lacks."""
    configure_malloc()
    for text, path in texts.items():
        for experiment in experiments():
            run = {"text": text, **USUAL, **experiment}
            if claim(run):
                save(run, train(run, open_text(path, run["tokenizer"], run)))


def claim(run: dict[str, Any]) -> bool:
    """Add a run without a result to the file, so that no other process trains it; return False if it is there."""
    with lock():
        runs = load_runs()
        if any(all(other.get(name) == value for name, value in run.items()) for other in runs):
            return False
        write_runs([*runs, run])
    return True


def save(run: dict[str, Any], result: dict[str, Any]) -> None:
    """Add the result of a run that was claimed."""
    with lock():
        runs = load_runs()
        runs[runs.index(run)] |= result
        write_runs(runs)


def lock() -> Any:
    """Return an open file, locked until it is closed."""
    file = RUNS.with_suffix(".lock").open("w")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def write_runs(runs: list[dict[str, Any]]) -> None:
    RUNS.write_text("[\n" + ",\n".join(json.dumps(run, ensure_ascii=False) for run in runs) + "\n]\n", encoding="utf-8")


def train(run: dict[str, Any], data: TextDataModule) -> dict[str, Any]:
    """Train a model and return its loss on the whole validation split."""
    config = GPTConfig(
        data.model_vocab_size,
        run["context"],
        run["width"],
        run["blocks"],
        num_heads=max(1, run["width"] // 64),
        dropout=run["dropout"],
        norm="layernorm",
        mlp="relu2",
        tie_embeddings=False,
        previous_tokens=run["previous_tokens"],
    )
    rates = {name: run[name] for name in ("learning_rate", "embedding_rate", "head_rate", "weight_decay")}
    recipe = Recipe("muon", **rates, betas=(0.8, 0.95), decay_share=0.85)
    training = BareTraining(config, recipe, "bf16-mixed", torch.device("cpu"))
    batches = data.train_batches()
    for step in range(run["steps"]):
        tokens, targets = batches.get_batch(step)
        training.step(tokens, targets, learning_rate_factor(step, "linear", 0, run["steps"], 0.0, recipe.decay_share))
    ids = np.asarray(data.val_ids[:])
    text = EncodedText(ids[:0], ids, data.tokenizer.bytes_per_token())
    loss = bits_per_byte(training, text, run["batch"], max_tokens=len(ids))
    return {"vocab_size": data.model_vocab_size, "bits_per_byte": round(loss, 4)}


# -------------------------------------------------------------------------------------------------------- comparison


def compare(texts: dict[str, str]) -> None:
    """Print the error of the expected loss of every run on the texts, and the median error of each text."""
    for text, path in texts.items():
        runs = [run for run in load_runs() if run["text"] == text and "bits_per_byte" in run]
        known: dict[str, TokenizerStatistics] = {}
        ratios = []
        for run in runs:
            data = open_text(path, run["tokenizer"], run)
            if run["tokenizer"] not in known:
                sample = sample_text(data.sources(), data.corpus_config)
                known[run["tokenizer"]] = tokenizer_statistics(
                    sample, data.tokenizer, {"data.tokenizer": data.tokenizer.name}, 0
                )
            config = GPTConfig(run["vocab_size"], run["context"], run["width"], run["blocks"], dropout=run["dropout"])
            tokens = run["steps"] * run["batch"] * run["context"]
            ratios.append(run["bits_per_byte"] / rules.expected_bits_per_byte(known[run["tokenizer"]], config, tokens))
        if not runs:
            continue
        level = statistics.median(ratios)
        for run, ratio in zip(runs, ratios):
            changed = {name: value for name, value in run.items() if USUAL.get(name, value) != value}
            changed |= {"tokenizer": run["tokenizer"], "bits_per_byte": run["bits_per_byte"]}
            print(f"{text:12} {100 * (ratio / level - 1):+5.1f}%  {changed}")
        errors = [100 * abs(ratio / level - 1) for ratio in ratios]
        print(
            f"{text:12} median error {statistics.median(errors):.1f}%, largest {max(errors):.1f}%, level {level:.2f}\n"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["measure", "compare"])
    parser.add_argument("texts", nargs="+", metavar="NAME=PATH")
    options = parser.parse_args()
    texts = dict(text.split("=", 1) for text in options.texts)
    {"measure": measure, "compare": compare}[options.command](texts)


if __name__ == "__main__":
    main()
