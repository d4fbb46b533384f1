"""Strict settings: frozen dataclasses <-> JSON and the command line; an unknown key is an error naming near ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import re
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from sparse_coding.errors import UserError, near

T = TypeVar("T")


def to_dict(settings: Any) -> Any:
    """A dataclass (nested, with tuples) as what JSON can hold."""
    if dataclasses.is_dataclass(settings) and not isinstance(settings, type):
        return {field.name: to_dict(getattr(settings, field.name)) for field in dataclasses.fields(settings)}
    if isinstance(settings, Mapping):
        return {str(key): to_dict(value) for key, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [to_dict(value) for value in settings]
    return settings


def from_dict(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """The dataclass `cls` from a mapping; unknown, missing and mistyped keys are errors that name the key."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(f"unknown setting {where + key!r}: have {', '.join(fields)}{near(key, fields)}")
    values = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _value(hints[name], data[name], where + name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise UserError(f"setting {where + name!r} is missing")
    return cls(**values)


def _value(hint: Any, value: Any, name: str) -> Any:
    """`value` as the annotated type, or an error that says what is allowed."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _value(arguments[0], value, name)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            with contextlib.suppress(UserError):
                return _value(option, value, name)
    elif hint is Any or (hint is type(None) and value is None):
        return value
    elif origin is typing.Literal:
        if value in arguments:
            return value
        allowed = ", ".join(map(str, arguments))
        raise UserError(f"{name} is {value!r}: allowed are {allowed}{near(str(value), map(str, arguments))}")
    elif dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_dict(hint, value, name + ".")  # type: ignore[arg-type]
    elif origin in (tuple, list) and isinstance(value, list | tuple):
        inner = arguments[0] if arguments else Any
        return origin(_value(inner, one, f"{name}[{i}]") for i, one in enumerate(value))
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        return dict(value)
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise UserError(f"{name} is {value!r}: it must be {_in_words(hint)}")


def _in_words(hint: Any) -> str:
    """A type as a user says it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_in_words(option) for option in typing.get_args(hint))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(hint, getattr(hint, "__name__", str(hint)))


def value_from_text(hint: Any, text: str, name: str) -> Any:
    """A setting's value written by hand: numbers, true, false and none as such, parts of a tuple between slashes."""
    if any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint))):
        return _value(hint, [_plain(part) for part in text.split("/")], name)
    return _value(hint, text if typing.get_origin(hint) is typing.Literal else _plain(text), name)


def _plain(text: str) -> Any:
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def parse(cls: type[T], arguments: Sequence[str], prog: str, description: str) -> T:
    """The settings from command line flags; a mistake is one `UserError` line instead of a page of usage."""
    import tyro

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                cls,
                args=list(arguments),
                prog=prog,
                description=description,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as stop:
        if stop.code == 2:
            raise UserError(_one_line(captured.getvalue()) + f" (see {prog} --help)") from None
        sys.stderr.write(captured.getvalue())
        raise


def _one_line(boxed: str) -> str:
    """The message inside tyro's box: no frame, no title, no usage."""
    inside = [line for line in boxed.splitlines() if not line.startswith(("╭", "╰"))]
    lines = [re.sub(r"[│─┃|]", " ", line).strip() for line in inside]
    kept = [line for line in lines if line and "--help" not in line and not line.startswith("For full helptext")]
    return " ".join(" ".join(kept).split())


def count(text: str, name: str) -> int:
    """A number of things written by hand: 250000, 250k, 2M, 1.5B."""
    match = re.fullmatch(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kKmMbB]?)\s*", text)
    if not match:
        raise UserError(f"{name} is {text!r}: it must be a count such as 250000, 250k, 2M or 1.5B")
    return round(float(match[1].replace("_", "")) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2].lower()])


def numbers(words: Sequence[str], name: str) -> tuple[float, ...]:
    """Numbers from the command line, each given as it is or as `logspace:FIRST:LAST:HOW_MANY` (powers of ten)."""
    values: list[float] = []
    for word in words:
        try:
            if word.startswith("logspace:"):
                first, last, how_many = word.removeprefix("logspace:").split(":")
                steps = int(how_many)
                span = (float(last) - float(first)) / max(steps - 1, 1)
                values += [10 ** (float(first) + i * span) for i in range(steps)]
            else:
                values.append(float(word))
        except ValueError:
            raise UserError(
                f"{name} is {word!r}: give numbers (0.1 0.3 1) or logspace:FIRST:LAST:HOW_MANY "
                "(logspace:-2:0:9 is nine values from 0.01 to 1)"
            ) from None
    if not values or not all(math.isfinite(value) for value in values):
        raise UserError(f"{name} holds no usable number: give some such as 0.1 0.3 1")
    return tuple(values)
