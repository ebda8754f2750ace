"""Ctrl-C ends a command in one line, without a traceback of any process: a sample of tests/interrupts.py."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import forked
from interrupts import Ended, after, interrupt

from lit_gpt.cli.exit_status import exit_status

STOPPED = "stopped by SIGINT\n"


def test_interrupt_while_a_script_imports_ends_it_in_one_line(tmp_path: Path) -> None:
    for script, seconds in (("generate.py", 0.4), ("fit.py", 0.7)):
        assert interrupt(tmp_path, [script], after(seconds)) == Ended(130, "", STOPPED, is_interrupted=True)


def test_interrupt_while_workers_import_ends_the_command_in_one_line(folder: Path) -> None:
    def press_when_workers_import() -> None:
        while not multiprocessing.active_children():
            time.sleep(0.01)
        time.sleep(0.15)
        os.killpg(os.getpgrp(), signal.SIGINT)

    flags = ["--config", "small.yaml", "--dry_run", "--processes", 2]
    prepare = threading.Thread(target=press_when_workers_import).start
    ended = forked(folder, *flags, script="prepare.py", prepare=prepare)
    assert (ended.status, ended.out, ended.err) == (130, "", STOPPED)
    assert not (folder / "data").exists()


class InterruptOnDeletion:
    """Sends SIGINT to this process in `__del__`, where Python discards exceptions."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


def interrupt_twice() -> None:
    InterruptOnDeletion()
    InterruptOnDeletion()


def interrupt_and_fail() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise ValueError("what the interruption has caused") from None


@pytest.mark.parametrize("command", [interrupt_twice, interrupt_and_fail])
def test_interrupt_that_gets_lost_ends_the_command_all_the_same(folder: Path, command: object) -> None:
    ended = forked(folder, prepare=lambda: sys.exit(exit_status(command)))  # type: ignore[arg-type]
    assert (ended.status, ended.out, ended.err) == (130, "", STOPPED)


def test_exit_status_restores_the_handler_of_the_calling_program() -> None:
    before = signal.getsignal(signal.SIGINT)
    assert exit_status(lambda: None) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupt_while_python_exits_changes_no_status(tmp_path: Path) -> None:
    program = """
import os
from lit_gpt.cli.interrupts import exit_on_signals

class InterruptAtExit:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, 2)

exit_on_signals()
last = InterruptAtExit()
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")
