"""Run scripts/fit.py: the console, the signals, and how a failure ends."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import torch

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.exit_status import classify, is_distributed_failure, is_full_disk, print_failure
from lit_gpt.cli.fit import run
from lit_gpt.cli.help import print_help, split_help
from lit_gpt.cli.messages import format_traceback, quiet_lightning
from lit_gpt.cli.validation import is_externally_launched
from lit_gpt.device import configure_malloc
from lit_gpt.errors import Stopped, UserError, is_out_of_memory
from lit_gpt.training.stop import GracefulStop, global_rank

KILL_SECONDS = 10  # rank 0 saves before it ends the processes that Lightning has started


def main(default_config: Path, start: float | None = None) -> int:
    """Run the command line in `sys.argv`; return the exit status (see `classify`).

    Args:
        default_config: The config that is read if neither `--config` nor `--ckpt_path` is given.
        start: When the command began, as time.perf_counter(), from which `--budget` counts; None: now.
    """
    start = time.perf_counter() if start is None else start
    quiet_lightning()
    configure_malloc()
    stop = GracefulStop()
    try:
        with stop.signals.listen(), quiet_writer():
            topic, args = split_help(sys.argv[1:])
            if topic is not None:
                print_help(topic, args, default_config)
                return 0
            arguments = CommandLine(args, default_config)
            sys.argv[1:] = arguments.args  # Lightning starts the processes for other devices with it
            run(arguments, stop, start)
        return 0
    except (Exception, Stopped, KeyboardInterrupt) as error:
        return handle_failure(error, stop)
    finally:
        stop.clean_up()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # its threads may abort a process that just ends


def handle_failure(error: BaseException, stop: GracefulStop) -> int:
    """Print why the command failed, once for all processes of a run; return the exit status of this process.

    All processes know of a stop and of an error that the user can correct. Rank 0 prints it, and the others end with
    status 0: Lightning kills rank 0 if another process fails. Before the processes have met, the first process on each
    machine prints it.

    There are exceptions: only rank 0 writes files, and a file may be unreadable for one process only. So rank 0 kills
    the processes that Lightning has started, and one that is not killed prints its error itself. Any other error, such
    as a lack of memory or a full disk, may be known to this process only, which therefore exits without waiting for the
    others.
    """
    rank, is_distributed = global_rank(), torch.distributed.is_initialized()
    status, message = classify(
        error, rank=rank, is_training=stop.started, resume_command=stop.resume_command, stopped=stop.signals.raised
    )
    is_known_to_all = status not in (1, 141) and not is_out_of_memory(error) and not is_full_disk(error)
    if is_known_to_all:
        if rank != 0 and isinstance(error, UserError) and not is_externally_launched():
            if is_distributed:
                time.sleep(KILL_SECONDS)
            hard_exit(stop, status, message or "")  # rank 0 has not killed this process, so it has no such error
        local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if rank != 0 and (local_rank != "0" or is_distributed):
            return 0
        stop.kill_child_processes()
    elif status != 141 and (rank != 0 or is_distributed or is_distributed_failure(error)):
        hard_exit(stop, status, message or format_traceback(error))
    print_failure(error, message)
    return status


def hard_exit(stop: GracefulStop, status: int, message: str) -> NoReturn:
    """Print `message` and end this process, without waiting for processes that may never answer."""
    os.write(2, f"{message}\n".encode(errors="replace"))  # one call, because other processes write to the same stream
    sys.stdout.flush()
    stop.kill_child_processes()
    stop.clean_up()
    os._exit(status)


@contextlib.contextmanager
def quiet_writer() -> Iterator[None]:
    """Hide the traceback of TensorBoard's writer thread where it cannot write: the main thread reports the error."""
    original_hook = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        is_tensorboard = type(args.thread).__module__.startswith("tensorboard.")
        if not (is_tensorboard and isinstance(args.exc_value, OSError | MemoryError)):
            original_hook(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = original_hook
