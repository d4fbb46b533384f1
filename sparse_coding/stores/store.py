"""Activations written once: a manifest and safetensors shards in a folder or on S3, read by byte ranges.

`StoreWriter` writes one, `Store.open` reads one; docs/stores.md is the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.errors import UserError, near
from sparse_coding.stores.codec import DTYPES, Affine8, Codec, decode
from sparse_coding.stores.manifest import (
    MANIFEST,
    TOKEN_NUMPY,
    FileInfo,
    Manifest,
    ShardInfo,
    SiteInfo,
    Source,
    Statistics,
    found_manifest,
    read_manifest,
)
from sparse_coding.stores.objects import ObjectMissing, Objects, ObjectTruncated, open_objects
from sparse_coding.stores.shard_file import Damaged, data_starts
from sparse_coding.stores.writer import StoreWriter

__all__ = [
    "MANIFEST",
    "Damaged",
    "FileInfo",
    "Manifest",
    "ShardInfo",
    "SiteInfo",
    "Source",
    "Statistics",
    "Store",
    "StoreWriter",
    "found_manifest",
    "read_manifest",
]


class Store:
    """A store opened for reading; safe to use from several threads at once.

    A file's size and header are checked once, when it is first read; its checksum only by `read_shard` and `check`.
    """

    def __init__(self, objects: Objects, manifest: Manifest):
        self.objects, self.manifest, self.url = objects, manifest, objects.url
        self.widths: Mapping[str, int] = {name: site.width for name, site in manifest.sites.items()}
        """Width of the rows by site."""
        self.codec: Codec = manifest.codec
        self.dtype: torch.dtype = DTYPES[manifest.codec]
        """Of the rows as they are stored."""
        self.shard_rows: list[int] = [shard.rows for shard in manifest.shards]
        """Rows of each shard."""
        self.rows: int = manifest.rows
        self._starts: dict[str, dict[str, int]] = {}
        self._affine: dict[tuple[str, torch.device], Affine8] = {}

    @classmethod
    def open(cls, url: str | Path | Objects, *, unfinished: bool = False) -> Store:
        """Open the store in a folder or at s3://bucket/prefix; reads its manifest alone.

        unfinished: take a store that is still written, as far as it goes. Raises `UserError` where there is no store,
        it is damaged, empty, or not finished.
        """
        objects = open_objects(url) if isinstance(url, str | Path) else url
        try:
            manifest = read_manifest(objects)
        except ObjectMissing:
            raise UserError(
                f"{objects.url} is no store: it has no {MANIFEST}; make one with `python -m sparse_coding harvest`"
            ) from None
        if not manifest.complete and not unfinished:
            raise UserError(
                f"the store {objects.url} is not finished ({manifest.rows:,} rows so far): start the command that "
                "writes it again, it goes on from there"
            )
        if not manifest.rows and not unfinished:
            raise UserError(f"the store {objects.url} has no rows")
        return cls(objects, manifest)

    def read_rows(self, site: str, shard: int, start: int, count: int) -> Tensor:
        """Rows [start, start + count) of a shard as stored, `[count d]` of `self.dtype` on the CPU; one range read.

        Raises `Damaged` for a file that is missing, truncated or has another header than it must.
        """
        self._check_bounds(shard, start, count)
        self._checked(site, shard)  # before the allocation
        rows = torch.empty(count, self.widths[site], dtype=self.dtype)
        self.read_rows_into(site, shard, start, rows)
        return rows

    def read_rows_into(self, site: str, shard: int, start: int, out: Tensor) -> None:
        """As `read_rows`, into `out`: contiguous, `[count d]` of `self.dtype`, on the CPU."""
        assert out.is_contiguous()
        assert (out.dtype, out.shape[1]) == (self.dtype, self.widths[site])
        self._check_bounds(shard, start, len(out))
        name = self._checked(site, shard)
        self._read(name, "rows", start * out.shape[1] * out.element_size(), out)

    def read_shard(self, site: str, shard: int) -> Tensor:
        """All rows of a shard as stored, `[n d]`, their checksum verified. Raises `Damaged`."""
        data = self.read_file(site, shard)
        start = self._starts[self.manifest.file_name(site, shard)]["rows"]
        stored = torch.frombuffer(data, dtype=torch.uint8)[start:]
        if start % self.dtype.itemsize:  # files that others wrote need not be aligned
            stored = stored.clone()
        return stored.view(self.dtype).view(self.shard_rows[shard], self.widths[site])

    def read_file(self, site: str | None, shard: int) -> memoryview:
        """The bytes of a shard's file of a site, or with None of its tokens; size, header and checksum verified."""
        name = self._checked(site, shard)
        try:
            data = self.objects.get(name)
        except (ObjectMissing, ObjectTruncated) as error:
            raise Damaged(str(error), name) from None
        if hashlib.sha256(data).hexdigest() != self.manifest.shards[shard].files[name].sha256:
            raise self._wrong_checksum(name)
        return data

    def read_tokens(self, shard: int, start: int, count: int) -> dict[str, Int[np.ndarray, " count"]]:
        """Token ids, contexts and positions of rows [start, start + count) of a shard, as far as they are kept."""
        if not self.manifest.tokens:
            raise UserError(f"the store {self.url} keeps no tokens: harvest it again with them")
        self._check_bounds(shard, start, count)
        name = self._checked(None, shard)
        columns = {}
        for column, dtype in self.manifest.tokens.items():
            values = np.empty(count, dtype=TOKEN_NUMPY[dtype])
            self._read(name, column, start * values.itemsize, torch.from_numpy(values.view(np.uint8)))
            columns[column] = values
        return columns

    def decode(self, site: str, stored: Tensor, dtype: torch.dtype = torch.float32) -> Float[Tensor, "n d"]:
        """Stored rows as numbers, on the device they are on."""
        return decode(stored, self.affine(site, stored.device), dtype)

    def affine(self, site: str, device: torch.device | str = "cpu") -> Affine8 | None:
        """Mean and scale that int8 is decoded with, float32; None for other codecs."""
        info, key = self.manifest.sites[site], (site, torch.device(device))
        if info.mean is None or info.scale is None:
            return None
        if key not in self._affine:
            self._affine[key] = Affine8(torch.tensor(info.mean), torch.tensor(info.scale)).to(device)
        return self._affine[key]

    def check(self, name: str, shard: int) -> None:
        """Read a file of a shard whole, in bounded memory, and verify size, header and checksum. Raises `Damaged`."""
        part = {self.manifest.file_name(part, shard): part for part in self.manifest.parts()}[name]
        self._checked(part, shard)
        try:
            digest = self.objects.sha256(name)
        except (ObjectMissing, ObjectTruncated) as error:
            raise Damaged(str(error), name) from None
        if digest != self.manifest.shards[shard].files[name].sha256:
            raise self._wrong_checksum(name)

    def need_sites(self, sites: list[str] | tuple[str, ...]) -> None:
        """Raises `UserError` for a site that the store does not have."""
        for site in sites:
            if site not in self.widths:
                raise UserError(
                    f"the store {self.url} has no site {site!r}: it has {', '.join(self.widths)}"
                    f"{near(site, self.widths)}"
                )

    def _check_bounds(self, shard: int, start: int, count: int) -> None:
        assert 0 <= start <= start + count <= self.shard_rows[shard], (shard, start, count)

    def _checked(self, part: str | None, shard: int) -> str:
        """The name of a file, after its size and header were checked once."""
        name = self.manifest.file_name(part, shard)
        if name not in self._starts:
            info = self.manifest.shards[shard]
            try:
                size = self.objects.size(name)
                if size != info.files[name].bytes:
                    word = "truncated" if size < info.files[name].bytes else "damaged"
                    raise Damaged(
                        f"{self.url}/{name} is {word}: it has {size} bytes, the manifest says {info.files[name].bytes}",
                        name,
                    )
                expected = self.manifest.expected(part, info.rows)
                self._starts[name] = data_starts(self.objects, name, size, expected)
            except (ObjectMissing, ObjectTruncated) as error:
                raise Damaged(str(error), name) from None
        return name

    def _read(self, name: str, tensor: str, offset: int, out: Tensor) -> None:
        if not out.numel():
            return
        view = out.view(-1).view(torch.uint8).numpy().data
        try:
            self.objects.read_into(name, self._starts[name][tensor] + offset, view)
        except (ObjectMissing, ObjectTruncated) as error:
            raise Damaged(str(error), name) from None

    def _wrong_checksum(self, name: str) -> Damaged:
        return Damaged(
            f"{self.url}/{name} is damaged: its checksum is not the manifest's; copy the file again from where it is "
            "whole, or harvest again",
            name,
        )
