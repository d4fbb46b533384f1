"""What dictionaries trained from stores are measured on: the model of the harvest, and the text it kept out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sparse_coding.activations.capture import widths
from sparse_coding.activations.sites import resolve_all
from sparse_coding.activations.tokens import Contexts
from sparse_coding.captured import context_length, open_model, open_tokenizer, packed_text, revision
from sparse_coding.errors import UserError
from sparse_coding.run_flags import DEFAULT_MODEL, ModelFlags, TextFlags
from sparse_coding.run_settings import RunSettings
from sparse_coding.stores.store import Store


@dataclass
class Reading:
    """What dictionaries are measured on."""

    model: Any
    tokenizer: Any
    held_out: Contexts


def as_harvested(settings: RunSettings, stores: Sequence[Store], names: Sequence[str]) -> RunSettings:
    """The settings with model, text and sites of the harvest, unless others are named."""
    source = stores[0].manifest.source
    text = source.text if isinstance(source.text, dict) else {}
    read_as = _mapping(text.get("reading"))
    model: ModelFlags = replace(settings.model, sites=tuple(names))
    if model.model == DEFAULT_MODEL:
        model = replace(
            model,
            model=source.model,
            gelu=model.gelu or read_as.get("gelu"),
            tokenizer=model.tokenizer or _mapping(source.tokenizer).get("name"),
        )
    flags, known = settings.text, _mapping(text.get("text"))
    if flags.text is None and known.get("source") is None:  # texts of a merged store, or one that we cannot read
        return replace(settings, model=model)
    if flags.text is None:
        shares = [_mapping(store.manifest.source.text).get("held_out") for store in stores]
        flags = TextFlags(
            text=known.get("source"),
            text_config=known.get("config"),
            text_split=known.get("split") or "train",
            text_column=known.get("column"),
            streaming=bool(read_as.get("streaming")),
            max_documents=known.get("max_documents"),
            held_out=min((share for share in shares if isinstance(share, float) and share), default=0.05),
            context=source.context,
            exclude_special=source.exclude_special,
        )
    elif flags.context is None:
        flags = replace(flags, context=source.context)
    return replace(settings, model=model, text=flags)


def reading(settings: RunSettings, store: Store, sites: Sequence[str]) -> Reading:
    """The model of the store and text that was not harvested. Raises UserError where they are not at hand."""
    source = store.manifest.source
    if settings.text.text is None:
        several = "is of several texts" if "merged" in _mapping(source.text) else "does not say which text it is of"
        raise UserError(f"the store {store.url} {several}: name one to measure on with --text")
    model, _ = open_model(settings.model)
    now = revision(model)
    same_kind = source.revision is not None and source.revision.partition(" ")[0] == now.partition(" ")[0]
    if same_kind and now != source.revision:
        raise UserError(
            f"the model {settings.model.model} is not the one that {store.url} was harvested from ({now[:20]} here, "
            f"{source.revision[:20]} there): name that with --model"  # type: ignore[index]
        )
    resolve_all(model, sites)
    for site, width in widths(model, list(sites)).items():
        if width != store.widths[site]:
            raise UserError(f"{site} is {width} wide in {settings.model.model} and {store.widths[site]} in {store.url}")
    tokenizer = open_tokenizer(settings.model, model)
    held_out = packed_text(settings, tokenizer, context_length(settings.text.context, model), "held_out")
    _check_text(store, held_out.identity, settings.text.held_out)
    return Reading(model, tokenizer, held_out)


def _check_text(store: Store, here: Mapping[str, Any], share: float) -> None:
    """Raise UserError where a text that a store is of has changed, or is read otherwise; `here`: what is at hand."""
    of = _mapping(store.manifest.source.text)
    harvested = [_mapping(one) for one in of.get("merged", [of])]
    if any(one.get("tokenizer", here["tokenizer"]) != here["tokenizer"] for one in harvested):
        raise UserError(f"the tokenizer is not the one that {store.url} was harvested with: name that with --tokenizer")
    now = here["text"]
    named_so = [one for one in harvested if _mapping(one.get("text")).get("source") == now["source"]]
    same = [one for one in named_so if one["text"] == now]
    if named_so and not same:
        raise UserError(
            f"the text {now['source']} has changed since {store.url} was harvested: name another with --text"
        )
    kept_out = min((one.get("held_out") or 1 for one in same), default=1)
    if share > kept_out:
        raise UserError(
            f"--held-out is {share}: {kept_out} of the documents were kept out of the harvest of {store.url}, give no "
            "more"
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
