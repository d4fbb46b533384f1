"""The ReLU dictionary with an L1 penalty, tied or untied, in the form of 2022/23.

    f = relu((x - b_dec) W_enc + b_enc)          x_hat = f W_dec + b_dec          ||W_dec_i|| = 1

    loss = E ||x - x_hat||^2 + l1_coefficient E ||f||_1

With a free decoder the penalty counts the atoms' norms, as in relu_april.py: else they would grow to shrink it.

Sources: Sharkey, Braun, Millidge, "Taking features out of superposition with sparse autoencoders" (2022); Cunningham
et al., arXiv 2309.08600; Bricken et al., "Towards Monosemanticity" (2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.dense import dense_gradients
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import LinearSettings, require_weight
from sparse_coding.dictionaries.sparse import sparse_gradients
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult, runs

DENSEST = 1 / 16
"""Share of active entries above which the dense step is faster than the sparse one; measured, see docs/kernels.md."""

L1Scaling = Literal["toy-2023", "mean", "sum"]


@dataclass(frozen=True)
class ReLUSettings(LinearSettings):
    """Settings of one ReLU-L1 dictionary in the form of 2022/23."""

    l1_coefficient: float = 1.0
    """Weight of the L1 penalty, in the convention that `l1_scaling` names."""
    l1_scaling: L1Scaling = "sum"
    """How error and penalty are averaged: see `loss_weights`."""

    per_member: ClassVar[tuple[str, ...]] = ("l1_coefficient", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("l1_coefficient",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"l1_coefficient": (0.5, 1.0, 2.0, 4.0, 8.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("l1_coefficient", self.l1_coefficient)
        if self.l1_scaling not in get_args(L1Scaling):
            raise UserError(f"l1_scaling is {self.l1_scaling!r}: allowed are {', '.join(get_args(L1Scaling))}")


def loss_weights(scaling: L1Scaling, d_in: int, d_sae: int) -> tuple[float, float]:
    """(error_weight, l1_weight per unit alpha) in `error_weight * E||x - x_hat||^2 + l1_weight * alpha * E||f||_1`.

    sum       the sum over dims, alpha * ||f||_1                (equations of arXiv 2309.08600, Anthropic)
    mean      the mean over dims, alpha * ||f||_1               (code of arXiv 2309.08600 since June 2023)
    toy-2023  the mean over dims, alpha * ||f||_1 / d_sae       (the frozen toy script, early June 2023)

    So alpha in toy-2023 equals alpha / d_sae in mean and alpha * d_in / d_sae in sum.
    """
    if scaling == "sum":
        return 1.0, 1.0
    return 1 / d_in, 1 / d_sae if scaling == "toy-2023" else 1.0


def convert_l1(alpha: float, source: L1Scaling, target: L1Scaling, d_in: int, d_sae: int) -> float:
    """The coefficient that has the same minimiser under another convention."""
    (error_a, l1_a), (error_b, l1_b) = loss_weights(source, d_in, d_sae), loss_weights(target, d_in, d_sae)
    return alpha * (l1_a / error_a) / (l1_b / error_b)


@final
class ReLU(LinearDictionary):
    """ReLU encoder, linear decoder, L1 on the codes."""

    Settings = ReLUSettings
    settings: ReLUSettings
    l1_coefficient: Float[Tensor, "..."]

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return torch.relu(self.pre_activations(x))

    @property
    def weights(self) -> tuple[float, float]:
        return loss_weights(self.settings.l1_scaling, self.settings.target_width, self.settings.d_sae)

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        error_weight, l1_weight = self.weights
        if self.settings.error != "mse" or moment.error:
            error_weight = 1.0  # only the sum over dims has a mean over dims
        pre = self.pre_activations(x)
        f = torch.relu(pre)
        x_hat = self.decode(f, x)
        sizes = f.mean(-2)
        l1 = (sizes * self.norms if self.settings.decoder == "free" else sizes).sum(-1)
        total = error_weight * self.error(x_hat, target, moment)
        total = total + l1_weight * moment.sparsity * self.l1_coefficient * l1
        return self.finish(total, {"l1": l1}, pre, f, x_hat, target, moment)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        found = self._sparse(x, target, moment, dtype)
        if found is None:
            return self._dense(x, target, moment, dtype)
        for members in runs(found.left, len(found.loss)):
            dense = self.part(members)._dense(x, target, moment.of(members), dtype)
            if dense is None:
                return found
            found.put(members, dense)
        return found._replace(left=())

    def _sparse(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        """The step of members of which few latents of a row are active; None where there are none."""
        if self.settings.decoder == "free":
            return None
        error_weight, l1_weight = self.weights
        weight = l1_weight * moment.sparsity * self.l1_coefficient
        if self.settings.error != "mse":
            error_weight = 1.0
        fast = sparse_gradients(
            self, x, target, moment, dtype, error_weight, DENSEST, rule="above", penalty=weight / len(x)
        )
        if fast is None:
            return None
        return fast.result._replace(loss=fast.result.loss + weight * fast.result.l1)

    def _dense(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        error_weight, l1_weight = self.weights
        weight = l1_weight * moment.sparsity * self.l1_coefficient
        found = dense_gradients(self, x, target, moment, dtype, weight, self.settings.decoder == "free", error_weight)
        return found and found.result

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "standard"}
