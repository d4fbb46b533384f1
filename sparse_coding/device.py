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
