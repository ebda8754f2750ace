"""summary.json: what a run was and how far it came, in a file that is read in a tenth of a millisecond."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args

from lit_gpt.files import atomic_write, open_regular

SUMMARY_FILE = "summary.json"
MAX_BYTES = 2**23  # of a file that is read: a command that lists files may have 2 MB, and its settings once more
MAX_NUMBER = 1e18  # in a file that is read; no run has more of anything

Status = Literal["running", "finished", "stopped", "failed"]


class DamagedSummaryError(ValueError):
    """The file is no summary; the message says why."""


@dataclass
class RunSummary:
    """What a run was and how far it came.

    Every value is plain: numbers, texts, lists and dictionaries of them. None stands for what is not known (yet).

    Attributes:
        name: The name of the run, its folder under logs/.
        folder: The folder of the run when it was written, logs/<name>/version_<n>.
        status: "running", "finished", "stopped" (by Ctrl-C, SIGTERM or a time limit) or "failed" (by an error). A run
            that was killed keeps "running".
        command: The latest command of the run, as for a shell.
        settings: All settings, without those that are null: "model.config.d_model" -> 128.
        defaults: The settings that differ from their defaults, with the defaults; null for one without.
        parameters: Parameters of the model; a shared one counts once.
        tokens: Tokens trained on, summed over resumes.
        step: Optimizer steps.
        max_steps: The last step that was planned; None without an end.
        best_loss: The lowest `loss/val` so far, in nats per token; the untrained model is no candidate.
        best_step: The step that reached it.
        bits_per_byte: `val/bits_per_byte` at that step: comparable across tokenizers.
        last_loss: `loss/val` of the latest validation.
        last_train_loss: `loss/train_eval` of the latest validation.
        seconds: Time in which the run trained, validations and samples included, summed over resumes. Steps that were
            lost because the run was killed do not count.
        tokens_per_second: Mean training speed of the latest command over all devices, without validations.
        started: When the run began, ISO 8601 with the offset from UTC.
        ended: When this file was written, likewise.
        machine: The computer: cpu, cores, memory in bytes, devices, system.
        versions: Versions of Python, of this package and of the libraries that decide about results.
        git: commit, and whether tracked files are changed, of the checkout of this package; {} if it is none.
        advice: What the run said about its learning rate; "" for nothing.
        data: What the corpus's report says: files, documents, characters, tokens, tokenizer and others.
    """

    name: str
    folder: str
    status: Status = "running"
    command: str = ""
    settings: dict = field(default_factory=dict)
    defaults: dict = field(default_factory=dict)
    parameters: int = 0
    tokens: int = 0
    step: int = 0
    max_steps: int | None = None
    best_loss: float | None = None
    best_step: int | None = None
    bits_per_byte: float | None = None
    last_loss: float | None = None
    last_train_loss: float | None = None
    seconds: float = 0.0
    tokens_per_second: float | None = None
    started: str = ""
    ended: str = ""
    machine: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    git: dict = field(default_factory=dict)
    advice: str = ""
    data: dict = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write summary.json into the folder of the run.

        Raises:
            OSError: It cannot be written.
        """
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1, default=str) + "\n"
        atomic_write(folder / SUMMARY_FILE, lambda file: file.write(text.encode("utf-8", "replace")), durable=False)


def read_summary(folder: str | Path) -> RunSummary:
    """Read the summary in the folder of a run.

    Raises:
        DamagedSummaryError: The file is damaged, or it cannot be read.
        FileNotFoundError: There is none.
    """
    try:
        with open_regular(os.path.join(folder, SUMMARY_FILE)) as file:
            content = file.read(MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(folder)) from None
    except OSError as error:
        raise DamagedSummaryError(error.strerror or str(error)) from None
    if len(content) > MAX_BYTES:
        raise DamagedSummaryError(f"it has more than {MAX_BYTES:,} bytes")
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DamagedSummaryError("it is not JSON") from None
    return _from_values(values)


def _from_values(values: Any) -> RunSummary:
    """Return the summary with these values; keys that this version does not know are left out."""
    if not isinstance(values, dict):
        raise DamagedSummaryError("it is not an object of JSON")
    known = {name: value for name, value in values.items() if name in _TYPES}
    for name, value in known.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        is_too_large = is_number and not abs(value) <= MAX_NUMBER  # or NaN
        if is_number and not is_too_large and float in _TYPES[name]:
            known[name] = value = float(value)
        if type(value) not in _TYPES[name] or is_too_large:
            raise DamagedSummaryError(f"its {name} is {str(value)[:40]!r}")
    if not {"name", "folder", "status"} <= known.keys() or known["status"] not in get_args(Status):
        raise DamagedSummaryError("it has no name, folder or status")
    return RunSummary(**known)


def _types_of(annotation: Any) -> tuple[type, ...]:
    """Return the types of the values that an annotation of `RunSummary` allows."""
    if isinstance(annotation, UnionType):
        return get_args(annotation)
    return (annotation,) if isinstance(annotation, type) else (str,)  # str: Status


_TYPES = {entry.name: _types_of(entry.type) for entry in fields(RunSummary)}
