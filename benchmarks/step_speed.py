"""Speed of one training step: the sparse step in C++, in torch's operators, and the definition by autograd.

    python benchmarks/step_speed.py [--threads 2] [--repeats 15] [--only topk-512x8192] [--skip definition]

What is timed is the whole of `Trainer.advance`: reading a batch that is in memory, the gradients, the optimiser, unit
norms, dead-latent clocks and the sums for the log. Methods take turns, so that a busy machine slows all of them alike;
medians are shown. Beside them stands the limit: the encoder's product alone, by torch, and one pass of Adam over
memory (24 bytes a parameter) at the rate of a large copy.

It writes benchmarks/results/step_speed.md and .json.
"""

from __future__ import annotations

import argparse
import json
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
from sparse_coding.kernels import native
from sparse_coding.provenance import provenance
from sparse_coding.training.precision import products_dtype
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

METHODS = ("C++", "operators", "definition")
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
    "topk-768x24576": Configuration("topk", 768, 24576, 2048, varied={"k": [32]}),
    "topk-16-of-256x1024": Configuration("topk", 256, 1024, 1024, varied={"k": list(range(25, 41))}),
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
        with mock.patch.object(native, "library", lambda: None):
            yield
    else:
        with mock.patch.object(kind, "fused_gradients", lambda *_: None):
            yield


def trainer(one: Configuration) -> Trainer:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * one.batch, one.d_in, generator=generator)
    members = grid(
        one.architecture, {"synthetic": one.d_in}, [one.d_sae / one.d_in], varied=one.varied, **one.fixed
    )  # fmt: skip
    return Trainer(members, TensorStream({"synthetic": rows}, one.batch), TrainingSettings(steps=10**6))


def interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def limit(one: Configuration, n_members: int) -> Callable[[], None]:
    """The least a step could take: the encoder's product, and reading and writing what Adam changes."""
    dtype = products_dtype("auto", "cpu")
    x, W = torch.randn(one.batch, one.d_in).to(dtype), torch.randn(one.d_in, one.d_sae).to(dtype)
    state = torch.zeros(6 * one.d_in * one.d_sae)  # 3 read, 3 written for each of 2 matrices

    def run() -> None:
        for _ in range(n_members):
            x @ W
            state[: state.numel() // 2].copy_(state[state.numel() // 2 :])

    return run


def measured(one: Configuration, repeats: int, skip: list[str]) -> dict[str, float]:
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
    return {name: statistics.median(values) for name, values in interleaved(calls, repeats).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds that are measured (default 15)")
    parser.add_argument("--only", nargs="*", default=list(CONFIGURATIONS), help="configurations to run")
    parser.add_argument("--skip", nargs="*", default=[], choices=METHODS, help="methods to leave out")
    parser.add_argument("--no-write", action="store_true", help="print alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = {}
    for name in args.only:
        found[name] = measured(CONFIGURATIONS[name], args.repeats, args.skip)
        shown = ", ".join(f"{method} {1e3 * seconds:.2f} ms" for method, seconds in found[name].items())
        rate = CONFIGURATIONS[name].batch / found[name].get("C++", float("nan"))
        print(f"{name}: {shown} ({rate:,.0f} rows/s)", flush=True)
    if not args.no_write:
        write(found, args.threads)


def write(found: dict[str, dict[str, float]], threads: int) -> None:
    RESULTS.mkdir(exist_ok=True)
    facts = {"provenance": provenance(), "threads": threads, "seconds": found}
    (RESULTS / "step_speed.json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = [
        "# One training step",
        "",
        f"Milliseconds of a whole step of all members, {threads} threads; medians of interleaved runs.",
        "",
        "| configuration | C++ | operators | definition | limit | C++, rows/s of all members |",
        "|---|---|---|---|---|---|",
    ]
    for name, seconds in found.items():
        cells = [f"{1e3 * seconds[one]:.2f}" if one in seconds else "" for one in (*METHODS, "limit")]
        rate = CONFIGURATIONS[name].batch / seconds["C++"] if "C++" in seconds else float("nan")
        lines.append(f"| {name} | {' | '.join(cells)} | {rate:,.0f} |")
    lines += ["", "Made by `python benchmarks/step_speed.py`, which says what is timed and what the limit is.", ""]
    (RESULTS / "step_speed.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
