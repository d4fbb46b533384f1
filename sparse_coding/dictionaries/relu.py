"""The ReLU dictionary with an L1 penalty, tied or untied, in the form of 2022/23.

    f = relu((x - b_dec) W_enc + b_enc)          x_hat = f W_dec + b_dec          ||W_dec_i|| = 1

Sources: Sharkey, Braun, Millidge, "Taking features out of superposition with sparse autoencoders" (2022); Cunningham
et al., arXiv 2309.08600; Bricken et al., "Towards Monosemanticity" (2023).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import DictionarySettings, Losses, TrainableDictionary, unit_rows
from sparse_coding.errors import UserError
from sparse_coding.kernels.relu import relu_l1_step
from sparse_coding.kernels.result import StepResult

L1Scaling = Literal["toy-2023", "mean", "sum"]
Init = Literal["transpose", "toy-2023"]


@dataclass(frozen=True)
class ReLUSettings(DictionarySettings):
    """Settings of one ReLU-L1 dictionary."""

    l1_coefficient: float = 1.0
    """Weight of the L1 penalty, in the convention that `l1_scaling` names."""
    l1_scaling: L1Scaling = "sum"
    """How error and penalty are averaged: see `loss_weights`."""
    tied: bool = False
    """W_enc is the transpose of W_dec."""
    decoder_bias: bool = True
    """Learn b_dec, subtracted before the encoder and added after the decoder."""
    remove_parallel_gradient: bool = True
    """Drop from each atom's gradient the part along the atom, which re-normalisation would undo anyway."""
    init: Init = "transpose"
    """transpose: random unit atoms, W_enc = W_dec^T, zero biases. toy-2023: torch's Linear default for the encoder and
    its bias, an orthogonal decoder."""

    per_member: ClassVar[tuple[str, ...]] = ("l1_coefficient",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.l1_coefficient >= 0 and math.isfinite(self.l1_coefficient)):
            raise UserError(f"the L1 coefficient is {self.l1_coefficient}: it must be 0 or a positive number")
        for value, allowed in ((self.l1_scaling, L1Scaling), (self.init, Init)):
            if value not in get_args(allowed):
                raise UserError(f"{value!r} is not one of {', '.join(get_args(allowed))}")
        if self.tied and self.init == "toy-2023":
            raise UserError("init toy-2023 draws encoder and decoder apart, which tied weights cannot: use transpose")


def loss_weights(scaling: L1Scaling, d_in: int, d_sae: int) -> tuple[float, float]:
    """(error_weight, l1_weight per unit alpha) in `error_weight * E||x - x_hat||^2 + l1_weight * alpha * E||f||_1`.

    sum       the sum over dims, alpha * ||f||_1                (equations of arXiv 2309.08600, Anthropic)
    mean      the mean over dims, alpha * ||f||_1               (code of arXiv 2309.08600 since June 2023)
    toy-2023  the mean over dims, alpha * ||f||_1 / d_sae       (the frozen toy script, early June 2023)

    So alpha in toy-2023 equals alpha / d_sae in mean and alpha * d_in / d_sae in sum.
    """
    if scaling == "sum":
        return 1.0, 1.0
    return 1 / d_in, 1 / d_sae if scaling == "toy-2023" else 1.0


def convert_l1(alpha: float, source: L1Scaling, target: L1Scaling, d_in: int, d_sae: int) -> float:
    """The coefficient that has the same minimiser under another convention."""
    (error_a, l1_a), (error_b, l1_b) = loss_weights(source, d_in, d_sae), loss_weights(target, d_in, d_sae)
    return alpha * (l1_a / error_a) / (l1_b / error_b)


class ReLU(TrainableDictionary):
    """ReLU encoder, linear decoder of unit atoms, L1 on the codes."""

    Settings = ReLUSettings
    settings: ReLUSettings
    W_enc: Float[Tensor, "... d_in d_sae"]
    b_enc: Float[Tensor, "... d_sae"]
    W_dec: Float[Tensor, "... d_sae d_in"]
    b_dec: Float[Tensor, "... d_in"]
    l1_coefficient: Float[Tensor, "..."]

    @classmethod
    def initial(cls, settings: ReLUSettings, generator: torch.Generator) -> dict[str, Tensor]:
        d_in, d_sae = settings.d_in, settings.d_sae
        if settings.init == "transpose":
            atoms = unit_rows(torch.randn(d_sae, d_in, generator=generator))
            parameters = {"W_dec": atoms, "b_enc": torch.zeros(d_sae)}
            if not settings.tied:
                parameters["W_enc"] = atoms.T.clone()
        else:
            bound = d_in**-0.5  # torch.nn.Linear's default for weight and bias
            weight = torch.rand(d_sae, d_in, generator=generator) * (2 * bound) - bound
            bias = torch.rand(d_sae, generator=generator) * (2 * bound) - bound
            orthogonal = torch.nn.init.orthogonal_(torch.empty(d_in, d_sae), generator=generator)
            parameters = {"W_enc": weight.T.clone(), "b_enc": bias, "W_dec": unit_rows(orthogonal.T.contiguous())}
        if settings.decoder_bias:
            parameters["b_dec"] = torch.zeros(d_in)
        return parameters

    @property
    def atoms(self) -> Float[Tensor, "... d_sae d_in"]:
        return self.W_dec

    @property
    def encoder(self) -> Float[Tensor, "... d_in d_sae"]:
        return self.W_dec.mT if self.settings.tied else self.W_enc

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        if self.settings.decoder_bias:
            x = x - self.b_dec.unsqueeze(-2)
        return torch.relu(x @ self.encoder + self.b_enc.unsqueeze(-2))

    def decode(self, f: Float[Tensor, "... B d_sae"]) -> Float[Tensor, "... B d_in"]:
        x_hat = f @ self.W_dec
        return x_hat + self.b_dec.unsqueeze(-2) if self.settings.decoder_bias else x_hat

    def loss(self, x: Float[Tensor, "B d_in"]) -> Losses:
        error_weight, l1_weight = loss_weights(self.settings.l1_scaling, self.settings.d_in, self.settings.d_sae)
        f = self.encode(x)
        x_hat = self.decode(f)
        squared_error = (x_hat - x).square().sum(-1).mean(-1)
        l1 = f.sum(-1).mean(-1)
        total = error_weight * squared_error + l1_weight * self.l1_coefficient * l1
        return Losses(total, {"squared_error": squared_error, "l1": l1}, f, x_hat)

    def fused_gradients(self, x: Float[Tensor, "B d_in"], dtype: torch.dtype) -> StepResult:
        error_weight, l1_weight = loss_weights(self.settings.l1_scaling, self.settings.d_in, self.settings.d_sae)
        weights = self.tensors()
        return relu_l1_step(
            x,
            weights.get("W_enc"),
            weights["b_enc"],
            weights["W_dec"],
            weights.get("b_dec"),
            error_weight,
            l1_weight * self.l1_coefficient,
            dtype,
        )

    def constrain_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        if self.settings.remove_parallel_gradient:
            atoms, gradient = self.W_dec.detach(), gradients["W_dec"]
            gradient.addcmul_(atoms, (atoms * gradient).sum(-1, keepdim=True), value=-1)

    @torch.no_grad()
    def constrain_(self) -> None:
        norms = self.W_dec.norm(dim=-1, keepdim=True)
        self.W_dec.div_(norms.clamp_min(torch.finfo(norms.dtype).tiny))

    def to_inference(self, scale: float = 1.0) -> dict[str, Tensor]:
        weights = self.tensors()
        b_dec = weights["b_dec"] if self.settings.decoder_bias else torch.zeros_like(weights["W_dec"][..., 0, :])
        return {
            "W_enc": (self.encoder.detach() * scale).contiguous(),
            "b_enc": weights["b_enc"].clone(),
            "W_dec": weights["W_dec"] / scale,
            "b_dec": b_dec / scale,
        }

    @classmethod
    def from_inference(cls, settings: ReLUSettings, tensors: Mapping[str, Tensor]) -> ReLU:
        wanted = {name: value for name, value in tensors.items() if settings.decoder_bias or name != "b_dec"}
        return cls.single(replace(settings, tied=False), wanted)

    def saelens_config(self) -> dict[str, Any]:
        return {"architecture": "standard", "apply_b_dec_to_input": self.settings.decoder_bias}
