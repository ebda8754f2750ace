"""The commands of scripts/fit.py: `fit`, `validate` and `test`."""

import contextlib
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_gpt.checkpoint.store import REMEDY, Checkpoint
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.budget import find_budget
from lit_gpt.cli.config_values import flatten
from lit_gpt.cli.experiment import Experiment, build_experiment
from lit_gpt.cli.messages import print_command, print_lines, program_name
from lit_gpt.cli.planned import choose_settings, print_explicit_command, print_plan
from lit_gpt.cli.preflight import describe_run, estimate_run_memory
from lit_gpt.cli.resume import (
    check_same_callbacks,
    check_same_data,
    check_same_model,
    check_same_optimizer,
    describe_resume,
)
from lit_gpt.cli.validation import TRAINER_DEFAULTS
from lit_gpt.compat import is_restoring
from lit_gpt.data.datamodule import fingerprint
from lit_gpt.device import free_memory
from lit_gpt.errors import UserError, is_out_of_memory
from lit_gpt.figures import format_duration
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.runs.report import REPORT_FILE
from lit_gpt.training.advice import LearningRateAdvice
from lit_gpt.training.checkpointing import StopEarly
from lit_gpt.training.checks import check_float8, check_schedule
from lit_gpt.training.logger import StepLogger, step_logger
from lit_gpt.training.stop import GracefulStop


def run(arguments: CommandLine, stop: GracefulStop, start: float) -> None:
    """Run the command that the command line names.

    Args:
        arguments: The command line.
        stop: Ends the run early.
        start: When the command began, as time.perf_counter().

    Raises:
        UserError: A setting, a file or a checkpoint is wrong.
        Stopped: A signal or the time limit ended the run.
    """
    budget, planned = find_budget(arguments, start), None
    if budget is not None:
        planned = choose_settings(arguments, budget)
        print_plan(planned.plan)
        if planned.is_all:
            print_explicit_command(arguments)
            return
    experiment = build_experiment(arguments, stop, planned)
    RUN_COMMAND[experiment.command](experiment, stop)


def fit(experiment: Experiment, stop: GracefulStop) -> None:
    """Train the model, from its initial weights or from a checkpoint; or measure a few steps, with `--preflight`."""
    checkpoint = experiment.checkpoint
    if checkpoint is not None:
        check_same_model(checkpoint, experiment.model, experiment.datamodule.tokenizer)
        check_same_optimizer(checkpoint, experiment.model)
        check_same_callbacks(checkpoint, experiment.trainer)
        if not experiment.settings.allow_data_change:
            check_same_data(checkpoint, experiment.datamodule)
    check_steps(experiment)
    check_float8(experiment.model.gpt, experiment.trainer.strategy.root_device)
    check_prompts(experiment)
    if experiment.trainer.is_global_zero:
        claim_folder(experiment, checkpoint, stop)
        print_start(experiment, checkpoint)
        log_settings(experiment)
        if experiment.steps_in_time is not None:
            experiment.steps_in_time.on_change = lambda steps: save_steps(experiment, stop, steps)
    if experiment.profiler is not None:
        profile(experiment, checkpoint)
    else:
        train(experiment, stop)
    if experiment.trainer.is_global_zero:
        print_end(experiment)


def validate(experiment: Experiment, stop: GracefulStop) -> None:
    """Print the metrics of a checkpoint on the validation split."""
    evaluate(experiment, experiment.trainer.validate)


def evaluate(experiment: Experiment, run: Callable[..., object]) -> None:
    """Run a validation or a test of the checkpoint, or of the model of `--model.init_from`, and print its metrics."""
    checkpoint = experiment.checkpoint
    if checkpoint is not None:
        check_same_model(checkpoint, experiment.model, experiment.datamodule.tokenizer)
    print_checkpoint(experiment)
    if checkpoint is not None and experiment.command == "test":
        warn_of_other_split(experiment, checkpoint)
    path = None if checkpoint is None else checkpoint.path
    with misconfiguration_as_user_error(), restore_error_as_user_error(checkpoint):
        run(experiment.model, datamodule=experiment.datamodule, ckpt_path=path, verbose=False)
    print_metrics(experiment)


def test(experiment: Experiment, stop: GracefulStop) -> None:
    """Print the metrics of a checkpoint on the test split."""
    datamodule = experiment.datamodule
    if len(datamodule.test_ids) < 2:
        raise UserError(
            f"the test split has {len(datamodule.test_ids)} tokens, of which none can be predicted: give more "
            "with --data.test_fraction, --data.test_files or --data.split_column"
        )
    evaluate(experiment, experiment.trainer.test)


def warn_of_other_split(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """Warn if the training split is another one than that of the checkpoint."""
    saved, tokens = checkpoint.data_fingerprint["train tokens"], fingerprint(experiment.datamodule)["train tokens"]
    if saved != tokens and experiment.trainer.is_global_zero:
        print_lines(
            f"warning     the checkpoint was trained on {saved:,} tokens, and this split has {tokens:,} "
            "training tokens: the test text may have been trained on; give the split of the training"
        )


RUN_COMMAND: dict[str, Callable[[Experiment, GracefulStop], None]] = {"fit": fit, "validate": validate, "test": test}


# --------------------------------------------------------------------------------------------------- before training


def check_steps(experiment: Experiment) -> None:
    """Check that there is a step to train, a last step if the schedule needs one, and none required after it.

    Raises:
        UserError: There is not.
    """
    plan, min_epochs = experiment.datamodule.plan, experiment.settings.trainer.min_epochs
    check_schedule(experiment.model.hparams["schedule"], plan.last_step)
    if plan.last_step == 0:
        raise UserError("--trainer.max_steps 0, or max_epochs 0, trains nothing: give 1 or more")
    if plan.last_step is not None and min_epochs is not None and min_epochs * plan.steps_per_epoch > plan.last_step:
        raise UserError(
            f"--trainer.min_epochs {min_epochs} of {plan.steps_per_epoch:,} steps is more than the {plan.last_step:,} "
            "steps of the run: give fewer, or more --trainer.max_steps"
        )


def check_prompts(experiment: Experiment) -> None:
    """Check that every prompt of `--generate.prompts` can be tokenized, before training starts.

    Raises:
        UserError: A prompt has a character that the tokenizer does not know.
    """
    datamodule = experiment.datamodule
    for prompt in experiment.generate.prompts:
        encode_prompt(datamodule.tokenizer, prompt, mode=datamodule.corpus_config.read_options.mode)


def claim_folder(experiment: Experiment, checkpoint: Checkpoint | None, stop: GracefulStop) -> None:
    """Create the run's folder, or repair the one that is resumed, and keep other processes out of it.

    Raises:
        UserError: It cannot be created or written to, or another process trains in it.
    """
    if experiment.folder is None or experiment.profiler is not None:
        return
    experiment.move_to(stop.run_folder.create_and_lock(experiment.folder, is_new=not experiment.resumes_in_place))
    if experiment.checkpointing is not None and experiment.resumes_in_place and checkpoint is not None:
        experiment.checkpointing.restore_copies(checkpoint)


def print_start(experiment: Experiment, checkpoint: Checkpoint | None) -> None:
    """Print what is about to be trained, what it needs, and from where it resumes."""
    if experiment.notice:
        print_lines(experiment.notice)
    print_lines(
        *describe_run(
            experiment.trainer,
            experiment.model,
            experiment.datamodule,
            experiment.folder,
            experiment.checkpointing,
        )
    )
    if checkpoint is not None:
        print_lines(*describe_resume(experiment, checkpoint))
    elif experiment.settings.model.init_from is not None:
        print_lines(f"starts from {experiment.settings.model.init_from}: its weights, its shape, its tokenizer")
    print_lines(*describe_visualize(experiment))


def describe_visualize(experiment: Experiment) -> list[str]:
    """Return the line that says what `--visualize true` cannot show in this run, if there is anything."""
    if not experiment.settings.visualize or experiment.profiler is not None:  # which measures without a logger
        return []
    if step_logger(experiment.trainer) is None:
        return ["visualize   nothing: this run has no StepLogger, which writes the pictures for TensorBoard"]
    if isinstance(experiment.trainer.strategy, ModelParallelStrategy):
        shown = "next tokens and loss by position only"
        return [f"visualize   {shown}: no device has whole weights, as the rest needs"]
    return []


def log_settings(experiment: Experiment) -> None:
    """Log the settings of a new run: all of them with the loggers of a config, `main_settings` with ours.

    Raises:
        UserError: A logger cannot write its files.
    """
    if experiment.resumes_in_place:
        return
    settings = experiment.settings.as_dict()
    params = flatten({key: settings[key] for key in ("seed_everything", "data", "model", "trainer")})
    for logger in experiment.trainer.loggers:
        try:
            logger.log_hyperparams(main_settings(experiment) if isinstance(logger, StepLogger) else params)
        except OSError as error:
            raise UserError(f"{type(logger).__name__}: {error}") from error


def save_steps(experiment: Experiment, stop: GracefulStop, steps: int) -> None:
    """Save the number of steps of a run with a budget, which has changed, wherever its settings are saved."""
    planned = experiment.settings.trainer.max_steps
    experiment.settings.trainer.max_steps = steps
    stop.resume_command = stop.resume_command.replace(f"--trainer.max_steps={planned}", f"--trainer.max_steps={steps}")
    if experiment.recorder is not None:
        summary = experiment.recorder.summary
        summary.settings["trainer.max_steps"] = steps
        summary.defaults.pop("trainer.max_steps", None)  # holds the defaults of settings that differ from them
        if steps != (default := TRAINER_DEFAULTS["max_steps"]):
            summary.defaults["trainer.max_steps"] = default
    if experiment.save_config is not None:
        experiment.save_config.update()
    for logger in experiment.trainer.loggers:
        if not isinstance(logger, StepLogger):
            logger.log_hyperparams({"trainer.max_steps": steps})
    if experiment.checkpointing is not None:  # a run that is killed resumes with this number
        experiment.checkpointing.save_last_step(experiment.trainer)


def main_settings(experiment: Experiment) -> dict[str, str | float]:
    """Return the settings that people vary between runs, under short names, for the columns of a table."""
    model, data = experiment.model, experiment.datamodule
    config, hparams = model.gpt.config, model.hparams
    settings: dict[str, str | float] = {
        "context": config.context_length,
        "width": config.d_model,
        "blocks": config.num_blocks,
        "heads": config.num_heads,
        "dropout": config.dropout,
        "parameters (M)": sum(p.numel() for p in model.parameters()) / 1e6,
        "tokenizer": data.corpus_config.tokenizer_name,
        "vocabulary": data.model_vocab_size,
        "batch": data.plan.windows_per_step,
        "optimizer": hparams["optimizer"],
        "learning rate": hparams["learning_rate"],
        "seed": experiment.settings.seed_everything,
    }
    if data.plan.last_step is not None and experiment.steps_in_time is None:  # which may change it
        settings["steps"] = data.plan.last_step
    return settings


# ---------------------------------------------------------------------------------------------------------- training


@contextlib.contextmanager
def misconfiguration_as_user_error() -> Iterator[None]:
    """Turn Lightning's error for arguments that do not work into a `UserError`."""
    try:
        yield
    except MisconfigurationException as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def restore_error_as_user_error(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Turn what is raised where the Trainer restores its state from a damaged checkpoint into a `UserError`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if checkpoint is None or isinstance(error, UserError) or is_out_of_memory(error):
            raise
        if not is_restoring(error):  # a bug
            raise
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{checkpoint.path} cannot be resumed ({reason}): {REMEDY}") from error


def train(experiment: Experiment, stop: GracefulStop) -> None:
    """Train to the end.

    Raises:
        UserError: Before the first step, the Trainer refuses a setting, a part from a config cannot use a file or a
            package, or the model does not fit into memory.
    """
    try:
        with restore_error_as_user_error(experiment.checkpoint):
            experiment.trainer.fit(
                experiment.model, datamodule=experiment.datamodule, ckpt_path=experiment.settings.ckpt_path
            )
    except Exception as error:
        if not stop.started and isinstance(error, MisconfigurationException):
            raise UserError(str(error)) from error
        if not stop.started and is_out_of_memory(error):
            reason = str(error) or type(error).__name__
            raise UserError(f"the model does not fit into memory ({reason}): give a smaller --model.config") from error
        if not stop.started and isinstance(error, OSError | ImportError):
            name = failed_part(error, experiment.trainer)
            if name is not None:
                raise UserError(f"{name}: {error}") from error
        raise


def failed_part(error: Exception, trainer: Trainer) -> str | None:
    """Return the class of the callback, logger, profiler or plugin from a config in which an error was raised.

    The config names the class and its arguments, for example a folder that cannot be written. None: it was raised
    elsewhere.
    """
    parts = [*trainer.callbacks, *trainer.loggers, trainer.profiler]  # type: ignore[attr-defined]
    given = {id(part) for part in parts if not type(part).__module__.startswith("lit_gpt.")}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if id(owner) in given:
            return type(owner).__name__
    return None


def profile(experiment: Experiment, checkpoint: Checkpoint | None) -> None:
    """Run the steps that the profiler measures. Nothing is run if not even one window fits into memory."""
    profiler, trainer = experiment.profiler, experiment.trainer
    assert profiler is not None
    free = free_memory(trainer.strategy.root_device)
    if free is not None and sum(estimate_run_memory(trainer, experiment.model, 1)) > free:
        return
    if checkpoint is not None:
        profiler.completed_steps = checkpoint.step
    try:
        with misconfiguration_as_user_error():
            # without the checkpoint, because speed and memory do not depend on the values of the weights
            trainer.fit(experiment.model, datamodule=experiment.datamodule)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        profiler.handle_out_of_memory(trainer)


# ----------------------------------------------------------------------------------------------------- after training


def print_end(experiment: Experiment) -> None:
    """Print why the run ended, advice that still holds, its checkpoints, and the commands to continue with."""
    if experiment.profiler is not None:
        print_lines(*experiment.profiler.report())
        return
    trainer = experiment.trainer
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, StopEarly) and callback.is_exhausted:
            print_lines(f"stopped     at step {trainer.global_step:,}, {callback.reason(callback.wait_count)}")
        if isinstance(callback, LearningRateAdvice) and callback.holds:
            print_lines(f"advice      {callback.given}")
    if experiment.budget is not None:
        print_lines(f"time        {format_duration(experiment.budget.used)} of --budget {experiment.budget.text}")
    if experiment.folder is not None:
        last, best = experiment.folder / "last.ckpt", experiment.folder / "best.ckpt"
        with contextlib.suppress(UserError, KeyError):  # there may be none
            state = Checkpoint.open(best, verify=False).callbacks["StepCheckpoint"]
            print_lines(f"best        {best}   loss/val {state['best_loss']:.4f} at step {state['best_step']:,}")
            first_loss = None if experiment.recorder is None else experiment.recorder.first_loss
            if experiment.model.hparams["init_from"] and first_loss is not None and first_loss < state["best_loss"]:
                print_lines(
                    f"warning     loss/val was lower before training, {first_loss:.4f}: give a lower "
                    "--model.learning_rate"
                )
        if last.exists():
            print_lines(f"last        {last}")
        if experiment.recorder is not None and experiment.recorder.problem:
            print_lines(f"warning     {experiment.recorder.problem}")
        elif (report := experiment.folder / REPORT_FILE).exists():
            print_lines(f"report      {report}")
        if last.exists():
            program = [program_name("python")], [str(Path(sys.argv[0]).with_name("generate.py"))]
            print_command("more text", *program, ["--ckpt_path", str(best if best.exists() else last)])
        if step_logger(trainer) is not None:
            print_command("curves", [program_name("tensorboard")], ["--logdir", str(experiment.folder.parents[1])])


def print_checkpoint(experiment: Experiment) -> None:
    """Print which checkpoint is evaluated."""
    if experiment.trainer.is_global_zero and experiment.checkpoint is not None:
        print_lines(f"checkpoint  {experiment.checkpoint.path}, step {experiment.checkpoint.step:,}")
    elif experiment.trainer.is_global_zero:
        print_lines(f"model       {experiment.settings.model.init_from}")


def print_metrics(experiment: Experiment) -> None:
    """Print every metric of a validation or a test, and what to compare its loss with."""
    vocab_size = experiment.model.gpt.config.vocab_size
    uniform = f"   nats; a uniform guess has ln({vocab_size:,}) = {math.log(vocab_size):.4f}"
    if experiment.trainer.is_global_zero:
        for name, value in sorted(experiment.trainer.callback_metrics.items()):
            print_lines(f"{name:20} {value:.4f}{uniform if name in ('loss/val', 'loss/test') else ''}")
