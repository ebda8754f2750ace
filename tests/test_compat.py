"""Each entry of lit_gpt/compat.py: the private attribute still exists and still means what the package relies on."""

import argparse
import io
import os
import pickletools
import struct
import subprocess
import zipfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tiktoken.load
import torch
from conftest import event_files, points
from jsonargparse._common import parsing_settings
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import scalar

from lit_gpt import compat
from lit_gpt.device import supports_bfloat16


class Regression(LightningModule):
    """One weight; logs `loss` at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StepRecorder(Logger):
    """Keeps the x values of all metrics."""

    name, version = "steps", 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.steps.append(step)

    def log_hyperparams(self, *args: object, **kwargs: object) -> None:
        pass


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("corrected", [False, True])
def test_set_logged_step_decides_where_lightning_logs(corrected: bool) -> None:
    class Module(Regression):
        def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
            if batch_idx == 2:
                self.trainer.fit_loop.epoch_loop._batches_that_stepped = 90  # a wrong count, as after some resumes
            if corrected:
                compat.set_logged_step(self.trainer)

    logger = StepRecorder()
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(torch.ones(4, 1)))
    assert logger.steps == ([0, 1, 2, 3] if corrected else [0, 1, 90, 91])


def test_set_loop_progress_sets_step_epoch_and_batch() -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    loops = trainer.fit_loop.state_dict()
    compat.set_loop_progress(loops, step=6, accumulate_grad_batches=2, steps_per_epoch=4)
    trainer.fit_loop.load_state_dict(loops)
    assert (trainer.global_step, trainer.current_epoch) == (6, 1)
    assert (trainer.fit_loop.total_batch_idx, trainer.fit_loop.batch_idx) == (11, 3)  # the last batch of step 6


QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_is_restoring_knows_errors_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    class Failing(Regression):
        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            raise KeyError("of a bug")

    batches, path = DataLoader(torch.ones(1, 1)), tmp_path / "run.ckpt"
    trainer = Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(Regression(), batches)
    trainer.save_checkpoint(path)
    for key, value, expected in (("optimizer_states", [{}], True), ("callbacks", {}, False)):
        torch.save({**torch.load(path, weights_only=True), key: value}, tmp_path / "changed.ckpt")
        with pytest.raises(KeyError) as raised:
            Trainer(max_steps=2, enable_checkpointing=False, **QUIET).fit(
                Failing(), batches, ckpt_path=tmp_path / "changed.ckpt", weights_only=True
            )
        assert compat.is_restoring(raised.value) == expected


def test_event_file_writer_writes_one_event_and_opens_a_new_file_after_close(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    for step in (1, 2):
        summary = Summary()
        for tag in ("a", "b"):
            summary.MergeFrom(scalar(tag, float(step)))
        compat.event_file_writer(writer).add_summary(summary, step)
        writer.close()
    assert len(event_files(tmp_path)) == 2
    assert points(tmp_path) == {"a": [(1, 1.0), (2, 2.0)], "b": [(1, 1.0), (2, 2.0)]}


def fit_regression(*callbacks: Callback, **flags: Any) -> Trainer:
    trainer = Trainer(max_steps=2, enable_checkpointing=False, callbacks=list(callbacks), **QUIET, **flags)
    trainer.fit(Regression(), DataLoader(torch.ones(4, 1)))
    return trainer


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
def test_dump_checkpoint_returns_what_save_checkpoint_writes(tmp_path: Path) -> None:
    trainer = fit_regression()
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved, dumped = torch.load(tmp_path / "saved.ckpt", weights_only=True), compat.dump_checkpoint(trainer)
    assert saved.keys() == dumped.keys()
    assert saved["global_step"] == dumped["global_step"] == 2
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in dumped["state_dict"].items())


@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.parametrize("disabled", [False, True])
def test_disable_sigterm_broadcast_removes_one_broadcast_per_forward_pass(
    monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    broadcasts = []
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: broadcasts.append(tensor))

    class TwoRanks(Callback):
        """Makes the training loop believe that it is one of two ranks."""

        def on_train_start(self, trainer: Trainer, *args: object) -> None:
            monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
            monkeypatch.setattr(Trainer, "world_size", 2)
            if disabled:
                compat.disable_sigterm_broadcast(trainer)

        def on_train_end(self, *args: object) -> None:
            monkeypatch.undo()

    fit_regression(TwoRanks())
    assert len(broadcasts) == (0 if disabled else 2)


@pytest.mark.parametrize("disabled", [False, True])
def test_disable_child_process_observer_keeps_this_process_alive(
    monkeypatch: pytest.MonkeyPatch, disabled: bool
) -> None:
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: killed.append(pid))
    child = subprocess.Popen(["false"])
    child.wait()
    observer = _ChildProcessObserver(main_pid=os.getpid(), child_processes=[child], sleep_period=1)
    observer.start()
    if disabled:
        compat.disable_child_process_observer()
    observer.join()
    assert killed == ([] if disabled else [os.getpid()])


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Strategies set themselves up without connecting to other ranks; holds what they pass to torch."""
    passed: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: passed.update(kwargs))
    monkeypatch.setattr("torch.distributed.device_mesh.init_device_mesh", lambda **kwargs: passed.update(kwargs))
    for name in ("MASTER_ADDR", "MASTER_PORT"):  # which the strategy sets
        monkeypatch.setenv(name, "0")
    return passed


@pytest.mark.parametrize(
    ("strategy", "seconds"),
    [("ddp", 7), (DDPStrategy(timeout=timedelta(seconds=60)), 60), (ModelParallelStrategy(), 7)],
    ids=["created by the Trainer", "created with a timeout", "model parallel"],
)
def test_set_default_timeout_changes_only_the_default(
    unconnected: dict[str, Any], strategy: str | Strategy, seconds: int
) -> None:
    created = Trainer(devices=2, strategy=strategy, **QUIET).strategy
    created.connect(Regression())
    compat.set_default_timeout(created, timedelta(seconds=7))
    created.setup_environment()
    assert unconnected["timeout"] == timedelta(seconds=seconds)


@pytest.mark.parametrize("sizes", [None, (2, 1)])
def test_set_mesh_sizes_replaces_the_default_of_tensor_parallelism(
    unconnected: dict[str, Any], sizes: tuple[int, int] | None
) -> None:
    strategy = Trainer(devices=2, strategy=ModelParallelStrategy(), **QUIET).strategy
    strategy.connect(Regression())
    if sizes is not None:
        compat.set_mesh_sizes(strategy, *sizes)
    strategy.setup_environment()
    assert unconnected["mesh_shape"] == (sizes or (1, 2))


def test_no_instantiator_keeps_lightning_from_building_what_hyperparameters_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parsing_settings, "instantiate_subclass_spec_in_any", True)  # the default of jsonargparse

    class Untyped(LightningModule):
        def __init__(self, part: Any = None) -> None:
            super().__init__()
            self.part = part

    spec = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}
    hyper_parameters = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "part": spec}
    version = {"pytorch-lightning_version": "2.6.6"}
    torch.save({"state_dict": {}, "hyper_parameters": hyper_parameters, **version}, tmp_path / "x.ckpt")
    for arguments, kind in (({}, LearningRateMonitor), (compat.NO_INSTANTIATOR, dict)):
        with pytest.warns(UserWarning, match="contains no parameters"):
            loaded = Untyped.load_from_checkpoint(tmp_path / "x.ckpt", weights_only=True, **arguments)
        assert isinstance(loaded.part, kind)


def test_parser_actions_are_all_flags_in_their_order() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--first")
    parser.add_argument_group("group").add_argument("--second")
    assert [action.dest for action in compat.parser_actions(parser)] == ["first", "second"]


@pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and supports_bfloat16(torch.device("cpu"))),
    reason="needs oneDNN and a CPU that multiplies in bfloat16",
)
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linear_matches_linear(bias: bool) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(48, 32, bias=bias).bfloat16().requires_grad_(False)
    packed_weight = compat.pack_linear_weight(layer.weight)
    for rows in (1, 2, 7):
        x = torch.randn(3, rows, 48).bfloat16()
        torch.testing.assert_close(compat.packed_linear(x, packed_weight, layer.bias), layer(x))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(3), {compat.PICKLED_TENSOR}),
        (torch.nn.Parameter(torch.zeros(3)), {compat.PICKLED_TENSOR, compat.PICKLED_PARAMETER}),
    ],
)
def test_pickled_tensor_names_are_those_that_torch_writes(value: torch.Tensor, expected: set[tuple[str, str]]) -> None:
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        content = archive.read("archive/data.pkl")
    found = {tuple(str(name).split()) for opcode, name, _ in pickletools.genops(content) if opcode.name == "GLOBAL"}
    assert found - {("collections", "OrderedDict"), ("torch", "FloatStorage")} == expected


# ---------------------------------------------------------------------------------------------------------- tiktoken


def test_encoding_pattern_is_that_of_the_constructor() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding("t", pat_str="a+|b", mergeable_ranks=ranks, special_tokens={})
    assert compat.encoding_pattern(encoding) == "a+|b"


def test_encode_pre_token_merges_across_the_pattern() -> None:
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    encoding = tiktoken.Encoding("t", pat_str="a|b", mergeable_ranks=ranks, special_tokens={})
    assert encoding.encode_ordinary("abc") == [*b"ab"]
    assert compat.encode_pre_token(encoding, "abc") == [256, *b"c"]


def test_forbid_tiktoken_downloads_raises_url_instead_of_downloading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    url = "https://example.invalid/a.tiktoken"
    download = tiktoken.load.read_file
    with compat.forbid_tiktoken_downloads(), pytest.raises(FileNotFoundError) as error:
        tiktoken.load.load_tiktoken_bpe(url)
    assert error.value.filename == url
    assert tiktoken.load.read_file is download


# -------------------------------------------------------------------------------------------------------------- gguf


def test_open_gguf_ends_at_the_end_of_the_file(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install 'lit-gpt[gguf]'")
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("numbers", [1, 2, 3, 4, 5])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert compat.open_gguf(path).fields["numbers"].contents() == [1, 2, 3, 4, 5]
    path.write_bytes(path.read_bytes().replace(struct.pack("<Q", 5), struct.pack("<Q", 2**40), 1))
    with pytest.raises(ValueError, match="it is shorter than it says"):
        compat.open_gguf(path)
