"""Schedule-free AdamW: an average of the weights in place of a schedule."""

# torch documents its multi-tensor operations only as internals of torch.optim
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_coding.training.optimizers.base import Group, StackedOptimizer, views

if TYPE_CHECKING:
    from sparse_coding.training.optimizer import OptimizerSettings


class ScheduleFree(StackedOptimizer):
    """Defazio et al., arXiv 2405.15682, algorithm 1, as `schedulefree.AdamWScheduleFree` (1.4.1) computes it.

    The parameters are y, where gradients are taken; z takes the steps, x averages the z and is what to evaluate with:
    y = (1 - beta1) z + beta1 x. `averaged` gives x. Weights of the average are the square of the highest rate so far.
    """

    moment_names = ("moment2",)
    on_device = False

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lrs: Sequence[float],
        settings: OptimizerSettings,
        matrices: Collection[str] = (),
    ):
        super().__init__(parameters, lrs, settings, matrices)
        self.z = {name: value.detach().clone() for name, value in parameters.items()}
        self.z_views = {group.lr: views(self.z, group.members) for group in self.groups}
        # Numbers of a member as a whole: on the CPU and in float64, they turn into factors without asking the device.
        self.numbers = {
            name: torch.zeros(len(lrs), dtype=torch.float64) for name in ("steps", "highest_rate", "sum_of_weights")
        }

    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        assert isinstance(lr, float)
        settings, y, z, moment2 = self.settings, group.parameters, self.z_views[group.lr], group.moments["moment2"]
        steps, share = self._count(group, lr)
        torch._foreach_mul_(moment2, settings.beta2)
        torch._foreach_addcmul_(moment2, gradients, gradients, value=1 - settings.beta2)
        root = torch._foreach_div(moment2, 1 - settings.beta2**steps)
        torch._foreach_sqrt_(root)
        torch._foreach_add_(root, settings.eps)
        direction = torch._foreach_div(gradients, root)
        if settings.weight_decay:
            torch._foreach_add_(direction, y, alpha=settings.weight_decay)
        torch._foreach_lerp_(y, z, weight=share)
        torch._foreach_add_(y, direction, alpha=lr * (settings.beta1 * (1 - share) - 1))
        torch._foreach_sub_(z, direction, alpha=lr)

    def _count(self, group: Group, lr: float) -> tuple[int, float]:
        """Steps of the group with this one, and the share of the newest z in the average x."""
        steps, highest, weights = (self.numbers[name] for name in ("steps", "highest_rate", "sum_of_weights"))
        first = group.members[0]  # the others of a group stand where it does
        steps[group.members] += 1
        highest[group.members] = max(lr, highest[first].item())
        weight = highest[first].item() ** 2
        weights[group.members] += weight
        return int(steps[first].item()), weight / weights[first].item() if weight else 0.0

    def state(self) -> dict[str, dict[str, Tensor]]:
        return super().state() | {"z": dict(self.z), "averaging": dict(self.numbers)}

    @torch.no_grad()
    def forget_(self, masks: Mapping[str, Tensor]) -> None:
        super().forget_(masks)
        for name, mask in masks.items():
            self.z[name].copy_(torch.where(mask, self.parameters[name], self.z[name]))

    @torch.no_grad()
    def averaged(self) -> dict[str, Tensor]:
        x = {name: value.detach().clone() for name, value in self.parameters.items()}
        members = range(len(self.lrs))
        torch._foreach_lerp_(views(x, members), views(self.z, members), weight=1 - 1 / self.settings.beta1)
        return x
