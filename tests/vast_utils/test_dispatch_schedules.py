"""Hundreds of seeded schedules of faults and kills: never over the cap, nothing left behind, no result lost."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

from tests.vast_utils.desks import World, dispatcher, make_world
from tests.vast_utils.fake_crew import FakeCrew, FakeMachine
from tests.vast_utils.fake_market import Market, VirtualClock, random_hosts
from tests.vast_utils.fake_vast import Faults
from vast_utils.destroy import Unconfirmed
from vast_utils.dispatch import Dispatcher
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Need
from vast_utils.reap import cost, reap
from vast_utils.signals import Stopped
from vast_utils.tasks import Queue, Task, read_tasks

TASKS = tuple(Task(f"run-{i}", ("run.py", str(i)), f"run-{i}") for i in range(3))


class Killed(BaseException):
    """kill -9."""


@dataclass
class Schedule:
    """One seed: a world with its faults, jobs, and when the dispatcher is killed or told to stop."""

    world: World
    caps: Caps
    need: Need
    crew: FakeCrew
    tasks: tuple[Task, ...]
    rng: random.Random
    left: float
    """Things that are yet to be done before the dispatcher is killed."""
    kind: str = "kill"

    def dispatch(self, work=lambda one: run_here(one)) -> str:
        """A dispatcher from its start to its end; `done`, `stopped`, or the phase of what is left."""
        with dispatcher(self.world, self.caps) as fleet:
            queue = Queue(fleet.desk.ledger, self.tasks)
            one = Dispatcher(fleet, self.crew, queue, self.need, say=lambda line: None, poll=150.0)
            stopped = False
            try:
                work(one)
            except Stopped:
                self.left, stopped = float("inf"), True
            except Killed:
                one.close = lambda: None  # type: ignore[method-assign]  # the dead do not tidy up
                raise
            finally:
                one.close()
            phases = {task.phase for task in queue}
        if stopped:
            return "stopped"
        return "done" if phases == {"done"} else "failed" if "failed" in phases else "unfinished"

    def tick(self) -> None:
        """Before each request and each thing done on a machine."""
        self.left -= 1
        if self.left == 0:
            raise Killed if self.kind == "kill" else Stopped


def run_here(one: Dispatcher) -> None:
    """One machine after another, in this thread."""
    for rental in one.take_over() or [None]:
        one.work(rental)


def make(monkeypatch, folder, seed: int) -> Schedule:
    rng = random.Random(seed)
    clock = VirtualClock()
    began = clock.now() + rng.uniform(0, 7200)
    outage = (began, began + rng.choice([0, 0, 0, 120, 500, 3600]))
    faults = Faults(seed, rng.choice([0.0, 0.05, 0.2, 0.4]), outage)
    market = Market(clock, random_hosts(rng))
    market.machine_factory = lambda lease: FakeMachine(market)
    world = make_world(monkeypatch, folder, market, faults=faults, latency=rng.uniform(0, 2))
    caps = Caps(max_price=rng.uniform(0.25, 0.8), max_cost=rng.uniform(0.5, 4), max_hours=rng.uniform(1.5, 8))
    need = Need(max_price=caps.max_price, hours=caps.max_hours, interruptible=rng.random() < 0.5)
    fates = rng.choice([("",), ("", "", "crash", "kill", "wedge")])
    crew = FakeCrew(market, rng.uniform(600, 5400), rng, rng.choice([0, 0, 0.1, 0.4]), rng.choice([0, 0, 0.3]), fates)
    left = rng.randint(2, 120) if rng.random() < 0.6 else float("inf")
    tasks = TASKS[: rng.randint(1, 3)]
    made = Schedule(world, caps, need, crew, tasks, rng, left, rng.choice(["kill", "kill", "stop"]))
    crew.tick = made.tick
    handle, after = world.fake.handle, rng.random() < 0.5

    def deadly(*arguments):
        if not after:
            made.tick()
        reply = handle(*arguments)
        if after:
            made.tick()
        return reply

    world.fake.handle = deadly  # type: ignore[method-assign]
    return made


def play(schedule: Schedule) -> str:
    """A schedule to its end, taken over or rescued where the dispatcher was killed; how it ended."""
    try:
        try:
            return schedule.dispatch()
        except Killed:
            schedule.left = float("inf")
            schedule.world.clock.sleep(schedule.rng.uniform(0, 900))
            if schedule.rng.random() < 0.6:
                return "killed, " + schedule.dispatch()
            schedule.dispatch(lambda one: one.end())
            return "killed, rescued"
    except Unconfirmed:
        return "Unconfirmed"


def check(schedule: Schedule, ended: str) -> None:
    """The promises of the whole."""
    world, crew = schedule.world, schedule.crew
    tasks = read_tasks(Ledger("toy", world.folder))
    for task in tasks:
        if task.phase == "done":
            assert task.name in crew.complete
            assert crew.here[task.name] == crew.length
    left = [task for task in tasks if task.phase != "done"]
    assert not left or ended in ("stopped", "killed, rescued", "Unconfirmed") or any(task.why for task in left)
    assert ended == "Unconfirmed" or not world.market.leases
    assert ended == "Unconfirmed" or world.market.spent <= schedule.caps.max_cost
    outcome = reap(world.account, world.clock, world.folder, say=lambda line: None)
    assert not outcome.confirmed or not world.market.leases
    if not outcome.confirmed:
        assert outcome.error
        world.fake.faults = None
        outcome = reap(world.account, world.clock, world.folder, say=lambda line: None)
        immortal = {lease.id for lease in world.market.leases.values() if lease.fate.destroy_refusals == float("inf")}
        assert outcome.left == immortal == set(world.market.leases)
        assert outcome.confirmed == (not immortal)
    records = Ledger("toy", world.folder).records()
    if outcome.confirmed:
        assert all(record.over for record in records)
    assert cost(records, world.clock.now()) >= world.market.spent - 1e-9


def test_money_and_results_are_safe_in_every_schedule(monkeypatch, tmp_path):
    endings: Counter[str] = Counter()
    for seed in range(200):
        with monkeypatch.context() as patch:
            schedule = make(patch, tmp_path / str(seed), seed)
            try:
                ended = play(schedule)
                endings[ended] += 1
                schedule.left = float("inf")
                check(schedule, ended)
            except AssertionError as error:
                raise AssertionError(f"schedule {seed}: {error}") from error
    for word in ("done", "unfinished", "failed", "stopped", "killed, done", "killed, rescued", "Unconfirmed"):
        assert endings[word] >= 2, endings  # or the schedules would prove little
