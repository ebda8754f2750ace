"""The command of scripts/prepare.py: tokenize files ahead of training, and report what is in them."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jsonargparse import Namespace
from tqdm import tqdm

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.describe_data import encoding_lines, hint_lines
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, print_json, print_lines, print_rows, quiet_lightning
from lit_gpt.cli.parser import load_settings
from lit_gpt.data.cache import Corpus
from lit_gpt.data.config import SPLITS, CorpusConfig
from lit_gpt.data.corpus import open_corpus
from lit_gpt.data.datamodule import CACHE, TextDataModule
from lit_gpt.data.executors import EXECUTORS
from lit_gpt.data.sources import Source
from lit_gpt.data.tokenize import read_texts, train_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.files import temporary_folder
from lit_gpt.tokenizer import BytePairTokenizer, Tokenizer, open_tokenizer, prune

MAX_COMPARED_CHARACTERS = 2**24  # tokenizers are compared on the first characters of the text

# What `--compare` compares: values of data.tokenizer, data.vocab and data.vocab_size; None where one does not apply.
COMPARED_TOKENIZERS: list[tuple[str, str | None, int | None]] = [
    *((name, vocab, None) for name in ("cl100k_base", "o200k_base", "gpt2") for vocab in ("full", "pruned")),
    *(("bpe", None, vocab_size) for vocab_size in (1024, 4096, 16384)),
    ("char", None, None),
    ("byte", None, None),
]

USAGE = "python scripts/prepare.py [flags] [--config FILE] [--data.NAME VALUE ...]"
DESCRIPTION = """Tokenize files before training, and report what is in them: rows, duplicates,
tokens, splits. Settings of data are those of fit.py: see fit.py --help data."""
EXAMPLES = (
    "python scripts/prepare.py --data.files poems.csv --data.columns text --dry_run",
    "python scripts/prepare.py --data.files poems.csv --data.columns text --compare",
    "python scripts/prepare.py --data.files corpus.parquet --data.columns text",
)


def main(args: list[str], default_config: Path) -> int:
    """Run the command; return its exit status (see `classify`).

    Args:
        args: The arguments, without the program's name.
        default_config: The path of default.yaml.
    """
    quiet_lightning()
    return exit_status(lambda: run(args, default_config))


def run(args: list[str], default_config: Path) -> None:
    """Tokenize and print a report, or compare tokenizers.

    Raises:
        UserError: An argument is wrong, or the files cannot be read.
    """
    parser = LineParser(USAGE, DESCRIPTION, EXAMPLES)
    parser.add_argument("--dry_run", action="store_true", help="report, and leave nothing behind")
    parser.add_argument("--compare", action="store_true", help="compare tokenizers on this text, and what each costs")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="processes that tokenize; default: all cores, for long texts"
    )
    parser.add_argument(
        "--engine",
        choices=EXECUTORS,
        default="local",
        help="where to tokenize: here (local), or on the Ray cluster at RAY_ADDRESS (ray)",
    )
    options, fit_args = parser.parse_known_args(args)
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give 1 or more")
    _, settings, _ = load_settings(CommandLine(fit_args, default_config))
    data = TextDataModule(**settings.data)
    if options.compare:
        print_rows(compare_tokenizers(data, settings.model.config), options.json)
        return
    with temporary_folder() if options.dry_run else contextlib.nullcontext(CACHE) as folder:
        corpus = open_corpus(data.sources(), data.corpus_config, Path(folder), options.processes, options.engine)
        if options.json:
            print_json(corpus.report)
            return
        print_lines(*describe_corpus(corpus), *hint_lines(corpus.report, data.corpus_config, data.sources()))
        if not options.dry_run:
            print_lines(f"cache       {corpus.folder}")


def describe_corpus(corpus: Corpus) -> Iterator[str]:
    """Yield a corpus's report as lines of text."""
    report = corpus.report
    for file in report["files"]:
        yield f"file        {file['name']}   {file['bytes'] / 1e6:,.1f} MB, {file['encoding']}"
    yield from encoding_lines([file for file in report["files"] if not file["sure"]])
    yield from _describe_rows(corpus)
    yield f"text        {report['characters']:,} characters, {report['bytes']:,} bytes"
    if report["longest"]:
        rows = (f"{file} line {line} ({characters:,})" for file, line, characters in report["longest"][:3])
        yield f"longest     {', '.join(rows)} characters"
    yield (
        f"tokens      {report['tokens']:,}, {report['tokens_per_character']:.2f} a character; of "
        f"{report['vocab_size']:,} different ones {report['vocabulary_in_use']:,} occur"
    )
    yield "rarest      " + ", ".join(f"{text!r} {count:,}" for _, text, count in report["least_frequent"])
    for split in SPLITS:
        counts = report["parts"][split]
        if counts["tokens"]:
            yield f"{split:11} {counts['documents']:,} documents, {counts['tokens']:,} tokens"


def _describe_rows(corpus: Corpus) -> Iterator[str]:
    """Yield the lines about rows: how many there are, which are rejected, and which are duplicates."""
    report = corpus.report
    if report["mode"] == "rows":
        dropped = report["duplicates_left_out"]
        yield (
            f"rows        {report['rows']:,}: {report['documents']:,} documents, {report['rejected']:,} rejected, "
            f"{report['empty_rows']:,} empty" + (f", {dropped:,} duplicates left out" if dropped else "")
        )
    for file, line, reason in report["rejected_first"]:
        yield f"rejected    {file} line {line}: {reason}"
    if report["rejected"] > len(report["rejected_first"]):
        yield f"            all {report['rejected']:,} are in {corpus.folder / 'rejected.jsonl'}"
    if report["duplicates"] > report["duplicates_left_out"] and report["duplicates_first"]:
        (file, line), (original, original_line) = report["duplicates_first"][0]
        yield (
            f"duplicates  {report['duplicates']:,} rows have the text of an earlier row (the first is {file} line "
            f"{line}, as {original} line {original_line}); {report['duplicates_across']:,} rows outside the training "
            "split are also in it; --data.dedupe true leaves duplicates out"
        )


def compare_tokenizers(data: TextDataModule, shape: Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row of figures for each of COMPARED_TOKENIZERS that is installed.

    Args:
        data: The data module, for its files and how to read them.
        shape: The settings of the model, for the number of parameters of its embeddings and head.
    """
    sources, config = data.sources(), data.corpus_config
    texts = _read_first_texts(sources, config)
    characters, num_bytes = sum(map(len, texts)), sum(len(text.encode()) for text in texts)
    tables = 1 + (not shape.tie_embeddings) + shape.previous_tokens  # matrices of shape (vocab_size, d_model)
    for name, vocab, vocab_size in tqdm(COMPARED_TOKENIZERS, desc="comparing", delay=2, leave=False, disable=None):
        try:
            tokenizer = _open_or_train(name, vocab_size, sources, config)
        except UserError as error:
            if vocab != "pruned":  # "full" has printed the same error
                with tqdm.external_write_mode(sys.stderr):  # hides the bar meanwhile
                    print_lines(f"left out: {error}", to_stderr=True)
            continue
        ids, _ = tokenizer.encode_documents(texts)
        used_ids = np.unique(ids)
        if vocab == "pruned":
            assert isinstance(tokenizer, BytePairTokenizer)
            tokenizer, _ = prune(tokenizer, used_ids[used_ids != tokenizer.end_of_text])
        tokens = len(ids) - len(texts)  # without the end-of-text token of each document
        yield {
            "tokenizer": " ".join(str(part) for part in (name, vocab, vocab_size) if part),
            "vocabulary": tokenizer.vocab_size,
            "in_use": len(used_ids),
            "tokens": tokens,
            "bytes_per_token": num_bytes / tokens,
            "tokens_per_character": tokens / characters,
            "embedding_parameters": tables * shape.d_model * tokenizer.vocab_size,
        }


def _read_first_texts(sources: list[Source], config: CorpusConfig) -> list[str]:
    """Return documents from the start of the files, until they have more than MAX_COMPARED_CHARACTERS."""
    texts: list[str] = []
    characters = 0
    for text in read_texts(sources, config.read_options):
        texts.append(text)
        characters += len(text)
        if characters > MAX_COMPARED_CHARACTERS:
            break
    return texts


def _open_or_train(name: str, vocab_size: int | None, sources: list[Source], config: CorpusConfig) -> Tokenizer:
    """Return a tokenizer by name; train it on the files if it depends on them.

    Raises:
        UserError: The tokenizer is not installed.
    """
    if name in ("bpe", "char"):
        return train_tokenizer(sources, replace(config, tokenizer=name, vocab="pruned", vocab_size=vocab_size))
    return open_tokenizer(name)
