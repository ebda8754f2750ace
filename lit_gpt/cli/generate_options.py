"""The flags of generate.py, and the prompts that they give."""

import argparse
import errno
import os
import sys

from lit_gpt.cli.messages import LineParser
from lit_gpt.data.read_options import unescape
from lit_gpt.errors import UserError, shorten
from lit_gpt.files import expand_path
from lit_gpt.inference.generate import check_sampling

DESCRIPTION = "Generate text with a trained model."
EXAMPLES = (
    "python scripts/generate.py 静夜 --num_samples 3",
    "python scripts/generate.py --name poems --given title=静夜思 --novel",
    "python scripts/generate.py --num_samples 1000 --jsonl out.jsonl",
)

FILE_PREFIX = "FILE:"
MAX_PROMPT_BYTES = 2**24  # of a file


def parse_options(args: list[str]) -> argparse.Namespace:
    """Parse and check the flags.

    Returns:
        The flags by name. `prompts` has at least one text, "" if none is given.

    Raises:
        UserError: A flag is unknown, or its value is out of range, or two flags do not go together.
    """
    end_of_flags = args.index("--") if "--" in args else len(args)
    options = build_parser().parse_intermixed_args(args[:end_of_flags])
    options.prompts += args[end_of_flags + 1 :]
    for name in ("max_new_tokens", "num_samples", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}: give 1 or more")
    check_sampling(options.temperature, options.top_k, options.top_p)
    if not 0 <= options.seed < 2**63:
        raise UserError(f"--seed is {options.seed}: give a number from 0 to {2**63 - 1}")
    _check_combinations(options)
    for pair in options.given:
        check_is_text(pair)
    options.prompts = [read_prompt(prompt) for prompt in options.prompts or options.prompt or [""]]
    return options


def _check_combinations(options: argparse.Namespace) -> None:
    """Raise UserError if two flags do not go together."""
    kinds = {
        "a prompt that stands alone": options.prompts,
        "--prompt": options.prompt,
        "--given": options.given,
        "--interactive": options.interactive,
    }
    given = [kind for kind, value in kinds.items() if value]
    if len(given) > 1:
        raise UserError(f"{given[0]} and {given[1]} both say how texts begin: leave one out")
    for prompt in options.prompts:
        if prompt.endswith(".ckpt") and os.path.exists(prompt):
            raise UserError(f"{prompt} is a checkpoint and stands where a prompt does: give it as --ckpt_path {prompt}")
    if options.name == "":
        raise UserError("--name is empty: give the name of a run, or leave it out for the newest one")
    if options.interactive and (others := [name for name in ("novel", "jsonl") if getattr(options, name)]):
        raise UserError(f"--interactive prints each text as it is written: leave out --{others[0]}")
    if options.interactive and sys.stdin is None:
        raise UserError("--interactive reads prompts from stdin, which is closed: give a prompt")
    limits = [name for name in ("top_k", "top_p") if getattr(options, name)]
    if options.temperature == 0 and limits:
        raise UserError(f"--temperature 0 always takes the likeliest token: leave out it or --{limits[0]}")


def build_parser() -> LineParser:
    """Return the parser of the flags."""
    parser = LineParser("python scripts/generate.py [flags] [PROMPT ...]", DESCRIPTION, EXAMPLES)
    model = parser.add_argument_group("model")
    model.add_argument("--name", help="run to use, as given to fit.py; default: the newest")
    model.add_argument(
        "--ckpt_path", type=expand_path, metavar="FILE", help="checkpoint, or last or best of the run; default: best"
    )
    _add_prompts(parser)
    _add_sampling(parser)
    output = parser.add_argument_group("output")
    output.add_argument("--jsonl", metavar="FILE", help="new file for the texts, as JSON lines; -: stdout")
    output.add_argument("--logprobs", action="store_true", help="the log-probability of each token too, in nats")
    output.add_argument(
        "--batch_size",
        type=int,
        default=32,
        metavar="N",
        help="texts drawn at once, but on a terminal (%(default)s)",
    )
    return parser


def _add_prompts(parser: LineParser) -> None:
    prompts = parser.add_argument_group("how texts begin; without one of these, as the training texts do")
    prompts.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; after -- it may begin with -")
    prompts.add_argument(
        "--prompt",
        action="append",
        help=r"the same as a flag, once for each prompt; \n is a line end, \t a tab, \\n a backslash and an n; "
        "FILE:path is the text of a file",
    )
    prompts.add_argument(
        "--given",
        action="append",
        default=[],
        metavar="COLUMN=TEXT",
        help="begin as a training row with this text in the column; once for each column, in the order of the training",
    )
    prompts.add_argument("--interactive", action="store_true", help="ask for prompts, one after another")


def _add_sampling(parser: LineParser) -> None:
    sampling = parser.add_argument_group("which texts")
    sampling.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts for each prompt (%(default)s)")
    sampling.add_argument(
        "--max_new_tokens", type=int, default=200, metavar="N", help="tokens of the longest text (%(default)s)"
    )
    sampling.add_argument("--novel", action="store_true", help="leave out texts that are rows of the training text")
    sampling.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0 always takes the likeliest token (%(default)s)"
    )
    sampling.add_argument("--top_k", type=int, metavar="K", help="draw from the K likeliest tokens only")
    sampling.add_argument("--top_p", type=float, metavar="P", help="draw from the likeliest up to this probability")
    sampling.add_argument(
        "--seed", type=int, default=1337, metavar="N", help="of the first text; the next has N + 1 (%(default)s)"
    )
    sampling.add_argument("--raw_bytes", action="store_true", help="allow bytes that form no character")


def check_is_text(typed: str) -> None:
    """Raise UserError if what was typed has bytes that are no text, which Python reads as surrogates (PEP 383)."""
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise UserError("a prompt is not text in this terminal's encoding: set the terminal to UTF-8") from None


def read_prompt(typed: str) -> str:
    r"""Return the text of a prompt as it was typed: with `\n` and `\t`, or the path of a file after `FILE:`.

    Raises:
        UserError: It is not text, or the file cannot be read.
    """
    check_is_text(typed)
    if not typed.startswith(FILE_PREFIX):
        return unescape(typed)
    path = expand_path(typed.removeprefix(FILE_PREFIX))
    try:
        if "\0" in str(path):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        with open(path, "rb") as file:
            content = file.read(MAX_PROMPT_BYTES + 1)
        if len(content) > MAX_PROMPT_BYTES:
            raise UserError(f"{shorten(typed)} has more than {MAX_PROMPT_BYTES:,} bytes: give the end of it")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{typed} cannot be read ({error.strerror}): give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{typed} is not UTF-8 (at byte {error.start:,}): save it as UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")
