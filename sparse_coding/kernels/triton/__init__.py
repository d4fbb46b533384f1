"""The fast steps on NVIDIA GPUs, in Triton: nothing in them waits for the device, and all shapes are known beforehand.

Triton is imported by the modules of this package, not here: a CPU needs none.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

OLDEST = (8, 0)
"""Compute capability of the first cards that multiply bf16."""


def serves(x: Tensor) -> bool:
    """Whether what holds `x` runs these kernels; torch's operators do the work on other devices and older cards."""
    return x.is_cuda and available(x.device)


@cache
def available(device: torch.device) -> bool:
    recent = torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST
    return recent and find_spec("triton") is not None


def latents_together(weights: Tensor) -> Tensor:
    """`[... d_in d_sae]` with the numbers of each latent side by side in memory, as the kernels read and write them."""
    return weights.mT.contiguous().mT
