"""Unigram, bigram and trigram baselines: what a language model has to beat before its insides are worth studying.

All score the same positions: every held-out token but the first, given the one or two tokens before it. Counts are
exact; of a text too long to count, evenly spread blocks are counted, and `Baselines.counted` says how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

BLOCKS = 20
"""Blocks that stand for a text of more tokens than are to be counted."""


@dataclass(frozen=True)
class Baselines:
    """Cross entropies on held-out text in nats per token."""

    unigram: float
    bigram: float
    bigram_weight: float  # share of the bigram estimate in the interpolation, chosen on the training text
    trigram: float
    trigram_weight: float  # the same of the trigram estimate
    tokens: int  # scored positions
    counted: int  # training tokens


def baselines(
    train: Integer[np.ndarray, "N"],
    held_out: Integer[np.ndarray, "K"],
    vocab_size: int,
    most: int = 20_000_000,
    most_scored: int = 5_000_000,
) -> Baselines:
    """Count on at most `most` tokens of `train`, score at most `most_scored` of `held_out` (see `spread`).

    Both texts hold token ids below `vocab_size`, at least two each. With N tokens counted and V = `vocab_size`,

    Unigram, add one:            p(c) = (c(c) + 1) / (N + V)
    Bigram, interpolated:    p(c | b) = w2 c(b, c) / c(b, .) + (1 - w2) p(c)
    Trigram, interpolated: p(c | a b) = w3 c(a, b, c) / c(a, b, .) + (1 - w3) p(c | b)

    (Jelinek and Mercer 1980), each the shorter estimate alone where the tokens before were never followed or, for the
    second token of a text, are too few. The weights are chosen on the training text by leaving one out. A weight is 1,
    and a held-out surprise infinite, only after a text in which every such n-gram comes again.
    """
    assert min(len(train), len(held_out)) >= 2, "two tokens are the least that makes a pair"
    texts = spread(train, most)
    counted = sum(map(len, texts))
    single, pair, triple = (count_ngrams(texts, vocab_size, order) for order in (1, 2, 3))
    before, between = pair.contexts(vocab_size), triple.contexts(vocab_size)

    # Leaving one out: the token itself is taken out of all counts (out of N too, and add one puts one back).
    left = single.of(pair.keys % vocab_size) / (counted + vocab_size - 1)
    followed = before.of(pair.keys // vocab_size)
    bigram_weight = best_weight(pair.times, followed, left)
    tail = triple.keys % vocab_size**2
    left = single.of(tail % vocab_size) / (counted + vocab_size - 1)
    left = mixed(bigram_weight, pair.of(tail) - 1, before.of(tail // vocab_size) - 1, left)
    trigram_weight = best_weight(triple.times, between.of(triple.keys // vocab_size), left)

    estimates = []
    for text in spread(held_out, most_scored):
        pairs, triples = (ngrams(text, vocab_size, order) for order in (2, 3))
        one = (single.of(ngrams(text[1:], vocab_size, 1)) + 1.0) / (counted + vocab_size)
        two = mixed(bigram_weight, pair.of(pairs), before.of(pairs // vocab_size), one)
        three = mixed(trigram_weight, triple.of(triples), between.of(triples // vocab_size), two[1:])
        estimates.append((one, two, np.concatenate([two[:1], three])))
    losses = [float(-np.log(np.concatenate(p)).mean()) for p in zip(*estimates, strict=True)]
    scored = sum(len(one) for one, _, _ in estimates)
    return Baselines(losses[0], losses[1], bigram_weight, losses[2], trigram_weight, scored, counted)


def spread(text: Integer[np.ndarray, "N"], most: int) -> list[Integer[np.ndarray, "B"]]:
    """The whole text if it has at most `most` tokens; else `BLOCKS` pieces of it, from its first token to its last."""
    if len(text) <= most:
        return [text]
    assert most >= 2 * BLOCKS, f"most = {most}: a block of less than two tokens has no pair"
    size = most // BLOCKS
    return [text[start : start + size] for start in (i * (len(text) - size) // (BLOCKS - 1) for i in range(BLOCKS))]


@dataclass(frozen=True)
class Counts:
    """How often each n-gram occurs that does; tokens a, b, c are the key (a V + b) V + c, keys are sorted."""

    keys: Int[np.ndarray, "P"]
    times: Int[np.ndarray, "P"]

    def of(self, keys: Int[np.ndarray, "K"]) -> Int[np.ndarray, "K"]:
        """How often these occur, 0 where never."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        place = np.argsort(keys)  # in order, neighbouring searches end near one another: several times as quick
        asked = keys[place]
        where = np.minimum(np.searchsorted(self.keys, asked), len(self.keys) - 1)
        found = np.empty(len(keys), np.int64)
        found[place] = np.where(self.keys[where] == asked, self.times[where], 0)
        return found

    def contexts(self, vocab_size: int) -> Counts:
        """The n-grams without their last token: how often each is followed by one."""
        return _added(self.keys // vocab_size, self.times)


def count_ngrams(
    texts: Sequence[Integer[np.ndarray, "N"]], vocab_size: int, order: int, chunk: int = 1 << 22
) -> Counts:
    """The n-grams of `order` tokens inside each text; memory grows with what is distinct and `chunk`, not with N."""
    found = Counts(np.zeros(0, np.int64), np.zeros(0, np.int64))
    for text in texts:
        for start in range(0, len(text) - order + 1, chunk):
            keys, times = np.unique(
                ngrams(text[start : start + chunk + order - 1], vocab_size, order), return_counts=True
            )
            keys, times = np.concatenate([found.keys, keys]), np.concatenate([found.times, times])
            place = np.argsort(keys, kind="stable")  # linear: it merges two sorted runs
            found = _added(keys[place], times[place])
    return found


def ngrams(tokens: Integer[np.ndarray, "N"], vocab_size: int, order: int) -> Int[np.ndarray, "N-order+1"]:
    """Each run of `order` neighbours as one number, in the order of the text; none if the text is shorter."""
    assert vocab_size**order <= 2**63, "keys are 64 bits"
    tokens = tokens.astype(np.int64)
    keys = tokens[: max(0, len(tokens) - order + 1)]
    for place in range(1, order):
        keys = keys * vocab_size + tokens[place : place + len(keys)]
    return keys


def mixed(
    weight: float, seen: Int[np.ndarray, "K"], followed: Int[np.ndarray, "K"], lower: Float[np.ndarray, "K"]
) -> Float[np.ndarray, "K"]:
    """w seen / followed + (1 - w) lower, and `lower` alone where nothing ever followed."""
    return np.where(followed > 0, weight * seen / np.maximum(followed, 1) + (1 - weight) * lower, lower)


def best_weight(times: Int[np.ndarray, "P"], followed: Int[np.ndarray, "P"], lower: Float[np.ndarray, "P"]) -> float:
    """The weight in [0, 1] that best predicts each training token from all the others (leave one out).

    For each distinct n-gram: how often it occurs, how often what stands before its last token is followed, and the
    shorter estimate of that last token, one occurrence of it left out. With the scored occurrence left out,
        p = w (times - 1) / (followed - 1) + (1 - w) lower,
    so an n-gram seen once speaks for the shorter estimate: without this, w would be 1. The log likelihood is concave in
    w, its maximum is found by bisection of its derivative. Where `followed` is 1, w plays no part: these are left out.
    """
    kept = followed > 1
    times, lower = times[kept], lower[kept]
    upper = (times - 1) / (followed[kept] - 1)

    def slope(weight: float) -> float:
        return float((times * (upper - lower) / (weight * upper + (1 - weight) * lower)).sum())

    if not kept.any() or slope(0.0) <= 0:
        return 0.0
    if (upper > 0).all() and slope(1.0) >= 0:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    return low


def _added(keys: Int[np.ndarray, "P"], times: Int[np.ndarray, "P"]) -> Counts:
    """Sorted keys, each once, with its times added up."""
    first: Bool[np.ndarray, "P"] = np.ones(len(keys), bool)
    first[1:] = keys[1:] != keys[:-1]
    at = np.flatnonzero(first)
    return Counts(keys[at], np.add.reduceat(times, at) if len(at) else times)
