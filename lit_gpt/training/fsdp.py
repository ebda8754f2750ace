"""Fully sharded data parallelism (FSDP2, Zhao et al. 2023): each device holds a shard of every weight."""

import contextlib
import shutil
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from lit_gpt import compat
from lit_gpt.checkpoint.sharded import ShardReader, complete_folder, flatten_state, read_shards
from lit_gpt.checkpoint.store import REMEDY, Checkpoint, write_contents
from lit_gpt.digests import sha256_of_all
from lit_gpt.errors import UserError
from lit_gpt.files import atomic_replace, remove, temporary_path, write_error
from lit_gpt.model import GPT
from lit_gpt.sharding import shard_like
from lit_gpt.training.checkpoint_io import AtomicCheckpointIO

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class FSDP2(ModelParallelStrategy):
    """Shard weights, gradients and optimizer state over all devices; `LitGPT.configure_model` calls `shard`.

    A checkpoint is a folder. Each device writes its shards into it, and any number of devices can read theirs from it.
    Checkpoints that are a single file can be read too.

    Args:
        process_group_backend: "nccl" or "gloo"; None: the one that fits the devices.
        timeout: How long a rank waits for the others in a collective.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    def setup_environment(self) -> None:
        compat.set_mesh_sizes(self, data_parallel=self.num_nodes * self.num_processes, tensor_parallel=1)
        super().setup_environment()

    # ---------------------------------------------------------------------------------------------------------- saving

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the module's state dict; tensors are DTensors, and tied weights are the same object."""
        assert self.model is not None
        return self.model.state_dict(keep_vars=True)  # without keep_vars each entry would be a new object

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint folder: every rank its shards, rank 0 everything else; collective.

        A checkpoint that was there before is removed when the new one is complete.

        Raises:
            UserError: It cannot be written. All ranks raise it, or rank 0 alone.
        """
        path = Path(self.broadcast(str(filepath)))
        folder = temporary_path(path)
        tensors, rest = flatten_state(checkpoint)
        if self.is_global_zero:
            with contextlib.suppress(OSError):  # writing to the folder fails too, and on all ranks
                remove(folder)
        self.barrier()
        try:
            metadata = dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder))
            digests = self._digests_of_shards(folder)
            if self.is_global_zero:
                complete_folder(folder, metadata, digests, lambda file: write_contents(rest, file))
                atomic_replace(folder, path)
        except (CheckpointException, OSError) as error:
            if self.is_global_zero:
                shutil.rmtree(folder, ignore_errors=True)
            cause = next(iter(error.failures.values()))[0] if isinstance(error, CheckpointException) else error
            raise write_error(path, cause) from error

    def _digests_of_shards(self, folder: Path) -> dict[str, str]:
        """Return the digests of all shards in a folder; each rank reads those that it wrote; collective.

        Raises:
            OSError: A rank cannot read them. All ranks raise it.
        """
        digests: dict[str, str] | OSError
        try:
            digests = sha256_of_all(folder.glob(f"__{self.global_rank}_*.distcp"))
        except OSError as error:
            digests = error
        of_ranks: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(of_ranks, digests)
        for found in of_ranks:
            if isinstance(found, OSError):
                raise found
        return {name: digest for found in of_ranks for name, digest in found.items()}

    # --------------------------------------------------------------------------------------------------------- loading

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Load this rank's shards of the weights and of the optimizer state in place; return everything else."""
        path = Path(self.broadcast(str(checkpoint_path)))
        checkpoint = Checkpoint.open(path, verify=False)
        self._verify(checkpoint)
        # the tensors of a folder are not read here: they stay on the meta device
        contents = checkpoint.contents if checkpoint.is_sharded else checkpoint.read(mmap=True)
        saved, rest = flatten_state(contents)
        targets = self._tensors_to_load(contents)
        targets = {name: target for name, target in targets.items() if name in saved}
        if checkpoint.is_sharded:
            try:
                dcp.load(targets, storage_reader=ShardReader(path, read_shards(path)))
            except CheckpointException as error:
                raise UserError(f"{path} cannot be read ({error}): {REMEDY}") from error
        else:
            for name, target in targets.items():
                target.copy_(shard_like(saved[name], target))
        return rest

    def _verify(self, checkpoint: Checkpoint) -> None:
        """Compare the bytes with their digests, once for all ranks, unless the command line has done so; collective.

        Raises:
            UserError: They differ. All ranks raise it.
        """
        if isinstance(self.checkpoint_io, AtomicCheckpointIO) and self.checkpoint_io.is_verified(checkpoint.path):
            return
        failure: UserError | None = None
        if self.is_global_zero:
            try:
                checkpoint.verify()
            except UserError as error:
                failure = error
        failure = self.broadcast(failure)
        if failure is not None:
            raise failure

    def _tensors_to_load(self, contents: dict[str, Any]) -> dict[str, Tensor]:
        """Return the tensors to be filled from a checkpoint, by name; create the optimizer's state."""
        assert self.model is not None
        targets = {f"state_dict/{name}": p.detach() for name, p in self.model.state_dict(keep_vars=True).items()}
        for optimizer in self.optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for index, saved_state in contents["optimizer_states"][0]["state"].items():
                p = parameters[index]
                state = {  # moments are sharded as their parameter is, step counters are not
                    name: torch.zeros_like(p) if value.ndim else torch.zeros((), dtype=value.dtype, device=p.device)
                    for name, value in saved_state.items()
                }
                optimizer.state[p] = state
                targets |= {f"optimizer/{index}/{name}": value for name, value in state.items()}
        return targets

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Do nothing: `load_checkpoint` has loaded the weights and the optimizer state."""


def shard(gpt: GPT, mesh: "DeviceMesh", dtype: torch.dtype | None = None) -> None:
    """Shard the weights over the devices of `mesh`, block by block; does nothing if they are sharded.

    The weights of a block are gathered while it computes, and freed afterwards.

    Args:
        gpt: The model, changed in place.
        mesh: The devices, in one dimension.
        dtype: In which the blocks compute and their weights are gathered; None: that of the weights. Gradients are
            reduced in the dtype of the weights.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    if isinstance(gpt, FSDPModule):
        return
    policy = MixedPrecisionPolicy(dtype, gpt.embedding.weight.dtype, cast_forward_inputs=False)
    for block in gpt.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(gpt, mesh=mesh)
    for method in ("hidden", "loss", "evaluate"):  # entry points besides forward
        register_fsdp_forward_method(gpt, method)
