"""Receive SIGINT and SIGTERM: raise `Stopped`, or record the signal until the current optimizer step is saved."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from lit_gpt.errors import Stopped

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 0.5  # a SIGINT that follows sooner is the same Ctrl-C, passed on by another process
HANDLER_SECONDS = 0.5  # how long the second thread waits for the handler, before it acts in its place


class SignalListener:
    """Turn SIGINT (Ctrl-C) and SIGTERM into a request to stop.

    What a signal does depends on the state::

        state      signal                       effect
        raising    any                          raise `Stopped` in the main thread
        deferring  the first                    record it in `request`, print a notice
        deferring  a later SIGINT (Ctrl-C)      exit at once with status 130
        deferring  a later SIGTERM              none
        exiting    any                          none

    `defer` and `stop_deferring` change between the first two states. Every rank except 0 always
    defers: rank 0 ends the ranks it has started, or all ranks agree on a step after which they stop.

    Python runs a signal handler only between two instructions of the main thread. If the main thread waits inside a
    library, for example for another rank, the handler never runs. A second thread therefore reads the signals from a
    pipe (see `signal.set_wakeup_fd`) and ends the process if the handler has not run in time.

    Attributes:
        request: The recorded signal, None before the first one.
        raised: The `Stopped` that the handler has raised, None before. Where Python discards exceptions, for example
            in `__del__`, this attribute is the only trace of the signal.
    """

    def __init__(self, is_nonzero_rank: bool, before_exit: Callable[[int], None]) -> None:
        """Create a listener; it installs no handler before `listen`.

        Args:
            is_nonzero_rank: Whether this process is a rank other than 0.
            before_exit: Called with the signal before the process exits at once.
        """
        self.request: int | None = None
        self.raised: Stopped | None = None
        self._is_nonzero_rank = is_nonzero_rank
        self._before_exit = before_exit
        self._deferring = is_nonzero_rank
        self._request_time = 0.0
        self._exiting = False

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Receive signals until the end of the block, then restore the handlers that were installed before.

        Only the main thread may install signal handlers; in other threads this does nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
        self._install_handlers()
        with contextlib.ExitStack() as stack:
            if os.name == "posix":
                read_end, write_end = os.pipe()
                os.set_blocking(write_end, False)
                threading.Thread(target=self._watch_pipe, args=(read_end,), daemon=True).start()
                stack.callback(os.close, write_end)  # ends the thread
                stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_end, warn_on_full_buffer=False))
            for signum, handler in previous_handlers.items():
                stack.callback(signal.signal, signum, handler)
            yield

    def defer(self) -> None:
        """Record signals from now on. If `Stopped` was raised and discarded before, its signal becomes the request.

        Installs the handlers again: the Trainer has installed its own, which would exit with status 0, or hang.
        """
        self._deferring = True
        if self.raised is not None:
            self._record(self.raised.status - 128)
        self._install_handlers()

    def stop_deferring(self) -> None:
        """Raise `Stopped` at a signal again, unless this is a child process."""
        self._deferring = self._is_nonzero_rank

    def _install_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                signal.signal(signum, self._on_signal)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal in the main thread; the table in the class docstring says how."""
        if self._exiting:
            return
        if not self._deferring:
            self.raised = Stopped(128 + signum, f"stopped by {signal.Signals(signum).name}")
            raise self.raised
        if self.request is None:
            self._record(signum)
            if not self._is_nonzero_rank:  # os.write, because the signal may have interrupted a print
                os.write(2, b"\nstopping when this step is done and saved; press Ctrl-C again to exit at once\n")
        elif signum == signal.SIGINT and time.monotonic() - self._request_time > REPEAT_SECONDS:
            self._exit_at_once(signum)

    def _record(self, signum: int) -> None:
        self.request, self._request_time = signum, time.monotonic()

    def _watch_pipe(self, read_end: int) -> None:
        """Exit in place of the handler if it does not run; the second thread executes this.

        Args:
            read_end: The file descriptor from which to read; Python writes the number of each signal, one byte, into
                the other end of the pipe.
        """
        first_time: float | None = None
        with os.fdopen(read_end, "rb", buffering=0) as pipe:
            while received := pipe.read(1):
                signum = received[0]
                if signum not in STOP_SIGNALS:
                    continue
                now = time.monotonic()
                is_repeated = signum == signal.SIGINT and first_time is not None and now - first_time > REPEAT_SECONDS
                first_time = first_time or now
                if is_repeated or not self._deferring:
                    time.sleep(HANDLER_SECONDS)
                    if is_repeated or self.raised is None:
                        self._exit_at_once(signum)

    def _exit_at_once(self, signum: int) -> NoReturn:
        self._exiting = True
        self._before_exit(signum)
        os._exit(128 + signum)
