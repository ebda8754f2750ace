"""A path that begins with `~` is in the home folder, wherever a person writes it; `./~` is a file of that name."""

import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Fit

from lit_gpt import UserError
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.consolidate import main as consolidate_main
from lit_gpt.cli.generate import main as generate_main
from lit_gpt.data.sources import find_sources
from lit_gpt.files import expand_path


@pytest.fixture
def home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the home folder, which is not the working folder."""
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def test_paths_of_a_run_may_be_in_the_home_folder(fit: Fit, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("rows.txt", "small.yaml"):
        shutil.move(name, home / name)
    flags = ["--data.files", "~/rows.txt", "--trainer.default_root_dir", "~/runs"]
    trained = fit(*flags, "--trainer.max_steps", 1, config="~/small.yaml")
    assert trained.status == 0, trained.err
    run = home / "runs" / "small" / "version_0"
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert (saved["data"]["files"], saved["trainer"]["default_root_dir"]) == ("~/rows.txt", "~/runs")  # as typed
    path = "~/runs/small/version_0/last.ckpt"
    resumed = fit("--ckpt_path", path, "--trainer.max_steps", 2, config=None)
    assert (resumed.status, resumed.err) == (0, "")
    assert Checkpoint.open(run / "last.ckpt").step == 2
    again = fit("--ckpt_path", "last", *flags, "--trainer.max_steps", 3, config="~/small.yaml")
    assert "version_0/last.ckpt, step 2\n" in again.out
    assert fit("validate", "--ckpt_path", path, config=None).status == 0
    assert generate_main(["--ckpt_path", path, "--max_new_tokens", "1"]) == 0
    assert consolidate_main([path, "~/one.ckpt"]) == 0
    assert (home / "one.ckpt").exists()
    assert sorted(path.name for path in Path().iterdir()) == ["data", "home"]


def test_checkpoint_that_a_config_names_may_be_in_the_home_folder(fit: Fit, home: Path) -> None:
    assert fit("--trainer.max_steps", 1, "--name", "other").status == 0
    shutil.move("logs/other/version_0/last.ckpt", home / "last.ckpt")
    Path("resume.yaml").write_text("ckpt_path: ~/last.ckpt\n", encoding="utf-8")
    resumed = fit("--config", "resume.yaml", "--trainer.max_steps", 2)
    assert f"{home}/last.ckpt, step 1" in " ".join(resumed.out.split()).replace("- ", "-")


def test_path_below_a_folder_called_tilde_is_no_path_of_the_home_folder(
    fit: Fit, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("~").mkdir()
    shutil.move("small.yaml", "./~")
    root, config = ["--trainer.default_root_dir", "./~"], "./~/small.yaml"
    assert fit(*root, "--trainer.max_steps", 1, config=config).status == 0
    path = "./~/small/version_0/last.ckpt"
    assert Path(path).exists()
    assert fit(*root, "--ckpt_path", "last", "--trainer.max_steps", 2, config=config).status == 0
    assert Checkpoint.open(path).step == 2
    assert fit("validate", "--ckpt_path", path, config=None).status == 0
    assert generate_main(["--ckpt_path", path, "--max_new_tokens", "1"]) == 0
    assert consolidate_main([path, "./~/one.ckpt"]) == 0
    assert Path("./~/one.ckpt").exists()
    Path("./~/a").write_text("row\n", encoding="utf-8")
    assert [source.name for source in find_sources("./~/a")] == ["~/a"]
    with pytest.raises(UserError, match=r"^~ is a folder: give its files"):
        find_sources("~")
    assert list(home.iterdir()) == []


def test_unknown_user_is_an_ordinary_name() -> None:
    assert expand_path("~nobody_has_this_name/x") == Path("~nobody_has_this_name/x")
