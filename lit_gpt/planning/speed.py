"""Predict the seconds of an optimizer step and of an evaluation on this machine, before anything is trained.

The seconds are a sum over the kinds of work that `work.py` counts, each with the seconds per unit in `SECONDS`. That
table was fitted once, by docs/planning_speed.py, on one thread of a CPU. Another machine differs from it by one factor
for each of the `PARTS`. `measure_machine` finds these factors with a few short timings. docs/planning.md states the
errors.
"""

import math
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_gpt.data.batches import MIN_EVALUATION_TOKENS
from lit_gpt.device import peak_flops, supports_bfloat16, synchronize
from lit_gpt.model import GPT, GPTConfig
from lit_gpt.optim import OptimizerName
from lit_gpt.planning.bare_training import BareTraining, Recipe
from lit_gpt.planning.memory import activation_dtype
from lit_gpt.planning.work import Work, flops_per_token, pass_work, update_work

# Seconds per unit of work. work.py explains the units. "training" is a forward and a backward pass.
SECONDS: dict[str, Work] = {
    "training float32": {
        "passes": 1.34e-3,
        "blocks": 5.10e-4,
        "heads": 0.0,
        "products": 3.10e-11,
        "activations": 7.32e-10,
        "masks": 0.0,
        "attention": 2.50e-9,
        "logits": 1.73e-9,
        "embeddings": 0.0,
        "weights": 1.49e-9,
    },
    "training bfloat16": {
        "passes": 1.21e-3,
        "blocks": 1.50e-3,
        "heads": 9.02e-6,
        "products": 1.39e-11,
        "activations": 1.06e-9,
        "masks": 7.87e-10,
        "attention": 2.78e-10,
        "logits": 1.44e-9,
        "embeddings": 0.0,
        "weights": 1.08e-9,
    },
    "evaluation float32": {
        "passes": 1.31e-3,
        "blocks": 2.27e-4,
        "heads": 1.56e-6,
        "products": 1.07e-11,
        "activations": 2.29e-10,
        "masks": 0.0,
        "attention": 1.16e-9,
        "logits": 1.35e-9,
        "embeddings": 0.0,
        "weights": 3.19e-10,
    },
    "evaluation bfloat16": {
        "passes": 8.54e-4,
        "blocks": 6.72e-4,
        "heads": 4.50e-6,
        "products": 4.74e-12,
        "activations": 3.11e-10,
        "masks": 0.0,
        "attention": 8.37e-10,
        "logits": 1.51e-9,
        "embeddings": 4.88e-10,
        "weights": 4.36e-10,
    },
    "update": {
        "updates": 8.11e-4,
        "parameters": 1.50e-5,
        "adamw": 9.64e-10,
        "muon": 2.05e-3,
        "matrices": 9.70e-6,
        "momenta": 4.82e-9,
        "newton_schulz": 4.82e-12,
    },
}

# Kinds of work that another machine does faster or slower by the same factor.
PARTS = {
    "calls": ("passes", "blocks", "heads", "updates", "parameters", "muon", "matrices"),
    "products": ("products", "newton_schulz"),
    "numbers": ("activations", "masks", "attention", "logits", "embeddings", "weights", "adamw", "momenta"),
}
PART_OF = {kind: part for part, kinds in PARTS.items() for kind in kinds}
FACTORS = ("calls", "numbers", "products float32", "products bfloat16")
TRAINER_SECONDS = 0.0015  # of the Trainer, its callbacks and logging, for each step and each batch of an evaluation

# The share of each part's time that compiled blocks take. It explains the speeds in docs/performance.md.
COMPILED = {"calls": 0.7, "numbers": 0.7}

# How far factors are expected to lie apart, and measurements to be wrong, as standard deviations of logarithms.
FACTOR_SPREAD, MEASUREMENT_ERROR = 0.5, 0.03

# Operations of a forward and a backward pass. Below this, the casts to bfloat16 cost a CPU more than they save.
BF16_MIN_FLOPS = 5e8


@dataclass(frozen=True)
class Workload:
    """An optimizer step.

    Attributes:
        config: The shape of the model.
        windows: B, windows in a forward pass.
        optimizer: Its name.
        precision: The Trainer's precision, for example "bf16-mixed".
        accumulate: Forward passes in an optimizer step.
        compile: Whether the blocks are compiled.
        activation_checkpointing: Whether the activations of a block are computed again in the backward pass.
    """

    config: GPTConfig
    windows: int
    optimizer: OptimizerName = "muon"
    precision: str = "32-true"
    accumulate: int = 1
    compile: bool = False
    activation_checkpointing: bool = False


@dataclass(frozen=True)
class SpeedModel:
    """Predicts seconds.

    Attributes:
        device: The type of the device.
        seconds: As `SECONDS`, for the device.
        factors: How many times as long as in `seconds` each part takes on this machine. Products have a factor for each
            dtype.
    """

    device: str = "cpu"
    seconds: dict[str, Work] = field(default_factory=lambda: SECONDS)
    factors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FACTORS, 1.0))

    def step_seconds(self, workload: Workload) -> float:
        """Return the seconds of an optimizer step under the Trainer."""
        return self._total(self._step_parts(workload)) + TRAINER_SECONDS * self.factors["calls"]

    def evaluation_seconds(self, config: GPTConfig, tokens: int, precision: str, windows: int = 16) -> float:
        """Return the seconds to evaluate the loss of `tokens` tokens, in batches of `windows` windows or more.

        As in `EvaluationBatches`, a batch has at least MIN_EVALUATION_TOKENS tokens.
        """
        windows = max(windows, MIN_EVALUATION_TOKENS // config.context_length)
        work = pass_work(replace(config, dropout=0.0), windows, precision, self.device)
        batch_seconds = self._total(self._parts("evaluation", work, precision))
        batch_seconds += TRAINER_SECONDS * self.factors["calls"]
        return tokens / (windows * config.context_length) * batch_seconds

    def calibrated(self, measured: Iterable[tuple[Workload, float]]) -> "SpeedModel":
        """Return a model whose factors agree with measured steps.

        The logarithms of the factors are chosen by least squares, together with a penalty for factors that differ from
        the others. One measurement thus changes all factors alike.

        Args:
            measured: Steps, and the seconds of each without the Trainer, from `measure_step`.
        """
        steps = [(self._step_parts(workload), seconds) for workload, seconds in measured]
        names = sorted({name for parts, _ in steps for name in parts})
        logs = np.zeros(1 + len(names))  # of the factor of all, and of what each part differs by
        penalty = np.diag([0.0] + [1 / FACTOR_SPREAD] * len(names))
        for _ in range(20):  # Gauss-Newton
            factors = np.exp(logs[0] + logs[1:])
            rows, errors = [], []
            for parts, seconds in steps:
                predicted = np.array([parts.get(name, 0.0) for name in names]) * factors
                total = self._total(dict(zip(names, predicted)))
                shares = predicted / total  # the derivatives of the logarithm of the sum
                rows.append(np.array([shares.sum(), *shares]) / MEASUREMENT_ERROR)
                errors.append(math.log(seconds / total) / MEASUREMENT_ERROR)
            matrix, target = np.vstack([*rows, penalty]), np.concatenate([errors, -penalty @ logs])
            logs = logs + np.linalg.lstsq(matrix, target, rcond=None)[0]
        common = math.exp(logs[0])
        new = {name: factor * common for name, factor in self.factors.items()}
        new |= {name: new[name] * math.exp(log) for name, log in zip(names, logs[1:])}
        return replace(self, factors=new)

    def _step_parts(self, workload: Workload) -> dict[str, float]:
        """Return the seconds of each part of a step, without the Trainer."""
        config, precision = workload.config, workload.precision
        work = pass_work(config, workload.windows, precision, self.device)
        passes = self._parts("training", work, precision)
        if workload.activation_checkpointing:  # as if head and embeddings were computed again, too
            passes = _added(passes, self._parts("evaluation", work, precision))
        if workload.compile:
            passes = {name: seconds * COMPILED.get(name, 1.0) for name, seconds in passes.items()}
        update = self._parts("update", update_work(config, workload.optimizer), precision)
        return _added({name: workload.accumulate * seconds for name, seconds in passes.items()}, update)

    def _parts(self, phase: str, work: Work, precision: str) -> dict[str, float]:
        """Return the seconds of each part of a phase."""
        dtype = "bfloat16" if activation_dtype(precision) == torch.bfloat16 else "float32"
        seconds = self.seconds[phase if phase == "update" else f"{phase} {dtype}"]
        parts: dict[str, float] = {}
        for kind, amount in work.items():
            part = PART_OF[kind]
            if part == "products":  # Newton-Schulz iterations are in bfloat16
                part += " bfloat16" if phase == "update" else f" {dtype}"
            parts[part] = parts.get(part, 0.0) + amount * seconds[kind] * self.factors[part]
        return parts

    def _total(self, parts: dict[str, float]) -> float:
        """Return the seconds of all parts. A GPU calculates while the CPU calls the next operations."""
        calls, other = parts.get("calls", 0.0), sum(seconds for name, seconds in parts.items() if name != "calls")
        return max(calls, other) if self.device == "cuda" else calls + other


def _added(first: dict[str, float], second: dict[str, float]) -> dict[str, float]:
    return {name: first.get(name, 0.0) + second.get(name, 0.0) for name in first | second}


# ---------------------------------------------------------------------------------------------------- measurements


def measure_step(workload: Workload, device: torch.device, seconds: float) -> float:
    """Return the median seconds of a training step in a plain loop, without the Trainer.

    The first two steps are not counted, and at least one more is taken. Blocks are not compiled, because that takes
    longer than the measurement. The weights and tokens are random, and PyTorch's random states stay as they are.

    Args:
        workload: The step.
        device: Where it is taken.
        seconds: How long to measure at most, if three steps do not take longer.
    """
    end = time.perf_counter() + seconds
    times: list[float] = []  # of each step
    training, tokens, targets = start_training(workload, device)
    with torch.enable_grad():
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            for _ in range(workload.accumulate):
                training.compute_gradients(tokens, targets)
            training.update()
            synchronize(device)
            times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def start_training(workload: Workload, device: torch.device) -> tuple[BareTraining, Tensor, Tensor]:
    """Return a new model with its optimizer, and a batch of random tokens and targets, (B, T) each, on the device."""
    config = workload.config
    training = BareTraining(
        config,
        Recipe(workload.optimizer, learning_rate=1e-3, weight_decay=0.1),
        workload.precision,
        device,
        activation_checkpointing=workload.activation_checkpointing,
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (workload.windows, config.context_length + 1), generator=generator)
    tokens = tokens.to(device)
    return training, tokens[:, :-1], tokens[:, 1:]


def measure_machine(device: torch.device, seconds: float) -> SpeedModel:
    """Return the speed model of this machine, calibrated by timing small steps with the threads that are in use.

    Args:
        device: The device of the run.
        seconds: How long to measure, about.
    """
    precisions = ["32-true", "bf16-mixed"] if supports_bfloat16(device) else ["32-true"]
    scale = 16 if device.type == "cuda" else 1  # a GPU takes the same time for all small shapes
    options: dict[str, Any] = {"norm": "layernorm", "mlp": "relu2", "tie_embeddings": False, "previous_tokens": 2}
    small = GPTConfig(256, context_length=32, d_model=64, num_blocks=2, num_heads=1, **options)
    large = GPTConfig(512, context_length=64, d_model=256, num_blocks=2, num_heads=4, **options)
    workloads = [Workload(small, 4, "adamw")] + [
        Workload(large, 8 * scale, "muon", precision) for precision in precisions
    ]
    each = seconds / len(workloads)
    return base_model(device).calibrated([(workload, measure_step(workload, device, each)) for workload in workloads])


def base_model(device: torch.device) -> SpeedModel:
    """Return a speed model of a device of which nothing has been measured."""
    return SpeedModel(device.type, gpu_seconds(device) if device.type == "cuda" else SECONDS)


def gpu_seconds(device: torch.device) -> dict[str, Work]:
    """Return a table like `SECONDS` for a GPU, from its peak FLOP/s; the memory moves a byte in the time of 200 FLOPs.

    The constants fit what docs/performance.md reports for an H200, and are otherwise guesses: calibrate the model.
    """
    peak = peak_flops(device) or 100e12
    flop, byte = 1 / (0.65 * peak), 200 / peak
    tables: dict[str, Work] = {}
    for phase, passes in (("training", 3), ("evaluation", 1)):
        for dtype, size, slower in (("bfloat16", 2, 1), ("float32", 4, 10)):
            calls = {"passes": 4e-4 * passes, "blocks": 4e-4 * passes, "heads": 0.0}
            numbers = {"activations": 2.7 * byte, "masks": 2 * byte, "attention": 0.0, "logits": 1.3 * size * byte}
            numbers |= {"embeddings": size * byte, "weights": 2 * size * byte}
            tables[f"{phase} {dtype}"] = calls | {name: passes * value for name, value in numbers.items()}
            tables[f"{phase} {dtype}"]["products"] = passes * slower * flop
    tables["update"] = {"updates": 3e-4, "parameters": 1e-6, "adamw": 28 * byte, "muon": 5e-4, "matrices": 4e-5}
    tables["update"] |= {"momenta": 24 * byte, "newton_schulz": 2 * flop}
    return tables


# ------------------------------------------------------------------------------------------------------- precision


def fastest_precision(gpt: GPT, windows: int, device: torch.device) -> str:
    """Return the Trainer's precision for B = `windows`: bfloat16 where the device computes in it and it is faster."""
    flops = flops_per_token(gpt) * windows * gpt.config.context_length
    is_faster = device.type != "cpu" or flops > BF16_MIN_FLOPS
    return "bf16-mixed" if supports_bfloat16(device) and is_faster else "32-true"
