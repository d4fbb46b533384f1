"""The JumpReLU dictionary: a learnt threshold per latent, and a penalty on the number of active latents itself.

    f = pre H(pre - threshold)          pre = (x - b_dec) W_enc + b_enc          x_hat = f W_dec + b_dec

    loss = E ||x - x_hat||^2 + l0_coefficient E L0                    penalty l0
         ...                 + l0_coefficient (E L0 / target_l0 - 1)^2       where target_l0 is given
         ...                 + l0_coefficient E sum_i tanh(4 f_i ||W_dec_i||)      penalty tanh

H has no slope, so thresholds learn from straight-through estimates with a window K of width `bandwidth` e around them:
d f/d threshold = -(threshold / e) K((pre - threshold) / e), d H/d threshold = -(1 / e) K(...), summed over the batch;
d f/d pre = H, d H/d pre = 0. Both are taken on pre, not on f, so that rows just below the threshold count too.

Sources: Rajamanoharan et al., arXiv 2407.14435 and Lieberum et al., arXiv 2408.05147 (l0, target); Anthropic, January
2025 update (tanh).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import LinearSettings, require_weight
from sparse_coding.dictionaries.sparse import sparse_gradients
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult

Penalty = Literal["l0", "tanh"]
TANH_SLOPE = 4.0


@dataclass(frozen=True)
class JumpReLUSettings(LinearSettings):
    """Settings of one JumpReLU dictionary."""

    l0_coefficient: float = 1.0
    """Weight of the penalty."""
    target_l0: float = 0.0
    """Aim at this mean number of active latents; 0: the fewer the better."""
    penalty: Penalty = "l0"
    """l0, or tanh: a smooth stand-in that also counts the size of codes."""
    bandwidth: float = 0.05
    """Width e of the window around the threshold that straight-through estimates use."""
    initial_threshold: float = 0.5
    """Of every latent. Thresholds move by about the learning rate in a step, so a short run that starts near 0, as the
    sources do (0.001), ends with far more active latents at the same error."""

    per_member: ClassVar[tuple[str, ...]] = ("l0_coefficient", "target_l0", "bandwidth", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("l0_coefficient",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"l0_coefficient": (0.25, 0.5, 1.0, 2.0, 4.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("l0_coefficient", self.l0_coefficient)
        require_weight("initial_threshold", self.initial_threshold)
        if not 0 < self.bandwidth < math.inf:
            raise UserError(f"bandwidth is {self.bandwidth}: it must be a positive number, such as 0.05")
        if not 0 <= self.target_l0 <= self.d_sae:
            raise UserError(
                f"target_l0 is {self.target_l0}: it must lie between 0 (no target) and d_sae = {self.d_sae}"
            )
        if self.penalty not in get_args(Penalty):
            raise UserError(f"penalty is {self.penalty!r}: allowed are {', '.join(get_args(Penalty))}")
        if self.penalty == "tanh" and self.target_l0:
            raise UserError("target_l0 needs the penalty l0, not tanh: leave one of the two out")


class _Jump(torch.autograd.Function):
    """pre H(pre - threshold), with the straight-through gradient of the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold, bandwidth = ctx.saved_tensors
        (gradient,) = gradients
        inside = window(pre, threshold, bandwidth)
        slope = -(threshold / bandwidth) * (inside * gradient).sum(-2, keepdim=True)
        return torch.where(pre > threshold, gradient, 0.0), slope, None


class _Step(torch.autograd.Function):
    """H(pre - threshold), with the straight-through gradient of the threshold alone."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold, bandwidth)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold, bandwidth = ctx.saved_tensors
        (gradient,) = gradients
        return None, -(window(pre, threshold, bandwidth) * gradient).sum(-2, keepdim=True) / bandwidth, None


def window(pre: Tensor, threshold: Tensor, bandwidth: Tensor) -> Tensor:
    """K((pre - threshold) / bandwidth): 1 within half a bandwidth of the threshold, 0 outside."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


@final
class JumpReLU(LinearDictionary):
    """A threshold per latent, learnt by straight-through estimates."""

    Settings = JumpReLUSettings
    settings: JumpReLUSettings
    latent_axes: ClassVar[Mapping[str, int]] = {"W_enc": -1, "b_enc": -1, "W_dec": -2, "threshold": -1}
    nonnegative = ("threshold",)
    threshold: Float[Tensor, "... d_sae"]
    l0_coefficient: Float[Tensor, "..."]
    target_l0: Float[Tensor, "..."]
    bandwidth: Float[Tensor, "..."]

    @classmethod
    def own_values(cls, settings: JumpReLUSettings) -> dict[str, Tensor]:
        return {"threshold": torch.full((settings.d_sae,), settings.initial_threshold)}

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        pre = self.pre_activations(x)
        return torch.where(pre > self.threshold.unsqueeze(-2), torch.relu(pre), 0.0)

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pre = self.pre_activations(x)
        threshold, bandwidth = self.threshold.unsqueeze(-2), self.bandwidth[..., None, None]
        f: Tensor = _Jump.apply(pre, threshold, bandwidth)  # type: ignore[assignment]
        x_hat = self.decode(f, x)
        if self.settings.penalty == "tanh":
            counted = torch.tanh(TANH_SLOPE * f * self.norms.unsqueeze(-2))
        else:
            counted = _Step.apply(pre, threshold, bandwidth)
        active: Tensor = counted.sum(-1).mean(-1)  # type: ignore[union-attr]
        off_target = (active / self.target_l0.clamp(min=1e-6) - 1).square()
        penalty = torch.where(self.target_l0 > 0, off_target, active)
        total = self.error(x_hat, target, moment) + moment.sparsity * self.l0_coefficient * penalty
        return self.finish(total, {"penalty": penalty}, pre, f, x_hat, target, moment)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        if self.settings.penalty != "l0":
            return None
        threshold, bandwidth = self.threshold.detach(), self.bandwidth
        fast = sparse_gradients(
            self, x, target, moment, dtype, rule="above", threshold=threshold.contiguous(), window=bandwidth
        )
        if fast is None:
            return None
        result, inside, n_inside = fast.result, fast.sparse.inside, fast.sparse.n_inside
        assert inside is not None
        assert n_inside is not None
        active, target_l0 = result.active.sum(1) / len(x), self.target_l0.clamp(min=1e-6)
        off_target = active / target_l0 - 1
        aims = self.target_l0 > 0
        penalty, slope = (
            torch.where(aims, off_target.square(), active),
            torch.where(aims, 2 * off_target / target_l0, 1.0),
        )
        weight = moment.sparsity * self.l0_coefficient
        through_f, through_l0 = threshold * inside, (weight * slope / len(x)).unsqueeze(1) * n_inside
        result.gradients["threshold"] = -(through_f + through_l0) / bandwidth.unsqueeze(1)
        return result._replace(loss=result.loss + weight * penalty, terms={"penalty": penalty, **result.terms})

    def inference_values(self, values: Mapping[str, Tensor], shift: Tensor | float) -> dict[str, Tensor]:
        return {"b_enc": values["b_enc"] + shift, "threshold": values["threshold"]}

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}
