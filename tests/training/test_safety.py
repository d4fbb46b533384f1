"""When checkpoints are written, and what stopping, clocks and full disks do to a run."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from sparse_coding.errors import Interrupted, UserError
from sparse_coding.training import checkpoint, safety
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.run_folder import RunFolder, read_lines
from sparse_coding.training.safety import CheckpointClock, Safety
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

ROWS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
ALWAYS = Safety(checkpoint_share=1.0)


def stream(kind=TensorStream):
    return kind({"synthetic": ROWS}, batch_size=32)


def members(**changes):
    return grid("relu", {"synthetic": 16}, **{"ratios": [1, 2], "varied": {"l1_coefficient": [0.1, 1.0]}, **changes})


def settings(steps=40, **changes):
    return TrainingSettings(steps=steps, log_every=10, **changes)


def weights(trainer):
    return [trainer.dictionary(index).tensors() for index in range(len(trainer.members))]


def assert_same(a, b):
    for one, other in zip(weights(a), weights(b), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def clock(monkeypatch):
    """A monotonic clock that stands still until it is set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(safety.time, "monotonic", lambda: now.seconds)
    return now


def written(clock, hours, takes, seconds=120.0, step=5.0, state_bytes=0, share=0.02):
    """(seconds at which checkpoints were written, the largest share of the time that they ever had)."""
    due, began, times, largest = CheckpointClock(seconds, share, state_bytes), clock.seconds, [], 0.0
    while clock.seconds - began < hours * 3600:
        clock.seconds += step
        if due.due():
            with due.timing():
                clock.seconds += takes
            times.append(clock.seconds - began)
            largest = max(largest, due.spent / times[-1])
    return times, largest


def test_quick_checkpoints_come_as_often_as_asked_for(clock):
    times, largest = written(clock, hours=1, takes=0.5)
    assert len(times) == 29
    assert largest < 0.02


def test_slow_checkpoints_come_less_often_and_never_cost_more_than_their_share(clock):
    times, largest = written(clock, hours=10, takes=60.0, state_bytes=int(60 * safety.DISK_BYTES_PER_SECOND))
    assert 9 <= len(times) <= 12
    assert times[0] > 3000
    assert largest <= 0.021


def test_a_share_of_all_means_whenever_asked_for(clock):
    assert len(written(clock, hours=0.1, takes=60.0, seconds=1.0, share=1.0)[0]) > 4


def test_the_machines_clock_may_jump(tmp_path, monkeypatch):
    jumps = iter([0.0, -1e9, 1e9, -1e6] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    with RunFolder(tmp_path / "run", {}) as folder:
        trainer = Trainer(members(), stream(), settings(), folder=folder, checkpoint_seconds=1e6)
        trainer.fit()
        assert 0 < trainer.seconds < 60
        assert trainer.clock.count == 1  # the one at the end
        log = read_lines(folder.path / "log.jsonl")
    seconds = [line["seconds"] for line in log]
    assert seconds == sorted(seconds)
    assert 0 <= seconds[0] <= seconds[-1] < 60


def test_what_checkpoints_cost_is_noted(tmp_path):
    import json

    with RunFolder(tmp_path / "run", {}) as folder:
        Trainer(members(), stream(), settings(), folder=folder, checkpoint_seconds=0, safety=ALWAYS).fit()
    noted = json.loads((tmp_path / "run" / "settings.json").read_text())["checkpoints"]
    assert noted["written"] > 3
    assert noted["seconds"] > 0


class Slow(TensorStream):
    """Asked to stop while it reads, which would take a minute more."""

    stop_at = 7
    signal = signal.SIGTERM

    def batch(self, step):
        if step == self.stop_at:
            os.kill(os.getpid(), self.signal)
            for _ in range(600):
                time.sleep(0.1)
        return super().batch(step)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_activations_are_read_saves_at_once(tmp_path, monkeypatch, number):
    monkeypatch.setattr(Slow, "signal", number)
    whole = Trainer(members(), stream(), settings())
    whole.fit()
    began = time.monotonic()
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(Interrupted, match=r"at step 7 of 40.*saved"):
        Trainer(members(), stream(Slow), settings(), folder=folder).fit()
    assert time.monotonic() - began < 5
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder)
        assert resumed.step == 7
        resumed.fit()
    assert_same(whole, resumed)


@pytest.mark.parametrize("stop_at", [22, 27])
def test_a_stop_in_the_middle_of_resampling_is_continued_there(tmp_path, monkeypatch, stop_at):
    """Resampling at step 20 reads batches 20 to 27 ahead of training: the stop comes in one of these reads."""
    monkeypatch.setattr(Slow, "stop_at", stop_at)
    dead = DeadSettings(window=64, resample_every=20, resample_times=1, resample_rows=256)
    chosen = members(varied={"l1_coefficient": [30.0, 40.0]}, lrs=[3e-2])
    whole = Trainer(chosen, stream(), settings(dead=dead))
    whole.fit()
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(Interrupted, match="at step 20"):
        Trainer(chosen, stream(Slow), settings(dead=dead), folder=folder).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(chosen, stream(), settings(dead=dead), folder=folder)
        assert (resumed.step, resumed.resampling) == (20, True)
        resumed.fit()
        assert [line["step"] for line in read_lines(folder.path / "log.jsonl")] == [10, 20, 30, 40]
    assert_same(whole, resumed)


def test_a_stream_that_fails_leaves_the_state_saved(tmp_path):
    class Fails(TensorStream):
        def batch(self, step):
            if step == 13:
                raise UserError("shard 3 is damaged")
            return super().batch(step)

    whole = Trainer(members(), stream(), settings())
    whole.fit()
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(UserError, match="shard 3"):
        Trainer(members(), stream(Fails), settings(), folder=folder).fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder)
        assert resumed.step == 13
        resumed.fit()
    assert_same(whole, resumed)


def test_a_damaged_checkpoint_costs_the_time_since_the_one_before_and_nothing_else(tmp_path, capsys):
    whole = Trainer(members(), stream(), settings())
    whole.fit()
    with RunFolder(tmp_path / "run", {}) as folder:
        Trainer(members(), stream(), settings(), folder=folder, checkpoint_seconds=0, safety=ALWAYS).fit()
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step-000000039", "step-000000040"]
    file = kept[1] / "state.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder)
        assert resumed.step == 39
        resumed.fit()
    assert "damaged (wrong checksum of state.safetensors)" in capsys.readouterr().err
    assert_same(whole, resumed)


@pytest.mark.parametrize("name", ["checkpoint", "log"])
def test_a_full_disk_stops_the_run_names_the_file_and_loses_nothing(tmp_path, monkeypatch, name):
    whole = Trainer(members(), stream(), settings())
    whole.fit()
    if name == "checkpoint":

        def full(path, tensors):
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device", str(path))

        real = checkpoint.write_tensors
        count = []
        monkeypatch.setattr(
            checkpoint, "write_tensors", lambda *a: (full if len(count) == 3 else real)(*a, *count.append(1) or ())
        )
    else:
        dev_full = tmp_path / "run" / "log.jsonl"
        real_open = open

        def opened(path, mode="r", **arguments):
            if path == dev_full and mode == "a" and dev_full.exists():
                return real_open("/dev/full", mode, **arguments)
            return real_open(path, mode, **arguments)

        monkeypatch.setattr("sparse_coding.training.run_folder.open", opened, raising=False)
    with RunFolder(tmp_path / "run", {}) as folder, pytest.raises(OSError, match="No space") as raised:
        Trainer(members(), stream(), settings(), folder=folder, checkpoint_seconds=0, safety=ALWAYS).fit()
    assert ("state.safetensors" if name == "checkpoint" else "log.jsonl") in raised.value.filename
    monkeypatch.undo()
    with RunFolder(tmp_path / "run", {}) as folder:
        resumed = Trainer(members(), stream(), settings(), folder=folder)
        assert resumed.step >= 3
        resumed.fit()
        assert [line["step"] for line in read_lines(folder.path / "log.jsonl")] == [10, 20, 30, 40]
    assert_same(whole, resumed)


def test_the_best_checkpoint_stays_and_can_be_put_in_place(tmp_path):
    with RunFolder(tmp_path / "run", {}) as folder:
        best = Safety(checkpoint_share=1.0, keep_best=True, keep_checkpoints=1)
        trainer = Trainer(members(), stream(), settings(), folder=folder, checkpoint_seconds=0, safety=best)
        trainer.fit()
        kept = sorted((folder.path / "checkpoints").iterdir())
        assert kept[-1].name == "step-000000040"
        assert len(kept) in (1, 2)
        last = weights(trainer)
        with trainer.at_best() as found:
            assert found
            one = checkpoint.best(folder.path / "checkpoints")[0]
            name = trainer.members[0].name
            assert torch.equal(weights(trainer)[0]["W_dec"], one[f"{name}/weights/W_dec"])
        assert all(torch.equal(a["W_dec"], b["W_dec"]) for a, b in zip(last, weights(trainer), strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_share": 0.0}, "--checkpoint-share is 0"),
        ({"checkpoint_share": 1.5}, "--checkpoint-share is 1.5"),
        ({"keep_checkpoints": 0}, "--keep-checkpoints is 0"),
        ({"nan": "ignore"}, "--nan is 'ignore': allowed are stop, skip"),
    ],
)
def test_nonsense_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Safety(**changes)
