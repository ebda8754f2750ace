"""StepLogger: events that TensorBoard can read, files that can be truncated."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Fit, console_line, event_files, points, tags
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_gpt.errors import UserError
from lit_gpt.training.logger import FORECAST_CHART, StepLogger

RUN = Path("logs/small/version_0")
RUN_FILES = {"best.ckpt", "config.yaml", "last.ckpt", "report.html", "summary.json"}  # besides event files


def hparams_of(folder: Path) -> plugin_data_pb2.SessionStartInfo:
    """Return what a folder's event files say about the settings of the run."""
    metadata = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"]
    return plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info


def test_tensorboard_reads_charts_and_settings(fit: Fit) -> None:
    result = fit("--model.learning_rate", 0.002, "--data.global_batch_size", 8)
    assert result.status == 0, result.err
    events = EventAccumulator(str(RUN), size_guidance={"tensors": 0}).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    (category,) = layout.category
    logged = tags(RUN) | tags(RUN / "val")
    *charts, forecast = category.chart
    assert [(series.value, series.lower, series.upper) for series in forecast.margin.series] == [FORECAST_CHART[1]]
    for chart in charts:
        (pattern,) = chart.multiline.tag
        assert [tag for tag in logged if re.search(pattern, tag)], chart.title
    assert not [tag for tag in tags(RUN) if tag.startswith("_hparams_")]  # else it is a second row of the table
    settings = hparams_of(RUN / "val")
    assert settings.group_name == "small/version_0"
    values = {name: value.number_value or value.string_value for name, value in settings.hparams.items()}
    size = int(console_line(result.out, "model").split()[0].replace(",", ""))
    assert values == {
        "context": 16,
        "width": 16,
        "blocks": 2,
        "heads": 2,
        "dropout": "",
        "parameters (M)": size / 1e6,
        "tokenizer": "byte",
        "vocabulary": 257,
        "batch": 8,
        "optimizer": "adamw",
        "learning rate": 0.002,
        "seed": 1337,
        "steps": 6,
    }


def test_sub_runs_hold_both_losses_under_one_tag(fit: Fit) -> None:
    for steps in (3, 6):
        flags = ["--model.schedule", "constant", "--trainer.val_check_interval", 2, "--trainer.log_every_n_steps", 1]
        assert fit(*flags, "--trainer.max_steps", steps, "--ckpt_path", "auto").status == 0
        (RUN / "train" / "events.of.a.killed.process").write_bytes(b"")
    run, train, val = (points(folder) for folder in (RUN, RUN / "train", RUN / "val"))
    assert train == {"Loss": run["loss/train"]}
    assert val == {"Loss": run["loss/val"][1:], "best/loss_val": run["best/loss_val"]}
    assert [step for step, _ in run["loss/val"]] == [0, 2, 3, 4, 6]
    assert "steps" in hparams_of(RUN / "val").hparams
    assert len([path for path in event_files(RUN / "val") if b"_hparams_" in path.read_bytes()]) == 1


def test_folder_of_a_sub_run_is_created_before_the_first_event(tmp_path: Path) -> None:
    """If it cannot be created, a new run's folder is removed: a writer's thread would fail with a traceback."""
    logger = StepLogger(tmp_path, name="run")
    Path(logger.log_dir).mkdir(parents=True)
    Path(logger.log_dir, "val").write_text("a file in its place")
    with pytest.raises(UserError, match="the curves cannot be written"):
        logger.log_hyperparams({"seed": 1})
    assert event_files(Path(logger.log_dir)) == []


def test_truncated_event_files_hold_the_points_before_the_checkpoint(tmp_path: Path) -> None:
    first = StepLogger(tmp_path, "run", version=0)
    first.log_metrics({"loss/train": 3.0, "epoch": 0}, step=0)
    sizes = first.event_file_sizes()
    first.log_metrics({"loss/train": 2.0, "loss/val": 5.0}, step=1)
    first.finalize("failed")
    resumed = StepLogger(tmp_path, "run", version=0)
    resumed.log_metrics({"loss/train": 1.0}, step=1)
    resumed.truncate_event_files(sizes)
    resumed.truncate_event_files({})  # does nothing the second time
    resumed.finalize("success")
    folder = tmp_path / "run" / "version_0"
    assert points(folder) == {"loss/train": [(1, 3.0), (2, 1.0)]}
    assert points(folder / "train") == {"Loss": [(1, 3.0), (2, 1.0)]}
    assert event_files(folder / "val") == []  # the file was written after the checkpoint


def test_event_files_of_another_run_are_not_truncated(tmp_path: Path) -> None:
    first = StepLogger(tmp_path, "run", version=0)
    first.log_metrics({"loss": 3.0}, step=0)
    first.finalize("success")
    StepLogger(tmp_path, "run", version=0).truncate_event_files({"events.of.another.run": 0})
    assert points(tmp_path / "run" / "version_0") == {"loss": [(1, 3.0)]}


# ------------------------------------------------------------------------------------------------- --trainer.logger

STEP_LOGGER = {"class_path": "lit_gpt.training.logger.StepLogger"}
CSV_LOGGER = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "csv", "name": "run"}}


def write_config(**trainer: Any) -> list[str]:
    """Write an overlay with these settings of the Trainer; return its flags."""
    Path("overlay.yaml").write_text(yaml.safe_dump({"trainer": trainer}), encoding="utf-8")
    return ["--config", "overlay.yaml"]


def csv_points(tag: str, version: int = 0) -> list[tuple[int, float]]:
    """Return the values that CSVLogger wrote, by step, which Lightning counts from 0."""
    with open(f"csv/run/version_{version}/metrics.csv", newline="", encoding="utf-8") as file:
        return [(int(row["step"]), float(row[tag])) for row in csv.DictReader(file) if row.get(tag)]


def test_logger_in_a_config_replaces_ours(fit: Fit) -> None:
    flags = [*write_config(logger=CSV_LOGGER), "--model.schedule", "constant"]
    result = fit(*flags, "--trainer.max_steps", 3)
    assert result.status == 0, result.err
    assert "curves" not in result.out
    files = {path.name for path in RUN.iterdir()}
    assert files == RUN_FILES
    assert [step for step, _ in csv_points("loss/train")] == [0, 1, 2]
    assert [step for step, _ in csv_points("loss/val")] == [0, 2]  # of the untrained model, and after the third step
    settings = yaml.safe_load(Path("csv/run/version_0/hparams.yaml").read_text(encoding="utf-8"))
    assert (settings["model.config.num_blocks"], settings["data.files"]) == (2, "rows.txt")
    assert fit(*flags, "--ckpt_path", "last").status == 0
    assert [step for step, _ in csv_points("loss/train", version=1)] == [3, 4, 5]
    assert fit("--model.schedule", "constant", "--name", "straight").status == 0
    straight = points(Path("logs/straight/version_0"))["loss/train"]
    assert csv_points("loss/train") + csv_points("loss/train", 1) == [
        (step - 1, pytest.approx(loss)) for step, loss in straight
    ]


def test_logger_without_a_required_argument_is_refused(fit: Fit) -> None:
    result = fit("--trainer.logger", "CSVLogger")
    assert (result.status, result.err) == (2, "error: --trainer.logger CSVLogger: give --trainer.logger.save_dir too\n")


def test_step_logger_in_a_list_is_ours(fit: Fit) -> None:
    both = write_config(logger=[CSV_LOGGER, STEP_LOGGER])
    result = fit(*both)
    assert result.status == 0, result.err
    assert "tensorboard --logdir logs\n" in result.out
    for tag in ("loss/train", "optim/lr"):
        assert csv_points(tag) == [(step - 1, pytest.approx(value)) for step, value in points(RUN)[tag]]
    assert sorted(path.name for path in Path("logs").iterdir()) == ["small"]
    assert (
        fit(*write_config(logger=[CSV_LOGGER, STEP_LOGGER]), "--ckpt_path", "last", "--trainer.max_steps", 9).status
        == 0
    )
    assert [step for step, _ in points(RUN)["loss/train"]] == list(range(1, 10))


def test_step_logger_with_a_folder_of_its_own_is_refused(fit: Fit) -> None:
    result = fit(*write_config(logger={**STEP_LOGGER, "init_args": {"name": "mine"}}))
    assert (result.status, result.out) == (2, "")
    follows = "name mine follows from --name and --trainer.default_root_dir"
    assert result.err == f"error: --trainer.logger StepLogger: {follows}: leave it out\n"


def test_no_logger_still_writes_checkpoints(fit: Fit) -> None:
    assert fit("--trainer.logger", "false").status == 0
    assert {path.name for path in RUN.iterdir()} == {
        "best.ckpt",
        "config.yaml",
        "last.ckpt",
        "report.html",
        "summary.json",
    }


# ------------------------------------------------------------------------------------------- callbacks in a config


def test_learning_rate_monitor_agrees_with_our_rates(fit: Fit) -> None:
    monitor = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    flags = [*write_config(callbacks=[monitor]), "--trainer.log_every_n_steps", 2, "--trainer.max_steps"]
    assert fit(*flags, 7, "--name", "straight").status == 0
    logged = points(Path("logs/straight/version_0"))
    tags = [tag for tag in logged if tag.startswith("lr-AdamW/")]  # one for each group; here they have equal rates
    assert len(tags) > 1
    assert [step for step, _ in logged["optim/lr"]] == [2, 4, 6, 7]
    assert all(logged[tag] == logged["optim/lr"] for tag in tags)
    constant = ["--model.schedule", "constant", "--trainer.log_every_n_steps", 1]
    for steps in (3, 7):  # step 3 has a validation
        assert fit(*flags, steps, *constant, "--ckpt_path", "auto").status == 0
    logged = points(RUN)
    assert [step for step, _ in logged["optim/lr"]] == [1, 2, 3, 4, 5, 6, 7]
    assert all(logged[tag] == logged["optim/lr"] for tag in tags)


def test_progress_bar_in_a_config_replaces_ours(fit: Fit) -> None:
    for callback in ("TQDMProgressBar", "ModelSummary"):
        given = {"class_path": f"lightning.pytorch.callbacks.{callback}"}
        result = fit(*write_config(callbacks=[given]))
        assert result.status == 0, result.err
        assert ("loss/train_eval" in result.out) == (callback == "ModelSummary")
