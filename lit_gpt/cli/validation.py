"""Validate the settings of a command before anything is built.

Constructors check the values of our own classes. Checked here are the combinations of settings, and the arguments of
`lightning.pytorch.Trainer` that this project does not support.
"""

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
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.metrics import METRICS
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText

COMMANDS = ("fit", "validate", "test")

# The sections of the settings, besides `trainer`, and what is constructed from them.
CONSTRUCTORS: dict[str, Any] = {
    "data": TextDataModule.__init__,
    "model": LitGPT.__init__,
    "model.config": GPTConfig.__init__,
    "generate": GenerateText.__init__,
    "checkpoint": StepCheckpoint.__init__,
    "early_stopping": StopEarly.__init__,
}

# The arguments of the Trainer that differ from Lightning's defaults.
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # max_steps ends a run
    "max_steps": 1000,
    "val_check_interval": None,  # optimizer steps: see `resolve_validation_interval`
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,  # the text before a run contains the summary
}

# Callbacks that change batches, steps or weights in a way that the step count or the checkpoints do not include, and
# what to use instead.
UNSUPPORTED_CALLBACKS = {
    "GradientAccumulationScheduler": "give --data.global_batch_size",
    "BatchSizeFinder": "give --data.batch_size",
    "LearningRateFinder": "give --model.learning_rate",
    "StochasticWeightAveraging": "the averaged weights are in no checkpoint",
    "ModelPruning": "checkpoints do not say which weights were pruned",
    "BackboneFinetuning": "the model has no backbone",
    "OnExceptionCheckpoint": "last.ckpt is written on an exception already",
    "Timer": "give --trainer.max_time",
}


def as_list(value: Any) -> list[Any]:
    """Return the value of a setting that takes one item, a list of items, or None for no item."""
    return [] if value is None else value if isinstance(value, list) else [value]


def is_externally_launched() -> bool:
    """Return whether torchrun or SLURM started this process as one of several."""
    return bool({"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys())


def check_run_name(name: Any) -> str:
    """Return the name of a run, which is also the name of a folder.

    Raises:
        UserError: The name has other characters than letters, digits and `._-`, or the wrong length.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: use only letters, digits and ._-, at most 100 of them")
    return name


def check_not_null(settings: Namespace) -> None:
    """Check that no setting is null whose type does not include None. The parser does not check this.

    Raises:
        UserError: A setting is null.
    """
    for name in (
        *("seed_everything", "name", "timeout", "validate_at_start", "visualize"),
        *("allow_data_change", "preflight", "plan"),
    ):
        if settings[name] is None:
            raise UserError(f"--{name} null: give a value, or leave it out")
    for section, constructor in CONSTRUCTORS.items():
        values = settings.get(section)
        if not isinstance(values, Namespace):
            raise UserError(f"{section} {values}: give its settings, or leave it out")
        for name, annotation in get_type_hints(constructor).items():
            if name in values and values[name] is None and type(None) not in (annotation, *get_args(annotation)):
                raise UserError(f"--{section}.{name} null: give a value, or leave it out")
    for name, parameter in inspect.signature(Trainer.__init__).parameters.items():
        nullable = None in (parameter.default, TRAINER_DEFAULTS.get(name, parameter.default))
        if name in settings.trainer and settings.trainer[name] is None and not nullable:
            raise UserError(f"--trainer.{name} null: give a value, or leave it out")


def check_values(settings: Namespace) -> None:
    """Check that numbers are finite and fit into 64 bits, and that texts are UTF-8 without NUL. The parser accepts all.

    The names of files are checked when the files are looked for.

    Raises:
        UserError: A value is not so.
    """
    for key, value in settings.items():
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int) and abs(item) >= 2**63:
                raise UserError(f"--{key} is a number of more than 64 bits: give a smaller one")
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"--{key} is {item}: give a finite number")
            if isinstance(item, str) and "\0" in item:
                raise UserError(f"--{key} contains a NUL character: remove it")
            if isinstance(item, str) and not key.endswith("files") and re.search("[\ud800-\udfff]", item):
                raise UserError(f"--{key} {item!r} is not text in UTF-8: set the terminal to UTF-8")


def validate_args(settings: Namespace, command: str) -> Iterator[str]:
    """Yield the errors in settings that are of the right type one by one, in the order in which to report them.

    Args:
        settings: of the command, as the parser returns them.
        command: one of COMMANDS.
    """
    yield from _command_errors(settings, command)
    yield from _batch_errors(settings)
    yield from _interval_errors(settings)
    yield from _precision_errors(settings, command)
    yield from _device_errors(settings)
    if 12 * settings.model.config.num_blocks * settings.model.config.d_model**2 > 1e12:
        yield "--model.config gives more than 10^12 parameters, which does not fit into memory: give smaller numbers"
    if "://" in str(settings.trainer.default_root_dir or ""):
        yield f"--trainer.default_root_dir {settings.trainer.default_root_dir}: give a folder on this machine"
    if settings.trainer.profiler == "xla":
        yield "--trainer.profiler xla needs a TPU: give simple, advanced or pytorch"
    for callback in as_list(settings.trainer.callbacks):
        yield from _callback_errors(callback)
    for logger in as_list(settings.trainer.logger):
        yield from _logger_errors(logger)


def _command_errors(settings: Namespace, command: str) -> Iterator[str]:
    """Yield errors in the settings that a command needs or does not allow."""
    trainer, data = settings.trainer, settings.data
    if command != "fit" and not (settings.ckpt_path or settings.model.init_from):
        yield f"{command} needs a checkpoint: give --ckpt_path logs/<name>/version_<n>/best.ckpt"
    if command == "test" and not (data.test_fraction or data.test_files or data.split_column):
        yield "there is no test split: give --data.test_fraction, --data.test_files or --data.split_column"
    limit = {"validate": "limit_val_batches", "test": "limit_test_batches"}.get(command)
    if limit is not None and trainer[limit] == 0:
        yield f"--trainer.{limit} 0: {command} would evaluate nothing, leave it out"
    if settings.preflight and command != "fit":
        yield f"--preflight measures a training run: leave out --preflight or {command}"
    if settings.plan and settings.budget is None:
        yield "--plan shows what is chosen for a time: give --budget too, as --budget 10m --plan"
    if settings.preflight and trainer.fast_dev_run:
        yield "--preflight and --trainer.fast_dev_run do not go together: leave one out"


def _batch_errors(settings: Namespace) -> Iterator[str]:
    """Yield errors in the number of batches and in how they make up an optimizer step."""
    trainer, data = settings.trainer, settings.data
    accumulation = trainer.accumulate_grad_batches
    if accumulation < 1:
        yield f"--trainer.accumulate_grad_batches is {accumulation}: give 1 or more"
    if data.global_batch_size is not None and accumulation != 1:
        yield (
            f"--trainer.accumulate_grad_batches {accumulation} follows from --data.global_batch_size "
            f"{data.global_batch_size}: give only one of them"
        )


def _interval_errors(settings: Namespace) -> Iterator[str]:
    """Yield errors in when a run validates, logs and ends."""
    trainer, interval = settings.trainer, settings.trainer.val_check_interval
    epochs = trainer.check_val_every_n_epoch
    is_number = interval is None or isinstance(interval, int | float)
    if not is_number or (interval is not None and interval <= 0) or (isinstance(interval, float) and interval > 1):
        yield (  # after a time, a resumed run would validate at other steps
            f"--trainer.val_check_interval {interval}: give optimizer steps, as 250, or a part of an epoch, as 0.5"
        )
    if epochs is not None and epochs < 1:
        yield f"--trainer.check_val_every_n_epoch is {epochs}: give 1 or more"
    if epochs is not None and interval is not None and not (isinstance(interval, float) and 1 in (epochs, interval)):
        yield (
            f"--trainer.check_val_every_n_epoch {epochs} counts epochs, and --trainer.val_check_interval {interval} "
            "optimizer steps or a part of an epoch: give one of them, and null for the other"
        )
    if trainer.limit_val_batches == 0 and settings.early_stopping.patience is not None:
        yield "--early_stopping.patience counts validations, but --trainer.limit_val_batches 0 turns them off"
    if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
        yield f"--trainer.log_every_n_steps is {trainer.log_every_n_steps}: give 0 (never) or more"
    if trainer.min_steps is not None and 0 <= trainer.max_steps < trainer.min_steps:
        yield f"--trainer.min_steps {trainer.min_steps} is more than max_steps {trainer.max_steps}: give fewer"


def _precision_errors(settings: Namespace, command: str) -> Iterator[str]:
    """Yield errors in the precision and in the size of gradients."""
    trainer = settings.trainer
    if "FSDP2" in str(trainer.strategy) and str(trainer.precision) in ("64", "64-true", "16", "16-mixed"):
        yield f"--trainer.precision {trainer.precision} does not work with FSDP2: give 32-true, bf16-mixed or bf16-true"
    if command == "fit" and trainer.precision == "16-true":
        yield "--trainer.precision 16-true: squares of gradients exceed float16's range: give bf16-true or 16-mixed"
    if trainer.gradient_clip_val is not None and not 0 <= trainer.gradient_clip_val < math.inf:
        yield f"--trainer.gradient_clip_val is {trainer.gradient_clip_val:g}: give 0 (off) or more"


def _device_errors(settings: Namespace) -> Iterator[str]:
    """Yield errors in devices, processes and how they are started."""
    trainer, workers, cores = settings.trainer, settings.data.num_workers, os.cpu_count() or 1
    if re.search("spawn|fork|notebook", str(trainer.strategy)):
        yield f"--trainer.strategy {trainer.strategy} is for notebooks: give ddp"
    strategy = trainer.strategy.get("class_path", "") if isinstance(trainer.strategy, Namespace) else trainer.strategy
    if re.search("^fsdp|FSDPStrategy$", str(strategy)):
        yield (
            f"--trainer.strategy {strategy} is FSDP1, which cannot clip gradients by their norm: give "
            "--config configs/fsdp.yaml, which is FSDP2"
        )
    if not 1 <= settings.timeout <= 86_400:
        yield f"--timeout {settings.timeout}: give seconds, from 1 to 86400"
    if trainer.num_nodes > 1 and not is_externally_launched():
        yield f"--trainer.num_nodes {trainer.num_nodes}: start the command on each node, with torchrun or srun"
    if trainer.accelerator == "cpu" and str(trainer.devices).isdecimal() and int(trainer.devices) > 4 * cores:
        yield f"--trainer.devices {trainer.devices} on {cores} cores: give {cores} or fewer"
    if workers > 8 * cores:
        yield f"--data.num_workers {workers} on {cores} cores: give {cores} or fewer"
    address = os.environ.get("MASTER_ADDR", "localhost")
    if not re.fullmatch(r"[\w.:%-]+", address):
        yield f"MASTER_ADDR is {address!r}: give the name or the address of the first machine, or unset it"
    has_several_devices = trainer.strategy == "auto" and str(trainer.devices) not in ("auto", "1")
    if has_several_devices or re.search("ddp|fsdp", str(trainer.strategy), re.IGNORECASE):
        yield from _port_errors()


def _port_errors() -> Iterator[str]:
    """Yield an error if MASTER_PORT is set and the first process cannot listen on it."""
    port = os.environ.get("MASTER_PORT")
    if port is None or "LOCAL_RANK" in os.environ:
        return
    if not port.isdecimal() or not 0 < int(port) < 65536:
        yield f"MASTER_PORT is {port!r}: give a port from 1 to 65535, or unset it"
        return
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("", int(port)))
            server.listen()
        except OSError as error:
            yield f"MASTER_PORT {port}: {error.strerror}: give another port, or unset it"


def _callback_errors(callback: Any) -> Iterator[str]:
    """Yield errors in one of `trainer.callbacks`."""
    if not isinstance(callback, Namespace):
        return
    name = str(callback.get("class_path", "")).rpartition(".")[2]
    if name in UNSUPPORTED_CALLBACKS:
        yield f"--trainer.callbacks {name} is not supported: {UNSUPPORTED_CALLBACKS[name]}"
    monitor = (callback.get("init_args") or {}).get("monitor")
    if monitor is not None and monitor not in METRICS:
        hint = did_you_mean(monitor, METRICS)
        yield f"--trainer.callbacks: no metric is called {monitor!r}{hint}: give one of {', '.join(METRICS)}"


def _logger_errors(logger: Any) -> Iterator[str]:
    """Yield an error if a StepLogger in a config has arguments, which the run's folder decides."""
    if not isinstance(logger, Namespace) or not str(logger.get("class_path", "")).endswith(".StepLogger"):
        return
    defaults = inspect.signature(StepLogger).parameters
    for name, value in (logger.get("init_args") or Namespace()).items():
        if value != defaults[name].default:
            yield (
                f"--trainer.logger StepLogger: {name} {value} follows from --name and --trainer.default_root_dir: "
                "leave it out"
            )
