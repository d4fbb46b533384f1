"""One HTML file that opens with no network: pictures inline, styles and script inline, every text from data escaped."""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from sparse_coding.files import write_text
from sparse_coding.report.records import short


@dataclass(frozen=True)
class Picture:
    """A picture, how to read it, and the file that holds it as PNG."""

    title: str
    svg: str
    """Made by `canvas.save`; the only text that enters the page unescaped."""
    caption: str
    file: str
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell: what is shown, what it is sorted by, and the unrounded value behind it."""

    text: str
    key: float | str
    title: str = ""
    numeric: bool = True
    best: bool = False
    """Marked as the best of its column."""


@dataclass(frozen=True)
class Row:
    cells: Sequence[Cell]
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table that sorts by a click on a header."""

    title: str
    headers: Sequence[tuple[str, str]]
    """Name of each column and a longer explanation (may be empty)."""
    rows: Sequence[Row]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Section:
    """A chapter of the page."""

    title: str
    intro: str = ""
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    latents: Sequence[Any] = ()
    """`latents.LatentCard`s."""
    raw: str = ""
    """Text shown as it is, in a fixed-width block."""


@dataclass(frozen=True)
class Page:
    title: str
    subtitle: str
    facts: Sequence[tuple[str, str]]
    """What was run: name and value."""
    summary: Sequence[str]
    warnings: Sequence[str]
    sections: Sequence[Section] = field(default_factory=list)


def render(page: Page) -> str:
    """The page as HTML text. Everything but the SVG of the pictures is escaped."""
    import jinja2

    folder = resources.files("sparse_coding.report") / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string((folder / "report.html").read_text(encoding="utf-8"))
    style = (folder / "report.css").read_text(encoding="utf-8")
    script = (folder / "report.js").read_text(encoding="utf-8")
    return template.render(page=page, style=style, script=script)


def write_page(page: Page, path: Path) -> Path:
    """Write the page whole or not at all."""
    write_text(path, render(page).encode("utf-8", "replace").decode("utf-8"))
    return path


def number_cell(value: float, digits: int = 3, text: str | None = None) -> Cell:
    """A right-aligned number that keeps its unrounded value as title; NaN is blank and sorts last."""
    if not math.isfinite(value):
        return Cell("", "", "no finite value")
    return Cell(short(value, digits) if text is None else text, value, repr(value))


def text_cell(text: Any) -> Cell:
    return Cell(visible(str(text)), visible(str(text)), numeric=False)


def pretty(data: Any) -> str:
    """Settings as indented JSON."""
    return visible(json.dumps(data, indent=2, ensure_ascii=False, default=str), keep="\n")


def visible(text: str, keep: str = "") -> str:
    """Text with control characters, direction overrides and lone surrogates replaced by a visible mark."""
    return "".join(
        "�" if character not in keep and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") else character
        for character in text
    )
