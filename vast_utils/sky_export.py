"""`--backend skypilot --print`: the same commands as task files for SkyPilot, instead of renting here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from sparse_coding.errors import UserError
from vast_utils.secrets import PLAIN, collect
from vast_utils.skypilot import SkyTask, to_yaml
from vast_utils.tasks import Task

if TYPE_CHECKING:
    from vast_utils.session import RentFlags


@dataclass(frozen=True, kw_only=True)
class SkyFlags:
    """For task files of another engine."""

    backend: Literal["vast", "skypilot"] = "vast"
    """Who rents: this program at vast.ai, or SkyPilot, for which task files are written."""
    print_: Annotated[bool, arg(name="print")] = False
    """With --backend skypilot: print the task file, or files of a sweep."""
    to: Path | None = None
    """With --backend skypilot: write them into this folder, one for each command."""
    cloud: str = ""
    """With --backend skypilot: aws, gcp, ...; by default SkyPilot takes the cheapest."""
    region: str = ""
    """With --backend skypilot: where, such as us-east-1: traffic within a bucket's region is free."""

    def check_unused(self) -> None:
        """Refuse flags that renting here would not read."""
        for name in ("print_", "to", "cloud", "region"):
            if getattr(self, name):
                raise UserError(f"--{name.strip('_')} goes with --backend skypilot: give that too, or leave it out")


def export(flags: RentFlags, sky: SkyFlags, tasks: Sequence[Task]) -> None:
    """Print task files, or write them into a folder. Rents nothing."""
    if not sky.print_ and sky.to is None:
        raise UserError("--backend skypilot rents nothing itself: add --print, or --to FOLDER")
    known = collect(os.environ, flags.env)
    for task in tasks:
        text = to_yaml(
            SkyTask(
                name=task.name,
                command=task.argv,
                gpu=flags.gpu[0] if flags.gpu else "",
                num_gpus=flags.num_gpus,
                disk=round(flags.disk),
                cloud=sky.cloud,
                region=sky.region,
                spot=flags.interruptible,
                max_hours=flags.max_hours,
                env={name: value for name, value in known.items() if name in PLAIN},
                secrets=tuple(name for name in known if name not in PLAIN),
            )
        )
        if sky.to is not None:
            sky.to.mkdir(parents=True, exist_ok=True)
            path = sky.to / f"{task.name}.yaml"
            path.write_text(text, encoding="utf-8")
            print(path)
        if sky.print_:
            print(("---\n" if task is not tasks[0] else "") + text, end="")
