"""Run scripts/export.py: write a model in the format of another program, and prove that it computes the same."""

import argparse
import contextlib
import importlib
import time
from collections.abc import Iterator
from pathlib import Path

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.generate import open_checkpoint
from lit_gpt.cli.messages import LineParser, print_lines
from lit_gpt.cli.training_text import validation_texts
from lit_gpt.convert.load import ImportedModel
from lit_gpt.convert.target import Target
from lit_gpt.errors import UserError, did_you_mean
from lit_gpt.files import atomic_replace, expand_path, remove, temporary_path, write_error
from lit_gpt.inference.texts import generate_texts
from lit_gpt.model import GPT
from lit_gpt.tokenizer_base import Tokenizer

DESCRIPTION = """Write a trained model in the format of another program: a folder for
Hugging Face's transformers, a GGUF file for llama.cpp and Ollama, or one web page.
The result is compared with the model before it appears."""
EXAMPLES = (
    "python scripts/export.py --name poems --to hf poems-hf",
    "python scripts/export.py --ckpt_path best.ckpt --to gguf poems.gguf --dtype q8_0",
    "python scripts/export.py --name poems --to html poems.html",
)
MODULES = {"hf": "hugging_face", "gguf": "gguf_file", "html": "web_page"}  # kind -> module of lit_gpt.convert
NUM_TEXTS = 8  # whose logits are compared
MAX_NEW_TOKENS = 64  # of a text that the model writes for it


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: export(parse_options(args)))


def parse_options(args: list[str]) -> argparse.Namespace:
    """Parse the flags.

    Raises:
        UserError: A flag is unknown or missing, or there is something at the path already.
    """
    parser = LineParser("python scripts/export.py [--name NAME] --to KIND PATH [--dtype DTYPE]", DESCRIPTION, EXAMPLES)
    parser.add_argument("--name", help="run to use, as given to fit.py; default: the newest")
    parser.add_argument(
        "--ckpt_path", type=expand_path, metavar="FILE", help="checkpoint, or last or best of the run; default: best"
    )
    parser.add_argument(
        "--to", nargs=2, metavar=("KIND", "PATH"), help="hf and a folder, gguf or html and a file, none of which exists"
    )
    parser.add_argument("--dtype", help="number format of the weights; default: hf float32, gguf f16, html bfloat16")
    options = parser.parse_args(args)
    if options.to is None:
        raise UserError("--to is missing: give hf, gguf or html and a path, as --to hf poems-hf")
    options.kind, path = options.to
    if options.kind not in MODULES:
        raise UserError(
            f"--to {options.kind} is unknown{did_you_mean(options.kind, MODULES)}: give one of {', '.join(MODULES)}"
        )
    options.path = expand_path(path)
    return options


def export(options: argparse.Namespace) -> None:
    """Write the model, compare the result with it, and print what was compared.

    Raises:
        UserError: The target cannot express the model, or the path exists already or cannot be written, or the result
            differs from the model. Then nothing is left behind.
    """
    target: Target = importlib.import_module(f"lit_gpt.convert.{MODULES[options.kind]}").TARGET
    dtype = options.dtype or target.dtypes[0]
    if dtype not in target.dtypes:
        raise UserError(f"--dtype {dtype}: --to {options.kind} writes {', '.join(target.dtypes)}: give one of them")
    if target.suffix and options.path.suffix != target.suffix:
        raise UserError(f"--to {options.kind} {options.path}: give a name that ends in {target.suffix}")
    for path in (options.path, *map(options.path.with_suffix, target.suffixes_beside)):
        check_is_free(path)
    missing = [folder for folder in options.path.parents if not folder.exists()]  # the innermost first
    checkpoint = open_checkpoint(options.ckpt_path, options.name)
    print_lines(f"[{checkpoint.path}]", to_stderr=True)
    start = time.perf_counter()
    model, tokenizer, mode = checkpoint.load_model()
    texts = texts_to_compare(checkpoint, model, tokenizer, mode)
    unfinished = temporary_path(options.path)  # a folder, which holds what appears beside each other
    written = unfinished / options.path.name
    try:
        with write_errors(options.path):
            remove(unfinished)
            unfinished.mkdir(parents=True)
            target.write(model, tokenizer, mode, written, dtype)
        parity = target.check(model, tokenizer, mode, written, texts, dtype)
        with write_errors(options.path):
            for path in sorted(unfinished.iterdir(), key=lambda path: path == written):  # the model last
                move(path, options.path.parent / path.name)
    finally:
        with contextlib.suppress(OSError):
            remove(unfinished)
            for folder in missing:
                folder.rmdir()  # fails if it is not empty
    print_lines(
        f"compared    {parity.strings:,} strings encoded equally; logits of {parity.tokens:,} tokens within "
        f"{parity.difference:.1e}; {parity.greedy} likeliest tokens equal",
        f"written     {size_of(options.path) / 1e6:,.1f} MB in {time.perf_counter() - start:.0f} s, {dtype}: "
        f"{options.path}",
        f"opened by   {target.opens}",
    )


def texts_to_compare(checkpoint: Checkpoint | ImportedModel, model: GPT, tokenizer: Tokenizer, mode: str) -> list[str]:
    """Return texts of the validation split; where the files of the training are not here, texts of the model itself."""
    try:
        texts = validation_texts(checkpoint, NUM_TEXTS)
    except UserError:
        texts = []
    if not texts:
        print_lines("the training text is not here: comparing on texts that the model writes", to_stderr=True)
        drawn = generate_texts(model, tokenizer, "", mode, NUM_TEXTS, max_new_tokens=MAX_NEW_TOKENS)
        texts = [text.text for text in drawn]
    return [text for text in texts if text] or ["\n"]


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one line about the path."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error, "give a path elsewhere") from error


def move(source: Path, target: Path) -> None:
    """Move a complete file or folder to a path where nothing is.

    Raises:
        UserError: Something is there.
    """
    check_is_free(target)
    atomic_replace(source, target)


def check_is_free(path: Path) -> None:
    """Check that nothing is at a path.

    Raises:
        UserError: Something is there, or it cannot be looked up.
    """
    with write_errors(path):
        if path.exists() or path.is_symlink():
            raise UserError(f"{path} already exists: give another name, or delete it")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
