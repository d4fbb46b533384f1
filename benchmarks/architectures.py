"""Every architecture and every way with dead latents, on a world whose true features are known.

    python benchmarks/architectures.py                    the quick world; writes benchmarks/results/architectures.*
    python benchmarks/architectures.py --world hoagy-2023-07 --ratio 1 --steps 5000     the geometry of 2023, for a GPU
    python benchmarks/architectures.py --gpt RUN          draw the frontiers of a finished `run.py --architecture ...`

Each row is trained at a handful of settings on one stream with seed 0; the setting with the highest MMCS is trained
again with the other seeds. All have the same budget, learning rate and number of latents. Controls stand below.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparse_coding import toy_study
from sparse_coding.evaluation import record
from sparse_coding.provenance import provenance
from sparse_coding.report import architecture_frontier
from sparse_coding.report.records import knob_name
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

RESULTS, IMAGES = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs" / "images" / "architectures"
SHOWN = ("mmcs", "fraction_above_0.9", "mmcs_dict_to_truth", "l0", "fvu", "dead")
L1, K = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), (2, 3, 4, 6)


NEAR_ZERO = {"initial_threshold": 0.01}  # the default suits activations of norm sqrt(d_in), these have norm 1


@dataclass(frozen=True)
class Row:
    """One line of the table: an architecture with its settings, and what is varied to find its best."""

    name: str
    architecture: str
    varied: Mapping[str, Sequence[Any]]
    shared: Mapping[str, Any] = field(default_factory=dict)
    resample: bool = False


ROWS = (
    Row("relu", "relu", {"l1_coefficient": L1}),
    Row("relu, tied", "relu", {"l1_coefficient": L1}, {"tied": True}),
    Row("relu, resampling", "relu", {"l1_coefficient": L1}, resample=True),
    Row("relu, ghost gradients", "relu", {"l1_coefficient": L1}, {"dead_latents": "ghost"}),
    Row("relu, AuxK", "relu", {"l1_coefficient": L1}, {"dead_latents": "auxk"}),
    Row("relu-april", "relu-april", {"l1_coefficient": L1}),
    Row("lp, p annealed to 0.2", "lp", {"l1_coefficient": L1}),
    Row("lp, p = 0.5", "lp", {"l1_coefficient": L1}, {"p": 0.5, "p_end": 0.5}),
    Row("gated", "gated", {"l1_coefficient": L1}),
    Row("topk", "topk", {"k": K}),
    Row("topk, no AuxK", "topk", {"k": K}, {"dead_latents": "none"}),
    Row("topk, multi-TopK", "topk", {"k": K}, {"multi_topk": True}),
    Row("topk, abs", "topk", {"k": K}, {"selection": "abs"}),
    Row("topk, GroupMax", "topk", {"k": K}, {"selection": "group"}),
    Row("batchtopk", "batchtopk", {"k": K}),
    Row("matryoshka", "matryoshka", {"k": K}),
    Row("matryoshka, random prefixes", "matryoshka", {"k": K}, {"prefixes": "random"}),
    Row("jumprelu", "jumprelu", {"l0_coefficient": (0.01, 0.03, 0.1, 0.3)}, NEAR_ZERO),
    Row("jumprelu, target L0", "jumprelu", {"target_l0": (2, 3, 4, 6)}, NEAR_ZERO),
    Row("matching-pursuit", "matching-pursuit", {"k": K}),
)


def train(rows_and_members: Sequence[tuple[Row, Member]], world: World, flags: argparse.Namespace) -> list[dict]:
    """Train members side by side on one stream and measure each against the truth."""
    found: list[dict] = []
    batches = toy_study.held_out(world, 50_000, flags.batch_size)
    optimizer = OptimizerSettings(
        warmup_steps=100, schedule="linear", resample_warmup_steps=100
    )  # fmt: skip
    for resample in (False, True):
        chosen = [(row, member) for row, member in rows_and_members if row.resample == resample]
        if not chosen:
            continue
        dead = DeadSettings(window=flags.steps * flags.batch_size // 20)
        if resample:
            dead = replace(dead, resample_every=flags.steps // 8, resample_times=4, resample_rows=50_000)
        settings = TrainingSettings(
            flags.steps, optimizer, flags.precision, log_every=flags.steps // 10,
            sparsity_warmup_steps=flags.steps // 20, dead=dead,
        )  # fmt: skip
        stream = WorldStream(world, flags.batch_size)
        trainer = Trainer([member for _, member in chosen], stream, settings, flags.device)
        trainer.fit()
        for index, (row, member) in enumerate(chosen):
            reconstruction, metrics = toy_study.measure(trainer.dictionary(index), world, batches)
            metrics.pop("max_cosines")
            known = record(member, flags.ratio, reconstruction, metrics)
            found.append({"row": row.name, **known, "variant": row.name.partition(", ")[2]})
            found[-1].pop("density")
    return found


def members_of(row: Row, world: World, ratio: float, lr: float, seeds: Sequence[int], varied: Mapping) -> list[Member]:
    settings = world.settings
    latents_per_width = ratio * settings.n_features / settings.d_in
    return grid(
        row.architecture, {"synthetic": settings.d_in}, [latents_per_width], [lr], seeds, varied, **row.shared
    )  # fmt: skip


def best_settings(found: Sequence[dict]) -> dict[str, dict]:
    """Row -> the record of its setting with the highest MMCS."""
    best: dict[str, dict] = {}
    for one in found:
        if one["row"] not in best or one["metrics"]["mmcs"] > best[one["row"]]["metrics"]["mmcs"]:
            best[one["row"]] = one
    return best


def table(found: Sequence[dict], best: Mapping[str, dict], controls: Mapping[str, Any]) -> str:
    lines = ["| | best setting | MMCS | found (cos > .9) | MMCS back | L0 | FVU | dead |", "|" + "---|" * 8]
    for row in ROWS:
        if row.name not in best:
            continue
        (knob,) = row.varied
        value = best[row.name]["settings"][knob]
        same = [one["metrics"] for one in found if one["row"] == row.name and one["settings"][knob] == value]
        cells = [spread([one[name] for one in same], name) for name in SHOWN]
        lines.append(f"| {row.name} | {knob} {value:g} | {' | '.join(cells)} |")
    for name, metrics in controls["baselines"].items():
        cells = [spread([metrics[key]], key) for key in SHOWN]
        lines.append(f"| *control: {name}* | {metrics['n_atoms']} atoms | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_toy(found: Sequence[dict], true_l0: float) -> None:
    """The frontiers of the toy world, of the first row of each architecture."""
    first = {row.architecture: row.name for row in reversed(ROWS)}
    print(
        architecture_frontier(
            [one for one in found if one["row"] in first.values()], IMAGES / "toy.png", true_l0=true_l0
        )
    )


def draw_gpt(run: Path) -> None:
    """What docs/architectures shows of a finished run.py: the frontier, one with each highlighted, and a table."""
    records = [json.loads(line) for line in (run / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    settings = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    print(architecture_frontier(records, IMAGES / "frontier.png"))
    for name in dict.fromkeys(one["architecture"] for one in records):
        print(architecture_frontier(records, IMAGES / f"{name}.png", highlight=name))
    flags, facts, data = settings["run"], settings["provenance"], settings["data"]
    lines = [
        "# Every architecture on a language model\n",
        f"{flags['model']['model']}, {', '.join(data['sites'])}, {records[0]['d_sae']:,} latents, {data['tokens']:,} "
        f"tokens, seed {records[0]['seed']}, one sweep on one stream: "
        f"`python run.py --architecture all --ratios 2 --set matching-pursuit.k=8,16,32`, {facts['date'][:10]}, torch "
        f"{facts['versions']['torch']}, {settings['training']['seconds'] / 60:.0f} minutes of training beside other "
        "work. Table and pictures: `python benchmarks/architectures.py --gpt RUN`.\n",
        "| | setting | L0 | FVU | loss recovered | dead |",
        "|" + "---|" * 6,
    ]
    for one in records:
        knob = knob_name([one])
        metrics = one["metrics"]
        lines.append(
            f"| {one['architecture']} | {knob} {one[knob]:g} | {metrics['l0']:.1f} | {metrics['fvu']:.3f} | "
            f"{metrics['ce_recovered_zero']:.3f} | {metrics['dead']} |"
        )
    (RESULTS / "architectures-gpt.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def spread(values: Sequence[float], name: str) -> str:
    """Mean ± sample standard deviation."""
    digits = {"l0": 2, "dead": 1}.get(name, 3)
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="quick")
    parser.add_argument("--ratio", type=float, default=1.5, help="latents per true feature")
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", help="only these rows of the table, by name")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="another name than results/architectures[-WORLD]")
    parser.add_argument("--gpt", type=Path, help="a finished run to draw the pictures of docs/architectures from")
    parser.add_argument("--redraw", action="store_true", help="draw docs/images/architectures/toy.png again")
    flags = parser.parse_args()
    if flags.gpt:
        draw_gpt(flags.gpt)
        return
    if flags.redraw:
        kept = json.loads((RESULTS / "architectures.json").read_text(encoding="utf-8"))
        draw_toy(kept["records"], kept["controls"]["l0_true"])
        return
    world = World(preset(flags.world), flags.device)
    rows = [row for row in ROWS if not flags.rows or row.name in flags.rows]
    began = time.perf_counter()
    first = [
        (row, m) for row in rows for m in members_of(row, world, flags.ratio, flags.lr, flags.seeds[:1], row.varied)
    ]
    found = train(first, world, flags)
    best = best_settings(found)
    again = []
    for row in rows if flags.seeds[1:] else ():
        (knob,) = row.varied
        chosen = {knob: [best[row.name]["settings"][knob]]}
        again += [(row, m) for m in members_of(row, world, flags.ratio, flags.lr, flags.seeds[1:], chosen)]
    if again:
        found += train(again, world, flags)
    seconds = time.perf_counter() - began
    batches = toy_study.held_out(world, 20_000, flags.batch_size)
    controls = toy_study.controls(world, [flags.ratio], batches, 0)
    facts = provenance()
    settings = world.settings
    header = (
        f"# Every architecture on known truth\n\nWorld {flags.world}: {settings.n_features} features in "
        f"{settings.d_in} dimensions, {controls['l0_true']:.2f} active in a sample. "
        f"{round(flags.ratio * settings.n_features)} latents, {flags.steps:,} steps of {flags.batch_size}, "
        f"Adam {flags.lr:g}, best of the settings tried by MMCS, {len(flags.seeds)} seeds (mean ± standard "
        f"deviation).\n\n"
        f"`python benchmarks/architectures.py {' '.join(sys.argv[1:])}`".rstrip()
        + f", {facts['date'][:10]}, torch "
        f"{facts['versions']['torch']}, {facts['gpu'] or str(torch.get_num_threads()) + ' CPU threads'}, "
        f"{seconds / 60:.0f} minutes.\n\n"
    )
    text = header.replace(" `,", "`,") + table(found, best, controls)
    text += (
        "\n\nMMCS: mean over the true features of the largest cosine with an atom. Found: share of features with a "
        "cosine above .9. MMCS back: mean over atoms of the largest cosine with a feature; atoms beyond the number of "
        "features have nothing to find. L0, FVU and dead latents on 50,000 held-out samples without noise.\n"
    )
    print(text)
    if flags.world == "quick" and not flags.out and not flags.rows:
        draw_toy(found, controls["l0_true"])
    out = flags.out or RESULTS / ("architectures" if flags.world == "quick" else f"architectures-{flags.world}")
    out.with_suffix(".md").write_text(text, encoding="utf-8")
    data = {"provenance": facts, "seconds": seconds, "flags": vars(flags) | {"out": None}, "controls": controls}
    out.with_suffix(".json").write_text(json.dumps({**data, "records": found}, indent=1, default=str))


if __name__ == "__main__":
    main()
