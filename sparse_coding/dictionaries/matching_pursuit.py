"""The matching pursuit dictionary: atoms are chosen one after another, each for what the ones before it left.

    r = x - b_dec; k times: i = argmax r W_dec^T, a = relu(r . W_dec_i), f_i += a, r -= a W_dec_i          x_hat = x - r

There is no encoder to learn: the atoms encode. Unlike one product and a threshold, the loop can tell correlated atoms
apart, and so finds features that only make sense given others. Gradients run through all of its rounds.

Source: Costa et al., "From flat to hierarchical: extracting sparse representations with matching pursuit" (2025). Like
SAELens a row stops when its residual is shorter than `residual_threshold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, final, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import SETTLED, DictionarySettings, Losses, Moment, Sample, TrainableDictionary
from sparse_coding.dictionaries.linear_settings import require_bias, require_weight
from sparse_coding.dictionaries.normalise import Affine
from sparse_coding.dictionaries.objective import ErrorKind, reconstruction_error
from sparse_coding.dictionaries.selection import require_k
from sparse_coding.dictionaries.start import BiasInit, initial_bias, initial_weights
from sparse_coding.errors import UserError
from sparse_coding.kernels import unit_rows

Start = Literal["transpose", "orthogonal", "data"]


@dataclass(frozen=True)
class MatchingPursuitSettings(DictionarySettings):
    """Settings of one matching pursuit dictionary."""

    k: int = 32
    """Rounds: the most latents active in a row."""
    residual_threshold: float = 1e-2
    """A row whose residual is shorter than this is done."""
    decoder_bias: bool = True
    """Learn b_dec, subtracted before the first round."""
    error: ErrorKind = "mse"
    """How the distance to the target is measured: mse, fvu, l2 (see objective.py)."""
    init: Start = "transpose"
    """Initial atoms: transpose (random), orthogonal, data (see start.py)."""
    b_dec_init: BiasInit = "zero"
    """Initial b_dec: zero, mean, geometric-median."""

    per_member: ClassVar[tuple[str, ...]] = ("k",)
    named: ClassVar[tuple[str, ...]] = ("k",)
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {"k": (8, 16, 32, 64)}

    def __post_init__(self) -> None:
        super().__post_init__()
        require_k(self.k, self.d_sae, whole=True)
        require_weight("residual_threshold", self.residual_threshold)
        for name, allowed in (("error", ErrorKind), ("init", Start), ("b_dec_init", BiasInit)):
            if getattr(self, name) not in get_args(allowed):
                raise UserError(f"{name} is {getattr(self, name)!r}: allowed are {', '.join(get_args(allowed))}")
        require_bias(self.decoder_bias, self.b_dec_init)


@final
class MatchingPursuit(TrainableDictionary):
    """Unit atoms that encode by matching pursuit."""

    Settings = MatchingPursuitSettings
    settings: MatchingPursuitSettings
    latent_axes: ClassVar[Mapping[str, int]] = {"W_dec": -2}
    encodes_with_atoms = True
    W_dec: Float[Tensor, "... d_sae d_in"]
    b_dec: Float[Tensor, "... d_in"]
    k: Float[Tensor, "..."]

    @property
    def atoms(self) -> Float[Tensor, "... d_sae d_in"]:
        return self.W_dec

    @classmethod
    def needs_sample(cls, settings: MatchingPursuitSettings) -> bool:
        return settings.init == "data" or settings.b_dec_init != "zero"

    @classmethod
    def initial(
        cls, settings: MatchingPursuitSettings, generator: torch.Generator, sample: Sample | None = None
    ) -> dict[str, Tensor]:
        width = settings.d_in
        b_dec = initial_bias(settings.b_dec_init, sample and sample.target, width)
        atoms = initial_weights(
            settings.init, width, width, settings.d_sae, 1.0, False, generator, sample, b_dec, True
        )[2]
        return {"W_dec": atoms, "b_dec": b_dec} if settings.decoder_bias else {"W_dec": atoms}

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return self.pursue(x)[0]

    def pursue(
        self, x: Float[Tensor, "... B d_in"]
    ) -> tuple[Float[Tensor, "... B d_sae"], Float[Tensor, "... B d_in"]]:
        """(codes, what is left of x)."""
        residual = x - self.b_dec.unsqueeze(-2) if self.settings.decoder_bias else x
        residual = residual.expand(*torch.broadcast_shapes(residual.shape[:-2], self.W_dec.shape[:-2]), *x.shape[-2:])
        f = residual.new_zeros(*residual.shape[:-1], self.d_sae)
        for round_ in range(round(self.largest["k"])):
            value, index = (residual @ self.W_dec.mT).max(-1, keepdim=True)
            going = residual.detach().norm(dim=-1, keepdim=True) >= self.settings.residual_threshold
            value = torch.where(going & (round_ < self.k.round()[..., None, None]), torch.relu(value), 0.0).to(f.dtype)
            f = f.scatter_add(-1, index, value)
            chosen = self.W_dec.gather(-2, index.expand(residual.shape))
            residual = residual - value * chosen
        return f, residual

    def decode(
        self, f: Float[Tensor, "... B d_sae"], x: Float[Tensor, "... B d_in"] | None = None
    ) -> Float[Tensor, "... B d_in"]:
        x_hat = f @ self.W_dec
        return x_hat + self.b_dec.unsqueeze(-2) if self.settings.decoder_bias else x_hat

    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_in"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        assert target is None
        f, residual = self.pursue(x)
        x_hat = x - residual
        error = moment.error(x_hat) if moment.error else reconstruction_error(x_hat, x, self.settings.error)
        return Losses(error, {"squared_error": residual.square().sum(-1).mean(-1)}, f, x_hat)

    def constrain_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        unit_rows.project_(gradients["W_dec"], self.W_dec.detach())

    @torch.no_grad()
    def constrain_(self, values: Mapping[str, Tensor]) -> None:
        unit_rows.normalise_(values["W_dec"])

    @torch.no_grad()
    def restart_(self, latents: Tensor, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_in"]) -> None:
        self.W_dec[latents] = torch.nn.functional.normalize(x, dim=1)

    def to_inference(self, before: Affine | None = None, after: Affine | None = None) -> MatchingPursuit:
        """Atoms stay of norm 1, as they encode too, so here the codes change their unit with the activations."""
        scale = 1.0
        if before is not None:
            scale = float(before.factor.flatten()[0])
            if before.factor.ndim == 2 or bool((before.factor != scale).any()) or bool(before.shift.any()):
                raise UserError(
                    "matching pursuit encodes with its atoms, into which only one scale for all dimensions folds: "
                    "use normalisation mean-norm, and no crosscoder"
                )
        values = {"W_dec": self.W_dec.detach().clone()}
        b_dec = self.b_dec.detach() if self.settings.decoder_bias else torch.zeros_like(values["W_dec"][..., 0, :])
        settings = replace(self.settings, residual_threshold=self.settings.residual_threshold / scale,
                           decoder_bias=True, init="transpose", b_dec_init="zero")  # fmt: skip
        return MatchingPursuit.single(settings, {**values, "b_dec": b_dec / scale})

    def saelens_config(self) -> dict[str, Any]:
        return {
            "architecture": "matching_pursuit",
            "residual_threshold": self.settings.residual_threshold,
            "max_iterations": self.settings.k,
            "stop_on_duplicate_support": False,
            "apply_b_dec_to_input": True,
        }
