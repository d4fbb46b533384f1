"""The counting baselines against counts done by hand and by a slow, plain loop."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from sparse_coding.language_models.ngrams import BLOCKS, baselines, best_weight, count_ngrams, ngrams, spread


def probability(train, vocab_size, weights, context, token):
    """The docstring's formulas for one token after at most two, by looking through the whole text."""
    if not context:
        return (list(train).count(token) + 1) / (len(train) + vocab_size)
    shorter = probability(train, vocab_size, weights, context[1:], token)
    after = [train[i + len(context)] for i in range(len(train) - len(context))
             if tuple(train[i : i + len(context)]) == tuple(context)]  # fmt: skip
    weight = weights[len(context) - 1]
    return weight * after.count(token) / len(after) + (1 - weight) * shorter if after else shorter


def by_loops(train, held_out, vocab_size, weights):
    """The cross entropies of the three estimates, one token at a time."""
    train, held_out = train.tolist(), held_out.tolist()
    losses = []
    for length in range(3):
        logs = [math.log(probability(train, vocab_size, weights, held_out[max(0, i - length) : i], held_out[i]))
                for i in range(1, len(held_out))]  # fmt: skip
        losses.append(-sum(logs) / len(logs))
    return losses


def leave_one_out(train, vocab_size, weights):
    """Log likelihood of each token under the counts of all others: its own n-grams are taken out and put back.

    weights: w2, and w3 if the trigram is to be judged. Only tokens whose context is followed elsewhere too.
    """
    order = len(weights) + 1
    runs = [tuple(train[i - n : i + 1]) for n in range(order) for i in range(n, len(train))]
    counts = Counter(runs)
    followed = Counter(run[:-1] for run in runs)  # of (): the number of tokens
    total = 0.0
    for i in range(order - 1, len(train)):
        own = [tuple(train[i - n : i + 1]) for n in range(order)]
        counts.subtract(own)
        followed.subtract(run[:-1] for run in own)
        if followed[own[-1][:-1]]:
            chance = (counts[own[0]] + 1) / (followed[()] + vocab_size)
            for run, weight in zip(own[1:], weights, strict=True):
                if followed[run[:-1]]:
                    chance = weight * counts[run] / followed[run[:-1]] + (1 - weight) * chance
            total += math.log(chance)
        counts.update(own)
        followed.update(run[:-1] for run in own)
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


def test_hand_counted_trigrams():
    # c = 7, 4 of N = 11, V = 2; 00 x4, 01 x2, 11 x2, 10 x2; 001, 011, 110, 100 x2, 000 x1; 00 is followed 3 times
    train, held_out = np.array([0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 0]), np.array([1, 0, 0, 1, 1])
    found = baselines(train, held_out, vocab_size=2)
    # one left out, the pairs say 3/5, 1/5, 1/3, 1/3 and single tokens 7/12, 4/12, 4/12, 7/12: pairs are worth nothing,
    # 4 (3/5 - 7/12) / (7/12) + 2 (1/5 - 4/12) / (4/12) + 0 + 2 (1/3 - 7/12) / (7/12) < 0
    assert found.bigram_weight == 0.0
    # (w/2 + (1-w)/3)^2 (w + (1-w)/3)^2 (w + 7/12 (1-w))^4 (1-w) is largest where the derivative of its log is zero
    w = found.trigram_weight
    assert 2 / (w + 2) + 2 / (w + 1 / 2) + 4 / (w + 7 / 5) == pytest.approx(1 / (1 - w), abs=1e-9)
    chances = [8 / 13, w * 2 / 2 + (1 - w) * 8 / 13, w * 2 / 3 + (1 - w) * 5 / 13, w * 2 / 2 + (1 - w) * 5 / 13]
    assert found.trigram == pytest.approx(-sum(map(math.log, chances)) / 4, abs=1e-12)
    assert (found.tokens, found.counted) == (4, 11)


def test_random_text_agrees_with_plain_loops_and_the_weights_are_the_best_of_a_fine_grid():
    generator = np.random.default_rng(0)
    train = np.abs(generator.integers(0, 6, 300).cumsum()) % 7  # neighbours depend on one another
    train[2::3] = (train[0:-2:3] + train[1:-1:3]) % 7  # and every third token on the two before it
    held_out = np.abs(generator.integers(0, 6, 80).cumsum()) % 8  # 7 occurs here only
    found = baselines(train, held_out, vocab_size=9)
    weights = (found.bigram_weight, found.trigram_weight)
    grid = np.linspace(0, 0.99, 100)
    text = train.tolist()
    two = grid[np.argmax([leave_one_out(text, 9, (weight,)) for weight in grid])]
    three = grid[np.argmax([leave_one_out(text, 9, (weights[0], weight)) for weight in grid])]
    assert weights == pytest.approx((two, three), abs=0.01)
    assert all(0.05 < weight < 0.95 for weight in weights)
    expected = by_loops(train, held_out, 9, weights)
    assert [found.unigram, found.bigram, found.trigram] == pytest.approx(expected, abs=1e-12)


def test_what_depends_on_two_tokens_is_predicted_by_three_only():
    generator = np.random.default_rng(3)
    coins = generator.random(6000) < 0.1
    text = [0, 1]
    for flip in coins:  # the exclusive or of the last two, one in ten wrong: each token alone says little
        text.append(text[-1] ^ text[-2] ^ int(flip))
    train, held_out = np.array(text[:5000]), np.array(text[5000:])
    found = baselines(train, held_out, vocab_size=2)
    noise = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    assert found.trigram == pytest.approx(noise, abs=0.04)
    assert found.trigram < found.bigram - 0.2
    assert found.trigram_weight > 0.95


def test_pairs_that_never_come_again_leave_the_trigram_with_the_bigram():
    train = np.array([0, 1, 2, 3, 0, 2, 1, 3, 1, 0, 3, 2, 0])
    found = baselines(train, np.array([0, 2, 3, 1, 0, 1, 2]), vocab_size=5)
    assert found.trigram_weight == 0.0
    assert found.trigram == found.bigram


@pytest.mark.parametrize("length", [2, 3])
def test_the_shortest_texts_have_all_three(length):
    found = baselines(np.arange(length), np.arange(length), vocab_size=4)
    assert found.tokens == length - 1
    assert found.unigram == found.bigram == found.trigram == pytest.approx(math.log((length + 4) / 2))


def test_a_chain_is_predicted_by_pairs_and_independent_tokens_are_not():
    generator = np.random.default_rng(1)
    chain = np.tile(np.arange(10), 100)
    found = baselines(chain, chain[:101], vocab_size=10)
    assert found.bigram_weight == 1.0
    assert found.bigram == pytest.approx(0.0, abs=1e-12)
    assert found.trigram == pytest.approx(0.0, abs=1e-12)
    assert found.unigram == pytest.approx(math.log(10), abs=1e-3)
    independent = generator.integers(0, 10, 20_000)
    found = baselines(independent, generator.integers(0, 10, 5_000), vocab_size=10)
    assert max(found.bigram_weight, found.trigram_weight) < 0.1
    assert max(found.bigram, found.trigram) < found.unigram + 0.01


def test_text_without_a_repeated_predecessor_leaves_the_pairs_out():
    assert baselines(np.array([0, 1, 2]), np.array([1, 2]), vocab_size=3).bigram_weight == 0.0


def test_the_probabilities_of_all_continuations_sum_to_one():
    train = np.array([0, 1, 2, 0, 2, 1, 0, 1, 1, 0, 1, 2, 0])
    for after in range(4):
        singles = [baselines(train, np.array([after, b]), vocab_size=4).bigram for b in range(4)]
        assert sum(math.exp(-loss) for loss in singles) == pytest.approx(1.0, abs=1e-12)
        for b, loss in enumerate(singles):  # of [after, b, c], the mean of what b and c cost
            both = [baselines(train, np.array([after, b, c]), vocab_size=4).trigram * 2 for c in range(4)]
            assert sum(math.exp(loss - total) for total in both) == pytest.approx(1.0, abs=1e-12)


def test_a_large_vocabulary_does_not_overflow():
    train = np.array([50256, 50255, 50256, 50255, 50256], dtype=np.uint16)
    found = baselines(train, train, vocab_size=50257)
    assert found.bigram < found.unigram
    largest = 1 << 21
    assert ngrams(np.array([largest - 1] * 3), largest, 3).tolist() == [2**63 - 1]
    with pytest.raises(AssertionError, match="64 bits"):
        ngrams(np.array([0, 0, 0]), largest + 1, 3)


def test_the_weight_needs_only_counts():
    assert best_weight(np.array([5, 5]), np.array([5, 5]), np.array([0.5, 0.4])) == 1.0
    assert best_weight(np.array([1, 1]), np.array([1, 1]), np.array([0.5, 0.4])) == 0.0


@pytest.mark.parametrize("order", [1, 2, 3])
def test_counting_in_chunks_and_texts_is_counting_in_a_dictionary(order):
    tokens = np.random.default_rng(2).integers(0, 12, 1000).astype(np.uint16)
    texts = [tokens[:400], tokens[400:402], tokens[402:]]
    expected = Counter(
        tuple(text[i : i + order].tolist()) for text in texts for i in range(len(text) - order + 1)
    )  # nothing crosses from one text to the next
    for chunk in (1, 7, 396, 398, 399, 400, 5000):
        found = count_ngrams(texts, 12, order, chunk)
        assert (np.diff(found.keys) > 0).all()
        digits = [tuple(key // 12**place % 12 for place in reversed(range(order))) for key in found.keys.tolist()]
        assert dict(zip(digits, found.times.tolist(), strict=True)) == expected
    contexts = found.contexts(12)
    followed = Counter(run[:-1] for run in expected.elements())
    assert contexts.times.sum() == sum(followed.values())
    for context, times in followed.items():
        key = sum(token * 12**place for place, token in enumerate(reversed(context)))
        assert contexts.of(np.array([key, 12**3])).tolist() == [times, 0]


def test_a_text_that_is_too_long_is_counted_in_blocks_from_its_first_token_to_its_last():
    text = np.arange(1000)
    assert [block.tolist() for block in spread(text, 1000)] == [text.tolist()]
    blocks = spread(text, 999)
    assert len(blocks) == BLOCKS
    assert {len(block) for block in blocks} == {999 // BLOCKS}
    assert (blocks[0][0], blocks[-1][-1]) == (0, 999)
    assert np.unique(np.concatenate(blocks)).size == sum(map(len, blocks))  # no token twice


def test_capped_baselines_say_what_they_counted_and_see_the_whole_text():
    generator = np.random.default_rng(4)
    half = generator.integers(0, 8, 20_000)
    train = np.concatenate([half, half + 8])  # another subject: the first tokens alone know nothing of it
    held_out = np.concatenate([half[:3000], half[:3000] + 8])
    whole, capped = baselines(train, held_out, 16), baselines(train, held_out, 16, most=4000, most_scored=1000)
    assert (whole.counted, whole.tokens) == (40_000, 5999)
    assert (capped.counted, capped.tokens) == (4000, 1000 - BLOCKS)
    for name in ("unigram", "bigram", "trigram"):
        assert getattr(capped, name) == pytest.approx(getattr(whole, name), abs=0.05)
    assert baselines(train, held_out, 16, most=40_000, most_scored=6000) == whole
