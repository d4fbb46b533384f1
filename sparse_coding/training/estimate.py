"""What a sweep will cost, said before it starts: FLOP counted, seconds measured on a few steps of throwaway stacks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sparse_coding.dictionaries import Moment
from sparse_coding.progress import duration, quantity
from sparse_coding.training.build import build_stacks
from sparse_coding.training.stream import Stream
from sparse_coding.training.sweep import Member, split_into_stacks, stack_bytes
from sparse_coding.training.trainer import StepError, TrainingSettings


@dataclass(frozen=True)
class Estimate:
    """Of a whole sweep."""

    members: int
    flop: float
    """Of the five matrix products of every member and step: 10 * rows * d_in * d_sae."""
    seconds: float
    memory_bytes: int
    """Parameters in fp32, and Adam's two moments."""

    def __str__(self) -> str:
        rate = self.flop / max(self.seconds, 1e-9)
        return (
            f"{self.members} dictionaries, {quantity(self.flop / 1e12)} TFLOP, about {duration(self.seconds)} "
            f"at {quantity(rate / 1e9)} GFLOP/s (measured on a few steps), {quantity(self.memory_bytes / 2**20)} MiB"
        )


def estimate(
    members: Sequence[Member],
    stream: Stream,
    training: TrainingSettings,
    device: str,
    hidden_seconds: float = 0.0,
    error: StepError | None = None,
) -> Estimate:
    """Time one step of each distinct kind of stack, and one batch of the stream.

    `hidden_seconds` per batch are what a stream spends now and then and a few batches do not show, such as capturing.
    `error` is that of the trainer.
    """
    steps = training.steps
    batch, stream_seconds = stream.batch(0), _seconds(lambda step: stream.batch(step), device, first=1)
    timed: dict[tuple, float] = {}
    per_step = stream_seconds + hidden_seconds
    for group in split_into_stacks(members, stream.batch_size, stack_bytes(device)):
        chosen = [members[index] for index in group]
        first = chosen[0]
        shape = (first.architecture, first.variant, first.site, first.settings.d_sae, len(chosen))
        if shape not in timed:
            (stack,) = build_stacks(chosen, [range(len(chosen))], stream, replace(training, steps=1), device)
            moment = Moment(error=error and error(0, first.output_site))
            timed[shape] = _seconds(lambda _, stack=stack, moment=moment: stack.step(batch, 1.0, moment), device)
            del stack
        per_step += timed[shape]
    weights = sum((m.settings.d_in + m.settings.target_width) / 2 * m.settings.d_sae for m in members)
    flop = 10.0 * stream.batch_size * weights * steps
    each = 4 + 2 * (2 if training.optimizer.moments == "bf16" else 4)  # bytes of a parameter and its moments
    return Estimate(len(members), flop, per_step * steps, round(weights * 2 * each))


def _seconds(step: Callable[[int], object], device: str, first: int = 0, budget: float = 0.3) -> float:
    """The quickest of `step(first), step(first + 1), ...` within a budget of seconds, three calls at least.

    The first calls are slow for reasons that pass (threads, memory, kernels that are chosen), so not the mean.
    """
    times: list[float] = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 30):
        _wait(device)
        began = time.perf_counter()
        step(first + len(times))
        _wait(device)
        times.append(time.perf_counter() - began)
    return min(times)


def _wait(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
