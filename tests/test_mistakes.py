"""Every mistake a person makes gets one line that says what was got and what to do, and changes nothing."""

import os
import pickle
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, Result, forked, powerless
from filelock import FileLock

import lit_gpt.training.run_folder
from lit_gpt import LitGPT, UserError
from lit_gpt.cli.generate import main as generate_main

RUN = Path("logs/small/version_0")
LAST = str(RUN / "last.ckpt")


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("echo harm > harmed",)


def changed(**parts: object) -> None:
    """A checkpoint of the run, otherwise than it was, as changed.ckpt."""
    checkpoint = torch.load(LAST, weights_only=True)
    for name, value in parts.items():
        if value is None:
            del checkpoint[name]
        else:
            checkpoint[name] = value
    torch.save(checkpoint, "changed.ckpt")


def write(name: str, content: str | bytes) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())


def config(content: str) -> Callable[[], object]:
    return write("more.yaml", content)


def rows(content: str | bytes, name: str = "t.csv") -> Callable[[], object]:
    return write(name, content)


def misshapen() -> list:
    states = torch.load(LAST, weights_only=True)["optimizer_states"]
    states[0]["state"][0]["exp_avg"] = torch.zeros(3)
    return states


def fifo() -> None:
    os.mkfifo("pipe.csv")


def in_the_way(name: str) -> Callable[[], object]:
    return write(name, "")


def flipped() -> None:
    content = bytearray(Path(LAST).read_bytes())
    content[len(content) // 2] ^= 1
    Path("changed.ckpt").write_bytes(content)


def nothing() -> None:
    """The folder is as it was."""


Case = tuple[Callable[[], object], list[str], str]
MORE = ["--config", "more.yaml"]
TABLE = ["--data.files", "t.csv"]

FILES: dict[str, Case] = {
    "missing": (nothing, ["--data.files", "row.txt"], "row.txt: no such file (did you mean 'rows.txt'?)"),
    "a folder": (
        lambda: Path("in").mkdir(),
        ["--data.files", "in"],
        "in is a folder: give its files, as --data.files 'in/*.csv'",
    ),
    "no path": (nothing, ["--data.files", ""], "--data.files is empty: give a path"),
    "no paths": (nothing, ["--data.files", "[]"], "no file to read: give --data.files PATH"),
    "a glob of none": (nothing, ["--data.files", "*.csv"], "*.csv: no such file"),
    "the same twice": (
        nothing,
        ["--data.files", "[rows.txt, ./rows.txt]"],
        "--data.files names rows.txt twice: remove one",
    ),
    "a pipe": (fifo, ["--data.files", "pipe.csv"], "pipe.csv is not a regular file: copy its text into one"),
    "a broken link": (lambda: Path("t.csv").symlink_to("gone.csv"), TABLE, "t.csv: no such file"),
    "empty": (rows(""), TABLE, "t.csv is empty"),
    "only a header": (rows("text\n"), TABLE, "no rows, at most a header"),
    "only blanks": (rows("text\n \n\t\n"), TABLE, "no text in any of 2 rows"),
    "unknown kind": (rows("x", "t.docx"), ["--data.files", "t.docx"], "unknown file format .docx"),
    "not parquet": (rows("x", "t.parquet"), ["--data.files", "t.parquet"], "cannot be read as a Parquet table"),
    "not json": (rows('{"a": 1}\n{', "t.jsonl"), ["--data.files", "t.jsonl"], "t.jsonl line 2: not JSON"),
    "a field twice": (
        rows('{"a": "x", "a": "y"}', "t.jsonl"),
        ["--data.files", "t.jsonl"],
        "line 1: two fields called 'a'",
    ),
    "half a character": (rows('{"a": "\\ud83d"}', "t.jsonl"), ["--data.files", "t.jsonl"], "line 1: a lone surrogate"),
    "a name that is no text": (
        lambda: Path(os.fsdecode(b"b\xff.txt")).write_text("row"),
        ["--data.files", os.fsdecode(b"b\xff.txt")],
        "its name is not UTF-8",
    ),
    "an open quote": (rows('text\nfine\n"open\nfine\n'), TABLE, "t.csv line 3: a quote is opened and never closed"),
    "a long row": (
        rows("a,b\n1,2\n1,2,3\n"),
        [*TABLE, "--data.columns", "a"],
        "t.csv line 3: 3 fields where there are 2",
    ),
    "too short": (nothing, ["--model.config.context_length", "5000"], "fewer than one window of 5001"),
}
ENCODINGS: dict[str, Case] = {
    "gb18030": (
        rows("text\n中文\n".encode("gb18030")),
        [*TABLE, "--data.encoding", "utf-8"],
        "line 2: bytes d6 d0 ce c4 are not utf-8: correct that row, or give the encoding of the file",
    ),
    "utf-16": (
        rows("text\nx\n".encode("utf-16")),
        [*TABLE, "--data.encoding", "utf-8"],
        "t.csv line 1: bytes ff fe are not utf-8",
    ),
    "not that": (
        rows("text\nx\n"),
        [*TABLE, "--data.encoding", "utf-16"],
        "UTF-16 stream does not start with BOM: give its encoding, as --data.encoding utf-8",
    ),
    "unknown": (nothing, ["--data.encoding", "utf-9"], "--data.encoding utf-9 is unknown"),
    "no text": (rows(bytes(range(256))), TABLE, "its encoding cannot be detected: give it"),
}
COLUMNS: dict[str, Case] = {
    "unknown": (
        rows("text,title\nx,y\n"),
        [*TABLE, "--data.columns", "txt"],
        "has no column 'txt'; it has text, title (did you mean 'text'?)",
    ),
    "unchosen": (
        rows("text,title\nx,y\n"),
        TABLE,
        "has columns text, title: choose with --data.columns or --data.template",
    ),
    "two of a name": (rows("a,a\nx,y\n"), [*TABLE, "--data.columns", "a"], "has 2 columns called 'a'"),
    "semicolons": (
        rows("a;b\nx;y\n"),
        TABLE,
        "its only column is 'a;b': give --data.delimiter ';' if that separates columns, otherwise ','",
    ),
    "delimiter": (rows("a;b\nx;y\n"), [*TABLE, "--data.delimiter", ";;"], "--data.delimiter ';;' is not one character"),
    "template": (rows("a,b\nx,y\n"), [*TABLE, "--data.template", "{c}"], "has no column 'c'; it has a, b"),
    "template without": (rows("a\nx\n"), [*TABLE, "--data.template", "text"], "--data.template 'text' names no column"),
    "open template": (rows("a\nx\n"), [*TABLE, "--data.template", "{a"], "expected '}' before end of string"),
}
CONFIGS: dict[str, Case] = {
    "missing": (nothing, ["--config", "smal.yaml"], "--config smal.yaml: no such file (did you mean 'small.yaml'?)"),
    "none": (nothing, ["--config"], "--config names no file"),
    "empty": (config(""), MORE, "more.yaml has no settings"),
    "broken": (config("trainer: [\n"), MORE, "correct the YAML"),
    "not text": (config("\x00"), MORE, "more.yaml is not YAML in UTF-8"),
    "key of lists": (config("? [a, b]\n: 1\n"), MORE, "more.yaml is not YAML in UTF-8"),
    "a key twice": (
        config("trainer:\n  max_steps: 1\n  max_steps: 2\n"),
        MORE,
        "more.yaml line 3: key 'max_steps' is given twice",
    ),
    "misspelt": (config("model: {config: {d_modle: 8}}"), MORE, "unknown key model.config.d_modle (did you mean"),
    "linked": (
        config("data: {context_length: 8}"),
        MORE,
        "data.context_length follows from model.config.context_length",
    ),
    "linked, dotted": (config("data.seed: 8"), MORE, "more.yaml: data.seed: write it as data: seed, key below key"),
    "null": (config("data: {batch_size: null}"), MORE, "--data.batch_size null: give a value"),
    "null section": (config("generate: null"), MORE, "more.yaml: generate is None: write its settings below it"),
    "no mapping": (
        config("trainer:\n  - max_steps: 3\n"),
        MORE,
        "trainer is [{'max_steps': 3}]: write its",
    ),
    "blank name": (config("name:\ntrainer: {max_steps: 3}\n"), MORE, "--name None: use only letters, digits and ._-"),
    "blank of the Trainer's": (config("trainer: {overfit_batches: }"), MORE, "--trainer.overfit_batches null: give"),
    "a circle": (config("trainer: &a\n  x: *a\n"), MORE, "more.yaml is not YAML in UTF-8"),
    "a merge": (config("a: &a {max_steps: 3}\ntrainer:\n  <<: *a\n"), MORE, "merge keys (<<) are not supported"),
    "last, too late": (config("ckpt_path: last"), MORE, "give it as a flag, --ckpt_path last"),
}
FLAGS: dict[str, Case] = {
    "misspelt": (
        nothing,
        ["--trainer.max_step", "3"],
        "unknown flag --trainer.max_step (did you mean 'trainer.max_steps'?)",
    ),
    "one dash": (nothing, ["-ckpt_path", "last"], "-ckpt_path: a flag has two dashes"),
    "a section at once": (nothing, ["--trainer", "{max_steps: 3}"], "--trainer takes no value of its own"),
    "words": (nothing, ["--data.files", "a.csv", "b.csv"], "unexpected word 'b.csv'"),
    "type": (nothing, ["--trainer.max_steps", "many"], "--trainer.max_steps many: give int"),
    "choice": (
        nothing,
        ["--model.config.mlp", "geglu"],
        "--model.config.mlp geglu: give one of swiglu, gelu, relu, relu2",
    ),
    "linked": (nothing, ["--model.config.vocab_size", "9"], "model.config.vocab_size follows from the tokenizer"),
    "heads": (nothing, ["--model.config.num_heads", "3"], "num_heads 3 does not divide d_model 16"),
    "name": (nothing, ["--name", "a/b"], "--name 'a/b': use only letters, digits and ._-"),
    "name of dots": (nothing, ["--name", ".."], "--name '..': use only letters, digits and ._-"),
    "long name": (nothing, ["--name", "a" * 300], "at most 100 of them"),
    "both accumulations": (
        nothing,
        ["--data.global_batch_size", "8", "--trainer.accumulate_grad_batches", "2"],
        "follows from --data.global_batch_size 8: give only one of them",
    ),
    "global batch": (nothing, ["--data.global_batch_size", "6"], "6 is not a multiple of 4"),
    "timeout": (nothing, ["--timeout", "0"], "--timeout 0: give seconds, from 1 to 86400"),
    "batch": (nothing, ["--data.batch_size", "0"], "--data.batch_size is 0: give 1 or more"),
    "huge batch": (nothing, ["--data.batch_size", str(2**63)], "batch_size"),
    "huge model": (nothing, ["--model.config.d_model", str(2**40)], "does not fit"),
    "share": (nothing, ["--data.val_fraction", "1.5"], "--data.val_fraction is 1.5: give a fraction between 0 and 1"),
    "their sampler": (nothing, ["--trainer.use_distributed_sampler", "true"], "every device draws its own windows"),
    "timed validation": (nothing, ["--trainer.val_check_interval", "00:00:01:00"], "00:00:01:00: give optimizer steps"),
    "no interval": (
        nothing,
        ["--trainer.val_check_interval", "0"],
        "--trainer.val_check_interval 0: give optimizer steps",
    ),
    "no end": (nothing, ["--trainer.max_steps", "-1"], "--model.schedule cosine needs an end"),
    "no steps": (
        nothing,
        ["--trainer.max_steps", "0"],
        "--trainer.max_steps 0, or max_epochs 0, trains nothing",
    ),
    "no time": (nothing, ["--trainer.max_time", "an hour"], "--trainer.max_time an hour: give DD:HH:MM:SS"),
    "random seed": (nothing, ["--seed_everything", "true"], "--seed_everything True: give int"),
    "prompt": (
        nothing,
        ["--data.tokenizer", "char", "--generate.prompts", "[row, 静夜思]"],
        "character '静' (U+9759) is not among",
    ),
    "temperature": (nothing, ["--generate.temperature", "-1"], "temperature is -1.0: give 0"),
    "no such device": (nothing, ["--trainer.accelerator", "tpu"], "torch_xla"),
    "devices": (nothing, ["--trainer.devices", "-1"], "should be an int > 0"),
    "many devices": (nothing, ["--trainer.devices", "999"], "--trainer.devices 999 on"),
    "nodes": (
        nothing,
        ["--trainer.num_nodes", "2"],
        "--trainer.num_nodes 2: start the command on each node, with torchrun or srun",
    ),
    "spawn": (nothing, ["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn is for notebooks: give ddp"),
    "cut epochs": (nothing, ["--trainer.limit_train_batches", "3"], "give --trainer.max_steps"),
    "a share to overfit": (nothing, ["--trainer.overfit_batches", "0.5"], "give a number of batches, as 2"),
    "overfitting half a step": (
        nothing,
        ["--trainer.overfit_batches", "3", "--data.global_batch_size", "8"],
        "--trainer.overfit_batches 3 is not a multiple of 2, the batches of an optimizer step",
    ),
    "a sliver to validate": (nothing, ["--trainer.limit_val_batches", "0.001"], "limit_val_batches"),
    "betas": (nothing, ["--model.betas", "[1.5, 0.9]"], "--model.betas is [1.5, 0.9]: give two numbers"),
    "decay": (nothing, ["--model.weight_decay", "-1"], "--model.weight_decay is -1.0: give 0 or more"),
    "end of schedule": (
        nothing,
        ["--model.min_learning_rate", "1"],
        "--model.min_learning_rate 1.0 is above --model.learning_rate 0.001",
    ),
    "clip": (nothing, ["--trainer.gradient_clip_val", "-1"], "--trainer.gradient_clip_val is -1: give 0"),
    "logging": (nothing, ["--trainer.log_every_n_steps", "-1"], "--trainer.log_every_n_steps is -1: give 0"),
    "no accumulation": (
        nothing,
        ["--trainer.accumulate_grad_batches", "0"],
        "accumulate_grad_batches is 0: give 1 or more",
    ),
    "precision": (nothing, ["--trainer.precision", "12"], "--trainer.precision"),
    "half": (nothing, ["--trainer.precision", "16-true"], "--trainer.precision 16-true: squares of gradients exceed"),
    "double in slices": (
        nothing,
        ["--config", str(ROOT / "configs" / "fsdp.yaml"), "--trainer.precision", "64-true"],
        "--trainer.precision 64-true does not work with FSDP2: give 32-true",
    ),
    "mode of a callback": (
        nothing,
        [
            "--trainer.callbacks+",
            "EarlyStopping",
            "--trainer.callbacks.monitor=loss/val",
            "--trainer.callbacks.mode=up",
        ],
        "EarlyStopping: `mode` can be min, max, got up",
    ),
    "logger without its package": (nothing, ["--trainer.logger", "CometLogger"], "CometLogger: "),
    "seed": (nothing, ["--seed_everything", str(2**32)], "--seed_everything is 4294967296: give a number from 0"),
    "patience": (nothing, ["--early_stopping.patience", "0"], "--early_stopping.patience is 0"),
    "monitor": (
        nothing,
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "val_loss"],
        "--trainer.callbacks: no metric is called 'val_loss'",
    ),
    "checkpoints kept": (nothing, ["--checkpoint.keep", "-1"], "--checkpoint.keep -1: give 1 or more, 0 or more"),
    "no value": (nothing, ["--data.batch_size", ""], "--data.batch_size"),
    "a callback of its own mind": (
        nothing,
        ["--trainer.callbacks+", "GradientAccumulationScheduler", "--trainer.callbacks.scheduling", "{0: 2}"],
        "GradientAccumulationScheduler is not supported: give --data.global_batch_size",
    ),
    "epochs to validate": (nothing, ["--trainer.check_val_every_n_epoch", "2"], "give val_check_interval instead"),
    "patience without end": (
        nothing,
        ["--early_stopping.patience", "2", "--trainer.limit_val_batches", "0"],
        "--early_stopping.patience counts validations, but",
    ),
    "a place elsewhere": (nothing, ["--trainer.default_root_dir", "s3://b/x"], "give a folder on this machine"),
    "no time at all": (
        nothing,
        ["--trainer.max_time", "00:00:00:00"],
        "--trainer.max_time 00:00:00:00: give DD:HH",
    ),
    "many workers": (nothing, ["--data.num_workers", "100000"], "--data.num_workers 100000 on"),
    "many blocks": (nothing, ["--model.config.num_blocks", str(10**12)], "more than 10^12 parameters"),
    "a profiler": (nothing, ["--trainer.profiler", "xla"], "--trainer.profiler xla needs a TPU"),
    "last and a mistake": (
        nothing,
        ["--ckpt_path", "last", "--trainer.max_steps", "many"],
        "--trainer.max_steps many: give int",
    ),
    "last of no name": (nothing, ["--ckpt_path", "last", "--name", "../x"], "--name '../x': use only letters"),
    "validate what": (nothing, ["validate"], "validate needs a checkpoint"),
    "validate nothing": (
        nothing,
        ["validate", "--ckpt_path", "last"],
        "there is no checkpoint of 'small' under logs: train one first",
    ),
}
CHECKPOINTS: dict[str, Case] = {
    "missing": (nothing, ["--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint file"),
    "empty path": (nothing, ["--ckpt_path", ""], "--ckpt_path is empty"),
    "a folder": (nothing, ["--ckpt_path", str(RUN)], "logs/small/version_0: is a folder, not a checkpoint"),
    "text": (nothing, ["--ckpt_path", "rows.txt"], "rows.txt cannot be opened (damaged, or not a checkpoint)"),
    "cut": (
        lambda: Path("changed.ckpt").write_bytes(Path(LAST).read_bytes()[:-99]),
        ["--ckpt_path", "changed.ckpt"],
        "damaged",
    ),
    "flipped": (flipped, ["--ckpt_path", "changed.ckpt"], "changed.ckpt is damaged (checksum of"),
    "code": (
        lambda: torch.save({"state_dict": Harmful()}, "changed.ckpt"),
        ["--ckpt_path", "changed.ckpt"],
        "it holds code",
    ),
    "pickle": (
        lambda: Path("changed.ckpt").write_bytes(pickle.dumps(Harmful())),
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt cannot be opened (damaged, or not a checkpoint)",
    ),
    "of others": (
        lambda: torch.save({"state_dict": {}}, "changed.ckpt"),
        ["--ckpt_path", "changed.ckpt"],
        "not a checkpoint of lit_gpt",
    ),
    "another shape": (nothing, ["--ckpt_path", LAST, "--model.config.d_model", "8"], "d_model 16 there, 8 here"),
    "another vocabulary": (nothing, ["--ckpt_path", LAST, "--data.tokenizer", "char"], "vocab_size 257 there, 28 here"),
    "another text": (
        lambda: rows("row\n" * 200, "other.txt")(),
        ["--ckpt_path", LAST, "--data.files", "other.txt"],
        "other data",
    ),
    "another split": (nothing, ["--ckpt_path", LAST, "--data.val_fraction", "0.3"], "val tokens 279 there, 793 here"),
    "another optimizer": (nothing, ["--ckpt_path", LAST, "--model.optimizer", "muon"], "was trained with adamw"),
    "no weights": (lambda: changed(state_dict={}), ["--ckpt_path", "changed.ckpt"], "gpt.blocks.0.attention.k_norm"),
    "other weights": (
        lambda: changed(state_dict={"gpt.embedding.weight": torch.zeros(2)}),
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt holds another model (gpt.blocks.0.attention.k_norm.weight None there, (8,) here",
    ),
    "no optimizer": (lambda: changed(optimizer_states=None), ["--ckpt_path", "changed.ckpt"], "holds no optimizer"),
    "no description": (lambda: changed(hyper_parameters={}), ["--ckpt_path", "changed.ckpt"], "d_model None there"),
    "moments of another shape": (
        lambda: changed(optimizer_states=misshapen()),
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt holds an optimizer of another model",
    ),
    "no mapping of weights": (
        lambda: changed(state_dict=[]),
        ["--ckpt_path", "changed.ckpt"],
        "not a checkpoint of lit_gpt",
    ),
    "no step": (lambda: changed(global_step="x"), ["--ckpt_path", "changed.ckpt"], "not a checkpoint of lit_gpt"),
    "all damaged": (
        lambda: [path.write_bytes(b"") for path in RUN.glob("*.ckpt")],
        ["--ckpt_path", "last"],
        "no checkpoint can be used: logs/small/version_0/best.ckpt, logs/small/version_0/last.ckpt",
    ),
    "overfitting": (
        nothing,
        ["--ckpt_path", LAST, "--trainer.overfit_batches", "2"],
        "cannot resume from a checkpoint",
    ),
}
PLACES: dict[str, Case] = {
    "a file for logs": (in_the_way("logs"), [], "logs/small/version_0 cannot be created (Not a directory)"),
    "a file for a run": (
        lambda: (Path("logs").mkdir(), in_the_way("logs/small")()),
        [],
        "logs/small/version_0 cannot be created",
    ),
    "a file for data": (
        in_the_way("data"),
        [],
        "data/cache: the token cache cannot be written or read (Not a directory)",
    ),
    "no way to logs": (
        lambda: Path("shut").mkdir(mode=0o555),
        ["--trainer.default_root_dir", "shut"],
        "shut/small/version_0 cannot be created (Permission denied)",
    ),
    "no way to data": (
        lambda: Path("data").mkdir(mode=0o555),
        [],
        "data/cache: the token cache cannot be written or read (Permission denied)",
    ),
    "no right to read": (lambda: Path("rows.txt").chmod(0), [], "rows.txt cannot be read (no permission)"),
    "a file for the place": (nothing, ["--trainer.default_root_dir", "rows.txt"], "rows.txt/small/version_0 cannot be"),
    "an unreadable config": (
        lambda: (Path("shut.yaml").write_text("name: x"), Path("shut.yaml").chmod(0)),
        ["--config", "shut.yaml"],
        "--config shut.yaml cannot be read (Permission denied)",
    ),
    "an unreadable vocabulary": (
        lambda: (Path("shut.tiktoken").write_text("YQ== 0"), Path("shut.tiktoken").chmod(0)),
        ["--data.tokenizer", "shut.tiktoken"],
        "--data.tokenizer shut.tiktoken cannot be read (no permission)",
    ),
    "no way to the built-in table": (
        lambda: Path("data").mkdir(mode=0o555),
        ["--data.files", "data/mingcheng.csv"],
        "data/mingcheng.csv cannot be written (Permission denied)",
    ),
    "no right to resume": (
        lambda: (Path("shut.ckpt").write_text("x"), Path("shut.ckpt").chmod(0)),
        ["--ckpt_path", "shut.ckpt"],
        "shut.ckpt cannot be opened (Permission denied)",
    ),
}
SECTIONS = {
    "files": FILES,
    "encodings": ENCODINGS,
    "columns": COLUMNS,
    "configs": CONFIGS,
    "flags": FLAGS,
    "checkpoints": CHECKPOINTS,
    "places": PLACES,
}
ALL = {f"{section}: {name}": case for section, cases in SECTIONS.items() for name, case in cases.items()}


def contents() -> dict[str, bytes | None]:
    """Everything in the working folder but the token cache, which any command may fill."""
    found = (path for path in Path().rglob("*") if path.parts[:2] != ("data", "cache"))
    return {
        str(path): path.read_bytes() if path.is_file() and os.access(path, os.R_OK) else None
        for path in found
        if str(path) not in ("data", "out.txt", "err.txt")
    }


def is_one_line(result: Result, message: str) -> None:
    assert result.status == 2, result.err
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.out == ""


def test_there_are_enough_of_them() -> None:
    assert len(ALL) + len(GENERATE) >= 60


@pytest.mark.parametrize("name", [name for name in ALL if not name.startswith("places")])
def test_a_mistake_gets_one_line_and_leaves_nothing(fit: Fit, folder: Path, name: str) -> None:
    prepare, words, message = ALL[name]
    if name.startswith("checkpoints"):
        assert fit().status == 0
    prepare()
    before = contents()
    is_one_line(fit(*words, *([] if "--trainer.max_steps" in words else ["--trainer.max_steps", 8])), message)
    assert contents() == before
    assert not Path("harmed").exists()


@pytest.mark.parametrize("name", PLACES)
def test_a_place_that_cannot_be_used_gets_one_line(folder: Path, name: str) -> None:
    prepare, words, message = PLACES[name]
    prepare()
    before = contents()
    is_one_line(forked(folder, "--config", "small.yaml", *words, prepare=powerless), message)
    assert contents() == before
    (folder / "rows.txt").chmod(0o644)


PAIR = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]


@pytest.mark.parametrize(
    "name",
    [
        *("files: missing", "files: too short", "encodings: gb18030", "columns: unknown", "configs: misspelt"),
        *("flags: heads", "flags: prompt", "flags: no end", "checkpoints: flipped", "checkpoints: another text"),
        *("places: a file for logs", "places: a file for data"),
    ],
)
def test_a_mistake_on_two_ranks_is_said_once_before_they_start(fit: Fit, folder: Path, name: str) -> None:
    prepare, words, message = ALL[name]
    if name.startswith("checkpoints"):
        assert fit().status == 0
    prepare()
    before = contents()
    is_one_line(forked(folder, "--config", "small.yaml", *PAIR, "--trainer.max_steps", 8, *words), message)
    assert contents() == before


@pytest.mark.parametrize(
    ("port", "message"), [("taken", "Address already in use"), ("99999", "give a port from 1 to 65535")]
)
def test_a_port_that_cannot_be_had_is_said_once(folder: Path, port: str, message: str) -> None:
    with socket.socket(socket.AF_INET6) as place:
        place.bind(("", 0))
        place.listen()
        number = str(place.getsockname()[1]) if port == "taken" else port
        environment = {"MASTER_PORT": number}
        result = forked(folder, "--config", "small.yaml", *PAIR, prepare=lambda: os.environ.update(environment))
    is_one_line(result, message)
    assert not Path("logs").exists()


def test_two_processes_do_not_train_in_one_folder(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    before = contents()
    with FileLock(RUN / ".lock"):
        at_once = partial(setattr, lit_gpt.training.run_folder, "LOCK_TIMEOUT", 0.1)
        result = forked(folder, "--config", "small.yaml", "--ckpt_path", "last", prepare=at_once)
    told = "another process trains in this folder: wait until it ends, or choose another --name"
    is_one_line(result, f"logs/small/version_0: {told}")
    (RUN / ".lock").unlink()
    assert contents() == before


def test_a_global_batch_too_small_for_two_ranks_is_said_once(folder: Path) -> None:
    result = forked(folder, "--config", "small.yaml", *PAIR, "--data.global_batch_size", 4)
    is_one_line(result, "4 is not a multiple of 8, --data.batch_size 4 on 2 device(s)")
    assert not Path("logs").exists()


# ----------------------------------------------------------------------------------------------------- generate

GENERATE: dict[str, Case] = {
    "none": (nothing, [], "no checkpoint under logs/"),
    "none of the name": (nothing, ["--name", "poems"], "no checkpoint under logs/poems"),
    "no checkpoint": (nothing, ["--ckpt_path", "rows.txt"], "rows.txt cannot be opened"),
    "missing": (nothing, ["--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint file"),
    "code": (lambda: torch.save({"state_dict": Harmful()}, "a.ckpt"), ["--ckpt_path", "a.ckpt"], "it holds code"),
    "misspelt": (nothing, ["--temp", "1"], "unrecognized arguments: --temp 1"),
    "samples": (nothing, ["--num_samples", "0"], "give 1 or more"),
    "temperature": (nothing, ["--temperature", "-1"], "temperature is -1.0: give 0"),
    "top_p": (nothing, ["--top_p", "2"], "top_p is 2.0: give a probability"),
    "seed": (nothing, ["--seed", "-1"], "--seed is -1: give a number from 0"),
}


@pytest.mark.parametrize("name", GENERATE)
def test_a_mistake_with_generate_gets_one_line(folder: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    prepare, words, message = GENERATE[name]
    prepare()
    status = generate_main(words)
    printed = capsys.readouterr()
    is_one_line(Result(status, printed.out, printed.err), message)
    assert not Path("harmed").exists()


def test_load_from_checkpoint_runs_no_code_either(folder: Path) -> None:
    torch.save({"state_dict": Harmful(), "hyper_parameters": {}}, "harmful.ckpt")
    with pytest.raises(UserError, match=r"harmful.ckpt holds code, or is damaged"):
        LitGPT.load_from_checkpoint("harmful.ckpt")
    assert not Path("harmed").exists()
