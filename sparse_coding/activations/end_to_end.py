"""End-to-end losses: what a language model loses when a reconstruction takes the place of its activations.

    ce    mean over positions of -log q(next token)             in nats, q the model with x_hat at the site
    kl    mean over positions of sum_v p_v log(p_v / q_v)       in nats, p the untouched model

Source: Braun et al., arXiv 2405.12241 (kl on the logits is their SAE_e2e); `--loss_fn ce|kl` of EleutherAI's sparsify.
Positions are those of `metrics.behaviour`: all but the last of a context where the model predicts the next token, all
where it predicts masked ones. So the last x_hat of a causal context has no gradient.

A reconstruction must fill whole contexts, so a batch is whole contexts: their rows are not mixed as `ActivationStream`
mixes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sparse_coding.activations.capture import default_contexts_per_forward, rows, splice, widths
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.sites import Site, resolve_all
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError, near

Loss = Literal["ce", "kl"]
Undo = Callable[[Tensor], Tensor]
"""x_hat [B d] as a dictionary makes it -> in the model's own units; differentiable."""
ErrorOf = Callable[[Float[Tensor, "... B d"]], Float[Tensor, "..."]]

LOGIT_BYTES = 1 << 30
"""float32 logits of one forward pass with gradients; the loss and its gradient take a few times as much."""


@dataclass
class _Batch:
    step: int
    chosen: Int[np.ndarray, " C"]  # which contexts
    tokens: Int[np.ndarray, "C S"]
    rows: dict[str, Tensor] | None = None  # [C*S d] of each site
    clean: list[Tensor] | None = None  # logits of the untouched model at the positions that count, one per forward pass


class EndToEndStream:
    """Batches of whole contexts, and the loss of the language model with reconstructions of them put in.

    Rows lie in the order of contexts and positions. Contexts come once per epoch, in an order drawn from (seed, epoch);
    epochs follow each other without a gap, and any step may be asked for. A context with padding is left out. The last
    step asked for is kept: its rows and, for kl, the logits of the untouched model.
    """

    def __init__(
        self,
        model: LanguageModel,
        contexts: Contexts,
        sites: Sequence[str | Site],
        *,
        loss: Loss,
        contexts_per_batch: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        contexts_per_forward: int | None = None,
        check_finite: bool = True,
    ) -> None:
        """dtype: of the rows served. contexts_per_forward: contexts the model reads at once; None by device and memory.

        check_finite: False serves NaN and infinity too, to a trainer that leaves such batches out.

        Raises UserError for a loss that the model has not, masked tokens, and less text than one batch.
        """
        self.model, self.contexts, self.loss, self.seed, self.dtype = model, contexts, loss, seed, dtype
        self.check_finite = check_finite
        self.sites = resolve_all(model, sites)
        n_contexts, self.context = contexts.tokens.shape
        self.contexts_per_batch, self.batch_size = contexts_per_batch, contexts_per_batch * self.context
        self._n_full = n_contexts - 1 if contexts.n_padding else n_contexts
        self._check()
        self.rows_per_epoch = self._n_full * self.context
        """Rows the text gives: the tokens of its full contexts."""
        self.contexts_per_forward = contexts_per_forward or min(
            default_contexts_per_forward(model, contexts),
            max(1, LOGIT_BYTES // (4 * model.vocab_size * self.context)),
        )
        self.widths: Mapping[str, int] = widths(model, list(self.sites.values()))
        """Width of the activations by site."""
        self.seconds_capturing, self.rows_captured = 0.0, 0
        """Time spent on capturing so far, and the rows it gave; `error` is not counted."""
        self._order: tuple[int, Int[np.ndarray, " n"]] | None = None  # of one epoch
        self._held: _Batch | None = None

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d"]]:
        """Batch number `step` of each site, on the model's device. UserError for NaN or infinity (check_finite)."""
        batch = self._at(step)
        if batch.rows is None:
            start = time.perf_counter()
            batch.rows = rows(
                self.model,
                self.contexts,
                batch.chosen,
                list(self.sites.values()),
                contexts_per_forward=self.contexts_per_forward,
            )
            if self.check_finite:
                for name, x in batch.rows.items():
                    self._refuse_not_finite(name, x, batch.chosen)
            self.seconds_capturing += time.perf_counter() - start
            self.rows_captured += self.batch_size
        return {name: x.to(self.dtype) for name, x in batch.rows.items()}

    def error(self, step: int, site: str, undo: Undo | None = None) -> ErrorOf:
        """x_hat [... B d] -> the loss [...] of the model with each x_hat in place of the activations of batch `step`.

        undo: what brings x_hat back to the model's own units; it sees one [B d] at a time, in float32, and its own
        tensors get no gradient. The model runs once per member, in its own dtype whatever autocast says, and the
        gradient is formed at once, so memory holds one member's graph, and of the others a gradient of the shape of
        x_hat. There is no second derivative. The loss is float32 (float64 where model or x_hat is).
        Raises UserError for a site the stream does not have.
        """
        if site not in self.sites:
            raise UserError(f"site {site!r} is not in the stream: it has {', '.join(self.sites)}")
        batch = self._at(step)
        n_positions = self.contexts_per_batch * (self.context - 1 if self.model.causal else self.context)

        def summed(x_hat: Tensor, learning: bool) -> tuple[Tensor, Tensor | None]:
            return self._summed(batch, self.sites[site], undo, x_hat, learning)

        def mean(x_hat: Float[Tensor, "... B d"]) -> Float[Tensor, "..."]:
            members = x_hat.reshape(-1, *x_hat.shape[-2:])
            learning = torch.is_grad_enabled() and x_hat.requires_grad
            sums: Tensor = _OneByOne.apply(members, summed, learning)  # type: ignore[assignment]
            return (sums / n_positions).reshape(x_hat.shape[:-2])

        return mean

    def _summed(
        self, batch: _Batch, site: Site, undo: Undo | None, x_hat: Float[Tensor, "B d"], learning: bool
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "B d"] | None]:
        """The sum of the loss over positions and its gradient.

        The sum, not the mean: divided by thousands of positions, gradients would vanish in a float16 model.
        """
        with torch.set_grad_enabled(learning):
            given = _at_least_float32(x_hat.detach()).requires_grad_(learning)
            raw = given if undo is None else undo(given)
        put_in = raw.detach().to(self.model.device, self.model.dtype).unflatten(0, batch.tokens.shape)
        losses, gradients = [], []
        for index, part in enumerate(self._parts()):
            piece = put_in[part].requires_grad_(learning)
            logits = splice(self.model, batch.tokens[part], site, lambda _, piece=piece: piece, with_gradient=learning)
            with torch.set_grad_enabled(learning):
                loss = self._loss(batch, index, part, self._judged(logits))
            losses.append(loss.detach())
            if learning:
                gradients += torch.autograd.grad(loss, piece)
        total = torch.stack(losses).sum()
        if not learning:
            return total, None
        return total, torch.autograd.grad(raw, given, torch.cat(gradients).flatten(0, 1).to(raw))[0]

    def _loss(
        self, batch: _Batch, index: int, part: slice, logits: Float[Tensor, "c positions V"]
    ) -> Float[Tensor, ""]:
        """Summed over the contexts of one forward pass."""
        logits = _at_least_float32(logits)
        if self.loss == "ce":
            targets = torch.from_numpy(batch.tokens[part, 1:]).to(logits.device)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        log_p = _at_least_float32(self._clean(batch)[index]).log_softmax(-1)
        p = log_p.exp()
        # 0 log 0 = 0: models put -inf on tokens they exclude.
        return (p * (log_p - logits.log_softmax(-1))).masked_fill(p == 0, 0.0).sum()

    def _clean(self, batch: _Batch) -> list[Tensor]:
        if batch.clean is None:
            site = next(iter(self.sites.values()))
            batch.clean = [self._judged(splice(self.model, batch.tokens[part], site, None)) for part in self._parts()]
        return batch.clean

    def _judged(self, logits: Float[Tensor, "c S V"]) -> Float[Tensor, "c positions V"]:
        return logits[:, :-1] if self.model.causal else logits

    def _parts(self) -> Iterator[slice]:
        """The contexts of a batch as they go through the model together."""
        for start in range(0, self.contexts_per_batch, self.contexts_per_forward):
            yield slice(start, min(start + self.contexts_per_forward, self.contexts_per_batch))

    def _at(self, step: int) -> _Batch:
        if self._held is None or self._held.step != step:
            assert step >= 0
            self._held = None  # its memory goes first
            places = np.arange(step * self.contexts_per_batch, (step + 1) * self.contexts_per_batch)
            epochs, within = np.divmod(places, self._n_full)
            chosen = np.concatenate([self._order_of(int(e))[within[epochs == e]] for e in np.unique(epochs)])
            self._held = _Batch(step, chosen, self.contexts.tokens[chosen].astype(np.int64))
        return self._held

    def _order_of(self, epoch: int) -> Int[np.ndarray, " n"]:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self.seed % 2**64, epoch]).permutation(self._n_full)
        return self._order[1]

    def _check(self) -> None:
        model, mask = self.model, self.contexts.mask
        if self.loss not in get_args(Loss):
            raise UserError(
                f"loss {self.loss!r}: allowed are {', '.join(get_args(Loss))}{near(self.loss, get_args(Loss))}"
            )
        if model.kind is None:
            raise UserError(
                f"model {model.name!r} has no trained head that predicts tokens, so no dictionary can be trained end "
                "to end through it: choose another model, or train on the squared error"
            )
        if self.loss == "ce" and not model.causal:
            raise UserError(f"model {model.name!r} predicts masked tokens, not the next one: use kl instead of ce")
        if mask is not None and not mask[: self._n_full].all():
            raise UserError(
                "the text masks special tokens (exclude_special): end to end a reconstruction takes the place of whole "
                "contexts; leave exclude_special off"
            )
        if model.causal and self.context < 2:
            raise UserError("contexts of 1 token have no next one to predict: set a longer context")
        if self.contexts_per_batch < 1:
            raise UserError(f"contexts_per_batch is {self.contexts_per_batch}: it must be at least 1")
        if self._n_full < self.contexts_per_batch:
            raise UserError(
                f"the text gives {self._n_full} full contexts of {self.context} tokens, fewer than one batch of "
                f"{self.contexts_per_batch}: give more text, a shorter context or a smaller batch"
            )

    def _refuse_not_finite(self, name: str, x: Float[Tensor, "B d"], chosen: Int[np.ndarray, " C"]) -> None:
        bad = (~torch.isfinite(x).all(1)).nonzero().flatten()
        if not len(bad):
            return
        which, position = divmod(int(bad[0]), self.context)
        dtype = str(self.model.dtype).removeprefix("torch.")
        advice = "use another model or site" if dtype == "float32" else f"{dtype} may overflow, so load it in float32"
        raise UserError(
            f"the activations at {name} hold NaN or infinity in {len(bad)} of {len(x)} rows, first in context "
            f"{int(chosen[which])} at position {position}: {advice}, or leave such batches out with --nan skip"
        )


class _OneByOne(torch.autograd.Function):
    """The sums of members [M], computed with their gradients one after another: only the gradients [M B d] are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_hat: Float[Tensor, "M B d"],
        summed: Callable[[Tensor, bool], tuple[Tensor, Tensor | None]],
        learning: bool,
    ) -> Float[Tensor, " M"]:
        sums, gradients = [], torch.empty_like(x_hat) if learning else None
        with torch.autocast(x_hat.device.type, enabled=False):
            for index, one in enumerate(x_hat):
                total, gradient = summed(one, learning)
                sums.append(total.to(x_hat.device))
                if gradients is not None and gradient is not None:
                    gradients[index] = gradient
        if gradients is not None:
            ctx.save_for_backward(gradients)
        return torch.stack(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " M"]) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return (gradients * grad[:, None, None]).to(gradients.dtype), None, None


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
