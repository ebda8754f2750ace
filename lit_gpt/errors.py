"""The exceptions that a command reports in one line."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can correct, in a flag, a config or a file.

    The message is one line: what was found, what is wrong, and what to type. The command line prints the message
    without a traceback and ends with exit status 2.
    """


class Stopped(BaseException):
    """A signal or the time limit ended the command, as the user asked.

    Like KeyboardInterrupt, it is not an `Exception`: code that handles errors does not catch it by mistake.

    Args:
        status: The exit status of the command.
        message: The line that the command prints.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def shorten(text: str) -> str:
    """Return a text, or its first 79 characters and an ellipsis, for a message that repeats it."""
    return text if len(text) <= 80 else f"{text[:79]}…"


def did_you_mean(name: str, known_names: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the known name closest to `name`, or `""` if none is close."""
    matches = difflib.get_close_matches(name, list(known_names), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the error says that the host or the device has run out of memory."""
    phrases = ("out of memory", "allocate memory", "enough memory")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in phrases)
