"""Timing within a budget of seconds, and the lines of the table."""

from __future__ import annotations

import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

WARM_UP = 3


@dataclass(frozen=True)
class Sizes:
    """What is run: GPT-2 small at 32x, or something a CPU does in seconds."""

    d_in: int = 768
    d_sae: int = 24_576
    batches: tuple[int, ...] = (4_096, 16_384)
    k: int = 32
    rows: int = 262_144
    """In memory, for the steps."""
    square: int = 8_192
    """Of the large matrix product."""
    copied_bytes: int = 2**31
    members: int = 16
    small_d_in: int = 256
    small_d_sae: int = 1_024
    small_batch: int = 1_024
    context: int = 1_024
    contexts: int = 65_536
    per_forward: int = 32
    buffer_rows: int = 2**20
    layers: int = 12
    heads: int = 12
    vocabulary: int = 50_257
    sites: tuple[int, ...] = (2, 8)
    toy_ratios: tuple[float, ...] = tuple(2.0**e for e in range(-3, 6))
    toy_values: int = 17
    toy_trained: int = 200
    """Steps of training after which the toy grid is timed again."""


SMALL = Sizes(
    d_in=32, d_sae=128, batches=(64, 128), k=4, rows=512, square=128, copied_bytes=2**16, members=3, small_d_in=16,
    small_d_sae=32, small_batch=64, context=16, contexts=256, per_forward=8, buffer_rows=512, layers=3, heads=2,
    vocabulary=97, sites=(0, 1), toy_ratios=(0.125, 0.25), toy_values=2, toy_trained=5,
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One thing measured."""

    section: str
    what: str
    value: float | None
    """None: it was not measured, `note` says why."""
    unit: str = ""
    limit: float | None = None
    """What the hardware allows, in the same unit."""
    aim: float | None = None
    note: str = ""

    def text(self) -> str:
        cells = [self.what, *(quantity(number) for number in (self.value, self.limit, self.aim)), self.unit, self.note]
        return f"{cells[0]:<52}{cells[1]:>10}{cells[2]:>10}{cells[3]:>10}  {cells[4]:<12}{cells[5]}"


HEAD = f"{'':<52}{'measured':>10}{'limit':>10}{'aim':>10}  unit"


def quantity(number: float | None) -> str:
    """Four digits, with a unit of thousands."""
    if number is None:
        return ""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.4g} {letter}"
    return f"{number:.4g}"


class Meter:
    """Measures on one device until its time is over. What is measured is printed and written at once."""

    def __init__(self, device: str, seconds: float, out: Path | None, facts: dict[str, Any]):
        self.device, self.out, self.facts = torch.device(device), out, facts
        self.began = time.monotonic()
        self.end = self.section_end = self.began + seconds
        self.lines: list[Line] = []
        self.rates: dict[str, float] = {}
        """Ceilings by name, FLOP or bytes a second."""
        self.section_name = ""
        self.quick = False
        """Call everything once or twice: to see that it runs, not to measure."""

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @contextmanager
    def section(self, name: str, until: float) -> Iterator[None]:
        """A part of the table; its measurements stop at the share `until` of all the time."""
        self.section_name = name
        self.section_end = self.began + until * (self.end - self.began)
        print(f"\n{name}, {time.monotonic() - self.began:.0f} s after the start\n{HEAD}", flush=True)
        with self.attempt(name):
            yield

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is a line of the table, and the next is gone on with."""
        try:
            yield
        except Exception as error:
            words = str(error).strip().splitlines() or [""]
            self.add(what, None, note=f"failed: {type(error).__name__}: {words[0][:200]}")
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def has_time(self, what: str, seconds: float = 1.0) -> bool:
        if self.left >= seconds:
            return True
        self.add(what, None, note="no time left for it")
        return False

    @property
    def left(self) -> float:
        return min(self.end, self.section_end) - time.monotonic()

    def add(
        self, what: str, value: float | None, unit: str = "", limit: float | None = None, aim: float | None = None,
        note: str = "",
    ) -> None:  # fmt: skip
        self.lines.append(Line(self.section_name, what, value, unit, limit, aim, note))
        print(self.lines[-1].text(), flush=True)
        if self.out:
            record = {"facts": self.facts, "lines": [asdict(line) for line in self.lines]}
            (self.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    # ---- clocks

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], object], budget: float = 2.0, rounds: int = 7) -> float:
        """Of one call: the median over rounds of many calls, after a warm-up."""
        for _ in range(WARM_UP):
            call()
        once = max(self._timed(call, 1), 1e-7)
        each = max(1, min(1000, int(min(budget, max(self.left, 0.0)) / rounds / once)))
        if self.quick:
            return once
        began, found = time.monotonic(), []
        while len(found) < rounds and (not found or time.monotonic() - began < budget):
            found.append(self._timed(call, each) / each)
        return statistics.median(found)

    def _timed(self, call: Callable[[], object], times: int) -> float:
        self.wait()
        if not self.cuda:
            began = time.perf_counter()
            for _ in range(times):
                call()
            return time.perf_counter() - began
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def waits(self, call: Callable[[], object], times: int = 10) -> float | None:
        """How often a call makes the host wait for the device, as torch counts it; None on a CPU."""
        if not self.cuda:
            return None
        call()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for _ in range(times):
                    call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(one.message) for one in caught) / times
