"""The loss curve of train-lm: what is drawn where, for short, long, broken and empty logs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sparse_coding.report.loss_curve import MOST_POINTS, loss_curve, write_loss_curve


def update(iteration, loss=3.0, lr=1e-3, grad_norm=0.5):
    facts = {"iteration": iteration, "tokens": iteration * 64, "seconds": 0.1 * iteration, "tokens_per_second": 640.0}
    return {**facts, "lr": lr, "loss": loss, "grad_norm": grad_norm}


def evaluation(iteration, train_loss=3.0, val_loss=3.1):
    return {"iteration": iteration, "tokens": iteration * 64, "train_loss": train_loss, "val_loss": val_loss}


def curves(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_label()[0] != "_"}


def words(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_every_line_of_a_short_log_is_drawn_at_its_update():
    losses = [5.0, 4.0, 3.5, 3.25]
    lines = [evaluation(0, 5.5, 5.6), *(update(i + 1, loss, lr=1e-3 * (i + 1)) for i, loss in enumerate(losses)),
             evaluation(4, 3.25, 3.75)]  # fmt: skip
    main, rates, norms = loss_curve(lines, {}, kept=4).axes
    assert curves(main) == {
        "updates": [[1, 5.0], [2, 4.0], [3, 3.5], [4, 3.25]],
        "training text": [[0, 5.5], [4, 3.25]],
        "held-out text": [[0, 5.6], [4, 3.75]],
        "kept: 4": [[4, 3.75]],
    }
    assert {rates.get_title(loc="left"), norms.get_title(loc="left")} == {"learning rate", "gradient norm"}
    by_name = {axes.get_title(loc="left"): axes.lines[0].get_ydata().tolist() for axes in (rates, norms)}
    assert by_name["learning rate"] == [1e-3 * (i + 1) for i in range(4)]
    assert by_name["gradient norm"] == [0.5] * 4
    assert main.get_xlim() == rates.get_xlim() == norms.get_xlim()


def test_the_lowest_axis_counts_updates_and_tokens():
    figure = loss_curve([evaluation(0), update(500), update(1000)], {})
    figure.canvas.draw()
    labelled = [axes for axes in figure.axes if any(tick.label1.get_visible() for tick in axes.xaxis.get_major_ticks())]
    (lowest,) = labelled
    assert lowest.get_position().y0 == min(axes.get_position().y0 for axes in figure.axes)
    assert "1,000\n64k" in [tick.get_text() for tick in lowest.get_xticklabels()]


def test_a_long_noisy_log_has_a_running_median_and_keeps_its_spikes():
    noise = np.random.default_rng(0).normal(0, 0.1, 30_000)
    lines = [update(i, 4.0 + noise[i]) for i in range(1, 30_000)]
    lines[12_345]["loss"] = 15.0
    drawn = curves(loss_curve(lines, {}).axes[0])
    assert len(drawn["updates"]) <= MOST_POINTS
    assert [12_346, 15.0] in drawn["updates"]
    median = np.array(drawn["running median"])
    assert median[:, 1].max() - median[20:, 1].min() < 0.5
    assert np.abs(median[50:, 1] - 4.0).max() < 0.03
    assert (median[0, 0], median[-1, 0]) == (1, 29_999)


def test_the_running_median_follows_the_first_fall():
    lines = [update(i, 10.0 / i**0.5) for i in range(1, 1001)]
    median = np.array(curves(loss_curve(lines, {}).axes[0])["running median"])
    expected = 10.0 / median[:, 0] ** 0.5
    assert np.abs(median[:, 1] / expected - 1).max() < 0.05


def test_baselines_are_lines_with_names_and_values_that_do_not_overlap():
    close = {"single tokens": 4.5, "pair counts": 4.5, "triple counts": 4.49, "nothing": float("inf"), "far": 7.0}
    figure = loss_curve([evaluation(0, 7.0, 7.0), update(10, 3.0)], close)
    levels = sorted(line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label()[0] == "_")
    assert levels == [4.49, 4.5, 4.5, 7.0]
    assert sorted(words(figure)) == ["far 7.00", "pair counts 4.50", "single tokens 4.50", "triple counts 4.49"]
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    # the box of an annotation has its leader in it; the words alone are what must stay apart
    heights = sorted(figure.axes[0].transAxes.transform(text.get_position())[1] for text in figure.axes[0].texts)
    size = figure.axes[0].texts[0].get_fontsize() * figure.dpi / 72
    assert all(above - below > size for below, above in itertools.pairwise(heights))
    assert max(box.x1 for box in boxes) < figure.bbox.x1
    assert max(heights) <= figure.axes[0].get_window_extent().y1


def test_a_spike_does_not_press_the_curve_to_the_floor_and_is_counted():
    lines = [evaluation(0, 10.0, 10.0), *(update(i, 4.0 - i / 100) for i in range(1, 100))]
    usual = loss_curve(lines, {"uniform": 10.8})
    assert usual.axes[0].get_ylim()[1] > 10.8
    assert words(usual) == ["uniform 10.80"]
    lines[3]["loss"], lines[50]["loss"], lines[50]["grad_norm"] = 15_000.0, 80.0, 900.0
    spiked = loss_curve(lines, {"uniform": 10.8})
    assert spiked.axes[0].get_ylim()[1] < 15
    assert "2 above, up to 15,000" in words(spiked)
    scales = {axes.get_title(loc="left"): axes.get_yscale() for axes in spiked.axes[1:]}
    assert scales == {"learning rate": "linear", "gradient norm": "log"}


def test_the_legend_fits_the_picture():
    lines = [line for i in range(1, 101) for line in (update(i * 10_000), evaluation(i * 10_000))]
    figure = loss_curve(lines, {}, kept=1_000_000)
    figure.canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 5
    assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
    assert box.y0 >= figure.axes[0].get_window_extent().y1


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [evaluation(0)],
        [update(1)],
        [update(1, loss=0.0, lr=0.0, grad_norm=0.0)],
        [update(1, loss=float("nan"), grad_norm=float("inf"))],
        [evaluation(0), update(1)],
        [{"iteration": 3}],
        [{**evaluation(0), "val_loss": None}],
    ],
    ids=["none", "evaluation", "update", "zeros", "not-finite", "both", "bare", "null"],
)
@pytest.mark.parametrize("baselines", [{}, {"pair counts": 4.6}])
def test_the_shortest_and_the_strangest_logs_are_drawn(tmp_path, lines, baselines):
    write_loss_curve(tmp_path / "loss_curve.png", lines, baselines, kept=0)
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["loss_curve.png"]


def test_the_picture_repeats_byte_for_byte_and_leaves_the_callers_style_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    lines = [evaluation(0), *(update(i) for i in range(1, 9))]
    for name in ("a", "b"):
        write_loss_curve(tmp_path / f"{name}.png", lines, {"$\\frac{$": 4.0}, kept=0)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert dict(matplotlib.rcParams) == before
