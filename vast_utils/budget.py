"""Hard caps on dollars and hours: nothing is rented before its worst case is set aside, and what is set aside adds up.

Each rental reserves dollars when it is written down; it ends when they are used up, counted from before the request
at the full price. So the sum of what ended ones cost and what live ones reserve never passes the cap.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from sparse_coding.errors import UserError
from vast_utils.clock import Clock
from vast_utils.ledger import Caps, Ledger, Record

MARGIN = 900.0
"""Seconds before the end of what is reserved at which a machine is given back: time to destroy it and be sure,
which takes `destroy.LIMIT` at most and what the last requests of it take."""
DOUBT_HOURS = 0.25
"""What a request without a clear answer and without a machine to be seen is reckoned to cost, in hours."""


class OverBudget(UserError):
    """The caps leave no room for another rental: what is spent, what is left, what would be needed."""


@dataclass(frozen=True)
class Grant:
    """What one rental may cost: `dollars`, which last for `hours`."""

    dollars: float
    hours: float


def reserve(record: Record, now: float) -> float:
    """Dollars to count for a rental: its cost once it is over, all that is set aside for it before."""
    if record.over:
        return record.cost(now)
    if record.state == "doubtful":
        return record.hourly * DOUBT_HOURS
    return max(record.reserved, record.cost(now))


class Budget:
    """The caps of a run against its ledger. Hold `lock` from a grant until the rental is written down."""

    def __init__(
        self,
        caps: Caps,
        started: float,
        ledger: Ledger,
        clock: Clock,
        margin: float = MARGIN,
        machine_cost: float = 0.0,
    ):
        """machine_cost: most dollars for one rental; 0: no limit but the whole."""
        self.caps, self.started, self.ledger, self.clock, self.margin = caps, started, ledger, clock, margin
        self.machine_cost = machine_cost or caps.max_cost
        self.lock = threading.RLock()

    def spent(self) -> float:
        """Most dollars that the run can have cost until now."""
        now = self.clock.now()
        return sum(record.cost(now) for record in self.ledger.records())

    def free(self) -> float:
        """Dollars that are neither spent nor set aside."""
        now = self.clock.now()
        return self.caps.max_cost - sum(reserve(record, now) for record in self.ledger.records())

    def hours_left(self) -> float:
        """Hours until the run's time is up."""
        return self.caps.max_hours - (self.clock.now() - self.started) / 3600

    def grant(self, dearest: float, traffic: float, hours: float) -> Grant:
        """What to set aside for up to `hours` of a machine that costs `dearest` $/h at most; less where less is left.

        Raises `OverBudget` where the price is over its cap, or too little is left to be of use.
        """
        if dearest > self.caps.max_price:
            raise OverBudget(f"${dearest:.3f}/h is over the cap of ${self.caps.max_price:.3f}/h")
        free, left = self.free(), self.hours_left()
        granted = min(hours, left, (min(free, self.machine_cost) - traffic) / dearest)
        if granted * 3600 <= 2 * self.margin:
            raise OverBudget(
                f"${max(free, 0):.2f} of ${self.caps.max_cost:.2f} and {max(left, 0):.1f} of {self.caps.max_hours:.1f} "
                f"hours are free: not enough for {2 * self.margin / 60:.0f} minutes at ${dearest:.3f}/h"
            )
        return Grant(dearest * granted + traffic, granted)

    def useful_until(self, record: Record) -> float:
        """When a machine is to be given back, so that its end is confirmed before its money or the run's time is up."""
        return min(record.deadline(), self.started + 3600 * self.caps.max_hours) - self.margin
