"""The 2023 toy grid: 17 L1 values x 9 sizes, one stream drawn on the device, every update one CUDA graph."""

from __future__ import annotations

import torch

from benchmarks.gpu_parts.measure import Meter, Sizes
from sparse_coding.synthetic import World, preset
from sparse_coding.synthetic.on_device import DeviceWorldStream
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer

STEPS, BATCH, AIM = 20_000, 256, 60.0
ADAM_BYTES = 28


def measure(meter: Meter, sizes: Sizes) -> None:
    world = World(preset("hoagy-2023-07"), meter.device)
    stream = DeviceWorldStream(world, BATCH)
    counter = iter(range(10**9))
    seconds = meter.seconds(lambda: stream.batch(next(counter)), 1.0)
    meter.add(f"a batch of {BATCH} samples drawn on the device", 1e3 * seconds, "ms")

    d_in, n_features = world.settings.d_in, world.settings.n_features
    l1 = [10 ** (e / 4) for e in range(-8, 9)][: sizes.toy_values]
    ratios = [ratio * n_features / d_in for ratio in sizes.toy_ratios]
    members = grid(
        "relu", {"synthetic": d_in}, ratios, varied={"l1_coefficient": l1}, l1_scaling="toy-2023", init="toy-2023",
        decoder_bias=False, remove_parallel_gradient=False,
    )  # fmt: skip
    trainer = Trainer(members, stream, TrainingSettings(STEPS), str(meter.device))
    size = sum(member.settings.d_sae for member in members) * d_in
    limit = 10 * BATCH * size / meter.rates["square"] + 2 * ADAM_BYTES * size / meter.rates["copy"]

    budget = min(8.0, meter.left / 3)
    early = meter.seconds(trainer.advance, budget, rounds=3)
    while trainer.step < sizes.toy_trained:
        trainer.advance()
    late = meter.seconds(trainer.advance, budget, rounds=3)
    what = f"a step of all {len(members)} dictionaries"
    note = "NOT RECORDED" if meter.cuda and trainer.graphs.refused else ""
    meter.add(f"{what}, at first", 1e3 * early, "ms", 1e3 * limit, note=note)
    if meter.cuda:
        note = f"{meter.waits(trainer.advance):g} waits a step, {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
    meter.add(f"{what}, after {trainer.step:,}", 1e3 * late, "ms", 1e3 * limit, note=note)
    total = sizes.toy_trained * (early + late) / 2 + (STEPS - sizes.toy_trained) * late
    note = f"{STEPS:,} steps, extrapolated from those above"
    meter.add(f"the whole grid of {len(members)}", total, "s", STEPS * limit, AIM, note)
