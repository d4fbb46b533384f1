"""Descent along an average of the gradients, or along its sign."""

# torch documents its multi-tensor operations only as internals of torch.optim
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from sparse_coding.training.optimizers.base import Group, StackedOptimizer, descend


class SGD(StackedOptimizer):
    """`torch.optim.SGD` with momentum and no dampening: m = momentum * m + g, then p -= lr * m."""

    moment_names = ("momentum",)

    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        momentum = group.moments["momentum"]
        if self.settings.weight_decay:
            gradients = list(torch._foreach_add(gradients, group.parameters, alpha=self.settings.weight_decay))
        torch._foreach_mul_(momentum, self.settings.own_momentum)
        torch._foreach_add_(momentum, gradients)
        descend(group.parameters, momentum, lr)


class Signum(StackedOptimizer):
    """Bernstein et al., arXiv 1802.04434, algorithm 2: m = momentum * m + (1 - momentum) * g, then p -= lr * sign(m).

    Every entry moves by the whole learning rate at every step, so rates are far smaller than Adam's.
    """

    moment_names = ("momentum",)

    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        momentum = group.moments["momentum"]
        torch._foreach_mul_(momentum, self.settings.own_momentum)
        torch._foreach_add_(momentum, gradients, alpha=1 - self.settings.own_momentum)
        if self.settings.weight_decay:
            torch._foreach_mul_(group.parameters, 1 - lr * self.settings.weight_decay)
        signs = torch._foreach_sign(momentum)
        # The sign of NaN is 0: a member that broke would stand still and look well.
        torch._foreach_add_(signs, momentum, alpha=0)
        descend(group.parameters, signs, lr)
