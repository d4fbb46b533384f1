"""Loss scaling for fp16 products, whose gradients would otherwise vanish below 6e-8: one scale for each member.

Micikevicius et al., arXiv 1710.03740. The scale is halved when a gradient of the member is not finite, and that member
skips the update; it is doubled after 2,000 updates without that. As in torch.amp.GradScaler, but per member and without
waiting for the device.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2_000


class LossScale:
    """The scales of the members of a stack."""

    def __init__(self, n_members: int, device: str):
        self.scale: Float[Tensor, " M"] = torch.full((n_members,), FIRST_SCALE, device=device)
        self.good_steps: Float[Tensor, " M"] = torch.zeros(n_members, device=device)

    def unscale_(self, gradients: Mapping[str, Tensor]) -> Bool[Tensor, " M"]:
        """Divide gradients [M ...] by the scales; True for the members whose gradients are all finite."""
        finite = torch.ones_like(self.scale, dtype=torch.bool)
        for gradient in gradients.values():
            gradient.div_(self.scale.view(-1, *[1] * (gradient.ndim - 1)))
            finite &= gradient.flatten(1).isfinite().all(1)
        return finite

    def update(self, finite: Bool[Tensor, " M"]) -> None:
        good = torch.where(finite, self.good_steps + 1, 0.0)
        grown = good >= GROWTH_INTERVAL
        scale = torch.where(finite, torch.where(grown, self.scale * 2, self.scale), (self.scale / 2).clamp(min=1))
        self.scale.copy_(scale)
        self.good_steps.copy_(torch.where(grown, 0.0, good))

    def state(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self.good_steps}
