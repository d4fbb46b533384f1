"""The flags of a sweep: which members they stand for, and what they say to nonsense."""

from __future__ import annotations

import pytest

from sparse_coding.config import parse
from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.errors import UserError
from sparse_coding.sweep_flags import SweepFlags


def members(*words, widths=None, **changes):
    return parse(SweepFlags, words, "run.py", "").members(widths or {"a": 64}, **changes)


def test_without_flags_it_is_the_relu_grid_of_old():
    found = members()
    assert len(found) == 3 * 5
    assert {member.settings.l1_coefficient for member in found} == {0.5, 1, 2, 4, 8}
    assert {member.settings.d_sae for member in found} == {64, 128, 256}


def test_all_means_every_architecture_at_its_default_grid():
    found = members("--architecture", "all", "--ratios", "2")
    assert {member.architecture for member in found} == set(ARCHITECTURES)
    assert len({member.name for member in found}) == len(found)
    for name, kind in ARCHITECTURES.items():
        (knob, values), *_ = kind.Settings.default_grid.items()
        assert {getattr(m.settings, knob) for m in found if m.architecture == name} == set(values)


def test_each_architecture_takes_the_flags_that_are_its_own():
    found = members("--architecture", "relu", "topk", "--l1", "3", "--k", "5", "7", "--ratios", "1", "--tied")
    assert [(m.architecture, m.settings.tied) for m in found] == [("relu", True), ("topk", True), ("topk", True)]
    assert found[0].settings.l1_coefficient == 3
    assert [m.settings.k for m in found[1:]] == [5, 7]
    assert all(isinstance(m.settings.k, int) for m in found[1:])


def test_any_setting_can_be_set_and_varied():
    words = ["selection=topk,abs", "multi_topk=true", "--k", "5", "--ratios", "1"]
    found = members("--architecture", "topk", "--set", *words)
    assert [m.settings.selection for m in found] == ["topk", "abs"]
    assert all(m.settings.multi_topk for m in found)
    assert [m.variant for m in found] == ["selection_topk", "selection_abs"]
    assert "selection_abs" in found[1].name


def test_a_setting_can_be_given_to_one_of_several():
    words = ["topk.decoder=free", "matryoshka.group_fractions=0.25/0.75", "k_aux=none"]
    found = members("--architecture", "topk", "matryoshka", "--k", "5", "--ratios", "1", "--set", *words)
    assert [m.settings.decoder for m in found] == ["free", "unit"]
    assert found[1].settings.group_fractions == (0.25, 0.75)


def test_numbers_that_differ_per_member_are_no_variants():
    found = members("--architecture", "jumprelu", "--l0", "1", "--ratios", "1", "--set", "bandwidth=0.01,0.1")
    assert [m.variant for m in found] == ["", ""]
    assert [m.settings.bandwidth for m in found] == [0.01, 0.1]
    assert "bandwidth_0.01" in found[0].name


def test_target_l0_alone_takes_one_weight():
    found = members("--architecture", "jumprelu", "--target-l0", "8", "16", "--ratios", "1")
    assert [(m.settings.l0_coefficient, m.settings.target_l0) for m in found] == [(1, 8), (1, 16)]


def test_reviving_dead_latents():
    def methods(*words):
        found = members("--architecture", "relu", "topk", "--ratios", "1", "--l1", "1", "--k", "4", *words)
        return [m.settings.dead_latents for m in found]

    assert methods() == ["none", "auxk"]
    assert methods("--dead-latents", "ghost") == ["ghost", "ghost"]
    assert methods("--dead-latents", "resample") == ["none", "none"]


def test_losses_and_starts_reach_the_settings():
    (found,) = members(
        "--l1", "1", "--ratios", "1", "--loss", "fvu", "--init", "data", "--b-dec-init", "geometric-median"
    )
    assert (found.settings.error, found.settings.init, found.settings.b_dec_init) == ("fvu", "data", "geometric-median")
    (found,) = members("--l1", "1", "--ratios", "1", "--loss", "kl")
    assert found.settings.error == "mse"  # the trainer puts the model's own in its place


def test_transcoders_and_crosscoders():
    found = members("--ratios", "1", "--l1", "1", widths={"a": 64, "b": 32}, targets={"a": "b"}, skip=True)
    assert [(m.site, m.target, m.settings.d_in, m.settings.d_out, m.settings.skip) for m in found] == [
        ("a", "b", 64, 32, True)
    ]
    (found,) = members("--ratios", "1", "--l1", "1", widths={"a+b": 96}, parts={"a+b": [64, 32]})
    assert found.settings.parts == (64, 32)
    everything = members("--architecture", "all", "--ratios", "1", widths={"a+b": 96}, parts={"a+b": [64, 32]})
    assert {m.architecture for m in everything} == set(ARCHITECTURES) - {"matching-pursuit"}  # all that can


def test_a_number_is_what_each_architecture_has_it_as():
    found = members("--architecture", "batchtopk", "topk", "--k", "8", "--ratios", "1", "--set", "auxk_coefficient=1")
    assert [(m.architecture, type(m.settings.k)) for m in found] == [("batchtopk", float), ("topk", int)]
    assert all(type(m.settings.auxk_coefficient) is float for m in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--architecture", "topk", "--k", "100", "--ratios", "1"], "k is 100, but the dictionary has 64 latents"),
        (["--architecture", "matryoshka", "--set", "group_fractions=0.5/0.25"], r"sum to 0\.75.*must sum to 1"),
        (["--k", "32"], "relu takes no setting 'k': it belongs to topk, batchtopk, matryoshka, matching-pursuit"),
        (["--architecture", "topk", "batchtopk", "--l1", "1"], "topk and batchtopk take no setting 'l1_coefficient'"),
        (["--architecture", "topk", "--target-l0", "8"], "it belongs to jumprelu"),
        (["--architecture", "matching-pursuit", "--tied"], "matching-pursuit takes no setting 'tied'"),
        (["--architecture", "matching-pursuit", "--dead-latents", "auxk"], "matching-pursuit takes no setting"),
        (["--architecture", "topk", "--l1-scaling", "mean"], "it belongs to relu"),
        (["--set", "bandwith=1"], "none has it; did you mean 'bandwidth'"),
        (["--set", "topk.k=1"], "'topk' is not among the architectures of this run"),
        (["--set", "tied"], "NAME=VALUE"),
        (["--set", "d_sae=5"], "--ratios"),
        (["--set", "decoder=fre"], "did you mean 'free'"),
        (["--set", "k_aux=5"], "dead_latents auxk"),
        (["--architecture", "matryoshka", "--set", "n_prefixes=3"], "not read where prefixes is 'fixed'"),
        (["--architecture", "topk", "--k", "2.5", "--ratios", "1"], "k is 2.5"),
        (["--architecture", "relo"], "did you mean 'relu'"),
        (["--l1", "1", "1"], "twice"),
        (["--dead-latents", "sometimes"], "sometimes"),
        (["--architecture", "matching-pursuit", "--normalise", "whiten"], "cannot take --normalise whiten"),
    ],
)
def test_nonsense_is_one_clear_line(words, message):
    with pytest.raises(UserError, match=message) as caught:
        members(*words)
    assert "\n" not in str(caught.value)


def test_a_transcoder_of_an_architecture_without_one_is_refused():
    with pytest.raises(UserError, match="matching-pursuit cannot be a transcoder"):
        members("--architecture", "matching-pursuit", "--k", "2", widths={"a": 64, "b": 32}, targets={"a": "b"})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--l1", "2", "--set", "l1_coefficient=1"], "set by --l1 and by --set l1_coefficient=1"),
        (["--architecture", "topk", "--k", "2", "--set", "topk.k=3"], "k of topk is set by --k and by"),
        (["--loss", "l2", "--set", "error=fvu"], "error of relu is set by --loss and by"),
        (["--dead-latents", "auxk", "--set", "dead_latents=none"], "set by --dead-latents and by"),
        (["--architecture", "topk", "topk"], "names topk twice"),
        (["--architecture", "all", "relu"], "all stands alone"),
        (["--ratios", "nan"], "a ratio is nan"),
        (["--l1", "1.00000001", "1"], "agree to six digits"),
        (["--architecture", "relu", "topk", "--init", "zero"], "relu: init zero starts with atoms of norm 0"),
        (["--k", "3"], "--k: relu takes no setting 'k'"),
        (["--set", "k_aux=1.5", "--dead-latents", "auxk"], "k_aux is 1.5: it must be a whole number or none"),
        (["--architecture", "topk", "--k", "0"], "k is 0: it must be at least 1"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(words, message):
    with pytest.raises(UserError, match=message):
        members(*words)


def test_names_of_many_sites_fit_a_file_system():
    sites = {f"blocks.{layer}.hook_resid_post": 8 for layer in range(24)}
    name = "+".join(sites)
    first, second = (
        members("--l1", "1", "--ratios", "1", widths={joined: 8 * 24}, parts={joined: [8] * 24})[0].name
        for joined in (name, name.replace("blocks.3.", "blocks.33."))
    )
    assert max(len(first), len(second)) < 200
    assert first != second
