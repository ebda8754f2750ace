"""A run stops on Ctrl-C, SIGTERM or a time limit, with its state saved and the right exit status."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Fit, at_step, forked, points, texts
from lightning.pytorch.loops.fit_loop import _FitLoop

import lit_gpt.data.datamodule
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.data.cache import Corpus
from lit_gpt.data.samplers import EpochSampler
from lit_gpt.errors import UserError
from lit_gpt.training.module import LitGPT
from lit_gpt.training.run_folder import RunFolder
from lit_gpt.training.stop import check_ranks_agree

RUN = Path("logs/small/version_0")
TWO_RANKS = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]


def send_to_self(signum: int) -> Callable[[LitGPT], None]:
    return lambda module: os.kill(os.getpid(), signum)


# ------------------------------------------------------------------------------------------- signals during training


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("flags", [[], TWO_RANKS], ids=["1 rank", "2 ranks"])
def test_signal_stops_the_run_after_the_current_step_is_saved(
    folder: Path, signum: int, status: int, flags: list[object]
) -> None:
    flags = ["--trainer.max_steps", 4000, *flags]
    ended = forked(folder, "--config", "small.yaml", *flags, prepare=at_step(5, send_to_self(signum)))
    assert ended.status == status, ended.err
    saved = "logs/small/version_0/last.ckpt"
    message, _, command = ended.err.splitlines()[-1].partition("; resume it with: ")
    assert message == f"stopped at step 5 by {signal.Signals(signum).name}; the run is saved in {saved}"
    words = " ".join(map(str, flags))
    assert command.endswith(f"fit.py --config=small.yaml {words} --name small --ckpt_path last")
    assert "Traceback" not in ended.err
    assert Checkpoint.open(folder / saved).step == 5
    assert [step for step, _ in points(folder / RUN)["loss/train"]] == [1, 2, 3, 4, 5]
    assert sorted(texts(folder / RUN)) == [0, 3]  # no samples at the step of the interruption


def test_signal_during_validation_lets_it_finish(folder: Path) -> None:
    def prepare() -> None:
        validation_step = LitGPT.validation_step

        def patched(*args: object) -> None:
            if args[0].trainer.global_step == 3:  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGTERM)
            validation_step(*args)  # type: ignore[arg-type]

        LitGPT.validation_step = patched  # type: ignore[method-assign, assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143
    assert [step for step, _ in points(folder / RUN)["loss/val"]] == [0, 3]
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 3


@pytest.mark.parametrize(("validation", "last_step"), [(1, 4), (2, 6)], ids=["during the run", "at its end"])
def test_signal_during_a_save_lets_it_finish(folder: Path, validation: int, last_step: int) -> None:
    """A step is saved when the next one begins, and that one is finished too."""

    def prepare() -> None:
        replace, targets = os.replace, []

        def patched(source: Path, target: Path) -> None:
            targets.append(Path(target).name)
            if targets.count("best.ckpt") == validation:
                os.kill(os.getpid(), signal.SIGTERM)
            replace(source, target)

        os.replace = patched  # type: ignore[assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143
    assert f"stopped at step {last_step} by SIGTERM; the run is saved in logs/small/version_0/last.ckpt" in ended.err
    assert Checkpoint.open(folder / RUN / "best.ckpt").step == 3 * validation
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == last_step


def test_second_interrupt_exits_at_once(folder: Path) -> None:
    def interrupt_twice(module: LitGPT) -> None:
        def interrupt_later() -> None:
            time.sleep(0.8)
            os.kill(os.getpid(), signal.SIGINT)

        os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt_later).start()
        time.sleep(60)

    start = time.monotonic()
    ended = forked(folder, "--config", "small.yaml", prepare=at_step(5, interrupt_twice))
    assert ended.status == 130
    assert time.monotonic() - start < 30
    assert "press Ctrl-C again to exit at once" in ended.err
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 3  # of the validation; nothing newer


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_group_does_not_end_data_workers(folder: Path, signum: signal.Signals) -> None:
    to_the_group = at_step(5, lambda module: os.killpg(os.getpgrp(), signum))
    flags = ["--data.num_workers", 1, "--data.global_batch_size", 40]  # with a queue of few batches
    ended = forked(folder, "--config", "small.yaml", *flags, prepare=to_the_group)
    assert ended.status == 128 + signum, ended.err
    assert "Traceback" not in ended.err
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 5


def test_exception_in_the_teardown_of_a_stopped_run_does_not_hide_the_stop(folder: Path) -> None:
    def prepare() -> None:
        def fail(loop: _FitLoop) -> None:
            raise RuntimeError("a worker is gone")

        _FitLoop.teardown = fail  # type: ignore[method-assign]
        at_step(3, send_to_self(signal.SIGTERM))()

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143, ended.err
    assert "stopped at step 3 by SIGTERM; the run is saved in" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_time_limit_saves_the_run_and_exits_with_status_0(folder: Path) -> None:
    slow = at_step(2, lambda module: time.sleep(1.2))
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_time", "00:00:00:01", prepare=slow)
    assert ended.status == 0
    assert "stopped at step 2 by --trainer.max_time" in ended.err
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 2
    # the limit holds for one command: the time of earlier ones does not count
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_time", "00:00:01:00", "--ckpt_path", "last")
    assert ended.status == 0
    assert [step for step, _ in points(folder / RUN)["loss/val"]] == [0, 3, 6]


# --------------------------------------------------------------------------------------- signals before the first step


def test_signal_before_the_first_step_ends_the_command_in_one_line(folder: Path) -> None:
    def prepare() -> None:
        lit_gpt.data.datamodule.open_corpus = lambda *args: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[attr-defined]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.out, ended.err) == (130, "", "stopped by SIGINT\n")
    assert not (folder / "logs").exists()


class SignalOnDeletion:
    """Sends SIGTERM to this process in `__del__`, where Python reports exceptions but does not raise them."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_whose_exception_python_discards_ends_the_command(folder: Path) -> None:
    def prepare() -> None:
        sys.unraisablehook = lambda unraisable: None
        open_corpus = lit_gpt.data.datamodule.open_corpus

        def patched(*args: object) -> Corpus:
            SignalOnDeletion()
            return open_corpus(*args)  # type: ignore[arg-type]

        lit_gpt.data.datamodule.open_corpus = patched  # type: ignore[attr-defined]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n")
    assert not (folder / "logs").exists()


def test_signal_while_the_data_loader_starts_ends_the_command(folder: Path) -> None:
    """Lightning's teardown fails there, because it asks for the length of a loader that does not exist yet."""

    def prepare() -> None:
        EpochSampler.__len__ = lambda sampler: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n")
    assert not (folder / "logs").exists()


def test_signal_while_waiting_for_another_rank_ends_both(folder: Path) -> None:
    """The other rank still imports its modules; this one waits for it inside torch, where no signal handler runs."""

    def prepare() -> None:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    ended = forked(folder, "--config", "small.yaml", *TWO_RANKS, prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n"), ended.out
    assert not (folder / "logs").exists()


def test_main_restores_the_signal_handlers_of_the_calling_program(fit: Fit) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    assert fit().status == 0
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


# ------------------------------------------------------------------------------------------------------- run folder


@pytest.mark.parametrize(("keep", "content", "remains"), [(False, None, False), (True, None, True), (False, "a", True)])
def test_run_folder_removes_a_new_folder_without_checkpoint(
    tmp_path: Path, keep: bool, content: str | None, remains: bool
) -> None:
    run, run_folder = tmp_path / "logs" / "name" / "version_0", RunFolder()
    run_folder.create_and_lock(run, is_new=True)
    assert (run / ".lock").exists()
    if content is not None:
        (run / "last.ckpt").write_text(content)
    run_folder.release(keep=keep)
    assert run.exists() == remains
    assert (tmp_path / "logs").exists() == remains
    assert not (run / ".lock").exists()


def test_run_folder_keeps_an_existing_folder_and_refuses_a_second_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_gpt.training.run_folder.LOCK_TIMEOUT", 0)
    first, second = RunFolder(), RunFolder()
    first.create_and_lock(tmp_path, is_new=False)
    with pytest.raises(UserError, match="another process trains in this folder"):
        second.create_and_lock(tmp_path, is_new=False)
    second.release(keep=False)
    first.release(keep=False)
    assert tmp_path.exists()
    second.create_and_lock(tmp_path, is_new=False)
    second.release(keep=False)


@pytest.mark.parametrize(
    ("path", "key", "agrees"),
    [
        ("/elsewhere/logs/a/version_0/last.ckpt", "same", True),  # machines may have logs/ in different places
        ("/here/logs/b/version_0/last.ckpt", "same", False),
        ("/here/logs/a/version_1/last.ckpt", "same", False),
        ("/here/logs/a/version_0/last.ckpt", "other", False),
    ],
)
def test_ranks_agree_on_text_and_checkpoint(path: str, key: str, agrees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SimpleNamespace(
        root_device=torch.device("cpu"),
        broadcast=lambda inputs: (Path("/here/logs/a/version_0/last.ckpt").parts[-3:], "same"),  # of rank 0
        reduce=lambda tensor, reduce_op: tensor,
    )
    trainer: Any = SimpleNamespace(ckpt_path=path, strategy=strategy)
    data = SimpleNamespace(corpus=SimpleNamespace(key=key))
    monkeypatch.setattr("lit_gpt.training.stop.module_and_data", lambda trainer: (None, data))
    if agrees:
        check_ranks_agree(trainer)
    else:
        with pytest.raises(UserError, match="do not all find the same text, or the same checkpoint"):
            check_ranks_agree(trainer)
