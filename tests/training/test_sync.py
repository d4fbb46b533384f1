"""The copy of a run elsewhere: kept up in the background, gone on from on another machine, never in training's way."""

from __future__ import annotations

import json
import shutil
import threading
import time

import pytest
import torch

from sparse_coding.errors import Interrupted, UserError
from sparse_coding.stores.objects import FolderObjects, open_objects
from sparse_coding.training import sync as sync_module
from sparse_coding.training.run_folder import RunFolder, read_lines
from sparse_coding.training.safety import Safety
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.sync import Sync, belongs
from sparse_coding.training.trainer import Trainer, TrainingSettings
from tests.stores.fake_s3 import KEY, serving
from tests.stores.fake_s3 import SECRET as SECRET_OF_S3

ROWS = torch.randn(512, 16, generator=torch.Generator().manual_seed(1))
OFTEN = {"checkpoint_seconds": 0.0, "safety": Safety(checkpoint_share=1.0)}
SECRET = "AKIAIOSFODNN7EXAMPLE"


class Dies(TensorStream):
    """The machine is gone at this step: nothing is saved, nothing is said."""

    at = 10**9

    def batch(self, step):
        if step == self.at:
            raise SystemExit("gone")
        return super().batch(step)


class Bucket(FolderObjects):
    """A folder that can be slow, or fail."""

    fails = 0
    seconds = 0.0

    def __init__(self, folder):
        super().__init__(folder)
        self.url = "s3://bucket/run"
        self.calls = []

    def put(self, name, data):
        self.calls.append(("put", name))
        time.sleep(self.seconds)
        if self.fails > 0:
            self.fails -= 1
            raise RuntimeError(f"503 for key {SECRET}")
        super().put(name, data)

    def delete(self, name):
        self.calls.append(("delete", name))
        super().delete(name)


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setattr(sync_module, "RETRY_SECONDS", 0.05)
    return Bucket(tmp_path / "bucket")


def trainer(folder, steps=40, stream=None, **arguments):
    members = grid("relu", {"synthetic": 16}, [1, 2], varied={"l1_coefficient": [0.1, 1.0]})
    stream = stream or TensorStream({"synthetic": ROWS}, 32)
    return Trainer(members, stream, TrainingSettings(steps, log_every=10), folder=folder, **arguments)


def weights(one):
    return [one.dictionary(index).tensors() for index in range(len(one.members))]


def run(path, bucket, fresh=False, settings=None, stream=None, finish=True, **arguments):
    with RunFolder(path, settings or {"lr": 1}, fresh, Sync(bucket)) as folder:
        if folder.finished:
            return None
        one = trainer(folder, stream=stream, **{**OFTEN, **arguments})
        one.fit()
        (path / "dictionaries" / "a").mkdir(parents=True, exist_ok=True)
        (path / "dictionaries" / "a" / "sae_weights.safetensors").write_bytes(b"weights")
        if finish:
            folder.finish([{"name": "a"}])
            (path / "report.html").write_text("report")
        return one


def names(bucket):
    return sorted(bucket.names())


def timeless(path):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(path / "log.jsonl")]


def test_a_finished_run_is_copied_whole_and_without_what_served_only_on_the_way(tmp_path, bucket):
    run(tmp_path / "run", bucket)
    assert names(bucket) == [
        "dictionaries/a/sae_weights.safetensors", "log.jsonl", "owner.json", "report.html", "results.jsonl",
        "settings.json",
    ]  # fmt: skip
    for name in ("log.jsonl", "settings.json", "results.jsonl"):
        assert bytes(bucket.get(name)) == (tmp_path / "run" / name).read_bytes()
    assert not (tmp_path / "run" / ".syncing").exists()


@pytest.mark.parametrize("at", [5, 17, 33])
def test_another_machine_goes_on_from_the_copy(tmp_path, bucket, monkeypatch, at):
    whole = run(tmp_path / "whole", Bucket(tmp_path / "other"))
    monkeypatch.setattr(Dies, "at", at)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    shutil.rmtree(tmp_path / "first")
    second = run(tmp_path / "second", bucket, stream=TensorStream({"synthetic": ROWS}, 32))
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert timeless(tmp_path / "whole") == timeless(tmp_path / "second")
    assert "results.jsonl" in names(bucket)


def test_it_says_from_where(tmp_path, bucket, monkeypatch, capsys):
    monkeypatch.setattr(Dies, "at", 17)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    with RunFolder(tmp_path / "second", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step == 17
    assert "brought step 17 from s3://bucket/run" in capsys.readouterr().err


def test_a_finished_copy_is_brought_and_not_trained_again(tmp_path, bucket):
    run(tmp_path / "first", bucket)
    assert run(tmp_path / "second", bucket) is None
    assert (tmp_path / "second" / "dictionaries" / "a" / "sae_weights.safetensors").read_bytes() == b"weights"
    assert (tmp_path / "second" / "report.html").exists()


def test_what_is_here_stays_where_it_is_further(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(Dies, "at", 9)
    with pytest.raises(SystemExit):
        run(tmp_path / "run", bucket, stream=Dies({"synthetic": ROWS}, 32))
    monkeypatch.setattr(Dies, "at", 21)
    with pytest.raises(SystemExit), RunFolder(tmp_path / "run", {"lr": 1}) as folder:  # without --sync
        trainer(folder, stream=Dies({"synthetic": ROWS}, 32), **OFTEN).fit()
    with RunFolder(tmp_path / "run", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step == 21


def test_what_is_here_gives_way_where_another_machine_went_further(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(Dies, "at", 9)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    monkeypatch.setattr(Dies, "at", 25)
    with pytest.raises(SystemExit):
        run(tmp_path / "second", bucket, stream=Dies({"synthetic": ROWS}, 32))
    with RunFolder(tmp_path / "first", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step == 25


def test_a_copy_of_other_settings_is_refused_and_left_alone(tmp_path, bucket):
    run(tmp_path / "first", bucket)
    before = names(bucket)
    with pytest.raises(UserError, match=r"s3://bucket/run was started with other settings \(lr: was 1, is 2\).*--sync"):
        run(tmp_path / "second", bucket, settings={"lr": 2})
    assert names(bucket) == before


def test_starting_over_replaces_the_copy_when_there_is_something_new(tmp_path, bucket, monkeypatch):
    run(tmp_path / "first", bucket)
    monkeypatch.setattr(Dies, "at", 0)
    with pytest.raises(SystemExit):  # a mistake before anything is done costs nothing
        run(tmp_path / "second", bucket, fresh=True, settings={"lr": 2}, stream=Dies({"synthetic": ROWS}, 32))
    assert "results.jsonl" in names(bucket)
    monkeypatch.setattr(Dies, "at", 12)
    with pytest.raises(SystemExit):
        run(tmp_path / "second", bucket, fresh=True, settings={"lr": 2}, stream=Dies({"synthetic": ROWS}, 32))
    assert "results.jsonl" not in names(bucket)
    assert json.loads(bytes(bucket.get("settings.json")))["run"] == {"lr": 2}
    assert "dictionaries/a/sae_weights.safetensors" not in names(bucket)


def test_nothing_of_the_run_before_survives_under_the_new_settings(tmp_path, bucket, monkeypatch):
    run(tmp_path / "first", bucket, finish=False)
    bucket.calls.clear()
    run(tmp_path / "second", bucket, fresh=True, settings={"lr": 2})
    first_put = next(i for i, (verb, name) in enumerate(bucket.calls) if verb == "put" and name != "owner.json")
    deleted = [name for verb, name in bucket.calls[:first_put] if verb == "delete"]
    assert deleted[-1] == "settings.json"
    assert any(name.startswith("checkpoints/") for name in deleted)


def test_failures_warn_once_and_never_stop_training(tmp_path, bucket, capsys):
    bucket.fails = 7
    run(tmp_path / "run", bucket)
    told = capsys.readouterr().err
    assert told.count("copying to s3://bucket/run failed, training goes on: RuntimeError") == 1
    assert SECRET not in told
    assert "results.jsonl" in names(bucket)  # tried again until it went well


def test_a_bucket_that_never_answers_costs_a_warning_and_a_bounded_wait(tmp_path, bucket, capsys, monkeypatch):
    monkeypatch.setattr("sparse_coding.training.run_folder.END_SECONDS", 0.5)
    bucket.fails = 10**9
    began = time.monotonic()
    one = run(tmp_path / "run", bucket)
    assert time.monotonic() - began < 10
    assert one.step == 40
    assert (tmp_path / "run" / "results.jsonl").exists()
    told = capsys.readouterr().err
    assert "newest state is not in s3://bucket/run yet: start the same command again to copy it" in told
    assert SECRET not in told
    bucket.fails = 0
    run(tmp_path / "run", bucket)  # it is finished: only copied
    assert "results.jsonl" in names(bucket)


def test_a_slow_bucket_never_holds_training_up_and_misses_states_rather_than_piling_them_up(tmp_path, bucket):
    bucket.seconds = 0.05
    with RunFolder(tmp_path / "run", {"lr": 1}, sync=Sync(bucket)) as folder:
        began = time.monotonic()
        trainer(folder, **OFTEN).fit()
        seconds = time.monotonic() - began
        snapshots = list((tmp_path / "run" / ".syncing").iterdir())
        links = [path for path in (tmp_path / "run" / ".syncing").rglob("*") if path.is_file()]
    puts = [name for verb, name in bucket.calls if verb == "put" and name.endswith("state.safetensors")]
    assert seconds < 40 * 2 * 0.05  # forty checkpoints of two files
    assert len(puts) < 40
    assert len(links) < 20, snapshots
    assert "checkpoints/step-000000040/state.json" in names(bucket)


def test_a_checkpoint_that_is_pruned_while_it_is_copied_arrives_whole(tmp_path, bucket):
    started, go_on = threading.Event(), threading.Event()
    put = bucket.put

    def waits(name, data):
        if name.endswith("state.safetensors") and not started.is_set():
            started.set()
            assert go_on.wait(30)
        put(name, data)

    bucket.put = waits
    with RunFolder(tmp_path / "run", {"lr": 1}, sync=Sync(bucket)) as folder:
        one = trainer(folder, **OFTEN)
        one.advance()
        one.save()
        assert started.wait(30)
        first = (folder.path / "checkpoints" / "step-000000001" / "state.safetensors").read_bytes()
        for _ in range(5):
            one.advance()
            one.save()
        assert not (folder.path / "checkpoints" / "step-000000001").exists()
        copied = []
        keep = bucket.delete
        bucket.delete = lambda name: (
            copied.append(bytes(bucket.get(name))) if name.endswith("rs") else None,
            keep(name),
        )
        go_on.set()
    assert first in copied


def test_whoever_came_last_owns_the_copy(tmp_path, bucket, capsys):
    with RunFolder(tmp_path / "first", {"lr": 1}, sync=Sync(bucket)) as folder:
        first = trainer(folder, **OFTEN)
        first.advance()
        first.save()
        deadline = time.monotonic() + 20
        while "checkpoints/step-000000001/state.json" not in names(bucket) and time.monotonic() < deadline:
            time.sleep(0.01)
        run(tmp_path / "second", bucket)  # it was thought dead
        there = names(bucket)
        for _ in range(3):
            first.advance()
            first.save()
    assert names(bucket) == there
    assert "was taken over by process" in capsys.readouterr().err


def test_a_stop_copies_what_it_saved(tmp_path, bucket, monkeypatch):
    import os
    import signal

    class Stops(TensorStream):
        def batch(self, step):
            if step == 23:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(step)

    with pytest.raises(Interrupted):
        run(tmp_path / "run", bucket, stream=Stops({"synthetic": ROWS}, 32), checkpoint_seconds=1e6)
    assert "checkpoints/step-000000023/state.json" in names(bucket)


def test_a_damaged_copy_gives_way_to_the_checkpoint_before(tmp_path, bucket, monkeypatch, capsys):
    monkeypatch.setattr(Dies, "at", 17)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    file = tmp_path / "bucket" / "checkpoints" / "step-000000017" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with RunFolder(tmp_path / "second", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step < 17
    assert "step-000000017 is damaged" in capsys.readouterr().err


def test_bringing_a_run_that_was_cut_off_is_done_again(tmp_path, bucket, monkeypatch):
    monkeypatch.setattr(Dies, "at", 17)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    real, left = bucket.pieces, [3]

    def cut(name):
        left[0] -= 1
        if left[0] < 0:
            raise UserError(f"cannot read s3://bucket/run/{name}: status 503")
        return real(name)

    monkeypatch.setattr(bucket, "pieces", cut)
    with pytest.raises(UserError, match="status 503"):
        RunFolder(tmp_path / "second", {"lr": 1}, sync=Sync(bucket))
    left[0] = 10**9
    with RunFolder(tmp_path / "second", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step == 17


def test_a_killed_fetch_blocks_nothing(tmp_path, bucket, monkeypatch):
    """Killed when some files were in place and settings.json, the last, was not."""
    monkeypatch.setattr(Dies, "at", 17)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", bucket, stream=Dies({"synthetic": ROWS}, 32))
    (tmp_path / "second" / ".fetched").mkdir(parents=True)
    (tmp_path / "second" / "log.jsonl").write_text("{}\n")
    with RunFolder(tmp_path / "second", {"lr": 1}, sync=Sync(bucket)) as folder:
        assert trainer(folder).step == 17
    assert not (tmp_path / "second" / ".fetched").exists()


def test_what_is_no_run_is_refused(tmp_path, bucket):
    bucket.put("settings.json", b"[1, 2]")
    with pytest.raises(UserError, match="is no run of ours: choose another --sync"):
        RunFolder(tmp_path / "run", {"lr": 1}, sync=Sync(bucket))


def test_what_belongs_to_a_copy():
    for name in ("log.jsonl", "settings.json", "report.html", "pictures/a.png", "best/dictionaries/a/cfg.json",
                 "checkpoints/step-000000001/state.safetensors"):  # fmt: skip
        assert belongs(name), name
    for name in ("lock", "settings.json.ab12cd_x", ".replaced/log.jsonl", ".syncing/1/log.jsonl", "wandb/run-id.json",
                 "checkpoints/.step-000000001.77/state.json", "checkpoints/step-000000001.before/state.json",
                 "owner.json"):  # fmt: skip
        assert not belongs(name), name


@pytest.fixture
def s3(monkeypatch):
    with serving(monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize("fault", [None, 500, 503, "cut", "drop", "hang", "slow"])
def test_over_s3_with_faults_that_pass(tmp_path, s3, monkeypatch, capsys, fault):
    """Every fifth request fails or all are slow; the second machine ends with the bits of an undisturbed run."""
    whole = run(tmp_path / "whole", Bucket(tmp_path / "other"))
    every = 25 if fault == "hang" else 5  # which takes two seconds each time
    s3.delay = 0.03 if fault == "slow" else 0.0
    s3.fault = lambda method, key, n: fault if n % every == every - 1 and fault != "slow" else None
    monkeypatch.setattr(Dies, "at", 17)
    with pytest.raises(SystemExit):
        run(tmp_path / "first", open_objects("s3://bucket/run"), stream=Dies({"synthetic": ROWS}, 32))
    second = run(tmp_path / "second", open_objects("s3://bucket/run"))
    for a, b in zip(weights(whole), weights(second), strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert "bucket/run/results.jsonl" in s3.objects
    assert not any("checkpoints" in name for name in s3.objects)
    told = capsys.readouterr().err
    assert "brought step" in told
    everything = [told.encode(), *s3.objects.values()]
    everything += [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(word.encode() in data for word in (KEY, SECRET_OF_S3) for data in everything)
