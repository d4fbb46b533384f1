"""How the learning rate moves over a run: factors on it, 1 at full height."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "constantwithwarmup", "linear", "cosine", "restarts"]


def warm_up(step: int, warmup_steps: int) -> float:
    """Rises linearly over the first `warmup_steps` steps (1 / warmup_steps at step 0) and stays at 1."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def fall(step: int, steps: int, fraction: float, shape: Literal["linear", "cosine"]) -> float:
    """1 up to the last `fraction` of the run, then down to where one step more would be 0."""
    falling, left = round(steps * fraction), steps - step
    if left > falling:
        return 1.0
    share = left / (falling + 1)
    return share if shape == "linear" else 0.5 * (1 - math.cos(math.pi * share))


def restarts(step: int, steps: int, warmup_steps: int, cycles: int) -> float:
    """Cosine with warm restarts (SGDR: Loshchilov and Hutter, arXiv 1608.03983, eq. 5; eta_min = 0, T_mult = 1).

    The steps after the warm-up hold `cycles` equal cycles, each from 1 down to almost 0.
    """
    after, length = step - warmup_steps, steps - warmup_steps
    if after < 0:
        return 1.0
    phase = after * cycles % length / length
    return 0.5 * (1 + math.cos(math.pi * phase))
