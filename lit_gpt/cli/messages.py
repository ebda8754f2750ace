"""How a command reports an error."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from lit_gpt.errors import UserError


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
