"""End a command on Ctrl-C in one line, with status 130, whatever the command does at the moment.

The scripts import this module before all others, because the other imports take seconds. It imports nothing slow.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any


def exit_on_signals(*signums: int) -> None:
    """Make signals end this process at once, with one line, until a command handles them itself.

    While Python exits, they are ignored: the command has ended, and its status stands.

    Args:
        signums: The signals; without any SIGINT, which is what Ctrl-C sends.
    """
    for signum in signums or (signal.SIGINT,):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # a shell ignores SIGINT for a command in the background
            signal.signal(signum, _exit_at_once)
            atexit.register(signal.signal, signum, signal.SIG_IGN)  # Python restores other handlers to the default


def _exit_at_once(signum: int, frame: FrameType | None) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr
        os.write(2, f"stopped by {signal.Signals(signum).name}\n".encode())
    os._exit(128 + signum)


class Interrupts:
    """What SIGINT does while a command runs: the first raises KeyboardInterrupt, a later one ends the process at once.

    Attributes:
        received: Whether there was one. An error that is raised afterwards follows from it.
    """

    def __init__(self) -> None:
        self.received = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Receive SIGINT until the end of the block, in the main thread only; then restore the handler from before.

        Python discards an exception in places such as `__del__` and reports it with a traceback. Not so here.
        """
        previous_handler, previous_hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
        if threading.current_thread() is not threading.main_thread() or previous_handler is signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, self._raise)
        sys.unraisablehook = lambda args: None if args.exc_type is KeyboardInterrupt else previous_hook(args)
        try:
            yield
        finally:
            sys.unraisablehook = previous_hook
            signal.signal(signal.SIGINT, previous_handler)

    def _raise(self, signum: int, frame: Any) -> None:
        if self.received:
            _exit_at_once(signum, frame)
        self.received = True
        raise KeyboardInterrupt
