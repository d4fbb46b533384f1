"""Full shards on their way into a store: summed, hashed and sent by threads, counted in their order.

The manifest counts a shard once all its files are durable, and is written again after it.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from sparse_coding.stores.manifest import MANIFEST, FileInfo, Manifest, ShardInfo
from sparse_coding.stores.objects import Objects
from sparse_coding.stores.running import Running
from sparse_coding.stores.shard_file import Expected, header, tensor_bytes
from sparse_coding.stores.sums import DIGITS, Sums, sum_of


@dataclass
class _Sending:
    """A shard whose files are on their way."""

    rows: int
    statistics: Mapping[str, Running]
    files: dict[str, Future[FileInfo]]


class Outbox:
    """Sends files with `uploads` threads, at most so many at once, and keeps the manifest of what is durable."""

    def __init__(self, objects: Objects, manifest: Manifest, uploads: int, group_rows: int):
        self.objects, self.manifest, self.group_rows = objects, manifest, group_rows
        self._statistics = {
            name: Running.of(manifest.rows, manifest.statistics.get(name), site.width)
            for name, site in manifest.sites.items()
        }
        self._next = len(manifest.shards)
        self._sending: deque[_Sending] = deque()
        self._slots = threading.Semaphore(uploads)
        self._threads = ThreadPoolExecutor(uploads, thread_name_prefix="store-upload")
        self._said, self._written, self._write_took = len(manifest.shards), time.monotonic(), 0.0
        """Shards the manifest there counts; when and how long it was written last."""

    def send(self, rows: int, parts: Mapping[str | None, np.ndarray], statistics: Mapping[str, Running]) -> None:
        """Send the next shard. parts: the bytes of each file, by site or None for the tokens, with room for the header.

        Waits for a free place for each. Raises what sending a shard before this one raised.
        """
        files = {}
        for part, data in parts.items():
            self._slots.acquire()
            name = self.manifest.file_name(part, self._next)
            files[name] = self._threads.submit(self._put, name, data, self.manifest.expected(part, rows))
        self._sending.append(_Sending(rows, statistics, files))
        self._next += 1
        self.settle()

    def settle(self) -> None:
        """Count what has become durable, without waiting. Raises what sending a shard raised."""
        self._settle(wait=False)

    def finish(self) -> None:
        """Wait until all is durable, and say that the store is complete."""
        self._settle(wait=True)
        self.manifest = replace(self.manifest, complete=True)
        self._write_manifest()
        self._threads.shutdown()

    def close(self) -> None:
        """Wait for what is being sent and write the manifest."""
        try:
            if not self.manifest.complete:
                try:
                    self._settle(wait=True)
                finally:  # what is durable stays so, whatever failed after it
                    self._write_manifest()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _put(self, name: str, data: np.ndarray, expected: Expected) -> FileInfo:
        try:
            start = len(data) - sum(tensor_bytes(*one) for one in expected.values())
            sums = None
            if "rows" in expected:
                sums = Sums.of(data[start:].reshape(expected["rows"][1][0], -1), self.group_rows)
            data[:start] = np.frombuffer(header(expected, start, sums), np.uint8)
            info = FileInfo(len(data), hashlib.sha256(data.data).hexdigest(), f"{sum_of(data[:start]):0{DIGITS}x}")
            self.objects.put(name, data.data)
            return info
        finally:
            self._slots.release()

    def _settle(self, wait: bool) -> None:
        """Count the shards that are durable, in their order. Raises what sending one raised."""
        try:
            while self._sending and (wait or all(future.done() for future in self._sending[0].files.values())):
                one = self._sending[0]
                files = {name: future.result() for name, future in one.files.items()}
                self._sending.popleft()
                for name, running in one.statistics.items():
                    self._statistics[name].merge(running)
                self.manifest = replace(
                    self.manifest,
                    shards=(*self.manifest.shards, ShardInfo(one.rows, files)),
                    statistics={name: running.said() for name, running in self._statistics.items()},
                )
        finally:
            # A long manifest is not written for every shard where that would take more than a twentieth of the time.
            if len(self.manifest.shards) > self._said and time.monotonic() - self._written >= 20 * self._write_took:
                self._write_manifest()

    def _write_manifest(self) -> None:
        start = time.monotonic()
        self.objects.put(MANIFEST, self.manifest.to_json().encode())
        self._said, self._written = len(self.manifest.shards), time.monotonic()
        self._write_took = self._written - start
