"""Where tensors live."""

from __future__ import annotations

import torch

from sparse_coding.errors import UserError


def pick_device(name: str) -> str:
    """The device by name; `auto` is cuda, then mps, then cpu."""
    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    kind = name.split(":")[0]
    if kind not in ("cpu", "cuda", "mps"):
        raise UserError(f"the device is {name!r}: allowed are auto, cpu, cuda (or cuda:0, ...) and mps")
    if kind == "cuda":
        number = name.partition(":")[2] or "0"
        if not number.isdigit() or int(number) >= torch.cuda.device_count():
            raise UserError(f"the device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise UserError("the device is 'mps', but torch sees none: use --device auto")
    return name


def has_bf16(device: str | torch.device) -> bool:
    """Whether the hardware multiplies bf16 matrices natively: there they are 3x (CPU) to 13x (GPU) faster than fp32.

    A CPU without the instructions is slower in bf16 than in fp32: 0.5x to 0.9x with AVX-512 alone, 0.02x with AVX2
    (products of 2,048 x 768 x 3,072 and smaller, 2 cores, oneDNN).
    """
    kind = torch.device(device).type
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


BF16_WIDTH = 96
"""A CPU is no faster in bf16 with narrower models: at 64 what is rounded back and forth costs more than it saves."""


def bf16_pays(device: str | torch.device, width: int) -> bool:
    """Whether a language model of this width runs faster in bf16 than in fp32: the automatic choice."""
    return has_bf16(device) and (torch.device(device).type != "cpu" or width >= BF16_WIDTH)
