"""Commands to their end on rented machines: a lost machine is replaced, and its work goes on from what was fetched.

All that matters is on disk before it is done (ledger, tasks), so that this program may be killed anywhere: started
again, it finds the machines and their jobs, and goes on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from vast_utils.account import AccountError, Container
from vast_utils.budget import OverBudget
from vast_utils.clock import Clock
from vast_utils.crew import Crew
from vast_utils.destroy import Unconfirmed
from vast_utils.fleet import Fleet, NoMachine
from vast_utils.job import Job
from vast_utils.ledger import run_of
from vast_utils.offers import Need
from vast_utils.rental import Lost, Rental
from vast_utils.results import NotFetched, Results
from vast_utils.rows import Instance
from vast_utils.signals import Stopped
from vast_utils.ssh import HostKeyChanged, MachineError
from vast_utils.tasks import Queue, Task
from vast_utils.verdict import last_words, verdict

POLL = 15.0
FETCH_EVERY = 60.0
PATIENCE = 600.0
"""A machine that does not answer for so many seconds is lost."""
WIND_DOWN = 300.0
"""So long before a machine must be given back its job is stopped, to save and to be fetched."""
OFFERS = 5
"""Machines that are tried before it is said that none works."""
RETRIES = 3


class TimeUp(Exception):
    """The machine must be given back before the job has ended."""


class Dispatcher:
    """Works off a queue. Whoever makes one calls `close()` in a `finally`."""

    def __init__(
        self,
        fleet: Fleet,
        crew: Crew,
        queue: Queue,
        need: Need,
        say: Callable[[str], None] = print,
        show: Callable[[Task, str], None] = lambda task, line: None,
        retries: int = RETRIES,
        detach: bool = False,
        poll: float = POLL,
    ):
        """say: takes what happens; show: takes the lines of the jobs' logs. need.hours: most that a machine is for."""
        self.fleet, self.crew, self.queue, self.need = fleet, crew, queue, need
        self.say, self.retries, self.detach, self.poll = say, retries, detach, poll
        self.clock: Clock = fleet.desk.clock
        self.carrying: set[threading.Thread] = set()
        """Threads that have a job on a machine."""
        self.results = Results(crew, queue, self.clock, say, show)
        self.kept = self.results.kept

    def take_over(self) -> list[Rental]:
        """Settle what an earlier dispatcher left; the machines that still work on a task."""
        alive = self.fleet.recover()
        self.queue.begin({rental.record.label for rental in alive})
        working = []
        for rental in alive:
            if task := self.queue.on(rental.record.label):
                self.say(f"machine {rental.record.instance} is there from before, with {task.name}: going on with it")
                working.append(rental)
            else:
                self.fleet.end(rental)
        return working

    def work(self, rental: Rental | None = None) -> None:
        """Do tasks until none waits, on one machine at a time; the last one is given back.

        Ends early where the caps or the market leave no machine: what is not done waits. Raises `Stopped`,
        `Unconfirmed`, `NotFetched`, and `UserError` for what only the user can mend.
        """
        task = self.queue.on(rental.record.label) if rental else None
        while task := task or self.queue.take():
            try:
                rental = rental or self._hire()
                rental = self._carry(rental, self.queue.place(task, rental.record.label))
            except (OverBudget, NoMachine) as error:
                self.queue.change(task, phase="waiting", why=str(error))
                self.say(f"{task.name}: {error}")
                return
            except NotFetched:
                raise
            except (Stopped, Exception) as error:
                self.queue.change(task, phase="waiting", why=str(error) or "stopped")
                raise
            if rental and rental.record.label in self.kept:
                return
            task = None
        if rental is not None:
            self.give_back(rental)

    def give_back(self, rental: Rental) -> None:
        """End a machine whose results are all here; its watchdog is told too, in case our request is not heard."""
        with suppress(MachineError):
            self.crew.release(rental)
        self.crew.forget(rental)
        rental.destroy()
        self.say(f"machine {rental.record.instance} is destroyed; it cost ${rental.record.cost(self.clock.now()):.2f}")

    def _hire(self) -> Rental:
        def furnish(rental: Rental) -> Container:
            self.clock.sleep(0.0)  # nothing is rented once it is to stop
            return self.crew.furnish(rental)

        key, hours = self.crew.public_key, self.need.hours
        rental, _ = self.fleet.hire(self.need, furnish, hours, self.crew.check, key, attempts=OFFERS)
        if why := self.crew.unguarded(rental):
            self.say(
                f"note: machine {rental.record.instance} cannot end itself ({why}): while this computer sleeps or is "
                "off it goes on costing money"
            )
        return rental

    def _carry(self, rental: Rental, task: Task) -> Rental | None:
        """A task on a machine; the machine where it can be used on."""
        began = self.clock.now()
        self.carrying.add(threading.current_thread())
        try:
            self._follow(rental, task)
            return rental
        except Lost as error:
            failures = self.queue[task.name].failures + 1
            over = failures > self.retries
            self.queue.change(task, phase="failed" if over else "waiting", failures=failures, why=str(error))
            self.crew.forget(rental)
            self.fleet.give_up(rental, str(error))
        except TimeUp as error:
            self.say(f"{task.name}: {error}")
            self.results.wind_down(rental, task)
            self.queue.change(task, phase="waiting", why=str(error))
            self.give_back(rental)
        except NotFetched:
            raise
        except (Stopped, Exception) as error:  # whatever it is: the machine will be destroyed, with all that is on it
            why = f"{error}; " if str(error) else ""
            self.say(f"{task.name}: {why}stopping it and fetching its results; once more Ctrl-C leaves them")
            self.results.wind_down(rental, task)
            raise
        finally:
            self.carrying.discard(threading.current_thread())
            self.queue.change(task, seconds=self.queue[task.name].seconds + self.clock.now() - began)
        return None

    def _follow(self, rental: Rental, task: Task) -> None:
        """Start a task's job unless it is there, watch it, fetch as it goes; returns when the task is over."""
        answered, fetched = self.clock.now(), self.clock.now()
        while True:
            self._look(rental)
            try:
                job = self.crew.job(rental, task)
                if job.state != "absent":
                    self.results.log(rental, task)
                if self._decide(rental, task, job):
                    return
                if job.lives and self.detach and self._left_alone(rental, task):
                    return
                if job.state != "absent" and self.clock.now() - fetched >= FETCH_EVERY:
                    self.results.fetch(rental, task, last=False)
                    fetched = self.clock.now()
                answered = self.clock.now()
            except HostKeyChanged as error:
                raise Lost(str(error)) from None
            except MachineError as error:
                if self.clock.now() - answered > PATIENCE:
                    self.results.rescue(rental, task, error)
                    raise Lost(f"it does not answer ({error})") from None
            self.clock.sleep(self.poll)

    def _left_alone(self, rental: Rental, task: Task) -> bool:
        """Whether a machine may go on with nobody to look after it: only if its watchdog will end it."""
        if why := self.crew.unguarded(rental):
            self.detach = False
            self.say(f"machine {rental.record.instance} cannot end itself ({why}): it is not left alone")
            return False
        until = (rental.useful_until - self.clock.now()) / 3600
        where = f"machine {rental.record.instance}, for {until:.1f} h at most"
        self.kept[rental.record.label] = f"{task.name} goes on by itself on {where}"
        return True

    def _look(self, rental: Rental) -> None:
        """What the account says of the machine, and the clock of its money. Raises `Lost` or `TimeUp`."""
        try:
            number = rental.record.instance or 0
            instance = self.fleet.look().get(number) or self.fleet.desk.account.show(number)
            if instance is None:
                raise Lost("it is gone")  # by the list and by itself: one list may lack it
            try:
                rental.check_price(instance)
            except Lost as error:
                raise TimeUp(str(error)) from None  # it works: what it made is fetched first
            if instance.condition == "outbid":
                self.say(f"machine {instance.id} was outbid")
                instance = rental.raise_bid(instance)
            elif instance.condition not in ("running", "starting"):  # a restart is waited for as long as ssh is
                raise Lost(f"it is {instance.condition} ({instance.status_msg or 'no reason given'})")
            self.crew.meet(rental, instance)
        except AccountError:
            pass  # a service that does not answer has taken nothing away; what it may cost is capped by the clock
        if self.clock.now() >= rental.useful_until - WIND_DOWN:
            raise TimeUp("the time or the money of its machine is used up")

    def _decide(self, rental: Rental, task: Task, job: Job) -> bool:
        """Do what a job's state calls for; whether its task is over. Raises `Lost` where the machine is to blame."""
        if job.state == "absent":
            self.crew.start(rental, self.queue[task.name], again=False)
            self.say(f"{task.name}: started on machine {rental.record.instance}")
        elif job.state == "dead":
            self._again(rental, task, "its processes are gone: the machine was restarted or ran out of memory")
        elif job.state == "wedged":
            self.crew.stop(rental, task)
            self.results.fetch(rental, task, last=True)
            raise Lost(f"{task.name} stood still for {job.still_seconds / 60:.0f} minutes")
        elif job.state == "done":
            return self._ended(rental, task, job)
        return False

    def _ended(self, rental: Rental, task: Task, job: Job) -> bool:
        """A job that ended: whether its task is over. What it made is here before anything else happens."""
        self.results.log(rental, task, last=True)
        tail = self.results.tail(rental, task, job.log_bytes)
        self.results.fetch(rental, task, last=True)
        told = f"exit code {job.rc}: {last_words(tail)}"
        ruling = verdict(job.rc, tail)
        if ruling == "machine":
            raise Lost(f"{task.name} ended with {told}")
        if ruling == "again" and self.queue[task.name].failures < self.retries:
            self._again(rental, task, told)
            return False
        done = ruling == "done"
        self.queue.change(task, phase="done" if done else "failed", why="" if done else told)
        self.say(f"{task.name}: " + (f"done after {job.seconds / 60:.1f} minutes" if done else f"failed with {told}"))
        return True

    def _again(self, rental: Rental, task: Task, why: str) -> None:
        """Start the job once more on the machine that it was on."""
        failures = self.queue[task.name].failures + 1
        if failures > self.retries:
            raise Lost(f"{task.name}: {why}")
        self.queue.change(task, failures=failures, why=why)
        self.say(f"{task.name}: {why}; starting it again")
        self.crew.start(rental, task, again=True)

    def desk_instances(self) -> list[Instance]:
        """The run's machines as the account lists them."""
        run = self.queue.ledger.run
        return [one for one in self.fleet.desk.account.instances() if run_of(one.label) == run]

    def end(self) -> None:
        """Stop whatever runs, fetch it, and end every machine but those whose results do not fit here: see `kept`.

        Raises `Unconfirmed`.
        """
        for rental in self.fleet.recover():
            task = self.queue.on(rental.record.label)
            with suppress(Lost, TimeUp, Unconfirmed):
                self._look(rental)
            if task:
                try:
                    self.results.wind_down(rental, task)
                except NotFetched:
                    continue
                self.queue.change(task, phase="waiting", why="stopped")
        self.close()

    def close(self) -> None:
        """End every machine of the run but those that are kept. Raises `Unconfirmed`."""
        self.fleet.close(self.kept)
