"""Muon: the momentum of a weight matrix, made orthogonal, is the update."""

# torch documents its multi-tensor operations only as internals of torch.optim
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.training.optimizers.adam import AdamW
from sparse_coding.training.optimizers.base import Group, StackedOptimizer, descend

if TYPE_CHECKING:
    from sparse_coding.training.optimizer import OptimizerSettings

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(StackedOptimizer):
    """Keller Jordan (kellerjordan.github.io/posts/muon, 2024), as `torch.optim.Muon` (2.9 and later) has it.

    m = momentum * m + (1 - momentum) * g, the Nesterov direction (1 - momentum) * g + momentum * m is made orthogonal,
    and p -= lr * max(1, r / c) ** 0.5 * direction for a parameter stored as `[r c]`. Parameters that are no matrices
    take AdamW at the same learning rate. Unlike the elementwise optimisers, a member equals itself alone up to the
    rounding of batched matrix products.
    """

    moment_names = ("momentum",)

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lrs: Sequence[float],
        settings: OptimizerSettings,
        matrices: Collection[str] = (),
    ):
        own = {name: value for name, value in parameters.items() if name in matrices}
        assert own, "muon needs to know which parameters are matrices"
        assert all(value.dim() == 3 for value in own.values())
        super().__init__(own, lrs, settings, matrices)
        rest = {name: value for name, value in parameters.items() if name not in own}
        self.rest = AdamW(rest, lrs, settings)
        self.parameters = dict(parameters)  # what `step` reads gradients of

    def apply(self, gradients: dict[str, Tensor], scale: float | Tensor) -> None:
        self.rest.apply({name: gradients[name] for name in self.rest.parameters}, scale)
        directions = {}
        for name, momentum in self.moments["momentum"].items():
            share = self.settings.own_momentum
            momentum.lerp_(gradients[name], 1 - share)
            rows, columns = momentum.shape[-2:]
            direction = orthogonal(gradients[name].lerp(momentum, share)).to(momentum.dtype)
            directions[name] = direction.mul_(max(1, rows / columns) ** 0.5)
        super().apply(directions, scale)

    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        if self.settings.weight_decay:
            torch._foreach_mul_(group.parameters, 1 - lr * self.settings.weight_decay)
        descend(group.parameters, gradients, lr)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return super().state() | self.rest.state()

    def forget_(self, masks: Mapping[str, Tensor]) -> None:
        own = self.moments["momentum"]
        super().forget_({name: mask for name, mask in masks.items() if name in own})
        self.rest.forget_({name: mask for name, mask in masks.items() if name not in own})


def orthogonal(matrices: Float[Tensor, "M r c"]) -> Float[Tensor, "M r c"]:
    """About U V^T of each matrix U S V^T: singular values come out between about 0.7 and 1.2.

    Five Newton-Schulz iterations of the quintic whose slope at 0 is steepest; in bf16 on a GPU (and so returned), where
    products in fp32 would cost several times as much, in the given dtype elsewhere.
    """
    a, b, c = COEFFICIENTS
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
