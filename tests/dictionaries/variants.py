"""What the shared tests run over: every architecture in several settings, three members each that differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_coding.dictionaries import DictionarySettings, Losses, Moment, Sample, TrainableDictionary, architecture

D_IN, D_SAE, D_OUT, ROWS = 6, 10, 4, 12


@dataclass(frozen=True)
class Case:
    """Settings that share a stack, one per member."""

    name: str
    label: str
    members: tuple[DictionarySettings, ...]

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"

    @property
    def kind(self) -> type[TrainableDictionary]:
        return architecture(self.name)

    @property
    def settings(self) -> Any:
        """Of the first member; what shapes and control flow depend on is the same in all."""
        return self.members[0]

    def stack(self, dtype: torch.dtype = torch.float32) -> Any:
        """Members off the special starting point (biases at zero, equal state hide mistakes), constraints kept."""
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(self.members))]
        stack = self.kind.init(self.members, generators, sample=sample(self.settings)).to(dtype)
        with torch.no_grad():
            for parameter in stack.parameters():
                parameter += 0.15 * torch.randn(parameter.shape, generator=generators[0], dtype=dtype)
            for value in stack.state().values():
                share = torch.arange(1.0, len(self.members) + 1, dtype=dtype) / 4
                value += share.view(-1, *[1] * (value.ndim - 1))
        stack.constrain_(stack.tensors())
        return stack

    def data(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
        """Rows and, for a transcoder, targets."""
        generator = torch.Generator().manual_seed(9)
        x = torch.randn(ROWS, self.settings.d_in, generator=generator, dtype=dtype)
        if self.settings.target_width == self.settings.d_in:
            return x, None
        return x, torch.randn(ROWS, self.settings.target_width, generator=generator, dtype=dtype)


def sample(settings: Any) -> Sample:
    """Rows for initial values."""
    generator = torch.Generator().manual_seed(17)
    x = torch.randn(40, settings.d_in, generator=generator)
    same = settings.target_width == settings.d_in
    return Sample(x, x if same else torch.randn(40, settings.target_width, generator=generator) + 1)


def moments(n_members: int = 3) -> dict[str, Moment]:
    """Places in a run: the end, the middle of every warm-up with some latents dead, and end to end."""
    dead = torch.zeros(n_members, D_SAE, dtype=torch.bool)
    dead[0, [1, 4, 5, 8]] = dead[1, [0, 9]] = True  # and none of the third
    return {
        "settled": Moment(),
        "warming": Moment(step=4, steps=20, sparsity=0.4, dead=dead[:n_members]),
        "end-to-end": Moment(error=lambda x_hat: (x_hat - 0.5).cosh().log().sum((-2, -1))),
    }


def of_member(moment: Moment, index: int) -> Moment:
    return moment if moment.dead is None else moment._replace(dead=moment.dead[index])


def gradients(dictionary: TrainableDictionary, losses: Losses) -> dict[str, Tensor]:
    """Of the total, by autograd."""
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    found = torch.autograd.grad(losses.total.sum(), parameters)
    return dict(zip(names, found, strict=True))


L1 = tuple({"l1_coefficient": value, "auxk_coefficient": weight} for value, weight in ((0.1, 0.5), (0.3, 0.03), (1, 2)))
K = tuple({"k": k, "auxk_coefficient": weight} for k, weight in ((2, 0.5), (3, 0.03), (5, 2.0)))
K_FRACTION = tuple({"k": k, "auxk_coefficient": weight} for k, weight in ((1.5, 0.5), (2, 0.03), (3.25, 2.0)))
L0 = tuple(
    {"l0_coefficient": value, "bandwidth": bandwidth, "auxk_coefficient": value}
    for value, bandwidth in ((0.1, 0.3), (0.5, 0.8), (2.0, 0.5))
)
ROUNDS = ({"k": 1}, {"k": 2}, {"k": 3})  # past the last useful atom the largest product is 0, a kink

TRANSCODER = {"d_out": D_OUT}
SKIP = {"d_out": D_OUT, "skip": True}
CROSSCODER = {"parts": (2, 4), "decoder": "free"}
NO_BIAS = {"decoder_bias": False}
NO_SUBTRACTION = {"subtract_b_dec": False}
JUMP: dict[str, Any] = {"initial_threshold": 0.4}

_VARIANTS: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, dict[str, Any]]]] = {
    "relu": (
        L1,
        {
            "plain": {},
            "tied": {"tied": True},
            "no-bias-mean": {**NO_BIAS, "l1_scaling": "mean"},
            "toy": {**NO_BIAS, "l1_scaling": "toy-2023", "init": "toy-2023"},
            "tied-no-bias": {**NO_BIAS, "tied": True},
            "no-subtraction": NO_SUBTRACTION,
            "free": {"decoder": "free", "init_norm": 0.5},
            "transcoder": {**TRANSCODER, "l1_scaling": "mean"},
            "skip": SKIP,
            "crosscoder": CROSSCODER,
            "fvu": {"error": "fvu"},
            "l2": {"error": "l2"},
            "auxk": {"dead_latents": "auxk", "k_aux": 3},
            "auxk-transcoder": {**TRANSCODER, "dead_latents": "auxk"},
            "ghost": {"dead_latents": "ghost"},
            "ghost-skip": {**SKIP, "dead_latents": "ghost"},
        },
    ),
    "relu-april": (
        L1,
        {
            "plain": {},
            "subtracting": {"subtract_b_dec": True},
            "unit": {"decoder": "unit"},
            "tied": {"tied": True},
            "transcoder": TRANSCODER,
            "skip-ghost": {**SKIP, "dead_latents": "ghost"},
            "crosscoder-auxk": {**CROSSCODER, "dead_latents": "auxk"},
            "no-bias-fvu": {**NO_BIAS, "error": "fvu"},
        },
    ),
    "lp": (
        L1,
        {
            "annealed": {},
            "annealed-norm": {"form": "norm"},
            "fixed": {"p": 0.5, "p_end": 0.5},
            "fixed-norm-free": {"p": 0.7, "p_end": 0.7, "form": "norm", "decoder": "free"},
            "unsmoothed": {"p": 0.5, "p_end": 0.25, "smoothing": 0.0},
            "p-1": {"p": 1.0, "p_end": 1.0, "smoothing": 0.0},
            "transcoder": TRANSCODER,
            "tied-auxk": {"tied": True, "dead_latents": "auxk"},
        },
    ),
    "gated": (
        L1,
        {
            "plain": {},
            "trained-auxiliary": {"frozen_auxiliary": False},
            "free": {"decoder": "free"},
            "free-trained": {"decoder": "free", "frozen_auxiliary": False},
            "tied": {"tied": True},
            "skip": SKIP,
            "crosscoder": CROSSCODER,
            "no-bias-l2": {**NO_BIAS, "error": "l2"},
            "auxk": {"dead_latents": "auxk"},
            "ghost": {"dead_latents": "ghost"},
        },
    ),
    "topk": (
        K,
        {
            "plain": {},
            "abs": {"selection": "abs"},
            "abs-free": {"selection": "abs", "decoder": "free"},
            "group": {"selection": "group"},
            "group-free-multi": {"selection": "group", "decoder": "free", "multi_topk": True},
            "multi": {"multi_topk": True},
            "free": {"decoder": "free"},
            "tied-free": {"tied": True, "decoder": "free"},
            "transcoder": TRANSCODER,
            "sparsify": {**SKIP, "decoder": "free", "init": "zero", "b_dec_init": "mean", "error": "fvu"},
            "crosscoder": CROSSCODER,
            "no-bias-ghost": {**NO_BIAS, "dead_latents": "ghost"},
            "no-subtraction": NO_SUBTRACTION,
        },
    ),
    "batchtopk": (
        K_FRACTION,
        {
            "plain": {},
            "free": {"decoder": "free"},
            "tied-free": {"tied": True, "decoder": "free"},
            "transcoder": {**TRANSCODER, "k_aux": 4},
            "skip-l2": {**SKIP, "error": "l2"},
            "crosscoder": CROSSCODER,
            "no-bias": NO_BIAS,
        },
    ),
    "matryoshka": (
        K_FRACTION,
        {
            "fixed": {"group_fractions": (0.2, 0.3, 0.5)},
            "random": {"prefixes": "random", "n_prefixes": 4},
            "free": {"group_fractions": (0.2, 0.3, 0.5), "decoder": "free"},
            "skip": {**SKIP, "group_fractions": (0.25, 0.75)},
            "transcoder-fvu": {**TRANSCODER, "group_fractions": (0.5, 0.5), "error": "fvu"},
            "crosscoder": {**CROSSCODER, "group_fractions": (0.5, 0.5)},
            "no-bias": {**NO_BIAS, "group_fractions": (0.5, 0.5)},
        },
    ),
    "jumprelu": (
        L0,
        {
            "l0": JUMP,
            "tanh": {**JUMP, "penalty": "tanh"},
            "tanh-free": {**JUMP, "penalty": "tanh", "decoder": "free"},
            "tied": {**JUMP, "tied": True},
            "transcoder": {**JUMP, **TRANSCODER},
            "skip": {**JUMP, **SKIP},
            "crosscoder-tanh": {**JUMP, **CROSSCODER, "penalty": "tanh"},
            "auxk-no-subtraction": {**JUMP, **NO_SUBTRACTION, "dead_latents": "auxk"},
            "ghost-no-bias": {**JUMP, **NO_BIAS, "dead_latents": "ghost"},
        },
    ),
    "matching-pursuit": (
        ROUNDS,
        {
            "plain": {},
            "no-bias": NO_BIAS,
            "fvu-data": {"error": "fvu", "init": "data"},
            "l2-stopping": {"error": "l2", "residual_threshold": 1.8},
        },
    ),
}


def _case(name: str, label: str, common: dict[str, Any], differing: tuple[dict[str, Any], ...]) -> Case:
    kind = architecture(name).Settings
    return Case(name, label, tuple(kind(D_IN, D_SAE, **{**common, **own}) for own in differing))


CASES = [
    _case(name, label, common, differing)
    for name, (differing, variants) in _VARIANTS.items()
    for label, common in variants.items()
]
_TARGETS = tuple({**own, "target_l0": target} for own, target in zip(L0, (0.0, 3.0, 1.5), strict=True))
CASES.append(_case("jumprelu", "some-with-a-target", JUMP, _TARGETS))
