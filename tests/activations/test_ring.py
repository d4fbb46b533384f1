from __future__ import annotations

from itertools import pairwise
from unittest import mock

import pytest
import torch

from sparse_coding.activations import ring
from sparse_coding.activations.ring import RingStream
from tests.activations.test_stream import BATCH, SITES, TEXTS, build, contexts_of, stream_of

STEPS = 40


@pytest.fixture(scope="module")
def model():
    return build()


def ring_of(model, contexts, **changes):
    given = {"batch_size": BATCH, "buffer_rows": 36, "seed": 3, "contexts_per_forward": 2, "n_batches": STEPS}
    return RingStream(model, contexts, SITES, **{**given, **changes})


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name])


@pytest.mark.parametrize("contexts", TEXTS)
@pytest.mark.parametrize("changes", [{}, {"shuffled": False}, {"buffer_rows": 10_000}, {"buffer_rows": 7}])
def test_batches_are_those_of_the_stream_bit_for_bit(model, contexts, changes):
    expected, found = stream_of(model, contexts, **changes), ring_of(model, contexts, **changes)
    for step in range(STEPS):  # several epochs, batches across blocks and across epochs
        assert_same(found.batch(step), expected.batch(step))


def test_any_batch_may_be_asked_for(model):
    contexts = TEXTS[3]
    expected, found = stream_of(model, contexts), ring_of(model, contexts)
    for step in (9, 3, 3, 30, 31, 0, 17, 18, 19, 2):
        assert_same(found.batch(step), expected.batch(step))


def test_rows_are_captured_a_few_at_a_time_and_none_for_nothing(model):
    contexts = contexts_of(n=48)
    with mock.patch.object(ring, "rows", wraps=ring.rows) as captured:
        found = ring_of(model, contexts, buffer_rows=12 * 12, n_batches=48 * 12 // BATCH)
        passes = [0]
        for step in range(48 * 12 // BATCH):
            found.batch(step)
            passes.append(captured.call_count)
    assert passes[-1] == 24  # 48 contexts, two a pass, each once
    launched = [after - before for before, after in pairwise(passes)]
    assert launched[0] == 7  # the first block, and the first pass of the next
    assert max(launched[1:]) <= 2


def test_only_what_is_waited_for_counts_as_time_capturing(model):
    found = ring_of(model, contexts_of(n=48), buffer_rows=12 * 12, n_batches=48 * 12 // BATCH)
    for step in range(48 * 12 // BATCH):
        found.batch(step)
    assert found.rows_captured == 12 * 12
    assert found.seconds_capturing > 0
