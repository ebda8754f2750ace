"""Every private attribute of another library that this package uses, in one place.

Each function says why public API does not suffice. Each has a test in tests/test_compat.py that fails when the library
renames the attribute or changes its meaning. Heavy libraries are imported inside the functions, so that importing this
module stays cheap.
"""

import contextlib
import errno
import threading
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from argparse import Action, ArgumentParser

    import tiktoken
    from gguf import GGUFReader
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
    from torch.utils.tensorboard import FileWriter, SummaryWriter


# --------------------------------------------------------------------------------------------------------- lightning


def set_logged_step(trainer: "Trainer", step: int | None = None) -> None:
    """Make Lightning log metrics at x = `step`; None: of the current optimizer step, `trainer.global_step`.

    `self.log` and callbacks such as LearningRateMonitor take their x axis from a counter of the training loop. After a
    resume at a step that validates, Lightning increments this counter once too often, and no public setter exists.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step if step is None else step


def set_loop_progress(loops: dict[str, Any], step: int, accumulate_grad_batches: int, steps_per_epoch: int) -> None:
    """Set the state of a new fit loop to the start of the batch that follows optimizer step `step`.

    The keys of this state are not documented. A checkpoint has the state of the loop that wrote it: perhaps in the
    middle of an epoch, or with another batch size or number of ranks. Only its step is used.

    Args:
        loops: `trainer.fit_loop.state_dict()` before training; changed in place.
        step: Completed optimizer steps.
        accumulate_grad_batches: Batches in an optimizer step.
        steps_per_epoch: Optimizer steps in an epoch.
    """

    def set_progress(progress: dict[str, Any], total: int, current: int, in_progress: int = 0) -> None:
        for name, completed in (("total", total), ("current", current)):
            for key in progress[name]:
                progress[name][key] = completed + (in_progress if key in ("ready", "started") else 0)

    epochs, steps_of_epoch = divmod(step, steps_per_epoch)
    set_progress(loops["epoch_progress"], epochs, epochs, in_progress=1 if steps_of_epoch else 0)
    batches, batches_of_epoch = step * accumulate_grad_batches, steps_of_epoch * accumulate_grad_batches
    set_progress(loops["epoch_loop.batch_progress"], batches, batches_of_epoch)
    optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]
    set_progress(optimizer["step"], step, steps_of_epoch)
    set_progress(optimizer["zero_grad"], step, steps_of_epoch)


def dump_checkpoint(trainer: "Trainer") -> dict[str, Any]:
    """Return the checkpoint that `trainer.save_checkpoint` would write.

    `trainer.save_checkpoint` waits for all ranks after it has written. After an exception they may never come.
    """
    return trainer._checkpoint_connector.dump_checkpoint()


def disable_sigterm_broadcast(trainer: "Trainer") -> None:
    """Keep Lightning from asking all ranks before every forward pass whether rank 0 has received SIGTERM.

    Lightning broadcasts and waits for a tensor each time, and no public setting switches it off. `GracefulStop` does
    the same once per optimizer step, without waiting.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def disable_child_process_observer() -> None:
    """Keep Lightning from killing this process when a rank that it has started fails.

    A thread of Lightning looks at the started processes every five seconds, and kills this one with SIGKILL where one
    of them has failed: perhaps while it saves, or before it has reported the error. Lightning keeps no public
    reference to the thread.
    """
    from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver

    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []


def set_default_timeout(strategy: "Strategy", timeout: timedelta) -> None:
    """Set how long a rank waits in a collective, unless the strategy was created with a timeout of its own.

    A timeout is an argument of the strategy's constructor. Where the Trainer creates the strategy, from a name such as
    "auto" or "ddp", nobody can pass it.
    """
    from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout

    if getattr(strategy, "_timeout", None) == default_pg_timeout:
        strategy._timeout = timeout  # type: ignore[attr-defined]


def set_mesh_sizes(strategy: "ModelParallelStrategy", data_parallel: int, tensor_parallel: int) -> None:
    """Set the sizes of the device mesh that `strategy.setup_environment` creates.

    They are arguments of the constructor, but the number of devices is known only when the Trainer has set it. The
    default "auto" is tensor parallelism within a machine.
    """
    strategy._data_parallel_size, strategy._tensor_parallel_size = data_parallel, tensor_parallel


def is_restoring(error: BaseException) -> bool:
    """Return whether an error was raised while the Trainer restored its state from a checkpoint.

    The Trainer raises what its parts raise: no type of error says that the checkpoint is the cause. The functions on
    the way do, in a private module of Lightning.
    """
    return any(
        frame.f_globals["__name__"].endswith(".checkpoint_connector")
        and frame.f_code.co_name.lstrip("_").startswith(("resume", "restore"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
    )


# The argument of `load_from_checkpoint` that keeps Lightning from calling a function which the hyperparameters of the
# checkpoint name. One that it allows, of its command line, builds the classes that other hyperparameters name.
NO_INSTANTIATOR: dict[str, Any] = {"_instantiator": None}


# ---------------------------------------------------------------------------------------------------------- argparse


def parser_actions(parser: "ArgumentParser") -> list["Action"]:
    """Return the actions of all flags of a parser, in the order in which they were added.

    The public methods add flags and format the help of all of them; none lists them.
    """
    return list(parser._actions)


# ------------------------------------------------------------------------------------------------------------- torch


def pack_linear_weight(weight: Tensor) -> Tensor:
    """Return a bfloat16 weight (D_out, D_in) on the CPU in the layout in which oneDNN reads it fastest for a few rows.

    torch.compile uses this layout for frozen models; eager mode has no public function for it.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed


def packed_linear(x: Tensor, packed_weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `torch.nn.functional.linear(x, weight, bias)` with a weight of `pack_linear_weight`."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed_weight, bias, "none", [], "")
    return y


# The functions to which the pickle in a file of torch.save refers for a tensor and for a parameter, as (module, name).
# torch has no function that says which shapes and bytes such a file names before it reads them.
PICKLED_TENSOR = ("torch._utils", "_rebuild_tensor_v2")
PICKLED_PARAMETER = ("torch._utils", "_rebuild_parameter")


# ------------------------------------------------------------------------------------------------------- tensorboard


def event_file_writer(writer: "SummaryWriter") -> "FileWriter":
    """Return the writer of the event file, which takes many values as one event; open a new file if it was closed.

    The public `SummaryWriter.add_scalar` writes one event for each value. The public attribute `file_writer` is None
    after `close`, as in `trainer.validate()` after `trainer.fit()`.
    """
    return writer._get_file_writer()


# ---------------------------------------------------------------------------------------------------------- tiktoken


def encoding_pattern(encoding: "tiktoken.Encoding") -> str:
    """Return the regular expression that splits a text into pre-tokens.

    The constructor takes it, but no public attribute returns it. Vocabularies that are pruned or trained need it.
    """
    return encoding._pat_str


def encode_pre_token(encoding: "tiktoken.Encoding", text: str) -> list[int]:
    """Return the ids of a text that is one pre-token, without the regular expression.

    The public methods apply the expression, which fails in long runs of white space.
    """
    return encoding._encode_single_piece(text)


@contextlib.contextmanager
def forbid_tiktoken_downloads() -> Iterator[None]:
    """Make tiktoken raise FileNotFoundError with a URL as `filename`, instead of downloading it.

    tiktoken downloads a data file if its cache does not contain it, or contains it with a wrong SHA-256. No setting
    prevents this.
    """
    import tiktoken.load

    def refuse(blobpath: str) -> bytes:
        raise FileNotFoundError(errno.ENOENT, "tiktoken would download it", blobpath)

    download = tiktoken.load.read_file
    tiktoken.load.read_file = refuse
    try:
        yield
    finally:
        tiktoken.load.read_file = download


# -------------------------------------------------------------------------------------------------------------- gguf


def open_gguf(path: Path) -> "GGUFReader":
    """Open a GGUF file; its tensors stay in the file until they are used.

    Beyond the end of the file, the reader of the package finds empty values instead of an error, and counts up to
    lengths that a damaged file names.

    Raises:
        OSError: The file cannot be opened.
        ValueError: It ends before something that it names, or is no GGUF file. Other errors of damaged bytes are those
            of Python and NumPy: LookupError, TypeError, ArithmeticError, AttributeError.
    """
    from gguf import GGUFReader

    class BoundedReader(GGUFReader):
        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
            values = super()._get(offset, dtype, count, override_order)
            if len(values) != count:
                raise ValueError("it is shorter than it says")
            return values

    return BoundedReader(path)
