"""The gated dictionary: one half of the encoder says which latents are active, the other how much.

    e = (x - b_dec) W_enc          pi = e + b_gate          f = H(pi) relu(exp(r_mag) e + b_mag)

    loss = E ||x - x_hat||^2 + l1_coefficient E ||relu(pi)||_1 + E ||x - relu(pi) sg(W_dec) - sg(b_dec)||^2

The L1 penalty shrinks pi alone, which only gates, so that what is active keeps its size; the last term makes pi, which
gets no gradient through H, useful for reconstruction. sg is stop-gradient. `frozen_auxiliary` False lets that term
train the decoder too, as SAELens does; the authors find both fine. With a free decoder the L1 counts the atoms' norms.

Source: Rajamanoharan et al., arXiv 2404.16014.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment, stop_gradient
from sparse_coding.dictionaries.dense import dense_gradients
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import LinearSettings, require_weight
from sparse_coding.dictionaries.objective import reconstruction_error
from sparse_coding.kernels.result import StepResult


@dataclass(frozen=True)
class GatedSettings(LinearSettings):
    """Settings of one gated dictionary."""

    l1_coefficient: float = 1.0
    """Weight of the L1 penalty on relu(pi)."""
    frozen_auxiliary: bool = True
    """The auxiliary term does not train the decoder."""

    per_member: ClassVar[tuple[str, ...]] = ("l1_coefficient", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("l1_coefficient",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"l1_coefficient": (0.5, 1.0, 2.0, 4.0, 8.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("l1_coefficient", self.l1_coefficient)


@final
class Gated(LinearDictionary):
    """Gate and magnitude share W_enc up to a factor exp(r_mag) per latent."""

    Settings = GatedSettings
    settings: GatedSettings
    latent_axes: ClassVar[Mapping[str, int]] = {"W_enc": -1, "W_dec": -2, "b_gate": -1, "b_mag": -1, "r_mag": -1}
    l1_coefficient: Float[Tensor, "..."]
    b_gate: Float[Tensor, "... d_sae"]
    b_mag: Float[Tensor, "... d_sae"]
    r_mag: Float[Tensor, "... d_sae"]

    @classmethod
    def own_values(cls, settings: GatedSettings) -> dict[str, Tensor]:
        return {name: torch.zeros(settings.d_sae) for name in ("b_gate", "b_mag", "r_mag")}

    def gate(self, x: Float[Tensor, "... B d_in"]) -> tuple[Float[Tensor, "... B d_sae"], Float[Tensor, "... B d_sae"]]:
        """(pi, f)."""
        e = self.projected(x)
        pi = e + self.b_gate.unsqueeze(-2)
        magnitude = torch.relu(self.r_mag.exp().unsqueeze(-2) * e + self.b_mag.unsqueeze(-2))
        return pi, torch.where(pi > 0, magnitude, 0.0)

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return self.gate(x)[1]

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pi, f = self.gate(x)
        x_hat = self.decode(f, x)
        open_gates = torch.relu(pi)
        shares = open_gates.mean(-2)
        l1 = (shares * self.norms if self.settings.decoder == "free" else shares).sum(-1)
        auxiliary = reconstruction_error(self.from_gates(open_gates, x), target, self.settings.error)
        total = self.error(x_hat, target, moment) + moment.sparsity * self.l1_coefficient * l1 + auxiliary
        return self.finish(total, {"l1_gate": l1, "auxiliary": auxiliary}, pi, f, x_hat, target, moment)

    def from_gates(self, open_gates: Float[Tensor, "... B d_sae"], x: Float[Tensor, "B d_in"]) -> Tensor:
        """The reconstruction that the auxiliary term judges."""

        def frozen(values: Tensor) -> Tensor:
            return stop_gradient(values) if self.settings.frozen_auxiliary else values

        x_hat = open_gates @ frozen(self.W_dec)
        if self.settings.decoder_bias:
            x_hat = x_hat + frozen(self.b_dec).unsqueeze(-2)
        return x_hat + x @ frozen(self.W_skip).mT if self.settings.skip else x_hat

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        own = {"b_mag": self.b_mag.detach(), "r_mag": self.r_mag.detach(), "frozen": self.settings.frozen_auxiliary}
        weight, free = moment.sparsity * self.l1_coefficient, self.settings.decoder == "free"
        found = dense_gradients(self, x, target, moment, dtype, weight, free, bias="b_gate", **own)
        if found is None:
            return None
        return found.result._replace(terms={"l1_gate": found.l1, "auxiliary": found.dense.auxiliary})

    def inference_values(self, values: Mapping[str, Tensor], shift: Tensor | float) -> dict[str, Tensor]:
        r_mag = values["r_mag"]
        return {
            "b_gate": values["b_gate"] + shift,
            "b_mag": values["b_mag"] + r_mag.exp() * shift,
            "r_mag": r_mag,
        }

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "gated"}
