"""Find and destroy everything of ours at vast.ai, whether a ledger knows of it or not, and be sure that it is gone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_coding.config import parse
from sparse_coding.errors import UserError
from vast_utils.account import Account
from vast_utils.clock import Clock, SafeClock
from vast_utils.destroy import LIMIT, QUIET_WHEN_NEW, Outcome, Unconfirmed, destroy_all, quiet_for
from vast_utils.ledger import Ledger, Record, check_run_name, ledgers, run_of


def reap(
    account: Account,
    clock: Clock,
    folder: Path | None = None,
    run: str | None = None,
    limit: float = LIMIT,
    say: Callable[[str], None] = print,
    keep: Collection[str] = (),
) -> Outcome:
    """Destroy the machines of all runs, or of one, until listings that succeeded show none. keep: labels of others.

    The runs of this computer are ended first, so that a dispatcher that is still at work rents nothing more. Where a
    request is without an answer, the account is watched for a minute more. A ledger that cannot be read or written is
    said, and keeps no machine alive: they are known by their labels.
    """
    known = [ledger for ledger in ledgers(folder) if run in (None, ledger.run)]
    open_: list[Record] = []
    quiet = 0.0
    for ledger in known:
        try:
            if ledger.busy or ledger.open_records():
                ledger.end()
        except UserError as error:
            say(f"note: {error}")
        try:  # read after its end: what a dispatcher writes from now on it takes back itself
            open_ += [record for record in ledger.open_records() if record.label not in keep]
        except UserError:
            quiet = QUIET_WHEN_NEW

    def ours(label: str) -> bool:
        found = run_of(label)
        return found is not None and run in (None, found) and label not in keep

    numbers = {record.instance for record in open_ if record.instance is not None}
    quiet = max(quiet, quiet_for(open_, clock.now()))
    outcome = destroy_all(account, clock, numbers, lambda one: ours(one.label), limit, quiet)
    if outcome.confirmed:
        for ledger in known:
            _close(ledger, outcome.labels, clock, say, keep)
    return outcome


def _close(
    ledger: Ledger, seen: Mapping[str, int], clock: Clock, say: Callable[[str], None], keep: Collection[str]
) -> None:
    """Write into a run's ledger that all is over, unless its dispatcher is at work: then it finds out by itself."""
    try:
        if ledger.open_records():
            with ledger.held():
                ledger.write_off(seen, clock.now(), keep)
    except UserError as error:
        say(f"note: {error}")


def cost(records: Sequence[Record], now: float) -> float:
    """Most dollars that these rentals can have cost until `now`."""
    return sum(record.cost(now) for record in records)


def rescue(ledger: Ledger, account: Account, say: Callable[[str], None] = print) -> dict[str, str]:
    """Have a run's dispatcher stop in peace, or stop and fetch what nobody looks after; what goes wrong is only said.

    Gives the labels of machines whose results do not fit here, and why: they are to stay.
    """
    from vast_utils.session import ask_to_stop, reopen
    from vast_utils.signals import stopping

    try:
        if not ledger.busy and not any(record.state == "ready" for record in ledger.records()):
            return {}
        ledger.end()  # from here on the run rents nothing more
        ask_to_stop(ledger, say)
        with ledger.held(), stopping(say) as ear:
            ear.deaf = True
            dispatcher = reopen(ledger, account, say)
            dispatcher.end()
            return dispatcher.kept
    except (UserError, OSError, Unconfirmed) as error:
        say(f"note: {error}")
    return {}


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
    known = [ledger for ledger in ledgers() if flags.run in (None, ledger.run)]
    account, clock = Account(), SafeClock(max(map(_latest, known), default=0.0))
    kept: dict[str, str] = {}
    if not flags.now:
        for ledger in known:
            kept |= rescue(ledger, account)
    outcome = reap(account, clock, run=flags.run, keep=kept)
    for instance in sorted(outcome.destroyed):
        print(f"machine {instance}: destroyed")
    if not outcome.confirmed:
        raise SystemExit(_alarm(outcome))
    if kept:
        print("\n".join([*kept.values(), "reap --now destroys them all the same"]), file=sys.stderr)
        raise SystemExit(1)
    try:
        spent = f"${cost([record for ledger in known for record in ledger.records()], clock.now()):.2f}"
    except UserError:
        spent = "what the console says, for a ledger is damaged"
    print(f"nothing of ours is left at vast.ai; the runs in this computer's ledger cost at most {spent}")


def _latest(ledger: Ledger) -> float:
    try:
        return ledger.latest()
    except UserError:
        return 0.0


def _alarm(outcome: Outcome) -> int:
    left = ", ".join(map(str, sorted(outcome.left)))
    print(f"ERROR: {Unconfirmed(f'machines {left}'.strip(), outcome.error)}", file=sys.stderr)
    return 1
