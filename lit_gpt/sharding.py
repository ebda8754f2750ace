"""Tensors of models that are sharded over devices with FSDP2 (Zhao et al. 2023)."""

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether each device holds only a shard of the parameters, as DTensors.

    After a forward pass FSDP2 keeps the parameters outside of the blocks whole until the backward pass; those of the
    blocks are shards then, too.
    """
    return any(hasattr(parameter, "placements") for parameter in model.parameters())


def full_tensor(x: Tensor) -> Tensor:
    """Gather a DTensor, a collective call on all ranks; return any other tensor as it is."""
    gathered: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return gathered


def shard_like(x: Tensor, other: Tensor) -> Tensor:
    """Shard `x`, which is complete on every rank, as `other` is sharded; return `x` if `other` is not a DTensor."""
    if not hasattr(other, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor  # slow to import

    x = x.to(other.device)
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]
