"""What FVU divides by."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels import triton


def spread(x: Float[Tensor, "B d"]) -> Float[Tensor, ""]:
    """The sum of the rows' squared distances to their mean. NaN or infinity where x holds any."""
    if x.dtype == torch.float32 and triton.serves(x):
        from sparse_coding.kernels.triton import columns  # imports Triton, which a CPU need not have

        with torch.cuda.device_of(x):
            return columns.spread(x.contiguous())
    return (x - x.mean(0)).square().sum()
