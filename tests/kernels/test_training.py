"""Training with the sparse step beside training by the definition: the same rows, order and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from sparse_coding.dictionaries import architecture
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

D_IN, D_SAE, ROWS = 16, 128, 128
METHODS: dict[str, tuple[dict[str, list[float]], dict[str, Any]]] = {
    "topk": ({"k": [3, 6]}, {}),
    "batchtopk": ({"k": [3, 5.5]}, {}),
    "matryoshka": ({"k": [3, 5.5]}, {"group_fractions": (0.25, 0.25, 0.5)}),
    "jumprelu": ({"l0_coefficient": [0.1, 1.0]}, {"initial_threshold": 1.5, "dead_latents": "auxk"}),
    "relu": ({"l1_coefficient": [0.5, 1.0]}, {"dead_latents": "auxk"}),
}
every_method = pytest.mark.parametrize("name", list(METHODS))


def world(rows: int) -> torch.Tensor:
    """Rows of four of 64 directions each, plus a little noise."""
    generator = torch.Generator().manual_seed(11)
    directions = torch.nn.functional.normalize(torch.randn(64, D_IN, generator=generator), dim=1)
    codes = torch.rand(rows, 64, generator=generator).argsort(1).argsort(1).lt(4) * torch.rand(
        rows, 64, generator=generator
    )
    return 2 * codes @ directions + 0.02 * torch.randn(rows, D_IN, generator=generator)


def trained(members: Sequence[Member], settings: TrainingSettings) -> Trainer:
    trainer = Trainer(members, TensorStream({"synthetic": world(4096)}, ROWS), settings)
    trainer.fit()
    return trainer


def both(
    members: Sequence[Member], settings: TrainingSettings, monkeypatch: pytest.MonkeyPatch
) -> tuple[Trainer, Trainer]:
    """(with the fast step, which is taken at every update; by the definition)"""
    kind = architecture(members[0].architecture)
    taken, fused = [], kind.fused_gradients

    def counting(*arguments: Any) -> Any:
        taken.append(fused(*arguments))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(kind, "fused_gradients", counting)
        fast = trained(members, settings)
    assert len(taken) == settings.steps
    assert all(one is not None for one in taken)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "fused_gradients", lambda *_: None)
        return fast, trained(members, settings)


@every_method
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_twenty_updates_end_where_the_definition_ends(name, tied, clip, implementation, monkeypatch):
    """Among them warm-up of sparsity, latents that count as dead after 512 rows, and a resampling."""
    varied, fixed = METHODS[name]
    members = grid(name, {"synthetic": D_IN}, [D_SAE / D_IN], varied=varied, tied=tied, **fixed)
    settings = TrainingSettings(
        20, OptimizerSettings(clip_norm=clip), "fp32", sparsity_warmup_steps=4,
        dead=DeadSettings(window=512, resample_every=12, resample_times=1, resample_rows=256),
    )  # fmt: skip
    fast, slow = both(members, settings, monkeypatch)
    for index in range(len(members)):
        ours, theirs = fast.dictionary(index), slow.dictionary(index)
        for part in ("tensors", "state"):
            for key, value in getattr(theirs, part)().items():
                # Adam moves a weight by about the learning rate (.001) whatever the size of its gradient
                off = (getattr(ours, part)()[key] - value).abs()
                assert off.quantile(0.95) < 1e-5, f"{key} of member {index}"
                assert off.max() < 5e-3, f"{key} of member {index}"
    assert (fast.stacks[0].clocks.rows_since_fired == slow.stacks[0].clocks.rows_since_fired).float().mean() > 0.99


@every_method
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_run_ends_at_the_same_fvu_and_l0(name, precision, implementation, monkeypatch):
    varied, fixed = METHODS[name]
    members = grid(name, {"synthetic": D_IN}, [D_SAE / D_IN], varied=varied, **fixed)
    settings = TrainingSettings(300, precision=precision, log_every=1000, dead=DeadSettings(window=5000))
    fast, slow = both(members, settings, monkeypatch)
    x = world(4096)
    for index in range(len(members)):
        found = []
        for trainer in (fast, slow):
            dictionary = trainer.dictionary(index)
            with torch.no_grad():
                f = dictionary.encode(x)
                error = (dictionary.decode(f, x) - x).square().sum()
            found.append((float(error / (x - x.mean(0)).square().sum()), float((f != 0).sum(1).float().mean())))
        (fvu, l0), (fvu_slow, l0_slow) = found
        assert fvu == pytest.approx(fvu_slow, rel=0.01)
        assert l0 == pytest.approx(l0_slow, rel=0.01)
