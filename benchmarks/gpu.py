"""One GPU in nine minutes: rates of the pieces, steps beside the peers, token ids to dictionaries, the toy grid.

    python benchmarks/gpu.py                          writes benchmarks/results/gpu.json and gpu.md
    python benchmarks/gpu.py --sections rates steps --minutes 4 --out FOLDER
    python benchmarks/gpu.py --device cpu --small     the same script in little, on a CPU: to see that it runs

Beside each line stands its limit. A step's: its dense products at the rate that a large product has here, and Adam's
reads and writes at the rate of a large copy; all that lies between is ours to lose. From token ids: the model alone and
the step alone, one after the other, as both share the GPU. Aims are those that the project has set itself for an H200.
Medians over rounds, timed by events on the device after a warm-up; "waits" are the times a step makes the CPU wait for
the GPU, as torch counts them. Peers run where they are installed in this environment (sae-lens, eai-sparsify,
dictionary-learning), with their own trainers and optimisers on the same rows; else a line says that they are not.

What fails is a line too, and the rest goes on; results are written as they come.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
import threading
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch

from benchmarks.gpu_parts import from_tokens, rates, steps, toy
from benchmarks.gpu_parts.measure import SMALL, Line, Meter, Sizes, quantity
from sparse_coding.provenance import provenance

RESULTS = Path(__file__).parent / "results"
SECTIONS = {"rates": (rates, 0.08), "steps": (steps, 0.5), "tokens": (from_tokens, 0.92), "toy": (toy, 1.0)}
"""What measures, and the share of all time by which it ends."""
PEERS = ("triton", "sae-lens", "eai-sparsify", "dictionary-learning")
GRACE = 30.0
"""Seconds after which a measurement that does not end is given up."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, every call once: nothing is measured")
    parser.add_argument("--minutes", type=float, default=8.0, help="most time taken (default 8)")
    parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument(
        "--out", type=Path, help="folder for gpu.json and gpu.md (default: benchmarks/results on a GPU)"
    )
    flags = parser.parse_args(arguments)
    cuda = torch.device(flags.device).type == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("torch sees no GPU: use --device cpu --small to try the script")
    out = flags.out or (RESULTS if cuda else None)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    if torch.device(flags.device).index is not None:
        torch.cuda.set_device(flags.device)
    seconds = 60 * flags.minutes
    meter = Meter(flags.device, seconds, out, facts(cuda))
    meter.quick = flags.small
    watchdog = threading.Timer(seconds + GRACE, give_up, [meter])
    watchdog.daemon = True
    watchdog.start()
    try:
        run(meter, flags.sections, SMALL if flags.small else Sizes())
    finally:
        watchdog.cancel()
    if out:
        write(meter, out)
    return sum(line.note.startswith("failed") for line in meter.lines)


def run(meter: Meter, names: list[str], sizes: Sizes) -> None:
    chosen = [SECTIONS[name] for name in names]
    for name, (part, _), until in zip(names, chosen, shared_out([share for _, share in chosen]), strict=True):
        with meter.section(name, until):
            if name != "rates" and not meter.rates:  # what limits are made of
                rates.copies(meter, sizes)
                rates.products(meter, sizes)
            part.measure(meter, sizes)


def shared_out(ends: list[float]) -> list[float]:
    """Ends of the sections that were chosen, in shares of all time: those left out leave theirs to the others."""
    names = list(SECTIONS.values())
    lengths = [end - max([0.0, *(other for _, other in names if other < end)]) for end in ends]
    total, found = sum(lengths), []
    for length in lengths:
        found.append((found[-1] if found else 0.0) + length / total)
    return found


def facts(cuda: bool) -> dict[str, Any]:
    """Date, chip and versions."""
    known = provenance()
    for package in PEERS:
        try:
            known["versions"][package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            known["versions"][package] = None
    if cuda:
        chip = torch.cuda.get_device_properties(torch.cuda.current_device())
        known["chip"] = {
            "name": chip.name, "bytes": chip.total_memory, "multiprocessors": chip.multi_processor_count,
            "l2_bytes": getattr(chip, "L2_cache_size", None), "cuda": torch.version.cuda,
        }  # fmt: skip
    return known


def give_up(meter: Meter) -> None:
    """What was measured is written; the process ends, whatever it waits for."""
    meter.add("the rest", None, note="failed: not done in time")
    if meter.out:
        write(meter, meter.out)
    sys.stdout.flush()
    os._exit(1)


def write(meter: Meter, out: Path) -> None:
    known = meter.facts
    chip = known["chip"]["name"] if "chip" in known else known["platform"]
    versions = ", ".join(f"{name} {known['versions'][name]}" for name in ("torch", *PEERS) if known["versions"][name])
    lines = ["One GPU: `python benchmarks/gpu.py`", "", f"{known['date'][:10]}, {chip}, {versions}.", ""]
    sections: dict[str, list[Line]] = {}
    for line in meter.lines:
        sections.setdefault(line.section, []).append(line)
    for name, found in sections.items():
        lines += [f"## {name}", "", "| | measured | limit | aim | unit | |", "|" + "---|" * 6]
        for line in found:
            numbers = [quantity(number) for number in (line.value, line.limit, line.aim)]
            lines.append("| " + " | ".join([line.what, *numbers, line.unit, line.note]) + " |")
        lines.append("")
    (out / "gpu.md").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
