"""The BatchTopK dictionary: k latents per row on average, chosen over the whole batch.

    f = relu(pre) where pre is among the int(k B) largest of the batch, 0 elsewhere; at inference a threshold
    loss = E ||x - x_hat||^2 + auxk_coefficient AuxK

so rows that need more latents get more. See batch_selecting.py for the threshold.

Source: Bussmann et al., arXiv 2412.06410.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.batch_selecting import BatchSelecting, BatchSelectingSettings
from sparse_coding.kernels.result import StepResult


@dataclass(frozen=True)
class BatchTopKSettings(BatchSelectingSettings):
    """Settings of one BatchTopK dictionary."""


@final
class BatchTopK(BatchSelecting):
    """k latents per row on average; a threshold at inference."""

    Settings = BatchTopKSettings
    settings: BatchTopKSettings

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        pre = self.pre_activations(x)
        f, state = self.select(pre, moment)
        x_hat = self.decode(f, x)
        return self.finish(self.error(x_hat, target, moment), {}, pre, f, x_hat, target, moment, state)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        fast = self.nested_gradients(x, target, moment, dtype)
        return fast and fast[0]
