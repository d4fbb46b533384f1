"""Rows kept at unit norm: the projection of their gradients, and the norms after an update.

In C++ each is one pass over memory without a temporary; torch's operators, which take three and two, do it on other
devices and where there is no compiler.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels.compiled import compiled

FOLDER = Path(__file__).parent / "cpp"
SOURCES = (FOLDER / "unit_rows.cpp", FOLDER / "team.h")


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled passes; None where there is no compiler (said once) or it was switched off."""
    return compiled("unit_rows.cpp", SOURCES)


def project_(gradient: Float[Tensor, "... n d"], atoms: Float[Tensor, "... n d"]) -> None:
    """Drop from each gradient, in place, its part along the atom of unit norm."""
    if served(gradient, atoms):
        library().project_rows(*addresses(atoms, gradient), *extent(gradient))
    else:
        gradient.addcmul_(atoms, (atoms * gradient).sum(-1, keepdim=True), value=-1)


def normalise_(rows: Float[Tensor, "... n d"]) -> None:
    """Rows to unit norm in place; a zero row stays zero."""
    if served(rows):
        library().normalise_rows(*addresses(rows), *extent(rows))
    else:
        norms = rows.norm(dim=-1, keepdim=True)
        rows.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))


def served(*tensors: Tensor) -> bool:
    fits = all(one.device.type == "cpu" and one.dtype == torch.float32 and one.is_contiguous() for one in tensors)
    return fits and tensors[0].numel() > 0 and loaded() is not None


def library() -> ctypes.CDLL:
    found = loaded()
    assert found is not None
    return found


def addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(one.data_ptr()) for one in tensors]


def extent(rows: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]:
    """How many rows, their width, and the threads to take."""
    width = rows.shape[-1]
    return ctypes.c_int64(rows.numel() // width), ctypes.c_int64(width), ctypes.c_int64(torch.get_num_threads())
