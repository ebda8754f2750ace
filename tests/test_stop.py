"""However a run ends, what it had is kept, and a person is told."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Fit, forked, points, powerless, texts
from lightning.pytorch.loops.fit_loop import _FitLoop

import lit_gpt.checkpoint.store
import lit_gpt.data.datamodule
from lit_gpt.checkpoint.store import open_checkpoint
from lit_gpt.cli.fit import FitCLI
from lit_gpt.data.corpus import Corpus
from lit_gpt.data.datamodule import RunSampler
from lit_gpt.model import GPT
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText

RUN = Path("logs/small/version_0")


def at_step(step: int, act: Callable[[LitGPT], object]) -> Callable[[], None]:
    """Does `act` when training reaches optimizer step `step`, from 1, inside its forward."""

    def prepare() -> None:
        training_step = LitGPT.training_step

        def instead(module: LitGPT, *args: object) -> torch.Tensor:
            if module.trainer.global_step == step - 1:
                act(module)
            return training_step(module, *args)  # type: ignore[arg-type]

        LitGPT.training_step = instead  # type: ignore[method-assign, assignment]

    return prepare


def told(signum: int) -> Callable[[LitGPT], None]:
    return lambda module: os.kill(os.getpid(), signum)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("devices", [1, 2])
def test_a_signal_ends_the_run_after_its_step_saved(folder: Path, signum: int, status: int, devices: int) -> None:
    pair = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]
    flags = ["--config", "small.yaml", "--trainer.max_steps", 4000, *(pair if devices == 2 else [])]
    ended = forked(folder, *flags, prepare=at_step(5, told(signum)))
    assert ended.status == status, ended.err
    message = ended.err.splitlines()[-1]
    saved = "logs/small/version_0/last.ckpt"
    assert message.startswith(
        f"stopped at step 5 by {signal.Signals(signum).name}; the run is saved in {saved}; resume it with: "
    )
    assert message.endswith(
        "fit.py --config=small.yaml --trainer.max_steps 4000"
        + "".join(f" {word}" for word in flags[4:])
        + " --name small --ckpt_path last"
    )
    assert "Traceback" not in ended.err
    assert open_checkpoint(folder / saved)["global_step"] == 5
    assert [step for step, _ in points(folder / RUN)["loss/train"]] == [1, 2, 3, 4, 5]
    assert sorted(texts(folder / RUN)) == [0, 3]  # none where it was only interrupted


def test_a_signal_during_validation_lets_it_end(folder: Path) -> None:
    def prepare() -> None:
        validation_step = LitGPT.validation_step

        def instead(*args: object) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            validation_step(*args)  # type: ignore[arg-type]

        LitGPT.validation_step = instead  # type: ignore[method-assign, assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143
    assert [step for step, _ in points(folder / RUN)["loss/val"]] == [3]
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 3


def test_what_falls_over_when_a_stopped_run_is_cleared_away_hides_nothing(folder: Path) -> None:
    def prepare() -> None:
        def fallen(loop: _FitLoop) -> None:
            raise RuntimeError("a worker is gone")

        _FitLoop.teardown = fallen  # type: ignore[method-assign]
        at_step(3, told(signal.SIGTERM))()

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143, ended.err
    assert "stopped at step 3 by SIGTERM; the run is saved in" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err


def test_a_second_interrupt_leaves_at_once(folder: Path) -> None:
    def twice(module: LitGPT) -> None:
        def again() -> None:
            time.sleep(0.8)
            os.kill(os.getpid(), signal.SIGINT)

        os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=again).start()
        time.sleep(60)

    begun = time.monotonic()
    ended = forked(folder, "--config", "small.yaml", prepare=at_step(5, twice))
    assert ended.status == 130
    assert time.monotonic() - begun < 30
    assert "press Ctrl-C again to exit at once" in ended.err
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 3  # of its validation


def test_a_signal_before_the_first_step_is_told_in_a_line(folder: Path) -> None:
    def prepare() -> None:
        lit_gpt.data.datamodule.open_corpus = lambda *args: os.kill(os.getpid(), signal.SIGINT)  # type: ignore[attr-defined]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.out, ended.err) == (130, "", "stopped by SIGINT\n")
    assert not (folder / "logs").exists()


class Last:
    """Sends the signal when it is let go of, where an exception is only reported."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_where_exceptions_are_lost_ends_the_command(folder: Path) -> None:
    def prepare() -> None:
        sys.unraisablehook = lambda what: None
        original = lit_gpt.data.datamodule.open_corpus

        def instead(*args: object) -> Corpus:
            Last()
            return original(*args)  # type: ignore[arg-type]

        lit_gpt.data.datamodule.open_corpus = instead  # type: ignore[attr-defined]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n")
    assert not (folder / "logs").exists()


def test_a_signal_while_batches_are_made_ready_ends_the_command(folder: Path) -> None:
    """Lightning's cleaning up fails there, since it asks for the length of what is not there yet."""

    def prepare() -> None:
        RunSampler.__iter__ = lambda sampler: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n")
    assert not (folder / "logs").exists()


def test_a_signal_while_another_rank_is_awaited_ends_both(folder: Path) -> None:
    """The other one still imports what it needs; this one waits for it inside torch, where no handler has its turn."""

    def prepare() -> None:
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()

    pair = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]
    ended = forked(folder, "--config", "small.yaml", *pair, prepare=prepare)
    assert (ended.status, ended.err) == (143, "stopped by SIGTERM\n"), ended.out
    assert not (folder / "logs").exists()


@pytest.mark.parametrize(("saved", "last"), [(3, 4), (6, 6)], ids=["amid the run", "at its end"])
def test_a_signal_amid_a_save_lets_it_end(folder: Path, saved: int, last: int) -> None:
    """A step is saved when the next one begins: that one ends too."""

    def prepare() -> None:
        replace, names = os.replace, []

        def instead(source: Path, target: Path) -> None:
            names.append(Path(target).name)
            if names.count("best.ckpt") == saved // 3:
                os.kill(os.getpid(), signal.SIGTERM)
            replace(source, target)

        os.replace = instead  # type: ignore[assignment]

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 143
    assert f"stopped at step {last} by SIGTERM; the run is saved in logs/small/version_0/last.ckpt" in ended.err
    assert open_checkpoint(folder / RUN / "best.ckpt")["global_step"] == saved
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == last


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_that_hear_the_signal_too_go_on_working(folder: Path, signum: signal.Signals) -> None:
    def prepare() -> None:
        at_step(5, lambda module: os.killpg(os.getpgrp(), signum))()

    more = ["--data.global_batch_size", 40]  # batches of which only few lie ready
    ended = forked(folder, "--config", "small.yaml", "--data.num_workers", 1, *more, prepare=prepare)
    assert ended.status == 128 + signum, ended.err
    assert "Traceback" not in ended.err
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 5


def test_when_the_time_is_up_the_run_is_saved_and_well(folder: Path) -> None:
    slow = at_step(2, lambda module: time.sleep(1.2))
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_time", "00:00:00:01", prepare=slow)
    assert ended.status == 0
    assert "stopped at step 2 by --trainer.max_time" in ended.err
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 2
    # a command has all of its time, whatever the ones before it took
    ended = forked(folder, "--config", "small.yaml", "--trainer.max_time", "00:00:01:00", "--ckpt_path", "last")
    assert ended.status == 0
    assert [step for step, _ in points(folder / RUN)["loss/val"]] == [3, 6]


def test_a_program_that_calls_main_has_its_signals_back(fit: Fit) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    assert fit().status == 0
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == before


# ---------------------------------------------------------------------------------------------------- exceptions


def fail(*args: object) -> None:
    raise RuntimeError("a bug")


def test_an_exception_before_the_update_saves_the_step_before_it(folder: Path) -> None:
    ended = forked(folder, "--config", "small.yaml", prepare=at_step(6, fail))
    assert ended.status == 1
    assert "RuntimeError: a bug" in ended.err
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 5" in ended.err
    assert forked(folder, "--config", "small.yaml", "--ckpt_path", "last").status == 0
    assert forked(folder, "--config", "small.yaml", "--name", "straight").status == 0
    one, other = (open_checkpoint(folder / f"logs/{name}/version_0/last.ckpt") for name in ("small", "straight"))
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name])


def test_an_exception_amid_accumulation_saves_the_last_whole_step(folder: Path) -> None:
    def prepare() -> None:
        training_step = LitGPT.training_step

        def instead(module: LitGPT, batch: tuple, batch_idx: int) -> torch.Tensor:
            if (module.trainer.global_step, batch_idx % 3) == (4, 1):
                raise RuntimeError("a bug")
            return training_step(module, batch, batch_idx)

        LitGPT.training_step = instead  # type: ignore[method-assign]

    flags = ["--config", "small.yaml", "--data.global_batch_size", 12]
    assert forked(folder, *flags, prepare=prepare).status == 1
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 4
    assert forked(folder, *flags, "--ckpt_path", "last").status == 0
    assert forked(folder, *flags, "--name", "straight").status == 0
    one, other = (points(folder / f"logs/{name}/version_0")["loss/train"] for name in ("small", "straight"))
    assert one == other


@pytest.mark.parametrize("place", ["update", "validation", "text"])
def test_an_exception_amid_a_step_saves_nothing_and_names_the_last_good(folder: Path, place: str) -> None:
    def prepare() -> None:
        if place == "update":

            def instead(module: LitGPT, *args: object, **kwargs: object) -> None:
                module.updating = True
                raise RuntimeError("a bug")

            at_step(5, lambda module: setattr(LitGPT, "configure_gradient_clipping", instead))()
        elif place == "validation":
            at_step(6, lambda module: setattr(LitGPT, "validation_step", fail))()
        else:
            at_step(6, lambda module: setattr(GenerateText, "generate_texts", fail))()

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 3" in ended.err
    assert "the best checkpoint is logs/small/version_0/best.ckpt, step 3" in ended.err
    assert open_checkpoint(folder / RUN / "last.ckpt")["global_step"] == 3


# --------------------------------------------------------------------------------------------- not a number


def test_a_loss_that_is_no_number_stops_before_the_update(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = GPT.loss
    calls = []

    def broken(self: GPT, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(self.training)
        value = loss(self, *args, **kwargs)  # type: ignore[arg-type]
        return value * float("nan") if sum(calls) == 5 and self.training else value

    monkeypatch.setattr(GPT, "loss", broken)
    result = fit()
    assert result.status == 2
    assert "error: step 5 was not taken, it is not finite (loss nan; gradient of " in result.err
    assert result.err.count("\n") == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 4" in result.err
    saved = open_checkpoint(RUN / "last.ckpt")
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_weights_that_are_no_numbers_are_never_saved(fit: Fit) -> None:
    every = ["--checkpoint.every_n_steps", 1, "--model.warmup_steps", 0]
    result = fit("--model.learning_rate", 3e38, *every)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "after step 1 the weights are not finite, and not saved" in result.err
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 0" in result.err
    assert [path.name for path in RUN.glob("*.ckpt")] == ["last.ckpt"]
    assert fit("--ckpt_path", "last", *every).status == 0


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_a_gradient_that_is_no_number_names_its_parameters(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    training_step = LitGPT.training_step

    def broken(module: LitGPT, batch: tuple, batch_idx: int) -> torch.Tensor:
        if module.trainer.global_step == 3:
            module.gpt.blocks[1].attention.qkv.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "training_step", broken)
    result = fit("--trainer.gradient_clip_val", clip, "--model.optimizer", "muon", "--trainer.log_every_n_steps", 50)
    assert result.status == 2
    assert "step 4 was not taken, it is not finite (gradient of 1 of 8 blocks, as blocks.1.attention.qkv" in result.err
    assert open_checkpoint(RUN / "last.ckpt")["global_step"] == 3


@pytest.mark.parametrize(("interval", "told"), [(2, 2), (50, 3)], ids=["where it logs", "before it saves"])
def test_where_to_ask_is_to_wait_it_is_asked_later_and_nothing_after_it_is_kept(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, interval: int, told: int
) -> None:
    loss, calls = GPT.loss, []

    def broken(self: GPT, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(self.training)
        value = loss(self, *args, **kwargs)  # type: ignore[arg-type]
        return value * float("nan") if sum(calls) == 2 and self.training else value

    monkeypatch.setattr(GPT, "loss", broken)
    monkeypatch.setattr("lit_gpt.training.module.SYNC_CHECK_DEVICES", ())
    # weights that no step moves stay numbers: the gradients alone tell
    monkeypatch.setattr("lit_gpt.training.module.MuonAdamW.step", lambda self, closure: closure())
    result = fit("--trainer.log_every_n_steps", interval)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"a step up to {told} is not finite" in result.err
    assert open_checkpoint(RUN / "last.ckpt")["global_step"] == 0


def test_a_model_that_has_blown_up_is_not_saved(fit: Fit) -> None:
    result = fit("--model.learning_rate", 3e38, "--trainer.val_check_interval", 1)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "not finite" in result.err
    saved = open_checkpoint(RUN / "last.ckpt")
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


# ----------------------------------------------------------------------------------------------- a full disk


def room(size: int) -> Callable[[], None]:
    """Lets no file of this process grow beyond `size` bytes, as a disk without room would."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@pytest.mark.parametrize("devices", [1, 2])
def test_a_save_without_room_stops_the_run_and_leaves_the_files_before_it(folder: Path, devices: int) -> None:
    pair = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]
    flags = ["--config", "small.yaml", *(pair if devices == 2 else [])]
    assert forked(folder, *flags, "--trainer.max_steps", 3).status == 0
    before = {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")}
    ended = forked(folder, *flags, "--ckpt_path", "last", prepare=room(100_000))
    assert ended.status == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if line]
    assert "version_0/best.ckpt cannot be written (File too large); the previous file is unchanged" in line
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 3" in line
    assert {
        path: path.read_bytes() for path in (folder / RUN).iterdir() if path.name in ("best.ckpt", "last.ckpt")
    } == before
    assert not list((folder / RUN).glob(".*"))


def test_a_run_that_cannot_be_saved_says_so_before_its_first_step(folder: Path) -> None:
    ended = forked(folder, "--config", "small.yaml", prepare=room(20_000))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "last.ckpt cannot be written (File too large): free disk space" in ended.err
    assert "step      3" not in ended.out


@pytest.mark.parametrize("flags", [[], ["--trainer.enable_checkpointing", "false"]], ids=["saving", "not saving"])
def test_curves_without_room_stop_the_run_with_one_line(folder: Path, flags: list[str]) -> None:
    words = ["--config", "small.yaml", "--trainer.max_steps", 2000, "--trainer.val_check_interval", 500, *flags]
    ended = forked(folder, *words, "--checkpoint.every_n_steps", 100, prepare=room(200_000))
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "error: logs/small/version_0: the curves cannot be written (File too large)" in ended.err


def test_a_folder_that_may_not_be_written_leaves_the_files_before_it(folder: Path) -> None:
    assert forked(folder, "--config", "small.yaml", "--trainer.max_steps", 3).status == 0
    before = {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")}

    def lose(module: LitGPT) -> None:
        os.chmod(RUN, 0o555)
        powerless()

    ended = forked(folder, "--config", "small.yaml", "--ckpt_path", "last", prepare=at_step(5, lose))
    (folder / RUN).chmod(0o755)
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "best.ckpt cannot be written (Permission denied); the previous file is unchanged" in ended.err
    assert {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")} == before
    assert forked(folder, "--config", "small.yaml", "--ckpt_path", "last").status == 0


def test_a_disk_that_is_full_is_a_disk_that_is_full(folder: Path) -> None:
    """A real one, where this process may mount it."""
    script = f"""
set -e
mount -t tmpfs -o size=300k tmpfs "{folder}"
cd "{folder}"
head -c 50000 /dev/zero | tr '\\0' 'a' | fold -w 40 > rows.txt
exec {sys.executable} -c "
import sys, pathlib
sys.argv = ['fit.py', '--data.files', 'rows.txt', '--data.tokenizer', 'byte', '--config', 'c.yaml']
pathlib.Path('c.yaml').write_text('model: {{config: {{context_length: 16, d_model: 16, num_blocks: 2, num_heads: 2}}}}')
from lit_gpt.cli.fit import main
status = main(pathlib.Path('c.yaml'))
print('left', sorted(path.name for path in pathlib.Path('logs').rglob('*') if path.suffix == '.ckpt'))
sys.exit(status)
"
"""
    ended = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True
    )
    if "unshare:" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "No space left on device" in ended.stderr


# ---------------------------------------------------------------------------------------------- early stopping

UNSTABLE = ["--model.learning_rate", 1.0, "--model.schedule", "constant", "--trainer.val_check_interval", 1]


def test_a_loss_that_falls_no_more_ends_the_run_and_the_best_is_kept(fit: Fit) -> None:
    flags = [*UNSTABLE, "--early_stopping.patience", 3]
    result = fit(*flags, "--trainer.max_steps", 60)
    losses = dict(points(RUN)["loss/val"])
    best = min(losses, key=losses.__getitem__)
    assert max(losses) == best + 3 < 60
    assert f"stopped     at step {best + 3}, loss/val has not fallen for 3 validations" in result.out
    assert open_checkpoint(RUN / "best.ckpt")["global_step"] == best
    again = fit(*flags, "--trainer.max_steps", 60, "--ckpt_path", "last")
    assert "already complete: loss/val has not fallen for 3 validations; raise --early_stopping.patience" in again.out
    assert dict(points(RUN)["loss/val"]) == losses
    further = fit(*UNSTABLE, "--early_stopping.patience", 4, "--trainer.max_steps", 60, "--ckpt_path", "last")
    assert further.status == 0
    assert max(dict(points(RUN)["loss/val"])) > best + 3


def test_patience_goes_on_where_a_run_was_interrupted(fit: Fit) -> None:
    flags = [*UNSTABLE, "--early_stopping.patience", 3, "--trainer.max_steps"]
    assert fit(*flags, 60, "--name", "straight").status == 0
    straight = points(Path("logs/straight/version_0"))["loss/val"]
    for steps in (len(straight) - 2, 60):
        assert fit(*flags, steps, "--ckpt_path", "last").status == 0
    assert points(RUN)["loss/val"] == straight


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        (["--trainer.max_steps", 2000], True),
        (["--trainer.max_steps", 40], False),  # no more than four epochs
        (["--trainer.max_steps", 2000, "--data.files", "long.txt"], False),
    ],
    ids=["many passes over little text", "few passes", "much text"],
)
def test_the_preflight_warns_of_a_model_too_large_for_its_text(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, flags: list, warns: bool
) -> None:
    Path("long.txt").write_text("a long row of text, the same again and again\n" * 10_000)
    small = ["--model.config.d_model", 2, "--model.config.num_heads", 1, "--model.config.num_blocks", 1]
    monkeypatch.setattr(FitCLI, "_run_subcommand", lambda cli, name: cli.before_fit())
    out = fit(*flags, *small, "--trainer.logger", "false").out
    assert ("by heart" in out) == warns
    assert ("20 tokens a parameter (Hoffmann et al. 2022), and after 4 epochs" in out) == warns
