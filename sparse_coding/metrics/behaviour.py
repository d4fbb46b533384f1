"""What a language model loses when the activations at a site are replaced by their reconstruction.

Nothing here knows a model: `run(tokens, fn)` returns the logits `[B S V]` of a model in which the activations `[B S d]`
at the site have passed through `fn` (None: the untouched model). With `sparse_coding.activations.capture` that is

    run = lambda tokens, fn, attention=None: splice(model, tokens, site, fn, attention)

A mask `[B S]` says which tokens are real (True) and which are padding, or special tokens no dictionary was trained on.
They are not judged and keep their activations. An attention mask, only where there is padding, is handed on to `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.dictionaries.base import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.metrics.reconstruction import ratio

Replace: TypeAlias = Callable[[Tensor], Tensor]
"""Activations `[... d_in]` of the model to what is put in their place, of the same shape."""
Run: TypeAlias = Callable[..., Tensor]
"""(tokens, Replace or None) -> logits; called with a third argument, the attention mask, for batches that have one."""
Batch: TypeAlias = Tensor | tuple[Tensor, Tensor | None] | tuple[Tensor, Tensor | None, Tensor | None]
"""tokens `[B S]`, (tokens, mask) or (tokens, mask, attention)."""
Kind = Literal["causal", "masked"]


def reconstruct_with(dictionary: Dictionary, scale: float = 1.0) -> Replace:
    """x -> dictionary(scale x) / scale, for activations of any leading shape, dtype and device.

    `scale` is what activations were multiplied by before the dictionary was trained on them.
    """

    def replace(x: Tensor) -> Tensor:
        atoms = dictionary.atoms
        rows = x.reshape(-1, x.shape[-1]).to(atoms.device, atoms.dtype)
        return (dictionary(rows * scale) / scale).reshape(x.shape).to(x)

    return replace


def judged_positions(
    tokens: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None, kind: Kind = "causal"
) -> Bool[Tensor, "B S"]:
    """The positions whose prediction counts: causal, t where tokens t and t + 1 are both real (so never the last of a
    row); masked, every real token."""
    if kind not in get_args(Kind):
        raise UserError(f"kind {kind!r} is not one of {', '.join(get_args(Kind))}: it says how the model predicts")
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    if real.shape != tokens.shape:
        raise UserError(f"the mask is {tuple(real.shape)}, the tokens {tuple(tokens.shape)}: give one value per token")
    if kind == "masked":
        return real
    judged = torch.zeros_like(real)
    judged[:, :-1] = real[:, :-1] & real[:, 1:]
    return judged


def next_token_losses(
    logits: Float[Tensor, "B S V"], tokens: Int[Tensor, "B S"], mask: Bool[Tensor, "B S"] | None = None
) -> tuple[float, int]:
    """(sum over the causal `judged_positions` of -log p(token t + 1 | tokens <= t) in nats, number of positions)."""
    judged = judged_positions(tokens, mask)
    parts = zip(_log_probabilities(logits, judged), _targets(tokens, judged), strict=True)
    return sum(_ce(log_p, target) for log_p, target in parts), int(judged.sum())


def kl_sum(
    clean: Float[Tensor, "B S V"], spliced: Float[Tensor, "B S V"], judged: Bool[Tensor, "B S"]
) -> tuple[float, int]:
    """(sum over judged positions of KL(clean || spliced) = sum_v p_v log(p_v / q_v) in nats, number of positions)."""
    parts = zip(_log_probabilities(clean, judged), _log_probabilities(spliced, judged), strict=True)
    return sum(_kl(log_p, log_q) for log_p, log_q in parts), int(judged.sum())


@torch.no_grad()
def behaviour(
    run: Run,
    batches: Iterable[Batch],
    reconstructions: Mapping[str, Replace],
    mean_activation: Float[Tensor, " d_in"],
    kind: Kind = "causal",
) -> dict[str, dict[str, float | None]]:
    """Cross-entropy and KL in nats per position with each reconstruction in place, and the share that is recovered:

        ce_recovered_zero = (CE_zero - CE_spliced) / (CE_zero - CE_clean)
        kl_recovered_zero = 1 - KL_spliced / KL_zero

    and the same against mean ablation. zero and mean put 0 or `mean_activation` (in the model's own units) at the site
    in every position; KL is KL(clean || changed). Nothing is clipped, and a ratio with nothing to recover is None.
    Sources: Bricken et al. (2023) for the CE share; the KL share as in SAELens and SAEBench.

    Clean, zero and mean run once per batch for all reconstructions; everything is averaged over the same
    `judged_positions`, and every change is made at the real tokens alone. kind="masked" is for models such as BERT that
    do not predict a next token: only KL has a meaning there, and every ce_ value is None.

    Returns per reconstruction: ce_clean, ce_spliced, ce_zero, ce_mean, kl_spliced, kl_zero, kl_mean, ce_recovered_zero,
    ce_recovered_mean, kl_recovered_zero, kl_recovered_mean. Raises UserError when no position can be judged.
    """
    changes: list[Replace] = [torch.zeros_like, lambda x: mean_activation.to(x).expand_as(x), *reconstructions.values()]
    clean_ce, count = 0.0, 0
    sums = [(0.0, 0.0)] * len(changes)  # (CE, KL)
    for batch in batches:
        tokens, mask, *attention = (batch, None) if isinstance(batch, Tensor) else batch
        given = [one for one in attention if one is not None]
        judged = judged_positions(tokens, mask, kind)
        if not judged.any():
            continue
        count += int(judged.sum())
        targets = _targets(tokens, judged) if kind == "causal" else [None] * len(tokens)
        clean = list(_log_probabilities(run(tokens, None, *given), judged))
        clean_ce += sum(_ce(log_p, target) for log_p, target in zip(clean, targets, strict=True))
        for i, change in enumerate(changes):
            changed = _log_probabilities(run(tokens, _at_real_tokens(change, mask), *given), judged)
            for log_p, log_q, target in zip(clean, changed, targets, strict=True):
                sums[i] = sums[i][0] + _ce(log_q, target), sums[i][1] + _kl(log_p, log_q)
    if not count:
        raise UserError("no position can be judged: give batches with rows of at least two real tokens")
    zero, mean, *spliced = [(ce / count, kl / count) for ce, kl in sums]
    return {
        name: _scores(clean_ce / count, zero, mean, one, causal=kind == "causal")
        for name, one in zip(reconstructions, spliced, strict=True)
    }


def _at_real_tokens(change: Replace, mask: Bool[Tensor, "B S"] | None) -> Replace:
    if mask is None:
        return change
    return lambda x: torch.where(mask.to(x.device, torch.bool)[..., None], change(x), x)


def _scores(
    clean: float, zero: tuple[float, float], mean: tuple[float, float], spliced: tuple[float, float], causal: bool
) -> dict[str, float | None]:
    """The results of one reconstruction from (CE, KL) per position."""
    scores: dict[str, float | None] = {"ce_clean": clean}
    for name, (ce, kl) in (("spliced", spliced), ("zero", zero), ("mean", mean)):
        scores |= {f"ce_{name}": ce, f"kl_{name}": kl}
    for name, (ce, kl) in (("zero", zero), ("mean", mean)):
        scores[f"ce_recovered_{name}"] = ratio(ce - spliced[0], ce - clean)
        scores[f"kl_recovered_{name}"] = ratio(kl - spliced[1], kl)
    # A diverged dictionary gives nan or inf, which JSON does not know; ratio(., 1) makes them None.
    finite = {name: None if value is None else ratio(value, 1.0) for name, value in scores.items()}
    return finite if causal else {name: None if name.startswith("ce_") else value for name, value in finite.items()}


def _log_probabilities(
    logits: Float[Tensor, "B S V"], judged: Bool[Tensor, "B S"]
) -> Iterator[Float[Tensor, "positions V"]]:
    """log p at the judged positions, one sequence at a time: a whole batch over a large vocabulary is gigabytes."""
    for row, chosen in zip(logits, judged.to(logits.device), strict=True):
        yield row[chosen].float().log_softmax(-1)


def _targets(tokens: Int[Tensor, "B S"], judged: Bool[Tensor, "B S"]) -> list[Int[Tensor, " positions"] | None]:
    """The next token at the judged positions of each row."""
    return [row[chosen] for row, chosen in zip(tokens.roll(-1, 1), judged, strict=True)]


def _ce(log_p: Float[Tensor, "positions V"], target: Int[Tensor, " positions"] | None) -> float:
    return 0.0 if target is None else -log_p.gather(1, target.to(log_p.device)[:, None]).sum().item()


def _kl(log_p: Float[Tensor, "positions V"], log_q: Float[Tensor, "positions V"]) -> float:
    p = log_p.exp()
    # 0 log 0 = 0: models put -inf on tokens they exclude.
    return (p * (log_p - log_q)).masked_fill_(p == 0, 0.0).sum().item()
