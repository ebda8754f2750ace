"""StepLogger: events that TensorBoard can read, files that can be truncated."""

from pathlib import Path

from conftest import Fit, points
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_gpt.training.logger import StepLogger

RUN = Path("logs/small/version_0")


def test_tensorboard_reads_loss_chart_and_hyperparameters(fit: Fit) -> None:
    assert fit("--model.learning_rate", 0.002).status == 0
    events = EventAccumulator(str(RUN), size_guidance={"tensors": 0}).Reload()
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    chart = layout.category[0].chart[0]
    assert list(chart.multiline.tag) == ["loss/train$", "loss/train_eval", "loss/val"]
    start = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    ).session_start_info
    assert start.hparams["model.learning_rate"].number_value == 0.002
    assert start.hparams["data.files"].string_value == "rows.txt"
    experiment = plugin_data_pb2.HParamsPluginData.FromString(
        events.summary_metadata["_hparams_/experiment"].plugin_data.content
    ).experiment
    assert [info.name.tag for info in experiment.metric_infos] == ["best/loss_val"]


def test_truncated_event_files_hold_the_points_before_the_checkpoint(tmp_path: Path) -> None:
    first = StepLogger(tmp_path, "run", version=0)
    first.log_metrics({"loss": 3.0, "epoch": 0}, step=0)
    sizes = first.event_file_sizes()
    first.log_metrics({"loss": 2.0}, step=1)
    first.finalize("failed")
    resumed = StepLogger(tmp_path, "run", version=0)
    resumed.log_metrics({"loss": 1.0}, step=1)
    resumed.truncate_event_files(sizes)
    resumed.truncate_event_files({})  # does nothing the second time
    resumed.finalize("success")
    assert points(tmp_path / "run" / "version_0") == {"loss": [(1, 3.0), (2, 1.0)]}


def test_event_files_of_another_run_are_not_truncated(tmp_path: Path) -> None:
    first = StepLogger(tmp_path, "run", version=0)
    first.log_metrics({"loss": 3.0}, step=0)
    first.finalize("success")
    StepLogger(tmp_path, "run", version=0).truncate_event_files({"events.of.another.run": 0})
    assert points(tmp_path / "run" / "version_0") == {"loss": [(1, 3.0)]}
