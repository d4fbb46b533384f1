"""Which optimiser trains a sweep, with which settings, and the schedule its learning rates follow."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from sparse_coding.errors import UserError, near
from sparse_coding.training.optimizers import (
    SGD,
    Adam,
    AdamW,
    Muon,
    ScheduleFree,
    Signum,
    StackedOptimizer,
)
from sparse_coding.training.schedule import Schedule, fall, restarts, warm_up

Moments = Literal["fp32", "bf16"]
OptimizerName = Literal["adam", "adamw", "sgd", "signum", "muon", "schedule-free"]
MOMENTUM = {"sgd": 0.9, "signum": 0.95, "muon": 0.95}
"""The optimisers that have a momentum, and what it is where nothing is said."""


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser and the schedule of its learning rate, the same for every member of a sweep."""

    name: OptimizerName = "adam"
    """adam (arXiv 1412.6980), adamw (1711.05101), sgd, signum (1802.04434), muon (Keller Jordan 2024), schedule-free
    (AdamW of 2405.15682)."""
    beta1: float = 0.9
    """Of the adams: decay of the mean gradient; of schedule-free: how much of x is in the weights trained at."""
    beta2: float = 0.999
    """Of the adams and schedule-free: decay of the mean squared gradient."""
    eps: float = 1e-8
    """Of the adams and schedule-free: added to the root of the mean squared gradient."""
    moments: Moments = "fp32"
    """Of adam and adamw: what the means of a matrix's gradient and its square are kept in. bf16 takes half the memory,
    and is rounded at random (optimizers/rounding.py)."""
    momentum: float | None = None
    """Of sgd (0.9 where nothing is said), signum and muon (0.95); the others have none."""
    weight_decay: float = 0.0
    """Added to the gradient by adam and sgd (coupled, as in torch); the others shrink the weights by the factor
    1 - lr * weight_decay beside the update (decoupled)."""
    clip_norm: float | None = None
    """Largest norm of the gradient of one member, over all its parameters; None does not clip."""
    schedule: Schedule = "constant"
    """linear and cosine fall to 0 at the end of the run, restarts falls several times; constantwithwarmup is constant,
    and wants `warmup_steps`."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly to its full value."""
    decay_fraction: float = 0.2
    """Share of the run, at its end, over which linear and cosine fall."""
    restarts: int = 4
    """Cycles of restarts, over the run after the warm-up."""
    resample_warmup_steps: int = 0
    """Steps over which the learning rate rises again after dead latents were re-initialised."""

    def __post_init__(self) -> None:
        self._one_of("name", get_args(OptimizerName))
        self._one_of("schedule", get_args(Schedule))
        self._one_of("moments", get_args(Moments))
        for name, allowed, holds in (
            ("beta1", "at least 0 and below 1", lambda value: 0 <= value < 1),
            ("beta2", "at least 0 and below 1", lambda value: 0 <= value < 1),
            ("eps", "above 0", lambda value: 0 < value < math.inf),
            ("momentum", "at least 0 and below 1", lambda value: value is None or 0 <= value < 1),
            ("weight_decay", "at least 0", lambda value: 0 <= value < math.inf),
            ("clip_norm", "above 0", lambda value: value is None or 0 < value < math.inf),
            ("warmup_steps", "at least 0", lambda value: value >= 0),
            ("decay_fraction", "between 0 and 1", lambda value: 0 <= value <= 1),
            ("restarts", "at least 1", lambda value: value >= 1),
            ("resample_warmup_steps", "at least 0", lambda value: value >= 0),
        ):
            if not holds(getattr(self, name)):
                raise UserError(f"{name} is {getattr(self, name)}: it must be {allowed}")
        if self.momentum is not None and self.name not in MOMENTUM:
            raise UserError(f"momentum is {self.momentum}, but {self.name} has none: it is for {', '.join(MOMENTUM)}")
        if self.moments != "fp32" and self.name not in ("adam", "adamw"):
            raise UserError(f"moments are {self.moments}, but {self.name} keeps its own in fp32: it is for adam, adamw")
        if self.name == "schedule-free" and self.beta1 == 0:
            raise UserError("beta1 is 0: schedule-free needs one above 0, its weights to evaluate with divide by it")
        if self.schedule == "constantwithwarmup" and self.warmup_steps == 0:
            raise UserError(
                "the schedule is constantwithwarmup and warmup_steps is 0: say how long the warm-up is with "
                "--warmup-steps, or take the schedule constant"
            )

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        given = getattr(self, name)
        if given not in allowed:
            what = "optimizer" if name == "name" else name
            raise UserError(f"the {what} is {given!r}: allowed are {', '.join(allowed)}{near(str(given), allowed)}")

    @property
    def own_momentum(self) -> float:
        """The momentum, or what the optimiser takes where nothing is said."""
        return MOMENTUM[self.name] if self.momentum is None else self.momentum

    def scale(self, step: int, steps: int, since_resampling: int | None = None) -> float:
        """Factor on the learning rate at step 0 <= step < steps; 1 at full height.

        `since_resampling` counts the steps since dead latents were last re-initialised, 0 for the first one after it;
        None where that never happened.
        """
        factor = warm_up(step, self.warmup_steps)
        if self.schedule in ("linear", "cosine"):
            factor *= fall(step, steps, self.decay_fraction, self.schedule)
        elif self.schedule == "restarts":
            factor *= restarts(step, steps, self.warmup_steps, self.restarts)
        if since_resampling is not None:
            factor *= warm_up(since_resampling, self.resample_warmup_steps)
        return factor


OPTIMIZERS: dict[str, type[StackedOptimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "sgd": SGD,
    "signum": Signum,
    "muon": Muon,
    "schedule-free": ScheduleFree,
}


def make_optimizer(
    parameters: Mapping[str, Tensor],
    lrs: Sequence[float],
    settings: OptimizerSettings,
    matrices: Collection[str] = (),
) -> StackedOptimizer:
    """The optimiser of a stack; it updates `parameters`, each `[M ...]` and contiguous (its last two axes may lie
    in memory the other way round), in place.

    `lrs` holds the learning rate of each of the M members, `matrices` the names of the parameters `[M r c]` that muon
    orthogonalises (a name that is no parameter is passed over). Make it when the parameters have their initial values:
    schedule-free starts from them.
    """
    return OPTIMIZERS[settings.name](parameters, lrs, settings, matrices)
