"""How a failed command ends: `classify` as a table, and a bug in each of the scripts."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from conftest import forked

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.exit_status import classify, exit_status
from lit_gpt.cli.main import handle_failure
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import Stopped, UserError
from lit_gpt.training.stop import GracefulStop


def with_context(error: Exception, context: BaseException) -> Exception:
    """Return `error` as it is when it was raised while `context` was handled."""
    error.__context__ = context
    return error


def with_note(error: Exception, note: str) -> Exception:
    error.add_note(note)
    return error


STOPPED = Stopped(143, "stopped by SIGTERM")
GLOO = RuntimeError("[../gloo/tcp/pair.cc:534] Connection closed by peer. More text")
LOST = "another process of the run is gone or out of reach (Connection closed by peer)"
NOT_STARTED = "not all processes of the run have started, or one is gone (Connection closed by peer): read its output"

LOST_WORKER = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
WORKER_GONE = "error: a process that reads batches is gone (DataLoader worker (pid 7) is killed by signal: Killed)"
ALLOCATED = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes"
ALLOCATOR = RuntimeError(f"[enforce fail at alloc_cpu.cpp:124] err == 0. {ALLOCATED}. Error code 12")

Case = tuple[BaseException, dict, tuple[int, str | None]]
FAILURES: dict[str, Case] = {
    "Ctrl-C": (KeyboardInterrupt(), {}, (130, "stopped by SIGINT")),
    "SIGTERM": (STOPPED, {}, (143, "stopped by SIGTERM")),
    "time limit": (Stopped(0, "stopped at step 5"), {"is_training": True}, (0, "stopped at step 5")),
    "reader has left": (BrokenPipeError(), {}, (141, "")),
    "error after a stop": (with_context(RuntimeError("x"), STOPPED), {}, (143, "stopped by SIGTERM")),
    "error instead of a stop": (RuntimeError("x"), {"stopped": STOPPED}, (143, "stopped by SIGTERM")),
    "user error": (UserError("a\nb: mend  it"), {}, (2, "error: a b: mend it")),
    "user error with a note": (with_note(UserError("a"), "saved in b"), {}, (2, "error: a; saved in b")),
    "user error while training": (UserError("disk full"), {"is_training": True}, (2, "error: disk full")),
    "lost process": (GLOO, {"rank": 1, "is_training": True, "resume_command": "go"}, (1, f"rank 1: {LOST}; resume")),
    "lost process before training": (GLOO, {}, (1, f"rank 0: {NOT_STARTED}")),
    "lost process, NCCL": (torch.distributed.DistBackendError("x"), {"rank": 2}, (1, "rank 2: not all processes")),
    "lost worker": (
        LOST_WORKER,
        {"is_training": True, "resume_command": "go"},
        (1, WORKER_GONE + "; resume it with: go"),
    ),
    "lost worker in validate": (LOST_WORKER, {}, (1, WORKER_GONE)),
    "worker lost while it sends": (
        RuntimeError("DataLoader worker exited unexpectedly (EOFError())"),
        {},
        (1, "error: a p"),
    ),
    "no memory": (MemoryError(), {"is_training": True, "resume_command": "go"}, (2, "error: not enough memory (Mem")),
    "no memory on a CPU": (ALLOCATOR, {}, (2, f"error: not enough memory ({ALLOCATED}): free memory, or give less")),
    "no memory on a GPU": (
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        {},
        (2, "error: not enough memory (CUDA o"),
    ),
    "full disk": (
        OSError(errno.ENOSPC, "No space left"),
        {},
        (2, "error: a file or stdout cannot be written (No space left): f"),
    ),
    "ValueError": (ValueError("x"), {}, (1, None)),
    "TypeError while training": (TypeError("x"), {"is_training": True}, (1, None)),
    "OSError": (FileNotFoundError(2, "No such file", "x"), {}, (1, None)),
    "error after a user error": (with_context(KeyError("x"), UserError("a")), {}, (1, None)),
}


@pytest.mark.parametrize("name", FAILURES)
def test_classify_decides_status_and_message(name: str) -> None:
    error, context, (expected_status, expected_message) = FAILURES[name]
    status, message = classify(error, **context)
    assert status == expected_status
    if expected_message:
        assert message is not None
        assert message.startswith(expected_message)
        assert "\n" not in message
    else:
        assert message == expected_message


def test_process_of_a_run_whose_disk_is_full_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    def hard_exit(stop: GracefulStop, status: int, message: str) -> NoReturn:
        raise SystemExit(f"{status} {message}")

    monkeypatch.setattr("lit_gpt.cli.main.hard_exit", hard_exit)
    monkeypatch.setattr("lit_gpt.cli.main.global_rank", lambda: 1)
    with pytest.raises(SystemExit, match=r"2 error: a file or stdout cannot be written \(No space left\)"):
        handle_failure(OSError(errno.ENOSPC, "No space left"), GracefulStop())


def test_exit_status_is_zero_if_the_command_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def fail(*args: object, **kwargs: object) -> NoReturn:
    raise ValueError("a bug")


def break_method(owner: type, name: str) -> Callable[[], None]:
    """Return a function that replaces a method by one that raises ValueError."""
    return lambda: setattr(owner, name, fail)


SMALL = ["--config", "small.yaml"]
BUGS: dict[str, tuple[str, list[str], Callable[[], None]]] = {
    "fit, in setup": ("fit.py", SMALL, break_method(TextDataModule, "setup")),
    "fit, tokenizing": ("fit.py", SMALL, break_method(TextDataModule, "sources")),
    "fit, reading the checkpoint": ("fit.py", [*SMALL, "--ckpt_path", "x.ckpt"], break_method(Checkpoint, "open")),
    "prepare": ("prepare.py", SMALL, break_method(TextDataModule, "sources")),
    "bench": ("bench.py", ["prepare", *SMALL], break_method(TextDataModule, "sources")),
    "generate": ("generate.py", ["--ckpt_path", "small.yaml"], break_method(Checkpoint, "open")),
    "consolidate": ("consolidate.py", ["x.ckpt", "y.ckpt"], break_method(Checkpoint, "open")),
}


@pytest.mark.parametrize("name", BUGS)
def test_bug_ends_every_script_with_a_traceback_and_status_1(folder: Path, name: str) -> None:
    script, words, break_something = BUGS[name]
    result = forked(folder, *words, script=script, prepare=break_something)
    assert result.status == 1
    assert result.err.startswith("Traceback (most recent call last):\n")
    assert "ValueError: a bug" in result.err
    assert "error: a bug" not in result.err.replace("ValueError: a bug", "")
    assert not Path("logs").exists()
