"""Start processes that do not receive the signals of their terminal."""

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import resource_tracker


@contextlib.contextmanager
def signals_blocked(*signums: int) -> Iterator[None]:
    """Block signals while processes are started.

    A new process inherits the mask and never receives these signals, not even while it starts: Ctrl-C goes to all
    processes of a terminal, and each would print a traceback. This process receives them after the block. Windows has
    no such mask.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its start unblocks SIGINT and SIGTERM, so it must not happen in the block
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)
