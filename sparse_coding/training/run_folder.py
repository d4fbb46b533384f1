"""One run, one folder: a lock, the settings it was started with, and the data files everything is drawn from."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_coding.errors import DISK_FULL, UserError
from sparse_coding.files import write_text
from sparse_coding.training.sync import FETCHED, SNAPSHOT, Sync

SYNCING = (SNAPSHOT, FETCHED)
"""What syncing keeps in a run folder meanwhile."""
END_SECONDS, STOP_SECONDS = 600.0, 20.0
"""How long the last copies may take: at the end of a run, and when it is stopped (a spot machine has 30 s or more)."""


class RunFolder:
    """`outputs/<run>`, locked by this process for as long as the object is open."""

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False, sync: Sync | None = None):
        """Take the folder. A folder of other settings, or one in use, is refused; `fresh` empties it first.

        `settings` decide what comes out of the run; facts that do not (versions, host) go to `note`. With `sync` the
        run goes on from its copy where that is further, and is copied there after each checkpoint and at the end.
        """
        self.path, self._new, self._replaced = path, not path.exists(), path / ".replaced"
        self._sync = sync
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"{path} is a file: choose another output folder with --out") from None
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise UserError(f"{path} cannot be made ({error.strerror}): choose another folder with --out") from None
        try:
            self._lock = open(path / "lock", "a+", encoding="utf-8")  # noqa: SIM115 - held until close()
        except PermissionError:
            raise UserError(f"{path} cannot be written to: choose another folder with --out") from None
        self._take_lock()
        try:
            self._settle(dict(settings), fresh)
        except BaseException:
            self.close()
            raise

    def _take_lock(self) -> None:
        """The system's own lock, gone with the process that holds it; its text says who that is, for the message."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                told = (
                    f"{self.path}: this file system has no locks ({error.strerror}); see that no other run writes there"
                )
                print(told, file=sys.stderr, flush=True)
                return
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(
                f"{self.path} is in use by {owner}: wait for it, stop it, or choose another --out"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _settle(self, settings: dict[str, Any], fresh: bool) -> None:
        settings_file = self.path / "settings.json"
        for leftover in SYNCING:
            shutil.rmtree(self.path / leftover, ignore_errors=True)
        if self._sync:
            self._continue_elsewhere(self._sync, settings, fresh)
        others = [entry for entry in self.path.iterdir() if entry.name not in ("lock", self._replaced.name, *SYNCING)]
        if (
            others
            and not settings_file.exists()
            and not all(entry.name.startswith("settings.json.") for entry in others)
        ):
            raise UserError(f"{self.path} holds files that are no run of ours: choose another --out")
        if fresh:
            # Set aside, not removed: a mistake found before anything is done must not cost the run that was there.
            if others:
                shutil.rmtree(self._replaced, ignore_errors=True)  # left by a run that was killed
            self._replaced.mkdir(exist_ok=True)
            for entry in others:
                entry.rename(self._replaced / entry.name)
        elif settings_file.exists():
            before = json.loads(settings_file.read_text(encoding="utf-8")).get("run")
            _require_same(str(self.path), before, settings, "--out for a new folder")
            return
        write_text(settings_file, json.dumps({"run": settings}, indent=1))

    def _continue_elsewhere(self, sync: Sync, settings: dict[str, Any], fresh: bool) -> None:
        """Bring the copy of this run here where it is further than what is here."""
        there = None if fresh else sync.run_settings()
        if there is not None:
            _require_same(sync.url, there, settings, "another --sync")
            sync.fetch(self.path)
        sync.replace = fresh

    def push(self) -> None:
        """Copy what is new to where the run is synced to, in the background; nothing without --sync."""
        if self._sync:
            self._sync.push(self.path)

    def note(self, **facts: Any) -> None:
        """Add facts about the run to settings.json beside the settings."""
        path = self.path / "settings.json"
        known = json.loads(path.read_text(encoding="utf-8"))
        write_text(path, json.dumps({**known, **facts}, indent=1))

    def write_json(self, name: str, data: Any) -> None:
        write_text(self.path / name, json.dumps(data, indent=1))

    def write_lines(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """A whole JSON-lines file at once."""
        write_text(self.path / name, "".join(json.dumps(record) + "\n" for record in records))

    def append(self, name: str, record: Mapping[str, Any]) -> None:
        """One more line. Raises `OSError` naming the file, and what was there stays, where the disk is full."""
        path = self.path / name
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None

    def make_durable(self, name: str) -> None:
        """After this the lines of a file survive a crash of the machine."""
        path = self.path / name
        if path.exists():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())

    def rewind_log(self, step: int) -> None:
        """Drop log lines past `step`: a resumed run writes them again."""
        path = self.path / "log.jsonl"
        if path.exists():
            kept = [record for record in read_lines(path) if record["step"] <= step]
            self.write_lines("log.jsonl", kept)

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the results; the checkpoints have served and go."""
        self.write_lines("results.jsonl", records)
        shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    @property
    def finished(self) -> bool:
        return (self.path / "results.jsonl").exists()

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """What fails or is stopped before anything was done leaves no new folder behind and an old run as it was."""
        begun = {"lock", "settings.json", ".replaced", *SYNCING}
        nothing_done = {entry.name for entry in self.path.iterdir()} <= begun
        in_vain = nothing_done and kind is not None
        if self._sync:
            if not in_vain:
                self.push()
            self._sync.close(END_SECONDS if kind is None else STOP_SECONDS)
        if in_vain and self._new:
            shutil.rmtree(self.path)
        elif in_vain and self._replaced.exists():
            for entry in self._replaced.iterdir():
                entry.replace(self.path / entry.name)
        shutil.rmtree(self._replaced, ignore_errors=True)
        self.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a last line cut short by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _require_same(where: str, before: Any, settings: Mapping[str, Any], instead: str) -> None:
    """Raise UserError naming what differs between the settings a run was started with and those of now."""
    changed = differences(before, json.loads(json.dumps(settings)))
    if changed:
        raise UserError(
            f"{where} was started with other settings ({'; '.join(changed)}): "
            f"give those again to continue it, {instead}, or --fresh to start over in this one"
        )


def differences(before: Any, now: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, as `key: was 1, is 2`."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys((*before, *now))
        return [line for key in keys for line in differences(before.get(key), now.get(key), f"{where}{key}.")]
    if before == now:
        return []
    return [f"{where.rstrip('.')}: was {short(before)}, is {short(now)}"]


def short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
