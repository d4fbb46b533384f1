"""Top contexts of latents as a page shows them: every token a span, coloured by its activation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparse_coding.errors import UserError
from sparse_coding.report.page import visible
from sparse_coding.report.records import number, read_json, short

WHITESPACE = {"\n": "↵", "\t": "⇥", "\r": "␍"}


class Span(NamedTuple):
    """A piece of a context: its text, its strength in [0, 1], and the activation as the reader sees it on hover."""

    text: str
    strength: float
    title: str


@dataclass(frozen=True)
class LatentCard:
    """One latent as it is shown."""

    index: str
    density: str
    maximum: str
    contexts: Sequence[Sequence[Span]]


def read_latents(folder: Path) -> list[tuple[str, list[LatentCard]]]:
    """Member and cards from latents.json: one object or a list of them; empty where there is no such file.

    Raises UserError for a file of another shape.
    """
    path = folder / "latents.json"
    if not path.exists():
        return []
    data = read_json(path)
    try:
        return [(str(part["member"]), [_card(latent) for latent in part["latents"]]) for part in
                (data if isinstance(data, list) else [data])]  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path} is not a list of latents with contexts ({type(error).__name__}: {error}): write it again"
        ) from None


def _card(latent: Mapping[str, Any]) -> LatentCard:
    largest = number(latent.get("max_activation"))
    contexts = [spans(context["tokens"], context["activations"], largest) for context in latent["contexts"]]
    density = number(latent.get("density"))
    percent = f"{short(100 * density)}%" if math.isfinite(density) else "–"
    return LatentCard(str(int(latent["index"])), percent, short(largest), contexts)


def spans(tokens: Sequence[str], activations: Sequence[float], largest: float) -> list[Span]:
    """The tokens of one context; strength is the activation over the latent's largest. Silent neighbours are joined.

    Raises ValueError where tokens and activations differ in number.
    """
    joined: list[Span] = []
    for token, activation in zip(tokens, activations, strict=True):
        text, value = token_text(str(token)), number(activation)
        if not value > 0:
            if joined and joined[-1].strength == 0:
                joined[-1] = Span(joined[-1].text + text, 0.0, "")
            else:
                joined.append(Span(text, 0.0, ""))
            continue
        strength = min(value / largest, 1.0) if largest > 0 else 1.0
        joined.append(Span(text, round(max(strength, 0.02), 3), short(value, 4)))
    return joined


def token_text(token: str) -> str:
    """A token with its invisible characters shown: ↵ ⇥ for line ends and tabs, · for tokens of nothing but spaces."""
    shown = "".join(WHITESPACE.get(character, character) for character in token)
    if shown and not shown.strip(" "):
        return "·" * len(shown)
    return visible(shown)
