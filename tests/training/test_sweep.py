from __future__ import annotations

import json

import pytest

from sparse_coding.errors import UserError
from sparse_coding.training.sweep import Member, grid, split_into_stacks, stack_bytes


def small_grid(**changes):
    arguments = {
        "widths": {"synthetic": 8},
        "ratios": [1, 2],
        "lrs": [1e-3, 3e-3],
        "seeds": [0, 1],
        "varied": {"l1_coefficient": [0.1, 1]},
    }
    return grid("relu", **{**arguments, **changes})


def test_the_grid_holds_every_combination_once():
    members = small_grid()
    assert len(members) == 2 * 2 * 2 * 2
    assert len({member.name for member in members}) == 16
    combinations = {(m.settings.d_sae, m.settings.l1_coefficient, m.lr, m.seed) for m in members}
    assert len(combinations) == 16
    assert (16, 1, 3e-3, 1) in combinations


def test_members_that_differ_in_numbers_share_a_stack_and_sizes_do_not():
    members = small_grid()
    stacks = split_into_stacks(members, batch_size=4)
    assert sorted(index for stack in stacks for index in stack) == list(range(16))
    assert [{members[index].settings.d_sae for index in stack} for stack in stacks] == [{8}, {16}]


def test_what_changes_control_flow_splits_the_stack():
    members = small_grid(ratios=[1]) + small_grid(ratios=[1], tied=True)
    assert len(split_into_stacks(members, batch_size=4)) == 2


def test_a_stack_is_cut_to_a_size_in_memory():
    members = small_grid(ratios=[1])
    one = 8 * (40 * 8 + 8 * 4)  # bytes a member of 8 latents, width 8, batch 4 touches
    assert [len(stack) for stack in split_into_stacks(members, 4, 3 * one)] == [3, 3, 2]
    assert [len(stack) for stack in split_into_stacks(members, 4, 1)] == [1] * 8
    assert [len(stack) for stack in split_into_stacks(members, 4, stack_bytes("cuda:0"))] == [8]


def test_a_member_survives_json():
    member = small_grid(tied=True)[3]
    assert (
        Member.from_dict({k: v for k, v in json.loads(json.dumps(member.to_dict())).items() if k != "name"}) == member
    )


def test_names_of_members_tell_sites_apart_and_fit_file_names():
    members = small_grid(widths={"blocks.2.mlp.hook_post": 8, "transformer.h.2:in": 8})
    names = {member.name for member in members}
    assert len(names) == 32
    assert not any(set(name) & set("/: ") for name in names)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ratios": []}, "empty"),
        ({"varied": {"l1_coefficient": [0.1, 0.1]}}, "twice"),
        ({"varied": {"l1_coeficient": [0.1]}}, "did you mean 'l1_coefficient'"),
        ({"varied": {"l1_coefficient": [-1.0]}}, "L1 coefficient is -1.0"),
        ({"ratios": [1.0, 1.01]}, "two ratios give the same number"),
        ({"seeds": [0, 0]}, "seeds holds 0 twice"),
        ({"ratios": [0.01]}, "d_sae is 0"),
        ({"lrs": [0.0]}, "learning rate is 0.0"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        small_grid(**changes)
