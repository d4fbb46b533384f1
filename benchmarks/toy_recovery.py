"""Recovery in the full geometry of 2023 (512 features in 256 dimensions), on the cells whose outcome is known.

    python benchmarks/toy_recovery.py        about 6 minutes on 2 CPU cores; writes benchmarks/results/toy_recovery.*

At ratio 1 and 4 the recovered band, its best cells and the collapse above it, all 20,000 steps of batch 256, Adam 1e-3,
single uniform magnitudes, probabilities per batch: the world hoagy-2023-07.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparse_coding import toy_study
from sparse_coding.dictionaries import ReLUSettings
from sparse_coding.provenance import provenance
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

CELLS = {1: (0.1, 0.3, 1.0), 4: (0.4, 1.2, 4.0)}
"""Ratio (latents per true feature) -> L1 coefficients."""
RESULTS = Path(__file__).parent / "results"


def members(world: World, seeds: list[int]) -> list[Member]:
    per_feature = world.settings.n_features / world.settings.d_in
    found = []
    for ratio, l1 in CELLS.items():
        found += grid(
            "relu", {"synthetic": world.settings.d_in}, [ratio * per_feature], seeds=seeds,
            varied={"l1_coefficient": l1}, l1_scaling="toy-2023", init="toy-2023", decoder_bias=False,
            remove_parallel_gradient=False,
        )  # fmt: skip
    return found


def l1_of(member: Member) -> float:
    assert isinstance(member.settings, ReLUSettings)
    return member.settings.l1_coefficient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    flags = parser.parse_args()
    world = World(preset("hoagy-2023-07"), flags.device)
    chosen = members(world, flags.seeds)
    trainer = Trainer(chosen, WorldStream(world, 256), TrainingSettings(flags.steps, log_every=1000), flags.device)
    began = time.perf_counter()
    trainer.fit()
    seconds = time.perf_counter() - began
    batches = toy_study.held_out(world, 100_000, 256)
    lines = [
        "| ratio | L1 | seed | MMCS | above .9 | L0 | dead of 100k samples | dead as published | FVU |",
        "|" + "---|" * 9,
    ]
    rows = []
    for index, member in enumerate(chosen):
        reconstruction, metrics = toy_study.measure(trainer.dictionary(index), world, batches)
        result = {**reconstruction.result(), **metrics}
        result.pop("max_cosines")
        ratio, l1 = member.settings.d_sae / world.settings.n_features, l1_of(member)
        rows.append({"ratio": ratio, "l1_coefficient": l1, "seed": member.seed, **result})
        lines.append(
            f"| {ratio:g} | {l1:g} | {member.seed} | {result['mmcs']:.3f} | {result['fraction_above_0.9']:.1%} | "
            f"{result['l0']:.2f} | {result['dead']} | {result['dead_published']} | {result['fvu']:.3f} |"
        )
    table = "\n".join(lines)
    facts = provenance()
    header = (
        f"Recovery in the full geometry: world hoagy-2023-07, {flags.steps:,} steps of 256 samples, Adam 1e-3, "
        f"{str(trainer.stacks[0].dtype).removeprefix('torch.')} products.\n\n"
        f"`python benchmarks/toy_recovery.py`, {facts['date'][:10]}, torch {facts['versions']['torch']}, "
        f"{facts['gpu'] or str(torch.get_num_threads()) + ' CPU threads'}, {seconds:.0f} s of training.\n\n"
    )
    print(header + table)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "toy_recovery.md").write_text(header + table + "\n", encoding="utf-8")
    (RESULTS / "toy_recovery.json").write_text(
        json.dumps({"provenance": facts, "seconds": seconds, "rows": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
