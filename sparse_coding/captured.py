"""The first stage of run.py: models, the text they read, and their activations as one stream."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from sparse_coding.activations.capture import capture as captured_activations
from sparse_coding.activations.end_to_end import EndToEndStream
from sparse_coding.activations.fused import compile_blocks
from sparse_coding.activations.models import WEIGHTS, LanguageModel, cut_padding, load_model
from sparse_coding.activations.paired import JoinedStream, PairedStream
from sparse_coding.activations.ring import RingStream
from sparse_coding.activations.sites import resolve_all, site_name
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.activations.tokens import Contexts, contexts
from sparse_coding.dictionaries.normalise import joined
from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256
from sparse_coding.formats.saelens import Normalised
from sparse_coding.run_flags import SourceFlags
from sparse_coding.run_settings import RunSettings
from sparse_coding.sweep_flags import END_TO_END
from sparse_coding.training.stream import NormalisedStream, Stream
from sparse_coding.training.sweep import Member
from sparse_coding.training.trainer import StepError

DEFAULT_CONTEXT = 256


@dataclass(frozen=True)
class Place:
    """Where a site of the stream lies: the model and the site's name there."""

    model: LanguageModel
    site: str


class Source(Protocol):
    """Raw activations, from a model or from stores."""

    batch_size: int
    rows_per_epoch: int

    @property
    def widths(self) -> Mapping[str, int]: ...

    def batch(self, step: int) -> dict[str, Tensor]: ...


@dataclass
class FromStores:
    """What is particular to activations that come from stores."""

    lines: list[str]
    """What the run says about them."""
    facts: dict[str, Any]
    """Which stores, and checksums: a run goes on with the same rows only."""
    apart: Callable[[int], Mapping[str, Float[Tensor, "N d_in"]]] | None
    """Up to so many rows kept out of training, by site, where dictionaries cannot be measured on held-out text."""


@dataclass
class Captured:
    """Activations as a stream, and the model and text that dictionaries are measured on."""

    device: str
    model: LanguageModel | None
    """None where it cannot be loaded, which only training from stores survives; then no text is read either."""
    tokenizer: Any
    places: dict[str, Place]
    """Every site of the stream that is captured, by its name in the stream; none without a model."""
    text: dict[str, Any]
    """Identity of the text trained on."""
    n_tokens: int
    context: int
    held_out: Contexts | None
    source: Source
    normalised: NormalisedStream
    stream: Stream
    """What is trained on: the source, normalised, with the sites of a crosscoder joined."""
    targets: dict[str, str] = field(default_factory=dict)
    """Input site -> target site, for transcoders."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Joined site -> the sites side by side in it, for crosscoders."""
    stores: FromStores | None = None

    @property
    def sites(self) -> list[str]:
        """Sites of the source."""
        return list(self.source.widths)

    @property
    def seconds_waiting(self) -> float:
        """Time that was waited for raw activations so far: for the model, or for a store."""
        for name in ("seconds_waiting", "seconds_capturing"):
            if hasattr(self.source, name):
                return getattr(self.source, name)
        return 0.0

    @property
    def trained_sites(self) -> list[str]:
        """Sites that dictionaries encode."""
        return list(self.parts or self.targets or self.sites)

    @property
    def trained_widths(self) -> dict[str, int]:
        """Widths of those, and of the targets."""
        widths = self.stream.widths
        return {site: widths[site] for site in (*self.trained_sites, *self.targets.values())}

    @property
    def part_widths(self) -> dict[str, list[int]]:
        return {name: [self.stream.widths[site] for site in sites] for name, sites in self.parts.items()}

    def at_inference(self, member: Member) -> Normalised:
        """What training did to the activations a member reads and predicts."""
        maps = self.normalised.maps
        before = joined([maps[site] for site in self.parts.get(member.site, [member.site])])
        after = maps[member.target] if member.target else before
        return Normalised(before, after, self.normalised.row_norm)

    def end_to_end(self) -> StepError | None:
        """What the language model loses, where that is what dictionaries are trained on."""
        source = self.source
        if not isinstance(source, EndToEndStream):
            return None
        return lambda step, site: source.error(step, site, self.normalised.undo(site, step))

    def inputs(self, tokens: Tensor, site: str) -> Float[Tensor, "B S d_in"]:
        """Raw activations of tokens at a site of the stream, joined ones included."""
        sites = self.parts.get(site, [site])
        found = []
        for model in dict.fromkeys(self.places[one].model for one in sites):
            there = {name: place.site for name, place in self.places.items() if place.model is model and name in sites}
            captured = captured_activations(model, tokens, list(there.values()))
            found += [(name, captured[there[name]].to(self.device)) for name in there]
        rows = dict(found)
        return torch.cat([rows[one].float() for one in sites], dim=-1)


def capture(settings: RunSettings) -> Captured:
    """Load the model, tokenize the text, and set up the stream of activations; nothing is trained yet."""
    flags = settings.model
    model, names = open_model(flags)
    targets = target_sites(settings, names, model)
    captured_sites = list(dict.fromkeys([*names, *targets.values()]))
    resolve_all(model, captured_sites)  # a wrong name is an error before any text is read
    tokenizer = open_tokenizer(flags, model)
    context = context_length(settings.text.context, model)
    training, kept = (packed_text(settings, tokenizer, context, part) for part in ("train", "held_out"))
    source = open_source(settings, model, training, captured_sites)
    places = {site: Place(model, site) for site in captured_sites}
    if flags.also_model:
        source, places = with_other_models(settings, source, names)
    normalised, stream, parts = prepared(settings, source, list(places))
    return Captured(
        str(model.device), model, tokenizer, places, training.identity, training.n_tokens, context, kept,
        source, normalised, stream, targets, parts,
    )  # fmt: skip


def open_model(flags: SourceFlags) -> tuple[LanguageModel, list[str]]:
    """The model and the names of the sites asked for."""
    model = load_as(flags, flags.model)
    return model, list(flags.sites) or [site_name(model, layer, flags.location) for layer in flags.layer]


def load_as(flags: SourceFlags, name: str) -> LanguageModel:
    """A model by name, on the device and in the form that the flags say."""
    model = load_model(name, device=flags.device, dtype=flags.model_dtype, gelu=flags.gelu)
    if flags.compile_model:
        compile_blocks(model.hf)
    return model


def open_tokenizer(flags: SourceFlags, model: LanguageModel) -> Any:
    """The model's tokenizer; what no token of it needs is cut off the model."""
    tokenizer = load_tokenizer(flags.tokenizer or model.path)
    if flags.tokenizer or model.from_nanogpt:
        cut_padding(model, tokenizer)
    return tokenizer


def revision(model: LanguageModel) -> str:
    """What tells a model's weights from others of the same name: the hub's commit, or a hash of its files."""
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        return f"commit {commit}"
    path = Path(model.path)
    files = [path] if path.is_file() else sorted(file for kind in ("config.json", *WEIGHTS) for file in path.glob(kind))
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {file_sha256(file)}\n".encode())
    return f"sha256 {digest.hexdigest()}"


def prepared(
    settings: RunSettings, source: Source, sites: Sequence[str]
) -> tuple[NormalisedStream, Stream, dict[str, list[str]]]:
    """The source normalised; the same with sites joined where crosscoders are trained; what is joined."""
    normalised = NormalisedStream(source, settings.sweep.normalise)
    if not settings.model.crosscoder:
        return normalised, normalised, {}
    if len(sites) < 2:
        raise UserError(
            f"--crosscoder needs several sites, {sites[0]} is one: give more layers or sites, or --also-model"
        )
    name = "+".join(sites)
    return normalised, JoinedStream(normalised, name, list(sites)), {name: list(sites)}


def packed_text(settings: RunSettings, tokenizer: Any, context: int, part: Literal["train", "held_out"]) -> Contexts:
    """The tokens of a part of the text, as many as the run needs of it."""
    wanted = settings.steps * settings.training.batch_size
    if part == "held_out":
        wanted = max(settings.eval_rows, settings.splice_tokens)
    special, text = settings.text.exclude_special, settings.text_settings()
    return contexts(text, tokenizer, part=part, context=context, max_tokens=wanted, exclude_special=special)


def target_sites(settings: RunSettings, names: list[str], model: LanguageModel | None = None) -> dict[str, str]:
    """Input site -> target site of the transcoders, none where none are asked for."""
    flags = settings.model
    if flags.target_location:
        assert model is not None
        if flags.sites:
            raise UserError("--target-location goes with --layer and --location: with --sites give --target-sites")
        found = {
            name: site_name(model, layer, flags.target_location) for name, layer in zip(names, flags.layer, strict=True)
        }
    elif flags.target_sites:
        found = dict(zip(names, flags.target_sites, strict=True))
    else:
        return {}
    if len(found) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{twice} is given twice: one transcoder a site; predict its other targets in another run")
    for name, target in found.items():
        if name == target:
            raise UserError(f"a transcoder from {name} to itself is an autoencoder: leave the target out")
    return found


def context_length(asked: int | None, model: LanguageModel) -> int:
    """Tokens per context."""
    context = asked
    if context is None:
        context = min(DEFAULT_CONTEXT, model.max_positions or DEFAULT_CONTEXT)
    if model.max_positions is not None and context > model.max_positions:
        raise UserError(f"--context is {context}: {model.name} takes at most {model.max_positions} tokens")
    return context


def open_source(
    settings: RunSettings, model: LanguageModel, training: Contexts, sites: list[str]
) -> ActivationStream | EndToEndStream:
    """The stream of raw activations: shuffled rows, or whole contexts where the loss is end to end."""
    rows, loss = settings.training, settings.sweep.loss
    check = settings.safety.nan == "stop"  # else the trainer looks, and leaves batches out
    if loss not in END_TO_END:
        shared: dict[str, Any] = {
            "batch_size": rows.batch_size,
            "buffer_rows": rows.buffer_rows,
            "seed": rows.data_seed,
        }
        if model.device.type == "cuda":
            return RingStream(model, training, sites, n_batches=settings.steps, **shared)
        return ActivationStream(model, training, sites, **shared, check_finite=check)
    context = training.tokens.shape[1]
    if rows.batch_size % context:
        raise UserError(
            f"--loss {loss} trains on whole contexts: --batch-size is {rows.batch_size}, it must be a multiple of the "
            f"context of {context} tokens (--context sets that)"
        )
    per_batch = rows.batch_size // context
    return EndToEndStream(
        model, training, sites,
        loss="ce" if loss == "ce" else "kl", contexts_per_batch=per_batch, seed=rows.data_seed, check_finite=check,
    )  # fmt: skip


def with_other_models(
    settings: RunSettings, first: ActivationStream | EndToEndStream, names: list[str]
) -> tuple[PairedStream, dict[str, Place]]:
    """The same sites of further models beside those of the first, each under `MODEL/SITE`.

    Each reads the text through its own tokenizer; that all give the same tokens is checked.
    """
    assert isinstance(first, ActivationStream)
    flags, context = settings.model, first.contexts.tokens.shape[1]
    streams = {short_name(flags.model): first}
    for name in flags.also_model:
        model = load_as(flags, name)
        training = packed_text(settings, load_tokenizer(flags.tokenizer or model.path), context, "train")
        key = short_name(name)
        if key in streams:
            key = f"{key}-{len(streams) + 1}"
        stream = open_source(settings, model, training, names)
        assert isinstance(stream, ActivationStream)
        streams[key] = stream
    places = {f"{key}/{name}": Place(stream.model, name) for key, stream in streams.items() for name in names}
    return PairedStream(streams), places


def short_name(model: str) -> str:
    """A model's name or folder, without the path."""
    return Path(model).resolve().name if Path(model).exists() else model.rsplit("/", 1)[-1]
