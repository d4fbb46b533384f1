"""Copying and merging stores: files as they are, their checksums verified on the way, or rows in another codec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

from sparse_coding.errors import UserError
from sparse_coding.progress import Progress
from sparse_coding.stores.begin import begun
from sparse_coding.stores.codec import Codec
from sparse_coding.stores.manifest import MANIFEST, Manifest, ShardInfo, Source
from sparse_coding.stores.objects import Objects, open_objects
from sparse_coding.stores.own import own, remove_half_written
from sparse_coding.stores.running import Running
from sparse_coding.stores.store import Store
from sparse_coding.stores.writer import StoreWriter

FILES_AT_ONCE = 4
"""Files in memory while they are copied."""
PIECE_ROWS = 8192
"""Rows decoded at once."""


def copied(store: Store, target: str, codec: Codec | None = None) -> Manifest:
    """Copy a complete store to a new folder or prefix, or go on with a copy; with another codec rows are written anew.

    Raises `UserError`: `Damaged` for a source file that is not what it was, and what `StoreWriter` raises of a target.
    """
    objects = open_objects(target)
    if codec is None or codec == store.codec:
        files = [(store, shard) for shard in range(len(store.shard_rows))]
        return _copy_files(files, store.manifest, objects)
    manifest = store.manifest
    with (
        own(objects),
        StoreWriter(
            objects,
            store.widths,
            manifest.source,
            codec=codec,
            shard_rows=manifest.shard_rows,
            modules={name: site.module for name, site in manifest.sites.items()},
            tokens=manifest.tokens,
            versions=manifest.versions,
            run=manifest.run,
        ) as writer,
    ):
        remove_half_written(objects)
        skip = writer.rows
        with Progress("copying", store.rows, "rows", start=skip) as progress:
            for shard, rows in enumerate(store.shard_rows):
                if skip < rows:
                    _append_shard(store, shard, skip, writer)
                skip = max(0, skip - rows)
                progress.update(writer.appended)
        return writer.finish()


def _append_shard(store: Store, shard: int, first: int, writer: StoreWriter) -> None:
    rows = store.shard_rows[shard]
    stored = {site: store.read_shard(site, shard) for site in store.widths}
    tokens: Mapping[str, Any] = store.read_tokens(shard, 0, rows) if store.manifest.tokens else {}
    for start in range(first, rows, PIECE_ROWS):
        chosen = slice(start, start + PIECE_ROWS)
        piece = {site: store.decode(site, x[chosen]) for site, x in stored.items()}
        writer.append(piece, {name: column[chosen] for name, column in tokens.items()})


def merged(stores: Sequence[Store], target: str) -> Manifest:
    """One store of the shards of several, in their order, in a new folder or prefix; or go on with it.

    Raises `UserError` for stores of other models, sites, widths, codecs or columns of tokens.
    """
    first = stores[0].manifest
    for store in stores[1:]:
        _check_alike(stores[0], store)
    texts: list[Any] = []
    for store in stores:
        if store.manifest.source.text not in texts:
            texts.append(store.manifest.source.text)
    source = first.source if len(texts) == 1 else replace(first.source, text={"merged": texts})
    statistics = {}
    for name, width in stores[0].widths.items():
        total = Running.of(0, None, width)
        for store in stores:
            total.merge(Running.of(store.rows, store.manifest.statistics[name], width))
        statistics[name] = total.said()
    files = [(store, shard) for store in stores for shard in range(len(store.shard_rows))]
    plan = replace(
        first,
        source=source,
        shard_rows=max(store.manifest.shard_rows for store in stores),
        shards=tuple(_renamed(store, shard, index) for index, (store, shard) in enumerate(files)),
        statistics=statistics,
        run=None,
    )
    return _copy_files(files, plan, open_objects(target))


def _renamed(store: Store, shard: int, index: int) -> ShardInfo:
    """A shard of a store as number `index` of another."""
    manifest, info = store.manifest, store.manifest.shards[shard]
    files = {manifest.file_name(part, index): info.files[manifest.file_name(part, shard)] for part in manifest.parts()}
    return ShardInfo(info.rows, files)


def _copy_files(files: Sequence[tuple[Store, int]], plan: Manifest, target: Objects) -> Manifest:
    """Copy shard i of `plan` from shard `files[i]`; the manifest follows the shards, and is `plan` at the end."""
    with own(target):
        return _copy_files_alone(files, plan, target)


def _copy_files_alone(files: Sequence[tuple[Store, int]], plan: Manifest, target: Objects) -> Manifest:
    found = begun(target, replace(plan, shards=(), statistics={}, complete=False))
    remove_half_written(target)
    done = len(found.shards)
    if found.shards != plan.shards[:done]:
        raise UserError(f"{target.url} holds the beginning of another store: name a new folder or prefix")

    def copy_one(source: Store, shard: int, index: int, part: str | None) -> None:
        target.put(plan.file_name(part, index), source.read_file(part, shard))

    parts = plan.parts()
    at_once = max(1, FILES_AT_ONCE // len(parts))
    with ThreadPoolExecutor(FILES_AT_ONCE) as threads, Progress("copying", len(files), "shards", done) as progress:
        for begin in range(done, len(files), at_once):
            end = min(begin + at_once, len(files))
            jobs = [
                threads.submit(copy_one, *files[index], index, part) for index in range(begin, end) for part in parts
            ]
            for job in jobs:
                job.result()
            now = replace(plan, shards=plan.shards[:end], complete=end == len(files))
            target.put(MANIFEST, now.to_json().encode())
            progress.update(end)
    return replace(plan, complete=True)


def _check_alike(first: Store, other: Store) -> None:
    one, two = first.manifest, other.manifest
    pairs: dict[str, tuple[Any, Any]] = {name: (getattr(one, name), getattr(two, name)) for name in ("codec", "tokens")}
    pairs["sites"] = list(first.widths.items()), list(other.widths.items())
    here, there = asdict(one.source), asdict(two.source)
    pairs |= {name: (here[name], there[name]) for name in Source.__dataclass_fields__ if name != "text"}
    for name, (value, another) in pairs.items():
        if value != another:
            raise UserError(
                f"stores to be merged must have the same {name}: {first.url} has {value}, {other.url} has {another}"
            )
    if [(site.mean, site.scale) for site in one.sites.values()] != [
        (site.mean, site.scale) for site in two.sites.values()
    ]:
        raise UserError(
            f"the int8 stores {first.url} and {other.url} have means and scales of their own: copy each with "
            "`store copy --codec bf16` and merge those, or train from both without merging"
        )
