"""A dictionary of normalised rows, used on raw ones: what row-wise normalisation in training leaves to inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Dictionary
from sparse_coding.dictionaries.normalise import RowNorm, row_statistics


@final
class RowNormalised(Dictionary):
    """f = encode((x - shift) / scale), x_hat = decode(f) scale + shift, with shift and scale of each row of x.

    Codes and atoms are in the units of normalised rows.
    """

    def __init__(self, inner: Dictionary, kind: RowNorm, parts: Sequence[int] = ()):
        super().__init__()
        self.inner, self.parts = inner, tuple(parts)
        self.kind: RowNorm = kind

    @property
    def atoms(self) -> Float[Tensor, "d_sae d_in"]:
        return self.inner.atoms

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        shift, scale = row_statistics(x, self.kind, self.parts)
        return self.inner.encode((x - shift) / scale)

    def decode(
        self, f: Float[Tensor, "... B d_sae"], x: Float[Tensor, "... B d_in"] | None = None
    ) -> Float[Tensor, "... B d_in"]:
        if x is None:
            raise ValueError("a dictionary of normalised rows needs the activations to decode: decode(f, x)")
        shift, scale = row_statistics(x, self.kind, self.parts)
        return self.inner.decode(f) * scale + shift
