"""Tests of the configs in configs/, and of the defaults of a run without a config."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import DEFAULT, ROOT, Fit, points, weights
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lit_gpt.cli.arguments import SECTIONS
from lit_gpt.data.datamodule import TextDataModule
from lit_gpt.data.sample import SAMPLE_FILE
from lit_gpt.model import GPTConfig
from lit_gpt.training.module import LitGPT

OVERLAYS = [ROOT / "configs" / name for name in ("ddp.yaml", "fsdp.yaml")]  # test_cli and test_sharding train with them
EXPERIMENTS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*OVERLAYS})

# Flags by config: the text that the user has to bring, and for gpt2 a model that trains in seconds.
SMALLER_GPT2 = [
    *("--data.files", "rows.txt"),
    *("--model.config.context_length", "32", "--model.config.num_blocks", "2"),
    *("--data.batch_size", "1", "--data.global_batch_size", "2"),
    *("--model.compile", "false", "--trainer.precision", "32-true"),
    *("--trainer.enable_checkpointing", "false"),  # a checkpoint has 1.5 GB
]
SMALLER_FLAGS = {
    "gpt2": SMALLER_GPT2,
    "gpt2_fast": SMALLER_GPT2,
    "shakespeare_char": ["--data.files", str(ROOT / "LICENSE")],
    "shakespeare_fast": ["--data.files", str(ROOT / "LICENSE")],
}


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_trains_two_steps(fit: Fit, config: Path) -> None:
    short = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 1]
    small = ["--data.eval_windows", 2, "--generate.max_new_tokens", 4, "--trainer.accelerator", "cpu"]
    result = fit(*short, *small, *SMALLER_FLAGS.get(config.stem, []), config=str(config))
    assert result.status == 0, result.err
    logged = points(Path(f"logs/{config.stem}/version_0"))
    assert [step for step, _ in logged["loss/train"]] == [1, 2]
    at_start = [] if config.stem == "shakespeare_fast" else [0]
    assert [step for step, _ in logged["loss/val"]] == [*at_start, 2]


@pytest.mark.parametrize("config", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiment_comment_has_command_and_expectation_but_no_measured_figures(config: Path) -> None:
    comment = "".join(line for line in config.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert "python scripts/fit.py" in comment
    assert "Expect" in comment or "It takes" in comment
    assert not re.search(r"tokens/s|loss/val [0-9]|[0-9] s\b", comment)  # docs/performance.md has the measured figures


@pytest.mark.parametrize("config", OVERLAYS, ids=lambda path: path.stem)
def test_overlay_comment_has_command_with_an_experiment(config: Path) -> None:
    assert f"--config configs/gpt2.yaml --config configs/{config.name}" in config.read_text(encoding="utf-8")


@pytest.mark.parametrize("config", EXPERIMENTS + OVERLAYS, ids=lambda path: path.stem)
def test_config_has_known_sections_only(config: Path) -> None:
    assert set(yaml.safe_load(config.read_text(encoding="utf-8"))) <= {*SECTIONS, "validate_at_start"}


def test_gpt2_config_requires_data_files(fit: Fit) -> None:
    result = fit(config=str(ROOT / "configs" / "gpt2.yaml"))
    assert (result.status, result.out, result.err) == (2, "", "error: no file to read: give --data.files PATH\n")
    assert not Path("logs").exists()


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:The number of training batches",
    "ignore:You defined a `validation_step` but have no `val_dataloader`",
)
def test_course_takes_the_steps_of_adamw_over_all_parameters() -> None:
    settings = yaml.safe_load((ROOT / "configs" / "course.yaml").read_text(encoding="utf-8"))
    shape = {**settings["model"].pop("config"), "dropout": 0.0}
    module = LitGPT(GPTConfig(vocab_size=50, **shape), **settings["model"])
    theirs = copy.deepcopy(module.gpt)
    ids = torch.randint(50, (12, 17), generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(ids[:, :-1], ids[:, 1:]), batch_size=settings["data"]["batch_size"])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    clip = settings["trainer"]["gradient_clip_val"]
    trainer = Trainer(accelerator="cpu", max_steps=3, gradient_clip_val=clip, enable_model_summary=False, **quiet)
    trainer.fit(module, loader)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    for tokens, targets in loader:
        optimizer.zero_grad()
        theirs.loss(tokens, targets).backward()
        optimizer.step()
    for (name, one), other in zip(module.gpt.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6, msg=name)


# ------------------------------------------------------------------------------------------ defaults in one place


def write_table(path: str) -> None:
    """Write a table of one column, whose name is not that of the built-in table's column."""
    Path(path).write_text("verse\n" + "".join(f"line {i} of {i * i} verses\n" for i in range(2000)), encoding="utf-8")


SHORT = [
    *("--trainer.max_steps", 3, "--trainer.log_every_n_steps", 1, "--trainer.accelerator", "cpu"),
    *("--data.eval_windows", 2, "--generate.prompts", "[]"),
]


def test_config_with_only_data_files_gives_same_run_as_flag(fit: Fit) -> None:
    write_table("mine.csv")
    Path("mine.yaml").write_text("data: {files: mine.csv}\n", encoding="utf-8")
    assert fit(*SHORT, config="mine.yaml").status == 0
    assert fit(*SHORT, "--data.files", "mine.csv", config=None).status == 0
    by_config, by_flag = (Path(f"logs/{name}/version_0") for name in ("mine", "default"))
    settings = [yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) for run in (by_config, by_flag)]
    assert [saved.pop("name") for saved in settings] == ["mine", "default"]
    assert settings[0] == settings[1]
    trained = [weights(run / "last.ckpt") for run in (by_config, by_flag)]
    assert trained[0].keys() == trained[1].keys()
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
    assert points(by_config)["loss/train"] == points(by_flag)["loss/train"]


def test_config_without_files_trains_on_built_in_table(fit: Fit) -> None:
    Path("wide.yaml").write_text("model: {learning_rate: 1.0e-3}\n", encoding="utf-8")
    assert fit(*SHORT, config="wide.yaml").status == 0
    assert fit(*SHORT, "--model.learning_rate", 1e-3, config=None).status == 0
    one, other = (weights(Path(f"logs/{name}/version_0/last.ckpt")) for name in ("wide", "default"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_default_config_only_names_built_in_table() -> None:
    assert yaml.safe_load(DEFAULT.read_text(encoding="utf-8")) == {"data": {"files": SAMPLE_FILE}}


def test_model_and_data_have_same_default_context_length() -> None:
    assert TextDataModule().context_length == GPTConfig(vocab_size=1).context_length


def test_built_in_column_is_default_of_built_in_table_only() -> None:
    def columns(**settings: Any) -> tuple[str, ...] | None:
        return TextDataModule(**settings).corpus_config.read_options.columns

    assert columns() == columns(files=[SAMPLE_FILE]) == ("name",)
    assert columns(columns="price") == ("price",)
    assert columns(template="{id} {name}") is None
    assert columns(mode="raw") is None
    assert columns(files="mine.csv") is None
    assert columns(files=[SAMPLE_FILE, "mine.csv"]) is None


@pytest.mark.parametrize(
    "flags", [["--data.files", "mine.csv"], ["--data.files=mine.csv"]], ids=["two words", "one word"]
)
def test_last_checkpoint_is_found_without_a_config(fit: Fit, flags: list[str]) -> None:
    write_table("mine.csv")
    assert fit(*SHORT, *flags, "--name", "mine", "--ckpt_path", "auto", config=None).status == 0
    result = fit(*SHORT, *flags, "--name", "mine", "--ckpt_path", "last", "--trainer.max_steps", 4, config=None)
    assert result.status == 0, result.err
    assert "resumed     logs/mine/version_0/last.ckpt, step 3" in result.out


def test_last_checkpoint_is_looked_for_in_root_dir_of_last_config(fit: Fit) -> None:
    text = Path("small.yaml").read_text(encoding="utf-8").replace("trainer: {", "trainer: {default_root_dir: runs, ")
    Path("small.yaml").write_text(text, encoding="utf-8")
    Path("overlay.yaml").write_text("trainer: {default_root_dir: other}\n", encoding="utf-8")
    overlaid = ["--config", "overlay.yaml", "--ckpt_path", "last"]
    assert fit(*overlaid[:-1], "auto", "--trainer.max_steps", 3).status == 0
    assert "resumed     other/small/version_0/last.ckpt, step 3" in fit(*overlaid).out
