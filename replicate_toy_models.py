"""Do sparse autoencoders find the true features? The toy study of 2022/23, from data to pictures.

A world of known features in superposition makes the data; dictionaries of many sizes and L1 weights are trained on it
side by side; each is compared with the truth; heat maps show where recovery works, next to what chance would give.

    python replicate_toy_models.py                                  the small world, minutes on a laptop
    python replicate_toy_models.py --preset full                    the published geometry and grid, for a GPU
    python replicate_toy_models.py --preset fast                    the same grid in fewer updates, for a CPU
    python replicate_toy_models.py --preset full --world hoagy-2023-06   with the data of the published runs
    python replicate_toy_models.py --architecture relu topk gated        newer dictionaries beside those of 2023
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from sparse_coding import toy_study
from sparse_coding.config import numbers, parse, to_dict
from sparse_coding.device import pick_device
from sparse_coding.dictionaries import settings_of
from sparse_coding.errors import UserError, reported
from sparse_coding.evaluation import record, save_dictionaries, stability
from sparse_coding.progress import Progress
from sparse_coding.provenance import provenance, short_hash
from sparse_coding.report.toy_report import write_toy_report
from sparse_coding.stores.objects import open_objects
from sparse_coding.sweep_flags import SweepFlags
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.estimate import estimate
from sparse_coding.training.micro_batches import plan_without_memory
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.run_folder import RunFolder
from sparse_coding.training.safety import Safety
from sparse_coding.training.settling import SettlingSettings
from sparse_coding.training.sweep import Member
from sparse_coding.training.sync import Sync
from sparse_coding.training.trainer import Trainer, TrainingSettings


@dataclass(frozen=True)
class Grid:
    """What is trained: every L1 value at every dictionary ratio and seed."""

    l1: tuple[str, ...]
    """L1 coefficients: numbers, or logspace:FIRST:LAST:HOW_MANY in powers of ten."""
    ratios: tuple[float, ...]
    """Dictionary sizes as multiples of the number of true features."""
    steps: int
    """Updates of each dictionary."""
    world: str
    """The toy world: quick, post-2022, hoagy-2023-06 (double uniform), hoagy-2023-07."""
    lr: float = 1e-3
    """Learning rate of the optimizer."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    """Adam, and how its learning rate moves."""
    settling: SettlingSettings = field(default_factory=SettlingSettings)
    """When a dictionary stops early."""


# The grid of the 2023 script, and one that shows the same picture on a quarter of the width in minutes.
GRIDS = {
    "full": Grid(("logspace:-2:2:17",), (0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32), 20_000, "hoagy-2023-07"),
    "quick": Grid(("logspace:-2:1:13",), (0.25, 0.5, 1, 2, 4), 5_000, "quick"),
}
# The full grid in less time: what it gives beside the schedule of 2023 is in benchmarks/results/toy_fast.md.
GRIDS["fast"] = replace(
    GRIDS["full"],
    steps=6_000,
    lr=8e-3,
    optimizer=OptimizerSettings(schedule="linear", warmup_steps=200, decay_fraction=0.2),
    settling=SettlingSettings(every=250, tolerance=3e-4, patience=6),
)


# In the form of 2023, whose L1 term is divided by the number of latents.
RELU_2023 = ("l1_scaling=toy-2023", "init=toy-2023", "decoder_bias=false", "remove_parallel_gradient=false")
# What the other architectures vary, on activations of norm 1 rather than sqrt(d_in).
NEWER = {
    "l1_coefficient": "0.02,0.05,0.1,0.2,0.4,0.8",
    "k": "1,2,3,4,6,8",
    "l0_coefficient": "0.003,0.01,0.03,0.1,0.3",
    "initial_threshold": "0.01",
}


@dataclass(frozen=True)
class Study:
    """Replicate the toy-model study of sparse autoencoders."""

    preset: Literal["auto", "quick", "full", "fast"] = "auto"
    """quick: a smaller world, under 4 minutes on 2 cores. full: the published geometry. fast: the same in fewer
    updates, with dictionaries that stop when they settle; close to full but for those that full leaves unfinished.
    auto: full where there is a GPU, quick elsewhere."""
    world: str | None = None
    """Another toy world than the preset's: quick, post-2022, hoagy-2023-06, hoagy-2023-07."""
    l1: tuple[str, ...] = ()
    """Other L1 coefficients than the preset's, such as 0.1 0.3 1 or logspace:-2:0:9."""
    architecture: tuple[str, ...] = ("relu",)
    """Several of relu (in the form of 2023), relu-april, lp, gated, topk, batchtopk, matryoshka, jumprelu and
    matching-pursuit side by side, each with a grid of its own; --l1 is relu's."""
    set: tuple[str, ...] = ()
    """Any setting of an architecture, as in run.py: topk.k=2,3,4 gated.l1_coefficient=0.1,0.2 topk.selection=abs."""
    ratios: tuple[float, ...] = ()
    """Other dictionary ratios than the preset's (latents per true feature)."""
    steps: int | None = None
    """Another number of updates than the preset's."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the dictionaries; each cell of the heat maps is their mean."""
    world_seed: int = 0
    """Seed of the world: directions, covariance, samples."""
    batch_size: int = 256
    """Samples per update."""
    lr: float | None = None
    """Another learning rate of Adam than the preset's (1e-3, that of 2023; fast: 8e-3 after a warm-up)."""
    stop_settled: bool | None = None
    """True, False: whether a dictionary whose loss falls no more stops early. By default it does with fast alone."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products; auto is bf16 where the hardware has it."""
    eval_samples: int = 100_000
    """Held-out samples for dead latents, L0 and reconstruction."""
    published_metrics: bool = False
    """Draw dead latents as published: counted on 2,560 samples, clipped at 100 in the picture."""
    device: str = "auto"
    """auto, cpu, cuda, mps."""
    out: Annotated[Path | None, arg(help_behavior_hint="(default: outputs/toy-...)")] = None
    """Run folder. The same command continues a run that was stopped."""
    fresh: bool = False
    """Start over, even if the folder holds a run."""
    checkpoint_seconds: float = 120.0
    """Seconds between two checkpoints; see --checkpoint-share."""
    sync: str | None = None
    """Copy the run to s3://bucket/prefix or a folder in the background, after each checkpoint and at the end. The same
    command on another machine goes on from there."""
    safety: Safety = field(default_factory=Safety)


def complete(study: Study) -> tuple[Study, Grid]:
    """The study with every choice of its preset filled in."""
    for flag, value in (("--batch-size", study.batch_size), ("--eval-samples", study.eval_samples)):
        if value < 1:
            raise UserError(f"{flag} is {value}: it must be at least 1")
    name = study.preset if study.preset != "auto" else "full" if pick_device("auto") == "cuda" else "quick"
    base = GRIDS[name]
    settling = {None: base.settling, True: GRIDS["fast"].settling, False: SettlingSettings()}
    chosen = replace(
        base,
        l1=study.l1 or base.l1,
        ratios=study.ratios or base.ratios,
        steps=base.steps if study.steps is None else study.steps,
        world=study.world or base.world,
        lr=base.lr if study.lr is None else study.lr,
        settling=settling[study.stop_settled],
    )
    return replace(study, preset=name), chosen


def sweep(study: Study, chosen: Grid, world: World) -> SweepFlags:
    """The dictionaries of the study, as flags of a sweep; ratios are latents per true feature there."""
    words: list[str] = []
    for name in study.architecture:
        if name == "relu":
            words += [f"relu.{word}" for word in RELU_2023]
        else:
            words += [f"{name}.{one}={values}" for one, values in NEWER.items() if one in settings_of(name)]
    per_feature = world.settings.n_features / world.settings.d_in
    if study.l1 and "relu" not in study.architecture:
        raise UserError("--l1 is relu's, which is not among the architectures: use --set gated.l1_coefficient=0.1,0.2")
    if "relu" in study.architecture:
        l1 = ",".join(repr(value) for value in numbers(chosen.l1, "--l1"))
        words.append(f"relu.l1_coefficient={l1}")
    return SweepFlags(
        architecture=study.architecture,
        ratios=tuple(ratio * per_feature for ratio in chosen.ratios),
        lr=(chosen.lr,),
        seeds=study.seeds,
        set=(*words, *study.set),
    )


def training_of(study: Study, chosen: Grid) -> TrainingSettings:
    """How the study trains."""
    return TrainingSettings(
        chosen.steps, chosen.optimizer, study.precision, max(1, chosen.steps // 100), settling=chosen.settling
    )


def main(study: Study) -> Path:
    study, chosen = complete(study)
    device = pick_device(study.device)

    # The data. A world is a set of directions and a law of which are active; batch number i is a function of (seed, i).
    world = World(preset(chosen.world, seed=study.world_seed), device)
    stream = WorldStream(world, study.batch_size)

    # The sweep: every architecture at every setting, size and seed.
    members = sweep(study, chosen, world).members(stream.widths)
    training = training_of(study, chosen)
    settings = {
        "kind": "toy",
        "world": to_dict(world.settings),
        "world_name": chosen.world,
        "grid": to_dict(chosen),
        "seeds": list(study.seeds),
        "batch_size": study.batch_size,
        "lr": chosen.lr,
        "architecture": list(study.architecture),
        "set": list(study.set),
        "training": to_dict(training),
        "eval_samples": study.eval_samples,
        "device": device,
    }
    out = study.out or Path("outputs") / f"toy-{study.preset}-{short_hash(settings)}"

    sync = Sync(open_objects(study.sync)) if study.sync else None
    with RunFolder(out, settings, study.fresh, sync) as folder:
        if folder.finished:
            print(f"the study in {out} is finished: drawing its report again (--fresh starts over)")
        else:
            describe(members, chosen, stream, training, device, study.safety)
            folder.note(provenance=provenance())
            folder.write_json("members.json", [member.to_dict() for member in members])
            train_and_measure(members, chosen.ratios, world, stream, training, study, device, folder)
        folder.note(pictures={"published_metrics": study.published_metrics})
        # The pictures: drawn from the data files alone, so they can be drawn again.
        return write_toy_report(folder.path)


def describe(
    members: list[Member], chosen: Grid, stream: WorldStream, training: TrainingSettings, device: str, safety: Safety
) -> None:
    world = stream.world.settings
    print(f"world {chosen.world}: {world.n_features} features in {world.d_in} dimensions")
    per_architecture = Counter(member.architecture for member in members)
    counts = ", ".join(f"{count} {name}" for name, count in per_architecture.items())
    print(f"grid: {counts}, ratios {' '.join(f'{ratio:g}' for ratio in chosen.ratios)}")
    with plan_without_memory(safety):
        less = "; less where dictionaries settle and stop" if training.settling.every else ""
        print(f"plan: {estimate(members, stream, training, device)}{less}", flush=True)


def train_and_measure(
    members: list[Member],
    ratios: tuple[float, ...],
    world: World,
    stream: WorldStream,
    training: TrainingSettings,
    study: Study,
    device: str,
    folder: RunFolder,
) -> None:
    trainer = Trainer(members, stream, training, device, folder, study.checkpoint_seconds, safety=study.safety)
    trainer.fit()
    save_dictionaries(trainer, folder.path)
    if study.safety.keep_best:
        with trainer.at_best() as kept:
            if kept:
                save_dictionaries(trainer, folder.path / "best")

    # Matching: against the truth, against the next larger dictionary, and on samples that training never saw.
    batches = toy_study.held_out(world, study.eval_samples, study.batch_size)
    with_larger = stability(members, trainer.dictionary)
    records = []
    with Progress("measuring", len(members), unit="dictionaries") as progress:
        for index, member in enumerate(members):
            reconstruction, metrics = toy_study.measure(trainer.dictionary(index), world, batches)
            ratio = member.settings.d_sae / world.settings.n_features
            metrics["mmcs_next_larger"] = with_larger[index]
            own = record(member, ratio, reconstruction, metrics)
            records.append({**own, "updates": trainer.updates(index)})
            progress.update(index + 1)
    folder.note(controls=toy_study.controls(world, ratios, batches, study.world_seed))
    folder.finish(records)


if __name__ == "__main__":
    with reported():
        study = parse(Study, sys.argv[1:], "python replicate_toy_models.py", __doc__ or "")
        print(f"report: {main(study)}")
