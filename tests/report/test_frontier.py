"""Trade-off pictures: who has which look, what is written where, what is refused."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparse_coding.errors import UserError
from sparse_coding.report.canvas import CATEGORIES, CATEGORY_MARKERS
from sparse_coding.report.families import families
from sparse_coding.report.frontier import frontier, looks
from sparse_coding.report.pictures import Curve, Panel
from sparse_coding.report.trade_off import architecture_frontier, measures, shown_ratios, trade_off, trade_off_figure
from tests.report.fake_architectures import KINDS, members


def curve(family, size="1", **more):
    return Curve(f"{size} ({family})", [1, 2], [1, 2], size=size, family=family, **more)


def written(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def legends(figure):
    return [
        (legend.get_title().get_text(), [text.get_text() for text in legend.get_texts()]) for legend in figure.legends
    ]


def test_one_family_is_coloured_by_size_in_order():
    lines = frontier([Panel("t", [curve("", s) for s in ("1", "2", "10")])], "L0", "ratio").axes[0].lines
    assert [line.get_linestyle() for line in lines] == ["-"] * 3
    assert len({line.get_color() for line in lines}) == 3
    assert legends(frontier([Panel("t", [curve("", "1"), curve("", "2")])], "L0", "ratio")) == [("ratio", ["1", "2"])]


def test_several_families_are_told_apart_by_colour_and_marker_and_sizes_by_dashes():
    curves = [curve(f, s) for f in "ab" for s in ("2", "10")]
    figure = frontier([Panel("t", curves)], "L0", "ratio")
    small_a, large_a, small_b, large_b = figure.axes[0].lines
    assert small_a.get_color() == large_a.get_color() != small_b.get_color() == large_b.get_color()
    assert large_a.get_marker() != large_b.get_marker()
    assert (small_a.get_linestyle(), large_a.get_linestyle()) == ("--", "-")
    assert small_a.get_linewidth() < large_a.get_linewidth()
    assert legends(figure) == [("architecture", ["a", "b"]), ("ratio", ["10", "2"])]


def test_twenty_families_have_twenty_looks():
    known = looks([Panel("t", [curve(str(i)) for i in range(20)])])
    assert len({(look.colour, look.marker, look.filled) for look in known.values()}) == 20
    assert len({(look.colour, look.filled) for look in known.values()}) == 20


def test_a_look_is_the_same_in_every_panel():
    panels = [Panel("x", [curve("a"), curve("b")]), Panel("y", [curve("b")])]
    first, second = frontier(panels, "L0", "ratio").axes
    assert first.lines[1].get_color() == second.lines[0].get_color() != first.lines[0].get_color()


SIGHTS = {
    "ordinary": np.eye(3),
    "red-blind": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green-blind": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}
"""Machado, Oliveira, Fernandes (2009), severity 1, on linear RGB."""


def lab(colour, sight):
    srgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(sight) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    scaled = xyz / [0.9505, 1, 1.089]
    f = np.where(scaled > 0.008856, np.cbrt(scaled), 7.787 * scaled + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("sight", SIGHTS)
def test_any_two_family_colours_differ_to_every_eye(sight):
    seen = [lab(colour, SIGHTS[sight]) for colour in CATEGORIES]
    nearest = min(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(seen, 2))
    assert nearest > 15
    assert len(CATEGORIES) == len(set(CATEGORY_MARKERS)) == 10


def overlapping(figure):
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    return [(a, b) for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)], boxes


@pytest.mark.parametrize("count", [2, 12, 27])
def test_legends_stay_inside_the_picture_and_off_the_axes(count):
    curves = [curve(f"an-architecture-of-a-long-name {i:02d}", s) for i in range(count) for s in "124"]
    figure = frontier([Panel("t", curves, edges={"true L0": 1.5}), Panel("u", curves)], "L0", "ratio")
    touching, boxes = overlapping(figure)
    assert not touching
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height for box in boxes)


def test_points_carry_their_setting_in_one_family_alone():
    (fvu, *_) = measures(records := members())
    assert not any(len(line.labels) for line in trade_off(records, fvu).curves)
    alone = trade_off(members(kinds=[("topk", "")]), fvu)
    assert list(alone.curves[0].labels) == ["8", "16", "32", "64"]
    assert alone.title == "Reconstruction (points: k)"


def test_dictionaries_of_one_l0_stand_on_an_axis_that_can_be_read():
    """Rounding leaves a TopK of 32 latents at 31.9998: no axis of 32, 32, 32 for that."""
    panel = Panel("a", [Curve("lr 1", [31.9998], [0.1], family="lr 1"), Curve("lr 2", [32.0], [0.2], family="lr 2")])
    figure = frontier([panel], "L0", "size")
    figure.canvas.draw()
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    ticks = zip(axes.get_xticklabels(), axes.get_xticks(), strict=True)
    words = [text.get_text() for text, at in ticks if low < at < high]
    assert len(words) == len(set(words)) > 1


def test_seeds_are_averaged_and_no_curve_mixes_families():
    records = members((1.0, 4.0), seeds=2)
    panel = trade_off(records, measures(records)[0])
    assert len(panel.curves) == 2 * len(KINDS)
    for line, ((kind, _), size) in zip(panel.curves, itertools.product(KINDS, ("1", "4")), strict=True):
        assert line.family.startswith(kind)
        assert line.size == size
        own = [r["metrics"] for r in families(records)[line.family] if r["ratio"] == float(size)]
        assert sorted(line.x) == pytest.approx(
            sorted((a["l0"] + b["l0"]) / 2 for a, b in zip(own[::2], own[1::2], strict=True))
        )


def test_of_many_sizes_and_families_as_many_are_drawn_as_there_are_line_styles():
    ratios = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
    assert shown_ratios(members(ratios)) == [1.0, 4.0, 8.0, 32.0]
    assert shown_ratios(members(ratios, kinds=[("topk", "")])) == list(ratios)


def test_the_highlighted_family_is_coloured_and_labelled_and_the_others_are_grey():
    records = members((1.0, 4.0))
    figure, panels = trade_off_figure(records, highlight="gated")
    assert {line.family for line in panels[0].curves if not line.faded} == {"gated"}
    assert {line.size for line in panels[0].curves if line.faded} == {"4"}
    assert legends(figure)[0] == ("architecture", ["gated", "the others (ratio 4)"])
    assert {"0.5", "8"} <= set(written(figure))
    crowded = trade_off_figure(members(), highlight="batchtopk")[0].axes[0]
    assert {text.get_text() for text in crowded.texts} == {"8", "16", "32", "64"}  # grey lines do not keep them away
    both = trade_off_figure(records, highlight="topk")[1][0]
    assert {line.family for line in both.curves if not line.faded} == {"topk", "topk selection_abs"}
    one = trade_off_figure(records, highlight="topk selection_abs")[1][0]
    assert {line.family for line in one.curves if not line.faded} == {"topk selection_abs"}


def test_architecture_frontier_writes_a_picture_with_and_without_highlight(tmp_path):
    plain = architecture_frontier(members(), tmp_path / "deep" / "plain.png")
    bright = architecture_frontier(members(), tmp_path / "bright.png", highlight="lp")
    assert plain.read_bytes().startswith(b"\x89PNG")
    assert bright.read_bytes() != plain.read_bytes()


def test_toy_records_are_drawn_against_the_truth():
    records = members(toy=True)
    figure, panels = trade_off_figure(records, true_l0=16.0)
    assert [panel.title for panel in panels] == ["Reconstruction", "Match with the truth"]
    assert all(any(list(line.get_xdata()) == [16.0, 16.0] for line in axes.lines) for axes in figure.axes)
    assert legends(figure)[-1] == ("", ["true L0"])


def test_the_true_l0_of_toy_records_is_found_in_them(tmp_path):
    stated = architecture_frontier(members(toy=True), tmp_path / "a.png", true_l0=16.0).read_bytes()
    found = architecture_frontier(members(toy=True), tmp_path / "b.png").read_bytes()
    other = architecture_frontier(members(toy=True), tmp_path / "c.png", true_l0=30.0).read_bytes()
    assert stated == found != other


def test_a_collapsed_member_does_not_press_several_families_together():
    records = members(kinds=[("relu", ""), ("topk", "")])
    records[4]["metrics"] |= {"l0": 0.001, "fvu": 0.97}
    axes = trade_off_figure(records)[0].axes[0]
    assert axes.get_xlim()[0] == pytest.approx(8.0 / 1.15)
    assert axes.get_ylim()[1] < 0.5
    alone = trade_off_figure([one for one in records if one["architecture"] == "relu"])[0].axes[0]
    assert alone.get_xlim()[0] < 0.001


@pytest.mark.parametrize(
    ("records", "highlight", "words"),
    [
        (members(), "batchtop", "did you mean 'batchtopk'"),
        ([*members(), *members(target="out")], "", "give those of one site"),
        (
            [{"name": "a", "architecture": "topk", "k": 3, "ratio": 1.0, "metrics": {"fvu": None}}],
            "",
            "nothing to draw",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, records, highlight, words):
    with pytest.raises(UserError, match=words):
        architecture_frontier(records, tmp_path / "x.png", highlight)
    assert not list(tmp_path.iterdir())
