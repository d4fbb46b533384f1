"""`python -m sparse_coding harvest`: a model reads a text once, and its activations are kept in a store.

Forward passes lie on a fixed grid of contexts and shards on a fixed grid of rows, wherever a harvest was stopped and
however many processes share it: the files of a store depend on neither.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparse_coding.activations.capture import default_contexts_per_forward, widths
from sparse_coding.activations.capture import rows as captured_rows
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.passes import Passes
from sparse_coding.activations.sites import Site, resolve_all
from sparse_coding.activations.tokens import Contexts, contexts
from sparse_coding.captured import context_length, open_model, open_tokenizer, revision
from sparse_coding.device import pick_device
from sparse_coding.errors import Interrupted, UserError
from sparse_coding.harvest_flags import HarvestFlags
from sparse_coding.harvest_plan import measured, row_bytes, size
from sparse_coding.language_models.processes import Processes, processes
from sparse_coding.progress import Progress, duration, quantity
from sparse_coding.provenance import provenance
from sparse_coding.stores.begin import check_free
from sparse_coding.stores.codec import Affine8, calibrate
from sparse_coding.stores.intact import refuse_damaged
from sparse_coding.stores.objects import Objects, open_objects
from sparse_coding.stores.own import own, remove_half_written
from sparse_coding.stores.parts import PartObjects, begun_parts, drop_parts, join_parts
from sparse_coding.stores.store import Manifest, Source, StoreWriter, found_manifest
from sparse_coding.stores.writer import CALIBRATION_ROWS, rows_per_shard
from sparse_coding.training.run_folder import differences
from sparse_coding.training.stopping import Stopping, StopRequested

TOKEN_COLUMNS = {"token": "I32", "context": "I64", "position": "I32"}


def harvest(flags: HarvestFlags) -> str:
    """Everything; returns where the store is. The same settings continue a harvest that was stopped.

    Raises `UserError` for settings that make no sense and a store begun with others, `Interrupted` when stopped.
    """
    store = flags.store()
    with (
        processes(torch.device(pick_device(flags.model.device))) as (everyone, device),
        contextlib.ExitStack() as held,
    ):
        flags = replace(flags, model=replace(flags.model, device=str(device)))
        with everyone.first_goes_ahead():
            if everyone.first:
                print(f"store: {store}", flush=True)
                held.enter_context(own(open_objects(store)))
            model, names = open_model(flags.model)
            sites = resolve_all(model, names)
            tokenizer = open_tokenizer(flags.model, model)
            text = contexts(
                flags.text.settings(flags.model.model),
                tokenizer,
                context=context_length(flags.text.context, model),
                max_tokens=flags.tokens,
                exclude_special=flags.text.exclude_special,
                progress=everyone.first,
            )
            harvesting = _Harvest(flags, store, everyone, model, sites, text)
            if everyone.first:
                harvesting.check()
        harvesting.go()
    return store


class _Harvest:
    """One call of `harvest` in one process."""

    def __init__(
        self,
        flags: HarvestFlags,
        store: str,
        everyone: Processes,
        model: LanguageModel,
        sites: Mapping[str, Site],
        text: Contexts,
    ):
        self.flags, self.store, self.everyone, self.model, self.sites = flags, store, everyone, model, sites
        self.objects: Objects = open_objects(store)
        self.widths = widths(model, list(sites.values()))
        self.passes = Passes(text, default_contexts_per_forward(model, text))
        self.shard_rows = flags.keep.shard_rows or rows_per_shard(self.widths, flags.keep.codec)
        n_shards = -(-self.passes.rows // self.shard_rows)
        if not self.passes.rows:
            raise UserError(
                "the text gives no activations: every token is special, and --exclude-special leaves them out"
            )
        if n_shards < everyone.size:
            raise UserError(
                f"{self.passes.rows:,} rows make {n_shards} shards of {self.shard_rows:,}, and there are "
                f"{everyone.size} processes: start fewer, or give a smaller --shard-rows"
            )
        first_shards = [n_shards * rank // everyone.size for rank in range(everyone.size + 1)]
        self.first_shard = first_shards[everyone.rank]
        self.first = self.first_shard * self.shard_rows
        self.last = min(first_shards[everyone.rank + 1] * self.shard_rows, self.passes.rows)
        """Rows [first, last) of the text are this process's."""

    @cached_property
    def source(self) -> Source:
        """What the rows are made from. A store is continued from the same only."""
        model, text = self.flags.model, self.passes.text
        reading = {
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "gelu": model.gelu,
            "contexts_per_forward": self.passes.per_forward,
            "streaming": self.flags.text.streaming,
        }
        return Source(
            model=model.model,
            revision=revision(self.model),
            text={**text.identity, "reading": reading},
            tokenizer={"name": model.tokenizer, "sha256": text.identity["tokenizer"]},
            context=text.tokens.shape[1],
            exclude_special=self.flags.text.exclude_special,
        )

    @property
    def settled(self) -> dict[str, Any]:
        """What a store that is continued must have been begun with."""
        tokens = TOKEN_COLUMNS if self.flags.keep.keep_tokens else {}
        return settled(Manifest(self.source, self.flags.keep.codec, {}, self.shard_rows, tokens=tokens), self.widths)

    def check(self) -> None:
        """Raise UserError for a store of other settings or other processes, and a disk that is too small."""
        found, parts = found_manifest(self.objects), begun_parts(self.objects)
        processes = parts.size if parts and not found else 1
        begun = [found] if found else list(parts.manifests.values()) if parts else []
        if not begun:
            check_free(self.objects)
            remove_half_written(self.objects)
            self._check_space(0)
            return
        there = {name: site.width for name, site in begun[0].sites.items()}
        if changed := differences(settled(begun[0], there), json.loads(json.dumps(self.settled))):
            raise UserError(
                f"{self.store} was begun with other settings ({'; '.join(changed)}): give those again to continue it, "
                "or another --store"
            )
        remove_half_written(self.objects)
        if not (found and found.complete):
            if processes != self.everyone.size:
                again = f"torchrun --nproc_per_node={processes}" if processes > 1 else "one process"
                raise UserError(f"{self.store} was begun by {processes} processes: continue it with {again}")
            self._check_space(sum(one.rows for one in begun))
        else:
            refuse_damaged(self.objects, found)

    def _check_space(self, done: int) -> None:
        if "://" in self.store:
            return
        needed, free = self.bytes_of(self.passes.rows - done), shutil.disk_usage(self.store).free
        if needed > free:
            raise UserError(
                f"the store needs {size(needed)} more and {self.store} has {size(free)} free: give fewer --tokens, "
                "--codec int8, or another --store"
            )

    def bytes_of(self, rows: int) -> int:
        return rows * row_bytes(self.widths, self.flags.keep.codec, self.flags.keep.keep_tokens)

    def go(self) -> None:
        """This process's rows into its part of the store; the first joins the parts."""
        if self._finished():
            return
        alone, rank = self.everyone.size == 1, self.everyone.rank
        objects = self.objects if alone else PartObjects(self.objects, rank, self.everyone.size, self.first_shard)
        if alone or not ((part := found_manifest(objects)) and part.complete):
            self._write(objects)
        self.everyone.wait()
        if self.everyone.first:
            if not alone:
                join_parts(self.objects, self.everyone.size)
            self._finished()
        self.everyone.wait()

    def _finished(self) -> bool:
        """Whether the store is complete, which is said."""
        found = found_manifest(self.objects)
        if not (found and found.complete):
            return False
        if self.everyone.first:
            drop_parts(self.objects)
            written = sum(file.bytes for shard in found.shards for file in shard.files.values())
            print(f"{self.store} is complete: {found.rows:,} rows in {len(found.shards)} shards, {size(written)}")
            print(f"train from it: python run.py --activations {self.store}", flush=True)
        return True

    def _write(self, objects: Objects) -> None:
        flags, stopping = self.flags.keep, Stopping()
        with (
            stopping.listening(),
            StoreWriter(
                objects,
                self.widths,
                self.source,
                codec=flags.codec,
                shard_rows=self.shard_rows,
                modules={name: f"{site.module}:{site.side}" for name, site in self.sites.items()},
                tokens=TOKEN_COLUMNS if flags.keep_tokens else None,
                affine=self._affine(),
                versions=provenance()["versions"],
                run=self.store.rstrip("/").rsplit("/", 1)[-1],
            ) as writer,
        ):
            try:
                self._fill(writer, stopping)
            except StopRequested:
                writer.close()
                raise Interrupted(
                    f"by {stopping.reason} at row {writer.rows:,} of {self.last - self.first:,}: the shards until "
                    "there are kept; the same command continues after them"
                ) from None
            writer.finish()

    def _fill(self, writer: StoreWriter, stopping: Stopping) -> None:
        total, flags = self.last - self.first, self.flags.keep
        left = self.passes.within(self.first + writer.rows, self.last)
        if self.everyone.first:
            self._describe(writer)
        label = "harvesting" if self.everyone.size == 1 else f"harvesting (process 0 of {self.everyone.size})"
        # Others are silent: their shares are as large.
        progress = Progress(label, total, "rows", writer.rows, 10.0 if self.everyone.first else float("inf"))
        with progress if self.everyone.first else contextlib.nullcontext():
            for number, chosen in left:
                with stopping.abandoning():
                    rows = self._rows(number)
                tokens = self.passes.columns(number, chosen) if flags.keep_tokens else None
                writer.append({name: x[chosen] for name, x in rows.items()}, tokens)
                if self.everyone.first:
                    progress.update(writer.appended, f"{size(self.bytes_of(writer.appended))} written")
        with stopping.abandoning():  # a wish from the last rows on
            pass

    def _rows(self, number: int) -> dict[str, Tensor]:
        passes = self.passes
        which = passes.contexts(number)
        return captured_rows(
            self.model, passes.text, which, list(self.sites.values()), contexts_per_forward=passes.per_forward
        )

    def _describe(self, writer: StoreWriter) -> None:
        """Say what will be done and about how long it takes."""
        done, total = writer.rows, self.last - self.first
        rows, shards = self.passes.rows, -(-self.passes.rows // self.shard_rows)
        text, keep = self.passes.text, self.flags.keep
        shown = ", ".join(f"{name} (width {width})" for name, width in self.widths.items())
        print(f"model {self.flags.model.model} on {self.model.runs_on}: {shown}")
        print(f"text {text.identity['text']['source']}: {quantity(text.n_tokens)} tokens, held-out documents left out")
        if keep.tokens is not None and text.n_tokens < (self.flags.tokens or 0):
            print(f"note: --tokens is {keep.tokens}, the text has no more")
        if done:
            print(f"continuing after {done:,} rows")
        if done == total:
            return
        number, _ = next(self.passes.within(self.first + done, self.last))
        next_file = writer.manifest.file_name(next(iter(self.widths)), len(writer.manifest.shards))
        cost = measured(lambda: self._rows(number), keep.codec, writer.objects, next_file, self.bytes_of(1))
        sharing = f", {self.everyone.size} processes" if self.everyone.size > 1 else ""
        print(
            f"plan: {rows:,} rows as {keep.codec} in {shards} shards of {self.shard_rows:,}: "
            f"{size(self.bytes_of(rows))}; {cost} (measured on one pass), about "
            f"{duration(cost.seconds(total - done))}{sharing}",
            flush=True,
        )

    def _affine(self) -> Mapping[str, Affine8] | None:
        """With several processes, int8's mean and scale from the first rows of the text: each finds the same."""
        if self.flags.keep.codec != "int8" or self.everyone.size == 1:
            return None
        wanted = min(CALIBRATION_ROWS, self.shard_rows, self.passes.rows)
        found: dict[str, list[Tensor]] = {name: [] for name in self.widths}
        for number, chosen in self.passes.within(0, wanted):
            for name, x in self._rows(number).items():
                found[name].append(x[chosen].float().cpu())
        return {name: calibrate(torch.cat(parts)) for name, parts in found.items()}


def settled(manifest: Manifest, widths: Mapping[str, int]) -> dict[str, Any]:
    """What decides the files of a store."""
    return {
        **vars(manifest.source),
        "codec": manifest.codec,
        "shard_rows": manifest.shard_rows,
        "keep_tokens": bool(manifest.tokens),
        "sites": dict(widths),
    }
