"""What a person can get wrong, and how a command says so."""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a command, a config or a file: the message says in one line what was got and what to do.

    The command line prints the message alone and ends with exit status 2.
    """


def did_you_mean(got: str, known: Iterable[str]) -> str:
    """`" (did you mean 'x'?)"` for the nearest of `known`, or nothing where none is near."""
    near = difflib.get_close_matches(got, list(known), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


class LineParser(argparse.ArgumentParser):
    """Knows flags by their whole names, shows their defaults, and says what is wrong in one line."""

    def __init__(self, description: str | None) -> None:
        shown = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(description=description, allow_abbrev=False, formatter_class=shown)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def exit_status(command: Callable[[], object]) -> int:
    """Runs a command; returns its exit status: 2 for what a person can mend, said in one line, 130 for Ctrl-C."""
    try:
        command()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever was reading has had enough
        sys.stderr.close()
    except (ValueError, OSError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
