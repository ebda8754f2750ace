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

import lit_gpt.cli.fit
import lit_gpt.cli.planned
from lit_gpt.checkpoint.store import Checkpoint
from lit_gpt.cli.arguments import CommandLine
from lit_gpt.cli.budget import Budget, format_budget, parse_duration, usual_budget
from lit_gpt.cli.experiment import build_experiment
from lit_gpt.cli.planned import Planned, split_flags
from lit_gpt.errors import UserError
from lit_gpt.model import GPTConfig
from lit_gpt.planning.overheads import Overheads
from lit_gpt.planning.plan import Plan
from lit_gpt.runs.summary import read_summary
from lit_gpt.training.deadline import Deadline
from lit_gpt.training.module import LitGPT
from lit_gpt.training.pace import Pace
from lit_gpt.training.steps_in_time import StepsInTime
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
    save_config = build_experiment(CommandLine(list(args), DEFAULT), GracefulStop()).save_config
    return None if save_config is None else save_config.text


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
        (["--trainer.min_steps", 5], "--trainer.min_steps 5 both say how long to train"),
        (["--preflight"], "give --budget 100s --plan, and --preflight with the command that it prints"),
        (["--trainer.fast_dev_run", "true"], "--trainer.fast_dev_run does not: leave one out"),
        (["--trainer.barebones", "true"], "--trainer.barebones does not: leave one out"),
        (["--trainer.overfit_batches", 2], "--trainer.overfit_batches does not: leave one out"),
        (["--trainer.devices", 2], "measures one device: give --trainer.devices 1"),
        (["--trainer.accumulate_grad_batches", 2], "give --data.global_batch_size, the windows in a step"),
        (["--trainer.strategy", "ddp"], "measures one device: leave out --trainer.strategy"),
        (["--budget", "10"], "--budget 10 has no unit"),
        (["--budget", "100ms"], "is no time"),
        (["--budget", "0.1s"], "--budget 0.1s is too short: start-up takes"),
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
    deadline.on_train_batch_start(trainer)  # a validation takes 3 s, of which 1.3 times 4 s follow
    now[0] = 92.7
    assert not deadline.is_reached()
    now[0] = 92.9
    assert deadline.is_reached()


def test_tokenizing_that_leaves_no_time_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan({}, step_seconds=0.1, validation_seconds=2.0)
    planned = Planned(plan, Budget("100s", 100.0, 0.0), Overheads(), False)
    monkeypatch.setattr("time.perf_counter", lambda: 85.0)
    planned.check_time_left()
    monkeypatch.setattr("time.perf_counter", lambda: 93.0)
    with pytest.raises(UserError, match=r"--budget 100s is too short: 93 s of it are used when the text is tokenized"):
        planned.check_time_left()


# ---------------------------------------------------------------------------------------------- the number of steps


class TimedRun:
    """A run of 1,000 planned steps of 90 ms, with validations of 0.3 s, whose last checkpoint is due at 93 s.

    Args:
        step_seconds: How long a step takes. The first one takes 1 s longer.
        interval: Steps between validations.
        stall: How much longer the step 30 takes, in seconds.
        later_seconds: How long steps take from 15 s on; None: as before.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        step_seconds: float,
        interval: int = 100,
        stall: float = 0.0,
        later_seconds: float | None = None,
    ) -> None:
        self.now, self.step_seconds, self.interval, self.stall = 0.0, step_seconds, interval, stall
        self.later_seconds = later_seconds
        monkeypatch.setattr("time.perf_counter", lambda: self.now)
        module = LitGPT(GPTConfig(257, d_model=16, num_blocks=1), schedule="linear", decay_share=0.5, warmup_steps=0)
        module.max_steps = 1000
        self.loop = SimpleNamespace(max_steps=1000)
        self.trainer: Any = SimpleNamespace(
            global_step=0,
            should_stop=False,
            enable_validation=True,
            fit_loop=SimpleNamespace(epoch_loop=self.loop),
            progress_bar_callback=None,
        )
        data = SimpleNamespace(plan=SimpleNamespace(last_step=1000, validation_interval=interval))
        monkeypatch.setattr("lit_gpt.training.steps_in_time.module_and_data", lambda trainer: (module, data))
        self.callback = StepsInTime(93.0, step_seconds=0.09, validation_seconds=0.3)
        self.changed_at: list[int] = []

    def end(self) -> float:
        """Return when the run ends."""
        self.now = 1.0
        while self.trainer.global_step < self.loop.max_steps:
            before, step = self.loop.max_steps, self.trainer.global_step
            self.callback.on_train_batch_start(self.trainer)
            self.changed_at += [step] if self.loop.max_steps != before else []
            if self.later_seconds is not None and self.now > 15:
                self.step_seconds = self.later_seconds
            self.now += self.step_seconds + (self.stall if step == 30 else 0.0)
            self.trainer.global_step += 1
            if self.trainer.global_step % self.interval == 0 or self.trainer.global_step == self.loop.max_steps:
                self.callback.on_validation_start(self.trainer, None)  # type: ignore[arg-type]
                self.now += 0.3 * max(1.0, self.step_seconds / 0.09)
        return self.now


@pytest.mark.parametrize("interval", [4, 100, 10_000])
@pytest.mark.parametrize("step_seconds", [0.01, 0.03, 0.05, 0.08, 0.2, 0.4])
def test_steps_and_validations_fill_the_time(
    monkeypatch: pytest.MonkeyPatch, step_seconds: float, interval: int
) -> None:
    run = TimedRun(monkeypatch, step_seconds, interval)
    assert run.end() == pytest.approx(93.0, rel=0.03)
    assert 0 < run.changed_at[0] <= max(13, 0.12 * run.loop.max_steps)
    assert run.changed_at[-1] < 0.5 * run.loop.max_steps


def test_steps_stay_where_they_take_the_expected_time_or_one_of_them_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TimedRun(monkeypatch, 0.0885)
    assert run.end() == pytest.approx(93.0, rel=0.03)
    assert run.loop.max_steps == 1000
    stalled = TimedRun(monkeypatch, 0.0885, stall=5.0)
    assert stalled.end() == pytest.approx(93.0, rel=0.05)


@pytest.mark.parametrize("later_seconds", [0.06, 0.12])
def test_steps_that_become_faster_or_slower_fill_the_time(
    monkeypatch: pytest.MonkeyPatch, later_seconds: float
) -> None:
    run = TimedRun(monkeypatch, 0.09, later_seconds=later_seconds)
    assert run.end() == pytest.approx(93.0, rel=0.07)


def test_steps_are_as_few_as_the_rates_so_far_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    run = TimedRun(monkeypatch, 5.0)  # 12 steps are taken when their time is known, and 18 would fit
    assert run.end() > 93.0
    assert 0.5 * run.loop.max_steps == pytest.approx(12, abs=1)


def change_steps(monkeypatch: pytest.MonkeyPatch, last_step: int) -> None:
    """Make a run change its number of steps after its third step."""
    monkeypatch.setattr(Pace, "MIN_STEPS", 1)
    monkeypatch.setattr(StepsInTime, "_steps_left", lambda steps, trainer, *times: last_step - trainer.global_step)


CONSTANT_FIRST = ["--model.schedule", "linear", "--model.decay_share", "0.4", "--model.warmup_steps", "0"]


def test_run_whose_steps_change_equals_one_that_began_with_them(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_steps(monkeypatch, 10)
    changed = fit(*TABLE, *CONSTANT_FIRST, "--name", "small", config=None)
    assert changed.status == 0, changed.err
    assert "steps       10, not 6: a step takes" in changed.out
    assert yaml.safe_load((RUN / "config.yaml").read_text())["trainer"]["max_steps"] == 10
    assert fit("--config", str(RUN / "config.yaml"), "--name", "explicit", config=None).status == 0
    explicit = Path("logs/explicit/version_0")
    assert lasting_points(RUN) == lasting_points(explicit)
    saved = [Checkpoint.open(run / "last.ckpt") for run in (RUN, explicit)]
    configs = [yaml.safe_load(checkpoint.config_text or "") for checkpoint in saved]
    assert {**configs[0], "name": "explicit"} == configs[1]
    summaries = [read_summary(run) for run in (RUN, explicit)]
    assert summaries[0].max_steps == summaries[1].max_steps == 10
    assert summaries[0].settings == summaries[1].settings
    assert summaries[0].defaults == summaries[1].defaults
    for name, weight in weights(explicit / "last.ckpt").items():
        assert torch.equal(weight, weights(RUN / "last.ckpt")[name])


@pytest.mark.parametrize("stop_step", [3, 7])
def test_stopped_run_resumes_with_the_changed_steps(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch, stop_step: int
) -> None:
    """The settings are partly from a config, which the command to resume gives again."""
    Path("part.yaml").write_text("model:\n  config:\n    dropout: 0.1\n")
    command = [*TABLE, *CONSTANT_FIRST, "--config", "part.yaml"]
    change_steps(monkeypatch, 10)
    assert fit(*command, "--name", "straight", config=None).status == 0
    with monkeypatch.context() as patches:
        patches.setattr(Deadline, "is_reached", lambda deadline: deadline._step == stop_step)
        stopped = fit(*command, "--name", "small", config=None)
    assert f"stopped at step {stop_step} of 10" in stopped.err
    words = shlex.split(stopped.err.splitlines()[-1].partition("; complete it with: ")[2])
    resumed = fit(*words[words.index("fit.py") + 1 :], config=None)
    assert resumed.status == 0, resumed.err
    assert Checkpoint.open(RUN / "last.ckpt").step == 10
    assert lasting_points(RUN) == lasting_points(Path("logs/straight/version_0"))


def test_checkpoint_holds_the_changed_steps_at_once(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed after the change, and before its next checkpoint, resumes with the new number."""
    change_steps(monkeypatch, 10)
    real_save_steps = lit_gpt.cli.fit.save_steps
    saved: list[tuple[int, Any]] = []

    def save_steps(*args: Any) -> None:
        real_save_steps(*args)
        checkpoint = Checkpoint.open(RUN / "last.ckpt")
        saved.append((checkpoint.step, yaml.safe_load(checkpoint.config_text or "")["trainer"]["max_steps"]))

    monkeypatch.setattr(lit_gpt.cli.fit, "save_steps", save_steps)
    assert fit(*TABLE, *CONSTANT_FIRST, "--name", "small", config=None).status == 0
    assert saved == [(3, 10)]


def test_steps_stay_where_the_rates_so_far_depend_on_them(
    fit: Fit, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    change_steps(monkeypatch, 10)
    result = fit(*TABLE, "--model.schedule", "cosine", "--name", "small", config=None)
    assert result.status == 0, result.err
    assert "not 6" not in result.out
    assert Checkpoint.open(RUN / "last.ckpt").step == 6


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
