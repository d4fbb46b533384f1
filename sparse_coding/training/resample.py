"""Resampling of dead latents: they get new directions, drawn from inputs that are reconstructed badly.

For each dead latent one input is drawn without replacement, with probability proportional to the square of its loss.
Its direction becomes the atom; the encoder column is the same direction at 0.2 times the mean length of the living
ones; bias 0; the optimiser's memory of all of them is wiped. Source: Bricken et al., "Towards Monosemanticity" (2023),
appendix "Neuron resampling".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries import Moment
from sparse_coding.kernels.result import runs
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import Member


@torch.no_grad()
def resample(stacks: Sequence[Stack], batches: Iterable[Mapping[str, Tensor]], moment: Moment) -> list[int]:
    """Give every dead latent of every stack a new direction; returns how many each member had, stack by stack.

    `batches` are the rows whose losses count. They are read once for all stacks, and not at all where nothing is dead.
    """
    resamplings = [_Resampling(stack, moment) for stack in stacks]
    needed = [one for one in resamplings if any(one.counts)]
    for batch in batches if needed else ():
        for one in needed:
            one.read(batch)
    for one in needed:
        one.restart()
    return [count for one in resamplings for count in one.counts]


class _Resampling:
    """The resampling of one stack."""

    def __init__(self, stack: Stack, moment: Moment):
        self.stack, self.moment, self.dead = stack, moment, stack.clocks.dead()
        self.counts: list[int] = self.dead.sum(1).tolist()
        self.draws = [_Draw(one, moment.step, count) for one, count in zip(stack.members, self.counts, strict=True)]

    def read(self, batch: Mapping[str, Tensor]) -> None:
        """Offer the rows of a batch to every member, by how badly it reconstructs them."""
        x, target = self.stack.rows(batch)
        aim = x if target is None else target
        for members in runs(range(len(self.draws)), self.stack.at_once(len(x), self.moment)):
            x_hat = self.stack.dictionary.part(members).loss(x, target, self.moment).x_hat
            for losses, draw in zip((x_hat - aim).square().sum(-1), self.draws[members], strict=True):
                draw.offer(losses, x, aim)

    def restart(self) -> None:
        for index, draw in enumerate(self.draws):
            if draw.count:
                latents = self.dead[index].nonzero().flatten()[: len(draw.keys)]
                self.stack.restart_(index, latents, draw.x, draw.target)


class _Draw:
    """`count` rows of all that are offered, without replacement, P ~ loss^2: the largest of log loss^2 + Gumbel noise
    (Efraimidis and Spirakis 2006)."""

    def __init__(self, member: Member, step: int, count: int):
        digest = hashlib.sha256(f"resample:{member.seed}:{step}".encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        self.count = count
        self.keys, self.x, self.target = torch.empty(0), torch.empty(0), torch.empty(0)

    def offer(self, losses: Float[Tensor, " B"], x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"]) -> None:
        uniform = torch.rand(len(losses), generator=self.generator, dtype=torch.float64).to(losses.device)
        if not self.count:
            return
        keys = 2 * losses.double().log() - (-uniform.clamp_min(1e-300).log()).log()
        keys = torch.where(losses > 0, keys, -torch.inf)
        if len(self.keys):
            keys, x, target = torch.cat([self.keys, keys]), torch.cat([self.x, x]), torch.cat([self.target, target])
        self.keys, kept = keys.topk(min(self.count, len(keys)))
        self.x, self.target = x[kept], target[kept]
