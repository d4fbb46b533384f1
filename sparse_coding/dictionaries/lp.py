"""The ReLU dictionary with an Lp penalty, p fixed or annealed from 1 towards 0.

    loss = E ||x - x_hat||^2 + l1_coefficient s E sum_i f_i^p          (form "sum")
           E ||x - x_hat||^2 + l1_coefficient s E (sum_i f_i^p)^(1/p)  (form "norm")

p is `p` until `anneal_start`, then comes down to `p_end` in `anneal_steps` equal stages over the rest of the run. At
each change s is multiplied by mean(penalty at the old p) / mean(penalty at the new p) over the ten steps before, so
that the penalty is continuous. The smaller p, the nearer the penalty is to L0, and the less it shrinks what is active.
With a free decoder f_i counts times ||W_dec_i||.

Source: Karvonen et al., arXiv 2408.00113 (p-annealing). The slope of f^p at 0 is infinite, which one Adam moment never
forgets: `smoothing` e replaces f^p by (f + e)^p - e^p; 0 is the formula of the source.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment, stop_gradient
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import LinearSettings, require_weight
from sparse_coding.errors import UserError

Form = Literal["sum", "norm"]
COMPARED_STEPS = 10
"""Steps before a change of p over which the two penalties are compared."""


@dataclass(frozen=True)
class LpSettings(LinearSettings):
    """Settings of one Lp dictionary."""

    l1_coefficient: float = 1.0
    """Weight of the penalty at p = 1."""
    p: float = 1.0
    """Exponent at the start."""
    p_end: float = 0.2
    """Exponent at the end; the same as p for a fixed one."""
    anneal_start: float = 0.15
    """Share of the run after which p falls."""
    anneal_steps: int = 10
    """Stages in which it falls."""
    form: Form = "sum"
    """sum: sum_i f_i^p. norm: its 1/p-th power."""
    smoothing: float = 1e-3
    """e in (f + e)^p - e^p."""

    per_member: ClassVar[tuple[str, ...]] = ("l1_coefficient", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("l1_coefficient",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"l1_coefficient": (0.5, 1.0, 2.0, 4.0, 8.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("l1_coefficient", self.l1_coefficient)
        require_weight("smoothing", self.smoothing)
        if not 0 < self.p_end <= self.p <= 1:
            raise UserError(f"p falls from {self.p} to {self.p_end}: they must lie in (0, 1] and p_end be the smaller")
        if self.form not in get_args(Form):
            raise UserError(f"form is {self.form!r}: allowed are {', '.join(get_args(Form))}")
        if self.anneal_steps < 1 or not 0 <= self.anneal_start < 1:
            raise UserError(
                f"p falls in {self.anneal_steps} stages from {self.anneal_start} of the run on: "
                "the first must be at least 1, the second at least 0 and below 1"
            )

    def stage(self, step: int, steps: int) -> int:
        """How often p has changed by this step, 0 to `anneal_steps`."""
        if self.p_end == self.p:
            return 0
        share = (step / steps - self.anneal_start) / (1 - self.anneal_start)
        return 0 if share < 0 else min(self.anneal_steps, int(share * self.anneal_steps) + 1)

    def exponent(self, stage: int) -> float:
        return self.p + (self.p_end - self.p) * stage / self.anneal_steps


@final
class Lp(LinearDictionary):
    """ReLU encoder, linear decoder of unit atoms, Lp penalty."""

    Settings = LpSettings
    settings: LpSettings
    state_names = ("penalty_scale", "compared")
    l1_coefficient: Float[Tensor, "..."]
    penalty_scale: Float[Tensor, "..."]
    compared: Float[Tensor, "... 2"]
    """Sums of the penalty at this p and at the next over the steps since the comparison began."""

    @classmethod
    def own_values(cls, settings: LpSettings) -> dict[str, Tensor]:
        return {"penalty_scale": torch.ones(()), "compared": torch.zeros(2)}

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return torch.relu(self.pre_activations(x))

    def penalty(self, f: Float[Tensor, "... B d_sae"], p: float) -> Float[Tensor, "..."]:
        e = self.settings.smoothing
        powers = torch.where(f > 0, torch.where(f > 0, f + e, 1.0) ** p - e**p, 0.0)
        total = powers.sum(-1)
        if self.settings.form == "norm":
            total = torch.where(total > 0, torch.where(total > 0, total, 1.0) ** (1 / p), 0.0)
        return total.mean(-1)

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pre = self.pre_activations(x)
        f = torch.relu(pre)
        x_hat = self.decode(f, x)
        settings, stage = self.settings, self.settings.stage(moment.step, moment.steps)
        sizes = f * self.norms.unsqueeze(-2) if settings.decoder == "free" else f
        penalty = self.penalty(sizes, settings.exponent(stage))
        weight = moment.sparsity * self.l1_coefficient * self.penalty_scale
        total = self.error(x_hat, target, moment) + weight * penalty
        state = self.following_scale(stop_gradient(sizes), stop_gradient(penalty), stage, moment)
        return self.finish(total, {"penalty": penalty}, pre, f, x_hat, target, moment, state)

    def stages(self, moment: Moment) -> tuple[int, ...]:
        """The stage of this step and of the next ten, as far as the run goes."""
        last = min(moment.step + COMPARED_STEPS, moment.steps - 1)
        return tuple(self.settings.stage(step, moment.steps) for step in range(moment.step, last + 1))

    def branch(self, moment: Moment) -> Hashable | None:
        return self.stages(moment)

    def following_scale(self, f: Tensor, penalty: Tensor, stage: int, moment: Moment) -> dict[str, Tensor]:
        """The state after this step: p changes where the stage of one of the next ten steps is another."""
        settings, ahead = self.settings, self.stages(moment)[1:]
        coming = next((other for other in ahead if other != stage), None)
        if coming is None:
            return {}
        following = self.penalty(f, settings.exponent(coming))
        compared = self.compared + torch.stack([penalty, following], dim=-1)
        if ahead[0] == stage:
            return {"compared": compared}
        now, then = compared.unbind(-1)
        factor = torch.where(then > 0, now / then, 1.0)
        return {"penalty_scale": self.penalty_scale * factor, "compared": torch.zeros_like(compared)}

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "standard"}
