"""Press Ctrl-C at many moments of every command: SIGINT to the whole process group, as a terminal sends it.

    python tests/interrupts.py                       # every command, after 0.1, 0.4, 0.7, ... 10 seconds: 20 minutes
    python tests/interrupts.py --command prepare_processes --every 0.1 --until 6

Whatever a command does at that moment (importing torch, tokenizing in several processes, validating, generating), no
process may print a traceback, the last line says what happened, and the status is 130.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import ROOT

SHAPE = ["--model.config.context_length", "16", "--model.config.d_model", "16", "--model.config.num_heads", "2"]
FIT = ["--data.files", "rows.txt", "--data.batch_size", "4", *SHAPE, "--trainer.accelerator", "cpu"]
TWO_RANKS = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.global_batch_size", "8"]
CHECKPOINT = ["--ckpt_path", "logs/saved/version_0/last.ckpt"]
COMMANDS = {
    "fit": ["fit.py", *FIT, "--trainer.max_steps", "100000"],
    "fit_workers": ["fit.py", *FIT, "--trainer.max_steps", "100000", "--data.num_workers", "2"],
    "fit_ranks": ["fit.py", *FIT, "--trainer.max_steps", "100000", *TWO_RANKS],
    "validate": ["fit.py", "validate", *CHECKPOINT, "--data.eval_windows", "null"],
    "prepare": ["prepare.py", "--data.files", "rows.txt", "--dry_run"],
    "prepare_processes": ["prepare.py", "--data.files", "rows.txt", "--dry_run", "--processes", "3"],
    "generate": ["generate.py", *CHECKPOINT, "--max_new_tokens", "100000"],
    "consolidate": ["consolidate.py", "--weights", CHECKPOINT[1], "weights.ckpt"],
    "bench_prepare": ["bench.py", "prepare", "--data.files", "rows.txt"],
    "bench_train": ["bench.py", "train", "--turns", "1000", *FIT],
}


EXIT_SECONDS = 1.0  # what Python takes to exit after a command has ended, at most


@dataclass
class Ended:
    """How an interrupted command ended, and what it printed."""

    status: int
    out: str
    err: str
    is_interrupted: bool  # False: it had ended before, or was about to exit

    def fault(self) -> str:
        """Return what is wrong with this end, or an empty string."""
        if not self.is_interrupted:
            return ""
        if self.status != 130:
            return f"status {self.status}"
        if "Traceback" in self.out + self.err or "KeyboardInterrupt" in self.err:
            return "a traceback"
        if not re.match(r"stopped (at step [\d,]+ )?by SIGINT", (self.err.splitlines() or [""])[-1]):
            return "no line that says so at the end"
        return ""


def interrupt(folder: Path, command: list[str], is_due: Callable[[int], bool]) -> Ended:
    """Run a script in a folder, and press Ctrl-C as soon as `is_due`, which gets the process id, is true."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / command[0]), *command[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
        # a process that was started in the background, as this one may have been, inherits that SIGINT is ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    while process.poll() is None and not is_due(process.pid):
        time.sleep(0.01)
    is_interrupted = process.poll() is None
    if is_interrupted:
        os.killpg(process.pid, signal.SIGINT)
    sent = time.monotonic()
    out, err = process.communicate(timeout=60)
    was_exiting = process.returncode == 0 and time.monotonic() < sent + EXIT_SECONDS
    return Ended(process.returncode, out, err, is_interrupted and not was_exiting)


def after(seconds: float) -> Callable[[int], bool]:
    """Return a condition for `interrupt` that is true some seconds after now."""
    deadline = time.monotonic() + seconds
    return lambda pid: time.monotonic() > deadline


def write_rows(path: Path, rows: int) -> None:
    """Write a text of many different lines."""
    words = np.array(["a", "few", "words", "that", "make", "lines", "which", "differ", "from", "each", "other"])
    drawn = np.random.default_rng(0).choice(words, (rows, 12))
    path.write_text("\n".join(" ".join(line) for line in drawn), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--command", choices=COMMANDS, action="append", help="the command; all without this flag")
    parser.add_argument("--every", type=float, default=0.3, help="seconds between two moments")
    parser.add_argument("--until", type=float, default=10.0, help="seconds after the start of the last moment")
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.txt", 200_000)
        saved = ["fit.py", *FIT, "--name", "saved", "--trainer.max_steps", "1"]
        subprocess.run([sys.executable, str(ROOT / "scripts" / saved[0]), *saved[1:]], cwd=folder, check=True)
        for command in options.command or COMMANDS:
            for seconds in np.arange(0.1, options.until, options.every):
                ended = interrupt(folder, COMMANDS[command], after(seconds))
                fault = ended.fault()
                faults += bool(fault)
                print(f"{command:18} {seconds:4.1f} s  status {ended.status}  {fault or 'as it should be'}", flush=True)
                if fault:
                    print(ended.err)
    print(f"{faults} faults")
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main())
