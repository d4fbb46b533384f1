"""Which precision the matrix products run in; parameters and accumulation are always fp32."""

from __future__ import annotations

from typing import Literal

import torch

from sparse_coding.errors import UserError

Precision = Literal["auto", "bf16", "fp16", "fp32"]
"""auto: bf16 where the hardware has it, else fp32. fp16 is for GPUs without bf16: its losses are scaled."""


def has_bf16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices natively: there they are 3x (CPU) to 13x (GPU) faster than fp32."""
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def products_dtype(precision: Precision, device: str | torch.device) -> torch.dtype:
    """The dtype of the matrix products of a training step."""
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    if precision not in dtypes:
        raise UserError(f"the precision is {precision!r}: allowed are auto, {', '.join(dtypes)}")
    return dtypes[precision]
