"""`--budget`: from the command line to the planner and back, and the end of a run whose steps take too long."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import DEFAULT, Fit, points, texts, weights
from jsonargparse import Namespace

import lit_gpt.cli.planned
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.budget import Budget, format_budget, parse_duration, usual_budget
from lit_gpt.cli.experiment import build_experiment
from lit_gpt.cli.planned import Planned, split_flags
from lit_gpt.errors import UserError
from lit_gpt.planning.overheads import Overheads
from lit_gpt.planning.plan import Plan
from lit_gpt.runs.summary import read_summary
from lit_gpt.training.deadline import Deadline
from lit_gpt.training.stop import GracefulStop

RUN = Path("logs/small/version_0")
TABLE = ["--data.files", "rows.txt", "--budget", "100s"]
CHOSEN: dict[str, Any] = {
    "data.tokenizer": "char",
    "data.batch_size": 4,
    "data.eval_windows": 8,
    "model.config.context_length": 16,
    "model.config.d_model": 16,
    "model.config.num_blocks": 1,
    "model.config.num_heads": 2,
    "model.betas": (0.8, 0.95),
    "model.min_learning_rate": 0.0,
    "trainer.max_steps": 6,
    "trainer.val_check_interval": 3,
    "trainer.gradient_clip_val": None,
}


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put a planner of fixed choices in the place of the real one; return what is given to it, by name."""
    received: dict[str, Any] = {}

    def make_plan(sources: Any, config: Any, given: dict[str, Any], seconds: float, *others: Any) -> Plan:
        received.update(given, seconds=seconds)
        settings = {key: value for key, value in CHOSEN.items() if key not in given}
        return Plan(settings, [("tokenizer   char", "the text is short"), ("steps       6", "for a test")])

    monkeypatch.setattr(lit_gpt.cli.planned, "make_plan", make_plan)
    return received


# --------------------------------------------------------------------------------------------------------- durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("1.5h", 5400), ("1h 30m", 5400)],
)
def test_duration_is_read_with_its_units(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("600", "--budget 600 has no unit: give a unit, as 90s"),
        ("1.5", "has no unit"),
        ("10min", "--budget '10min' is no time: give a number and a unit"),
        ("30m1h", "is no time"),
        ("-5m", "is no time"),
        ("", "is no time"),
        ("0s", "leaves no time"),
    ],
)
def test_duration_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        parse_duration(text)


def test_proposed_budget_is_a_usual_one_that_is_long_enough() -> None:
    assert [usual_budget(seconds) for seconds in (8, 21, 61, 3601, 100_000)] == ["10s", "30s", "90s", "2h", "2d"]
    for seconds in (45, 60, 90, 120, 600, 5400, 7200, 86_400):
        assert parse_duration(format_budget(seconds)) == seconds


# ------------------------------------------------------------------------------------------------- to the planner


def test_planner_is_told_what_flags_and_configs_give(fit: Fit, given: dict[str, Any]) -> None:
    Path("part.yaml").write_text("model: {config: {d_model: 32}}\ntrainer: {max_steps: 900}\n")
    flags = ["--data.batch_size", 8, "--trainer.max_steps", -1]  # -1 is no limit
    result = fit("--data.files", "rows.txt", *flags, "--budget", "100s", "--plan", config="part.yaml")
    assert result.status == 0, result.err
    seconds = given.pop("seconds")
    assert given == {"data.files": "rows.txt", "data.batch_size": 8, "model.config.d_model": 32}  # not max_steps
    assert 0 < seconds < 100


def test_defaults_need_not_go_with_what_is_given(fit: Fit, given: dict[str, Any]) -> None:
    """The default of 4 heads does not divide the width; the planner chooses 2."""
    result = fit(*TABLE, "--model.config.d_model", 100, "--plan", config=None)
    assert result.status == 0, result.err
    result = fit(*TABLE, "--model.config.d_model", 101, "--plan", config=None)
    assert (result.status, result.out) == (2, "")
    assert (
        "chooses settings that do not go with the given ones: --model.config: num_heads 2 does not divide" in result.err
    )


def test_default_config_gives_nothing_to_the_planner(fit: Fit, given: dict[str, Any]) -> None:
    result = fit("--budget", "100s", "--plan", config=None)
    assert result.status == 0, result.err
    assert list(given) == ["seconds"]


# --------------------------------------------------------------------------------------------- and back to a command


def config_text(*args: str) -> str | None:
    """Return what config.yaml of a command would hold, without running it."""
    return build_experiment(CommandLine(list(args), DEFAULT), GracefulStop()).config_text


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--config", "part.yaml", "--data.columns+", "line", "--model.learning_rate=1e-3", "--name", "a b"[:1]],
        ["--model.config.dropout", "0.5", "--model.config.dropout", "0.1", "--generate.prompts", "one 'two'"],
    ],
    ids=["few", "config", "twice"],
)
def test_plan_prints_a_command_of_equal_settings_and_leaves_no_run(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list
) -> None:
    Path("part.yaml").write_text("model: {config: {d_model: 32}}\ntrainer: {max_steps: 900}\n")
    Path("rows.csv").write_text("line\n" + Path("rows.txt").read_text(encoding="utf-8"), encoding="utf-8")
    table = ["--data.files", "rows.csv", *flags]
    result = fit(*table, "--budget", "100s", "--plan", config=None)
    assert result.status == 0, result.err
    assert not Path("logs").exists()
    assert "tokenizer   char   the text is short\nsteps       6      for a test\n" in result.out
    words = shlex.split(result.out.partition("command     ")[2].replace("\\\n", ""))
    assert words[1] == "fit.py"
    names = [word for word in words if word.startswith("--")]
    assert len(names) == len(set(names))
    assert not {"--budget", "--plan"} & set(names)
    chosen = [f"--{key}={value}".replace("None", "null") for key, value in CHOSEN.items()]
    chosen = [flag.replace("(", "[").replace(")", "]") for flag in chosen if flag.partition("=")[0][2:] not in given]
    monkeypatch.setattr(sys, "argv", ["fit.py"])
    assert config_text(*words[2:]) == config_text(*table, *chosen)
    assert "budget" not in (config_text(*words[2:]) or "budget")


def test_flags_are_listed_once_with_the_last_value() -> None:
    args = ["--a.b", "1", "--c=x y", "--a.b", "2", "--plan", "--d=-1", "--f+", "u", "--f+", "v", "--budget", "9m"]
    assert split_flags(args) == [["--c", "x y"], ["--a.b", "2"], ["--d=-1"], ["--f+", "u"], ["--f+", "v"]]


def test_run_with_a_budget_saves_explicit_settings_and_resumes_without_it(fit: Fit, given: dict[str, Any]) -> None:
    result = fit(*TABLE, "--name", "small", config=None)
    assert result.status == 0, result.err
    assert re.search(r"^time        \d.* of --budget 100s$", result.out, re.MULTILINE)
    saved = yaml.safe_load((RUN / "config.yaml").read_text(encoding="utf-8"))
    assert not {"budget", "plan"} & saved.keys()
    assert (saved["data"]["tokenizer"], saved["model"]["config"]["d_model"]) == ("char", 16)
    assert (saved["trainer"]["max_steps"], saved["model"]["betas"]) == (6, [0.8, 0.95])
    summary = read_summary(RUN)
    assert (summary.status, summary.step, summary.settings["data.batch_size"]) == ("finished", 6, 4)
    resumed = fit("--name", "small", "--ckpt_path", "last", config=None)
    assert resumed.status == 0, resumed.err
    assert "already complete at step 6" in resumed.out
    assert "changed" not in resumed.out


# --------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--trainer.max_steps", 9], "--budget 100s and --trainer.max_steps 9 both say how long to train"),
        (["--trainer.max_epochs", 2], "--trainer.max_epochs 2 both say how long to train"),
        (["--trainer.max_time", "00:00:01:00"], "--trainer.max_time 00:00:01:00 both say"),
        (["--preflight"], "give --budget 100s --plan, and --preflight with the command that it prints"),
        (["--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run does not: leave one out"),
        (["--trainer.barebones", "true"], "--trainer.barebones does not: leave one out"),
        (["--trainer.overfit_batches", 2], "--trainer.overfit_batches does not: leave one out"),
        (["--trainer.devices", 2], "measures one device: give --trainer.devices 1"),
        (["--trainer.accumulate_grad_batches", 2], "give --data.global_batch_size, the windows in a step"),
        (["--trainer.strategy", "ddp"], "measures one device: leave out --trainer.strategy"),
        (["--budget", "10"], "--budget 10 has no unit"),
        (["--budget", "100ms"], "is no time"),
        (["--budget", "0.1s"], "--budget 0.1s is too short: start-up alone takes"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_budget_is_refused_where_it_makes_no_sense(
    fit: Fit, given: dict[str, Any], flags: list[object], message: str
) -> None:
    result = fit(*TABLE, *flags, config=None)
    assert (result.status, result.err.count("\n")) == (2, 1)
    assert message in result.err
    assert not Path("logs").exists()
    assert not Path("data").exists()


def test_plan_needs_a_budget(fit: Fit) -> None:
    result = fit("--plan")
    assert result.status == 2
    assert "give --budget too, as --budget 10m --plan" in result.err


def test_choice_that_does_not_go_with_a_given_setting_is_refused_before_it_is_printed(
    fit: Fit, given: dict[str, Any]
) -> None:
    result = fit(*TABLE, "--data.vocab", "full", "--plan", config=None)  # the tokenizer "char" is chosen
    assert (result.status, result.out) == (2, "")
    assert "--budget 100s chooses settings that do not go with the given ones: --data.vocab full is for" in result.err


@pytest.mark.parametrize("key", ["budget: 10m", "plan: true"])
def test_config_with_a_budget_is_refused(fit: Fit, key: str) -> None:
    Path("part.yaml").write_text(key)
    result = fit(config="part.yaml")
    assert result.status == 2
    assert f"part.yaml: {key.partition(':')[0]} holds for one command only: give it as a flag" in result.err


def test_printed_config_without_a_budget_can_be_used(fit: Fit) -> None:
    Path("part.yaml").write_text("budget: null\nplan: false\n")
    assert "no such file" in fit("--data.files", "nowhere.txt", config="part.yaml").err


def test_budget_beside_a_checkpoint_is_refused(fit: Fit, given: dict[str, Any]) -> None:
    assert fit("--budget", "100s", "--ckpt_path", "auto").status == 0  # there is none: starts
    for choice in ("last", "auto", RUN / "last.ckpt"):
        result = fit("--budget", "100s", "--ckpt_path", choice)
        assert result.status == 2
        assert "--budget 100s leaves nothing to choose beside --ckpt_path" in result.err
    for command in ("validate", "test"):
        result = fit(command, "--budget", "100s")
        assert result.status == 2
        assert f"--budget 100s is for training: leave out --budget or {command}" in result.err


# --------------------------------------------------------------------------------------------------------- the time


def test_deadline_leaves_time_for_the_longest_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    deadline = Deadline(100.0, ending_seconds=10.0, report_seconds=1.0, text="100s")
    trainer: Any = SimpleNamespace(checkpoint_callback=None, global_step=0)
    for start, step in ((80.0, 0), (81.0, 0), (82.0, 1)):  # a step of two batches takes 2 s
        now[0], trainer.global_step = start, step
        deadline.on_train_batch_start(trainer)
    now[0] = 87.9
    assert not deadline.is_reached()
    now[0] = 88.1  # a step, and the estimate of 10 s
    assert deadline.is_reached()
    now[0] = 82.0
    deadline.on_validation_start(trainer, None)  # type: ignore[arg-type]
    now[0], trainer.global_step = 85.0, 2
    deadline.on_train_batch_start(trainer)  # a validation takes 3 s, of which 1.5 times 4 s follow
    now[0] = 91.9
    assert not deadline.is_reached()
    now[0] = 92.1
    assert deadline.is_reached()


def planned(prepare_seconds: float, step_seconds: float | None = 0.1) -> Planned:
    """Return a plan of a command with 100 s, made at 0 s."""
    plan = Plan({"trainer.val_check_interval": 30}, prepare_seconds=prepare_seconds, step_seconds=step_seconds)
    return Planned(plan, Budget("100s", 100.0, 0.0), Overheads(), 0.0, False)


@pytest.mark.parametrize(
    ("prepare_seconds", "steps", "interval", "notice"),
    [
        (11.0, 300, 30, ""),  # 1 s is little
        (15.0, 350, 35, "steps       350, not 300: the text was tokenized sooner than expected"),
        (5.0, 250, 25, "steps       250, not 300: the text was tokenized later than expected"),
    ],
)
def test_steps_follow_the_time_of_tokenizing(
    monkeypatch: pytest.MonkeyPatch, prepare_seconds: float, steps: int, interval: int, notice: str
) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 10.0)
    trainer = Namespace(max_steps=300, val_check_interval=30)
    assert planned(prepare_seconds).correct_steps(trainer) == notice
    assert (trainer.max_steps, trainer.val_check_interval) == (steps, interval)


def test_tokenizing_that_leaves_no_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.perf_counter", lambda: 90.0)
    with pytest.raises(UserError, match=r"--budget 100s is too short: 90 s of it are used when the text is tokenized"):
        planned(10.0).correct_steps(Namespace(max_steps=300, val_check_interval=30))


def lasting_points(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the points of all curves that do not depend on the machine."""
    return {tag: found for tag, found in points(run).items() if not tag.startswith(("speed", "memory"))}


def test_run_that_is_too_slow_ends_in_time_and_resumes_as_if_never_stopped(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop is at step 4, between two validations, and the loss there is the lowest so far."""
    assert fit(*TABLE, "--name", "straight", config=None).status == 0
    with monkeypatch.context() as patches:
        steps = iter(range(100))
        patches.setattr(Deadline, "is_reached", lambda deadline: next(steps) == 4)
        stopped = fit(*TABLE, "--name", "small", config=None)
    assert stopped.status == 0
    message, _, command = stopped.err.splitlines()[-1].partition("; complete it with: ")
    assert message.startswith("stopped at step 4 of 6, because --budget 100s ends")
    assert "budget" not in command
    summary = read_summary(RUN)
    assert (summary.status, summary.step, summary.best_step) == ("stopped", 4, 4)
    assert [step for step, _ in points(RUN)["loss/val"]] == [0, 3, 4]
    assert sorted(texts(RUN)) == [0, 3, 4]
    assert (RUN / "report.html").exists()
    assert [Checkpoint.open(RUN / name).step for name in ("best.ckpt", "last.ckpt")] == [4, 4]
    words = shlex.split(command)
    resumed = fit(*words[words.index("fit.py") + 1 :], config=None)
    assert resumed.status == 0, resumed.err
    assert "resumed     logs/small/version_0/last.ckpt, step 4" in resumed.out
    straight = Path("logs/straight/version_0")
    curves = [
        {k: v for k, v in points(run).items() if not k.startswith(("speed", "memory"))} for run in (RUN, straight)
    ]
    assert curves[0] == curves[1]
    for name, weight in weights(straight / "last.ckpt").items():
        assert torch.equal(weight, weights(RUN / "last.ckpt")[name])
