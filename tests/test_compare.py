"""scripts/compare.py: the table of runs, what differs, filters, files, and damaged summaries."""

import csv
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lit_gpt.cli.compare import main
from lit_gpt.lines import display_width
from lit_gpt.runs.comparison import describe_value, find_differences, read_runs, short_names
from lit_gpt.runs.find import find_runs
from lit_gpt.runs.summary import RunSummary


@pytest.fixture
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return tmp_path / "logs"


def add_run(logs: Path, name: str, settings: dict[str, Any], version: int = 0, **figures: Any) -> Path:
    """Write the summary of a run; return its folder."""
    folder = logs / name / f"version_{version}"
    folder.mkdir(parents=True)
    figures = {"status": "finished", "best_loss": 2.0, "bits_per_byte": 1.0, "best_step": 100, **figures}
    base = {"model.config.num_heads": 4, "model.learning_rate": 0.002, "data.files": "poems.csv"}
    RunSummary(name, str(folder), settings={**base, **settings}, **figures).write(folder)
    return folder


def compare(capsys: pytest.CaptureFixture[str], *flags: object) -> list[str]:
    assert main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_table_has_the_best_run_first_and_says_what_differs(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(logs, "base", {}, parameters=945_664, tokens=410_000, seconds=75.0, tokens_per_second=9752.0)
    add_run(logs, "heads", {"model.config.num_heads": 1}, bits_per_byte=0.5, best_loss=3.0)
    add_run(logs, "rate", {"model.learning_rate": 1e-4, "generate.prompts": "x"}, bits_per_byte=None, best_loss=None)
    lines = compare(capsys)
    assert [line.split()[0] for line in lines[1:] if line[:1].strip()][:3] == ["heads", "base", "rate"]
    assert lines[0].split() == ["run", "params", "tokens", "loss", "step", "bits/byte", "time", "tok/s", "status"]
    assert lines[1:3] == [lines[1], "    num_heads 1"]
    assert lines[3].split() == [
        "base",
        "946",
        "k",
        "410",
        "k",
        *["2.0000", "100", "1.000", "75.0", "s", "9.75", "k", "finished"],
    ]
    assert lines[5] == "    learning_rate 0.0001"
    assert lines[-2:] == ["the other runs have", "    num_heads 4, learning_rate 0.002"]
    assert max(map(display_width, lines)) <= 80
    os.environ["COLUMNS"] = "120"
    wide = compare(capsys)
    assert wide[0].endswith("  status    differs in")
    assert wide[1].endswith("finished  num_heads 1")


def test_loggers_are_no_difference(logs: Path) -> None:
    add_run(logs, "plain", {})
    add_run(logs, "csv", {"trainer.logger.class_path": "CSVLogger", "trainer.logger.init_args.save_dir": "logs/csv"})
    runs, _ = read_runs(find_runs([])[0])
    find_differences(runs)
    assert [run.differences for run in runs] == [{}, {}]


def test_differences_are_those_from_most_runs(logs: Path) -> None:
    for number, settings in enumerate([{"a.x": 1}, {"a.x": 1}, {"a.x": 2}, {"a.y": [1]}]):
        add_run(logs, f"run{number}", settings)
    runs, damaged = read_runs(find_runs([])[0])
    assert damaged == {}
    assert find_differences(runs) == {"a.y": None}  # a.x: no value has more than half of the runs
    assert [run.differences for run in runs] == [{"a.x": 1}, {"a.x": 1}, {"a.x": 2}, {"a.x": None, "a.y": "[1]"}]
    assert short_names(["a.x", "b.x", "a.y"]) == {"a.x": "a.x", "b.x": "b.x", "a.y": "y"}
    assert [describe_value(value) for value in (0.1 + 0.2, True, None, "", "a\x1b")] == [
        *("0.3", "true", "null", "''", "a\\x1b")
    ]


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--where", "num_heads>=2"], ["c", "b"]),
        (["--where", "model.config.num_heads=1.0"], ["a"]),
        (["--where", "num_heads>1", "--where", "status!=stopped"], ["c"]),
        (["--where", "status = stopped"], ["b"]),
        (["--where", "dropout=null"], ["c", "b"]),
        (["--where", "loss<2.5", "--sort", "run", "--reverse"], ["c", "b"]),
        (["--sort", "num_heads"], ["a", "b", "c"]),
        (["--sort", "dropout"], ["a", "b", "c"]),
        (["--sort", "dropout", "--reverse"], ["a", "b", "c"]),
        (["--sort", "loss", "--limit", "1"], ["c"]),
        (["a", "logs/b"], ["b", "a"]),
        (["logs/a/version_0"], ["a"]),
        (["a", "logs/a", "./logs/a/version_0", "link"], ["a"]),
    ],
)
def test_runs_are_chosen_and_sorted(
    logs: Path, capsys: pytest.CaptureFixture[str], flags: list[str], shown: list[str]
) -> None:
    for heads, (name, status) in enumerate([("a", "finished"), ("b", "stopped"), ("c", "finished")], start=1):
        settings = {"model.config.num_heads": heads, **({"model.config.dropout": 0.1} if name == "a" else {})}
        add_run(logs, name, settings, status=status, best_loss=3.0 - heads / 2, bits_per_byte=3.0 - heads)
    Path("link").symlink_to("logs/a")
    lines = compare(capsys, *flags)
    assert [line.split()[0] for line in lines[1:] if "finished" in line or "stopped" in line] == shown


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nothing"], "nothing is neither a run in logs nor a folder: give the name of a run, or a folder of runs"),
        (["bse"], "bse is neither a run in logs nor a folder (did you mean 'base'?): give the name"),
        (["--sort", "num_head"], "num_head is no setting of these runs (did you mean 'num_heads'?): give a setting"),
        (["--where", "num_heads"], "--where 'num_heads': give KEY=VALUE, or another of != < <= > >=, as --where"),
        (["--where", "files<3x"], "--where 'files<3x': 3x is no number: give one, or compare with = or !="),
        (["--where", "files=1"], "files stands for data.files, model.files: give one of them"),
        (["--limit", "0"], "--limit is 0: give 1 or more"),
        (["--md", "there"], "--md there is a folder: give the name of a new file"),
        (["--csv", "base.txt"], "--csv base.txt exists: give the name of a new file"),
        (["--csv", "x", "--md", "./x"], "--md and --csv name one file: give different ones"),
        (["--csv", "x", "--where", "run=b"], "there is no run to write to --csv: choose other runs"),
        (["--png", "no/x.png"], "--png no/x.png cannot be written (there is no folder no): give another path"),
    ],
)
def test_mistakes_are_one_line(logs: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    add_run(logs, "base", {"model.files": 1} if "files=1" in flags else {})
    Path("there").mkdir()
    Path("base.txt").write_text("x")
    assert main(flags) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"error: {message}")
    assert printed.err.count("\n") == 1
    assert Path("base.txt").read_text() == "x"


def test_files_have_the_table(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    add_run(logs, "base", {"data.files": "唐诗|$x$.csv"}, parameters=10, tokens=5, step=1)
    add_run(logs, "other", {}, parameters=20, best_loss=None)
    lines = compare(capsys, "--md", "runs.md", "--csv", "runs.csv", "--png", "runs.png")
    assert lines[-3:] == ["md          runs.md", "csv         runs.csv", "png         runs.png"]
    table = Path("runs.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 4
    assert table[2].endswith("| finished | files 唐诗\\|$x$.csv |")
    with open("runs.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["parameters"], row["loss"], row["data.files"]) for row in rows] == [
        ("base", "10", "2.0", "唐诗|$x$.csv"),
        ("other", "20", "", "poems.csv"),
    ]
    assert Path("runs.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_texts_stay_texts_in_files(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(logs, "=1+1", {"data.columns": "[a](b) <b>", "-x": "@x", "model.dropout": -1.0})
    folder = add_run(logs, "other", {})
    summary = json.loads((folder / "summary.json").read_text())
    summary["settings"]["data.columns"] = "\ud800"  # half a surrogate pair, which UTF-8 cannot write
    (folder / "summary.json").write_text(json.dumps(summary))
    compare(capsys, "--md", "runs.md", "--csv", "runs.csv")
    assert "columns \\[a](b) \\<b>" in Path("runs.md").read_text()
    with open("runs.csv", encoding="utf-8", newline="") as file:
        first, second = csv.DictReader(file)
    assert [first[key] for key in ("run", "'-x", "model.dropout")] == ["'=1+1", "'@x", "-1.0"]
    assert second["data.columns"] == "\\ud800"


def test_renamed_folder_renames_the_run(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add_run(logs, "base", {})
    shutil.copytree(logs / "base", logs / "copy")
    assert [line.split()[0] for line in compare(capsys)[1:]] == ["base", "copy"]
    assert compare(capsys, "copy")[1].startswith("copy ")


def test_runs_without_a_usable_summary_are_counted_or_named(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(capsys) == ["no runs     train one with scripts/fit.py, or give the folder of runs"]
    add_run(logs, "poems", {}, version=1)
    add_run(logs, "poems", {}, version=12)
    for name in ("older/version_0", "older/version_1", "poems/version_12/train"):
        (logs / name).mkdir(parents=True)
    for number in range(5):
        (add_run(logs, f"damaged{number}", {}) / "summary.json").write_text('{"name": "\x1b[31m"')
    lines = compare(capsys)
    assert [line[:11] for line in lines[1:3]] == ["poems v1   ", "poems v12  "]
    assert "left out    2 without summary.json (older versions, other loggers)" in lines
    assert [line for line in lines if line.startswith("damaged")] == [
        f"damaged     logs/damaged{number}/version_0/summary.json: it is not JSON" for number in range(3)
    ]
    assert lines[-1] == "            and 2 more"


def test_lock_tells_whether_a_run_still_runs(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("running", "killed", "unknown"):
        folder = add_run(logs, name, {}, status="running")
        if name != "unknown":
            (folder / ".lock").touch()
    with open(logs / "running/version_0/.lock", "rb+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lines = compare(capsys)
    assert [(line.split()[0], line.split()[-1]) for line in lines[1:]] == [
        *(("killed", "killed"), ("running", "running"), ("unknown", "unknown"))
    ]


def test_command_imports_nothing_slow(logs: Path) -> None:
    slow = {"torch", "lightning", "numpy", "tensorboard", "matplotlib", "jsonargparse"}
    program = (
        f"import sys, json, lit_gpt.cli.compare as c; c.main([]); print(json.dumps(sorted({slow} & set(sys.modules))))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed.splitlines()[-1]) == []
