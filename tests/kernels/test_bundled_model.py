"""Whole runs on activations of the bundled model: the fast steps end where the definition ends."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_coding.activations.models import bundled_models
from sparse_coding.dictionaries import architecture
from sparse_coding.training.optimizer import Moments, OptimizerSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

CONTEXT, BATCH, STEPS = 128, 256, 200
GRIDS: dict[str, dict[str, list[float]]] = {
    "topk": {"k": [16, 32]},
    "batchtopk": {"k": [16, 32]},
    "jumprelu": {"l0_coefficient": [0.5, 1.0]},
    "relu": {"l1_coefficient": [1.0, 6.0]},  # the second turns sparse on the way
    "gated": {"l1_coefficient": [1.0, 6.0]},
}


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    """The residual stream behind layer 2, of mean norm sqrt(width), on a module of the standard library."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = bundled_models()["python-gpt"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = torch.tensor(tokenizer(Path(argparse.__file__).read_text())["input_ids"])
    with torch.no_grad():
        contexts = tokens[: len(tokens) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        found = model(contexts, output_hidden_states=True).hidden_states[2].flatten(0, 1)
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    return found * (found.shape[1] ** 0.5 / found.norm(dim=1).mean())


def ends(members: Sequence[Member], rows: torch.Tensor, moments: Moments = "fp32") -> list[tuple[float, float]]:
    """(FVU, L0) of each member after a run at the precision that a run has by itself."""
    settings = TrainingSettings(STEPS, OptimizerSettings(moments=moments, schedule="linear"), log_every=STEPS)
    trainer, x, found = Trainer(members, TensorStream({"synthetic": rows}, BATCH), settings), rows[: 8 * BATCH], []
    trainer.fit()
    for index in range(len(members)):
        dictionary = trainer.dictionary(index)
        with torch.no_grad():
            f = dictionary.encode(x)
            error = (dictionary.decode(f, x) - x).square().sum()
        found.append((float(error / (x - x.mean(0)).square().sum()), float((f != 0).sum(1).float().mean())))
    return found


@pytest.mark.parametrize("name", list(GRIDS))
def test_a_run_ends_at_the_fvu_and_l0_of_the_definition(name: str, rows: torch.Tensor, monkeypatch: pytest.MonkeyPatch):
    kind = architecture(name)
    members = grid(name, {"synthetic": rows.shape[1]}, [4], lrs=[2e-3], varied=GRIDS[name])
    fused, taken = kind.fused_gradients, []

    def counted(*arguments: Any) -> Any:
        taken.append(fused(*arguments))
        return taken[-1]

    monkeypatch.setattr(kind, "fused_gradients", counted)
    fast = ends(members, rows)
    monkeypatch.setattr(kind, "fused_gradients", lambda *_: None)
    slow = ends(members, rows)
    steps = sum(one is not None for one in taken)
    assert steps == STEPS or (name == "jumprelu" and steps > STEPS / 2)  # it starts too dense
    for (fvu, l0), (fvu_slow, l0_slow) in zip(fast, slow, strict=True):
        assert fvu == pytest.approx(fvu_slow, rel=0.01)
        assert l0 == pytest.approx(l0_slow, rel=0.01)


@pytest.mark.parametrize("name", ["relu", "topk"])
def test_moments_in_bf16_end_at_the_fvu_and_l0_of_those_in_fp32(name: str, rows: torch.Tensor):
    members = grid(name, {"synthetic": rows.shape[1]}, [4], lrs=[2e-3], varied=GRIDS[name])
    for (fvu, l0), (exact_fvu, exact_l0) in zip(ends(members, rows, "bf16"), ends(members, rows), strict=True):
        assert fvu == pytest.approx(exact_fvu, rel=0.01)
        assert l0 == pytest.approx(exact_l0, rel=0.01)
