"""Beginning a store, or finding one that the same settings began."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from sparse_coding.errors import UserError
from sparse_coding.stores.codec import ITEMSIZE, Affine8, Codec
from sparse_coding.stores.manifest import (
    LEASE,
    MANIFEST,
    TOKEN_DTYPES,
    Manifest,
    SiteInfo,
    Source,
    found_manifest,
)
from sparse_coding.stores.objects import Objects
from sparse_coding.stores.own import HALF_WRITTEN
from sparse_coding.stores.sums import chunk_rows


def rows_per_shard(widths: Mapping[str, int], codec: Codec, megabytes: float = 64.0) -> int:
    """Rows whose widest site fills a file of about `megabytes` (2^20 bytes); whole chunks of the order, if any fits."""
    widest = max(widths.values())
    rows, chunk = max(1, int(megabytes * 2**20) // (widest * ITEMSIZE[codec])), chunk_rows(widest)
    return rows // chunk * chunk or rows


def asked_manifest(
    widths: Mapping[str, int],
    source: Source,
    codec: Codec,
    shard_rows: int,
    modules: Mapping[str, str] | None,
    tokens: Mapping[str, str] | None,
    affine: Mapping[str, Affine8] | None,
    versions: Mapping[str, Any] | None,
    run: str | None,
) -> Manifest:
    """The manifest of a store without rows; the arguments are those of `StoreWriter`. Raises `UserError`."""
    for column, dtype in (tokens or {}).items():
        if dtype not in TOKEN_DTYPES.get(column, ()):
            raise UserError(f"tokens has {column} as {dtype}: allowed are {TOKEN_DTYPES}")
    if not widths:
        raise UserError("a store needs at least one site")
    sites = {}
    for i, (name, width) in enumerate(widths.items()):
        given = (affine or {}).get(name) if codec == "int8" else None
        mean, scale = (None, None) if given is None else (tuple(one.tolist()) for one in given)
        sites[name] = SiteInfo(f"site-{i}", width, (modules or {}).get(name, ""), mean, scale)
    source = Source(**json.loads(json.dumps(asdict(source))))  # as it comes back from the manifest
    return Manifest(source, codec, sites, shard_rows, tokens=dict(tokens or {}), versions=dict(versions or {}), run=run)


def begun(objects: Objects, asked: Manifest) -> Manifest:
    """The manifest to go on with: the one there, if it is of these settings, or the new one, written at once.

    Raises `UserError` for a store that is complete or of other settings, and where other files lie.
    """
    found, url = found_manifest(objects), objects.url
    if found is None:
        check_free(objects)
        objects.put(MANIFEST, asked.to_json().encode())
        return asked
    if differing := differences(found, asked):
        raise UserError(f"{url} holds a store of other settings: {differing}; name a new folder or prefix")
    if found.complete:
        raise UserError(f"{url} holds a complete store of {found.rows:,} rows: name a new folder or prefix")
    return replace(found, versions=asked.versions, run=asked.run)


def check_free(objects: Objects) -> None:
    """Raise `UserError` where files lie that no writer of a store left behind."""
    for name in objects.names():
        if name != LEASE and not HALF_WRITTEN.fullmatch(name):
            raise UserError(f"{objects.url} holds other files ({name}) and no store: name a new folder or prefix")


def differences(found: Manifest, asked: Manifest) -> str:
    """What a store there and one asked for differ in, in words; empty if one can go on with the other."""
    pairs: dict[str, tuple[Any, Any]] = {
        name: (getattr(found, name), getattr(asked, name)) for name in ("codec", "shard_rows", "tokens")
    }
    widths = [[(name, site.width) for name, site in one.sites.items()] for one in (found, asked)]
    pairs["sites"] = (widths[0], widths[1])
    pairs |= {name: (there, asdict(asked.source)[name]) for name, there in asdict(found.source).items()}
    said = [
        f"{name} is {_short(there)} there and {_short(here)} here"
        for name, (there, here) in pairs.items()
        if there != here
    ]
    if not said:
        for name, site in asked.sites.items():
            if site.mean is not None and (site.mean, site.scale) != (found.sites[name].mean, found.sites[name].scale):
                said.append(f"the mean and scale of int8 at {name} are others")
    return "; ".join(said)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
