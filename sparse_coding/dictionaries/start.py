"""Where training starts: initial weights of a dictionary with a linear encoder and decoder, and of its bias."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Sample, unit_rows
from sparse_coding.dictionaries.geometric_median import geometric_median

Init = Literal["transpose", "orthogonal", "kaiming", "data", "zero", "toy-2023"]
BiasInit = Literal["zero", "mean", "geometric-median"]

MEDIAN_ROWS = 32_768
"""Rows that the geometric median is taken of, as OpenAI do."""


def initial_weights(
    init: Init,
    d_in: int,
    d_out: int,
    d_sae: int,
    norm: float,
    transcoder: bool,
    generator: torch.Generator,
    sample: Sample | None,
    b_dec: Float[Tensor, " d_out"],
    subtracts: bool,
) -> tuple[Float[Tensor, "d_in d_sae"], Float[Tensor, " d_sae"], Float[Tensor, "d_sae d_out"]]:
    """(W_enc, b_enc, W_dec).

    transpose   random directions of length `norm`, W_enc = W_dec^T; for a transcoder the two are drawn apart
    orthogonal  the same with (semi-)orthogonal directions
    kaiming     uniform within sqrt(6 / fan in), drawn apart (He et al., arXiv 1502.01852)
    data        directions of random rows of the data, less b_dec; W_enc = W_dec^T, or input and target of one row;
                no row twice while there are enough
    zero        W_dec = 0 and b_enc = -mean(x) W_enc (of x - b_dec where that is subtracted), as sparsify's transcoders
    toy-2023    torch's Linear default for W_enc and b_enc, an orthogonal decoder
    """
    b_enc = torch.zeros(d_sae)
    if init == "toy-2023":
        bound = d_in**-0.5  # torch.nn.Linear's default for weight and bias
        weight = torch.rand(d_sae, d_in, generator=generator) * (2 * bound) - bound
        b_enc = torch.rand(d_sae, generator=generator) * (2 * bound) - bound
        return weight.T.clone(), b_enc, _orthogonal(d_sae, d_out, generator)
    if init == "kaiming":
        W_enc = _uniform(d_in, d_sae, (6 / d_in) ** 0.5, generator)
        return W_enc, b_enc, _uniform(d_sae, d_out, (6 / d_sae) ** 0.5, generator)
    if init == "data":
        assert sample is not None
        rows = len(sample.x)  # each row once, where there are enough: twins would never part
        passes = [torch.randperm(rows, generator=generator) for _ in range(-(-d_sae // rows))]
        chosen = torch.cat(passes)[:d_sae]
        W_dec = _directions(sample.target[chosen] - b_dec, generator)
        from_x = sample.x[chosen] - sample.x.mean(0) if transcoder else None
    else:
        draw = _orthogonal if init == "orthogonal" else _random
        W_dec = draw(d_sae, d_out, generator)
        from_x = draw(d_sae, d_in, generator) if transcoder else None
    encoder = W_dec if from_x is None else _directions(from_x, generator)
    W_enc = norm * encoder.T
    if init == "zero":
        assert sample is not None
        centre = sample.x.mean(0) - b_dec if subtracts else sample.x.mean(0)
        return W_enc.clone(), -(centre @ W_enc), torch.zeros(d_sae, d_out)
    return W_enc.clone(), b_enc, norm * W_dec


def initial_bias(init: BiasInit, target: Float[Tensor, "N d_out"] | None, d_out: int) -> Float[Tensor, " d_out"]:
    """b_dec: zero, or the mean or the geometric median of (the first 32,768) target rows."""
    if init == "zero":
        return torch.zeros(d_out)
    assert target is not None
    return target.mean(0) if init == "mean" else geometric_median(target[:MEDIAN_ROWS]).float()


def _random(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return unit_rows(torch.randn(n, d, generator=generator))


def _orthogonal(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    return unit_rows(torch.nn.init.orthogonal_(torch.empty(d, n), generator=generator).T.contiguous())


def _uniform(rows: int, columns: int, bound: float, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, columns, generator=generator) * (2 * bound) - bound


def _directions(rows: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Unit rows; where a row is zero, a random direction."""
    empty = rows.norm(dim=-1, keepdim=True) == 0
    return unit_rows(torch.where(empty, _random(len(rows), rows.shape[1], generator), rows))
