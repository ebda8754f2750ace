"""Run the tasks of building a corpus: in this process, in processes of this machine, or on a Ray cluster.

The results do not depend on where tasks run. Tasks are functions of modules with bound arguments, so that they can be
pickled, and running a task twice must have the same effect as running it once. Their output lies in files.
"""

import collections
import logging
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

from lit_gpt.errors import Stopped, UserError
from lit_gpt.processes import signals_blocked

ExecutorName = Literal["local", "ray"]
EXECUTORS: tuple[ExecutorName, ...] = get_args(ExecutorName)
MakeTasks = Callable[[Any], Iterable[Any]]
RunTask = Callable[[Any], Any]


class Executor(Protocol):
    def run(self, make_tasks: MakeTasks, run_task: RunTask, items: Sequence[Any]) -> Iterator[Any]:
        """Yield `run_task(task)` for every task of `make_tasks(item)`, for every item, in any order.

        Raises:
            UserError: As raised by `make_tasks` or `run_task`, like every other exception of theirs.
            OSError: A worker process was killed and not replaced.
        """


def open_executor(name: ExecutorName, processes: int) -> AbstractContextManager[Executor]:
    """Return a context manager that starts an executor and shuts it down.

    Args:
        name: "local" or "ray".
        processes: Worker processes on this machine. Ignored for a Ray cluster that RAY_ADDRESS names.

    Raises:
        UserError: Ray is not installed, or the cluster cannot be reached.
    """
    return _open_ray_executor(processes) if name == "ray" else _open_local_executor(processes)


# -------------------------------------------------------------------------------------------------- this machine


@contextmanager
def _open_local_executor(processes: int) -> Iterator[Executor]:
    if processes == 1:
        yield SerialExecutor()
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _init_worker)
    other_children = set(multiprocessing.active_children())
    try:
        yield ProcessPool(pool, processes)
    except BrokenProcessPool:
        raise OSError(None, "a worker process was killed; the same command continues from here") from None
    except (KeyboardInterrupt, Stopped):
        for worker in set(multiprocessing.active_children()) - other_children:
            worker.kill()  # `shutdown` would wait until it has imported its modules and run its tasks
        raise
    finally:
        pool.shutdown(cancel_futures=True)


class SerialExecutor:
    """Runs all tasks in this process."""

    def run(self, make_tasks: MakeTasks, run_task: RunTask, items: Sequence[Any]) -> Iterator[Any]:
        return (run_task(task) for item in items for task in make_tasks(item))


class ProcessPool:
    """Makes tasks in this process and runs them in others; at most two for each process wait.

    Args:
        pool: Where tasks run.
        processes: Number of its processes.
    """

    def __init__(self, pool: ProcessPoolExecutor, processes: int) -> None:
        self.pool = pool
        self.max_pending = 2 * processes

    def run(self, make_tasks: MakeTasks, run_task: RunTask, items: Sequence[Any]) -> Iterator[Any]:
        pending: collections.deque[Future] = collections.deque()
        for item in items:
            for task in make_tasks(item):
                with signals_blocked(signal.SIGINT):  # may start a process; this one handles Ctrl-C
                    pending.append(self.pool.submit(run_task, task))
                if len(pending) > self.max_pending:
                    yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _init_worker() -> None:
    """Exit when the parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where it cannot be blocked, on Windows
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()


# ----------------------------------------------------------------------------------------------------------- Ray


@contextmanager
def _open_ray_executor(processes: int) -> Iterator[Executor]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray  # imported here because it is an optional dependency
        import ray.data
    except ImportError:
        raise UserError("--engine ray needs Ray, which is not installed: pip install -e '.[ray]'") from None
    address = os.environ.get("RAY_ADDRESS")
    starts_ray = not ray.is_initialized()
    sigterm_handler = signal.getsignal(signal.SIGTERM)
    try:
        if starts_ray:
            try:
                if address and re.fullmatch(r"[^/]+:\d+", address):
                    # ray.init would wait for minutes for a cluster that does not exist
                    host, _, port = address.rpartition(":")
                    socket.create_connection((host, int(port)), timeout=5).close()
                ray.init(
                    address=address or "local",
                    num_cpus=None if address else processes,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="error",
                )
            except (OSError, ValueError, RuntimeError) as error:
                reason = str(error).splitlines()[0]
                raise UserError(
                    f"RAY_ADDRESS={address}: no Ray cluster there ({reason}): start one with ray start --head, or "
                    "unset RAY_ADDRESS"
                ) from None
        yield RayExecutor()
    finally:
        if starts_ray:
            ray.shutdown()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, sigterm_handler)  # ray.init replaces it


class RayExecutor:
    """Makes and runs tasks on a Ray cluster. Ray runs the tasks of a lost worker again."""

    def run(self, make_tasks: MakeTasks, run_task: RunTask, items: Sequence[Any]) -> Iterator[Any]:
        import ray

        logging.getLogger("ray.data").setLevel(logging.CRITICAL + 1)  # its errors are raised below
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.target_max_block_size = 1  # a row is a Ray task of its own
        context.raise_original_map_exception = True
        working_directory = os.getcwd()
        cpus = int(ray.cluster_resources().get("CPU", 1))

        def make_task_rows(row: dict[str, bytes]) -> Iterator[dict[str, bytes]]:
            os.chdir(working_directory)  # file names are relative to it
            return ({"bytes": pickle.dumps(task)} for task in make_tasks(pickle.loads(row["bytes"])))

        def run_task_row(row: dict[str, bytes]) -> dict[str, bytes]:
            return {"bytes": pickle.dumps(run_task(pickle.loads(row["bytes"])))}

        with ray.data.DataContext.current(context):
            item_rows = [{"bytes": pickle.dumps(item)} for item in items]
            dataset = ray.data.from_items(item_rows, override_num_blocks=len(items))
            # making tasks mostly waits for the tasks to run: it reserves no CPU, but only a few do it at once
            tasks = dataset.flat_map(make_task_rows, num_cpus=0, concurrency=-(-cpus // 8))
            try:
                for row in tasks.map(run_task_row, num_cpus=1).iter_rows():
                    yield pickle.loads(row["bytes"])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, (UserError, OSError)):
                    raise cause from None
                reason = str(error).strip().splitlines()[-1]
                raise OSError(None, f"Ray: {reason}; the same command continues from here") from None
