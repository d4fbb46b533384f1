"""A mirror of the logs in Weights & Biases; the files in the run folder are the record, and a failure stops nothing."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sparse_coding.files import write_text
from sparse_coding.training.sweep import Member

PER_MEMBER = ("loss", "mse", "fvu", "l1", "l0", "dead")


class Mirror:
    """One W&B run beside one run folder.

    mode: `auto` is what the environment variable WANDB_MODE says, online without it.
    A run that is stopped and goes on in its folder goes on in W&B too when online; offline each start is a W&B run of
    its own. Whatever goes wrong in W&B is said once, the mirror is switched off, and training goes on.
    """

    def __init__(
        self,
        mode: Literal["online", "offline", "auto"],
        project: str,
        name: str,
        folder: Path,
        settings: Mapping[str, Any],
    ):
        self.run: Any = None
        self.next_step = 0
        chosen: Any = (os.environ.get("WANDB_MODE") or "online") if mode == "auto" else mode
        online = chosen == "online"
        with self._tolerated():
            import wandb

            self.run = wandb.init(
                project=project,
                name=name,
                dir=str(folder),
                mode=chosen,
                config=dict(settings),
                id=_run_id(folder / "wandb" / "run-id") if online else None,
                resume="allow" if online else None,
                reinit="create_new",  # never an unfinished run of this process, which belongs to another folder
            )
            self.next_step = self.run.step if online else 0

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Values at a step; calls may share one. Steps that W&B had before a stop are not sent again."""
        with self._tolerated():
            if self.run is not None and step >= self.next_step:
                self.run.log(dict(values), step=step)

    def finish(self, summary: Mapping[str, Any] | None = None, results: Sequence[Mapping[str, Any]] = ()) -> None:
        """The final facts, and `results` as a table with a column for each key."""
        with self._tolerated():
            if self.run is not None:
                import wandb

                if results:
                    columns: Any = list(dict.fromkeys(key for row in results for key in row))
                    rows: Any = [[row.get(key) for key in columns] for row in results]
                    self.run.log({"results": wandb.Table(columns=columns, data=rows)})
                self.run.summary.update(dict(summary or {}))
                self.run.finish()

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # its text may quote a key, its type does not
            self.run = None
            told = f"W&B is switched off for this run ({type(error).__name__}); the run folder has everything"
            print(told, file=sys.stderr)


class WandbMirror:
    """The mirror of a sweep, with keys such as `relu-512-.../fvu`; a callable for `Trainer(loggers=...)`."""

    def __init__(
        self,
        mode: Literal["online", "offline"],
        project: str,
        folder: Path,
        settings: Mapping[str, Any],
        members: Sequence[Member],
    ):
        self.names = [member.name for member in members]
        self.mirror = Mirror(mode, project, folder.name, folder, settings)

    def __call__(self, record: Mapping[str, Any]) -> None:
        values = {key: record[key] for key in ("tokens", "seconds", "lr_scale")}
        for key in PER_MEMBER:
            named = zip(self.names, record[key], strict=True)
            values |= {f"{name}/{key}": value for name, value in named if value is not None}
        self.mirror.log(values, record["step"])

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The results as a table."""
        plain = [{key: value for key, value in r["metrics"].items() if _plain(value)} for r in records]
        self.mirror.finish(results=[{"name": r["name"], **m} for r, m in zip(records, plain, strict=True)])


def _run_id(path: Path) -> str:
    """The id of the W&B run of a folder, kept in it: another folder of the same name is another run."""
    if not path.exists():
        write_text(path, uuid.uuid4().hex[:12])
    return path.read_text(encoding="utf-8").strip()


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
