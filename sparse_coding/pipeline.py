"""run.py from end to end: capture -> sweep -> evaluate -> report."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from sparse_coding.activations.end_to_end import EndToEndStream
from sparse_coding.activations.paired import PairedStream
from sparse_coding.activations.sites import resolve_all
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.captured import Captured, Source, capture
from sparse_coding.evaluation import save_dictionaries
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.measured import evaluate
from sparse_coding.progress import quantity
from sparse_coding.provenance import provenance, short_hash
from sparse_coding.report.run_report import write_run_report
from sparse_coding.run_settings import RunSettings
from sparse_coding.stored import from_stores
from sparse_coding.stores.objects import open_objects
from sparse_coding.training.estimate import estimate
from sparse_coding.training.micro_batches import plan_without_memory
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.sweep import Member
from sparse_coding.training.sync import Sync
from sparse_coding.training.trainer import Trainer, TrainingSettings
from sparse_coding.training.wandb_mirror import WandbMirror


def run(settings: RunSettings) -> Path:
    """Everything: returns the report's path. The same settings continue a stopped run or redraw a finished one."""
    output = settings.output
    sync = Sync(open_objects(output.sync)) if output.sync else None
    with RunFolder(run_folder(settings), settings.identity(), output.fresh, sync) as folder:
        if folder.finished:
            print(f"the run in {folder.path} is finished: drawing its report again (--fresh starts over)")
        else:
            settings.check_grid()  # one that makes no sense is an error before anything is read
            if settings.stores.activations:
                settings, captured = from_stores(settings, folder)
            else:
                captured = capture(settings)
            members = settings.sweep.members(
                captured.trained_widths, captured.targets, captured.part_widths, settings.model.skip
            )
            trainer = train(settings, captured, members, folder)
            evaluate(settings, captured, trainer, folder)
        return write_run_report(folder.path)


def run_folder(settings: RunSettings) -> Path:
    """`--out`, or a name under outputs/ that the same settings give again."""
    if settings.output.out is not None:
        return settings.output.out
    model = settings.model
    if settings.stores.activations:
        named = "-".join(store.rstrip("/").rsplit("/", 1)[-1] for store in settings.stores.activations)
        words = f"{named}-{'-'.join(model.sites) or 'all'}-{short_hash(settings.identity())}"
        return Path("outputs") / re.sub(r"[^A-Za-z0-9._-]+", "_", words)
    where = "-".join(model.sites) or f"{'-'.join(str(layer) for layer in model.layer)}-{model.location}"
    named = Path(model.model).parent if checkpoint_file(model.model) else Path(model.model)  # out-owt/ckpt.pt
    words = f"{named.resolve().name}-{where}-{short_hash(settings.identity())}"
    return Path("outputs") / re.sub(r"[^A-Za-z0-9._-]+", "_", words)


def train(settings: RunSettings, captured: Captured, members: list[Member], folder: RunFolder) -> Trainer:
    """Train the sweep, or continue it; leaves dictionaries/, members.json and log.jsonl in the folder."""
    output, training = settings.output, settings.training_settings()
    describe(settings, captured, members, training)
    folder.note(provenance=provenance(), data=facts(settings, captured))
    folder.write_json("members.json", [member.to_dict() for member in members])
    mirrors = []
    if output.wandb != "off":
        mirrors.append(WandbMirror(output.wandb, output.wandb_project, folder.path, settings.identity(), members))
    device, error = captured.device, captured.end_to_end()
    trainer = Trainer(
        members, captured.stream, training, device, folder, output.checkpoint_seconds, mirrors, error, settings.safety
    )  # fmt: skip
    before, waited, began = trainer.seconds, captured.seconds_waiting, time.monotonic()
    trainer.fit()
    took, waited = time.monotonic() - began, captured.seconds_waiting - waited
    share = waited / took if trainer.seconds > before else None  # None: it was trained to its end before
    folder.note(training={"seconds": trainer.seconds, "seconds_waiting": waited, "share_waiting": share})
    known = {"model_name": settings.model.model, "context_size": captured.context}
    save_dictionaries(trainer, folder.path, captured.at_inference, known)
    if settings.safety.keep_best:
        with trainer.at_best() as kept:
            if kept:
                save_dictionaries(trainer, folder.path / "best", captured.at_inference, known)
    return trainer


def describe(settings: RunSettings, captured: Captured, members: list[Member], training: TrainingSettings) -> None:
    """Say what will be done and about how long it takes."""
    widths = captured.trained_widths
    if captured.targets:
        shown = [f"{a} (width {widths[a]}) to {b} (width {widths[b]})" for a, b in captured.targets.items()]
    else:
        shown = [f"{site} (width {widths[site]})" for site in captured.trained_sites]
    rows = training.steps * captured.stream.batch_size
    epochs = rows / captured.source.rows_per_epoch
    where = captured.device if captured.model is None else captured.model.runs_on
    print(f"model {settings.model.model} on {where}: {', '.join(shown)}")
    kept = "" if captured.held_out is None else f"{quantity(captured.held_out.n_tokens)} tokens held out"
    passes = f"{epochs:.2g} passes over {'the text' if captured.stores is None else 'the stores'}"
    for line in captured.stores.lines if captured.stores else []:
        print(line)
    if captured.stores is None:
        kept = f"{quantity(captured.n_tokens)} tokens for training, {kept}"
    if captured.held_out is not None:
        print(f"text {captured.held_out.identity['text']['source']}: {kept}")
    print(f"sweep: {training.steps:,} steps of {captured.stream.batch_size:,} activations ({passes})")
    capturing = seconds_capturing_a_batch(captured.source)
    with plan_without_memory(settings.safety):
        plan = estimate(members, captured.stream, training, captured.device, capturing, captured.end_to_end())
        print(f"plan: {plan}", flush=True)


def seconds_capturing_a_batch(source: Source) -> float:
    """What the language model has taken so far, per batch; nothing for stores, which are read meanwhile."""
    if isinstance(source, ActivationStream | EndToEndStream | PairedStream):
        return source.seconds_capturing / max(source.rows_captured, 1) * source.batch_size
    return 0.0


def facts(settings: RunSettings, captured: Captured) -> dict[str, Any]:
    """What the run was fed: text and its hash, model, sites, normalisation."""
    sites = {}
    for name, place in captured.places.items():
        site = resolve_all(place.model, [place.site])[place.site]
        sites[name] = f"{site.module}:{site.side}"
    maps, model = captured.normalised.maps, captured.model
    known = {
        "model": settings.model.model,
        "models": list(dict.fromkeys(place.model.name for place in captured.places.values())),
        "model_dtype": None if model is None else str(model.dtype).removeprefix("torch."),
        "device": captured.device,
        "sites": sites,
        "targets": captured.targets,
        "crosscoders": captured.parts,
        "widths": dict(captured.stream.widths),
        "normalise": captured.normalised.kind,
        "scales": {site: float(one.factor[0]) for site, one in maps.items() if one.factor.ndim == 1},
        "text": captured.text,
        "held_out_text": None if captured.held_out is None else captured.held_out.identity,
        "tokens": captured.n_tokens,
        "held_out_tokens": 0 if captured.held_out is None else captured.held_out.n_tokens,
    }
    return known if captured.stores is None else {**known, "stores": captured.stores.facts}
