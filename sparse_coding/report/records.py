"""Reading a finished run: the records everything is drawn from, and the small questions all reports ask of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparse_coding.errors import UserError

Record = dict[str, Any]
"""One line of results.jsonl: one member with its settings and metrics."""

KNOBS = ("l1_coefficient", "k", "target_l0", "l0_coefficient")
"""What sets the sparsity of a member, the first that it has (a target L0 of 0 is none); the x axis of every map."""


@dataclass(frozen=True)
class RunData:
    """The data files of one run folder."""

    folder: Path
    settings: dict[str, Any]
    records: list[Record]
    log: list[Record]
    member_names: list[str]
    """The order of the columns in log.jsonl."""


def read_run(folder: Path) -> RunData:
    """Read settings.json, results.jsonl, and, where they are, log.jsonl and members.json.

    Raises UserError for a folder, file or line that is missing or damaged. Only the end of log.jsonl may be cut short,
    which is what a killed run leaves behind.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a run folder: give a folder that holds results.jsonl")
    records = _lines(folder / "results.jsonl", "finish the run first, it is written at the end")
    if not records:
        raise UserError(f"{folder / 'results.jsonl'} is empty: there are no members to report on; finish the run first")
    for number, record in enumerate(records, 1):
        if not isinstance(record.get("name"), str) or not isinstance(record.get("metrics"), dict):
            raise UserError(
                f"{folder / 'results.jsonl'} line {number} has no 'name' or no 'metrics': restore or redo the run"
            )
    settings = read_json(folder / "settings.json")
    if not isinstance(settings, dict):
        raise UserError(f"{folder / 'settings.json'} must hold an object, not {type(settings).__name__}")
    log = _lines(folder / "log.jsonl", "", may_be_cut=True) if (folder / "log.jsonl").exists() else []
    names = [record["name"] for record in records]
    if (folder / "members.json").exists():
        members = read_json(folder / "members.json")
        if not isinstance(members, list) or not all(isinstance(m, dict) and "name" in m for m in members):
            raise UserError(f"{folder / 'members.json'} must hold a list of members, each with a 'name'")
        names = [str(member["name"]) for member in members]
    return RunData(folder, settings, records, log, names)


def read_json(path: Path) -> Any:
    """The value in a JSON file; UserError where it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a report is drawn from the data files of a finished run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it or redo the run") from None


def _lines(path: Path, advice: str, may_be_cut: bool = False) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8", errors="strict").splitlines()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {advice}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): restore it or redo the run") from None
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            if may_be_cut and number == len(lines):
                break
            raise UserError(f"{path} line {number} is damaged ({error}): restore the file or redo the run") from None
        records.append(record)
    return records


def number(value: Any) -> float:
    """`value` as a finite float, or NaN for anything else (None, infinity, text)."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return math.nan


def metric(record: Mapping[str, Any], name: str) -> float:
    """A metric of a member, or a fact of the same name; NaN where it is missing or not finite."""
    metrics = record.get("metrics") or {}
    return number(metrics[name] if name in metrics else record.get(name))


def has(records: Iterable[Mapping[str, Any]], name: str) -> bool:
    """Whether any member has a finite value of the metric."""
    return any(math.isfinite(metric(record, name)) for record in records)


def knob_name(records: Iterable[Mapping[str, Any]]) -> str:
    """What sets the sparsity of these members of one architecture: its L1 coefficient, its k, ..."""
    records = list(records)
    return next((name for name in KNOBS if any(_turns(record, name) for record in records)), KNOBS[0])


def _turns(record: Mapping[str, Any], name: str) -> bool:
    value = fact(record, name)
    return value > 0 if name == "target_l0" else math.isfinite(value)


def knob(record: Mapping[str, Any]) -> float:
    """The sparsity setting of a member, rounded to 6 digits so that equal settings compare equal."""
    return _rounded(fact(record, knob_name([record])))


def ratio(record: Mapping[str, Any]) -> float:
    """The dictionary ratio of a member, rounded to 6 digits; d_sae / d_in where the record does not say it."""
    value = fact(record, "ratio")
    if math.isnan(value):
        d_in, d_sae = fact(record, "d_in"), fact(record, "d_sae")
        value = d_sae / d_in if d_in > 0 else math.nan
    return _rounded(value)


def fact(record: Mapping[str, Any], name: str) -> float:
    """A number that a record states at its top or in its settings; NaN where it states none."""
    value = number(record.get(name))
    return value if math.isfinite(value) else number((record.get("settings") or {}).get(name))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def axes(records: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """The distinct sparsity settings and ratios of the members of one family, both ascending."""
    knobs = {value for record in records if math.isfinite(value := knob(record))}
    ratios = {value for record in records if math.isfinite(value := ratio(record))}
    return sorted(knobs), sorted(ratios)


def grid_matrix(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float], np.ndarray]:
    """A metric over the grid: L1 values, ratios, and the matrix `[n_ratios n_l1]` of the mean over what shares a cell.

    Members that share a cell differ in seed. Values that are missing or not finite take no part in the mean; a cell
    with none left is NaN.
    """
    knobs, ratios = axes(records)
    return knobs, ratios, _grid(records, name, knobs, ratios, np.mean)


def grid_spread(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Sample standard deviation over what shares a cell, `[n_ratios n_l1]`; NaN below two values."""
    return _grid(
        records, name, *axes(records), lambda values: np.std(values, ddof=1) if len(values) > 1 else float("nan")
    )


def _grid(records, name, knobs, ratios, reduce) -> np.ndarray:
    cells: dict[tuple[float, float], list[float]] = {}
    for record in records:
        if math.isfinite(value := metric(record, name)):
            cells.setdefault((ratio(record), knob(record)), []).append(value)
    return np.array([[reduce(cells[r, k]) if (r, k) in cells else np.nan for k in knobs] for r in ratios])


def short(value: float, digits: int = 3) -> str:
    """A number for an axis or a table: `digits` significant digits, exponents without padding, a dash for NaN."""
    if not math.isfinite(value):
        return "–"
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text
    if 1e3 <= abs(value) < 1e6:
        return f"{float(text):,.0f}"
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"


def labels(values: Sequence[float], digits: int = 3) -> list[str]:
    """Axis labels that differ wherever the values do: 3 significant digits, more where those are not enough."""
    for more in range(digits, 17):
        texts = [short(value, more) for value in values]
        if len(set(texts)) == len(set(values)):
            return texts
    return [repr(value) for value in values]


def by_ratio(values: Any, at: float) -> float:
    """A control at a ratio: a number that holds for all, or the entry of a mapping whose key is that ratio."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            try:
                if math.isclose(float(key), at, rel_tol=1e-4):
                    return number(value)
            except (TypeError, ValueError):
                continue
        return math.nan
    return number(values)
