"""The life of one rented machine, as states that are on disk before anything is asked of vast.ai.

intended -> rented -> ready -> destroying -> destroyed (confirmed by reading back)
    |-> refused (nothing was rented)
    |-> doubtful (no clear answer and no machine to be seen; should one appear, it is destroyed)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sparse_coding.errors import UserError
from vast_utils.account import Account, AccountError, Busy, Container, Doubtful, KeyRefused, Refused
from vast_utils.budget import Budget
from vast_utils.clock import Clock
from vast_utils.destroy import LIMIT, Unconfirmed, destroy_all, quiet_for
from vast_utils.ledger import Ledger, Record, State
from vast_utils.offers import Price, bid_above
from vast_utils.rows import Condition, Instance, Offer

MOVES: dict[State, tuple[State, ...]] = {
    "intended": ("rented", "refused", "doubtful", "destroying"),
    "doubtful": ("rented",),
    "rented": ("ready", "destroying"),
    "ready": ("destroying",),
    "destroying": ("destroyed",),
    "destroyed": (),
    "refused": (),
}
SETTLE = (0.0, 5.0, 10.0, 20.0, 30.0)
"""Pauses between the listings after which a machine that was not seen is taken to be none."""
START_LIMIT = 900.0
REBID_LIMIT = 300.0
APPEARS_WITHIN = 60.0
"""A machine just rented may be missing from what is read back for so long."""
POLL = 10.0


class NotRented(Exception):
    """This offer came to nothing and costs nothing more; the next one may do."""


class Lost(Exception):
    """This machine is of no use (never started, died, outbid, dearer than shown): destroy it, take another."""


class Counter:
    """Where requests that rent are handed in, one at a time; once it is shut, all are answered and none follows."""

    def __init__(self) -> None:
        self._lock, self._shut = threading.Lock(), False

    @contextmanager
    def turn(self) -> Iterator[None]:
        """To send one request in. Raises `Busy` after the counter was shut."""
        with self._lock:
            if self._shut:
                raise Busy("the run is ending: nothing more is rented")
            yield

    def shut(self) -> None:
        with self._lock:
            self._shut = True


@dataclass(frozen=True)
class Desk:
    """What every rental of a run works with."""

    account: Account
    ledger: Ledger
    budget: Budget
    clock: Clock
    counter: Counter = field(default_factory=Counter)


class Rental:
    """One machine of a run. `record` is what the ledger holds."""

    def __init__(self, desk: Desk, record: Record):
        self.desk, self.record = desk, record

    @classmethod
    def intend(cls, desk: Desk, offer: Offer, price: Price, disk: float, hours: float, up: float = 0.0) -> Rental:
        """Write down what is to be rented and set its worst case aside. `OverBudget`; `UserError` after a reap.

        disk, up: GB to rent, and of uploads that are in the price.
        Whether the run was reaped is asked again after writing: a reaper that has not seen the record is seen here.
        """
        with desk.budget.lock:
            desk.ledger.check_not_reaped()
            dearest = price.dearest(desk.budget.caps.max_price)
            grant = desk.budget.grant(dearest, price.traffic, hours)
            record = Record(
                label=desk.ledger.label(),
                state="intended",
                offer=offer.id,
                machine=offer.machine_id,
                gpu=offer.gpu_name,
                hourly=price.hourly,
                dearest=dearest,
                traffic=price.traffic,
                reserved=grant.dollars,
                disk=disk,
                intended=desk.clock.now(),
                bid=price.bid,
                up_cost=offer.inet_up_cost,
                up_free=up,
            )
            rental = cls(desk, desk.ledger.write(record))
            try:
                desk.ledger.check_not_reaped()
            except UserError:
                rental._move("refused", ended=desk.clock.now())
                raise
            return rental

    def create(self, container: Container) -> None:
        """Send the request that rents, once. Raises `NotRented` where no machine came of it that is worth having.

        After any doubt the account is listed by label: a machine that is there is ours, and adopted. One that came
        with an error (too low a bid leaves a stopped machine behind) is destroyed.
        """
        assert self.record.state == "intended", self.record.state
        try:
            with self.desk.counter.turn():
                number = self.desk.account.create(
                    self.record.offer, container, self.record.disk, self.record.label, self.record.bid
                )
                self._move("rented", instance=number)
        except KeyRefused:
            self._move("refused", ended=self.desk.clock.now())
            raise
        except Busy as error:
            self._move("refused", ended=self.desk.clock.now())
            self.desk.clock.sleep(POLL)
            raise NotRented(str(error)) from None
        except Refused as error:
            self._move("refused", ended=self.desk.clock.now(), ban=str(error))
            raise NotRented(str(error)) from None
        except Doubtful as error:
            if error.instance is not None:
                self._move("rented", instance=error.instance, ban=str(error))
                self.destroy()
                raise NotRented(str(error)) from None
            if not self.settle():
                raise NotRented(f"{error}; no machine of that label is there") from None

    def settle(self) -> bool:
        """Find out by its label whether a request without an answer rented; `Unconfirmed` where no list comes."""
        began, seen = self.desk.clock.now(), 0
        while seen < len(SETTLE):
            self.desk.clock.sleep(SETTLE[seen])
            try:
                listed = self.desk.account.instances()
            except AccountError as error:
                if self.desk.clock.now() - began > LIMIT:
                    raise Unconfirmed(f"a machine labelled {self.record.label}", str(error)) from None
                self.desk.clock.sleep(POLL)
                continue
            if mine := [one.id for one in listed if one.label == self.record.label]:
                self.found(mine[0])
                return True
            seen += 1
        if self.record.state == "intended":
            self._move("doubtful")
        return False

    def found(self, instance: int) -> None:
        """A machine with our label is there after all."""
        self._move("rented", instance=instance)

    def check_price(self, instance: Instance) -> None:
        """Refuse a machine that costs more than was shown, or that is let otherwise than was meant."""
        if instance.is_bid and self.record.bid is None:
            raise Lost("it was let as interruptible, not on demand")
        actual = instance.dph_total
        if actual is None or actual <= self.record.hourly * (1 + 1e-6):
            return
        shown = self.record.hourly
        self._write(hourly=actual)  # what it costs until it is gone
        if actual > self.record.dearest * (1 + 1e-6):
            raise Lost(f"it costs ${actual:.3f}/h, not ${shown:.3f}/h as shown")

    def wait_running(self, limit: float = START_LIMIT, ignore: tuple[Condition, ...] = ()) -> Instance:
        """Wait until it runs and has an address for ssh and a price. Raises `Lost` with the reason.

        ignore: conditions to wait through that otherwise mean that it never will.
        """
        began, said = self.desk.clock.now(), "no status"
        end = min(began + limit, self.useful_until)
        while self.desk.clock.now() < end:
            try:
                assert self.record.instance is not None
                instance = self.desk.account.show(self.record.instance)
            except AccountError as error:
                said = str(error)
            else:
                if instance is not None:
                    said = instance.status_msg or instance.actual_status or "no status"
                    self.check_price(instance)
                    if instance.condition not in ("starting", "running", *ignore):
                        raise Lost(f"it is {instance.condition} ({said})")
                    if instance.condition == "running" and instance.addresses and instance.dph_total is not None:
                        return instance
                elif self.desk.clock.now() - began > APPEARS_WITHIN:
                    raise Lost("it is gone")
            self.desk.clock.sleep(POLL)
        raise Lost(f"it did not start in time ({said})")

    def mark_ready(self) -> None:
        """It passed every check; from here on a job may run there."""
        self._move("ready", ready=self.desk.clock.now())

    @property
    def useful_seconds(self) -> float:
        """How long it is of use from the request that rents it: the limit for a watchdog on the machine.

        A watchdog counts from the machine's start, at most `START_LIMIT` later: `budget.MARGIN` allows for that.
        """
        return self.useful_until - self.record.intended

    @property
    def useful_until(self) -> float:
        """When it must be given back, seconds since the epoch."""
        return self.desk.budget.useful_until(self.record)

    def raise_bid(self, instance: Instance, limit: float = REBID_LIMIT) -> Instance:
        """Outbid: bid once more, within what was set aside, and wait until it runs again; else `Lost`."""
        bid, storage = self.record.bid, self.record.hourly - (self.record.bid or 0)
        if bid is None or self.record.rebid:
            raise Lost("it was outbid" + (" again" if self.record.rebid else ""))
        higher = bid_above(max(bid, instance.min_bid or bid), self.record.dearest - storage)
        if higher is None or higher <= bid:
            raise Lost(f"it was outbid, and ${self.record.dearest:.3f}/h, the most set aside, allows no higher bid")
        self._write(bid=higher, hourly=higher + storage, rebid=True)  # on disk first: it may take effect unanswered
        try:
            self.desk.account.bid(instance.id, higher)
        except Refused as error:
            raise Lost(f"it was outbid, and a higher bid was refused: {error}") from None
        except Doubtful:
            pass  # taken or not, it costs no more than is written down, and whether it runs again is seen
        return self.wait_running(limit, ignore=("outbid",))

    def came(self, gigabytes: float) -> None:
        """Pay for what was fetched beyond what was reckoned, out of what is set aside: its time is up the sooner."""
        if gigabytes and self.desk.ledger.is_held:
            free = self.record.up_free
            more = max(0.0, gigabytes - free) * self.record.up_cost
            self._write(traffic=self.record.traffic + more, up_free=max(0.0, free - gigabytes))

    def ban(self, reason: str) -> None:
        """This run does not take the machine again."""
        self._write(ban=reason[:200] or "of no use")

    def destroy(self) -> None:
        """End it and read back that it is gone. Raises `Unconfirmed`. Harmless when repeated."""
        if self.record.over or (self.record.instance is None and not self.settle()):
            return
        if self.record.state != "destroying":
            self._move("destroying")
        number, label = self.record.instance, self.record.label
        assert number is not None
        quiet = quiet_for([self.record], self.desk.clock.now())
        outcome = destroy_all(self.desk.account, self.desk.clock, {number}, lambda one: one.label == label, quiet=quiet)
        if not outcome.confirmed:
            raise Unconfirmed(f"machine {number} (label {label})", outcome.error)
        self._move("destroyed", ended=self.desk.clock.now())

    def _move(self, state: State, **changes: Any) -> None:
        assert state in MOVES[self.record.state], f"{self.record.state} -> {state}"
        self._write(state=state, **changes)

    def _write(self, **changes: Any) -> None:
        with self.desk.budget.lock:
            self.record = self.desk.ledger.change(self.record, **changes)
