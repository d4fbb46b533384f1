"""Unigram and bigram baselines: what a language model has to beat before its insides are worth studying.

Both score the same positions: every held-out token but the first, each given the token before it. All counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Integer


@dataclass(frozen=True)
class Baselines:
    """Cross entropies on held-out text in nats per token."""

    unigram: float
    bigram: float
    bigram_weight: float  # share of the bigram estimate in the interpolation, chosen on the training text
    tokens: int  # scored positions


def baselines(train: Integer[np.ndarray, "N"], held_out: Integer[np.ndarray, "K"], vocab_size: int) -> Baselines:
    """Count on `train`, score `held_out`. Both hold token ids below `vocab_size`, at least two each.

    Unigram, add one:            p(b) = (c(b) + 1) / (N + V)
    Bigram, interpolated:    p(b | a) = w c(a, b) / c(a, .) + (1 - w) p(b),  and p(b) alone where `a` was never followed
    (Jelinek and Mercer 1980), with the one weight w of `bigram_weight`.
    """
    assert min(len(train), len(held_out)) >= 2, "two tokens are the least that makes a pair"
    counts = np.bincount(train, minlength=vocab_size)
    unigram = (counts + 1.0) / (len(train) + vocab_size)
    pairs, pair_counts = count_pairs(train, vocab_size)
    first_counts = np.bincount(train[:-1], minlength=vocab_size)  # c(a, .): the last token is followed by nothing
    weight = bigram_weight(pairs, pair_counts, counts, first_counts)

    asked = _pairs(held_out, vocab_size)
    where = np.minimum(np.searchsorted(pairs, asked), len(pairs) - 1)
    seen = np.where(pairs[where] == asked, pair_counts[where], 0)
    followed = first_counts[held_out[:-1]]
    p_unigram = unigram[held_out[1:]]
    p_bigram = np.where(followed > 0, weight * seen / np.maximum(followed, 1) + (1 - weight) * p_unigram, p_unigram)
    return Baselines(
        unigram=float(-np.log(p_unigram).mean()),
        bigram=float(-np.log(p_bigram).mean()),
        bigram_weight=weight,
        tokens=len(asked),
    )


def count_pairs(
    tokens: Integer[np.ndarray, "N"], vocab_size: int, chunk: int = 1 << 24
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"]]:
    """The distinct neighbours a * V + b, sorted, and how often each occurs; memory grows with P and `chunk`, not N."""
    pairs = times = np.zeros(0, np.int64)
    for start in range(0, len(tokens) - 1, chunk):
        new, counts = np.unique(_pairs(tokens[start : start + chunk + 1], vocab_size), return_counts=True)
        merged, place = np.unique(np.concatenate([pairs, new]), return_inverse=True)
        total = np.zeros(len(merged), np.int64)
        np.add.at(total, place, np.concatenate([times, counts]))
        pairs, times = merged, total
    return pairs, times


def bigram_weight(
    pairs: Int[np.ndarray, "P"],
    pair_counts: Int[np.ndarray, "P"],
    counts: Int[np.ndarray, "V"],
    first_counts: Int[np.ndarray, "V"],
) -> float:
    """The weight in [0, 1] that best predicts each training token from all the others (leave one out).

    `pairs` are a * V + b. With the scored pair taken out of the counts, token b after a has
        p(b | a) = w (c(a, b) - 1) / (c(a, .) - 1) + (1 - w) c(b) / (N + V - 1),
    so a pair seen once speaks for the unigram: without this, w would be 1. The log likelihood is concave in w, its
    maximum is found by bisection of its derivative. Pairs whose `a` occurs once do not depend on w and are left out.
    """
    vocab_size, total = len(counts), counts.sum()
    followed = first_counts[pairs // vocab_size]
    kept = followed > 1
    times = pair_counts[kept]
    bigram = (times - 1) / (followed[kept] - 1)
    unigram = counts[pairs[kept] % vocab_size] / (total + vocab_size - 1)

    def slope(weight: float) -> float:
        return float((times * (bigram - unigram) / (weight * bigram + (1 - weight) * unigram)).sum())

    if not kept.any() or slope(0.0) <= 0:
        return 0.0
    if (bigram > 0).all() and slope(1.0) >= 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def _pairs(tokens: Integer[np.ndarray, "N"], vocab_size: int) -> Int[np.ndarray, "N-1"]:
    """Neighbours a, b as the one number a * V + b (below 2^63 for any vocabulary)."""
    tokens = tokens.astype(np.int64)
    return tokens[:-1] * vocab_size + tokens[1:]
