"""Run implementations in processes of their own that take turns.

With a process for each implementation, the peak memory of each can be measured. Short turns make a change of the
machine's speed affect all implementations alike. Results are medians over the turns.
"""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from multiprocessing.connection import Connection
from typing import Any

import torch

from lit_gpt.benchmark.task import Row
from lit_gpt.cli.messages import prepare_console, quiet_lightning
from lit_gpt.device import peak_memory, synchronize
from lit_gpt.errors import UserError
from lit_gpt.processes import signals_blocked

END = 0  # the message that ends a worker


class TurnTimer:
    """Time the optimizer steps of a worker process, turn by turn.

    A message from the parent process is the number of steps of the next turn. The answer has the seconds per step, the
    peak memory and what `phase_seconds` returns.

    Args:
        pipe: connection to the parent process.
        device: the device that the steps run on.

    Attributes:
        phase_seconds: returns the seconds of each phase of the steps since it was last called, by the name of its
            column in milliseconds.
    """

    def __init__(self, pipe: Connection, device: torch.device) -> None:
        self.pipe, self.device = pipe, device
        self.phase_seconds: Callable[[], dict[str, float]] = dict
        self._turn_steps = self._remaining_steps = 0
        self._start = 0.0  # time.perf_counter() at the start of the turn

    def before_step(self) -> None:
        """Call this before every step. At the end of a turn it sends the answer and waits for the next turn.

        Raises:
            SystemExit: There is no further turn.
        """
        if self._remaining_steps == 0:
            if self._turn_steps > 0:
                self.pipe.send(self._answer())
            self._turn_steps = self._remaining_steps = self.pipe.recv()
            if self._turn_steps == END:
                sys.exit(0)
            self._start = time.perf_counter()
        self._remaining_steps -= 1

    def _answer(self) -> Row:
        synchronize(self.device)
        seconds = time.perf_counter() - self._start
        phases = {name: 1e3 * value / self._turn_steps for name, value in self.phase_seconds().items()}
        return {"seconds": seconds / self._turn_steps, "peak_mb": peak_memory(self.device) / 1e6, **phases}


def run_in_turns(workers: dict[str, tuple[Any, ...]], messages: list[Any]) -> dict[str, list[Row]]:
    """Start worker processes and send them messages in turn.

    Args:
        workers: name -> a function and its arguments after the first, which is the connection to this process. The
            function answers every message with a row, until it receives `END`.
        messages: what to send to every worker. The first message lets a worker warm up before the next one starts.

    Returns:
        Name -> the answers to all messages.

    Raises:
        UserError: A worker failed.
    """
    context = multiprocessing.get_context("spawn")
    answers: dict[str, list[Row]] = {name: [] for name in workers}
    pipes, processes = {}, {}
    try:
        for name, (function, *arguments) in workers.items():
            pipes[name], worker_end = context.Pipe()
            processes[name] = context.Process(target=_run_worker, args=(worker_end, function, *arguments))
            with signals_blocked(signal.SIGINT):  # the worker ends when the pipe is closed
                processes[name].start()
            worker_end.close()
            answers[name].append(_ask(name, pipes[name], messages[0]))
        for message in messages[1:]:
            for name, pipe in pipes.items():
                answers[name].append(_ask(name, pipe, message))
        for pipe in pipes.values():
            pipe.send(END)
        return answers
    finally:
        for pipe in pipes.values():
            pipe.close()
        for process in processes.values():
            process.join(timeout=5)
            process.kill()


def _ask(name: str, pipe: Connection, message: Any) -> Row:
    try:
        pipe.send(message)
        answer: Row = pipe.recv()
    except (EOFError, ConnectionError):
        raise UserError(f"{name} ended without a result: run it alone to see why") from None
    if "error" in answer:
        raise UserError(f"{name}: {answer['error']}")
    if "traceback" in answer:
        raise RuntimeError(f"{name} failed:\n{answer['traceback']}")
    return answer


def _run_worker(pipe: Connection, function: Callable[..., None], *arguments: Any) -> None:
    prepare_console()
    quiet_lightning()
    try:
        with open(os.devnull, "w") as devnull, redirect_stdout(devnull):
            function(pipe, *arguments)
    except EOFError:  # the parent process closed the connection because another worker failed
        return
    except (UserError, ImportError) as error:
        pipe.send({"error": str(error)})
    except Exception:
        pipe.send({"traceback": traceback.format_exc()})
