"""The results of a sweep in one place: every record says which command it is from, and a report names them all."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError
from vast_utils.tasks import Task

RECORDS = "results.jsonl"
MEASURES = ("fvu", "l0", "dead_fraction", "ce_recovered_zero")
"""Columns of the report, where the records have them."""


def merge(outputs: Path, sweep: str, tasks: Sequence[Task], dollars: float) -> Path:
    """Write `results.jsonl` of all commands that have results, and `report.md`; the folder they are in."""
    folder = outputs / sweep
    folder.mkdir(parents=True, exist_ok=True)
    found = {task.name: records(outputs, task) for task in tasks}
    lines = [json.dumps({"run": task.name, **record}) for task in tasks for record in found[task.name]]
    _write(folder / RECORDS, "".join(line + "\n" for line in lines))
    reported = {task.name for task in tasks if (folder / task.name / "report.html").exists()}
    _write(folder / "report.md", _report(sweep, tasks, found, reported, dollars))
    return folder


def records(outputs: Path, task: Task) -> list[dict[str, Any]]:
    """What a command's results.jsonl holds; of one without a folder of its own, those of all folders that it made."""
    read = []
    for run in [task.out] if task.out else task.runs:
        path = outputs / run / RECORDS
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            read += [_record(path, at, line) for at, line in enumerate(lines, 1) if line.strip()]
    return read


def _record(path: Path, at: int, line: str) -> dict[str, Any]:
    try:
        read = json.loads(line)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise UserError(f"{path}, line {at}: {line[:40]!r} is no JSON object; mend it and give the same command again")
    return read


def _report(
    sweep: str, tasks: Sequence[Task], found: dict[str, list[dict[str, Any]]], reported: set[str], dollars: float
) -> str:
    everything = [_measures(record) for one in found.values() for record in one]
    shown = [name for name in MEASURES if any(name in measures for measures in everything)]
    done = sum(task.phase == "done" for task in tasks)
    head = ["command", "state", "minutes", "dictionaries", *shown]
    rows = [head, ["---"] * len(head)]
    for task in tasks:
        state = task.phase if task.phase == "done" or not task.why else f"{task.phase}: {task.why}"
        name = task.about or task.name
        if task.name in reported:
            name = f"[{name}]({task.name}/report.html)"
        best = [_range(found[task.name], name) for name in shown]
        rows.append([name, state, f"{task.seconds / 60:.1f}", str(len(found[task.name])), *best])
    table = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)
    return (
        f"# {sweep}\n\n{done} of {len(tasks)} commands done, at most ${dollars:.2f}. Of each measure the range over a "
        f"command's dictionaries; every record is in `{RECORDS}`.\n\n{table}\n"
    )


def _range(records: Sequence[dict[str, Any]], name: str) -> str:
    values = [value for record in records if isinstance(value := _measures(record).get(name), int | float)]
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"


def _measures(record: dict[str, Any]) -> dict[str, Any]:
    """Of a record of run.py what was measured; of another program's, all of it."""
    inner = record.get("metrics")
    return inner if isinstance(inner, dict) else record


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
