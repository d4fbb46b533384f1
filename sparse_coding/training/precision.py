"""Which precision the matrix products run in; parameters and accumulation are always fp32."""

from __future__ import annotations

from typing import Literal

import torch

from sparse_coding.device import has_bf16
from sparse_coding.errors import UserError

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""auto: bf16 where the hardware has it, else fp32. fp16 is for GPUs without bf16: its losses are scaled."""


def products_dtype(precision: Precision, device: str | torch.device) -> torch.dtype:
    """The dtype of the matrix products of a training step."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in dtypes:
        raise UserError(f"the precision is {precision!r}: allowed are auto, {', '.join(dtypes)}")
    return dtypes[precision]
