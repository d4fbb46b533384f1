"""Record what `schedulefree.AdamWScheduleFree` computes, for our optimiser to be tested against.

    PYTHON_WITH_SCHEDULEFREE benchmarks/rivals/optimizers.py

Needs torch and schedulefree alone. Writes tests/training/schedulefree_values.json: initial weights, gradients, and for
each case the weights after each step, as trained at (y) and as evaluated with (x). All float32, exact in JSON.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from schedulefree import AdamWScheduleFree

RECORD = Path(__file__).parents[2] / "tests" / "training" / "schedulefree_values.json"
STEPS = 8
FALLING = [1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.125]  # the weights of the average go by the highest rate so far
CASES = [
    {"lr": lr, "beta1": beta1, "weight_decay": decay, "warmup_steps": warmup, "factors": factors}
    for beta1, decay, warmup, factors in (
        (0.9, 0.0, 0, [1.0] * STEPS),
        (0.95, 0.1, 5, [1.0] * STEPS),
        (0.9, 0.1, 2, FALLING),
    )
    for lr in (1e-3, 3e-2)
]


def trajectory(
    start: dict[str, torch.Tensor], gradients: list[dict[str, torch.Tensor]], case: dict[str, Any]
) -> dict[str, list[dict[str, list[float]]]]:
    parameters = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    optimizer = AdamWScheduleFree(
        parameters.values(),
        lr=case["lr"],
        betas=(case["beta1"], 0.999),
        weight_decay=case["weight_decay"],
        warmup_steps=case["warmup_steps"],
    )
    found: dict[str, list[dict[str, list[float]]]] = {"y": [], "x": []}
    for gradient, factor in zip(gradients, case["factors"], strict=True):
        optimizer.train()
        optimizer.param_groups[0]["lr"] = case["lr"] * factor
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].clone()
        optimizer.step()
        found["y"].append(lists(parameters))
        kept = {name: value.detach().clone() for name, value in parameters.items()}
        optimizer.eval()
        found["x"].append(lists(parameters))
        optimizer.train()
        for name, value in kept.items():  # there and back costs a rounding
            parameters[name].data.copy_(value)
    return found


def lists(tensors: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in tensors.items()}


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (3, 4), "b": (4,)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    gradients = [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(STEPS)
    ]
    record = {
        "package": f"schedulefree {version('schedulefree')}",
        "start": lists(start),
        "gradients": [lists(gradient) for gradient in gradients],
        "cases": [case | trajectory(start, gradients, case) for case in CASES],
    }
    RECORD.write_text(json.dumps(record) + "\n")
    print(f"wrote {RECORD}: {len(CASES)} cases of {STEPS} steps of {record['package']}")


if __name__ == "__main__":
    main()
