from __future__ import annotations

import pytest
import torch

from sparse_coding.dictionaries import ReLU
from sparse_coding.evaluation import next_larger, record, stability
from sparse_coding.metrics.reconstruction import evaluate_reconstruction
from sparse_coding.training.sweep import grid


def members(**changes):
    arguments = {"ratios": [1, 4, 2], "seeds": [0, 1], "varied": {"l1_coefficient": [0.1, 1.0]}}
    return grid("relu", {"synthetic": 8}, **{**arguments, **changes})


def test_the_next_larger_differs_in_size_alone():
    chosen = members()
    for member, larger in zip(chosen, next_larger(chosen), strict=True):
        if member.settings.d_sae == 32:
            assert larger is None
        else:
            other = chosen[larger]
            assert other.settings.d_sae == 2 * member.settings.d_sae
            assert other.settings.l1_coefficient == member.settings.l1_coefficient
            assert (other.seed, other.lr, other.site) == (member.seed, member.lr, member.site)


def test_sites_are_not_compared_with_one_another():
    both = grid("relu", {"a": 8, "b": 8}, [1]) + grid("relu", {"a": 8}, [2])
    assert next_larger(both) == [2, None, None]


def test_stability_is_one_for_a_dictionary_kept_whole_in_the_larger():
    small, large = members(ratios=[1, 2], seeds=[0], varied={"l1_coefficient": [0.1]})
    first = ReLU.single(small.settings, ReLU.initial(small.settings, torch.Generator().manual_seed(0)))
    second = ReLU.single(large.settings, ReLU.initial(large.settings, torch.Generator().manual_seed(1)))
    with torch.no_grad():
        second.W_dec[4:12] = first.W_dec
    values = stability([small, large], lambda index: (first, second)[index])
    assert values[0] == pytest.approx(1.0)
    assert values[1] is None


def test_a_record_holds_settings_and_unrounded_metrics(generator):
    member = members()[3]
    dictionary = ReLU.single(member.settings, ReLU.initial(member.settings, generator))
    x = torch.randn(50, 8, generator=generator)
    line = record(member, 1.0, evaluate_reconstruction(dictionary, [x]), {"extra": 0.1 + 0.2})
    assert line["name"] == member.name
    assert line["l1_coefficient"] == member.settings.l1_coefficient
    assert line["metrics"]["extra"] == 0.1 + 0.2
    assert line["metrics"]["l0"] == pytest.approx((dictionary.encode(x) > 0).sum().item() / 50)
    assert sum(line["density"]["counts"]) + line["density"]["never_fired"] == 8
