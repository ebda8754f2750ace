"""Tests of user errors in files, columns, checkpoints and folders: one line that says what to do, and no file changes.

Errors in configs and flags are in test_arguments.py and test_validation.py.
"""

import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Fit, drop_capabilities, forked
from filelock import FileLock
from user_errors import (
    LAST,
    RUN,
    TABLE,
    Case,
    Harmful,
    assert_user_error,
    check_case,
    check_case_on_two_ranks,
    folder_contents,
    write,
)

import lit_gpt.training.run_folder
from lit_gpt import LitGPT, UserError

# ---------------------------------------------------------------------------------------------------- files and rows

FILES: dict[str, Case] = {
    "missing file": Case(["--data.files", "row.txt"], "row.txt: no such file (did you mean 'rows.txt'?)"),
    "folder": Case(
        ["--data.files", "in"], "in is a folder: give its files, as --data.files 'in/*.csv'", lambda: Path("in").mkdir()
    ),
    "empty path": Case(["--data.files", ""], "--data.files is empty: give a path"),
    "empty list": Case(["--data.files", "[]"], "no file to read: give --data.files PATH"),
    "glob without match": Case(["--data.files", "*.csv"], "*.csv: no such file"),
    "same file twice": Case(
        ["--data.files", "[rows.txt, ./rows.txt]"], "--data.files names rows.txt twice: remove one"
    ),
    "pipe": Case(
        ["--data.files", "pipe.csv"],
        "pipe.csv is not a regular file: copy its text into one",
        lambda: os.mkfifo("pipe.csv"),
    ),
    "broken link": Case(TABLE, "t.csv: no such file", lambda: Path("t.csv").symlink_to("gone.csv")),
    "empty file": Case(TABLE, "t.csv is empty", write("")),
    "header only": Case(TABLE, "no rows, at most a header", write("text\n")),
    "blank rows only": Case(TABLE, "no text in any of 2 rows", write("text\n \n\t\n")),
    "unknown suffix": Case(["--data.files", "t.docx"], "unknown file format .docx", write("x", "t.docx")),
    "invalid parquet": Case(
        ["--data.files", "t.parquet"], "is not a Parquet table: name its format", write("x", "t.parquet")
    ),
    "invalid json": Case(["--data.files", "t.jsonl"], "t.jsonl line 2: not JSON", write('{"a": 1}\n{', "t.jsonl")),
    "duplicate field": Case(
        ["--data.files", "t.jsonl"], "line 1: two fields called 'a'", write('{"a": "x", "a": "y"}', "t.jsonl")
    ),
    "lone surrogate": Case(
        ["--data.files", "t.jsonl"], "line 1: a lone surrogate", write('{"a": "\\ud83d"}', "t.jsonl")
    ),
    "file name not UTF-8": Case(
        ["--data.files", os.fsdecode(b"b\xff.txt")],
        "its name is not UTF-8",
        lambda: Path(os.fsdecode(b"b\xff.txt")).write_text("row"),
    ),
    "unclosed quote": Case(
        TABLE, "t.csv line 3: a quote is opened and never closed", write('text\nfine\n"open\nfine\n')
    ),
    "row with too many fields": Case(
        [*TABLE, "--data.columns", "a"], "t.csv line 3: 3 fields where there are 2", write("a,b\n1,2\n1,2,3\n")
    ),
    "text shorter than a window": Case(["--model.config.context_length", "5000"], "fewer than one window of 5001"),
}
ENCODINGS: dict[str, Case] = {
    "gb18030 read as utf-8": Case(
        [*TABLE, "--data.encoding", "utf-8"],
        "line 2: bytes d6 d0 ce c4 are not utf-8: correct them, or give the encoding of the file",
        write("text\n中文\n".encode("gb18030")),
    ),
    "utf-16 read as utf-8": Case(
        [*TABLE, "--data.encoding", "utf-8"],
        "t.csv line 1: bytes ff fe are not utf-8",
        write("text\nx\n".encode("utf-16")),
    ),
    "utf-8 read as utf-16": Case(
        [*TABLE, "--data.encoding", "utf-16"],
        "UTF-16 stream does not start with BOM: give its encoding, as --data.encoding utf-8",
        write("text\nx\n"),
    ),
    "unknown encoding": Case(["--data.encoding", "utf-9"], "--data.encoding utf-9 is unknown"),
    "binary file": Case(TABLE, "is no text: 9% of it are control characters", write(bytes(range(256)))),
}
COLUMNS: dict[str, Case] = {
    "unknown column": Case(
        [*TABLE, "--data.columns", "txt"],
        "has no column 'txt'; it has text, title (did you mean 'text'?)",
        write("text,title\nx,y\n"),
    ),
    "several columns, none chosen": Case(
        TABLE,
        "has columns text, title: choose with --data.columns title or --data.template",
        write("text,title\nx,y\n"),
    ),
    "duplicate column": Case([*TABLE, "--data.columns", "a"], "has 2 columns called 'a'", write("a,a\nx,y\n")),
    "wrong delimiter": Case(
        TABLE,
        "its only column is 'a;b': give --data.delimiter ';' if that separates columns, otherwise ','",
        write("a;b\nx;y\n"),
    ),
    "delimiter of two characters": Case(
        [*TABLE, "--data.delimiter", ";;"], "--data.delimiter ';;' is not one character", write("a;b\nx;y\n")
    ),
    "unknown column in template": Case(
        [*TABLE, "--data.template", "{c}"], "has no column 'c'; it has a, b", write("a,b\nx,y\n")
    ),
    "template without column": Case(
        [*TABLE, "--data.template", "text"], "--data.template 'text' names no column", write("a\nx\n")
    ),
    "unclosed template": Case([*TABLE, "--data.template", "{a"], "expected '}' before end of string", write("a\nx\n")),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES)
def test_wrong_file_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


@pytest.mark.parametrize("case", ENCODINGS.values(), ids=ENCODINGS)
def test_wrong_encoding_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


@pytest.mark.parametrize("case", COLUMNS.values(), ids=COLUMNS)
def test_wrong_column_gives_one_line(fit: Fit, case: Case) -> None:
    check_case(fit, case)


@pytest.mark.parametrize(
    "case",
    [
        FILES["missing file"],
        FILES["text shorter than a window"],
        ENCODINGS["gb18030 read as utf-8"],
        COLUMNS["unknown column"],
    ],
    ids=["missing file", "text shorter than a window", "gb18030 read as utf-8", "unknown column"],
)
def test_wrong_file_on_two_ranks_is_reported_once(folder: Path, case: Case) -> None:
    check_case_on_two_ranks(folder, case)


# ------------------------------------------------------------------------------------------------------- checkpoints


def change_checkpoint(**changes: object) -> None:
    """Write a copy of the run's last checkpoint with other contents as changed.ckpt; None removes an entry."""
    checkpoint = torch.load(LAST, weights_only=True)
    for name, value in changes.items():
        if value is None:
            del checkpoint[name]
        else:
            checkpoint[name] = value
    torch.save(checkpoint, "changed.ckpt")


def states_without_step() -> list:
    """Return the optimizer states of the run's last checkpoint, without the step counter of each parameter."""
    states = torch.load(LAST, weights_only=True)["optimizer_states"]
    for state in states[0]["state"].values():
        del state["step"]
    return states


def moments_of_wrong_shape() -> list:
    """Return the optimizer states of the run's last checkpoint, with a moment of another shape."""
    states = torch.load(LAST, weights_only=True)["optimizer_states"]
    states[0]["state"][0]["exp_avg"] = torch.zeros(3)
    return states


def flip_bit() -> None:
    """Write a copy of the run's last checkpoint with one flipped bit as changed.ckpt."""
    content = bytearray(Path(LAST).read_bytes())
    content[len(content) // 2] ^= 1
    Path("changed.ckpt").write_bytes(content)


CHECKPOINTS: dict[str, Case] = {
    "missing file": Case(["--ckpt_path", "no.ckpt"], "no.ckpt does not exist"),
    "empty path": Case(["--ckpt_path", ""], "--ckpt_path is empty"),
    "folder": Case(["--ckpt_path", str(RUN)], "logs/small/version_0 is a folder, not a checkpoint"),
    "text file": Case(["--ckpt_path", "rows.txt"], "rows.txt cannot be opened (damaged, or not a checkpoint)"),
    "truncated": Case(
        ["--ckpt_path", "changed.ckpt"],
        "damaged",
        lambda: Path("changed.ckpt").write_bytes(Path(LAST).read_bytes()[:-99]),
    ),
    "flipped bit": Case(["--ckpt_path", "changed.ckpt"], "changed.ckpt is damaged (checksum of", flip_bit),
    "pickled code in a checkpoint": Case(
        ["--ckpt_path", "changed.ckpt"], "it holds code", lambda: torch.save({"state_dict": Harmful()}, "changed.ckpt")
    ),
    "pickled code alone": Case(
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt cannot be opened (damaged, or not a checkpoint)",
        lambda: Path("changed.ckpt").write_bytes(pickle.dumps(Harmful())),
    ),
    "checkpoint of another program": Case(
        ["--ckpt_path", "changed.ckpt"],
        "not a checkpoint of lit_gpt",
        lambda: torch.save({"state_dict": {}}, "changed.ckpt"),
    ),
    "another model shape": Case(
        ["--ckpt_path", LAST, "--model.config.d_model", "8"], "d_model 16 in the checkpoint, 8 now"
    ),
    "another vocabulary": Case(
        ["--ckpt_path", LAST, "--data.tokenizer", "char"], "vocab_size 257 in the checkpoint, 28 now"
    ),
    "another text": Case(
        ["--ckpt_path", LAST, "--data.files", "other.txt"], "other data", lambda: write("row\n" * 200, "other.txt")()
    ),
    "another split": Case(
        ["--ckpt_path", LAST, "--data.val_fraction", "0.3"], "val tokens 279 in the checkpoint, 793 now"
    ),
    "another optimizer": Case(["--ckpt_path", LAST, "--model.optimizer", "muon"], "was trained with adamw"),
    "optimizer state without step counters": Case(
        ["--ckpt_path", "changed.ckpt"],
        "has the optimizer state of an earlier version of lit_gpt",
        lambda: change_checkpoint(optimizer_states=states_without_step()),
    ),
    "no weights": Case(
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt describes no model of lit_gpt (num_blocks is 2, and it has 0 weights)",
        lambda: change_checkpoint(state_dict={}),
    ),
    "other weights": Case(
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt describes no model of lit_gpt (num_blocks is 2, and it has 1 weights)",
        lambda: change_checkpoint(state_dict={"gpt.embedding.weight": torch.zeros(2)}),
    ),
    "no optimizer": Case(
        ["--ckpt_path", "changed.ckpt"], "has no optimizer state", lambda: change_checkpoint(optimizer_states=None)
    ),
    "no hyperparameters": Case(
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt describes no model of lit_gpt (its hyper_parameters have no config)",
        lambda: change_checkpoint(hyper_parameters={}),
    ),
    "optimizer moments of another shape": Case(
        ["--ckpt_path", "changed.ckpt"],
        "changed.ckpt has the optimizer state of another model",
        lambda: change_checkpoint(optimizer_states=moments_of_wrong_shape()),
    ),
    "state_dict is a list": Case(
        ["--ckpt_path", "changed.ckpt"], "not a checkpoint of lit_gpt", lambda: change_checkpoint(state_dict=[])
    ),
    "invalid step": Case(
        ["--ckpt_path", "changed.ckpt"], "not a checkpoint of lit_gpt", lambda: change_checkpoint(global_step="x")
    ),
    "validate without batches": Case(
        ["validate", "--ckpt_path", LAST, "--trainer.limit_val_batches", "0"], "validate would evaluate nothing"
    ),
    "all checkpoints damaged": Case(
        ["--ckpt_path", "last"],
        "no checkpoint can be used: logs/small/version_0/best.ckpt, logs/small/version_0/last.ckpt",
        lambda: [path.write_bytes(b"") for path in RUN.glob("*.ckpt")],
    ),
}


@pytest.mark.parametrize("case", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_wrong_checkpoint_gives_one_line(fit: Fit, case: Case) -> None:
    assert fit().status == 0
    check_case(fit, case)


@pytest.mark.parametrize("name", ["flipped bit", "another text"])
def test_wrong_checkpoint_on_two_ranks_is_reported_once(fit: Fit, folder: Path, name: str) -> None:
    assert fit().status == 0
    check_case_on_two_ranks(folder, CHECKPOINTS[name])


def test_load_from_checkpoint_runs_no_code(folder: Path) -> None:
    torch.save({"state_dict": Harmful(), "hyper_parameters": {}}, "harmful.ckpt")
    with pytest.raises(UserError, match=r"harmful.ckpt holds code, or is damaged"):
        LitGPT.load_from_checkpoint("harmful.ckpt")
    assert not Path("harmed").exists()


# ----------------------------------------------------------------------------------------------------------- folders

FOLDERS: dict[str, Case] = {
    "file in place of logs": Case([], "logs/small/version_0 cannot be created (Not a directory)", write("", "logs")),
    "file in place of the name": Case(
        [], "logs/small/version_0 cannot be created", lambda: (Path("logs").mkdir(), write("", "logs/small")())
    ),
    "file in place of data": Case(
        [], "data/cache: the token cache cannot be written or read (Not a directory)", write("", "data")
    ),
    "root folder not writable": Case(
        ["--trainer.default_root_dir", "shut"],
        "shut/small/version_0 cannot be created (Permission denied)",
        lambda: Path("shut").mkdir(mode=0o555),
    ),
    "data folder not writable": Case(
        [],
        "data/cache: the token cache cannot be written or read (Permission denied)",
        lambda: Path("data").mkdir(mode=0o555),
    ),
    "text not readable": Case([], "rows.txt cannot be read (no permission)", lambda: Path("rows.txt").chmod(0)),
    "file in place of the root folder": Case(
        ["--trainer.default_root_dir", "rows.txt"], "rows.txt/small/version_0 cannot be"
    ),
    "config not readable": Case(
        ["--config", "shut.yaml"],
        "--config shut.yaml cannot be read (Permission denied)",
        lambda: (Path("shut.yaml").write_text("name: x"), Path("shut.yaml").chmod(0)),
    ),
    "vocabulary not readable": Case(
        ["--data.tokenizer", "shut.tiktoken"],
        "--data.tokenizer shut.tiktoken cannot be read (no permission)",
        lambda: (Path("shut.tiktoken").write_text("YQ== 0"), Path("shut.tiktoken").chmod(0)),
    ),
    "built-in table not writable": Case(
        ["--data.files", "data/mingcheng.csv"],
        "data/mingcheng.csv cannot be written (Permission denied)",
        lambda: Path("data").mkdir(mode=0o555),
    ),
    "checkpoint not readable": Case(
        ["--ckpt_path", "shut.ckpt"],
        "shut.ckpt cannot be opened (Permission denied)",
        lambda: (Path("shut.ckpt").write_text("x"), Path("shut.ckpt").chmod(0)),
    ),
}


@pytest.mark.parametrize("case", FOLDERS.values(), ids=FOLDERS)
def test_unusable_folder_or_file_gives_one_line(folder: Path, case: Case) -> None:
    case.prepare()
    before = folder_contents()
    assert_user_error(forked(folder, "--config", "small.yaml", *case.flags, prepare=drop_capabilities), case.message)
    assert folder_contents() == before
    (folder / "rows.txt").chmod(0o644)


@pytest.mark.parametrize("name", ["file in place of logs", "file in place of data"])
def test_unusable_folder_on_two_ranks_is_reported_once(folder: Path, name: str) -> None:
    check_case_on_two_ranks(folder, FOLDERS[name])


def test_second_process_cannot_train_in_same_folder(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    before = folder_contents()
    with FileLock(RUN / ".lock"):
        shorten_timeout = partial(setattr, lit_gpt.training.run_folder, "LOCK_TIMEOUT", 0.1)
        result = forked(folder, "--config", "small.yaml", "--ckpt_path", "last", prepare=shorten_timeout)
    remedy = "wait until it ends, or choose another --name"
    assert_user_error(result, f"logs/small/version_0: another process trains in this folder: {remedy}")
    (RUN / ".lock").unlink()
    assert folder_contents() == before
