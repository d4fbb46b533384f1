"""The Matryoshka dictionary: nested prefixes of the latents, each of which must reconstruct on its own.

    loss = sum over prefixes m of E ||x - (f_1..m W_dec_1..m + b_dec)||^2 + auxk_coefficient AuxK

with f as in BatchTopK, chosen once over all latents. What the first latents explain alone stays with them, so that
later ones split general features instead of absorbing them.

prefixes  fixed   they end where `group_fractions`, which sum to 1, add up to
          random  `n_prefixes` ends drawn at every step from P(m) ~ m^(-1 - prefix_exponent), the last always d_sae

Source: Bussmann et al., arXiv 2503.17547 (a sum, as there and in SAELens; dictionary_learning divides by the number of
prefixes twice). Random prefixes: Nabeshima, "Matryoshka sparse autoencoders" (2024).
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, fields
from typing import Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.batch_selecting import BatchSelecting, BatchSelectingSettings
from sparse_coding.dictionaries.selection import group_ends, random_ends
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult

Prefixes = Literal["fixed", "random"]


@dataclass(frozen=True)
class MatryoshkaSettings(BatchSelectingSettings):
    """Settings of one Matryoshka dictionary on BatchTopK."""

    prefixes: Prefixes = "fixed"
    """fixed, or random: drawn anew at every step."""
    group_fractions: tuple[float, ...] = (0.0625, 0.0625, 0.125, 0.25, 0.5)
    """Shares of the latents that each fixed prefix adds; they sum to 1."""
    n_prefixes: int = 10
    """How many random prefixes, the whole among them."""
    prefix_exponent: float = 0.5
    """How strongly random prefixes prefer to be short."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prefixes not in get_args(Prefixes):
            raise UserError(f"prefixes is {self.prefixes!r}: allowed are {', '.join(get_args(Prefixes))}")
        if self.prefixes == "fixed":
            group_ends(self.group_fractions, self.d_sae)
        if self.n_prefixes < 1:
            raise UserError(f"n_prefixes is {self.n_prefixes}: it must be at least 1")
        if not -1 < self.prefix_exponent < math.inf:
            raise UserError(f"prefix_exponent is {self.prefix_exponent}: it must be above -1, such as 0.5")
        unread = {"fixed": ("n_prefixes", "prefix_exponent"), "random": ("group_fractions",)}[self.prefixes]
        for field in fields(self):
            if field.name in unread and getattr(self, field.name) != field.default:
                raise UserError(
                    f"{field.name} is not read where prefixes is {self.prefixes!r}: leave one of the two out"
                )


@final
class Matryoshka(BatchSelecting):
    """BatchTopK whose prefixes reconstruct too."""

    Settings = MatryoshkaSettings
    settings: MatryoshkaSettings

    def ends(self, step: int) -> list[int]:
        """Where the prefixes of this step end. Random ones are a function of the step, the same for all members."""
        settings = self.settings
        if settings.prefixes == "fixed":
            return group_ends(settings.group_fractions, settings.d_sae)
        generator = torch.Generator().manual_seed(step)
        return random_ends(settings.n_prefixes, settings.d_sae, settings.prefix_exponent, generator)

    def branch(self, moment: Moment) -> Hashable | None:
        return () if self.settings.prefixes == "fixed" else None

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pre = self.pre_activations(x)
        f, state = self.select(pre, moment)
        errors, first = [], 0
        x_hat = self.without_latents(x)
        for end in self.ends(moment.step):
            x_hat = x_hat + f[..., first:end] @ self.W_dec[..., first:end, :]
            errors.append(self.error(x_hat, target, moment))
            first = end
        total = torch.stack(errors).sum(0)
        return self.finish(total, {"shortest_prefix": errors[0]}, pre, f, x_hat, target, moment, state)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        fast = self.nested_gradients(x, target, moment, dtype, tuple(self.ends(moment.step)))
        if fast is None:
            return None
        result, errors = fast
        return result._replace(terms={"shortest_prefix": errors[:, 0], **result.terms})
