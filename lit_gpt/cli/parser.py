"""Parse and check the settings of a command: flags, configs and defaults."""

import copy
import inspect
import os
import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from jsonargparse import ActionConfigFile, ActionYesNo, Namespace, set_parsing_settings
from lightning import __version__ as lightning_version
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_gpt.checkpoint.store import REMEDY, Checkpoint
from lit_gpt.cli.arguments import CommandLine, find_values, remove_flags
from lit_gpt.cli.config_values import has_setting
from lit_gpt.cli.exclusive_settings import remove_replaced
from lit_gpt.cli.init_from import check_start, start_settings
from lit_gpt.cli.intervals import TRAINER_ARGUMENTS
from lit_gpt.cli.messages import print_lines
from lit_gpt.cli.parser_errors import rewrite_parser_error
from lit_gpt.cli.run_checkpoint import CHOICES
from lit_gpt.cli.saved_config import describe_left_out, take_settings
from lit_gpt.cli.text_settings import TextFlag, pop_texts
from lit_gpt.cli.validation import TRAINER_DEFAULTS, check_not_null, check_run_name, check_values, validate_args
from lit_gpt.cli.yaml_text import dump_yaml, limit_parser
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.errors import UserError
from lit_gpt.files import temporary_folder, write_error
from lit_gpt.inference.attention_maps import check_heads
from lit_gpt.model import GPTConfig
from lit_gpt.training.checkpointing import StepCheckpoint, StopEarly
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText
from lit_gpt.training.stop import global_rank

# Seconds. A disk of 50 MB/s writes a checkpoint of 15 GB in this time, and all ranks wait for it.
DEFAULT_TIMEOUT = 300

# The packages whose classes and functions configs and flags may name, for example as a callback.
ALLOWED_IMPORTS = ("lightning", "lit_gpt", "torch")
# The parts of these packages that compile, load or start what their arguments say.
DENIED_IMPORTS = (
    *("torch.hub", "torch.load", "torch.serialization", "torch.package", "torch.jit", "torch.fx", "torch.export"),
    *("torch.ops", "torch.classes", "torch.library", "torch.utils.cpp_extension", "torch.utils.benchmark"),
    *("torch.multiprocessing", "torch.distributed.elastic", "torch.distributed.run", "torch.distributed.launch"),
    *("torch.distributed.rpc", "torch.testing", "torch._inductor", "torch._dynamo", "torch._C"),
    *("lightning.pytorch.cli", "lightning.fabric.cli", "lightning.pytorch.core", "lightning.pytorch.trainer"),
)

EVALUATED_CHECKPOINT = (
    "A checkpoint, or best or last: the best checkpoint of the newest run of --name, or the newest one. null: best."
)
CKPT_PATH_HELP = {
    "fit": "A checkpoint from which to resume, or last: the newest one of --name; auto: the same, or a new run where "
    "there is none; best: the best one of the newest run.",
    "validate": EVALUATED_CHECKPOINT,
    "test": EVALUATED_CHECKPOINT,
}


class StrictParser(LightningArgumentParser):
    """A parser that does not accept abbreviated flags and raises a `UserError` instead of exiting.

    Attributes:
        texts: The text settings, which do not pass through the parser, by name (see `text_settings`).
        flat_defaults: The default of each setting by name, once the settings are parsed.
        given: The names of the settings that flags and configs give, once they are parsed. Neither the saved config of
            a checkpoint nor default.yaml, where the user did not name it, counts.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.texts: dict[str, Any] = {}
        self.flat_defaults: dict[str, Any] = {}
        self.given: set[str] = set()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(message) from ex

    def dump(self, cfg: Namespace, **kwargs: Any) -> str:
        """Return settings as YAML; also those of `--print_config`, which are printed before the texts are in them."""
        return super().dump(self.with_texts(cfg), **kwargs)

    def with_texts(self, settings: Namespace) -> Namespace:
        """Return a copy of settings that has the text settings, as far as it has settings of their names."""
        settings = settings.clone()
        for key, value in self.texts.items():
            if key in settings:
                settings[key] = value
        return settings


def load_settings(
    arguments: CommandLine, is_complete: bool = True
) -> tuple[StrictParser, Namespace, Checkpoint | None]:
    """Parse and check the settings of the command; open the checkpoint of `--ckpt_path`.

    Args:
        arguments: The command line.
        is_complete: Whether no more settings will be chosen. Else the shape of the model is not checked: the defaults
            need not go together with what is given.

    Returns:
        The parser, the settings, and the checkpoint, verified; None if there is none.

    Raises:
        UserError: A setting is wrong.
    """
    command = arguments.args[0]
    limit_parser()
    limit_imports(arguments.allowed_imports)
    parser = build_parser(command, arguments.run_name)
    settings = parse_settings(parser, arguments)
    checkpoint = validate_settings(settings, command, arguments.checkpoint)
    if is_complete:
        check_model(settings, checkpoint)
    return parser, settings, checkpoint


def limit_imports(allowed: list[str]) -> None:
    """Limit what configs and flags can name to classes and functions of some packages, in the whole process.

    Args:
        allowed: More packages, or modules, or classes.

    Raises:
        UserError: One of them is not the name of a package.
    """
    try:
        set_parsing_settings(
            instantiate_subclass_spec_in_any=False,
            import_path_denylist=["*", *DENIED_IMPORTS],
            import_path_allowlist=[*ALLOWED_IMPORTS, *allowed],
        )
    except ValueError:
        names = ", ".join(allowed)
        raise UserError(f"--allow_imports {names}: give names of packages, as --allow_imports my_package") from None


def build_on_meta(*args: Any, **kwargs: Any) -> LitGPT:
    with torch.device("meta"):  # weights are allocated once the device of each of them is known
        return LitGPT(*args, **kwargs)


build_on_meta.__doc__ = LitGPT.__doc__  # --help shows it


def build_parser(command: str, name: str) -> StrictParser:
    """Build the parser of one command.

    Args:
        command: `fit`, `validate` or `test`; the commands differ in the help of `--ckpt_path` only.
        name: The default of `--name`.
    """
    parser = StrictParser(
        prog=f"fit.py {command}",
        description=(getattr(Trainer, command).__doc__ or "").strip().split("\n")[0],
        dump_header=[f"lightning.pytorch=={lightning_version}"],
    )
    parser.add_argument(
        "-c", "--config", action=ActionConfigFile, help="Path to a configuration file in json or yaml format."
    )
    parser.add_argument(
        "--seed_everything", type=int, default=1337, help="Seed of everything random: weights, dropout, windows, texts."
    )
    add_trainer_arguments(parser)
    parser.add_lightning_class_args(build_on_meta, "model")
    parser.add_lightning_class_args(TextDataModule, "data")
    parser.add_argument("--name", type=str, default=name, help="The run's folder under logs/ (letters, digits, ._-).")
    parser.add_argument(
        "--allow_data_change", type=bool, default=False, help="Resume on another text or split than before."
    )
    parser.add_argument(
        "--allow_imports",
        type=list[str],
        default=[],
        help=f"A package whose classes configs may name, besides {', '.join(ALLOWED_IMPORTS)}. It may be given again.",
    )
    parser.add_argument(
        "--preflight",
        action=ActionYesNo,
        nargs="?",
        default=False,
        help="Measure a few steps, print what the run will need, and leave nothing behind.",
    )
    add_budget_arguments(parser)
    parser.add_argument(
        "--timeout",
        type=int,
        default=DEFAULT_TIMEOUT,
        help="Seconds a process waits for the others of its run; longer than a checkpoint takes to be written.",
    )
    parser.add_argument(
        "--validate_at_start", type=bool, default=True, help="Validate the untrained model before the first step."
    )
    add_visualize_arguments(parser)
    parser.add_lightning_class_args(StopEarly, "early_stopping")
    parser.add_lightning_class_args(GenerateText, "generate")
    parser.add_lightning_class_args(StepCheckpoint, "checkpoint")
    parser.link_arguments("model.config.context_length", "data.context_length")
    parser.link_arguments("seed_everything", "data.seed")
    parser.link_arguments("data.model_vocab_size", "model.config.vocab_size", apply_on="instantiate")
    parser.add_argument("--ckpt_path", type=str | None, default=None, help=CKPT_PATH_HELP[command])
    return parser


def add_budget_arguments(parser: StrictParser) -> None:
    """Add the arguments that leave the choice of settings to the program."""
    parser.add_argument(
        "--budget",
        type=str | None,
        default=None,
        help="Time for the whole command, as 90s, 10m, 2h or 1d. Settings that are not given are chosen for it.",
    )
    parser.add_argument(
        "--plan",
        action=ActionYesNo,
        nargs="?",
        default=False,
        help="With --budget, print what would be chosen and the equal command, and leave nothing behind.",
    )


def add_visualize_arguments(parser: StrictParser) -> None:
    """Add the arguments of `Visualize`, whose module is imported only where it is used."""
    parser.add_argument(
        "--visualize",
        type=bool,
        default=False,
        help="Show in TensorBoard what the model learns: likeliest tokens, attention, embeddings, histograms.",
    )
    parser.add_argument(
        "--attention_heads",
        type=list[list[int]] | None,
        default=None,
        help="With --visualize, the heads whose attention is shown, as [[0, 2], [3, 1]]: head 2 of block 0, head 1 of "
        "block 3. null: the first four of the first and the last block.",
    )


def add_trainer_arguments(parser: StrictParser) -> None:
    """Add the arguments of the Trainer. Without sub_configs, no value is the name of a file that gives the settings."""
    arguments = {**TRAINER_ARGUMENTS, "default_root_dir": (str | None, "The folder of all runs. null: logs.")}
    skip = {*arguments, "limit_predict_batches"}  # no command predicts
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, skip=skip)
    assert parser.groups is not None
    for key, (annotation, description) in arguments.items():
        default = inspect.signature(Trainer).parameters[key].default
        parser.groups["trainer"].add_argument(f"--trainer.{key}", type=annotation, default=default, help=description)
    parser.set_defaults({f"trainer.{key}": value for key, value in TRAINER_DEFAULTS.items()})


def parse_settings(parser: StrictParser, arguments: CommandLine) -> Namespace:
    """Parse configs and flags.

    Raises:
        UserError: A flag or a key is unknown, or its value has the wrong type.
    """
    configs, flags = copy.deepcopy(arguments.configs), remove_flags(["--allow_imports"], arguments.other_flags)
    if arguments.uses_saved_config:
        assert arguments.checkpoint is not None
        saved, left_out = take_settings(arguments.checkpoint, arguments.gives)
        if left_out and global_rank() == 0:
            print_lines(describe_left_out(arguments.checkpoint, left_out), to_stderr=True)
        configs.insert(0, saved)
    start: dict[str, Any] = {}
    if arguments.init_from is not None and not arguments.gives_checkpoint:
        start = start_settings(arguments.init_from)
    elif arguments.init_from is not None and arguments.checkpoint is not None:  # the run that began there goes on
        saved, _ = take_settings(arguments.checkpoint, arguments.gives)
        data = {name: value for name, value in saved.get("data", {}).items() if name in ("tokenizer", "vocab")}
        start = {"model": {"config": saved.get("model", {}).get("config", {})}, "data": data}
    configs.append(copy.deepcopy(start))
    given = {**find_values(flags), **{text.key: text.value for text in arguments.text_flags}}
    parser.flat_defaults = dict(parser.get_defaults().items())
    remove_replaced(configs, given, parser.flat_defaults)
    named = [] if arguments.reads_default_config else configs[int(arguments.uses_saved_config) :]
    parser.given = {
        key for key in parser.flat_defaults if key in given or any(has_setting(c, key) for c in [*named, start])
    }
    parser.texts = {}
    for config in configs:
        parser.texts.update(pop_texts(config))
    for text in arguments.text_flags:
        parser.texts[text.key] = add_texts(parser, text) if text.appends else text.value
    with temporary_folder() as folder:
        files = [Path(folder, f"{number}.yaml") for number, config in enumerate(configs) if config]
        try:
            for file, config in zip(files, filter(None, configs)):
                file.write_text(dump_yaml(config), encoding="utf-8")
        except OSError as error:
            raise write_error(Path(folder), error, "give TMPDIR another folder") from None
        try:
            settings = parser.parse_args([*(f"--config={file}" for file in files), *flags])
        except UserError as error:
            raise UserError(rewrite_parser_error(str(error), list(parser.flat_defaults))) from None
    return parser.with_texts(settings)


def add_texts(parser: StrictParser, flag: TextFlag) -> list[str]:
    """Return the texts of a setting so far, with those of a flag behind them."""
    before = parser.texts.get(flag.key, parser.get_default(flag.key))
    texts: list[str] = []
    for value in (before, flag.value):
        texts += [] if value is None else [value] if isinstance(value, str) else value
    return texts


def validate_settings(settings: Namespace, command: str, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Refuse settings that the parser accepts and that cannot work, before the data are read.

    Args:
        settings: All settings.
        command: `fit`, `validate` or `test`.
        checkpoint: The checkpoint of `--ckpt_path`, if it is open already.

    Returns:
        The checkpoint of `ckpt_path`, verified; None if there is none.

    Raises:
        UserError: The first of them.
    """
    check_run_name(settings.name)
    check_not_null(settings)
    check_values(settings)
    if settings.ckpt_path == "":
        raise UserError("--ckpt_path is empty: give a .ckpt file or last, or leave it out")
    if settings.ckpt_path in CHOICES:
        choice = settings.ckpt_path
        raise UserError(f"ckpt_path: {choice} in a config is not supported: give it as a flag, --ckpt_path {choice}")
    if settings.ckpt_path:
        settings.ckpt_path = os.path.expanduser(settings.ckpt_path)
        checkpoint = checkpoint or Checkpoint.open(settings.ckpt_path, verify=False)
        checkpoint.verify()
        check_lightning_version(checkpoint)
        checkpoint.build_model()
    if not 0 <= settings.seed_everything < 2**32:
        raise UserError(f"--seed_everything is {settings.seed_everything}: give a number from 0 to {2**32 - 1}")
    for message in validate_args(settings, command):
        raise UserError(message)
    return checkpoint


def check_model(settings: Namespace, checkpoint: Checkpoint | None) -> None:
    """Check the shape of the model, and what depends on it.

    Raises:
        UserError: There is no such model, or the checkpoint has another one.
    """
    shape = {key: value for key, value in settings.model.config.as_dict().items() if key != "vocab_size"}
    try:
        config = GPTConfig(vocab_size=1, **shape)
    except ValueError as error:
        raise UserError(f"--model.config: {error}") from None
    if settings.attention_heads is not None and not settings.visualize:
        raise UserError("--attention_heads shows nothing without --visualize true: give both, or null")
    check_heads(settings.attention_heads, config)
    if checkpoint is None and settings.model.init_from is not None:
        check_start(settings)
    if checkpoint is not None and (found := differences(saved_shape(checkpoint), shape)):
        raise other_model_error(checkpoint, found)


def saved_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the values of the checkpoint's GPTConfig. A field that is younger than the checkpoint has its default."""
    defaults = {field.name: field.default for field in fields(GPTConfig) if field.default is not MISSING}
    return {**defaults, **checkpoint.hyper_parameters.get("config", {})}


def differences(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Describe every value of `current` that differs from the checkpoint's."""
    return [
        f"{key} {saved.get(key)} in the checkpoint, {value} now"
        for key, value in current.items()
        if saved.get(key) != value
    ]


def other_model_error(checkpoint: Checkpoint, found: list[str]) -> UserError:
    """Return the error that the checkpoint's model differs in what `differences` found from that of the settings."""
    return UserError(
        f"{checkpoint.path} has another model ({'; '.join(found)}): remove the flags that change it, or --ckpt_path"
    )


def check_lightning_version(checkpoint: Checkpoint) -> None:
    """Check that Lightning 2 wrote the checkpoint: Lightning rewrites what says that an earlier version wrote it.

    Raises:
        UserError: It did not.
    """
    version = checkpoint.contents.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.fullmatch(r"2\.\d+\.\d+(\.?(a|b|rc|post|dev)\d+)?", version):
        raise UserError(
            f"{checkpoint.path} says that Lightning {str(version)[:20]!r} wrote it, which is no version 2: {REMEDY}"
        )
