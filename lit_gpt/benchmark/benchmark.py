"""Measure the speed of this project, next to other projects at the same work.

Arguments that are not listed here are those of scripts/fit.py: --config, --model.config.d_model, ...
"""

import argparse
from pathlib import Path

from lit_gpt.benchmark.commands import benchmark_preparation, benchmark_startup, benchmark_time_to_loss
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
    parser = LineParser(__doc__)
    parser.add_argument("what", choices=list(BENCHMARKS), help="what to measure")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    parser.add_argument("--peers", action="store_true", help="measure transformers and litgpt too, if installed")
    parser.add_argument(
        "--nanogpt", type=expand_path, metavar="DIR", help="measure nanoGPT too: the folder of a checkout"
    )
    parser.add_argument(
        "--vocab_size", type=int, help="generate: vocabulary size of the untrained model; default: the tokenizer's"
    )
    parser.add_argument("--valid_utf8", action="store_true", help="generate: measure texts of valid UTF-8 only too")
    parser.add_argument("--steps", type=int, default=20, help="steps per turn; generate: new tokens")
    parser.add_argument("--turns", type=int, default=10, help="turns of each implementation; loss: seeds")
    parser.add_argument("--target", type=float, default=1.898, help="loss: the loss to reach, in nats per token")
    parser.add_argument("--first_seed", type=int, default=1, help="loss: the seed of the first run")
    parser.add_argument("--warm_up", type=int, default=10, help="train: steps before the first turn")
    options, fit_args = parser.parse_known_args(args)
    for name in ("steps", "turns", "warm_up"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more")
    if options.nanogpt is not None:
        load_nanogpt(options.nanogpt)  # report a wrong folder before the first measurement
    return options, fit_args
