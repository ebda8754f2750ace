"""No value controls the terminal, from wherever it comes: names, texts, settings, checkpoints, other libraries."""

import functools
import json
import re
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEFAULT, Fit, Result, in_terminal, unwrap

from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.cli.consolidate import main as consolidate
from lit_gpt.cli.generate import main as generate
from lit_gpt.cli.messages import print_text
from lit_gpt.cli.prepare import main as prepare

# Colours, a line end that forges a line of a report, the one-byte form of ESC [, and right-to-left text.
BAD = "\x1b[31m\r\x9b\u202e\nforged      line"


def assert_printable(printed: str) -> None:
    """Check that text has no control characters but line ends, nothing that reorders it, and no forged line."""
    for character in printed:
        assert character == "\n" or unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp"), repr(printed)
    assert not any(line.startswith("forged") for line in printed.splitlines()), printed


Run = Callable[..., Result]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the `main` of a command in this process and checks what it prints."""

    def run(main: Callable[..., int], *words: object) -> Result:
        capsys.readouterr()
        arguments = [[str(word) for word in words], DEFAULT][: 2 if main is prepare else 1]
        status = main(*arguments)
        printed = capsys.readouterr()
        assert_printable(printed.out + printed.err)
        return Result(status, unwrap(printed.out), printed.err)

    return run


# ------------------------------------------------------------------------------------------------- files and reports


def write_table(path: Path) -> Path:
    """Write a table with a duplicate, a long document, a rejected row and rare characters, all of them bad."""
    rows = ["text", *["hello"] * 3, f'"{BAD}"', f'"{BAD * 30}"', *(f"row {i}" for i in range(20)), "a,b,c"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8", newline="\n")
    return path


def test_report_on_files_is_printable(run: Run, folder: Path) -> None:
    bad_folder = folder / f"in{BAD}"
    bad_folder.mkdir()
    table = write_table(bad_folder / f"a{BAD}.csv")
    flags = ["--data.files", table, "--data.tokenizer", "char"]
    report = run(prepare, *flags).out
    for label in ("file", "rejected", "longest", "rarest", "duplicates"):
        assert re.search(rf"^{label} ", report, re.MULTILINE), report
    assert r"\x1b[31m\r\x9b\u202e\n" in report
    as_json = json.loads(run(prepare, *flags, "--json").out)
    assert as_json["files"][0]["name"] == str(table)
    assert run(prepare, *flags, "--compare").status == 0
    assert run(prepare, *flags, "--compare", "--json").status == 0


BAD_FILES = {
    "header": ("a.csv", f'"{BAD}","te{BAD}xt"\n1,2\n', []),
    "column": ("a.csv", "x,y\n1,2\n", ["--data.columns", BAD]),
    "template": ("a.csv", "x,y\n1,2\n", ["--data.template", f"{{{BAD}}}"]),
    "JSONL key": ("a.jsonl", json.dumps({f"{BAD}": "a", f"b{BAD}": "b"}) + "\n", []),
    "JSONL keys of two rows": ("a.jsonl", json.dumps({"text": "a"}) + "\n" + json.dumps({f"{BAD}": 1}) + "\n", []),
    "split name": ("a.csv", f'text,split\na,"{BAD}"\nb,train\n', ["--data.split_column", "split"]),
    "suffix": (f"a.{BAD}", "text\na\n", []),
    "empty file": (f"a{BAD}.csv", "text\n", []),
    "binary file": (f"a{BAD}.csv", "\x00" * 100, []),
    "damaged file": (f"a{BAD}.csv.gz", "no gzip", []),
    "Parquet": (f"a{BAD}.parquet", "no Parquet", []),
    "encoding": ("a.csv", "text\na\n", ["--data.encoding", BAD]),
    "delimiter": ("a.csv", "text\na\n", ["--data.delimiter", BAD]),
    "tokenizer": ("a.csv", "text\na\n", ["--data.tokenizer", BAD]),
    "tiktoken file": ("a.csv", "text\na\n", ["--data.tokenizer", f"{BAD}.tiktoken"]),
}


@pytest.mark.parametrize(("name", "text", "flags"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_errors_about_files_are_printable(run: Run, folder: Path, name: str, text: str, flags: list[str]) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    ended = run(prepare, "--data.files", name, *flags)
    assert ended.status in (0, 2)
    assert run(prepare, "--data.files", f"missing {name}", *flags).status == 2


# ----------------------------------------------------------------------------------- flags, configs, the environment


@pytest.mark.parametrize(
    "flags",
    [
        ["--name", BAD],
        ["--ckpt_path", f"{BAD}.ckpt"],
        ["--config", f"{BAD}.yaml"],
        [f"--{BAD}", "1"],
        [BAD],
        ["--model.config.d_model", BAD],
        ["--model.config.norm", BAD],
        ["--trainer.strategy", BAD],
        ["--trainer.max_time", BAD],
        ["--trainer.logger", BAD],
        ["--trainer.callbacks", f'[{{"class_path": "{BAD}"}}]'],
        ["--generate.prompts", json.dumps([BAD]), "--data.tokenizer", "char"],
        ["--trainer.default_root_dir", f"rows.txt/{BAD}", "--trainer.max_steps", "1"],
    ],
    ids=lambda flags: flags[0].replace(BAD, "BAD"),
)
def test_errors_about_flags_are_printable(fit: Fit, flags: list[str]) -> None:
    ended = fit(*flags)
    assert_printable(ended.out + ended.err)
    assert ended.status == 2


@pytest.mark.parametrize(
    "settings",
    [
        {BAD: 1},
        {"trainer": {BAD: 1}},
        {"trainer": {"max_steps": BAD}},
        {"data": {"files": BAD}},
        {f"a.{BAD}": 1},
        {"model": BAD},
        {"trainer": {"callbacks": {"class_path": BAD, "init_args": {BAD: BAD}}}},
    ],
    ids=lambda settings: str(next(iter(settings))).replace(BAD, "BAD"),
)
def test_errors_about_configs_are_printable(fit: Fit, folder: Path, settings: dict[str, Any]) -> None:
    for name in (f"a{BAD}.yaml", f"{BAD}.yaml"):
        (folder / name).write_text(yaml.safe_dump(settings), encoding="utf-8")
        ended = fit(config=name)
        assert_printable(ended.out + ended.err)
        assert ended.status == 2


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_errors_about_the_environment_are_printable(fit: Fit, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, BAD)
    for strategy in ("auto", "ddp"):
        ended = fit("--trainer.devices", 2, "--trainer.strategy", strategy)
        assert_printable(ended.out + ended.err)
        assert ended.status == 2
        assert name in ended.err


def test_printed_config_is_printable_and_keeps_every_value(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [BAD, "می\u200cخواهم 👨\u200d👩\u200d👧", "a\nb\tc"]
    Path("prompts.yaml").write_text(yaml.safe_dump({"generate": {"prompts": prompts}}), encoding="utf-8")
    with pytest.raises(SystemExit):
        fit("--config", "prompts.yaml", "--print_config")
    printed = capsys.readouterr().out
    assert_printable(re.sub("[\u200c\u200d]", "", printed))
    assert yaml.safe_load(printed)["generate"]["prompts"] == prompts


# -------------------------------------------------------------------------------------------------------- checkpoints


# Changes to a checkpoint, by the paths of the values that they set.
UNKNOWN_KEYS = ("", "tokenizer/", "data/", "hyper_parameters/", "callbacks/")
CRAFTED: dict[str, dict[str, Any]] = {
    "names": {f"{path}{BAD}": BAD for path in UNKNOWN_KEYS} | {f"events/{BAD}": 9, f"callback_metrics/{BAD}": 1.0},
    "tokenizer": {"tokenizer/kind": BAD},
    "fingerprint": {"data/text": BAD, f"data/{BAD}": 1},
    "mode": {"data/mode": BAD},
    "hyperparameter": {"hyper_parameters/optimizer": BAD},
    "shape": {"hyper_parameters/config/norm": BAD, f"hyper_parameters/config/{BAD}": BAD},
    "weight": {f"state_dict/{BAD}": torch.zeros(2)},
    "version": {"pytorch-lightning_version": BAD},
}
CRAFTED_SETTINGS = {
    "an unknown setting": {"trainer": {BAD: BAD}, BAD: BAD},
    "a number": {"trainer": {"max_steps": BAD}},
    "the run's name": {"name": BAD},
    "files to train on": {"data": {"files": f"{BAD}.csv"}},
    "a logger": {"trainer": {"logger": {"class_path": BAD, "init_args": {BAD: BAD}}}},
    "a callback": {"trainer": {"callbacks": [{"class_path": BAD, "init_args": {BAD: BAD}}]}},
    "a folder": {"trainer": {"default_root_dir": BAD}},
}


@pytest.fixture
def genuine(fit: Fit) -> Callable[[], dict[str, Any]]:
    """Return a function that reads the checkpoint of a small run."""
    assert fit("--trainer.max_steps", 1).status == 0
    return lambda: Checkpoint.open("logs/small/version_0/last.ckpt").read()


def test_what_crafted_checkpoints_print_is_printable(genuine: Callable[[], dict[str, Any]], fit: Fit, run: Run) -> None:
    for number, (name, values) in enumerate(CRAFTED.items()):
        contents = genuine()
        for key, value in values.items():
            *path, last = key.split("/")
            functools.reduce(dict.__getitem__, path, contents)[last] = value
        file = Path("logs", f"crafted{BAD}", f"version_{number}", f"{BAD}.ckpt")
        save_checkpoint(contents, file)
        ended = fit("--ckpt_path", file, "--trainer.max_steps", 2)
        assert_printable(ended.out + ended.err)
        assert ended.status in (0, 1, 2), name
        assert run(generate, "--ckpt_path", file, "--max_new_tokens", 1).status in (0, 2), name
    assert run(consolidate, file, f"one{BAD}.ckpt").status == 0
    assert run(consolidate, "--weights", file, f"weights{BAD}.pt").status == 0
    (file.parent / f"damaged{BAD}.ckpt").write_bytes(b"")
    assert "skipped damaged" in run(generate, "--name", f"crafted{BAD}", "--max_new_tokens", 1).err


def test_what_crafted_settings_print_is_printable(genuine: Callable[[], dict[str, Any]], fit: Fit) -> None:
    for number, (name, settings) in enumerate(CRAFTED_SETTINGS.items()):
        saved = yaml.safe_load(genuine()["config"])
        for section, values in settings.items():
            saved[section] = {**saved.get(section, {}), **values} if isinstance(values, dict) else values
        path = Path("logs", "small", f"version_{number + 1}", "last.ckpt")
        save_checkpoint({**genuine(), "config": yaml.safe_dump(saved), "saved_at": 2e9 + number}, path)
        ended = fit("--ckpt_path", path, "--trainer.max_steps", 2, config=None)
        assert_printable(ended.out + ended.err)
        assert ended.status in (0, 2), name
    save_checkpoint({**genuine(), "config": BAD, "saved_at": 3e9}, Path("logs", "small", "version_99", "last.ckpt"))
    ended = fit("validate", "--ckpt_path", "last", "--name", "small", config=None)
    assert_printable(ended.out + ended.err)
    assert ended.status == 2


# ------------------------------------------------------------------------------------------------- progress, libraries


def test_terminal_shows_only_the_controls_of_the_progress_bar(fit: Fit, folder: Path) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    resumed = Path("logs", "small", "version_\x9b\u202e")
    shutil.copytree("logs/small/version_0", resumed)
    status, printed = in_terminal(folder, "--config", "small.yaml", "--ckpt_path", resumed / "last.ckpt")
    assert status == 0, printed
    assert re.search(r"step 3/6 +50%\|", printed)
    assert r"version_\x9b\u202e" in printed
    assert_printable(printed.replace("\r", "").replace("\x1b[A", ""))


@pytest.mark.parametrize("is_terminal", [True, False])
def test_generated_text_is_printable_on_a_terminal_and_exact_elsewhere(
    is_terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    print_text(f"{BAD}\t床前\n")
    escaped = "\\x1b[31m\\r\\x9b\\u202e\nforged      line\t床前\n"
    assert capsys.readouterr().out == (escaped if is_terminal else f"{BAD}\t床前\n")


LIBRARIES = f"""
import logging, sys, threading, warnings
from lit_gpt.cli.messages import prepare_console
BAD = {BAD!r}
prepare_console()
warnings.warn(BAD)
logging.getLogger("lightning").warning("%s and more", BAD)
try:
    raise ValueError(BAD)
except ValueError:
    logging.exception(BAD)
class Broken:
    def __del__(self):
        raise RuntimeError(BAD)
Broken()
thread = threading.Thread(target=lambda: int(BAD + BAD))
thread.start()
thread.join()
noted = Exception(BAD)
noted.add_note(BAD + chr(10) + BAD)
raise noted from ExceptionGroup(BAD, [OSError(2, BAD, BAD), KeyError(BAD), noted])
"""


def test_what_python_and_libraries_print_is_printable() -> None:
    ended = subprocess.run([sys.executable, "-c", LIBRARIES], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("", 1)
    assert_printable(ended.stderr)
    for kind in ("UserWarning", "and more", "Traceback", "RuntimeError", "invalid literal", "ExceptionGroup"):
        assert kind in ended.stderr


def test_traceback_of_a_bug_is_printable(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError(BAD)

    monkeypatch.setattr("lit_gpt.cli.fit.check_steps", fail)
    ended = fit()
    assert ended.status == 1
    assert "RuntimeError: \\x1b[31m" in ended.err
    assert_printable(ended.err)
