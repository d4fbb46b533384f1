from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from sparse_coding.report.canvas import canvas, page_svg, place, save
from sparse_coding.report.frontier import frontier
from sparse_coding.report.heatmaps import Grid, Scale, cell_text, edge_positions, heat_map
from sparse_coding.report.pictures import Curve, Panel, histograms


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.97, ".97"), (1.0, "1"), (-0.5, "-.50"), (0.0, "0"), (9.96, "10"), (5.25, "5.2"), (0.002, "2e-3"),
     (999.6, "1k"), (12_345, "12k"), (2_500_000, "2.5M"), (float("nan"), ""), (0.996, "1.0")],
)  # fmt: skip
def test_cells_hold_short_numbers(value, text):
    assert cell_text(value) == text


def test_the_predicted_edge_parts_the_cells_at_or_below_it_from_those_beyond():
    l1 = [0.1, 1.0, 10.0]
    assert edge_positions(l1, [0.01, 0.5, 1.0, 50.0], {"0.01": 0.04, "0.5": 1.0, "1.0": 4.0, "50": 200.0}) == [
        0,
        2,
        2,
        3,
    ]
    assert edge_positions(l1, [2.0], {"1.0": 4.0}) == [3]


def texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_a_heat_map_prints_every_value_and_leaves_nan_blank():
    grid = Grid([0.01, 0.018], [1.0, 2.0], np.array([[0.11, 0.22], [np.nan, 0.44]]))
    figure = heat_map("MMCS", grid, Scale("MMCS", 0, 1))
    assert sorted(texts(figure)) == [".11", ".22", ".44"]
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0.01", "0.018"]


def test_controls_stand_beside_the_map_per_ratio_and_marks_on_the_colour_bar():
    grid = Grid([0.01, 0.1], [1.0, 2.0], np.full((2, 2), 0.5))
    strip = {"chance": {"1.0": 0.21, "2.0": 0.22}, "pca": 0.31, "nothing": None}
    figure = heat_map("MMCS", grid, Scale("MMCS", 0, 1, marks={"ceiling": 1.0, "chance": (0.21, 0.22)}), strip)
    assert [tick.get_text() for tick in figure.axes[1].get_xticklabels()] == ["chance", "pca"]
    assert texts(figure).count(".31") == 2
    assert {".21", ".22", "ceiling"} <= set(texts(figure))


def test_an_exact_control_does_not_stretch_the_colours_of_the_map():
    grid = Grid([0.01, 0.1], [1.0], np.array([[1e-3, 1e-2]]))
    figure = heat_map("MSE", grid, Scale("MSE", log=True), strip={"identity": 1e-18})
    norm = figure.axes[0].collections[0].norm
    assert (norm.vmin, norm.vmax) == (1e-3, 1e-2)
    assert "~0" in texts(figure)
    ticks = figure.axes[-1].get_yticks()
    assert all(1e-3 / 1.01 < tick < 1e-2 * 1.01 for tick in ticks)


def test_the_staircase_is_drawn_only_where_it_crosses_the_map():
    grid = Grid([0.1, 1.0, 10.0], [1.0, 2.0], np.ones((2, 3)))
    assert len(heat_map("x", grid, Scale("x"), edge={"1.0": 0.5, "2.0": 5.0}).axes[0].lines) == 1
    assert not heat_map("x", grid, Scale("x"), edge=100.0).axes[0].lines


def test_an_all_blank_map_and_a_single_cell_can_be_drawn(tmp_path):
    for values, log in itertools.product((np.full((1, 1), np.nan), np.zeros((1, 1)), np.ones((1, 1))), (False, True)):
        save(heat_map("x", Grid([0.0], [1.0], values), Scale("x", log=log)), tmp_path / "x.png")


def test_frontier_labels_cover_neither_each_other_nor_a_point(tmp_path):
    x = list(np.geomspace(1, 100, 12))
    curves = [Curve(str(i), x, [(0.5 + 0.01 * i) / v**0.3 for v in x], [f"{v:.4g}" for v in x]) for i in range(4)]
    figure = frontier([Panel("t", curves)], "L0", "ratio")
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) >= 6
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = figure.axes[0].transData.transform(np.concatenate([line.get_xydata() for line in figure.axes[0].lines]))
    assert not any(box.contains(*point) for box in boxes for point in points)


def test_histograms_show_shares_of_one_per_panel():
    figure = histograms([("a", [0.95] * 3 + [0.1], {"chance": 0.2})], "cosine", "share")
    heights = figure.axes[0].patches[0].get_data().values
    assert heights.sum() == pytest.approx(1.0)
    assert heights.max() == 0.75


def test_pictures_repeat_byte_for_byte_and_follow_the_page_colours(tmp_path):
    svgs = []
    for name in ("a", "b"):
        grid = Grid([0.01, 0.1], [1.0], np.array([[0.2, 0.8]]))
        svgs.append(save(heat_map("t", grid, Scale("s")), tmp_path / name / "map.png"))
    assert svgs[0] == svgs[1]
    assert (tmp_path / "a" / "map.png").read_bytes() == (tmp_path / "b" / "map.png").read_bytes()
    assert "var(--ink)" in svgs[0]
    assert "#1b2430" not in svgs[0]
    assert "http" not in svgs[0]


def test_ids_of_two_pictures_on_a_page_do_not_meet(tmp_path):
    grid = Grid([0.01], [1.0], np.array([[0.2]]))
    first, second = (save(heat_map("t", grid, Scale("s")), tmp_path / f"{name}.png") for name in ("one", "two"))
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    used = set(re.findall(r'href="#([^"]+)"', first)) | set(re.findall(r"url\(#([^)]+)\)", first))
    assert used <= ids[0]


def test_text_in_pictures_is_escaped_and_never_read_as_mathematics(tmp_path):
    figure = heat_map("<script>alert(1)</script> $\\frac{$", Grid([0.01], [1.0], np.ones((1, 1))), Scale("s"))
    svg = save(figure, tmp_path / "x.png")
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg


def test_drawing_leaves_the_callers_matplotlib_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    save(heat_map("t", Grid([0.01], [1.0], np.ones((1, 1))), Scale("s")), tmp_path / "x.png")
    assert dict(matplotlib.rcParams) == before


def test_an_interrupted_picture_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    figure = canvas(1, 1)
    place(figure, 0, 0, 1, 1)
    with pytest.raises(OSError, match="full"):
        save(figure, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


def test_an_svg_loses_its_prolog_and_metadata():
    svg = '<?xml version="1.0"?><svg viewBox="0 0 9 8" xmlns="http://www.w3.org/2000/svg"><metadata>http://x</metadata><g/></svg>'
    assert page_svg(svg, "a") == '<svg viewBox="0 0 9 8" width="9pt" role="img"><g/></svg>'
