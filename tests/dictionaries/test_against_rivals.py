"""Same weights, same rows: losses, terms and gradients of SAELens, sparsify and dictionary_learning, and ours.

The rivals answered once, in their own environments, through their own code: benchmarks/rivals/dictionaries.py, which
also lists every difference in convention. Here each case says which of our settings mean the same, and by what factor
a rival scales. Where a rival is wrong, what it should have said is worked out from what it did say, or shown to differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_coding.dictionaries import (
    BatchTopK,
    BatchTopKSettings,
    Gated,
    GatedSettings,
    JumpReLU,
    JumpReLUSettings,
    Lp,
    LpSettings,
    MatchingPursuit,
    MatchingPursuitSettings,
    Matryoshka,
    MatryoshkaSettings,
    Moment,
    ReLU,
    ReLUApril,
    ReLUAprilSettings,
    ReLUSettings,
    TopK,
    TopKSettings,
    TrainableDictionary,
)
from sparse_coding.dictionaries.base import SETTLED, Losses
from sparse_coding.dictionaries.geometric_median import geometric_median

HERE = Path(__file__).parent
RECORD = load_file(HERE / "rival_values.safetensors")
FACTS = json.loads((HERE / "rival_values.json").read_text(encoding="utf-8"))
D_IN, D_SAE, ROWS = 6, 12, 16
DEAD = slice(8, 12)
X, TARGET = RECORD["world/x"], RECORD["world/target"]


def answer(case: str, name: str) -> Tensor:
    """A tensor that a rival gave: f, x_hat, gradient/W_enc, ..."""
    return RECORD[f"{case}/{name}"]


def losses_of(case: str) -> dict[str, float]:
    rival, name = case.split("/")
    return FACTS[rival]["cases"][name]["losses"]


def build(kind: type[TrainableDictionary], settings: Any) -> TrainableDictionary:
    """Ours with the world's weights."""
    atoms = RECORD["world/W_dec_unit" if getattr(settings, "decoder", "unit") == "unit" else "world/W_dec"]
    names = kind.initial(settings, torch.Generator()).keys()
    world = {name: RECORD[f"world/{name}"].clone() for name in names if f"world/{name}" in RECORD}
    initial = kind.own_values(settings) if hasattr(kind, "own_values") else {}
    return kind.single(settings, {**initial, **world, "W_dec": atoms.clone()})


def gradients(dictionary: TrainableDictionary, loss: Tensor) -> dict[str, Tensor]:
    """Of a loss in every parameter; zero where it does not reach."""
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def assert_near(found: Tensor, wanted: Tensor | float, what: str) -> None:
    torch.testing.assert_close(
        found.detach(), torch.as_tensor(wanted), rtol=1e-5, atol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def spread(rows: Tensor) -> float:
    """Mean squared distance to the mean row."""
    return float((rows - rows.mean(0)).square().sum(1).mean())


def of_target(case: str) -> float:
    """sparsify divides AuxK by the variance of the target."""
    return 1 / spread(X)


def of_residual(case: str) -> float:
    """dictionary_learning divides AuxK by the variance of what is left."""
    return 1 / spread(X - answer(case, "x_hat"))


@dataclass(frozen=True)
class Case:
    """One question that a rival and we were asked."""

    name: str
    kind: type[TrainableDictionary]
    settings: Any
    terms: Mapping[str, tuple[str, float]] = field(default_factory=dict)
    """Our term -> theirs, and what theirs is multiplied by."""
    factor: float = 1.0
    """What their loss and gradients are multiplied by."""
    moment: Moment = SETTLED
    transcodes: bool = False
    rows: int = ROWS
    normaliser: Callable[[str], float] | None = None
    """What their AuxK is divided by besides."""
    apart: tuple[str, ...] = ()
    """Parameters whose gradients differ; a test of their own says how."""

    def __str__(self) -> str:
        return self.name

    def ours(self, **changes: Any) -> tuple[TrainableDictionary, Losses]:
        settings = self.settings
        if self.normaliser is not None:
            changes = {"auxk_coefficient": settings.auxk_coefficient * self.normaliser(self.name), **changes}
        dictionary = build(self.kind, replace(settings, **changes))
        return dictionary, dictionary.loss(X[: self.rows], TARGET if self.transcodes else None, self.moment)


def dead(which: slice = DEAD, **moment: Any) -> Moment:
    mask = torch.zeros(D_SAE, dtype=torch.bool)
    mask[which] = True
    return Moment(dead=mask, **moment)


FREE = {"d_in": D_IN, "d_sae": D_SAE, "decoder": "free"}
UNIT = {"d_in": D_IN, "d_sae": D_SAE, "decoder": "unit"}
AUXK = {"dead_latents": "auxk", "auxk_coefficient": 0.5}
PREFIXES = {"k": 2, "group_fractions": (2 / 12, 3 / 12, 7 / 12)}
JUMP = {"l0_coefficient": 0.7, "bandwidth": 0.8}
FVU = {"error": "fvu", "k": 2}
MSE = {"squared_error": ("mse_loss", 1.0)}
"""SAELens: the sum over dims, the mean over rows, as ours."""
SAELENS_AUXK = {**MSE, "auxk": ("auxiliary_reconstruction_loss", 2.0)}

SAELENS = [
    # its L1 counts the norms of the atoms, so it is our relu-april, with b_dec subtracted or not
    Case("standard", ReLUApril, ReLUAprilSettings(**FREE, l1_coefficient=0.7, subtract_b_dec=True),
         {**MSE, "penalty": ("l1_loss", 1 / 0.7)}),
    Case("standard_unsubtracted", ReLUApril, ReLUAprilSettings(**FREE, l1_coefficient=0.7), MSE),
    # its lp_norm is a norm, and weighs codes with the norms of the atoms: the same where they are 1
    Case("standard_lp", Lp,
         LpSettings(**UNIT, l1_coefficient=0.7, p=0.5, p_end=0.5, form="norm", smoothing=0.0),
         {**MSE, "penalty": ("l1_loss", 1 / 0.7)}, apart=("W_dec",)),
    # its auxiliary term trains the decoder
    Case("gated", Gated, GatedSettings(**FREE, l1_coefficient=0.7, frozen_auxiliary=False),
         {**MSE, "l1_gate": ("l1_loss", 1 / 0.7), "auxiliary": ("auxiliary_reconstruction_loss", 1.0)}),
    # latents are ranked by pre ||W_dec_i||, dead ones too; its codes f carry that factor, ours do not. Its AuxK does
    # not rectify, the paper does: the dead latents' pre-activations here are all above 0. AbsTopK takes either sign
    Case("topk", TopK, TopKSettings(**FREE, k=2), MSE),
    Case("topk_auxk", TopK, TopKSettings(**UNIT, **AUXK, k=2), SAELENS_AUXK, moment=dead()),
    Case("topk_auxk_few", TopK, TopKSettings(**FREE, **AUXK, k=2), SAELENS_AUXK, moment=dead(slice(8, 10))),
    Case("topk_auxk_free", TopK, TopKSettings(**FREE, **AUXK, k=2), SAELENS_AUXK, moment=dead()),
    Case("abstopk", TopK, TopKSettings(**FREE, k=2, selection="abs"), MSE),
    Case("abstopk_auxk", TopK, TopKSettings(**UNIT, **AUXK, k=2, selection="abs"), SAELENS_AUXK,
         moment=dead(slice(0, 5))),
    Case("batchtopk", BatchTopK, BatchTopKSettings(**FREE, k=2.3), MSE),
    Case("batchtopk_auxk", BatchTopK, BatchTopKSettings(**UNIT, **AUXK, k=2.3), SAELENS_AUXK, moment=dead()),
    Case("matryoshka", Matryoshka, MatryoshkaSettings(**FREE, **PREFIXES),
         {**MSE, "shortest_prefix": ("inner_mse_loss_2", 1.0)}),
    Case("matryoshka_auxk", Matryoshka,
         MatryoshkaSettings(**UNIT, **PREFIXES, dead_latents="auxk", auxk_coefficient=1.0),
         {**MSE, "auxk": ("auxiliary_reconstruction_loss", 1.0)}, moment=dead()),
    Case("jumprelu_step", JumpReLU, JumpReLUSettings(**FREE, **JUMP), {**MSE, "penalty": ("l0_loss", 1 / 0.7)}),
    Case("jumprelu_tanh", JumpReLU, JumpReLUSettings(**FREE, **JUMP, penalty="tanh"),
         {**MSE, "penalty": ("l0_loss", 1 / 0.7)}),
    # its quadratic penalty is 2/T (L0 - T)^2 of each row, ours (L0/T - 1)^2 of the batch's mean L0 (as in
    # dictionary_learning): the same up to 2 T for one row
    Case("jumprelu_quadratic", JumpReLU,
         JumpReLUSettings(**FREE, l0_coefficient=2 * 3 * 0.7, bandwidth=0.8, target_l0=3.0), MSE, rows=1),
    Case("matching_pursuit", MatchingPursuit,
         MatchingPursuitSettings(D_IN, D_SAE, k=4, residual_threshold=0.6), MSE),
]  # fmt: skip

SPARSIFY = [
    Case("topk", TopK, TopKSettings(**UNIT, **FVU)),
    # the gradient of pre-activations is lost in its fused encoder: AuxK and Multi-TopK do not reach W_enc, b_enc, and
    # b_dec through them (see the test below)
    Case("multi_topk", TopK, TopKSettings(**UNIT, **FVU, multi_topk=True), {"multi_topk": ("multi_topk_fvu", 1 / 8)},
         apart=("W_enc", "b_enc", "b_dec")),
    Case("topk_auxk", TopK, TopKSettings(**UNIT, **FVU, **AUXK), moment=dead(), normaliser=of_target,
         apart=("W_enc", "b_enc", "b_dec")),
    Case("topk_auxk_few", TopK, TopKSettings(**UNIT, **FVU, **AUXK), moment=dead(slice(8, 10)), normaliser=of_target,
         apart=("W_enc", "b_enc", "b_dec")),
    # it also gives latents that ReLU closed a gradient: all maxima of groups here are above 0
    Case("groupmax", TopK, TopKSettings(**UNIT, error="fvu", k=3, selection="group")),
    Case("transcoder", TopK, TopKSettings(**UNIT, **FVU, d_out=D_IN), transcodes=True),
    Case("skip_transcoder", TopK, TopKSettings(**UNIT, **FVU, d_out=D_IN, skip=True), transcodes=True),
]  # fmt: skip

L2 = {"squared_error": ("l2_loss", 1.0)}
THIRDS = {"k": 2, "group_fractions": (0.25, 0.25, 0.5)}
LEARNING = [
    Case("standard", ReLU, ReLUSettings(**UNIT, l1_coefficient=0.1), {**MSE, "l1": ("sparsity_loss", 1.0)}),
    # a quarter of the warm-up of sparsity
    Case("standard_april", ReLUApril, ReLUAprilSettings(**FREE, l1_coefficient=0.7, subtract_b_dec=True),
         {**MSE, "penalty": ("sparsity_loss", 1.0)}, moment=Moment(sparsity=0.25)),
    Case("gated", Gated, GatedSettings(**UNIT, l1_coefficient=0.7),
         {**MSE, "l1_gate": ("sparsity_loss", 1.0), "auxiliary": ("aux_loss", 1.0)}),
    Case("topk", TopK, TopKSettings(**UNIT, k=2), L2),
    Case("topk_auxk", TopK, TopKSettings(**UNIT, **AUXK, k=2), L2, moment=dead(), normaliser=of_residual),
    Case("batchtopk", BatchTopK, BatchTopKSettings(**UNIT, k=2), L2),
    Case("batchtopk_auxk", BatchTopK, BatchTopKSettings(**UNIT, **AUXK, k=2), L2, moment=dead(),
         normaliser=of_residual),
    # it divides the sum over 3 prefixes by 3 twice, AuxK by neither
    Case("matryoshka", Matryoshka, MatryoshkaSettings(**UNIT, **THIRDS), factor=9),
    Case("matryoshka_auxk", Matryoshka,
         MatryoshkaSettings(**UNIT, **THIRDS, dead_latents="auxk", auxk_coefficient=9 * 0.5), factor=9,
         moment=dead(), normaliser=of_residual),
    # L0 is counted on f, not on pre-activations, so thresholds miss the rows just below them (see the test below)
    Case("jumprelu", JumpReLU, JumpReLUSettings(**UNIT, **JUMP, target_l0=3.0, subtract_b_dec=False), L2,
         apart=("threshold",)),
    Case("jumprelu_error_alone", JumpReLU,
         JumpReLUSettings(**UNIT, l0_coefficient=0.0, bandwidth=0.8, target_l0=3.0, subtract_b_dec=False), L2),
    Case("p_anneal_Lp", Lp, LpSettings(**UNIT, l1_coefficient=0.7, p=0.5, p_end=0.5, form="norm", smoothing=0.0),
         {"penalty": ("lp_loss", 1.0)}),
    Case("p_anneal_Lp^p", Lp, LpSettings(**UNIT, l1_coefficient=0.7, p=0.5, p_end=0.5, form="sum", smoothing=0.0),
         {"penalty": ("lp_loss", 1.0)}),
]  # fmt: skip

CASES = {
    case.name: case
    for rival, cases in (("saelens", SAELENS), ("sparsify", SPARSIFY), ("dictionary_learning", LEARNING))
    for case in (replace(case, name=f"{rival}/{case.name}") for case in cases)
}


def that_give(name: str) -> list[Case]:
    """The cases whose rivals gave this too."""
    return [case for case in CASES.values() if f"{case.name}/{name}" in RECORD]


@pytest.mark.parametrize("case", CASES.values(), ids=str)
def test_losses_terms_and_gradients_are_the_rivals(case):
    dictionary, losses = case.ours()
    theirs = losses_of(case.name)
    assert_near(losses.total, case.factor * theirs["loss"], "loss")
    for term, (name, factor) in case.terms.items():
        assert_near(losses.terms[term], factor * theirs[name], term)
    for name, gradient in gradients(dictionary, losses.total).items():
        if name not in case.apart:
            assert_near(gradient, case.factor * answer(case.name, f"gradient/{name}"), f"gradient of {name}")


@pytest.mark.parametrize("case", that_give("f"), ids=str)
def test_codes_and_reconstructions_are_the_rivals(case):
    dictionary, losses = case.ours()
    assert_near(losses.x_hat, answer(case.name, "x_hat"), "x_hat")
    f = losses.f
    if case.name.startswith("saelens/") and case.kind in (TopK, BatchTopK, Matryoshka):
        f = f * dictionary.norms
    assert_near(f, answer(case.name, "f"), "f")


@pytest.mark.parametrize("name", ["multi_topk", "topk_auxk", "topk_auxk_few"])
def test_sparsify_s_encoder_hears_of_fvu_alone(name):
    """Its fused encoder drops the gradient of pre-activations: what AuxK and Multi-TopK add to W_enc and b_enc is lost,
    and what they would add to b_dec through the encoder, - W_enc d loss/d b_enc. Everything else is ours."""
    case = CASES[f"sparsify/{name}"]
    dictionary, losses = case.ours()
    whole = gradients(dictionary, losses.total)
    dictionary, losses = replace(case, moment=SETTLED).ours(multi_topk=False)
    fvu = gradients(dictionary, losses.total)
    for parameter in ("W_enc", "b_enc"):
        assert_near(fvu[parameter], answer(case.name, f"gradient/{parameter}"), parameter)
        assert not torch.allclose(whole[parameter], fvu[parameter], rtol=1e-2)
    lost = -RECORD["world/W_enc"] @ (whole["b_enc"] - fvu["b_enc"])
    assert_near(whole["b_dec"] - lost, answer(case.name, "gradient/b_dec"), "b_dec")


def test_dictionary_learning_s_l0_does_not_see_rows_below_the_threshold():
    """It counts f > threshold, and f is 0 below: of the kernel's window only the upper half is left."""
    with_l0, alone = CASES["dictionary_learning/jumprelu"], CASES["dictionary_learning/jumprelu_error_alone"]
    theirs = answer(with_l0.name, "gradient/threshold") - answer(alone.name, "gradient/threshold")
    ours = []
    for case in (with_l0, alone):
        dictionary, losses = case.ours()
        ours.append(gradients(dictionary, losses.total)["threshold"])
    pre, threshold = dictionary.pre_activations(X), dictionary.threshold
    window = (pre - threshold).abs() < 0.4
    above = (window & (pre > threshold)).sum(0) / window.sum(0).clamp(min=1)
    assert 0.2 < float(above.mean()) < 0.8
    assert_near((ours[0] - ours[1]) * above, theirs, "what L0 does to the threshold")


@pytest.mark.parametrize("decoder", ["unit", "free"])
@pytest.mark.parametrize("kind", [BatchTopK, Matryoshka])
def test_the_threshold_is_saelens_s_without_its_bias(kind, decoder):
    """SAELens averages from 0 on without correction, so after n batches it is (1 - 0.99^n) times ours."""
    case = f"saelens/batchtopk_threshold{'' if decoder == 'unit' else '_free'}"
    dictionary = build(kind, kind.Settings(D_IN, D_SAE, k=2.3, decoder=decoder))
    for step, scale in enumerate((1.0, 0.6, 1.7)):
        losses = dictionary.loss(scale * X, None, Moment(step=step, steps=3))
        dictionary.threshold, dictionary.batches_seen = losses.state["threshold"], losses.state["batches_seen"]
        theirs = answer(case, "thresholds")[step] / (1 - 0.99 ** (step + 1))
        assert_near(dictionary.threshold, theirs.expand(D_SAE), f"after batch {step}")


def test_the_first_threshold_is_dictionary_learning_s():
    dictionary = build(BatchTopK, BatchTopKSettings(**UNIT, k=2))
    found = dictionary.loss(X).state["threshold"]
    assert_near(found, answer("dictionary_learning/batchtopk_threshold", "thresholds").expand(D_SAE), "threshold")


@pytest.mark.parametrize(("case", "form"), [("p_anneal_run_Lp", "norm"), ("p_anneal_run_Lp^p", "sum")])
def test_a_run_in_which_p_falls_is_dictionary_learning_s(case, form):
    """p is 1, 0.8, ... 0.2 from steps 0, 11, 21, 31, 41 on, and the penalty's weight is adapted at each."""
    case, steps = f"dictionary_learning/{case}", 51
    settings = LpSettings(
        **UNIT, l1_coefficient=0.7, p_end=0.2, anneal_start=10.5 / steps, anneal_steps=4, form=form, smoothing=0.0
    )
    dictionary, wanted = build(Lp, settings), answer(case, "losses")
    for step in range(steps):
        losses = dictionary.loss((1 + 0.5 * math.sin(step)) * X, None, Moment(step=step, steps=steps))
        assert_near(losses.total, wanted[step], f"loss of step {step}")
        if step == 35:
            for name, gradient in gradients(dictionary, losses.total).items():
                assert_near(gradient, answer(case, f"gradient/{name}"), f"gradient of {name}")
        for name, value in losses.state.items():
            setattr(dictionary, name, value)


@pytest.mark.parametrize("case", that_give("projected_gradient"), ids=str)
def test_what_is_left_of_a_unit_atom_s_gradient_is_dictionary_learning_s(case):
    dictionary, losses = case.ours()
    found = gradients(dictionary, losses.total)
    dictionary.constrain_gradients_(found)
    assert_near(found["W_dec"], case.factor * answer(case.name, "projected_gradient"), "projected gradient")


def test_saelens_s_lp_norm_differs_along_the_atoms_alone():
    """Its penalty counts the norms of the atoms; a unit atom gives that part of its gradient up."""
    dictionary, losses = CASES["saelens/standard_lp"].ours()
    ours, theirs = gradients(dictionary, losses.total), {"W_dec": answer("saelens/standard_lp", "gradient/W_dec")}
    for found in (ours, theirs):
        dictionary.constrain_gradients_(found)
    assert_near(ours["W_dec"], theirs["W_dec"], "projected gradient")


def test_ghost_gradients_are_those_of_their_source():
    dictionary = build(ReLU, ReLUSettings(**UNIT, dead_latents="ghost"))
    ghost = dictionary.loss(X, None, dead()).terms["ghost"]
    assert_near(ghost, losses_of("mats_sae_training/ghost")["loss"], "ghost")
    for name, gradient in gradients(dictionary, ghost).items():
        assert_near(gradient, answer("mats_sae_training/ghost", f"gradient/{name}"), f"gradient of {name}")


def test_the_geometric_median_is_dictionary_learning_s():
    assert_near(geometric_median(X).float(), RECORD["dictionary_learning/geometric_median"], "geometric median")
