"""Before a store is gone on with, or said to be complete: are the files it counts there, of their size and header?

Rows are not read for that: `store verify` does. One that is damaged is written again, with all that comes after it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from sparse_coding.errors import UserError
from sparse_coding.stores.manifest import MANIFEST, Manifest, Statistics
from sparse_coding.stores.objects import Objects
from sparse_coding.stores.running import Running
from sparse_coding.stores.store import Damaged, Store

AT_ONCE = 16
"""Files asked for at once: on S3 each answer takes its time."""


def damages(store: Store) -> list[tuple[int, Damaged]]:
    """Every file that is missing or of another size or header, with its shard, in their order."""
    parts = [(part, shard) for shard in range(len(store.shard_rows)) for part in store.manifest.parts()]

    def look(one: tuple[str | None, int]) -> Damaged | None:
        try:
            store.file(*one)
        except Damaged as damaged:
            return damaged
        return None

    with ThreadPoolExecutor(AT_ONCE) as threads:
        found = list(threads.map(look, parts))
    return [(shard, damaged) for (_, shard), damaged in zip(parts, found, strict=True) if damaged]


def refuse_damaged(objects: Objects, manifest: Manifest) -> None:
    """Raises `UserError` for a complete store that lacks files."""
    if found := damages(Store(objects, manifest)):
        raise UserError(
            f"{objects.url} is complete but damaged: {found[0][1]}"
            + (f", and {len(found) - 1} more (`store verify` names them)" if len(found) > 1 else "")
            + "; copy what is damaged again from where it is whole, or delete the store and harvest it again"
        )


def intact(objects: Objects, manifest: Manifest) -> Manifest:
    """An unfinished store up to its first damaged file, which is said; `manifest` itself where there is none.

    Of the shards that are kept the statistics are those of the rows as they are stored: what the others added to them
    is not known any more.
    """
    store = Store(objects, manifest)
    if not (found := damages(store)):
        return manifest
    kept, statistics = _kept(store, found[0][0])
    manifest = replace(manifest, shards=manifest.shards[:kept], statistics=statistics)
    print(f"{found[0][1]}: going on from row {manifest.rows:,}", file=sys.stderr, flush=True)
    objects.put(MANIFEST, manifest.to_json().encode())
    return manifest


def _kept(store: Store, most: int) -> tuple[int, Mapping[str, Statistics]]:
    """How many of the first `most` shards hold what was written, and the statistics of their rows."""
    sums = {site: Running.of(0, None, width) for site, width in store.widths.items()}
    for shard in range(most):
        try:
            rows = {site: store.decode(site, store.read_shard(site, shard)) for site in sums}
        except Damaged:
            most = shard
            break
        for site, x in rows.items():
            sums[site].add(x)
    return most, {site: one.said() for site, one in sums.items()} if most else {}
