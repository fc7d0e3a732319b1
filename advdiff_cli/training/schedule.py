"""The learning rate as a pure function of the step, so that resume needs no scheduler state."""

import math


def cosine(step: int, total: int, peak: float, warmup: float = 0.05) -> float:
    """Return the learning rate at `step` of `total`: linear warm-up over a share of them, then half a cosine to 0."""
    rise = max(1, round(warmup * total))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
