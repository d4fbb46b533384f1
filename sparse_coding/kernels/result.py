"""What one training step of a stack hands back, whichever path computed it: one for all members, or several."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    left: Sequence[int] = ()
    """Members that this path did not take, in ascending order: nothing else here says anything of them."""

    def put(self, members: slice, found: StepResult) -> None:
        """Write in what another path found for `members`."""
        for name in ("loss", "squared_error", "l1", "active"):
            getattr(self, name)[members] = getattr(found, name)
        for name in ("gradients", "terms", "state"):
            for key, value in getattr(self, name).items():
                value[members] = getattr(found, name)[key]

    def room(self, n_members: int) -> StepResult:
        """A result of the same make for `n_members`, to be filled."""

        def empty(value: Tensor) -> Tensor:
            return value.new_empty(n_members, *value.shape[1:])

        own = (self.gradients, self.terms, self.state)
        gradients, terms, state = ({name: empty(value) for name, value in part.items()} for part in own)
        loss, squared_error, l1, active = map(empty, (self.loss, self.squared_error, self.l1, self.active))
        return StepResult(gradients, loss, squared_error, l1, active, terms, state)


def runs(members: Sequence[int], most: int) -> Iterator[slice]:
    """Ascending `members` as runs of neighbours, each of `most` at most."""
    start = 0
    for end in range(1, len(members) + 1):
        if end == len(members) or members[end] != members[end - 1] + 1 or end - start == most:
            yield slice(members[start], members[end - 1] + 1)
            start = end
