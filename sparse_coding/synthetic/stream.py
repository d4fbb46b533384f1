"""A toy world as a stream of activation batches, the form in which the trainer takes its data."""

from __future__ import annotations

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor

from sparse_coding.synthetic.world import World, WorldBatch, check_position

SITE = "synthetic"


class WorldStream:
    """Batches of a world under the site name "synthetic"; batch(step) is a pure function of the world's seed and step.

    `split="held-out"` gives rows that no training step sees. `noisy=False` leaves out the world's noise, as the code of
    2023 did whenever it evaluated. Raises UserError for an unknown split or a batch of no rows.
    """

    def __init__(self, world: World, batch_size: int, split: str = "train", noisy: bool = True) -> None:
        check_position(0, batch_size, split)
        self.world = world
        self.batch_size = batch_size
        self.split = split
        self.noisy = noisy
        self.widths: Mapping[str, int] = {SITE: world.settings.d_in}

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Activations [B d_in] of batch number `step`, on the world's device."""
        return {SITE: self.batch_with_truth(step).x}

    def batch_with_truth(self, step: int) -> WorldBatch:
        """The same batch with its codes and the true directions."""
        return self.world.batch(step, self.batch_size, self.split, self.noisy)
