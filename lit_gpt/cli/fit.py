"""The command line of scripts/fit.py: what is built of its flags, what a person is told, how it ends."""

import contextlib
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ActionYesNo, Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.profilers import PassThroughProfiler

from lit_gpt import compat
from lit_gpt.checkpoint.store import open_checkpoint
from lit_gpt.cli.arguments import LOGS, CommandLine, StrictParser, rewrite_parser_error
from lit_gpt.cli.preflight import preflight
from lit_gpt.cli.validation import (
    TRAINER_DEFAULTS,
    as_list,
    check_not_null,
    check_run_name,
    is_externally_launched,
    validate_args,
)
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.device import available_cores, configure_malloc, free_memory, supports_bfloat16
from lit_gpt.errors import Stopped, UserError
from lit_gpt.files import atomic_write, write_error
from lit_gpt.inference.generate import encode_prompt
from lit_gpt.model import GPTConfig
from lit_gpt.optim import parameter_groups
from lit_gpt.tokenizer import from_state
from lit_gpt.training.checkpointing import AtomicCheckpointIO, StepCheckpoint, StopEarly
from lit_gpt.training.logger import StepLogger
from lit_gpt.training.memory import estimate_memory
from lit_gpt.training.module import LitGPT
from lit_gpt.training.profiler import RunProfiler
from lit_gpt.training.progress import StepProgress
from lit_gpt.training.samples import GenerateText
from lit_gpt.training.stop import GracefulStop, global_rank, is_distributed_failure
from lit_gpt.training.throughput import Throughput, flops_per_token


def tool(name: str) -> str:
    """How to call a program of this Python's environment from here: by name where that finds it."""
    program = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(program):
        return name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def main(default_config: Path) -> int:
    """Runs the command line; returns the exit status.

    2 is for what a person can mend, said in one line; 130 and 143 for Ctrl-C and SIGTERM.
    """
    quiet_lightning()
    configure_malloc()
    stop = GracefulStop()
    try:
        return _run(stop, default_config)
    finally:
        stop.clean_up()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # whose threads may abort a process that just ends


def _run(stop: GracefulStop, default_config: Path) -> int:
    try:
        with stop.signals.listen(), quiet_writer():
            arguments = CommandLine(sys.argv[1:], default_config)
            sys.argv[1:] = arguments.args  # what processes for other devices are started with
            FitCLI(arguments, stop)
    except Stopped as stopped:
        return _leave(stopped.status, str(stopped))
    except BrokenPipeError:  # whoever was reading has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except Exception as error:
        first = stop.signals.raised or _stopped_before(error)
        if first is not None:  # what it interrupted fell over it
            return _leave(first.status, str(first))
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        if isinstance(error, UserError):
            return _leave(2, f"error: {error}{notes}")
        if is_distributed_failure(error):
            reason = re.sub(r"^\[[^]]*\] ?", "", str(error)).split("\n")[0].split(". ")[0][:200]
            if stop.started:
                lost = f"another process of the run is gone or out of reach ({reason}){notes}"
                lost += f"; resume it with: {stop.resume_command}"
            else:
                lost = f"not all processes of the run came, or one is gone ({reason}): see what it says, and start all"
            _leave_alone(stop, f"rank {global_rank()}: {lost}")
        if stop.started:
            if torch.distributed.is_initialized():
                _leave_alone(stop, "".join(traceback.format_exception(error)).strip())
            raise
        if global_rank() != 0:  # which the others may not know
            _leave_alone(stop, f"rank {global_rank()}: {_said(error)}")
        return _leave(2, f"error: {_said(error)}{notes}")
    return 0


def _stopped_before(error: BaseException | None) -> Stopped | None:
    """What ended the run in good order before `error` came, in clearing up after it."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def _leave_alone(stop: GracefulStop, message: str) -> NoReturn:
    """Ends this process of several with status 1, without what would wait for others that may never come."""
    os.write(2, f"{message}\n".encode(errors="replace"))  # in one piece, where others write too
    sys.stdout.flush()
    stop.kill_child_processes()
    stop.clean_up()
    os._exit(1)


def _said(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}: give another place, or yourself the right to it"
    if isinstance(error, UserError | ValueError | OSError | ImportError | MisconfigurationException | MemoryError):
        return str(error)
    # before the first step it is most often a flag nobody foresaw; if it is a bug, this is where
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name} line {frame.lineno}"
    return f"{type(error).__name__}: {error} ({place}): change the flag it is about"


def _leave(status: int, message: str) -> int:
    """Says `message` in one line, once; returns the status of this process.

    What ends a run in good order is known to all its processes: the first speaks, and the others end with 0, so that
    Lightning, which kills the first where another has failed, lets it. Until they have met, the first on each machine
    speaks.
    """
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    if global_rank() != 0 and (local_rank != "0" or torch.distributed.is_initialized()):
        return 0
    print(" ".join(message.split()), file=sys.stderr)
    return status


@contextlib.contextmanager
def quiet_writer() -> Iterator[None]:
    """Leaves it to the logger to say once that curves cannot be written: TensorBoard's thread would add a traceback."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def quiet_lightning() -> None:
    """Leaves Lightning its warnings; what it announces, the preflight says."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "You're resuming from a checkpoint that ended before the epoch ended",  # our sampler goes on from the step
        "The number of training batches",  # is smaller than the logging interval: we count across epochs
        "Be aware that when using `ckpt_path`",  # a validation has no use for the state of what only trains
        "The '.*_dataloader' does not have many workers",  # one process prepares a batch in a third of a millisecond
        "It is recommended to use `self.log",  # with sync_dist: what we log is equal on all devices already
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 calls what torch has renamed
    ):
        warnings.filterwarnings("ignore", message=message)


def share_cores(processes: int) -> None:
    """Give each process of this machine an equal share of the cores, unless OMP_NUM_THREADS is set; they inherit it."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, available_cores() // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


TIMEOUT = 300  # seconds: in which a disk of 50 MB/s takes a checkpoint of 15 GB, while the other ranks wait

PAYS = 5e8  # operations in a forward and its backward, above which bfloat16 on a CPU is worth its casts


def fastest_precision(accelerator: str, model: LitGPT, data: TextDataModule) -> str:
    """What `--trainer.precision` is where nobody says: bfloat16 where the processor multiplies in it and it pays."""
    device = "cpu" if accelerator == "cpu" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and accelerator != "cpu" and torch.backends.mps.is_available():
        device = "mps"
    pays = device != "cpu" or flops_per_token(model) * data.batch_size * data.context_length > PAYS
    return "bf16-mixed" if supports_bfloat16(torch.device(device)) and pays else "32-true"


class Unwatched(PassThroughProfiler):
    """Lightning's profiler for those who want none, without its fifty generators a step."""

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml, and the same text into its checkpoints, without the checkpoint it came from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = Path()  # of the run; the command line sets it
        config = self.config.clone()
        for once in ("ckpt_path", "allow_data_change", "preflight"):  # said for one command
            config.pop(once, None)
        self.text: str = self.parser.dump(config, skip_unset=False)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        path = self.folder / "config.yaml"
        try:
            atomic_write(path, lambda file: file.write(self.text.encode("utf-8")))
        except OSError as error:
            raise write_error(path, error) from error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


def on_meta(*args: Any, **kwargs: Any) -> LitGPT:
    with torch.device("meta"):  # the weights come when it is known on which devices they lie
        return LitGPT(*args, **kwargs)


on_meta.__doc__ = LitGPT.__doc__  # which --help shows


class FitCLI(LightningCLI):
    """`fit`, `validate` and `test` of LitGPT on TextDataModule."""

    def __init__(self, arguments: CommandLine, stop: GracefulStop) -> None:
        self.arguments, self.stop = arguments, stop
        self.folder = Path()
        self.resumes_here = False  # in the folder its checkpoint lies in
        self.saves: StepCheckpoint | None = None  # what saves the run
        self.profiler: RunProfiler | None = None  # the run that is only tried
        super().__init__(
            on_meta,
            TextDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=StrictParser,
            args=arguments.args,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        dataloaders = {"model", "datamodule", "weights_only", "train_dataloaders", "val_dataloaders", "dataloaders"}
        return {"fit": dataloaders, "validate": dataloaders | {"verbose"}, "test": dataloaders | {"verbose"}}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != self.arguments.args[0]:  # its flags would take as long as those of the one that is meant
            return self.init_parser(**kwargs)
        return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name",
            type=str,
            default=self.arguments.run_name,
            help="The run's folder under logs/ (letters, digits, ._-).",
        )
        parser.add_argument(
            "--allow_data_change", type=bool, default=False, help="Resume on another text or split than before."
        )
        parser.add_argument(
            "--preflight",
            action=ActionYesNo,
            nargs="?",
            default=False,
            help="Measure a few steps, say what the run will need, and leave nothing behind.",
        )
        parser.add_argument(
            "--timeout",
            type=int,
            default=TIMEOUT,
            help="Seconds a process waits for the others of its run; longer than a checkpoint takes to be written.",
        )
        parser.add_lightning_class_args(StopEarly, "early_stopping")
        parser.add_lightning_class_args(GenerateText, "generate")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.link_arguments("model.config.context_length", "data.context_length")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.model_vocab_size", "model.config.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if self.arguments.checkpoint_config is not None:
                config = Path(folder, "config.yaml")
                config.write_text(self.arguments.checkpoint_config, encoding="utf-8")
                args = [args[0], f"--config={config}", *args[1:]]
            try:
                self.config = parser.parse_args(args)
            except UserError as error:
                flags = [flag.lstrip("-") for flag in self._subcommand_parsers[args[0]]._option_string_actions]
                raise UserError(rewrite_parser_error(str(error), flags)) from None

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyperparameters override flags; here flags win."""

    def before_instantiate_classes(self) -> None:
        assert self.subcommand is not None
        settings = self.config[self.subcommand]
        check_run_name(settings.name)
        check_not_null(settings)
        if settings.ckpt_path == "":
            raise UserError("--ckpt_path is empty: give a .ckpt file or last, or leave it out")
        if settings.ckpt_path == "last":
            raise UserError("ckpt_path: last in a config is read too late: give it as a flag, --ckpt_path last")
        if settings.ckpt_path:
            open_checkpoint(Path(settings.ckpt_path))
        for mistake in validate_args(settings, self.subcommand):
            raise UserError(mistake)
        shape = {key: value for key, value in settings.model.config.as_dict().items() if key != "vocab_size"}
        GPTConfig(vocab_size=1, **shape)  # one that cannot be is refused before the text is read

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (RuntimeError, MemoryError, OverflowError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error) and "overflow" not in str(error).lower():
                raise
            raise UserError(f"the model does not fit into memory ({error}): give a smaller --model.config") from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config[self.subcommand]
        config = {**self._get(self.config_init, "trainer"), **kwargs}
        checkpoint: StepCheckpoint = self._get(self.config_init, "checkpoint")
        generate: GenerateText = self._get(self.config_init, "generate")
        if config["precision"] is None and not as_list(config.get("plugins")):
            model, data = self._get(self.config_init, "model"), self._get(self.config_init, "data")
            config["precision"] = fastest_precision(config["accelerator"], model, data)
            settings.trainer.precision = config["precision"]  # so it is saved: another processor would choose anew
        if config["profiler"] is None and not config["barebones"]:
            config["profiler"] = Unwatched()
        config["plugins"] = [*as_list(config.get("plugins")), AtomicCheckpointIO()]
        if self.subcommand != "fit":
            config.update(logger=False, enable_checkpointing=False, enable_progress_bar=False)
            self.save_config_callback = None
            self.stop.trainer = self._instantiate_trainer(config, [self.stop])
            return self.stop.trainer
        if isinstance(config["val_check_interval"], float):
            config["check_val_every_n_epoch"] = 1  # the Trainer asks for it; the data module makes it steps
        callbacks: list[Callback] = []
        if (time := config.pop("max_time")) is not None:
            try:  # the Trainer's own would validate, and count the time of earlier commands
                self.stop.timer = Timer(time)
                none_left = self.stop.timer.time_remaining() in (None, 0)
            except (MisconfigurationException, TypeError, OverflowError):
                none_left = True
            if none_left:
                raise UserError(f"--trainer.max_time {time}: give DD:HH:MM:SS, as 00:01:30:00")
        logger = self._run_logger(settings, config)
        self.folder = checkpoint.folder = Path(logger.log_dir)
        leaves_nothing = config["barebones"] or config["fast_dev_run"]
        self.saves = None if leaves_nothing or config["enable_checkpointing"] is False else checkpoint
        if settings.preflight:
            config.update(logger=False, callbacks=None, enable_checkpointing=False, enable_progress_bar=False)
            self.save_config_callback, self.stop.timer = None, None
            self.profiler = RunProfiler(generate)
            callbacks += [self.profiler]
        elif leaves_nothing:
            config["logger"] = False
            self.save_config_callback = None
        else:
            theirs = [] if config["logger"] is True else as_list(config["logger"])
            config["logger"] = False if config["logger"] is False else [logger, *theirs]
            callbacks += [Throughput(lambda: checkpoint.save_seconds)]
            callbacks += [StepProgress()] if config["enable_progress_bar"] is not False else []
            callbacks += [generate]
            stop_early: StopEarly = self._get(self.config_init, "early_stopping")
            callbacks += [stop_early] if settings.early_stopping.patience is not None else []
            if self.saves is not None:
                callbacks += [checkpoint]
                self.stop.checkpoint = checkpoint
        callbacks += [self.stop]  # after what saves
        if config["barebones"]:
            config["log_every_n_steps"] = 0
        try:
            trainer = self._instantiate_trainer(config, callbacks)
        except (TypeError, RuntimeError, AttributeError, LookupError) as error:  # all ways of refusing a flag's value
            raise UserError(f"--trainer: {error}") from None
        self.stop.trainer = trainer
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfig):
                callback.folder = self.folder
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if not TorchElasticEnvironment.detect() and "SLURM_NTASKS" in os.environ and SLURMEnvironment.detect():
            # its own requeueing would save inside a signal's handler; scripts/slurm.sh does it
            config["plugins"] = [*config["plugins"], SLURMEnvironment(auto_requeue=False)]
        trainer: Trainer = super()._instantiate_trainer(config, callbacks)
        if trainer.strategy.launcher is not None:  # it would do this too late for the processes it starts
            share_cores(trainer.num_devices)
        compat.set_default_timeout(trainer.strategy, timedelta(seconds=self.config[self.subcommand].timeout))
        return trainer

    def _run_logger(self, settings: Any, config: dict[str, Any]) -> StepLogger:
        """Of a new version folder, or of the one the checkpoint lies in."""
        logs = Path(config.get("default_root_dir") or LOGS)
        checkpoint = Path(settings.ckpt_path).absolute() if settings.ckpt_path else None
        version = None
        if checkpoint and checkpoint.parent.name.startswith("version_") and checkpoint.parts[-3] == settings.name:
            there = checkpoint.parents[2]
            if self.arguments.root_dir is None or Path(self.arguments.root_dir).absolute() == there:
                self.resumes_here, version = True, checkpoint.parent.name
                logs = there.relative_to(Path.cwd()) if there.is_relative_to(Path.cwd()) else there
        place = [] if logs == LOGS else ["--trainer.default_root_dir", str(logs)]
        words = [*self.arguments.resume_args, "--name", settings.name, *place, "--ckpt_path", "last"]
        everywhere = (
            "start on every machine, as before: " if is_externally_launched() else f"{shlex.quote(tool('python'))} "
        )
        self.stop.resume_command = everywhere + shlex.join([sys.argv[0], *words])
        return StepLogger(logs, name=settings.name, version=version)

    # ---------------------------------------------------------------------------------------------- what is told

    def refuse_another_model(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint whose model has another shape, or another vocabulary, than the one just built."""
        saved, ours = checkpoint["hyper_parameters"].get("config", {}), self.model.arguments["config"]
        differences = [
            f"{key} {saved.get(key)} there, {value} here" for key, value in ours.items() if saved.get(key) != value
        ]
        if any(difference.startswith("vocab_size") for difference in differences):
            differences.append("so the text, --data.files, is not the one it was trained on")
        if not differences and from_state(checkpoint["tokenizer"]) != self.datamodule.tokenizer:
            differences = ["its tokens stand for other pieces of text than this data's"]
        there, here = (
            {name: tuple(value.shape) for name, value in weights.items() if isinstance(value, torch.Tensor)}
            for weights in (checkpoint["state_dict"], self.model.state_dict())
        )
        if not differences and there != here:
            other = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
            differences = [f"{name} {there.get(name)} there, {here.get(name)} here" for name in other[:3]]
        if differences:
            raise UserError(
                f"{self.resumed} holds another model ({'; '.join(differences)}): "
                "leave out what changes it, or the checkpoint"
            )

    def refuse_another_optimizer(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with an optimizer that would not know what to do with the other's state."""
        saved, ours = checkpoint["hyper_parameters"].get("optimizer"), self.model.optimizer
        if not checkpoint.get("optimizer_states"):
            raise UserError(f"{self.resumed} holds no optimizer to go on with: validate it, or write texts with it")
        if saved != ours:
            raise UserError(f"--model.optimizer {ours}: {self.resumed} was trained with {saved}, go on with that")
        shapes = [
            p.shape
            for group in parameter_groups(self.model.gpt, self.model.weight_decay, self.model.optimizer)
            for p in group["params"]
        ]
        states = checkpoint["optimizer_states"][0]["state"]
        if any(v.shape != shapes[i] for i, state in states.items() for v in state.values() if v.ndim > 0):
            raise UserError(f"{self.resumed} holds an optimizer of another model: validate it, or write texts with it")

    def refuse_another_text(self, checkpoint: dict[str, Any]) -> None:
        """Refuses to go on with other data, unless the person means it."""
        saved, ours = checkpoint["data"], fingerprint(self.datamodule)
        differences = [
            f"{key} {saved.get(key)} there, {value} here" for key, value in ours.items() if saved.get(key) != value
        ]
        if differences and not self.config.fit.allow_data_change:
            told = [text for text in differences if not text.startswith("key ")] or ["the text itself"]
            raise UserError(
                f"{self.resumed} was trained on other data ({'; '.join(told)}): give the data it had, or "
                "--allow_data_change true to go on with this"
            )

    @property
    def resumed(self) -> str | None:
        """The checkpoint the command goes on from."""
        path: str | None = self._get(self.config, "ckpt_path")
        return path

    def before_validate(self) -> None:
        assert self.resumed is not None
        self.refuse_another_model(open_checkpoint(Path(self.resumed), mmap=True))

    def before_test(self) -> None:
        assert self.resumed is not None
        if len(self.datamodule.test_ids) < 2:
            raise UserError(
                f"the test split has {len(self.datamodule.test_ids)} tokens, of which none can be predicted: give more "
                "with --data.test_fraction, --data.test_files or --data.split_column"
            )
        checkpoint = open_checkpoint(Path(self.resumed), mmap=True)
        self.refuse_another_model(checkpoint)
        there, here = (split["train tokens"] for split in (checkpoint["data"], fingerprint(self.datamodule)))
        if there != here and self.trainer.is_global_zero:
            print(
                f"warning     it was trained on {there:,} tokens, and this split has {here:,} to train on: it may have "
                "seen what is tested; give the split it had"
            )

    def before_fit(self) -> None:
        checkpoint = open_checkpoint(Path(self.resumed), mmap=True) if self.resumed else None
        if checkpoint is not None:
            self.refuse_another_model(checkpoint)
            self.refuse_another_optimizer(checkpoint)
            self.refuse_another_text(checkpoint)
        logger = self.trainer.logger
        self.datamodule.trainer = self.trainer
        self.datamodule.check_batches()
        if self.datamodule.max_steps is None and self.model.schedule != "constant":
            raise UserError(
                f"--model.schedule {self.model.schedule} needs an end: give --trainer.max_steps or "
                "--trainer.max_epochs, or --model.schedule constant"
            )
        generate: GenerateText = self._get(self.config_init, "generate")
        for prompt in generate.prompts:  # one that has no ids is said now, not in mid-run
            encode_prompt(self.datamodule.tokenizer, prompt, mode=self.datamodule.corpus_config.read_options.mode)
        if self.datamodule.max_steps == 0:
            raise UserError("--trainer.max_steps 0, or max_epochs 0, trains nothing: give 1 or more")
        if self.trainer.is_global_zero:
            folder = self.folder if self.save_config_callback or self.profiler else None
            if folder is not None and self.profiler is None:
                self.stop.run_folder.create_and_lock(folder, is_new=not self.resumes_here)
                if self.stop.checkpoint is not None and self.resumes_here and checkpoint and self.resumed:
                    self.stop.checkpoint.restore_copies(Path(self.resumed), checkpoint)
            if self.arguments.notice:
                print(self.arguments.notice)
            print(preflight(self.trainer, self.model, self.datamodule, folder, self.saves))
            if checkpoint is not None:
                print("\n".join(self._resuming(checkpoint)))
        if isinstance(logger, StepLogger) and self.trainer.is_global_zero and not self.resumes_here:
            settings = self.config.fit.as_dict()
            shown = {part: settings[part] for part in ("seed_everything", "data", "model", "trainer")}
            logger.log_settings(flat(shown))

    def _resuming(self, checkpoint: dict[str, Any]) -> list[str]:
        """What to tell of a run that goes on: from where, with which flags changed, and whether there is work left."""
        step, end = checkpoint["global_step"], self.datamodule.max_steps
        lines = [f"resumed     {self.resumed}, step {step:,}"]
        for saved in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(saved, SaveConfig) and "config" in checkpoint:
                before, now = (flat(yaml.safe_load(text)) for text in (checkpoint["config"], saved.text))
                lines += [
                    f"changed     {key} {before.get(key)} -> {now.get(key)}"
                    for key in sorted(before.keys() | now.keys())
                    if before.get(key) != now.get(key)
                ]
            elif isinstance(saved, StopEarly):
                waited = checkpoint["callbacks"].get(saved.state_key, {}).get("wait_count", 0)
                if waited >= saved.patience:
                    lines += [f"already complete: {saved.reason(waited)}; raise --early_stopping.patience to go on"]
        if end is not None and step >= end:
            lines += [f"already complete at step {step:,}: raise --trainer.max_steps to go on"]
        return lines

    def fit(self, **kwargs: Any) -> None:
        """Trains; or, where that is all a person asks for, takes the steps that are measured."""
        if self.profiler is None:
            self.trainer.fit(**kwargs)
            return
        free = free_memory(self.trainer.strategy.root_device)
        if free is not None and sum(estimate_memory(self.trainer, self.model, 1)) > free:
            return
        if self.resumed:
            self.profiler.completed_steps = open_checkpoint(Path(self.resumed), mmap=True)["global_step"]
        kwargs["ckpt_path"] = None  # from where it starts is all the same
        try:
            self.trainer.fit(**kwargs)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            self.profiler.handle_out_of_memory()

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero:
            return
        if self.profiler is not None:
            print(self.profiler.report())
            return
        lines = [
            f"stopped     at step {self.trainer.global_step:,}, {callback.reason(callback.wait_count)}"
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, StopEarly) and callback.is_exhausted
        ]
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        with contextlib.suppress(UserError, KeyError):  # there may be none
            state = open_checkpoint(best, mmap=True)["callbacks"]["StepCheckpoint"]
            lines.append(f"best        {best}   loss/val {state['best_loss']:.4f} at step {state['best_step']:,}")
        if last.exists():
            lines.append(f"last        {last}")
            lines.append(
                f"more text   {tool('python')} scripts/generate.py --ckpt_path {best if best.exists() else last}"
            )
        if isinstance(self.trainer.logger, StepLogger):
            lines.append(f"curves      {tool('tensorboard')} --logdir {self.folder.parents[1]}")
        print("\n".join(lines))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quiet = {"verbose": False} if subcommand != "fit" else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            for tag, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{tag:20} {value:.4f}")

    after_test = after_validate


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"a": 1}}` -> `{"model.a": 1}`, values as TensorBoard takes them, without those not set."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
