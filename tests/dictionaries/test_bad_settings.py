"""A setting that cannot be is refused by name, with what is allowed."""

from __future__ import annotations

import pytest

from sparse_coding.dictionaries import ARCHITECTURES, architecture, require_setting, settings_of
from sparse_coding.errors import UserError

LINEAR = [name for name in ARCHITECTURES if name != "matching-pursuit"]
NAN, INF = float("nan"), float("inf")

FOR_LINEAR = [
    ({"decoder": "units"}, r"decoder is 'units': allowed are unit, free"),
    ({"error": "mae"}, r"error is 'mae': allowed are mse, fvu, l2"),
    ({"init": "xavier"}, r"init is 'xavier': allowed are transpose, orthogonal, kaiming, data, zero, toy-2023"),
    ({"b_dec_init": "median"}, r"b_dec_init is 'median': allowed are zero, mean, geometric-median"),
    ({"dead_latents": "resample"}, r"dead_latents is 'resample': allowed are none, auxk, ghost"),
    ({"d_out": 0}, r"d_out is 0: it must be at least 1"),
    ({"d_out": 4, "tied": True}, r"tied weights .* d_out .* leave one of the two out"),
    ({"d_out": 4, "parts": (2, 2)}, r"parts of a crosscoder .* d_out .* leave one of the two out"),
    ({"skip": True}, r"skip connection .* needs d_out"),
    ({"parts": (1, 2)}, r"parts \(1, 2\) add up to 3, the width of the input is 4"),
    ({"tied": True, "init": "toy-2023"}, r"init toy-2023 .* tied weights cannot: use transpose"),
    ({"tied": True, "init": "kaiming"}, r"init kaiming .* tied weights cannot: use transpose"),
    ({"tied": True, "init": "zero", "decoder": "free"}, r"init zero .* tied weights cannot: use transpose"),
    ({"init": "zero", "decoder": "unit"}, r"init zero .* use decoder free"),
    ({"decoder_bias": False, "b_dec_init": "mean"}, r"b_dec_init mean needs a bias, but decoder_bias is off"),
    ({"auxk_coefficient": -0.1}, r"auxk coefficient is -0.1: it must be 0 or a positive number"),
    ({"auxk_coefficient": INF}, r"auxk coefficient is inf"),
    ({"init_norm": -1.0}, r"init_norm is -1.0: it must be a positive number"),
    ({"k_aux": 0}, r"k_aux is 0: it must be at least 1"),
]

L1 = [({"l1_coefficient": value}, r"L1 coefficient is .* 0 or a positive number") for value in (-0.1, NAN, INF)]
K = [
    ({"k": 0}, r"k is 0: it must be at least 1"),
    ({"k": 9}, r"k is 9, but the dictionary has 8 latents: k must lie between 1 and 8"),
]
OWN = [
    *[(name, *case) for name in ("relu", "relu-april", "lp", "gated") for case in L1],
    *[(name, *case) for name in ("topk", "batchtopk", "matryoshka", "matching-pursuit") for case in K],
    ("batchtopk", {"k": 0.5}, r"k is 0.5: it must be at least 1"),
    ("topk", {"k": NAN}, r"k is nan"),
    ("relu", {"l1_scaling": "sums"}, r"l1_scaling is 'sums': allowed are toy-2023, mean, sum"),
    ("lp", {"p": 1.5}, r"p falls from 1.5 to 0.2: they must lie in \(0, 1\]"),
    ("lp", {"p_end": 0.0}, r"p falls from 1.0 to 0.0"),
    ("lp", {"p": 0.2, "p_end": 0.5}, r"p falls from 0.2 to 0.5: .* p_end be the smaller"),
    ("lp", {"form": "root"}, r"form is 'root': allowed are sum, norm"),
    ("lp", {"smoothing": -1e-3}, r"smoothing is -0.001: it must be 0 or a positive number"),
    ("lp", {"anneal_steps": 0}, r"in 0 stages from 0.15 .* first must be at least 1"),
    ("lp", {"anneal_start": 1.0}, r"from 1.0 of the run .* below 1"),
    ("lp", {"anneal_start": -0.1}, r"from -0.1 of the run .* at least 0"),
    ("topk", {"selection": "top"}, r"selection is 'top': allowed are topk, abs, group"),
    ("matryoshka", {"prefixes": "none"}, r"prefixes is 'none': allowed are fixed, random"),
    (
        "matryoshka",
        {"group_fractions": (0.5, 0.25)},
        r"group fractions \(0.5/0.25\) sum to 0.75: .* such as 0.125/0.125",
    ),
    ("matryoshka", {"group_fractions": (0.01, 0.99)}, r"2 groups of 8 latents leave some group empty"),
    ("matryoshka", {"n_prefixes": 0}, r"n_prefixes is 0: it must be at least 1"),
    ("matryoshka", {"n_prefixes": 3}, r"n_prefixes is not read where prefixes is 'fixed'"),
    ("matryoshka", {"prefixes": "random"}, r"group_fractions is not read where prefixes is 'random'"),
    ("jumprelu", {"l0_coefficient": -1.0}, r"L0 coefficient is -1.0: it must be 0 or a positive number"),
    ("jumprelu", {"initial_threshold": -0.1}, r"initial threshold is -0.1: it must be 0 or a positive number"),
    ("jumprelu", {"bandwidth": INF}, r"bandwidth is inf: it must be a positive number"),
    ("matryoshka", {"group_fractions": (NAN, 1.0)}, r"must sum to 1"),
    ("matryoshka", {"prefix_exponent": NAN}, r"prefix_exponent is nan: it must be above -1"),
    ("relu", {"init_norm": 0.0}, r"init_norm is 0.0: it must be a positive number"),
    ("relu", {"init": "kaiming", "init_norm": 0.5}, r"init_norm is not read by init kaiming"),
    ("jumprelu", {"bandwidth": 0.0}, r"bandwidth is 0.0: it must be a positive number, such as 0.05"),
    ("jumprelu", {"bandwidth": NAN}, r"bandwidth is nan: it must be a positive number"),
    ("jumprelu", {"target_l0": 9.0}, r"target_l0 is 9.0: it must lie between 0 \(no target\) and d_sae = 8"),
    ("jumprelu", {"target_l0": -1.0}, r"target_l0 is -1.0: it must lie between 0"),
    ("jumprelu", {"penalty": "l1"}, r"penalty is 'l1': allowed are l0, tanh"),
    ("jumprelu", {"penalty": "tanh", "target_l0": 2.0}, r"target_l0 needs the penalty l0, not tanh"),
    ("matching-pursuit", {"residual_threshold": -1.0}, r"residual threshold is -1.0"),
    ("matching-pursuit", {"error": "mae"}, r"error is 'mae': allowed are mse, fvu, l2"),
    ("matching-pursuit", {"init": "kaiming"}, r"init is 'kaiming': allowed are transpose, orthogonal, data"),
    ("matching-pursuit", {"b_dec_init": "median"}, r"b_dec_init is 'median': allowed are zero, mean, geometric"),
    (
        "matching-pursuit",
        {"decoder_bias": False, "b_dec_init": "mean"},
        r"b_dec_init mean needs a bias, but decoder_bias is off",
    ),
]


def settings(name, **changes):
    """Of a dictionary that is as wide as 4 and has 8 latents, where nothing else is wrong."""
    fine = {"k": 2} if "k" in settings_of(name) else {}
    fine |= {"group_fractions": (0.5, 0.5)} if name == "matryoshka" else {}
    return architecture(name).Settings(**{"d_in": 4, "d_sae": 8, **fine, **changes})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_these_are_fine(name):
    settings(name)


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize(("changes", "message"), FOR_LINEAR, ids=[str(changes) for changes, _ in FOR_LINEAR])
def test_settings_that_all_with_a_linear_encoder_share(name, changes, message):
    with pytest.raises(UserError, match=message):
        settings(name, **changes)


@pytest.mark.parametrize(("name", "changes", "message"), OWN, ids=[f"{name}-{changes}" for name, changes, _ in OWN])
def test_an_architectures_own_settings(name, changes, message):
    with pytest.raises(UserError, match=message):
        settings(name, **changes)


@pytest.mark.parametrize("field", ["d_in", "d_sae"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_widths_below_one(name, field):
    with pytest.raises(UserError, match=f"{field} is 0: it must be at least 1"):
        settings(name, **{field: 0})


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("lp", {"p": 0.5, "p_end": 0.5}),
        ("jumprelu", {"target_l0": 8.0}),
        ("topk", {"k": 8}),
        ("batchtopk", {"k": 1.5}),
        ("relu", {"l1_coefficient": 0.0}),
        ("relu", {"tied": True, "init": "orthogonal"}),
        ("relu", {"tied": True, "parts": (1, 3)}),
        ("relu", {"d_out": 4, "subtract_b_dec": True}),
    ],
    ids=str,
)
def test_limits_that_are_allowed(name, changes):
    settings(name, **changes)


# ---- the registry


def test_an_unknown_architecture_is_named_with_all_there_are_and_the_near_one():
    with pytest.raises(UserError, match=r"unknown architecture 'batch-topk': have relu, .*; did you mean 'batchtopk'"):
        architecture("batch-topk")


def test_settings_that_may_differ_or_are_swept_exist():
    for name, kind in ARCHITECTURES.items():
        have, numbers = settings_of(name), kind.Settings(4, 40)
        assert set(kind.Settings.per_member) <= set(have)
        assert set(kind.Settings.named) <= set(kind.Settings.default_grid) <= set(have)
        assert all(isinstance(getattr(numbers, field), int | float) for field in kind.Settings.per_member), name
        assert {"d_in", "d_sae"} <= set(have)


def test_which_architectures_take_a_setting():
    assert require_setting("l1_coefficient", ["relu"]) == ["relu"]
    assert require_setting("k", ["relu", "topk", "gated", "batchtopk"]) == ["topk", "batchtopk"]
    assert require_setting("error", ARCHITECTURES) == list(ARCHITECTURES)
    assert require_setting("tied", iter(ARCHITECTURES)) == LINEAR


def test_a_setting_of_other_architectures_is_refused_with_their_names():
    with pytest.raises(
        UserError, match=r"^relu takes no setting 'k': it belongs to topk, batchtopk, matryoshka, match"
    ):
        require_setting("k", ["relu"])
    with pytest.raises(UserError, match=r"^relu and gated take no setting 'target_l0': it belongs to jumprelu$"):
        require_setting("target_l0", ["relu", "gated"])


def test_a_setting_of_none_is_refused_with_the_near_one():
    with pytest.raises(UserError, match=r"no setting 'l1_coeficient': none has it; did you mean 'l1_coefficient'"):
        require_setting("l1_coeficient", ["relu", "topk"])
    with pytest.raises(UserError, match="unknown architecture 'relo'"):
        require_setting("k", ["relo"])
