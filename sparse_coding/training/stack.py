"""Members that train together as one batched computation: parameters, optimiser, dead-latent clocks and metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries import TrainableDictionary, architecture
from sparse_coding.kernels.result import StepResult
from sparse_coding.training.allocator import keep_freed_memory
from sparse_coding.training.optimizer import OptimizerSettings, StackedAdam
from sparse_coding.training.sweep import Member

METRICS = ("loss", "squared_error", "l1", "l0")


def gradients_by_autograd(dictionary: TrainableDictionary, x: Float[Tensor, "B d_in"]) -> StepResult:
    """The step as the dictionary's own `loss` defines it, in the dtype of its parameters."""
    losses = dictionary.loss(x)
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    gradients = torch.autograd.grad(losses.total.sum(), parameters)
    f = losses.f.detach()
    return StepResult(
        dict(zip(names, gradients, strict=True)),
        losses.total.detach(),
        losses.terms["squared_error"].detach(),
        f.abs().sum(-1).mean(-1),
        (f != 0).sum(-2).float(),
    )


class Stack:
    """`M` members of one architecture, site and shape."""

    def __init__(self, members: Sequence[Member], settings: OptimizerSettings, device: str, dtype: torch.dtype):
        keep_freed_memory()
        self.members, self.site, self.dtype = list(members), members[0].site, dtype
        kind = architecture(members[0].architecture)
        generators = [member.generator() for member in members]
        self.dictionary = kind.init([member.settings for member in members], generators, device)
        self.optimizer = StackedAdam(self.dictionary.tensors(), [member.lr for member in members], settings)
        shape = (len(members), members[0].settings.d_sae)
        self.rows_since_fired = torch.zeros(shape, dtype=torch.int64, device=device)
        self.sums = {name: torch.zeros(shape[0], dtype=torch.float64, device=device) for name in METRICS}
        self.steps_summed = 0

    def step(self, x: Float[Tensor, "B d_in"], scale: float) -> None:
        """One update on one batch, the learning rates multiplied by `scale`. Nothing here waits for the device."""
        fused = self.dictionary.fused_gradients
        result = fused(x, self.dtype) if fused is not None else gradients_by_autograd(self.dictionary, x)
        self.dictionary.constrain_gradients_(result.gradients)
        self.optimizer.step(result.gradients, scale)
        self.dictionary.constrain_()
        self._count(result, len(x))

    def _count(self, result: StepResult, n_rows: int) -> None:
        self.rows_since_fired.add_(n_rows).mul_(result.active == 0)
        l0 = result.active.sum(-1) / n_rows
        for name, value in zip(METRICS, (result.loss, result.squared_error, result.l1, l0), strict=True):
            self.sums[name] += value
        self.steps_summed += 1

    def averages(self, dead_window: int) -> dict[str, list[float]]:
        """Means over the steps since the last call, and latents silent for `dead_window` rows, per member."""
        means = {name: (value / max(self.steps_summed, 1)).tolist() for name, value in self.sums.items()}
        means["dead"] = (self.rows_since_fired >= dead_window).sum(1).tolist()
        for value in self.sums.values():
            value.zero_()
        self.steps_summed = 0
        return means

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on or a log line will show, by a flat name; shares memory."""
        parts = {
            "weights": self.dictionary.tensors(),
            "adam1": self.optimizer.first,
            "adam2": self.optimizer.second,
            "sums": self.sums,
            "clocks": {"rows_since_fired": self.rows_since_fired},
        }
        return {
            f"{member.name}/{part}/{name}": value[index]
            for index, member in enumerate(self.members)
            for part, tensors in parts.items()
            for name, value in tensors.items()
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], steps: int, steps_summed: int) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])
        self.optimizer.set_steps(steps)
        self.steps_summed = steps_summed
