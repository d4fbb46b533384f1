"""Fake run folders: smooth functions of L1 and ratio that look like the real thing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = "<script>alert(1)</script>"


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def chance(ratio: float) -> float:
    return 0.205 + 0.0145 * math.log2(ratio)


def ceiling(ratio: float) -> float:
    return min(1.0, ratio) + max(0.0, 1 - ratio) * chance(ratio)


def toy_run(folder: Path, n_l1: int = 17, n_ratios: int = 9, seeds: int = 2, n_features: int = 128) -> Path:
    """A toy study whose good cells lie on the diagonal l1 = ratio, with every control."""
    folder.mkdir(parents=True, exist_ok=True)
    l1s = [10 ** (e / 4) for e in range(-8, -8 + n_l1)]
    ratios = [2.0**e for e in range(-3, -3 + n_ratios)]
    records = []
    for seed in range(seeds):
        for ratio in ratios:
            for l1 in l1s:
                records.append(_toy_record(l1, ratio, seed, n_features, ratio == ratios[-1]))
    write_lines(folder / "results.jsonl", records)
    controls = {
        "chance_mmcs": {str(r): chance(r) for r in ratios},
        "ceiling": {str(r): ceiling(r) for r in ratios},
        "collapse_l1": {str(r): 4 * r for r in ratios},
        "expected_dead": 33,
        "l0_true": 5.0,
        "data_mean_square": 0.0066,
        "baselines": {
            "random": {"mmcs": {str(r): chance(r) for r in ratios}, "fvu": 0.9, "mse": 0.0058, "l0": 60.0},
            "pca": {"mmcs": 0.31, "fvu": 0.12, "mse": 0.0008, "l0": 128.0},
            "ica": {"mmcs": 0.62, "fvu": 0.12, "mse": 0.0008, "l0": 70.0},
            "oracle": {"mmcs": 1.0, "fvu": 0.02, "mse": 0.0002, "l0": 5.6, "fraction_above_0.9": 1.0},
        },
    }
    provenance = {"date": "2026-01-02T03:04:05+00:00", "command": f"replicate_toy_models.py {HOSTILE}"}
    settings = {"run": {"preset": "hoagy-2023-06", "steps": 20000}, "controls": controls, "provenance": provenance}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _toy_record(l1: float, ratio: float, seed: int, n_features: int, largest: bool) -> dict[str, Any]:
    rng = np.random.default_rng([seed, int(1e4 * l1), int(1e3 * ratio)])
    x = math.log10(l1 / ratio)
    alive = 1 / (1 + math.exp(9 * (x - 0.3)))
    quality = math.exp(-((x + 0.45) ** 2) / (0.5 if x < -0.45 else 0.16)) * alive
    low, high = chance(ratio), ceiling(ratio)
    mmcs = low + (high - low) * (0.35 * alive + 0.6 * quality) + 0.005 * rng.standard_normal()
    d_sae = round(n_features * ratio)
    dead = round(d_sae * min(1.0, 1 - alive + 0.03))
    found = rng.random(n_features) < quality * min(1, ratio)
    cosines = np.where(found, 0.97 + 0.01 * rng.standard_normal(n_features), rng.normal(low + 0.1, 0.06, n_features))
    return {
        "name": f"relu-{d_sae}-l1_coefficient_{l1:.6g}-lr_0.001-seed_{seed}",
        "site": "synthetic",
        "architecture": "relu",
        "d_in": n_features // 2,
        "d_sae": d_sae,
        "ratio": ratio,
        "l1_coefficient": l1,
        "lr": 1e-3,
        "seed": seed,
        "settings": {"d_sae": d_sae, "l1_coefficient": l1, "l1_scaling": "toy-2023"},
        "metrics": {
            "mmcs": mmcs,
            "fraction_above_0.9": float(found.mean()),
            "mmcs_dict_to_truth": mmcs * 0.9,
            "mcc": mmcs * 0.95,
            "dead": dead,
            "dead_fraction": dead / d_sae,
            "mse": 0.0066 * min(1.0, 0.01 + 10 ** (x - 0.3)) if alive > 0.01 else 0.0066,
            "fvu": min(1.0, 0.01 + 10 ** (x - 0.3)),
            "l0": 0.0 if alive < 0.01 else alive * 5 * 10 ** (-1.1 * (x + 0.45)),
            "l0_true": 5.0,
            "mmcs_next_larger": None if largest else 0.25 + 0.7 * quality,
            "max_cosines": [float(c) for c in cosines.clip(-1, 1)],
        },
    }


def language_run(
    folder: Path,
    sites: tuple[str, ...] = ("blocks.2.mlp.hook_post",),
    ratios: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0),
    l1s: tuple[float, ...] = (0.003, 0.01, 0.01778, 0.03, 0.1, 0.3),
    lrs: tuple[float, ...] = (1e-3,),
    seeds: int = 1,
    latents: bool = True,
) -> Path:
    """A sweep on a language model, with log, members, latents and hostile words in names and tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        _language_record(site, ratio, l1, lr, seed, ratio == ratios[-1])
        for site in sites
        for ratio in ratios
        for l1 in l1s
        for lr in lrs
        for seed in range(seeds)
    ]
    write_lines(folder / "results.jsonl", records)
    (folder / "members.json").write_text(json.dumps([{"name": r["name"]} for r in records]), encoding="utf-8")
    write_lines(folder / "log.jsonl", [_log_line(step, records) for step in range(0, 20001, 250)])
    baselines = {
        "PCA": [{"l0": k, "fvu": 0.9 * k**-0.35, "ce_recovered_zero": 1 - 0.8 * k**-0.4} for k in (4, 16, 64)],
        "ICA": {"l0": 90.0, "fvu": 0.22, "ce_recovered_zero": None},
    }
    provenance = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": "run.py --model gpt2 --layer 2",
        "version": "0.1.0",
        "python": "3.11.2",
        "platform": "Linux-6.1-x86_64",
        "versions": {"torch": "2.13.0", "numpy": "2.2.0", "datasets": None},
        "git": {"commit": "0123456789abcdef0123", "changed": True},
        "gpu": None,
    }
    run = {"model": "gpt2", "dataset": "python-docs", "note": HOSTILE}
    settings = {"run": run, "controls": {"baselines": baselines}, "provenance": provenance}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    if latents:
        (folder / "latents.json").write_text(json.dumps(_latents(records[0]["name"])), encoding="utf-8")
    return folder


def _language_record(site: str, ratio: float, l1: float, lr: float, seed: int, largest: bool) -> dict[str, Any]:
    d_in, d_sae = 768, round(768 * ratio)
    strength = l1 * (1 + 0.02 * seed) * (lr / 1e-3) ** 0.1
    l0 = 60 * (0.01 / strength) ** 0.85 * ratio**0.12
    fvu = min(0.99, (0.6 + 0.02 * seed) * l0**-0.42 * ratio**-0.1 + 0.02)
    dead = round(d_sae * min(0.97, 0.02 * ratio + 1 / (1 + math.exp(-6 * math.log10(strength / 0.15)))))
    edges = [round(-6 + 0.25 * i, 2) for i in range(25)]
    centre = math.log10(l0 / d_sae) - 0.4
    counts = [round(d_sae * 0.1 * math.exp(-((e + 0.125 - centre) ** 2) / 0.8)) for e in edges[:-1]]
    recovered = 1 - 1.1 * fvu**1.5
    prefix = site.replace("/", "_")
    return {
        "name": f"{prefix}-relu-{d_sae}-l1_coefficient_{l1:.6g}-lr_{lr:.6g}-seed_{seed}",
        "site": site,
        "architecture": "relu",
        "d_in": d_in,
        "d_sae": d_sae,
        "ratio": ratio,
        "l1_coefficient": l1,
        "lr": lr,
        "seed": seed,
        "settings": {"d_sae": d_sae, "l1_coefficient": l1},
        "metrics": {
            "fvu": fvu,
            "mse": fvu * 0.02,
            "l0": l0,
            "l1": l0 * 0.7,
            "dead": dead,
            "dead_fraction": dead / d_sae,
            "cosine": math.sqrt(1 - fvu),
            "mmcs_next_larger": None if largest else 0.3 + 0.55 * math.exp(-(math.log10(l1 / 0.03) ** 2)),
            "ce_clean": 3.2,
            "ce_spliced": 3.2 + 4 * (1 - recovered),
            "ce_recovered_zero": recovered,
            "kl_spliced": 3.9 * (1 - recovered),
        },
        "density": {"log10_edges": edges, "counts": counts},
    }


def _log_line(step: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    rest = math.exp(-step / 3000)
    metrics = [record["metrics"] for record in records]
    return {
        "step": step,
        "tokens": step * 4096,
        "seconds": step / 100,
        "tokens_per_second": 4e5,
        "lr_scale": 1.0,
        "loss": [m["mse"] * (1 + 8 * rest) for m in metrics],
        "mse": [m["mse"] * (1 + 6 * rest) for m in metrics],
        "l1": [m["l1"] for m in metrics],
        "l0": [m["l0"] * (1 + 20 * rest) for m in metrics],
        "dead": [m["dead"] * (1 - rest) for m in metrics],
        "fvu": [min(1.0, m["fvu"] + rest) for m in metrics],
    }


def _latents(member: str) -> dict[str, Any]:
    words = [
        "def",
        " read",
        "(",
        "path",
        ")",
        ":",
        "\n",
        "    ",
        "return",
        " ",
        HOSTILE,
        "\t",
        "open",
        "(",
        "path",
        ")",
    ]
    latents = []
    for index in range(8):
        contexts = []
        for c in range(4):
            peak = (3 * index + 2 * c) % len(words)
            activations = [max(0.0, 4.0 - 1.3 * abs(i - peak) - 0.3 * c) for i in range(len(words))]
            contexts.append({"tokens": words, "activations": activations})
        latents.append(
            {"index": 17 * index, "density": 0.0042 / (index + 1), "max_activation": 4.0, "contexts": contexts}
        )
    return {"member": member, "latents": latents}
