"""The loop of generate.py --interactive: read a prompt, continue it, read the next one."""

import contextlib
import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from lit_gpt.cli.messages import print_lines, read_line
from lit_gpt.errors import UserError
from lit_gpt.printable import one_line

HELP = "type the beginning of a text; Ctrl-C stops a text, /quit or Ctrl-D ends"


def run_prompt_loop(continue_text: Callable[[str, Callable[[], bool]], None]) -> None:
    """Read prompts from stdin until it ends or a line is /quit. A prompt that cannot be used is said in one line.

    Args:
        continue_text: Prints the continuation of a line. Its second argument is a function that returns True as soon as
            the text is to be stopped.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are said as they are for a flag
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # the arrow keys then edit the line, and recall earlier ones
        print_lines(HELP, to_stderr=True)
    while True:
        try:
            line = read_line("> " if is_terminal else "")
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print_lines("", HELP, to_stderr=True)
            continue
        if line is None or line.strip() == "/quit":
            break
        try:
            with catch_interrupt() if is_terminal else contextlib.nullcontext(lambda: False) as is_stopped:
                continue_text(line, is_stopped)
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
