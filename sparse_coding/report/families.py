"""Families: members that differ in sparsity, size and seed alone, and so share the axes of a picture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sparse_coding.report.page import visible
from sparse_coding.report.records import Record, fact, knob_name, labels

KNOB_LABELS = {
    "l1_coefficient": "L1 coefficient",
    "k": "k (active latents allowed)",
    "target_l0": "target L0",
    "l0_coefficient": "L0 coefficient",
}
KNOB_WORDS = {"l1_coefficient": "L1", "k": "k", "target_l0": "target L0", "l0_coefficient": "L0 coefficient"}
"""The same where room is short."""
NUMBERS = {"lr": "lr", "l0_coefficient": "L0 coefficient", "bandwidth": "bandwidth", "auxk_coefficient": "aux"}
"""Numbers that set families of one architecture apart, and what they are called. A knob is none of them."""
LONGEST = 36
"""Characters of a family's name; the rest of a longer architecture and variant is left out."""


def knob_label(records: Iterable[Mapping[str, Any]]) -> str:
    """What the sparsity axis of these members of one family is called."""
    return KNOB_LABELS[knob_name(records)]


def knob_word(records: Iterable[Mapping[str, Any]]) -> str:
    """The same in a word or two."""
    return KNOB_WORDS[knob_name(records)]


def family_key(record: Mapping[str, Any]) -> tuple:
    """Equal for members that differ in sparsity, size and seed alone: architecture, variant, knob, other numbers."""
    turned = knob_name([record])
    others = tuple(_comparable(fact(record, name)) if name != turned else "" for name in NUMBERS)
    return (str(record.get("architecture") or ""), str(record.get("variant") or ""), turned, *others)


def _comparable(value: float) -> float | str:
    return value if value == value else ""


def families(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Members by family, in the order of first appearance, under a short name that says what sets each apart.

    The name of a single family is ''. Names are safe to show, unlike those in the records.
    """
    parts: dict[tuple, list[Record]] = {}
    for record in records:
        parts.setdefault(family_key(record), []).append(record)
    kinds: dict[tuple, list[tuple]] = {}
    for key in parts:
        kinds.setdefault(key[:2], []).append(key)
    named: dict[str, list[Record]] = {}
    for key, found in parts.items():
        kind = [" ".join(word for word in key[:2] if word) or "dictionary"] if len(kinds) > 1 else []
        apart = _apart(key, kinds[key[:2]])
        room = LONGEST - sum(len(word) + 2 for word in apart)
        name = ", ".join([*(_clipped(visible(word), room) for word in kind), *apart])
        named[name if name not in named else f"{name} ({len(named) + 1})"] = found
    return named


def _apart(key: tuple, siblings: Sequence[tuple]) -> list[str]:
    """What sets a family apart from others of its architecture and variant."""
    words = [KNOB_WORDS[key[2]]] if len({sibling[2] for sibling in siblings}) > 1 else []
    for index, word in enumerate(NUMBERS.values(), 3):
        values = list(dict.fromkeys(sibling[index] for sibling in siblings if sibling[index] != ""))
        if len(values) > 1 and key[index] != "":
            words.append(f"{word} {labels(values)[values.index(key[index])]}")
    return words


def _clipped(name: str, room: int) -> str:
    return name if len(name) <= room else name[: room - 1] + "…"


def file_words(names: Iterable[str]) -> dict[str, str]:
    """A word for each name that is fit for the name of a file, and differs from the others."""
    words: dict[str, str] = {}
    for name in names:
        word = re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("_") or "family"
        words[name] = word if word not in words.values() else f"{word}_{len(words)}"
    return words


def site_label(record: Mapping[str, Any]) -> str:
    """Where a member reads and what it predicts: the site, or `input -> target` for a transcoder.

    Members of different labels solve different problems: no picture and no table row may mix them.
    """
    target = record.get("target")
    return f"{record.get('site')} -> {target}" if target else str(record.get("site"))


def by_site(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Members by site label, in the order of first appearance."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(site_label(record), []).append(record)
    return found
