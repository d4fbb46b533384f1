"""Several processes writing one store: each its own shards, in their final places, under a manifest of its own.

Until the store is whole its root has no manifest; `join_parts` makes it from those of the parts, and no row is copied.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sparse_coding.errors import UserError
from sparse_coding.stores.intact import damages
from sparse_coding.stores.manifest import (
    MANIFEST,
    Manifest,
    ShardInfo,
    read_manifest,
)
from sparse_coding.stores.objects import Buffer, Objects
from sparse_coding.stores.running import Running
from sparse_coding.stores.store import Store


class PartObjects(Objects):
    """The objects of a store as process `rank` of `size` writes them: its shard 0 is shard `first_shard` there."""

    def __init__(self, objects: Objects, rank: int, size: int, first_shard: int = 0):
        self.objects, self.folder, self.first_shard = objects, f"part-{rank}-of-{size}", first_shard
        self.url = f"{objects.url}/{self.folder}"

    def put(self, name: str, data: Buffer | Path) -> None:
        self.objects.put(self._there(name), data)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        self.objects.read_into(self._there(name), start, out)

    def size(self, name: str) -> int:
        return self.objects.size(self._there(name))

    def names(self, under: str = "") -> Iterator[str]:
        """Its manifest alone: the shards of a part that has none are written again."""
        if not under and self.objects.exists(self._there(MANIFEST)):
            yield MANIFEST

    def delete(self, name: str) -> None:
        self.objects.delete(self._there(name))

    def _there(self, name: str) -> str:
        return f"{self.folder}/{MANIFEST}" if name == MANIFEST else moved(name, self.first_shard)


def moved(name: str, by: int) -> str:
    """The name of the same file `by` shards later."""
    folder, _, file = name.rpartition("/")
    number, dot, rest = file.partition(".")
    return f"{folder}/{int(number) + by:05d}{dot}{rest}"


@dataclass(frozen=True)
class Parts:
    """What several processes have begun of a store."""

    size: int
    """Processes that share it."""
    manifests: dict[str, Manifest]
    """By name, in the order of the ranks; of those that have begun."""


def begun_parts(objects: Objects) -> Parts | None:
    """The parts of a store, None where it has none."""
    pattern = re.compile(rf"part-(\d+)-of-(\d+)/{re.escape(MANIFEST)}")
    found = sorted(
        (int(match[1]), int(match[2]), match[0]) for match in map(pattern.fullmatch, objects.names()) if match
    )
    if not found:
        return None
    manifests = {name: read_manifest(PartObjects(objects, rank, size)) for rank, size, name in found}
    return Parts(found[0][1], manifests)


def join_parts(objects: Objects, size: int) -> Manifest:
    """Write the manifest of a store from those of its `size` parts, which are complete, and take theirs away.

    Raises `UserError` where int8 means other numbers in one part than in another, and where files are damaged: their
    part is unfinished from then on, so that it can be gone on with.
    """
    parts = [read_manifest(PartObjects(objects, rank, size)) for rank in range(size)]
    assert all(part.complete for part in parts)
    for rank, part in enumerate(parts):
        if part.sites != parts[0].sites:
            raise UserError(
                f"the parts of {objects.url} do not fit each other: process {rank} has other sites than process 0, or "
                "another mean and scale of int8; delete the store and harvest it again, with --codec bf16 if it "
                "happens again"
            )
    _check_intact(objects, parts)
    shards: list[ShardInfo] = []
    sums = {name: Running.of(0, None, site.width) for name, site in parts[0].sites.items()}
    for part in parts:
        before = len(shards)
        for shard in part.shards:
            shards.append(replace(shard, files={moved(name, before): file for name, file in shard.files.items()}))
        for name, running in sums.items():
            running.merge(Running.of(part.rows, part.statistics[name], parts[0].sites[name].width))
    statistics = {name: one.said() for name, one in sums.items()}
    whole = replace(parts[0], shards=tuple(shards), statistics=statistics)
    objects.put(MANIFEST, whole.to_json().encode())
    drop_parts(objects)
    return whole


def _check_intact(objects: Objects, parts: Sequence[Manifest]) -> None:
    first, found = 0, []
    for rank, part in enumerate(parts):
        there = PartObjects(objects, rank, len(parts), first)
        if damaged := damages(Store(there, part)):
            there.put(MANIFEST, replace(part, complete=False).to_json().encode())
            found += damaged
        first += len(part.shards)
    if found:
        raise UserError(f"{found[0][1]}: start the same command again, it harvests again from there")


def drop_parts(objects: Objects) -> None:
    """Take the manifests of parts away, once the store has its own."""
    parts = begun_parts(objects)
    for name in parts.manifests if parts else ():
        objects.delete(name)
