"""Offers: filters in the API's units, the price of a whole job, what the verb shows."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.desks import make_world
from tests.vast_utils.fake_market import Host
from tests.vast_utils.fake_vast import KEY, Fault, in_process
from vast_utils import offers
from vast_utils.offers import Need, Price, fits, price, ranked
from vast_utils.rows import Offer


@pytest.fixture
def world(monkeypatch, tmp_path):
    return make_world(monkeypatch, tmp_path)


def offer(**changes) -> Offer:
    read = Offer.from_row(Host(1, 2).row(disk=40, bid=False))
    assert read is not None
    return dataclasses.replace(read, **changes)


def test_the_price_of_a_job_on_demand():
    """0.40 $/h + 40 GB at 0.15 $/GB and month for 3 h, 10 GB down at 0.2 cents, 2 GB up at 0.4."""
    cost = price(offer(), Need(hours=3))
    assert cost == Price(0.4 + 40 * 0.15 / 720, 10 * 0.002 + 2 * 0.004, None)
    assert Price(0.4, 0.028, None).total(3) == pytest.approx(1.228)
    assert Price(0.4, 0.028, None).dearest(0.6) == pytest.approx(0.42)
    assert Price(0.4, 0.028, 0.39).dearest(0.9) == pytest.approx(0.6)
    assert Price(0.4, 0.028, 0.39).dearest(0.5) == 0.5


def test_the_price_of_a_bid():
    """A fifth above the least bid of 0.20, or what the cap leaves beside the disk."""
    storage = 40 * 0.15 / 720

    def bid(max_price: float, **changes) -> Price | None:
        return price(offer(**changes), Need(interruptible=True, max_price=max_price))

    roomy, tight = bid(0.30), bid(0.22)
    assert roomy is not None
    assert (roomy.bid, roomy.hourly) == (pytest.approx(0.24), pytest.approx(0.24 + storage))
    assert tight is not None
    assert (tight.bid, tight.hourly) == (pytest.approx(0.22 - storage), pytest.approx(0.22))
    assert bid(0.20) is None
    assert bid(0.30, min_bid=None) is None


def test_the_cheapest_job_is_not_the_cheapest_hour(world):
    world.market.hosts = [
        Host(1, 1, dph_base=0.30, fields={"inet_down_cost": 0.10}),
        Host(2, 2, dph_base=0.35),
    ]
    assert [one.id for one, _ in ranked(world.account, Need(hours=1, down=50))] == [2, 1]
    assert [one.id for one, _ in ranked(world.account, Need(hours=1, down=0, up=0))] == [1, 2]


@pytest.mark.parametrize(
    ("need", "field", "bad"),
    [
        (Need(), "num_gpus", 2),
        (Need(), "reliability", 0.9),
        (Need(), "inet_down", 100.0),
        (Need(), "direct_port_count", 0),
        (Need(), "disk_space", 30.0),
        (Need(), "cuda_max_good", 12.1),
        (Need(hours=10), "duration", 14 * 3600.0),
        (Need(gpu_ram=20), "gpu_ram", 12000),
        (Need(gpu=("RTX_4090", "H100 SXM")), "gpu_name", "RTX 3090"),
        (Need(), "rentable", False),
        (Need(), "rented", True),
    ],
)
def test_what_does_not_fit_is_left_out_by_the_service_and_again_here(world, need, field, bad):
    world.market.hosts = [Host(1, 1), Host(2, 2, fields={field: bad})]
    assert [one.id for one, _ in ranked(world.account, need)] == [1]
    assert fits(offer(), need)
    assert not fits(offer(**{field: bad}), need)
    if not isinstance(bad, bool):
        assert not fits(offer(**{field: None}), need)


def test_the_cap_holds_whatever_the_service_answers(world):
    rows = [Host(1, 1, dph_base=0.9).row(40, False), Host(2, 2).row(40, False), {"id": 3}, {}]
    world.fake.fail_next("search", Fault(200, body={"offers": rows}))
    assert [one.id for one, _ in ranked(world.account, Need(max_price=0.5))] == [2]


def test_the_query_goes_out_in_the_apis_words(world):
    ranked(world.account, Need(gpu=("RTX_4090",), gpu_ram=20, hours=4, disk=50, max_price=0.6, interruptible=True))
    (body,) = [body for name, body in world.fake.bodies if name == "search"]
    assert body["type"] == "bid"
    assert body["allocated_storage"] == 50
    assert body["gpu_name"] == {"in": ["RTX 4090"]}
    assert body["gpu_ram"] == {"gte": 20000}
    assert body["duration"] == {"gte": 6 * 3600}
    assert body["min_bid"] == {"lte": 0.6}
    assert body["rented"] == {"eq": False}
    assert body["verified"] == {"eq": True}


@pytest.mark.parametrize(
    ("name", "value"), [("hours", 0), ("disk", -1), ("num_gpus", 0), ("reliability", 2), ("up", -1)]
)
def test_needs_that_make_no_sense(name, value):
    with pytest.raises(UserError, match=name):
        Need(**{name: value})
    with pytest.raises(UserError):
        Need(hours=float("nan"))


def verb(world, monkeypatch, *words: str) -> None:
    monkeypatch.setenv("VAST_URL", in_process(world.fake, monkeypatch))
    monkeypatch.setenv("VAST_API_KEY", KEY)
    offers.main(words)


def test_the_verb_prints_lines_for_programs(world, monkeypatch, capsys):
    verb(world, monkeypatch, "--gpu", "RTX 4090", "--max-price", "0.45", "--hours", "10", "--limit", "3")
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == list(offers.COLUMNS)
    assert [line[0] for line in lines[1:]] == ["100", "101", "102"]
    assert lines[1][3] == f"{10 * (0.4 + 40 * 0.15 / 720) + 0.028:.2f}"
    assert world.count("create") == 0


def test_the_verb_draws_a_table_on_a_terminal(world, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "140")
    verb(world, monkeypatch, "--interruptible")
    out = capsys.readouterr().out
    assert "interruptible" in out
    assert "1x RTX 4090" in out


def test_a_gpu_that_is_named_otherwise(world, monkeypatch):
    with pytest.raises(UserError, match="did you mean 'RTX 4090'"):
        verb(world, monkeypatch, "--gpu", "RTX4090")
    with pytest.raises(UserError, match="allow a higher --max-price"):
        verb(world, monkeypatch, "--gpu", "RTX 4090", "--max-price", "0.01")
    with pytest.raises(UserError, match="allow a higher --max-price"):
        verb(world, monkeypatch, "--max-price", "0.01")


def test_a_service_that_does_not_answer_is_one_line(world, monkeypatch):
    world.fake.fail_next("search", *[Fault(0)] * 3)
    with pytest.raises(UserError, match=r"vast\.ai does not answer"):
        verb(world, monkeypatch)
