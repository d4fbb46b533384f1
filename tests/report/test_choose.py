from __future__ import annotations

import pytest

from sparse_coding.errors import UserError
from sparse_coding.report.choose import best_member, best_members, pareto


def member(name, l0, fvu, dead=0.0, site="a"):
    return {"name": name, "site": site, "metrics": {"l0": l0, "fvu": fvu, "dead_fraction": dead}}


FRONTIER = [member("sparse", 1, 0.45), member("knee", 10, 0.12), member("dense", 100, 0.10)]


def test_the_best_member_is_the_knee_of_the_frontier():
    assert best_member(FRONTIER) == "knee"


def test_the_knee_is_found_in_log_l0_by_hand():
    # scaled (log L0, FVU): a (0, 1), b (1/3, .4) sum .733, c (2/3, .1) sum .767, d (1, 0)
    records = [member("a", 1, 0.4), member("b", 10, 0.22), member("c", 100, 0.13), member("d", 1000, 0.1)]
    assert best_member(records) == "b"


def test_members_beaten_in_both_are_not_on_the_frontier():
    beaten = member("beaten", 20, 0.2)
    assert [record["name"] for record in pareto([*FRONTIER, beaten])] == ["sparse", "knee", "dense"]


def test_a_mostly_dead_member_is_not_chosen_while_another_lives():
    assert best_member([*FRONTIER, member("dead", 8, 0.11, dead=0.5)]) == "knee"
    assert best_member([*FRONTIER, member("alive", 8, 0.11, dead=0.49)]) == "alive"
    assert best_member([member("dead", 8, 0.11, dead=0.9)]) == "dead"


def test_a_collapsed_member_does_not_stretch_the_frontier():
    assert best_member([*FRONTIER, member("collapsed", 0.001, 0.99)]) == "knee"


def test_two_ends_alone_give_the_lower_fvu():
    assert best_member([FRONTIER[0], FRONTIER[2]]) == "dense"


def test_members_without_finite_numbers_are_passed_over_and_none_at_all_is_an_error():
    broken = [member("nan", 5, float("nan")), member("none", None, 0.1), member("zero", 0, 0.1)]
    assert best_member([*broken, *FRONTIER]) == "knee"
    with pytest.raises(UserError, match="none of the 3 members"):
        best_member(broken)


def test_each_site_has_its_own_best_member():
    other = [member("x", 5, 0.3, site="b"), member("y", 5, None, site="c")]
    assert best_members([*FRONTIER, *other]) == {"a": "knee", "b": "x"}
