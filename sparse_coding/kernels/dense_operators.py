"""The dense step in torch's own operators: everywhere at hand, on any device.

Elementwise work is done in place on `[M B d_sae]` in the dtype of the products; the parameters, the residual and the
small reductions stay fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from sparse_coding.kernels.dense import DenseProblem, DenseResult

CHUNK = 128


def step(problem: DenseProblem, dtype: torch.dtype) -> DenseResult:
    """See `dense.dense_step`."""
    from sparse_coding.kernels.dense import DenseResult

    n_rows, n_members = len(problem.x), len(problem.W_dec)
    bias = 0.0 if problem.b_dec is None else problem.b_dec.unsqueeze(1)
    inputs = (problem.x - bias if problem.subtracts else problem.x).to(dtype).expand(n_members, -1, -1)
    decoder = problem.W_dec.to(dtype)
    encoder = decoder.mT if problem.W_enc is None else problem.W_enc.to(dtype)

    codes = coded(problem, inputs, encoder)
    errors = [torch.bmm(f, decoder).float().sub_(problem.target - bias) for f in codes]
    squared = [error.square().sum((1, 2)) / n_rows for error in errors]
    weights = (2 * problem.error_weight / n_rows, 2 / n_rows)
    d_errors = [error.mul_(weight) for error, weight in zip(errors, weights, strict=False)]
    halves = [error.to(dtype) for error in d_errors]
    trains = slice(0, 1 if problem.frozen else None)  # whose errors train the decoder
    d_decoder = added([torch.bmm(f.mT, d) for f, d in zip(codes[trains], halves[trains], strict=True)])

    active = column_sums(torch.sign(codes[0]))  # codes are >= 0; a sum of booleans is ten times slower on a CPU
    totals = [column_sums(f) / n_rows for f in codes]
    penalty = (problem.penalty / n_rows).to(dtype).unsqueeze(1)
    d_codes = [torch.bmm(d, decoder.mT) for d in halves[:-1]] + [torch.baddbmm(penalty, halves[-1], decoder.mT)]
    d_codes = [torch.ops.aten.threshold_backward(d, f, 0) for d, f in zip(d_codes, codes, strict=True)]
    gradients = {"b_enc": column_sums(d_codes[-1])}
    if problem.r_mag is not None and problem.b_mag is not None:
        gradients |= magnitude_gradients(problem.b_mag, d_codes[0], codes[0])
        d_codes[0] = d_codes[-1].addcmul_(d_codes[0], problem.r_mag.exp().to(dtype).unsqueeze(1))
    d_encoder = torch.bmm(inputs.mT, d_codes[0])

    if problem.W_enc is None:
        gradients["W_dec"] = d_decoder.float().add_(d_encoder.mT)
    else:
        gradients["W_enc"], gradients["W_dec"] = d_encoder.float(), d_decoder.float()
    if problem.b_dec is not None:
        gradients["b_dec"] = added([error.sum(1) for error in d_errors[trains]])
        if problem.subtracts:
            slope = column_sums(d_codes[0]) if len(codes) > 1 else gradients["b_enc"]
            columns = problem.W_dec if problem.W_enc is None else problem.W_enc.mT
            gradients["b_dec"] -= torch.bmm(slope.unsqueeze(1), columns).squeeze(1)
    auxiliary = squared[1] if len(codes) > 1 else torch.zeros_like(squared[0])
    return DenseResult(gradients, squared[0], auxiliary, totals[0], totals[-1], active)


def coded(problem: DenseProblem, inputs: Tensor, encoder: Tensor) -> list[Tensor]:
    """[f], or [f, open gates]."""
    bias = problem.b_enc.to(inputs.dtype).unsqueeze(1)
    if problem.r_mag is None or problem.b_mag is None:
        return [torch.baddbmm(bias, inputs, encoder).relu_()]
    e = torch.bmm(inputs, encoder)
    b_mag, scale = (value.to(inputs.dtype).unsqueeze(1) for value in (problem.b_mag, problem.r_mag.exp()))
    sizes = torch.addcmul(b_mag, e, scale).relu_()
    gates = e.add_(bias).relu_()
    return [torch.ops.aten.threshold_backward(sizes, gates, 0), gates]


def magnitude_gradients(
    b_mag: Float[Tensor, "M d_sae"], d_f: Float[Tensor, "M B d_sae"], f: Float[Tensor, "M B d_sae"]
) -> dict[str, Tensor]:
    """Of b_mag and r_mag, `d_f` being 0 where f is: there exp(r_mag) e = f - b_mag."""
    d_b_mag = column_sums(d_f)
    return {"b_mag": d_b_mag, "r_mag": column_sums(d_f * f) - d_b_mag * b_mag}


def added(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def column_sums(values: Float[Tensor, "M B n"]) -> Float[Tensor, "M n"]:
    """Sum over the batch, in fp32. bf16 is summed in chunks of 128 rows, each exact up to its last rounding (counts
    are exact): asking torch for an fp32 sum of a bf16 tensor would first copy all of it."""
    if values.dtype == torch.float32 or values.shape[1] % CHUNK:
        return values.sum(1, dtype=torch.float32)
    return values.unflatten(1, (-1, CHUNK)).sum(2).float().sum(1)
