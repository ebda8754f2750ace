"""What a person can get wrong, and how a command says so."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a command, a config or a file: the message says in one line what was got and what to do.

    The command line prints the message alone and ends with exit status 2.
    """


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `known`, or nothing where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class Stopped(BaseException):
    """Ends the command in good order. Like KeyboardInterrupt it passes by `except Exception`.

    Args:
        status: exit status.
        message: what to tell.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
