"""What generate.py takes from the training text: the columns of `--given`, and the rows of `--novel`.

Both follow from the config in the checkpoint, which gives plain values only.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.convert.load import ImportedModel
from lit_gpt.data.read_options import ReadOptions, join_names, make_formatter, unescape
from lit_gpt.errors import UserError, did_you_mean, shorten
from lit_gpt.inference.texts import TrainingRows

# Settings that name a file, which may be a URL; the prompt of --given needs none of them.
FILES = ("data.files", "data.val_files", "data.test_files", "data.tokenizer")
MAX_VALIDATION_IDS = 2**14  # of which texts are taken
IDS_PER_TEXT = 256  # in raw mode
PLACEHOLDER = "\0"  # stands for the columns that are not given; no field of a table contains it


def prompt_of_columns(checkpoint: Checkpoint | ImportedModel, pairs: list[str]) -> str:
    """Return the prompt of `--given`: a training document up to the first column that is not given.

    Args:
        checkpoint: The checkpoint, whose config names the columns.
        pairs: Its values, `COLUMN=TEXT`.

    Raises:
        UserError: The model was not trained on named columns, or the pairs do not fit them.
    """
    checkpoint = _trained_here(checkpoint, "--given")
    data = _data_settings(checkpoint, "--given", left_out=FILES)
    columns = data.get("columns")
    columns = (columns,) if isinstance(columns, str) else columns and tuple(columns)
    options = ReadOptions(columns=columns, template=data.get("template"))
    if data.get("mode") == "raw" or not options.named_columns():
        raise UserError(
            f"--given fills a template or several columns, and {checkpoint.path} was trained on neither: give the "
            "beginning of a text as a prompt"
        )
    return start_of_document(options, parse_given(pairs, options.named_columns()))


def parse_given(texts: list[str], columns: list[str]) -> dict[str, str]:
    r"""Parse `COLUMN=TEXT` pairs. A column may have a `=` in its name, and a text as well. `\n` and `\t` may be typed.

    Args:
        texts: The pairs.
        columns: The columns of a document.

    Raises:
        UserError: A pair has no `=`, its column is unknown, or a column is given twice.
    """
    given: dict[str, str] = {}
    for text in texts:
        if "=" not in text:
            raise UserError(f"--given {shorten(text)!r} names no column: write COLUMN=TEXT, as {columns[0]}=TEXT")
        matches = [column for column in columns if text.startswith(f"{column}=")]
        if not matches:
            name = text.partition("=")[0]
            raise UserError(
                f"--given {shorten(name)!r} is no column of the training documents; they have {join_names(columns)}"
                f"{did_you_mean(name, columns)}"
            )
        column = max(matches, key=len)
        if column in given:
            raise UserError(f"--given {column} is there twice: leave one out")
        given[column] = unescape(text.removeprefix(f"{column}="))
    return given


def start_of_document(options: ReadOptions, given: Mapping[str, str]) -> str:
    r"""Return the text of a document up to the first column that is not given.

    Example:
        >>> start_of_document(ReadOptions(template=r"{title}\n{text}"), {"title": "静夜思"})
        '静夜思\n'

    Args:
        options: How the documents of training were read.
        given: The text of some columns. In the order of a document they come before all others.

    Raises:
        UserError: All columns are given, or one that comes after a column that is not given.
    """
    columns = options.named_columns()
    missing = [column for column in columns if column not in given]
    if not missing:
        raise UserError(
            f"--given has all columns of a document, {join_names(columns)}, and nothing is left to write: leave out "
            f"{shorten(columns[-1])}, or give the beginning of the document as a prompt"
        )
    late = [column for column in columns[columns.index(missing[0]) :] if column in given]
    if late:
        raise UserError(
            f"--given {shorten(late[0])}: a document is {join_names(columns)} in this order, and "
            f"{shorten(missing[0])} is not given: give {shorten(missing[0])} too, or leave out {shorten(late[0])}"
        )
    document = make_formatter(options)([given.get(column, PLACEHOLDER) for column in columns])
    return document.partition(PLACEHOLDER)[0]


def training_rows(checkpoint: Checkpoint | ImportedModel) -> TrainingRows:
    """Return the rows on which the model of a checkpoint was trained, for `--novel`.

    Raises:
        UserError: It was not trained on rows, or its files are not here, or their text is another one.
    """
    from lit_gpt.data.corpus import corpus_key, open_corpus  # imported here because they import Lightning
    from lit_gpt.data.datamodule import CACHE, TextDataModule

    checkpoint = _trained_here(checkpoint, "--novel")
    if checkpoint.data_fingerprint.get("mode") != "rows":
        raise UserError(f"--novel compares rows, and {checkpoint.path} was trained with --data.mode raw: leave it out")
    data = TextDataModule(**_data_settings(checkpoint, "--novel"))
    try:
        sources = data.sources()
    except UserError as error:
        raise _unusable("--novel", error, "run in the folder of the training, or leave out --novel") from None
    if corpus_key(sources, data.corpus_config) != checkpoint.data_fingerprint.get("key"):
        names = ", ".join(shorten(str(source)) for source in sources[:3])
        raise UserError(
            f"--novel: {names} is not the text on which {checkpoint.path} was trained: put that text there, or leave "
            "out --novel"
        )
    corpus = open_corpus(sources, data.corpus_config, CACHE)
    return TrainingRows(corpus.split("train"), corpus.tokenizer)


def validation_texts(checkpoint: Checkpoint | ImportedModel, count: int) -> list[str]:
    """Return up to `count` texts of the validation split of a checkpoint's training text.

    Raises:
        UserError: Its files are not here, or their text is another one.
    """
    from lit_gpt.data.corpus import corpus_key, open_corpus  # imported here because they import Lightning
    from lit_gpt.data.datamodule import CACHE, TextDataModule

    checkpoint = _trained_here(checkpoint, "--ckpt_path")
    data = TextDataModule(**_data_settings(checkpoint, "--ckpt_path"))
    sources = data.sources()
    if corpus_key(sources, data.corpus_config) != checkpoint.data_fingerprint.get("key"):
        raise UserError("the files are not the text of the training")
    corpus = open_corpus(sources, data.corpus_config, CACHE)
    tokenizer = corpus.tokenizer
    ids = np.array(corpus.split("val")[:MAX_VALIDATION_IDS]).tolist()
    if data.corpus_config.read_options.mode == "rows":
        rows = [list(row) for is_end, row in groupby(ids, lambda id: id == tokenizer.end_of_text) if not is_end]
    else:
        rows = [ids[start : start + IDS_PER_TEXT] for start in range(0, len(ids), IDS_PER_TEXT)]
    return [tokenizer.decode(row) for row in rows[:count]]


def _trained_here(checkpoint: Checkpoint | ImportedModel, flag: str) -> Checkpoint:
    """Return the checkpoint.

    Raises:
        UserError: It is the model of another program.
    """
    if isinstance(checkpoint, ImportedModel):
        raise UserError(f"{flag} needs the training text, which {checkpoint.path} does not state: leave it out")
    return checkpoint


def _data_settings(checkpoint: Checkpoint, flag: str, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the data settings of the config in a checkpoint, except for those in `left_out`.

    Raises:
        UserError: There is no config, or it names a URL.
    """
    from lit_gpt.cli.saved_config import take_settings  # imported here because it imports Lightning

    try:
        settings, _ = take_settings(checkpoint, lambda name: not name.startswith("data.") or name in left_out)
    except UserError as error:
        raise _unusable(flag, error, f"leave out {flag}") from None
    data: dict[str, Any] = settings.get("data", {})
    return data


def _unusable(flag: str, error: UserError, remedy: str) -> UserError:
    """Return an error whose remedy fits generate.py; that of `error` names a flag of fit.py."""
    reason = str(error).partition("; give ")[0].partition(": give ")[0]
    return UserError(f"{flag}: {reason}: {remedy}")
