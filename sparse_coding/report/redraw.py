"""The report of any finished run, drawn again from its data files."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_coding.errors import UserError
from sparse_coding.report.run_report import write_run_report
from sparse_coding.report.toy_report import write_toy_report

WRITERS = {"toy": write_toy_report, "run": write_run_report}


def redraw(folder: Path) -> Path:
    """Write the report of a run folder; its settings.json says which kind of run it was."""
    try:
        kind = json.loads((folder / "settings.json").read_text(encoding="utf-8"))["run"]["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} is no run folder: give one that holds settings.json, such as outputs/...") from None
    if kind not in WRITERS:
        raise UserError(f"{folder} is a run of kind {kind!r}: this version draws {', '.join(WRITERS)}")
    return WRITERS[kind](folder)
