"""Run scripts/generate.py: generate text with a trained model."""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.exit_status import exit_status
from lit_gpt.cli.generate_options import parse_options, read_prompt
from lit_gpt.cli.jsonl import JsonLines
from lit_gpt.cli.logprobs import describe_logprobs
from lit_gpt.cli.messages import print_json, print_lines, print_text
from lit_gpt.cli.prompt_loop import run_prompt_loop
from lit_gpt.cli.run_checkpoint import CHOICES, LOGS, TRAIN, find_checkpoint, no_checkpoint_error
from lit_gpt.cli.training_text import prompt_of_columns, training_rows
from lit_gpt.errors import UserError
from lit_gpt.files import expand_path
from lit_gpt.inference.generate import encode_prompt, prepare_for_inference, stream_text
from lit_gpt.inference.texts import MAX_TRIES, GeneratedText, generate_texts, seeded_generator


def main(args: list[str]) -> int:
    """Run the command line; return the exit status."""
    return exit_status(lambda: generate(parse_options(args)))


def generate(options: argparse.Namespace) -> None:
    """Generate texts and print them, or write them to a file.

    Raises:
        UserError: There is no checkpoint, or it cannot be used, or the prompt has a character unknown to its tokenizer.
    """
    checkpoint = open_checkpoint(options.ckpt_path, options.name)
    prompts = [prompt_of_columns(checkpoint, options.given)] if options.given else options.prompts
    writer = TextWriter(checkpoint, options)
    for prompt in prompts:  # raises before anything is printed
        writer.count_tokens(prompt)
    print_lines(f"[{checkpoint.path}]", to_stderr=True)
    if options.interactive:
        seeds = itertools.count(options.seed, options.num_samples)
        run_prompt_loop(lambda line, is_stopped: writer.answer(read_prompt(line), next(seeds), is_stopped))
    elif options.jsonl is None:
        for prompt in prompts:
            writer.print_texts(prompt, options.seed, total=len(prompts) * options.num_samples)
    elif options.jsonl == "-":
        for prompt in prompts:
            writer.write_objects(prompt, print_json)
    else:
        with JsonLines(expand_path(options.jsonl)) as file:
            for prompt in prompts:
                writer.write_objects(prompt, file.write)
        print_lines(f"wrote       {file.path}, {file.count:,} text{'s' * (file.count != 1)}", to_stderr=True)
    writer.report_left_out()


def open_checkpoint(path: Path | None, name: str | None) -> Checkpoint:
    """Open the checkpoint at `path`, or that of a run if `path` is None or one of `CHOICES`.

    Args:
        path: None is the same as `auto`: the best checkpoint of the run, or its newest one if it has none.
        name: The name of the run; None: of any run.

    Raises:
        UserError: There is none, or it cannot be used.
    """
    choice = "auto" if path is None else str(path)
    if choice not in CHOICES:
        if name is not None:
            raise UserError(f"--ckpt_path {choice} is a checkpoint already: leave out --name {name}")
        return Checkpoint.open(choice)
    checkpoint = find_checkpoint("best" if choice == "auto" else choice, LOGS, name)
    if checkpoint is None:
        raise no_checkpoint_error(LOGS, name, TRAIN)
    return checkpoint


class TextWriter:
    """Generates texts as the flags say, and prints or writes them.

    Args:
        checkpoint: The checkpoint of the model.
        options: The flags.

    Raises:
        UserError: The checkpoint has no model, or with --novel no training rows.
    """

    def __init__(self, checkpoint: Checkpoint, options: argparse.Namespace) -> None:
        self.path, self.options = checkpoint.path, options
        self.model, self.tokenizer, self.mode = checkpoint.load_model()
        self.rows = training_rows(checkpoint) if options.novel else None
        prepare_for_inference(self.model.to("cuda" if torch.cuda.is_available() else "cpu"))
        self.sampling: dict[str, Any] = {
            name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_k", "top_p", "raw_bytes")
        }
        # Texts are chosen, and their log-probabilities known, when they are complete. Batches are faster than streams.
        is_shown_as_written = sys.stdout.isatty() or options.num_samples == 1
        self.streams = is_shown_as_written and not (options.novel or options.logprobs)
        self.numbers = itertools.count(1)
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
        is_terminal = sys.stdin.isatty()
        self.numbers = itertools.count(1) if is_terminal else self.numbers
        self.print_texts(prompt, seed, self.options.num_samples if is_terminal else None, should_stop)

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
            if isinstance(text, GeneratedText):
                print_text(f"{text.text}\n")
                print_lines(*describe_logprobs(text, self.tokenizer) if self.options.logprobs else ())
            else:
                for piece in text:
                    print_text(piece)

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
        is_hidden = self.options.jsonl == "-" and sys.stdout.isatty()  # the objects themselves show the progress
        texts = self.draw(prompt, self.options.seed)
        for text in tqdm(texts, "texts", total, unit=" texts", delay=2, leave=False, disable=is_hidden or None):
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

    def report_left_out(self) -> None:
        """Say what --novel has left out."""
        if self.rows is None:
            return
        print_lines(f"left out    training rows: {self.left_out:,} of {self.drawn:,} texts", to_stderr=True)
        if self.missing:
            print_lines(
                f"warning     {self.missing:,} missing: {MAX_TRIES} tries for each text gave too few new ones;",
                "            a higher --temperature gives others",
                to_stderr=True,
            )
