"""`bench.py generate`: the speed of text generation."""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from lit_gpt.benchmark.peers import PEERS, Bare, peer_names
from lit_gpt.benchmark.task import Row, build_run, build_task
from lit_gpt.benchmark.turns import run_in_turns
from lit_gpt.device import peak_memory, synchronize
from lit_gpt.inference.generate import prepare_for_inference
from lit_gpt.inference.utf8 import utf8_constraint
from lit_gpt.model import GPT

BATCH_SIZES = (1, 16)


def run_generation(
    pipe: Connection, name: str, args: list[str], default_config: Path, nanogpt: Path | None, vocab_size: int | None
) -> None:
    """Worker process: answer each message `(batch_size, prompt_tokens, new_tokens, use_cache, valid_utf8)`.

    The answer has the seconds and the peak memory. It is empty where the implementation has no such mode.
    """
    task = build_task(build_run([*args, "--trainer.logger=false"], default_config), nanogpt)
    if vocab_size is not None:
        task.module.gpt = GPT(replace(task.config, vocab_size=vocab_size))
    peer = PEERS[name](task)
    peer.model.eval()
    constraint = None
    if isinstance(peer.model, GPT):
        prepare_for_inference(peer.model)
        constraint = utf8_constraint(peer.model, task.data.tokenizer)
    while message := pipe.recv():
        batch_size, prompt_tokens, new_tokens, use_cache, valid_utf8 = message
        if valid_utf8 and not isinstance(peer, Bare):
            pipe.send({})
            continue
        if isinstance(peer, Bare):
            peer.constraint = constraint if valid_utf8 else None
        prompts = torch.randint(task.config.vocab_size, (batch_size, prompt_tokens), device=task.device)  # (B, T)
        start = time.perf_counter()
        try:
            peer.generate(prompts, new_tokens, use_cache)
        except NotImplementedError:
            pipe.send({})
            continue
        synchronize(task.device)
        pipe.send({"seconds": time.perf_counter() - start, "peak_mb": peak_memory(task.device) / 1e6})


def benchmark_generation(options: argparse.Namespace, args: list[str], default_config: Path) -> Iterator[Row]:
    """Measure tokens per second of reading a prompt and of generating, for 1 and 16 texts, with and without a KV cache.

    The time of the first token is the time to read the prompt; the others are generated in the rest of the time. With
    `--valid_utf8`, lit_gpt also generates valid UTF-8 only; `over_lit_gpt` is then the cost of it.
    """
    names = ["bare", *peer_names(options)]
    workers: dict[str, tuple[Any, ...]] = {
        name: (run_generation, name, args, default_config, options.nanogpt, options.vocab_size) for name in names
    }
    context_length = build_run(args, default_config).model.gpt.config.context_length
    prompt_tokens = context_length // 2
    new_tokens = min(options.steps, context_length - prompt_tokens)
    constraints = (False, True) if options.valid_utf8 else (False,)
    modes = list(itertools.product(BATCH_SIZES, (True, False), constraints))
    turn = [
        (batch_size, prompt_tokens, count, use_cache, valid_utf8)
        for batch_size, use_cache, valid_utf8 in modes
        for count in (1, new_tokens)
    ]
    warm_up = (1, prompt_tokens, 2, True, False)
    answers = run_in_turns(workers, [warm_up] + turn * options.turns)
    lit_gpt_speed = None
    for number, (batch_size, use_cache, valid_utf8) in enumerate(modes):
        for name in names:
            first, total = (answers[name][1 + 2 * number + part :: len(turn)] for part in (0, 1))  # of each turn
            if "seconds" not in first[0]:  # the implementation has no such mode
                continue
            first_seconds, seconds = (statistics.median(each["seconds"] for each in part) for part in (first, total))
            # on a busy machine one token may take longer than all
            speed = batch_size * (new_tokens - 1) / (seconds - first_seconds) if seconds > first_seconds else None
            lit_gpt_speed = speed if name == "bare" and not valid_utf8 else lit_gpt_speed
            yield {
                "who": "lit_gpt" if name == "bare" else name,
                "rows": batch_size,
                "cache": use_cache,
                "valid_utf8": valid_utf8,
                "tokens_per_second": speed,
                "over_lit_gpt": lit_gpt_speed / speed if lit_gpt_speed and speed else None,
                "prompt_tokens_per_second": batch_size * prompt_tokens / first_seconds,
                "peak_mb": answers[name][-1].get("peak_mb"),
            }
