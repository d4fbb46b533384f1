"""The 2023 toy grid on this machine: our sweep against a sequential loop that does, per step, what the original did.

    python benchmarks/toy_grid.py                some minutes on 2 CPU cores; writes benchmarks/results/toy_grid.*

Both sides are timed in slices (a few steps of every size, in turn, medians) and multiplied up to the whole grid:
17 L1 values x 9 sizes x 20,000 steps of 256 samples. Our steps get cheaper as codes get sparse, so they are timed at
the start and again after some training (200 steps, 50 of sizes above 2,048); the rest of the run is taken to cost what
the latter do (half of the L1 values are sparse by then, the others stay dense for thousands of steps). `--preset fast`
is the same grid in fewer such steps; that its dictionaries stop when they settle is left out. The sequential side is
written from the description of the frozen 2023 script, not from its code, and runs in a process of its own: fp32, one
dictionary at a time, torch.nn layers under autograd, decoder columns normalised in every forward pass, torch.optim.Adam
at its defaults, and data generated densely for every step of every dictionary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from replicate_toy_models import GRIDS
from sparse_coding.progress import duration
from sparse_coding.provenance import provenance
from sparse_coding.synthetic import World, WorldStream, covariance_matrix, preset
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.precision import products_dtype
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import grid, split_into_stacks

L1 = [10 ** (e / 4) for e in range(-8, 9)]
RATIOS = [2.0**e for e in range(-3, 6)]
FAST = GRIDS["fast"]
STEPS, BATCH, D_IN, FEATURES = 20_000, 256, 256, 512
RESULTS = Path(__file__).parent / "results"


def trained(n: int) -> int:
    """Steps of training after which ours are timed again."""
    return 200 if n <= 2048 else 50


class Sequential2023(nn.Module):
    """One dictionary as the frozen script trained it."""

    def __init__(self, n: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(D_IN, n), nn.ReLU())
        self.decoder = nn.Linear(n, D_IN, bias=False)
        nn.init.orthogonal_(self.decoder.weight)
        self.optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)

    def step(self, x: Tensor, alpha: float) -> None:
        with torch.no_grad():
            self.decoder.weight.data = nn.functional.normalize(self.decoder.weight.data, dim=0)
        self.optimizer.zero_grad()
        codes = self.encoder(x)
        loss = nn.functional.mse_loss(self.decoder(codes), x) + alpha * codes.norm(1, dim=1).mean() / codes.shape[1]
        loss.backward()
        self.optimizer.step()


class DenseGenerator:
    """The recipe of 2023 with a dense draw: one normal vector per batch, a Bernoulli and a uniform for every cell."""

    def __init__(self) -> None:
        settings = preset("hoagy-2023-07")
        self.directions = nn.functional.normalize(torch.randn(FEATURES, D_IN), dim=1)
        self.covariance = covariance_matrix(settings).float()
        self.decay = 0.99 ** torch.arange(FEATURES)

    def batch(self) -> Tensor:
        normal = torch.distributions.MultivariateNormal(torch.zeros(FEATURES), covariance_matrix=self.covariance)
        u = torch.distributions.Normal(0.0, 1.0).cdf(normal.sample())
        p = u * self.decay
        p = p * (5 / FEATURES / p.mean())
        active = torch.bernoulli(p.expand(BATCH, -1))
        codes = torch.where(active == 1, torch.rand(BATCH, FEATURES), 0.0)
        empty = codes.sum(1) == 0
        codes[empty, torch.randint(FEATURES, (int(empty.sum()),))] = 1.0
        return codes @ self.directions


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Theirs:
    """A round: one batch made, one step of one dictionary. What it costs does not change as training goes on."""

    def __init__(self, n: int):
        self.data, self.model = DenseGenerator(), Sequential2023(n)
        self.x = self.data.batch()

    def train(self) -> None:
        pass

    def round(self) -> dict[str, float]:
        return {"their_data": seconds(self.data.batch), "their_step": seconds(lambda: self.model.step(self.x, 0.1))}


class Ours:
    """A round: one batch made, one step of all 17 dictionaries."""

    def __init__(self, n: int):
        self.trained = trained(n)
        self.data, self.steps = WorldStream(World(preset("hoagy-2023-07")), BATCH), itertools.count()
        sweep = grid(
            "relu", {"synthetic": D_IN}, [n / D_IN], varied={"l1_coefficient": L1}, l1_scaling="toy-2023",
            init="toy-2023", decoder_bias=False, remove_parallel_gradient=False,
        )  # fmt: skip
        dtype = products_dtype("auto", "cpu")
        groups = split_into_stacks(sweep, BATCH)
        self.stacks = [Stack([sweep[index] for index in group], OptimizerSettings(), "cpu", dtype) for group in groups]
        self.read()

    def read(self) -> None:
        self.batch = self.data.batch(next(self.steps))

    def step(self) -> None:
        for stack in self.stacks:
            stack.step(self.batch, 1.0)

    def train(self) -> None:
        for _ in range(self.trained):
            self.read()
            self.step()

    def round(self) -> dict[str, float]:
        return {"our_data": seconds(self.read), "our_steps": seconds(self.step)}


SIDES = {"theirs": Theirs, "ours": Ours}


def work(side: str) -> None:
    """A worker process: reads `n` to prepare a size, "train", and an empty line for a round; answers with JSON."""
    found: Any = None
    for line in sys.stdin:
        answer = {}
        if line.strip() == "train":
            found.train()
        elif line.strip():
            found = SIDES[side](int(line))
            found.round()
        else:
            answer = found.round()
        print(json.dumps(answer), flush=True)


class Worker:
    """One side in a process of its own: what we tell the allocator and the thread pool must not help the other."""

    def __init__(self, side: str):
        ours = {"GOMP_SPINCOUNT": "20000"} if side == "ours" else {}  # what `import sparse_coding` sets before torch
        command = [sys.executable, __file__, "--worker", side]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env={**os.environ, **ours})

    def ask(self, line: str) -> dict[str, float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def in_turn(workers: list[Worker], rounds: int) -> dict[str, float]:
    """Medians over rounds."""
    turns = [{key: value for worker in workers for key, value in worker.ask("").items()} for _ in range(rounds)]
    return {key: median(turn[key] for turn in turns) for key in turns[0]}


def slices(rounds: int) -> list[dict[str, float]]:
    """Median seconds per size, the two sides in turn."""
    workers = [Worker(side) for side in SIDES]
    rows = []
    for ratio in RATIOS:
        n = round(FEATURES * ratio)
        for worker in workers:
            worker.ask(str(n))
        first = in_turn(workers, rounds)
        for worker in workers:
            worker.ask("train")
        row = {"n": n, "our_first_steps": first["our_steps"], **in_turn(workers, rounds)}
        rows.append(row)
        ours = f"{1e3 * row['our_first_steps']:7.1f} ms at first, {1e3 * row['our_steps']:7.1f} ms later"
        print(f"n = {n:>6}: a step of 17 dictionaries {17e3 * row['their_step']:8.1f} ms against {ours}", flush=True)
    for worker in workers:
        worker.process.communicate("")
    return rows


def our_seconds(rows: list[dict[str, float]], steps: int) -> float:
    """What the grid takes us in this many steps."""
    early = sum(trained(int(row["n"])) * (row["our_first_steps"] - row["our_steps"]) / 2 for row in rows)
    return early + steps * (sum(row["our_steps"] for row in rows) + median(row["our_data"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--worker", choices=list(SIDES), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.worker:
        return work(flags.worker)
    rows = slices(flags.rounds)
    theirs = STEPS * sum(len(L1) * (row["their_step"] + row["their_data"]) for row in rows)
    ours, fast = (our_seconds(rows, steps) for steps in (STEPS, FAST.steps))
    facts = provenance()
    lines = [
        "The 2023 toy grid (17 L1 values x 9 sizes x 20,000 steps of 256), extrapolated from steps of every size.",
        "",
        f"`python benchmarks/toy_grid.py`, {facts['date'][:10]}, torch {facts['versions']['torch']}, "
        f"{facts['threads']} CPU threads, medians of {flags.rounds} rounds, sides in turn, each in its own process.",
        "",
        "| latents | sequential, 17 steps (ms) | ours, 17 members: first steps (ms) | later | ratio |",
        "|---|---|---|---|---|",
        *(
            f"| {row['n']} | {17e3 * row['their_step']:.1f} | {1e3 * row['our_first_steps']:.1f} | "
            f"{1e3 * row['our_steps']:.1f} | {17 * row['their_step'] / row['our_steps']:.1f} |"
            for row in rows
        ),
        "",
        f"Data: {1e3 * median(r['their_data'] for r in rows):.2f} ms a batch densely, once for every dictionary; "
        f"{1e3 * median(r['our_data'] for r in rows):.2f} ms sparsely, once for all of them.",
        "",
        f"**Whole grid: {duration(theirs)} sequentially, {duration(ours)} ours in the same steps: {theirs / ours:.1f} "
        f"times less. `--preset fast`, {FAST.steps:,} steps: {duration(fast)}, {theirs / fast:.1f} times less** (early "
        "stops left out; what it finds beside the schedule of 2023: [toy_fast.md](toy_fast.md)).",
    ]
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "toy_grid.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    record = {"provenance": facts, "rows": rows, "their_seconds": theirs, "our_seconds": ours, "fast_seconds": fast}
    (RESULTS / "toy_grid.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
