"""Members that have settled are set aside, in stacks of their own that take no more updates."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparse_coding.training.build import build_stacks
from sparse_coding.training.sweep import split_into_stacks, stack_bytes

if TYPE_CHECKING:
    from sparse_coding.training.trainer import Trainer


def groups_of(trainer: Trainer) -> list[list[int]]:
    """Indices of the members of each stack: those of a sweep, each of them parted where some of its members settled."""
    stopped, found = trainer.settling.stopped, []
    for group in split_into_stacks(trainer.members, trainer.stream.batch_size, stack_bytes(trainer.device)):
        for stack in ([i for i in group if stopped[i] < 0], [i for i in group if stopped[i] >= 0]):
            found += [stack] if stack else []
    return found


@torch.no_grad()
def set_aside(trainer: Trainer) -> None:
    """Take members that have just settled out of the stacks that go on."""
    stopped, state, micro = trainer.settling.stopped, {}, {}
    summed = trainer.steps_summed
    before = {tuple(group): stack for group, stack in zip(trainer.groups, trainer.stacks, strict=True)}
    for group, stack in before.items():
        if not stack.resting:
            stack.repeat_averages([place for place, index in enumerate(group) if stopped[index] >= 0])
        state |= stack.state()
        micro |= dict.fromkeys(group, stack.micro)
    trainer.groups, trainer.stacks = groups_of(trainer), []
    for group in trainer.groups:
        stack = before.get(tuple(group))
        if stack is None:
            (stack,) = build_stacks(trainer.members, [group], trainer.stream, trainer.settings, trainer.device)
            stack.micro = micro[group[0]]
            stack.load_state(state, summed)
        if stopped[group[0]] >= 0:
            stack.resting, stack.steps_summed = True, 1
        trainer.stacks.append(stack)
