"""What most architectures share: a linear encoder and a linear decoder around codes that each makes in its own way.

    pre = (x - b_dec) W_enc + b_enc        f = the architecture's own        x_hat = f W_dec + b_dec

The same class is an autoencoder (x_hat meets x), a transcoder (it meets the activations of another site, of width
d_out; b_dec is then not subtracted; arXiv 2406.11944), a skip transcoder (x_hat also gets x W_skip^T; arXiv
2501.18823) and a crosscoder (x holds several sites or models side by side, `parts` their widths; an atom's norm is the
sum of its norms at each; Lindsey et al., transformer-circuits, October 2024).
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Losses, Moment, Sample, TrainableDictionary
from sparse_coding.dictionaries.linear_settings import LinearSettings
from sparse_coding.dictionaries.normalise import Affine
from sparse_coding.dictionaries.objective import auxk_error, ghost_error, reconstruction_error
from sparse_coding.dictionaries.start import initial_bias, initial_weights
from sparse_coding.kernels import unit_rows

if TYPE_CHECKING:
    from sparse_coding.kernels.triton.adam import RowAdam

RESTARTED_NORM = 0.2
"""Length of a restarted encoder column, in mean lengths of the living ones (Bricken et al. 2023)."""


class LinearDictionary(TrainableDictionary):
    """The shared half of an architecture. Its own file adds settings, its codes and its loss."""

    settings: LinearSettings
    latent_axes: ClassVar[Mapping[str, int]] = {"W_enc": -1, "b_enc": -1, "W_dec": -2}
    nonnegative: ClassVar[tuple[str, ...]] = ()
    """Parameters that are set back to 0 where a step leaves them below."""
    compares_latents: ClassVar[bool] = False
    """Whether latents compete for a place, so that the norms of free atoms decide too."""
    learning: RowAdam | None = None
    """On a GPU: the optimiser, for a step that can update W_enc and W_dec itself instead of giving their gradients."""
    density: float = 0.0
    """On a GPU: the largest share of a member's entries that was active when the log was last written."""
    W_enc: Float[Tensor, "... d_in d_sae"]
    b_enc: Float[Tensor, "... d_sae"]
    W_dec: Float[Tensor, "... d_sae d_out"]
    b_dec: Float[Tensor, "... d_out"]
    W_skip: Float[Tensor, "... d_out d_in"]
    auxk_coefficient: Float[Tensor, "..."]

    # ---- what an architecture adds

    @classmethod
    def own_values(cls, settings: Any) -> dict[str, Tensor]:
        """Initial values of one member beside W_enc, b_enc, W_dec, b_dec, W_skip; also of a restarted latent."""
        return {}

    def inference_values(
        self, values: Mapping[str, Tensor], shift: Float[Tensor, "... d_sae"] | float
    ) -> dict[str, Tensor]:
        """What `encode` needs beside W_enc, W_dec and b_dec, once `shift` is to be added to x W_enc."""
        return {"b_enc": values["b_enc"] + shift}

    @property
    @abc.abstractmethod
    def saelens_architecture(self) -> dict[str, Any]:
        """`architecture` and its own entries in a SAELens cfg.json, for an autoencoder."""

    # ---- the maps

    @property
    def atoms(self) -> Float[Tensor, "... d_sae d_out"]:
        return self.W_dec

    @property
    def encoder(self) -> Float[Tensor, "... d_in d_sae"]:
        return self.W_dec.mT if self.settings.tied else self.W_enc

    @property
    def norms(self) -> Float[Tensor, "... d_sae"]:
        """Norms of the atoms; for a crosscoder the sum of the norms at each site."""
        parts = self.W_dec.split(list(self.settings.parts) or [self.W_dec.shape[-1]], dim=-1)
        return torch.stack([part.norm(dim=-1) for part in parts]).sum(0)

    def pre_activations(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return self.projected(x) + self.b_enc.unsqueeze(-2)

    def projected(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        """The encoder's product alone, without its bias."""
        if self.settings.subtracts:
            x = x - self.b_dec.unsqueeze(-2)
        return x @ self.encoder

    def ranked(self, pre: Float[Tensor, "... B d_sae"]) -> Float[Tensor, "... B d_sae"]:
        """What latents are compared by: what each would add to x_hat, that is pre times the norm of its atom.

        Atoms that are still zero (init zero) count as of norm 1: nothing else could tell them apart.
        """
        scores = pre.detach()
        if self.settings.decoder == "unit":
            return scores
        norms = self.norms.detach()
        return scores * torch.where(norms > 0, norms, 1.0).unsqueeze(-2)

    @property
    def signed(self) -> bool:
        """Whether codes may be negative."""
        return False

    def competing(self, pre: Float[Tensor, "... B d_sae"]) -> Float[Tensor, "... B d_sae"]:
        """What latents are chosen by: `ranked`, its size alone where codes may be negative."""
        return self.ranked(pre).abs() if self.signed else self.ranked(pre)

    def decode(
        self, f: Float[Tensor, "... B d_sae"], x: Float[Tensor, "... B d_in"] | None = None
    ) -> Float[Tensor, "... B d_out"]:
        return f @ self.W_dec + self.without_latents(x)

    def without_latents(self, x: Float[Tensor, "... B d_in"] | None) -> Float[Tensor, "... B d_out"]:
        """x_hat of codes that are all zero: b_dec, and what a skip transcoder passes around the codes."""
        bias = self.b_dec if self.settings.decoder_bias else self.W_dec.new_zeros(self.W_dec.shape[-1])
        bias = bias.unsqueeze(-2)
        if not self.settings.skip:
            return bias
        if x is None:
            raise ValueError("a skip transcoder needs the activations to decode: decode(f, x)")
        return bias + x @ self.W_skip.mT

    # ---- the loss

    def error(
        self, x_hat: Float[Tensor, "... B d_out"], target: Float[Tensor, "B d_out"], moment: Moment
    ) -> Float[Tensor, "..."]:
        """The settings' reconstruction error, or the moment's own."""
        return moment.error(x_hat) if moment.error else reconstruction_error(x_hat, target, self.settings.error)

    def finish(
        self,
        total: Float[Tensor, "..."],
        terms: Mapping[str, Tensor],
        pre: Float[Tensor, "... B d_sae"],
        f: Float[Tensor, "... B d_sae"],
        x_hat: Float[Tensor, "... B d_out"],
        target: Float[Tensor, "B d_out"],
        moment: Moment,
        state: Mapping[str, Tensor] | None = None,
    ) -> Losses:
        """The losses of a step: the squared error as a term, and what revives dead latents added to the total."""
        found = {"squared_error": (target - x_hat).square().sum(-1).mean(-1), **terms}
        settings = self.settings
        if moment.dead is not None and settings.dead_latents == "auxk":
            k_aux = settings.k_aux or max(1, settings.target_width // 2)
            found["auxk"] = auxk_error(
                pre, target - x_hat, self.W_dec, moment.dead, k_aux, self.competing(pre), self.signed
            )
            total = total + self.auxk_coefficient * found["auxk"]
        elif moment.dead is not None and settings.dead_latents == "ghost":
            found["ghost"] = ghost_error(pre, x_hat, target, self.W_dec, moment.dead)
            total = total + found["ghost"]
        return Losses(total, found, f, x_hat, state or {})

    # ---- the start

    @classmethod
    def needs_sample(cls, settings: LinearSettings) -> bool:
        return settings.init in ("data", "zero") or settings.b_dec_init != "zero"

    @classmethod
    def initial(
        cls, settings: LinearSettings, generator: torch.Generator, sample: Sample | None = None
    ) -> dict[str, Tensor]:
        d_in, d_out = settings.d_in, settings.target_width
        b_dec = initial_bias(settings.b_dec_init, sample and sample.target, d_out)
        W_enc, b_enc, W_dec = initial_weights(
            settings.init, d_in, d_out, settings.d_sae, settings.start_norm, settings.d_out is not None,
            generator, sample, b_dec, settings.subtracts,
        )  # fmt: skip
        values = {"W_dec": W_dec}
        if not settings.tied:
            values["W_enc"] = W_enc
        if "b_enc" in cls.latent_axes:
            values["b_enc"] = b_enc
        if settings.decoder_bias:
            values["b_dec"] = b_dec
        if settings.skip:
            values["W_skip"] = torch.zeros(d_out, d_in)
        values |= cls.own_values(settings)
        if settings.decoder == "unit":
            unit_rows.normalise_(values["W_dec"])
        return values

    @torch.no_grad()
    def restart_(self, latents: Tensor, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """Point atom i along target row i and its encoder column along x row i; everything else as at the start.

        Atoms get the mean norm of the living ones (1 where they are kept there), encoder columns 0.2 of theirs.
        """
        living = torch.ones(self.d_sae, dtype=torch.bool, device=latents.device)
        living[latents] = False
        if not living.any():
            living[:] = True
        length = 1.0 if self.settings.decoder == "unit" else self.W_dec[living].norm(dim=1).mean()
        self.W_dec[latents] = length * torch.nn.functional.normalize(target, dim=1)
        if not self.settings.tied:
            length = RESTARTED_NORM * self.W_enc[:, living].norm(dim=0).mean()
            self.W_enc[:, latents] = length * torch.nn.functional.normalize(x, dim=1).T
        own = self.own_values(self.settings)
        for name in self.latent_axes:
            if name not in ("W_enc", "W_dec"):
                getattr(self, name)[latents] = own[name].to(x)[0] if name in own else 0.0

    # ---- what the trainer does around a step

    def constrain_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        if self.settings.decoder == "unit" and self.settings.remove_parallel_gradient and "W_dec" in gradients:
            unit_rows.project_(gradients["W_dec"], self.W_dec.detach())

    @torch.no_grad()
    def constrain_(self, values: Mapping[str, Tensor]) -> None:
        if self.settings.decoder == "unit" and "W_dec" in values:
            unit_rows.normalise_(values["W_dec"])
        for name in self.nonnegative:
            values[name].clamp_(min=0)

    # ---- saving

    def to_inference(self, before: Affine | None = None, after: Affine | None = None) -> LinearDictionary:
        values, settings = {**self.tensors(), **self.state()}, self.settings
        encoder, W_dec = self.encoder.detach(), values["W_dec"]
        b_dec = values["b_dec"] if settings.decoder_bias else torch.zeros_like(W_dec[..., 0, :])
        skip = values["W_skip"].mT if settings.skip else None
        if self.compares_latents and settings.decoder == "free":
            norms = self.norms.detach()
            encoder, W_dec = encoder * norms.unsqueeze(-2), W_dec / norms.clamp_min(1e-12).unsqueeze(-1)
            values = {**values, "b_enc": values["b_enc"] * norms}
        shift: Tensor | float = 0.0
        if before is not None:
            encoder = before.before(encoder)
            if not settings.subtracts:  # else the shift comes in through b_dec
                shift = -(before.shift.to(encoder) @ encoder)
            skip = None if skip is None else before.before(skip)
        if after is not None:
            W_dec, b_dec = after.after(W_dec), after.undo(b_dec)
            skip = None if skip is None else after.after(skip)
        tensors = {"W_enc": encoder, "W_dec": W_dec, **self.inference_values(values, shift)}
        if skip is not None:
            tensors["W_skip"] = skip.mT
            if before is not None:
                b_dec = b_dec - before.shift.to(skip) @ skip
        tensors["b_dec"] = b_dec
        at_rest = replace(
            settings, tied=False, decoder_bias=True, subtract_b_dec=settings.subtracts, decoder="unit",
            init="transpose", b_dec_init="zero",
        )  # fmt: skip
        copies = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
        return type(self).single(at_rest, copies)

    def saelens_config(self) -> dict[str, Any]:
        """Transcoders that SAELens knows get its names; what it does not know gets a name it refuses."""
        settings, own = self.settings, dict(self.saelens_architecture)
        if settings.parts:
            own["architecture"] = f"crosscoder_{own['architecture']}"
        elif settings.d_out is not None:
            kind = "skip_transcoder" if settings.skip else "transcoder"
            name: str = own["architecture"]
            own["architecture"] = kind if name == "standard" else f"{name}_{kind}"
            own["d_out"] = settings.d_out
        return {**own, "apply_b_dec_to_input": settings.subtracts}
