"""Writing a store while the rows come: bounded memory, bounded uploads in flight, resumable at the shard.

Rows fill one buffer per site, which is the shard's file itself; outbox.py sends the full ones. A writer that dies at
any instant leaves a store that says how many rows it holds, and the next one goes on after them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.stores.begin import asked_manifest, begun, rows_per_shard
from sparse_coding.stores.codec import Affine8, Codec, calibrate, checked_codec, encode
from sparse_coding.stores.manifest import TOKEN_NUMPY, Manifest, Source
from sparse_coding.stores.objects import Objects, open_objects
from sparse_coding.stores.outbox import Outbox
from sparse_coding.stores.running import Running
from sparse_coding.stores.shard_file import LARGEST_HEADER, data_start, tensor_bytes
from sparse_coding.stores.sums import DIGITS, group_rows

CALIBRATION_ROWS = 16_384
"""Of the first shard, held in float32 until int8's mean and scale are chosen from them."""


class StoreWriter:
    """Appends rows of several sites to a store. Use it in a `with`: an exception keeps the shards that are durable.

    Memory: one buffer of a shard per site, and at most `uploads` more that are being sent.
    """

    def __init__(
        self,
        url: str | Path | Objects,
        widths: Mapping[str, int],
        source: Source,
        *,
        codec: Codec = "bf16",
        shard_rows: int | None = None,
        modules: Mapping[str, str] | None = None,
        tokens: Mapping[str, str] | None = None,
        affine: Mapping[str, Affine8] | None = None,
        uploads: int = 4,
        versions: Mapping[str, Any] | None = None,
        run: str | None = None,
    ):
        """Begin a store, or go on with one that the same settings began: `rows` says how many it has already.

        A shard of it with a file that is missing or of another size or header is given up, and those after it.

        widths: by site. shard_rows: by default files of about 64 MiB. modules: by site, for people to read. tokens:
        columns kept beside the rows and their dtypes, as {"token": "I32", "context": "I64", "position": "I32"}. affine:
        by site, int8's mean and scale, by default chosen from the first rows. uploads: files in flight at most.
        Raises `UserError` for a store that is complete or has other settings, and for a folder that holds other files.
        """
        self.objects = open_objects(url) if isinstance(url, str | Path) else url
        codec = checked_codec(codec)
        if shard_rows is None:
            shard_rows = rows_per_shard(widths, codec)
        for name, value in (("shard_rows", shard_rows), ("uploads", uploads)):
            if value < 1:
                raise UserError(f"{name} is {value}: it must be at least 1")
        self._group_rows = group_rows(max(widths.values(), default=1))
        if shard_rows > (most := self._group_rows * LARGEST_HEADER // (2 * DIGITS)):
            raise UserError(f"shard_rows is {shard_rows}: it must be at most {most}")
        asked = asked_manifest(widths, source, codec, shard_rows, modules, tokens, affine, versions, run)
        from sparse_coding.stores.intact import intact  # it reads stores, and store.py offers this class

        there = intact(self.objects, begun(self.objects, asked))
        self._outbox = Outbox(self.objects, there, uploads, self._group_rows)
        self._data_start = data_start(-(-shard_rows // self._group_rows))
        self._buffers: dict[str, np.ndarray] = {}
        self._token_columns: dict[str, np.ndarray] = {}
        self._filled, self._current = 0, self._fresh()
        self._held: dict[str, list[Tensor]] = {name: [] for name in widths}
        self._held_tokens: list[Mapping[str, np.ndarray]] = []
        self._affines: dict[tuple[str, torch.device], Affine8] = {}
        self.appended = self.rows
        """Rows given so far, with those of the store that was gone on with."""

    @property
    def manifest(self) -> Manifest:
        """Of what is durable."""
        return self._outbox.manifest

    @property
    def rows(self) -> int:
        """Rows that are durable: where a resumed harvest goes on."""
        return self.manifest.rows

    def append(self, rows: Mapping[str, Float[Tensor, "n d"]], tokens: Mapping[str, ArrayLike] | None = None) -> None:
        """Add n rows of every site, and their columns of tokens `[n]` if the store keeps them.

        Rows may be on any device. Waits where `uploads` files are in flight. Raises `UserError` for NaN or infinity,
        and what sending a shard before these raised.
        """
        self._outbox.settle()
        n_rows = len(next(iter(rows.values())))
        columns = self._columns(tokens, n_rows)
        assert set(rows) == set(self.manifest.sites)
        for name, x in rows.items():
            assert x.shape == (n_rows, self.manifest.sites[name].width), (name, x.shape)
        start = 0
        while start < n_rows:
            stop = min(n_rows, start + self.manifest.shard_rows - self._filled)
            piece = {name: x[start:stop].detach() for name, x in rows.items()}
            self._count(piece)
            self._take(piece, {name: column[start:stop] for name, column in columns.items()})
            start = stop

    def finish(self) -> Manifest:
        """Send the last rows, wait until all is durable, and say that the store is complete."""
        self._choose_affine()
        if self._filled:
            self._send()
        self._outbox.finish()
        return self.manifest

    def close(self) -> None:
        """Wait for what is being sent and write the manifest; rows that fill no shard are dropped, `rows` says so."""
        self._outbox.close()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise  # else the first error is the one to tell

    # ---- rows into buffers

    def _count(self, piece: Mapping[str, Tensor]) -> None:
        for name, x in piece.items():
            bad = self._current[name].add(x)
            if bad is not None:
                raise UserError(
                    f"the activations at {name} hold NaN or infinity, first in row {self.appended + bad}: the model "
                    "overflows in its dtype (load it in float32) or its weights are damaged"
                )
        self.appended += len(next(iter(piece.values())))

    def _take(self, piece: Mapping[str, Tensor], columns: Mapping[str, np.ndarray]) -> None:
        n_rows = len(next(iter(piece.values())))
        if self._needs_affine():
            for name, x in piece.items():
                self._held[name].append(x.float().cpu().clone())
            self._held_tokens.append({name: column.copy() for name, column in columns.items()})
            self._filled += n_rows
            if self._filled >= min(CALIBRATION_ROWS, self.manifest.shard_rows):
                self._choose_affine()
        else:
            self._put_rows(piece, columns, n_rows)
        if self._filled == self.manifest.shard_rows:
            self._send()

    def _needs_affine(self) -> bool:
        return self.manifest.codec == "int8" and any(site.mean is None for site in self.manifest.sites.values())

    def _choose_affine(self) -> None:
        """Choose int8's mean and scale from the rows held, and encode those."""
        if not self._needs_affine() or not self._filled:
            return
        sites = {}
        for name, site in self.manifest.sites.items():
            chosen = calibrate(torch.cat(self._held[name])[:CALIBRATION_ROWS])
            sites[name] = replace(site, mean=tuple(chosen.centre.tolist()), scale=tuple(chosen.scale.tolist()))
        self._outbox.manifest = replace(self.manifest, sites=sites)
        self._filled = 0
        for i, columns in enumerate(self._held_tokens):
            piece = {name: parts[i] for name, parts in self._held.items()}
            self._put_rows(piece, columns, len(next(iter(piece.values()))))
        self._held, self._held_tokens = {name: [] for name in sites}, []

    def _put_rows(self, piece: Mapping[str, Tensor], columns: Mapping[str, np.ndarray], n_rows: int) -> None:
        for name, x in piece.items():
            stored = encode(x, self.manifest.codec, self._affine(name, x.device)).contiguous().cpu()
            buffer = self._buffer(name)
            width = stored.shape[1] * stored.element_size()
            start = self._data_start + self._filled * width
            buffer[start : start + n_rows * width] = stored.view(torch.uint8).numpy().reshape(-1)
        for name, column in columns.items():
            if name not in self._token_columns:
                self._token_columns[name] = np.empty(self.manifest.shard_rows, dtype=column.dtype)
            self._token_columns[name][self._filled : self._filled + n_rows] = column
        self._filled += n_rows

    def _affine(self, name: str, device: torch.device) -> Affine8 | None:
        site, key = self.manifest.sites[name], (name, device)
        if site.mean is None or site.scale is None:
            return None
        if key not in self._affines:
            self._affines[key] = Affine8(torch.tensor(site.mean), torch.tensor(site.scale)).to(device)
        return self._affines[key]

    def _buffer(self, site: str) -> np.ndarray:
        """The file of a full shard, its rows to be filled in."""
        if site not in self._buffers:
            rows = tensor_bytes(*self.manifest.expected(site, self.manifest.shard_rows)["rows"])
            self._buffers[site] = np.empty(self._data_start + rows, dtype=np.uint8)
        return self._buffers[site]

    def _columns(self, tokens: Mapping[str, ArrayLike] | None, n_rows: int) -> dict[str, np.ndarray]:
        assert set(tokens or {}) == set(self.manifest.tokens), "the columns are those the store began with"
        columns = {}
        for name, dtype in self.manifest.tokens.items():
            given = np.asarray((tokens or {})[name])
            column = np.ascontiguousarray(given, dtype=TOKEN_NUMPY[dtype])
            assert column.shape == (n_rows,)
            assert (column == given).all(), f"{name} does not fit {dtype}"
            columns[name] = column
        return columns

    def _send(self) -> None:
        """Hand the filled buffers on; waits where too many files are in flight."""
        columns, rows = self._token_columns, self._filled
        parts: dict[str | None, np.ndarray] = {}
        for site in self.manifest.sites:
            n_bytes = tensor_bytes(*self.manifest.expected(site, rows)["rows"])
            parts[site] = self._buffers.pop(site)[: self._data_start + n_bytes]
        if self.manifest.tokens:
            head = np.zeros(data_start(0), np.uint8)
            parts[None] = np.concatenate(
                [head, *(columns[name][:rows].view(np.uint8) for name in self.manifest.tokens)]
            )
        statistics, self._filled, self._current = self._current, 0, self._fresh()
        self._outbox.send(rows, parts, statistics)

    def _fresh(self) -> dict[str, Running]:
        return {name: Running.of(0, None, site.width) for name, site in self.manifest.sites.items()}
