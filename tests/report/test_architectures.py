"""Reports of sweeps that hold many architectures, transcoders and crosscoders."""

from __future__ import annotations

import re

import pytest

from sparse_coding.report import best_members, run_pictures, write_run_report, write_toy_report
from sparse_coding.report.choose import best_by_site
from sparse_coding.report.records import read_run
from sparse_coding.report.run_pictures import MOST_PANELS, RANKS, Site, densities
from sparse_coding.report.tables import member_table, site_table
from sparse_coding.report.training_pictures import MOST_FAMILIES, training
from tests.report.fake_architectures import KINDS, member, members, run_of
from tests.report.fake_runs import HOSTILE

FEW = [("relu", ""), ("topk", ""), ("topk", "selection_abs"), ("jumprelu", "penalty_tanh")]
OUT = "blocks.2.hook_mlp_out"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    records = [*members((1.0, 4.0), kinds=FEW), *members(kinds=FEW[:2], target=OUT)]
    return write_run_report(run_of(tmp_path_factory.mktemp("many"), records))


def names(page):
    return {path.name for path in (page.parent / "pictures").iterdir()}


def headers(table):
    return [name for name, _ in table.headers]


def test_every_family_has_its_maps_and_training_curves(page):
    own = {name.removeprefix("0-blocks.2.mlp.hook_post-") for name in names(page) if name.startswith("0-")}
    families = ("relu", "topk", "topk_selection_abs", "jumprelu_penalty_tanh")
    assert own == {"frontier.png", "densities.png",
                   *(f"{word}-{name}.png" for word in ("maps", "training") for name in families)}  # fmt: skip
    html = page.read_text(encoding="utf-8")
    for words in ("Training (topk selection_abs)", "Maps over sparsity and size (jumprelu penalty_tanh)",
                  "colours say the target L0", "colours say the k (active latents allowed)"):  # fmt: skip
        assert words in html


def test_transcoders_are_a_place_of_their_own(page):
    html = page.read_text(encoding="utf-8")
    assert f"Site blocks.2.mlp.hook_post -&gt; {OUT}" in html
    assert "at 2 sites: 3 architectures, 4 families, 2 sizes." in html


def test_the_summary_says_who_wins_at_equal_l0_and_tables_say_by_how_much(page):
    html = page.read_text(encoding="utf-8")
    assert re.search(r"The lowest FVU at equal L0: topk selection_abs \([\d.]+ at 8", html)
    assert html.count("<h3>FVU at equal L0</h3>") == html.count("<h3>Loss recovered at equal L0</h3>") == 2
    assert '<td class="n top"' in html


def test_one_architecture_is_not_compared_with_itself(tmp_path):
    html = write_run_report(run_of(tmp_path, members((1.0, 4.0), kinds=FEW[:1]))).read_text(encoding="utf-8")
    assert "at equal L0</h3>" not in html
    assert "5 sparsity settings, 2 sizes." in html


def test_hostile_words_of_new_facts_are_escaped(tmp_path):
    record = members(kinds=FEW[:2])
    record[-1] |= {"variant": HOSTILE}
    record += [{**one, "target": HOSTILE, "name": one["name"] + "t"} for one in members(kinds=FEW[:2])]
    record[-1]["metrics"]["fvu_by_site"] = {HOSTILE: 0.5}
    html = write_run_report(run_of(tmp_path, record)).read_text(encoding="utf-8")
    assert HOSTILE not in html
    assert "-&gt; &lt;script&gt;" in html


def test_the_table_has_a_column_for_each_thing_that_differs():
    records = [*members(kinds=FEW), member(("topk", ""), 8, target="out")]
    found = headers(member_table(records, (), "", ""))
    assert found[:8] == ["member", "site", "architecture", "variant", "L1", "k", "target L0", "ratio"]
    assert {"rel. bias", "KL rec. mean"} <= set(found)
    one = headers(member_table(members(kinds=FEW[:1]), (), "", ""))
    assert one[:3] == ["member", "L1 coefficient", "ratio"]


def test_a_knob_stands_in_its_own_column_alone():
    table = member_table(members(kinds=[("relu", ""), ("topk", "")]), (), "", "")
    l1, k = (headers(table).index(name) for name in ("L1", "k"))
    assert [(row.cells[l1].text, row.cells[k].text) for row in table.rows] == [
        ("0.5", ""), ("1", ""), ("2", ""), ("4", ""), ("8", ""), ("", "8"), ("", "16"), ("", "32"), ("", "64"),
    ]  # fmt: skip


def test_crosscoders_show_the_error_of_each_site():
    records = members(kinds=FEW[:1])
    assert site_table(records) is None
    records[0]["metrics"]["fvu_by_site"] = {"a": 0.25, "b": None}
    table = site_table(records)
    assert headers(table) == ["member", "a", "b"]
    assert [cell.text for cell in table.rows[0].cells[1:]] == ["0.25", ""]
    assert len(table.rows) == 1


def caught(monkeypatch, module, name):
    """Calls of a drawing function, passed through."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *a, **k: (calls.append((a, k)), function(*a, **k))[1])
    return calls


def test_densities_have_a_panel_per_family_ranked_by_l0(tmp_path, monkeypatch):
    calls = caught(monkeypatch, run_pictures, "overlays")
    run = read_run(run_of(tmp_path, members((1.0, 4.0), kinds=FEW)))
    densities(Site("s", run.records, run, tmp_path / "pictures"))
    panels = calls[0][0][0]
    assert [panel.title for panel in panels] == [
        "relu\nL1 0.5 to 8", "topk\nk 8 to 64", "topk selection_abs\nk 8 to 64",
        "jumprelu penalty_tanh\ntarget L0 10 to 80",
    ]  # fmt: skip
    for panel in panels:
        assert (panel.curves[0].name, panel.curves[-1].name) == (RANKS[0], RANKS[-1])
        first, last = (
            sum(e * c for e, c in zip(one.x, one.y, strict=False)) for one in (panel.curves[0], panel.curves[-1])
        )
        assert first < last  # the sparsest fires least


def many(count):
    return [{**one, "variant": f"v{i}", "name": f"{i}-{one['name']}"} for i in range(count)
            for one in members(kinds=[("topk", "")])]  # fmt: skip


def test_pictures_of_very_many_families_are_bounded_and_say_so(tmp_path, monkeypatch):
    calls = caught(monkeypatch, run_pictures, "overlays")
    run = read_run(run_of(tmp_path, many(MOST_PANELS + 2)))
    site = Site("s", run.records, run, tmp_path / "pictures")
    (picture,) = densities(site)
    assert len(calls[0][0][0]) == MOST_PANELS
    assert "2 more are not drawn." in picture.note
    pictures = training(site)
    assert len(pictures) == MOST_FAMILIES
    assert "2 more families" in pictures[-1].note
    assert not pictures[0].note


def test_the_best_member_of_a_site_is_that_of_its_first_target():
    plain, moved = members(kinds=FEW[:2]), members(kinds=FEW[1:3], target=OUT)
    best = best_by_site([*plain, *moved])
    site = plain[0]["site"]
    assert set(best) == {site, f"{site} -> {OUT}"}
    assert best_members([*plain, *moved]) == {site: best[site]}
    assert best_members([*moved, *plain]) == {site: best[f"{site} -> {OUT}"]}


def test_a_toy_study_compares_architectures_around_the_true_l0(tmp_path):
    page = write_toy_report(
        run_of(tmp_path, members((1.0,), toy=True, kinds=FEW), {"l0_true": 16.0, "collapse_l1": 2.0})
    )
    html = page.read_text(encoding="utf-8")
    assert {"frontier.png", "relu-mmcs.png", "topk_selection_abs-mmcs.png"} <= names(page)
    for words in (
        "L0 = 8",
        "L0 = 16",
        "L0 = 32",
        "MMCS at equal L0",
        "4 families, 1 size",
        "The highest MMCS at equal L0",
    ):
        assert words in html
    assert "predicted collapse" not in html  # theory of the L1 term of 2023, which none of these has


def test_old_runs_without_variant_and_target_read_the_same(tmp_path):
    records = members(kinds=FEW[:1])
    old = [{key: value for key, value in one.items() if key not in ("variant", "target")} for one in records]
    pages = [write_run_report(run_of(tmp_path / str(i), part)) for i, part in enumerate((records, old))]
    assert pages[0].read_bytes() == pages[1].read_bytes()
    assert len(KINDS) == 11
