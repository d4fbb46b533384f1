"""One machine's life on the fake market: every way in which renting, waiting, bidding and destroying goes wrong."""

from __future__ import annotations

import pytest

from tests.vast_utils.desks import CAPS, CONTAINER, NEED, dispatcher, make_world
from tests.vast_utils.fake_market import Fate, Host, Market, VirtualClock
from tests.vast_utils.fake_vast import Fault
from vast_utils.account import KeyRefused
from vast_utils.budget import OverBudget
from vast_utils.destroy import Unconfirmed
from vast_utils.ledger import Caps, Ledger
from vast_utils.offers import Need, price
from vast_utils.rental import Desk, Lost, NotRented, Rental
from vast_utils.rows import Instance


@pytest.fixture
def world(monkeypatch, tmp_path):
    return make_world(monkeypatch, tmp_path, Market(VirtualClock(), [Host(100, 10)]))


@pytest.fixture
def fleet(world):
    with dispatcher(world) as fleet:
        yield fleet


def intend(fleet, need: Need = NEED, hours: float = 2.0) -> Rental:
    offers = fleet.desk.account.search({}, 40.0, need.interruptible)
    cost = price(offers[0], need)
    assert cost is not None
    return Rental.intend(fleet.desk, offers[0], cost, 40.0, hours)


def on_disk(world) -> list[str]:
    return [record.state for record in Ledger("toy", world.folder).records()]


def test_a_whole_life(world, fleet):
    rental = intend(fleet)
    assert on_disk(world) == ["intended"]
    hour = 0.4 + 40 * 0.15 / 720
    assert rental.record.reserved == pytest.approx(2.0 * 1.05 * hour + 0.028)
    assert world.count("create") == 0
    rental.create(CONTAINER)
    assert on_disk(world) == ["rented"]
    assert world.market.leases[rental.record.instance].label == rental.record.label
    instance = rental.wait_running()
    assert instance.addresses
    rental.mark_ready()
    assert on_disk(world) == ["ready"]
    world.clock.sleep(3600)
    rental.destroy()
    assert on_disk(world) == ["destroyed"]
    assert not world.market.leases
    assert world.market.spent <= fleet.desk.budget.spent() < 0.6
    rental.destroy()  # again: nothing happens
    assert on_disk(world) == ["destroyed"]


def test_the_intent_is_on_disk_when_the_request_arrives(world, fleet):
    seen = []
    create = world.fake._create
    world.fake._create = lambda *args: (seen.extend(Ledger("toy", world.folder).records()), create(*args))[1]
    rental = intend(fleet)
    rental.create(CONTAINER)
    (record,) = seen
    assert (record.state, record.label) == ("intended", rental.record.label)


def test_an_answer_lost_after_it_rented_is_adopted(world, fleet):
    world.market.hosts[0].fate.hidden_for = 30
    world.fake.fail_next("create", Fault(502, after=True))
    rental = intend(fleet)
    rental.create(CONTAINER)
    assert world.count("create") == 1
    assert [rental.record.instance] == list(world.market.leases)
    assert rental.record.state == "rented"


def test_an_answer_lost_before_it_rented_is_in_doubt(world, fleet):
    world.fake.fail_next("create", Fault(502))
    rental = intend(fleet)
    with pytest.raises(NotRented):
        rental.create(CONTAINER)
    assert on_disk(world) == ["doubtful"]
    assert world.count("create") == 1
    assert world.count("list") >= 5
    fleet.close()
    assert on_disk(world) == ["refused"]


def test_a_doubt_that_no_list_resolves_is_loud(world, fleet):
    world.fake.fail_next("create", Fault(502, after=True))
    world.fake.fail_next("list", *[Fault(500)] * 500)
    with pytest.raises(Unconfirmed, match=r"cloud\.vast\.ai"):
        intend(fleet).create(CONTAINER)
    assert on_disk(world) == ["intended"]


def test_a_refusal_costs_nothing_and_bans_the_machine(world, fleet):
    world.market.hosts[0].gone = True
    rental = intend(fleet)
    with pytest.raises(NotRented, match="no_such_ask"):
        rental.create(CONTAINER)
    assert on_disk(world) == ["refused"]
    assert rental.record.ban
    assert fleet.desk.budget.free() == CAPS.max_cost


def test_a_request_to_slow_down_bans_nothing(world, fleet):
    world.fake.fail_next("create", Fault(429))
    rental = intend(fleet)
    with pytest.raises(NotRented, match="slow down"):
        rental.create(CONTAINER)
    assert on_disk(world) == ["refused"]
    assert not rental.record.ban


def test_a_refused_key_ends_the_run(world, fleet):
    world.fake.fail_next("create", Fault(401, body={}))
    with pytest.raises(KeyRefused):
        intend(fleet).create(CONTAINER)
    assert on_disk(world) == ["refused"]


def test_the_stopped_machine_that_too_low_a_bid_leaves_is_destroyed(world, fleet):
    rental = intend(fleet, Need(interruptible=True, max_price=0.6))
    world.market.hosts[0].min_bid = 0.5  # it rose since the search
    with pytest.raises(NotRented, match="bid_too_low"):
        rental.create(CONTAINER)
    assert on_disk(world) == ["destroyed"]
    assert not world.market.leases


@pytest.mark.parametrize(
    ("fate", "words"),
    [
        (Fate(runs_after=None), "did not start in time"),
        (Fate(stopped_at_birth=True), "stopped"),
        (Fate(runs_after=None, exits_after=100), "dead"),
        (Fate(runs_after=None, offline_after=100), "dead"),
        (Fate(runs_after=None, vanishes_after=100), "gone"),
        (Fate(price_factor=1.5), "costs"),
    ],
)
def test_machines_that_never_work(world, fleet, fate, words):
    world.market.hosts[0].fate = fate
    rental = intend(fleet)
    rental.create(CONTAINER)
    began = world.clock.now()
    with pytest.raises(Lost, match=words):
        rental.wait_running()
    assert world.clock.now() - began <= 930
    rental.destroy()
    assert not world.market.leases
    assert fleet.desk.budget.spent() >= world.market.spent


def test_a_slow_start_with_failing_reads_is_waited_for(world, fleet):
    world.market.hosts[0].fate = Fate(runs_after=400, hidden_for=45)
    rental = intend(fleet)
    rental.create(CONTAINER)
    world.fake.fail_next("show", *[Fault(502)] * 7, *[Fault(0)] * 4)
    assert rental.wait_running().condition == "running"


def test_a_price_read_back_slightly_higher_is_what_counts(world, fleet):
    """It was set aside for, so the machine is of use as long as before."""
    world.market.hosts[0].fate.price_factor = 1.03
    rental = intend(fleet)
    before = rental.useful_until
    rental.create(CONTAINER)
    rental.wait_running()
    assert rental.record.hourly == pytest.approx(0.4 * 1.03 + 40 * 0.15 / 720)
    assert rental.useful_until == before
    world.clock.sleep(rental.useful_until - world.clock.now())
    assert world.market.spent < fleet.desk.budget.spent() < rental.record.reserved


def test_what_is_fetched_beyond_what_was_reckoned_is_paid_out_of_what_is_set_aside(world, fleet):
    offer = fleet.desk.account.search({}, 40.0, False)[0]  # $0.004 per GB up
    cost = price(offer, NEED)
    assert cost is not None
    rental = Rental.intend(fleet.desk, offer, cost, 40.0, 2.0, NEED.up)
    rental.create(CONTAINER)
    before, reserved, spent = rental.useful_until, rental.record.reserved, fleet.desk.budget.spent()
    rental.came(1.5)
    assert rental.useful_until == before
    rental.came(100.5)
    assert fleet.desk.budget.spent() == pytest.approx(spent + 0.4)
    assert rental.useful_until == pytest.approx(before - 3600 * 0.4 / rental.record.dearest)
    assert rental.record.reserved == reserved
    desk = Desk(fleet.desk.account, Ledger("toy", world.folder), fleet.desk.budget, world.clock)
    Rental(desk, rental.record).came(100.0)  # `fetch` beside a dispatcher writes nothing
    assert Ledger("toy", world.folder).records() == [rental.record]


def test_a_machine_let_by_bid_though_meant_on_demand_is_lost(world, fleet):
    rental = intend(fleet)
    rental.create(CONTAINER)
    world.market.leases[rental.record.instance].bid = 0.1
    with pytest.raises(Lost, match="interruptible"):
        rental.wait_running()


def outbid(world, fleet, max_price: float, after: float = 600) -> tuple[Rental, Instance]:
    """An interruptible machine at a bid of 0.24 that is outbid after a while; the least bid is then 0.264."""
    world.market.hosts[0].fate.outbid_after = after
    rental = intend(fleet, Need(interruptible=True, max_price=max_price))
    rental.create(CONTAINER)
    rental.wait_running()
    rental.mark_ready()
    world.clock.sleep(after)
    return rental, fleet.look()[rental.record.instance]


def test_outbid_once_a_higher_bid_within_the_cap_brings_it_back(world, fleet):
    rental, instance = outbid(world, fleet, 0.6)
    assert instance.condition == "outbid"
    assert rental.raise_bid(instance).condition == "running"
    lease = world.market.leases[rental.record.instance]
    assert lease.bid == rental.record.bid == pytest.approx(1.2 * 1.1 * 0.24)
    assert rental.record.hourly == pytest.approx(lease.hourly)
    with pytest.raises(Lost, match="again"):
        rental.raise_bid(instance)
    assert world.count("bid") == 1


def test_a_lost_answer_to_a_bid_is_not_repeated(world, fleet):
    rental, instance = outbid(world, fleet, 0.6)
    world.fake.fail_next("bid", Fault(502, after=True))
    assert rental.raise_bid(instance).condition == "running"
    assert world.count("bid") == 1
    assert rental.record.hourly == pytest.approx(world.market.leases[instance.id].hourly)


def test_outbid_above_the_cap_is_lost(world, monkeypatch):
    with dispatcher(world, Caps(0.25, 3.0, 6.0)) as fleet:
        rental, instance = outbid(world, fleet, 0.25)
        with pytest.raises(Lost, match="allows no higher bid"):
            rental.raise_bid(instance)
        assert world.count("bid") == 0


def test_a_higher_bid_stays_within_what_was_set_aside(world, fleet):
    rental, instance = outbid(world, fleet, 0.6)
    before = rental.useful_until
    world.market.hosts[0].min_bid = 0.35  # a fifth more would make an hour more than 1.5 times as dear
    instance = fleet.look()[instance.id]
    rental.raise_bid(instance)
    assert rental.record.hourly == pytest.approx(rental.record.dearest) == pytest.approx(1.5 * (0.24 + 40 * 0.15 / 720))
    assert rental.useful_until == before
    world.clock.sleep(rental.useful_until - world.clock.now())
    assert world.market.spent <= rental.record.reserved


def test_a_destroy_that_does_not_take_is_asked_again(world, fleet):
    world.market.hosts[0].fate.destroy_refusals = 3
    rental = intend(fleet)
    rental.create(CONTAINER)
    world.fake.fail_next("destroy", *[Fault(429)] * 3)
    world.fake.fail_next("list", *[Fault(500)] * 3)
    rental.destroy()
    assert not world.market.leases
    assert on_disk(world) == ["destroyed"]


def test_a_destroy_that_cannot_be_confirmed_is_loud(world, fleet):
    world.market.hosts[0].fate.destroy_refusals = float("inf")
    rental = intend(fleet)
    rental.create(CONTAINER)
    with pytest.raises(Unconfirmed, match=r"MAY STILL BE RUNNING.*https://cloud.vast.ai/instances/"):
        rental.destroy()
    assert on_disk(world) == ["destroying"]


def test_silence_is_no_confirmation(world, fleet):
    """The machine is gone, but no list says so: that is not to be told as success."""
    rental = intend(fleet)
    rental.create(CONTAINER)
    world.fake.fail_next("list", *[Fault(500)] * 5000)
    with pytest.raises(Unconfirmed):
        rental.destroy()
    world.fake._next.clear()
    rental.destroy()
    assert on_disk(world) == ["destroyed"]


@pytest.mark.parametrize(("fails", "refusals"), [(6, 0), (0, 6), (2, 2)])
def test_a_list_that_lags_is_no_confirmation(world, fleet, fails, refusals):
    """A machine so new that no list shows it, and requests to destroy it that fail or do not take."""
    world.market.hosts[0].fate = Fate(hidden_for=25, destroy_refusals=refusals)
    rental = intend(fleet)
    rental.create(CONTAINER)
    world.fake.fail_next("destroy", *[Fault(500)] * fails)
    rental.destroy()
    assert not world.market.leases


def test_no_intent_without_money_or_after_a_reap(world, fleet):
    with pytest.raises(OverBudget):
        intend(fleet, Need(max_price=0.6), hours=0.1)
    Ledger("toy", world.folder).end()
    with pytest.raises(Exception, match="ended by reap"):
        intend(fleet)
    assert on_disk(world) == []


def test_a_state_cannot_be_skipped(fleet):
    rental = intend(fleet)
    with pytest.raises(AssertionError, match="intended -> ready"):
        rental.mark_ready()
