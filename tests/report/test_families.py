"""What is one family, what it is called, and which knob it has."""

from __future__ import annotations

import math

import pytest

from sparse_coding.config import to_dict
from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.report.families import (
    KNOB_LABELS,
    KNOB_WORDS,
    LONGEST,
    by_site,
    families,
    file_words,
    knob_label,
    site_label,
)
from sparse_coding.report.records import KNOBS, grid_matrix, knob, knob_name
from tests.report.fake_architectures import KINDS, members
from tests.report.fake_runs import HOSTILE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_laid_out_by_its_own_knob(name):
    settings = ARCHITECTURES[name].Settings(d_in=128, d_sae=256)
    record = {"name": name, "settings": to_dict(settings), "metrics": {}}
    record |= {field: record["settings"][field] for field in settings.per_member}
    assert (knob_name([record]),) == settings.named
    assert knob(record) == getattr(settings, knob_name([record]))


def test_a_target_l0_is_the_knob_only_where_there_is_one():
    aimed = {"architecture": "jumprelu", "target_l0": 20.0, "l0_coefficient": 1.0}
    free = {"architecture": "jumprelu", "target_l0": 0.0, "l0_coefficient": 0.5}
    assert (knob_name([aimed]), knob(aimed)) == ("target_l0", 20.0)
    assert (knob_name([free]), knob(free)) == ("l0_coefficient", 0.5)
    assert list(families([aimed, free])) == ["target L0", "L0 coefficient"]


def test_every_knob_has_its_words():
    assert set(KNOBS) == set(KNOB_LABELS) == set(KNOB_WORDS)
    assert knob_label([{"k": 3}]) == "k (active latents allowed)"
    assert knob_label([{"settings": {"l0_coefficient": 3}}]) == "L0 coefficient"


def test_no_family_mixes_two_knobs_and_each_kind_is_one():
    found = families(members((1.0, 4.0), seeds=2))
    assert list(found) == [" ".join(word for word in kind if word) for kind in KINDS]
    for kind, records in zip(KINDS, found.values(), strict=True):
        name, values, _ = KINDS[kind]
        assert {knob_name([record]) for record in records} == {name}
        knobs, ratios, matrix = grid_matrix(records, "fvu")
        assert (knobs, ratios) == (sorted(values), [1.0, 4.0])
        assert len(records) == 2 * matrix.size
        assert not any(map(math.isnan, matrix.ravel()))


def test_one_family_has_no_name_and_old_records_are_one_family():
    old = [{"name": str(i), "architecture": "relu", "l1_coefficient": i, "lr": 1e-3, "metrics": {}} for i in (1, 2)]
    assert families(old) == {"": old}
    newer = {**old[0], "variant": "", "target": None}
    assert list(families([*old, newer])) == [""]


def test_other_numbers_part_families_and_are_named_where_they_do():
    base = {"architecture": "topk", "k": 8, "auxk_coefficient": 0.03125, "lr": 1e-3}
    assert list(families([base, {**base, "lr": 3e-4}])) == ["lr 0.001", "lr 0.0003"]
    assert list(families([base, {**base, "auxk_coefficient": 0.0}])) == ["aux 0.0312", "aux 0"]
    other = {**base, "architecture": "batchtopk", "lr": 3e-4}
    assert list(families([base, other])) == ["topk", "batchtopk"]
    assert list(families([base, other, {**other, "lr": 1e-4}])) == [
        "topk",
        "batchtopk, lr 0.0003",
        "batchtopk, lr 0.0001",
    ]
    close = [{**base, "lr": lr} for lr in (1e-3, 1.0001e-3)]
    assert len(families(close)) == 2


def test_names_are_short_safe_and_differ():
    long = [{"architecture": "topk", "variant": "x" * 60 + tail, "k": 8} for tail in "ab"]
    found = list(families([*long, {"architecture": "a\u202eb", "k": 1}]))
    assert len(set(found)) == 3
    assert len(found[0]) == LONGEST
    assert found[2] == "a�b"


def test_what_sets_families_apart_outlives_a_long_name():
    long = [{"architecture": "lp", "variant": "v" * 60, "l1_coefficient": 1, "lr": lr} for lr in (1e-3, 3e-4)]
    found = list(families([*long, {"architecture": "topk", "k": 8}]))
    assert [name[-12:] for name in found] == ["v…, lr 0.001", "…, lr 0.0003", "topk"]
    assert [len(name) for name in found[:2]] == [LONGEST, LONGEST]


def test_file_words_are_fit_for_files_and_differ():
    words = file_words(["topk", "topk, lr 0.1", "a/b", "a b", HOSTILE, "///"])
    assert len(set(words.values())) == 6
    assert all(word and "/" not in word and "<" not in word for word in words.values())


def test_transcoders_have_a_place_of_their_own():
    plain, moved = {"site": "a"}, {"site": "a", "target": "b"}
    assert [site_label(record) for record in (plain, {**plain, "target": ""}, moved)] == ["a", "a", "a -> b"]
    assert by_site([moved, plain, moved]) == {"a -> b": [moved, moved], "a": [plain]}
