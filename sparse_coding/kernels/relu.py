"""One training step of a stack of ReLU-L1 dictionaries, without autograd.

    z = (x - b_dec) W_enc + b_enc        f = relu(z)        x_hat = f W_dec + b_dec
    loss = error_weight * mean_b ||x_hat - x||^2 + l1_weight * mean_b ||f||_1

Five matrix products per member, 10 B d_in d_sae FLOP, in `dtype` (bf16 products accumulate in fp32; the parameters,
the residual and the small reductions stay fp32). The gradient of `b_dec` through the encoder is a matrix-vector
product, so a learned `b_dec` costs no sixth GEMM. Elementwise work is done in place on `[M B d_sae]` in `dtype`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.kernels.result import StepResult

CHUNK = 128


@torch.no_grad()
def relu_l1_step(
    x: Float[Tensor, "B d_in"],
    W_enc: Float[Tensor, "M d_in d_sae"] | None,
    b_enc: Float[Tensor, "M d_sae"],
    W_dec: Float[Tensor, "M d_sae d_in"],
    b_dec: Float[Tensor, "M d_in"] | None,
    error_weight: float,
    l1_weight: Float[Tensor, " M"],
    dtype: torch.dtype,
) -> StepResult:
    """Loss, gradients and metrics of each member on one shared batch. `W_enc` None means tied: W_enc = W_dec^T."""
    n_members, n_rows = W_dec.shape[0], x.shape[0]
    decoder = W_dec.to(dtype)
    encoder = decoder.mT if W_enc is None else W_enc.to(dtype)

    centred = x if b_dec is None else x - b_dec.unsqueeze(1)
    inputs = centred.to(dtype).expand(n_members, -1, -1)
    f = torch.baddbmm(b_enc.to(dtype).unsqueeze(1), inputs, encoder).relu_()
    error = torch.bmm(f, decoder).float().sub_(centred)  # x_hat - x: b_dec cancels
    squared_error = error.square().sum((1, 2)) / n_rows

    d_error = (error * (2 * error_weight / n_rows)).to(dtype)
    active = column_sums(torch.sign(f))  # codes are >= 0; a sum of booleans is ten times slower on a CPU
    total_f = column_sums(f)
    d_decoder = torch.bmm(f.mT, d_error)
    penalty = (l1_weight / n_rows).to(dtype).view(-1, 1, 1)
    d_f = torch.baddbmm(penalty, d_error, decoder.mT)
    d_z = torch.ops.aten.threshold_backward(d_f, f, 0)
    d_encoder = torch.bmm(inputs.mT, d_z)

    d_b_enc = column_sums(d_z)
    gradients = {"b_enc": d_b_enc}
    if W_enc is None:
        gradients["W_dec"] = d_decoder.float().add_(d_encoder.mT)
    else:
        gradients["W_enc"], gradients["W_dec"] = d_encoder.float(), d_decoder.float()
    if b_dec is not None:
        weights = W_dec if W_enc is None else W_enc.mT
        through_encoder = torch.bmm(d_b_enc.unsqueeze(1), weights).squeeze(1)
        gradients["b_dec"] = error.sum(1).mul_(2 * error_weight / n_rows).sub_(through_encoder)

    l1 = total_f.sum(1) / n_rows
    loss = error_weight * squared_error + l1_weight * l1
    return StepResult(gradients, loss, squared_error, l1, active)


def column_sums(values: Float[Tensor, "M B n"]) -> Float[Tensor, "M n"]:
    """Sum over the batch, in fp32. bf16 is summed in chunks of 128 rows, each exact up to its last rounding (counts
    are exact): asking torch for an fp32 sum of a bf16 tensor would first copy all of it."""
    if values.dtype == torch.float32 or values.shape[1] % CHUNK:
        return values.sum(1, dtype=torch.float32)
    return values.unflatten(1, (-1, CHUNK)).sum(2).float().sum(1)
