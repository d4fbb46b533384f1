"""An update that is recorded once and replayed is the update itself, whatever changes from one to the next."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch

from sparse_coding.dictionaries import ARCHITECTURES
from sparse_coding.dictionaries import sparse as sparse_dictionaries
from sparse_coding.dictionaries.matryoshka import MatryoshkaSettings
from sparse_coding.kernels import dense_native, unit_rows
from sparse_coding.training.dead import Clocks, DeadSettings
from sparse_coding.training.graph import MOST, WARM_UP, Graphs
from sparse_coding.training.loss_scale import LossScale
from sparse_coding.training.optimizer import OPTIMIZERS, OptimizerSettings, make_optimizer
from sparse_coding.training.settling import Settling, SettlingSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings
from tests.training.recorded import Recorder, Waits

X = torch.randn(512, 12, generator=torch.Generator().manual_seed(1))
Y = torch.randn(512, 8, generator=torch.Generator().manual_seed(2)) + X[:, :8]
VARIED = {
    "relu": {"l1_coefficient": [0.1, 1.0]},
    "relu-april": {"l1_coefficient": [0.1, 1.0]},
    "lp": {"l1_coefficient": [0.1, 0.5]},
    "gated": {"l1_coefficient": [0.1, 1.0]},
    "topk": {"k": [1, 3], "auxk_coefficient": [0.03, 0.3]},
    "batchtopk": {"k": [2, 4.5]},
    "matryoshka": {"k": [2, 5]},
    "jumprelu": {"l0_coefficient": [0.1, 0.5], "target_l0": [0.0, 4.0]},
    "matching-pursuit": {"k": [2, 4]},
}
SHARED = {
    "matryoshka": {"group_fractions": (0.25, 0.25, 0.5)},
    "gated": {"dead_latents": "ghost"},
    "relu": {"dead_latents": "auxk", "error": "fvu", "k_aux": 4},
    "lp": {"anneal_steps": 1},
}
RECORDABLE = [name for name, kind in OPTIMIZERS.items() if kind.on_device]
STEPS = 40


@pytest.fixture(autouse=True)
def _as_a_gpu_without_triton(monkeypatch):
    """The fast steps of a CPU are no operators of torch."""
    monkeypatch.setattr(sparse_dictionaries, "sparse_step", lambda *_: None)
    monkeypatch.setattr(dense_native, "serves", lambda *_: False)
    monkeypatch.setattr(unit_rows, "loaded", lambda: None)


def members(name, **changes):
    return grid(name, {"x": 12}, [4], varied=VARIED[name], **{**SHARED.get(name, {}), **changes})


def trainer(sweep, recorder, optimizer="adam", steps=STEPS, device="cpu", **changes):
    settings = TrainingSettings(
        steps,
        OptimizerSettings(optimizer, warmup_steps=5, schedule="linear", decay_fraction=0.8),
        changes.pop("precision", "fp32"),
        dead=changes.pop("dead", DeadSettings(window=320, threshold=0.02, sampling_window=320)),
        settling=changes.pop("settling", SettlingSettings(every=16, patience=2)),
        **changes,
    )
    rows = {"x": X.to(device), "y": Y.to(device)}
    made = Trainer(sweep, TensorStream(rows, batch_size=32), settings, device)
    made.careful, made.graphs = False, Graphs(made, recorder)
    return made


class Never(Recorder):
    """Launches every update kernel by kernel."""

    def record(self, run):
        raise RuntimeError("this device records nothing")


def run(made, steps=STEPS):
    for _ in range(steps):
        made.advance()
    return made


def assert_same_bits(first, second):
    one, other = first._tensors(), second._tensors()
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert first.steps_summed == second.steps_summed


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_replays_are_the_updates_themselves(name, capsys):
    recorder = Recorder()
    replayed = run(trainer(members(name), recorder))
    assert_same_bits(replayed, run(trainer(members(name), Never())))
    assert recorder.replayed > 10
    assert "updates are launched as one CUDA graph" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", RECORDABLE)
def test_every_optimiser_that_is_recorded(optimizer):
    sweep = members("topk", lrs=[1e-3, 3e-3])
    recorder = Recorder()
    replayed = run(trainer(sweep, recorder, optimizer))
    assert_same_bits(replayed, run(trainer(sweep, Never(), optimizer)))
    assert recorder.replayed > 10
    plain = trainer(sweep, None, optimizer)
    assert plain.graphs.recorder is None  # a CPU takes the factor of the learning rates from Python
    for one, other in zip(replayed._tensors().values(), run(plain)._tensors().values(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-4, rtol=1e-3)


def test_schedule_free_keeps_its_numbers_on_the_cpu():
    recorder = Recorder()
    run(trainer(members("topk"), recorder, "schedule-free"), 10)
    assert recorder.warmed_up == recorder.recorded == 0


def test_loss_scales_are_recorded_too():
    recorder = Recorder()
    replayed = run(trainer(members("relu"), recorder, precision="fp16"))
    assert replayed.stacks[0].loss_scale is not None
    assert_same_bits(replayed, run(trainer(members("relu"), Never(), precision="fp16")))


def test_several_stacks_share_a_graph_and_some_come_to_rest():
    sweep = [*members("relu", error="mse", dead_latents="none"), *members("topk")]
    settling = SettlingSettings(every=4, tolerance=0.9, patience=1)
    recorder = Recorder()
    replayed = run(trainer(sweep, recorder, settling=settling), 24)
    assert len(replayed.stacks) > 2 or any(stack.resting for stack in replayed.stacks)
    assert_same_bits(replayed, run(trainer(sweep, Never(), settling=settling), 24))


def test_weights_that_something_else_changes_are_recorded_anew():
    dead = DeadSettings(window=32, resample_every=16, resample_times=1, resample_rows=64)
    recorder = Recorder()
    replayed = run(trainer(members("topk"), recorder, dead=dead, settling=SettlingSettings()), 28)
    assert_same_bits(replayed, run(trainer(members("topk"), Never(), dead=dead, settling=SettlingSettings()), 28))
    assert recorder.recorded == 2


@pytest.mark.parametrize(
    "changes",
    [{"sparsity_warmup_steps": 30}, {"prefixes": "random", "group_fractions": MatryoshkaSettings.group_fractions}],
)
def test_updates_of_which_no_two_are_alike_are_not_recorded(changes):
    sparsity = {key: value for key, value in changes.items() if key == "sparsity_warmup_steps"}
    own = {key: value for key, value in changes.items() if key not in sparsity}
    recorder = Recorder()
    run(trainer(members("matryoshka", **own), recorder, **sparsity), 20)
    assert recorder.warmed_up == 0


def test_rows_that_are_looked_at_and_batches_in_pieces_are_not_recorded():
    recorder = Recorder()
    made = trainer(members("relu", error="mse"), recorder, dead=DeadSettings(), settling=SettlingSettings())
    made.careful = True
    run(made, 8)
    made.careful = False
    for stack in made.stacks:
        stack.allow_micro_batches(2)
    run(made, 8)
    assert recorder.warmed_up == 0
    for stack in made.stacks:
        stack.allow_micro_batches(1)
    run(made, 8)
    assert recorder.warmed_up == WARM_UP


def test_where_recording_fails_updates_go_on_and_it_is_told_once(capsys):
    made = run(trainer(members("topk"), Never(), dead=DeadSettings(), settling=SettlingSettings()), 10)
    assert made.step == made.steps_summed == 10
    told = capsys.readouterr().err
    assert told.count("this device records nothing") == 1


def test_a_resumed_run_meets_the_recorded_one():
    """What `restore` does: other tensors take the place of those that were recorded."""
    recorder = Recorder()
    replayed = run(trainer(members("topk"), recorder), 12)
    kept = {name: value.clone() for name, value in replayed._tensors().items()}
    run(replayed, 8)
    resumed = trainer(members("topk"), Recorder())
    resumed.step = 12
    resumed.settling.load_state(kept)
    resumed._load(kept, 12)
    assert_same_bits(run(resumed, 8), replayed)


def test_no_more_than_a_few_graphs_are_kept():
    made = trainer(members("relu"), Recorder(), dead=DeadSettings(), settling=SettlingSettings())
    with mock.patch.object(Graphs, "_branch", side_effect=[i % (MOST + 2) for i in range(8 * (MOST + 2))]):
        run(made, 5 * (MOST + 2))
    assert 1 <= len(made.graphs._graphs) <= MOST


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_a_cuda_graph_is_the_updates_themselves(name, precision, monkeypatch):
    monkeypatch.undo()  # as a GPU with Triton
    states = []
    for refused in (False, True):
        made = trainer(members(name), None, device="cuda", precision=precision)
        made.graphs.refused = refused
        states.append(run(made))
        assert made.graphs.refused == refused, "recorded without an error"
    if name == "matching-pursuit":  # a GPU's autograd adds up its gathered rows in no certain order
        for one, other in zip(*(state._tensors().values() for state in states), strict=True):
            torch.testing.assert_close(one, other, atol=0.05, rtol=0.1)
    else:
        assert_same_bits(*states)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="records a CUDA graph")
def test_in_a_cuda_graph_stacks_beside_one_another_are_the_updates_themselves(monkeypatch):
    monkeypatch.undo()
    sweep = [one for ratio in (2, 4, 8, 16, 32, 64) for one in grid("relu", {"x": 12}, [ratio], varied=VARIED["relu"])]
    states = []
    for refused in (False, True):
        made = trainer([*sweep, *members("topk")], None, device="cuda")
        made.graphs.refused = refused
        states.append(run(made))
        assert made.graphs.refused == refused
    assert len(states[0].stacks) == 7
    assert_same_bits(*states)


# ---- no value is asked for


@pytest.fixture
def no_autocast(monkeypatch):
    """Which the device without values does not know."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def on_meta(made):
    """The trainer with all that an update touches on a device without values."""
    made.graphs.scale = made.graphs.scale.to("meta")
    for stack in made.stacks:
        stack.dictionary.to("meta")
        lrs = [member.lr for member in stack.members]
        stack.optimizer = make_optimizer(stack.dictionary.tensors(), lrs, made.settings.optimizer, {"W_enc", "W_dec"})
        stack.clocks = Clocks(tuple(stack.clocks.fired.shape), made.settings.dead, "meta")
        stack.sums = {name: value.to("meta") for name, value in stack.sums.items()}
        if stack.loss_scale is not None:
            stack.loss_scale = LossScale(len(stack.members), "meta")
    made.settling = Settling(made.settings.settling, len(made.members), "meta")
    made.moments = {site: value.to("meta") for site, value in made.moments.items()}
    return made


def update_on_meta(made, steps=14):
    made = on_meta(made)
    batch = {"x": torch.empty(32, 12, device="meta"), "y": torch.empty(32, 8, device="meta")}
    with Waits():
        for _ in range(steps):
            made.update(batch, made.graphs.scale)
            made.step += 1


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_an_update_of_any_architecture_waits_for_nothing(name):
    update_on_meta(trainer(members(name), None, sparsity_warmup_steps=4))


@pytest.mark.usefixtures("no_autocast")
@pytest.mark.parametrize("optimizer", RECORDABLE)
def test_an_update_of_any_optimiser_waits_for_nothing(optimizer):
    update_on_meta(trainer(members("topk", lrs=[1e-3, 2e-3]), None, optimizer))


@pytest.mark.usefixtures("no_autocast")
def test_an_update_in_fp16_waits_for_nothing():
    update_on_meta(trainer(members("relu"), None, precision="fp16"))


@pytest.mark.parametrize(
    "asks",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.arange(3).to(x.device) + x,
    ],
)
def test_what_waits_is_noticed(asks):
    x = torch.empty(4, 3, device="meta")
    with Waits(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        asks(x)
