"""Speed of the toy world's generator beside the dense method of 2023, in one run.

    python benchmarks/synthetic_speed.py [--threads 1] [--repeats 100] [--batch 256]

It writes benchmarks/results/synthetic_speed.md.

The dense method is written anew from its description: torch's multivariate normal is built (checked and factored) for
every batch, then three uniform numbers per (sample, feature) cell and a dense product. A second line keeps the factor
between batches, which the original did not. Methods take turns, five batches each, so that a busy machine slows all of
them alike; medians over the turns are shown, per batch. (The world's first line follows a dense one and
finds the caches cold; its second line, which does more, finds them warm.)
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparse_coding.provenance import provenance
from sparse_coding.synthetic import World, covariance_matrix, preset


def dense_batch(
    normal: MultivariateNormal, F: Tensor, decay: Tensor, k: float, batch_size: int
) -> tuple[Tensor, Tensor]:
    """One batch by the dense method: every cell of three [B G] tables is drawn; returns x and the codes."""
    G = len(F)
    u = torch.special.ndtr(normal.sample())
    p = u * decay
    p = p * (k / G) / p.mean()
    active = torch.rand(batch_size, G) <= p
    codes = torch.where(active, torch.rand(batch_size, G), torch.zeros(()))
    empty = (codes.count_nonzero(dim=1) == 0).nonzero()[:, 0]
    codes[empty, torch.randint(G, (len(empty),))] = 1.0
    codes = codes * torch.rand(batch_size, G)
    return codes @ F, codes


def time_interleaved(methods: dict[str, Callable[[int], object]], repeats: int, turn: int = 5) -> dict[str, float]:
    """Median seconds per batch of each method over `repeats` rounds of one turn each, after one round unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for round_ in range(repeats + 1):
        for name, method in methods.items():
            start = time.perf_counter()
            for step in range(round_ * turn, (round_ + 1) * turn):
                method(step)
            seconds[name].append((time.perf_counter() - start) / turn)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch (default 1)")
    parser.add_argument("--repeats", type=int, default=100, help="rounds that are measured (default 100)")
    parser.add_argument("--batch", type=int, default=256, help="rows per batch (default 256)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = preset("hoagy-2023-06")
    world = World(settings)
    per_sample = World(preset("hoagy-2023-06", probability_draw="per_sample"))
    C = covariance_matrix(settings).float()
    zero = torch.zeros(settings.n_features)
    kept = MultivariateNormal(zero, C)
    F, k = world.directions, settings.mean_active
    decay = settings.decay_rate ** torch.arange(settings.n_features)

    medians = time_interleaved(
        {
            "dense, as in 2023": lambda _: dense_batch(MultivariateNormal(zero, C), F, decay, k, args.batch),
            "dense, factor kept": lambda _: dense_batch(kept, F, decay, k, args.batch),
            "world, per batch": lambda step: world.batch(step, args.batch),
            "world, per batch + dense codes": lambda step: world.batch(step, args.batch).codes,
            "world, per sample": lambda step: per_sample.batch(step, args.batch),
        },
        args.repeats,
    )
    first, second = medians["dense, as in 2023"], medians["dense, factor kept"]
    facts = provenance()
    lines = [
        "Speed of the toy world's generator.",
        "",
        f"`python benchmarks/synthetic_speed.py`, {facts['date'][:10]}, torch {facts['versions']['torch']}, "
        f"{args.threads} CPU thread(s), G {settings.n_features}, d_in {settings.d_in}, batch {args.batch}, "
        f"medians of {args.repeats} interleaved turns.",
        "",
        "| method | ms per batch | times faster than 2023 | times faster, factor kept |",
        "|---|---|---|---|",
        *(f"| {name} | {1e3 * t:.3f} | {first / t:.1f} | {second / t:.1f} |" for name, t in medians.items()),
    ]
    print("\n".join(lines))
    (Path(__file__).parent / "results" / "synthetic_speed.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
