"""The counting baselines against counts done by hand and by a slow, plain loop."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from sparse_coding.language_models.ngrams import baselines, bigram_weight, count_pairs


def by_loops(train, held_out, vocab_size, weight):
    """The docstring's formulas, one token at a time."""

    def unigram(b):
        return (list(train).count(b) + 1) / (len(train) + vocab_size)

    def bigram(a, b):
        pairs = list(itertools.pairwise(train))
        followed = sum(first == a for first, _ in pairs)
        return weight * pairs.count((a, b)) / followed + (1 - weight) * unigram(b) if followed else unigram(b)

    pairs = list(itertools.pairwise(held_out))
    one = -sum(math.log(unigram(b)) for _, b in pairs) / len(pairs)
    two = -sum(math.log(bigram(a, b)) for a, b in pairs) / len(pairs)
    return one, two


def leave_one_out(train, vocab_size, weight):
    """Log likelihood of every pair with a predecessor seen elsewhere, that pair taken out of the counts."""
    pairs = list(itertools.pairwise(train))
    total = 0.0
    for a, b in pairs:
        followed = sum(first == a for first, _ in pairs)
        if followed > 1:
            unigram = list(train).count(b) / (len(train) + vocab_size - 1)
            total += math.log(weight * (pairs.count((a, b)) - 1) / (followed - 1) + (1 - weight) * unigram)
    return total


def test_hand_counted_example():
    # train 0 1 0 1 0 2: c = 3, 2, 1 of N = 6, V = 4; pairs 01 x2, 10 x2, 02 x1; 0 is followed 3 times, 1 twice, 2 never
    train, held_out = np.array([0, 1, 0, 1, 0, 2]), np.array([3, 0, 1, 1, 2, 0])
    found = baselines(train, held_out, vocab_size=4)
    assert found.tokens == 5
    assert found.unigram == pytest.approx(-(math.log(4 / 10) * 2 + math.log(3 / 10) * 2 + math.log(2 / 10)) / 5)
    # leave one out: (.5 w + 2/9 (1-w))^2 (w + 3/9 (1-w))^2 (1/9 (1-w)) is largest at w; the derivative of its log is
    # 2 (5/18) / (2/9 + 5/18 w) + 2 (2/3) / (1/3 + 2/3 w) - 1 / (1 - w) = 0  <=>  2/(w + .8) + 2/(w + .5) = 1/(1 - w)
    # <=>  5 w^2 - .1 w - 2.2 = 0 after clearing denominators
    w = (0.1 + math.sqrt(0.01 + 44)) / 10
    assert found.bigram_weight == pytest.approx(w, abs=1e-12)
    after_3 = 4 / 10  # 3 was never seen: the unigram alone
    after_0 = w * 2 / 3 + (1 - w) * 3 / 10
    one_after_1, two_after_1 = (1 - w) * 3 / 10, (1 - w) * 2 / 10
    after_2 = 4 / 10  # 2 was never followed
    expected = -sum(math.log(p) for p in (after_3, after_0, one_after_1, two_after_1, after_2)) / 5
    assert found.bigram == pytest.approx(expected, abs=1e-12)


def test_random_text_agrees_with_plain_loops_and_the_weight_is_the_best_of_a_fine_grid():
    generator = np.random.default_rng(0)
    train = np.abs(generator.integers(0, 6, 300).cumsum()) % 7  # neighbours depend on one another
    held_out = np.abs(generator.integers(0, 6, 80).cumsum()) % 8  # 7 occurs here only
    found = baselines(train, held_out, vocab_size=9)
    grid = np.linspace(0, 0.99, 100)
    best = grid[np.argmax([leave_one_out(train, 9, weight) for weight in grid])]
    assert abs(found.bigram_weight - best) < 0.01
    assert 0.05 < found.bigram_weight < 0.999
    assert (found.unigram, found.bigram) == pytest.approx(by_loops(train, held_out, 9, found.bigram_weight), abs=1e-12)


def test_a_chain_is_predicted_by_pairs_and_independent_tokens_are_not():
    generator = np.random.default_rng(1)
    chain = np.tile(np.arange(10), 100)
    found = baselines(chain, chain[:101], vocab_size=10)
    assert found.bigram_weight == 1.0
    assert found.bigram == pytest.approx(0.0, abs=1e-12)
    assert found.unigram == pytest.approx(math.log(10), abs=1e-3)
    independent = generator.integers(0, 10, 20_000)
    found = baselines(independent, generator.integers(0, 10, 5_000), vocab_size=10)
    assert found.bigram_weight < 0.1
    assert abs(found.bigram - found.unigram) < 0.01


def test_text_without_a_repeated_predecessor_leaves_the_pairs_out():
    assert baselines(np.array([0, 1, 2]), np.array([1, 2]), vocab_size=3).bigram_weight == 0.0


def test_the_probabilities_of_all_continuations_sum_to_one():
    train = np.array([0, 1, 2, 0, 2, 1, 0, 1, 1, 0])
    for after in range(4):
        total = sum(math.exp(-baselines(train, np.array([after, b]), vocab_size=4).bigram) for b in range(4))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_a_large_vocabulary_does_not_overflow():
    train = np.array([50256, 50255, 50256, 50255, 50256], dtype=np.uint16)
    assert baselines(train, train, vocab_size=50257).bigram < baselines(train, train, vocab_size=50257).unigram


def test_the_weight_needs_only_counts():
    pairs, times = np.array([0 * 2 + 1, 1 * 2 + 0]), np.array([5, 5])
    assert bigram_weight(pairs, times, np.array([5, 6]), np.array([5, 5])) == 1.0


def test_pairs_counted_in_chunks_are_the_pairs_counted_at_once():
    tokens = np.random.default_rng(2).integers(0, 12, 1000).astype(np.uint16)
    pairs, times = count_pairs(tokens, 12)
    assert times.sum() == 999
    for chunk in (1, 7, 998, 999, 1000):
        again = count_pairs(tokens, 12, chunk)
        assert (again[0] == pairs).all()
        assert (again[1] == times).all()
    counted = {(a, b): 0 for a in range(12) for b in range(12)}
    for pair in itertools.pairwise(tokens.tolist()):
        counted[pair] += 1
    assert dict(zip(pairs.tolist(), times.tolist(), strict=True)) == {
        a * 12 + b: n for (a, b), n in counted.items() if n
    }
