"""What every rival is given (`world`) and where its answers are kept (`Record`).

Names and orientation are ours: W_enc [d_in d_sae], W_dec [d_sae d_out]; a rival that stores a matrix the other way
round is filled with the transpose, and its gradient is turned back.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FOLDER = Path(__file__).parents[2] / "tests" / "dictionaries"
TENSORS, FACTS = FOLDER / "rival_values.safetensors", FOLDER / "rival_values.json"
D_IN, D_SAE, ROWS = 6, 12, 16
K, GROUPS = 2, 3
"""Latents kept in a row by the TopK family, and groups of GroupMax."""
DEAD = slice(8, 12)
"""Latents that are called dead. d_in // 2 = 3 of them take part in AuxK."""


def world() -> dict[str, Tensor]:
    """Weights and rows, from one seed, such that every comparison has one answer.

    No selection hangs on rounding, no kept code and no pre-activation of a dead latent is 0 or below (rivals disagree
    on whether those get a gradient), and no dead latent is among the k kept (where dictionary_learning would call it
    alive). `W_dec_unit` holds the atoms of `W_dec` at norm 1.
    """
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    uniform = lambda low, high, n: torch.rand(n, generator=draw) * (high - low) + low  # noqa: E731
    W_enc, b_enc = 0.7 * normal(D_IN, D_SAE), 0.2 * normal(D_SAE)
    W_enc[:, DEAD] *= 0.1
    b_enc[DEAD] = 0.3
    W_dec_unit = torch.nn.functional.normalize(normal(D_SAE, D_IN), dim=1)
    norms = uniform(0.6, 1.4, D_SAE)
    norms[DEAD] = torch.tensor([1.4, 0.6, 1.1, 0.8])
    W_dec = W_dec_unit * norms.unsqueeze(1)
    values = {
        "W_enc": W_enc,
        "b_enc": b_enc,
        "W_dec": W_dec,
        "W_dec_unit": W_dec_unit,
        "b_dec": 0.2 * normal(D_IN),
        "W_skip": 0.3 * normal(D_IN, D_IN),
        "b_gate": 0.3 * normal(D_SAE),
        "b_mag": 0.3 * normal(D_SAE),
        "r_mag": 0.3 * normal(D_SAE),
        "threshold": uniform(0.45, 0.9, D_SAE),
        "target": normal(ROWS, D_IN),
    }
    rows = normal(4000, D_IN)
    fine = torch.ones(len(rows), dtype=torch.bool)
    for x in (rows - values["b_dec"], rows):  # autoencoder, transcoder
        pre = x @ W_enc + b_enc
        fine &= pre[:, DEAD].amin(1) > 0.02
        fine &= (pre.unflatten(1, (GROUPS, -1)).amax(2) > 0.02).all(1)
        for scores in (pre, pre * W_dec.norm(dim=1), pre.abs()):
            best = scores.topk(K + 1, dim=1).values
            fine &= (best[:, K - 1] - best[:, K] > 0.01) & (best[:, K - 1] > scores[:, DEAD].amax(1) + 0.3)
    return {**values, "x": rows[fine][:ROWS].clone()}


class Leaf(NamedTuple):
    """A parameter of a rival, and whether it is stored the other way round than ours."""

    parameter: Tensor
    turned: bool = False


@torch.no_grad()
def fill(leaves: Mapping[str, Leaf], values: Mapping[str, Tensor], unit: bool = False) -> None:
    """Give a rival's parameters the world's values; `unit`: with atoms of norm 1."""
    for name, (parameter, turned) in leaves.items():
        value = values["W_dec_unit" if unit and name == "W_dec" else name]
        parameter.copy_(value.T if turned else value)


class Record:
    """The answers of one rival, by case; they replace those it gave before."""

    def __init__(self, rival: str, version: str) -> None:
        self.rival, self.values = rival, world()
        self.tensors: dict[str, Tensor] = {}
        self.facts: dict[str, Any] = {
            "version": version,
            "torch": torch.__version__,
            "date": datetime.date.today().isoformat(),
            "cases": {},
        }

    def add(
        self,
        case: str,
        leaves: Mapping[str, Leaf],
        loss: Tensor,
        terms: Mapping[str, Any],
        settings: Mapping[str, Any],
        **tensors: Tensor,
    ) -> None:
        """Keep the loss, its terms by the rival's own names, its gradients, and more (codes `f`, `x_hat`, ...)."""
        found = torch.autograd.grad(
            loss, [leaf.parameter for leaf in leaves.values()], allow_unused=True, retain_graph=True
        )
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            gradient = torch.zeros_like(leaf.parameter) if gradient is None else gradient
            self.tensors[f"{self.rival}/{case}/gradient/{name}"] = gradient.T if leaf.turned else gradient
        for name, value in tensors.items():
            self.tensors[f"{self.rival}/{case}/{name}"] = value
        losses = {name: float(torch.as_tensor(value).detach()) for name, value in {"loss": loss, **terms}.items()}
        self.facts["cases"][case] = {"settings": dict(settings), "losses": losses}

    def write(self) -> None:
        """Into the two files that the tests read, beside what other rivals gave."""
        tensors = load_file(TENSORS) if TENSORS.exists() else {}
        facts = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.exists() else {}
        for name, value in self.values.items():
            if not torch.equal(tensors.setdefault(f"world/{name}", value), value):
                raise SystemExit(f"world/{name} is not what other rivals were given: delete {TENSORS}, ask all again")
        tensors = {name: value for name, value in tensors.items() if not name.startswith(f"{self.rival}/")}
        tensors |= {name: value.detach().clone().contiguous() for name, value in self.tensors.items()}
        save_file(dict(sorted(tensors.items())), TENSORS)
        facts[self.rival] = self.facts
        FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        print(f"{len(self.facts['cases'])} cases of {self.rival} {self.facts['version']} -> {TENSORS}")
