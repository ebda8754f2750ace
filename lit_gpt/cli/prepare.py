"""Tokenizes files ahead of training, and says what is in them."""

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.messages import LineParser, quiet_lightning
from lit_gpt.cli.parser import load_settings
from lit_gpt.cli.table import print_rows
from lit_gpt.data.config import SPLITS
from lit_gpt.data.corpus import Corpus, open_corpus
from lit_gpt.data.datamodule import CACHE, TextDataModule
from lit_gpt.data.executors import EXECUTORS
from lit_gpt.data.tokenize import read_texts, train_tokenizer
from lit_gpt.errors import UserError
from lit_gpt.tokenizer import BytePairTokenizer, open_tokenizer, prune

COMPARED = 2**24  # characters that tokenizers are compared on at most
LEARNED = (1024, 4096, 16384)  # sizes of vocabularies learned for the comparison


def shown(corpus: Corpus) -> str:
    """A corpus's report as lines a person can act on."""
    report = corpus.report
    lines = []
    for file in report["files"]:
        sure = f" (looks like it, {file['sure']:.0%}: else give --data.encoding)" if file["sure"] < 1 else ""
        lines.append(f"file        {file['name']}   {file['bytes'] / 1e6:,.1f} MB, {file['encoding']}{sure}")
    if report["mode"] == "rows":
        left_out = f", {report['duplicates_left_out']:,} came before" if report["duplicates_left_out"] else ""
        lines.append(
            f"rows        {report['rows']:,}: {report['documents']:,} documents, {report['rejected']:,} rejected, "
            f"{report['empty_rows']:,} empty{left_out}"
        )
    lines += [f"rejected    {file} line {line}: {reason}" for file, line, reason in report["rejected_first"]]
    if report["rejected"] > len(report["rejected_first"]):
        lines.append(f"            all {report['rejected']:,} are in {corpus.folder / 'rejected.jsonl'}")
    if report["duplicates"] > report["duplicates_left_out"]:
        (file, line), (other, first) = report["duplicates_first"][0]
        lines.append(
            f"duplicates  {report['duplicates']:,} rows came before (first {file} line {line}, as {other} line "
            f"{first}); {report['duplicates_across']:,} outside training are also in it: --data.dedupe true leaves out"
        )
    lines.append(f"text        {report['characters']:,} characters, {report['bytes']:,} bytes")
    if report["longest"]:
        rows = (f"{file} line {line} ({size:,})" for file, line, size in report["longest"][:3])
        lines.append(f"longest     {', '.join(rows)} characters")
    lines.append(
        f"tokens      {report['tokens']:,}, {report['tokens_per_character']:.2f} a character; of "
        f"{report['vocab_size']:,} different ones {report['vocabulary_in_use']:,} occur"
    )
    lines.append("rarest      " + ", ".join(f"{text!r} {count:,}" for _, text, count in report["least_frequent"]))
    for part in SPLITS:
        if counts := report["parts"][part]["tokens"]:
            lines.append(f"{part:11} {report['parts'][part]['documents']:,} documents, {counts:,} tokens")
    return "\n".join(lines)


def compare(data: TextDataModule, shape: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each tokenizer would make of the text, and what its embeddings would cost at the config's width."""
    sources, recipe = data.sources(), data.corpus_config
    texts: list[str] = []
    size = 0
    for text in read_texts(sources, recipe.read_options):
        texts.append(text)
        size += len(text)
        if size > COMPARED:
            break
    tables = 1 + (not shape["tie_embeddings"]) + shape["previous_tokens"]
    ways: list[tuple[str, str, int]] = [
        *((name, vocab, 0) for name in ("cl100k_base", "o200k_base", "gpt2") for vocab in ("full", "pruned")),
        *(("bpe", "", size) for size in LEARNED),
        ("char", "", 0),
        ("byte", "", 0),
    ]
    for name, vocab, vocab_size in tqdm(ways, desc="comparing", delay=2, leave=False):
        row: dict[str, Any] = {"tokenizer": " ".join(filter(None, (name, vocab, str(vocab_size or ""))))}
        try:
            if name in ("bpe", "char"):
                tokenizer = train_tokenizer(sources, replace(recipe, tokenizer=name, vocab_size=vocab_size or 4096))
            else:
                tokenizer = open_tokenizer(name)
        except UserError as error:
            if vocab != "pruned":  # which would be said again
                tqdm.write(f"left out: {error}", file=sys.stderr)
            continue
        ids, _ = tokenizer.encode_documents(texts)
        used = np.unique(ids)
        if vocab == "pruned":
            assert isinstance(tokenizer, BytePairTokenizer)
            tokenizer, _ = prune(tokenizer, used[used != tokenizer.end_of_text])
        tokens = len(ids) - len(texts)
        yield row | {
            "vocabulary": tokenizer.vocab_size,
            "in_use": len(used),
            "tokens": tokens,
            "bytes_per_token": sum(len(text.encode()) for text in texts) / tokens,
            "tokens_per_character": tokens / sum(map(len, texts)),
            "embedding_parameters": tables * shape["d_model"] * tokenizer.vocab_size,
        }


def main(words: list[str], default_config: Path) -> int:
    """Runs the command line; returns the exit status of `exit_status`."""
    quiet_lightning()
    return exit_status(lambda: report(words, default_config))


def report(words: list[str], default_config: Path) -> None:
    parser = LineParser(f"{__doc__} Takes --config and the data flags of fit.py besides.")
    parser.add_argument("--processes", type=int, help="that tokenize; all cores if left out and the text is long")
    parser.add_argument(
        "--engine", choices=EXECUTORS, default="local", help="ray: workers of the cluster RAY_ADDRESS names"
    )
    parser.add_argument("--dry_run", action="store_true", help="report, and leave nothing behind")
    parser.add_argument("--compare", action="store_true", help="tokenizers on this text, and what each would cost")
    parser.add_argument("--json", action="store_true", help="the report, or every tokenizer, as JSON")
    options, others = parser.parse_known_args(words)
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}: give 1 or more")
    _, settings = load_settings(CommandLine(others, default_config))
    data = TextDataModule(**settings.data)
    if options.compare:
        print_rows(compare(data, settings.model.config.as_dict()), options.json)
        return
    with tempfile.TemporaryDirectory() if options.dry_run else contextlib.nullcontext(CACHE) as folder:
        corpus = open_corpus(data.sources(), data.corpus_config, Path(folder), options.processes, options.engine)
        print(json.dumps(corpus.report, ensure_ascii=False) if options.json else shown(corpus))
        if not options.dry_run and not options.json:
            print(f"cache       {corpus.folder}")
