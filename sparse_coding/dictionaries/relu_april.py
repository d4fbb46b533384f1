"""The ReLU dictionary in the form of April 2024: free atoms, and an L1 penalty that counts their norms.

    f = relu(x W_enc + b_enc)          x_hat = f W_dec + b_dec

    loss = E ||x - x_hat||^2 + l1_coefficient E sum_i f_i ||W_dec_i||

The penalty does not change when an atom grows and its code shrinks, so nothing has to hold the norms. The source starts
with atoms of norm 0.1 and W_enc = W_dec^T, does not subtract b_dec, and wants rows of mean norm sqrt(d_in), the L1
weight warmed up over the first 5% of the run, the learning rate falling over the last 20%, and gradients clipped at 1.

Source: Conerly et al., "Update on how we train SAEs", transformer-circuits (April 2024).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.dense import dense_gradients
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import Decoder, LinearSettings, require_weight
from sparse_coding.kernels.result import StepResult


@dataclass(frozen=True)
class ReLUAprilSettings(LinearSettings):
    """Settings of one ReLU dictionary in the form of April 2024."""

    l1_coefficient: float = 1.0
    """Weight of sum_i f_i ||W_dec_i||."""
    decoder: Decoder = "free"
    subtract_b_dec: bool = False
    init_norm: float | None = 0.1

    per_member: ClassVar[tuple[str, ...]] = ("l1_coefficient", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("l1_coefficient",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"l1_coefficient": (0.5, 1.0, 2.0, 4.0, 8.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("l1_coefficient", self.l1_coefficient)


@final
class ReLUApril(LinearDictionary):
    """ReLU encoder, free linear decoder, L1 weighted by the norms of the atoms."""

    Settings = ReLUAprilSettings
    settings: ReLUAprilSettings
    l1_coefficient: Float[Tensor, "..."]

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return torch.relu(self.pre_activations(x))

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pre = self.pre_activations(x)
        f = torch.relu(pre)
        x_hat = self.decode(f, x)
        penalty = (f.mean(-2) * self.norms).sum(-1)
        total = self.error(x_hat, target, moment) + moment.sparsity * self.l1_coefficient * penalty
        return self.finish(total, {"penalty": penalty}, pre, f, x_hat, target, moment)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        weight = moment.sparsity * self.l1_coefficient
        found = dense_gradients(self, x, target, moment, dtype, weight, counts_norms=True)
        return found and found.result._replace(terms={"penalty": found.l1})

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "standard"}
