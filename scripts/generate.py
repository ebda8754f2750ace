"""Writes text with a trained model: `python scripts/generate.py --prompt "..."`."""

import sys
from pathlib import Path

import torch

from lit_gpt.checkpoint.store import Checkpoint, newest_checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import encode_prompt, prepare_for_inference, stream_text, strip_control_characters
from lit_gpt.inference.sampling import check_sampling


def write(words: list[str]) -> None:
    parser = LineParser(__doc__)
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint; last, or left out: the newest under logs/")
    parser.add_argument("--name", help="run whose newest checkpoint is taken")
    parser.add_argument("--prompt", default="", help="text to go on from")
    parser.add_argument("--num_samples", type=int, default=1, help="how many texts")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="length of each at most, in tokens")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token always")
    parser.add_argument("--top_k", type=int, help="draw among the k likeliest tokens")
    parser.add_argument("--top_p", type=float, help="draw among the likeliest tokens that reach this probability")
    parser.add_argument("--seed", type=int, default=1337, help="the same seed writes the same text")
    options = parser.parse_args(words)
    if options.max_new_tokens < 1 or options.num_samples < 1:
        raise UserError("--max_new_tokens and --num_samples: give 1 or more")
    check_sampling(options.temperature, options.top_k, options.top_p)
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}: give a number from 0 to {2**63 - 1}")
    if not options.prompt.isprintable() and "\udc80" <= max(options.prompt) <= "\udcff":
        raise UserError("--prompt is not text in this terminal's encoding: set the terminal to UTF-8")

    chosen = options.ckpt_path if options.ckpt_path != Path("last") else None
    checkpoint, warning = (Checkpoint.open(chosen), "") if chosen else newest_checkpoint(Path("logs"), options.name)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
    if checkpoint is None:
        place = f"logs/{options.name or ''}"
        raise UserError(f"no checkpoint under {place}: train one with scripts/fit.py, or give --ckpt_path")
    model, tokenizer, mode = checkpoint.load_model()
    prepare_for_inference(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    encode_prompt(tokenizer, options.prompt, mode)  # a character it does not know is said before anything is written
    print(f"[{checkpoint.path}]", file=sys.stderr)
    generator = torch.Generator(device=model.embedding.weight.device).manual_seed(options.seed)
    for _ in range(options.num_samples):
        print(options.prompt, end="")
        for piece in stream_text(
            model,
            tokenizer,
            options.prompt,
            mode,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        ):
            print(strip_control_characters(piece) if sys.stdout.isatty() else piece, end="", flush=True)
        print()


if __name__ == "__main__":
    if sys.stdout is not None:  # it may be closed
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows what it can
    sys.exit(exit_status(lambda: write(sys.argv[1:])))
