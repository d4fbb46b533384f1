"""The stages of run.py as functions: capture -> sweep -> evaluate -> report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparse_coding.activations.capture import rows as captured_rows
from sparse_coding.activations.capture import splice
from sparse_coding.activations.models import LanguageModel, cut_padding, load_model
from sparse_coding.activations.sites import resolve_all, site_name
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.activations.tokens import Contexts, contexts
from sparse_coding.config import numbers
from sparse_coding.dictionaries import Dictionary, architecture
from sparse_coding.errors import UserError
from sparse_coding.evaluation import record, save_dictionaries, stability
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.latents import top_contexts
from sparse_coding.metrics.behaviour import behaviour, reconstruct_with
from sparse_coding.metrics.reconstruction import evaluate_reconstruction
from sparse_coding.progress import Progress, quantity
from sparse_coding.provenance import provenance, short_hash
from sparse_coding.report.choose import best_members
from sparse_coding.report.run_report import write_run_report
from sparse_coding.run_settings import RunSettings
from sparse_coding.training.estimate import estimate
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.stream import ScaledStream, Stream
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings
from sparse_coding.training.wandb_mirror import WandbMirror

DEFAULT_CONTEXT = 256
EVALUATION_BATCH = 16
"""Contexts in one forward pass of the evaluation."""


@dataclass
class Captured:
    """A model, the text it reads, and its activations as a stream."""

    model: LanguageModel
    tokenizer: Any
    sites: list[str]
    train: Contexts
    held_out: Contexts
    source: ActivationStream
    stream: Stream
    scales: dict[str, float]
    """What the stream multiplies each site with."""


def run(settings: RunSettings) -> Path:
    """Everything: returns the report's path. The same settings continue a stopped run or redraw a finished one."""
    with RunFolder(run_folder(settings), settings.identity(), fresh=settings.output.fresh) as folder:
        if folder.finished:
            print(f"the run in {folder.path} is finished: drawing its report again (--fresh starts over)")
        else:
            sweep_members(settings, {"any": 2**20})  # a grid that makes no sense is an error before anything is read
            captured = capture(settings)
            members = sweep_members(settings, captured.stream.widths)
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


def capture(settings: RunSettings) -> Captured:
    """Load the model, tokenize the text, and set up the stream of activations; nothing is trained yet."""
    flags = settings.model
    model = load_model(flags.model, device=flags.device, dtype=flags.model_dtype, gelu=flags.gelu)
    names = list(flags.sites) or [site_name(model, layer, flags.location) for layer in flags.layer]
    resolve_all(model, names)  # a wrong name is an error before any text is read
    tokenizer = load_tokenizer(flags.tokenizer or model.path)
    if flags.tokenizer or model.from_nanogpt:
        cut_padding(model, tokenizer)
    text = settings.text_settings()
    context = settings.text.context
    if context is None:
        context = min(DEFAULT_CONTEXT, model.max_positions or DEFAULT_CONTEXT)
    if model.max_positions is not None and context > model.max_positions:
        raise UserError(f"--context is {context}: {flags.model} takes at most {model.max_positions} tokens")
    wanted = settings.steps * settings.training.batch_size

    def packed(part: Any, tokens: int) -> Contexts:
        special = settings.text.exclude_special
        return contexts(text, tokenizer, part=part, context=context, max_tokens=tokens, exclude_special=special)

    training, kept = packed("train", wanted), packed("held_out", max(settings.eval_rows, settings.splice_tokens))
    rows = settings.training
    source = ActivationStream(
        model, training, names, batch_size=rows.batch_size, buffer_rows=rows.buffer_rows, seed=rows.data_seed
    )
    scaled = ScaledStream(source) if settings.sweep.normalise else None
    scales = scaled.scales if scaled else dict.fromkeys(names, 1.0)
    return Captured(model, tokenizer, names, training, kept, source, scaled or source, scales)


def sweep_members(settings: RunSettings, widths: Mapping[str, int]) -> list[Member]:
    """The grid of the flags, at every site."""
    flags = settings.sweep
    return grid(
        flags.architecture,
        widths,
        ratios=flags.ratios,
        lrs=flags.lr,
        seeds=flags.seeds,
        varied={"l1_coefficient": numbers(flags.l1, "--l1")},
        l1_scaling=flags.l1_scaling,
        tied=flags.tied,
        decoder_bias=flags.decoder_bias,
    )


def train(settings: RunSettings, captured: Captured, members: list[Member], folder: RunFolder) -> Trainer:
    """Train the sweep, or continue it; leaves dictionaries/, members.json and log.jsonl in the folder."""
    flags, output = settings.training, settings.output
    schedule = OptimizerSettings(
        warmup_steps=flags.warmup_steps, decay=flags.decay, decay_fraction=flags.decay_fraction
    )
    training = TrainingSettings(
        settings.steps,
        schedule,
        flags.precision,
        log_every=max(1, settings.steps // 200),
        dead_window=flags.dead_window,
    )
    describe(settings, captured, members, training)
    folder.note(provenance=provenance(), data=facts(settings, captured))
    folder.write_json("members.json", [member.to_dict() for member in members])
    mirrors = []
    if output.wandb != "off":
        mirrors.append(WandbMirror(output.wandb, output.wandb_project, folder.path, settings.identity(), members))
    device = captured.model.device
    trainer = Trainer(members, captured.stream, training, str(device), folder, output.checkpoint_seconds, mirrors)
    trainer.fit()
    folder.note(training={"seconds": trainer.seconds, "seconds_capturing": captured.source.seconds_capturing})
    known = {"model_name": settings.model.model, "context_size": captured.train.tokens.shape[1]}
    save_dictionaries(trainer, folder.path, captured.scales, known)
    return trainer


def describe(settings: RunSettings, captured: Captured, members: list[Member], training: TrainingSettings) -> None:
    """Say what will be done and about how long it takes."""
    widths = ", ".join(f"{site} (width {width})" for site, width in captured.stream.widths.items())
    rows = training.steps * captured.stream.batch_size
    epochs = rows / captured.source.rows_per_epoch
    print(f"model {settings.model.model} on {captured.model.device}: {widths}")
    sizes = f"{quantity(captured.train.n_tokens)} tokens for training, {quantity(captured.held_out.n_tokens)} held out"
    print(f"text {captured.train.identity['text']['source']}: {sizes}")
    steps = f"{training.steps:,} steps of {captured.stream.batch_size:,} activations"
    print(f"sweep: {steps} ({epochs:.2g} passes over the text)")
    source = captured.source
    capturing = source.seconds_capturing / max(source.rows_captured, 1) * source.batch_size
    device = str(captured.model.device)
    plan = estimate(members, captured.stream, training.steps, training.precision, device, capturing)
    print(f"plan: {plan}", flush=True)


def facts(settings: RunSettings, captured: Captured) -> dict[str, Any]:
    """What the run was fed: text and its hash, model, sites, scales."""
    return {
        "model": settings.model.model,
        "model_dtype": str(captured.model.dtype).removeprefix("torch."),
        "device": str(captured.model.device),
        "sites": {n: f"{s.module}:{s.side}" for n, s in resolve_all(captured.model, captured.sites).items()},
        "widths": dict(captured.stream.widths),
        "scales": captured.scales,
        "text": captured.train.identity,
        "held_out_text": captured.held_out.identity,
        "tokens": captured.train.n_tokens,
        "held_out_tokens": captured.held_out.n_tokens,
    }


@torch.no_grad()
def evaluate(settings: RunSettings, captured: Captured, trainer: Trainer, folder: RunFolder) -> list[dict[str, Any]]:
    """Measure every member on held-out text; writes latents.json and results.jsonl."""
    members = trainer.members

    def inference(index: int) -> Dictionary:
        member, trained = members[index], trainer.dictionary(index)
        scale = captured.scales[member.site]
        return architecture(member.architecture).from_inference(trained.settings, trained.to_inference(scale))

    print(f"evaluating {len(members)} dictionaries on held-out text", flush=True)
    kept = held_out(captured, settings.eval_rows)
    recovered = loss_recovered(settings, captured, members, inference, kept)
    with_larger = stability(members, inference)
    records = []
    with Progress("measuring", len(members), unit="dictionaries") as progress:
        for index, member in enumerate(members):
            reconstruction = evaluate_reconstruction(inference(index), kept.rows[member.site].split(4096))
            metrics = {**recovered[member.name], "mmcs_next_larger": with_larger[index]}
            ratio = member.settings.d_sae / member.settings.d_in
            records.append(record(member, ratio, reconstruction, metrics))
            progress.update(index + 1)
    if settings.evaluation.latents:
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
    places: Int[Tensor, "N 2"]
    """(context, position) of each row."""


def held_out(captured: Captured, wanted: int) -> HeldOut:
    """Up to `wanted` held-out activations of each site, in the order of the text."""
    kept = captured.held_out
    counted = np.ones(kept.tokens.shape, dtype=bool) if kept.mask is None else kept.mask
    places = torch.from_numpy(np.argwhere(counted)[:wanted])
    n_contexts = int(places[-1, 0]) + 1 if len(places) else 0
    found = captured_rows(captured.model, kept, slice(n_contexts), captured.sites)
    return HeldOut({name: x[: len(places)].float() for name, x in found.items()}, places)


def token_batches(captured: Captured, wanted: int) -> Iterator[tuple[Tensor, Tensor]]:
    """About `wanted` held-out tokens and which of them count, as (tokens, counted) batches without padding."""
    kept = captured.held_out
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
) -> dict[str, dict[str, float | None]]:
    """CE and KL with each member's reconstruction spliced in, against zero and mean ablation.

    Nothing for a model without a head that predicts tokens.
    """
    found: dict[str, dict[str, float | None]] = {member.name: {} for member in members}
    if captured.model.kind is None:
        print(f"{settings.model.model} has no head that predicts tokens: loss recovered is not measured", flush=True)
        return found
    for site in captured.sites:

        def run(tokens: Tensor, replace: Callable[[Tensor], Tensor] | None, site: str = site) -> Tensor:
            return splice(captured.model, tokens, site, replace)

        chosen = {m.name: reconstruct_with(inference(i)) for i, m in enumerate(members) if m.site == site}
        batches = token_batches(captured, settings.splice_tokens)
        found |= behaviour(run, batches, chosen, kept.rows[site].mean(0), captured.model.kind)
    return found


def list_latents(
    settings: RunSettings,
    captured: Captured,
    members: list[Member],
    inference: Callable[[int], Dictionary],
    kept: HeldOut,
    records: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Top contexts of latents of the best dictionary of each site."""
    last = int(kept.places[-1, 0]) + 1
    words = [captured.tokenizer.batch_decode([[t] for t in row.tolist()]) for row in captured.held_out.tokens[:last]]
    found = []
    for site, name in best_members(records).items():
        index = next(i for i, member in enumerate(members) if member.name == name)
        latents = top_contexts(inference(index), kept.rows[site], kept.places, words, settings.evaluation.latents)
        found.append({"member": name, "site": site, "latents": latents})
    return found
