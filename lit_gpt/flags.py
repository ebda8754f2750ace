"""What a person types: which config is read, who wins, and what cannot be meant."""

import inspect
import math
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_gpt.callbacks import GenerateText
from lit_gpt.checkpoint import newest_checkpoint, open_checkpoint
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.model import GPTConfig
from lit_gpt.module import METRICS, LitGPT
from lit_gpt.saving import StepCheckpoint, StopEarly

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

COMMANDS = ("fit", "validate", "test")

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
        root: where runs go, where flags or configs say it.
        resuming: what of the words still counts when the run goes on.
    """

    def __init__(self, words: list[str], default_config: Path) -> None:
        command, words = (words[0], words[1:]) if words[:1] and words[0] in COMMANDS else ("fit", words)
        configs, flags = _split_configs(words)
        helped = bool({"-h", "--help"} & set(flags))
        self.name = re.sub(r"[^A-Za-z0-9._-]", "_", Path(configs[0]).stem if configs else default_config.stem)
        self.notice = ""
        contents = [check_config(Path(config)) for config in configs]
        checkpoint = _value_of("--ckpt_path", flags)
        self.root: str | None = _value_of("--trainer.default_root_dir", flags)
        for config in contents:
            self.root = self.root or config.get("trainer", {}).get("default_root_dir")
        once = ("--ckpt_path", "--name", "--trainer.default_root_dir", "--allow_data_change")
        self.resuming = [*(f"--config={config}" for config in configs), *flags]
        for flag in once:
            self.resuming = _without(flag, self.resuming)
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
        name = self.name
        for config in configs:
            name = config.get("name", name)
        name, logs = check_name(_value_of("--name", flags) or name), Path(str(self.root or LOGS))
        path = newest_checkpoint(logs, name)
        if path is None and command != "fit":
            raise UserError(f"--ckpt_path last: there is no checkpoint of {name!r} under {logs}: train one first")
        if path is None:
            self.notice = f"no checkpoint of {name!r} under {logs}: starting from the beginning"
        return str(path) if path else None


def _split_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """`--config X` and `--config=X` (`-c` too) apart from everything else."""
    configs, others, waiting = [], [], iter(words)
    for word in waiting:
        if word.startswith("-c") and len(word) > 2:  # as -cFILE
            if Path(word).suffix not in (".yaml", ".yml"):
                raise UserError(f"{word}: a flag has two dashes, and a config ends in .yaml")
            word = f"--config={word[2:].removeprefix('=')}"
        flag, equals, value = word.partition("=")
        if flag.removeprefix("--") in SECTIONS and flag.startswith("--"):
            raise UserError(f"{flag} takes no value of its own: give its settings, as {flag}.NAME VALUE")
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
        commands = ", ".join(COMMANDS)
        return f"unexpected word {word!r}: commands are {commands}; a glob or a text with spaces goes in quotes"
    if match := re.match(r"Subcommand '\w+' does not accept option '(.+)'", message):
        return f"unknown key {match[1]}{did_you_mean(match[1], keys)}: see --help"
    if match := re.match(r'Linked "(.+?)" must be given', message):
        return f"--{match[1]} follows from {LINKED[match[1]]}: leave it out"
    if match := re.match(r"argument (--\w+)/\S+: invalid _boolean_type value: '(.*)'", message):
        return f"{match[1]} {match[2]}: it stands alone, or give true or false"
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


def as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def launched() -> bool:
    """Whether torchrun or SLURM has started this process, and others beside it."""
    return bool({"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys())


def mistakes(settings: Namespace, command: str) -> Iterator[str]:
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
    if trainer.num_nodes > 1 and not launched():
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
