"""What the API tells of offers and machines, read with tolerance: any field may be null while a machine is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Condition = Literal["starting", "running", "outbid", "stopped", "dead"]
STARTING = (None, "created", "loading", "rebooting", "scheduling", "running")


def number(value: Any) -> float | None:
    """A finite number, also where it was sent as text; else None."""
    try:
        read = float(value)
    except (TypeError, ValueError):
        return None
    return read if math.isfinite(read) and not isinstance(value, bool) else None


def whole(value: Any) -> int | None:
    read = number(value)
    return None if read is None else int(read)


def text(value: Any) -> str:
    return " ".join(str(value).split()) if value is not None else ""


@dataclass(frozen=True)
class Offer:
    """A machine to let. Prices in $, per hour unless they say otherwise; None where the API did not say."""

    id: int
    machine_id: int
    dph_total: float
    """On demand, with the disk that the search named."""
    min_bid: float | None
    """Least bid for the GPU alone."""
    storage_cost: float
    """$ per GB and month."""
    inet_up_cost: float
    """$ per GB."""
    inet_down_cost: float
    """$ per GB."""
    gpu_name: str
    num_gpus: int
    gpu_ram: float | None
    """MB, of one GPU."""
    cuda_max_good: float | None
    disk_space: float | None
    """GB."""
    inet_up: float | None
    """Mb/s."""
    inet_down: float | None
    """Mb/s."""
    reliability: float | None
    duration: float | None
    """Seconds for which the host lets it."""
    direct_port_count: int | None
    geolocation: str
    verified: bool
    rentable: bool
    rented: bool

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Offer | None:
        """None where the row lacks what is needed to rent it: its number, machine or price."""
        offer, machine, price = whole(row.get("id")), whole(row.get("machine_id")), number(row.get("dph_total"))
        if offer is None or machine is None or price is None or price <= 0:
            return None
        reliability = row.get("reliability", row.get("reliability2"))
        return cls(
            id=offer,
            machine_id=machine,
            dph_total=price,
            min_bid=number(row.get("min_bid")),
            storage_cost=max(0.0, number(row.get("storage_cost")) or 0.0),
            inet_up_cost=max(0.0, number(row.get("inet_up_cost")) or 0.0),
            inet_down_cost=max(0.0, number(row.get("inet_down_cost")) or 0.0),
            gpu_name=text(row.get("gpu_name")),
            num_gpus=whole(row.get("num_gpus")) or 1,
            gpu_ram=number(row.get("gpu_ram")),
            cuda_max_good=number(row.get("cuda_max_good")),
            disk_space=number(row.get("disk_space")),
            inet_up=number(row.get("inet_up")),
            inet_down=number(row.get("inet_down")),
            reliability=number(reliability),
            duration=number(row.get("duration")),
            direct_port_count=whole(row.get("direct_port_count")),
            geolocation=text(row.get("geolocation")),
            verified=row.get("verification", "verified") == "verified",
            rentable=row.get("rentable") is not False,
            rented=row.get("rented") is True,
        )


@dataclass(frozen=True)
class Instance:
    """A machine of the account."""

    id: int
    label: str
    machine_id: int | None
    actual_status: str | None
    intended_status: str | None
    status_msg: str
    dph_total: float | None
    """$ per hour with its disk, while it runs."""
    is_bid: bool
    min_bid: float | None
    gpu_name: str
    direct: tuple[str, int] | None
    """Host and port of its ssh, reached directly."""
    proxy: tuple[str, int] | None
    """Host and port of its ssh through vast.ai's proxy."""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Instance | None:
        """None where the row has no number."""
        instance = whole(row.get("id"))
        if instance is None:
            return None
        return cls(
            id=instance,
            label=text(row.get("label")),
            machine_id=whole(row.get("machine_id")),
            actual_status=text(row.get("actual_status")).lower() or None,
            intended_status=text(row.get("intended_status")).lower() or None,
            status_msg=text(row.get("status_msg"))[:300],
            dph_total=number(row.get("dph_total")),
            is_bid=row.get("is_bid") is True,
            min_bid=number(row.get("min_bid")),
            gpu_name=text(row.get("gpu_name")),
            direct=_address(row.get("public_ipaddr"), _mapped_port(row.get("ports"))),
            proxy=_address(row.get("ssh_host"), row.get("ssh_port")),
        )

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where its ssh may answer, the better way first."""
        return [address for address in (self.direct, self.proxy) if address is not None]

    @property
    def condition(self) -> Condition:
        """What the status means. `exited`, `unknown` and `offline` never become `running` by themselves.

        A machine that is meant to be stopped never starts, even while its status still says `loading`.
        """
        if self.intended_status == "stopped" or self.actual_status == "stopped":
            return "outbid" if self.is_bid else "stopped"
        if self.actual_status not in STARTING:
            return "dead"
        return "running" if self.actual_status == "running" else "starting"


def _mapped_port(ports: Any) -> Any:
    mapped = ports.get("22/tcp") if isinstance(ports, Mapping) else None
    first = mapped[0] if isinstance(mapped, list) and mapped else None
    return first.get("HostPort") if isinstance(first, Mapping) else None


def _address(host: Any, port: Any) -> tuple[str, int] | None:
    read = whole(port)
    return (text(host), read) if text(host) and read is not None and 0 < read < 65536 else None
