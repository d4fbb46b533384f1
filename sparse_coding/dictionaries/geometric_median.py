"""The geometric median: the point with the smallest mean distance to the rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def geometric_median(
    rows: Float[Tensor, "N d"], tolerance: float = 1e-10, most_iterations: int = 10_000
) -> Float[Tensor, " d"]:
    """argmin_m sum_i ||x_i - m|| in float64, by Weiszfeld's iteration with the step of Vardi and Zhang (2000).

    Starts at the mean and stops when the point moves by less than `tolerance` times the mean distance to the rows.
    Where the point falls on some rows (which plain Weiszfeld divides by zero at), the pull R of the others decides: it
    is the median if ||R|| is at most the number of rows there, else the step is shortened by that share.
    """
    x = rows.double()
    m = x.mean(0)
    for _ in range(most_iterations):
        distances = (x - m).norm(dim=1)
        mean_distance = distances.mean()
        here = distances <= 1e-14 * mean_distance
        if bool(here.all()):
            return m
        weights = torch.where(here, 0.0, 1 / distances.where(~here, torch.ones_like(distances)))
        target = weights @ x / weights.sum()
        pull = ((target - m) * weights.sum()).norm()
        share = min(1.0, float(here.sum() / pull)) if pull > 0 else 1.0
        step = (1 - share) * (target - m)
        m = m + step
        if float(step.norm()) <= tolerance * float(mean_distance):
            return m
    return m
