"""The dense step in C++: one call for the whole stack, on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_coding.kernels.compiled import compiled

if TYPE_CHECKING:
    from sparse_coding.kernels.dense import DenseProblem, DenseResult

FOLDER = Path(__file__).parent / "cpp"
SOURCES = tuple(FOLDER / name for name in ("dense_step.cpp", "dense_problem.h", "dense_tile.h", "product.h", "team.h"))
INTEGERS = ("members", "rows", "d_in", "d_out", "d_sae", "threads", "half", "subtracts", "frozen")
PARAMETERS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_mag", "r_mag")
POINTERS = (
    "x", "target", *PARAMETERS, "penalty", *(f"d_{name}" for name in PARAMETERS), "active", "codes", "gates", "sums",
)  # fmt: skip


class Problem(ctypes.Structure):
    """`DenseProblem` of cpp/dense_problem.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in INTEGERS),
        ("error_weight", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled step; None where there is no compiler (said once) or it was switched off."""
    return compiled("dense_step.cpp", SOURCES)


def serves(problem: DenseProblem, dtype: torch.dtype) -> bool:
    tensors = [problem.x, problem.target, *(getattr(problem, name) for name in PARAMETERS)]
    fits = all(one is None or one.dtype == torch.float32 for one in tensors)
    wanted = dtype in (torch.float32, torch.bfloat16)
    return fits and wanted and problem.x.device.type == "cpu" and loaded() is not None


def step(problem: DenseProblem, dtype: torch.dtype) -> DenseResult | None:
    """See `dense.dense_step`; None where products are to be in bf16 and the CPU has none."""
    from sparse_coding.kernels.dense import DenseResult

    n_members, d_sae, d_out = problem.W_dec.shape
    rows, d_in = problem.x.shape
    given = {name: getattr(problem, name) for name in PARAMETERS}
    gradients = {name: torch.empty_like(value) for name, value in given.items() if value is not None}
    found = {name: problem.W_dec.new_empty(n_members, d_sae) for name in ("active", "codes", "gates")}
    sums = torch.empty(n_members, 2, dtype=torch.float64)
    each = {name: getattr(problem, name).contiguous() for name in ("x", "target")}
    each["penalty"] = (problem.penalty / rows).contiguous()  # of a row
    tensors: dict[str, Tensor | None] = {**given, **each, **found, "sums": sums}
    tensors |= {f"d_{name}": value for name, value in gradients.items()}
    assert all(value is None or value.is_contiguous() for value in tensors.values())
    pointers = (tensors.get(name) for name in POINTERS)
    arguments = Problem(
        *(n_members, rows, d_in, d_out, d_sae, torch.get_num_threads()),
        *(dtype == torch.bfloat16, problem.subtracts, problem.frozen, problem.error_weight / rows),
        *(None if value is None else value.data_ptr() for value in pointers),
    )
    if loaded().dense_step(ctypes.byref(arguments)):  # type: ignore[union-attr]
        return None
    squared_error, auxiliary = (sums / rows).float().unbind(1)
    codes = found["codes"].div_(rows)
    gates = codes if problem.r_mag is None else found["gates"].div_(rows)
    return DenseResult(gradients, squared_error, auxiliary, codes, gates, found["active"])
