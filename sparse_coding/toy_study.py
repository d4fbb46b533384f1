"""The measurements of the toy study: dictionaries against the known truth, and the controls to read them beside."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch

from sparse_coding.dictionaries import Dictionary
from sparse_coding.dictionaries.baselines import BASELINES, oracle
from sparse_coding.metrics.matching import fraction_above, max_cosines, mcc, uniqueness
from sparse_coding.metrics.reconstruction import Reconstruction, evaluate_reconstruction
from sparse_coding.synthetic import World, WorldStream, chance_mmcs, collapse_l1, expected_dead, mmcs_ceiling

PUBLISHED_SAMPLES = 2560
"""The 2023 code counted dead latents on 10 batches of 256 samples."""
BASELINE_ROWS = 20_000


def held_out(world: World, samples: int, batch_size: int) -> list[torch.Tensor]:
    """Noise-free activations that no training step sees, as batches."""
    stream = WorldStream(world, batch_size, split="held-out", noisy=False)
    return [stream.batch(step)["synthetic"] for step in range(-(-samples // batch_size))]


def against_truth(dictionary: Dictionary, world: World) -> dict[str, Any]:
    """How well the atoms match the true directions.

    `mmcs` is the published definition: for each TRUE feature the largest signed cosine to any atom, averaged over the
    features. `mcc` matches one to one (Hungarian, |cos|); `uniqueness` is the share of atoms with a match of their own.
    """
    cosines = max_cosines(world.directions, dictionary.atoms)
    return {
        "mmcs": cosines.mean().item(),
        "fraction_above_0.9": fraction_above(cosines, 0.9),
        "mmcs_dict_to_truth": max_cosines(dictionary.atoms, world.directions).mean().item(),
        "mcc": mcc(world.directions, dictionary.atoms),
        "uniqueness": uniqueness(world.directions, dictionary.atoms),
        "max_cosines": cosines.tolist(),
    }


def measure(
    dictionary: Dictionary, world: World, batches: Sequence[torch.Tensor]
) -> tuple[Reconstruction, dict[str, Any]]:
    """Reconstruction on all held-out batches, the published dead count on the first 2,560 rows, and the match."""
    few = max(1, PUBLISHED_SAMPLES // len(batches[0]))
    first = evaluate_reconstruction(dictionary, batches[:few])
    published = first.result()["dead"]
    if len(batches) > few:
        first.merge(evaluate_reconstruction(dictionary, batches[few:]))
    return first, {**against_truth(dictionary, world), "dead_published": published}


def controls(world: World, ratios: Sequence[float], batches: Sequence[torch.Tensor], seed: int) -> dict[str, Any]:
    """What chance, the geometry, theory and simpler methods give: drawn into every picture."""
    settings = world.settings
    n_samples = sum(len(x) for x in batches)
    chance = {ratio: chance_mmcs(max(1, round(ratio * settings.n_features)), settings.d_in) for ratio in ratios}
    stream = WorldStream(world, len(batches[0]), split="held-out", noisy=False)
    some = [stream.batch_with_truth(step) for step in range(min(len(batches), 40))]
    l0_true = sum(len(batch.values) for batch in some) / sum(len(batch.x) for batch in some)
    square = sum(x.square().sum().item() for x in batches) / sum(x.numel() for x in batches)
    return {
        "chance_mmcs": {f"{ratio:g}": value for ratio, value in chance.items()},
        "ceiling": {f"{ratio:g}": mmcs_ceiling(ratio, chance[ratio]) for ratio in ratios},
        "collapse_l1": {f"{ratio:g}": collapse_l1(ratio, settings.d_in, settings.n_features) for ratio in ratios},
        "expected_dead": expected_dead(world, n_samples, len(batches[0])),
        "expected_dead_published": expected_dead(world, PUBLISHED_SAMPLES),
        "l0_true": l0_true,
        "data_mean_square": square,
        "n_samples": n_samples,
        "baselines": baselines(world, batches, seed),
    }


def baselines(world: World, batches: Sequence[torch.Tensor], seed: int) -> dict[str, dict[str, Any]]:
    """Random, PCA, ICA, ... and the true dictionary with a ReLU encoder, as many atoms as features where they can."""
    generator = torch.Generator().manual_seed(seed)
    stream = WorldStream(world, len(batches[0]))
    rows = torch.cat([stream.batch(step)["synthetic"] for step in range(-(-BASELINE_ROWS // stream.batch_size))])
    fitted = {name: fit(rows, world.settings.n_features, generator) for name, fit in BASELINES.items()}
    fitted["oracle"] = oracle(world.directions, rows)
    found = {}
    for name, dictionary in fitted.items():
        result = evaluate_reconstruction(dictionary, list(islice(batches, 20))).result()
        match = {key: value for key, value in against_truth(dictionary, world).items() if key != "max_cosines"}
        found[name] = {"n_atoms": dictionary.d_sae, **result, **match}
    return found
