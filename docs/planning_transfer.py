"""Measure which learning rate of Muon is best at several widths and depths.

    python docs/planning_transfer.py measure 20    # adds 20 runs to planning_transfer.json; each takes some seconds
    python docs/planning_transfer.py fit           # prints the losses and the best rates

Each run trains on the built-in table for 60 steps of 256 tokens, in one thread on a CPU, as the planner's runs are
trained. `loss` is that of 16,384 tokens of the validation split, in nats per token. `rate` is the learning rate at
width 128. With the rule "width factors", `width_factors` carries it over to another width, and with it the rates of
embeddings and head. With "one rate" all of them stay as they are.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt import GPTConfig, TextDataModule
from lit_gpt.device import configure_malloc
from lit_gpt.ops import IGNORE_INDEX
from lit_gpt.planning.bare_training import BareTraining, Recipe
from lit_gpt.planning.transfer import REFERENCE_WIDTH, width_factors

DATA = Path(__file__).with_name("planning_transfer.json")
RATES, SEEDS, RULES = (0.0033, 0.0067, 0.0133, 0.0267, 0.053), (1, 2), ("width factors", "one rate")
SHAPES = ((64, 2), (128, 2), (256, 2), (64, 4), (64, 8))  # (width, depth)
STEPS, CONTEXT, BATCH, WINDOWS = 60, 32, 8, 512


def grid() -> list[dict[str, Any]]:
    """Return the settings of all runs. At the reference width both rules are the same; depths are compared with one."""
    runs = [
        {"rule": rule, "width": width, "depth": depth, "rate": rate, "seed": seed}
        for rule in RULES
        for seed in SEEDS
        for width, depth in SHAPES
        for rate in RATES
        if rule == RULES[0] or (width != REFERENCE_WIDTH and depth == 2)
    ]
    return sorted(runs, key=lambda run: (RULES.index(run["rule"]), run["depth"]))


def train(run: dict[str, Any]) -> float:
    """Train a model and return its loss on the validation split in nats per token."""
    width, seed = run["width"], run["seed"]
    data = TextDataModule(
        tokenizer="bpe",
        vocab_size=512,
        context_length=CONTEXT,
        batch_size=BATCH,
        sampling="shuffled",
        eval_windows=WINDOWS,
        seed=seed,
    )
    shape: dict[str, Any] = {"norm": "layernorm", "mlp": "relu2", "tie_embeddings": False, "previous_tokens": 2}
    shape |= {"d_model": width, "num_blocks": run["depth"], "num_heads": width // 32}
    factors = width_factors(width if run["rule"] == "width factors" else REFERENCE_WIDTH)
    rates = {"learning_rate": run["rate"], "embedding_rate": 15.0, "head_rate": 1.5}
    rates = {name: rate * factors[name] for name, rate in rates.items()}
    recipe = Recipe("muon", **rates, weight_decay=0.0, betas=(0.8, 0.95), warmup_steps=0, decay_share=0.85)
    config = GPTConfig(data.model_vocab_size, CONTEXT, **shape)
    training = BareTraining(config, recipe, "32-true", torch.device("cpu"), seed)
    training.train(data.train_batches(), STEPS)
    training.gpt.eval()
    batches = data.evaluation_batches(data.val_ids, WINDOWS)
    nats, tokens = 0.0, 0
    with torch.no_grad():
        for index in range(len(batches)):
            inputs, targets = batches[index][:2]
            nats += float(training.gpt.evaluate(inputs, targets)[0])
            tokens += int((targets != IGNORE_INDEX).sum())
    return nats / tokens


def measure(count: int) -> None:
    """Add runs of the grid that were not measured yet to the file."""
    torch.set_num_threads(1)
    measured = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else []
    done = {json.dumps({key: value for key, value in run.items() if key != "loss"}) for run in measured}
    for run in [run for run in grid() if json.dumps(run) not in done][:count]:
        measured.append(run | {"loss": round(train(run), 4)})
        print(measured[-1], flush=True)
        DATA.write_text("[\n" + ",\n".join(map(json.dumps, measured)) + "\n]\n", encoding="utf-8")


def mean_losses(rule: str, width: int, depth: int) -> dict[float, float]:
    """Return the loss at each rate, the mean over the seeds that all rates were measured with."""
    rule = RULES[0] if width == REFERENCE_WIDTH else rule
    losses: dict[int, dict[float, float]] = {}
    for run in json.loads(DATA.read_text(encoding="utf-8")):
        if (run["rule"], run["width"], run["depth"]) == (rule, width, depth):
            losses.setdefault(run["seed"], {})[run["rate"]] = run["loss"]
    complete = [found for found in losses.values() if found.keys() == set(RATES)]
    return {rate: float(np.mean([found[rate] for found in complete])) for rate in RATES} if complete else {}


def best_rate(losses: dict[float, float]) -> float:
    """Return the lowest point of a parabola through the best rate and its neighbors, over the logarithm of the rate."""
    rates, values = np.log(list(losses)), np.array(list(losses.values()))
    middle = min(max(1, int(values.argmin())), len(values) - 2)
    near = slice(middle - 1, middle + 2)
    a, b, _ = np.polyfit(rates[near], values[near], 2)
    return math.exp(min(max(-b / (2 * a), rates[middle - 1]), rates[middle + 1]))


def fit() -> None:
    """Print the losses of each shape and rule, and the best rate."""
    for rule in RULES:
        print(f"{rule}: losses with the rates {', '.join(map(str, RATES))} at width {REFERENCE_WIDTH}")
        for width, depth in SHAPES:
            if losses := mean_losses(rule, width, depth):
                shown = " ".join(f"{loss:.3f}" for loss in losses.values())
                print(f"  width {width:3} depth {depth}: {shown}   best rate {best_rate(losses):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("count", type=int)
    commands.add_parser("fit")
    configure_malloc()
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.count)
    else:
        fit()
