"""A fleet at work on the fake market, in virtual time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vast_utils.fake_market import Market, VirtualClock
from tests.vast_utils.fake_vast import KEY, FakeVast, in_process
from vast_utils.account import Account, Container
from vast_utils.budget import Budget
from vast_utils.fleet import Fleet
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Need
from vast_utils.rental import Rental

CAPS = Caps(max_price=0.6, max_cost=3.0, max_hours=6.0)
CONTAINER = Container(image="pytorch/pytorch")
NEED = Need(max_price=0.6, hours=2.0)


@dataclass
class World:
    """What a test holds: the fake, what stands behind it, and a state folder."""

    fake: FakeVast
    account: Account
    folder: Path

    @property
    def market(self) -> Market:
        return self.fake.market

    @property
    def clock(self) -> Any:
        return self.fake.market.clock

    def count(self, name: str) -> int:
        """How many requests of this name the API saw."""
        return self.fake.calls.count(name)


def make_world(monkeypatch: Any, folder: Path, market: Market | None = None, **settings: Any) -> World:
    """A fake API without sockets and an account that talks to it through the SDK."""
    monkeypatch.setattr("os.fsync", lambda handle: None)  # nothing here crashes the computer itself
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.delenv("VAST_URL", raising=False)
    fake = FakeVast(market or Market(VirtualClock()), **settings)
    return World(fake, Account(in_process(fake, monkeypatch), KEY), folder / "state")


@contextmanager
def dispatcher(world: World, caps: Caps = CAPS, run: str = "toy") -> Iterator[Fleet]:
    """What a dispatcher begins with: the ledger held, the caps written down, a fleet."""
    with Ledger(run, world.folder).held() as ledger:
        caps, started = ledger.begin(caps, world.clock.now())
        budget = Budget(caps, started, ledger, world.clock)
        yield Fleet(world.account, ledger, budget, world.clock, say=lambda line: None)


def furnish(rental: Rental) -> Container:
    """The same container whatever the machine."""
    return CONTAINER


def content(rental: Rental, instance: Any) -> None:
    """A check that every machine passes."""
