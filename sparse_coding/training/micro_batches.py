"""A batch taken in pieces where memory does not hold it whole, and what to lower where that does not help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_coding.dictionaries import Moment, TrainableDictionary
from sparse_coding.errors import UserError, is_out_of_memory
from sparse_coding.kernels.result import StepResult
from sparse_coding.training.safety import Safety

Gradients = Callable[[Tensor, Tensor | None, Moment], StepResult]
"""(x, target, moment) -> gradients and metrics of one batch."""

PROBE_ROWS = 16


@contextmanager
def memory_for(doing: str, advice: str) -> Iterator[None]:
    """Running out of memory inside is a `UserError` that says what to lower."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory while {doing}: {advice}") from None


@contextmanager
def plan_without_memory(safety: Safety) -> Iterator[None]:
    """Around the estimate of a run: with --auto-batch, memory too small for a whole batch ends the estimate alone."""
    try:
        yield
    except UserError as error:
        if not (safety.auto_batch and isinstance(error, BatchTooLarge)):
            raise
        print("plan: memory does not hold a whole batch; --auto-batch will take it in pieces", flush=True)


class BatchTooLarge(UserError):
    """Memory does not hold the step of a batch, which smaller pieces might mend."""


class MicroBatches:
    """How many pieces the batches of one stack are taken in: 1, doubled each time that memory runs out.

    allowed: whether pieces were asked for. whole: the loss looks at the batch as a whole, so that pieces would train
    something else.
    """

    def __init__(self, name: str, allowed: bool = False, whole: bool = False):
        self.name, self.allowed, self.whole, self.pieces = name, allowed, whole, 1

    def gradients(self, compute: Gradients, x: Tensor, target: Tensor | None, moment: Moment) -> StepResult:
        """Of the whole batch. Trying again is safe: gradients change no state."""
        while True:
            try:
                return in_pieces(compute, x, target, moment, self.pieces)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            # Outside the handler, which holds on to the tensors of the failed attempt.
            self._halve(len(x), moment)

    def _halve(self, rows: int, moment: Moment) -> None:
        size = -(-rows // self.pieces)
        lower = "lower --batch-size or --ratios, or train fewer dictionaries at once"
        if not self.allowed:
            raise BatchTooLarge(f"out of memory in a step of {size:,} rows: {lower}, or give --auto-batch")
        if self.whole or moment.error is not None:
            raise UserError(
                f"out of memory in a step of {size:,} rows, and --auto-batch cannot split it: the loss of {self.name} "
                f"looks at the whole batch; {lower}"
            )
        if size == 1:
            raise UserError(f"out of memory in a step of a single row: {lower}")
        self.pieces = min(2 * self.pieces, rows)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        told = f"out of memory: batches of {rows:,} rows are now taken in {self.pieces} pieces ({self.name})"
        print(told, file=sys.stderr, flush=True)


def in_pieces(compute: Gradients, x: Tensor, target: Tensor | None, moment: Moment, pieces: int) -> StepResult:
    """The step on `pieces` parts of the batch, gradients and means weighted by their rows, counts added up.

    Equal to the whole batch, but for rounding, where the loss is a mean over rows.
    """
    if pieces == 1:
        return compute(x, target, moment)
    total: StepResult | None = None
    targets = [None] * pieces if target is None else target.chunk(pieces)
    for part, aim in zip(x.chunk(pieces), targets, strict=False):
        result, weight = compute(part, aim, moment), len(part) / len(x)
        loss, error, l1 = (value * weight for value in (result.loss, result.squared_error, result.l1))
        terms = {name: value * weight for name, value in result.terms.items()}
        if total is None:
            for gradient in result.gradients.values():
                gradient.mul_(weight)
            total = StepResult(result.gradients, loss, error, l1, result.active, terms, result.state)
            continue
        for name, gradient in result.gradients.items():
            total.gradients[name].add_(gradient, alpha=weight)
        own = (total.loss, total.squared_error, total.l1, total.active)
        for sum_, value in zip(own, (loss, error, l1, result.active), strict=True):
            sum_.add_(value)
        for name, value in terms.items():
            total.terms[name].add_(value)
        del result
    assert total is not None
    return total


def looks_at_whole_batch(
    dictionary: TrainableDictionary, gradients: Callable[..., StepResult], d_out: int | None, revives: bool
) -> bool:
    """Whether the loss of a batch differs from the mean over its halves: asked of the loss itself, on random rows.

    True for selection over a batch (batchtopk), fvu, ghost gradients, target_l0 and whatever keeps running values.
    `gradients(dictionary, x, target, moment)` is the definition by autograd; d_out None: x itself is the target.
    """
    device = next(iter(dictionary.tensors().values())).device
    generator = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-1, 1, PROBE_ROWS).unsqueeze(1)
    x = (torch.randn(PROBE_ROWS, dictionary.d_in, generator=generator) * sizes).to(device)
    target = None if d_out is None else (torch.randn(PROBE_ROWS, d_out, generator=generator) * sizes).to(device)
    if dictionary.state():
        return True
    n_members, d_sae = dictionary.atoms.shape[0], dictionary.d_sae
    dead = torch.arange(d_sae, device=device).remainder(2).bool().expand(n_members, -1)
    for moment in (Moment(), *([Moment(dead=dead)] if revives else [])):

        def compute(x: Tensor, target: Tensor | None, moment: Moment) -> StepResult:
            return gradients(dictionary, x, target, moment)

        whole, halves = (in_pieces(compute, x, target, moment, pieces) for pieces in (1, 2))
        pairs = [(whole.loss, halves.loss), *((g, halves.gradients[n]) for n, g in whole.gradients.items())]
        if any(bool((a - b).abs().max() > 1e-3 * a.abs().max() + 1e-12) for a, b in pairs):
            return True
    return False
