"""Activations written once: a manifest and safetensors shards in a folder or on S3, read by byte ranges.

`StoreWriter` writes one, `Store.open` reads one; docs/stores.md is the format.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
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
from sparse_coding.stores.objects import ObjectDamaged, ObjectMissing, Objects, open_objects
from sparse_coding.stores.shard_file import Damaged, ShardFile, read_header
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


CHECKED_BYTES = 8 << 20
"""Read at once where a whole file is checked."""
MEND = "copy the file again from where it is whole, or delete the store and harvest it again"


class Store:
    """A store opened for reading; safe to use from several threads at once.

    A file's size and header are checked once, when it is first read, and the sums of rows whenever rows are read; files
    of format 1 have none. The checksum of a whole file is verified by `read_shard` and `check`.
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
        self._files: dict[str, ShardFile] = {}
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

        Raises `Damaged` for a file that is missing, truncated or has another header than it must, or other rows.
        """
        self._check_bounds(shard, start, count)
        self.file(site, shard)  # before the allocation
        rows = torch.empty(count, self.widths[site], dtype=self.dtype)
        self.read_rows_into(site, shard, start, rows)
        return rows

    def read_rows_into(self, site: str, shard: int, start: int, out: Tensor) -> None:
        """As `read_rows`, into `out`: contiguous, `[count d]` of `self.dtype`, on the CPU."""
        assert out.is_contiguous()
        assert (out.dtype, out.shape[1]) == (self.dtype, self.widths[site])
        self._check_bounds(shard, start, len(out))
        file, row_bytes = self.file(site, shard), out.shape[1] * out.element_size()
        rows = out.view(torch.uint8).numpy()
        first, stop = start, start + len(out)
        if file.sums is not None and len(out):
            first, stop = file.sums.around(start, stop, self.manifest.shards[shard].rows)
            rows = np.empty((stop - first, row_bytes), np.uint8)
        self._read(file.name, file.starts["rows"] + first * row_bytes, rows)
        if file.sums is not None and len(out):
            self.check_rows(file, rows, first)
            out.view(torch.uint8).numpy()[:] = rows[start - first : start - first + len(out)]

    def check_rows(self, file: ShardFile, rows: UInt8[np.ndarray, "n bytes"], start: int) -> None:
        """Raises `Damaged` unless `rows`, whole groups from row `start` on, have the sums that were written."""
        if file.sums is None:
            return
        if (wrong := file.sums.wrong(rows, start)) is None:
            first = start // file.sums.group_rows
            file.seen[first : first - -len(rows) // file.sums.group_rows] = True
            return
        raise Damaged(
            f"{self.url}/{file.name} is damaged: rows {wrong[0]} to {wrong[1] - 1} are not what was written (their "
            f"checksum is another); {MEND}",
            file.name,
        )

    def read_shard(self, site: str, shard: int) -> Tensor:
        """All rows of a shard as stored, `[n d]`, their checksum verified. Raises `Damaged`."""
        data = self.read_file(site, shard)
        start = self.file(site, shard).starts["rows"]
        stored = torch.frombuffer(data, dtype=torch.uint8)[start:]
        if start % self.dtype.itemsize:  # files that others wrote need not be aligned
            stored = stored.clone()
        return stored.view(self.dtype).view(self.shard_rows[shard], self.widths[site])

    def read_file(self, site: str | None, shard: int) -> memoryview:
        """The bytes of a shard's file of a site, or with None of its tokens; size, header and checksum verified."""
        name = self.file(site, shard).name
        try:
            data = self.objects.get(name)
        except ObjectDamaged as error:
            raise Damaged(str(error), name) from None
        if hashlib.sha256(data).hexdigest() != self.manifest.shards[shard].files[name].sha256:
            raise self._wrong_checksum(name)
        return data

    def read_tokens(self, shard: int, start: int, count: int) -> dict[str, Int[np.ndarray, " count"]]:
        """Token ids, contexts and positions of rows [start, start + count) of a shard, as far as they are kept."""
        if not self.manifest.tokens:
            raise UserError(f"the store {self.url} keeps no tokens: harvest it again with them")
        self._check_bounds(shard, start, count)
        file = self.file(None, shard)
        columns = {}
        for column, dtype in self.manifest.tokens.items():
            values = np.empty(count, dtype=TOKEN_NUMPY[dtype])
            self._read(file.name, file.starts[column] + start * values.itemsize, values.view(np.uint8))
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
        self.file(part, shard)
        try:
            digest = self.objects.sha256(name)
        except ObjectDamaged as error:
            raise Damaged(str(error), name) from None
        if digest != self.manifest.shards[shard].files[name].sha256:
            raise self._wrong_checksum(name)

    def check_shard(self, site: str, shard: int) -> None:
        """As `check`, by the sums of the rows where there are any, which is much faster than SHA-256."""
        file, rows = self.file(site, shard), self.manifest.shards[shard].rows
        if file.sums is None:
            self.check(file.name, shard)
            return
        row_bytes = self.widths[site] * self.dtype.itemsize
        step = max(1, CHECKED_BYTES // (row_bytes * file.sums.group_rows)) * file.sums.group_rows
        for start in range(0, rows, step):
            piece = np.empty((min(step, rows - start), row_bytes), np.uint8)
            self._read(file.name, file.starts["rows"] + start * row_bytes, piece)
            self.check_rows(file, piece, start)

    def summed(self, sites: Iterable[str]) -> bool:
        """Whether every file of these sites has sums of its rows, so that no row can come that was not written."""
        manifest = self.manifest
        files = [shard.files[manifest.file_name(site, i)] for site in sites for i, shard in enumerate(manifest.shards)]
        return all(file.header is not None for file in files)

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

    def file(self, part: str | None, shard: int) -> ShardFile:
        """A file of a site, or with None of the tokens; its size and header are checked once. Raises `Damaged`."""
        name = self.manifest.file_name(part, shard)
        if name not in self._files:
            rows, info = self.manifest.shards[shard].rows, self.manifest.shards[shard].files[name]
            try:
                size = self.objects.size(name)
                if size != info.bytes:
                    word = "truncated" if size < info.bytes else "damaged"
                    raise Damaged(
                        f"{self.url}/{name} is {word}: it has {size} bytes, the manifest says {info.bytes}", name
                    )
                expected = self.manifest.expected(part, rows)
                self._files[name] = read_header(
                    self.objects, name, size, expected, info.header, 0 if part is None else rows
                )
            except ObjectDamaged as error:
                raise Damaged(str(error), name) from None
        return self._files[name]

    def _read(self, name: str, start: int, out: np.ndarray) -> None:
        if not out.size:
            return
        try:
            self.objects.read_into(name, start, out.reshape(-1).view(np.uint8).data)
        except ObjectDamaged as error:
            raise Damaged(str(error), name) from None

    def _wrong_checksum(self, name: str) -> Damaged:
        return Damaged(
            f"{self.url}/{name} is damaged: its checksum is not the manifest's; {MEND}",
            name,
        )
