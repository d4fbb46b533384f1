from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from sparse_coding.errors import UserError
from sparse_coding.report.records import (
    by_ratio,
    grid_matrix,
    grid_spread,
    knob_name,
    labels,
    metric,
    read_run,
    short,
)


def record(l1, ratio, seed=0, **metrics):
    return {"name": f"{l1}-{ratio}-{seed}", "l1_coefficient": l1, "ratio": ratio, "seed": seed, "metrics": metrics}


def test_grid_matrix_has_ratios_as_rows_and_l1_as_columns_both_ascending():
    records = [
        record(0.1, 2.0, fvu=0.4),
        record(0.01, 2.0, fvu=0.3),
        record(0.01, 1.0, fvu=0.1),
        record(0.1, 1.0, fvu=0.2),
    ]
    l1, ratios, matrix = grid_matrix(records, "fvu")
    assert l1 == [0.01, 0.1]
    assert ratios == [1.0, 2.0]
    np.testing.assert_array_equal(matrix, [[0.1, 0.2], [0.3, 0.4]])


def test_grid_matrix_averages_seeds_and_leaves_missing_cells_nan():
    records = [
        record(0.01, 1.0, 0, fvu=0.1),
        record(0.01, 1.0, 1, fvu=0.3),
        record(0.01, 1.0, 2, fvu=None),
        record(0.1, 1.0, 0, fvu=math.inf),
        record(0.1, 2.0, 0, fvu=0.5),
    ]
    _, _, matrix = grid_matrix(records, "fvu")
    np.testing.assert_allclose(matrix, [[0.2, np.nan], [np.nan, 0.5]])
    np.testing.assert_allclose(grid_spread(records, "fvu"), [[math.sqrt(0.02), np.nan], [np.nan, np.nan]])


def test_l1_values_that_differ_only_by_rounding_share_a_column():
    l1, _, matrix = grid_matrix([record(0.1, 1.0, fvu=1.0), record(0.1 + 1e-12, 1.0, 1, fvu=3.0)], "fvu")
    assert l1 == [0.1]
    assert matrix.tolist() == [[2.0]]


def test_labels_tell_neighbours_apart():
    assert labels([0.010, 0.0178, 0.018]) == ["0.01", "0.0178", "0.018"]
    assert labels([1.0001, 1.0002]) == ["1.0001", "1.0002"]
    values = [10 ** (e / 4) for e in range(-8, 9)]
    assert len(set(labels(values))) == 17


@pytest.mark.parametrize(
    ("value", "text"), [(0.0178, "0.0178"), (1e-5, "1e-5"), (12345.0, "12,300"), (math.nan, "–"), (100.0, "100")]
)
def test_numbers_are_short(value, text):
    assert short(value) == text


def test_a_metric_that_is_null_nan_or_text_is_nan():
    for value in (None, math.nan, math.inf, "0.5", True):
        assert math.isnan(metric({"metrics": {"fvu": value}}, "fvu"))
    assert metric({"metrics": {"fvu": 0.5}}, "fvu") == 0.5


def test_members_without_l1_are_laid_out_by_k():
    records = [{"name": str(k), "ratio": 1.0, "settings": {"k": k}, "metrics": {"l0": k}} for k in (16, 4)]
    assert knob_name(records) == "k"
    assert grid_matrix(records, "l0")[0] == [4.0, 16.0]


def test_a_control_is_one_number_or_one_per_ratio():
    assert by_ratio(0.3, 4.0) == 0.3
    assert by_ratio({"0.125": 0.1, "4.0": 0.2}, 4.0) == 0.2
    assert math.isnan(by_ratio({"0.125": 0.1, "x": 1.0}, 4.0))


GOOD = json.dumps(record(0.1, 1.0, fvu=0.5)) + "\n"


def write(folder, results=GOOD, settings="{}", log=None):
    if results is not None:
        (folder / "results.jsonl").write_text(results)
    if settings is not None:
        (folder / "settings.json").write_text(settings)
    if log is not None:
        (folder / "log.jsonl").write_text(log)
    return folder


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"results": None}, "results.jsonl is missing"),
        ({"results": ""}, "is empty"),
        ({"results": GOOD + "{broken"}, "line 2 is damaged"),
        ({"results": "[1]\n"}, "line 1 is damaged"),
        ({"results": '{"name": "a"}\n'}, "no 'metrics'"),
        ({"settings": None}, "settings.json is missing"),
        ({"settings": "{"}, "is damaged"),
        ({"settings": "[]"}, "must hold an object"),
        ({"log": '{"step": 1\n{"step": 2}\n'}, "line 1 is damaged"),
    ],
)
def test_missing_empty_and_damaged_files_are_mistakes_a_user_can_mend(tmp_path, files, words):
    with pytest.raises(UserError, match=words):
        read_run(write(tmp_path, **files))


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UserError, match="nowhere is not a run folder"):
        read_run(Path("nowhere"))


def test_a_log_cut_short_by_a_kill_is_read_up_to_the_cut(tmp_path):
    run = read_run(write(tmp_path, log='{"step": 1}\n{"step": 2, "lo'))
    assert [line["step"] for line in run.log] == [1]
