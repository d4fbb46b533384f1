"""Fake runs of many architectures on one stream: every knob there is, variants, transcoders, several seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tests.report.fake_runs import write_lines

L1 = (0.5, 1.0, 2.0, 4.0, 8.0)
K = (8, 16, 32, 64)
KINDS: dict[tuple[str, str], tuple[str, tuple[float, ...], float]] = {
    ("relu", ""): ("l1_coefficient", L1, 1.0),
    ("relu-april", ""): ("l1_coefficient", L1, 0.97),
    ("lp", ""): ("l1_coefficient", L1, 0.93),
    ("gated", ""): ("l1_coefficient", L1, 0.86),
    ("topk", ""): ("k", K, 0.8),
    ("topk", "selection_abs"): ("k", K, 0.77),
    ("batchtopk", ""): ("k", K, 0.75),
    ("matryoshka", ""): ("k", K, 0.82),
    ("jumprelu", ""): ("l0_coefficient", (0.25, 0.5, 1.0, 2.0, 4.0), 0.74),
    ("jumprelu", "penalty_tanh"): ("target_l0", (10, 20, 40, 80), 0.79),
    ("matching-pursuit", ""): ("k", K, 0.7),
}
"""Architecture and variant -> its knob, the values of it, and how good it is (the smaller the better)."""


def member(
    kind: tuple[str, str], value: float, ratio: float = 4.0, seed: int = 0, site: str = "blocks.2.mlp.hook_post",
    target: str | None = None, d_in: int = 64, toy: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """One record; L0 is k, the target, or falls with the penalty."""
    knob, _, factor = KINDS[kind]
    l0 = {"l1_coefficient": 45 * value**-0.9, "l0_coefficient": 30 * value**-0.7}.get(knob, value) * (1 + 0.03 * seed)
    fvu = min(0.98, factor * 1.1 * l0**-0.42 * ratio**-0.12)
    d_sae = round(d_in * ratio)
    numbers = {knob: value, **({"l0_coefficient": 1.0} if knob == "target_l0" else {})}
    if kind[0] == "jumprelu":
        numbers = {"target_l0": 0.0, "bandwidth": 0.05, **numbers}
    edges = [round(-6 + 0.25 * i, 2) for i in range(25)]
    counts = [round(1000 * math.exp(-((e + 0.5 - math.log10(l0 / d_sae)) ** 2) / factor)) for e in edges[:-1]]
    quality = math.exp(-(math.log2(l0 / 16) ** 2) / (9 / factor))
    found = {"fvu": fvu, "mse": fvu / 50, "l0": l0, "l1": 0.7 * l0, "dead": round(0.1 * d_sae), "dead_fraction": 0.1,
             "cosine": math.sqrt(1 - fvu), "relative_bias": 0.96}  # fmt: skip
    found |= {"mmcs": 1 - 0.5 * factor * (1 - 0.8 * quality), "l0_true": 16.0} if toy else {
        "ce_recovered_zero": 1 - 1.1 * fvu**1.5, "kl_recovered_mean": 1 - fvu**1.4}  # fmt: skip
    words = [*(word for word in kind if word), str(d_sae), f"{knob}_{value:g}", f"seed_{seed}"]
    return {
        "name": "-".join([*([] if toy else [site.replace(".", "_"), *([target] if target else [])]), *words]),
        "site": "synthetic" if toy else site,
        "architecture": kind[0],
        "variant": kind[1],
        "target": target,
        "d_in": d_in,
        "d_sae": d_sae,
        "ratio": ratio,
        **numbers,
        "lr": 1e-3,
        "seed": seed,
        "settings": {"d_sae": d_sae, **numbers},
        "metrics": found,
        "density": {"log10_edges": edges, "counts": counts},
    }


def members(ratios: tuple[float, ...] = (4.0,), seeds: int = 1, kinds: Any = tuple(KINDS), **facts: Any) -> list[dict]:
    """Every value of every kind's knob."""
    return [
        member(kind, value, ratio, seed, **facts)
        for kind in kinds for ratio in ratios for value in KINDS[kind][1] for seed in range(seeds)
    ]  # fmt: skip


def run_of(folder: Path, records: list[dict[str, Any]], controls: dict[str, Any] | None = None) -> Path:
    """A run folder that holds these records and a log of them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "results.jsonl", records)
    (folder / "members.json").write_text(json.dumps([{"name": record["name"]} for record in records]))
    (folder / "settings.json").write_text(json.dumps({"run": {"model": "gpt2"}, "controls": controls or {}}))
    log = []
    for step in range(0, 2001, 100):
        rest = math.exp(-step / 400)
        own = [record["metrics"] for record in records]
        log.append({"step": step, "tokens": step * 4096, "loss": [m["mse"] * (1 + 8 * rest) for m in own],
                    "l0": [m["l0"] * (1 + 9 * rest) for m in own], "dead": [m["dead"] for m in own],
                    "fvu": [min(1.0, m["fvu"] + rest) for m in own]})  # fmt: skip
    write_lines(folder / "log.jsonl", log)
    return folder
