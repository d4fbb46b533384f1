"""Values at equal L0, by hand."""

from __future__ import annotations

import math

import pytest

from sparse_coding.report.compare import (
    MOST_LEVELS,
    at_equal_l0,
    equal_l0_table,
    equal_l0_words,
    interpolate,
    pareto_points,
)
from sparse_coding.report.trade_off import measures
from tests.report.fake_architectures import members


def record(family, l0, fvu, ratio=1.0, seed=0, k=None, **more):
    return {"name": f"{family}-{l0}-{ratio}-{seed}", "architecture": family, "k": k or l0, "ratio": ratio, "seed": seed,
            "metrics": {"l0": l0, "fvu": fvu, **more}}  # fmt: skip


def test_between_two_points_the_value_is_linear_in_log_l0():
    points = [(4.0, 0.8), (16.0, 0.4), (64.0, 0.3)]
    assert interpolate(points, 8.0) == pytest.approx(0.6)
    assert interpolate(points, 32.0) == pytest.approx(0.35)
    assert interpolate(points, 16.0) == 0.4
    assert interpolate(points, 4 * 4**0.25) == pytest.approx(0.7)


def test_outside_the_points_there_is_no_value_but_for_a_hair():
    points = [(4.0, 0.8), (16.0, 0.4)]
    assert math.isnan(interpolate(points, 3.7))
    assert math.isnan(interpolate(points, 17.0))
    assert interpolate(points, 16.5) == pytest.approx(0.8 - 0.4 * math.log(16.5 / 4) / math.log(4))
    assert interpolate(points, 3.9) == pytest.approx(0.8 - 0.4 * math.log(3.9 / 4) / math.log(4))
    assert interpolate([(4.0, 0.8)], 4.0) == 0.8
    assert math.isnan(interpolate([(4.0, 0.8)], 4.1))
    assert math.isnan(interpolate([], 4.0))


def test_of_points_at_one_l0_the_first_counts():
    assert interpolate([(4.0, 0.5), (4.0, 0.9)], 4.0) == 0.5
    assert interpolate([(4.0, 0.5), (4.0, 0.9), (16.0, 0.1)], 8.0) == pytest.approx(0.5)
    assert math.isnan(interpolate([(4.0, 0.5), (4.0, 0.9)], 4.1))


def test_nothing_is_read_across_a_wide_gap():
    points = [(0.02, 0.9), (8.0, 0.4), (60.0, 0.2)]
    assert math.isnan(interpolate(points, 4.0))
    assert interpolate(points, 30.0) == pytest.approx(0.4 - 0.2 * math.log(30 / 8) / math.log(60 / 8))


def test_the_frontier_leaves_out_what_a_sparser_member_equals():
    points = [(8.0, 0.5), (16.0, 0.5), (4.0, 0.7), (32.0, 0.2), (4.0, 0.6), (40.0, 0.3)]
    assert pareto_points(points, lower_is_better=True) == [(4.0, 0.6), (8.0, 0.5), (32.0, 0.2)]
    rising = [(x, 1 - y) for x, y in points]
    assert [x for x, _ in pareto_points(rising, lower_is_better=False)] == [4.0, 8.0, 32.0]


FVU = measures([record("a", 4, 0.5)])[0]


def test_families_are_read_at_the_levels_two_of_them_reach():
    records = [record("a", 4, 0.8), record("a", 16, 0.4), record("b", 8, 0.5), record("b", 32, 0.3)]
    found = at_equal_l0(records, FVU)
    assert found.levels == [8.0, 16.0]
    assert found.values["a"] == pytest.approx([0.6, 0.4])
    assert found.values["b"] == pytest.approx([0.5, 0.4])
    assert [(level, name) for level, name, _ in found.winners()] == [(8.0, "b"), (16.0, "a")]
    assert equal_l0_words(found) == "The lowest FVU at equal L0: b (0.5 at 8); a (0.4 at 16)."


def test_one_family_or_two_that_never_meet_are_not_compared():
    assert at_equal_l0([record("a", 4, 0.8), record("a", 16, 0.4)], FVU) is None
    apart = [record("a", 4, 0.8), record("a", 7, 0.4), record("b", 20, 0.5), record("b", 30, 0.3)]
    assert at_equal_l0(apart, FVU) is None


def test_each_level_takes_the_best_size_and_seeds_are_averaged():
    records = [record("a", 8, 0.5, 1.0), record("a", 8, 0.3, 4.0), record("a", 32, 0.2, 1.0),
               record("a", 32, 0.25, 4.0), record("b", 8, 0.3, seed=0), record("b", 8, 0.5, seed=1),
               record("b", 32, 0.2)]  # fmt: skip
    found = at_equal_l0(records, FVU, (8.0, 32.0))
    assert found.values["a"] == [0.3, 0.2]
    assert found.sizes["a"] == [4.0, 1.0]
    assert found.values["b"] == pytest.approx([0.4, 0.2])


def test_where_higher_is_better_the_highest_wins_and_the_match_with_the_truth_may_fall():
    def at(family, l0, mmcs):
        return record(family, l0, 0.5, mmcs=mmcs, ce_recovered_zero=mmcs)

    records = [at("a", 4, 0.6), at("a", 16, 0.9), at("a", 64, 0.7), at("b", 4, 0.5), at("b", 16, 0.65),
               at("b", 64, 0.8)]  # fmt: skip
    recovered, mmcs = measures(records)[1:]
    assert (recovered.name, mmcs.name) == ("ce_recovered_zero", "mmcs")
    levels = (16.0, 32.0, 64.0)
    assert at_equal_l0(records, mmcs, levels).values["a"] == pytest.approx([0.9, 0.8, 0.7])
    assert [name for _, name, _ in at_equal_l0(records, mmcs, levels).winners()] == ["a", "a", "b"]
    assert at_equal_l0(records, recovered, levels).levels == [16.0]  # beyond its best a frontier ends
    assert "highest loss recovered" in equal_l0_words(at_equal_l0(records, recovered, levels))


def test_members_that_diverged_take_no_part():
    records = [record("a", 8, 0.5), record("a", 16, math.nan), record("a", 32, 0.3), record("b", 8, 0.6),
               record("b", 32, 0.4), record("c", 0, 0.1, k=4), record("c", 8, None)]  # fmt: skip
    found = at_equal_l0(records, FVU)
    assert list(found.values) == ["a", "b"]
    assert found.values["a"][1] == pytest.approx(0.4)


def test_of_many_levels_those_that_most_reach_stay_in_order():
    wide = [record(family, l0, 1 / l0) for family in "ab" for l0 in (1, 8, 64, 512, 4096)]
    narrow = [record("c", 100, 0.5), record("c", 600, 0.1)]
    found = at_equal_l0([*wide, *narrow], FVU)
    assert len(found.levels) == MOST_LEVELS
    assert found.levels == sorted(found.levels)
    assert {128.0, 256.0, 512.0} <= set(found.levels)


def test_the_table_marks_the_best_of_each_column_and_leaves_the_rest_blank():
    records = [record("a", 4, 0.8), record("a", 16, 0.4), record("b", 4, 0.7), record("b", 16, 0.5),
               record("c", 12, 0.4), record("c", 20, 0.1)]  # fmt: skip
    found = at_equal_l0(records, FVU)
    table = equal_l0_table(found)
    assert table.title == "FVU at equal L0"
    assert [name for name, _ in table.headers] == ["architecture", "L0 = 4", "L0 = 8", "L0 = 16"]
    cells = {row.cells[0].text: row.cells[1:] for row in table.rows}
    assert [[cell.best for cell in cells[name]] for name in "abc"] == [
        [False, False, False], [True, True, False], [False, False, True]]  # fmt: skip
    assert [cell.text for cell in cells["c"][:2]] == ["", ""]
    assert cells["b"][0].title == "0.7 at ratio 1"
    assert "0.7 at 4, which 2 of 3 reach" in equal_l0_words(found)


def test_the_better_architectures_win_the_fake_run():
    for measure in measures(records := members()):
        assert {name for _, name, _ in at_equal_l0(records, measure).winners()} == {"matching-pursuit"}
