"""What every optimiser of a stack shares: members grouped by learning rate, clipping, state.

A stack's parameters are tensors `[M ...]`. The updates work on views of one member each, in torch's multi-tensor
operations: a member then sees the very operations, on the very shapes, that it would see alone, so it comes out
bit-for-bit the same, and a group of members that share a learning rate takes one call.
"""

# torch documents its multi-tensor operations only as internals of torch.optim
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import abc
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_coding.kernels.triton.adam import RowAdam
    from sparse_coding.training.optimizer import OptimizerSettings


class Group(NamedTuple):
    """Members that share a learning rate; each list holds every parameter of every member as a tensor of its own."""

    lr: float
    members: list[int]
    parameters: list[Tensor]
    moments: dict[str, list[Tensor]]
    """By part."""


class StackedOptimizer(abc.ABC):
    """Updates the parameters `[M ...]` of a stack in place; member `m` learns at the rate `lrs[m]`."""

    moment_names: ClassVar[tuple[str, ...]] = ()
    """Parts of the state with one number for each entry of each parameter; they start at 0."""
    on_device: ClassVar[bool] = True
    """Whether all numbers that change from step to step may lie on the parameters' device, the factor among them."""

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lrs: Sequence[float],
        settings: OptimizerSettings,
        matrices: Collection[str] = (),
    ):
        assert all(value.is_contiguous() or value.mT.is_contiguous() for value in parameters.values())
        assert all(len(value) == len(lrs) for value in parameters.values())
        self.parameters, self.lrs, self.settings = dict(parameters), list(lrs), settings
        half = [name for name in parameters if settings.moments == "bf16" and name in matrices]
        self.moments = {
            part: {
                name: torch.zeros_like(value, dtype=torch.bfloat16 if name in half else None)
                for name, value in parameters.items()
            }
            for part in self.moment_names
        }
        # Views are made once: with hundreds of members that costs more than the update.
        self.groups: list[Group] = []
        for lr in dict.fromkeys(lrs):
            members = [index for index, own in enumerate(lrs) if own == lr]
            moments = {part: views(tensors, members) for part, tensors in self.moments.items()}
            self.groups.append(Group(lr, members, views(self.parameters, members), moments))

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], scale: float | Tensor) -> None:
        """One update with learning rates `lrs * scale`; leaves the gradients as they are, waits for no device.

        `scale` may lie on the device (0-d, float32), where `on_device`: a CUDA graph then reads what it holds by then.
        """
        # Not a nicety: torch's fused Adam reads a gradient of another layout in the wrong order and says nothing.
        own = {name: in_layout_of(value, gradients[name]) for name, value in self.parameters.items()}
        if self.settings.clip_norm is not None:
            own = clipped(own, self.settings.clip_norm)
        self.apply(own, scale)

    def apply(self, gradients: dict[str, Tensor], scale: float | Tensor) -> None:
        """The update itself, from gradients in the layouts of the parameters."""
        for group in self.groups:
            self.update(group, views(gradients, group.members), group.lr * scale)

    @abc.abstractmethod
    def update(self, group: Group, gradients: list[Tensor], lr: float | Tensor) -> None:
        """Update the parameters and the moments of one group."""

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Part -> name -> tensor `[M ...]`: all that the next step depends on besides the parameters; shares memory.

        Names are those of parameters, but for numbers that belong to the member as a whole. What is kept on the CPU,
        and in float64, has to come back so: restore with `copy_`.
        """
        return {part: dict(tensors) for part, tensors in self.moments.items()}

    @torch.no_grad()
    def forget_(self, masks: Mapping[str, Tensor]) -> None:
        """Reset what is remembered of the entries where a mask is True; the rest, and the step counts, stay.

        `masks` holds, for each parameter concerned, a bool tensor that broadcasts to it `[M ...]`. Give the entries
        their new values first: schedule-free starts again from them.
        """
        for tensors in self.moments.values():
            for name, mask in masks.items():
                tensors[name].masked_fill_(mask, 0)

    def row_learning(self) -> RowAdam | None:
        """The same updates, on the same state, inside the kernels that make the gradients; None where there is none."""
        return None

    def averaged(self) -> dict[str, Tensor] | None:
        """The weights to evaluate with, where they are not the parameters themselves (schedule-free); copies."""
        return None


def descend(parameters: list[Tensor], directions: list[Tensor] | tuple[Tensor, ...], lr: float | Tensor) -> None:
    """p -= lr * direction."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(parameters, directions, alpha=-lr)


def views(tensors: Mapping[str, Tensor], members: Sequence[int]) -> list[Tensor]:
    """Each parameter of each member as a tensor of its own, parameter by parameter."""
    return [value[index] for value in tensors.values() for index in members]


def in_layout_of(value: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its numbers in memory as those of `value`, a copy where they are not."""
    same = value.stride() == gradient.stride() or (value.is_contiguous() and gradient.is_contiguous())
    return gradient if same else torch.empty_like(value).copy_(gradient)


def clipped(gradients: Mapping[str, Tensor], clip_norm: float) -> dict[str, Tensor]:
    """Gradients `[M ...]` scaled down, member by member, to a norm of at most `clip_norm` over all parameters.

    As `torch.nn.utils.clip_grad_norm_` does it for one model. A member's norm comes from its own tensors alone, so that
    not even the order of summation depends on the others.
    """
    n_members = len(next(iter(gradients.values())))
    norms = torch.stack(torch._foreach_norm(views(gradients, range(n_members)))).view(len(gradients), n_members)
    squares = norms.square()
    total = squares[0]
    for row in squares[1:]:
        total = total + row
    factor = (clip_norm / (total.sqrt() + 1e-6)).clamp(max=1.0)
    return {name: value * factor.view(-1, *[1] * (value.dim() - 1)) for name, value in gradients.items()}
