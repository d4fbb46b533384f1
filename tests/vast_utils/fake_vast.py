"""A loopback fake of the vast.ai API that the official SDK talks to: the routes, the faults of requests, the server.

`serving(fake)` answers on a port of its own; `in_process(fake, monkeypatch)` answers without sockets, for tests that
ask thousands of times. Both run the SDK unchanged.
"""

from __future__ import annotations

import io
import json
import operator
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import requests
from requests.adapters import HTTPAdapter

from tests.vast_utils.fake_market import Host, Lease, Market

KEY = "the-account-key"
OPERATORS = {
    "eq": operator.eq,
    "neq": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
    "in": lambda value, allowed: value in allowed,
}
ROUTES = {
    "search": ("POST", r"/api/v0/bundles/"),
    "create": ("PUT", r"/api/v0/asks/(\d+)/"),
    "list": ("GET", r"/api/v1/instances/"),
    "show": ("GET", r"/api/v0/instances/(\d+)/"),
    "destroy": ("DELETE", r"/api/v0/instances/(\d+)/"),
    "state": ("PUT", r"/api/v0/instances/(\d+)/"),
    "attach": ("POST", r"/api/v0/instances/(\d+)/ssh/"),
    "account_key": ("POST", r"/api/v0/ssh/"),
    "bid": ("PUT", r"/api/v0/instances/bid_price/(\d+)/"),
    "logs": ("PUT", r"/api/v0/instances/request_logs/(\d+)/"),
    "log_text": ("GET", r"/result/(\d+)"),
    "user": ("GET", r"/api/v0/users/current/?"),
}
SCOPED = ("show", "destroy", "state")


@dataclass(frozen=True)
class Fault:
    """What befalls one request. `after`: it is carried out, and then answered so. status 0: no answer at all."""

    status: int
    after: bool = False
    body: Any = None


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


class Faults:
    """A seeded plan: each request fails with chance `rate`, and none is answered between the times of `outage`."""

    def __init__(self, seed: int, rate: float, outage: tuple[float, float] = (0.0, 0.0)):
        self.random, self.rate, self.outage = random.Random(seed), rate, outage

    def draw(self, name: str, now: float) -> Fault | None:
        if self.outage[0] <= now < self.outage[1]:
            return Fault(0)
        if self.random.random() >= self.rate:
            return None
        status, after = self.random.choice(
            [(429, False), (500, False), (502, False), (502, True), (504, True), (0, True)]
        )
        if self.random.random() < 0.1:
            return Fault(200, after, "<html>maintenance</html>")
        return Fault(status, after)


class FakeVast:
    """The API. `market` is the world behind it; `calls` what was asked, in order."""

    def __init__(self, market: Market, faults: Faults | None = None, latency: float = 0.0):
        self.market, self.faults, self.latency = market, faults, latency
        self.url = "http://127.0.0.1:9"
        self.calls: list[str] = []
        self.bodies: list[tuple[str, Any]] = []
        self.credit = 25.0
        self._next: dict[str, list[Fault]] = {}

    def fail_next(self, name: str, *faults: Fault) -> None:
        """The next requests of this name meet these faults, in order."""
        self._next.setdefault(name, []).extend(faults)

    def handle(self, method: str, url: str, headers: Any, body: Any) -> Reply | None:
        """The answer to one request; None: the line is cut."""
        parts = urlsplit(url)
        with self.market.lock:
            name, match = _route(method, parts.path)
            if name is None or match is None:
                return _json(404, {"error": "no_such_route", "msg": f"{method} {parts.path}"})
            self.calls.append(name)
            self.bodies.append((name, body))
            if self.latency:
                self.market.clock.sleep(self.latency)
            number = int(match[1]) if match.groups() else None
            if refused := self._authorize(name, number, headers):
                return refused
            fault = self._fault(name)
            if fault is None or fault.after:
                reply = getattr(self, "_" + name)(number, parse_qs(parts.query), body or {})
            if fault is None:
                return reply
            if fault.status == 0:
                return None
            if isinstance(fault.body, str):
                return Reply(fault.status, fault.body.encode())
            wait = {"Retry-After": "1"} if fault.status == 429 else {}
            return _json(fault.status, fault.body or {"error": "fault", "msg": "by the fake"}, wait)

    def _fault(self, name: str) -> Fault | None:
        if self._next.get(name):
            return self._next[name].pop(0)
        return self.faults.draw(name, self.market.clock.now()) if self.faults else None

    def _authorize(self, name: str, number: int | None, headers: Any) -> Reply | None:
        if name == "log_text":
            return None
        key = str(headers.get("Authorization", "")).removeprefix("Bearer ")
        if key == KEY:
            return None
        lease = self.market.leases.get(number or -1)
        if name in SCOPED and lease is not None and key == lease.key:
            return None
        scoped = key.startswith("scoped-")
        return _json(403 if scoped else 401, {"error": "auth_error", "msg": "Invalid user key"})

    def _search(self, _: Any, query: Any, body: dict[str, Any]) -> Reply:
        asked = dict(body)
        order, kind = asked.pop("order"), asked.pop("type")
        limit, disk = asked.pop("limit", 64), asked.pop("allocated_storage", 5.0)
        rows = [host.row(disk, kind == "bid") for host in self.market.hosts]
        kept = [
            row
            for row in rows
            if all(OPERATORS[how](row[name], value) for name, test in asked.items() for how, value in test.items())
        ]
        for name, way in reversed(order):
            kept.sort(key=lambda row, name=name: row[name], reverse=way == "desc")
        return _json(200, {"offers": kept[:limit]})

    def _create(self, number: int, query: Any, body: dict[str, Any]) -> Reply:
        host = next((host for host in self.market.hosts if host.id == number), None)
        if host is None or host.gone or host.rented:
            return _json(400, {"success": False, "error": "no_such_ask", "msg": "not available", "ask_id": number})
        if body.get("price") is not None and body["price"] < host.min_bid:
            lease = self.market.create(host, body, stopped=True)
            return _json(400, {"success": False, "error": "bid_too_low", "new_contract": lease.id})
        lease = self.market.create(host, body)
        return _json(200, {"success": True, "new_contract": lease.id})

    def _list(self, _: Any, query: dict[str, list[str]], body: Any) -> Reply:
        limit = min(int(query.get("limit", ["25"])[0]), 25)
        after = int(query.get("after_token", ["0"])[0])
        left = [lease for lease in self.market.visible() if lease.id > after]
        page = left[:limit]
        token = str(page[-1].id) if len(left) > limit else None
        rows = [self.market.row(lease) for lease in page]
        return _json(200, {"instances": rows, "next_token": token, "total_instances": len(self.market.leases)})

    def _visible(self, number: int | None) -> Lease | None:
        return next((lease for lease in self.market.visible() if lease.id == number), None)

    def _show(self, number: int, query: Any, body: Any) -> Reply:
        lease = self._visible(number)
        return _json(200, {"instances": self.market.row(lease) if lease else None})

    def _destroy(self, number: int, query: Any, body: Any) -> Reply:
        self.market.advance()
        lease = self.market.leases.get(number)
        if lease is None:
            return _json(404, {"success": False, "error": "no_such_instance"})
        self.market.destroy(lease)
        return _json(200, {"success": True})

    def _state(self, number: int, query: Any, body: dict[str, Any]) -> Reply:
        return _json(400, {"success": False, "error": "not_used", "msg": "nothing of ours stops or starts a machine"})

    def _attach(self, number: int, query: Any, body: dict[str, Any]) -> Reply:
        lease = self._visible(number)
        if lease is None:
            return _json(404, {"success": False, "error": "no_such_instance"})
        if body["ssh_key"] in lease.keys:
            return _json(400, {"success": False, "error": "key_exists", "msg": "SSH key already associated"})
        lease.keys.append(body["ssh_key"])
        if lease.machine:
            lease.machine.authorize(body["ssh_key"])
        return _json(200, {"success": True})

    def _account_key(self, _: Any, query: Any, body: dict[str, Any]) -> Reply:
        self.market.account_keys.append(body["ssh_key"])
        return _json(200, {"success": True})

    def _bid(self, number: int, query: Any, body: dict[str, Any]) -> Reply:
        lease = self._visible(number)
        if lease is None or body.get("price") is None:
            return _json(400, {"success": False, "error": "bad_bid"})
        self.market.rebid(lease, float(body["price"]))
        return _json(200, {"success": True})

    def _logs(self, number: int, query: Any, body: Any) -> Reply:
        if self._visible(number) is None:
            return _json(404, {"success": False, "error": "no_such_instance"})
        return _json(200, {"success": True, "result_url": f"{self.url}/result/{number}"})

    def _log_text(self, number: int, query: Any, body: Any) -> Reply:
        return Reply(200, f"log of {number}\n".encode())

    def _user(self, _: Any, query: Any, body: Any) -> Reply:
        return _json(200, {"id": 1, "credit": self.credit, "api_key": KEY})


def _route(method: str, path: str) -> tuple[str | None, re.Match[str] | None]:
    for name, (verb, pattern) in ROUTES.items():
        if verb == method and (match := re.fullmatch(pattern, path)):
            return name, match
    return None, None


def _json(status: int, body: Any, headers: dict[str, str] | None = None) -> Reply:
    return Reply(status, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})})


@contextmanager
def serving(fake: FakeVast) -> Iterator[str]:
    """The fake on a loopback port; gives its URL, which is also `fake.url`."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            reply = fake.handle(self.command, self.path, self.headers, body)
            if reply is None:
                self.close_connection = True
                return
            self.send_response(reply.status)
            for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(BrokenPipeError):  # a client that was killed
                self.wfile.write(reply.body)

        do_GET = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield fake.url
    finally:
        server.shutdown()
        server.server_close()
        for lease in list(fake.market.leases.values()):
            fake.market.end(lease)


def in_process(fake: FakeVast, monkeypatch: Any) -> str:
    """The fake behind `requests`, without a socket, and the SDK's own pauses in the market's time; gives its URL."""
    import vastai.api.client

    def send(adapter: Any, request: requests.PreparedRequest, **_: Any) -> requests.Response:
        body = json.loads(request.body) if isinstance(request.body, bytes | str) else None
        reply = fake.handle(str(request.method), str(request.url), request.headers, body)
        if reply is None:
            raise requests.ConnectionError("the line was cut", request=request)
        response = requests.Response()
        response.status_code, response.raw, response.url = reply.status, io.BytesIO(reply.body), str(request.url)
        response.headers.update(reply.headers)
        response.request = request
        return response

    monkeypatch.setattr(HTTPAdapter, "send", send)
    for lookup in ("get_environ_proxies", "get_netrc_auth"):  # of the environment and the home: most of the time
        monkeypatch.setattr(requests.sessions, lookup, lambda *_, **__: {})
    monkeypatch.setattr(vastai.api.client, "time", SimpleNamespace(sleep=fake.market.clock.sleep))
    return fake.url


__all__ = ["KEY", "FakeVast", "Fault", "Faults", "Host", "in_process", "serving"]
