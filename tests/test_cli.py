"""Which config is read, who wins, what is refused and how it is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, Fit, points, tags, weights

RUN = Path("logs/small/version_0")


def saved(folder: Path = RUN) -> dict:
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def test_without_a_config_the_default_one_is_read(fit: Fit) -> None:
    small = ["--trainer.max_steps", 1, "--data.files", "rows.txt", "--data.columns", "text", "--data.batch_size", 2]
    assert fit(*small, "--trainer.accelerator", "cpu", config=None).status == 0
    assert saved(Path("logs/default/version_0"))["model"]["config"]["d_model"] == 128


def test_the_first_config_is_the_experiment_and_later_ones_overlay_it(fit: Fit) -> None:
    Path("overlay.yaml").write_text("trainer: {max_steps: 2}\nmodel: {config: {d_model: 8}}\n")
    assert fit("--config", "overlay.yaml").status == 0
    config = saved()  # in the folder of the first one's name
    assert (config["trainer"]["max_steps"], config["model"]["config"]["d_model"]) == (2, 8)
    assert config["model"]["config"]["num_blocks"] == 2  # the first one's; default.yaml says 4


@pytest.mark.parametrize("config", ["--config=small.yaml", "-csmall.yaml"])
@pytest.mark.parametrize("first", [True, False], ids=["flag first", "config first"])
def test_flags_win_wherever_they_stand(fit: Fit, first: bool, config: str) -> None:
    flag = ["--trainer.max_steps", "1"]
    words = [*flag, config] if first else [config, *flag]
    assert fit(*words, config=None).status == 0
    assert saved()["trainer"]["max_steps"] == 1


def test_runs_of_a_name_are_counted(fit: Fit) -> None:
    for _ in range(2):
        assert fit("--name", "mine.2-b_c", "--trainer.max_steps", 1).status == 0
    assert sorted(path.name for path in Path("logs/mine.2-b_c").iterdir()) == ["version_0", "version_1"]


def test_the_saved_config_runs_the_same_again(fit: Fit) -> None:
    assert fit("--name", "first", "--model.config.dropout", 0.1).status == 0
    assert fit(config="logs/first/version_0/config.yaml").status == 0
    one, other = (points(Path(f"logs/first/version_{n}"))["loss/train"] for n in (0, 1))
    assert one == other


def test_a_checkpoint_alone_resumes_its_run_in_its_folder(fit: Fit) -> None:
    dropout = ["--model.config.dropout", 0.2]
    assert fit(*dropout, "--name", "straight").status == 0
    assert fit(*dropout, "--name", "small", "--checkpoint.every_n_steps", 4).status == 0
    resumed = fit("--ckpt_path", RUN / "step_00000004.ckpt", config=None)
    assert resumed.status == 0
    assert "resumed" in resumed.out
    assert [path.name for path in Path("logs/small").iterdir()] == ["version_0"]
    one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("straight", "small"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "ckpt_path" not in saved()


def test_flags_win_over_a_checkpoints_config(fit: Fit) -> None:
    assert fit().status == 0
    assert fit("--ckpt_path", RUN / "last.ckpt", "--trainer.max_steps", 8, config=None).status == 0
    assert torch.load(RUN / "last.ckpt", weights_only=True)["global_step"] == 8
    assert "already complete at step 8: raise" in fit("--ckpt_path", RUN / "last.ckpt", config=None).out
    assert saved()["model"]["config"]["d_model"] == 16


def test_a_checkpoint_of_another_vocabulary_is_refused(fit: Fit) -> None:
    Path("a.txt").write_text("abcabcab\n" * 50)
    Path("x.txt").write_text("xyzxyzxy\n" * 50)
    assert fit("--data.tokenizer", "char", "--data.files", "a.txt").status == 0
    result = fit("validate", "--ckpt_path", RUN / "last.ckpt", "--data.files", "x.txt", config=None)
    assert (result.status, result.out) == (2, "")
    assert "its tokens stand for other pieces of text" in result.err


def test_a_run_resumed_under_another_name_has_its_chart_too(fit: Fit) -> None:
    assert fit().status == 0
    assert fit("--ckpt_path", RUN / "last.ckpt", "--name", "other", "--trainer.max_steps", 8).status == 0
    assert {"custom_scalars__config__", "_hparams_/session_start_info"} <= tags(Path("logs/other/version_0"))


@pytest.mark.parametrize("command", [[], ["validate"]], ids=["fit", "validate"])
def test_a_checkpoint_of_another_model_is_refused(fit: Fit, command: list[str]) -> None:
    assert fit().status == 0
    result = fit(*command, "--ckpt_path", RUN / "last.ckpt", "--model.config.d_model", 8, "--data.tokenizer", "char")
    assert result.status == 2
    assert "vocab_size 257 there, 28 here; d_model 16 there, 8 here" in result.err
    assert result.err.count("\n") == 1


def test_validate_scores_a_checkpoint_and_makes_no_run(fit: Fit) -> None:
    assert fit().status == 0
    before = sorted(Path("logs").rglob("*"))
    result = fit("validate", "--ckpt_path", RUN / "last.ckpt", config=None)
    assert result.status == 0
    assert sorted(Path("logs").rglob("*")) == before
    expected = points(RUN)["loss/val"][-1][1]
    assert f"loss/val             {expected:.4f}" in result.out.splitlines()


def test_the_preflight_says_what_is_about_to_be_trained(fit: Fit) -> None:
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
        ["--trainer.log_every_n_steps", "0"],
        ["--trainer.max_epochs", "1"],
        ["--trainer.max_time", "00:00:10:00"],
        ["--trainer.profiler", "simple"],
        ["--trainer.detect_anomaly", "true"],
        ["--trainer.callbacks+", "EarlyStopping", "--trainer.callbacks.monitor", "loss/val"],
    ],
    ids=lambda flags: flags[0],
)
@pytest.mark.filterwarnings("ignore:.*anomaly.*")
@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_trainer_flags_work(fit: Fit, flags: list[str]) -> None:
    assert fit(*flags).status == 0


@pytest.mark.filterwarnings("ignore:.*barebones.*")
def test_a_barebones_run_leaves_nothing(fit: Fit) -> None:
    fit("--trainer.barebones", "true")
    assert not Path("logs").exists()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "missing file": (["--data.files", "row.txt"], "row.txt: no such file (did you mean 'rows.txt'?)"),
    "unknown column": (["--data.files", "header.csv", "--data.columns", "name"], "has no column 'name'; it has text"),
    "empty file": (["--data.files", "empty.csv"], "empty.csv is empty"),
    "only a header": (["--data.files", "header.csv"], "no rows, at most a header"),
    "short corpus": (["--model.config.context_length", "5000"], "fewer than one window of 5001"),
    "undecodable": (["--data.files", "gbk.csv"], "line 2, bytes d6 d0"),
    "template field": (
        ["--data.files", "header.csv", "--data.template", "{txt}"],
        "has no column 'txt'; it has text (did you mean 'text'?)",
    ),
    "heads": (["--model.config.num_heads", "3"], "num_heads 3 does not divide d_model 16"),
    "misspelt flag": (
        ["--trainer.max_step", "3"],
        "unknown flag --trainer.max_step (did you mean 'trainer.max_steps'?)",
    ),
    "misspelt key": (["--config", "misspelt.yaml"], "unknown key model.config.d_modle"),
    "key twice": (["--config", "twice.yaml"], "twice.yaml line 3: key 'max_steps' is given twice"),
    "linked key": (["--config", "linked.yaml"], "data.context_length follows from model.config.context_length"),
    "linked flag": (["--model.config.vocab_size", "9"], "model.config.vocab_size follows from the tokenizer"),
    "broken yaml": (["--config", "broken.yaml"], "mend the YAML"),
    "no settings": (["--config", "empty.yaml"], "empty.yaml holds no settings"),
    "missing config": (["--config", "smal.yaml"], "--config smal.yaml: no such file (did you mean 'small.yaml'?)"),
    "no checkpoint": (["--ckpt_path", "rows.txt"], "rows.txt cannot be opened (damaged, or no checkpoint)"),
    "missing checkpoint": (["--ckpt_path", "no.ckpt"], "no.ckpt: no such checkpoint file"),
    "wrong type": (["--trainer.max_steps", "many"], "--trainer.max_steps many: give int"),
    "wrong choice": (
        ["--model.config.mlp", "geglu"],
        "--model.config.mlp geglu: give one of swiglu, gelu, relu, relu2",
    ),
    "wrong name": (["--name", "a/b"], "--name 'a/b': take letters, digits and ._- only"),
    "name of dots": (["--name", ".."], "--name '..': take letters, digits and ._- only"),
    "both accumulations": (
        ["--data.global_batch_size", "8", "--trainer.accumulate_grad_batches", "2"],
        "say the same twice",
    ),
    "global batch": (["--data.global_batch_size", "6"], "6 is not a multiple of 4"),
    "their sampler": (["--trainer.use_distributed_sampler", "true"], "every device draws its own windows"),
    "timed validation": (["--trainer.val_check_interval", "00:00:01:00"], "00:00:01:00: give optimizer steps"),
    "no end": (["--trainer.max_steps", "-1"], "--model.schedule cosine needs an end"),
    "random seed": (["--seed_everything", "true"], "--seed_everything True: give int"),
    "prompt": (
        ["--data.tokenizer", "char", "--generate.prompts", "[row, 静夜思]"],
        "character '静' (U+9759) is not among the",
    ),
    "temperature": (["--generate.temperature", "-1"], "temperature is -1.0: give 0"),
    "words": (["--data.files", "a.csv", "b.csv"], "unexpected word 'b.csv'"),
    "no such device": (["--trainer.accelerator", "tpu"], "torch_xla"),
    "cut epochs": (["--trainer.limit_train_batches", "3"], "give --trainer.max_steps"),
    "no interval": (["--trainer.val_check_interval", "0"], "--trainer.val_check_interval 0: give optimizer steps"),
    "betas": (["--model.betas", "[1.5, 0.9]"], "--model.betas is [1.5, 0.9]: give two numbers"),
    "decay": (["--model.weight_decay", "-1"], "--model.weight_decay is -1.0: give 0 or more"),
    "clip": (["--trainer.gradient_clip_val", "-1"], "--trainer.gradient_clip_val is -1.0: give 0"),
    "null": (["--config", "null.yaml"], "--data.batch_size null: give a value"),
    "null section": (["--config", "section.yaml"], "generate None: give its settings"),
    "key of lists": (["--config", "keys.yaml"], "keys.yaml is not YAML in UTF-8"),
    "empty checkpoint": (["--ckpt_path", ""], "--ckpt_path is empty"),
    "no accumulation": (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches is 0: give 1 or more"),
    "spawn": (["--trainer.strategy", "ddp_spawn"], "--trainer.strategy ddp_spawn is for notebooks: give ddp"),
    "devices": (["--trainer.devices", "-1"], "should be an int > 0"),
    "validate what": (["validate"], "validate needs a checkpoint"),
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_line_and_leaves_nothing(fit: Fit, words: list[str], message: str) -> None:
    Path("empty.csv").write_bytes(b"")
    Path("header.csv").write_text("text\n")
    Path("gbk.csv").write_bytes("text\n中文\n".encode("gb18030"))
    Path("misspelt.yaml").write_text("model: {config: {d_modle: 8}}\n")
    Path("twice.yaml").write_text("trainer:\n  max_steps: 1\n  max_steps: 2\n")
    Path("linked.yaml").write_text("data: {context_length: 8}\n")
    Path("null.yaml").write_text("data: {batch_size: null}\n")
    Path("section.yaml").write_text("generate: null\n")
    Path("keys.yaml").write_text("? [a, b]\n: 1\n")
    Path("broken.yaml").write_text("trainer: [\n")
    Path("empty.yaml").write_text("")
    result = fit(*words)
    assert result.status == 2
    assert message in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert result.out == ""
    assert not Path("logs").exists()


def test_a_shape_that_cannot_be_is_refused_before_the_text_is_read(fit: Fit) -> None:
    assert fit("--model.config.num_heads", "3").status == 2
    assert not Path("data").exists()


def run_script(script: str, *words: str, timeout: int = 100) -> subprocess.CompletedProcess[str]:
    """A script as a person runs it, in a process of its own."""
    command = [sys.executable, str(ROOT / "scripts" / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


def test_two_devices_train_validate_checkpoint_and_resume_as_one(fit: Fit, folder: Path) -> None:
    shared = ["--data.global_batch_size", "8", "--model.config.dropout", "0.1", "--checkpoint.every_n_steps", "4"]
    assert fit("--name", "one", *shared).status == 0
    pair = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    trained = run_script("fit.py", "--config", "small.yaml", "--name", "two", *shared, *pair)
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("parameters") == 1  # one preflight
    assert "Warning" not in trained.stderr
    assert [path.name for path in Path("logs/two").iterdir()] == ["version_0"]
    one, two = (points(Path(f"logs/{name}/version_0")) for name in ("one", "two"))
    for tag in ("loss/train", "loss/val", "loss/train_eval", "optim/grad_norm"):
        torch.testing.assert_close(two[tag], one[tag], rtol=0, atol=1e-5)
    resumed = run_script("fit.py", "--ckpt_path", "logs/two/version_0/step_00000004.ckpt")
    assert resumed.returncode == 0, resumed.stderr
    expected, got = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("one", "two"))
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_mistake_on_two_devices_is_said_once(folder: Path) -> None:
    words = ["--config", "small.yaml", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    result = run_script("fit.py", *words, "--data.global_batch_size", "4")
    assert (result.returncode, result.stderr.count("error: "), result.stdout) == (2, 1, "")
    assert "4 is not a multiple of 8, --data.batch_size 4 on 2 device(s)" in result.stderr
    assert not Path("logs").exists()


def test_generate_writes_from_the_newest_checkpoint(fit: Fit) -> None:
    assert fit("--data.tokenizer", "char").status == 0
    words = ["--prompt", "第1行", "--max_new_tokens", "40", "--num_samples", "2", "--seed", "7"]
    first, again = (run_script("generate.py", *words) for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == again.stdout
    assert first.stdout.startswith("第1行")
    assert first.stderr == f"[{RUN / 'last.ckpt'}]\n"
    assert first.stdout != run_script("generate.py", *words[:-1], "8").stdout
    likeliest = run_script("generate.py", "--prompt", "row", "--temperature", "0", "--num_samples", "2").stdout
    half = len(likeliest) // 2
    assert likeliest[:half] == likeliest[half:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no checkpoint under logs/"),
        (["--ckpt_path", "rows.txt"], "rows.txt cannot be opened"),
        (["--temp", "1"], "unrecognized arguments: --temp 1"),
        (["--num_samples", "0"], "give 1 or more"),
    ],
    ids=["none", "no checkpoint", "misspelt", "number"],
)
def test_a_mistake_with_generate_gets_one_line(folder: Path, words: list[str], message: str) -> None:
    result = run_script("generate.py", *words)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_configs_are_found_from_the_scripts_place(folder: Path) -> None:
    words = ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--generate.prompts", "[]"]
    result = run_script("fit.py", *words)
    assert result.returncode == 0, result.stderr
    assert Path("data/mingcheng.csv").exists()
    assert Path("logs/default/version_0/last.ckpt").exists()
