"""From token ids to a dictionary: a model of GPT-2 small's shape with random weights feeds the trainer beside it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_parts.measure import Meter, Sizes
from sparse_coding.activations.capture import rows
from sparse_coding.activations.fused import compile_blocks, fuse_gelu
from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.ring import RingStream
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokens import Contexts
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer

TOKENS = 300_000_000
"""What the aims are stated for."""
AT_ONCE = 20
"""Steps between two looks at the clock, for which the device is waited for."""


def measure(meter: Meter, sizes: Sizes) -> None:
    model, text = language_model(meter, sizes), random_text(sizes)
    same_rows(meter, sizes, model, text)
    small, large = sizes.batches
    first, last = sizes.sites
    alone: dict[int, float] = {}
    for layer in sizes.sites:
        what = f"the model up to layer {layer} alone"
        with meter.attempt(what):
            alone[layer] = model_alone(meter, sizes, model, text, layer, what)
    with meter.attempt("profile of the model"):
        profile(meter, sizes, model, text, last)
    if meter.cuda:
        compiled = language_model(meter, sizes)
        compile_blocks(compiled.hf)
        what = f"the model up to layer {last} alone, compiled"
        with meter.attempt(what):
            if meter.has_time(what, 40.0):
                rate = model_alone(meter, sizes, compiled, text, last, what)
                if rate > alone.get(last, 0.0):
                    model, alone = compiled, {last: rate}
    runs = [
        (last, small, 1, 180.0),
        (last, large, 1, 180.0),
        (last, large, sizes.members, 900.0),
        (first, small, 1, None),
    ]
    for layer, batch, members, aim in runs:
        what = f"tokens to {members} x topk 32x, layer {layer}, batch {batch:,}"
        with meter.attempt(what):
            if meter.has_time(what, 9.0 if meter.cuda else 0.5):
                whole(meter, sizes, model, text, what, layer, batch, members, alone.get(layer), aim)


def profile(meter: Meter, sizes: Sizes, model: LanguageModel, text: Contexts, layer: int) -> None:
    """Where the device's time goes in forward passes: gpu_model_profile.txt beside the results."""
    if not meter.cuda or meter.out is None:
        return
    chosen = np.arange(sizes.per_forward)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as taken:
        for _ in range(3):
            rows(model, text, chosen, [site(layer)], contexts_per_forward=len(chosen))
        meter.wait()
    table = taken.key_averages().table(sort_by="self_device_time_total", row_limit=25, max_name_column_width=60)
    name = "gpu_model_profile.txt"
    (meter.out / name).write_text(f"3 passes of the model up to layer {layer}\n{table}\n", encoding="utf-8")


def language_model(meter: Meter, sizes: Sizes) -> LanguageModel:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=sizes.vocabulary, n_positions=sizes.context, n_embd=sizes.d_in, n_layer=sizes.layers,
        n_head=sizes.heads, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    dtype, hf = torch.bfloat16 if meter.cuda else torch.float32, GPT2LMHeadModel(config)
    fuse_gelu(hf)  # as all models are loaded
    return LanguageModel.of(hf.to(dtype).to(meter.device))  # pyright: ignore[reportArgumentType]


def random_text(sizes: Sizes) -> Contexts:
    shape = sizes.contexts, sizes.context
    tokens = np.random.default_rng(0).integers(0, sizes.vocabulary, shape, dtype=np.uint16)
    return Contexts(tokens, None, 1, 0, tokens.size, 0, 0, {}, Path())


def site(layer: int) -> str:
    """The residual stream after `layer` blocks."""
    return f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"


def model_alone(meter: Meter, sizes: Sizes, model: LanguageModel, text: Contexts, layer: int, what: str) -> float:
    """Tokens a second of nothing but forward passes."""
    chosen = np.arange(sizes.per_forward)
    seconds = meter.seconds(lambda: rows(model, text, chosen, [site(layer)], contexts_per_forward=len(chosen)), 3.0)
    tokens, d = sizes.per_forward * sizes.context, sizes.d_in
    flop = layer * tokens * (24 * d**2 + 2 * sizes.context * d)  # attention is causal: half of 4 n d
    limit = tokens * meter.rates["square"] / flop if layer else None
    meter.add(what, tokens / seconds, "tokens/s", limit)
    return tokens / seconds


def same_rows(meter: Meter, sizes: Sizes, model: LanguageModel, text: Contexts) -> None:
    """Whether rows that were captured beside others are those of the plain stream."""
    what = "batches that differ from the plain stream's"
    with meter.attempt(what):
        some = Contexts(text.tokens[: 8 * sizes.per_forward], None, 1, 0, 0, 0, 0, {}, Path())
        batch = sizes.batches[0]
        n_batches = some.tokens.size // batch
        common: dict[str, Any] = {
            "batch_size": batch, "buffer_rows": max(batch, some.tokens.size // 3),
            "contexts_per_forward": sizes.per_forward,
        }  # fmt: skip
        ring = RingStream(model, some, [site(1)], n_batches=n_batches, **common)
        plain = ActivationStream(model, some, [site(1)], **common)
        differ = [
            step for step in range(n_batches) if not torch.equal(ring.batch(step)[site(1)], plain.batch(step)[site(1)])
        ]
        meter.add(what, len(differ), "batches", 0, note=f"of {n_batches}")


def whole(
    meter: Meter, sizes: Sizes, model: LanguageModel, text: Contexts, what: str, layer: int, batch: int, members: int,
    alone: float | None, aim: float | None,
) -> None:  # fmt: skip
    """Run for a while, and say what 300 million tokens would take at this rate."""
    name, n_batches = site(layer), text.tokens.size // batch
    began = time.monotonic()
    stream = RingStream(
        model, text, [name], n_batches=n_batches, batch_size=batch, buffer_rows=max(sizes.buffer_rows, batch),
        contexts_per_forward=sizes.per_forward,
    )  # fmt: skip
    sweep = grid(
        "topk",
        {name: sizes.d_in},
        [sizes.d_sae / sizes.d_in],
        varied={"k": [sizes.k + i for i in range(members)]},
        dead_latents="none",
    )
    trainer = Trainer(sweep, stream, TrainingSettings(n_batches), str(meter.device))
    for _ in range(8):  # the first block, kernels, the graph
        trainer.advance()
    meter.wait()
    start = time.monotonic() - began
    began, steps, budget = time.monotonic(), 0, 0.0 if meter.quick else min(meter.left, 7.0)
    while not steps or (time.monotonic() - began < budget and trainer.step + AT_ONCE <= n_batches):
        for _ in range(AT_ONCE):
            trainer.advance()
        steps += AT_ONCE
        meter.wait()
    rate = steps * batch / (time.monotonic() - began)
    step_alone = meter.rates.get(f"topk 32x, batch {batch:,}")
    limit = 1 / (1 / alone + members / step_alone) if alone and step_alone else None
    took = start + TOKENS / rate
    note = f"{TOKENS / 1e6:.0f} M tokens in {took:.0f} s (from {steps * batch / 1e6:.3g} M; start {start:.0f} s)"
    if meter.cuda:
        note += f", {meter.waits(trainer.advance):g} waits a step, {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
        note += ", NOT RECORDED" if trainer.graphs.refused else ""
    meter.add(what, rate, "tokens/s", limit, aim and TOKENS / aim, note)
