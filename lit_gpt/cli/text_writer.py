"""What generate.py does with the texts of a model: it prints them, with log-probabilities, or writes JSON Lines."""

import argparse
import codecs
import errno
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.messages import can_print, is_terminal, json_line, print_lines, print_text
from lit_gpt.cli.training_text import training_rows
from lit_gpt.convert.load import ImportedModel
from lit_gpt.errors import UserError
from lit_gpt.inference.generate import encode_prompt, prepare_for_inference, stream_text
from lit_gpt.inference.texts import MAX_TRIES, GeneratedText, generate_texts, seeded_generator
from lit_gpt.lines import COLUMNS, INDENT, display_width
from lit_gpt.printable import escape_controls
from lit_gpt.tokenizer import Tokenizer


class TextWriter:
    """Generates texts as the flags say, and prints or writes them.

    Args:
        checkpoint: What has the model.
        options: The flags.

    Raises:
        UserError: The checkpoint has no model, or with --novel no training rows.
    """

    def __init__(self, checkpoint: Checkpoint | ImportedModel, options: argparse.Namespace) -> None:
        self.path, self.options = checkpoint.path, options
        self.model, self.tokenizer, self.mode = checkpoint.load_model()
        self.rows = training_rows(checkpoint) if options.novel else None
        prepare_for_inference(self.model.to("cuda" if torch.cuda.is_available() else "cpu"))
        self.sampling: dict[str, Any] = {
            name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "raw_bytes")
        }
        # Texts are chosen, and their log-probabilities known, when they are complete. Batches are faster than streams.
        is_shown_as_written = is_terminal(sys.stdout) or options.num_samples == 1
        self.streams = is_shown_as_written and not (options.novel or options.logprobs)
        self.numbers = itertools.count(1)
        self.is_garbled = False  # whether stdout has shown ? for a character
        # texts that --novel has looked at, those of them that are training rows, and those that were not found
        self.drawn = self.left_out = self.missing = 0

    def count_tokens(self, prompt: str) -> int:
        """Return how many tokens the model reads for a prompt.

        Raises:
            UserError: The tokenizer has no token for a character of it.
        """
        return len(encode_prompt(self.tokenizer, prompt, self.mode))

    def answer(self, prompt: str, seed: int, should_stop: Callable[[], bool]) -> None:
        """Print the texts that continue a line of --interactive.

        On a terminal the line stands above them. Elsewhere they are numbered.
        """
        is_typed = is_terminal(sys.stdin)
        self.numbers = itertools.count(1) if is_typed else self.numbers
        self.print_texts(prompt, seed, self.options.num_samples if is_typed else None, should_stop)

    def print_texts(
        self, prompt: str, seed: int, total: int | None, should_stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Print the texts that continue a prompt, each under its number if there are several.

        Args:
            prompt: The prompt.
            seed: The seed of the first text.
            total: The number of all texts; None if it is not known.
            should_stop: Returns True as soon as the texts are to be stopped.
        """
        self.warn_if_cropped(prompt)
        for text in self.stream(prompt, seed, should_stop) if self.streams else self.draw(prompt, seed, should_stop):
            if total != 1:
                print_lines(f"--- sample {next(self.numbers)}{'' if total is None else f' of {total}'} ---")
            for piece in [f"{text.text}\n"] if isinstance(text, GeneratedText) else text:
                print_text(piece)
                self.is_garbled |= not can_print(piece)
            if isinstance(text, GeneratedText) and self.options.logprobs:
                print_lines(*describe_logprobs(text, self.tokenizer))

    def stream(self, prompt: str, seed: int, should_stop: Callable[[], bool]) -> Iterator[Iterator[str]]:
        """Yield `num_samples` texts, each as pieces that are written one after another."""
        for number in range(self.options.num_samples):
            if should_stop():
                return
            generator = seeded_generator(self.model, seed + number)
            pieces = stream_text(self.model, self.tokenizer, prompt, self.mode, generator=generator, **self.sampling)
            yield itertools.chain([prompt], itertools.takewhile(lambda _: not should_stop(), pieces), ["\n"])

    def draw(self, prompt: str, seed: int, should_stop: Callable[[], bool] = lambda: False) -> Iterator[GeneratedText]:
        """Yield `num_samples` texts that are drawn in batches, without training rows if --novel is given."""
        options, found = self.options, 0
        texts = generate_texts(
            self.model,
            self.tokenizer,
            prompt,
            self.mode,
            options.num_samples,
            seed,
            options.batch_size,
            accept=None if self.rows is None else self.is_novel,
            should_stop=should_stop,
            with_logprobs=options.logprobs,
            **self.sampling,
        )
        for text in texts:
            found += 1
            yield text
        if not should_stop():
            self.missing += options.num_samples - found

    def is_novel(self, text: GeneratedText) -> bool:
        """Return whether a text is no training row; count those that are."""
        assert self.rows is not None
        is_novel = self.rows.lack(text)
        self.drawn += 1
        self.left_out += not is_novel
        return is_novel

    def write_objects(self, prompt: str, write: Callable[[dict[str, Any]], None]) -> None:
        """Write the texts that continue a prompt, each as an object."""
        self.warn_if_cropped(prompt)
        total = self.options.num_samples
        is_hidden = self.options.jsonl == "-" and is_terminal(sys.stdout)  # the objects themselves show the progress
        disable = True if is_hidden else None  # None: tqdm shows a bar only if stderr is a terminal
        texts = self.draw(prompt, self.options.seed)
        for text in tqdm(texts, "texts", total, unit=" texts", delay=2, leave=False, disable=disable):
            write(
                {
                    "number": next(self.numbers),
                    "prompt": text.prompt,
                    "text": text.text,
                    "seed": text.seed,
                    "finish_reason": "stop" if text.is_complete else "length",
                    "tokens": text.tokens,
                    **({} if text.logprobs is None else {"logprobs": [round(value, 4) for value in text.logprobs]}),
                    "checkpoint": str(self.path),
                }
            )

    def warn_if_cropped(self, prompt: str) -> None:
        """Say that the model reads the last tokens of a prompt only, if it is longer than its context."""
        count, context_length = self.count_tokens(prompt), self.model.config.context_length
        if count > context_length:
            line = f"the prompt has {count:,} tokens: the model reads the last {context_length:,} of them, its context"
            print_lines(line, to_stderr=True)

    def report(self) -> None:
        """Say which characters stdout has not shown, and what --novel has left out."""
        if self.is_garbled:
            print_lines(
                f"warning     stdout is {sys.stdout.encoding}, which lacks characters of the texts: they are ? there;",
                "            PYTHONUTF8=1 in the environment makes it UTF-8",
                to_stderr=True,
            )
        if self.rows is None:
            return
        print_lines(f"left out    training rows: {self.left_out:,} of {self.drawn:,} texts", to_stderr=True)
        if self.missing:
            print_lines(
                f"warning     {self.missing:,} missing: {MAX_TRIES} tries for each text gave too few new ones;",
                "            a higher --temperature gives others",
                to_stderr=True,
            )


def describe_logprobs(text: GeneratedText, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield lines with the tokens that the model has drawn, each with its log-probability, and their sum."""
    assert text.logprobs is not None
    line = "logprobs".ljust(len(INDENT))
    pieces = map(tokenizer.token_bytes, text.tokens)
    for shown, logprob in zip(_show_pieces(pieces), text.logprobs):
        cell = f"{shown} {logprob:.2f}"
        if len(line) > len(INDENT) and display_width(f"{line}  {cell}") > COLUMNS:
            yield line
            line = INDENT
        line += cell if len(line) == len(INDENT) else f"  {cell}"
    yield line
    total, count = sum(text.logprobs), len(text.tokens)
    yield (
        f"{INDENT}sum {total:.2f}, mean {total / count:.2f} nats of {count:,} tokens; perplexity "
        f"{math.exp(-total / count):.2f}"
    )


def _show_pieces(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield each token in quotes. A part of a character is shown as its bytes, the last part with the character."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
    for piece in pieces:
        is_inside = bool(decoder.getstate()[0])  # a character
        text = decoder.decode(piece)
        quoted = escape_controls(repr(text)) if text else ""
        is_whole = not is_inside and text.encode() == piece
        yield (quoted if is_whole else f"<{piece.hex(' ')}>{quoted}") or "<end of text>"


class JsonLines:
    """A new file of JSON Lines, a context manager.

    Each line is written by one call, as soon as its object is known. So a process that is killed loses no earlier
    line, and leaves no part of one. If the disk is full, the part that was written is cut off. A file without lines is
    removed.

    Args:
        path: The file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0  # lines in the file
        self._size = 0  # bytes of these lines

    def __enter__(self) -> "JsonLines":
        try:
            self._file = open(self.path, "xb", buffering=0)
        except FileExistsError:
            what = "is a folder" if self.path.is_dir() else "exists"
            raise UserError(f"--jsonl {self.path} {what}: give the name of a new file") from None
        except OSError as error:
            reason = error.strerror if self.path.parent.is_dir() else f"there is no folder {self.path.parent}"
            raise UserError(f"--jsonl {self.path} cannot be written ({reason}): give another path") from None
        return self

    def write(self, value: Any) -> None:
        """Append an object.

        Raises:
            UserError: It cannot be written.
        """
        line = f"{json_line(value)}\n".encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._file.truncate(self._size)
            raise UserError(
                f"--jsonl {self.path} cannot be written ({error.strerror}): free disk space there, or give another path"
            ) from None
        self.count += 1
        self._size += len(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._file.close()
        if not self.count:
            self.path.unlink(missing_ok=True)
        elif kind is None:
            print_lines(f"wrote       {self.path}, {self.count:,} text{'s' * (self.count != 1)}", to_stderr=True)
        else:
            print_lines(f"wrote       {self.path}, the first {self.count:,} of the texts", to_stderr=True)
