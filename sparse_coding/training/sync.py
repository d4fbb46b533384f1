"""A copy of a run folder in a bucket or another folder, kept up in the background: a rented machine may vanish.

The last machine that started a run owns the copy (`owner.json`); one that was thought dead and still runs sees that
another took over and stops copying. What a copy holds is a run folder: checkpoints carry their own checksums, and a
file is put whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from sparse_coding.errors import UserError
from sparse_coding.training import checkpoint

SNAPSHOT, FETCHED = ".syncing", ".fetched"
"""Folders in the run folder: hard links to what is being copied, and what is being brought here."""
OWNER = "owner.json"
SUFFIXES = (".json", ".jsonl", ".html", ".md", ".png", ".svg", ".csv", ".safetensors")
FIRST, LAST = ("settings.json", "members.json", "log.jsonl"), ("results.jsonl", "report.html")
"""A log is never behind its checkpoint, and results come when everything else is there."""
RETRY_SECONDS = 5.0

Key = tuple[int, int, int]


class Objects(Protocol):
    """What is needed of stores/objects.py, which gives folders and S3."""

    url: str

    def put(self, name: str, data: bytes | Path) -> None: ...
    def pieces(self, name: str) -> Iterator[memoryview]: ...
    def names(self, under: str = "") -> Iterator[str]: ...
    def delete(self, name: str) -> None: ...
    def exists(self, name: str) -> bool: ...


class Sync:
    """One run folder and its copy. Whatever goes wrong while copying is said on stderr and never stops training."""

    def __init__(self, objects: Objects):
        self.objects, self.url = objects, objects.url
        self.replace = False
        """A run that starts over: what lies in the copy goes when the first new state is there."""
        self._token = uuid.uuid4().hex
        self._owned = self._lost = self._closing = self._hurry = False
        self._copied: dict[str, Key] = {}
        self._pending: dict[str, tuple[Path, Key]] | None = None
        self._work = threading.Condition()
        self._thread: threading.Thread | None = None
        self._number = 0
        self._told: set[str] = set()

    # ---- bringing a run here

    def run_settings(self) -> dict[str, Any] | None:
        """The settings of the run in the copy; None where there is none. Raises UserError where it cannot be read."""
        if not self.objects.exists("settings.json"):
            return None
        try:
            return json.loads(self._bytes("settings.json"))["run"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.url}/settings.json is no run of ours: choose another --sync") from None

    def fetch(self, folder: Path) -> None:
        """Bring the copy here if it is further than what is here. A kill in the middle leaves it to be done again."""
        names = [name for name in self.objects.names() if belongs(name)]
        there = checkpoint_steps(names)
        finished, here = (folder / "results.jsonl").exists(), checkpoint.newest_step(folder / "checkpoints")
        further = not finished and ("results.jsonl" in names or max(there, default=-1) > here)
        if not further and (folder / "settings.json").exists():
            return
        elsewhere = folder / FETCHED
        shutil.rmtree(elsewhere, ignore_errors=True)
        for name in names:
            path = elsewhere / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for piece in self.objects.pieces(name):
                    file.write(piece)
        for name in ("settings.json", "checkpoints"):  # settings.json comes back last: a sign that all is here
            path = folder / name
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for entry in sorted(elsewhere.iterdir(), key=lambda entry: entry.name == "settings.json"):
            place = folder / entry.name
            if place.is_dir():
                shutil.rmtree(place)
            entry.replace(place)
        shutil.rmtree(elsewhere)
        self._copied = {name: _key(folder / name) for name in names}
        what = "a finished run" if "results.jsonl" in names else f"step {max(there, default=0):,}"
        print(f"brought {what} from {self.url}", file=sys.stderr, flush=True)

    def _bytes(self, name: str) -> bytes:
        return b"".join(bytes(piece) for piece in self.objects.pieces(name))

    # ---- copying it away

    def push(self, folder: Path) -> None:
        """Copy what is new in the folder, in the background. What is asked for meanwhile replaces what waits."""
        with self._work:
            if self._lost or self._closing:
                return
            self._number += 1
            try:
                snapshot = self._snapshot(folder)
            except OSError as error:
                self._tell("failed", f"copying to {self.url} failed, training goes on: {error.strerror}")
                return
            waiting, self._pending = self._pending, snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._copying, name="sync", daemon=True)
                self._thread.start()
            self._work.notify()
        _remove(waiting)

    def close(self, seconds: float) -> None:
        """Wait for the copies that were asked for, at most so long, and clean up."""
        thread, deadline = self._thread, time.monotonic() + seconds
        with self._work:
            self._closing, self._deadline = True, deadline
            self._work.notify()
        if thread is not None:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive() or self._pending:
                self._tell(
                    "late", f"the newest state is not in {self.url} yet: start the same command again to copy it"
                )
        for snapshot in self._folders:
            shutil.rmtree(snapshot, ignore_errors=True)

    _deadline = float("inf")
    _folders: tuple[Path, ...] = ()

    def _snapshot(self, folder: Path) -> dict[str, tuple[Path, Key]]:
        """Every file of the run by name, and hard links to those that are not copied yet: pruning cannot take them."""
        place = folder / SNAPSHOT
        self._folders = (place,)
        found: dict[str, tuple[Path, Key]] = {}
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if not belongs(name):
                continue
            with contextlib.suppress(FileNotFoundError):
                key = _key(path)
                link = place / str(self._number) / name
                if self._copied.get(name) != key:
                    link.parent.mkdir(parents=True, exist_ok=True)
                    if name == "log.jsonl":  # the one file that is written to in place
                        shutil.copyfile(path, link)
                    else:
                        _link(path, link)
                found[name] = link, key
        return found

    def _copying(self) -> None:
        """The thread: copies the newest snapshot, tries again after a while where that fails."""
        while True:
            with self._work:
                while self._pending is None and not self._closing:
                    self._work.wait()
                snapshot, self._pending = self._pending, None
            if snapshot is None or self._lost:
                return
            try:
                self._copy(snapshot)
                self._told.discard("failed")
            except Exception as error:  # training goes on whatever happens here
                # A UserError is ours and holds no secret; the text of another error might.
                words = str(error) if isinstance(error, UserError) else type(error).__name__
                self._tell("failed", f"copying to {self.url} failed, training goes on: {words}")
                with self._work:
                    if self._pending is None:
                        self._pending = snapshot
                        if self._closing and time.monotonic() + RETRY_SECONDS > self._deadline:
                            return
                        self._work.wait(RETRY_SECONDS)
                        if self._closing and time.monotonic() > self._deadline:
                            return
                        continue
            _remove(snapshot)

    def _copy(self, snapshot: dict[str, tuple[Path, Key]]) -> None:
        self._check_owner()
        if self._lost:
            return
        there = {name for name in self.objects.names() if belongs(name)} if self.replace or not self._copied else set()
        if self.replace:  # settings.json last: until then what is left there still is the run before, not this one
            for name in sorted(there, key=lambda name: (name == "settings.json", _place(name))):
                self.objects.delete(name)
            self.replace, there = False, set()
        for name in sorted(snapshot, key=_place):
            path, key = snapshot[name]
            if self._copied.get(name) != key and path.exists():
                self.objects.put(name, path)
                self._copied[name] = key
        for name in {*self._copied, *there} - snapshot.keys():
            if name.startswith("checkpoints/"):
                self.objects.delete(name)
                self._copied.pop(name, None)

    def _check_owner(self) -> None:
        """Take the copy, or see that another run took it since."""
        if not self._owned:
            owner = {"host": socket.gethostname(), "process": os.getpid(), "token": self._token}
            self.objects.put(OWNER, json.dumps(owner).encode())
            self._owned = True
            return
        try:
            owner = json.loads(self._bytes(OWNER)) if self.objects.exists(OWNER) else {}
        except ValueError:
            owner = {}
        if owner.get("token", self._token) != self._token:
            self._lost = True
            by = f"process {owner.get('process')} on {owner.get('host')}"
            self._tell("lost", f"{self.url} was taken over by {by}: this run is no longer copied there")

    def _tell(self, kind: str, message: str) -> None:
        """A warning, once until that kind of trouble has passed."""
        if kind not in self._told:
            self._told.add(kind)
            print(f"warning: {message}", file=sys.stderr, flush=True)


def belongs(name: str) -> bool:
    """Whether a file of a run folder is copied: data, dictionaries and pictures, not locks and temporary files."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part.endswith(checkpoint.BEFORE) for part in parts)
    return not hidden and parts[0] != "wandb" and name != OWNER and name.endswith(SUFFIXES)


def checkpoint_steps(names: list[str]) -> list[int]:
    """Steps of the checkpoints that are whole in a list of names."""
    found = []
    for name in names:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] == "checkpoints" and parts[2] == checkpoint.FACTS:
            digits = parts[1].removeprefix("step-")
            found += [int(digits)] if digits.isdigit() else []
    return found


def _key(path: Path) -> Key:
    """What changes when a file does."""
    facts = path.stat()
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except FileNotFoundError:
        raise
    except OSError:  # a file system without links
        shutil.copyfile(path, link)


def _place(name: str) -> tuple[int, str, bool]:
    """The order of copying; within a checkpoint the file that makes it whole comes last."""
    rank = 0 if name in FIRST else 2 if name in LAST else 1
    folder = str(PurePosixPath(name).parent)
    return rank, folder, name.endswith(checkpoint.FACTS)


def _remove(snapshot: dict[str, tuple[Path, Key]] | None) -> None:
    """The links of a snapshot that has served."""
    for path, _ in (snapshot or {}).values():
        path.unlink(missing_ok=True)
