"""The account layer against a fake API, through the official SDK: what is repeated, what not, what errors mean."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.desks import make_world
from tests.vast_utils.fake_market import Host, Market, VirtualClock
from tests.vast_utils.fake_vast import KEY, FakeVast, Fault, in_process, serving
from vast_utils.account import Account, AccountError, Busy, Container, Doubtful, KeyRefused, Refused
from vast_utils.rows import Instance

CONTAINER = Container("image", {"PLAIN": "value"}, "echo started")
LABEL = "sparse-coding.toy.0123"


@pytest.fixture
def world(monkeypatch, tmp_path):
    return make_world(monkeypatch, tmp_path)


def rent(world, count: int = 1) -> list[int]:
    world.market.hosts = [Host(100 + i, 10 + i) for i in range(count)]
    return [world.account.create(100 + i, CONTAINER, 40.0, f"{LABEL}{i}", None) for i in range(count)]


def test_what_a_request_that_rents_says(world):
    world.account.create(100, CONTAINER, 40.0, LABEL, None)
    world.account.create(101, CONTAINER, 40.0, LABEL, 0.3)
    on_demand, bid = [body for name, body in world.fake.bodies if name == "create"]
    assert on_demand["price"] is None  # to the API any price is a bid, on whatever offer
    assert bid["price"] == 0.3
    for body in (on_demand, bid):
        assert body["cancel_unavail"] is True
        assert body["label"] == LABEL
        assert body["disk"] == 40.0
        assert body["env"] == {"PLAIN": "value"}
        assert body["onstart"] == "echo started"
        assert "ssh_direc" in body["runtype"]


@pytest.mark.parametrize("status", [0, 429, 500, 502, 503, 504])
def test_a_request_that_rents_is_sent_once_whatever_the_answer(world, status):
    world.fake.fail_next("create", *[Fault(status, after=True)] * 5)
    with pytest.raises(AccountError):
        world.account.create(100, CONTAINER, 40.0, LABEL, None)
    assert world.count("create") == 1


@pytest.mark.parametrize("status", [0, 429, 502, 503, 504])
def test_reads_and_destroy_are_repeated(world, status):
    number = rent(world)[0]
    world.fake.fail_next("list", Fault(status), Fault(status))
    assert [one.id for one in world.account.instances()] == [number]
    assert world.count("list") == 3
    world.fake.fail_next("destroy", Fault(status), Fault(status))
    world.account.destroy(number)
    assert not world.market.leases


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (Fault(0), Doubtful),
        (Fault(500), Doubtful),
        (Fault(502, after=True), Doubtful),
        (Fault(408), Doubtful),
        (Fault(400, body="not JSON"), Doubtful),
        (Fault(200, body="<html>"), Doubtful),
        (Fault(200, body={"success": True}), Doubtful),
        (Fault(200, body={"success": False, "error": "no"}), Refused),
        (Fault(400, body={"error": "no_such_ask"}), Refused),
        (Fault(429), Busy),
        (Fault(401, body={}), KeyRefused),
        (Fault(403, body={}), KeyRefused),
    ],
)
def test_what_an_answer_to_a_rental_means(world, fault, error):
    world.fake.fail_next("create", fault)
    with pytest.raises(error) as raised:
        world.account.create(100, CONTAINER, 40.0, LABEL, None)
    assert type(raised.value) is error
    assert getattr(raised.value, "instance", None) is None


def test_an_error_that_carries_a_contract_has_rented(world):
    with pytest.raises(Doubtful) as raised:
        world.account.create(100, CONTAINER, 40.0, LABEL, 0.01)
    assert raised.value.instance in world.market.leases


def test_a_vanished_offer_is_a_clear_no(world):
    world.market.hosts[0].gone = True
    with pytest.raises(Refused, match="no_such_ask"):
        world.account.create(100, CONTAINER, 40.0, LABEL, None)


def test_all_pages_are_read_also_while_rows_are_null(world):
    numbers = rent(world, 60)
    world.clock.sleep(2)  # nothing is known of them yet; the SDK's own show_instances raises on such rows
    assert sorted(one.id for one in world.account.instances()) == numbers
    assert world.count("list") == 3
    assert world.account.instances()[0].condition == "starting"


@pytest.mark.parametrize("body", [{"instances": [], "next_token": "7"}, {"success": False}, [], "<html>"])
def test_a_list_that_is_not_whole_is_an_error(world, body):
    world.fake.fail_next("list", *[Fault(200, body=body)] * 500)
    with pytest.raises(Doubtful):
        world.account.instances()


def test_one_machine_through_its_life(world):
    number = rent(world)[0]
    shown = world.account.show(number)
    assert shown is not None
    assert (shown.condition, shown.addresses, shown.dph_total) == ("starting", [], None)
    world.clock.sleep(100)
    shown = world.account.show(number)
    assert shown is not None
    assert shown.condition == "running"
    assert shown.direct == ("127.0.0.1", 9)
    assert shown.dph_total == pytest.approx(0.40 + 40 * 0.15 / 720)
    world.account.destroy(number)
    assert world.account.show(number) is None
    world.account.destroy(number)  # it is gone already: nothing to complain of
    world.fake.fail_next("show", Fault(404, body={}))
    assert world.account.show(number) is None
    world.fake.fail_next("show", Fault(200, body={"hello": 1}))
    with pytest.raises(Doubtful):
        world.account.show(number)


@pytest.mark.parametrize(
    ("row", "condition"),
    [
        ({"actual_status": None}, "starting"),
        ({"actual_status": "loading"}, "starting"),
        ({"actual_status": "loading", "intended_status": "stopped"}, "stopped"),
        ({"actual_status": "running", "intended_status": "running"}, "running"),
        ({"actual_status": "stopped", "is_bid": True}, "outbid"),
        ({"actual_status": "stopped", "is_bid": False}, "stopped"),
        ({"actual_status": "exited"}, "dead"),
        ({"actual_status": "unknown"}, "dead"),
        ({"actual_status": "offline"}, "dead"),
        ({"actual_status": "frozen"}, "dead"),
        ({"actual_status": "something new"}, "dead"),
    ],
)
def test_conditions(row, condition):
    read = Instance.from_row({"id": 1, **row})
    assert read is not None
    assert read.condition == condition


@pytest.mark.parametrize(
    "ports", [None, {}, "x", {"22/tcp": None}, {"22/tcp": []}, {"22/tcp": [None]}, {"22/tcp": [{}]}]
)
def test_rows_with_holes_are_read(ports):
    read = Instance.from_row({"id": "7", "ports": ports, "public_ipaddr": "1.2.3.4", "ssh_host": "p", "ssh_port": "22"})
    assert read is not None
    assert read.id == 7
    assert read.addresses == [("p", 22)]
    assert Instance.from_row({"id": None}) is None


def test_the_direct_address_comes_first():
    ports = {"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": "40022"}]}
    read = Instance.from_row({"id": 7, "ports": ports, "public_ipaddr": "1.2.3.4", "ssh_host": "p", "ssh_port": 22})
    assert read is not None
    assert read.addresses == [("1.2.3.4", 40022), ("p", 22)]


def test_keys_logs_bid_and_credit(world):
    number = rent(world)[0]
    world.clock.sleep(100)
    world.account.attach_ssh(number, "ssh-ed25519 AAAA")
    world.account.attach_ssh(number, "ssh-ed25519 AAAA")
    assert world.market.leases[number].keys == ["ssh-ed25519 AAAA"]
    assert world.account.logs(number) == f"log of {number}\n"
    assert world.account.logs(999) == ""
    world.account.bid(number, 0.31)
    assert world.market.leases[number].bid == 0.31
    assert world.account.credit() == 25.0
    with pytest.raises(Refused):
        world.account.attach_ssh(999, "ssh-ed25519 AAAA")


def test_the_daily_quota_is_named(world):
    world.fake.fail_next("search", Fault(429, body={"error": "search_quota_exceeded"}))
    with pytest.raises(Busy, match="midnight"):
        world.account.search({}, 40, False)


def test_a_machines_own_key_destroys_that_machine_only(world, monkeypatch):
    mine, other = rent(world, 2)
    account = Account(in_process(world.fake, monkeypatch), world.market.leases[mine].key)
    with pytest.raises(KeyRefused):
        account.destroy(other)
    with pytest.raises(KeyRefused):
        account.create(100, CONTAINER, 40.0, LABEL, None)
    with pytest.raises(KeyRefused):
        account.instances()
    account.destroy(mine)
    assert list(world.market.leases) == [other]


def test_the_key_shows_nowhere(world, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    logger = logging.getLogger("vastai")
    assert logger.level == logging.WARNING
    assert not [one for one in logger.handlers if type(one) is logging.StreamHandler]  # as the SDK gives itself
    said = [repr(world.account), str(vars(world.account))]
    for fault in (Fault(401, body={"msg": "bad"}), Fault(500), Fault(0), Fault(200, body="x"), Fault(400, body={})):
        world.fake.fail_next("create", fault)
        with pytest.raises(AccountError) as raised:
            world.account.create(100, CONTAINER, 40.0, LABEL, None)
        said.append(repr(raised.value) + repr(raised.value.__cause__))
    with pytest.raises(UserError) as refused:
        world.account.create(100, Container("image", {"KEY": KEY}), 40.0, LABEL, None)
    with pytest.raises(UserError):
        world.account.create(100, Container("image", onstart=f"export K={KEY}"), 40.0, LABEL, None)
    said += [str(refused.value), caplog.text, *capfd.readouterr()]
    assert not any(KEY in text for text in said)
    assert world.count("create") == 5


def test_what_an_account_needs(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VAST_API_KEY", raising=False)
    with pytest.raises(UserError, match="VAST_API_KEY"):
        Account("http://127.0.0.1:1")
    with pytest.raises(UserError, match="https"):
        Account("http://example.org", KEY)
    monkeypatch.setenv("VAST_URL", "https://example.org/")
    monkeypatch.setenv("VAST_API_KEY", KEY)
    assert Account().url == "https://example.org"


def test_over_a_real_socket(monkeypatch, tmp_path):
    """The same, once, with nothing between the SDK and a server."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeVast(Market(VirtualClock()))
    with serving(fake) as url:
        account = Account(url, KEY)
        offer = account.search({"gpu_name": {"eq": "RTX 4090"}}, 40, False)[0]
        fake.fail_next("create", Fault(0, after=True))
        with pytest.raises(Doubtful):
            account.create(offer.id, CONTAINER, 40.0, LABEL, None)
        assert fake.calls.count("create") == 1
        (found,) = account.instances()
        assert found.label == LABEL
        fake.market.clock.sleep(100)
        account.attach_ssh(found.id, "ssh-ed25519 AAAA")
        assert account.logs(found.id) == f"log of {found.id}\n"
        account.destroy(found.id)
        assert account.show(found.id) is None
        assert account.instances() == []


def test_the_package_loads_quickly_and_without_torch():
    code = (
        "import sys, vast_utils.fleet, vast_utils.reap, vast_utils.offers, vast_utils.skypilot\n"
        "print([name for name in ('torch', 'vastai', 'requests', 'rich', 'yaml', 'tyro') if name in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"
