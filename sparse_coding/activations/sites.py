"""Sites: the places in a model that activations are taken from, by name.

Two kinds of names work. Names of transformer-lens 4 (`blocks.2.mlp.hook_post`) mean what they mean in its
`TransformerBridge` without compatibility mode; one table per family of models says where each one lies. Names of the
model's own modules (`transformer.h.2.mlp.act`) mean the module's output, or its input with `:in` at the end.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from sparse_coding.activations.families import ALIASES, FAMILIES, LOCATIONS, Family, Side
from sparse_coding.activations.models import LanguageModel
from sparse_coding.errors import UserError, near


@dataclass(frozen=True)
class Site:
    """Where activations come from: the first tensor that goes into or comes out of a module."""

    name: str  # as it was asked for
    module: str  # its name in the Hugging Face model
    side: Side
    carrier: str | None = None
    """The module whose output also carries these activations on, past `module`: a replacement must be added there."""


def resolve(model: LanguageModel, name: str) -> Site:
    """The site of that name. Raises UserError that names the near ones when there is none."""
    known = _lens_sites(model)
    block, _, rest = name.rpartition("blocks.")[2].partition(".")
    canonical = f"blocks.{block}.{ALIASES[rest]}" if name.startswith("blocks.") and rest in ALIASES else name
    if canonical in known:
        found = known[canonical]
        return Site(name, found.module, found.side, found.carrier)
    module, colon, side = name.rpartition(":")
    if not colon:
        module, side = name, "out"
    if side not in ("in", "out"):
        raise UserError(f"site {name!r}: after the colon stands 'in' or 'out', for a module's input or output")
    modules = _modules(model)
    if module in modules:
        return Site(name, module, side)  # type: ignore[arg-type]
    raise UserError(_unknown(model, name, [*known, *modules]))


def resolve_all(model: LanguageModel, sites: Sequence[str | Site]) -> dict[str, Site]:
    """Sites by name, from names and sites, in the order given. Raises UserError for none and for one given twice."""
    if not sites:
        raise UserError(f"no site is given: list those of the model with {_listing(model)}")
    found = [site if isinstance(site, Site) else resolve(model, site) for site in sites]
    by_name = {site.name: site for site in found}
    if len(by_name) < len(found):
        twice = next(site.name for index, site in enumerate(found) if site in found[:index])
        raise UserError(f"site {twice!r} is given twice: give each site once")
    return by_name


def list_sites(model: LanguageModel) -> list[str]:
    """Every name that resolves: those of transformer-lens in the order of the forward pass, then the modules."""
    return [*_lens_sites(model), *_modules(model)]


def site_name(model: LanguageModel, layer: int, location: str = "mlp") -> str:
    """The name of a usual site of a layer: location is one of `LOCATIONS`."""
    if location not in LOCATIONS:
        raise UserError(f"location {location!r}: allowed are {', '.join(LOCATIONS)}{near(location, LOCATIONS)}")
    family = family_of(model)
    if family is None:
        raise UserError(
            f"model {model.name!r} has the blocks of none of {', '.join(one.name for one in FAMILIES)}, so "
            f"{location!r} is not known in it: give a site as a module name; list them with {_listing(model)}"
        )
    layers = n_layers(model)
    if not 0 <= layer < layers:
        raise UserError(_no_layer(layer, layers))
    name = f"blocks.{layer}.{LOCATIONS[location]}"
    if name not in _lens_sites(model):
        why = (
            "attention and MLP read the same residual stream" if location == "resid_mid" else "its blocks differ there"
        )
        raise UserError(
            f"location {location!r}: this model has none in layer {layer}, because {why}; choose another one"
        )
    return name


def n_layers(model: LanguageModel) -> int:
    """Number of blocks; 0 where the model is of no known family."""
    found = _find(model)
    return 0 if found is None else len(found[2])


def family_of(model: LanguageModel) -> Family | None:
    """The family whose modules the model has, None if there is none."""
    found = _find(model)
    return None if found is None else found[0]


def _find(model: LanguageModel) -> tuple[Family, str, nn.ModuleList] | None:
    """The family, the name of its base with a dot behind (or nothing), and the blocks."""
    for name, blocks in model.hf.named_modules():
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            continue
        modules = {inner for inner, _ in blocks[0].named_modules()}
        for family in FAMILIES:
            base, match = name.removesuffix(family.blocks), name == family.blocks or name.endswith("." + family.blocks)
            if match and modules.issuperset(family.needs) and modules.isdisjoint(family.lacks):
                return family, base, blocks
    return None


def _lens_sites(model: LanguageModel) -> dict[str, Site]:
    """The sites with names of transformer-lens, in the order of the forward pass."""
    found = _find(model)
    if found is None:
        return {}
    family, base, blocks = found
    modules = {name for name, _ in model.hf.named_modules()}
    sites: list[Site] = []
    for layer, block in enumerate(blocks):
        top = f"{base}{family.blocks}.{layer}"
        parallel = getattr(block, "use_parallel_residual", False)
        for word, (module, side) in family.block_sites.items():
            if parallel and word == "hook_resid_mid":
                continue
            carrier = top if word in family.bypassed else None
            sites.append(Site(f"blocks.{layer}.{word}", f"{top}.{module}" if module else top, side, carrier))
    (embed, place), *last = family.base_sites.items()
    sites.insert(0, Site(embed, base + place[0], place[1]))
    sites += [Site(word, base + module, side) for word, (module, side) in last]
    return {site.name: site for site in sites if site.module in modules}


def _modules(model: LanguageModel) -> list[str]:
    """Modules that run: all but the model itself and mere lists of others."""
    return [
        name
        for name, module in model.hf.named_modules()
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


def _unknown(model: LanguageModel, name: str, known: list[str]) -> str:
    layer = re.match(r"blocks\.(\d+)\.", name)
    layers = n_layers(model)
    if layer and layers and int(layer[1]) >= layers:
        return f"site {name!r}: {_no_layer(int(layer[1]), layers)}"
    return f"site {name!r} is not in model {model.name!r}; list all with {_listing(model)}{near(name, known)}"


def _no_layer(layer: int, layers: int) -> str:
    return f"layer {layer}: this model has layers 0 to {layers - 1}"


def _listing(model: LanguageModel) -> str:
    return f"`python -m sparse_coding sites --model {model.name}`"
