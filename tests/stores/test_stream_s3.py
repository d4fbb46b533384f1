"""Rows from S3, whatever the service answers: those of the local store, in its order."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.stores.objects import PIECE, open_objects
from sparse_coding.stores.store import Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings
from tests.stores.fake_s3 import KEY, SECRET, FakeS3, serving

ROWS, WIDTHS = 1500, {"a": 6, "b": 300}
OPTIONS = {"batch_size": 64, "buffer_rows": 500, "seed": 5}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("local") / "run"
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(ROWS, width, generator=generator) for name, width in WIDTHS.items()}
    with StoreWriter(folder, WIDTHS, Source("none"), codec="fp32", shard_rows=600) as writer:
        writer.append(rows)
        writer.finish()
    return folder


@pytest.fixture
def s3(local, monkeypatch) -> Iterator[FakeS3]:
    with serving(monkeypatch) as fake:
        for path in local.rglob("*"):
            if path.is_file():
                fake.objects[f"bucket/run/{path.relative_to(local).as_posix()}"] = path.read_bytes()
        yield fake


def remote(seconds: float = 20.0) -> Store:
    return Store.open(open_objects("s3://bucket/run", seconds=seconds))


FAULTS = {
    "500": [500], "503": [503], "cut": ["cut"], "flip": ["flip"], "drop": ["drop"], "slow": [None],
    "each in turn": [500, 503, "cut", "flip", "drop"],
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rows_and_their_order_are_those_of_the_local_store(local, s3, fault):
    answers, served = FAULTS[fault], []
    s3.delay = 0.02 if fault == "slow" else 0.0

    def every_fifth(method: str, key: str, n: int) -> str | int | None:
        found = answers[n // 5 % len(answers)] if n % 5 == 0 else None
        served.append(found)
        return found

    s3.fault = every_fifth
    readers = 1 if "flip" in answers else 8  # so that the answer after a flipped one is whole
    with (
        StoreStream(local, ["b"], **OPTIONS) as ours,
        StoreStream(remote(), ["b"], readers=readers, **OPTIONS) as theirs,
    ):
        for step in range(12):
            assert torch.equal(ours.batch(step)["b"], theirs.batch(step)["b"])
    assert set(answers) <= set(served)


def test_training_is_the_same_bit_for_bit(local, s3):
    s3.fault = lambda method, key, n: [500, "cut", "drop"][n // 4 % 3] if n % 4 == 1 else None
    trained = []
    for store in (Store.open(local), remote()):
        members = grid("relu", {"b": 300}, [2.0], varied={"l1_coefficient": [1e-3, 1e-2]})
        with StoreStream(store, ["b"], **OPTIONS) as stream:
            trainer = Trainer(members, stream, TrainingSettings(steps=20, precision="fp32"))
            trainer.fit()
        trained.append([trainer.dictionary(i).state_dict() for i in range(len(members))])
    for ours, theirs in zip(*trained, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def spoil(data: bytes) -> bytes:
    return data[:-700] + bytes([data[-700] ^ 8]) + data[-699:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (spoil, "rows 512 to 599 are not what was written"),
        (lambda data: data[:-700], "truncated"),
        (lambda data: None, "missing"),
    ],
)
def test_damage_on_the_service_is_named_or_left_out(s3, damage, words):
    name = "bucket/run/site-1/00001.safetensors"
    with StoreStream(remote(seconds=3), **OPTIONS) as stream:
        changed = damage(s3.objects.pop(name))
        if changed is not None:
            s3.objects[name] = changed
        with pytest.raises(UserError, match=rf"site-1/00001.*{words}.*--skip-damaged") as caught:
            all(stream.batch(step) for step in range(50))
    assert KEY not in str(caught.value)
    assert SECRET not in str(caught.value)
    with StoreStream(remote(seconds=3), skip_damaged=True, **OPTIONS) as stream:
        assert stream.rows_per_epoch == 900
        assert len(stream.skipped) == 1
        assert "site-1/00001" in stream.skipped[0]


def test_neighbours_are_asked_for_together_and_no_range_is_longer_than_a_piece(s3, monkeypatch):
    asked = []
    store = remote()
    real = type(store.objects).get_range
    monkeypatch.setattr(
        type(store.objects), "get_range", lambda self, name, start, n: asked.append(n) or real(self, name, start, n)
    )
    with StoreStream(store, ["b"], batch_size=64, buffer_rows=2000, shuffled=False) as stream:
        stream.batch(0)
    rows = [n // 1200 for n in asked if n > 16 << 10]
    assert sorted(rows) == [300, 600, 600]
    assert max(asked) <= PIECE
