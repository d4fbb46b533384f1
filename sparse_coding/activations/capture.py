"""Activations of a language model at some sites, and the model with activations at a site replaced.

Plain forward hooks on the Hugging Face model. A capture stops the forward pass as soon as the last site asked for has
been reached: the layers above and the unembedding, often most of the work, are never computed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.sites import Site, resolve, resolve_all
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError

Tokens = Int[Tensor, "B S"] | Int[np.ndarray, "B S"]
Mask = Bool[Tensor, "B S"] | Bool[np.ndarray, "B S"]
Replace = Callable[[Tensor], Tensor]

TOKENS_PER_FORWARD = {"cuda": 32_768}
ELSEWHERE = 4_096  # tokens in one forward pass on a CPU: a few times as many gain nothing and cost memory


class _Done(Exception):
    """Every site has been reached."""


def capture(
    model: LanguageModel, tokens: Tokens, sites: Sequence[str | Site], *, attention_mask: Mask | None = None
) -> dict[str, Float[Tensor, "B S d_in"]]:
    """Activations at each site, in the model's dtype and on its device, from one forward pass that stops early.

    attention_mask: False where the model must not attend (padding). The tensors are ordinary ones without gradients,
    so that a trainer can use them under autograd. Where a module runs several times in a forward pass, the first
    counts. Raises UserError for an unknown site, one that gives no tensor [B S d_in], and tokens the model cannot take.
    """
    chosen = resolve_all(model, sites)
    found: dict[str, Tensor] = {}

    def keep(site: Site, x: Any) -> None:
        if site.name not in found:
            found[site.name] = _as_activations(site, x, tuple(tokens.shape))
            if len(found) == len(chosen):
                raise _Done

    with _hooked() as hooks, torch.no_grad():
        for site in chosen.values():
            module = model.hf.get_submodule(site.module)
            if site.side == "in":
                # The default argument binds this site, not the last one.
                hook: Any = lambda _, args, kwargs, site=site: keep(site, _first(args, kwargs))  # noqa: E731
                hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            else:
                hook = lambda _, args, output, site=site: keep(site, _first_output(output))  # noqa: E731
                hooks.append(module.register_forward_hook(hook))
        try:
            _forward(model, tokens, attention_mask)
        except _Done:
            return {name: found[name] for name in chosen}
    missed = [name for name in chosen if name not in found]
    raise UserError(f"site {missed[0]!r}: the model does not run that module on its own; choose another site")


def rows(
    model: LanguageModel,
    contexts: Contexts,
    which: slice | Sequence[int] | Int[np.ndarray, " n"],
    sites: Sequence[str | Site],
    *,
    contexts_per_forward: int | None = None,
) -> dict[str, Float[Tensor, "rows d_in"]]:
    """Activations at each site of the unmasked positions of some contexts, in the order of contexts and positions.

    Padding is not attended to; tokens that are only excluded (special ones) are read by the model but give no row.
    """
    index = np.arange(len(contexts.tokens))[which] if isinstance(which, slice) else np.asarray(which, dtype=np.int64)
    if not len(index):
        raise UserError("no context is asked for: there must be at least one to take activations from")
    chosen_sites = list(resolve_all(model, sites).values())
    per_forward = contexts_per_forward or default_contexts_per_forward(model, contexts)
    kept = rows_per_context(contexts, index)
    n_rows, start = int(kept.sum()), 0
    buffers: dict[str, Tensor] = {}
    for first in range(0, len(index), per_forward):
        part = index[first : first + per_forward]
        captured = capture(model, contexts.tokens[part], chosen_sites, attention_mask=attended(contexts, part))
        chosen = None
        if contexts.mask is not None:
            chosen = _on_device(torch.from_numpy(np.flatnonzero(contexts.mask[part])), model.device)
        stop = start + int(kept[first : first + per_forward].sum())
        for name, x in captured.items():
            flat = x.flatten(0, 1)
            if name not in buffers:
                buffers[name] = torch.empty(n_rows, x.shape[-1], dtype=x.dtype, device=x.device)
            buffers[name][start:stop] = flat if chosen is None else flat.index_select(0, chosen)
        start = stop
    return buffers


def splice(
    model: LanguageModel,
    tokens: Tokens,
    site: str | Site,
    replacement: Replace | None,
    *,
    mask: Mask | None = None,
    attention_mask: Mask | None = None,
    with_gradient: bool = False,
) -> Float[Tensor, "B S V"]:
    """Logits of the whole model with the activations x [B S d_in] at a site replaced by `replacement(x)`.

    replacement None: the untouched model. mask: True where to replace; by default wherever the model may attend.
    with_gradient: whether gradients go from the logits back to what `replacement` made; x itself never has one.
    An input is replaced for the module that takes it; where it also goes on beside that module in the residual stream
    (`hook_resid_mid`), it is replaced there too. Raises UserError for a model that predicts no tokens.
    """
    if model.kind is None:
        raise UserError(f"model {model.name!r} has no trained head that predicts tokens, so it has no loss to compare")
    found = site if isinstance(site, Site) else resolve(model, site)
    with _hooked() as hooks, torch.set_grad_enabled(with_gradient):
        if replacement is not None:
            where = attention_mask if mask is None else mask
            hooks += _replacing(model, found, replacement, None if where is None else _as_tensor(where, model.device))
        return _forward(model, tokens, attention_mask).logits


def widths(model: LanguageModel, sites: Sequence[str | Site]) -> dict[str, int]:
    """Width of the activations at each site, found by running four tokens."""
    tokens = np.zeros((1, min(4, model.max_positions or 4)), np.int64)
    return {name: x.shape[-1] for name, x in capture(model, tokens, sites).items()}


def rows_per_context(contexts: Contexts, index: Int[np.ndarray, " n"] | None = None) -> Int[np.ndarray, " n"]:
    """How many positions of each context are not masked."""
    if contexts.mask is None:
        n = len(contexts.tokens) if index is None else len(index)
        return np.full(n, contexts.tokens.shape[1], np.int64)
    mask = contexts.mask if index is None else contexts.mask[index]
    return np.count_nonzero(mask, axis=1).astype(np.int64)


def attended(contexts: Contexts, index: Int[np.ndarray, " n"]) -> Bool[np.ndarray, "n S"] | None:
    """The attention mask of some contexts: False on padding, which ends the last one; None where there is none."""
    n, context = contexts.tokens.shape
    if not contexts.n_padding or not (index == n - 1).any():
        return None
    mask = np.ones((len(index), context), bool)
    mask[index == n - 1, context - contexts.n_padding :] = False
    return mask


def default_contexts_per_forward(model: LanguageModel, contexts: Contexts) -> int:
    """So many contexts that a forward pass keeps the device busy."""
    return max(1, TOKENS_PER_FORWARD.get(model.device.type, ELSEWHERE) // contexts.tokens.shape[1])


# ---- the forward pass


def _forward(model: LanguageModel, tokens: Tokens, attention_mask: Mask | None) -> Any:
    _check_tokens(model, tokens)
    given: dict[str, Any] = {"input_ids": _as_tensor(tokens, model.device).long()}
    if attention_mask is not None:
        given["attention_mask"] = _as_tensor(attention_mask, model.device).long()
    if "use_cache" in inspect.signature(model.hf.forward).parameters:
        given["use_cache"] = False
    return model.hf(**given)


def _check_tokens(model: LanguageModel, tokens: Tokens) -> None:
    n, longest = tokens.shape[1], model.max_positions
    if longest is not None and n > longest:
        raise UserError(f"contexts of {n} tokens: model {model.name!r} takes at most {longest}; set a shorter context")
    # A tensor on a GPU is not looked at: that would make the CPU wait.
    if (isinstance(tokens, np.ndarray) or tokens.device.type == "cpu") and int(tokens.max()) >= model.vocab_size:
        raise UserError(
            f"token {int(tokens.max())} is not in model {model.name!r}, which knows {model.vocab_size} tokens: "
            "the text was tokenized for another model"
        )


def _as_tensor(values: Tensor | np.ndarray, device: torch.device) -> Tensor:
    if isinstance(values, np.ndarray):
        # torch counts in signed numbers; a copy also because a memory map is read-only.
        values = torch.from_numpy(values.astype(bool if values.dtype == bool else np.int64))
    return _on_device(values, device)


def _on_device(values: Tensor, device: torch.device) -> Tensor:
    """Without waiting for the device where it is a GPU."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


# ---- hooks


@contextmanager
def _hooked() -> Iterator[list[Any]]:
    """A list for the handles of hooks, which are removed whatever happens."""
    handles: list[Any] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


def _replacing(model: LanguageModel, site: Site, replacement: Replace, where: Tensor | None) -> list[Any]:
    """Register the hooks of a splice; the first run of the module counts, as in `capture`."""
    change: list[Tensor] = []

    def replaced(x: Any) -> Tensor:
        old = _as_activations(site, x, None)
        new = replacement(old).to(old)
        if new.shape != old.shape:
            raise UserError(
                f"a replacement at {site.name} made {tuple(new.shape)} of {tuple(old.shape)}: keep the shape"
            )
        if where is not None:
            new = torch.where(where[..., None], new, old)
        change.append(new - old)
        return new.reshape(x.shape)

    def at_input(
        _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if change:
            return None
        new = replaced(_first(args, kwargs))
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, _keyword(kwargs): new}

    def at_output(_: Any, __: Any, output: Any) -> Any:
        return output if change else _with_first(output, replaced(_first_output(output)))

    def carried_on(_: Any, __: Any, output: Any) -> Any:
        return _with_first(output, _first_output(output) + change[0])

    module = model.hf.get_submodule(site.module)
    if site.side == "in":
        handles: list[Any] = [module.register_forward_pre_hook(at_input, with_kwargs=True)]
    else:
        handles = [module.register_forward_hook(at_output)]
    if site.carrier is not None:
        handles.append(model.hf.get_submodule(site.carrier).register_forward_hook(carried_on))
    return handles


def _keyword(kwargs: dict[str, Any]) -> str:
    """The keyword under which a module gets its activations."""
    if "hidden_states" in kwargs:
        return "hidden_states"
    return next((name for name, value in kwargs.items() if isinstance(value, Tensor)), "")


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else kwargs.get(_keyword(kwargs))


def _first_output(output: Any) -> Any:
    """A module gives a tensor, a tuple whose first element is meant, or a Hugging Face output, likewise."""
    if isinstance(output, dict):
        return next(iter(output.values()), None)
    return output[0] if isinstance(output, tuple | list) else output


def _with_first(output: Any, new: Tensor) -> Any:
    if isinstance(output, dict):
        output[next(iter(output))] = new
        return output
    return type(output)((new, *output[1:])) if isinstance(output, tuple | list) else new


def _as_activations(site: Site, x: Any, shape: tuple[int, ...] | None) -> Tensor:
    """x as [B S d_in], heads side by side."""
    if isinstance(x, Tensor) and x.is_floating_point() and x.ndim >= 3 and shape in (None, tuple(x.shape[:2])):
        return x.detach().flatten(2)
    what = f"{tuple(x.shape)} of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
    tokens = "" if shape is None else f" {shape}"
    raise UserError(
        f"site {site.name!r} gives {what}, not one row of numbers for each of the tokens{tokens}: choose another site"
    )
