"""Controls: dictionaries that were not trained by sparse coding, behind the same interface.

All have unit atoms, so that L1 and matching compare with trained dictionaries. Where a direction may carry either sign
(identity, PCA, ICA) it becomes two atoms, +v and -v, since codes are never negative. Fits run on the CPU in float64 or
float32 and never touch their input; dictionaries come back in float32 on the device of the data they were fitted to.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.dictionaries.base import Dictionary, unit_rows
from sparse_coding.errors import UserError

_NEGLIGIBLE = 1e-10
"""Directions with less than this share of the largest variance are rounding, not data."""


@final
class FixedReLU(Dictionary):
    """f = relu((x - b_dec) W_enc + b_enc), x_hat = f W_dec + b_dec, with given weights."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def __init__(self, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> None:
        super().__init__()
        for name, value in (("W_enc", W_enc), ("b_enc", b_enc), ("W_dec", W_dec), ("b_dec", b_dec)):
            self.register_buffer(name, value.detach().float().contiguous())

    @property
    def atoms(self) -> Float[Tensor, "d_sae d_in"]:
        return self.W_dec

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        return torch.relu((x - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, f: Float[Tensor, "... B d_sae"], x: Tensor | None = None) -> Float[Tensor, "... B d_in"]:
        return f @ self.W_dec + self.b_dec


@final
class NMF(Dictionary):
    """x_hat = f W_dec + b_dec with f >= 0 the best such codes: argmin_f ||x - b_dec - f W_dec||^2."""

    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def __init__(self, W_dec: Tensor, b_dec: Tensor, iterations: int = 100) -> None:
        super().__init__()
        self.register_buffer("W_dec", W_dec.detach().float().contiguous())
        self.register_buffer("b_dec", b_dec.detach().float().contiguous())
        self.iterations = iterations
        self._largest = torch.linalg.matrix_norm(W_dec.detach().double().cpu(), 2).square().item()

    @property
    def atoms(self) -> Float[Tensor, "d_sae d_in"]:
        return self.W_dec

    def encode(self, x: Float[Tensor, "... B d_in"]) -> Float[Tensor, "... B d_sae"]:
        """Accelerated projected gradient (FISTA, Beck and Teboulle 2009, with f >= 0 in place of the shrinkage).

        Unlike the multiplicative updates of the fit it reaches exact zeros, so that L0 means something.
        """
        y = x - self.b_dec
        f = y.new_zeros(*y.shape[:-1], self.d_sae)
        if not self._largest:
            return f
        ahead, momentum = f, 1.0
        for _ in range(self.iterations):
            following = torch.relu(ahead - (ahead @ self.W_dec - y) @ self.W_dec.mT / self._largest)
            grown = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
            ahead = following + (momentum - 1) / grown * (following - f)
            f, momentum = following, grown
        return f

    def decode(self, f: Float[Tensor, "... B d_sae"], x: Tensor | None = None) -> Float[Tensor, "... B d_in"]:
        return f @ self.W_dec + self.b_dec


def random_dictionary(x: Float[Tensor, "N d_in"], n_atoms: int, generator: torch.Generator) -> FixedReLU:
    """`n_atoms` directions drawn uniformly from the sphere, tied: f = g relu((x - mean) W^T), x_hat = f W + mean.

    The one gain g is the least-squares fit on x, as without it x_hat is about n/(2 d_in) times too long.
    """
    _check("n_atoms", n_atoms)
    rows = _sample(x)
    atoms = unit_rows(torch.randn(n_atoms, rows.shape[1], generator=generator))
    mean = rows.mean(0)
    gain, _ = _gain((_spread(rows) - mean).float() @ atoms.T, atoms)
    return FixedReLU(gain * atoms.T, torch.zeros(n_atoms), atoms, mean).to(x.device)


def identity_relu(d_in: int) -> FixedReLU:
    """Atoms +e_i then -e_i, f = relu([x, -x]): the neuron basis itself, with exact reconstruction."""
    return _signed(torch.eye(d_in), torch.eye(d_in), torch.zeros(d_in))


def pca(x: Float[Tensor, "N d_in"], components: int) -> FixedReLU:
    """The leading principal directions of the centred data, each as +v and -v: 2 x `components` atoms, + first.

    All d_in of them reconstruct exactly. The sign of v is fixed by making its largest entry positive.
    """
    rows = _sample(x)
    _check("components", components, rows.shape[1])
    _, directions = _principal(rows)
    top = directions[:, :components]
    return _signed(top, top.T, rows.mean(0)).to(x.device)


def ica(
    x: Float[Tensor, "N d_in"],
    components: int,
    generator: torch.Generator,
    max_iterations: int = 200,
    tolerance: float = 1e-4,
) -> FixedReLU:
    """Independent components by parallel FastICA with the log cosh contrast (Hyvarinen and Oja 2000, eq. 40 and 45).

    Data is centred and whitened in its leading `components` principal directions (fewer if its rank is smaller). An
    atom is a column of the MIXING matrix in data space, what one unit of the source adds to x, not a row of the
    unmixing matrix; each comes as + and -, so there are twice as many atoms as components, + first.
    Warns when it stops at `max_iterations`, as it does on data with Gaussian directions. Time: N d_in^2 per iteration.
    """
    rows = _sample(x)
    _check("components", components, rows.shape[1])
    mean = rows.mean(0)
    variances, directions = _principal(rows)
    kept = min(components, int((variances > _NEGLIGIBLE * variances[0]).sum()))
    if not kept:
        raise UserError("ICA needs activations that vary: all rows are equal")
    scales, directions = variances[:kept].sqrt(), directions[:, :kept]
    white = ((rows - mean) @ directions / scales).float()
    rotation = _orthogonal(torch.randn(kept, kept, generator=generator))
    for _ in range(max_iterations):
        contrast = torch.tanh(white @ rotation.T)
        slope = 1 - contrast.square().mean(0)
        updated = _orthogonal(contrast.T @ white / len(white) - slope[:, None] * rotation)
        change = ((updated * rotation).sum(1).abs() - 1).abs().max()
        rotation = updated
        if change < tolerance:
            break
    else:
        warnings.warn(f"ICA did not converge in {max_iterations} iterations: its atoms are approximate", stacklevel=2)
    rotation = _orthogonal(rotation.double())
    mixing = (rotation * scales) @ directions.T  # x - mean = sources @ mixing
    lengths = mixing.norm(dim=1)
    unmixing = (directions / scales) @ rotation.T
    return _signed(unmixing * lengths, mixing / lengths[:, None], mean).to(x.device)


def nmf(x: Float[Tensor, "N d_in"], n_atoms: int, generator: torch.Generator, iterations: int = 200) -> NMF:
    """Non-negative matrix factorisation of x - b_dec by multiplicative updates for the squared error (Lee, Seung 2001).

    b_dec is the negative part of each dimension's minimum, so that data without negative values is factorised as it is.
    Fitted to 4,096 rows of x at most, evenly spread; time 12 N n_atoms d_in per iteration.
    """
    _check("n_atoms", n_atoms)
    rows = _sample(x)
    shift = rows.amin(0).clamp_max(0.0)
    y = _spread(rows) - shift
    y = (y / y.mean().clamp_min(torch.finfo(y.dtype).tiny)).float()  # only the atoms' directions are kept
    codes = torch.rand(len(y), n_atoms, generator=generator) / n_atoms**0.5
    atoms = torch.rand(n_atoms, y.shape[1], generator=generator) / n_atoms**0.5
    floor = 1e-10  # far below any product of data whose mean is 1
    for _ in range(iterations):
        codes *= (y @ atoms.T) / (codes @ atoms @ atoms.T).clamp_min(floor)
        atoms *= (codes.T @ y) / (codes.T @ (codes @ atoms)).clamp_min(floor)
        for factor in (codes, atoms):  # what shrinks for ever would become denormal numbers, which are very slow
            torch.threshold_(factor, 1e-15, 0.0)
    return NMF(unit_rows(atoms), shift).to(x.device)


def oracle(directions: Float[Tensor, "G d_in"], x: Float[Tensor, "N d_in"]) -> FixedReLU:
    """The true directions W with a plain ReLU encoder: f = g relu(x W^T - t), x_hat = f W.

    The threshold t keeps out interference between directions; t (one number) and the gain g are those of least squared
    error on x (4,096 evenly spread rows at most): t by a grid search refined twice, g in closed form.
    """
    atoms = unit_rows(directions.detach().cpu().float())
    projections = _spread(_sample(x)).float() @ atoms.T
    low, high = 0.0, projections.max().clamp_min(0.0).item()
    best = (0.0, *_gain(projections, atoms))  # threshold, gain, energy explained
    for _ in range(3):
        thresholds = torch.linspace(low, high, 17)[:-1].tolist()
        tried = [(threshold, *_gain(projections, atoms, threshold)) for threshold in thresholds]
        best = max([best, *tried], key=lambda one: one[2])
        width = (high - low) / 16
        low, high = max(0.0, best[0] - width), best[0] + width
    threshold, gain, _ = best
    bias = torch.full((len(atoms),), -gain * threshold)
    return FixedReLU(gain * atoms.T, bias, atoms, torch.zeros(atoms.shape[1])).to(x.device)


BASELINES: dict[str, Callable[[Tensor, int, torch.Generator], Dictionary]] = {
    "random": random_dictionary,
    "identity-relu": lambda x, n_atoms, generator: identity_relu(x.shape[1]).to(x.device),
    "pca": lambda x, n_atoms, generator: pca(x, _pairs(x, n_atoms)),
    "ica": lambda x, n_atoms, generator: ica(x, _pairs(x, n_atoms), generator),
    "nmf": nmf,
}
"""Baselines from data alone: (x, n_atoms, generator) -> Dictionary. identity-relu always has 2 d_in atoms; pca and ica
have `n_atoms` (one less if odd), never more than the 2 d_in there are."""


def _pairs(x: Tensor, n_atoms: int) -> int:
    """How many +- pairs give about `n_atoms` atoms."""
    return min(max(1, n_atoms // 2), x.shape[1])


def _check(name: str, value: int, most: float = math.inf) -> None:
    if not 1 <= value <= most:
        raise UserError(f"{name} is {value}: it must be 1 or more" + (f", at most {most}" if most < math.inf else ""))


def _sample(x: Float[Tensor, "N d_in"]) -> Float[Tensor, "N d_in"]:
    """The data on the CPU in float64."""
    if x.ndim != 2 or not len(x):
        raise UserError(f"activations of shape {tuple(x.shape)} were given: a baseline is fitted to [rows, width]")
    rows = x.detach().cpu().double()
    if not rows.isfinite().all():
        raise UserError("the activations hold inf or nan: a baseline cannot be fitted to them")
    return rows


def _spread(rows: Float[Tensor, "N d_in"], most: int = 4096) -> Float[Tensor, "n d_in"]:
    """At most `most` rows, evenly spread over all."""
    return rows[torch.linspace(0, len(rows) - 1, min(most, len(rows)), dtype=torch.float64).round().long()]


def _gain(projections: Tensor, atoms: Tensor, threshold: float = 0.0) -> tuple[float, float]:
    """(g, energy) for f = relu(projections - threshold): the g that minimises ||x - g f W||^2, and by how much that
    lies below ||x||^2. <x, f W> = <x W^T, f>, so x itself is not needed."""
    f = torch.relu(projections - threshold)
    overlap, energy = (f * projections).sum().item(), (f @ atoms).square().sum().item()
    return (overlap / energy, overlap**2 / energy) if energy > 0 else (0.0, 0.0)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Variances, descending, and the directions (columns) that have them."""
    centred = rows - rows.mean(0)
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(rows))
    variances, directions = variances.flip(0).clamp_min(0.0), directions.flip(1)
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return variances, directions * signs


def _orthogonal(rows: Tensor) -> Tensor:
    """(W W^T)^(-1/2) W, the nearest orthogonal matrix, by the singular value decomposition."""
    left, _, right = torch.linalg.svd(rows)
    return left @ right


def _signed(encoder: Tensor, atoms: Tensor, mean: Tensor) -> FixedReLU:
    """Every direction as a pair: f = relu([s, -s]) with s = (x - mean) @ encoder, atoms [v, -v]."""
    both = torch.cat([encoder, -encoder], 1)
    return FixedReLU(both, torch.zeros(both.shape[1]), torch.cat([atoms, -atoms]), mean)
