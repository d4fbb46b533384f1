"""A market of machines to let, with faults and a meter: what the fake API of `fake_vast` tells about.

The meter is harsher than the service is said to be: the full price runs from the moment a machine is made, started or
not, until it is destroyed; only a stopped one costs no more than its disk.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol


class VirtualClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, now: float = 1_800_000_000.0):
        self._now = now

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


class FastClock:
    """Real time, `speed` times as fast: for machines that are real while hours are not."""

    def __init__(self, speed: float):
        self.speed, self._real, self._start = speed, time.monotonic(), time.time()

    def now(self) -> float:
        return self._start + self.speed * (time.monotonic() - self._real)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / self.speed)


class Started(Protocol):
    """What stands behind an instance: a real sshd (`LoopbackMachine`) or nothing."""

    def start(self, authorized_keys: list[str], env: dict[str, str], onstart: str) -> tuple[str, int]: ...

    def authorize(self, key: str) -> None: ...

    def pause(self) -> None: ...

    def stop(self) -> None: ...


class NoMachine:
    """An address that nobody answers at."""

    def start(self, authorized_keys: list[str], env: dict[str, str], onstart: str) -> tuple[str, int]:
        return "127.0.0.1", 9

    def authorize(self, key: str) -> None: ...

    def pause(self) -> None: ...

    def stop(self) -> None: ...


@dataclass
class Fate:
    """What becomes of an instance; times in seconds after it was made, None for never."""

    runs_after: float | None = 60.0
    stopped_at_birth: bool = False
    exits_after: float | None = None
    offline_after: float | None = None
    vanishes_after: float | None = None
    outbid_after: float | None = None
    price_factor: float = 1.0
    hidden_for: float = 0.0
    """Not in any list, nor shown, for so long."""
    destroy_refusals: float = 0
    """Requests to destroy it that are answered well and change nothing; inf: for ever."""


@dataclass
class Host:
    """A machine to let."""

    id: int
    machine_id: int
    gpu_name: str = "RTX 4090"
    dph_base: float = 0.40
    min_bid: float = 0.20
    storage_cost: float = 0.15
    fields: dict[str, Any] = field(default_factory=dict)
    gone: bool = False
    """In the search, but no longer to be had."""
    fate: Fate = field(default_factory=Fate)
    rented: bool = False

    def row(self, disk: float, bid: bool) -> dict[str, Any]:
        storage = disk * self.storage_cost / 720
        row = {
            "id": self.id,
            "ask_contract_id": self.id,
            "machine_id": self.machine_id,
            "host_id": self.machine_id * 10,
            "gpu_name": self.gpu_name,
            "num_gpus": 1,
            "gpu_ram": 24564,
            "dph_base": self.dph_base,
            "dph_total": (self.min_bid if bid else self.dph_base) + storage,
            "min_bid": self.min_bid,
            "storage_cost": self.storage_cost,
            "inet_up_cost": 0.004,
            "inet_down_cost": 0.002,
            "inet_up": 500.0,
            "inet_down": 800.0,
            "reliability": 0.995,
            "duration": 30 * 86400.0,
            "cuda_max_good": 12.9,
            "disk_space": 500.0,
            "direct_port_count": 50,
            "geolocation": "Sweden, SE",
            "verification": "verified",
            "verified": True,
            "external": False,
            "rentable": True,
            "rented": self.rented,
        }
        return {**row, **self.fields}


@dataclass
class Lease:
    """An instance: a contract on a host."""

    id: int
    host: Host
    label: str
    disk: float
    bid: float | None
    image: str
    env: dict[str, str]
    onstart: str
    key: str
    """The instance's own key: it may destroy this instance and nothing else."""
    born: float
    fate: Fate
    status: str | None = None
    intended: str = "running"
    spent: float = 0.0
    charged_until: float = 0.0
    keys: list[str] = field(default_factory=list)
    machine: Started | None = None
    address: tuple[str, int] | None = None
    events: list[tuple[float, str]] = field(default_factory=list)

    @property
    def hourly(self) -> float:
        base = self.host.dph_base if self.bid is None else self.bid
        return base * self.fate.price_factor + self.storage

    @property
    def storage(self) -> float:
        return self.disk * self.host.storage_cost / 720


class Market:
    """Hosts, leases and the meter, as of `clock.now()`."""

    def __init__(self, clock: VirtualClock | FastClock, hosts: list[Host] | None = None):
        self.clock = clock
        self.hosts = hosts if hosts is not None else [Host(100 + i, 10 + i, dph_base=0.4 + 0.01 * i) for i in range(6)]
        self.leases: dict[int, Lease] = {}
        self.ended: list[Lease] = []
        self.machine_factory: Callable[[Lease], Started] = lambda lease: NoMachine()
        self.account_keys: list[str] = []
        self.lock = threading.RLock()
        self._next = 5000

    @property
    def spent(self) -> float:
        """Dollars that all instances, alive or ended, have cost."""
        self.advance()
        return sum(lease.spent for lease in [*self.leases.values(), *self.ended])

    def create(self, host: Host, body: dict[str, Any], stopped: bool = False) -> Lease:
        fate = Fate(**vars(host.fate))
        now = self.clock.now()
        self._next += 1
        lease = Lease(
            id=self._next,
            host=host,
            label=body.get("label") or "",
            disk=float(body.get("disk") or 10),
            bid=body.get("price"),
            image=body.get("image") or "",
            env={key: value for key, value in (body.get("env") or {}).items() if not key.startswith("-")},
            onstart=body.get("onstart") or "",
            key=f"scoped-{self._next}",
            born=now,
            fate=fate,
            charged_until=now,
        )
        if stopped or fate.stopped_at_birth:
            lease.intended = "stopped"
            lease.status = "stopped" if stopped else "loading"
        else:
            self._plan(lease)
        host.rented = True
        self.leases[lease.id] = lease
        return lease

    def _plan(self, lease: Lease) -> None:
        fate = lease.fate
        plan: list[tuple[float | None, str]] = [
            (5.0, "loading"),
            (fate.runs_after, "running"),
            (fate.exits_after, "exited"),
            (fate.offline_after, "offline"),
            (fate.vanishes_after, "vanished"),
            (fate.outbid_after if lease.bid is not None else None, "outbid"),
        ]
        lease.events = sorted((lease.born + after, what) for after, what in plan if after is not None)

    def advance(self) -> None:
        """Let everything happen that is due, charging each piece of time at the price of its state."""
        with self.lock:
            now = self.clock.now()
            for lease in list(self.leases.values()):
                while lease.events and lease.events[0][0] <= now and lease.id in self.leases:
                    when, what = lease.events.pop(0)
                    self._charge(lease, when)
                    self._happen(lease, what)
                if lease.id in self.leases:
                    self._charge(lease, now)

    def _charge(self, lease: Lease, until: float) -> None:
        rate = lease.storage if lease.status == "stopped" else lease.hourly
        lease.spent += rate * max(0.0, until - lease.charged_until) / 3600
        lease.charged_until = max(until, lease.charged_until)

    def _happen(self, lease: Lease, what: str) -> None:
        if what == "vanished":
            self.end(lease)
        elif what == "outbid":
            lease.status, lease.intended = "stopped", "running"
            lease.host.min_bid = 1.1 * (lease.bid or 0)
            lease.events = []
        else:
            lease.status = what
        if what == "running":
            lease.machine = lease.machine or self.machine_factory(lease)
            env = {**lease.env, "CONTAINER_ID": str(lease.id), "CONTAINER_API_KEY": lease.key}
            lease.address = lease.machine.start([*self.account_keys, *lease.keys], env, lease.onstart)
        elif lease.machine and what == "offline":
            lease.machine.pause()
        elif lease.machine and what in ("outbid", "exited"):
            lease.machine.stop()

    def end(self, lease: Lease) -> None:
        if self.leases.pop(lease.id, None) is None:
            return
        if lease.machine:
            lease.machine.stop()
        lease.host.rented = False
        self.ended.append(lease)

    def destroy(self, lease: Lease) -> None:
        """What a request to destroy does: nothing, where the fate says so."""
        self._charge(lease, self.clock.now())
        if lease.fate.destroy_refusals > 0:
            lease.fate.destroy_refusals -= 1
        else:
            self.end(lease)

    def rebid(self, lease: Lease, price: float) -> None:
        self._charge(lease, self.clock.now())
        lease.bid = price
        if lease.status == "stopped" and price >= lease.host.min_bid:
            lease.events = [(self.clock.now() + 20, "running")]

    def row(self, lease: Lease) -> dict[str, Any]:
        """What the API shows; nearly everything is null while the machine is made."""
        row: dict[str, Any] = dict.fromkeys(
            ("actual_status", "start_date", "extra_env", "ports", "public_ipaddr", "ssh_host", "ssh_port", "dph_total")
        )
        row.update(id=lease.id, label=lease.label, machine_id=lease.host.machine_id, intended_status=lease.intended)
        if lease.status is None:
            return row
        row.update(
            actual_status=lease.status,
            dph_total=lease.hourly,
            is_bid=lease.bid is not None,
            min_bid=lease.host.min_bid,
            gpu_name=lease.host.gpu_name,
            status_msg="fake",
            start_date=lease.born,
            extra_env=[list(pair) for pair in lease.env.items()],
        )
        if lease.status == "running" and lease.address:
            host, port = lease.address
            row.update(public_ipaddr=host, ports={"22/tcp": [{"HostIp": "0.0.0.0", "HostPort": str(port)}]})
            row.update(ssh_host=host, ssh_port=port)
        return row

    def visible(self) -> list[Lease]:
        """Those that lists and single looks show now, by number."""
        self.advance()
        now = self.clock.now()
        return sorted(
            (lease for lease in self.leases.values() if now - lease.born >= lease.fate.hidden_for),
            key=lambda lease: lease.id,
        )


def random_hosts(rng: random.Random, count: int = 8) -> list[Host]:
    """Hosts of which many fail, each in a way of its own."""
    hosts = []
    for i in range(count):
        fate = Fate(runs_after=rng.choice([20, 90, 300, None]), hidden_for=rng.choice([0, 0, 0, 15, 40]))
        fate.stopped_at_birth = rng.random() < 0.08
        fate.price_factor = rng.choice([1, 1, 1, 1, 1.02, 1.5])
        fate.destroy_refusals = rng.choice([0, 0, 0, 1, 3]) if rng.random() < 0.98 else float("inf")
        for name in ("exits_after", "offline_after", "vanishes_after", "outbid_after"):
            if rng.random() < 0.15:
                setattr(fate, name, rng.uniform(10, 7200))
        base = rng.uniform(0.2, 0.6)
        hosts.append(Host(100 + i, 10 + i, dph_base=base, min_bid=base / 2, gone=rng.random() < 0.15, fate=fate))
    return hosts
