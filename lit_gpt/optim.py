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
    of one shorter side at once. It is scaled so that AdamW's learning rate and weight decay serve both (Liu et al.
    2025, "match_rms_adamw").

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
                for short in dict.fromkeys(min(p.shape) for p in moved):  # in their order, not a set's
                    self._muon([p for p in moved if min(p.shape) == short], group["lr"], group["weight_decay"])
            else:
                self._adamw(moved, group)
        return loss

    def _muon(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        """One step for matrices (A, B) of one shorter side; their gradients are used up."""
        for p in parameters:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients: list[Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        torch._foreach_lerp_(gradients, buffers, MOMENTUM)
        shapes = dict.fromkeys(p.shape for p in parameters)
        alike = [[i for i, p in enumerate(parameters) if p.shape == shape] for shape in shapes]
        stacks = [torch.stack([gradients[i] for i in places]) for places in alike]  # (n, A, B) each
        torch._foreach_mul_(parameters, 1 - rate * weight_decay)
        for places, updates in zip(alike, orthogonal(stacks)):
            moved = [parameters[i] for i in places]
            scale = 0.2 * math.sqrt(max(moved[0].shape))
            torch._foreach_add_(moved, list(updates.to(moved[0].dtype)), alpha=-rate * scale)

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


def orthogonal(stacks: list[Tensor]) -> list[Tensor]:
    """The nearest matrices with all singular values near 1: (n, A, B) each -> (n, A, B) bfloat16 each.

    Newton-Schulz as in https://kellerjordan.github.io/posts/muon/: singular values end between about 0.7 and 1.2. All
    matrices have one shorter side, S, on which the polynomial is taken for all of them at once; it multiplies a tall
    one from the right, a wide one from the left, so that nothing is transposed.
    """
    a, b, c = NEWTON_SCHULZ
    stacks = [stack.bfloat16() for stack in stacks]
    stacks = [stack.div_(stack.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7)) for stack in stacks]
    tall = [stack.shape[-2] > stack.shape[-1] for stack in stacks]
    counts, short = [len(stack) for stack in stacks], min(stacks[0].shape[1:])
    grams = stacks[0].new_empty(sum(counts), short, short)
    for _ in range(NEWTON_SCHULZ_STEPS):
        for x, high, gram in zip(stacks, tall, grams.split(counts)):
            torch.bmm(*((x.mT, x) if high else (x, x.mT)), out=gram)  # (n, S, S)
        factors = torch.baddbmm(grams, grams, grams, beta=b, alpha=c).split(counts)
        stacks = [torch.baddbmm(x, *((x, f) if high else (f, x)), beta=a) for x, f, high in zip(stacks, factors, tall)]
    return stacks


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
