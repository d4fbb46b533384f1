"""`python -m sparse_coding store info|verify|copy|merge`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Annotated

from tyro.conf import Positional, arg

from sparse_coding.config import parse
from sparse_coding.errors import UserError, near
from sparse_coding.progress import Progress
from sparse_coding.stores.codec import Codec
from sparse_coding.stores.copying import copied, merged
from sparse_coding.stores.manifest import LEASE, MANIFEST
from sparse_coding.stores.store import Damaged, Store

THREADS = 4
"""Files read at once."""


@dataclass(frozen=True)
class InfoFlags:
    """Say what a store holds."""

    store: Positional[str]
    """A folder or s3://bucket/prefix."""


@dataclass(frozen=True)
class VerifyFlags:
    """Read a store whole and check every file's size, header and checksum; exits 2 if one is damaged."""

    store: Positional[str]
    """A folder or s3://bucket/prefix."""


@dataclass(frozen=True)
class CopyFlags:
    """Copy a store between folders and S3, checking every file on the way; a copy that was stopped goes on."""

    source: Positional[str]
    """A folder or s3://bucket/prefix."""
    target: Positional[str]
    """A new folder or s3://bucket/prefix."""
    codec: Codec | None = None
    """Write the rows anew in this codec; by default the files are copied as they are."""


@dataclass(frozen=True)
class MergeFlags:
    """Make one store of several of the same model, sites, widths and codec; their rows follow each other."""

    stores: Positional[tuple[str, ...]]
    """Folders or s3://bucket/prefix, two or more."""
    to: Annotated[str, arg(name="to")]
    """A new folder or s3://bucket/prefix."""


def info(arguments: Sequence[str]) -> None:
    """say what a store holds"""
    flags = parse(InfoFlags, arguments, "python -m sparse_coding store info", InfoFlags.__doc__ or "")
    print(description(Store.open(flags.store, unfinished=True)))


def description(store: Store) -> str:
    """A store in a short table."""
    manifest = store.manifest
    size = sum(file.bytes for shard in manifest.shards for file in shard.files.values())
    source = manifest.source
    facts = {
        "store": store.url,
        "rows": f"{store.rows:,} in {len(store.shard_rows)} shards" + ("" if manifest.complete else ", not finished"),
        "codec": manifest.codec,
        "size": f"{size / 1e9:.3g} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB",
        "model": source.model + (f" ({source.revision})" if source.revision else ""),
        "text": _short(source.text),
        "tokenizer": _short(source.tokenizer),
        "context": f"{source.context or '?'} tokens" + (", special tokens left out" if source.exclude_special else ""),
        "kept beside": ", ".join(f"{name} ({dtype.lower()})" for name, dtype in manifest.tokens.items()) or "nothing",
        "run": manifest.run or "",
    }
    lines = [f"{name:<12} {value}" for name, value in facts.items() if value]
    width = max(map(len, [*store.widths, "site"]))
    lines += ["", f"{'site':<{width}} {'width':>7} {'rms':>10}  module"]
    for name, site in manifest.sites.items():
        rms = ""
        if name in manifest.statistics:
            one = manifest.statistics[name]
            total = sum(mean * mean + variance for mean, variance in zip(one.mean, one.variance, strict=True))
            rms = f"{(total / site.width) ** 0.5:.4g}"
        lines.append(f"{name:<{width}} {site.width:>7} {rms:>10}  {site.module}".rstrip())
    return "\n".join(lines)


def verify(arguments: Sequence[str]) -> None:
    """check every file of a store"""
    flags = parse(VerifyFlags, arguments, "python -m sparse_coding store verify", VerifyFlags.__doc__ or "")
    store = Store.open(flags.store, unfinished=True)
    damaged = damages(store)
    for one in damaged:
        print(one)
    n_files = sum(len(shard.files) for shard in store.manifest.shards)
    if damaged:
        raise UserError(
            f"{len(damaged)} of {n_files} files of {store.url} are damaged, as listed: copy them again from where they "
            "are whole, delete the store and harvest it again, or train with --skip-damaged"
        )
    if not store.manifest.complete:
        print("note: the store is not finished; the command that writes it goes on with it")
    if stray := list(islice(_strays(store), 4)):
        print(f"note: files that are no part of it: {', '.join(stray[:3])}{' and more' if len(stray) > 3 else ''}")
    print(f"{store.url}: {n_files} files, {store.rows:,} rows, all as they were written")


def damages(store: Store) -> list[Damaged]:
    """Every damaged file of a store, in its order. Raises `UserError` where the store cannot be read at all."""
    files = [(name, shard) for shard, one in enumerate(store.manifest.shards) for name in one.files]

    def check(file: tuple[str, int]) -> Damaged | None:
        try:
            store.check(*file)
        except Damaged as damaged:
            return damaged
        return None

    found = []
    with ThreadPoolExecutor(THREADS) as threads, Progress("verifying", len(files), "files") as progress:
        for done, damaged in enumerate(threads.map(check, files), start=1):
            found += [damaged] if damaged else []
            progress.update(done)
    return found


def _strays(store: Store) -> Iterator[str]:
    known = {MANIFEST, LEASE, *(name for shard in store.manifest.shards for name in shard.files)}
    return (name for name in store.objects.names() if name not in known)


def copy(arguments: Sequence[str]) -> None:
    """copy a store between folders and S3, or to another codec"""
    flags = parse(CopyFlags, arguments, "python -m sparse_coding store copy", CopyFlags.__doc__ or "")
    manifest = copied(Store.open(flags.source), flags.target, flags.codec)
    print(f"{flags.target}: {manifest.rows:,} rows as {manifest.codec}")


def merge(arguments: Sequence[str]) -> None:
    """make one store of several"""
    flags = parse(MergeFlags, arguments, "python -m sparse_coding store merge", MergeFlags.__doc__ or "")
    if len(flags.stores) < 2:
        raise UserError("merge needs two or more stores: give them, and --to NEW")
    manifest = merged([Store.open(one) for one in flags.stores], flags.to)
    print(f"{flags.to}: {manifest.rows:,} rows of {len(flags.stores)} stores")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"info": info, "verify": verify, "copy": copy, "merge": merge}


def main(arguments: Sequence[str]) -> None:
    """One of the verbs. Raises `UserError`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m sparse_coding store VERB ... (each verb explains itself with --help)\n")
        for name, verb in VERBS.items():
            print(f"  {name:<8} {verb.__doc__}")
        return
    if arguments[0] not in VERBS:
        hint = near(arguments[0], VERBS, cutoff=0.6)  # the verbs are short: half their letters is too little
        raise UserError(f"unknown verb {arguments[0]!r} of store: have {', '.join(VERBS)}{hint}")
    VERBS[arguments[0]](arguments[1:])


def _short(value: object) -> str:
    text = "" if value is None else str(value)
    return text if len(text) <= 100 else text[:97] + "..."
