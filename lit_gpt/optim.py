"""What updates the weights, and how fast."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine", "linear"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, so that few steps do
NEWTON_SCHULZ_STEPS = 5
MOMENTUM = 0.95  # Muon's


def parameter_groups(model: nn.Module, weight_decay: float, optimizer: OptimizerName) -> list[dict[str, Any]]:
    """What is trained, by where it stands: matrices with weight decay, norms' scales and biases without.

    The matrices inside `model.blocks` are marked `muon` where that is the optimizer.
    """
    groups: dict[str, dict[str, Any]] = {
        "blocks": {"muon": optimizer == "muon", "weight_decay": weight_decay},
        "embeddings": {"muon": False, "weight_decay": weight_decay},
        "head": {"muon": False, "weight_decay": weight_decay},
        "scales": {"muon": False, "weight_decay": 0.0},
    }
    for name, p in model.named_parameters():
        kind = name.partition(".")[0]
        group = "scales" if p.ndim < 2 else kind if kind in ("blocks", "head") else "embeddings"
        if p.requires_grad:
            groups[group].setdefault("params", []).append(p)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


class MuonAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for the groups marked `muon`, AdamW for the others, in one optimizer.

    A step of Muon is `torch.optim.Muon`'s: momentum, made orthogonal by Newton-Schulz in bfloat16, but for all matrices
    of one shape at once. It is scaled so that AdamW's learning rate and weight decay serve both (Liu et al. 2025,
    "match_rms_adamw").

    Args:
        groups: of `parameter_groups`.
        lr: of every group.
        betas: AdamW's.
        fused: whether AdamW's step is one kernel.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], fused: bool = True) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for shape in dict.fromkeys(p.shape for p in moved):  # in their order, not a set's
                    self._muon([p for p in moved if p.shape == shape], group["lr"], group["weight_decay"])
            else:
                self._adamw(moved, group)
        return loss

    def _muon(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        """One step for matrices of one shape (A, B)."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        updates = orthogonal(torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM)))  # (n, A, B)
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        scale = 0.2 * math.sqrt(max(parameters[0].shape))
        torch._foreach_add_(parameters, list(updates.to(parameters[0].dtype)), alpha=-rate * scale)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for p in parameters:
            if not self.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group["fused"] else "cpu")
                self.state[p].update(step=step, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=1e-8,
            maximize=False,
        )


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with all singular values near 1: (n, A, B) -> (n, A, B) bfloat16.

    Newton-Schulz as in https://kellerjordan.github.io/posts/muon/: singular values end between about 0.7 and 1.2.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.bfloat16()
    tall = wide.shape[-2] > wide.shape[-1]
    wide = wide.mT if tall else wide
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.mT  # (n, min, min)
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if tall else wide


def learning_rate_factor(
    step: int, schedule: Schedule, warmup_steps: int, max_steps: int, lowest: float, decay_share: float = 1.0
) -> float:
    """The share of the peak learning rate that optimizer step `step`, from 0, takes.

    It climbs in equal strides over `warmup_steps`, from one stride on and never from 0, and is then constant, or in the
    last `decay_share` of all steps falls by a cosine (Loshchilov and Hutter 2017) or a line to `lowest`, reached at
    `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = max(warmup_steps, round(max_steps * (1 - decay_share)))
    progress = min(1.0, max(0, step - begin) / max(1, max_steps - begin))
    fallen = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))
    return 1.0 - (1.0 - lowest) * fallen
