"""The optimizer (AdamW, or Muon with AdamW) and the learning rate schedule."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_gpt.sharding import full_tensor, shard_like

OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["constant", "cosine", "linear"]

FIRST_MOMENTUM, MOMENTUM = 0.85, 0.95  # of Muon, before and after the warm-up of the momentum
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of Jordan et al. 2024
# Five iterations. Consecutive ones in a group share one product with the long matrix, which saves time if it is long.
NEWTON_SCHULZ_GROUPS = {"square": (1, 1, 1, 1, 1), "long": (2, 3)}
NORM_ROW = 2**14  # elements of a large gradient whose squares are added up together


# ------------------------------------------------------------------------------------------------ learning rate


def learning_rate_factor(
    step: int,
    schedule: Schedule,
    warmup_steps: int,
    max_steps: int,
    min_factor: float,
    decay_share: float = 1.0,
) -> float:
    """Return the learning rate of an optimizer step as a fraction of its highest value.

    The rate rises linearly in `warmup_steps` steps, from 1 / warmup_steps to 1. Then it is constant, until it falls in
    the last part of the run along a cosine (Loshchilov and Hutter 2017) or a line.

    Args:
        step: Optimizer step, from 0.
        schedule: "constant" never falls.
        warmup_steps: Steps in which the rate rises.
        max_steps: Steps of the run. The rate would reach `min_factor` at this step.
        min_factor: Lowest fraction.
        decay_share: Part of `max_steps`, at the end, in which the rate falls.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    decay_start = max(warmup_steps, round(max_steps * (1 - decay_share)))
    progress = min(1.0, max(0, step - decay_start) / max(1, max_steps - decay_start))  # from 0 to 1
    decay = progress if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * progress))  # from 0 to 1
    return 1.0 - (1.0 - min_factor) * decay


# ---------------------------------------------------------------------------------------------------- optimizer


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rate: float,
    embedding_rate: float = 1.0,
    head_rate: float = 1.0,
    decay_norms_and_biases: bool = False,
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups for an optimizer: blocks, embeddings, head, scales.

    Args:
        model: A GPT.
        weight_decay: Weight decay of all groups but "scales", which are the scales of norms and the biases.
        learning_rate: Learning rate of all groups, where no factor changes it.
        embedding_rate: Factor on the learning rate of the embeddings.
        head_rate: Factor on the learning rate of an output head that is not tied to the embeddings.
        decay_norms_and_biases: Whether "scales" has the weight decay, too.
    """
    groups: dict[str, dict[str, Any]] = {
        "blocks": {"lr": learning_rate, "weight_decay": weight_decay},
        "embeddings": {"lr": learning_rate * embedding_rate, "weight_decay": weight_decay},
        "head": {"lr": learning_rate * head_rate, "weight_decay": weight_decay},
        "scales": {"lr": learning_rate, "weight_decay": weight_decay if decay_norms_and_biases else 0.0},
    }
    for name, parameter in model.named_parameters():
        module = name.partition(".")[0]
        matrix_group = module if module in ("blocks", "head") else "embeddings"
        if parameter.requires_grad:
            group = groups["scales" if parameter.ndim < 2 else matrix_group]
            group.setdefault("params", []).append(parameter)
    return [{"name": name, **group} for name, group in groups.items() if "params" in group]


def state_names(optimizer: str, group: str) -> set[str]:
    """Return the names of the tensors that an optimizer keeps for each parameter.

    Args:
        optimizer: "adamw" or "muon".
        group: The name of the parameter's group.
    """
    is_muon = optimizer == "muon" and group == "blocks"
    return {"step", "momentum_buffer"} if is_muon else {"step", "exp_avg", "exp_avg_sq"}


def keep_groups(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a loaded optimizer state with the optimizer's own groups, so that their settings are those of this run.

    It is a `load_state_dict` pre-hook.
    """
    return {**state, "param_groups": optimizer.state_dict()["param_groups"]}


class MuonAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the group "blocks", `torch.optim.AdamW` for all other groups.

    AdamW scales each element of a gradient by itself. Muon treats the gradient of a matrix as a whole: it replaces its
    momentum by the nearest orthogonal matrix, so that the update is equally large in all directions. The update is then
    scaled to the size of AdamW's, so that one learning rate and weight decay serve both (Liu et al. 2025).

    A step of Muon equals that of `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")` up to rounding, but all matrices
    with the same shorter side are orthogonalised together, which is faster.

    Args:
        groups: From `parameter_groups`.
        betas: Decay rates of AdamW's moments.
        fused: Whether AdamW's step is one kernel.
        momentum_warmup_steps: Steps in which Muon's momentum rises linearly to its final value.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float],
        fused: bool = True,
        momentum_warmup_steps: int = 0,
    ) -> None:
        super().__init__(groups, betas=betas, fused=fused)
        self.momentum_warmup_steps = momentum_warmup_steps

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take an optimizer step; return the loss that `closure` returns, if it is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in (group for group in groups if group["name"] == "blocks"):
            parameters = [p for p in group["params"] if p.grad is not None]
            for kind in dict.fromkeys(matrix_kind(p.shape) for p in parameters):  # a set has no fixed order
                matrices = [p for p in parameters if matrix_kind(p.shape) == kind]
                self._muon_step(matrices, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if group["name"] != "blocks"]
        try:
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. AdamW moves step counters to the parameters' device, where reading one would wait for it."""
        super().load_state_dict(state_dict)
        for group in (group for group in self.param_groups if group["name"] == "blocks"):
            for state in (self.state[p] for p in group["params"] if p in self.state):
                state["step"] = state["step"].cpu()

    def _muon_step(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        """Update matrices (A, B) of one kind (see `matrix_kind`); those of one shape are stacked."""
        shapes = dict.fromkeys(p.shape for p in parameters)
        by_shape = [[p for p in parameters if p.shape == shape] for shape in shapes]
        updates = newton_schulz([self._stack_momenta(matrices) for matrices in by_shape])
        for matrices, stack in zip(by_shape, updates):
            rms_of_adamw = 0.2 * math.sqrt(max(matrices[0].shape))
            for p, update in zip(matrices, stack):
                if weight_decay:
                    p.mul_(1 - lr * weight_decay)
                p.add_(shard_like(update, p), alpha=-lr * rms_of_adamw)

    def _stack_momenta(self, matrices: list[Tensor]) -> Tensor:
        """Update the momentum of n matrices (A, B); return their Nesterov momenta, (n, A, B) bfloat16."""
        stack = torch.empty(len(matrices), *matrices[0].shape, dtype=torch.bfloat16, device=matrices[0].device)
        for p, row in zip(matrices, stack):  # one by one, so that a matrix stays in the cache
            state = self.state[p]
            if not state:  # AdamW expects a step counter in every state
                state.update(step=torch.zeros(()), momentum_buffer=torch.zeros_like(p))
            assert p.grad is not None
            momentum = muon_momentum(int(state["step"]), self.momentum_warmup_steps)
            state["step"] += 1
            mean = state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
            row.copy_(full_tensor(p.grad.lerp(mean, momentum)))
        return stack


def muon_momentum(step: int, warmup_steps: int) -> float:
    """Return Muon's momentum in an optimizer step, counted from 0: less at the start, where gradients change fast."""
    progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
    return FIRST_MOMENTUM + (MOMENTUM - FIRST_MOMENTUM) * progress


def matrix_kind(shape: torch.Size) -> tuple[int, str]:
    """Return the shorter side of a matrix, and whether it is "square" or "long" (1.5 times as long as wide)."""
    short, long = sorted(shape[-2:])
    return short, "long" if 2 * long >= 3 * short else "square"


def newton_schulz(stacks: list[Tensor]) -> list[Tensor]:
    """Return approximately the nearest (semi-)orthogonal matrices: (n, A, B) each -> (n, A, B) bfloat16 each.

    One Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/) of a wide matrix X is

        X <- (a I + b G + c G²) X,    with the Gram matrix G = X Xᵀ.

    It applies the polynomial a s + b s³ + c s⁵ to each singular value s, and leaves the singular vectors. After five
    iterations all singular values are between about 0.7 and 1.2. For a tall matrix G = Xᵀ X, and the polynomial stands
    on the right.

    All matrices have the same shorter side S, so the polynomials of all of them, (S, S) each, are computed together.
    For long matrices, products with X cost most. As G' = P G P is the Gram matrix after an iteration with polynomial P,
    several iterations can use Gram matrices alone; X is multiplied by the product of their polynomials. Rounding errors
    in small singular values grow meanwhile, so there are at most three iterations in a group.

    Args:
        stacks: Matrices of one kind (see `matrix_kind`). Stacks in bfloat16 are overwritten.
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    stacks = [x.bfloat16() for x in stacks]
    stacks = [x.div_(x.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7)) for x in stacks]
    is_tall = [x.shape[-2] > x.shape[-1] for x in stacks]
    counts, (short, kind) = [len(x) for x in stacks], matrix_kind(stacks[0].shape)
    a_identity = a * torch.eye(short, dtype=torch.bfloat16, device=stacks[0].device)  # (S, S)
    for iterations in NEWTON_SCHULZ_GROUPS[kind]:
        gram = stacks[0].new_empty(sum(counts), short, short)  # (n of all stacks, S, S)
        for x, tall, out in zip(stacks, is_tall, gram.split(counts)):
            torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=out)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b G + c G²; P is a I more
        if iterations == 1:  # a X is added in float32, before the result is rounded
            factors = zip(stacks, is_tall, poly.split(counts))
            stacks = [torch.baddbmm(x, *((x, f) if tall else (f, x)), beta=a) for x, tall, f in factors]
            continue
        product = poly + a_identity
        for _ in range(iterations - 1):
            gram = torch.baddbmm(gram, gram, poly, beta=a)  # G P
            gram = torch.baddbmm(gram, gram, poly, beta=a)  # G P² = P G P: all of these commute
            poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            product = torch.baddbmm(product, product, poly, beta=a)
        factors = zip(stacks, is_tall, product.split(counts))
        stacks = [torch.bmm(*((x, f) if tall else (f, x))) for x, tall, f in factors]
    return stacks


# ----------------------------------------------------------------------------------------------- gradient norm


def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """Return the 2-norm of all gradients together, a scalar.

    On a CPU torch adds up the squares of a tensor in one thread, and in so few float32 sums that the norm of 25 million
    elements is wrong by a thousandth. Large tensors are therefore added up by rows.
    """
    parts = []
    for gradient in gradients:
        is_plain_cpu_tensor = type(gradient) is Tensor and gradient.device.type == "cpu"
        if is_plain_cpu_tensor and gradient.numel() >= 64 * NORM_ROW:
            flat = gradient.flatten()
            rows, rest = flat.split([len(flat) // NORM_ROW * NORM_ROW, len(flat) % NORM_ROW])
            parts += [torch.linalg.vector_norm(rows.view(-1, NORM_ROW), dim=-1), rest]
        else:
            parts.append(gradient)
    return torch.nn.utils.get_total_norm(parts)
