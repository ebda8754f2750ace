"""How learning rates that are best at one width are carried over to another."""

import math

REFERENCE_WIDTH = 128  # at which the rates of the rules were fitted


def width_factors(width: int) -> dict[str, float]:
    """Return what the rates that Muon trains with at `REFERENCE_WIDTH` are multiplied by at another width.

    Steps should change what each layer adds to its output by an amount that does not depend on the width (muP, Yang et
    al. 2022, arXiv:2203.03466). For a matrix inside of a block, the spectral norm of a step has to stay the same. Ours
    grows with the square root of the width, because Muon's updates are scaled to the size of AdamW's (Liu et al. 2025,
    arXiv:2502.16982), so the rate falls with it. AdamW's rate has to stay for the embeddings and to fall with the width
    for the head. Both are factors on the rate of the blocks, so they change with it.

    `docs/planning_transfer.py` has measured that the best rate stays in place.

    Args:
        width: d_model.
    """
    factor = math.sqrt(REFERENCE_WIDTH / width)
    return {"learning_rate": factor, "embedding_rate": 1 / factor, "head_rate": factor}
