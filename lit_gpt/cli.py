"""The command line of scripts/fit.py: which config is read, who wins, what is refused, what a person is told."""

import contextlib
import inspect
import logging
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from lit_gpt.callbacks import (
    GenerateText,
    GracefulStop,
    RunLogger,
    StepCheckpoint,
    StepProgress,
    StopEarly,
    Stopped,
    Throughput,
    WholeFileIO,
    rank_zero_rank,
)
from lit_gpt.checkpoint import newest_checkpoint, open_checkpoint, write_whole
from lit_gpt.data.datamodule import TextDataModule, fingerprint
from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.generate import prompt_tokens
from lit_gpt.model import GPTConfig
from lit_gpt.module import METRICS, LitGPT
from lit_gpt.optim import parameter_groups
from lit_gpt.tokenizer import from_state

LOGS = Path("logs")

# what fit.py gives the Trainer where neither config nor flag says otherwise
TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # max_steps ends a run
    "max_steps": 2000,
    "val_check_interval": 250,  # optimizer steps, also across epochs:
    "check_val_every_n_epoch": None,
    "log_every_n_steps": 10,
    "gradient_clip_val": 1.0,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "enable_model_summary": False,  # the preflight says it shorter
}

SECTIONS = ("data", "model", "trainer", "generate", "checkpoint", "early_stopping")

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

# keys that follow from others: target -> who decides
LINKED = {
    "model.config.vocab_size": "the tokenizer (data.tokenizer, data.vocab)",
    "data.context_length": "model.config.context_length",
    "data.seed": "seed_everything",
}


def main(default_config: Path) -> int:
    """Runs the command line; returns the exit status.

    2 is for what a person can mend, said in one line; 130 and 143 for Ctrl-C and SIGTERM.
    """
    quiet_lightning()
    stop = GracefulStop()
    try:
        return _run(stop, default_config)
    finally:
        stop.clean_up()


def _run(stop: GracefulStop, default_config: Path) -> int:
    try:
        with stop.listening(), quiet_writer():
            arguments = Arguments(sys.argv[1:], default_config)
            sys.argv[1:] = arguments.words  # what processes for other devices are started with
            FitCLI(arguments, stop)
    except Stopped as stopped:
        return _leave(stopped.status, str(stopped))
    except BrokenPipeError:  # whoever was reading has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except Exception as error:
        if stop.started and not isinstance(error, UserError):
            raise
        notes = "".join(f"; {note}" for note in getattr(error, "__notes__", []))
        return _leave(2, f"error: {_said(error)}{notes}")
    return 0


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

    What ends a run is known to all its processes: the first speaks, and the others end with 0, so that Lightning, which
    kills the first where another has failed, lets it.
    """
    if rank_zero_rank() != 0:
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
        "It is recommended to use `self.log",  # with sync_dist: what we log is equal on all devices already
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # lightning 2.6 calls what torch has renamed
    ):
        warnings.filterwarnings("ignore", message=message)


class Arguments:
    """The words of the command line, put in order for the parser.

    `fit` may be left out. The first --config is the experiment and later ones overlay it; without one it is the config
    saved in the checkpoint of --ckpt_path, or default.yaml. Configs go to the front, so that flags win wherever they
    stand. `--ckpt_path last` becomes the newest checkpoint of the run's name, or nothing where there is none.

    Attributes:
        words: for the parser.
        name: of the run, where neither config nor flag says it: the experiment's file name.
        config_text: the checkpoint's config, to be read first.
        notice: what is to be told before anything else.
        go_on: the same command, resumed.
    """

    def __init__(self, words: list[str], default_config: Path) -> None:
        command, words = (words[0], words[1:]) if words[:1] and words[0] in ("fit", "validate") else ("fit", words)
        configs, flags = _split_configs(words)
        helped = bool({"-h", "--help"} & set(flags))
        self.name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(configs[0]).stem if configs else default_config.stem)
        self.notice = ""
        contents = [check_config(Path(config)) for config in configs]
        checkpoint = _value_of("--ckpt_path", flags)
        typed = [*(f"--config={config}" for config in configs), *_without("--ckpt_path", flags), "--ckpt_path", "last"]
        self.go_on = shlex.join([tool("python"), sys.argv[0], *typed])
        if checkpoint == "last" and not helped:
            checkpoint = self._last(contents, flags, command)
            flags = _without("--ckpt_path", flags) + ([f"--ckpt_path={checkpoint}"] if checkpoint else [])
        self.config_text: str | None = None
        if not configs and checkpoint and not helped:
            self.config_text = open_checkpoint(Path(checkpoint), mmap=True).get("config")
            if self.config_text is None:
                raise UserError(f"{checkpoint} was not written by fit.py and holds no config: give --config")
        elif not configs:
            configs = [str(default_config)]
            check_config(default_config)
        self.words = [command, *(f"--config={config}" for config in configs), *flags]

    def _last(self, configs: list[dict[str, Any]], flags: list[str], command: str) -> str | None:
        """The newest checkpoint of the name that flags, configs or the experiment's file say."""
        name, logs = self.name, LOGS
        for config in configs:
            name = config.get("name", name)
            logs = Path(str(config.get("trainer", {}).get("default_root_dir") or logs))
        name = check_name(_value_of("--name", flags) or name)
        logs = Path(_value_of("--trainer.default_root_dir", flags) or logs)
        path = newest_checkpoint(logs, name)
        if path is None and command == "validate":
            raise UserError(f"--ckpt_path last: there is no checkpoint of {name!r} under {logs}: train one first")
        if path is None:
            self.notice = f"no checkpoint of {name!r} under {logs}: starting from the beginning"
        return str(path) if path else None


def _split_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """`--config X` and `--config=X` (`-c` too) apart from everything else."""
    configs, others, waiting = [], [], iter(words)
    for word in waiting:
        if word.startswith("-c") and len(word) > 2:  # as -cFILE
            word = f"--config={word[2:].removeprefix('=')}"
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-c"):
            others.append(word)
        elif equals:
            configs.append(value)
        else:
            value = next(waiting, "")
            if not value or value.startswith("-"):
                raise UserError(f"{word} names no file: give --config configs/default.yaml")
            configs.append(value)
    return configs, others


def _value_of(flag: str, words: list[str]) -> str | None:
    """The last value given to `flag`."""
    value = None
    for word, after in zip(words, [*words[1:], ""]):
        if word == flag:
            value = after
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
    return value


def _without(flag: str, words: list[str]) -> list[str]:
    """`words` but for `flag` and its value."""
    kept, waiting = [], iter(words)
    for word in waiting:
        if word == flag:
            next(waiting, None)
        elif not word.startswith(f"{flag}="):
            kept.append(word)
    return kept


def check_config(path: Path) -> dict[str, Any]:
    """What a config says, once it is sure that the parser will pass over nothing in it.

    That would be: no such file, broken YAML, a key given twice, a key that is linked.

    Raises:
        UserError: it is one of these.
    """
    if not path.is_file():
        beside = [str(other) for other in path.parent.glob("*.yaml")]
        raise UserError(f"--config {path}: no such file{did_you_mean(str(path), beside)}")
    try:
        with open(path, encoding="utf-8") as file:
            content: Any = yaml.load(file, Loader=_StrictLoader)
        nested: list[str] = list(_dotted(content)) if isinstance(content, dict) else []
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: {error.problem}: mend the YAML") from None
    except (UnicodeDecodeError, yaml.YAMLError, TypeError, RecursionError):
        raise UserError(f"{path} is not YAML in UTF-8: give a config such as configs/default.yaml") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings: write them as `trainer:` and, below it, `max_steps: 100`")
    for key in SECTIONS:
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{path}: {key} is {content[key]!r}: write its settings below it, one `name: value` a line")
    for dotted in nested:
        raise UserError(f"{path}: {dotted}: write it as {': '.join(dotted.split('.'))}, key below key")
    for key, decider in LINKED.items():
        found: Any = content
        for part in key.split("."):
            found = found.get(part, {}) if isinstance(found, dict) else {}
        if found != {}:
            raise UserError(f"{path}: {key} follows from {decider}: take it out")
    return content


def _dotted(content: dict[Any, Any]) -> Iterator[str]:
    """The keys of nested sections that hold a dot, which the parser would take and the checks here would not see."""
    for key, value in content.items():
        if "." in str(key):
            yield str(key)
        if isinstance(value, dict):
            yield from _dotted(value)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, where the usual loader keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        merges = [key.start_mark for key, _ in node.value if key.tag == "tag:yaml.org,2002:merge"]
        if merges:
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read here", merges[0])
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


class Parser(LightningArgumentParser):
    """A parser that takes keys in full only, and says what is wrong in one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message) from ex


def plain(message: str, keys: list[str]) -> str:
    """A parser's message as a person would put it."""
    message = " ".join(message.split())
    if match := re.match(r"unrecognized arguments: (-?-?)([^\s=]+)", message):
        dashes, word = match.groups()
        if dashes:
            return f"unknown flag {dashes}{word}{did_you_mean(word, keys)}: see --help"
        return f"unexpected word {word!r}: commands are fit and validate; a glob or a text with spaces goes in quotes"
    if match := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        return f"unknown key {match[1]}{did_you_mean(match[1], keys)}: see --help"
    if match := re.match(r'Linked "(.+?)" must be given', message):
        return f"--{match[1]} follows from {LINKED[match[1]]}: leave it out"
    if match := re.match(r'Parser key "(.+?)": (.*?)(?:Got value|Given value): ?(.*)', message):
        key, expected, got = match.groups()
        key = "seed_everything" if key == "data.seed" else key
        if problem := re.search(r"Problem with given class_path '.*?': (.*?) Not a valid", expected):
            return f"--{key}: {problem[1]}"
        choices = [choice for listed in re.findall(r"Literal\[(.*?)\]", expected) for choice in listed.split(", ")]
        kinds = re.findall(r"<class '(?:\w+\.)*(\w+)'>", expected.partition("Errors:")[0])
        kinds = ["null" if kind == "NoneType" else kind for kind in kinds]
        wanted = ", ".join(
            dict.fromkeys([*(choice.strip("'") for choice in choices), *kinds])
        ) or expected.removeprefix("Expected ")
        return f"--{key} {got}: give {'one of ' if choices else ''}{wanted}"
    return message


class SaveConfig(SaveConfigCallback):
    """Writes the run's config.yaml, and the same text into its checkpoints, without the checkpoint it came from."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = Path()  # of the run; the command line sets it
        config = self.config.clone()
        config.pop("ckpt_path", None)
        self.text: str = self.parser.dump(config, skip_unset=False)

    def save_config(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        write_whole(self.folder / "config.yaml", lambda file: file.write(self.text.encode("utf-8")))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


class FitCLI(LightningCLI):
    """`fit` and `validate` of LitGPT on TextDataModule."""

    def __init__(self, arguments: Arguments, stop: GracefulStop) -> None:
        self.arguments, self.stop = arguments, stop
        stop.go_on = arguments.go_on
        self.folder = Path()
        self.resumes_here = False  # in the folder its checkpoint lies in
        super().__init__(
            LitGPT,
            TextDataModule,
            save_config_callback=SaveConfig,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_class=Parser,
            args=arguments.words,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        dataloaders = {"model", "datamodule", "weights_only", "train_dataloaders", "val_dataloaders", "dataloaders"}
        return {"fit": dataloaders, "validate": dataloaders | {"verbose"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str, default=self.arguments.name, help="The run's folder under logs/ (letters, digits, ._-)."
        )
        parser.add_argument(
            "--allow_data_change", type=bool, default=False, help="Resume on another text or split than before."
        )
        parser.add_lightning_class_args(StopEarly, "early_stopping")
        parser.add_lightning_class_args(GenerateText, "generate")
        parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
        parser.link_arguments("model.config.context_length", "data.context_length")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("data.vocab_size", "model.config.vocab_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if self.arguments.config_text is not None:
                config = Path(folder, "config.yaml")
                config.write_text(self.arguments.config_text, encoding="utf-8")
                args = [args[0], f"--config={config}", *args[1:]]
            try:
                self.config = parser.parse_args(args)
            except UserError as error:
                flags = [flag.lstrip("-") for flag in self._subcommand_parsers[args[0]]._option_string_actions]
                raise UserError(plain(str(error), flags)) from None

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's hyperparameters override flags; here flags win."""

    def before_instantiate_classes(self) -> None:
        settings = self.config[self.subcommand]
        trainer = settings.trainer
        check_name(settings.name)
        refuse_null(settings)
        if settings.ckpt_path == "":
            raise UserError("--ckpt_path is empty: give a .ckpt file, or leave it out")
        if self.subcommand == "validate" and not settings.ckpt_path:
            raise UserError("validate needs a checkpoint: give --ckpt_path logs/<name>/version_<n>/best.ckpt")
        if settings.ckpt_path == "last":
            raise UserError("ckpt_path: last in a config is read too late: give it as a flag, --ckpt_path last")
        if settings.ckpt_path:
            open_checkpoint(Path(settings.ckpt_path))
            if trainer.overfit_batches:
                raise UserError(
                    "--ckpt_path with --trainer.overfit_batches: its few batches are not counted on, start anew"
                )
        shape = {key: value for key, value in settings.model.config.as_dict().items() if key != "vocab_size"}
        GPTConfig(vocab_size=1, **shape)  # one that cannot be is refused before the text is read
        if settings.data.global_batch_size is not None and trainer.accumulate_grad_batches != 1:
            raise UserError(
                f"--trainer.accumulate_grad_batches {trainer.accumulate_grad_batches} and --data.global_batch_size "
                f"{settings.data.global_batch_size} say the same twice: leave the first out, it follows from the second"
            )
        if trainer.use_distributed_sampler:
            raise UserError("--trainer.use_distributed_sampler true: leave it out, every device draws its own windows")
        if "spawn" in str(trainer.strategy) or "fork" in str(trainer.strategy) or "notebook" in str(trainer.strategy):
            raise UserError(f"--trainer.strategy {trainer.strategy} is for notebooks: give ddp")
        if trainer.accumulate_grad_batches is None or trainer.accumulate_grad_batches < 1:
            raise UserError(f"--trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: give 1 or more")
        interval = trainer.val_check_interval
        if not isinstance(interval, int | float) or interval <= 0 or (isinstance(interval, float) and interval > 1):
            raise UserError(
                f"--trainer.val_check_interval {interval}: give optimizer steps, as 250, or a share of an epoch, as 0.5"
            )
        if trainer.limit_train_batches not in (None, 1.0):
            raise UserError(
                f"--trainer.limit_train_batches {trainer.limit_train_batches} would cut optimizer steps apart: "
                "give --trainer.max_steps"
            )
        if trainer.gradient_clip_val is not None and not 0 <= trainer.gradient_clip_val < float("inf"):
            raise UserError(f"--trainer.gradient_clip_val is {trainer.gradient_clip_val}: give 0 (off) or more")
        if trainer.log_every_n_steps is not None and trainer.log_every_n_steps < 0:
            raise UserError(f"--trainer.log_every_n_steps is {trainer.log_every_n_steps}: give 0 (never) or more")
        if trainer.num_nodes > 1 and not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
            raise UserError(f"--trainer.num_nodes {trainer.num_nodes}: start it on each of them, with torchrun or srun")
        devices, cores = str(trainer.devices), os.cpu_count() or 1
        if trainer.accelerator == "cpu" and devices.isdecimal() and int(devices) > 4 * cores:
            raise UserError(f"--trainer.devices {devices} on {cores} cores: give {cores} or fewer")
        if trainer.limit_val_batches not in (None, 0, 1.0):
            raise UserError(
                f"--trainer.limit_val_batches {trainer.limit_val_batches}: give --data.eval_windows instead"
            )
        if trainer.limit_val_batches == 0 and settings.early_stopping.patience is not None:
            raise UserError("--early_stopping.patience waits for validations, --trainer.limit_val_batches 0 has none")
        if trainer.check_val_every_n_epoch not in (None, 1):
            raise UserError(
                f"--trainer.check_val_every_n_epoch {trainer.check_val_every_n_epoch}: give val_check_interval instead"
            )
        if trainer.min_steps is not None and 0 <= trainer.max_steps < trainer.min_steps:
            raise UserError(f"--trainer.min_steps {trainer.min_steps} is more than max_steps {trainer.max_steps}")
        if "://" in str(trainer.default_root_dir or ""):
            raise UserError(f"--trainer.default_root_dir {trainer.default_root_dir}: give a folder of this machine")
        if settings.data.num_workers > 8 * cores:
            raise UserError(f"--data.num_workers {settings.data.num_workers} on {cores} cores: give {cores} or fewer")
        if 12 * settings.model.config.num_blocks * settings.model.config.d_model**2 > 1e12:
            raise UserError("--model.config describes more than 10^12 parameters, which does not fit: give less")
        if trainer.profiler == "xla":
            raise UserError("--trainer.profiler xla needs a TPU: give simple, advanced or pytorch")
        refuse_port_in_use(trainer.strategy)
        for callback in _as_list(trainer.callbacks):
            kind = str(callback.get("class_path", "")).rpartition(".")[2] if isinstance(callback, Namespace) else ""
            if kind in UNSUITABLE:
                raise UserError(f"--trainer.callbacks {kind} does not go with this project: {UNSUITABLE[kind]}")
            monitor = (callback.get("init_args") or {}).get("monitor") if isinstance(callback, Namespace) else None
            if monitor is not None and monitor not in METRICS:
                raise UserError(
                    f"--trainer.callbacks: monitor {monitor!r} is not measured{did_you_mean(monitor, METRICS)}; "
                    f"take one of {', '.join(METRICS)}"
                )

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
        config["plugins"] = [*_as_list(config.get("plugins")), WholeFileIO()]
        if self.subcommand == "validate":
            config.update(logger=False, enable_checkpointing=False, enable_progress_bar=False)
            self.save_config_callback = None
            return self._instantiate_trainer(config, [])
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
        if config["barebones"] or config["fast_dev_run"]:  # a run that leaves nothing behind
            config["logger"] = False
            self.save_config_callback = None
        else:
            theirs = [] if config["logger"] is True else _as_list(config["logger"])
            config["logger"] = False if config["logger"] is False else [logger, *theirs]
            callbacks += [Throughput()]
            callbacks += [StepProgress()] if config["enable_progress_bar"] is not False else []
            callbacks += [generate]
            stop_early: StopEarly = self._get(self.config_init, "early_stopping")
            callbacks += [stop_early] if settings.early_stopping.patience is not None else []
            if config["enable_checkpointing"] is not False:
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

    def _run_logger(self, settings: Any, config: dict[str, Any]) -> RunLogger:
        """Of a new version folder, or of the one the checkpoint lies in."""
        logs = Path(config.get("default_root_dir") or LOGS)
        checkpoint = Path(settings.ckpt_path).absolute() if settings.ckpt_path else None
        if checkpoint and checkpoint.parent.name.startswith("version_") and checkpoint.parts[-3] == settings.name:
            logs = checkpoint.parents[2]
            here = logs.relative_to(Path.cwd()) if logs.is_relative_to(Path.cwd()) else logs
            self.resumes_here = True
            return RunLogger(here, name=settings.name, version=checkpoint.parent.name)
        return RunLogger(logs, name=settings.name)

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
        states = (checkpoint.get("optimizer_states") or [{}])[0].get("state", {})
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
        for prompt in self._get(
            self.config_init, "generate"
        ).prompts:  # one that has no ids is said now, not in mid-run
            prompt_tokens(self.datamodule.tokenizer, prompt, rows=self.datamodule.reading.mode == "rows")
        if self.datamodule.max_steps == 0:
            raise UserError("--trainer.max_steps 0, or max_epochs 0, trains nothing: give 1 or more")
        if self.trainer.is_global_zero:
            folder = self.folder if self.save_config_callback else None
            if folder is not None:
                self.stop.take(folder, fresh=not self.resumes_here)
                for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
                    if isinstance(callback, StepCheckpoint) and self.resumes_here and checkpoint and self.resumed:
                        callback.mend(Path(self.resumed), checkpoint)
            if self.arguments.notice:
                print(self.arguments.notice)
            print(preflight(self.trainer, self.model, self.datamodule, folder))
            if checkpoint is not None:
                print("\n".join(self._resuming(checkpoint)))
        if isinstance(logger, RunLogger) and self.trainer.is_global_zero and not self.resumes_here:
            settings = self.config.fit.as_dict()
            logger.start(flat({part: settings[part] for part in ("seed_everything", "data", "model", "trainer")}))

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

    def after_fit(self) -> None:
        if not self.trainer.is_global_zero:
            return
        lines = [
            f"stopped     at step {self.trainer.global_step:,}, {callback.reason(callback.wait_count)}"
            for callback in self.trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, StopEarly) and callback.exhausted
        ]
        last, best = self.folder / "last.ckpt", self.folder / "best.ckpt"
        if best.exists():
            state = open_checkpoint(best, mmap=True)["callbacks"]["StepCheckpoint"]
            lines.append(f"best        {best}   loss/val {state['best_loss']:.4f} at step {state['best_step']:,}")
        if last.exists():
            lines.append(f"last        {last}")
            lines.append(
                f"more text   {tool('python')} scripts/generate.py --ckpt_path {best if best.exists() else last}"
            )
        if isinstance(self.trainer.logger, RunLogger):
            lines.append(f"curves      {tool('tensorboard')} --logdir {self.folder.parents[1]}")
        print("\n".join(lines))

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        quiet = {"verbose": False} if subcommand == "validate" else {}
        return {**super()._prepare_subcommand_kwargs(subcommand), **quiet}

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            for tag, value in sorted(self.trainer.callback_metrics.items()):
                print(f"{tag:20} {value:.4f}")


def refuse_port_in_use(strategy: Any) -> None:
    """Refuses a MASTER_PORT at which the ranks of this machine could not meet; the Trainer takes a free one without it.

    Raises:
        UserError: it is no port, or taken.
    """
    port = os.environ.get("MASTER_PORT")
    if port is None or "LOCAL_RANK" in os.environ or "ddp" not in str(strategy):
        return
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"MASTER_PORT is {port!r}: give a port from 1 to 65535, or unset it")
    with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(("", int(port)))
            place.listen()
        except OSError as error:
            raise UserError(f"MASTER_PORT {port}: {error.strerror}: give another, or unset it") from None


def tool(name: str) -> str:
    """How to call a program of this Python's environment from here: by name where that finds it."""
    program = Path(sys.executable).with_name(name)
    if shutil.which(name) == str(program):
        return name
    return str(program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program)


def check_name(name: Any) -> str:
    """A run's name, which is a folder's.

    Raises:
        UserError: it could not be one.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", name) or name.strip(".") == "":
        raise UserError(f"--name {name!r}: take letters, digits and ._- only, a hundred at most")
    return name


def refuse_null(settings: Namespace) -> None:
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


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"a": 1}}` -> `{"model.a": 1}`, values as TensorBoard takes them, without those not set."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found.update(flat(value, f"{prefix}{key}."))
        elif value is not None:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


TOKENS_A_PARAMETER = 20  # where more data and more parameters are worth the same
PASSES = 4  # over the same text that teach about as much as so much new text


def preflight(trainer: Trainer, model: LitGPT, data: TextDataModule, folder: Path | None) -> str:
    """What is about to be trained, on what, for how long, and where it is written."""
    config, counts = model.gpt.config, data.corpus.counts
    parameters = sum(p.numel() for p in model.gpt.parameters())
    tokens = len(data.corpus.ids)
    per_step = data.windows_per_step * data.context_length
    steps = data.max_steps
    skipped = f", {counts['empty_rows']:,} empty rows left out" if counts["empty_rows"] else ""
    vocabulary = (
        f"{data.tokenizer_name}{' pruned' if data.tokenizer_name == 'cl100k_base' and data.vocab == 'pruned' else ''}"
    )
    epochs = steps / data.steps_per_epoch if steps is not None else float("inf")
    lines = [
        f"text        {counts['documents']:,} document{'s'[: counts['documents'] != 1]}, "
        f"{counts['characters']:,} characters{skipped}",
        f"tokens      {tokens:,} ({len(data.train_ids):,} to train on, {len(data.val_ids):,} to validate), "
        f"{data.vocab_size:,} different ({vocabulary})",
        f"model       {parameters:,} parameters, {tokens / parameters:.2g} tokens a parameter; "
        f"{config.num_blocks} blocks of width {config.d_model}, context {config.context_length}",
        f"memory      {_bytes(16 * parameters)} for weights, gradients and AdamW; activations come on top",
        f"steps       {'no end' if steps is None else f'{steps:,}'} of {per_step:,} tokens, "
        f"{data.steps_per_epoch:,} to an epoch" + ("" if steps is None else f", {epochs:,.1f} epochs"),
        f"logs        {folder if folder else 'none'}",
    ]
    trained = len(data.train_ids)
    if epochs > PASSES and parameters > trained / TOKENS_A_PARAMETER:
        lines.append(
            f"warning     {parameters:,} parameters may learn {trained:,} tokens by heart: a model wants "
            f"{TOKENS_A_PARAMETER} tokens a parameter (Hoffmann et al. 2022), and after {PASSES} epochs text loses its "
            "worth (Muennighoff et al. 2023); give --early_stopping.patience 5, a smaller model or more text"
        )
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
