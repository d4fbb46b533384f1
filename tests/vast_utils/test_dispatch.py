"""A dispatcher in virtual time: one thing goes wrong, and what it does about it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.desks import CAPS, NEED, World, content, dispatcher, furnish, make_world
from tests.vast_utils.fake_crew import FakeCrew, FakeMachine
from vast_utils.dispatch import PATIENCE, Dispatcher
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Need
from vast_utils.results import NotFetched
from vast_utils.tasks import Queue, Task, read_tasks
from vast_utils.workers import run

TASK = Task("run-0", ("run.py",), "run-0")


@pytest.fixture
def world(monkeypatch, tmp_path) -> World:
    made = make_world(monkeypatch, tmp_path)
    made.market.machine_factory = lambda lease: FakeMachine(made.market)
    return made


@pytest.fixture
def crew(world) -> FakeCrew:
    return FakeCrew(world.market, 3000.0, random.Random(0))


def dispatch(
    world: World,
    crew: FakeCrew,
    caps: Caps = CAPS,
    need: Need = NEED,
    detach: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
    tasks: tuple[Task, ...] = (TASK,),
) -> list[str]:
    """From start to end; what was said."""
    said: list[str] = []
    crew.tick = meanwhile
    with dispatcher(world, caps) as fleet:
        fleet.say = said.append
        one = Dispatcher(fleet, crew, Queue(fleet.desk.ledger, tasks), need, said.append, detach=detach, poll=60.0)
        try:
            for rental in one.take_over() or [None]:
                one.work(rental)
        finally:
            one.close()
            said += one.kept.values()
    return said


def task(world: World) -> Task:
    return read_tasks(Ledger("toy", world.folder))[0]


def test_without_trouble_it_is_done_on_one_machine(world, crew):
    said = dispatch(world, crew)
    assert task(world).phase == "done"
    assert crew.here == {"run-0": 3000.0}
    assert world.count("create") == 1
    assert not world.market.leases
    assert 3000 < task(world).seconds < 3600
    assert any("done after 50.0 minutes" in line for line in said)


@pytest.mark.parametrize(
    ("fates", "failures", "machines"),
    [(("crash",), 3, 1), (("kill",), 4, 4), (("wedge",), 4, 4)],
)
def test_a_command_that_never_gets_through_is_given_up_and_what_it_made_is_here(world, crew, fates, failures, machines):
    crew.fates, crew.length = fates, 10_000.0
    dispatch(world, crew, Caps(0.6, 20.0, 24.0), Need(max_price=0.6, hours=20.0))
    assert (task(world).phase, task(world).failures) == ("failed", failures)
    assert world.count("create") == machines  # a crash is not the machine's fault
    assert crew.here["run-0"] >= 1200.0  # and each start went on from the one before
    assert not world.market.leases


def test_a_machine_that_does_not_answer_is_replaced(world, crew):
    def hang() -> None:
        lease = next(iter(world.market.leases.values()), None)
        if lease and lease.id == 5001 and crew.here.get("run-0", 0) > 1000:
            lease.machine.pause()

    before = world.clock.now()
    said = dispatch(world, crew, meanwhile=hang)
    assert task(world).phase == "done"
    assert [lease.id for lease in world.market.ended] == [5001, 5002]
    assert any("it does not answer" in line for line in said)
    assert PATIENCE < world.clock.now() - before - 3000 < PATIENCE + 1800


def test_an_outbid_machine_is_bid_for_once_and_its_job_started_again(world, crew):
    world.market.hosts[0].fate.outbid_after = 1500.0
    dispatch(world, crew, need=Need(max_price=0.6, hours=2.0, interruptible=True))
    assert task(world).phase == "done"
    assert world.count("bid") == 1
    assert world.count("create") == 1


def test_before_its_time_is_up_a_job_saves_and_is_fetched(world, crew):
    crew.length = 20_000.0
    said = dispatch(world, crew, Caps(0.6, 3.0, 2.0))
    assert task(world).phase == "waiting"
    assert "not enough" in task(world).why  # nothing is left for another machine
    assert crew.here["run-0"] > 5000
    assert any("is used up" in line for line in said)
    assert not world.market.leases


def test_results_that_do_not_fit_here_keep_their_machine_and_come_later(world, crew):
    fetch = crew.fetch

    def full(rental, task, last):
        if last:
            raise UserError("outputs has 0.1 GB free; make room")
        return fetch(rental, task, last)

    crew.fetch = full  # type: ignore[method-assign]
    with pytest.raises(NotFetched, match=r"do not fit here.*it stays for"):
        dispatch(world, crew)
    assert list(world.market.leases) == [5001]
    crew.fetch = fetch  # type: ignore[method-assign]
    dispatch(world, crew)
    assert task(world).phase == "done"
    assert world.count("create") == 1
    assert not world.market.leases


def test_left_alone_and_taken_over(world, crew):
    said = dispatch(world, crew, detach=True)
    assert "goes on by itself on machine 5001" in said[-1]
    assert list(world.market.leases) == [5001]
    world.clock.sleep(3600)
    said = dispatch(world, crew)
    assert "is there from before, with run-0" in said[0]
    assert task(world).phase == "done"
    assert world.count("create") == 1
    assert not world.market.leases


def test_a_machine_that_vanished_while_nobody_looked_is_replaced(world, crew):
    dispatch(world, crew, detach=True)
    world.market.end(world.market.leases[5001])
    dispatch(world, crew)
    assert task(world).phase == "done"
    assert world.count("create") == 2


def test_a_machine_does_one_command_after_another(world, crew):
    crew.length = 900.0
    tasks = tuple(Task(f"run-{i}", ("run.py", str(i)), f"run-{i}") for i in range(3))
    dispatch(world, crew, tasks=tasks)
    assert [one.phase for one in read_tasks(Ledger("toy", world.folder))] == ["done"] * 3
    assert world.count("create") == 1


def test_more_machines_than_commands_are_not_rented(world, crew):
    with dispatcher(world) as fleet:
        one = Dispatcher(fleet, crew, Queue(fleet.desk.ledger, (TASK,)), NEED, lambda line: None, poll=60.0)
        run(one, 4, halt=None)  # type: ignore[arg-type]  # one machine needs no thread
        one.close()
    assert world.count("create") == 1
    assert crew.complete == {"run-0"}


def once(world: World, crew: FakeCrew, what: Callable[[], None], seconds: float = 1100.0) -> Callable[[], None]:
    """Does it once, when the first machine has worked for so long."""
    began, did = world.clock.now(), []

    def meanwhile() -> None:
        if not did and 5001 in world.market.leases and world.clock.now() - began > seconds:
            did.append(True)
            what()

    return meanwhile


def test_whatever_ends_a_dispatcher_its_job_saves_and_is_fetched_first(world, crew):
    """A full disk, a bug, another machine that resists: this one is about to be destroyed with all that is on it."""

    def trouble() -> None:
        raise UserError("the ledger cannot be written")

    with pytest.raises(UserError, match="cannot be written"):
        dispatch(world, crew, meanwhile=once(world, crew, trouble))
    assert crew.here["run-0"] % 300 > 0  # saved when it was stopped, not a checkpoint
    assert (task(world).phase, task(world).why) == ("waiting", "the ledger cannot be written")
    assert not world.market.leases


def test_a_log_that_cannot_be_kept_here_loses_no_results(world, crew):
    log = crew.log

    def full(rental, task, offset):
        if crew.here.get("run-0", 0) > 500:
            raise OSError(28, "No space left on device")
        return log(rental, task, offset)

    crew.log = full  # type: ignore[method-assign]
    with pytest.raises(OSError, match="No space"):
        dispatch(world, crew)
    assert crew.here["run-0"] % 300 > 0
    assert not world.market.leases


def test_one_list_that_lacks_a_machine_does_not_end_it(world, crew):
    listed = world.fake._list

    def lacking(*arguments):
        world.fake._list = listed
        return listed(None, {"after_token": ["9999"]}, None)

    dispatch(world, crew, meanwhile=once(world, crew, lambda: setattr(world.fake, "_list", lacking)))
    assert world.fake._list is listed  # it was asked
    assert task(world).phase == "done"
    assert world.count("create") == 1


def test_a_machine_that_gets_dearer_is_given_back_with_its_results_here(world, crew):
    def dearer() -> None:
        world.market.leases[5001].fate.price_factor = 1.5

    said = dispatch(world, crew, meanwhile=once(world, crew, dearer))
    assert any("as shown" in line for line in said)
    assert task(world).phase == "done"
    assert task(world).failures == 0
    assert crew.bases[-1] % 300 > 0  # what the second machine began with was saved when the first was stopped


def test_a_machine_that_cannot_end_itself_is_not_left_alone(world, crew):
    crew.no_watchdog = "no CONTAINER_API_KEY in its environment"
    said = dispatch(world, crew, detach=True)
    assert any("note: machine 5001 cannot end itself (no CONTAINER_API_KEY" in line for line in said)
    assert any("it is not left alone" in line for line in said)
    assert task(world).phase == "done"
    assert not world.market.leases


def test_a_stop_keeps_the_machine_whose_results_do_not_fit_here_and_ends_the_others(world, crew):
    dispatch(world, crew, detach=True)
    fetch = crew.fetch

    def full(rental, task, last):
        raise UserError("outputs has 0.1 GB free; make room")

    crew.fetch = full  # type: ignore[method-assign]
    with dispatcher(world) as fleet:
        fleet.hire(NEED, furnish, 0.6, content)
        one = Dispatcher(fleet, crew, Queue(fleet.desk.ledger), NEED, lambda line: None)
        one.end()
        assert "do not fit here" in "".join(one.kept.values())
    assert list(world.market.leases) == [5001]
    crew.fetch = fetch  # type: ignore[method-assign]
    with dispatcher(world) as fleet:
        one = Dispatcher(fleet, crew, Queue(fleet.desk.ledger), NEED, lambda line: None)
        one.end()
        assert not one.kept
    assert crew.here["run-0"] > 0
    assert not world.market.leases
