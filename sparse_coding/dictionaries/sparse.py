"""The sparse step of a linear dictionary: what its settings and the moment say, in the words of `kernels/sparse.py`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Moment
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.kernels import triton
from sparse_coding.kernels.result import StepResult
from sparse_coding.kernels.sparse import SparseProblem, SparseResult, sparse_step
from sparse_coding.kernels.spread import spread


class Fast(NamedTuple):
    """A sparse step: what there is to hand back, and what an architecture's own terms are made of."""

    result: StepResult
    sparse: SparseResult
    errors: Float[Tensor, "M n_prefixes"]
    """The reconstruction error of each prefix, as the loss has it."""


def sparse_gradients(
    dictionary: LinearDictionary,
    x: Float[Tensor, "B d_in"],
    target: Float[Tensor, "B d_out"] | None,
    moment: Moment,
    dtype: torch.dtype,
    error_weight: float = 1.0,
    densest: float = 1.0,
    **own: Any,
) -> Fast | None:
    """The step of loss = the sum of the prefixes' errors + AuxK + what `own`, fields of `SparseProblem`, adds.

    None where the definition has to do it: a skip connection, an error that the moment brings, ghost gradients, and
    whatever `sparse_step` leaves to it.
    """
    settings, values = dictionary.settings, dictionary.tensors()
    revives = moment.dead is not None and settings.dead_latents != "none"
    if settings.skip or moment.error or (revives and settings.dead_latents == "ghost"):
        return None
    if any(value.dtype != torch.float32 for value in (x, *values.values())):
        return None
    rows, meant = len(x), (x if target is None else target).contiguous()
    each = error_weight / rows  # the weight of a row
    if settings.error == "fvu":
        known = x.device.type == "cpu" and not triton.serves(x)  # asking a GPU would wait for it
        each = error_weight / (spread(meant).item() if known else spread(meant))
    extra, factor = aux_of(dictionary, moment, rows) if revives else ({}, None)
    norms = scoring_norms(dictionary) if own["rule"] != "above" or revives else None
    problem = SparseProblem(
        x.contiguous(), meant, values.get("W_enc"), values["b_enc"], values["W_dec"], values.get("b_dec"),
        settings.subtracts, norms=norms, signed=dictionary.signed, norm_error=settings.error == "l2",
        error_weight=each, density=dictionary.density, learning=dictionary.learning, unit=settings.decoder == "unit",
        projects=settings.decoder == "unit" and settings.remove_parallel_gradient, **extra, **own,
    )  # fmt: skip
    sparse = sparse_step(problem, dtype, densest)
    if sparse is None:
        return None
    errors = sparse.errors * each
    loss, terms = errors.sum(1), {}
    if factor is not None and sparse.auxk is not None:
        terms["auxk"] = sparse.auxk / rows * factor
        loss = loss + dictionary.auxk_coefficient * terms["auxk"]
    left = () if sparse.left is None else sparse.left.numpy().nonzero()[0].tolist()
    result = StepResult(
        dict(sparse.gradients), loss, sparse.squared_error / rows, sparse.l1 / rows, sparse.active, terms, left=left
    )
    return Fast(result, sparse, errors)


def aux_of(dictionary: LinearDictionary, moment: Moment, rows: int) -> tuple[dict[str, Any], Float[Tensor, " M"]]:
    """AuxK as fields of `SparseProblem`, and its factor min(n_dead / k_aux, 1) (see objective.auxk_error)."""
    settings, dead = dictionary.settings, moment.dead
    assert dead is not None
    k_aux = min(settings.k_aux or max(1, settings.target_width // 2), settings.d_sae)
    factor = (dead.sum(1) / k_aux).clamp(max=1)
    weight = dictionary.auxk_coefficient * factor / rows
    return {"dead": dead.contiguous(), "k_aux": k_aux, "aux_weight": weight}, factor


def scoring_norms(dictionary: LinearDictionary) -> Float[Tensor, "M d_sae"] | None:
    """What `LinearDictionary.ranked` multiplies pre-activations by; None where that is 1."""
    if dictionary.settings.decoder == "unit":
        return None
    norms = dictionary.norms.detach()
    return torch.where(norms > 0, norms, 1.0)
