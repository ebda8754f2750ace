"""A model spread over devices (FSDP2, Zhao et al. 2023): every one holds a slice of each weight and of its state.

What torch has for it is slow to import, and imported when it is used.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_gpt.model import GPT

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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


def is_sharded(gpt: GPT) -> bool:
    return hasattr(gpt.embedding.weight, "placements")


def whole(x: Tensor) -> Tensor:
    """All of a tensor of which this device may hold a slice; then all devices have to ask."""
    full: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return full


def like(x: Tensor, other: Tensor) -> Tensor:
    """`x`, which every device has whole, in slices where `other` is."""
    if not hasattr(other, "placements"):
        return x
    from torch.distributed.tensor import distribute_tensor

    x = x.to(other.device)
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)  # type: ignore[attr-defined]
