"""The fake API with something real behind it: sshd on loopback as the rented machine, a dispatcher that is killed."""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.vast_utils.desks import NEED, World, content, dispatcher
from tests.vast_utils.fake_market import FastClock, Fate, Host, Market
from tests.vast_utils.fake_vast import KEY, FakeVast, serving
from vast_utils.account import Account, Container
from vast_utils.ledger import Ledger
from vast_utils.reap import reap
from vast_utils.ssh import Machine

SPEED = 30.0
"""Seconds of the market's in one of ours."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """The fake on a port."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    fake = FakeVast(Market(FastClock(SPEED), [Host(100 + i, 10 + i, fate=Fate(runs_after=15)) for i in range(4)]))
    with serving(fake) as url:
        yield World(fake, Account(url, KEY), tmp_path / "state")


def test_a_rented_machine_is_a_real_one(world, new_host, identity, tmp_path):
    hosts = []

    def make(lease):
        hosts.append(new_host(str(lease.id)))
        return hosts[-1]

    world.market.machine_factory = make
    container = Container("image", {"PLAIN": "yes"}, 'echo "$CONTAINER_API_KEY $PLAIN" > started')
    with dispatcher(world) as fleet:
        rental, instance = fleet.hire(NEED, lambda rental: container, 3.0, content, identity[1])
        host, port = instance.addresses[0]
        machine = Machine(host, port, getpass.getuser(), tmp_path / "known", identity[0])
        try:
            assert machine.run(["cat", "started"]).text.split() == [f"scoped-{instance.id}", "yes"]
        finally:
            machine.close()
        assert hosts[0].processes()
        rental.destroy()
    assert not world.market.leases
    assert not hosts[0].processes()


DISPATCHER = """
    import os, sys
    from pathlib import Path
    from tests.vast_utils.desks import CAPS, NEED, content, furnish
    from tests.vast_utils.fake_market import FastClock
    from vast_utils.account import Account
    from vast_utils.budget import Budget
    from vast_utils.fleet import Fleet
    from vast_utils.ledger import Ledger

    clock = FastClock(float(sys.argv[2]))
    with Ledger("toy", Path(sys.argv[1])).held() as ledger:
        caps, started = ledger.begin(CAPS, clock.now())
        fleet = Fleet(Account(), ledger, Budget(caps, started, ledger, clock), clock)
        fleet.hire(NEED, furnish, 2.0, content, "ssh-ed25519 AAAA")
        fleet.close()
"""


@pytest.mark.parametrize("at", ["search", "create", "show", "attach", "destroy"])
def test_a_dispatcher_killed_at_any_step_leaves_nothing_that_reap_does_not_find(world, at):
    """kill -9 while the service is at this request: it carries it out, and nobody is there to hear."""
    handle, process = world.fake.handle, None

    def deadly(*arguments):
        reply = handle(*arguments)
        if process is not None and process.poll() is None and world.fake.calls[-1] == at:
            process.kill()
            process.wait()
            return None
        return reply

    world.fake.handle = deadly
    env = {**os.environ, "VAST_URL": world.fake.url, "VAST_API_KEY": KEY}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DISPATCHER), str(world.folder), str(SPEED)],
        cwd=Path(__file__).resolve().parents[2],
        env=env,
        stdout=subprocess.DEVNULL,
    )
    assert process.wait(60) == -9
    world.fake.handle = handle
    assert len(world.market.leases) == (0 if at in ("search", "destroy") else 1)
    assert reap(world.account, world.clock, world.folder, say=lambda line: None).confirmed
    assert not world.market.leases
    assert all(record.over for record in Ledger("toy", world.folder).records())
