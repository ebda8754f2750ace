"""A model spread over devices (FSDP2, Zhao et al. 2023): every one holds a slice of each weight and of its state.

What torch has for it is slow to import, and imported when it is used.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    pass


def is_sharded(model: nn.Module) -> bool:
    return hasattr(next(model.parameters()), "placements")


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
