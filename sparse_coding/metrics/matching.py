"""How well the atoms of one dictionary are found among those of another, or among the true directions.

All of it rests on cosines between rows. A row without a direction (norm zero, as of a dead latent, or not finite, as of
a dictionary that diverged) matches nothing: as an atom it is left out, as a reference its cosine is 0, and it stays in
every denominator. Cosines are computed in float32, or float64 where an input is float64, and never clipped.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.errors import UserError

CHUNK = 1024
"""Reference rows per product: 1,024 rows against 16,384 atoms take 64 MiB."""


def max_cosines(
    reference: Float[Tensor, "G d"], atoms: Float[Tensor, "n d"], chunk: int = CHUNK, absolute: bool = False
) -> Float[Tensor, " G"]:
    """m_i = max_j cos(reference_i, atoms_j), the signed cosine; with `absolute` max_j |cos|.

    The maximum over the dictionary for each true feature: Sharkey, Braun, Millidge (2022), and arXiv 2309.08600.
    `chunk` reference rows at a time, so that no G x n table is ever held. 0 where no atom has a direction.
    """
    return _best(reference, atoms, chunk, absolute)[0]


def mmcs(reference: Float[Tensor, "G d"], atoms: Float[Tensor, "n d"], chunk: int = CHUNK) -> float:
    """Mean max cosine similarity, (1/G) sum_i max_j cos(reference_i, atoms_j), signed.

    Truth as the reference asks which features were found (Sharkey et al. 2022: the mean over true features); the
    learned atoms as the reference ask which atoms are features. The two differ.
    """
    return max_cosines(reference, atoms, chunk).cpu().double().mean().item()


def mmcs_with_larger(small: Float[Tensor, "n d"], large: Float[Tensor, "m d"], chunk: int = CHUNK) -> float:
    """(1/n) sum_i max_j cos(small_i, large_j), n <= m: the mean over the SMALLER dictionary's atoms, signed.

    The measure that needs no truth: features both sizes find should be real (Sharkey et al. 2022, figure 10).
    """
    if len(small) > len(large):
        raise UserError(
            f"the smaller dictionary has {len(small)} atoms and the larger {len(large)}: the mean runs over the "
            "smaller one's atoms, so swap them"
        )
    return mmcs(small, large, chunk)


def fraction_above(cosines: Float[Tensor, " G"], threshold: float = 0.9) -> float:
    """|{i : m_i > threshold}| / G, of the maxima that `max_cosines` returns (0.9: the 2023 replication)."""
    return (cosines > threshold).sum().item() / len(cosines)


def mcc(reference: Float[Tensor, "G d"], atoms: Float[Tensor, "n d"], absolute: bool = True) -> float:
    """Mean correlation coefficient: the most that one-to-one pairs P can reach of (1/|P|) sum_{(i,j) in P} |cos(i, j)|.

    Hungarian matching with |P| = min(G, n) pairs (arXiv 2505.20254 and 2602.14687); signed cosines if not `absolute`.
    Unlike MMCS it pays nothing for a second copy of a feature. Exact, so it holds the G x n table in float64 and takes
    on one core about 0.4 s for 512 x 16,384 and 2 s for 4,096 x 4,096; the worst case grows with min(G, n)^2 max(G, n).
    """
    from scipy.optimize import linear_sum_assignment

    (reference, _), (atoms, _) = _directions(reference, atoms)
    cosines = reference @ atoms.T
    table = (cosines.abs() if absolute else cosines).cpu().double().numpy()
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].mean())


def uniqueness(
    reference: Float[Tensor, "G d"], atoms: Float[Tensor, "n d"], chunk: int = CHUNK, absolute: bool = True
) -> float:
    """|{argmax_i |cos(reference_i, atoms_j)| : j}| / n: distinct best matches over the number of atoms.

    From SynthSAEBench (arXiv 2602.14687). 1 when every atom is nearest to a feature of its own; at most G/n.
    1 - uniqueness is the share of duplicates. An atom without a direction has no best match.
    """
    _, best = _best(atoms, reference, chunk, absolute)
    return len(best[best >= 0].unique()) / len(atoms)


def _directions(
    *dictionaries: Float[Tensor, "_ d"],
) -> list[tuple[Float[Tensor, "_ d"], Bool[Tensor, " _"]]]:
    """For each: its unit rows, and which of them have a direction (the others are zero). All come in one dtype, float32
    at least, on the device of the first."""
    dtype = torch.float32
    for rows in dictionaries:
        if rows.ndim != 2 or not len(rows):
            raise UserError(
                f"a dictionary of shape {tuple(rows.shape)} was given: it must be [atoms, width], one atom or more"
            )
        dtype = torch.promote_types(dtype, rows.dtype)
    found = []
    for rows in dictionaries:
        rows = rows.detach().to(dictionaries[0].device, dtype)
        norms = rows.norm(dim=1)
        valid = (norms > 0) & norms.isfinite()
        unit = rows / torch.where(valid, norms, 1.0)[:, None]
        found.append((unit.masked_fill(~valid[:, None], 0.0), valid))
    return found


def _best(
    reference: Float[Tensor, "G d"], atoms: Float[Tensor, "n d"], chunk: int, absolute: bool
) -> tuple[Float[Tensor, " G"], Int[Tensor, " G"]]:
    """The best cosine of each reference row and the index of that atom; (0, -1) where there is no direction."""
    (reference, reference_valid), (atoms, atom_valid) = _directions(reference, atoms)
    indices, candidates = atom_valid.nonzero()[:, 0], atoms[atom_valid].T
    cosines = reference.new_zeros(len(reference))
    best = torch.full_like(cosines, -1, dtype=torch.long)
    if not len(indices):
        return cosines, best
    for start in range(0, len(reference), chunk):
        part = slice(start, start + chunk)
        table = reference[part] @ candidates
        found = (table.abs_() if absolute else table).max(dim=1)
        cosines[part], best[part] = found.values, indices[found.indices]
    cosines[~reference_valid] = 0.0
    best[~reference_valid] = -1
    return cosines, best
