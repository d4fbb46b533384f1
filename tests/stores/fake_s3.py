"""A small S3 server of this process: objects in a dict, ranges, multipart, listing, and faults on request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

KEY, SECRET = "AKIAFAKEKEYFORTESTS", "fakesecretfortests"
Fault = Callable[[str, str, int], "str | int | None"]
"""(method, key, requests before) -> a status, "cut" (half the body), "flip" (one bit), "hang", "drop"; None."""


class FakeS3:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        """By bucket/key."""
        self.requests: list[tuple[str, str]] = []
        self.parts: dict[str, dict[int, bytes]] = {}
        self.fault: Fault = lambda method, key, n: None
        self.lock = threading.Lock()
        self.in_flight = self.most_in_flight = 0
        self.delay = 0.0
        self.conditional = True
        """Whether it knows If-None-Match."""


def _handler(fake: FakeS3) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", cut: bool = False, **headers: Any) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", headers.get("length") or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body[: len(body) // 2] if cut else body)
            if cut:
                self.close_connection = True

        def error(self, status: int, code: str) -> None:
            # Real services repeat the key's id and what was signed.
            self.answer(status, f"<Error><Code>{code}</Code><AWSAccessKeyId>{KEY}</AWSAccessKeyId></Error>".encode())

        def serve(self) -> None:
            with fake.lock:
                fake.in_flight += 1
                fake.most_in_flight = max(fake.most_in_flight, fake.in_flight)
            try:
                time.sleep(fake.delay)
                self.serve_one()
            finally:
                with fake.lock:
                    fake.in_flight -= 1

        def serve_one(self) -> None:
            url = urlsplit(self.path)
            key, query = unquote(url.path[1:]), parse_qs(url.query, keep_blank_values=True)
            with fake.lock:
                fault = fake.fault(self.command, key, len(fake.requests))
                fake.requests.append((self.command, key))
            if fault == "drop":  # the connection goes while the body is on its way
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if fault == "hang":
                time.sleep(2)
                self.close_connection = True
                return
            if isinstance(fault, int):
                self.error(
                    fault, {403: "SignatureDoesNotMatch", 404: "NoSuchKey", 503: "SlowDown"}.get(fault, "Broken")
                )
                return
            if KEY not in self.headers.get("Authorization", ""):
                self.error(403, "AccessDenied")
                return
            getattr(self, "serve_" + self.command.lower())(key, query, body, fault)

        def serve_get(self, key: str, query: dict[str, list[str]], _: bytes, fault: object) -> None:
            if "list-type" in query:
                prefix = key.rstrip("/") + "/" + query.get("prefix", [""])[0]
                rows = "".join(
                    f"<Contents><Key>{name.split('/', 1)[1]}</Key><Size>{len(data)}</Size>"
                    "<LastModified>2024-01-01T00:00:00Z</LastModified></Contents>"
                    for name, data in sorted(fake.objects.items())
                    if name.startswith(prefix)
                )
                self.answer(
                    200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode()
                )
                return
            if key not in fake.objects:
                self.error(404, "NoSuchKey")
                return
            data = fake.objects[key]
            facts: dict[str, Any] = {"ETag": '"1"', "Last_Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
            if self.command == "HEAD":
                self.answer(200, b"", length=str(len(data)), **facts)
                return
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if not found:
                self.answer(200, data, fault == "cut", **facts)
                return
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            if first >= len(data):
                self.error(416, "InvalidRange")
                return
            body = bytearray(data[first : last + 1])
            if fault == "flip":
                body[-1] ^= 1
            place = f"bytes {first}-{last}/{len(data)}"
            self.answer(206, bytes(body), fault == "cut", Content_Range=place, **facts)

        serve_head = serve_get

        def serve_put(self, key: str, query: dict[str, list[str]], body: bytes, _: object) -> None:
            if "uploadId" in query:
                fake.parts[query["uploadId"][0]][int(query["partNumber"][0])] = body
            elif fake.conditional and self.headers.get("If-None-Match") == "*" and key in fake.objects:
                self.error(412, "PreconditionFailed")
                return
            else:
                fake.objects[key] = body
            self.answer(200, ETag='"1"')

        def serve_post(self, key: str, query: dict[str, list[str]], body: bytes, __: object) -> None:
            if "uploads" in query:
                with fake.lock:
                    upload = f"upload{len(fake.parts)}"
                    fake.parts[upload] = {}
                self.answer(
                    200,
                    f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>".encode(),
                )
                return
            if "delete" in query:
                bucket = key.strip("/")
                names = re.findall(r"<Key>([^<]*)</Key>", body.decode())
                for name in names:
                    fake.objects.pop(f"{bucket}/{name}", None)
                done = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
                self.answer(200, f"<DeleteResult>{done}</DeleteResult>".encode())
                return
            parts = fake.parts[query["uploadId"][0]]
            fake.objects[key] = b"".join(parts[number] for number in sorted(parts))
            self.answer(200, b"<CompleteMultipartUploadResult><ETag>1</ETag></CompleteMultipartUploadResult>")

        def serve_delete(self, key: str, query: dict[str, list[str]], _: bytes, __: object) -> None:
            if "uploadId" not in query:
                fake.objects.pop(key, None)
            self.answer(204)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    return Handler


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """A server that the AWS_* environment points to."""
    fake = FakeS3()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(fake))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
