"""Run scripts/generate.py: generate text with a trained model."""

import argparse
import contextlib
import io
import itertools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.generate_options import parse_options, read_prompt
from lit_gpt.cli.messages import print_json, print_lines, read_line
from lit_gpt.cli.run_checkpoint import CHOICES, TRAIN, find_checkpoint, no_checkpoint_error
from lit_gpt.cli.text_writer import JsonLines, TextWriter
from lit_gpt.cli.training_text import prompt_of_columns
from lit_gpt.convert.load import ImportedModel, open_model
from lit_gpt.errors import UserError
from lit_gpt.files import expand_path
from lit_gpt.printable import one_line
from lit_gpt.runs.find import LOGS

INTERACTIVE_HELP = "type the beginning of a text; Ctrl-C stops a text, /quit or Ctrl-D ends"


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: generate(parse_options(args)))


def generate(options: argparse.Namespace) -> None:
    """Generate texts and print them, or write them to a file.

    Raises:
        UserError: There is no checkpoint, or it cannot be used, or the prompt has a character unknown to its tokenizer.
    """
    checkpoint = open_checkpoint(options.ckpt_path, options.name)
    prompts = [prompt_of_columns(checkpoint, options.given)] if options.given else options.prompts
    writer = TextWriter(checkpoint, options)
    for prompt in prompts:  # raises before anything is printed
        writer.count_tokens(prompt)
    print_lines(f"[{checkpoint.path}]", to_stderr=True)
    if options.interactive:
        seeds = itertools.count(options.seed, options.num_samples)
        run_prompt_loop(lambda line, is_stopped: writer.answer(read_prompt(line), next(seeds), is_stopped))
    elif options.jsonl is None:
        for prompt in prompts:
            writer.print_texts(prompt, options.seed, total=len(prompts) * options.num_samples)
    elif options.jsonl == "-":
        for prompt in prompts:
            writer.write_objects(prompt, print_json)
    else:
        with JsonLines(expand_path(options.jsonl)) as file:
            for prompt in prompts:
                writer.write_objects(prompt, file.write)
    writer.report()


def open_checkpoint(path: Path | None, name: str | None) -> Checkpoint | ImportedModel:
    """Open the model at `path`, or the checkpoint that of a run if `path` is None or one of `CHOICES`.

    Args:
        path: None is the same as `auto`: the best checkpoint of the run, or its newest one if it has none.
        name: The name of the run; None: of any run.

    Raises:
        UserError: There is none, or it cannot be used.
    """
    choice = "auto" if path is None else str(path)
    if choice not in CHOICES:
        if name is not None:
            raise UserError(f"--ckpt_path {choice} is a checkpoint already: leave out --name {name}")
        return open_model(choice)
    checkpoint = find_checkpoint("best" if choice == "auto" else choice, LOGS, name)
    if checkpoint is None:
        raise no_checkpoint_error(LOGS, name, TRAIN)
    return checkpoint


def run_prompt_loop(continue_text: Callable[[str, Callable[[], bool]], None]) -> None:
    """Read prompts from stdin until it ends or a line is /quit. A prompt that cannot be used is said in one line.

    Args:
        continue_text: Prints the continuation of a line. Its second argument is a function that returns True as soon as
            the text is to be stopped.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # for read_prompt, which refuses bytes that are no text
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # the arrow keys then edit the line, and recall earlier ones
        print_lines(INTERACTIVE_HELP, to_stderr=True)
    while True:
        try:
            line = read_line("> " if is_terminal else "")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print_lines("", INTERACTIVE_HELP, to_stderr=True)
            continue
        if line is None or line.strip() == "/quit":
            break
        try:
            with catch_interrupt() if is_terminal else contextlib.nullcontext(lambda: False) as is_stopped:
                continue_text(line.removeprefix("\ufeff"), is_stopped)  # the mark at the start of a text file
        except UserError as error:
            print_lines(one_line(f"error: {error}"), to_stderr=True)


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C set a flag, which is yielded as a function. A second Ctrl-C raises KeyboardInterrupt as usual."""
    interrupted = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
