"""Adam over a stack, with a learning rate per member, and the schedules of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.optim.adam import adam

from sparse_coding.errors import UserError

Decay = Literal["none", "linear", "cosine"]


@dataclass(frozen=True)
class OptimizerSettings:
    """Adam (Kingma and Ba, arXiv 1412.6980) and the schedule its learning rate follows."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its full value."""
    decay: Decay = "none"
    """How the learning rate falls to 0 at the end of the run."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which it falls."""

    def __post_init__(self) -> None:
        if self.decay not in get_args(Decay):
            raise UserError(f"the decay is {self.decay!r}: allowed are {', '.join(get_args(Decay))}")
        if self.warmup_steps < 0 or not 0 <= self.decay_fraction <= 1:
            raise UserError(
                f"warm-up of {self.warmup_steps} steps, decay over {self.decay_fraction} of the run: "
                "the first must be at least 0, the second between 0 and 1"
            )

    def scale(self, step: int, steps: int) -> float:
        """Factor on the learning rate at step 0 <= step < steps; 1 at full height."""
        factor = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        falling = round(steps * self.decay_fraction)
        left = steps - step
        if self.decay != "none" and left <= falling:
            share = left / (falling + 1)
            factor *= share if self.decay == "linear" else 0.5 * (1 - math.cos(math.pi * share))
        return factor


class StackedAdam:
    """Adam on the parameters of a stack `[M ...]`; each member is exactly `torch.optim.Adam` with its own rate."""

    def __init__(self, parameters: Mapping[str, Tensor], lrs: Sequence[float], settings: OptimizerSettings):
        self.settings = settings
        self.first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self.second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        # One group per learning rate; its views of the members are made once, and the counts stay on the device.
        self.groups: list[_Group] = []
        for lr in dict.fromkeys(lrs):
            members = [index for index, own in enumerate(lrs) if own == lr]
            weights, first, second = (_views(tensors, members) for tensors in (parameters, self.first, self.second))
            counts = [torch.zeros((), device=value.device) for value in weights]
            self.groups.append(_Group(lr, members, weights, first, second, counts))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], scale: float) -> None:
        """One update with learning rates `lrs * scale`."""
        for group in self.groups:
            adam(
                group.parameters,
                _views({name: gradients[name] for name in self.first}, group.members),
                group.first,
                group.second,
                [],
                group.counts,
                fused=True,
                amsgrad=False,
                beta1=self.settings.beta1,
                beta2=self.settings.beta2,
                lr=group.lr * scale,
                weight_decay=0.0,
                eps=self.settings.eps,
                maximize=False,
            )

    def set_steps(self, steps: int) -> None:
        """The number of updates done so far, for a run that is resumed."""
        for group in self.groups:
            for count in group.counts:
                count.fill_(steps)


class _Group(NamedTuple):
    """Members that share a learning rate, each parameter of each as a tensor of its own."""

    lr: float
    members: list[int]
    parameters: list[Tensor]
    first: list[Tensor]
    second: list[Tensor]
    counts: list[Tensor]


def _views(tensors: Mapping[str, Tensor], members: list[int]) -> list[Tensor]:
    return [value[index] for value in tensors.values() for index in members]
