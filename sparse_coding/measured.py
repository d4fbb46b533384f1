"""The last stage of run.py: every dictionary on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.activations.capture import rows as captured_rows
from sparse_coding.activations.capture import splice
from sparse_coding.captured import Captured
from sparse_coding.dictionaries import Dictionary
from sparse_coding.errors import UserError
from sparse_coding.evaluation import record, stability
from sparse_coding.latents import top_contexts
from sparse_coding.metrics.behaviour import behaviour
from sparse_coding.metrics.reconstruction import evaluate_reconstruction, fvu_by_part
from sparse_coding.progress import Progress
from sparse_coding.report.choose import best_members
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.sweep import Member
from sparse_coding.training.trainer import Trainer
from sparse_coding.training.wandb_mirror import WandbMirror

EVALUATION_BATCH = 16
"""Contexts in one forward pass of the evaluation."""
PIECE = 4096
"""Rows that go through a dictionary at once."""


@torch.no_grad()
def evaluate(settings: RunSettings, captured: Captured, trainer: Trainer, folder: RunFolder) -> list[dict[str, Any]]:
    """Measure every member on held-out text; writes latents.json and results.jsonl."""
    members = trainer.members

    def inference(index: int) -> Dictionary:
        return captured.at_inference(members[index]).at_inference(trainer.dictionary(index))

    on = "held-out text" if captured.held_out is not None else "rows of the stores kept out of training"
    print(f"evaluating {len(members)} dictionaries on {on}", flush=True)
    kept = only_finite(held_out(captured, settings.eval_rows), settings.safety.nan == "skip")
    recovered = loss_recovered(settings, captured, members, inference, kept)
    with_larger = stability(members, inference)
    records = []
    with Progress("measuring", len(members), unit="dictionaries") as progress:
        for index, member in enumerate(members):
            dictionary, x, target = inference(index), kept.rows[member.site], kept.rows[member.output_site]
            reconstruction = evaluate_reconstruction(dictionary, zip(x.split(PIECE), target.split(PIECE), strict=True))
            metrics = {**recovered[member.name], "mmcs_next_larger": with_larger[index]}
            if member.site in captured.parts:
                widths = captured.part_widths[member.site]
                by_part = fvu_by_part(dictionary, x.split(PIECE), widths)
                metrics["fvu_by_site"] = dict(zip(captured.parts[member.site], by_part, strict=True))
            ratio = member.settings.d_sae / member.settings.d_in
            records.append(record(member, ratio, reconstruction, metrics))
            progress.update(index + 1)
    diverged = [one["name"] for one in records if one["metrics"]["fvu"] is None]
    if diverged:
        print(f"diverged, no finite error: {', '.join(diverged)}; lower --lr for these", file=sys.stderr, flush=True)
    if settings.evaluation.latents and captured.held_out is not None:
        folder.write_json("latents.json", list_latents(settings, captured, members, inference, kept, records))
    folder.finish(records)
    for mirror in trainer.loggers:
        if isinstance(mirror, WandbMirror):
            mirror.finish(records)
    return records


@dataclass
class HeldOut:
    """Activations of held-out text, and where each row comes from."""

    rows: dict[str, Float[Tensor, "N d_in"]]
    """By site of the stream, joined ones included."""
    places: Int[Tensor, "N 2"] | None
    """(context, position) of each row; None for rows of stores."""


def held_out(captured: Captured, wanted: int) -> HeldOut:
    """Up to `wanted` held-out activations of each site, in the order of the text."""
    rows: dict[str, Tensor] = {}
    if captured.stores is not None and captured.stores.apart is not None:
        return HeldOut(with_joined(captured, dict(captured.stores.apart(wanted))), None)
    kept = captured.held_out
    assert kept is not None
    counted = np.ones(kept.tokens.shape, dtype=bool) if kept.mask is None else kept.mask
    places = torch.from_numpy(np.argwhere(counted)[:wanted])
    n_contexts = int(places[-1, 0]) + 1 if len(places) else 0
    for model in dict.fromkeys(place.model for place in captured.places.values()):
        there = {name: place.site for name, place in captured.places.items() if place.model is model}
        found = captured_rows(model, kept, slice(n_contexts), list(dict.fromkeys(there.values())))
        rows |= {name: found[site][: len(places)].float().to(captured.device) for name, site in there.items()}
    return HeldOut(with_joined(captured, rows), places)


def only_finite(kept: HeldOut, skip: bool) -> HeldOut:
    """The rows that are numbers at every site; raises UserError where some are not and `skip` is off."""
    finite = torch.stack([x.isfinite().all(1).cpu() for x in kept.rows.values()]).all(0)
    n_bad = len(finite) - int(finite.sum())
    if not n_bad:
        return kept
    told = f"{n_bad:,} of {len(finite):,} held-out activations are NaN or infinity"
    if not skip or n_bad == len(finite):
        raise UserError(
            f"{told}, so nothing can be measured on them; what was trained is saved: "
            + ("use another model or site" if skip else "start the same command with --nan skip to leave them out")
        )
    print(f"{told}: they are left out; loss recovered is null where the model itself gives no number", flush=True)
    rows = {site: x[finite.to(x.device)] for site, x in kept.rows.items()}
    return HeldOut(rows, None if kept.places is None else kept.places[finite])


def with_joined(captured: Captured, rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows by site, and those of the joined sites."""
    return rows | {name: torch.cat([rows[site] for site in sites], dim=1) for name, sites in captured.parts.items()}


def token_batches(captured: Captured, wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
    """About `wanted` held-out tokens and which of them count, as (tokens, counted) batches without padding."""
    kept = captured.held_out
    assert kept is not None
    n_contexts, context = kept.tokens.shape
    full = n_contexts - 1 if kept.n_padding else n_contexts
    last = min(full, -(-wanted // context))
    pieces = [
        (slice(start, min(start + EVALUATION_BATCH, last)), context) for start in range(0, last, EVALUATION_BATCH)
    ]
    for which, length in pieces or [(slice(1), context - kept.n_padding)]:  # all there is may be one short context
        tokens = torch.from_numpy(kept.tokens[which, :length].astype(np.int64))
        counted = None if kept.mask is None else torch.from_numpy(np.array(kept.mask[which, :length]))
        yield tokens, torch.ones_like(tokens, dtype=torch.bool) if counted is None else counted


def loss_recovered(
    settings: RunSettings,
    captured: Captured,
    members: list[Member],
    inference: Callable[[int], Dictionary],
    kept: HeldOut,
) -> dict[str, dict[str, Any]]:
    """CE and KL with each member's reconstruction spliced in, against zero and mean ablation.

    A transcoder's goes in at its target site, made from its input site in the untouched model. A crosscoder's goes in
    at one of its sites at a time: the mean over the sites counts, and each stands under `by_site`. Nothing for a model
    without a head that predicts tokens, and where no model could be loaded.
    """
    found: dict[str, dict[str, Any]] = {member.name: {} for member in members}
    if captured.model is None:
        return found
    for output in dict.fromkeys(member.output_site for member in members):
        at = [(i, member) for i, member in enumerate(members) if member.output_site == output]
        by_site = {}
        for number, site in enumerate(captured.parts.get(output, [output])):
            place = captured.places[site]
            if place.model.kind is None:
                print(
                    f"{place.model.name} has no head that predicts tokens: its loss recovered is not measured",
                    flush=True,
                )
                continue
            spliced = Splices(captured, site, (member.site for _, member in at))
            chosen = {m.name: spliced.replacement(inference(i), m, number) for i, m in at}
            batches = token_batches(captured, settings.splice_tokens)
            mean = kept.rows[site].mean(0)
            by_site[site] = behaviour(spliced.run, batches, chosen, mean, place.model.kind)
        for _, member in at:
            scores = {site: values[member.name] for site, values in by_site.items()}
            found[member.name] = mean_scores(list(scores.values()))
            if output in captured.parts:
                found[member.name]["by_site"] = scores
    return found


def mean_scores(scores: list[dict[str, float | None]]) -> dict[str, Any]:
    """The mean of each score over several sites; None where one has none."""
    if len(scores) < 2:
        return dict(scores[0]) if scores else {}
    columns = {name: [one[name] for one in scores] for name in scores[0]}
    return {
        name: None if any(value is None for value in values) else sum(v for v in values if v is not None) / len(values)
        for name, values in columns.items()
    }


class Splices:
    """Runs a model with reconstructions put in at one site, whatever sites they are made from."""

    def __init__(self, captured: Captured, site: str, inputs: Iterable[str]):
        """`inputs`: the sites of the stream that reconstructions are made from."""
        self.captured, self.site, self.place = captured, site, captured.places[site]
        self.elsewhere = [name for name in dict.fromkeys(inputs) if name != site]
        self._tokens: Tensor | None = None
        self._inputs: dict[str, Tensor] = {}

    def run(self, tokens: Tensor, replace: Callable[[Tensor], Tensor] | None) -> Tensor:
        if tokens is not self._tokens:  # read beforehand: the model cannot be run again from inside its own run
            self._tokens = tokens
            self._inputs = {name: self.captured.inputs(tokens, name) for name in self.elsewhere}
        return splice(self.place.model, tokens, self.place.site, replace)

    def replacement(self, dictionary: Dictionary, member: Member, part: int) -> Callable[[Tensor], Tensor]:
        """Activations at the site -> what the member makes in their place."""

        def replace(old: Tensor) -> Tensor:
            x = old.to(dictionary.atoms) if member.site == self.site else self._inputs[member.site]
            x_hat = dictionary(x.flatten(0, 1))
            if member.site in self.captured.parts:
                x_hat = x_hat.split(self.captured.part_widths[member.site], dim=1)[part]
            return x_hat.reshape(old.shape).to(old)

        return replace


def list_latents(
    settings: RunSettings,
    captured: Captured,
    members: list[Member],
    inference: Callable[[int], Dictionary],
    kept: HeldOut,
    records: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Top contexts of latents of the best dictionary of each site."""
    assert captured.held_out is not None
    assert kept.places is not None
    last = int(kept.places[-1, 0]) + 1
    words = [captured.tokenizer.batch_decode([[t] for t in row.tolist()]) for row in captured.held_out.tokens[:last]]
    found = []
    for site, name in best_members(records).items():
        index = next(i for i, member in enumerate(members) if member.name == name)
        latents = top_contexts(inference(index), kept.rows[site], kept.places, words, settings.evaluation.latents)
        found.append({"member": name, "site": site, "latents": latents})
    return found
