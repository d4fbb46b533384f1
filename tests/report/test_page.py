from __future__ import annotations

import json

import pytest

from sparse_coding.errors import UserError
from sparse_coding.report.latents import read_latents, spans, token_text
from sparse_coding.report.page import Cell, Page, Row, Section, Table, number_cell, render, visible, write_page

HOSTILE = "<script>alert(1)</script>\"'&"


def page(**changes):
    known = {"title": "t", "subtitle": "s", "facts": [], "summary": [], "warnings": [], "sections": []}
    return Page(**{**known, **changes})


def test_every_text_of_a_page_is_escaped():
    table = Table(HOSTILE, [(HOSTILE, HOSTILE)], [Row([Cell(HOSTILE, HOSTILE, HOSTILE, numeric=False)])], HOSTILE)
    section = Section(HOSTILE, HOSTILE, tables=[table], raw=HOSTILE)
    html = render(page(title=HOSTILE, subtitle=HOSTILE, facts=[(HOSTILE, HOSTILE)], summary=[HOSTILE],
                       warnings=[HOSTILE], sections=[section]))  # fmt: skip
    assert "alert(1)" in html
    assert "<script>alert" not in html
    assert "\"'&" not in html


def test_numbers_are_right_aligned_and_keep_their_unrounded_value():
    html = render(
        page(sections=[Section("s", tables=[Table("t", [("x", "")], [Row([number_cell(1 / 3)], best=True)])])])
    )
    assert '<tr class="best"><td class="n" data-key="0.3333333333333333" title="0.3333333333333333">0.333</td>' in html


def test_a_number_that_is_not_finite_is_a_blank_cell():
    assert number_cell(float("nan")) == Cell("", "", "no finite value")


def test_lone_surrogates_and_control_characters_do_not_break_a_page(tmp_path):
    written = write_page(page(title="a\ud800b"), tmp_path / "x.html").read_text(encoding="utf-8")
    assert "<title>a?b</title>" in written
    assert visible("a\u202eb\x00c\ud800") == "a�b�c�"


def test_silent_tokens_are_joined_and_active_ones_carry_strength_and_value():
    found = spans(["a", "b", "c", "d"], [0.0, 0.0, 1.0, 4.0], 4.0)
    assert found == [("ab", 0.0, ""), ("c", 0.25, "1"), ("d", 1.0, "4")]


def test_strength_stays_within_bounds_for_odd_numbers():
    found = spans(["a", "b", "c", "d"], [9.0, float("nan"), -1.0, 1e-9], 4.0)
    assert found == [("a", 1.0, "9"), ("bc", 0.0, ""), ("d", 0.02, "1e-9")]


@pytest.mark.parametrize(
    ("token", "shown"), [("\n", "↵"), ("\t", "⇥"), ("  ", "··"), (" the", " the"), ("a\nb", "a↵b"), ("\u202e", "�")]
)
def test_white_space_and_invisible_characters_are_made_visible(token, shown):
    assert token_text(token) == shown


def test_latents_of_one_or_several_members_are_read(tmp_path):
    latent = {
        "index": 3,
        "density": 0.0012,
        "max_activation": 2.0,
        "contexts": [{"tokens": ["x"], "activations": [2.0]}],
    }
    part = {"member": "m", "latents": [latent]}
    assert read_latents(tmp_path) == []
    for data in (part, [part, part]):
        (tmp_path / "latents.json").write_text(json.dumps(data))
        found = read_latents(tmp_path)
        assert len(found) == (2 if isinstance(data, list) else 1)
        member, (card,) = found[0]
        assert (member, card.index, card.density, card.maximum) == ("m", "3", "0.12%", "2")
        assert card.contexts == [[("x", 1.0, "2")]]


@pytest.mark.parametrize(
    "data",
    [{"latents": []}, {"member": "m"}, 3, {"member": "m", "latents": [{"index": 0, "contexts": [{"tokens": ["a"]}]}]},
     {"member": "m", "latents": [{"index": 0, "contexts": [{"tokens": ["a"], "activations": []}]}]}],
)  # fmt: skip
def test_latents_of_another_shape_are_refused(tmp_path, data):
    (tmp_path / "latents.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="not a list of latents"):
        read_latents(tmp_path)
