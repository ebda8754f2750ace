"""The benchmark measures what it says, and says what it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEFAULT, ROOT, forked

from lit_gpt.benchmark.benchmark import main
from lit_gpt.device import available_cores


def measured(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, float | str]]:
    status = main([*words, "--json"], DEFAULT)
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return [json.loads(line) for line in printed.out.splitlines()]


def test_training_is_split_into_its_parts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--config", "small.yaml", "--steps=3", "--turns=2", "--warm_up=2"]
    ours, bare = measured(capsys, *words, "--data.num_workers=1")
    assert (ours["who"], bare["who"]) == ("lit_gpt", "bare")
    parts = ("data_ms", "forward_ms", "backward_ms", "optimizer_ms", "else_ms")
    assert all(float(ours[part]) > 0 for part in parts)
    assert sum(float(ours[part]) for part in parts) == pytest.approx(ours["step_ms"])
    assert ours["tokens_per_second"] == pytest.approx(4 * 16 / float(ours["step_ms"]) * 1000)
    assert float(bare["over_lit_gpt"]) == pytest.approx(float(bare["step_ms"]) / float(ours["step_ms"]))
    assert float(ours["peak_mb"]) > 100
    assert not (folder / "logs").exists()


def test_writing_is_measured_with_and_without_a_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured(capsys, "generate", "--config", "small.yaml", "--steps=8", "--turns=3", "--vocab_size=50")
    assert {(row["rows"], row["cache"]) for row in rows} == {(1, True), (1, False), (16, True), (16, False)}


def test_preparing_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, *ours = measured(capsys, "prepare", "--config", "small.yaml", "--turns=1")
    assert tokenizer["who"] == "tokenizer"
    assert [row["processes"] for row in ours] == sorted({1, available_cores()})
    for row in ours:
        assert float(row["rows_per_second"]) * float(row["seconds"]) == pytest.approx(120)


def test_a_loss_is_reached_or_not(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["loss", "--config", "small.yaml", "--turns=1", "--first_seed=7"]
    (row,) = measured(capsys, *words, "--target", "5.49")
    assert (row["seed"], row["steps"], row["tokens"], row["reached"]) == (7, 3, 3 * 4 * 16, True)
    (row,) = measured(capsys, *words, "--target", "1")
    assert (row["steps"], row["reached"]) == (6, False)


def test_starting_is_measured(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        script = Path(command[1])
        if script.parent.name != "scripts" or "--version" in command:
            return subprocess.CompletedProcess(command, 0)
        ended = forked(folder, *command[2:], script=script.name)
        return subprocess.CompletedProcess(command, ended.status, ended.out, ended.err)

    monkeypatch.setattr(subprocess, "run", run)
    rows = measured(capsys, "startup", "--config", "small.yaml", "--turns=1")
    whats = ["import lightning.pytorch.cli", "fit.py --version", "fit.py --help", "first step", "first token"]
    assert [row["what"] for row in rows] == whats
    assert all(float(row["seconds"]) > 0 for row in rows)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "small.yaml", "--nanogpt", "nowhere"], "--nanogpt nowhere"),
        (["train", "--config", "none.yaml"], "none.yaml: no such file"),
        (["train", "--model.config.d_mode", "3"], "d_model"),
        (
            ["train", "--config", "small.yaml", "--trainer.devices=2", "--trainer.strategy=ddp"],
            "one device is measured",
        ),
        (["sing"], "invalid choice"),
        (["train", "--steps", "0"], "--steps"),
    ],
    ids=["no checkout", "no config", "unknown flag", "two devices", "unknown kind", "no steps"],
)
def test_a_mistake_is_said_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(words, DEFAULT) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_the_version_is_said_without_torch() -> None:
    script = str(ROOT / "scripts" / "fit.py")
    program = (
        "import atexit, runpy, sys; atexit.register(lambda: print('torch' in sys.modules)); "
        f"sys.argv = ['fit.py', '--version']; runpy.run_path({script!r}, run_name='__main__')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.split() == ["lit_gpt", "0.1.0", "False"]
