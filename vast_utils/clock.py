"""Time that never runs backwards: what every cap on money and hours is measured with."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the epoch that only grow, and a way to wait."""

    def now(self) -> float: ...

    def sleep(self, seconds: float) -> None: ...


class SafeClock:
    """The wall clock, unless it was set back or the computer's monotonic clock has seen more time go by.

    A wrong clock can therefore end a rental too early, never too late; a laptop that slept counts its sleep. `floor`:
    the latest time that earlier processes wrote down, so that a clock set back between two of them changes nothing.
    """

    def __init__(self, floor: float = 0.0):
        self._started = max(time.time(), floor)
        self._monotonic = time.monotonic()
        self._latest = self._started

    def now(self) -> float:
        elapsed = time.monotonic() - self._monotonic
        self._latest = max(self._latest, time.time(), self._started + elapsed)
        return self._latest

    def sleep(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds))
