"""Which dictionaries are trained: the flags of a sweep, and the members they stand for."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from sparse_coding.config import numbers, value_from_text
from sparse_coding.dictionaries import ARCHITECTURES, architecture, require_setting, settings_of
from sparse_coding.dictionaries.normalise import Normalisation
from sparse_coding.errors import UserError, near
from sparse_coding.training.sweep import Member, grid, require_distinct

Loss = Literal["mse", "fvu", "l2", "ce", "kl"]
END_TO_END = ("ce", "kl")


@dataclass(frozen=True)
class SweepFlags:
    """Which dictionaries are trained: every combination, side by side on one stream."""

    architecture: tuple[str, ...] = ("relu",)
    """One or several of relu, relu-april, lp, gated, topk, batchtopk, matryoshka, jumprelu, matching-pursuit, or all.
    docs/architectures has a page on each."""
    l1: tuple[str, ...] = ()
    """L1 coefficients (relu, relu-april, lp, gated): numbers, or logspace:FIRST:LAST:HOW_MANY in powers of ten; by
    default 0.5 1 2 4 8."""
    k: tuple[str, ...] = ()
    """Active latents per row (topk, matching-pursuit), or their mean (batchtopk, matryoshka); by default 8 16 32 64."""
    l0: tuple[str, ...] = ()
    """L0 coefficients (jumprelu); by default 0.25 0.5 1 2 4."""
    target_l0: tuple[str, ...] = ()
    """Mean numbers of active latents to aim at (jumprelu); by default none: the fewer the better."""
    ratios: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Dictionary sizes as multiples of the width of the activations."""
    lr: tuple[float, ...] = (2e-3,)
    """Learning rates. Short runs gain from high ones; 1e-3 is that of 2023."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the dictionaries' initial values."""
    set: tuple[str, ...] = ()
    """Any other setting of the architectures, as NAME=VALUE, NAME=VALUE,VALUE (all of them) or ARCHITECTURE.NAME=VALUE:
    selection=topk,abs topk.multi_topk=true bandwidth=0.01,0.1 prefixes=random group_fractions=0.25/0.25/0.5."""
    tied: bool = False
    """The encoder is the transposed decoder."""
    decoder_bias: bool = True
    """Learn a bias of the decoder."""
    l1_scaling: Literal["sum", "mean", "toy-2023"] = "sum"
    """Convention of relu's L1 coefficient. sum: squared error summed over dims + l1 * ||f||_1. mean: averaged over dims
    instead. toy-2023: mean, and the penalty divided by the number of latents."""
    loss: Loss = "mse"
    """What reconstructions are judged by: mse (squared error, summed over dims), fvu, l2 (the norm itself), or end to
    end ce (next-token cross-entropy of the model with the reconstruction in place) and kl (its KL from the model).
    The default L1 and L0 coefficients are for mse; the others are smaller numbers, and so must the coefficients be."""
    init: Literal["auto", "transpose", "orthogonal", "kaiming", "data", "zero", "toy-2023"] = "auto"
    """Initial weights: encoder = decoder^T with random or orthogonal directions, or with rows of the data; kaiming;
    zero (decoder 0, for transcoders with decoder=free)."""
    b_dec_init: Literal["zero", "mean", "geometric-median"] = "zero"
    """Initial decoder bias: zero, or the mean or geometric median of the first 32,768 rows."""
    dead_latents: Literal["auto", "none", "auxk", "ghost", "resample"] = "auto"
    """What revives dead latents: auxk, ghost gradients, resampling, none; auto: auxk for topk, batchtopk, matryoshka,
    none for others. When a latent is dead is said by --dead-feature-window."""
    normalise: Normalisation = "mean-norm"
    """Of activations before training: none; mean-norm (times one number, to mean norm sqrt(d_in), so that settings
    carry over between models) and whiten, which are folded into the saved dictionaries; unit-norm and layer-norm, row
    by row."""

    def __post_init__(self) -> None:
        for name in self.names:
            architecture(name)
        for word in self.set:
            self._setting(word)

    @property
    def names(self) -> tuple[str, ...]:
        """The architectures."""
        if not self.architecture:
            raise UserError(f"--architecture is empty: give some of {', '.join(ARCHITECTURES)}")
        if self.architecture == ("all",):
            return tuple(ARCHITECTURES)
        if "all" in self.architecture:
            raise UserError("--architecture all stands alone: leave out the others")
        for name in self.architecture:
            if self.architecture.count(name) > 1:
                raise UserError(f"--architecture names {name} twice: leave one out")
        return self.architecture

    def members(
        self,
        widths: Mapping[str, int],
        targets: Mapping[str, str] | None = None,
        parts: Mapping[str, Sequence[int]] | None = None,
        skip: bool = False,
    ) -> list[Member]:
        """The grid of the flags, for every architecture, at every site; see `grid` for the arguments."""
        names = self._fitting(bool(targets), bool(parts))
        choices = self._choices(names, skip)
        members = []
        for name in names:
            own = choices[name]
            varied = {field: values for field, values in own.items() if len(values) > 1}
            shared = {field: values[0] for field, values in own.items() if len(values) == 1}
            with _of(name if len(names) > 1 else ""):
                members += grid(name, widths, self.ratios, self.lr, self.seeds, varied, targets, parts, **shared)
        require_distinct(members)
        return members

    def _fitting(self, transcode: bool, crosscode: bool) -> list[str]:
        """The architectures that can do what is asked for: of `all` those that can, else it is an error."""
        fitting = []
        for name in self.names:
            atoms = architecture(name).encodes_with_atoms
            why = (
                "cannot be a transcoder" if transcode and "d_out" not in settings_of(name)
                else "cannot be a crosscoder" if crosscode and atoms
                else "cannot take --normalise whiten" if self.normalise == "whiten" and atoms
                else ""
            )  # fmt: skip
            if not why:
                fitting.append(name)
            elif self.architecture != ("all",):
                raise UserError(f"{name} {why}, as its atoms are its encoder: leave it out")
        return fitting

    def _choices(self, names: Sequence[str], skip: bool) -> dict[str, dict[str, tuple[Any, ...]]]:
        """Architecture -> setting -> its values. A flag that no chosen architecture takes is an error, and so is a
        setting that two of them set."""
        found = {
            name: {f: tuple(v) for f, v in architecture(name).Settings.default_grid.items()} for name in self.names
        }
        given: dict[tuple[str, str], str] = {}

        def choose(flag: str, setting: str, values: tuple[Any, ...], among: Sequence[str] = names) -> None:
            for name in require_setting(setting, among, flag):
                before = given.setdefault((name, setting), flag)
                if before != flag:
                    raise UserError(f"{setting} of {name} is set by {before} and by {flag}: leave one of the two out")
                found[name][setting] = tuple(self._typed(name, setting, value) for value in values)

        for flag, setting, words in (
            ("--l1", "l1_coefficient", self.l1), ("--k", "k", self.k), ("--l0", "l0_coefficient", self.l0),
            ("--target-l0", "target_l0", self.target_l0),
        ):  # fmt: skip
            if words:
                choose(flag, setting, numbers(words, flag))
        for flag, setting, default in (
            ("--tied", "tied", False), ("--no-decoder-bias", "decoder_bias", True),
            ("--l1-scaling", "l1_scaling", "sum"), ("--init", "init", "auto"), ("--b-dec-init", "b_dec_init", "zero"),
        ):  # fmt: skip
            if getattr(self, setting) != default:
                choose(flag, setting, (getattr(self, setting),))
        if self.loss not in ("mse", *END_TO_END):
            choose("--loss", "error", (self.loss,))
        if self.dead_latents == "resample":
            for name in names:
                if "dead_latents" in settings_of(name):
                    choose("--dead-latents", "dead_latents", ("none",), [name])
        elif self.dead_latents != "auto":
            choose("--dead-latents", "dead_latents", (self.dead_latents,))
        if skip:
            choose("--skip", "skip", (True,))
        for word in self.set:
            taking, setting, values = self._setting(word)
            choose(f"--set {word}", setting, values, taking)
        if self.target_l0 and not any(setting == "l0_coefficient" for _, setting in given):
            choose("--target-l0", "l0_coefficient", (1.0,))
        for name, own in found.items():
            unread = {"k_aux", "auxk_coefficient"} & own.keys()
            methods = own.get("dead_latents") or (getattr(architecture(name).Settings, "dead_latents", "none"),)
            if unread and "auxk" not in methods:
                raise UserError(
                    f"{' and '.join(sorted(unread))} of {name} would not be read: it belongs to dead_latents auxk, "
                    f"which is {methods[0]!r} here; give --dead-latents auxk too"
                )
        return found

    @property
    def revivals(self) -> set[str]:
        """Methods against dead latents that were asked for by name."""
        words = {self.dead_latents} - {"auto", "none", "resample"}
        for word in self.set:
            _, setting, values = self._setting(word)
            words |= set(values) if setting == "dead_latents" else set()
        return words - {"none"}

    def _setting(self, word: str) -> tuple[Sequence[str], str, tuple[Any, ...]]:
        """(architectures, setting, values) of one word of --set."""
        left, equals, right = word.partition("=")
        owner, dot, setting = left.rpartition(".")
        if not equals or not right or not setting:
            raise UserError(f"--set {word!r}: write NAME=VALUE, NAME=VALUE,VALUE or ARCHITECTURE.NAME=VALUE")
        if dot and owner not in self.names:
            raise UserError(
                f"--set {word!r}: {owner!r} is not among the architectures of this run "
                f"({', '.join(self.names)}){near(owner, self.names)}"
            )
        taking = require_setting(setting, [owner] if dot else self.names, f"--set {word}")
        if setting in ("d_in", "d_sae", "d_out", "parts"):
            raise UserError(f"--set {word!r}: {setting} follows from the sites and --ratios, it cannot be set")
        return taking, setting, tuple(right.split(","))

    @staticmethod
    def _typed(name: str, setting: str, value: Any) -> Any:
        """A value as the architecture has it: words of the command line as numbers, whole ones where it counts."""
        hint = typing.get_type_hints(architecture(name).Settings)[setting]
        if isinstance(value, str):
            return value_from_text(hint, value, setting)
        return int(value) if hint is int and value == int(value) else float(value) if hint is float else value


@contextmanager
def _of(architecture_name: str) -> Iterator[None]:
    """Says which of several architectures a mistake is about."""
    try:
        yield
    except UserError as error:
        named = not architecture_name or str(error).startswith(architecture_name)
        raise UserError(str(error) if named else f"{architecture_name}: {error}") from None
