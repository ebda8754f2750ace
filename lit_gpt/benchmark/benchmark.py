"""Measure the speed of this project, next to other projects at the same work: the command of scripts/bench.py."""

import argparse
from pathlib import Path

from lit_gpt.benchmark.commands import (
    README_TARGET,
    benchmark_preparation,
    benchmark_startup,
    benchmark_time_to_loss,
)
from lit_gpt.benchmark.generation import benchmark_generation
from lit_gpt.benchmark.peers import load_nanogpt
from lit_gpt.benchmark.training import benchmark_training
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, print_rows, quiet_lightning
from lit_gpt.errors import UserError
from lit_gpt.files import expand_path

BENCHMARKS = {
    "train": benchmark_training,
    "loss": benchmark_time_to_loss,
    "generate": benchmark_generation,
    "prepare": benchmark_preparation,
    "startup": benchmark_startup,
}

USAGE = "python scripts/bench.py WHAT [flags] [--config FILE] [--SETTING VALUE]"
DESCRIPTION = """Measure the speed of this project, and of other projects at the same work:
training, the time to a loss, generation, tokenizing, or the start of commands.
The settings of fit.py, as --model.config.d_model, apply too."""
EXAMPLES = (
    "python scripts/bench.py train --config configs/shakespeare_char.yaml",
    "python scripts/bench.py train --peers --nanogpt ../nanoGPT",
    "python scripts/bench.py generate --turns 3",
)


def main(args: list[str], default_config: Path) -> int:
    """Run the command line of scripts/bench.py and return its exit status (see `exit_status`)."""
    quiet_lightning()
    return exit_status(lambda: run_benchmark(args, default_config))


def run_benchmark(args: list[str], default_config: Path) -> None:
    """Run the benchmark that the arguments ask for and print its results."""
    options, fit_args = parse_args(args)
    rows = BENCHMARKS[options.what](options, fit_args, default_config)
    print_rows(rows, options.json)


def parse_args(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of the benchmark, and the remaining arguments, which are those of fit.py.

    Raises:
        UserError: An option is wrong.
    """
    parser = LineParser(USAGE, DESCRIPTION, EXAMPLES)
    parser.add_argument("what", choices=list(BENCHMARKS), metavar="WHAT", help=", ".join(BENCHMARKS))
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object a line instead of a table")
    add("--peers", action="store_true", help="measure transformers and litgpt too, if installed")
    add("--nanogpt", type=expand_path, metavar="DIR", help="measure nanoGPT too: the folder of a checkout")
    add("--nanogpt_args", default="", metavar="ARGS", help="loss: more arguments for nanoGPT's train.py, in quotes")
    add("--steps", type=int, default=20, metavar="N", help="steps of a turn; generate: new tokens (%(default)s)")
    add("--turns", type=int, default=10, metavar="N", help="turns of each project; loss: seeds (%(default)s)")
    add("--warm_up", type=int, default=10, metavar="N", help="train: steps before the first turn (%(default)s)")
    add("--vocab_size", type=int, metavar="N", help="generate: of the untrained model; default: the tokenizer's")
    add("--valid_utf8", action="store_true", help="generate: measure texts of valid UTF-8 only too")
    add("--target", type=float, metavar="X", help=f"loss: the loss to reach, in nats (nanoGPT's, or {README_TARGET})")
    add("--first_seed", type=int, default=1, metavar="N", help="loss: the seed of the first run (%(default)s)")
    options, fit_args = parser.parse_known_args(args)
    for name in ("steps", "turns", "warm_up"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if options.nanogpt is not None:
        load_nanogpt(options.nanogpt)  # report a wrong folder before the first measurement
    return options, fit_args
