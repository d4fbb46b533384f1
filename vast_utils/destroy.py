"""The end of machines, believed only when it was read back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from vast_utils.account import CONSOLE, Account, AccountError
from vast_utils.clock import Clock
from vast_utils.ledger import Record
from vast_utils.rows import Instance

LIMIT = 600.0
QUIET = 5.0
QUIET_WHEN_NEW = 60.0
NEW = 180.0
"""A machine rented less than this many seconds ago is new."""
LATE = 3600.0
"""A request without an answer that is older than this, in seconds, no longer makes a machine."""
LONGEST_PAUSE = 30.0


class Unconfirmed(Exception):
    """Machines may still be running and costing money."""

    def __init__(self, what: str, why: str):
        super().__init__(f"{what} MAY STILL BE RUNNING AND COST MONEY ({why}): look at {CONSOLE} and destroy by hand")


@dataclass
class Outcome:
    """What an attempt at destroying came to: `destroyed` where it is confirmed, else `left`, which may be there."""

    destroyed: set[int] = field(default_factory=set)
    left: set[int] = field(default_factory=set)
    labels: dict[str, int] = field(default_factory=dict)
    """The numbers of those that were seen, by their labels."""
    confirmed: bool = False
    error: str = "not read back"


def destroy_all(
    account: Account,
    clock: Clock,
    ids: Iterable[int],
    ours: Callable[[Instance], bool],
    limit: float = LIMIT,
    quiet: float = QUIET,
) -> Outcome:
    """Destroy the machines of these numbers and all that `ours` is true of, and read back until none is there.

    Confirmed means: two rounds, `quiet` seconds apart or more, in which every request to destroy was answered and every
    list and look that followed succeeded and found none, and no round between them that found one. A machine may be
    missing from lists when it is new: `quiet` is then to be a minute. Gives up after `limit` seconds.
    """
    known, outcome = set(ids), Outcome()
    end, pause, empty_since = clock.now() + limit, 1.0, None
    while True:
        error, left = _ask(account, known), None
        try:
            left = _present(account, known, ours, outcome.labels)
        except AccountError as failed:
            error = str(failed)
        known |= left or set()
        if left:
            empty_since, outcome.error = None, error or "asked to end, but still there"
        elif error:
            outcome.error = error
        elif empty_since is None:
            empty_since = clock.now()
        elif clock.now() - empty_since >= quiet:
            return Outcome(known, set(), outcome.labels, confirmed=True, error="")
        outcome.left = left or known
        if clock.now() >= end:
            return outcome
        clock.sleep(max(pause, quiet / 4))
        pause = min(2 * pause, LONGEST_PAUSE)


def quiet_for(records: Iterable[Record], now: float) -> float:
    """How long nothing must be seen until these open rentals are over: one may be too new to be in a list."""
    new = any(now - record.intended < (LATE if record.instance is None else NEW) for record in records)
    return QUIET_WHEN_NEW if new else QUIET


def _ask(account: Account, ids: Iterable[int]) -> str:
    """Ask for the end of each; the last thing that went wrong."""
    error = ""
    for instance in sorted(ids):
        try:
            account.destroy(instance)
        except AccountError as failed:
            error = str(failed)
    return error


def _present(account: Account, known: set[int], ours: Callable[[Instance], bool], labels: dict[str, int]) -> set[int]:
    """The numbers of those that are there, by the list and, for known ones, by asking for each."""
    listed = {one.id: one.label for one in account.instances() if one.id in known or ours(one)}
    labels.update({label: number for number, label in listed.items()})
    return set(listed) | {one for one in known - set(listed) if account.show(one) is not None}
