"""What BatchTopK and Matryoshka share: latents compete over a batch in training, and meet a threshold at inference.

    training    f = relu(pre) where pre is among the int(k B) largest of the batch, 0 elsewhere
    inference   f = pre H(pre - threshold)

The threshold is the running mean (decay 0.99, bias-corrected, so right from the first step) of the smallest code kept
in a batch; `encode` uses it, so that a row's codes do not depend on its company, and it is saved as a JumpReLU. With a
free decoder both go by pre times the norm of the atom.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Moment, stop_gradient
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import DeadLatents, LinearSettings
from sparse_coding.dictionaries.selection import (
    following_threshold,
    largest_of_batch,
    most_warmed_up,
    require_k,
    smallest_kept,
    warmed_up,
)
from sparse_coding.dictionaries.sparse import sparse_gradients
from sparse_coding.kernels.result import StepResult


@dataclass(frozen=True)
class BatchSelectingSettings(LinearSettings):
    """Settings of a dictionary that selects over a batch."""

    k: float = 32
    """Mean number of latents active in a row; it need not be whole."""
    dead_latents: DeadLatents = "auxk"

    per_member: ClassVar[tuple[str, ...]] = ("k", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("k",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"k": (8, 16, 32, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, whole=False)


class BatchSelecting(LinearDictionary):
    """Selection over the batch and the threshold that follows it; the loss is the architecture's own."""

    settings: BatchSelectingSettings
    compares_latents = True
    state_names = ("threshold", "batches_seen")
    k: Float[Tensor, "..."]
    threshold: Float[Tensor, "... d_sae"]
    """One number per member, written out for every latent as JumpReLU has it."""
    batches_seen: Float[Tensor, "..."]
    """Batches that the threshold is the mean of."""

    @classmethod
    def own_values(cls, settings: BatchSelectingSettings) -> dict[str, Tensor]:
        return {"threshold": torch.zeros(settings.d_sae), "batches_seen": torch.zeros(())}

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        pre = self.pre_activations(x)
        return torch.where(self.ranked(pre) > self.threshold.unsqueeze(-2), torch.relu(pre), 0.0)

    def select(
        self, pre: Float[Tensor, "... B d_sae"], moment: Moment
    ) -> tuple[Float[Tensor, "... B d_sae"], dict[str, Tensor]]:
        """(codes of training, the threshold after this step)."""
        settings = self.settings
        k = warmed_up(self.k, moment.sparsity, settings.d_in, settings.d_sae)
        most = self.largest["k"] if moment.sparsity >= 1 else settings.d_sae
        f = torch.where(largest_of_batch(self.ranked(pre), k, most), torch.relu(pre), 0.0)
        return f, self.next_state(smallest_kept(self.ranked(stop_gradient(f))))

    def next_state(self, smallest: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """The threshold after a batch in which `smallest` was the smallest positive score kept."""
        threshold, seen = following_threshold(self.threshold, self.batches_seen, smallest)
        return {"threshold": threshold, "batches_seen": seen}

    def nested_gradients(
        self,
        x: Float[Tensor, "B d_in"],
        target: Float[Tensor, "B d_out"] | None,
        moment: Moment,
        dtype: torch.dtype,
        ends: tuple[int, ...] = (),
    ) -> tuple[StepResult, Float[Tensor, "M n_prefixes"]] | None:
        """The sparse step with the errors of all prefixes that end at `ends` (none: of the whole), and those errors."""
        settings = self.settings
        k = warmed_up(self.k, moment.sparsity, settings.d_in, settings.d_sae)
        count = (k * len(x)).long().clamp(1, len(x) * settings.d_sae)
        most = len(x) * most_warmed_up(self.largest["k"], moment.sparsity, settings.d_in, settings.d_sae)
        fast = sparse_gradients(self, x, target, moment, dtype, rule="batch", k=count, most=most, ends=ends)
        if fast is None:
            return None
        assert fast.sparse.smallest is not None
        return fast.result._replace(state=self.next_state(fast.sparse.smallest)), fast.errors

    def inference_values(self, values: Mapping[str, Tensor], shift: Tensor | float) -> dict[str, Tensor]:
        return {"b_enc": values["b_enc"] + shift, "threshold": values["threshold"]}

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        return {"architecture": "jumprelu"}
