"""Every config in configs/ is a whole experiment, or is laid over one: it tells its story, and it trains."""

from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Fit, points

OVERLAYS = [ROOT / "configs" / name for name in ("ddp.yaml", "fsdp.yaml")]  # test_cli and test_sharding train with them
CONFIGS = sorted({*(ROOT / "configs").glob("*.yaml")} - {*OVERLAYS})

# a hundred-megabyte model takes its steps with two blocks, on a few short windows; Shakespeare is not in the house
SMALLER = {
    "gpt2": [
        *("--model.config.context_length", "32", "--model.config.num_blocks", "2"),
        *("--data.batch_size", "1", "--data.global_batch_size", "2"),
        *("--model.compile", "false", "--trainer.precision", "32-true"),
        *("--trainer.enable_checkpointing", "false"),  # 1.5 GB each
    ],
    "shakespeare_char": ["--data.files", str(ROOT / "LICENSE")],
    "shakespeare_fast": ["--data.files", str(ROOT / "LICENSE")],
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_takes_two_steps(fit: Fit, config: Path) -> None:
    short = ["--trainer.max_steps", 2, "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 1]
    small = ["--data.eval_windows", 2, "--generate.max_new_tokens", 4, "--trainer.accelerator", "cpu"]
    result = fit(*short, *small, *SMALLER.get(config.stem, []), config=str(config))
    assert result.status == 0, result.err
    logged = points(Path(f"logs/{config.stem}/version_0"))
    assert [step for step, _ in logged["loss/train"]] == [1, 2]
    assert [step for step, _ in logged["loss/val"]] == [2]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_tells_its_story(config: Path) -> None:
    story = "".join(line for line in config.read_text(encoding="utf-8").splitlines(True) if line.startswith("#"))
    assert "python scripts/fit.py" in story
    assert "not measured yet" not in story
    assert "loss/val" in story or "Not measured" in story


@pytest.mark.parametrize("config", OVERLAYS, ids=lambda path: path.stem)
def test_an_overlay_says_what_it_is_laid_over(config: Path) -> None:
    assert f"--config configs/gpt2.yaml --config configs/{config.name}" in config.read_text(encoding="utf-8")


@pytest.mark.parametrize("config", CONFIGS + OVERLAYS, ids=lambda path: path.stem)
def test_a_config_has_settings_only_of_known_parts(config: Path) -> None:
    assert set(yaml.safe_load(config.read_text(encoding="utf-8"))) <= {
        "data",
        "model",
        "trainer",
        "generate",
        "checkpoint",
    }
