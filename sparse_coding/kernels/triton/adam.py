"""Adam inside the kernels that make the gradients (rows.py): none of the two large ones is ever in memory.

As torch's: m and v are running means of g and g^2, and w -= rate / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
(Kingma and Ba, arXiv 1412.6980, algorithm 1). Rates and step counts are on the device, one for each member.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false
# pyright: reportArgumentType=false, reportReturnType=false, reportPrivateImportUsage=false, reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor


@triton.jit
def adam(weights, gradient, moment1, moment2, rate, root, beta1, beta2, eps):
    """(weights, moments) after a step; rate and root are corrected for the bias of the first steps."""
    moment1 = beta1 * moment1 + (1 - beta1) * gradient
    moment2 = beta2 * moment2 + (1 - beta2) * gradient * gradient
    return weights - rate * moment1 / (tl.sqrt(moment2) / root + eps), moment1, moment2


@triton.jit
def rounded(value, place, count, WHICH: tl.constexpr):
    """The value as bf16 has it, rounded at random (see training/optimizers/rounding.py)."""
    x = place.to(tl.uint32) + 0x3C6EF372 * count.to(tl.uint32) + WHICH
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) * 0x735A2D97
    noise = ((x ^ (x >> 15)) & 0xFFFF).to(tl.int32)
    return ((value.to(tl.int32, bitcast=True) + noise) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _correct(lrs, scale, steps, rates, roots, n, log_beta1, log_beta2, BLOCK: tl.constexpr):
    """Rates and roots of a step, corrected for the bias of the first ones."""
    member = tl.arange(0, BLOCK)
    ok = member < n
    count = tl.load(steps + member, mask=ok, other=1.0).to(tl.float64)
    rate = (tl.load(lrs + member, mask=ok, other=0.0) * tl.load(scale)).to(tl.float64)
    tl.store(rates + member, (rate / (1 - tl.exp(count * log_beta1))).to(tl.float32), mask=ok)
    tl.store(roots + member, tl.sqrt(1 - tl.exp(count * log_beta2)).to(tl.float32), mask=ok)


@triton.jit
def read_row(weights, moments1, moments2, at, ok):
    """(weights, moments) at the places `at`. To have them leave the cache first made the kernels 13% slower."""
    value, moment1 = tl.load(weights + at, mask=ok, other=0.0), tl.load(moments1 + at, mask=ok, other=0.0)
    moment2 = tl.load(moments2 + at, mask=ok, other=0.0)
    return value, moment1.to(tl.float32), moment2.to(tl.float32)


@triton.jit
def learn_row(value, moment1, moment2, gradient, at, place, ok, member, weights, moments1, moments2, half, rates,
              roots, counts, beta1, beta2, eps, PROJECTS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """What the gradient of a latent's row of a matrix makes of it: written to `at`, places of the member, where `ok`.

    PROJECTS: the part of the gradient along the row is left out. UNIT: the row is brought back to norm 1.
    """
    if PROJECTS:
        gradient -= value * tl.sum(value * gradient, axis=0)
    rate, root = tl.load(rates + member), tl.load(roots + member)
    value, moment1, moment2 = adam(value, gradient, moment1, moment2, rate, root, beta1, beta2, eps)
    if UNIT:
        norm = tl.sqrt(tl.sum(tl.where(ok, value * value, 0.0), axis=0))
        value = value / tl.maximum(norm, 1.1754944e-38)
    tl.store(weights + at, value, mask=ok)
    if moments1.dtype.element_ty == tl.bfloat16:
        count = tl.load(counts + member)
        moment1, moment2 = rounded(moment1, place, count, 0), rounded(moment2, place, count, 1)
    tl.store(moments1 + at, moment1, mask=ok)
    tl.store(moments2 + at, moment2, mask=ok)
    if half is not None:
        tl.store(half + at, value, mask=ok)


@triton.jit
def _vectors(weights, gradients, moments1, moments2, rates, roots, width, beta1, beta2, eps, BLOCK: tl.constexpr):
    member, at = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok, place = at < width, member.to(tl.int64) * width + at
    value, gradient = tl.load(weights + place, mask=ok), tl.load(gradients + place, mask=ok)
    moment1, moment2 = tl.load(moments1 + place, mask=ok), tl.load(moments2 + place, mask=ok)
    rate, root = tl.load(rates + member), tl.load(roots + member)
    value, moment1, moment2 = adam(value, gradient, moment1, moment2, rate, root, beta1, beta2, eps)
    tl.store(weights + place, value, mask=ok)
    tl.store(moments1 + place, moment1, mask=ok)
    tl.store(moments2 + place, moment2, mask=ok)


class Learning(NamedTuple):
    """One parameter and what its update needs; fields of None where the gradient itself is wanted."""

    weights: Tensor | None = None
    moment1: Tensor | None = None
    moment2: Tensor | None = None
    half: Tensor | None = None
    """The copy in the dtype of the products, which is kept up with the parameter."""
    rates: Float[Tensor, " M"] | None = None
    roots: Float[Tensor, " M"] | None = None
    counts: Float[Tensor, " M"] | None = None
    """Updates, this one among them."""
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0


class RowAdam:
    """The optimiser of a stack as the kernels see it: they update W_enc and W_dec, `rest_` what is left."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        moments: Mapping[str, Mapping[str, Tensor]],
        steps: Mapping[str, Tensor],
        lrs: Sequence[float],
        betas: tuple[float, float],
        eps: float,
    ):
        """`moments` and `steps` are the optimiser's own, and are changed in place."""
        self.parameters, self.moments, self.steps, self.betas, self.eps = parameters, moments, steps, betas, eps
        self.lrs = torch.tensor(lrs, device=next(iter(parameters.values())).device)
        self.scale: float | Tensor = 1.0
        """Factor on the learning rates of the next step."""
        self.rates = self.roots = self.lrs
        self.halves: dict[str, tuple[int, Tensor]] = {}

    def half(self, name: str, dtype: torch.dtype) -> Tensor:
        """The parameter in `dtype`, made anew where something else than the kernels changed it."""
        value = self.parameters[name].detach()
        if dtype == value.dtype:
            return value
        version, copy = self.halves.get(name, (-1, None))
        if copy is None or version != value._version or copy.dtype != dtype:
            copy = value.to(dtype)
            self.halves[name] = (value._version, copy)
        return copy

    def begin(self) -> None:
        """Count a step and correct the rates for it."""
        names = list(self.steps)
        torch._foreach_add_([self.steps[name] for name in names], 1.0)
        n, device = len(self.lrs), self.lrs.device
        scale = self.scale if isinstance(self.scale, Tensor) else torch.full((), self.scale, device=device)
        self.rates, self.roots = torch.empty(2, n, device=device)
        _correct[(1,)](
            self.lrs, scale, self.steps[names[0]], self.rates, self.roots, n,
            *(math.log(beta) if beta else -math.inf for beta in self.betas),
            BLOCK=triton.next_power_of_2(n),
        )  # fmt: skip

    def of(self, name: str, dtype: torch.dtype) -> Learning:
        """What the kernel that updates the parameter needs, after `begin`."""
        value, (first, second) = self.parameters[name].detach(), (self.moments[f"moment{i}"][name] for i in (1, 2))
        copy = None if dtype == value.dtype else self.half(name, dtype)
        return Learning(value, first, second, copy, self.rates, self.roots, self.steps[name], *self.betas, self.eps)

    def rest_(self, gradients: Mapping[str, Tensor]) -> None:
        """Update what the kernels left, from its gradients, in the step that `begin` began."""
        for name, gradient in gradients.items():
            value, gradient = self.parameters[name].detach(), gradient.contiguous()
            width = value[0].numel()
            with torch.cuda.device_of(value):
                _vectors[(triton.cdiv(width, 1024), len(value))](
                    value, gradient, self.moments["moment1"][name], self.moments["moment2"][name],
                    self.rates, self.roots, width, *self.betas, self.eps, BLOCK=1024,
                )  # fmt: skip
