"""Resampling of dead latents: they get new directions, drawn from inputs that are reconstructed badly.

For each dead latent one input is drawn without replacement, with probability proportional to the square of its loss.
Its direction becomes the atom; the encoder column is the same direction at 0.2 times the mean length of the living
ones; bias 0; the optimiser's memory of all of them is wiped. Source: Bricken et al., "Towards Monosemanticity" (2023),
appendix "Neuron resampling".
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries import Moment
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import Member


@torch.no_grad()
def resample(stack: Stack, batches: Iterable[Mapping[str, Tensor]], moment: Moment) -> list[int]:
    """Give every dead latent of a stack a new direction; returns how many each member had.

    `batches` are the rows whose losses count, read once. Waits for the device once per batch at most.
    """
    dead = stack.clocks.dead()
    counts = dead.sum(1).tolist()
    if not any(counts):
        return counts
    draws = [_Draw(member, moment.step, count) for member, count in zip(stack.members, counts, strict=True)]
    for batch in batches:
        x, target = stack.rows(batch)
        losses = (stack.dictionary.loss(x, target, moment).x_hat - (x if target is None else target)).square().sum(-1)
        for index, draw in enumerate(draws):
            draw.offer(losses[index], x, x if target is None else target)
    for index, draw in enumerate(draws):
        if counts[index]:
            latents = dead[index].nonzero().flatten()[: len(draw.keys)]
            stack.restart_(index, latents, draw.x, draw.target)
    return counts


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
