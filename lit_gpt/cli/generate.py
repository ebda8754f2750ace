"""Run scripts/generate.py: generate text with a trained model."""

import argparse
from pathlib import Path

import torch

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, print_lines, print_text
from lit_gpt.cli.run_checkpoint import CHOICES, LOGS, TRAIN, find_checkpoint, no_checkpoint_error
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import check_sampling, encode_prompt, prepare_for_inference, stream_text


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: generate(parse_options(args)))


def parse_options(args: list[str]) -> argparse.Namespace:
    """Parse and check the flags.

    Raises:
        UserError: A flag is unknown, or its value is out of range.
    """
    parser = LineParser('Generate text with a trained model: python scripts/generate.py --prompt "..."')
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint, or last or best; by default the run's best")
    parser.add_argument("--name", help="name of the run; the newest one by default")
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument("--num_samples", type=int, default=1, help="number of texts")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="maximum length of a text in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always chooses the most likely token")
    parser.add_argument("--top_k", type=int, help="sample from the k most likely tokens only")
    parser.add_argument("--top_p", type=float, help="sample from the most likely tokens up to this total probability")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed generates the same text")
    parser.add_argument(
        "--raw_bytes", action="store_true", help="allow bytes that form no character; they appear as U+FFFD"
    )
    options = parser.parse_args(args)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more")
    check_sampling(options.temperature, options.top_k, options.top_p)
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}: give a number from 0 to {2**63 - 1}")
    if not options.prompt.isprintable() and "\udc80" <= max(options.prompt) <= "\udcff":  # undecodable bytes, PEP 383
        raise UserError("--prompt is not text in this terminal's encoding: set the terminal to UTF-8")
    return options


def generate(options: argparse.Namespace) -> None:
    """Print `options.num_samples` texts, each token as soon as it is generated.

    Raises:
        UserError: There is no checkpoint, or it cannot be used, or the prompt has a character unknown to its tokenizer.
    """
    checkpoint = open_checkpoint(options.ckpt_path, options.name)
    model, tokenizer, mode = checkpoint.load_model()
    prepare_for_inference(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    encode_prompt(tokenizer, options.prompt, mode)  # raises before anything is printed
    print_lines(f"[{checkpoint.path}]", to_stderr=True)
    generator = torch.Generator(device=model.embedding.weight.device).manual_seed(options.seed)
    for _ in range(options.num_samples):
        print_text(options.prompt)
        for text in stream_text(
            model,
            tokenizer,
            options.prompt,
            mode,
            raw_bytes=options.raw_bytes,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        ):
            print_text(text)
        print_text("\n")


def open_checkpoint(path: Path | None, name: str | None) -> Checkpoint:
    """Open the checkpoint at `path`, or that of a run if `path` is None or one of `CHOICES`.

    Args:
        path: None is the same as `auto`: the best checkpoint of the run, or its newest one if it has none.
        name: The name of the run; None: of any run.

    Raises:
        UserError: There is none, or it cannot be used.
    """
    choice = "auto" if path is None else str(path)
    if choice not in CHOICES:
        return Checkpoint.open(choice)
    checkpoint = find_checkpoint("best" if choice == "auto" else choice, LOGS, name)
    if checkpoint is None:
        raise no_checkpoint_error(LOGS, name, TRAIN)
    return checkpoint
