"""What updates the weights, and how fast."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gpt.compat import fused_adamw_
from lit_gpt.sharding import full_tensor, shard_like

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine", "linear"]

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steep at zero, so that few steps do
# five; a run of steps shares a Gram matrix, where matrices are so much longer than wide that this is less work
NEWTON_SCHULZ_STEPS = {"square": (1, 1, 1, 1, 1), "long": (2, 3)}
MOMENTUM = 0.95  # Muon's
ROW = 2**14  # numbers of a large gradient whose squares are added up at once


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
    """Muon (Jordan et al. 2024) for the groups marked `muon`, AdamW (Loshchilov and Hutter 2019) for the others.

    A step of Muon is `torch.optim.Muon`'s: momentum, made orthogonal by Newton-Schulz in bfloat16, but for all matrices
    of one kind at once, and long ones rounded more: measured up to 2.3 times as much. It is scaled so that AdamW's
    learning rate and weight decay serve both (Liu et al. 2025, "match_rms_adamw").

    Args:
        groups: of `parameter_groups`.
        lr: of every group.
        betas: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if group["muon"]:
                for kind in dict.fromkeys(kind_of(p.shape) for p in moved):  # in their order, not a set's
                    self._muon([p for p in moved if kind_of(p.shape) == kind], group["lr"], group["weight_decay"])
            else:
                self._adamw(moved, group)
        return loss

    def _muon(self, parameters: list[Tensor], rate: float, weight_decay: float) -> None:
        """One step for matrices (A, B) of one kind; those of one shape are stacked."""
        stacks, shapes = [], list(dict.fromkeys(p.shape for p in parameters))
        alike = [[p for p in parameters if p.shape == shape] for shape in shapes]
        for matrices in alike:
            stack = torch.empty(len(matrices), *matrices[0].shape, dtype=torch.bfloat16, device=matrices[0].device)
            for p, row in zip(matrices, stack):  # one matrix after the other, while it is in the cache
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                assert p.grad is not None
                momentum = self.state[p]["momentum_buffer"].lerp_(p.grad, 1 - MOMENTUM)
                row.copy_(full_tensor(p.grad.lerp(momentum, MOMENTUM)))
            stacks.append(stack)
        for matrices, updates in zip(alike, newton_schulz(stacks)):
            scale = 0.2 * math.sqrt(max(matrices[0].shape))
            for p, update in zip(matrices, updates):
                if weight_decay:
                    p.mul_(1 - rate * weight_decay)
                p.add_(shard_like(update, p), alpha=-rate * scale)

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of AdamW. All of a group take equally many, which torch's own counts for each of them."""
        assert len(parameters) == len(group["params"])  # all have gradients, always
        group["step"] += 1
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
        states = [self.state[p] for p in parameters]
        fused_adamw_(
            parameters,
            [p.grad for p in parameters],  # type: ignore[misc]
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            group["step"],
            group["lr"],
            group["betas"],
            group["weight_decay"],
        )


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a scalar.

    On a CPU torch adds a tensor's squares up in one thread and in few float32 sums, which of 25 million numbers gives a
    norm that is off by a thousandth: of a large one it is taken row by row.
    """
    parts = []
    for g in gradients:
        whole_here = type(g) is Tensor and g.device.type == "cpu"
        if whole_here and g.numel() >= 64 * ROW:
            flat = g.flatten()
            rows, rest = flat.split([len(flat) // ROW * ROW, len(flat) % ROW])
            parts += [torch.linalg.vector_norm(rows.view(-1, ROW), dim=-1), rest]
        else:
            parts.append(g)
    return torch.nn.utils.get_total_norm(parts)


def kind_of(shape: torch.Size) -> tuple[int, str]:
    """Return what matrices share that `newton_schulz` takes at once: the shorter side, and square or long."""
    short, long = sorted(shape[-2:])
    return short, "long" if 2 * long >= 3 * short else "square"


def newton_schulz(stacks: list[Tensor]) -> list[Tensor]:
    """The nearest matrices with all singular values near 1: (n, A, B) each -> (n, A, B) bfloat16 each.

    Newton-Schulz as in https://kellerjordan.github.io/posts/muon/: singular values end between about 0.7 and 1.2. All
    matrices are of one kind, and so of one shorter side, S, on which the polynomials are taken for all of them at once.
    Of long ones, some steps in a row need their Gram matrix alone: X meets the product of their polynomials, and then a
    Gram matrix is taken anew, before what rounding did to the small singular values has grown. A tall X is multiplied
    from the right, a wide one from the left, so that nothing is transposed. Stacks in bfloat16 are overwritten.
    """
    a, b, c = NEWTON_SCHULZ
    stacks = [stack.bfloat16() for stack in stacks]
    stacks = [stack.div_(stack.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7)) for stack in stacks]
    tall = [stack.shape[-2] > stack.shape[-1] for stack in stacks]
    counts, (short, kind) = [len(stack) for stack in stacks], kind_of(stacks[0].shape)
    start = a * torch.eye(short, dtype=torch.bfloat16, device=stacks[0].device)  # (S, S)
    for steps in NEWTON_SCHULZ_STEPS[kind]:
        gram = stacks[0].new_empty(sum(counts), short, short)
        for x, high, out in zip(stacks, tall, gram.split(counts)):
            torch.bmm(*((x.mT, x) if high else (x, x.mT)), out=out)  # (n, S, S)
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the polynomial is a + p
        if steps == 1:  # added up in float32
            pairs = zip(stacks, tall, p.split(counts))
            stacks = [torch.baddbmm(x, *((x, f) if high else (f, x)), beta=a) for x, high, f in pairs]
            continue
        product = p + start
        for _ in range(steps - 1):
            gram = torch.baddbmm(gram, gram, p, beta=a)
            gram = torch.baddbmm(gram, gram, p, beta=a)  # (a + p) gram (a + p)
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = torch.baddbmm(product, product, p, beta=a)
        pairs = zip(stacks, tall, product.split(counts))
        stacks = [torch.bmm(*((x, f) if high else (f, x))) for x, high, f in pairs]
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
