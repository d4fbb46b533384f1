"""How well and how sparsely a dictionary rebuilds activations, streamed over an evaluation set of any length.

Accumulators hold counts and sums (in float64, on the CPU); ratios are taken once, at the end. Hence a result does not
depend on how the rows were cut into batches, and two accumulators over different rows can be merged exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.dictionaries.base import Dictionary
from sparse_coding.errors import UserError

LOG10_EDGES: tuple[float, ...] = tuple(-6 + step / 4 for step in range(25))
"""Bins of the density histogram: quarters of a decade from 1e-6 to 1."""

Histogram: TypeAlias = dict[str, list[float] | list[int] | int]

_SCALARS: tuple[str, ...] = ("residual", "output_energy", "overlap", "cosine", "nonzero", "l1")


Rows: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""Activations [B d_in], or those and what is to be predicted from them [B d_out] (transcoders)."""


class Reconstruction:
    """Sums over rows x (for a transcoder its targets), codes f and reconstructions x_hat; `result()` makes metrics."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self.d_in, self.d_sae = d_in, d_sae
        self.rows = 0
        self.firing_counts: Int[Tensor, " d_sae"] = torch.zeros(d_sae, dtype=torch.int64)
        """In how many rows each latent was active (f != 0)."""
        self._mean = torch.zeros(d_in, dtype=torch.float64)
        self._deviation = 0.0  # sum ||x - mean||^2 over all rows so far
        self._sums: dict[str, float] = dict.fromkeys(_SCALARS, 0.0)

    @torch.no_grad()
    def update(self, x: Float[Tensor, "B d_in"], f: Float[Tensor, "B d_sae"], x_hat: Float[Tensor, "B d_in"]) -> None:
        """Add a batch. Sums inside the batch are taken in float32 where the tensors are, then moved in one transfer."""
        if x.shape != x_hat.shape or x.shape != (len(x), self.d_in) or f.shape != (len(x), self.d_sae):
            raise UserError(
                f"x {tuple(x.shape)}, f {tuple(f.shape)} and x_hat {tuple(x_hat.shape)} do not fit: needed are "
                f"[B {self.d_in}], [B {self.d_sae}] and [B {self.d_in}]"
            )
        if not len(x):
            return
        x, x_hat = x.float(), x_hat.float()
        if f.device.type == "cpu":  # summing booleans over rows is ten times slower there than summing floats
            fired = torch.ne(f, 0, out=torch.empty(f.shape)).sum(0)
        else:
            fired = (f != 0).sum(0).float()
        mean = x.mean(0)
        x_norm, hat_norm = x.norm(dim=1), x_hat.norm(dim=1)
        overlap = (x * x_hat).sum(1)
        # A zero reconstruction has cosine 0; a zero x has none and leaves the mean.
        cosine = overlap / torch.where((x_norm > 0) & (hat_norm > 0), x_norm * hat_norm, 1.0)
        scalars = {
            "residual": (x - x_hat).square().sum(),
            "output_energy": hat_norm.square().sum(),
            "overlap": overlap.sum(),
            "cosine": cosine.sum(),
            "nonzero": (x_norm > 0).sum(),
            "l1": f.abs().sum(dtype=torch.float32),
        }
        numbers = [scalars[name].float() for name in _SCALARS] + [(x - mean).square().sum()]
        packed = torch.cat([torch.stack(numbers), mean, fired]).cpu().double()
        totals, mean, fired = packed.split([len(numbers), self.d_in, self.d_sae])
        *sums, deviation = totals.tolist()
        self._add(len(x), mean, deviation, dict(zip(_SCALARS, sums, strict=True)), fired.long())

    def merge(self, other: Reconstruction) -> None:
        """Add the rows another accumulator has seen."""
        if (self.d_in, self.d_sae) != (other.d_in, other.d_sae):
            raise UserError(
                f"cannot merge sums of a {other.d_in} -> {other.d_sae} dictionary into those of a "
                f"{self.d_in} -> {self.d_sae} one: merge only evaluations of the same dictionary"
            )
        if other.rows:
            self._add(other.rows, other._mean, other._deviation, other._sums, other.firing_counts)

    def _add(self, rows: int, mean: Tensor, deviation: float, sums: Mapping[str, float], fired: Tensor) -> None:
        """Join two sets of rows. Deviations are kept around each set's own mean and joined by Chan, Golub, LeVeque
        (1979), so that a mean far from zero costs no digits, whatever the first batch looked like."""
        total = self.rows + rows
        shift = mean - self._mean
        self._deviation += deviation + shift.square().sum().item() * self.rows * rows / total
        self._mean = self._mean + shift * (rows / total)
        self.rows = total
        self._sums = {name: value + sums[name] for name, value in self._sums.items()}
        self.firing_counts = self.firing_counts + fired

    def result(self) -> dict[str, float | int | None]:
        """The metrics, unrounded and unclipped; None where a ratio has no meaning or the dictionary diverged.

        fvu            sum ||x - x_hat||^2 / sum ||x - mean x||^2, mean over all rows (1 - explained variance; the mean
                       predictor scores 1, worse ones more; denominator 0: None)
        mse            (1/N d_in) sum ||x - x_hat||^2: mean over rows and dims
        l0             (1/N) sum #{i : f_i != 0}
        l1             (1/N) sum ||f||_1
        cosine         mean of cos(x, x_hat) over the rows with x != 0; a zero x_hat counts as 0
        relative_bias  sum ||x_hat||^2 / sum x.x_hat; below 1 where the reconstruction shrinks (arXiv 2404.16014 eq. 10)
        dead           latents active in no row; dead_fraction = dead / d_sae
        rows           N
        """
        sums, rows = self._sums, self.rows
        dead = int((self.firing_counts == 0).sum())
        return {
            "fvu": ratio(sums["residual"], self._deviation),
            "mse": ratio(sums["residual"], rows * self.d_in),
            "l0": ratio(float(self.firing_counts.sum()), rows),
            "l1": ratio(sums["l1"], rows),
            "cosine": ratio(sums["cosine"], sums["nonzero"]),
            "relative_bias": ratio(sums["output_energy"], sums["overlap"]),
            "dead": dead,
            "dead_fraction": dead / self.d_sae,
            "rows": rows,
        }

    def density_histogram(self, edges: Sequence[float] | Tensor = LOG10_EDGES) -> Histogram:
        """The histogram of log10 firing frequencies: see the function of this name."""
        return density_histogram(self.firing_counts, self.rows, edges)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """The mean of all rows in float64: what mean ablation puts in."""
        return self._mean.clone()


def ratio(numerator: float, denominator: float) -> float | None:
    """numerator / denominator, or None where that is no finite number (JSON knows neither inf nor nan)."""
    if denominator == 0:
        return None
    value = numerator / denominator
    return value if math.isfinite(value) else None


def evaluate_reconstruction(
    dictionary: Dictionary, batches: Iterable[Rows], device: torch.device | str | None = None
) -> Reconstruction:
    """Run one dictionary over batches of activations; see `evaluate_reconstructions`."""
    return evaluate_reconstructions({"": dictionary}, batches, device)[""]


@torch.no_grad()
def evaluate_reconstructions(
    dictionaries: Mapping[str, Dictionary],
    batches: Iterable[Rows],
    device: torch.device | str | None = None,
) -> dict[str, Reconstruction]:
    """Run many dictionaries over the same activations in one pass: each batch is made, read and moved once.

    A `device` moves the dictionaries there; without one each is used where it is. Rows go through in pieces that keep
    the codes at 4 MiB on a CPU (in cache) and 256 MiB elsewhere, whatever the batch size. Codes must depend on their
    own row alone. Raises UserError when there are no rows.
    """
    if device is not None:
        dictionaries = {name: one.to(device) for name, one in dictionaries.items()}
    sums = {name: Reconstruction(one.d_out, one.d_sae) for name, one in dictionaries.items()}
    rows = 0
    for batch in batches:
        inputs, targets = (batch, batch) if isinstance(batch, Tensor) else batch
        rows += len(inputs)
        placed: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for name, one in dictionaries.items():
            where = one.atoms.device
            if where not in placed:
                placed[where] = inputs.to(where).float(), targets.to(where).float()
            piece = max(1, (2**20 if where.type == "cpu" else 2**26) // one.d_sae)
            for x, target in zip(*(part.split(piece) for part in placed[where]), strict=True):
                x = x.to(one.atoms.dtype)
                f = one.encode(x)
                sums[name].update(target, f, one.decode(f, x))
    if not rows:
        raise UserError("there are no activations to evaluate on: the evaluation set gave 0 rows")
    return sums


@torch.no_grad()
def fvu_by_part(
    dictionary: Dictionary, batches: Iterable[Float[Tensor, "B d_in"]], widths: Sequence[int]
) -> list[float | None]:
    """FVU at each of several sites that lie side by side in the rows (crosscoders)."""
    sums = [Reconstruction(width, 1) for width in widths]
    for x in batches:
        pieces = zip(sums, x.split(list(widths), 1), dictionary(x).split(list(widths), 1), strict=True)
        for one, part, part_hat in pieces:
            one.update(part, part.new_zeros(len(part), 1), part_hat)
    return [one.result()["fvu"] for one in sums]


def density_histogram(
    counts: Int[Tensor, " d_sae"], rows: int, edges: Sequence[float] | Tensor = LOG10_EDGES
) -> Histogram:
    """How many latents fire how often: bins of log10(counts / rows) between ascending `edges`, and those that never do.

    A bin holds its lower edge, the last one both; what lies outside the edges goes to the nearest bin, so that the sum
    of `counts` and `never_fired` is d_sae. Log feature density as in Bricken et al. (2023).
    """
    if rows < 1:
        raise UserError(f"a density needs rows, but {rows} were seen: evaluate the dictionary first")
    fired = counts[counts > 0].cpu().double()
    bounds = torch.as_tensor(edges, dtype=torch.float64)
    bins = torch.bucketize((fired / rows).log10(), bounds, right=True) - 1
    found = torch.bincount(bins.clamp(0, len(bounds) - 2), minlength=len(bounds) - 1)
    return {
        "log10_edges": bounds.tolist(),
        "counts": found.tolist(),
        "never_fired": int((counts == 0).sum()),
    }
