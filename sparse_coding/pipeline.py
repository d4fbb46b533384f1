"""run.py from end to end: capture -> sweep -> evaluate -> report."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sparse_coding.activations.sites import resolve_all
from sparse_coding.captured import Captured, capture
from sparse_coding.evaluation import save_dictionaries
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.measured import evaluate
from sparse_coding.progress import quantity
from sparse_coding.provenance import provenance, short_hash
from sparse_coding.report.run_report import write_run_report
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.estimate import estimate
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.sweep import Member
from sparse_coding.training.trainer import Trainer, TrainingSettings
from sparse_coding.training.wandb_mirror import WandbMirror


def run(settings: RunSettings) -> Path:
    """Everything: returns the report's path. The same settings continue a stopped run or redraw a finished one."""
    with RunFolder(run_folder(settings), settings.identity(), fresh=settings.output.fresh) as folder:
        if folder.finished:
            print(f"the run in {folder.path} is finished: drawing its report again (--fresh starts over)")
        else:
            settings.check_grid()  # one that makes no sense is an error before anything is read
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
    device, error = str(captured.model.device), captured.end_to_end()
    trainer = Trainer(
        members, captured.stream, training, device, folder, output.checkpoint_seconds, mirrors, error
    )  # fmt: skip
    trainer.fit()
    folder.note(training={"seconds": trainer.seconds, "seconds_capturing": captured.source.seconds_capturing})
    known = {"model_name": settings.model.model, "context_size": captured.train.tokens.shape[1]}
    save_dictionaries(trainer, folder.path, captured.at_inference, known)
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
    print(f"model {settings.model.model} on {captured.model.device}: {', '.join(shown)}")
    sizes = f"{quantity(captured.train.n_tokens)} tokens for training, {quantity(captured.held_out.n_tokens)} held out"
    print(f"text {captured.train.identity['text']['source']}: {sizes}")
    steps = f"{training.steps:,} steps of {captured.stream.batch_size:,} activations"
    print(f"sweep: {steps} ({epochs:.2g} passes over the text)")
    source = captured.source
    capturing = source.seconds_capturing / max(source.rows_captured, 1) * source.batch_size
    device = str(captured.model.device)
    plan = estimate(members, captured.stream, training, device, capturing, captured.end_to_end())
    print(f"plan: {plan}", flush=True)


def facts(settings: RunSettings, captured: Captured) -> dict[str, Any]:
    """What the run was fed: text and its hash, model, sites, normalisation."""
    sites = {}
    for name, place in captured.places.items():
        site = resolve_all(place.model, [place.site])[place.site]
        sites[name] = f"{site.module}:{site.side}"
    maps = captured.normalised.maps
    return {
        "model": settings.model.model,
        "models": list(dict.fromkeys(place.model.name for place in captured.places.values())),
        "model_dtype": str(captured.model.dtype).removeprefix("torch."),
        "device": str(captured.model.device),
        "sites": sites,
        "targets": captured.targets,
        "crosscoders": captured.parts,
        "widths": dict(captured.stream.widths),
        "normalise": captured.normalised.kind,
        "scales": {site: float(one.factor[0]) for site, one in maps.items() if one.factor.ndim == 1},
        "text": captured.train.identity,
        "held_out_text": captured.held_out.identity,
        "tokens": captured.train.n_tokens,
        "held_out_tokens": captured.held_out.n_tokens,
    }
