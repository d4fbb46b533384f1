"""Caps: what is set aside adds up to no more than the cap, in every order of rentals."""

from __future__ import annotations

import dataclasses
import random

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.fake_market import VirtualClock
from vast_utils.budget import DOUBT_HOURS, MARGIN, Budget, OverBudget
from vast_utils.destroy import LIMIT
from vast_utils.ledger import Caps, Ledger, Record, State

CAPS = Caps(max_price=0.5, max_cost=2.0, max_hours=6.0)


@pytest.fixture
def budget(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # nothing here crashes the computer itself
    clock = VirtualClock(0.0)
    with Ledger("toy", tmp_path).held() as ledger:
        yield Budget(CAPS, 0.0, ledger, clock)


def rented(
    budget: Budget, reserved: float, hourly: float = 0.4, traffic: float = 0.0, state: State = "rented"
) -> Record:
    record = Record(
        label=budget.ledger.label(),
        state=state,
        offer=1,
        machine=1,
        gpu="",
        hourly=hourly,
        dearest=hourly,
        traffic=traffic,
        reserved=reserved,
        disk=1,
        intended=budget.clock.now(),
        instance=1,
    )
    return budget.ledger.write(record)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_cap_is_a_number_above_0(value):
    """Nothing compares as over a cap that is no number."""
    for name in ("max_price", "max_cost", "max_hours"):
        with pytest.raises(UserError, match=name.replace("_", "-")):
            dataclasses.replace(CAPS, **{name: value})


def test_a_grant_is_bounded_by_all_three_caps(budget):
    grant = budget.grant(0.4, 0.2, 3.0)
    assert (grant.dollars, grant.hours) == (pytest.approx(1.4), 3.0)
    grant = budget.grant(0.4, 0.2, 100.0)
    assert (grant.dollars, grant.hours) == (pytest.approx(2.0), pytest.approx(4.5))
    budget.clock.sleep(4 * 3600)
    assert budget.grant(0.4, 0.2, 100.0).hours == pytest.approx(2.0)
    with pytest.raises(OverBudget, match=r"cap of \$0.500/h"):
        budget.grant(0.51, 0, 1.0)


def test_what_is_set_aside_is_not_free(budget):
    record = rented(budget, 1.5)
    assert budget.free() == pytest.approx(0.5)
    with pytest.raises(OverBudget, match=r"\$0.50 of \$2.00"):
        budget.grant(0.4, 0.4, 1.0)
    budget.clock.sleep(3600)
    assert budget.spent() == pytest.approx(0.4)
    budget.ledger.change(record, state="destroyed", ended=budget.clock.now())
    assert budget.free() == pytest.approx(1.6)
    budget.clock.sleep(3600)
    assert budget.spent() == pytest.approx(0.4)


def test_a_machine_that_outlives_its_reserve_counts_in_full(budget):
    rented(budget, 0.4)
    budget.clock.sleep(2 * 3600)
    assert budget.free() == pytest.approx(1.2)


def test_doubt_costs_something(budget):
    record = rented(budget, 1.5, state="doubtful")
    budget.ledger.change(record, instance=None)
    assert budget.free() == pytest.approx(2.0 - 0.4 * DOUBT_HOURS)
    assert budget.spent() == 0


def test_there_is_time_to_destroy(budget):
    """A machine is given back so early that even a destroy that takes its longest is over before the money is."""
    assert MARGIN > LIMIT
    record = rented(budget, 0.8, traffic=0.4)
    assert budget.useful_until(record) == pytest.approx(3600 - MARGIN)
    long = rented(budget, 40.0)
    assert budget.useful_until(long) == pytest.approx(6 * 3600 - MARGIN)


@pytest.mark.parametrize("seed", range(20))
def test_rentals_that_keep_their_reserve_never_pass_the_cap(seed, budget):
    rng, live = random.Random(seed), []
    for _ in range(60):
        if rng.random() < 0.5 or not live:
            hourly = rng.uniform(0.05, 0.5)
            try:
                grant = budget.grant(hourly, rng.uniform(0, 0.05), rng.uniform(0.5, 3))
            except OverBudget:
                continue
            live.append(rented(budget, grant.dollars, hourly))
        else:
            record = live.pop(rng.randrange(len(live)))
            until = rng.uniform(budget.clock.now(), max(budget.clock.now(), record.deadline()))
            budget.clock.sleep(min(600.0, until - budget.clock.now()))
            budget.ledger.change(record, state="destroyed", ended=budget.clock.now())
        for record in [record for record in live if record.deadline() <= budget.clock.now() + 600]:
            live.remove(record)
            budget.ledger.change(record, state="destroyed", ended=budget.clock.now())
        assert budget.free() >= -1e-9
        assert budget.spent() <= CAPS.max_cost + 1e-9
