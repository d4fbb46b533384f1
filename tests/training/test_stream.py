from __future__ import annotations

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.training.stream import NormalisedStream, TensorStream

ROWS = torch.arange(20.0).unsqueeze(1).repeat(1, 3) + 1


def test_every_row_comes_once_per_epoch_in_another_order_each_time():
    stream = TensorStream({"a": ROWS}, batch_size=5, seed=1)
    epochs = [[int(v) for step in range(4) for v in stream.batch(4 * e + step)["a"][:, 0]] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(1, 21))
    assert epochs[0] != epochs[1]


def test_a_batch_is_a_function_of_its_position_alone():
    in_order = TensorStream({"a": ROWS}, batch_size=5)
    batches = [in_order.batch(step)["a"] for step in range(10)]
    assert torch.equal(TensorStream({"a": ROWS}, batch_size=5).batch(7)["a"], batches[7])
    assert torch.equal(in_order.batch(2)["a"], batches[2])
    assert not torch.equal(TensorStream({"a": ROWS}, batch_size=5, seed=2).batch(2)["a"], batches[2])


def test_fewer_rows_than_one_batch_are_refused():
    with pytest.raises(UserError, match="20"):
        TensorStream({"a": ROWS}, batch_size=21)


def test_activations_that_are_all_zero_are_refused():
    with pytest.raises(UserError, match="all zero"):
        NormalisedStream(TensorStream({"a": torch.zeros(10, 3)}, batch_size=5), "mean-norm")


class Damaged(TensorStream):
    """Its first batches hold NaN."""

    def __init__(self, bad):
        super().__init__({"synthetic": torch.randn(640, 8, generator=torch.Generator().manual_seed(2))}, 32)
        self.bad = bad

    def batch(self, step):
        batch = super().batch(step)
        if step < self.bad:
            batch["synthetic"][3, 2] = float("nan")
        return batch


@pytest.mark.parametrize("kind", ["mean-norm", "whiten"])
def test_scales_are_measured_on_batches_that_are_numbers(kind):
    class Later(TensorStream):
        def batch(self, step):
            return super().batch(step + 3)

    whole = {"synthetic": torch.randn(640, 8, generator=torch.Generator().manual_seed(2))}
    expected = NormalisedStream(Later(whole, 32), kind).maps["synthetic"]
    got = NormalisedStream(Damaged(3), kind).maps["synthetic"]
    assert torch.equal(expected.factor, got.factor)
    assert torch.equal(expected.shift, got.shift)


def test_nothing_but_nan_is_said_and_not_taken_for_zero():
    with pytest.raises(UserError, match=r"synthetic hold NaN or infinity in batch after batch \(batches 1 to 20\)"):
        NormalisedStream(Damaged(10**9), "mean-norm")
    zero = TensorStream({"synthetic": torch.zeros(64, 8)}, 32)
    with pytest.raises(UserError, match="all zero"):
        NormalisedStream(zero, "mean-norm")
