"""Shared by the tests: a working folder with a small table, the scripts in this or another process, event files."""

import contextlib
import ctypes
import functools
import gc
import os
import re
import runpy
import signal
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.util import tensor_util

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.main import main
from lit_gpt.cli.parser import build_parser
from lit_gpt.data.batches import TrainBatches
from lit_gpt.training.module import LitGPT

torch.set_num_threads(1)  # models this small only wait for each other's threads

ROOT = Path(__file__).parent.parent
DEFAULT = ROOT / "configs" / "default.yaml"

SMALL = """
data: {files: rows.txt, tokenizer: byte, batch_size: 4, eval_windows: 8}
model: {config: {context_length: 16, d_model: 16, num_blocks: 2, num_heads: 2}, learning_rate: 1.0e-3, warmup_steps: 2}
trainer: {max_steps: 6, val_check_interval: 3, log_every_n_steps: 1, accelerator: cpu, precision: 32-true}
generate: {max_new_tokens: 8, num_samples: 1}
"""


def unwrap(printed: str) -> str:
    """Join the lines that `wrap_line` and `wrap_command` have broken."""
    return re.sub(r"( \\)?\n {12}(?=\S)", " ", printed)


@dataclass
class Result:
    """The exit status of a command and what it printed; in `out`, continued lines are joined."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def quick_runs() -> Iterator[None]:
    """Leave out what makes hundreds of runs slow and what no test can see, in this process and those forked from it.

    - To build the parser of a command takes a fifth of a small run, and the result is always the same.
    - To wait until a file is on the disk helps after a power failure only.
    """
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("lit_gpt.cli.parser.build_parser", functools.cache(build_parser))
        patches.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a new working folder with rows.txt, 120 rows of text, and small.yaml, a run that takes seconds."""
    monkeypatch.chdir(tmp_path)
    rows = [f"row {i} 第{i}行: " + "abcdefghij"[i % 10] * (i % 7) for i in range(120)]
    (tmp_path / "rows.txt").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "small.yaml").write_text(SMALL, encoding="utf-8")
    return tmp_path


Fit = Callable[..., Result]


@pytest.fixture
def fit(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fit:
    """Return a function that runs scripts/fit.py in this process.

    `fit("--trainer.max_steps", 3)` is `python scripts/fit.py --config small.yaml --trainer.max_steps 3`.
    """

    def run(*flags: object, config: str | None = "small.yaml") -> Result:
        words = [str(flag) for flag in flags]
        command = [words.pop(0)] if words[:1] in (["fit"], ["validate"], ["test"]) else []
        configs = ["--config", config] if config else []
        monkeypatch.setattr(sys, "argv", ["fit.py", *command, *configs, *words])
        capsys.readouterr()
        with patch.dict(os.environ):  # Lightning sets LOCAL_RANK, after which a later run would start no other rank
            status = main(DEFAULT)
        printed = capsys.readouterr()
        return Result(status, unwrap(printed.out), printed.err)

    return run


def forked(
    folder: Path, *words: object, prepare: Callable[[], object] = lambda: None, script: str = "fit.py"
) -> Result:
    """Run a script in a forked process, which does not need to import its modules again.

    The process leads a process group, and every process of the group is killed when the script has ended. A script that
    runs for more than 100 seconds is aborted.

    Args:
        folder: The working folder of the script.
        words: Its arguments. Unlike `fit`, this function adds no `--config`.
        prepare: Is called in the forked process before the script.
        script: Its name in scripts/.

    Returns:
        The exit status, negative if a signal ended the process (SIGABRT, -6, after 100 seconds), and the output.
    """
    out, err = folder / "out.txt", folder / "err.txt"
    pid = os.fork()
    if pid == 0:
        gc.freeze()  # to destroy a process group of the parent would wait for threads that only the parent has
        status = 70
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):  # until the command installs its own handlers
                signal.signal(signum, lambda number, frame: os._exit(128 + number))
            os.setsid()
            os.chdir(folder)
            for number, path in ((1, out), (2, err)):
                with open(path, "wb") as file:
                    os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8") for number in (1, 2))
            sys.argv = [str(ROOT / "scripts" / script), *map(str, words)]
            sys.modules["__main__"].__spec__ = None  # so that Lightning starts the other ranks by the script's path
            prepare()
            if script == "fit.py":
                status = main(DEFAULT)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as error:
            status = int(error.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            status = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    deadline = time.monotonic() + 100
    while (waited := os.waitpid(pid, os.WNOHANG if time.monotonic() < deadline else 0))[0] == 0:
        time.sleep(0.01)
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGABRT)
    wait_status = waited[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    printed = [path.read_text(encoding="utf-8", errors="replace") for path in (out, err)]
    return Result(os.waitstatus_to_exitcode(wait_status), unwrap(printed[0]), printed[1])


def in_terminal(folder: Path, *words: object, prepare: Callable[[], object] = lambda: None) -> tuple[int, str]:
    """Run fit.py like `forked`, in a terminal of 80 columns; return its exit status and all that the terminal received.

    The words are its arguments.
    """
    received = bytearray()
    terminal, other_end = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))

    def connect() -> None:
        os.dup2(other_end, 1)
        os.dup2(other_end, 2)
        prepare()

    def receive() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(terminal, 4096):
                received.extend(part)

    reader = threading.Thread(target=receive, daemon=True)
    reader.start()
    ended = forked(folder, *words, prepare=connect)
    os.close(other_end)
    reader.join(10)
    os.close(terminal)
    return ended.status, received.decode()


def at_step(step: int, action: Callable[[LitGPT], object]) -> Callable[[], None]:
    """Return what `forked` takes as `prepare`: calls `action(module)` in the forward pass of optimizer step `step`.

    Steps count from 1. Only rank 0 does it, because Lightning starts the other ranks as new processes.
    """

    def prepare() -> None:
        training_step = LitGPT.training_step

        def patched(module: LitGPT, *args: object) -> torch.Tensor:
            if module.trainer.global_step == step - 1:
                action(module)
            return training_step(module, *args)  # type: ignore[arg-type]

        LitGPT.training_step = patched  # type: ignore[method-assign, assignment]

    return prepare


def drop_capabilities() -> None:
    """Make file permissions apply to the superuser too, for the rest of this process (Linux, capset(2))."""
    if os.geteuid() == 0:
        header, no_capabilities = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, no_capabilities) == 0


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint."""
    return Checkpoint.open(path).read()["state_dict"]


def event_files(folder: Path) -> list[Path]:
    """Return a run's event files in the order in which they were created: by time, process and number."""
    return sorted(folder.glob("events.*"), key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def event_values(folder: Path) -> Iterator[tuple[int, Summary.Value]]:
    """Yield every value in a run's event files with its step, in the order written."""
    for path in event_files(folder):
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            yield from ((event.step, value) for value in event.summary.value)


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return every scalar in a run's event files: tag -> (step, value) in the order written."""
    found: dict[str, list[tuple[int, float]]] = {}
    for step, value in event_values(folder):
        if value.tag.startswith("_hparams_"):  # the settings, in a tensor without a number
            continue
        number = value.simple_value
        if value.HasField("tensor") and value.tensor.dtype == 1:
            number = float(tensor_util.make_ndarray(value.tensor))
        if value.HasField("simple_value") or value.tensor.dtype == 1:
            found.setdefault(value.tag, []).append((step, number))
    return found


def tags(folder: Path) -> set[str]:
    """Return the tags of all values in a run's event files."""
    return {value.tag for _, value in event_values(folder)}


def texts(folder: Path) -> dict[int, str]:
    """Return the sample texts in a run's event files: step -> text."""
    return {
        step: tensor_util.make_ndarray(value.tensor).item().decode("utf-8")
        for step, value in event_values(folder)
        if value.tag.startswith("samples/")
    }


def visualized(folder: Path) -> dict[str, list[tuple[int, bytes]]]:
    """Return what --visualize has added to a run's event files: tag -> (step, content) in the order written."""
    found: dict[str, list[tuple[int, bytes]]] = {}
    for step, value in event_values(folder):
        if value.tag.startswith(("visualize/", "weights/", "gradients/")):
            content = value.image.encoded_image_string or value.SerializeToString()
            found.setdefault(value.tag, []).append((step, content))
    return found


def console_line(out: str, label: str) -> str:
    """The text after a label of the console output: `console_line(out, "memory")` for `memory      3.1 MB for ...`."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{label:12}"))
    return line[12:]


def parse_bytes(text: str) -> float:
    """`1.5 GB` -> 1.5e9"""
    number, unit = text.split()
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that receives the index of every training batch that is drawn in this process."""
    indices: list[int] = []
    get_item = TrainBatches.__getitem__

    def patched(batches: TrainBatches, index: int) -> tuple[torch.Tensor, ...]:
        indices.append(index)
        return get_item(batches, index)

    monkeypatch.setattr(TrainBatches, "__getitem__", patched)
    return indices
