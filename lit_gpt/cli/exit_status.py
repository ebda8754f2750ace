"""Decide how a failed command ends: its exit status, and what it prints. Every script uses this module."""

import errno
import os
import re
import sys
from collections.abc import Callable

from lit_gpt.cli.interrupts import Interrupts
from lit_gpt.cli.messages import print_lines, print_traceback
from lit_gpt.errors import Stopped, UserError, is_out_of_memory
from lit_gpt.printable import one_line


def is_distributed_failure(error: BaseException) -> bool:
    """Return whether the error says that another process of the run is gone, out of reach, or never started."""
    torch = sys.modules.get("torch")  # not imported here, because some commands do without its seconds
    if torch is not None and torch.distributed.is_available() and isinstance(error, torch.distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def is_lost_worker(error: BaseException) -> bool:
    """Return whether the error says that a process that draws batches, of `--data.num_workers`, is gone."""
    return isinstance(error, RuntimeError) and bool(re.match(r"DataLoader worker .*(is killed|exited)", str(error)))


def is_full_disk(error: BaseException) -> bool:
    """Return whether a file, which may be stdout, cannot be written because its disk or a quota is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def classify(
    error: BaseException,
    *,
    rank: int = 0,
    is_training: bool = False,
    resume_command: str = "",
    stopped: Stopped | None = None,
) -> tuple[int, str | None]:
    """Decide how a command that failed with `error` ends.

    | failure                                  | status  | message           |
    |------------------------------------------|---------|-------------------|
    | Stopped: a signal or a time limit        | its own | its own           |
    | KeyboardInterrupt                        | 130     | one line          |
    | BrokenPipeError: the reader has left     | 141     | none              |
    | UserError: what the user can correct     | 2       | one line          |
    | the name of a file is too long           | 2       | one line          |
    | a disk is full                           | 2       | one line          |
    | the memory does not suffice              | 2       | one line          |
    | another process of the run is lost       | 1       | one line          |
    | anything else: a bug                     | 1       | its traceback     |

    Args:
        error: The failure.
        rank: The rank of this process.
        is_training: Whether the first step has begun.
        resume_command: The command that resumes the run.
        stopped: The stop that was raised earlier, if one was and was lost on its way; `error` then follows from it.

    Returns:
        The exit status, and the message. The message is one line; "" if there is nothing to print; None if the
        traceback of `error` is to be printed.
    """
    stopped = _find_stopped(error) or stopped
    if stopped is not None:
        return stopped.status, one_line(str(stopped))
    if isinstance(error, KeyboardInterrupt):
        return 130, "stopped by SIGINT"
    if isinstance(error, BrokenPipeError):
        return 141, ""
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
    if isinstance(error, UserError):
        return 2, one_line(_shorten_words(f"error: {error}{notes}"))
    resume = f"; resume it with: {resume_command}" if is_training else ""
    if problem := _problem_with_file(error):
        return 2, one_line(_shorten_words(f"error: {problem}{notes}{resume}"))
    if is_out_of_memory(error):
        remedy = "a smaller --data.batch_size with the same --data.global_batch_size" if is_training else "less at once"
        remedy += ", and fewer --generate.num_samples" if is_training else ""
        return 2, one_line(f"error: not enough memory ({_reason(error)}): free memory, or give {remedy}{notes}{resume}")
    if is_lost_worker(error):
        return 1, one_line(f"error: a process that reads batches is gone ({_reason(error)}){notes}{resume}")
    if is_distributed_failure(error):
        if is_training:
            lost = f"another process of the run is gone or out of reach ({_reason(error)}){notes}{resume}"
        else:
            lost = f"not all processes of the run have started, or one is gone ({_reason(error)}): read its output, "
            lost += "and start all of them again"
        return 1, one_line(f"rank {rank}: {lost}")
    return 1, None


def _problem_with_file(error: BaseException) -> str | None:
    """Return what the user can correct, if the name of a file is too long or a disk is full."""
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return f"{error.filename}: {error.strerror}: give a shorter path"
    if is_full_disk(error):
        return f"a file or stdout cannot be written ({_reason(error)}): free disk space"
    return None


def _reason(error: BaseException) -> str:
    """Return the first sentence of an error of torch, without the place in its source."""
    sentence = re.sub(r"^\[[^]]*\] ?(err == 0\. )?", "", str(error)).split("\n")[0].split(". ")[0]
    return sentence[:200].rstrip(".") or type(error).__name__


def _shorten_words(text: str) -> str:
    """Return text whose words are short enough for a person to find what is around them."""
    return re.sub(r"\S{400,}", lambda match: f"{match[0][:200]}...{match[0][-100:]}", text)


def _find_stopped(error: BaseException | None) -> Stopped | None:
    """Return `error`, or the first error it followed, that is a `Stopped`."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def print_failure(error: BaseException, message: str | None) -> None:
    """Print the message that `classify` decided on, to stderr."""
    if isinstance(error, BrokenPipeError) or is_full_disk(error):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python reports at exit that it cannot flush stdout
    if message is None:
        print_traceback(error)
    elif message:
        print_lines(message, to_stderr=True)


def exit_status(command: Callable[[], object]) -> int:
    """Run a command in this process; print why it failed, if it does; return its exit status (see `classify`)."""
    interrupts = Interrupts()
    try:
        with interrupts.listen():
            command()
    except (Exception, KeyboardInterrupt) as error:
        status, message = classify(KeyboardInterrupt() if interrupts.received else error)
        print_failure(error, message)
        return status
    return 0
