"""Moments in bf16: what does not fit is rounded up or down at random, in proportion to where it lies between the two.

Adam's mean of squares moves by a thousandth of itself in a step, and two numbers of bf16 are 1/256 apart: rounded to
the nearest it would never move. At random it moves as it should on average (Gupta et al., arXiv 1502.02551). The draws
are a hash of the place, the count of updates and which moment it is: the same in every run, and without a state.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

WORD = 0xFFFFFFFF


def rounded(value: Float[Tensor, "..."], count: Tensor, which: int) -> Float[Tensor, "..."]:
    """`value` (float32) in bf16; `count`: of updates so far, a number on its device, `which`: of the moments."""
    bits = value.contiguous().view(torch.int32)
    noise = hashed(torch.arange(value.numel(), device=value.device), count.long(), which).view(value.shape)
    return ((bits + (noise & 0xFFFF).int()) & -0x10000).view(torch.float32).to(torch.bfloat16)


def hashed(place: Int[Tensor, " n"], count: Tensor, which: int) -> Int[Tensor, " n"]:
    """32 bits that look random (the finaliser of Wellons' hash prospector, 0x21f0aaad 0x735a2d97)."""
    x = (place + 0x3C6EF372 * count + which) & WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & WORD
    x = ((x ^ (x >> 15)) * 0x735A2D97) & WORD
    return x ^ (x >> 15)
