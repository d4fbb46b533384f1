"""What one training step of a stack hands back, whichever path computed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class StepResult(NamedTuple):
    """Gradients and the metrics that fall out of the step; nothing here needed an extra pass or a host sync."""

    gradients: dict[str, Tensor]
    """By parameter name, in the parameter's shape and dtype."""
    loss: Float[Tensor, " M"]
    squared_error: Float[Tensor, " M"]
    """Batch mean of ||x - x_hat||^2, summed over dims."""
    l1: Float[Tensor, " M"]
    """Batch mean of ||f||_1."""
    active: Float[Tensor, "M d_sae"]
    """How many rows of the batch each latent fired on."""
    terms: Mapping[str, Float[Tensor, " M"]] = {}
    """Other terms of the loss by name, such as AuxK."""
    state: Mapping[str, Tensor] = {}
    """New values of what the dictionary keeps besides its parameters."""
