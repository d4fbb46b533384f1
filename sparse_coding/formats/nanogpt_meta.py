"""nanoGPT's meta.pkl: the vocabulary of a character-level data set, read by an unpickler that can make nothing else.

A file holds `{"vocab_size": int, "stoi": {str: int}, "itos": {int: str}}` and perhaps more plain values. Its opcodes
are looked through before any is carried out: only those are accepted that make dicts, lists, tuples, texts and numbers.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_coding.errors import UserError

META = "meta.pkl"
LARGEST = 1 << 26  # bytes; 65,536 tokens with their texts take about two million
PLAIN = {"PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "DUP"}
PLAIN |= {"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
PLAIN |= {"FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
PLAIN |= {"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST", "APPEND", "APPENDS"}
PLAIN |= {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
PLAIN |= {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"}
NUMBERED = ("PUT", "LONG_BINPUT")  # the unpickler makes room for as many objects as the number says


@dataclass(frozen=True)
class Meta:
    """What nanoGPT knows of a data set's vocabulary."""

    vocab_size: int
    tokens: list[str] | None  # the text of each id, in order; None where the file does not say


class _PlainOnly(pickle.Unpickler):
    """Makes no object of any class, should an opcode ask for one all the same."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside itself")


def read_meta(path: Path) -> Meta:
    """Read a meta.pkl; raises `UserError` for a file that holds code, or anything but such a vocabulary."""
    what = f"vocabulary file {str(path)!r}"
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{what} is larger than {LARGEST:,} bytes: no meta.pkl of nanoGPT is")
        content = path.read_bytes()
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name not in PLAIN or (opcode.name in NUMBERED and int(argument or 0) > len(content)):
                raise pickle.UnpicklingError(f"it holds {opcode.name} {'' if argument is None else argument}")
        data = _PlainOnly(io.BytesIO(content)).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{what} is not read: {reason}; a meta.pkl holds plain numbers and strings only") from None
    size = data.get("vocab_size") if isinstance(data, dict) else None
    if type(size) is not int or not 0 < size < 1 << 32:
        raise UserError(f"{what} names no vocab_size: it is no meta.pkl of nanoGPT")
    itos = data.get("itos")
    if itos is None:
        return Meta(size, None)
    if not isinstance(itos, dict) or len(itos) != size or itos.keys() != set(range(size)):
        raise UserError(f"{what}: itos does not give a text for each id from 0 to {size - 1}")
    tokens = [itos[index] for index in range(size)]
    if not all(isinstance(token, str) for token in tokens):
        raise UserError(f"{what}: itos holds something that is no text")
    return Meta(size, tokens)
