"""What a training step costs as d_sae, batch, members and k grow, with what the machine allows drawn beside it.

    python benchmarks/scaling.py                a few minutes on 2 CPU cores; writes benchmarks/results/scaling.*
    python benchmarks/scaling.py --name try     other files

The limit of a step is the time of its products at the rate the machine reaches on data in cache, plus the time to read
and write what Adam needs at the rate of a copy. Both rates are measured before and after every single step, and the
higher one counts: a machine that others share is faster at one moment than at another. Products: five for dense codes
(10 B d_in d_sae FLOP), one for TopK and 8 B k d_in for its active entries. Adam: 28 bytes a parameter. Weights stand
still (learning rate 1e-12), so that codes are as dense at the last step as at the first.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch

from sparse_coding.dictionaries import architecture
from sparse_coding.kernels.compiled import compiled
from sparse_coding.kernels.dense_native import SOURCES
from sparse_coding.provenance import provenance
from sparse_coding.report.canvas import CATEGORIES, MUTED, canvas, drawn, number_axis, place, save
from sparse_coding.training.allocator import keep_freed_memory
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.precision import products_dtype
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import Member, split_into_stacks

HERE = Path(__file__).parent
RESULTS = HERE / "results"


@dataclass(frozen=True)
class Case:
    """One kind of step."""

    kind: str
    d_in: int = 512
    d_sae: int = 8192
    batch: int = 2048
    members: int = 1
    k: int = 32

    @property
    def flop(self) -> float:
        dense = 2 * self.batch * self.d_in * self.d_sae
        return self.members * (5 * dense if self.kind == "relu" else dense + 8 * self.batch * self.k * self.d_in)

    @property
    def adam_bytes(self) -> float:
        return self.members * 28 * (2 * self.d_in * self.d_sae + self.d_in + self.d_sae)

    def prepared(self, dtype: torch.dtype) -> Callable[[], None]:
        """One step of every member on a batch that stays the same."""
        kind = architecture(self.kind)
        own: dict[str, Any] = {"k": self.k} if self.kind == "topk" else {}
        settings = kind.Settings(d_in=self.d_in, d_sae=self.d_sae, **own)
        members = [Member(self.kind, settings, lr=1e-12, seed=seed) for seed in range(self.members)]
        groups = split_into_stacks(members, self.batch)
        stacks = [Stack([members[index] for index in group], OptimizerSettings(), "cpu", dtype) for group in groups]
        batch = {"synthetic": torch.randn(self.batch, self.d_in, generator=torch.Generator().manual_seed(0))}

        def step() -> None:
            for stack in stacks:
                stack.step(batch, 1.0)

        return step


AXES: dict[str, list[tuple[Case, str, tuple[int, ...]]]] = {
    "d_sae": [(Case(kind), "d_sae", (512, 1024, 2048, 4096, 8192, 16384, 32768)) for kind in ("relu", "topk")],
    "batch": [(Case(kind), "batch", (128, 256, 512, 1024, 2048, 4096, 8192)) for kind in ("relu", "topk")],
    "members": [
        (Case(kind, d_in=64, d_sae=256, batch=1024, k=8), "members", (1, 2, 4, 8, 16, 32, 64, 128))
        for kind in ("relu", "topk")
    ],
    "k": [(Case("topk"), "k", (4, 8, 16, 32, 64, 128, 256, 512))],
}
NOTES = {
    "d_sae": "d_in 512, batch 2,048, k 32",
    "batch": "d_in 512, d_sae 8,192, k 32",
    "members": "d_in 64, d_sae 256, batch 1,024, k 8",
    "k": "d_in 512, d_sae 8,192, batch 2,048",
}


@cache
def rates_library() -> ctypes.CDLL | None:
    source = HERE / "machine_rate.cpp"
    library = compiled(source.name, (source, *SOURCES))
    if library:
        library.product_rate.restype = ctypes.c_double
    return library


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of products in cache on torch's threads; of torch's own large product where nothing can be compiled."""
    library, half = rates_library(), int(dtype == torch.bfloat16)
    rate = library.product_rate(half, torch.get_num_threads(), ctypes.c_double(0.02)) if library else 0.0
    if rate:
        return rate
    a = torch.ones(1024, 1024, dtype=dtype)
    return 2 * 1024**3 / min(seconds(lambda: a @ a) for _ in range(5))


@cache
def two_blocks() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(32 * 2**20), torch.zeros(32 * 2**20)


def copy_rate() -> float:
    """Bytes/s read and written by a copy that no cache holds."""
    source, target = two_blocks()
    return 2 * 4 * source.numel() / seconds(lambda: target.copy_(source))


def rates_now(dtype: torch.dtype) -> dict[str, float]:
    return {"products": product_rate(dtype), "memory": copy_rate()}


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def measured(case: Case, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Medians over steps: seconds, the limit at the rates around each step, the share of it, and those rates."""
    step = case.prepared(dtype)
    step()
    step()
    around, taken = [rates_now(dtype)], []
    for _ in range(repeats):
        taken.append(seconds(step))
        around.append(rates_now(dtype))
    rates = [{name: max(a[name], b[name]) for name in a} for a, b in pairwise(around)]
    limits = [case.flop / rate["products"] + case.adam_bytes / rate["memory"] for rate in rates]
    return {
        "seconds": median(taken),
        "limit": median(limits),
        "reached": median(limit / t for limit, t in zip(limits, taken, strict=True)),
        **{name: median(rate[name] for rate in rates) for name in rates[0]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="steps of each point (default 9)")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--name", default="scaling", help="of the files in benchmarks/results")
    flags = parser.parse_args()
    keep_freed_memory()
    dtype = products_dtype("auto", "cpu")
    points = []
    for axis in flags.axes:
        for base, name, values in AXES[axis]:
            for value in values:
                case = replace(base, **{name: value})
                work = {"flop": case.flop, "adam_bytes": case.adam_bytes}
                found = measured(case, dtype, flags.repeats)
                points.append({"axis": axis, "value": value, **vars(case), **work, **found})
                print(
                    f"{axis:8s} {value:6d} {case.kind:5s} {1e3 * found['seconds']:9.2f} ms, {found['reached']:4.0%}",
                    flush=True,
                )
    rates = {name: median(point[name] for point in points) for name in ("products", "memory")}
    facts = {**provenance(), "dtype": str(dtype).removeprefix("torch."), "rates": rates, "repeats": flags.repeats}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{flags.name}.json").write_text(json.dumps({"facts": facts, "points": points}, indent=1) + "\n")
    (RESULTS / f"{flags.name}.md").write_text("\n".join(table(facts, points, flags.name)) + "\n", encoding="utf-8")
    save(picture(points, rates), RESULTS / f"{flags.name}.png")


def table(facts: dict[str, Any], points: list[dict[str, Any]], name: str) -> list[str]:
    rates = facts["rates"]
    lines = [
        "What a training step costs, and how near it comes to what the machine allows: `python benchmarks/scaling.py`",
        "",
        f"{facts['date'][:10]}, torch {facts['versions']['torch']}, {facts['threads']} CPU threads, products in "
        f"{facts['dtype']}; medians of {facts['repeats']} steps. The limit: products and Adam's traffic at the rates "
        f"measured around each step, {rates['products'] / 1e9:,.0f} GFLOP/s and {rates['memory'] / 1e9:,.0f} GB/s in "
        "the middle.",
        "",
        f"![Milliseconds a step beside the limit]({name}.png)",
    ]
    wide = [p for p in points if p["axis"] == "d_sae" and p["kind"] == "topk" and p["d_sae"] == 32 * p["d_in"]]
    lines += ["", *(f"TopK at 32 times the width: {p['reached']:.0%} of the limit." for p in wide)]
    for axis in dict.fromkeys(point["axis"] for point in points):
        own = [point for point in points if point["axis"] == axis]
        lines += ["", f"## {axis} ({NOTES[axis]})", ""]
        lines += [f"| | {axis} | ms a step | limit | reached |", "|---|---|---|---|---|"]
        for point in own:
            taken, limit = 1e3 * point["seconds"], 1e3 * point["limit"]
            lines.append(
                f"| {point['kind']} | {point['value']:,} | {taken:.2f} | {limit:.2f} | {point['reached']:.0%} |"
            )
    return lines


@drawn
def picture(points: list[dict[str, Any]], rates: dict[str, float]) -> Any:
    """One panel for each axis: solid what a step took, dashed what the machine allows."""
    axes = list(dict.fromkeys(point["axis"] for point in points))
    figure = canvas(0.3 + 3.1 * len(axes), 3.55)
    for index, axis in enumerate(axes):
        panel = place(figure, 0.65 + 3.1 * index, 0.8, 2.3, 2.2)
        own = [point for point in points if point["axis"] == axis]
        for colour, kind in zip(CATEGORIES, ("relu", "topk"), strict=False):
            line = [point for point in own if point["kind"] == kind]
            values = [point["value"] for point in line]
            panel.plot(values, [1e3 * p["seconds"] for p in line], color=colour, marker="o", markersize=4, label=kind)
            panel.plot(values, [1e3 * p["limit"] for p in line], color=colour, linestyle="--", linewidth=1.1)
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_title(axis, pad=16)
        panel.text(0, 1.02, NOTES[axis], transform=panel.transAxes, color=MUTED, fontsize=7.5)
        panel.grid(True)
        number_axis(panel.xaxis)
        number_axis(panel.yaxis)
        if not index:
            panel.set_ylabel("ms a step")
            panel.legend(loc="upper left")
    told = f"dashed: products at {rates['products'] / 1e9:,.0f} GFLOP/s + Adam at {rates['memory'] / 1e9:,.0f} GB/s, "
    told += "measured around each step"
    figure.text(0.65 / figure.get_size_inches()[0], 0.04, told, color=MUTED, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
