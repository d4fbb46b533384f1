"""One run, one folder: a lock, the settings it was started with, and the data files everything is drawn from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_coding.errors import DISK_FULL, UserError
from sparse_coding.files import write_text


class RunFolder:
    """`outputs/<run>`, locked by this process for as long as the object is open."""

    def __init__(self, path: Path, settings: Mapping[str, Any], fresh: bool = False):
        """Take the folder. A folder of other settings, or one in use, is refused; `fresh` empties it first.

        `settings` decide what comes out of the run; facts that do not (versions, host) go to `note`.
        """
        self.path, self._new, self._replaced = path, not path.exists(), path / ".replaced"
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
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "another process"
            self._lock.close()
            raise UserError(f"{path} is in use by {owner}: wait for it, stop it, or choose another --out") from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()
        try:
            self._settle(dict(settings), fresh)
        except BaseException:
            self.close()
            raise

    def _settle(self, settings: dict[str, Any], fresh: bool) -> None:
        settings_file = self.path / "settings.json"
        others = [entry for entry in self.path.iterdir() if entry.name not in ("lock", self._replaced.name)]
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
            changed = differences(before, json.loads(json.dumps(settings)))
            if changed:
                raise UserError(
                    f"{self.path} was started with other settings ({'; '.join(changed)}): "
                    "give those again to continue it, --out for a new folder, or --fresh to start over in this one"
                )
            return
        write_text(settings_file, json.dumps({"run": settings}, indent=1))

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
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

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
        nothing_done = {entry.name for entry in self.path.iterdir()} <= {"lock", "settings.json", ".replaced"}
        in_vain = nothing_done and kind is not None
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
