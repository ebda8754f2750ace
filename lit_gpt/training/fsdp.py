"""Training on devices that each hold a slice of the model."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException

from lit_gpt.checkpoint.sharded import ShardReader, flatten_state
from lit_gpt.checkpoint.store import NON_TENSOR_FILE, open_checkpoint
from lit_gpt.files import atomic_replace, atomic_write, fsync_folder, temporary_path, write_error
from lit_gpt.model import GPT
from lit_gpt.sharding import shard_like

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class FSDP2(ModelParallelStrategy):
    """Slices weights, gradients and optimizer state over all devices; `LitGPT.configure_model` says where.

    A checkpoint is a folder, into which every device writes its slices and out of which any number of devices reads
    its own. An ordinary file is read too.

    Args:
        process_group_backend: nccl or gloo; what suits the devices if left out.
        timeout: how long a process waits for the others.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.model is not None
        return self.model.state_dict(keep_vars=True)  # so that what is tied is seen to be one

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Writes a folder: all ranks its slices, the first everything else; what stood there before goes last.

        Raises:
            UserError: on all ranks, or on the first alone: it cannot be written.
        """
        path = Path(self.broadcast(str(filepath)))
        folder = temporary_path(path)
        tensors, rest = flatten_state(checkpoint)
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)
        self.barrier()
        try:
            dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
            if self.is_global_zero:
                atomic_write(folder / NON_TENSOR_FILE, lambda file: torch.save(rest, file))
                fsync_folder(folder)
                atomic_replace(folder, path)
        except (CheckpointException, OSError) as error:
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
            why = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise write_error(path, why) from error

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = open_checkpoint(path, mmap=True)
        assert self.model is not None
        there, rest = flatten_state(checkpoint)
        here = {f"state_dict/{name}": value.detach() for name, value in self.model.state_dict(keep_vars=True).items()}
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for number, saved in checkpoint["optimizer_states"][0]["state"].items():
                p = parameters[number]
                state = {name: torch.zeros_like(p) for name, value in saved.items() if value.shape == p.shape}
                optimizer.state[p] = state
                here |= {f"optimizer/{number}/{name}": value for name, value in state.items()}
        wanted = {name: value for name, value in here.items() if name in there}
        if path.is_dir():
            dcp.load(wanted, storage_reader=ShardReader(path))
        else:
            for name, value in wanted.items():
                value.copy_(shard_like(there[name], value))
        return rest

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Has been done by `load_checkpoint`, and so has the optimizer's."""


def shard(gpt: GPT, mesh: "DeviceMesh", kind: torch.dtype | None = None) -> None:
    """Slices the weights over the devices of `mesh`, block by block; a block's are put together while it computes.

    Args:
        gpt: the model.
        mesh: of one dimension.
        kind: in which the blocks multiply. Their weights travel in it; gradients are added up in that of the weights.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if isinstance(gpt, FSDPModule):
        return
    policy = MixedPrecisionPolicy(kind, gpt.embedding.weight.dtype, cast_forward_inputs=False)
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(gpt, mesh=mesh)
    for method in ("hidden", "loss"):  # ways in, besides forward
        register_fsdp_forward_method(gpt, method)
