"""Build what a command of scripts/fit.py works on: settings, model, data module, Trainer and callbacks.

`build_experiment` is the list of steps. `lit_gpt.cli.fit` runs the commands on the result.
"""

import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.loggers import Logger

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.budget import Budget
from lit_gpt.cli.intervals import apply_step_plan, resolve_validation_interval
from lit_gpt.cli.messages import program_name
from lit_gpt.cli.parser import StrictParser, load_settings
from lit_gpt.cli.planned import Planned
from lit_gpt.cli.run_facts import describe_start
from lit_gpt.cli.trainer import build_timer, build_trainer
from lit_gpt.cli.validation import as_list, is_externally_launched
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError, is_out_of_memory
from lit_gpt.files import atomic_write, expand_path, write_error
from lit_gpt.planning.speed import fastest_precision
from lit_gpt.runs.find import LOGS
from lit_gpt.training.advice import LearningRateAdvice
from lit_gpt.training.checkpoint_io import AtomicCheckpointIO
from lit_gpt.training.checkpointing import StepCheckpoint
from lit_gpt.training.deadline import Deadline
from lit_gpt.training.forecast import LossForecast
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.module import LitGPT
from lit_gpt.training.profiler import RunProfiler
from lit_gpt.training.progress import StepProgress
from lit_gpt.training.recorder import RunRecorder
from lit_gpt.training.samples import GenerateText
from lit_gpt.training.steps_in_time import StepsInTime
from lit_gpt.training.stop import GracefulStop
from lit_gpt.training.throughput import StepThroughput
from lit_gpt.training.validation import StartEndValidation


@dataclass
class Experiment:
    """What a command works on.

    Attributes:
        command: `fit`, `validate` or `test`.
        settings: All settings, from defaults, configs and flags.
        checkpoint: The checkpoint of `--ckpt_path`, verified; None if there is none.
        model: Its parameters are on the meta device until the Trainer configures it.
        datamodule: The data; its corpus is tokenized.
        generate: The callback that writes sample texts.
        notice: A line to print before anything else, or an empty string.
        trainer: The Trainer, with all callbacks.
        folder: The run's folder; None if the run has none.
        resumes_in_place: Whether the run continues in the folder of the checkpoint it resumes from.
        checkpointing: The callback that writes checkpoints; None if none are written.
        logger: The logger that writes to the run's folder.
        recorder: The callback that writes summary.json; None if the run has no folder.
        profiler: The callback that measures a few steps, with `--preflight`; None otherwise.
        save_config: The callback that writes config.yaml; None if the run has no folder.
        budget: The time for the command; None without `--budget`.
        steps_in_time: The callback that fixes the number of steps; None without `--budget`.
    """

    command: str
    settings: Namespace
    checkpoint: Checkpoint | None
    model: LitGPT
    datamodule: TextDataModule
    generate: GenerateText
    notice: str = ""
    trainer: Trainer = field(init=False)
    folder: Path | None = None
    resumes_in_place: bool = False
    checkpointing: StepCheckpoint | None = None
    recorder: RunRecorder | None = None
    profiler: RunProfiler | None = None
    logger: StepLogger | None = None
    save_config: "SaveConfig | None" = None
    budget: Budget | None = None
    steps_in_time: StepsInTime | None = None

    def move_to(self, folder: Path) -> None:
        """Change the run's folder, before anything is written to it. Other ranks ask rank 0 where to write."""
        self.folder = folder
        if self.checkpointing is not None:
            self.checkpointing.dirpath = str(folder)
        if self.logger is not None:
            self.logger.run_version = folder.name
        if self.recorder is not None:
            self.recorder.move_to(folder)


def build_experiment(arguments: CommandLine, stop: GracefulStop, planned: Planned | None = None) -> Experiment:
    """Parse the command line and construct everything that the command needs, without running it.

    Args:
        arguments: The command line, with the chosen settings if it has a budget.
        stop: Ends the run early.
        planned: The plan of a command with a budget.

    Raises:
        UserError: A setting is wrong.
    """
    command = arguments.args[0]
    parser, settings, checkpoint = load_settings(arguments)
    seed_everything(settings.seed_everything, workers=True)
    parts = instantiate(parser, settings)
    experiment = Experiment(command, settings, checkpoint, parts.model, parts.data, parts.generate, arguments.notice)
    if checkpoint is not None:
        parts.model.init_from = None  # the checkpoint has the weights
    if planned is not None:
        planned.check_time_left()
        stop.deadline, experiment.budget = planned.deadline(), planned.budget
        experiment.steps_in_time = planned.steps_in_time()
    options = trainer_options(experiment, parts.trainer.as_dict())
    if command == "fit":
        configure_training(experiment, options, parts, arguments, stop)
    else:  # callbacks of a config are for training; some refuse a Trainer without loggers or checkpoints
        has_no_bar = options["enable_progress_bar"] is False or options["barebones"]
        callbacks = [] if has_no_bar else [StepProgress()]
        options.update(logger=False, enable_checkpointing=False, callbacks=callbacks)
    folder = None if experiment.profiler is not None else experiment.folder
    if folder is not None:
        start = describe_start(settings, parser.flat_defaults, experiment.datamodule, arguments, folder)
        experiment.recorder = RunRecorder(start)
        options["callbacks"] += [experiment.recorder]
    options["callbacks"] += [stop]  # after the callback that saves
    if folder is not None:
        experiment.save_config = SaveConfig(parser, settings, experiment)
        options["callbacks"] += [experiment.save_config]
    experiment.trainer = stop.trainer = build_trainer(options, settings.timeout)
    if command == "fit":
        apply_step_plan(experiment.trainer, experiment.datamodule, settings.trainer)
    return experiment


# ---------------------------------------------------------------------------------------------------------- objects


def instantiate(parser: StrictParser, settings: Namespace) -> Namespace:
    """Construct the data module, the model and the callbacks; tokenize the data.

    Raises:
        UserError: The model is too large, the data cannot be read, or a constructor refuses its arguments.
    """
    refusals: list[UserError] = []  # the parser turns an error into a ValueError about all types it tried

    def construct(cls: type, *args: Any, **kwargs: Any) -> Any:
        try:
            return cls(*args, **kwargs)
        except UserError as error:
            refusals.append(error)
            raise
        except Exception as error:
            if not cls.__module__.startswith("lit_gpt."):  # the config names the class and its arguments
                refusals.append(UserError(f"{cls.__name__}: {error}"))
            raise

    try:
        return parser.instantiate(settings, instantiators=[(construct, object, True)])
    except Exception as error:
        if refusals:
            raise refusals[0] from error
        if isinstance(error, OverflowError) or is_out_of_memory(error) or "overflow" in str(error).lower():
            raise UserError(f"the model does not fit into memory ({error}): give a smaller --model.config") from error
        raise


class SaveConfig(SaveConfigCallback):
    """Write the settings to config.yaml in the run's folder, and the same text into its checkpoints.

    Settings that hold for one command only, such as the checkpoint to resume from, are left out.

    Args:
        parser: The parser of the settings.
        config: The settings.
        experiment: Knows the run's folder.

    Attributes:
        text: The settings as YAML.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, experiment: Experiment) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.experiment = experiment
        self.text = self._dump()

    def _dump(self) -> str:
        config = self.config.clone()
        for key in ("ckpt_path", "allow_data_change", "allow_imports", "preflight", "budget", "plan"):
            config.pop(key, None)
        return self.parser.dump(config, skip_unset=False)

    def update(self) -> None:
        """Write the settings as they are now."""
        self.text = self._dump()
        self._write()

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._write()

    def _write(self) -> None:
        assert self.experiment.folder is not None
        path = self.experiment.folder / "config.yaml"
        try:
            atomic_write(path, lambda file: file.write(self.text.encode("utf-8")))
        except OSError as error:
            raise write_error(path, error) from error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


# ------------------------------------------------------------------------------------------------------- the Trainer


def default_precision(accelerator: str, model: LitGPT, data: TextDataModule) -> str:
    """Return the default of `--trainer.precision`: the fastest on the device that the Trainer will choose."""
    device = "cpu" if accelerator == "cpu" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and accelerator != "cpu" and torch.backends.mps.is_available():
        device = "mps"
    return fastest_precision(model.gpt, data.batch_size, torch.device(device))


def trainer_options(experiment: Experiment, options: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the Trainer for any command.

    Args:
        experiment: The chosen precision is written to its settings, because another processor would choose another
            one. So is the chosen validation interval.
        options: The settings under `trainer`, with classes instantiated.
    """
    resolve_validation_interval(experiment.settings.trainer)
    options["val_check_interval"] = options["check_val_every_n_epoch"] = None  # `apply_step_plan` sets them
    if options["precision"] is None and not as_list(options["plugins"]):
        precision = default_precision(options["accelerator"], experiment.model, experiment.datamodule)
        options["precision"] = experiment.settings.trainer.precision = precision
    options["plugins"] = [*as_list(options["plugins"]), AtomicCheckpointIO(experiment.checkpoint)]
    if not TorchElasticEnvironment.detect() and "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
        # Lightning would save and requeue inside a signal handler; scripts/slurm.sh requeues instead
        options["plugins"] += [SLURMEnvironment(auto_requeue=False)]
    options["callbacks"] = as_list(options["callbacks"])
    return options


def configure_training(
    experiment: Experiment, options: dict[str, Any], parts: Namespace, arguments: CommandLine, stop: GracefulStop
) -> None:
    """Complete the arguments of a Trainer that trains, and `experiment`: folder, logger, callbacks and time limit.

    Args:
        experiment: Changed in place.
        options: The arguments of the Trainer, changed in place.
        parts: All settings, with classes instantiated.
        arguments: The command line.
        stop: It learns of the time limit and of the command that resumes the run.
    """
    settings = experiment.settings
    if (limit := options.pop("max_time")) is not None:
        stop.timer = build_timer(limit)
    logs, version = locate_run(settings, arguments)
    experiment.resumes_in_place = version is not None
    stop.resume_command = resume_command(arguments, settings.name, logs)
    if str(logs).startswith("~"):  # a folder called ~ here; the logger would take it for the home folder
        logs = logs.absolute()
    logger = experiment.logger = StepLogger(logs, name=settings.name, version=version)
    leaves_nothing = options["barebones"] or options["fast_dev_run"]
    if not leaves_nothing:
        experiment.folder = Path(logger.log_dir)
        parts.checkpoint.dirpath = str(experiment.folder)
        if options["enable_checkpointing"] is not False:
            experiment.checkpointing = parts.checkpoint
    if options["barebones"]:
        options["log_every_n_steps"] = 0
    if settings.preflight:
        stop.timer = None
        experiment.profiler = RunProfiler(experiment.generate, settings.validate_at_start)
        options.update(logger=False, enable_checkpointing=False, enable_progress_bar=False)
        options["callbacks"] = [experiment.profiler]
    elif options["barebones"]:
        options["logger"] = False
    else:
        options["logger"] = training_loggers(options["logger"], logger)  # the Trainer replaces them in a fast_dev_run
    if not leaves_nothing and not settings.preflight:
        options["callbacks"] = training_callbacks(experiment, parts, options, stop.deadline)
        stop.checkpointing = experiment.checkpointing


def training_loggers(given: Any, logger: StepLogger) -> list[Logger]:
    """Return the loggers of a run that trains.

    Args:
        given: `trainer.logger`: None or True for our logger, False for none, or loggers from a config, which replace
            ours. A StepLogger among them stands for ours.
        logger: Our logger, which writes to the run's folder.
    """
    if given is None or given is True:
        return [logger]
    loggers: list[Logger] = [] if given is False else as_list(given)
    return [logger if isinstance(other, StepLogger) else other for other in loggers]


def training_callbacks(
    experiment: Experiment, parts: Namespace, options: dict[str, Any], deadline: Deadline | None
) -> list[Callback]:
    """Return the callbacks of a run that trains, in the order in which Lightning calls them.

    Lightning moves checkpoint callbacks to the end. `trainer.checkpoint_callback` is the first of them, which is ours.
    """
    checkpointing: StepCheckpoint = parts.checkpoint
    given: list[Callback] = options["callbacks"]
    callbacks: list[Callback] = [] if experiment.steps_in_time is None else [experiment.steps_in_time]
    callbacks.append(StartEndValidation(experiment.settings.validate_at_start))
    if deadline is not None:
        callbacks.append(deadline)
    if experiment.checkpointing is not None:
        callbacks.append(experiment.checkpointing)
    callbacks += [*given, StepThroughput(lambda: checkpointing.save_seconds)]
    has_progress_bar = any(isinstance(callback, ProgressBar) for callback in given)
    if not has_progress_bar:
        callbacks.append(StepProgress(has_bars=options["enable_progress_bar"] is not False))
        options["enable_progress_bar"] = True  # else Lightning refuses the callback, which prints the losses too
    callbacks += [LossForecast(), LearningRateAdvice(), experiment.generate]  # after the lines with the losses
    if experiment.settings.visualize:
        from lit_gpt.training.visualize import Visualize  # imports Pillow, which few runs need

        callbacks.append(Visualize(experiment.generate.prompts, experiment.settings.attention_heads))
    if experiment.settings.early_stopping.patience is not None:
        callbacks.append(parts.early_stopping)
    return callbacks


def locate_run(settings: Namespace, arguments: CommandLine) -> tuple[Path, str | None]:
    """Return the folder of all runs, and the run's version if it continues in the folder of its checkpoint."""
    logs = expand_path(settings.trainer.default_root_dir or str(LOGS))
    checkpoint = Path(settings.ckpt_path).absolute() if settings.ckpt_path else None
    if checkpoint and checkpoint.parent.name.startswith("version_") and checkpoint.parts[-3] == settings.name:
        checkpoint_logs = checkpoint.parents[2]
        if arguments.root_dir is None or Path(arguments.root_dir).absolute() == checkpoint_logs:
            is_below = checkpoint_logs.is_relative_to(Path.cwd())
            logs = checkpoint_logs.relative_to(Path.cwd()) if is_below else checkpoint_logs
            return logs, checkpoint.parent.name
    return logs, None


def resume_command(arguments: CommandLine, name: str, logs: Path) -> str:
    """Return the command that resumes the run of this name."""
    root = [] if logs == LOGS else ["--trainer.default_root_dir", str(logs)]
    named = [f"--name={name}"] if name.startswith("-") else ["--name", name]
    words = [*arguments.resume_args, *named, *root, "--ckpt_path", "last"]
    start = (
        "start on every machine, as before: " if is_externally_launched() else f"{shlex.quote(program_name('python'))} "
    )
    return start + shlex.join([sys.argv[0], *words])
