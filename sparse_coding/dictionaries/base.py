"""The words and the interface every dictionary keeps to.

A dictionary maps activations `x [B d_in]` to codes `f [B d_sae]` and back to `x_hat [B d_in]`; row `i` of `W_dec
[d_sae d_in]` is atom `i`. All maths runs over leading axes: a single dictionary has none, a stack of `M` members that
are trained as one batched computation has `[M]` in front of every parameter and sees the same `x` in each member.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult


class Losses(NamedTuple):
    """The loss of each member, its named terms, and what it was computed from."""

    total: Float[Tensor, "..."]
    """What is minimised, one value per member."""
    terms: Mapping[str, Float[Tensor, "..."]]
    """`squared_error` is always there: the batch mean of ||x - x_hat||^2 (sum over dims). Other terms as they enter."""
    f: Float[Tensor, "... B d_sae"]
    x_hat: Float[Tensor, "... B d_in"]


@dataclass(frozen=True)
class DictionarySettings:
    """What every architecture needs; a variant adds its own fields."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents (atoms)."""

    per_member: ClassVar[tuple[str, ...]] = ()
    """Fields that may differ inside a stack: they only multiply, so they become one tensor `[M]`."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1 (check the dictionary ratios)")


class Dictionary(nn.Module, abc.ABC):
    """Anything with atoms, an encoder and a decoder: trained dictionaries and baselines alike."""

    @property
    @abc.abstractmethod
    def atoms(self) -> Float[Tensor, "... d_sae d_in"]:
        """The dictionary itself: one direction per latent, not necessarily of unit norm."""

    @abc.abstractmethod
    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]: ...

    @abc.abstractmethod
    def decode(self, f: Float[Tensor, "... B d_sae"]) -> Float[Tensor, "... B d_in"]: ...

    def forward(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_in"]:
        return self.decode(self.encode(x))

    @property
    def d_sae(self) -> int:
        return self.atoms.shape[-2]

    @property
    def d_in(self) -> int:
        return self.atoms.shape[-1]


class TrainableDictionary(Dictionary):
    """A dictionary the sweep trainer can train: settings, parameters with the same leading axes, and a loss."""

    Settings: ClassVar[type[DictionarySettings]]
    settings: DictionarySettings
    fused_gradients: Callable[[Tensor, torch.dtype], StepResult] | None = None
    """A fast step equal to autograd of `loss`, where `kernels` holds one: (x, dtype of the products) -> StepResult."""

    def __init__(self, settings: DictionarySettings, parameters: Mapping[str, Tensor], hyper: Mapping[str, Tensor]):
        """`parameters` and the per-member hyperparameters `hyper` are taken as they are, without a copy."""
        super().__init__()
        self.settings = settings
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))
        for name, value in hyper.items():
            self.register_buffer(name, value, persistent=False)

    @classmethod
    @abc.abstractmethod
    def initial(cls, settings: Any, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of one member, float32 on the CPU; every draw comes from `generator`."""

    @classmethod
    def init(cls, members: Sequence[DictionarySettings], generators: Sequence[torch.Generator], device: str = "cpu"):
        """A stack of `M` freshly initialised members; their settings may differ in `per_member` fields only."""
        drawn = [cls.initial(settings, generator) for settings, generator in zip(members, generators, strict=True)]
        stacked = {name: torch.stack([one[name] for one in drawn]).to(device) for name in drawn[0]}
        return cls(members[0], stacked, hyper_tensors(members, device))

    @classmethod
    def single(cls, settings: DictionarySettings, parameters: Mapping[str, Tensor]):
        """One dictionary, without a leading axis."""
        device = next(iter(parameters.values())).device
        return cls(settings, parameters, {k: v[0] for k, v in hyper_tensors([settings], device).items()})

    @abc.abstractmethod
    def loss(self, x: Float[Tensor, "B d_in"]) -> Losses:
        """The definition that every fast path must equal through autograd."""

    @abc.abstractmethod
    def constrain_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """Change the gradients in place before the optimiser's step."""

    @abc.abstractmethod
    def constrain_(self) -> None:
        """Bring the parameters back to where they must lie, after the optimiser's step."""

    @abc.abstractmethod
    def to_inference(self, scale: float = 1.0) -> dict[str, Tensor]:
        """Copies of the tensors of `x -> f -> x_hat` alone, by SAELens's names (W_enc, b_enc, W_dec, b_dec, ...).

        `scale` is what the stream multiplied the activations with; it is folded in, so that the tensors take raw
        activations and the codes stay as they were in training.
        """

    @classmethod
    @abc.abstractmethod
    def from_inference(cls, settings: Any, tensors: Mapping[str, Tensor]) -> TrainableDictionary:
        """One dictionary from what `to_inference` wrote."""

    @abc.abstractmethod
    def saelens_config(self) -> dict[str, Any]:
        """The entries of a SAELens v6 cfg.json that are the architecture's own."""

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, detached but sharing memory."""
        return {name: value.detach() for name, value in self.named_parameters()}

    def member(self, index: int, settings: DictionarySettings):
        """Member `index` of a stack as a dictionary of its own (a copy)."""
        return type(self).single(settings, {name: value[index].clone() for name, value in self.tensors().items()})


def hyper_tensors(members: Sequence[DictionarySettings], device: str | torch.device) -> dict[str, Tensor]:
    """The per-member fields of the settings as float32 tensors `[M]`."""
    names = members[0].per_member
    return {
        name: torch.tensor([float(getattr(one, name)) for one in members], dtype=torch.float32, device=device)
        for name in names
    }


def unit_rows(rows: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
    """Rows scaled to unit Euclidean norm; a zero row stays zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
