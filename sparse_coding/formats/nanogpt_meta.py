"""nanoGPT's meta.pkl: the vocabulary of a character-level data set, read by an unpickler that can make nothing else.

A file holds `{"vocab_size": int, "stoi": {str: int}, "itos": {int: str}}` and perhaps more plain values. Only what
pickle builds without calling anything (dict, list, tuple, str, int, float, bool, None) is accepted.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError

META = "meta.pkl"
LARGEST = 1 << 26  # bytes; 65,536 tokens with their texts take about two million


@dataclass(frozen=True)
class Meta:
    """What nanoGPT knows of a data set's vocabulary."""

    vocab_size: int
    tokens: list[str] | None  # the text of each id, in order; None where the file does not say


class _PlainOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def read_meta(path: Path) -> Meta:
    """Read a meta.pkl; raises `UserError` for a file that holds code, or anything but such a vocabulary."""
    what = f"vocabulary file {str(path)!r}"
    if path.stat().st_size > LARGEST:
        raise UserError(f"{what} has {path.stat().st_size:,} bytes: no meta.pkl of nanoGPT is larger than {LARGEST:,}")
    try:
        with path.open("rb") as file:
            data = _PlainOnly(file).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{what} is not read: {reason}; a meta.pkl holds plain numbers and strings only") from None
    size = data.get("vocab_size") if isinstance(data, dict) else None
    if type(size) is not int or not 0 < size < 1 << 32:
        raise UserError(f"{what} names no vocab_size: it is no meta.pkl of nanoGPT")
    itos = data.get("itos")
    if itos is None:
        return Meta(size, None)
    if not isinstance(itos, dict) or sorted(itos, key=str) != sorted(range(size), key=str):
        raise UserError(f"{what}: itos does not give a text for each id from 0 to {size - 1}")
    tokens = [itos[index] for index in range(size)]
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{what}: itos holds something that is no text")
    return Meta(size, tokens)
