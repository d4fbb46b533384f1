"""Speed of one training step: in C++, in torch's operators, and the definition by autograd.

    python benchmarks/step_speed.py [--threads 2] [--repeats 15] [--only topk-512x8192] [--skip definition]
    python benchmarks/step_speed.py --profile --threads 1

What is timed is the whole of `Trainer.advance`: reading a batch that is in memory, the gradients, the optimiser, unit
norms, dead-latent clocks and the sums for the log. Methods take turns, so that a busy machine slows all of them alike;
medians are shown, and the processor time of a step, of all threads, to which other programs add little. Beside them
stands the limit: the products that cannot be left out (the encoder's; of a dense step all five) alone, by torch, and
one pass of Adam over memory (24 bytes a parameter) at the rate of a large copy. relu stays dense on these rows.

It writes benchmarks/results/step_speed-THREADS.md and .json. With --profile it prints where the processor time of the
C++ step goes instead.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparse_coding.dictionaries import architecture
from sparse_coding.kernels import dense_native, sparse_native
from sparse_coding.provenance import provenance
from sparse_coding.training.precision import products_dtype
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

METHODS = ("C++", "operators", "definition")
COLUMNS = (*METHODS, "limit")
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Configuration:
    architecture: str
    d_in: int
    d_sae: int
    batch: int
    fixed: dict[str, Any] = field(default_factory=dict)
    varied: dict[str, list[float]] = field(default_factory=dict)


CONFIGURATIONS = {
    "topk-512x8192": Configuration("topk", 512, 8192, 2048, varied={"k": [32]}),
    "batchtopk-512x8192": Configuration("batchtopk", 512, 8192, 2048, varied={"k": [32]}),
    "matryoshka-512x8192": Configuration("matryoshka", 512, 8192, 2048, varied={"k": [32]}),
    # thresholds that leave about 32 latents of unit-norm directions active on gaussian rows
    "jumprelu-512x8192": Configuration(
        "jumprelu", 512, 8192, 2048, {"initial_threshold": 2.66}, {"l0_coefficient": [1]}
    ),
    "relu-512x8192": Configuration("relu", 512, 8192, 2048, varied={"l1_coefficient": [1]}),
    "topk-768x24576": Configuration("topk", 768, 24576, 2048, varied={"k": [32]}),
    "topk-16-of-256x1024": Configuration("topk", 256, 1024, 1024, varied={"k": list(range(25, 41))}),
    "relu-16-of-256x1024": Configuration(
        "relu", 256, 1024, 1024, varied={"l1_coefficient": [1 + i / 16 for i in range(16)]}
    ),
    "topk-64-of-64x128": Configuration(
        "topk", 64, 128, 256, varied={"k": [8], "auxk_coefficient": [i / 64 for i in range(64)]}
    ),
    "topk-64-of-64x256": Configuration(
        "topk", 64, 256, 1024, varied={"k": [8], "auxk_coefficient": [i / 64 for i in range(64)]}
    ),
}


@contextmanager
def method(name: str, kind: type) -> Iterator[None]:
    """Inside, steps are taken by this method alone."""
    if name == "C++":
        yield
    elif name == "operators":
        with (
            mock.patch.object(sparse_native, "loaded", return_value=None),
            mock.patch.object(dense_native, "loaded", return_value=None),
        ):
            yield
    else:
        with mock.patch.object(kind, "fused_gradients", return_value=None):
            yield


def trainer(one: Configuration) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * one.batch, one.d_in, generator=generator)
    members = grid(
        one.architecture, {"synthetic": one.d_in}, [one.d_sae / one.d_in], varied=one.varied, **one.fixed
    )  # fmt: skip
    return Trainer(members, TensorStream({"synthetic": rows}, one.batch), TrainingSettings(steps=10**6))


def interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median (seconds, processor seconds) of each call, after two rounds unmeasured."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            wall, processor = time.perf_counter(), time.process_time()
            call()
            if round_ >= 2:
                taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return {
        name: (statistics.median(wall for wall, _ in pairs), statistics.median(processor for _, processor in pairs))
        for name, pairs in taken.items()
    }


def limit(one: Configuration, n_members: int) -> Callable[[], None]:
    """The least a step could take: the products, and reading and writing what Adam changes."""
    products = 5 if one.architecture == "relu" else 1
    dtype = products_dtype("auto", "cpu")
    x, W = torch.randn(one.batch, one.d_in).to(dtype), torch.randn(one.d_in, one.d_sae).to(dtype)
    state = torch.zeros(6 * one.d_in * one.d_sae)  # 3 read, 3 written for each of 2 matrices

    def run() -> None:
        for _ in range(n_members):
            for _ in range(products):
                torch.mm(x, W)
            state[: state.numel() // 2].copy_(state[state.numel() // 2 :])

    return run


def measured(one: Configuration, repeats: int, skip: list[str]) -> dict[str, tuple[float, float]]:
    kind = architecture(one.architecture)
    calls: dict[str, Callable[[], None]] = {}
    for name in METHODS:
        if name in skip:
            continue
        own = trainer(one)

        def call(name: str = name, own: Trainer = own) -> None:
            with method(name, kind):
                own.advance()

        calls[name] = call
        n_members = len(own.members)
    calls["limit"] = limit(one, n_members)
    return interleaved(calls, repeats)


def profile(name: str, repeats: int) -> None:
    """Print processor milliseconds of one step by phase, of all threads."""
    own = trainer(CONFIGURATIONS[name])
    (stack,) = own.stacks
    spent = dict.fromkeys(map(str, sparse_native.PHASES), 0.0)
    for _ in range(3):
        own.advance()
    sparse_native.seconds = torch.zeros(len(sparse_native.PHASES), dtype=torch.float64)
    clock(own, "_read", "reading the batch", spent)
    clock(stack.dictionary, "constrain_gradients_", "projection of gradients", spent)
    clock(stack.optimizer, "step", "Adam", spent)
    clock(stack.dictionary, "constrain_", "unit norms", spent)
    before = time.process_time()
    for _ in range(repeats):
        own.advance()
    whole = time.process_time() - before
    spent |= dict(zip(sparse_native.PHASES, sparse_native.seconds.tolist(), strict=True))
    sparse_native.seconds = None
    spent["all else"] = whole - sum(spent.values())
    print(name, f"{1e3 * whole / repeats:.1f} ms")
    for phase, seconds in spent.items():
        print(f"  {phase:24}{1e3 * seconds / repeats:8.2f}{seconds / whole:6.0%}", flush=True)


def clock(owner: Any, method: str, phase: str, spent: dict[str, float]) -> None:
    """Add the processor time of a method of `owner` to `spent` from now on."""
    inner = getattr(owner, method)

    def timed(*arguments: Any) -> Any:
        start = time.process_time()
        found = inner(*arguments)
        spent[phase] = spent.get(phase, 0.0) + time.process_time() - start
        return found

    setattr(owner, method, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured (default 15)")
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS), help="configurations to run")
    parser.add_argument("--skip", nargs="*", default=[], choices=METHODS, help="methods to leave out")
    parser.add_argument("--no-write", action="store_true", help="print alone")
    parser.add_argument("--profile", action="store_true", help="print where the processor time of the C++ step goes")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.profile:
        for name in args.only:
            profile(name, args.repeats)
        return
    found, load = {}, os.getloadavg()[0]
    for name in args.only:
        found[name] = measured(CONFIGURATIONS[name], args.repeats, args.skip)
        shown = ", ".join(f"{method} {1e3 * wall:.2f} ({1e3 * own:.2f})" for method, (wall, own) in found[name].items())
        print(f"{name}, ms (processor ms): {shown}", flush=True)
    if not args.no_write:
        write(found, args.threads, load)


def write(found: dict[str, dict[str, tuple[float, float]]], threads: int, load: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    facts = {"provenance": provenance(), "threads": threads, "load": [load, os.getloadavg()[0]], "seconds": found}
    name = f"step_speed-{threads}"
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        f"One training step: `python benchmarks/step_speed.py --threads {threads}`",
        "",
        f"Milliseconds of a whole step of all members, {threads} threads, load average of the machine before and "
        f"after {load:.1f} and {os.getloadavg()[0]:.1f}; medians of interleaved runs, in brackets processor "
        "milliseconds. The head of the script says what is timed and what the limit is.",
        "",
        "| configuration | C++ | operators | definition | limit | C++, rows/s of all members | definition / C++ |",
        "|---|---|---|---|---|---|---|",
    ]
    for name_, taken in found.items():
        cells = [f"{1e3 * taken[one][0]:.1f} ({1e3 * taken[one][1]:.1f})" if one in taken else "" for one in COLUMNS]
        fast, slow = taken.get("C++", (float("nan"),))[0], taken.get("definition", (float("nan"),))[0]
        rate = CONFIGURATIONS[name_].batch / fast
        lines.append(f"| {name_} | {' | '.join(cells)} | {rate:,.0f} | {slow / fast:.1f} |")
    (RESULTS / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
