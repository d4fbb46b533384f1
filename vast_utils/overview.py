"""Runs at a glance, whether their dispatcher is at work or not: what they cost, their machines, their commands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparse_coding.errors import UserError
from vast_utils.clock import SafeClock
from vast_utils.dispatch import Dispatcher
from vast_utils.ledger import Ledger
from vast_utils.reap import cost
from vast_utils.rental import Rental
from vast_utils.rows import Instance
from vast_utils.ssh import MachineError
from vast_utils.tasks import Task, read_tasks


def overview(runs: Sequence[Ledger], ask: bool) -> Iterator[str]:
    """Lines about each run. ask: the account and the machines are asked too, where there is something open."""
    if not runs:
        yield "no run has been launched from this computer"
    for ledger in runs:
        yield from _run(ledger, ask)


def _run(ledger: Ledger, ask: bool) -> Iterator[str]:
    begun, records = ledger.begun(), ledger.records()
    assert begun is not None, "a run that is shown was begun"
    caps, started = begun
    now = SafeClock(ledger.latest()).now()
    open_ = [record for record in records if not record.over]
    hands = "a dispatcher is at work" if ledger.busy else "no dispatcher is at work"
    if not open_ and not any(not task.over for task in read_tasks(ledger)):
        hands, now = "over", ledger.latest()
    spent = f"at most ${cost(records, now):.2f} of ${caps.max_cost:.2f}"
    yield f"run {ledger.run}: {hands}; cost {spent}, {(now - started) / 3600:.1f} of {caps.max_hours:g} h"
    seen, states = {}, {}
    if ask and open_:
        try:
            seen, states = _ask(ledger)
        except UserError as error:
            yield f"  vast.ai was not asked: {error}"
    for record in open_:
        there = seen[record.label].condition if record.label in seen else "not seen" if seen else ""
        yield (
            f"  machine {record.instance or '-'}: {record.gpu}, ${record.hourly:.3f}/h, {record.state}"
            f"{', ' + there if there else ''}, {(now - record.intended) / 3600:.1f} h, ${record.cost(now):.2f}"
        )
    for task in read_tasks(ledger):
        yield f"  {task.name}: {task.phase}{_where(task, records)}{states.get(task.name, '')}{_why(task)}"


def _where(task: Task, records: Sequence) -> str:
    on = next((record.instance for record in records if record.label == task.label), None)
    return f" on machine {on}" if on and task.phase == "running" else ""


def _why(task: Task) -> str:
    told = f", {task.failures} failures" if task.failures else ""
    return f"{told} ({task.why})" if task.why else told


def _ask(ledger: Ledger) -> tuple[dict[str, Instance], dict[str, str]]:
    """The run's machines as the account shows them, and how their jobs stand, by task."""
    from vast_utils.account import Account
    from vast_utils.session import reopen

    dispatcher = reopen(ledger, Account())
    seen, states = {one.label: one for one in dispatcher.desk_instances()}, {}
    for rental in dispatcher.fleet.rentals:
        task = dispatcher.queue.on(rental.record.label)
        if task and rental.record.label in seen:
            states[task.name] = _job(dispatcher, rental, task, seen[rental.record.label])
    return seen, states


def _job(dispatcher: Dispatcher, rental: Rental, task: Task, instance: Instance) -> str:
    dispatcher.crew.meet(rental, instance)
    try:
        job = dispatcher.crew.job(rental, task)
        ended = f" with exit code {job.rc}" if job.state == "done" else ""
        return f", its job is {job.state}{ended}, {job.seconds / 60:.1f} min, log {job.log_bytes} bytes"
    except MachineError as error:
        return f", its machine does not answer ({error})"
