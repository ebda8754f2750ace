"""A run that is stopped and resumed equals a run that was never stopped."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Fit, at_step, forked, points, texts, weights
from ranks import TWO_RANKS, ForkedRank, RankKill
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torture import CONFIG, KILLS, SIGNALS, compare_runs, kill_process_group, torture, torture_ranks

from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.data.batches import TrainBatches
from lit_gpt.training.module import LitGPT

RUN = Path("logs/small/version_0")


@pytest.mark.parametrize(
    ("flags", "kinds", "seed"),
    [
        ([], KILLS, 2),
        (["--data.sampling", "shuffled", "--model.optimizer", "muon"], KILLS, 8),  # this seed draws other kinds
        (["--data.sampling", "shuffled"], SIGNALS, 4),
    ],
    ids=["killed", "killed, shuffled, Muon", "stopped by signals"],
)
def test_killed_and_resumed_run_equals_uninterrupted_run(
    tmp_path: Path, flags: list[str], kinds: tuple[str, ...], seed: int
) -> None:
    killed, differences = torture(tmp_path, 3, flags, seed, kinds)
    assert (len(killed), differences) == (3, [])


def test_killed_and_resumed_run_of_two_ranks_equals_uninterrupted_run(tmp_path: Path) -> None:
    killed, differences = torture(tmp_path, 1, TWO_RANKS, seed=1, kinds=("rename", "validation"))
    assert (len(killed), differences) == (1, [])


def test_run_whose_rank_was_killed_equals_uninterrupted_run(tmp_path: Path) -> None:
    kill = RankKill(1, "optimizer update", is_after=True, step=7)
    lines = list(torture_ranks(tmp_path, [kill], [*TWO_RANKS, "--trainer.max_steps", "11"]))
    assert lines == ["killed rank 1 after optimizer update: status 1", "equal"]


def test_rank_that_loses_another_saves_no_step_without_its_points(tmp_path: Path) -> None:
    """Rank 0 fails when the weights of a step are updated, and its points are not written yet; and before its last."""
    kills = [RankKill(None, "LitGPT.on_train_batch_end", is_after=True, step=7)]
    kills += [RankKill(None, "logging", is_after=after, step=10) for after in (False, True)]
    lines = list(torture_ranks(tmp_path, kills, ["--trainer.max_steps", "13", "--trainer.log_every_n_steps", "1"]))
    assert [line for line in lines if not line.startswith("killed")] == ["equal"]


@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-3)])
def test_run_can_be_resumed_with_another_number_of_ranks(folder: Path, optimizer: str, tolerance: float) -> None:
    (folder / "config.yaml").write_text(CONFIG)
    flags = ["--config", "config.yaml", "--model.optimizer", optimizer, "--model.schedule", "constant"]
    assert forked(folder, *flags, "--name", "straight").status == 0
    for steps, devices in ((7, TWO_RANKS), (16, []), (30, TWO_RANKS)):  # an epoch has four steps
        last = ["--name", "moved", "--ckpt_path", "auto", "--trainer.max_steps", steps]
        ended = forked(folder, *flags, *last, *devices, prepare=ForkedRank.prepare)
        assert ended.status == 0, ended.err
    straight, moved = (points(folder / f"logs/{name}/version_0")["loss/train"] for name in ("straight", "moved"))
    moved = [point for point in moved if point[0] not in (7, 16)]  # the last step of a command is logged too
    torch.testing.assert_close(moved, straight, rtol=0, atol=tolerance)


def test_last_resumes_the_newest_checkpoint_of_the_name(fit: Fit) -> None:
    assert "no checkpoint of 'small' under logs: starting from the beginning" in fit("--ckpt_path", "auto").out
    assert fit("--trainer.max_steps", 3).status == 0  # in version_1
    assert fit("--name", "other", "--trainer.max_steps", 4).status == 0
    result = fit("--ckpt_path", "last", "--trainer.max_steps", 8)
    assert "resumed     logs/small/version_1/last.ckpt, step 3" in result.out
    assert Checkpoint.open(Path("logs/small/version_1/last.ckpt")).step == 8
    assert not Path("logs/small/version_2").exists()
    assert fit("validate", "--ckpt_path", "last", "--name", "other", config=None).status == 0


def test_last_needs_no_config_and_finds_moved_logs(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3, "--model.config.num_blocks", 1).status == 0
    shutil.copytree("logs", "moved/here")  # modification times of the copies say nothing
    shutil.rmtree("logs")
    flags = ["--name", "small", "--trainer.default_root_dir", "moved/here", "--trainer.max_steps", 6]
    result = fit("--ckpt_path", "last", *flags, config=None)
    assert result.status == 0, result.err
    assert "resumed     moved/here/small/version_0/last.ckpt, step 3" in result.out
    assert not Path("logs").exists()
    assert (
        yaml.safe_load(Path("moved/here/small/version_0/config.yaml").read_text())["model"]["config"]["num_blocks"] == 1
    )


def test_resume_with_another_root_dir_leaves_the_old_run_unchanged(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    before = {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()}
    assert fit("--ckpt_path", RUN / "last.ckpt", "--trainer.default_root_dir", "other").status == 0
    assert Checkpoint.open(Path("other/small/version_0/last.ckpt")).step == 6
    assert {path: path.read_bytes() for path in RUN.rglob("*") if path.is_file()} == before


def test_printed_resume_command_resumes_the_run(folder: Path) -> None:
    assert forked(folder, "--config", "small.yaml", "--name", "mine", "--trainer.max_steps", 3).status == 0
    shutil.move(folder / "logs", folder / "moved")
    words = [
        "--ckpt_path",
        "moved/mine/version_0/last.ckpt",
        "--trainer.max_steps",
        3000,
        "--trainer.max_time",
        "00:00:00:01",
    ]
    message = forked(folder, *words).err
    step = re.search(r"stopped at step ([\d,]+)", message)
    assert step is not None
    _python, _script, *command = shlex.split(message.partition("resume it with: ")[2])
    assert f"mine/version_0/last.ckpt, step {step[1]}\n" in forked(folder, *command).out


def test_last_skips_damaged_checkpoints_with_a_warning(fit: Fit) -> None:
    assert fit("--checkpoint.every_n_steps", 4).status == 0
    for name in ("last.ckpt", "best.ckpt"):
        os.truncate(RUN / name, 5000)
    result = fit("--ckpt_path", "last")
    assert result.status == 0
    assert (
        f"warning: skipped damaged checkpoints {RUN}/best.ckpt, {RUN}/last.ckpt; using {RUN}/step_00000004.ckpt"
        in result.err
    )
    assert "step 4" in result.out


def test_resuming_a_finished_run_changes_nothing(fit: Fit) -> None:
    assert fit().status == 0
    before = {path.name: path.read_bytes() for path in RUN.iterdir() if path.suffix == ".ckpt"}
    curves = points(RUN)
    result = fit("--ckpt_path", "last")
    assert "already complete at step 6: raise --trainer.max_steps to continue" in result.out
    assert {path.name: path.read_bytes() for path in RUN.iterdir() if path.suffix == ".ckpt"} == before
    assert points(RUN) == curves


def test_optimizer_flags_override_the_checkpoint(fit: Fit) -> None:
    assert fit("--model.schedule", "constant", "--trainer.max_steps", 3).status == 0
    flags = ["--model.learning_rate", 0.5, "--model.weight_decay", 0.25, "--model.betas", "[0.5, 0.75]"]
    result = fit("--model.schedule", "constant", *flags, "--ckpt_path", "last")
    assert [step for step, rate in points(RUN)["optim/lr"] if rate == 0.5] == [4, 5, 6]
    *matrices, scales = Checkpoint.open(RUN / "last.ckpt").read()["optimizer_states"][0]["param_groups"]
    for group in matrices:
        assert (group["lr"], group["weight_decay"], group["betas"]) == (0.5, 0.25, (0.5, 0.75))
    assert scales["weight_decay"] == 0.0
    assert "changed     model.learning_rate 0.001 -> 0.5\n" in result.out
    assert "changed     trainer.max_steps 3 -> 6\n" in result.out


def test_checkpoint_without_younger_fields_of_the_model_resumes(fit: Fit) -> None:
    constant = ["--model.schedule", "constant", "--model.warmup_steps", 0]
    assert fit(*constant, "--name", "straight").status == 0
    assert fit(*constant, "--trainer.max_steps", 3).status == 0
    contents = torch.load(RUN / "last.ckpt", weights_only=True)
    config = contents["hyper_parameters"]["config"]
    for name in ("norm_eps", "rope_base", "head_size", "hidden_size", "qkv_bias", "project_bias", "mlp_bias"):
        del config[name]
        lines = contents["config"].splitlines(keepends=True)
        contents["config"] = "".join(line for line in lines if not line.strip().startswith(f"{name}:"))
    torch.save(contents, "older.ckpt")
    assert fit(*constant, "--ckpt_path", "older.ckpt", "--trainer.max_steps", 6).status == 0
    straight, resumed = (weights(Path("logs", name, "last.ckpt")) for name in ("straight/version_0", "small/version_1"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_resumed_run_writes_each_point_once(fit: Fit) -> None:
    assert fit("--name", "straight").status == 0
    assert fit("--trainer.val_check_interval", 3).status == 0
    first = (RUN / "last.ckpt").read_bytes()
    assert fit("--ckpt_path", RUN / "best.ckpt", "--trainer.max_steps", 9).status == 0
    logged = points(RUN)
    assert [step for step, _ in logged["loss/train"]] == list(range(1, 10))
    assert [step for step, _ in logged["loss/val"]] == [0, 3, 6, 9]
    read = EventAccumulator(str(RUN), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    assert sorted(event.step for event in read.Scalars("loss/train")) == list(range(1, 10))  # as TensorBoard reads it
    assert sorted(texts(RUN)) == [0, 3, 6, 9]
    assert (RUN / "last.ckpt").read_bytes() != first


def test_points_after_the_checkpoint_are_replaced(fit: Fit) -> None:
    every = ["--checkpoint.every_n_steps", 2, "--checkpoint.keep", 9, "--model.schedule", "constant"]
    assert fit(*every).status == 0
    straight, straight_texts = points(RUN), texts(RUN)
    assert fit(*every, "--ckpt_path", RUN / "step_00000004.ckpt").status == 0
    again = points(RUN)
    for tag in ("loss/train", "loss/val", "loss/train_eval", "best/loss_val", "optim/lr", "optim/grad_norm"):
        assert again[tag] == straight[tag], tag
    assert texts(RUN) == straight_texts


def test_run_killed_right_after_a_save_loses_nothing_of_the_saved_step(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--name"]
    # step 3 has a validation and samples, and is saved when step 4 begins
    kill_in_step_4 = at_step(4, lambda module: kill_process_group())
    assert forked(folder, *flags, "straight").status == 0
    assert forked(folder, *flags, "killed", prepare=kill_in_step_4).status == -signal.SIGKILL
    assert forked(folder, *flags, "killed", "--ckpt_path", "last").status == 0
    assert compare_runs(*(folder / f"logs/{name}/version_0" for name in ("straight", "killed"))) == []


@pytest.mark.parametrize("after", [True, False], ids=["after", "before"])
def test_resume_restores_copies_that_a_killed_save_did_not_write(folder: Path, after: bool) -> None:
    flags = ["--config", "small.yaml", "--checkpoint.every_n_steps", 3, "--name"]

    def prepare() -> None:
        replace, names = os.replace, []

        def patched(source: Path, target: Path) -> None:
            names.append(Path(target).name)
            if after:
                replace(source, target)
            if names.count("best.ckpt") == 2:  # of step 6, the last
                kill_process_group()
            if not after:
                replace(source, target)

        os.replace = patched  # type: ignore[assignment]

    assert forked(folder, *flags, "straight").status == 0
    assert forked(folder, *flags, "killed", prepare=prepare).status == -signal.SIGKILL
    assert forked(folder, *flags, "killed", "--ckpt_path", "last").status == 0
    straight, killed = (folder / f"logs/{name}/version_0" for name in ("straight", "killed"))
    assert compare_runs(straight, killed) == []
    assert [path.name for path in sorted(killed.glob("step_*"))] == ["step_00000003.ckpt", "step_00000006.ckpt"]


def test_exception_after_a_validation_keeps_the_best_checkpoint(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--name"]

    def prepare() -> None:
        get_item = TrainBatches.__getitem__

        def patched(batches: TrainBatches, index: int) -> tuple[torch.Tensor, ...]:
            if index == 4:  # prefetched by one step: it is drawn right after the validation of step 3
                raise RuntimeError("a bug")
            return get_item(batches, index)

        TrainBatches.__getitem__ = patched  # type: ignore[method-assign]

    assert forked(folder, *flags, "straight").status == 0
    assert forked(folder, *flags, "failed", prepare=prepare).status == 1
    assert forked(folder, *flags, "failed", "--ckpt_path", "last", "--trainer.max_steps", 3).status == 0
    assert Checkpoint.open(folder / "logs/failed/version_0/best.ckpt").step == 3
    assert forked(folder, *flags, "failed", "--ckpt_path", "last").status == 0
    assert compare_runs(*(folder / f"logs/{name}/version_0" for name in ("straight", "failed"))) == []


def test_resuming_an_older_checkpoint_removes_no_points_before_its_first_save(folder: Path) -> None:
    flags = ["--config", "small.yaml", "--checkpoint.every_n_steps", 2, "--ckpt_path"]
    assert forked(folder, *flags, "auto").status == 0
    curves, samples = points(folder / RUN), texts(folder / RUN)
    kill_in_step_5 = at_step(5, lambda module: kill_process_group())
    killed = forked(folder, *flags, RUN / "step_00000004.ckpt", prepare=kill_in_step_5)
    assert killed.status == -signal.SIGKILL
    assert "already complete at step 6" in forked(folder, *flags, "last").out
    assert (points(folder / RUN), texts(folder / RUN)) == (curves, samples)


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.enable_checkpointing", "false", "--trainer.max_steps", 8],
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.logger", "false", "--trainer.max_steps", 8],
    ],
    ids=["no checkpoints", "fast_dev_run", "no curves"],
)
def test_resume_may_switch_off_checkpoints_or_curves(fit: Fit, flags: list[object]) -> None:
    assert fit().status == 0
    result = fit("--ckpt_path", "last", *flags)
    assert result.status == 0, result.err


@pytest.mark.parametrize("step", [20, 35, 50], ids=["in the first epoch", "at its end", "in the second epoch"])
def test_max_epochs_counts_across_a_resume(fit: Fit, step: int) -> None:
    flags = ["--trainer.max_epochs", 2, "--model.schedule", "constant", "--trainer.val_check_interval", 0.5]
    assert "35 to an epoch" in fit(*flags, "--trainer.max_steps", step).out
    assert fit(*flags, "--trainer.max_steps", -1, "--ckpt_path", "last").status == 0
    assert fit(*flags, "--trainer.max_steps", -1, "--name", "straight").status == 0
    assert [at for at, _ in points(RUN)["loss/train"]] == list(range(1, 71))
    one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("small", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_checkpoint_of_another_run_does_not_truncate_event_files(fit: Fit) -> None:
    assert fit().status == 0
    assert fit().status == 0  # version_1
    other = Path("logs/small/version_1")
    curves = points(other)
    shutil.copy(RUN / "best.ckpt", other / "copied.ckpt")
    assert fit("--ckpt_path", other / "copied.ckpt", "--trainer.max_steps", 8).status == 0
    for tag, values in curves.items():
        assert points(other)[tag][: len(values)] == values


def test_other_data_is_refused_without_allow_data_change(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    before = sorted(RUN.rglob("*"))
    text = Path("rows.txt").read_text(encoding="utf-8")
    Path("rows.txt").write_text(text + "\none more row", encoding="utf-8")
    result = fit("--ckpt_path", "last")
    assert (result.status, result.err.count("\n")) == (2, 1)
    documents = (
        "documents 120 in the checkpoint, 121 now; characters 1937 in the checkpoint, 1949 now; "
        "val tokens 279 in the checkpoint, 292 now"
    )
    assert f"was trained on other data ({documents})" in result.err
    Path("rows.txt").write_text(text.replace("row 7", "row 8"), encoding="utf-8")
    assert "other data (the text itself)" in fit("--ckpt_path", "last").err
    assert "val tokens 279 in the checkpoint, 546 now" in fit("--ckpt_path", "last", "--data.val_fraction", 0.2).err
    assert sorted(RUN.rglob("*")) == before
    assert fit("--ckpt_path", "last", "--allow_data_change", "true").status == 0
    Path("rows.txt").write_text(text.replace("row 7", "row 9"), encoding="utf-8")
    result = fit("--ckpt_path", "last", "--name", "small", config=None)  # the flag is not saved in the config
    assert "other data (the text itself)" in result.err
    assert Checkpoint.open(RUN / "last.ckpt").step == 6


def test_other_optimizer_is_refused(fit: Fit) -> None:
    assert fit("--trainer.max_steps", 3).status == 0
    result = fit("--ckpt_path", "last", "--model.optimizer", "muon")
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert "--model.optimizer muon: logs/small/version_0/last.ckpt was trained with adamw" in result.err


def test_resumed_run_draws_the_batches_of_the_uninterrupted_run(fit: Fit, drawn: list[int]) -> None:
    batches = ["--data.global_batch_size", 40, "--checkpoint.every_n_steps", 1, "--checkpoint.keep", 99]
    result = fit(*batches, "--trainer.max_steps", 10)
    assert "3 to an epoch" in result.out
    assert drawn[:100] == list(range(100))
    for step in (1, 2, 3, 4, 6, 9):  # an epoch has 3 steps
        drawn.clear()
        resumed = ["--ckpt_path", RUN / f"step_{step:08d}.ckpt", "--name", f"from_{step}", "--trainer.max_steps", 10]
        assert fit(*batches, *resumed).status == 0
        assert drawn[: 10 * (10 - step)] == list(range(10 * step, 100))
        one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("small", f"from_{step}"))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_compare_runs_finds_differences(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit("--name", "one").status == 0
    assert fit("--name", "same").status == 0
    assert fit("--name", "other", "--model.learning_rate", 1.1e-3).status == 0
    one, same, other = (Path(f"logs/{name}/version_0") for name in ("one", "same", "other"))
    assert compare_runs(one, same) == []
    assert {"state_dict of last.ckpt", "optimizer_states of best.ckpt", "points of loss/train"} <= set(
        compare_runs(one, other)
    )
    training_step = LitGPT.training_step
    monkeypatch.setattr(LitGPT, "training_step", lambda *args: training_step(*args) * (1 + 1e-7))
    assert fit("--name", "nearly_equal").status == 0
    assert "state_dict of last.ckpt" in compare_runs(one, Path("logs/nearly_equal/version_0"))
