"""Whatever ends a run, its checkpoints stay complete and finite, and the message names them."""

import errno
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Fit, at_step, drop_capabilities, forked, points
from faults import Fault, FaultInjector
from ranks import ForkedRank
from torch.utils.tensorboard import SummaryWriter
from torture import compare_runs

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.model import GPT
from lit_gpt.training.module import LitGPT
from lit_gpt.training.samples import GenerateText

RUN = Path("logs/small/version_0")
TWO_RANKS = ["--trainer.devices", 2, "--trainer.strategy", "ddp", "--data.global_batch_size", 8]


# -------------------------------------------------------------------------------------------------------- exceptions


def fail(*args: object) -> None:
    raise RuntimeError("a bug")


def test_exception_in_the_forward_pass_saves_the_step_before(folder: Path) -> None:
    ended = forked(folder, "--config", "small.yaml", prepare=at_step(6, fail))
    assert ended.status == 1
    assert "RuntimeError: a bug" in ended.err
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 5" in ended.err
    assert forked(folder, "--config", "small.yaml", "--ckpt_path", "last").status == 0
    assert forked(folder, "--config", "small.yaml", "--name", "straight").status == 0
    files = (folder / f"logs/{name}/version_0/last.ckpt" for name in ("small", "straight"))
    resumed, straight = (Checkpoint.open(path).read() for path in files)
    for name, weight in resumed["state_dict"].items():
        assert torch.equal(weight, straight["state_dict"][name])


def test_exception_during_accumulation_saves_the_last_completed_step(folder: Path) -> None:
    def prepare() -> None:
        training_step = LitGPT.training_step

        def patched(module: LitGPT, batch: tuple, batch_idx: int) -> torch.Tensor:
            if (module.trainer.global_step, batch_idx % 3) == (4, 1):
                raise RuntimeError("a bug")
            return training_step(module, batch, batch_idx)

        LitGPT.training_step = patched  # type: ignore[method-assign]

    flags = ["--config", "small.yaml", "--data.global_batch_size", 12]
    assert forked(folder, *flags, prepare=prepare).status == 1
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 4
    assert forked(folder, *flags, "--ckpt_path", "last").status == 0
    assert forked(folder, *flags, "--name", "straight").status == 0
    resumed, straight = (points(folder / f"logs/{name}/version_0")["loss/train"] for name in ("small", "straight"))
    assert resumed == straight


@pytest.mark.parametrize("place", ["update", "validation", "samples"])
def test_exception_in_an_uncompleted_step_saves_nothing_and_names_the_checkpoints(folder: Path, place: str) -> None:
    def prepare() -> None:
        if place == "update":

            def patched(module: LitGPT, *args: object, **kwargs: object) -> None:
                module.updating = True
                raise RuntimeError("a bug")

            at_step(5, lambda module: setattr(LitGPT, "configure_gradient_clipping", patched))()
        elif place == "validation":
            at_step(6, lambda module: setattr(LitGPT, "validation_step", fail))()
        else:
            at_step(6, lambda module: setattr(GenerateText, "generate_texts", fail))()

    ended = forked(folder, "--config", "small.yaml", prepare=prepare)
    assert ended.status == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 3" in ended.err
    assert "the best checkpoint is logs/small/version_0/best.ckpt, step 3" in ended.err
    assert Checkpoint.open(folder / RUN / "last.ckpt").step == 3


ALLOCATOR = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize(
    ("owner", "name", "call", "error"),
    [
        (GPT, "loss", 5, MemoryError()),
        (LitGPT, "validation_step", 5, ALLOCATOR),
        (GenerateText, "generate_texts", 2, MemoryError()),
        (torch, "save", 2, ALLOCATOR),
    ],
    ids=["step", "validation", "samples", "save"],
)
def test_lack_of_memory_ends_in_one_line_and_the_run_can_be_resumed(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: Exception
) -> None:
    with monkeypatch.context() as patch:
        function, calls = getattr(owner, name), []

        def patched(*args: object, **kwargs: object) -> object:
            calls.append(1)
            if len(calls) >= call:
                raise error
            return function(*args, **kwargs)

        patch.setattr(owner, name, patched)
        result = fit("--checkpoint.every_n_steps", 2)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "give a smaller --data.batch_size with the same --data.global_batch_size" in result.err
    assert result.err.endswith(" --name small --ckpt_path last\n")
    as_told = ["--data.batch_size", 2, "--data.global_batch_size", 4] if name == "generate_texts" else []
    assert fit("--checkpoint.every_n_steps", 2, "--ckpt_path", "last", *as_told).status == 0
    assert fit("--checkpoint.every_n_steps", 2, "--name", "straight").status == 0
    assert as_told or compare_runs(Path("logs/straight/version_0"), RUN) == []


def test_killed_data_worker_ends_the_run_in_one_line(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--data.num_workers", 1, "--generate.prompts", "[]"]

    def kill_worker(module: LitGPT) -> None:
        (worker,) = multiprocessing.active_children()
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()

    ended = forked(folder, *flags, prepare=at_step(5, kill_worker))
    assert (ended.status, ended.err.count("\n")) == (1, 1), ended.err
    assert "a process that reads batches is gone (DataLoader worker (pid" in ended.err
    assert "; the last good checkpoint is logs/small/version_0/last.ckpt, step " in ended.err
    assert "; resume it with: " in ended.err


# ------------------------------------------------------------------------------------------- values that are not finite


def test_nonfinite_loss_stops_the_run_before_the_update(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = GPT.loss
    is_training: list[bool] = []

    def patched(self: GPT, *args: object, **kwargs: object) -> torch.Tensor:
        is_training.append(self.training)
        value = loss(self, *args, **kwargs)  # type: ignore[arg-type]
        return value * float("nan") if sum(is_training) == 5 and self.training else value

    monkeypatch.setattr(GPT, "loss", patched)
    result = fit()
    assert result.status == 2
    assert "error: step 5 was not taken, it is not finite (loss nan; gradient of " in result.err
    assert result.err.count("\n") == 1
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 4" in result.err
    saved = Checkpoint.open(RUN / "last.ckpt").read()
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_nonfinite_weights_are_not_saved(fit: Fit) -> None:
    flags = ["--checkpoint.every_n_steps", 1, "--model.warmup_steps", 0]
    result = fit("--model.learning_rate", 3e38, *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "after step 1 the weights are not finite, and not saved" in result.err
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 0" in result.err
    assert [path.name for path in RUN.glob("*.ckpt")] == ["last.ckpt"]
    assert fit("--ckpt_path", "last", *flags).status == 0


def test_nonfinite_weights_without_validation_end_in_one_line(fit: Fit) -> None:
    flags = ["--trainer.limit_val_batches", 0, "--trainer.max_steps", 1, "--model.warmup_steps", 0]
    result = fit("--model.learning_rate", 3e38, *flags)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "after step 1 the weights are not finite, and not saved" in result.err


def test_nonfinite_validation_loss_is_not_saved(fit: Fit) -> None:
    result = fit("--model.learning_rate", 3e38, "--trainer.val_check_interval", 1)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "not finite" in result.err
    saved = Checkpoint.open(RUN / "last.ckpt").read()
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("clip", ["1.0", "null"])
def test_nonfinite_gradient_is_reported_with_its_parameter(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, clip: str
) -> None:
    training_step = LitGPT.training_step

    def patched(module: LitGPT, batch: tuple, batch_idx: int) -> torch.Tensor:
        if module.trainer.global_step == 3:
            module.gpt.blocks[1].attention.qkv.weight.register_hook(lambda grad: grad * float("inf"))  # type: ignore
        return training_step(module, batch, batch_idx)

    monkeypatch.setattr(LitGPT, "training_step", patched)
    result = fit("--trainer.gradient_clip_val", clip, "--model.optimizer", "muon", "--trainer.log_every_n_steps", 50)
    assert result.status == 2
    assert "step 4 was not taken, it is not finite (gradient of 1 of 8 blocks, as blocks.1.attention.qkv" in result.err
    assert Checkpoint.open(RUN / "last.ckpt").step == 3


@pytest.mark.parametrize(
    ("log_interval", "reported_step"), [(2, 2), (50, 3)], ids=["at a logging step", "before a save"]
)
def test_gpu_nonfinite_check_is_deferred_to_logging_step_or_save(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, log_interval: int, reported_step: int
) -> None:
    loss = GPT.loss
    is_training: list[bool] = []

    def patched(self: GPT, *args: object, **kwargs: object) -> torch.Tensor:
        is_training.append(self.training)
        value = loss(self, *args, **kwargs)  # type: ignore[arg-type]
        return value * float("nan") if sum(is_training) == 2 and self.training else value

    monkeypatch.setattr(GPT, "loss", patched)
    monkeypatch.setattr("lit_gpt.training.module.SYNC_CHECK_DEVICES", ())
    # without updates the weights stay finite, so that only the gradients can tell
    monkeypatch.setattr("torch.optim.AdamW.step", lambda self, closure: closure())
    result = fit("--trainer.log_every_n_steps", log_interval)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert f"a step up to {reported_step} is not finite" in result.err
    assert Checkpoint.open(RUN / "last.ckpt").step == 0


# --------------------------------------------------------------------------------------------------------- a full disk


def limit_file_size(size: int) -> Callable[[], None]:
    """Return what `forked` takes as `prepare`: no file can grow beyond `size` bytes, as on a full disk."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@pytest.mark.parametrize("rank_flags", [[], TWO_RANKS], ids=["1 rank", "2 ranks"])
def test_failed_save_stops_the_run_and_keeps_the_files_before(folder: Path, rank_flags: list[object]) -> None:
    flags = ["--config", "small.yaml", *rank_flags]
    assert forked(folder, *flags, "--trainer.max_steps", 3, prepare=ForkedRank.prepare).status == 0
    before = {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")}

    def prepare() -> None:
        ForkedRank.prepare()
        limit_file_size(100_000)()

    ended = forked(folder, *flags, "--ckpt_path", "last", prepare=prepare)
    assert ended.status == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if line]
    assert "version_0/best.ckpt cannot be written (File too large); the previous file is unchanged" in line
    assert "the last good checkpoint is logs/small/version_0/last.ckpt, step 3" in line
    assert {
        path: path.read_bytes() for path in (folder / RUN).iterdir() if path.name in ("best.ckpt", "last.ckpt")
    } == before
    assert not list((folder / RUN).glob(".*"))


def test_run_that_cannot_be_saved_ends_before_its_first_step(folder: Path) -> None:
    ended = forked(folder, "--config", "small.yaml", prepare=limit_file_size(20_000))
    assert (ended.status, ended.err.count("\n")) == (2, 1)
    assert "last.ckpt cannot be written (File too large): free disk space" in ended.err
    assert "step      3" not in ended.out


@pytest.mark.parametrize("flags", [[], ["--trainer.enable_checkpointing", "false"]], ids=["saving", "not saving"])
def test_event_file_that_cannot_be_written_stops_the_run_in_one_line(folder: Path, flags: list[str]) -> None:
    words = ["--config", "small.yaml", "--trainer.max_steps", 2000, "--trainer.val_check_interval", 500, *flags]
    ended = forked(folder, *words, "--checkpoint.every_n_steps", 100, prepare=limit_file_size(200_000))
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "error: logs/small/version_0: the curves cannot be written (File too large)" in ended.err


def test_error_of_rank_1_alone_is_printed(folder: Path) -> None:
    """Rank 1 cannot read the token cache that rank 0 has opened."""
    injector = FaultInjector(folder, Fault("open", 1, errno.EIO, persists=True))
    flags = ["--config", "small.yaml", *TWO_RANKS]
    ended = forked(folder, *flags, prepare=lambda: ForkedRank.prepare(injector.install))
    assert ended.status != 0
    assert "error: data/cache: the token cache cannot be written or read (Input/output error): free" in ended.err
    assert "Traceback" not in ended.err


def test_write_error_of_rank_0_alone_ends_both_ranks_in_one_line(folder: Path) -> None:
    def fail_to_log() -> None:
        def patched(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        SummaryWriter.add_text = patched  # type: ignore[method-assign]

    flags = ["--config", "small.yaml", *TWO_RANKS]
    ended = forked(folder, *flags, prepare=lambda: (ForkedRank.prepare(), fail_to_log()))
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "error: logs/small/version_0: the curves cannot be written (No space left on device): free" in ended.err


def test_run_folder_that_becomes_read_only_keeps_its_files(folder: Path) -> None:
    assert forked(folder, "--config", "small.yaml", "--trainer.max_steps", 3).status == 0
    before = {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")}

    def make_read_only(module: LitGPT) -> None:
        os.chmod(RUN, 0o555)
        drop_capabilities()

    ended = forked(folder, "--config", "small.yaml", "--ckpt_path", "last", prepare=at_step(5, make_read_only))
    (folder / RUN).chmod(0o755)
    assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert "best.ckpt cannot be written (Permission denied); the previous file is unchanged" in ended.err
    assert {path: path.read_bytes() for path in (folder / RUN).glob("*.ckpt")} == before
    assert forked(folder, "--config", "small.yaml", "--ckpt_path", "last").status == 0


def test_full_file_system_is_reported_in_one_line(folder: Path) -> None:
    """Fill a real file system; skipped where this process may not mount one."""
    script = f"""
set -e
mount -t tmpfs -o size=300k tmpfs "{folder}"
cd "{folder}"
head -c 50000 /dev/zero | tr '\\0' 'a' | fold -w 40 > rows.txt
exec {sys.executable} -c "
import sys, pathlib
sys.argv = ['fit.py', '--data.files', 'rows.txt', '--data.tokenizer', 'byte', '--config', 'c.yaml']
pathlib.Path('c.yaml').write_text('model: {{config: {{context_length: 16, d_model: 16, num_blocks: 2, num_heads: 2}}}}')
from lit_gpt.cli.main import main
status = main(pathlib.Path('c.yaml'))
print('left', sorted(path.name for path in pathlib.Path('logs').rglob('*') if path.suffix == '.ckpt'))
sys.exit(status)
"
"""
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True)
    if "unshare:" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(ended.stderr.strip())
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert "No space left on device" in ended.stderr
