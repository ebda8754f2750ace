"""Time steps of many shapes, and fit the table `SECONDS` of lit_gpt/planning/speed.py to them.

    python docs/planning_speed.py measure 60    # adds 60 shapes to planning_speed.json, in about ten minutes
    python docs/planning_speed.py fit           # prints the table, fitted on every second shape, and its errors

Shapes are drawn at random. Times are those of one thread on a CPU, in CPU seconds, so that other programs disturb them
little. Before and after each shape a reference shape is timed. Times are divided by its times, and multiplied by the
median of its times over all shapes, so that the speed of the machine may change in between.
"""

import argparse
import json
import math
import random
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_gpt import GPTConfig
from lit_gpt.device import configure_malloc
from lit_gpt.planning.memory import model_without_memory
from lit_gpt.planning.speed import SECONDS, TRAINER_SECONDS, SpeedModel, Workload, start_training
from lit_gpt.planning.work import Work, flops_per_token, pass_work, update_work

DATA = Path(__file__).with_name("planning_speed.json")
PLANNED: dict[str, Any] = {"norm": "layernorm", "mlp": "relu2", "tie_embeddings": False, "previous_tokens": 2}
VARIANTS: tuple[dict[str, Any], ...] = (
    *[PLANNED] * 6,
    {},
    PLANNED | {"dropout": 0.1},
    PLANNED | {"tie_embeddings": True, "previous_tokens": 0},
)
REFERENCE = GPTConfig(1024, context_length=64, d_model=128, num_blocks=4, num_heads=2, **PLANNED)
PHASES = ("training", "update", "evaluation")
PRECISIONS = {"32-true": "float32", "bf16-mixed": "bfloat16"}
MIN_FLOPS, MAX_FLOPS = 2e7, 4e10  # of a step; three milliseconds to a second


def draw(generator: random.Random) -> Workload:
    """Draw a step. The logarithm of its floating-point operations is uniformly distributed, about."""
    wanted = math.exp(generator.uniform(math.log(MIN_FLOPS), math.log(MAX_FLOPS)))
    while True:
        width = generator.choice([64, 96, 128, 192, 256, 384, 512, 768])
        config = GPTConfig(
            vocab_size=generator.choice([65, 256, 512, 1024, 2048, 4096, 5500, 8192, 16000]),
            context_length=generator.choice([32, 64, 128, 256, 512]),
            d_model=width,
            num_blocks=generator.choice([2, 3, 4, 6, 8, 12]),
            num_heads=max(1, width // generator.choice([32, 64, 64])),
            **generator.choice(VARIANTS),
        )
        windows = generator.choice([2, 4, 8, 16, 32, 64])
        optimizer = generator.choice(["muon", "muon", "muon", "adamw"])
        precision = generator.choice(list(PRECISIONS))
        flops = flops_per_token(model_without_memory(config)) * windows * config.context_length
        if wanted / 2 < flops < wanted * 2:
            return Workload(config, windows, optimizer, precision)


def time_phases(workload: Workload, seconds: float) -> list[float]:
    """Return the median CPU seconds of each of the `PHASES`; the first two steps are not counted."""
    training, tokens, targets = start_training(workload, torch.device("cpu"))
    functions = (
        lambda: training.compute_gradients(tokens, targets),
        training.update,
        lambda: training.evaluate(tokens, targets),
    )
    times: list[list[float]] = [[] for _ in PHASES]
    end = math.inf
    while len(times[0]) < 3 or time.process_time() < end:
        if len(times[0]) == 2:
            end = time.process_time() + seconds
        for phase, function in zip(times, functions):
            start = time.process_time()
            function()
            phase.append(time.process_time() - start)
    return [statistics.median(phase[2:]) for phase in times]


def measure(count: int) -> None:
    """Add the times of `count` random shapes to `DATA`."""
    configure_malloc()
    torch.set_num_threads(1)
    rows = json.loads(DATA.read_text()) if DATA.exists() else []
    generator = random.Random(len(rows))
    for _ in range(count):
        workload = draw(generator)
        reference = replace(workload, config=REFERENCE, windows=16, optimizer="muon")
        before = time_phases(reference, 0.2)
        measured = time_phases(workload, 0.8)
        after = time_phases(reference, 0.2)
        defaults = asdict(GPTConfig(1))
        config = {name: value for name, value in asdict(workload.config).items() if value != defaults[name]}
        row = {"config": config, "windows": workload.windows, "optimizer": workload.optimizer}
        row |= {"precision": workload.precision, "seconds": [float(f"{second:.4g}") for second in measured]}
        row["reference"] = [float(f"{(x + y) / 2:.4g}") for x, y in zip(before, after)]
        rows.append(row)
        DATA.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
        print(row)


# -------------------------------------------------------------------------------------------------------------- fit


def normalize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of one precision with seconds as if the reference always took the median of its times.

    A shape whose reference differs from the median by more than a quarter was disturbed, and is left out.
    """
    median, kept = np.median([row["reference"] for row in rows], axis=0), []  # of each phase
    for row in rows:
        ratios = np.array(row["reference"]) / median
        if np.abs(ratios - 1).max() < 0.25:
            kept.append(row | {"seconds": (row["seconds"] / ratios).tolist()})
    return kept


def work_of(row: dict[str, Any], phase: str) -> Work:
    """Return the work of a phase of a measured step."""
    config = GPTConfig(**row["config"])
    if phase == "update":
        return update_work(config, row["optimizer"])
    return pass_work(
        replace(config, dropout=0.0) if phase == "evaluation" else config, row["windows"], row["precision"]
    )


def non_negative_least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return x >= 0 with the least |matrix @ x - target|: the active-set method of Lawson and Hanson 1974."""
    scale = np.linalg.norm(matrix, axis=0) + 1e-300
    matrix = matrix / scale
    x, active = np.zeros(matrix.shape[1]), np.zeros(matrix.shape[1], dtype=bool)
    while True:
        gradient = np.where(active, -np.inf, matrix.T @ (target - matrix @ x))
        if gradient.max() <= 1e-9:
            return x / scale
        active[gradient.argmax()] = True
        while True:
            solution = np.zeros_like(x)
            solution[active] = np.linalg.lstsq(matrix[:, active], target, rcond=None)[0]
            if (solution[active] > 0).all():
                break
            negative = active & (solution <= 0)
            x += (x[negative] / (x[negative] - solution[negative])).min() * (solution - x)
            active &= x > 1e-14
            x[~active] = 0
        x = solution


def fit() -> None:
    """Print the table, fitted on every second shape to relative errors, and its errors on the other shapes."""
    rows = json.loads(DATA.read_text())
    halves: tuple[list[dict[str, Any]], ...] = ([], [])  # to fit on, and to test on
    for precision in PRECISIONS:
        kept = normalize([row for row in rows if row["precision"] == precision])
        halves[0].extend(kept[::2])
        halves[1].extend(kept[1::2])
    table: dict[str, Work] = {}
    for name in SECONDS:
        phase, _, dtype = name.partition(" ")
        (amounts, names), (other_amounts, _) = (relative_amounts(half, phase, dtype) for half in halves)
        seconds = non_negative_least_squares(amounts, np.ones(len(amounts)))
        table[name] = {kind: float(f"{value:.2e}") for kind, value in zip(names, seconds)}
        print_errors(name, other_amounts @ seconds - 1)
    model, errors = SpeedModel("cpu", table), []
    for row in halves[1]:
        workload = Workload(GPTConfig(**row["config"]), row["windows"], row["optimizer"], row["precision"])
        training, update, _ = row["seconds"]
        errors.append((model.step_seconds(workload) - TRAINER_SECONDS) / (training + update) - 1)
    print_errors("whole step", np.array(errors))
    print("\n".join(f'"{name}": {json.dumps(seconds)},' for name, seconds in table.items()))


def relative_amounts(rows: list[dict[str, Any]], phase: str, dtype: str) -> tuple[np.ndarray, list[str]]:
    """Return the amounts of work of a phase, divided by its seconds, (rows, kinds), and the kinds of work."""
    rows = [row for row in rows if dtype in ("", PRECISIONS[row["precision"]])]
    works = [work_of(row, phase) for row in rows]
    seconds = [[row["seconds"][PHASES.index(phase)]] for row in rows]
    return np.array([list(work.values()) for work in works], dtype=float) / seconds, list(works[0])


def print_errors(name: str, errors: np.ndarray) -> None:
    print(f"{name}: {len(errors)} other shapes, median error {np.median(np.abs(errors)):.1%}, ", end="")
    print(f"largest {np.abs(errors).max():.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "fit"))
    parser.add_argument("shapes", nargs="?", type=int, default=60)
    options = parser.parse_args()
    measure(options.shapes) if options.what == "measure" else fit()


if __name__ == "__main__":
    main()
