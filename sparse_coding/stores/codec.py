"""How rows are written: fp32, bf16, fp16, or int8 centred and scaled per channel.

int8: q = round((x - centre) / scale) within +-127, so a channel's values within `centre` +- 127 `scale` get a noise of
variance scale^2 / 12 and those beyond are clipped. `calibrate` weighs one against the other per channel.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.errors import UserError, near

Codec: TypeAlias = Literal["fp32", "bf16", "fp16", "int8"]
CODECS: tuple[Codec, ...] = get_args(Codec)
DTYPES: dict[Codec, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}
ITEMSIZE: dict[Codec, int] = {codec: dtype.itemsize for codec, dtype in DTYPES.items()}
"""Bytes per number."""


class Affine8(NamedTuple):
    """What int8 needs to be decoded: x = q * scale + centre, the middle of the range. A manifest calls it `mean`."""

    centre: Float[Tensor, " d"]
    scale: Float[Tensor, " d"]

    def to(self, device: torch.device | str) -> Affine8:
        return Affine8(self.centre.to(device), self.scale.to(device))


def checked_codec(name: str) -> Codec:
    """`name` as a codec, or `UserError` that lists them."""
    for codec in CODECS:
        if codec == name:
            return codec
    raise UserError(f"codec is {name!r}: allowed are {', '.join(CODECS)}{near(name, CODECS)}")


def encode(x: Float[Tensor, "n d"], codec: Codec, affine: Affine8 | None = None) -> Tensor:
    """Rows as they are stored `[n d]`, on the device of `x`. int8 needs `affine` on that device.

    Raises `UserError` for values that fp16 cannot hold.
    """
    if codec == "int8":
        assert affine is not None
        return ((x.float() - affine.centre) / affine.scale).round_().clamp_(-127, 127).to(torch.int8)
    stored = x.to(DTYPES[codec])
    if codec == "fp16" and x.dtype != torch.float16 and not torch.isfinite(stored.sum(dtype=torch.float32)):
        largest = x.abs().max().item()
        if largest > 65504:
            raise UserError(f"fp16 holds numbers up to 65504, the activations reach {largest:.3g}: use codec bf16")
    return stored


def decode(stored: Tensor, affine: Affine8 | None = None, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
    """Stored rows as numbers of `dtype`, on their own device; int8 needs `affine` on that device."""
    if stored.dtype == torch.int8:
        assert affine is not None
        return torch.addcmul(affine.centre, stored.float(), affine.scale).to(dtype)
    return stored.to(dtype)


REACHES = (4.0, 5.0, 6.0, 8.0, 11.0, 16.0, 22.0, 32.0, 64.0)
"""Standard deviations on either side of the mean that the range of int8 may span."""
MARGIN = 0.05
"""Of the range, added at both ends: rows to come go a little further than those seen, and more so after few."""


def calibrate(x: Float[Tensor, "n d"]) -> Affine8:
    """int8's centre and scale per channel with the least squared error on these rows, float32.

    A few ranges are tried, mean +- r sigma within the values seen, and the best is kept: 4 sigma for a normal channel,
    more where rare values are large, whose clipping costs more than a coarser step (at the hidden layer of an MLP
    4 sigma would lose a tenth of the variance), and one-sided where the values are. A channel that does not vary gets
    scale 1.
    """
    x = x.float()
    sigma, mean = torch.std_mean(x, dim=0, correction=0)
    low, high = x.amin(0), x.amax(0)
    margin = max(MARGIN, min(0.5, 8 / len(x)))
    best = torch.full_like(mean, torch.inf)
    chosen = Affine8(mean, torch.ones_like(mean))
    for reach in REACHES:
        first, last = torch.maximum(low, mean - reach * sigma), torch.minimum(high, mean + reach * sigma)
        step = (last - first) * ((1 + 2 * margin) / 254)
        tried = Affine8((first + last) / 2, torch.where(step > 0, step, 1.0))
        error = (decode(encode(x, "int8", tried), tried) - x).square().mean(0)
        better = error < best
        best = torch.where(better, error, best)
        chosen = Affine8(*(torch.where(better, new, old) for new, old in zip(tried, chosen, strict=True)))
    return chosen
