"""What generate.py needs to know of the training text: the columns of a document, and all training rows.

Both follow from the config in the checkpoint, which gives plain values only.
"""

from typing import Any

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.data.prompts import parse_given, start_of_document
from lit_gpt.data.read_options import ReadOptions
from lit_gpt.errors import UserError, shorten
from lit_gpt.inference.texts import TrainingRows

# Settings that name a file, which may be a URL; the prompt of --given needs none of them.
FILES = ("data.files", "data.val_files", "data.test_files", "data.tokenizer")


def prompt_of_columns(checkpoint: Checkpoint, pairs: list[str]) -> str:
    """Return the prompt of `--given`: a training document up to the first column that is not given.

    Args:
        checkpoint: The checkpoint, whose config names the columns.
        pairs: Its values, `COLUMN=TEXT`.

    Raises:
        UserError: The model was not trained on named columns, or the pairs do not fit them.
    """
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


def training_rows(checkpoint: Checkpoint) -> TrainingRows:
    """Return the rows on which the model of a checkpoint was trained, for `--novel`.

    Raises:
        UserError: It was not trained on rows, or its files are not here, or their text is another one.
    """
    from lit_gpt.data.corpus import corpus_key, open_corpus  # imported here because they import Lightning
    from lit_gpt.data.datamodule import CACHE, TextDataModule

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
