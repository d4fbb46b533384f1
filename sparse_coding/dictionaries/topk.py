"""The TopK dictionary: exactly k latents per row, dead ones revived by AuxK.

    f = relu(the k largest of pre)          pre = (x - b_dec) W_enc + b_enc          x_hat = f W_dec + b_dec

    loss = E ||x - x_hat||^2 [+ the same with 4k latents / 8: multi_topk] + auxk_coefficient AuxK

selection  topk   the k largest pre-activations (Gao et al., arXiv 2406.04093)
           abs    the k largest in absolute value, signs kept (AbsTopK, arXiv 2510.00404)
           group  the largest of each of k groups of latents (GroupMax of sparsify)

With a free decoder latents are ranked by pre ||W_dec_i||, as in SAELens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, Losses, Moment
from sparse_coding.dictionaries.linear import LinearDictionary
from sparse_coding.dictionaries.linear_settings import DeadLatents, LinearSettings
from sparse_coding.dictionaries.selection import (
    largest_per_group,
    largest_per_row,
    most_warmed_up,
    require_k,
    warmed_up,
)
from sparse_coding.dictionaries.sparse import sparse_gradients
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult

Selection = Literal["topk", "abs", "group"]


@dataclass(frozen=True)
class TopKSettings(LinearSettings):
    """Settings of one TopK dictionary."""

    k: int = 32
    """Latents active in each row."""
    selection: Selection = "topk"
    """topk, abs or group (GroupMax)."""
    multi_topk: bool = False
    """Add an eighth of the error with 4k latents, which keeps reconstructions sane at other k than that of training."""
    dead_latents: DeadLatents = "auxk"

    per_member: ClassVar[tuple[str, ...]] = ("k", "auxk_coefficient")
    named: ClassVar[tuple[str, ...]] = ("k",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"k": (8, 16, 32, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, whole=True)
        if self.selection not in get_args(Selection):
            raise UserError(f"selection is {self.selection!r}: allowed are {', '.join(get_args(Selection))}")


@final
class TopK(LinearDictionary):
    """k latents per row."""

    Settings = TopKSettings
    settings: TopKSettings
    compares_latents = True
    k: Float[Tensor, "..."]

    @property
    def signed(self) -> bool:
        return self.settings.selection == "abs"

    def select(
        self, pre: Float[Tensor, "... B d_sae"], k: Float[Tensor, "..."], most: float
    ) -> Float[Tensor, "... B d_sae"]:
        """Codes from pre-activations: those that are kept, 0 elsewhere."""
        scores = self.competing(pre)
        if self.signed:
            return torch.where(largest_per_row(scores, k, round(most)), pre, 0.0)
        largest = largest_per_group if self.settings.selection == "group" else largest_per_row
        return torch.where(largest(scores, k, round(most)), torch.relu(pre), 0.0)

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return self.select(self.pre_activations(x), self.k, self.largest["k"])

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        target = x if target is None else target
        settings, terms = self.settings, {}
        k = warmed_up(self.k, moment.sparsity, settings.d_in, settings.d_sae)
        most = self.largest["k"] if moment.sparsity >= 1 else settings.d_sae
        pre = self.pre_activations(x)
        f = self.select(pre, k, most)
        x_hat = self.decode(f, x)
        total = self.error(x_hat, target, moment)
        if settings.multi_topk:
            wide = self.select(pre, (4 * k).clamp(max=settings.d_sae), min(4 * most, settings.d_sae))
            terms["multi_topk"] = self.error(self.decode(wide, x), target, moment) / 8
            total = total + terms["multi_topk"]
        return self.finish(total, terms, pre, f, x_hat, target, moment)

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        settings = self.settings
        if settings.selection == "group" or settings.multi_topk:
            return None
        k = warmed_up(self.k, moment.sparsity, settings.d_in, settings.d_sae).round().long()
        most = most_warmed_up(self.largest["k"], moment.sparsity, settings.d_in, settings.d_sae)
        fast = sparse_gradients(self, x, target, moment, dtype, rule="topk", k=k, most=most)
        return fast and fast.result

    @property
    def saelens_architecture(self) -> dict[str, Any]:
        name = {"topk": "topk", "abs": "abstopk", "group": "groupmax"}[self.settings.selection]
        return {"architecture": name, "k": round(float(self.k)), "rescale_acts_by_decoder_norm": False}
