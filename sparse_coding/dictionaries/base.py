"""The words and the interface every dictionary keeps to.

A dictionary maps activations `x [B d_in]` to codes `f [B d_sae]` and back to `x_hat [B d_out]`; row `i` of `W_dec
[d_sae d_out]` is atom `i`. Mostly the target of `x_hat` is x itself; for a transcoder it is what another site holds.
All maths runs over leading axes: a single dictionary has none, a stack of `M` members that are trained as one batched
computation has `[M]` in front of every parameter and sees the same `x` in each member.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sparse_coding.dictionaries.normalise import Affine
from sparse_coding.errors import UserError
from sparse_coding.kernels.result import StepResult

ErrorFunction: TypeAlias = Callable[[Tensor], Tensor]
"""x_hat [... B d_out] -> the error of each member [...]."""


class Moment(NamedTuple):
    """What a loss depends on besides rows and parameters: the place in the run, and which latents are dead."""

    step: int = 0
    steps: int = 1
    sparsity: float = 1.0
    """Warm-up of sparsity, rising to 1: it multiplies L1 and L0 weights, and k comes down to its value with it."""
    dead: Bool[Tensor, "... d_sae"] | None = None
    """Latents that count as dead; None where none can be yet. Read by AuxK and ghost gradients alone."""
    error: ErrorFunction | None = None
    """An error of x_hat in place of the settings' own: what a language model loses with x_hat put in (end to end)."""

    def of(self, members: slice) -> Moment:
        """The moment of some members of the stack alone."""
        return self._replace(dead=None if self.dead is None else self.dead[members])


SETTLED = Moment()
"""Every warm-up is over and nothing is dead."""


class Sample(NamedTuple):
    """Rows of the data that initial values may be taken from."""

    x: Float[Tensor, "N d_in"]
    target: Float[Tensor, "N d_out"]


class Losses(NamedTuple):
    """The loss of each member, its named terms, and what it was computed from."""

    total: Float[Tensor, "..."]
    """What is minimised, one value per member."""
    terms: Mapping[str, Float[Tensor, "..."]]
    """`squared_error` is always there: the batch mean of ||target - x_hat||^2 (sum over dims). Others as they enter."""
    f: Float[Tensor, "... B d_sae"]
    x_hat: Float[Tensor, "... B d_out"]
    state: Mapping[str, Tensor] = {}
    """Values the dictionary's state (see `TrainableDictionary.state_names`) takes when this step is done."""


@dataclass(frozen=True)
class DictionarySettings:
    """What every architecture needs; a variant adds its own fields."""

    d_in: int
    """Width of the activations."""
    d_sae: int
    """Number of latents (atoms)."""

    per_member: ClassVar[tuple[str, ...]] = ()
    """Fields that may differ inside a stack: they only multiply or count, so they become one tensor `[M]`."""
    named: ClassVar[tuple[str, ...]] = ()
    """The field that sets the sparsity: it stands in every member's name, and a sweep varies it."""
    default_grid: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    """What a sweep varies where nothing is said: values of fields that suit activations of norm sqrt(d_in)."""

    def __post_init__(self) -> None:
        for name in ("d_in", "d_sae"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1 (check the dictionary ratios)")

    @property
    def target_width(self) -> int:
        """d_out, the width of x_hat."""
        return self.d_in


class Dictionary(nn.Module, abc.ABC):
    """Anything with atoms, an encoder and a decoder: trained dictionaries and baselines alike."""

    @property
    @abc.abstractmethod
    def atoms(self) -> Float[Tensor, "... d_sae d_out"]:
        """The dictionary itself: one direction per latent, not necessarily of unit norm."""

    @abc.abstractmethod
    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]: ...

    @abc.abstractmethod
    def decode(
        self, f: Float[Tensor, "... B d_sae"], x: Float[Tensor, "... B d_in"] | None = None
    ) -> Float[Tensor, "... B d_out"]:
        """x_hat from codes. `x` is what they were encoded from; only dictionaries that pass something of x around the
        codes read it (a skip transcoder, normalisation row by row), and those need it."""

    def forward(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_out"]:
        return self.decode(self.encode(x), x)

    @property
    def d_sae(self) -> int:
        return self.atoms.shape[-2]

    @property
    def d_in(self) -> int:
        """Width of x."""
        return self.atoms.shape[-1]

    @property
    def d_out(self) -> int:
        """Width of x_hat; d_in unless this is a transcoder."""
        return self.atoms.shape[-1]


class TrainableDictionary(Dictionary):
    """A dictionary the sweep trainer can train: settings, parameters with the same leading axes, and a loss."""

    Settings: ClassVar[type[DictionarySettings]]
    state_names: ClassVar[tuple[str, ...]] = ()
    """Tensors that training changes but no gradient reaches (a running threshold): buffers, saved with the rest."""
    latent_axes: ClassVar[Mapping[str, int]] = {}
    """Parameter -> its axis of latents, counted from the end; parameters without one are left out."""
    encodes_with_atoms: ClassVar[bool] = False
    """Whether the atoms are the encoder too, so that raw activations may differ from those of training in scale only:
    no whitening, no crosscoder."""
    settings: DictionarySettings

    def __init__(self, settings: DictionarySettings, values: Mapping[str, Tensor], hyper: Mapping[str, Tensor]):
        """`values` (parameters and state) and the per-member hyperparameters `hyper` are taken without a copy."""
        super().__init__()
        self.settings = settings
        for name, value in values.items():
            if name in self.state_names:
                self.register_buffer(name, value)
            else:
                self.register_parameter(name, nn.Parameter(value))
        for name, value in hyper.items():
            self.register_buffer(name, value, persistent=False)
        self.largest = {name: float(value.max()) for name, value in hyper.items()}
        """Of each hyperparameter over the members, known to the CPU: what shapes depend on (k)."""

    @classmethod
    @abc.abstractmethod
    def initial(cls, settings: Any, generator: torch.Generator, sample: Sample | None = None) -> dict[str, Tensor]:
        """Parameters and state of one member, float32 on the CPU; every draw comes from `generator`.

        `sample` is there where `needs_sample(settings)`.
        """

    @classmethod
    @abc.abstractmethod
    def needs_sample(cls, settings: Any) -> bool:
        """Whether initial values are taken from data."""

    @classmethod
    def init(
        cls,
        members: Sequence[DictionarySettings],
        generators: Sequence[torch.Generator],
        device: str = "cpu",
        sample: Sample | None = None,
    ):
        """A stack of `M` freshly initialised members; their settings may differ in `per_member` fields only."""
        drawn = [
            cls.initial(settings, generator, sample) for settings, generator in zip(members, generators, strict=True)
        ]
        stacked = {name: torch.stack([one[name] for one in drawn]).to(device) for name in drawn[0]}
        return cls(members[0], stacked, hyper_tensors(members, device))

    @classmethod
    def single(cls, settings: DictionarySettings, values: Mapping[str, Tensor]):
        """One dictionary, without a leading axis."""
        device = next(iter(values.values())).device
        return cls(settings, values, {k: v[0] for k, v in hyper_tensors([settings], device).items()})

    @abc.abstractmethod
    def loss(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None = None, moment: Moment = SETTLED
    ) -> Losses:
        """The definition that every fast path must equal through autograd. `target` None: x itself."""

    def fused_gradients(
        self, x: Float[Tensor, "B d_in"], target: Float[Tensor, "B d_out"] | None, moment: Moment, dtype: torch.dtype
    ) -> StepResult | None:
        """A fast step equal to autograd of `loss`, its products in `dtype`; None where `kernels` holds none."""
        return None

    def branch(self, moment: Moment) -> Hashable | None:
        """What the loss makes of the step number: once sparsity has warmed up, steps of equal branches run the same
        operations with the same numbers. None: no two steps do."""
        return ()

    @abc.abstractmethod
    def constrain_gradients_(self, gradients: Mapping[str, Tensor]) -> None:
        """Change the gradients in place before the optimiser's step."""

    @abc.abstractmethod
    def constrain_(self, values: Mapping[str, Tensor]) -> None:
        """Bring `values`, tensors by the names of the parameters, back to where they must lie, in place."""

    @abc.abstractmethod
    def restart_(self, latents: Tensor, x: Float[Tensor, "n d_in"], target: Float[Tensor, "n d_out"]) -> None:
        """Give the latents of one dictionary, by index, new directions taken from rows (see training/resample.py)."""

    @abc.abstractmethod
    def to_inference(self, before: Affine | None = None, after: Affine | None = None) -> TrainableDictionary:
        """A copy that takes and gives raw activations: x -> f -> x_hat alone, by SAELens's names of the tensors.

        `before` is what was done to the rows x before training saw them, `after` what was done to the targets (None:
        nothing). Both are folded into the weights. What one latent adds to x_hat stays what it was, in raw units.
        """

    @abc.abstractmethod
    def saelens_config(self) -> dict[str, Any]:
        """The entries of a SAELens v6 cfg.json that are the architecture's own."""

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by name, detached but sharing memory."""
        return {name: value.detach() for name, value in self.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """What `state_names` lists, by name, sharing memory; what inference does not need is left out there."""
        return {name: getattr(self, name) for name in self.state_names if hasattr(self, name)}

    @property
    def d_in(self) -> int:
        return self.settings.d_in

    def part(self, members: slice):
        """Some members of a stack as a stack of their own that shares its memory."""
        values = {**self.tensors(), **self.state()}
        hyper = {name: getattr(self, name) for name in self.settings.per_member}
        cut = ({name: value[members] for name, value in group.items()} for group in (values, hyper))
        return type(self)(self.settings, *cut)

    def member(self, index: int, settings: DictionarySettings):
        """Member `index` of a stack as a dictionary of its own (a copy)."""
        values = {**self.tensors(), **self.state()}
        return type(self).single(settings, {name: value[index].clone() for name, value in values.items()})


def hyper_tensors(members: Sequence[DictionarySettings], device: str | torch.device) -> dict[str, Tensor]:
    """The per-member fields of the settings as float32 tensors `[M]`."""
    names = members[0].per_member
    return {
        name: torch.tensor([float(getattr(one, name)) for one in members], dtype=torch.float32, device=device)
        for name in names
    }


def stop_gradient(values: Tensor) -> Tensor:
    """`values` as constants. Every stop-gradient of a loss goes through here (a test holds them fixed)."""
    return values.detach()


def unit_rows(rows: Float[Tensor, "... n d"]) -> Float[Tensor, "... n d"]:
    """Rows scaled to unit Euclidean norm; a zero row stays zero."""
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
