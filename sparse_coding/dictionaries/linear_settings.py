"""Settings that all architectures with a linear encoder and decoder share, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from sparse_coding.dictionaries.base import DictionarySettings
from sparse_coding.dictionaries.objective import ErrorKind
from sparse_coding.dictionaries.start import BiasInit, Init
from sparse_coding.errors import UserError

Decoder = Literal["unit", "free"]
DeadLatents = Literal["none", "auxk", "ghost"]


@dataclass(frozen=True)
class LinearSettings(DictionarySettings):
    """Settings that every architecture with a linear encoder and decoder has."""

    d_out: int | None = None
    """Width of the target, for a transcoder; None for an autoencoder."""
    skip: bool = False
    """Add x W_skip^T to x_hat (transcoders only)."""
    parts: tuple[int, ...] = ()
    """Widths of the sites that lie side by side in x, for a crosscoder."""
    tied: bool = False
    """W_enc is the transpose of W_dec."""
    decoder_bias: bool = True
    """Learn b_dec, added after the decoder."""
    subtract_b_dec: bool = True
    """Subtract b_dec before the encoder too (autoencoders only)."""
    decoder: Decoder = "unit"
    """unit: atoms are kept at norm 1. free: they are not."""
    remove_parallel_gradient: bool = True
    """Drop from a unit atom's gradient the part along the atom, which re-normalisation would undo anyway."""
    error: ErrorKind = "mse"
    """How the distance to the target is measured: mse, fvu, l2 (see objective.py)."""
    init: Init = "transpose"
    """Initial weights: transpose, orthogonal, kaiming, data, zero, toy-2023 (see start.py)."""
    init_norm: float | None = 1.0
    """Length of the initial encoder columns, and of the initial atoms where the decoder is free; kaiming and toy-2023
    have their own. None: as `start_norm` has it."""
    b_dec_init: BiasInit = "zero"
    """Initial b_dec: zero, mean, geometric-median."""
    dead_latents: DeadLatents = "none"
    """What revives dead latents: none, auxk (they learn what the living ones leave), ghost (ghost gradients).
    Resampling is the trainer's."""
    auxk_coefficient: float = 1 / 32
    """Weight of AuxK."""
    k_aux: int | None = None
    """Dead latents that AuxK lets take part at once; by default half of d_out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = (
            ("decoder", Decoder),
            ("error", ErrorKind),
            ("init", Init),
            ("b_dec_init", BiasInit),
            ("dead_latents", DeadLatents),
        )
        if self.error in ("ce", "kl"):
            raise UserError(
                f"error {self.error!r} is what a language model loses, so it needs one: it is a loss of run.py (--loss "
                f"{self.error}), not of a dictionary by itself, which takes {', '.join(get_args(ErrorKind))}"
            )
        for name, allowed in choices:
            if getattr(self, name) not in get_args(allowed):
                raise UserError(f"{name} is {getattr(self, name)!r}: allowed are {', '.join(get_args(allowed))}")
        if self.d_out is not None and self.d_out < 1:
            raise UserError(f"d_out is {self.d_out}: it must be at least 1")
        if self.d_out is not None and (self.tied or self.parts):
            word = "tied weights" if self.tied else "the parts of a crosscoder"
            raise UserError(
                f"{word} need the target to be the input, but d_out names another: leave one of the two out"
            )
        if self.skip and self.d_out is None:
            raise UserError("a skip connection would let an autoencoder copy its input: it needs d_out, a transcoder")
        if self.parts and sum(self.parts) != self.d_in:
            raise UserError(
                f"the parts {self.parts} add up to {sum(self.parts)}, the width of the input is {self.d_in}"
            )
        if self.tied and self.init in ("toy-2023", "kaiming", "zero"):
            raise UserError(
                f"init {self.init} draws encoder and decoder apart, which tied weights cannot: use transpose"
            )
        if self.init == "zero" and self.decoder == "unit":
            raise UserError("init zero starts with atoms of norm 0, which a unit decoder cannot have: use decoder free")
        require_bias(self.decoder_bias, self.b_dec_init)
        require_weight("auxk_coefficient", self.auxk_coefficient)
        if self.init_norm is not None and not 0 < self.init_norm < math.inf:
            raise UserError(f"init_norm is {self.init_norm}: it must be a positive number")
        if self.init in ("kaiming", "toy-2023") and self.init_norm != type(self).init_norm:
            raise UserError(
                f"init_norm is not read by init {self.init}, which has lengths of its own: leave one of the two out"
            )
        if self.k_aux is not None and self.k_aux < 1:
            raise UserError(f"k_aux is {self.k_aux}: it must be at least 1")

    @property
    def target_width(self) -> int:
        return self.d_in if self.d_out is None else self.d_out

    @property
    def start_norm(self) -> float:
        """The initial length: `init_norm`, or what makes x_hat about as long as x where nothing selects among latents.

        With W_enc = n W_dec^T half the latents are active and x_hat is about n d_sae / (2 d_in) x: at 16 times the
        width, unit columns start eight times too long. Never above 1.
        """
        if self.init_norm is not None:
            return self.init_norm
        fitting = min(1.0, 2 * self.d_in / self.d_sae)
        return fitting if self.decoder == "unit" else fitting**0.5

    @property
    def subtracts(self) -> bool:
        """Whether the encoder sees x - b_dec."""
        return self.decoder_bias and self.subtract_b_dec and self.d_out is None


def require_weight(name: str, value: float) -> None:
    """Raise UserError unless the weight of a term is a number of at least 0."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"the {words(name)} is {value}: it must be 0 or a positive number")


def require_bias(decoder_bias: bool, b_dec_init: str) -> None:
    """Raise UserError for an initial value of a bias that is not there."""
    if not decoder_bias and b_dec_init != "zero":
        raise UserError(f"b_dec_init {b_dec_init} needs a bias, but decoder_bias is off: leave one of them out")


def words(name: str) -> str:
    """A setting's name in prose: l1_coefficient is the L1 coefficient."""
    return " ".join(word.upper() if word in ("l0", "l1") else word for word in name.split("_"))
