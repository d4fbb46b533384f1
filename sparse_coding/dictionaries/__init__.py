"""Dictionaries: one file per architecture. `ARCHITECTURES` is the one list of their names."""

from __future__ import annotations

from sparse_coding.dictionaries.base import Dictionary, DictionarySettings, Losses, TrainableDictionary
from sparse_coding.dictionaries.relu import ReLU, ReLUSettings, convert_l1
from sparse_coding.errors import UserError, near

ARCHITECTURES: dict[str, type[TrainableDictionary]] = {"relu": ReLU}


def architecture(name: str) -> type[TrainableDictionary]:
    """The class of an architecture by its name."""
    if name not in ARCHITECTURES:
        raise UserError(f"unknown architecture {name!r}: have {', '.join(ARCHITECTURES)}{near(name, ARCHITECTURES)}")
    return ARCHITECTURES[name]


__all__ = [
    "ARCHITECTURES",
    "Dictionary",
    "DictionarySettings",
    "Losses",
    "ReLU",
    "ReLUSettings",
    "TrainableDictionary",
    "architecture",
    "convert_l1",
]
