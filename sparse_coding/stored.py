"""The first stage of run.py where activations come from stores: the rows, and what dictionaries are measured on.

Dictionaries are measured on the held-out text of the harvest, read by its model. Where either cannot be had (a machine
without network), the last rows of the stores are kept out of training instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparse_coding.captured import Captured, FromStores, Place, prepared, target_sites
from sparse_coding.device import pick_device
from sparse_coding.errors import UserError, near
from sparse_coding.progress import quantity
from sparse_coding.run_flags import DEFAULT_MODEL, StoreFlags
from sparse_coding.run_settings import RunSettings
from sparse_coding.stored_text import as_harvested, reading
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.parts import begun_parts
from sparse_coding.stores.store import MANIFEST, Damaged, Store
from sparse_coding.stores.stream import StoreStream, damage
from sparse_coding.training.run_folder import RunFolder

APART = 0.05
"""Share of the rows of each store, its last ones, kept out of training where there is no held-out text."""
HELD_OUT_TEXT, ROWS_APART = "held-out text", "rows of the stores"


def from_stores(settings: RunSettings, folder: RunFolder) -> tuple[RunSettings, Captured]:
    """The settings with what the stores decide filled in, and the stream; nothing is trained yet.

    `folder`: of the run, whose earlier start decides what its dictionaries are measured on. Raises `UserError` for
    stores that do not fit each other, the settings or an earlier start.
    """
    device = pick_device(settings.model.device)
    stores = open_stores(settings.stores)
    names = list(settings.model.sites) or list(stores[0].widths)
    targets = target_sites(settings, names)
    sites = list(dict.fromkeys([*names, *targets.values()]))
    check_sites(stores, sites)
    earlier = earlier_start(folder)
    check_unchanged(stores, earlier)
    facts: dict[str, Any] = {
        "of": [described(store) for store in stores],
        "weights": settings.stores.activation_weights,
    }
    named = settings.model.model != DEFAULT_MODEL or settings.text.text is not None
    settings = as_harvested(settings, stores, names)
    read, reason = None, "the run was begun that way"
    if earlier.get("measured_on") != ROWS_APART:
        try:
            read = reading(settings, stores[0], sites)
        except UserError as error:
            if named or earlier:  # what was asked for, or had before, must be had
                raise
            reason = str(error)
    apart = None if read else kept_apart(settings, stores, sites, device)
    stream = StoreStream(
        stores,
        sites,
        batch_size=settings.training.batch_size,
        buffer_rows=settings.training.buffer_rows,
        seed=settings.training.data_seed,
        weights=settings.stores.activation_weights or None,
        device=device,
        skip_damaged=settings.stores.skip_damaged,
    )
    if settings.training.tokens == "auto":
        one_pass = replace(settings.training, tokens=str(stream.rows_per_epoch))
        settings = replace(settings, training=one_pass)
    facts |= {"measured_on": HELD_OUT_TEXT if read else ROWS_APART, "rows_apart": apart.rows if apart else 0}
    facts["skipped"] = [*(apart.skipped if apart else []), *stream.skipped]
    left_out = [*(apart.left_out if apart else []), *stream.left_out]
    check_left_out(stores, folder, earlier.get("left_out", []), left_out)
    facts["left_out"] = left_out
    known = FromStores(lines(stores, facts, "" if read else reason), facts, apart)
    normalised, trained, parts = prepared(settings, stream, sites)
    source = stores[0].manifest.source
    captured = Captured(
        device,
        read.model if read else None,
        read.tokenizer if read else None,
        {site: Place(read.model, site) for site in sites} if read else {},
        source.text if isinstance(source.text, dict) else {},
        sum(sum(store.shard_rows) for store in stores) + (apart.rows if apart else 0),
        source.context or 0,
        read.held_out if read else None,
        stream,
        normalised,
        trained,
        targets,
        parts,
        known,
    )
    return settings, captured


# ---- the stores


def open_stores(flags: StoreFlags) -> list[Store]:
    """Every store; all must be of one model."""
    stores = []
    for url in flags.activations:
        objects = open_objects(url)
        if not objects.exists(MANIFEST) and (parts := begun_parts(objects)):
            raise UserError(
                f"the store {url} is not complete: {parts.size} processes harvest it; wait, or start them again"
            )
        store = Store.open(objects, unfinished=True)
        if not store.manifest.complete and not flags.allow_incomplete:
            raise UserError(
                f"the store {url} is not complete ({store.rows:,} rows so far): start its harvest again, which goes "
                "on, or train from what is there with --allow-incomplete"
            )
        if not store.rows:
            raise UserError(f"the store {url} has no rows yet: wait for its harvest")
        stores.append(store)
    first = stores[0].manifest.source
    for store in stores[1:]:
        other = store.manifest.source
        for what, a, b in (("model", first.model, other.model), ("revision", first.revision, other.revision)):
            if a != b and (what == "revision" or None in (first.revision, other.revision)):
                raise UserError(
                    f"the stores {stores[0].url} and {store.url} are of different models ({first.model}, "
                    f"{first.revision}; {other.model}, {other.revision}): train from those of one model"
                )
    return stores


def check_sites(stores: Sequence[Store], sites: Sequence[str]) -> None:
    """Raise UserError for a site that a store lacks, or has in another width."""
    for store in stores:
        for site in sites:
            known = list(store.widths)
            if site not in known:
                raise UserError(
                    f"site {site!r} is not in the store {store.url}: it has {', '.join(known)}{near(site, known)}"
                )
            if store.widths[site] != stores[0].widths[site]:
                raise UserError(
                    f"{site} is {stores[0].widths[site]} wide in {stores[0].url} and {store.widths[site]} in "
                    f"{store.url}: train from stores of one width"
                )


def described(store: Store) -> dict[str, Any]:
    """A store as settings.json records it, as far as it is trained from."""
    source, n_shards = store.manifest.source, sum(rows > 0 for rows in store.shard_rows)
    return {
        "store": store.url,
        "rows": sum(store.shard_rows),
        "shards": n_shards,
        "codec": store.codec,
        "model": source.model,
        "revision": source.revision,
        "shards_sha256": shards_sha256(store, n_shards),
    }


def shards_sha256(store: Store, n_shards: int) -> str:
    """A checksum of the first shards of a store."""
    said = [[shard.rows, [file.sha256 for file in shard.files.values()]] for shard in store.manifest.shards[:n_shards]]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def earlier_start(folder: RunFolder) -> Mapping[str, Any]:
    """What an earlier start of this run noted about its stores."""
    known = json.loads((folder.path / "settings.json").read_text(encoding="utf-8"))
    found = known.get("data", {}).get("stores", {})
    return found if isinstance(found, dict) else {}


def check_unchanged(stores: Sequence[Store], earlier: Mapping[str, Any]) -> None:
    """Raise UserError where a store is not what it was when the run began; of one that has grown since, take as much
    as there was."""
    for store, before in zip(stores, earlier.get("of", ()), strict=False):
        n_shards = before["shards"]
        if n_shards > len(store.shard_rows) or shards_sha256(store, n_shards) != before["shards_sha256"]:
            raise UserError(
                f"the store {store.url} has changed since this run began: bring back what it was, or start over with "
                "--fresh"
            )
        store.shard_rows[n_shards:] = [0] * (len(store.shard_rows) - n_shards)


def check_left_out(
    stores: Sequence[Store], folder: RunFolder, before: Sequence[list[int]], now: Sequence[list[int]]
) -> None:
    """Raise UserError where a run with a checkpoint would go on with other rows, since other shards are damaged."""
    changed = [one for one in (*now, *before) if (one in now) != (one in before)]
    if changed and any((folder.path / "checkpoints").glob("step-*")):
        (store, shard), known = changed[0], "was sound" if changed[0] in now else "was left out as damaged"
        state = "is damaged" if changed[0] in now else "is whole"
        raise UserError(
            f"shard {shard} of {stores[store].url} {known} when this run began and {state} now, so it would go on with "
            "other rows: bring back what it was, or start over with --fresh"
        )


def lines(stores: Sequence[Store], facts: Mapping[str, Any], reason: str) -> list[str]:
    """What the run says about its stores."""
    said = []
    for store in stores:
        kind = "" if store.manifest.complete else ", not complete"
        said.append(f"store {store.url}: {quantity(store.rows)} rows as {store.codec}{kind}")
    if facts["skipped"]:
        n_skipped = len(facts["skipped"])
        which = (
            "1 damaged shard is left out:" if n_skipped == 1 else f"{n_skipped} damaged shards are left out, such as:"
        )
        said.append(f"{which} {facts['skipped'][0]}")
    if reason:
        said.append(
            f"no held-out text: dictionaries are measured on the last {facts['rows_apart']:,} rows of the stores, "
            f"which are not trained on, and without loss recovered ({reason})"
        )
    return said


def kept_apart(settings: RunSettings, stores: Sequence[Store], sites: Sequence[str], device: str) -> RowsApart:
    """The last rows of the stores. Raises UserError where those to be measured on are damaged: now, not at the end."""
    apart = RowsApart(stores, sites, device, settings.stores.skip_damaged)
    try:
        apart(settings.eval_rows)
    except Damaged as found:
        raise UserError(f"{found}; or leave its shard out with --skip-damaged") from None
    return apart


class RowsApart:
    """The last rows of every store, taken out of training."""

    def __init__(self, stores: Sequence[Store], sites: Sequence[str], device: str, skip_damaged: bool = False):
        """Shortens the shards of `stores`, as training sees them; raises UserError where too few rows are left.

        skip_damaged: read every shard that rows are taken from, and leave it out altogether where it is damaged.
        """
        self.sites, self.device, self.pieces = list(sites), device, []
        """(store, shard, first row, rows), in the order of the text."""
        self.skipped: list[str] = []
        """What is wrong with each shard left out."""
        self.left_out: list[list[int]] = []
        """Number of the store and of the shard, for each."""
        for number, store in enumerate(stores):
            whole = Store(store.objects, store.manifest)
            left, pieces = max(1, round(APART * sum(store.shard_rows))), []
            for shard in reversed(range(len(store.shard_rows))):
                taken = min(left, store.shard_rows[shard])
                if taken and skip_damaged and (found := damage(whole, sites, shard, verify=True)):
                    self.skipped.append(str(found))
                    self.left_out.append([number, shard])
                    store.shard_rows[shard] = 0
                elif taken:
                    pieces.append((whole, shard, store.shard_rows[shard] - taken, taken))
                    store.shard_rows[shard] -= taken
                    left -= taken
            self.pieces.append(pieces[::-1])
            if not pieces:
                raise UserError(f"all shards of {store.url} are damaged, the last: {self.skipped[0]}")
            if not any(store.shard_rows):
                raise UserError(f"the store {store.url} has {store.rows} rows: too few to keep some for measuring")

    @property
    def rows(self) -> int:
        return sum(taken for pieces in self.pieces for *_, taken in pieces)

    def __call__(self, wanted: int) -> dict[str, Tensor]:
        """Up to `wanted` of them, as many of each store as of another, float32 by site."""
        each = -(-wanted // len(self.pieces))
        found: dict[str, list[Tensor]] = {site: [] for site in self.sites}
        for pieces in self.pieces:
            left = each
            for store, shard, start, rows in pieces:
                count = min(left, rows)
                for site in self.sites:
                    stored = store.read_rows(site, shard, start, count)
                    found[site].append(store.decode(site, stored).to(self.device))
                left -= count
        return {site: torch.cat(parts)[:wanted] for site, parts in found.items()}
