"""Let single calls of a run fail: write, fsync, rename, open and others, as on a full or a broken disk.

    python tests/faults.py                           # every call of every kind
    python tests/faults.py --kind write --every 10   # every tenth call of one kind
    python tests/faults.py --devices 2 --every 10    # with two ranks

A run of a few steps is repeated; each time one call fails that works in the run's folder or in the token cache. With
ENOSPC, a full disk, the run is repeated once more, and all later calls of this kind fail too. The run must end with
status 2 and one line that says what to do, or with status 0 where the fault does no harm. The command that resumes it
must then end with status 0. The run must then have the weights, the optimizer state, the checkpoints, every point and
every sample of an undisturbed run, bit for bit. The same is done with a run that resumes after it was killed.

Calls of C code, for example of NumPy and PyArrow, are not seen here.
"""

import argparse
import builtins
import errno
import io
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from conftest import Result, at_step, forked
from ranks import TWO_RANKS, ForkedRank
from torture import compare_runs, write_inputs

from lit_gpt.checkpoint.runs import newest_checkpoint

# kind of call -> how it can fail; "short": only half of the bytes are written
ERRORS: dict[str, tuple[int | str, ...]] = {
    "write": (errno.ENOSPC, errno.EIO, "short"),
    "fsync": (errno.ENOSPC, errno.EIO),
    "rename": (errno.ENOSPC, errno.EACCES, errno.EIO),
    "open": (errno.ENOSPC, errno.EACCES, errno.EIO),
    "mkdir": (errno.ENOSPC, errno.EACCES),
    "truncate": (errno.EIO,),
    "unlink": (errno.EACCES,),
}
WATCHED = ("logs", "data")  # folders below the working folder
STEPS, KILLED_STEP = 8, 6
FLAGS = ["--config", "torture.yaml", "--trainer.max_steps", STEPS, "--trainer.val_check_interval", 4]
FLAGS += ["--trainer.log_every_n_steps", 1, "--checkpoint.every_n_steps", 3, "--data.global_batch_size", 8]
REMEDY = re.compile(": (free|choose|give|remove|run in|check)")  # a message that says what to do has one of these words

CACHE_NOTICE = "tokenizing the text again"  # where a file of the cache cannot be read, which does no harm


@dataclass
class Fault:
    """A call that fails.

    Args:
        kind: A key of `ERRORS`.
        number: Which call of its kind in `WATCHED`, from 1; 0: none, the calls are only counted.
        error: One of the values of `ERRORS`.
        persists: Whether all later calls of the kind fail too.
    """

    kind: str
    number: int
    error: int | str
    persists: bool

    def __str__(self) -> str:
        name = errno.errorcode[self.error] if isinstance(self.error, int) else self.error
        return f"{self.kind} {self.number}{' and later' if self.persists else ''}: {name}"


class FaultInjector:
    """Patches the functions of Python that write, so that one call fails; `install` is called in the forked process.

    Attributes:
        calls: The calls of the fault's kind so far; it is shared with the process that forked this one.
    """

    def __init__(self, folder: Path, fault: Fault) -> None:
        self.fault = fault
        self._roots = tuple(f"{folder.resolve() / name}" for name in WATCHED)
        self._calls = mmap.mmap(-1, 8)

    @property
    def calls(self) -> int:
        return int.from_bytes(self._calls[:], "little")

    def fails(self, kind: str, *paths: Any) -> bool:
        """Count a call of a kind with these paths; return whether it has to fail.

        Raises:
            OSError: It fails with an error.
        """
        fault = self.fault
        is_watched = any(
            os.path.abspath(path).startswith(self._roots) for path in paths if isinstance(path, str | Path)
        )
        if kind != fault.kind or not is_watched:
            return False
        self._calls[:] = (self.calls + 1).to_bytes(8, "little")
        if fault.number == 0 or not (self.calls == fault.number or (fault.persists and self.calls > fault.number)):
            return False
        if isinstance(fault.error, int):
            raise OSError(fault.error, os.strerror(fault.error), str(paths[0]))
        return True

    def install(self) -> None:
        """Patch this process."""
        injector, real_open, real_os_open, real_fsync = self, open, os.open, os.fsync

        class FaultyFile(io.FileIO):
            def write(self, content: Any) -> int:
                is_short = injector.fails("write", self.name) and len(content) > 1
                return super().write(memoryview(content)[: len(content) // 2] if is_short else content)

        def patched_open(file: Any, mode: str = "r", buffering: int = -1, *args: Any, **kwargs: Any) -> Any:
            injector.fails("open", file)
            if not isinstance(file, str | Path) or not set(mode) & set("wax+"):
                return real_open(file, mode, buffering, *args, **kwargs)
            raw = FaultyFile(file, mode.replace("b", "").replace("t", ""))
            if buffering == 0:
                return raw
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *args, **kwargs)

        def patched_os_open(path: Any, *args: Any, **kwargs: Any) -> int:
            injector.fails("open", path)
            return real_os_open(path, *args, **kwargs)

        def patched_fsync(descriptor: int) -> None:
            injector.fails("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

        builtins.open = io.open = patched_open  # type: ignore[assignment]
        os.open, os.fsync = patched_os_open, patched_fsync  # type: ignore[assignment]
        names = {"rename": ("rename", "replace"), "mkdir": ("mkdir",), "truncate": ("truncate",)}
        names |= {"unlink": ("unlink", "remove", "rmdir")}
        for kind, functions in names.items():
            for name in functions:
                setattr(os, name, partial(self._call, kind, getattr(os, name)))

    def _call(self, kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.fails(kind, *args)
        return function(*args, **kwargs)


class Scenario:
    """A run into which faults are injected.

    Args:
        folder: An empty folder.
        is_resumed: Whether the run is one that was killed in step `KILLED_STEP` and is resumed.
        flags: More flags of all runs. With two ranks, rank 0 has the fault.
    """

    def __init__(self, folder: Path, is_resumed: bool, flags: Sequence[Any] = ()) -> None:
        self.start, self.case, self.straight = folder / "start", folder / "case", folder / "straight"
        self.flags = [*FLAGS, *flags]
        self.first_flags = [*self.flags, *(["--ckpt_path", "last"] if is_resumed else [])]
        for path in (self.start, self.straight):
            path.mkdir(parents=True)
            write_inputs(path)
        assert forked(self.straight, *self.flags, prepare=ForkedRank.prepare).status == 0
        if is_resumed:
            kill = at_step(KILLED_STEP, lambda module: os.kill(os.getpid(), signal.SIGKILL))
            killed = forked(self.start, *self.flags, prepare=lambda: (ForkedRank.prepare(), kill()))
            assert killed.status == -signal.SIGKILL

    def run(self, fault: Fault) -> tuple[Result, int]:
        """Run with a fault; return the result and the number of calls of the fault's kind."""
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.start, self.case)
        injector = FaultInjector(self.case, fault)
        ended = forked(self.case, *self.first_flags, prepare=lambda: (ForkedRank.prepare(), injector.install()))
        return ended, injector.calls

    def check(self, fault: Fault) -> tuple[int, str]:
        """Run with a fault, and then without it.

        Returns:
            The exit status of the first run; and what is wrong, "" if nothing is.
        """
        ended, _ = self.run(fault)
        lines = [line for line in ended.err.splitlines() if not line.endswith(CACHE_NOTICE)]
        if ended.status == 2:
            is_right = len(lines) == 1 and lines[0].startswith("error: ") and REMEDY.search(lines[0]) is not None
        else:
            is_right = ended.status == 0 and all(line.startswith("warning: ") for line in lines)
        if not is_right:
            return ended.status, f"status {ended.status}, {ended.err}"
        if ended.status != 0:
            resumed = forked(self.case, *self.flags, "--ckpt_path", "auto", prepare=ForkedRank.prepare)
            if resumed.status != 0 or "Traceback" in resumed.err:
                return ended.status, f"{lines[0]}; resumed: status {resumed.status}, {resumed.err}"
        newest, _ = newest_checkpoint(self.case / "logs", "torture")
        assert newest is not None
        differences = compare_runs(self.straight / "logs" / "torture" / "version_0", newest.path.parent)
        return ended.status, f"{lines}: {', '.join(differences)}" if differences else ""


def faults(scenario: Scenario, kind: str, every: int, rng: random.Random) -> Iterator[Fault]:
    """Yield the faults of a kind: every n-th call, from a random one on, with every error."""
    _, calls = scenario.run(Fault(kind, 0, 0, False))
    first = rng.randint(1, every)
    for number in range(first, calls + 1, every):
        for error in ERRORS[kind]:
            for persists in (False, True) if error == errno.ENOSPC else (False,):
                yield Fault(kind, number, error, persists)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=ERRORS, nargs="*", default=list(ERRORS))
    parser.add_argument("--every", type=int, default=1, help="every n-th call")
    parser.add_argument("--devices", type=int, default=1, choices=(1, 2))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    rng = random.Random(options.seed)
    for is_resumed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            scenario = Scenario(Path(folder), is_resumed, TWO_RANKS if options.devices == 2 else [])
            for kind in options.kind:
                statuses: Counter[int] = Counter()
                for fault in faults(scenario, kind, options.every, rng):
                    status, problem = scenario.check(fault)
                    statuses[status] += 1
                    if problem:
                        wrong += 1
                        print(f"WRONG: {fault}: {problem}", flush=True)
                counts = ", ".join(f"{count} times status {status}" for status, count in sorted(statuses.items()))
                print(f"{'resumed' if is_resumed else 'new'} run, {kind}: {counts}", flush=True)
    print(f"{wrong} wrong")
    return wrong


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(min(main(), 1))
