"""The sparse step of `kernels/sparse.py` on a GPU: six stages, none of which the host has to wait for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.kernels.triton import columns
from sparse_coding.kernels.triton.choose import Entries, largest_of_rows
from sparse_coding.kernels.triton.encode import Encoded, encode
from sparse_coding.kernels.triton.index import List, by_latent
from sparse_coding.kernels.triton.listed import all_above, largest_of_batch
from sparse_coding.kernels.triton.reconstruct import Reconstructed, reconstruct
from sparse_coding.kernels.triton.revive import largest_of_dead
from sparse_coding.kernels.triton.rows import Window, latent_totals, learn_rows

if TYPE_CHECKING:
    from sparse_coding.kernels.sparse import SparseProblem, SparseResult


DENSEST = 1 / 8
DENSEST_ABOVE = 1 / 50
"""Share of active entries up to which the step is taken, of the rules that say how many there are and of the other;
estimated from the bytes that move, not measured yet."""
MOST_ENTRIES = 2**27
"""As many are made room for where nothing but the data says how many are active."""


def step(problem: SparseProblem, dtype: torch.dtype) -> SparseResult | None:
    """See `sparse.sparse_step`; None where too many entries could be active."""
    from sparse_coding.kernels.sparse import SparseResult

    n_members, n_rows, d_in, d_out, d_sae = problem.sizes
    if problem.rule == "above":
        if not problem.density <= DENSEST_ABOVE or n_members * n_rows * d_sae > MOST_ENTRIES:
            return None
    elif problem.most > DENSEST * d_sae * (n_rows if problem.rule == "batch" else 1):
        return None
    device, n_ends = problem.x.device, len(problem.prefixes)
    inputs, (atoms, encoder) = centred(problem, dtype), in_dtype(problem, dtype)
    encoded = encode(
        inputs, encoder, problem.b_enc, problem.norms, problem.signed, kept_in(problem, dtype),
        problem.rule == "above", problem.threshold, problem.window,
    )  # fmt: skip
    entries, smallest = chosen(problem, encoded)

    ends, weight = on_device(problem.prefixes, device), problem.error_weight
    weight = weight.view(1) if isinstance(weight, Tensor) else torch.full((1,), weight, device=device)
    n_sources, n_revived = n_members * n_rows * n_ends, 0 if problem.dead is None else n_members * n_rows
    learns, auxk = torch.empty(n_sources + n_revived, d_out, dtype=dtype, device=device), None
    found = reconstruct(
        entries, atoms, problem.b_dec, problem.target, weight, problem.penalty, ends, learns[:n_sources],
        problem.norm_error, keeps_parts=problem.b_dec is not None, keeps_left=problem.dead is not None,
        keeps_d_f=problem.window is not None,
    )  # fmt: skip
    lists = [List(entries.latent, entries.f, found.slope, n_ends, 0, found.d_f, entries.rows, entries.total)]
    if problem.dead is not None:
        revived, fit = revival(problem, encoded, atoms, found.left, learns[n_sources:])
        lists.append(List(revived.latent, revived.f, fit.slope, 1, n_sources, None, revived.rows, revived.total))
        auxk = fit.squared_error * problem.dead.any(1)
    ordered = by_latent(lists, ends, n_rows, d_sae)
    window = None
    if problem.window is not None and problem.threshold is not None:
        window = Window(encoded.pre, problem.threshold, problem.window)
    totals = latent_totals(ordered, n_sources, window)
    gradients = {"b_enc": totals.slope}
    if found.parts is not None and problem.b_dec is not None:
        gradients["b_dec"] = columns.sum_of_rows(found.parts.view(n_members, n_rows * n_ends, d_out))
        if problem.subtracts:
            gradients["b_dec"] -= torch.bmm(totals.slope.unsqueeze(1).to(dtype), encoder.mT).squeeze(1)
    gradients |= learn_rows(  # last: it may change what is read above
        ordered, totals, learns, inputs.reshape(-1, d_in), problem.W_dec, problem.W_enc,
        problem.learning, problem.unit, problem.projects,
    )  # fmt: skip
    return SparseResult(
        gradients,
        found.errors,
        found.squared_error,
        auxk,
        found.l1,
        totals.active,
        smallest,
        totals.inside,
        totals.n_inside,
    )


def kept_in(problem: SparseProblem, dtype: torch.dtype) -> torch.dtype:
    """Rows that choose for themselves do with what autocast would give them. A batch would have many entries equal to
    its last in bf16, all of which it keeps, and the window around a threshold is narrower than bf16 tells apart."""
    return dtype if problem.rule == "topk" else torch.float32


def chosen(problem: SparseProblem, encoded: Encoded) -> tuple[Entries, Float[Tensor, " M"] | None]:
    """The active entries, and the smallest score among them where the batch chooses."""
    if problem.rule == "above":
        return all_above(encoded, problem.threshold, problem.window), None
    assert problem.k is not None
    if problem.rule == "batch":
        return largest_of_batch(encoded, problem.k, problem.most, problem.norms)
    return largest_of_rows(encoded, problem.k, problem.most, problem.norms, problem.signed), None


def centred(problem: SparseProblem, dtype: torch.dtype) -> Tensor:
    """What the encoders multiply, [M B d_in]."""
    if problem.subtracts and problem.b_dec is not None:
        return columns.centred(problem.x, problem.b_dec, dtype)
    return problem.x.to(dtype).expand(len(problem.W_dec), -1, -1)


def in_dtype(problem: SparseProblem, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The atoms and the encoder as the products take them."""
    learning = problem.learning
    atoms = learning.half("W_dec", dtype) if learning else problem.W_dec.to(dtype)
    if problem.W_enc is None:
        return atoms, atoms.mT
    return atoms, learning.half("W_enc", dtype) if learning else problem.W_enc.to(dtype)


def revival(
    problem: SparseProblem, encoded: Encoded, atoms: Tensor, left: Tensor | None, learns: Tensor
) -> tuple[Entries, Reconstructed]:
    """AuxK: its entries, and how they fit what is left."""
    assert problem.dead is not None
    assert problem.aux_weight is not None
    assert left is not None
    entries = largest_of_dead(encoded.pre, problem.dead, problem.k_aux, problem.norms, problem.signed)
    fit = reconstruct(
        entries, atoms, None, left, problem.aux_weight, None, on_device((atoms.shape[1],), atoms.device), learns,
        norm_error=False, keeps_parts=False, keeps_left=False, keeps_d_f=False,
    )  # fmt: skip
    return entries, fit


@cache
def on_device(numbers: tuple[int, ...], device: torch.device) -> Int[Tensor, " n"]:
    return torch.tensor(numbers, dtype=torch.int32).to(device)
