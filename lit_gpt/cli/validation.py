"""Check settings that are valid one by one but not together."""

import inspect
import math
import os
import re
import socket
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch import Trainer

from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.model import GPTConfig
from lit_gpt.training.checkpointing import StepCheckpoint, StopEarly
from lit_gpt.training.module import METRICS, LitGPT
from lit_gpt.training.samples import GenerateText

# what would go behind the back of our counting, and why
UNSUITABLE = {
    "GradientAccumulationScheduler": "give --data.global_batch_size",
    "BatchSizeFinder": "give --data.batch_size",
    "LearningRateFinder": "give --model.learning_rate",
    "StochasticWeightAveraging": "its weights are in no checkpoint",
    "BackboneFinetuning": "there is no backbone",
    "OnExceptionCheckpoint": "last.ckpt is written on an exception already",
    "Timer": "give --trainer.max_time",
}


def check_run_name(name: Any) -> str:
    """A run's name, which is a folder's.

    Raises:
        UserError: it could not be one.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: take letters, digits and ._- only, a hundred at most")
    return name


def check_not_null(settings: Namespace) -> None:
    """Refuses `null` where a setting of ours has to be given; the parser lets it pass.

    Raises:
        UserError: it is such a one.
    """
    for section, owner in {
        "data": TextDataModule.__init__,
        "model": LitGPT.__init__,
        "model.config": GPTConfig.__init__,
        "generate": GenerateText.__init__,
        "checkpoint": StepCheckpoint.__init__,
        "early_stopping": StopEarly.__init__,
    }.items():
        values = settings.get(section)
        if not isinstance(values, Namespace):
            raise UserError(f"{section} {values}: give its settings, or leave it out")
        for name, kind in get_type_hints(owner).items():
            if name in values and values[name] is None and type(None) not in (kind, *get_args(kind)):
                raise UserError(f"--{section}.{name} null: give a value, or leave it out")
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items():
        nullable = None in (parameter.default, TRAINER_DEFAULTS.get(name, parameter.default))
        if name in settings.trainer and settings.trainer[name] is None and not nullable:
            raise UserError(f"--trainer.{name} null: give a value, or leave it out")


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def is_externally_launched() -> bool:
    """Whether torchrun or SLURM has started this process, and others beside it."""
    return bool({"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys())


def validate_args(settings: Namespace, command: str) -> Iterator[str]:
    """What cannot be meant by flags that each are of the right kind, the first first."""
    trainer, data, early = settings.trainer, settings.data, settings.early_stopping
    cores = os.cpu_count() or 1
    if command != "fit" and not settings.ckpt_path:
        yield f"{command} needs a checkpoint: give --ckpt_path logs/<name>/version_<n>/best.ckpt"
    if command == "test" and not (data.test_fraction or data.test_files or data.split_column):
        yield "there is no test split: give --data.test_fraction, --data.test_files or --data.split_column"
    if settings.preflight and command != "fit":
        yield f"--preflight is of a run that trains: leave it out, or {command}"
    if settings.preflight and trainer.fast_dev_run:
        yield "--preflight with --trainer.fast_dev_run measures another run: leave one out"
    if settings.ckpt_path and trainer.overfit_batches:
        yield "--ckpt_path with --trainer.overfit_batches: its few batches are not counted on, start anew"
    if isinstance(trainer.overfit_batches, float) and trainer.overfit_batches:
        yield f"--trainer.overfit_batches {trainer.overfit_batches}: give a number of batches, as 2"
    if trainer.accumulate_grad_batches < 1:
        yield f"--trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: give 1 or more"
    if data.global_batch_size is not None and trainer.accumulate_grad_batches != 1:
        yield (
            f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} and --data.global_batch_size "
            f"{data.global_batch_size} say the same twice: leave the first out, it follows from the second"
        )
    if trainer.use_distributed_sampler:
        yield "--trainer.use_distributed_sampler true: leave it out, every device draws its own windows"
    if re.search("spawn|fork|notebook", str(trainer.strategy)):
        yield f"--trainer.strategy {trainer.strategy} is for notebooks: give ddp"
    if "FSDP2" in str(trainer.strategy) and str(trainer.precision) in ("64", "64-true", "16", "16-mixed"):
        yield f"--trainer.precision {trainer.precision} does not go with slices: give 32-true, bf16-mixed or bf16-true"
    if command == "fit" and trainer.precision == "16-true":
        yield "--trainer.precision 16-true cannot hold the squares of gradients: give bf16-true or 16-mixed"
    every = trainer.val_check_interval
    if not isinstance(every, int | float) or every <= 0 or (isinstance(every, float) and every > 1):
        yield f"--trainer.val_check_interval {every}: give optimizer steps, as 250, or a share of an epoch, as 0.5"
    if trainer.check_val_every_n_epoch not in (None, 1):
        yield f"--trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch}: give val_check_interval instead"
    if trainer.limit_train_batches not in (None, 1.0):
        yield (
            f"--trainer.limit_train_batches {trainer.limit_train_batches} would cut optimizer steps apart: "
            "give --trainer.max_steps"
        )
    if trainer.limit_val_batches not in (None, 0, 1.0):
        yield f"--trainer.limit_val_batches {trainer.limit_val_batches}: give --data.eval_windows instead"
    if trainer.limit_val_batches == 0 and early.patience is not None:
        yield "--early_stopping.patience waits for validations, --trainer.limit_val_batches 0 has none"
    if trainer.gradient_clip_val is not None and not 0 <= trainer.gradient_clip_val < math.inf:
        yield f"--trainer.gradient_clip_val is {trainer.gradient_clip_val:g}: give 0 (off) or more"
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        yield f"--trainer.log_every_n_steps is {trainer.log_every_n_steps}: give 0 (never) or more"
    if trainer.min_steps is not None and 0 <= trainer.max_steps < trainer.min_steps:
        yield f"--trainer.min_steps {trainer.min_steps} is more than max_steps {trainer.max_steps}: give fewer"
    if not 1 <= settings.timeout <= 86_400:
        yield f"--timeout {settings.timeout}: give seconds, from 1 to 86400"
    if trainer.num_nodes > 1 and not is_externally_launched():
        yield f"--trainer.num_nodes {trainer.num_nodes}: start it on each of them, with torchrun or srun"
    if trainer.accelerator == "cpu" and str(trainer.devices).isdecimal() and int(trainer.devices) > 4 * cores:
        yield f"--trainer.devices {trainer.devices} on {cores} cores: give {cores} or fewer"
    if data.num_workers > 8 * cores:
        yield f"--data.num_workers {data.num_workers} on {cores} cores: give {cores} or fewer"
    if 12 * settings.model.config.num_blocks * settings.model.config.d_model**2 > 1e12:
        yield "--model.config describes more than 10^12 parameters, which does not fit: give less"
    if "://" in str(trainer.default_root_dir or ""):
        yield f"--trainer.default_root_dir {trainer.default_root_dir}: give a folder of this machine"
    if trainer.profiler == "xla":
        yield "--trainer.profiler xla needs a TPU: give simple, advanced or pytorch"
    if re.search("ddp|fsdp", str(trainer.strategy), re.IGNORECASE):
        yield from _port()
    for callback in as_list(trainer.callbacks):
        yield from _callback(callback)


def _callback(callback: Any) -> Iterator[str]:
    """What is wrong with a callback a person gives to the Trainer."""
    if isinstance(callback, Namespace):
        kind = str(callback.get("class_path", "")).rpartition(".")[2]
        if kind in UNSUITABLE:
            yield f"--trainer.callbacks {kind} does not go with this project: {UNSUITABLE[kind]}"
        monitor = (callback.get("init_args") or {}).get("monitor")
        if monitor is not None and monitor not in METRICS:
            near = did_you_mean(monitor, METRICS)
            yield f"--trainer.callbacks: monitor {monitor!r} is not measured{near}; take one of {', '.join(METRICS)}"


def _port() -> Iterator[str]:
    """What is wrong with a MASTER_PORT; where none is set, the Trainer finds one."""
    port = os.environ.get("MASTER_PORT")
    if port is None or "LOCAL_RANK" in os.environ:
        return
    if not port.isdecimal() or not 0 < int(port) < 65536:
        yield f"MASTER_PORT is {port!r}: give a port from 1 to 65535, or unset it"
        return
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("", int(port)))
            place.listen()
        except OSError as error:
            yield f"MASTER_PORT {port}: {error.strerror}: give another, or unset it"


# what fit.py gives the Trainer where neither config nor flag says otherwise
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # max_steps ends a run
    "max_steps": 1000,
    "val_check_interval": 200,  # optimizer steps, also across epochs:
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,  # the preflight says it shorter
}


COMMANDS = ("fit", "validate", "test")
