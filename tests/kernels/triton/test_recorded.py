"""Updates by the kernels, recorded once and replayed as a CUDA graph does it: see tests/training/recorded.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

pytest.importorskip("triton")

from sparse_coding.kernels import dense_native, unit_rows
from sparse_coding.kernels.triton import step
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.graph import WARM_UP, Graphs
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer
from tests.kernels.test_training import D_IN, METHODS, world
from tests.kernels.triton.conftest import GPU
from tests.training.recorded import Recorder, Recording, tensors

ROWS, D_SAE, STEPS = 4, 16, 6


@pytest.fixture(autouse=True)
def launches_are_recorded(monkeypatch):
    if GPU:
        pytest.skip("tests/training/test_graph.py records these on a GPU")
    from triton.runtime import interpreter

    real = interpreter.GridExecutor.__call__

    def launch(self, *arguments, **named):
        def kernel():
            with _disable_current_modes():
                real(self, *arguments, **named)

        recording = Recording.active
        return kernel() if recording is None else recording.launch(kernel, tensors((arguments, named)))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(dense_native, "serves", lambda *_: False)
    monkeypatch.setattr(unit_rows, "loaded", lambda: None)
    monkeypatch.setattr(step, "DENSEST", 1.0)
    monkeypatch.setattr(step, "DENSEST_ABOVE", 1.0)


def trained(name, recorder, precision):
    varied, fixed = METHODS[name]
    members = grid(name, {"synthetic": D_IN}, [D_SAE / D_IN], varied=varied, **fixed)
    optimizer = OptimizerSettings(schedule="linear", decay_fraction=1.0)
    settings = TrainingSettings(STEPS, optimizer, precision, dead=DeadSettings(window=ROWS))
    made = Trainer(members, TensorStream({"synthetic": world(64)}, ROWS), settings)
    made.careful, made.graphs = False, Graphs(made, recorder)
    for _ in range(STEPS):
        made.advance()
    return made


class Never(Recorder):
    def record(self, run):
        raise RuntimeError("this device records nothing")


@pytest.mark.parametrize(("name", "precision"), [("topk", "bf16"), ("relu", "fp32")])
def test_replays_are_the_updates_themselves(name, precision):
    recorder = Recorder()
    replayed, launched = trained(name, recorder, precision), trained(name, Never(), precision)
    assert recorder.replayed >= STEPS - WARM_UP - 1
    assert replayed.stacks[0].learning is not None  # Adam runs inside the kernels
    for key, value in launched._tensors().items():
        assert torch.equal(replayed._tensors()[key], value), key
