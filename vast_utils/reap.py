"""Find and destroy everything of ours at vast.ai, whether a ledger knows of it or not, and be sure that it is gone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from vast_utils.account import Account
from vast_utils.clock import Clock, SafeClock
from vast_utils.destroy import LIMIT, NEW, QUIET, QUIET_WHEN_NEW, Outcome, Unconfirmed, destroy_all
from vast_utils.ledger import Ledger, Record, check_run_name, ledgers, run_of

LATE = 3600.0
"""A request without an answer that is older than this, in seconds, no longer makes a machine."""


def reap(
    account: Account,
    clock: Clock,
    folder: Path | None = None,
    run: str | None = None,
    limit: float = LIMIT,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Destroy the machines of all runs, or of one, until listings that succeeded show none.

    The runs of this computer are ended first, so that a dispatcher that is still at work rents nothing more. Where a
    request is without an answer, the account is watched for a minute more.
    """
    known = [ledger for ledger in ledgers(folder) if run in (None, ledger.run)]
    for ledger in known:
        if ledger.busy or any(not record.over for record in ledger.records()):
            ledger.end()
    open_ = [record for ledger in known for record in ledger.records() if not record.over]
    numbers = {record.instance for record in open_ if record.instance is not None}
    late = any(clock.now() - record.intended < (LATE if record.instance is None else NEW) for record in open_)

    def ours(label: str) -> bool:
        found = run_of(label)
        return found is not None and run in (None, found)

    quiet = QUIET_WHEN_NEW if late else QUIET
    outcome = destroy_all(account, clock, numbers, lambda one: ours(one.label), limit, quiet)
    if outcome.confirmed:
        for ledger in known:
            _close(ledger, outcome.labels, clock, say)
    return outcome


def _close(ledger: Ledger, seen: Mapping[str, int], clock: Clock, say: Callable[[str], None]) -> None:
    """Write into a run's ledger that all is over, unless its dispatcher is at work: then it finds out by itself."""
    if all(record.over for record in ledger.records()):
        return
    try:
        with ledger.held():
            for record in ledger.records():
                if not record.over:
                    number = record.instance or seen.get(record.label)
                    state = "refused" if number is None else "destroyed"
                    ledger.change(record, state=state, instance=number, ended=clock.now())
    except UserError as error:
        say(f"note: {error}")


def cost(records: Sequence[Record], now: float) -> float:
    """Most dollars that these rentals can have cost until `now`."""
    return sum(record.cost(now) for record in records)


def rescue(ledger: Ledger, account: Account, say: Callable[[str], None] = print) -> None:
    """Stop and fetch what works on a run's machines and has no dispatcher; whatever goes wrong is only said."""
    from vast_utils.session import reopen

    if ledger.busy or not any(record.state == "ready" for record in ledger.records()):
        return
    ledger.end()  # from here on the run rents nothing more
    try:
        with ledger.held():
            reopen(ledger, account, say).end()
    except (UserError, OSError, Unconfirmed) as error:
        say(f"note: {error}")


@dataclass(frozen=True)
class ReapFlags:
    """Destroy every machine at vast.ai that this tool rented, also those of a dispatcher that was killed.

    Machines are known by their label (sparse-coding.RUN.NONCE). Exit status 1: not confirmed, look at the console.
    """

    run: str | None = None
    """Only the machines of this run."""
    now: bool = False
    """Destroy at once. Without it jobs that nobody looks after may save, and what they have made is fetched first."""


def main(arguments: Sequence[str]) -> None:
    """destroy every machine that was rented here, and check that it is gone"""
    flags = parse(ReapFlags, arguments, "python -m vast_utils reap", ReapFlags.__doc__ or "")
    if flags.run is not None:
        check_run_name(flags.run)
    account, clock = Account(), SafeClock(max((ledger.latest() for ledger in ledgers()), default=0.0))
    if not flags.now:
        for ledger in ledgers():
            if flags.run in (None, ledger.run):
                rescue(ledger, account)
    outcome = reap(account, clock, run=flags.run)
    for instance in sorted(outcome.destroyed):
        print(f"machine {instance}: destroyed")
    if not outcome.confirmed:
        raise SystemExit(_alarm(outcome))
    spent = cost([record for one in ledgers() if flags.run in (None, one.run) for record in one.records()], clock.now())
    print(f"nothing of ours is left at vast.ai; the runs in this computer's ledger cost at most ${spent:.2f}")


def _alarm(outcome: Outcome) -> int:
    left = ", ".join(map(str, sorted(outcome.left)))
    print(f"ERROR: {Unconfirmed(f'machines {left}'.strip(), outcome.error)}", file=sys.stderr)
    return 1
