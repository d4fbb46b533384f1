"""What every step of a linear dictionary computes from: rows, targets and weights."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sparse_coding.kernels.triton.adam import RowAdam


@dataclass(frozen=True)
class LinearProblem:
    """One step of a stack; all tensors float32 and contiguous on one device, `[M ...]` but for rows."""

    x: Float[Tensor, "B d_in"]
    target: Float[Tensor, "B d_out"]
    W_enc: Float[Tensor, "M d_in d_sae"] | None
    """None: tied, W_dec^T."""
    b_enc: Float[Tensor, "M d_sae"]
    """Of the gates, where there are any."""
    W_dec: Float[Tensor, "M d_sae d_out"]
    b_dec: Float[Tensor, "M d_out"] | None
    subtracts: bool
    """Whether the encoder sees x - b_dec."""
    _: KW_ONLY
    learning: RowAdam | None = None
    """Update W_enc and W_dec in place, instead of giving their gradients; read on a GPU alone."""
    unit: bool = False
    """An update of W_dec ends with atoms of norm 1."""
    projects: bool = False
    """It leaves out the part of an atom's gradient along the atom."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """M, B, d_in, d_out, d_sae."""
        n_members, d_sae, d_out = self.W_dec.shape
        rows, d_in = self.x.shape
        return n_members, rows, d_in, d_out, d_sae
