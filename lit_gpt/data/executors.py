"""Who does the work of building a corpus: the cores of this machine, or a Ray cluster.

Both do the same: a reader makes pieces of work, a worker does each of them wherever there is room, and what they leave
lies in files. Work is given as functions of modules with their settings bound, so that it can travel, and doing a piece
twice must be as doing it once.
"""

import collections
import multiprocessing
import multiprocessing.connection
import os
import pickle
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, get_args

from lit_gpt.errors import UserError

ExecutorName = Literal["local", "ray"]
EXECUTORS: tuple[ExecutorName, ...] = get_args(ExecutorName)
Read = Callable[[Any], Iterable[Any]]  # an item -> pieces of work
Work = Callable[[Any], Any]


class Executor(Protocol):
    def run(self, read: Read, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        """`work(piece)` for every piece of `read(item)`, for all items; in whatever order they are done.

        Raises:
            UserError: and whatever else `read` or `work` raised.
            OSError: a process was killed, and nobody took its place.
        """


def open_executor(name: ExecutorName, processes: int) -> AbstractContextManager[Executor]:
    """The engine of that name.

    Args:
        name: which.
        processes: that work on this machine; a cluster that RAY_ADDRESS names has its own.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """
    return _ray(processes) if name == "ray" else _local(processes)


# -------------------------------------------------------------------------------------------------- this machine


@contextmanager
def _local(processes: int) -> Iterator[Executor]:
    if processes == 1:
        yield Alone()
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start_worker)
    try:
        yield Pool(pool, processes)
    except BrokenProcessPool:
        raise OSError(None, "a process that tokenizes was killed; it goes on from here when run again") from None
    finally:
        pool.shutdown(cancel_futures=True)


class Alone:
    """This process."""

    def run(self, read: Read, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        return (work(piece) for item in items for piece in read(item))


class Pool:
    """This process reads, others work, ahead by two pieces each."""

    def __init__(self, pool: ProcessPoolExecutor, processes: int) -> None:
        self.pool, self.processes = pool, processes

    def run(self, read: Read, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        waiting: collections.deque[Future] = collections.deque()
        for item in items:
            for piece in read(item):
                waiting.append(self.pool.submit(work, piece))
                if len(waiting) > 2 * self.processes:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _start_worker() -> None:
    """Makes a worker leave signals to its parent and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------- Ray


@contextmanager
def _ray(processes: int) -> Iterator[Executor]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # imported here: few need it, and it is no dependency
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs Ray, which is not installed: pip install -e '.[ray]'") from None
    address = os.environ.get("RAY_ADDRESS")
    there: dict[str, Any] = {"address": address} if address else {"address": "local", "num_cpus": processes}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ours = not ray.is_initialized()
    before = signal.getsignal(signal.SIGTERM)
    try:
        if ours:
            try:
                if address and re.fullmatch(r"[^/]+:\d+", address):  # for which Ray itself would wait for minutes
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=5).close()
                ray.init(**there, **quiet)
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"RAY_ADDRESS={address}: no Ray cluster there ({reason}): ray start --head, or unset it"
                ) from None
        yield Cluster()
    finally:
        if ours:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)  # ray.init sets a handler of its own


class Cluster:
    """The workers of a Ray cluster; the work of one that is lost is done again by another."""

    def run(self, read: Read, work: Work, items: Sequence[Any]) -> Iterator[Any]:
        import logging

        import ray

        logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)  # what goes wrong is raised
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a piece is a task of its own
        context.raise_original_map_exception = True
        folder = os.getcwd()
        cpus = int(ray.cluster_resources().get("CPU", 1))

        def pieces(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
            os.chdir(folder)  # names of files are seen from there
            return ({"bytes": pickle.dumps(piece)} for piece in read(pickle.loads(row["bytes"])))

        def done(row: dict[str, bytes]) -> dict[str, bytes]:
            return {"bytes": pickle.dumps(work(pickle.loads(row["bytes"])))}

        with ray.data.DataContext.current(context):
            given = ray.data.from_items(
                [{"bytes": pickle.dumps(item)} for item in items], override_num_blocks=len(items)
            )
            # readers wait for those who work most of the time: they are given no core, but are few
            read_pieces = given.flat_map(pieces, num_cpus=0, concurrency=-(-cpus // 8))
            try:
                for row in read_pieces.map(done, num_cpus=1).iter_rows():
                    yield pickle.loads(row["bytes"])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, (UserError, OSError)):
                    raise cause from None
                reason = str(error).strip().splitlines()[-1]
                raise OSError(None, f"Ray: {reason}; it goes on from here when run again") from None
