"""Adam in C++: one call for every parameter of every member, where torch's fused kernel wants one for each.

Small members spend more time in those calls than in the arithmetic. Both give the same bits, which is looked at before
the first step; where they would not, where a parameter does not fill whole vector registers (torch rounds the rest of
it otherwise), with weight decay, and without a compiler, torch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.optim.adam import adam

from sparse_coding.kernels.compiled import compiled

FOLDER = Path(__file__).parent / "cpp"
SOURCES = (FOLDER / "adam_step.cpp", FOLDER / "team.h")
POINTERS = ("sizes", "values", "steps", "moment1", "moment2", "gradients")
REGISTER = 16
"""Numbers in the widest vector register."""


class Problem(ctypes.Structure):
    """`AdamProblem` of cpp/adam_step.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("members", "parameters", "threads")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
        *((name, ctypes.c_void_p) for name in ("lrs", *POINTERS)),
    ]


@cache
def loaded() -> ctypes.CDLL | None:
    """The compiled step; None where there is no compiler, it was switched off, or it differs from torch's."""
    found = compiled("adam_step.cpp", SOURCES)
    return found if found and is_exact(found) else None


def fits(parameters: Mapping[str, Tensor]) -> bool:
    """Whether parameters `[M ...]` are of a kind that the step takes."""
    return all(
        value.device.type == "cpu" and value.dtype == torch.float32 and value[0].numel() % REGISTER == 0
        for value in parameters.values()
    )


def step(
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    steps: Mapping[str, Tensor],
    lrs: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> bool:
    """Update contiguous `parameters` `[M ...]`, their moments and their counts `[M]` in place; False: nothing was done.

    Member m learns at the rate `lrs[m]`.
    """
    found = loaded()
    return found is not None and call(found, parameters, gradients, moments, steps, lrs, betas, eps)


def call(
    found: ctypes.CDLL,
    parameters: Mapping[str, Tensor],
    gradients: Mapping[str, Tensor],
    moments: Mapping[str, Mapping[str, Tensor]],
    steps: Mapping[str, Tensor],
    lrs: Sequence[float],
    betas: tuple[float, float],
    eps: float,
) -> bool:
    names, count = list(parameters), len(parameters)
    groups = (parameters, steps, moments["moment1"], moments["moment2"], gradients)
    tensors = [[group[name] for name in names] for group in groups]
    assert all(one.is_contiguous() and one.dtype == torch.float32 for group in tensors for one in group)
    rates = (ctypes.c_double * len(lrs))(*lrs)
    sizes = (ctypes.c_int64 * count)(*(value[0].numel() for value in parameters.values()))
    lists = [(ctypes.c_void_p * count)(*(one.data_ptr() for one in group)) for group in tensors]
    addresses = (ctypes.cast(one, ctypes.c_void_p) for one in (rates, sizes, *lists))
    problem = Problem(len(lrs), count, torch.get_num_threads(), *betas, eps, *addresses)
    return found.adam_step(ctypes.byref(problem)) == 0


def is_exact(found: ctypes.CDLL) -> bool:
    """Whether the step gives torch's bits: three steps of two members."""
    generator = torch.Generator().manual_seed(0)
    value, moment1, *gradients = (torch.randn(2, 64 * REGISTER, generator=generator) for _ in range(5))
    ours = [value, moment1, moment1.square(), torch.zeros(2)]
    theirs = [[one[index].clone() for index in range(2)] for one in ours]
    for gradient in gradients:
        named = [{"": one} for one in (ours[0], gradient, ours[1], ours[2], ours[3])]
        moments = {"moment1": named[2], "moment2": named[3]}
        if not call(found, named[0], named[1], moments, named[4], [1e-3, 1e-2], (0.9, 0.999), 1e-8):
            return False
        for index, lr in enumerate((1e-3, 1e-2)):
            adam(
                [theirs[0][index]], [gradient[index]], [theirs[1][index]], [theirs[2][index]], [], [theirs[3][index]],
                fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr, weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip
    return all(torch.equal(one, torch.stack(other)) for one, other in zip(ours, theirs, strict=True))
