"""scripts/fit.py: configs and flags, resuming, `validate` and `test`, several devices; generate.py after training."""

import math
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DEFAULT, ROOT, Fit, forked, points, tags, weights
from torch.nn import functional as F

from lit_gpt import load_model
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli import fit as fit_command
from lit_gpt.cli.generate import main as generate_main
from lit_gpt.device import available_cores

RUN = Path("logs/small/version_0")


def saved_config(folder: Path = RUN) -> dict:
    """Return the config.yaml of a run."""
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def test_default_config_is_read_without_config_flag(fit: Fit) -> None:
    small = ["--trainer.max_steps", 1, "--data.files", "rows.txt", "--data.batch_size", 2]
    assert fit(*small, "--trainer.accelerator", "cpu", config=None).status == 0
    assert saved_config(Path("logs/default/version_0"))["model"]["config"]["d_model"] == 128


def test_first_config_is_the_experiment_and_later_ones_overlay_it(fit: Fit) -> None:
    Path("overlay.yaml").write_text("trainer: {max_steps: 2}\nmodel: {config: {d_model: 8}}\n")
    assert fit("--config", "overlay.yaml").status == 0
    config = saved_config()  # the run is named after the first config
    assert (config["trainer"]["max_steps"], config["model"]["config"]["d_model"]) == (2, 8)
    assert config["model"]["config"]["num_blocks"] == 2  # the first one's; default.yaml says 4


@pytest.mark.parametrize("config", ["--config=small.yaml", "-csmall.yaml"])
@pytest.mark.parametrize("first", [True, False], ids=["flag first", "config first"])
def test_flags_override_configs_in_any_order(fit: Fit, first: bool, config: str) -> None:
    flag = ["--trainer.max_steps", "1"]
    words = [*flag, config] if first else [config, *flag]
    assert fit(*words, config=None).status == 0
    assert saved_config()["trainer"]["max_steps"] == 1


def test_runs_with_the_same_name_get_increasing_versions(fit: Fit) -> None:
    for _ in range(2):
        assert fit("--name", "mine.2-b_c", "--trainer.max_steps", 1).status == 0
    assert sorted(path.name for path in Path("logs/mine.2-b_c").iterdir()) == ["version_0", "version_1"]


def test_saved_config_reproduces_the_run(fit: Fit) -> None:
    assert fit("--name", "first", "--model.config.dropout", 0.1).status == 0
    assert fit(config="logs/first/version_0/config.yaml").status == 0
    one, other = (points(Path(f"logs/first/version_{n}"))["loss/train"] for n in (0, 1))
    assert one == other


def test_checkpoint_without_config_resumes_its_run_in_its_folder(fit: Fit) -> None:
    dropout = ["--model.config.dropout", 0.2]
    assert fit(*dropout, "--name", "straight").status == 0
    assert fit(*dropout, "--name", "small", "--checkpoint.every_n_steps", 4).status == 0
    resumed = fit("--ckpt_path", RUN / "step_00000004.ckpt", config=None)
    assert resumed.status == 0
    assert "resumed" in resumed.out
    assert [path.name for path in Path("logs/small").iterdir()] == ["version_0"]
    one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("straight", "small"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "ckpt_path" not in saved_config()


def test_flags_override_the_config_in_a_checkpoint(fit: Fit) -> None:
    assert fit().status == 0
    assert fit("--ckpt_path", RUN / "last.ckpt", "--trainer.max_steps", 8, config=None).status == 0
    assert torch.load(RUN / "last.ckpt", weights_only=True)["global_step"] == 8
    assert "already complete at step 8: raise" in fit("--ckpt_path", RUN / "last.ckpt", config=None).out
    assert saved_config()["model"]["config"]["d_model"] == 16


def test_checkpoint_with_another_vocabulary_is_refused(fit: Fit) -> None:
    Path("a.txt").write_text("abcabcab\n" * 50)
    Path("x.txt").write_text("xyzxyzxy\n" * 50)
    assert fit("--data.tokenizer", "char", "--data.files", "a.txt").status == 0
    result = fit("validate", "--ckpt_path", RUN / "last.ckpt", "--data.files", "x.txt", config=None)
    assert (result.status, result.out) == (2, "")
    assert "its tokenizer has other tokens than the tokenizer of this data" in result.err


def test_run_resumed_under_another_name_logs_chart_and_settings(fit: Fit) -> None:
    assert fit().status == 0
    assert fit("--ckpt_path", RUN / "last.ckpt", "--name", "other", "--trainer.max_steps", 8).status == 0
    assert "custom_scalars__config__" in tags(Path("logs/other/version_0"))
    assert "_hparams_/session_start_info" in tags(Path("logs/other/version_0/val"))


@pytest.mark.parametrize("command", [[], ["validate"]], ids=["fit", "validate"])
def test_checkpoint_with_another_model_is_refused(fit: Fit, command: list[str]) -> None:
    assert fit().status == 0
    for flags, difference in {
        ("--model.config.d_model", 8): "d_model 16 in the checkpoint, 8 now",
        ("--data.tokenizer", "char"): "vocab_size 257 in the checkpoint, 28 now",
    }.items():
        result = fit(*command, "--ckpt_path", RUN / "last.ckpt", *flags)
        assert result.status == 2
        assert f"has another model ({difference}" in result.err
        assert result.err.count("\n") == 1


def test_validate_prints_metrics_and_writes_no_files(fit: Fit) -> None:
    assert fit().status == 0
    before = sorted(Path("logs").rglob("*"))
    result = fit("validate", "--ckpt_path", RUN / "last.ckpt", config=None)
    assert result.status == 0
    assert sorted(Path("logs").rglob("*")) == before
    expected = points(RUN)["loss/val"][-1][1]
    uniform = f"nats; a uniform guess has ln(257) = {math.log(257):.4f}"
    assert f"loss/val             {expected:.4f}   {uniform}" in result.out.splitlines()


def test_test_command_prints_metrics_of_the_test_split(fit: Fit) -> None:
    trained = fit("--data.test_fraction", 0.2)
    assert trained.status == 0
    result = fit("test", "--ckpt_path", RUN / "last.ckpt", "--data.eval_windows", "null", config=None)
    assert (result.status, result.err) == (0, "")
    assert [path.name for path in Path("logs").rglob("version_*")] == ["version_0"]
    model, tokenizer, _ = load_model(RUN / "last.ckpt")
    rows = Path("rows.txt").read_text(encoding="utf-8").splitlines()[-24:]
    ids = torch.tensor([i for row in rows for i in (*row.encode(), tokenizer.end_of_text)])
    assert f"{len(ids):,} to test" in trained.out
    nats, correct = 0.0, 0
    for start in range(0, len(ids) - 1, 16):
        window = ids[start : start + 17]
        logits, _ = model(window[None, :-1])
        correct += int((logits[0].argmax(dim=-1) == window[1:]).sum())
        nats += F.cross_entropy(logits[0], window[1:], reduction="sum").item()
    loss, size = nats / (len(ids) - 1), sum(len(row.encode()) for row in rows) - 1
    got = {tag: float(value) for tag, value in (row.split()[:2] for row in result.out.splitlines()[1:])}
    expected = {"loss/test": loss, "test/bits_per_byte": nats / size / math.log(2), "test/perplexity": math.exp(loss)}
    expected["test/accuracy"] = correct / (len(ids) - 1)
    assert got == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_test_command_refuses_missing_split_and_warns_of_seen_text(fit: Fit) -> None:
    assert fit().status == 0
    Path("t.csv").write_text("text,part\n" + "a row to train on,train\na row to validate,val\n" * 20)
    test = ["test", "--ckpt_path", RUN / "last.ckpt"]
    table = ["--data.files", "t.csv", "--data.columns", "text", "--data.split_column", "part"]
    for flags, message in (
        ([*test[:1], "--name", "smal"], "no checkpoint of 'smal' under logs (did you mean 'small'?): give --name"),
        (test[:1], "there is no test split: give"),
        (test, "there is no test split: give --data.test_fraction, --data.test_files or --data.split_column"),
        ([*test, *table], "the test split has 0 tokens, of which none can be predicted"),
    ):
        result = fit(*flags)
        assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
        assert message in result.err
    result = fit(*test, "--data.test_fraction", 0.1)
    assert result.status == 0
    assert "training tokens: the test text may have been trained on" in result.out


def test_preflight_describes_data_model_and_steps(fit: Fit) -> None:
    out = fit("--data.global_batch_size", 8).out
    rows = Path("rows.txt").read_text(encoding="utf-8").splitlines()
    tokens = sum(len(row.encode()) + 1 for row in rows)
    assert f"120 documents, {sum(map(len, rows)):,} characters" in out
    assert f"tokens      {tokens:,} (" in out
    assert "257 different (byte)" in out
    parameters = sum(value.numel() for name, value in weights(RUN / "last.ckpt").items() if name != "gpt.head.weight")
    assert f"model       {parameters:,} parameters" in out
    assert "steps       6 of 128 tokens, " in out
    assert "logs        logs/small/version_0" in out


@pytest.mark.parametrize(
    "flags",
    [
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.barebones", "true"],
        ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false"],
        ["--trainer.enable_progress_bar", "false"],
        ["--trainer.overfit_batches", "2"],
        ["--trainer.use_distributed_sampler", "false"],
        ["--trainer.reload_dataloaders_every_n_epochs", "1"],
        ["--trainer.log_every_n_steps", "0"],
        ["--trainer.max_epochs", "1"],
        ["--trainer.max_time", "00:00:10:00"],
        ["--trainer.profiler", "simple"],
        ["--trainer.detect_anomaly", "true"],
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "loss/val"],
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "loss/train"],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.filterwarnings("ignore:.*anomaly.*")
@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_trainer_flag_is_accepted(fit: Fit, flags: list[str]) -> None:
    assert fit(*flags).status == 0


def test_overfit_batches_are_one_epoch(fit: Fit) -> None:
    few = ["--trainer.overfit_batches", 4, "--data.global_batch_size", 8]
    result = fit(*few, "--trainer.max_epochs", 2, "--trainer.max_steps", 20, "--model.schedule", "constant")
    assert result.status == 0, result.err
    assert "steps       4 of 128 tokens, 2 to an epoch" in result.out
    assert Checkpoint.open(RUN / "best.ckpt").step == 4  # the end of an epoch, where it is validated


@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_barebones_run_writes_no_files(fit: Fit) -> None:
    fit("--trainer.barebones", "true")
    assert not Path("logs").exists()


def test_invalid_model_shape_is_refused_before_data_is_read(fit: Fit) -> None:
    assert fit("--model.config.num_heads", "3").status == 2
    assert not Path("data").exists()


def test_two_devices_match_one_device_and_resume(fit: Fit, folder: Path) -> None:
    shared = ["--data.global_batch_size", "8", "--model.config.dropout", "0.1", "--checkpoint.every_n_steps", "4"]
    shared += ["--trainer.precision", "64-true"]  # so that another order of summation changes the last digits only
    assert fit("--name", "one", *shared).status == 0
    two_devices = ["--config", str(ROOT / "configs" / "ddp.yaml"), "--trainer.devices", "2"]
    trained = forked(folder, "--config", "small.yaml", "--name", "two", *shared, *two_devices)
    assert trained.status == 0, trained.err
    assert trained.out.count("parameters") == 1  # one preflight
    assert "Warning" not in trained.err
    assert [path.name for path in Path("logs/two").iterdir()] == ["version_0"]
    one, two = (points(Path(f"logs/{name}/version_0")) for name in ("one", "two"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(two[tag], one[tag], rtol=0, atol=5e-7)  # the last digit logged
    resumed = forked(folder, "--ckpt_path", "logs/two/version_0/step_00000004.ckpt")
    assert resumed.status == 0, resumed.err
    expected, got = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("one", "two"))
    for name, value in got.items():
        assert value.dtype == torch.float64
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)


def test_two_processes_get_half_of_the_cores_each(folder: Path) -> None:
    def prepare() -> None:
        os.environ.pop("OMP_NUM_THREADS", None)
        fit_command.RUN_COMMAND["fit"] = lambda experiment, stop: print(os.environ["OMP_NUM_THREADS"])

    flags = ["--config", "small.yaml", "--trainer.devices", 2, "--trainer.strategy", "ddp"]
    assert forked(folder, *flags, prepare=prepare).out.split()[-1] == str(max(1, available_cores() // 2))


def test_generate_script_uses_the_best_checkpoint(fit: Fit, folder: Path) -> None:
    assert fit("--data.tokenizer", "char").status == 0
    words = ["--prompt", "第1行", "--max_new_tokens", "40", "--num_samples", "2", "--seed", "7"]
    first, again = (forked(folder, *words, script="generate.py") for _ in range(2))
    assert first.status == 0, first.err
    assert first.out == again.out
    assert first.out.startswith("--- sample 1 of 2 ---\n第1行")
    assert first.err == f"[{RUN / 'best.ckpt'}]\n"
    assert first.out != forked(folder, *words[:-1], "8", script="generate.py").out
    likeliest = forked(folder, "--prompt", "row", "--temperature", 0, "--num_samples", 2, script="generate.py").out
    _, one, two = re.split(r"--- sample \d of 2 ---\n", likeliest)
    assert one == two


def test_script_finds_the_default_config_from_any_working_folder(folder: Path) -> None:
    words = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--generate.prompts", "[]"]
    result = forked(folder, *words)
    assert result.status == 0, result.err
    assert Path("data/mingcheng.csv").exists()
    assert Path("logs/default/version_0/last.ckpt").exists()


def test_generate_reports_a_bug_with_traceback_and_status_1(
    fit: Fit, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit("--trainer.max_steps", 1).status == 0
    monkeypatch.setattr("lit_gpt.cli.text_writer.prepare_for_inference", lambda model: 1 // 0)
    assert generate_main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        (
            "trainer: {logger: [{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: rows.txt/x}}]}",
            "error: CSVLogger: [Errno 20] Not a directory",
        ),
        (
            "trainer: {strategy: {class_path: lightning.pytorch.strategies.DDPStrategy, "
            "init_args: {process_group_backend: nonsense}}}",
            "error: process_group_backend nonsense is unknown: give gloo or nccl",
        ),
    ],
    ids=["logger", "strategy"],
)
def test_wrong_argument_of_a_class_in_a_config_is_a_user_error(fit: Fit, overlay: str, message: str) -> None:
    Path("overlay.yaml").write_text(overlay)
    result = fit("--config", "overlay.yaml", "--trainer.max_steps", 1)
    assert result.status == 2
    assert result.err.startswith(message)
    assert len(result.err.splitlines()) == 1


def test_built_in_column_does_not_apply_to_other_files(fit: Fit) -> None:
    Path("mine.csv").write_text("text\n" + "a row of mine\n" * 200)
    flags = ("--data.tokenizer", "byte", "--trainer.max_steps", 1, "--data.eval_windows", 1, "--generate.prompts", "[]")
    assert fit("--data.files", "mine.csv", *flags, config=str(DEFAULT)).status == 0
