"""Which machines to let fit a job, and what the whole job costs on each, disk and traffic included."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_coding.config import parse
from sparse_coding.errors import UserError, near
from vast_utils.account import Account
from vast_utils.rows import Offer

HOURS_PER_MONTH = 720.0
BID_ABOVE = 1.2
"""A bid is this much above the least one, so that the first rise does not end it."""
PRICE_SLACK = 1.05
"""A price read back may be this much over the one shown."""
REBID_MOST = 1.5
"""A higher bid may make an hour this much dearer than it was at first."""
LEAST_DURATION = 1.5
"""The host must let its machine for this many times the job's length."""
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "gte": operator.ge,
    "lte": operator.le,
    "eq": operator.eq,
    "in": lambda value, allowed: value in allowed,
}


@dataclass(frozen=True)
class Need:
    """What a job needs of a machine."""

    gpu: tuple[str, ...] = ()
    """Names of GPUs as vast.ai writes them, such as "RTX 4090" or "H100 SXM"; none: any."""
    num_gpus: int = 1
    """GPUs in the machine."""
    gpu_ram: float = 0.0
    """Least memory of one GPU, GB."""
    max_price: float = 0.0
    """Most dollars per hour, disk included; 0: no limit."""
    hours: float = 1.0
    """How long the job takes."""
    disk: float = 40.0
    """GB of disk to rent."""
    down: float = 10.0
    """GB that the machine downloads (image, packages, models, data)."""
    up: float = 2.0
    """GB that it uploads (results)."""
    interruptible: bool = False
    """Bid for an interruptible machine: cheaper, may be taken away at any moment."""
    reliability: float = 0.98
    """Least reliability of the host, between 0 and 1."""
    inet_down: float = 200.0
    """Least download speed, Mb/s."""
    cuda: float = 12.8
    """Least CUDA version that the driver carries."""

    def __post_init__(self) -> None:
        for name in ("num_gpus", "hours", "disk"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be more than 0")
        for name in ("gpu_ram", "max_price", "down", "up", "inet_down", "cuda"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be 0 or more")
        if not 0 <= self.reliability <= 1:
            raise UserError(f"reliability is {self.reliability}: it must be between 0 and 1")


@dataclass(frozen=True)
class Price:
    """What a machine costs for a job, in dollars."""

    hourly: float
    """Per hour, disk included."""
    traffic: float
    """All downloads and uploads."""
    bid: float | None
    """Per hour, for the GPU of an interruptible machine."""

    def dearest(self, max_price: float) -> float:
        """Most dollars per hour that it may come to, below the cap: by rounding, or by one higher bid."""
        return max(self.hourly, min(max_price, self.hourly * (PRICE_SLACK if self.bid is None else REBID_MOST)))

    def total(self, hours: float) -> float:
        return self.hourly * hours + self.traffic


def filters(need: Need) -> dict[str, dict[str, Any]]:
    """What an offer must satisfy, in the API's words and units (MB, seconds); the caps on price stand in `price`."""
    wanted: dict[str, dict[str, Any]] = {
        "num_gpus": {"eq": need.num_gpus},
        "reliability": {"gte": need.reliability},
        "inet_down": {"gte": need.inet_down},
        "direct_port_count": {"gte": 1},
        "disk_space": {"gte": need.disk},
        "cuda_max_good": {"gte": need.cuda},
        "duration": {"gte": LEAST_DURATION * need.hours * 3600},
    }
    if need.gpu_ram:
        wanted["gpu_ram"] = {"gte": 1000 * need.gpu_ram}
    if need.gpu:
        wanted["gpu_name"] = {"in": [name.replace("_", " ") for name in need.gpu]}
    if need.max_price:
        wanted["min_bid" if need.interruptible else "dph_total"] = {"lte": need.max_price}
    return wanted


def fits(offer: Offer, need: Need) -> bool:
    """The same filters here: the service's word is not enough where money is at stake; unknown does not fit."""
    if not offer.verified or not offer.rentable or offer.rented:
        return False
    for name, test in filters(need).items():
        value = getattr(offer, name)
        if value is None or not all(COMPARISONS[how](value, limit) for how, limit in test.items()):
            return False
    return True


def price(offer: Offer, need: Need) -> Price | None:
    """What the offer costs, the bid chosen; None where that is over the cap, or where it takes no bids."""
    traffic = need.down * offer.inet_down_cost + need.up * offer.inet_up_cost
    if not need.interruptible:
        over = need.max_price and offer.dph_total > need.max_price
        return None if over else Price(offer.dph_total, traffic, None)
    storage = need.disk * offer.storage_cost / HOURS_PER_MONTH
    bid = bid_above(offer.min_bid, need.max_price - storage if need.max_price else None)
    return None if bid is None else Price(bid + storage, traffic, bid)


def bid_above(least: float | None, most: float | None) -> float | None:
    """A bid with some room above the least one and no higher than `most`; None where there is no such bid."""
    if least is None or least <= 0 or (most is not None and least > most):
        return None
    wanted = BID_ABOVE * least
    return wanted if most is None else min(wanted, most)


def ranked(account: Account, need: Need) -> list[tuple[Offer, Price]]:
    """The offers that fit, the cheapest whole job first (the same hours are reckoned on every GPU)."""
    found = account.search(filters(need), need.disk, need.interruptible)
    priced = [(offer, price(offer, need)) for offer in found if fits(offer, need)]
    fitting = [(offer, cost) for offer, cost in priced if cost is not None]
    return sorted(fitting, key=lambda pair: (pair[1].total(need.hours), -(pair[0].reliability or 0), pair[0].id))


def nothing_fits(account: Account, need: Need) -> str:
    """Why no offer fits, as far as one more search tells: a GPU that is named otherwise, or too narrow a filter."""
    if not need.gpu:
        return "no offer fits: allow a higher --max-price, a lower --reliability or --inet-down, or less --disk"
    names = sorted({offer.gpu_name for offer in account.search({}, need.disk, need.interruptible)})
    unknown = [name for name in need.gpu if name.replace("_", " ") not in names]
    if not unknown:
        return (
            f"no offer of {', '.join(need.gpu)} fits: allow a higher --max-price, a lower --reliability or less --disk"
        )
    suggestion = near(unknown[0].replace("_", " "), names)
    return f"nothing is named {unknown[0]!r} at vast.ai now{suggestion or '; there are ' + ', '.join(names[:12])}"


@dataclass(frozen=True)
class OffersFlags(Need):
    """Show what is to let at vast.ai now and what the whole job would cost on each machine. Rents nothing."""

    limit: int = 15
    """Rows to show."""


COLUMNS = ("offer", "GPU", "$/h", "job $", "down Mb/s", "reliable", "CUDA", "where")


def table_rows(fitting: Sequence[tuple[Offer, Price]], need: Need) -> list[tuple[str, ...]]:
    """One line of text cells per offer, under `COLUMNS`."""
    return [
        (
            str(offer.id),
            f"{offer.num_gpus}x {offer.gpu_name}",
            f"{cost.hourly:.3f}",
            f"{cost.total(need.hours):.2f}",
            f"{offer.inet_down or 0:.0f}",
            f"{offer.reliability or 0:.3f}",
            f"{offer.cuda_max_good or 0:g}",
            offer.geolocation,
        )
        for offer, cost in fitting
    ]


def show(fitting: Sequence[tuple[Offer, Price]], need: Need) -> None:
    """Print the offers: a table on a terminal, lines with tabs elsewhere."""
    rows = table_rows(fitting, need)
    if not sys.stdout.isatty():
        for row in (COLUMNS, *rows):
            print("\t".join(row))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    kind = "interruptible" if need.interruptible else "on demand"
    title = f"{need.hours:g} h, {need.disk:g} GB disk, {need.down:g} GB down, {need.up:g} GB up, {kind}"
    table = Table(title=title, box=SIMPLE_HEAD)
    for column in COLUMNS:
        table.add_column(column, no_wrap=True, justify="left" if column in ("GPU", "where") else "right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def main(arguments: Sequence[str]) -> None:
    """show what is to let and what the whole job would cost"""
    flags = parse(OffersFlags, arguments, "python -m vast_utils offers", OffersFlags.__doc__ or "")
    account = Account()
    fitting = ranked(account, flags)
    if not fitting:
        raise UserError(nothing_fits(account, flags))
    show(fitting[: flags.limit], flags)
