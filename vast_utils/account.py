"""The account at vast.ai: a thin typed layer over the official SDK that says how far each answer can be trusted.

Two SDK clients: one repeats what may be repeated (reads, destroy); the other, for whatever spends, sends each request
exactly once, because the SDK's own repeats after a 502 can rent several machines.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sparse_coding.errors import UserError
from vast_utils.rows import Instance, Offer, number

SERVICE = "https://console.vast.ai"
CONSOLE = "https://cloud.vast.ai/instances/"
PAGE = 25
MOST_PAGES = 400
READ_TIMEOUT, SPEND_TIMEOUT = 30.0, 120.0
T = TypeVar("T")


class AccountError(UserError):
    """vast.ai did not do what was asked."""


class Refused(AccountError):
    """A clear no: nothing was rented or changed."""


class Busy(Refused):
    """Too many requests (429): nothing was done, ask again later."""


class KeyRefused(Refused):
    """The account key is not accepted."""


class Doubtful(AccountError):
    """No clear answer (5xx, timeout, broken reply): it may have been done.

    instance: the machine that exists all the same, where the answer named one.
    """

    def __init__(self, message: str, instance: int | None = None):
        super().__init__(message)
        self.instance = instance


@dataclass(frozen=True)
class Container:
    """What to start on a rented machine. Nothing here may be secret: the host and the account's pages show it all."""

    image: str
    env: Mapping[str, str] = field(default_factory=dict)
    onstart: str = ""


class Account:
    """One vast.ai account. `url` and `key` default to VAST_URL and VAST_API_KEY, then to the SDK's own files.

    Raises `UserError` where the SDK or a key is missing, or where the key would travel unencrypted.
    """

    def __init__(self, url: str | None = None, key: str | None = None):
        sdk = _sdk()
        self.url = (url or os.environ.get("VAST_URL") or SERVICE).rstrip("/")
        _check_url(self.url)
        try:
            self._reader = sdk(api_key=key, server_url=self.url, retry=3)
        except RuntimeError:
            raise UserError(
                "no vast.ai key: set VAST_API_KEY, or save it with `vastai set api-key KEY` "
                "(keys are made at https://cloud.vast.ai/manage-keys/)"
            ) from None
        self._spender = sdk(api_key=self._reader.client.api_key, server_url=self.url, retry=1)
        self._reader.client.timeout, self._spender.client.timeout = READ_TIMEOUT, SPEND_TIMEOUT

    def search(self, query: Mapping[str, Any], disk: float, interruptible: bool, limit: int = 200) -> list[Offer]:
        """Offers priced with `disk` GB, cheapest hour first. `query`: the API's filters, as `offers.filters` makes."""
        price = "min_bid" if interruptible else "dph_total"
        kind = "bid" if interruptible else "on-demand"
        rows = _asked(
            lambda: self._reader.search_offers(dict(query), type=kind, order=price, limit=limit, storage=disk)
        )
        offers = [Offer.from_row(row) for row in _rows(rows)]
        return [offer for offer in offers if offer is not None]

    def instances(self) -> list[Instance]:
        """Every machine of the account, whole: raises rather than return a part of them."""
        found: dict[int, Instance] = {}
        asked: dict[str, Any] = {"select_filters": {}, "order_by": [{"col": "id", "dir": "asc"}], "limit": PAGE}
        for _ in range(MOST_PAGES):  # the SDK's own show_instances fails on a row that is still provisioning
            page = _asked(lambda: self._reader.show_instances_v1(asked))
            if not isinstance(page, dict) or not isinstance(page.get("instances"), list):
                raise Doubtful(f"the list of machines is not one: {str(page)[:80]}")
            for instance in map(Instance.from_row, _rows(page["instances"])):
                if instance is not None:
                    found[instance.id] = instance
            token = page.get("next_token")
            if not token:
                return list(found.values())
            if token == asked.get("after_token"):
                break
            asked["after_token"] = token
        raise Doubtful("the list of machines does not end")

    def show(self, instance: int) -> Instance | None:
        """One machine, or None where the account has none of that number."""
        reply = _asked(lambda: self._raw_get(f"/instances/{instance}/"), missing={"instances": None})
        if not isinstance(reply, dict) or "instances" not in reply:
            raise Doubtful(f"machine {instance}: the answer is not one: {str(reply)[:80]}")
        row = reply["instances"]
        if isinstance(row, list):
            row = row[0] if row else None
        if row is None:
            return None
        shown = Instance.from_row(row) if isinstance(row, dict) else None
        if shown is None:
            raise Doubtful(f"machine {instance}: the answer is not one: {str(row)[:80]}")
        return shown

    def create(self, offer: int, container: Container, disk: float, label: str, bid: float | None) -> int:
        """Rent an offer, in one request that is never repeated; the new machine's number.

        disk: GB. bid: $/h of an interruptible machine; None rents on demand (the API takes any price for a bid, so what
        an on-demand machine costs is checked by reading it back). Raises `Refused` or `Doubtful`.
        """
        if str(self._reader.client.api_key) in json.dumps([dict(container.env), container.onstart]):
            raise UserError("the account key may not travel to a machine: take it out of its environment and script")
        reply = _asked(
            lambda: self._spender.create_instance(
                offer,
                image=container.image,
                disk=disk,
                env=dict(container.env),
                onstart_cmd=container.onstart or None,
                label=label,
                bid_price=bid,
                ssh=True,
                direct=True,
                cancel_unavail=True,
            )
        )
        made = _new_contract(reply)
        said = isinstance(reply, dict) and reply.get("success")
        if made is not None and said:
            return made
        if made is None and isinstance(reply, dict) and reply.get("success") is False:
            raise Refused(f"offer {offer}: {_words(reply)}")
        raise Doubtful(f"offer {offer}: {_words(reply)}", made)

    def bid(self, instance: int, price: float) -> None:
        """Change the bid of an interruptible machine, $/h."""
        _asked(lambda: self._spender.change_bid(instance, price))

    def attach_ssh(self, instance: int, public_key: str) -> None:
        """Let a key in. Through the API: keys written into the machine by hand vanish after hours."""
        try:
            _asked(lambda: self._reader.attach_ssh(instance, public_key))
        except Refused as error:
            if "already" not in str(error).lower():
                raise

    def logs(self, instance: int, tail: int = 200) -> str:
        """The last lines of the container's own log; empty where there is none yet."""
        text = _asked(lambda: self._reader.logs(instance, tail=str(tail)), missing="")
        return text if isinstance(text, str) else ""

    def destroy(self, instance: int) -> None:
        """Ask for the end of a machine. Only `instances` and `show` tell whether it came: see `destroy_all`."""
        _asked(lambda: self._reader.destroy_instance(instance), missing=None)

    def credit(self) -> float | None:
        """What is left on the account, in dollars; None where the answer does not say."""
        user = _asked(self._reader.show_user)
        return number(user.get("credit")) if isinstance(user, dict) else None

    def _raw_get(self, path: str) -> Any:
        reply = self._reader.client.get(path, query_args={"owner": "me"})
        reply.raise_for_status()
        return reply.json()


def _sdk() -> Any:
    """The SDK's class, with its logger silenced: at import it gives itself a handler at level INFO."""
    try:
        from vastai import VastAI
    except ImportError:
        raise UserError("renting needs vast.ai's SDK: pip install vastai") from None
    logger = logging.getLogger("vastai")
    logger.handlers.clear()
    logger.setLevel(logging.WARNING)
    return VastAI


def _check_url(url: str) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost")):
        raise UserError(f"VAST_URL is {url!r}: it must start with https:// (http only on this computer)")


_RAISE = object()


def _asked(call: Callable[[], T], missing: Any = _RAISE) -> T | Any:
    """The SDK's answer, or the error that says what is known. `missing`: what stands for a 404."""
    import requests

    try:
        return call()
    except requests.HTTPError as error:
        if missing is not _RAISE and error.response is not None and error.response.status_code == 404:
            return missing
        raise _from_status(error.response) from None
    except (requests.ConnectionError, requests.Timeout, TimeoutError) as error:
        raise Doubtful(f"vast.ai does not answer ({type(error).__name__})") from None
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Doubtful(f"vast.ai answered what cannot be read ({type(error).__name__})") from None


def _from_status(response: Any) -> AccountError:
    """The meaning of an HTTP error. One that carries a new contract has rented, whatever its number."""
    try:
        body = response.json()
    except ValueError:
        body = None
    status, words = response.status_code, _words(body)
    if (made := _new_contract(body)) is not None:
        return Doubtful(f"HTTP {status}: {words}", made)
    if status in (401, 403):
        return KeyRefused(f"vast.ai does not accept the key for this (HTTP {status}: {words}); check VAST_API_KEY")
    if status == 429 and isinstance(body, dict) and body.get("error") == "search_quota_exceeded":
        return Busy("today's searches at vast.ai are used up; they are counted anew from midnight UTC")
    if status == 429:
        return Busy(f"vast.ai asks to slow down (HTTP 429: {words})")
    if 400 <= status < 500 and status not in (408, 425) and isinstance(body, dict):
        return Refused(f"HTTP {status}: {words}")
    return Doubtful(f"HTTP {status}: {words}")


def _new_contract(body: Any) -> int | None:
    made = body.get("new_contract") if isinstance(body, dict) else None
    return made if isinstance(made, int) and not isinstance(made, bool) and made > 0 else None


def _words(body: Any) -> str:
    """What a reply says, in one short line."""
    if not isinstance(body, dict):
        return "no readable answer"
    said = [str(body[key]) for key in ("error", "msg", "message") if body.get(key)]
    return " ".join(" ".join(said).split())[:200] or "no reason given"


def _rows(rows: Any) -> list[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
