"""All machines of one run: hiring offer after offer until one works, taking over after a crash, ending every one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

from sparse_coding.errors import UserError
from vast_utils.account import Account, AccountError, Busy, Container, Doubtful, KeyRefused
from vast_utils.budget import Budget
from vast_utils.clock import Clock
from vast_utils.destroy import QUIET_WHEN_NEW, Unconfirmed, destroy_all, quiet_for
from vast_utils.ledger import Ledger
from vast_utils.offers import Need, Price, ranked
from vast_utils.rental import POLL, Desk, Lost, NotRented, Rental
from vast_utils.rows import Instance, Offer

ATTEMPTS = 8
SEARCHES = 3
SEARCH_PAUSE = 30.0
ADMISSIONS = 5
Check = Callable[[Rental, Instance], None]


class NoMachine(UserError):
    """No machine that works was to be had: what was tried and why each came to nothing."""


class Fleet:
    """The rentals of a run, under its ledger's lock (`with ledger.held()`).

    say: takes a line about what happens. Whoever makes a fleet calls `recover()` first and `close()` in a `finally`.
    """

    def __init__(
        self, account: Account, ledger: Ledger, budget: Budget, clock: Clock, say: Callable[[str], None] = print
    ):
        self.desk, self.say = Desk(account, ledger, budget, clock), say

    @property
    def rentals(self) -> list[Rental]:
        """Those that are not over, as the ledger has them."""
        return [Rental(self.desk, record) for record in self.desk.ledger.open_records()]

    def recover(self) -> list[Rental]:
        """After a crash: settle every rental that was left open; the machines that are ours and may go on working.

        A request without an answer is looked for by its label; what was being destroyed is destroyed; what never
        became ready is destroyed too, for nobody knows what it lacks. One that resists keeps no other from its work.
        """
        alive = []
        for rental in self.rentals:
            if rental.record.state == "ready":
                alive.append(rental)
            else:
                self.say(f"left over from before: {rental.record.label} ({rental.record.state}); ending it")
                self.end(rental)
        return alive

    def end(self, rental: Rental) -> None:
        """Destroy a machine that is left over; one that resists is said loudly, and `close` tries again."""
        try:
            rental.destroy()
        except Unconfirmed as error:
            self.say(f"ERROR: {error}")

    def hire(
        self,
        need: Need,
        furnish: Callable[[Rental], Container],
        hours: float,
        check: Check,
        public_key: str | None = None,
        attempts: int = ATTEMPTS,
    ) -> tuple[Rental, Instance]:
        """Rent the cheapest machine that works: running, reachable by `public_key`, and `check` content with it.

        furnish: what to start there; it knows the label and how long the machine is of use, for its own watchdog.
        check: raises `Lost` where the machine fails (ssh, nvidia-smi, a download). Machines that fail are destroyed,
        banned for this run, and the next is taken. Raises `NoMachine`, `OverBudget`, or `Unconfirmed`.
        """
        failures: list[str] = []
        cap = self.desk.budget.caps.max_price
        need = replace(need, max_price=min(need.max_price or cap, cap))
        for offer, price in self._offers(need, failures):
            if len(failures) >= attempts:
                break
            name = f"offer {offer.id}, {offer.gpu_name}, ${price.hourly:.3f}/h"
            try:
                with self.desk.budget.lock:
                    if self._taken(offer):  # by another worker, since the search
                        continue
                    rental = Rental.intend(self.desk, offer, price, need.disk, hours, need.up)
                self.say(f"renting {name}")
                rental.create(furnish(rental))
            except NotRented as error:
                failures.append(f"{name}: {error}")
                continue
            try:
                instance = rental.wait_running()
                if public_key is not None:
                    self._admit(instance, public_key)
                check(rental, instance)
            except (Lost, AccountError) as error:
                failures.append(f"{name}: {error}")
                self.give_up(rental, str(error))
                continue
            rental.mark_ready()
            return rental, instance
        raise NoMachine("no machine that works was to be had: " + ("; ".join(failures) or "no offer fits"))

    def give_up(self, rental: Rental, reason: str) -> None:
        """Destroy a machine that is of no use and do not take it again."""
        self.say(f"machine {rental.record.instance}: {reason}; destroying it")
        rental.ban(reason)
        rental.destroy()

    def look(self) -> dict[int, Instance]:
        """The run's live machines by number, from one listing; one of ours that should not be there is destroyed."""
        self.desk.ledger.seen(self.desk.clock.now())
        listed = self.desk.account.instances()
        open_ = {rental.record.label: rental for rental in self.rentals}  # read after: a new one is in the ledger first
        seen = {}
        for instance in listed:
            if not self.desk.ledger.owns(instance.label):
                continue
            rental = open_.get(instance.label)
            if rental is None or rental.record.instance not in (None, instance.id):
                self.say(f"machine {instance.id} ({instance.label}) should not be there; destroying it")
                self._destroy_stray(instance.id)
            elif rental.record.state == "doubtful":
                self.say(f"machine {instance.id} came of a request without an answer; destroying it")
                rental.found(instance.id)
                rental.destroy()
            else:
                seen[instance.id] = instance
        return seen

    def close(self, keep: Collection[str] = ()) -> None:
        """End everything of this run but the rentals whose labels `keep` has, and be sure of it. Raises `Unconfirmed`.

        A ledger that cannot be read or written keeps no machine alive: that is raised as `UserError` after the end.
        """
        ledger, clock, trouble, open_ = self.desk.ledger, self.desk.clock, None, []
        self.desk.counter.shut()
        try:
            open_ = [record for record in ledger.open_records() if record.label not in keep]
            for record in open_:
                if record.state in ("rented", "ready"):
                    ledger.change(record, state="destroying")
        except UserError as error:
            trouble = error
        numbers = {record.instance for record in open_ if record.instance is not None}
        quiet = QUIET_WHEN_NEW if trouble else quiet_for(open_, clock.now())

        def ours(one: Instance) -> bool:
            return one.label not in keep and ledger.owns(one.label)

        outcome = destroy_all(self.desk.account, clock, numbers, ours, quiet=quiet)
        if not outcome.confirmed:
            raise Unconfirmed(f"machines of run {ledger.run} {_listed(outcome.left)}".rstrip(), outcome.error)
        if trouble:
            raise trouble
        ledger.write_off(outcome.labels, clock.now(), keep)

    def _destroy_stray(self, number: int) -> None:
        outcome = destroy_all(self.desk.account, self.desk.clock, [number], lambda one: False)
        if not outcome.confirmed:
            raise Unconfirmed(f"machine {number} of run {self.desk.ledger.run}", outcome.error)

    def _admit(self, instance: Instance, public_key: str) -> None:
        """Attach the key; asking again does no harm."""
        for left in reversed(range(ADMISSIONS)):
            try:
                return self.desk.account.attach_ssh(instance.id, public_key)
            except (Busy, Doubtful):
                if not left:
                    raise
                self.desk.clock.sleep(POLL)

    def _offers(self, need: Need, failures: list[str]) -> Iterator[tuple[Offer, Price]]:
        """Offers that fit and are not banned, cheapest first; searched anew when they are used up."""
        for search in range(SEARCHES):
            if search:
                self.desk.clock.sleep(SEARCH_PAUSE)
            try:
                found = ranked(self.desk.account, need)
            except KeyRefused:
                raise
            except AccountError as error:
                failures.append(f"search: {error}")
                continue
            for offer, price in found:
                if not self._taken(offer):
                    yield offer, price

    def _taken(self, offer: Offer) -> bool:
        """Whether an offer is of a machine that this run does not take again, or is one that it has."""
        records = self.desk.ledger.records()
        banned = {record.machine for record in records if record.ban}
        return offer.machine_id in banned or offer.id in {record.offer for record in records if not record.over}


def _listed(numbers: Collection[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
