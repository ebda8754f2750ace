"""What the command line knows about a run before it trains, for its summary."""

import shlex
import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.config_file import LINKED_SETTINGS
from lit_gpt.cli.config_values import flatten
from lit_gpt.cli.messages import program_name
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.runs.summary import RunSummary

NOT_SETTINGS = {
    *("config", "ckpt_path", "allow_data_change", "allow_imports", "preflight", "budget", "plan", "name"),
    *LINKED_SETTINGS,
}
MAX_FILES = 20  # that a summary lists

# What a summary takes from the report of a corpus.
REPORTED = (
    *("mode", "rows", "documents", "empty_rows", "rejected", "duplicates", "duplicates_left_out", "duplicates_across"),
    *("characters", "bytes", "tokens", "tokens_per_character", "vocab_size", "vocabulary_in_use", "parts"),
)


def describe_start(
    settings: Namespace, defaults: dict[str, Any], data: TextDataModule, arguments: CommandLine, folder: Path
) -> RunSummary:
    """Return the summary of a run that has not begun.

    Args:
        settings: All settings, with the precision that this machine has chosen: a run that is resumed keeps it.
        defaults: The default of each setting, by name.
        data: The data module.
        arguments: The command line.
        folder: The folder of the run.
    """
    values, differing = plain_settings(settings, defaults)
    return RunSummary(
        name=settings.name,
        folder=str(folder),
        command=describe_command(arguments),
        settings=values,
        defaults=differing,
        data=describe_data(data),
    )


def describe_command(arguments: CommandLine) -> str:
    """Return the command as for a shell; it has the configs first, and the checkpoint that `last` has found."""
    command, *words = arguments.given_args
    return shlex.join([program_name("python"), sys.argv[0], *([] if command == "fit" else [command]), *words])


def plain_settings(settings: Namespace, defaults: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that are not null, and the defaults of those settings that differ from them.

    Args:
        settings: All settings.
        defaults: The default of each setting, by name.
    """
    values = flatten(settings.as_dict())
    values = {key: value for key, value in values.items() if key not in NOT_SETTINGS}
    usual = flatten(defaults)
    keys = dict.fromkeys([*values, *usual])
    differing = {key: usual.get(key) for key in keys if key not in NOT_SETTINGS and values.get(key) != usual.get(key)}
    return values, differing


def describe_data(data: TextDataModule) -> dict[str, Any]:
    """Return what a summary says about the text."""
    report = data.corpus.report
    files = [{key: file[key] for key in ("name", "bytes", "encoding", "sure")} for file in report["files"][:MAX_FILES]]
    return {
        "files": files,
        "num_files": len(report["files"]),
        "tokenizer": data.corpus_config.tokenizer_name,
        **{key: report[key] for key in REPORTED},
    }
