"""Streams put side by side, for dictionaries that read several activations of one token (crosscoders).

`PairedStream`: the same sites or others in several models that read the same text. `JoinedStream`: sites of a stream as
one wide row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError, near


class PairedStream:
    """The activations of several models on the same tokens: row i of every batch is the same token in each of them.

    Sites are named `PREFIX/SITE`, the prefix being the name the caller gives the model. Each model's rows lie on its
    own device.
    """

    def __init__(self, streams: Mapping[str, ActivationStream]) -> None:
        """Raises UserError unless all read the same tokens in the same order, with one vocabulary."""
        if len(streams) < 2:
            raise UserError(f"{len(streams)} models are given: a pair of streams needs at least two")
        self.streams = dict(streams)
        (first_name, first), *others = self.streams.items()
        for name, stream in others:
            _check_same_order(first_name, first, name, stream)
        self.batch_size, self.rows_per_epoch = first.batch_size, first.rows_per_epoch

    @property
    def widths(self) -> Mapping[str, int]:
        """Width of the activations by `PREFIX/SITE`."""
        return {
            f"{name}/{site}": width for name, stream in self.streams.items() for site, width in stream.widths.items()
        }

    @property
    def seconds_capturing(self) -> float:
        """Time spent in all language models so far."""
        return sum(stream.seconds_capturing for stream in self.streams.values())

    @property
    def rows_captured(self) -> int:
        """Rows that every model has given so far."""
        return min(stream.rows_captured for stream in self.streams.values())

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of every site of every model."""
        return {f"{name}/{site}": x for name, stream in self.streams.items() for site, x in stream.batch(step).items()}


class Rows(Protocol):
    """What is asked of a stream that is joined."""

    batch_size: int

    @property
    def widths(self) -> Mapping[str, int]: ...

    def batch(self, step: int) -> dict[str, Tensor]: ...


class JoinedStream:
    """A stream with one more key, `name`: the rows of some of its sites side by side, in the order given."""

    def __init__(self, stream: Rows, name: str, sites: Sequence[str]) -> None:
        """Raises UserError for no site, an unknown one, one given twice, and a name the stream has."""
        known = stream.widths
        if not sites:
            raise UserError(f"no site is given to join: the stream has {', '.join(known)}")
        for site in sites:
            if site not in known:
                raise UserError(f"site {site!r} is not in the stream: it has {', '.join(known)}{near(site, known)}")
        if len(set(sites)) < len(sites):
            raise UserError(f"sites {', '.join(sites)} are to be joined: give each site once")
        if name in known:
            raise UserError(
                f"the joined sites are to be called {name!r}, as a site of the stream is: give another name"
            )
        self.stream, self.name, self.sites, self.batch_size = stream, name, tuple(sites), stream.batch_size

    @property
    def widths(self) -> Mapping[str, int]:
        """Width by site; that of `name` is the sum over its sites."""
        known = self.stream.widths
        return {**known, self.name: sum(known[site] for site in self.sites)}

    def batch(self, step: int) -> dict[str, Float[Tensor, "B d_in"]]:
        """Batch number `step` of each site and of `name`, which lies where the first of its sites does."""
        found = self.stream.batch(step)
        device = found[self.sites[0]].device
        return {**found, self.name: torch.cat([found[site].to(device) for site in self.sites], dim=1)}


def _check_same_order(first_name: str, first: ActivationStream, name: str, other: ActivationStream) -> None:
    """Everything that the order of rows is a function of."""
    what = f"models {first_name!r} and {name!r}"
    a, b = first.contexts, other.contexts
    tokenizers = [one.identity.get("tokenizer") for one in (a, b)]
    if tokenizers[0] != tokenizers[1]:
        raise UserError(
            f"{what} have different tokenizers, so their tokens do not correspond: choose models that share one"
        )
    # The embedding may be padded (Pythia's is, by size), which is no harm where each model's own tokenizer is known.
    tokenized_apart = a is not b and tokenizers[0] is not None
    if first.model.vocab_size != other.model.vocab_size and not tokenized_apart:
        raise UserError(
            f"{what} know {first.model.vocab_size} and {other.model.vocab_size} tokens: choose models that share a "
            "tokenizer, and tokenize the text for each with its own"
        )
    if not _same_text(a, b):
        raise UserError(f"{what} read different contexts: give both the same text, context and number of tokens")
    for setting in ("batch_size", "seed"):
        values = getattr(first, setting), getattr(other, setting)
        if values[0] != values[1]:
            raise UserError(f"{setting} is {values[0]} for {first_name!r} and {values[1]} for {name!r}: give one value")
    if first._n_blocks != other._n_blocks:
        raise UserError(f"buffer_rows differs between {what}, and so does the order of their rows: give one value")


def _same_text(a: Contexts, b: Contexts) -> bool:
    if a is b:
        return True
    if a.n_padding != b.n_padding or (a.mask is None) != (b.mask is None):
        return False
    return np.array_equal(a.tokens, b.tokens) and (a.mask is None or np.array_equal(a.mask, b.mask))  # type: ignore[arg-type]
