"""Metrics, one formula each: matching atoms with a truth, rebuilding activations, keeping a model's behaviour."""

from sparse_coding.metrics.behaviour import (
    behaviour,
    judged_positions,
    kl_sum,
    next_token_losses,
    reconstruct_with,
)
from sparse_coding.metrics.matching import fraction_above, max_cosines, mcc, mmcs, mmcs_with_larger, uniqueness
from sparse_coding.metrics.reconstruction import (
    Reconstruction,
    density_histogram,
    evaluate_reconstruction,
    evaluate_reconstructions,
)

__all__ = [
    "Reconstruction",
    "behaviour",
    "density_histogram",
    "evaluate_reconstruction",
    "evaluate_reconstructions",
    "fraction_above",
    "judged_positions",
    "kl_sum",
    "max_cosines",
    "mcc",
    "mmcs",
    "mmcs_with_larger",
    "next_token_losses",
    "reconstruct_with",
    "uniqueness",
]
