"""Progress of long work: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def quantity(value: float) -> str:
    """A count with a unit: 12, 3.4k, 1.2M."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


class Progress:
    """`with Progress("training", total) as progress: progress.update(done, note)`; `done` may start above 0."""

    def __init__(self, label: str, total: int, unit: str = "steps", start: int = 0, every_seconds: float = 10.0):
        self.label, self.total, self.unit, self.start = label, total, unit, start
        self.every_seconds = every_seconds
        self.began = self.last = time.monotonic()
        self._bar = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = ("{task.description}", BarColumn(), "{task.completed}/{task.total}", TimeRemainingColumn())
            from rich.console import Console

            self._bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.start, note="")
        return self

    def update(self, done: int, note: str = "") -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self.last >= self.every_seconds or done >= self.total:
            self.last = now
            rate = (done - self.start) / max(now - self.began, 1e-9)
            left = duration((self.total - done) / rate) if rate > 0 else "?"
            line = f"{self.label}: {done:,}/{self.total:,} {self.unit}, {quantity(rate)}/s, {left} left"
            print(f"{line}  {note}".rstrip(), file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
