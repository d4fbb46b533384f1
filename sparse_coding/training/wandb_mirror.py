"""A mirror of the logs in Weights & Biases; the files in the run folder are the record, and a failure stops nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_coding.training.sweep import Member

PER_MEMBER = ("loss", "mse", "fvu", "l1", "l0", "dead")


class WandbMirror:
    """One W&B run for a sweep, with keys such as `relu-512-.../fvu`; a callable for `Trainer(loggers=...)`."""

    def __init__(self, mode: str, project: str, folder: Path, settings: Mapping[str, Any], members: Sequence[Member]):
        self.names = [member.name for member in members]
        self.run: Any = None
        with self._tolerated():
            import wandb

            self.run = wandb.init(
                project=project,
                name=folder.name,
                dir=str(folder),
                mode="offline" if mode == "offline" else "online",
                config=dict(settings),
                id=folder.name.replace("/", "-")[-64:] if mode == "online" else None,
                resume="allow" if mode == "online" else None,
            )

    def __call__(self, record: Mapping[str, Any]) -> None:
        with self._tolerated():
            if self.run is not None:
                values = {key: record[key] for key in ("tokens", "seconds", "lr_scale")}
                for key in PER_MEMBER:
                    named = zip(self.names, record[key], strict=True)
                    values |= {f"{name}/{key}": value for name, value in named if value is not None}
                self.run.log(values, step=record["step"])

    def finish(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The results as a table."""
        with self._tolerated():
            if self.run is not None:
                import wandb

                columns = ["name", *dict.fromkeys(key for r in records for key, v in r["metrics"].items() if _plain(v))]
                rows: Any = [[r["name"], *(r["metrics"].get(key) for key in columns[1:])] for r in records]
                self.run.log({"results": wandb.Table(columns=columns, data=rows)})
                self.run.finish()

    def _tolerated(self) -> _Tolerated:
        return _Tolerated(self)


class _Tolerated:
    """Whatever goes wrong inside is said once, the mirror is switched off, and the run goes on."""

    def __init__(self, mirror: WandbMirror):
        self.mirror = mirror

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.mirror.run = None
        print(
            f"W&B is switched off for this run ({type(error).__name__}); the run folder has everything", file=sys.stderr
        )
        return True


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, int | float)
