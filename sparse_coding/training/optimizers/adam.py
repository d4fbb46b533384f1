"""Adam and AdamW: torch's own fused kernels on the members' views, or what gives the same bits: see adam_native.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw

from sparse_coding.kernels import adam_native, triton
from sparse_coding.training.optimizers.base import Group, StackedOptimizer, views
from sparse_coding.training.optimizers.rounding import rounded

if TYPE_CHECKING:
    from sparse_coding.kernels.triton.adam import RowAdam
    from sparse_coding.training.optimizer import OptimizerSettings


class Adam(StackedOptimizer):
    """Kingma and Ba, arXiv 1412.6980, algorithm 1; weight decay is added to the gradient."""

    moment_names = ("moment1", "moment2")
    function: ClassVar[Callable[..., Any]] = staticmethod(adam)

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lrs: Sequence[float],
        settings: OptimizerSettings,
        matrices: Collection[str] = (),
    ):
        super().__init__(parameters, lrs, settings, matrices)
        # One count for each parameter of each member, on the device, as the fused kernels want them.
        self.steps = {name: torch.zeros(len(lrs), device=value.device) for name, value in parameters.items()}
        self.counts = {group.lr: views(self.steps, group.members) for group in self.groups}
        self.native = settings.weight_decay == 0 and settings.moments == "fp32" and adam_native.fits(parameters)

    def apply(self, gradients: dict[str, Tensor], scale: float | Tensor) -> None:
        settings = self.settings
        if self.native and not isinstance(scale, Tensor):
            rates = [lr * scale for lr in self.lrs]
            betas = (settings.beta1, settings.beta2)
            if adam_native.step(self.parameters, gradients, self.moments, self.steps, rates, betas, settings.eps):
                return
        super().apply(gradients, scale)

    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        half = self.settings.moments == "bf16"
        moments = {part: [kept.float() for kept in own] if half else own for part, own in group.moments.items()}
        self.function(
            group.parameters,
            gradients,
            moments["moment1"],
            moments["moment2"],
            [],
            self.counts[group.lr],
            fused=True,
            amsgrad=False,
            beta1=self.settings.beta1,
            beta2=self.settings.beta2,
            lr=lr,
            weight_decay=self.settings.weight_decay,
            eps=self.settings.eps,
            maximize=False,
        )
        for which, (part, own) in enumerate(group.moments.items() if half else ()):
            for kept, value, count in zip(own, moments[part], self.counts[group.lr], strict=True):
                if kept is not value:  # a matrix's; vectors stay in fp32
                    kept.copy_(rounded(value, count, which))

    def row_learning(self) -> RowAdam | None:
        settings = self.settings
        if settings.weight_decay or settings.clip_norm is not None or not triton.serves(self.parameters["W_dec"]):
            return None
        from sparse_coding.kernels.triton.adam import RowAdam  # imports Triton, which a CPU need not have

        betas = settings.beta1, settings.beta2
        return RowAdam(self.parameters, self.moments, self.steps, self.lrs, betas, settings.eps)

    def state(self) -> dict[str, dict[str, Tensor]]:
        return super().state() | {"steps": dict(self.steps)}


class AdamW(Adam):
    """Loshchilov and Hutter, arXiv 1711.05101: the weights shrink by the factor 1 - lr * weight_decay instead."""

    function = staticmethod(adamw)
