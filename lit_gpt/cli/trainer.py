"""Construct the Trainer and its time limit."""

import os
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer

from lit_gpt import compat
from lit_gpt.device import available_cores
from lit_gpt.errors import UserError


def build_timer(limit: Any) -> Timer:
    """Return a timer of this command; the Trainer's own would validate, and count the time of earlier commands too.

    Raises:
        UserError: `limit` is not a duration, or it is zero.
    """
    try:
        timer = Timer(limit)
        is_valid = timer.time_remaining() not in (None, 0)
    except (MisconfigurationException, TypeError, OverflowError):
        is_valid = False
    if not is_valid:
        raise UserError(f"--trainer.max_time {limit}: give DD:HH:MM:SS, as 00:01:30:00")
    return timer


def build_trainer(options: dict[str, Any], timeout: int) -> Trainer:
    """Construct the Trainer.

    Args:
        options: Its arguments.
        timeout: Seconds that a process waits for the others of its run, unless a strategy in a config has its own.

    Raises:
        UserError: The Trainer refuses one of its arguments, which it does with exceptions of many types.
    """
    try:
        trainer = Trainer(**options)
    except Exception as error:
        raise error if isinstance(error, UserError) else UserError(f"--trainer: {error}") from error
    check_backend(getattr(trainer.strategy, "process_group_backend", None))
    if trainer.strategy.launcher is not None and "OMP_NUM_THREADS" not in os.environ:
        # the Trainer sets it too, but only after it has started the other processes
        threads = max(1, available_cores() // trainer.num_devices)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    compat.set_default_timeout(trainer.strategy, timedelta(seconds=timeout))
    return trainer


def check_backend(backend: str | None) -> None:
    """Check the `process_group_backend` of a strategy, for example "gloo" or "cpu:gloo,cuda:nccl".

    Raises:
        UserError: torch.distributed does not know it.
    """
    known = torch.distributed.Backend.backend_list if torch.distributed.is_available() else []
    if backend and any(part.rpartition(":")[2].lower() not in known for part in backend.split(",")):
        raise UserError(f"process_group_backend {backend} is unknown: give gloo or nccl")
