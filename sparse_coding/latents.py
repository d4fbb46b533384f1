"""Top contexts: for some latents of a dictionary, the places in held-out text where they are most active."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.dictionaries import Dictionary

LEAST_FIRINGS = 5
"""A latent that fired less often is not listed: its top contexts would be all it ever did."""
BEFORE, AFTER = 16, 8
"""Tokens shown around the most active one."""


def choose_latents(counts: Float[Tensor, " d_sae"], how_many: int) -> list[int]:
    """Latents spread evenly over the range of firing rates, rarest first, leaving out those that hardly fire."""
    ranked = [int(index) for index in counts.argsort() if counts[index] >= LEAST_FIRINGS]
    if len(ranked) <= how_many:
        return ranked
    return [ranked[round(i * (len(ranked) - 1) / max(how_many - 1, 1))] for i in range(how_many)]


@torch.no_grad()
def top_contexts(
    dictionary: Dictionary,
    activations: Float[Tensor, "N d_in"],
    places: Int[Tensor, "N 2"],
    words: list[list[str]],
    n_latents: int,
    n_contexts: int = 6,
    chunk: int = 4096,
) -> list[dict[str, Any]]:
    """Records for latents.json: index, density, largest activation, and the `n_contexts` most active contexts.

    `places[i]` is (context, position) of row `i`; `words[context]` are the context's tokens as text. A context counts
    once per latent, at its most active position.
    """
    pieces = activations.split(chunk)
    counts = sum((dictionary.encode(x) > 0).sum(0) for x in pieces)
    assert isinstance(counts, Tensor)
    chosen = choose_latents(counts.float().cpu(), n_latents)
    if not chosen:
        return []
    codes = torch.cat([dictionary.encode(x)[:, chosen].float().cpu() for x in pieces])
    return [
        {
            "index": latent,
            "density": int(counts[latent]) / len(activations),
            "max_activation": codes[:, column].max().item(),
            "contexts": _contexts(codes[:, column], places, words, n_contexts),
        }
        for column, latent in enumerate(chosen)
    ]


def _contexts(
    code: Float[Tensor, " N"], places: Int[Tensor, "N 2"], words: list[list[str]], how_many: int
) -> list[dict[str, Any]]:
    """The most active contexts of one latent, each cut to a window around its peak."""
    found: dict[int, int] = {}
    for row in code.argsort(descending=True).tolist():
        if code[row] <= 0 or len(found) == how_many:
            break
        found.setdefault(int(places[row, 0]), row)
    shown = []
    for context, row in found.items():
        peak = int(places[row, 1])
        first, last = max(0, peak - BEFORE), min(len(words[context]), peak + AFTER + 1)
        active = [0.0] * (last - first)
        near = ((places[:, 0] == context) & (places[:, 1] >= first) & (places[:, 1] < last)).nonzero().flatten()
        for index in near.tolist():
            active[int(places[index, 1]) - first] = code[index].item()
        shown.append({"tokens": words[context][first:last], "activations": active})
    return shown
