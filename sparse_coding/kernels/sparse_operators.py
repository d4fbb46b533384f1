"""The sparse step in torch's own operators: slower than C++ by half, and everywhere at hand.

Rows of weights are summed with `embedding_bag`: over the entries of a row to decode, and over the rows of a latent, by
one sort of the entries, for the gradients of its encoder column and its atom. No atomic adds, nothing of size [B k d].
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

if TYPE_CHECKING:
    from sparse_coding.kernels.sparse import SparseProblem, SparseResult


class Entries(NamedTuple):
    """Active entries, row by row of all members: member * B + row, and member * d_sae + latent."""

    row: Int[Tensor, " A"]
    latent: Int[Tensor, " A"]
    f: Float[Tensor, " A"]


def step(problem: SparseProblem, left: Tensor, dtype: torch.dtype, densest: float) -> SparseResult:
    """See `sparse.sparse_step`. `left` `[M]` marks members to leave out; others are added."""
    from sparse_coding.kernels.sparse import SparseResult

    n_members, n_rows, d_in, _, d_sae = problem.sizes
    shift = problem.b_dec.unsqueeze(1) if problem.subtracts and problem.b_dec is not None else 0.0
    inputs = (problem.x - shift).expand(n_members, n_rows, d_in)
    encoder = problem.W_dec.mT if problem.W_enc is None else problem.W_enc
    # in bf16 the bias would be lost and scores would tie: many more than k would be kept
    pre = torch.bmm(inputs.to(dtype), encoder.to(dtype)).float().add_(problem.b_enc.unsqueeze(1))
    kept, smallest = selected(problem, pre)
    left |= kept.sum((1, 2)) > densest * kept[0].numel()
    kept &= ~left.view(-1, 1, 1)
    entries = listed(kept, pre)
    inside = torch.zeros_like(entries.f, dtype=torch.bool)
    if problem.threshold is not None:
        distance = entries.f - problem.threshold.flatten()[entries.latent]
        if problem.window is not None:
            inside = distance.abs() < problem.window[entries.row // n_rows] / 2
        entries = entries._replace(f=torch.where(distance > 0, entries.f, 0.0))

    prefix, n_ends = prefix_of(problem, entries), len(problem.prefixes)
    errors, squared_error, sizes, d_x_hat = reconstructed(problem, entries, prefix)
    d_f = slopes(problem.W_dec, d_x_hat, entries, prefix)
    slope = d_f if problem.penalty is None else d_f + problem.penalty[entries.row // n_rows]
    slope = torch.where(entries.f != 0, slope, 0.0)
    lists, auxk = [(entries, entries.row * n_ends + prefix, slope)], torch.zeros(n_members)
    gradients_of_rows = d_x_hat.flatten(0, 2)
    if problem.dead is not None:
        revived, auxk, d_fit = revival(problem, pre, errors[:, :, -1])
        source = len(gradients_of_rows) + revived.row
        lists.append((revived, source, slopes(problem.W_dec, d_fit.unsqueeze(2), revived, 0)))
        gradients_of_rows = torch.cat([gradients_of_rows, d_fit.flatten(0, 1)])
    gradients = weight_gradients(problem, lists, gradients_of_rows, inputs.flatten(0, 1))
    if problem.b_dec is not None:
        gradients["b_dec"] = d_x_hat[:, :, 0].sum(1)
        if problem.subtracts:
            gradients["b_dec"] -= torch.bmm(encoder, gradients["b_enc"].unsqueeze(2)).squeeze(2)

    def per_latent(values: Tensor) -> Tensor:
        return torch.bincount(entries.latent, values, minlength=n_members * d_sae).view(n_members, d_sae).float()

    return SparseResult(
        gradients,
        sizes.sum(1),
        squared_error.sum(1),
        auxk,
        torch.bincount(entries.row // n_rows, entries.f.abs().double(), minlength=n_members).float(),
        per_latent((entries.f != 0).float()),
        smallest,
        None if problem.window is None else per_latent(torch.where(inside, d_f, 0.0)),
        None if problem.window is None else per_latent(inside.float()),
        left,
    )


def selected(
    problem: SparseProblem, pre: Float[Tensor, "M B d_sae"]
) -> tuple[Bool[Tensor, "M B d_sae"], Float[Tensor, " M"] | None]:
    """(which entries take part, the smallest score among them where the batch chooses)."""
    if problem.rule == "above":
        if problem.threshold is None:
            return ~(pre <= 0), None
        distance = pre - problem.threshold.unsqueeze(1)
        near = 0.0 if problem.window is None else problem.window.view(-1, 1, 1) / 2
        return (distance > 0) | (distance.abs() < near), None
    scores = pre if problem.norms is None else pre * problem.norms.unsqueeze(1)
    scores = scores.abs() if problem.signed else scores
    positive = pre != 0 if problem.signed else ~(pre <= 0)
    k = problem.k
    assert k is not None
    if problem.rule == "topk":
        index = scores.topk(int(k.max()), dim=-1).indices
        within = torch.arange(index.shape[-1], device=k.device) < k.view(-1, 1, 1)
        return torch.zeros_like(positive).scatter_(-1, index, within.expand_as(index)) & positive, None
    best = scores.flatten(1).topk(int(k.max()), dim=-1).values
    last = best.gather(1, k.unsqueeze(1) - 1).unsqueeze(2)
    kept = ~(scores < last) & positive
    return kept, torch.where(kept, scores, torch.inf).flatten(1).amin(1).float()


def listed(kept: Bool[Tensor, "M B d_sae"], values: Float[Tensor, "M B d_sae"]) -> Entries:
    _, n_rows, d_sae = kept.shape
    row, latent = kept.flatten(0, 1).nonzero().unbind(1)
    return Entries(row, row // n_rows * d_sae + latent, values.flatten(0, 1)[row, latent].float())


def prefix_of(problem: SparseProblem, entries: Entries) -> Tensor:
    """The prefix in which each entry's latent enters."""
    ends = torch.tensor(problem.prefixes, device=entries.latent.device)
    return torch.bucketize(entries.latent % problem.W_dec.shape[1], ends, right=True)


def bags(ids: Int[Tensor, " A"], count: int) -> Int[Tensor, " count"]:
    """Where each of `count` runs of equal ids begins in a sorted list."""
    sizes = torch.bincount(ids, minlength=count)
    return sizes.cumsum(0) - sizes


def reconstructed(
    problem: SparseProblem, entries: Entries, prefix: Int[Tensor, " A"]
) -> tuple[
    Float[Tensor, "M B n_ends d_out"],
    Float[Tensor, "M B"],
    Float[Tensor, "M B n_ends"],
    Float[Tensor, "M B n_ends d_out"],
]:
    """(x_hat - target, the squared error of the whole, the errors, d loss / d what each prefix adds to x_hat)."""
    n_members, n_rows, _, d_out, _ = problem.sizes
    n_ends = len(problem.prefixes)
    atoms = problem.W_dec.flatten(0, 1)
    starts = bags(entries.row * n_ends + prefix, n_members * n_rows * n_ends)
    parts = embedding_bag(entries.latent, atoms, starts, mode="sum", per_sample_weights=entries.f)
    errors = parts.view(n_members, n_rows, n_ends, d_out).cumsum(2)
    if problem.b_dec is not None:
        errors += problem.b_dec.view(n_members, 1, 1, d_out)
    errors -= problem.target.view(1, n_rows, 1, d_out)
    squared = errors.square().sum(-1)
    if problem.norm_error:
        sizes = squared.sqrt()
        gradient = errors * torch.where(sizes > 0, problem.error_weight / sizes, 0.0).unsqueeze(-1)
    else:
        sizes = squared
        gradient = errors * (2 * problem.error_weight)
    if n_ends > 1:  # what a prefix adds is in all longer ones
        gradient = gradient.flip(2).cumsum(2).flip(2)
    return errors, squared[:, :, -1], sizes, gradient


def slopes(
    W_dec: Float[Tensor, "M d_sae d_out"],
    gradient: Float[Tensor, "M B G d_out"],
    entries: Entries,
    prefix: Tensor | int,
) -> Float[Tensor, " A"]:
    """d loss / d f of each entry: its atom times the gradient of x_hat."""
    bag = entries.row * gradient.shape[2] + prefix
    starts = bags(bag, gradient[..., 0].numel())
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient.reshape(-1, gradient.shape[-1]), W_dec.flatten(0, 1), entries.latent, starts, bag, 0, -1
    )


def revival(
    problem: SparseProblem, pre: Float[Tensor, "M B d_sae"], left: Float[Tensor, "M B d_out"]
) -> tuple[Entries, Float[Tensor, " M"], Float[Tensor, "M B d_out"]]:
    """AuxK: its entries, its squared distance summed over rows, and d loss / d e_hat."""
    dead = problem.dead
    assert dead is not None
    assert problem.aux_weight is not None
    scores = pre if problem.norms is None else pre * problem.norms.unsqueeze(1)
    scores = torch.where(dead.unsqueeze(1), scores.abs() if problem.signed else scores, -torch.inf)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(-1, scores.topk(problem.k_aux, dim=-1).indices, True)
    entries = listed(chosen & dead.unsqueeze(1) & (pre != 0 if problem.signed else ~(pre <= 0)), pre)
    fit = embedding_bag(
        entries.latent, problem.W_dec.flatten(0, 1), bags(entries.row, left[..., 0].numel()), mode="sum",
        per_sample_weights=entries.f,
    )  # fmt: skip
    fit = fit.view_as(left) + left
    distance = fit.square().sum((1, 2))
    return entries, distance * dead.any(1), fit * (2 * problem.aux_weight).view(-1, 1, 1)


def weight_gradients(
    problem: SparseProblem,
    lists: list[tuple[Entries, Tensor, Tensor]],
    gradients_of_rows: Float[Tensor, "n d_out"],
    inputs: Float[Tensor, "MB d_in"],
) -> dict[str, Tensor]:
    """Of W_enc, b_enc and W_dec, sums over the rows of each latent: f times what x_hat learns, slope times the input.

    `lists`: entries, which of `gradients_of_rows` each meets, d loss / d pre of each.
    """
    n_members, _, d_in, _, d_sae = problem.sizes
    entries = Entries(*(torch.cat(parts) for parts in zip(*(one for one, _, _ in lists), strict=True)))
    source, slope = torch.cat([one for _, one, _ in lists]), torch.cat([one for _, _, one in lists])
    order = entries.latent.argsort(stable=True)
    starts = bags(entries.latent, n_members * d_sae)
    atoms = embedding_bag(source[order], gradients_of_rows, starts, mode="sum", per_sample_weights=entries.f[order])
    columns = embedding_bag(entries.row[order], inputs, starts, mode="sum", per_sample_weights=slope[order])
    d_W_dec, d_columns = atoms.view_as(problem.W_dec), columns.view(n_members, d_sae, d_in)
    d_b_enc = torch.bincount(entries.latent, slope, minlength=n_members * d_sae).view(n_members, d_sae).float()
    if problem.W_enc is None:
        return {"b_enc": d_b_enc, "W_dec": d_W_dec + d_columns}
    return {"W_enc": d_columns.mT, "b_enc": d_b_enc, "W_dec": d_W_dec}
