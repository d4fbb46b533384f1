"""The sparse step in C++: one call for the whole stack, on as many threads as torch uses."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_coding.kernels.compiled import compiled

if TYPE_CHECKING:
    from sparse_coding.kernels.sparse import SparseProblem, SparseResult

FOLDER = Path(__file__).parent / "cpp"
SOURCES = tuple(
    FOLDER / name
    for name in (
        *("sparse_step.cpp", "sparse_step.h", "sparse_problem.h", "sparse_encode.h", "sparse_reconstruct.h"),
        *("sparse_weights.h", "select.h", "product.h", "rows.h", "team.h"),
    )
)
NO_MEMORY = 2
RULES = {"topk": 0, "batch": 1, "above": 2}
INTEGERS = (
    "members", "rows", "d_in", "d_out", "d_sae", "n_ends", "k_aux", "threads",
    "rule", "half", "subtracts", "is_signed", "norm_error",
)  # fmt: skip
NUMBERS = ("densest", "error_weight")
POINTERS = (
    "x", "target", "W_enc", "b_enc", "W_dec", "b_dec", "k", "ends", "norms", "threshold", "window", "penalty",
    "aux_weight", "dead", "left", "d_W_enc", "d_b_enc", "d_W_dec", "d_b_dec", "active", "d_inside", "n_inside",
    "smallest", "sums", "seconds",
)  # fmt: skip
PHASES = ("pack", "product", "choose", "reconstruct", "index", "weights")
seconds: Tensor | None = None
"""Processor time by phase [len(PHASES)], float64, to which each step adds its own; set by who wants to know."""


class Problem(ctypes.Structure):
    """`Problem` of cpp/sparse_problem.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in INTEGERS),
        *((name, ctypes.c_double) for name in NUMBERS),
        *((name, ctypes.c_void_p) for name in POINTERS),
    ]


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled step; None where there is no compiler (said once) or it was switched off."""
    return compiled("sparse_step.cpp", SOURCES)


def step(problem: SparseProblem, left: Tensor, dtype: torch.dtype, densest: float) -> SparseResult:
    """See `sparse.sparse_step`. `left` `[M]` marks members to leave out; others are added."""
    from sparse_coding.kernels.sparse import SparseResult

    n_members, rows, d_in, d_out, d_sae = problem.sizes
    n_ends = len(problem.prefixes)
    given = {"W_enc": problem.W_enc, "b_enc": problem.b_enc, "W_dec": problem.W_dec, "b_dec": problem.b_dec}
    gradients = {name: torch.empty_like(value) for name, value in given.items() if value is not None}
    outputs = {
        "active": torch.empty(n_members, d_sae),
        "sums": torch.empty(n_members, n_ends + 3, dtype=torch.float64),
        **({"smallest": torch.empty(n_members)} if problem.rule == "batch" else {}),
        **({name: torch.empty(n_members, d_sae) for name in ("d_inside", "n_inside") if problem.window is not None}),
    }
    tensors: dict[str, Tensor | None] = {
        name: getattr(problem, name)
        for name in ("x", "target", "k", "norms", "threshold", "window", "penalty", "aux_weight")
    }
    tensors |= given | outputs | {f"d_{name}": value for name, value in gradients.items()}
    tensors["seconds"], tensors["left"] = seconds, left.view(torch.uint8)
    tensors["ends"] = torch.tensor(problem.prefixes)
    tensors["dead"] = None if problem.dead is None else problem.dead.view(torch.uint8)
    numbers = (
        *(n_members, rows, d_in, d_out, d_sae, n_ends, problem.k_aux, torch.get_num_threads()),
        *(RULES[problem.rule], dtype == torch.bfloat16, problem.subtracts, problem.signed, problem.norm_error),
        *(densest, problem.error_weight),
    )
    arguments = Problem(**dict(zip((*INTEGERS, *NUMBERS), numbers, strict=True)), **pointers(tensors))
    failed = loaded().sparse_step(ctypes.byref(arguments))  # type: ignore[union-attr]
    if failed == NO_MEMORY:
        raise MemoryError
    assert not failed
    sums = outputs["sums"].float()
    squared_error, auxk, l1 = sums[:, n_ends:].unbind(1)
    return SparseResult(
        gradients,
        sums[:, :n_ends],
        squared_error,
        auxk,
        l1,
        outputs["active"],
        outputs.get("smallest"),
        outputs.get("d_inside"),
        outputs.get("n_inside"),
        left,
    )


def pointers(tensors: Mapping[str, Tensor | None]) -> dict[str, int | None]:
    """Addresses by name, each tensor checked to be what the C++ reads."""
    wanted = {
        "k": torch.int64,
        "ends": torch.int64,
        "dead": torch.uint8,
        "left": torch.uint8,
        "sums": torch.float64,
        "seconds": torch.float64,
    }
    for name, tensor in tensors.items():
        assert tensor is None or tensor.is_contiguous(), name
        assert tensor is None or tensor.dtype == wanted.get(name, torch.float32), (name, tensor.dtype)
    assert tensors.keys() <= set(POINTERS)
    return {name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
