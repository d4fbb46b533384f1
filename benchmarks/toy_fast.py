"""The map of the toy study under `--preset fast` beside the schedule of 2023: MMCS with the truth, cell by cell.

    python benchmarks/toy_fast.py                trains what is missing, then writes benchmarks/results/toy_fast.*
    python benchmarks/toy_fast.py --report       writes them from what there is

Both schedules start from the same initial weights; a second seed under the schedule of 2023 says how far two runs of
the original are apart. The whole grid takes hours, so rows of it are trained: every L1 value at several ratios in the
small world, every L1 value at two ratios in the geometry of 2023, and four of them at a larger ratio there. Each row is
a process of its own on one thread, which goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

import replicate_toy_models as toy
from sparse_coding.config import numbers, to_dict
from sparse_coding.metrics.matching import max_cosines
from sparse_coding.provenance import provenance
from sparse_coding.report.canvas import save
from sparse_coding.report.heatmaps import Grid, Scale, heat_maps
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.trainer import Trainer

OUT = Path("outputs") / "toy_fast"
RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """Dictionaries of one size on one world."""

    world: str
    ratio: float
    l1: tuple[str, ...] = ()
    """Empty: all of the grid."""


ROWS = [
    Row("hoagy-2023-07", 0.25),
    Row("hoagy-2023-07", 1),
    Row("hoagy-2023-07", 4, ("0.1", "1", "3.1622776601683795", "10")),
    Row("quick", 0.25),
    Row("quick", 1),
    Row("quick", 4),
]
RUNS = {"2023": ("full", 0), "2023, another seed": ("full", 1), "fast": ("fast", 0)}
L1 = numbers(toy.GRIDS["full"].l1, "--l1")


def folder_of(row: Row, preset_name: str, seed: int) -> Path:
    return OUT / f"{row.world}-ratio-{row.ratio:g}-{preset_name}-seed-{seed}"


def train(row: Row, preset_name: str, seed: int) -> None:
    """Train one row into a folder of its own, and leave cells.json there."""
    torch.set_num_threads(1)
    words = ["--preset", preset_name, "--world", row.world, "--ratios", f"{row.ratio:g}", "--seeds", str(seed)]
    study, chosen = toy.complete(toy.parse(toy.Study, [*words, *(["--l1", *row.l1] if row.l1 else [])], "", ""))
    world = World(preset(chosen.world))
    stream = WorldStream(world, study.batch_size)
    members = toy.sweep(study, chosen, world).members(stream.widths)
    training = toy.training_of(study, chosen)
    with RunFolder(folder_of(row, preset_name, seed), {"words": words, "training": to_dict(training)}) as folder:
        trainer = Trainer(members, stream, training, folder=folder)
        trainer.fit()
        dictionaries = [trainer.dictionary(index) for index in range(len(members))]
        cells = {
            "l1": [to_dict(member.settings)["l1_coefficient"] for member in members],
            "mmcs": [max_cosines(world.directions, one.atoms).mean().item() for one in dictionaries],
            "updates": [trainer.updates(index) for index in range(len(members))],
        }
        folder.write_json("cells.json", {**cells, "steps": training.steps, "seconds": trainer.seconds})


def train_missing() -> None:
    def run(index: int, name: str, seed: int) -> None:
        if not (folder_of(ROWS[index], name, seed) / "cells.json").exists():
            command = [sys.executable, __file__, "--row", str(index), name, str(seed)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in [pool.submit(run, index, *run_) for run_ in RUNS.values() for index in range(len(ROWS))]:
            done.result()


def found() -> dict[Row, dict[str, dict]]:
    """What was trained: row -> run -> its cells, for rows that have been trained under both schedules."""
    rows = {}
    for row in ROWS:
        paths = {run: folder_of(row, *which) / "cells.json" for run, which in RUNS.items()}
        runs = {run: json.loads(path.read_text()) for run, path in paths.items() if path.exists()}
        if {"2023", "fast"} <= set(runs):
            rows[row] = runs
    return rows


def differences(rows: dict[Row, dict[str, dict]], run: str) -> np.ndarray:
    """MMCS of a run less that of 2023, over all cells that both have."""
    return np.array([
        there - here
        for runs in rows.values() if run in runs
        for here, there in zip(runs["2023"]["mmcs"], runs[run]["mmcs"], strict=True)
    ])  # fmt: skip


def summary(rows: dict[Row, dict[str, dict]]) -> list[str]:
    """A line of the table for each world, then for all."""
    lines = [
        "| | cells | run | mean of the difference | mean size | largest | within 0.01 | within 0.02 |",
        "|" + "---|" * 8,
    ]
    worlds = {world: {row: rows[row] for row in group} for world, group in groupby(rows, lambda row: row.world)}
    for name, some in [*worlds.items(), ("all", rows)]:
        for run in list(RUNS)[1:]:
            values = differences(some, run)
            if len(values):
                sizes = np.abs(values)
                figures = f"{values.mean():+.4f} | {sizes.mean():.4f} | {sizes.max():.4f}"
                shares = " | ".join(f"{(sizes <= most).mean():.0%}" for most in (0.01, 0.02))
                lines.append(f"| {name} | {len(values)} | {run} | {figures} | {shares} |")
    return lines


def cells_of(row: Row, runs: dict[str, dict]) -> list[str]:
    base, fast = runs["2023"], runs["fast"]
    other = [f"{value:.4f}" for value in runs.get("2023, another seed", {}).get("mmcs", [])] or [""] * len(base["l1"])
    lines = [
        f"| {l1:.3g} | {one:.4f} | {again} | {found:.4f} | {found - one:+.4f} | {updates:,} |"
        for l1, one, again, found, updates in zip(
            base["l1"], base["mmcs"], other, fast["mmcs"], fast["updates"], strict=True
        )
    ]
    heads = "| L1 | 2023 | another seed | fast | fast - 2023 | updates of fast |"
    return ["", f"{row.world}, ratio {row.ratio:g}:", "", heads, "|" + "---|" * 6, *lines]


def picture(rows: dict[Row, dict[str, dict]]) -> None:
    """Both maps and their difference, world by world."""
    panels = []
    for world, group in groupby(rows, lambda row: row.world):
        own = list(group)
        maps = {run: np.full((len(own), len(L1)), np.nan) for run in ("2023", "fast")}
        for line, row in enumerate(own):
            for run, matrix in maps.items():
                for l1, value in zip(rows[row][run]["l1"], rows[row][run]["mmcs"], strict=True):
                    matrix[line, int(np.argmin([abs(math.log(l1 / one)) for one in L1]))] = value
        ratios = [row.ratio for row in own]
        mmcs = Scale("MMCS", 0.2, 1.0)
        panels += [(f"{world}: {run}", Grid(L1, ratios, matrix), mmcs) for run, matrix in maps.items()]
        apart = Grid(L1, ratios, maps["fast"] - maps["2023"])
        panels.append((f"{world}: fast - 2023", apart, Scale("difference", -0.1, 0.1, colours="RdBu_r")))
    save(heat_maps(panels, 1), RESULTS / "toy_fast.png")


def report() -> None:
    rows, facts, fast = found(), provenance(), toy.GRIDS["fast"]
    updates = [value for runs in rows.values() for value in runs["fast"]["updates"]]
    early = sum(value < fast.steps for value in updates)
    lines = [
        "MMCS with the truth under the schedule of 2023 (20,000 updates at 1e-3) and under `--preset fast` "
        f"({fast.steps:,} updates at {fast.lr:g}, a warm-up of {fast.optimizer.warmup_steps:,}, the last "
        f"{fast.optimizer.decay_fraction:.0%} falling to 0; dictionaries stop when they settle).",
        "",
        f"`python benchmarks/toy_fast.py`, {facts['date'][:10]}, torch {facts['versions']['torch']}, one thread for "
        "each row. Both from the same initial weights; the second seed says how far two runs of 2023 are apart.",
        "",
        *summary(rows),
        "",
        f"Of {len(updates)} dictionaries {early} settled before the end; together they took "
        f"{sum(updates) / len(updates) / fast.steps:.0%} of the updates of fast.",
        "",
        "![both maps and their difference](toy_fast.png)",
        *(line for row, runs in rows.items() for line in cells_of(row, runs)),
    ]
    print("\n".join(lines))
    (RESULTS / "toy_fast.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"provenance": facts, "rows": [{**row._asdict(), "runs": runs} for row, runs in rows.items()]}
    (RESULTS / "toy_fast.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    picture(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--row", nargs=3, metavar=("ROW", "PRESET", "SEED"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.row:
        return train(ROWS[int(flags.row[0])], flags.row[1], int(flags.row[2]))
    if not flags.report:
        train_missing()
    report()


if __name__ == "__main__":
    main()
