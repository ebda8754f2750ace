"""Which checkpoint of a run a command takes when no path is given, and what it says where there is none."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Fit, forked
from test_order import CONTENTS
from user_errors import assert_user_error

from lit_gpt import UserError
from lit_gpt.checkpoint.runs import newest_checkpoint, run_names
from lit_gpt.checkpoint.store import Checkpoint, save_checkpoint
from lit_gpt.cli import generate
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.generate import main as generate_main
from lit_gpt.cli.parser import build_parser
from lit_gpt.cli.run_checkpoint import find_checkpoint, no_checkpoint_error

RUNS = {  # path -> step and time
    "poems/version_0/last.ckpt": (9, 1.0),
    "poems/version_0/best.ckpt": (5, 0.5),
    "poems/version_1/last.ckpt": (4, 3.0),
    "poems/version_1/best.ckpt": (2, 2.0),
    "prose/version_0/last.ckpt": (3, 4.0),
    "Verse/version_0/step_00000001.ckpt": (1, 1.5),
}


@pytest.fixture
def logs(folder: Path) -> Path:
    """Return the folder logs/ with the checkpoints `RUNS`."""
    for name, (step, saved_at) in RUNS.items():
        save_checkpoint({**CONTENTS, "global_step": step, "saved_at": saved_at}, Path("logs", name))
    return Path("logs")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["validate", "--name", "poems"], "poems/version_1/best.ckpt"),
        (["test", "--name", "poems", "--ckpt_path", "auto"], "poems/version_1/best.ckpt"),
        (["validate", "--name", "poems", "--ckpt_path", "last"], "poems/version_1/last.ckpt"),
        (["validate", "--name", "prose"], "prose/version_0/last.ckpt"),
        (["validate", "--ckpt_path=best"], "prose/version_0/last.ckpt"),
        (["validate"], "prose/version_0/last.ckpt"),
        (["validate", "--config", "poems.yaml"], "poems/version_1/best.ckpt"),
        (["--name", "poems", "--ckpt_path", "last"], "poems/version_1/last.ckpt"),
        (["--name", "poems", "--ckpt_path", "auto"], "poems/version_1/last.ckpt"),
        (["--name", "poems", "--ckpt_path", "best"], "poems/version_1/best.ckpt"),
        (["--name", "new", "--ckpt_path", "auto"], None),
        (["--name", "poems"], None),
    ],
)
def test_command_takes_the_checkpoint_of_its_purpose(logs: Path, words: list[str], expected: str | None) -> None:
    Path("poems.yaml").write_text("trainer: {max_steps: 3}\n", encoding="utf-8")
    Path("default.yaml").write_text("trainer: {max_steps: 3}\n", encoding="utf-8")
    taken = [arg for arg in CommandLine(words, Path("default.yaml")).args if arg.startswith("--ckpt_path")]
    assert taken == ([f"--ckpt_path=logs/{expected}"] if expected else [])


@pytest.mark.parametrize("name", [None, "poems", "prose", "Verse"])
@pytest.mark.parametrize("choice", [None, "last", "best", "auto"])
def test_validate_and_generate_find_the_same_file(logs: Path, name: str | None, choice: str | None) -> None:
    words = [*(["--name", name] if name else []), *(["--ckpt_path", choice] if choice else [])]
    options = generate.parse_options(words)
    generated_from = generate.open_checkpoint(options.ckpt_path, options.name).path
    assert f"--ckpt_path={generated_from}" in CommandLine(["validate", *words], Path("default.yaml")).args


def test_damaged_best_checkpoint_is_skipped_with_a_warning(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, last = (logs / "poems" / "version_1" / f"{name}.ckpt" for name in ("best", "last"))
    content = bytearray(best.read_bytes())
    weights = torch.ones(3).numpy().tobytes()
    content[content.index(weights)] ^= 1
    best.write_bytes(content)
    checkpoint = find_checkpoint("best", logs, "poems")
    assert checkpoint is not None
    assert checkpoint.path == last
    assert capsys.readouterr().err == f"warning: skipped damaged checkpoints {best}; using {last}\n"


def test_best_checkpoint_of_an_older_version_is_not_taken(logs: Path) -> None:
    (logs / "poems" / "version_1" / "best.ckpt").unlink()
    newest, _ = newest_checkpoint(logs, "poems", prefer_best=True)
    assert newest is not None
    assert (newest.path, newest.step) == (logs / "poems" / "version_1" / "last.ckpt", 4)


def test_copy_of_a_run_beside_it_is_not_newer(logs: Path) -> None:
    shutil.copytree(logs / "poems" / "version_1", logs / "poems" / "version_1_backup")
    for prefer_best, name in ((False, "last.ckpt"), (True, "best.ckpt")):
        newest, _ = newest_checkpoint(logs, "poems", prefer_best=prefer_best)
        assert newest is not None
        assert newest.path == logs / "poems" / "version_1" / name


def test_empty_name_is_no_name_of_a_run(logs: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no checkpoint of '' under logs: give --name with a run"):
        generate.open_checkpoint(None, "")
    with pytest.raises(UserError, match=r"^--name '': use only letters"):
        CommandLine(["--name", "", "--ckpt_path", "last"], Path("default.yaml"))


@pytest.mark.parametrize("typed", ["lats", "LAST", "last.ckpt", "logs/poems/version_1"])
def test_path_that_is_no_checkpoint_reminds_of_last(logs: Path, typed: str) -> None:
    for command in ("fit", "validate"):
        with pytest.raises(UserError, match=r"or --ckpt_path last, the newest one of --name$"):
            CommandLine([command, "--name", "poems", "--ckpt_path", typed], Path("default.yaml"))


def test_null_as_a_flag_wins_over_the_folder_of_runs_in_a_config(logs: Path) -> None:
    Path("poems.yaml").write_text("trainer: {default_root_dir: elsewhere}\n", encoding="utf-8")
    words = ["--config", "poems.yaml", "--ckpt_path", "last", "--trainer.default_root_dir", "null"]
    assert "--ckpt_path=logs/poems/version_1/last.ckpt" in CommandLine(words, Path("default.yaml")).args


def test_error_lists_runs_newest_first_and_suggests_the_similar_one(logs: Path) -> None:
    assert run_names(logs) == ["prose", "poems", "Verse"]
    assert str(no_checkpoint_error(logs, "peoms", "train one")) == (
        "there is no checkpoint of 'peoms' under logs (did you mean 'poems'?): give --name with a run that has one "
        "(newest first: prose, poems, Verse), or train one"
    )
    for number in range(9):
        save_checkpoint({**CONTENTS, "saved_at": 10.0 + number}, logs / f"run{number}" / "version_0" / "last.ckpt")
    message = str(no_checkpoint_error(logs, "x", "train one"))
    assert "(newest first: run8, run7, run6, run5, run4 and 7 more)" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("command", ["fit", "validate", "test", "generate"])
def test_name_without_runs_stops_every_command(
    logs: Path, fit: Fit, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    message = "there is no checkpoint of 'poem' under logs (did you mean 'poems'?): give --name with a run that has one"
    if command == "generate":
        assert generate_main(["--name", "poem"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    else:
        result = fit(command, "--ckpt_path", "last", "--name", "poem")
        assert_user_error(result, message)
        assert ("--ckpt_path auto" in result.err) == (command == "fit")
    assert sorted(path.name for path in logs.iterdir()) == ["Verse", "poems", "prose"]


def test_generate_without_any_run_says_to_train_one(folder: Path) -> None:
    with pytest.raises(UserError, match=r"^there is no checkpoint under logs: train one with scripts/fit.py, or give"):
        generate.open_checkpoint(None, None)


def test_help_describes_the_choices_of_ckpt_path() -> None:
    for command, choices in (("fit", "last best auto"), ("validate", "last best"), ("test", "last best")):
        text = build_parser(command, "default").format_help()
        text = text[text.index("\n  --ckpt_path CKPT_PATH") :].partition("(type")[0]
        assert all(re.search(rf"\b{choice}\b", text) for choice in choices.split())
        assert not re.search("hpc|registry", text)


def test_commands_say_which_checkpoint_they_take(fit: Fit, capsys: pytest.CaptureFixture[str]) -> None:
    trained = fit("--model.schedule", "constant", "--trainer.max_steps", 3)
    best, last = (Path("logs/small/version_0", f"{name}.ckpt") for name in ("best", "last"))
    recommended = re.search(r"more text .*generate.py --ckpt_path (\S+)", trained.out)
    assert recommended is not None
    assert generate_main(["--name", "small", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err == f"[{recommended[1]}]\n" == f"[{best}]\n"
    validated = fit("validate", "--name", "small", config=None)
    assert validated.out.startswith(f"checkpoint  {best}, step {Checkpoint.open(best).step}\n")
    assert f"resumed     {last}, step 3\n" in fit("--ckpt_path", "last").out


def test_printed_commands_can_be_copied_into_a_shell(folder: Path) -> None:
    root = f"out put/{'long_' * 15}诗"
    flags = ["--config", "small.yaml", "--trainer.max_steps", 1, "--trainer.default_root_dir", root]
    out = forked(folder, *flags).out
    more_text, curves = out.partition("more text")[2].split("\ncurves")
    words = [shlex.split(command.replace("\\\n", ""))[1:] for command in (more_text, curves)]
    checkpoint = f"{root}/small/version_0/best.ckpt"
    assert words == [[str(ROOT / "scripts/generate.py"), "--ckpt_path", checkpoint], ["--logdir", root]]
    assert (folder / checkpoint).exists()
