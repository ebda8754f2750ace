"""summary.json: what a run writes, and what is read from a damaged or foreign one."""

import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
from conftest import Fit, at_step, forked, points

from lit_gpt.runs.environment import git_state
from lit_gpt.runs.summary import MAX_BYTES, DamagedSummaryError, RunSummary, read_summary
from lit_gpt.training import recorder

RUN = Path("logs/small/version_0")
TOKENS_PER_STEP = 4 * 16  # of small.yaml: windows, context


def test_finished_run_has_the_figures_of_its_curves(fit: Fit) -> None:
    assert fit("--model.learning_rate", 0.002).status == 0
    summary, curves = read_summary(RUN), points(RUN)
    assert (summary.status, summary.name, summary.folder) == ("finished", "small", str(RUN))
    assert (summary.step, summary.max_steps, summary.tokens) == (6, 6, 6 * TOKENS_PER_STEP)
    trained = [(loss, step) for step, loss in curves["loss/val"] if step > 0]
    assert (summary.best_loss, summary.best_step) == min(trained)
    assert summary.bits_per_byte == dict(curves["val/bits_per_byte"])[summary.best_step or 0]
    assert summary.last_loss == curves["loss/val"][-1][1]
    assert summary.last_train_loss == curves["loss/train_eval"][-1][1]
    assert 0 < summary.seconds < 60
    assert (summary.tokens_per_second or 0) > 0
    assert summary.parameters == 12_416
    assert summary.settings["model.learning_rate"] == 0.002
    assert summary.defaults["model.config.d_model"] == 128
    assert not {"model.learning_rate", "model.schedule", "name"} & summary.defaults.keys()  # 0.002 is the default
    assert summary.data["parts"]["train"]["documents"] == 108
    assert "--model.learning_rate" in summary.command


def test_resumed_run_adds_up_tokens_and_time_of_its_checkpoint(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3, "--trainer.precision", "null").status == 0  # this machine chooses
    first = read_summary(RUN)
    assert fit("--ckpt_path", "last", "--data.batch_size", 8).status == 0
    second = read_summary(RUN)
    assert second.tokens == 3 * TOKENS_PER_STEP + 3 * 2 * TOKENS_PER_STEP
    assert (second.started, second.status) == (first.started, "finished")
    changed = {"data.batch_size", "trainer.max_steps"}  # a resumed run differs in no setting that nobody changed
    assert {key for key in first.settings if first.settings[key] != second.settings.get(key)} == changed
    assert second.settings.keys() - first.settings.keys() <= changed
    assert first.seconds < second.seconds < first.seconds + 60
    content = (RUN / "summary.json").read_bytes()
    assert fit("--ckpt_path", "last").status == 0  # there is nothing to train
    assert (RUN / "summary.json").read_bytes() == content


def test_status_of_runs_that_were_killed_stopped_or_failed(folder: Path) -> None:
    run = folder / RUN

    def prepare(signum: int) -> None:
        recorder.WRITE_SECONDS = -1.0
        at_step(5, lambda module: os.kill(os.getpid(), signum))()

    for signum, status in ((signal.SIGKILL, "running"), (signal.SIGTERM, "stopped")):
        forked(folder, "--config", "small.yaml", prepare=partial(prepare, signum))
        summary = read_summary(run)
        assert (summary.status, summary.step) == (status, 3 if status == "running" else 5)
        shutil.rmtree(folder / "logs")
    overflow = at_step(5, lambda module: module.gpt.embedding.weight.data.fill_(float("nan")))
    assert forked(folder, "--config", "small.yaml", prepare=overflow).status == 2
    assert (read_summary(run).status, read_summary(run).step) == ("failed", 4)


def test_run_goes_on_where_its_summary_cannot_be_written(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(summary: RunSummary, folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunSummary, "write", write)
    result = fit("--trainer.max_steps", 3)
    assert (result.status, result.err) == (0, "")
    assert f"warning     {RUN}/summary.json cannot be written (No space left on device): free disk space" in result.out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not an object"),
        (b'{"name": "x", "folder": "y"}', "no name, folder or status"),
        (b'{"name": "x", "folder": "y", "status": "lost"}', "no name, folder or status"),
        (b'{"name": "x", "folder": "y", "status": "running", "step": "3"}', "its step is '3'"),
        (b'{"name": "x", "folder": "y", "status": "running", "step": true}', "its step is 'True'"),
        (b'{"name": "x", "folder": "y", "status": "running", "seconds": NaN}', "its seconds is 'nan'"),
        (b'{"name": "x", "folder": "y", "status": "running", "seconds": 1%s}' % (b"0" * 400), "its seconds is '1000"),
        (b'{"name": "x", "folder": "y", "status": "running", "tokens": 1%s}' % (b"0" * 400), "its tokens is '1000"),
        (b" " * (MAX_BYTES + 1), "more than 8,388,608 bytes"),
    ],
)
def test_damaged_summary_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "summary.json").write_bytes(content)
    with pytest.raises(DamagedSummaryError, match=message):
        read_summary(tmp_path)


def test_summary_of_another_version_is_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_summary(tmp_path)
    later = {"name": "x", "folder": "y", "status": "running", "seconds": 3, "invented_later": [1]}
    (tmp_path / "summary.json").write_text(json.dumps(later))
    assert read_summary(tmp_path) == RunSummary("x", "y", seconds=3.0)
    (tmp_path / "summary.json").rename(tmp_path / "other")
    (tmp_path / "summary.json").symlink_to(tmp_path / "other")
    with pytest.raises(DamagedSummaryError):  # it could lead anywhere
        read_summary(tmp_path)


def test_git_state_names_the_commit_of_this_checkout() -> None:
    state = git_state()
    assert state == {} or (len(state["commit"]) == 40 and state["changed"] in (True, False))
