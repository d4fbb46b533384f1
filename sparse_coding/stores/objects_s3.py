"""Objects on S3 and the services that speak it, by obstore.

Credentials come from the environment alone (AWS_ACCESS_KEY_ID, ..., AWS_ENDPOINT_URL for other services). What a server
answers can hold the key's id and signed headers, so none of it is repeated: a message has our words, the status and the
service's error code.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from sparse_coding.errors import UserError
from sparse_coding.stores.objects import PIECE, Buffer, ObjectMissing, Objects, ObjectTruncated, checked_name

T = TypeVar("T")

REQUEST_SECONDS = 120.0
"""One request of at most `PIECE` bytes may take so long; a slower one is tried again."""
SHORT_ANSWERS = 3
"""After so many answers that end too early an object is truncated; one can be a fault of the connection."""
CREDENTIALS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
OTHER_CREDENTIALS = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
)
NO_CREDENTIALS = (
    "no credentials for S3: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment (and AWS_ENDPOINT_URL "
    "for a service that is not Amazon's), or AWS_SKIP_SIGNATURE=true for a public bucket; ~/.aws is not read"
)
FINAL = {
    301: "the bucket is in another region: set AWS_REGION",
    400: "the request was refused: check AWS_REGION, AWS_ENDPOINT_URL and the credentials",
    401: "the credentials were refused: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN",
    403: "access was denied: check the credentials and that they allow this bucket and prefix",
    405: "the service does not allow this: is AWS_ENDPOINT_URL an S3 service?",
}
"""Answers that no retry mends, and what to do."""


class S3Objects(Objects):
    """The objects under s3://bucket/prefix."""

    def __init__(self, url: str, *, seconds: float = 300.0):
        """seconds: for one operation with its retries; after that `UserError` says what the service answered."""
        import obstore.store

        self.url, bucket, prefix = checked_url(url)
        self.seconds = seconds
        if not all(os.environ.get(name) for name in CREDENTIALS) and not any(map(os.environ.get, OTHER_CREDENTIALS)):
            self._check_machine_credentials()
        request = timedelta(seconds=min(REQUEST_SECONDS, seconds))
        self._store = obstore.store.S3Store(
            bucket,
            prefix=prefix or None,
            client_options={
                "timeout": request,
                "connect_timeout": timedelta(seconds=min(10.0, seconds)),
                "allow_http": any(
                    os.environ.get(name, "").startswith("http://")
                    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
                ),
            },
            retry_config={
                "max_retries": 3,
                "retry_timeout": timedelta(seconds=seconds / 2),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=5),
                    "base": 2,
                },
            },
        )

    def put(self, name: str, data: Buffer | Path) -> None:
        """In parts of `PIECE` bytes where it is longer: readers see the old object or all of the new one."""
        import obstore

        path = checked_name(name)
        self._tried(
            lambda: obstore.put(self._store, path, data, chunk_size=PIECE, max_concurrency=2),  # type: ignore[arg-type]
            "write",
            name,
        )

    def put_new(self, name: str, data: bytes) -> bool:
        """Write a small object where there is none of that name; False where there is one.

        A service that ignores the condition writes over it and True comes back.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError

        path = checked_name(name)

        def put() -> bool:
            try:
                obstore.put(self._store, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                return False
            return True

        return self._tried(put, "write", name)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        for begin in range(0, len(out), PIECE):
            piece = out[begin : begin + PIECE]
            piece[:] = self._piece(name, start + begin, len(piece))

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        """As it came, without a copy, where it is no more than one piece."""
        return self._piece(name, start, length) if length <= PIECE else super().get_range(name, start, length)

    def _piece(self, name: str, start: int, length: int) -> memoryview:
        import obstore

        path = checked_name(name)

        def read() -> memoryview:
            got = memoryview(obstore.get_range(self._store, path, start=start, length=length))
            if len(got) < length:
                raise _Short(start + len(got))
            return got

        return self._tried(read, "read", name)

    def size(self, name: str) -> int:
        import obstore

        path = checked_name(name)
        return self._tried(lambda: int(obstore.head(self._store, path)["size"]), "find", name)

    def names(self, under: str = "") -> Iterator[str]:
        import obstore

        prefix = checked_name(under) if under else None

        def listed() -> list[str]:
            return [str(one["path"]) for batch in obstore.list(self._store, prefix=prefix) for one in batch]

        yield from self._tried(listed, "list", under or ".")

    def delete(self, name: str) -> None:
        import obstore

        path = checked_name(name)
        try:
            self._tried(lambda: obstore.delete(self._store, path), "delete", name)
        except ObjectMissing:
            return

    def _check_machine_credentials(self) -> None:
        """Raises `UserError` unless this machine has a role of its own (Amazon's, asked once, two seconds at most)."""
        import socket

        if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
            raise UserError(NO_CREDENTIALS)
        try:
            socket.create_connection(("169.254.169.254", 80), timeout=2).close()
        except OSError:
            raise UserError(NO_CREDENTIALS) from None

    def _tried(self, action: Callable[[], T], verb: str, name: str) -> T:
        """The result of an action, tried again while it may still go well and there is time."""
        start, wait, short = time.monotonic(), 0.2, 0
        while True:
            try:
                return action()
            except FileNotFoundError:
                raise ObjectMissing(f"{self.url}/{name} is missing") from None
            except Exception as error:
                final, reason = reason_for(error)
                kind: type[UserError] = UserError
                if isinstance(error, _Short) or "status 416" in reason:
                    kind, short = ObjectTruncated, short + 1
                    final = short == SHORT_ANSWERS
                spent = time.monotonic() - start
                if final or spent + wait > self.seconds:
                    tried = "" if final else f" after {spent:.0f} s of retries"
                    raise kind(f"cannot {verb} {self.url}/{name}{tried}: {reason}") from None
            time.sleep(wait * _JITTER.uniform(0.5, 1.0))
            wait = min(2 * wait, 10.0)


class _Short(Exception):
    """A range came back shorter than asked for."""


_JITTER = random.Random()
"""Of the pauses between retries alone: no result depends on it, and the global state is left alone."""


def reason_for(error: Exception) -> tuple[bool, str]:
    """Whether an error of obstore is final, and why, with nothing of the server's answer but its codes."""
    if isinstance(error, _Short):
        return False, f"truncated: it ends at byte {error.args[0]}"
    text = str(error)
    if "169.254.169.254" in text or "CredentialsNotLoaded" in text:
        return True, NO_CREDENTIALS
    status = re.search(r"returned non-2xx status code: (\d{3})", text)
    code = re.search(r"<Code>([A-Za-z]{1,60})</Code>", text)
    words = f"status {status[1]}" if status else ""
    words += f" ({code[1]})" if code else ""
    if code and code[1] in ("NoSuchBucket", "InvalidBucketName"):
        return True, f"{words}: there is no such bucket"
    if code and code[1] in ("RequestTimeTooSkewed", "SlowDown", "RequestTimeout"):
        final = code[1] == "RequestTimeTooSkewed"
        return final, words + (": set this machine's clock" if final else ": the service asks to slow down")
    if status and status[1] == "416":
        return False, f"{words}: truncated, it ends before what was asked for"
    if status and (int(status[1]) < 500 or status[1] == "501") and status[1] not in ("408", "425", "429"):
        return True, f"{words}: {FINAL.get(int(status[1]), 'the service refuses it')}"
    if status:
        return False, f"{words}: the service fails or is overloaded; try again later"
    if "BareRedirect" in text:
        return True, FINAL[301]
    if "NotPartial" in text:
        return True, "the service ignores byte ranges, which stores need: use another service"
    if "Timeout" in text:
        return False, "the service answers too slowly: check the network, or try again later"
    if "kind: Connect" in text or "dns error" in text:
        return False, "no connection to the service: check AWS_ENDPOINT_URL, AWS_REGION and the network"
    if "Interrupted" in text or "IncompleteBody" in text:
        return False, "the connection breaks off before all bytes have come"
    return False, f"the client reports {type(error).__name__}"


def checked_url(url: str) -> tuple[str, str, str]:
    """(URL without a last slash, bucket, prefix) of s3://bucket/prefix. `UserError` repeats nothing of a bad one."""
    parts: Any = urlsplit(url)
    if "@" in url or parts.query or parts.fragment:
        raise UserError(
            "an S3 URL is s3://bucket/prefix with no credentials or options in it: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment"
        )
    bucket, prefix = parts.netloc, parts.path.strip("/")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}", bucket):
        raise UserError(f"{url!r} names no bucket: give s3://bucket/prefix")
    if prefix:
        checked_name(prefix)
    return f"s3://{bucket}/{prefix}".rstrip("/"), bucket, prefix
