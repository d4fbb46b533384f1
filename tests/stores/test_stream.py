from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_coding.activations.models import LanguageModel
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.tokens import Contexts
from sparse_coding.errors import UserError
from sparse_coding.stores import block_reader, ranges
from sparse_coding.stores.codec import Affine8
from sparse_coding.stores.objects import FolderObjects
from sparse_coding.stores.order import Order
from sparse_coding.stores.store import Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.training.stream import NormalisedStream, Stream
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

WIDTHS = {"a": 6, "b": 300}
"""The rows of `b` are wide enough to be read to scattered addresses, those of `a` are not."""


def store_of(
    path: Path, rows: int = 1000, *, first: int = 0, codec: str = "fp32", shard_rows: int = 170, scale: float = 1.0
) -> Path:
    """A store whose row i holds `first + i` in its first channel, at every site, and noise in the others."""
    generator = torch.Generator().manual_seed(first)
    values = {name: scale * torch.randn(rows, width, generator=generator) for name, width in WIDTHS.items()}
    for x in values.values():
        x[:, 0] = first + torch.arange(rows)
    affine = {}
    for name, width in WIDTHS.items():
        mean, step = torch.zeros(width), torch.full((width,), scale * 4 / 127)
        mean[0], step[0] = first + rows / 2, rows / 250
        affine[name] = Affine8(mean, step)
    chosen = affine if codec == "int8" else None
    with StoreWriter(path, WIDTHS, Source("none"), codec=codec, shard_rows=shard_rows, affine=chosen) as writer:  # type: ignore
        writer.append(values)
        writer.finish()
    return path


def stream_of(stores: object, sites: list[str] | None = None, **changes) -> StoreStream:
    return StoreStream(stores, sites, **{"batch_size": 32, "buffer_rows": 256, "seed": 3, **changes})  # type: ignore


def numbers(stream: Stream, steps: range, site: str = "b") -> list[int]:
    """Which rows come, in their order."""
    return [int(value) for step in steps for value in stream.batch(step)[site][:, 0]]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return store_of(tmp_path / "store")


@pytest.mark.parametrize("batch_size", [1, 32, 250, 256])
@pytest.mark.parametrize("buffer_rows", [256, 300, 999, 5000])
def test_every_row_comes_exactly_once_per_epoch_at_every_site(tmp_path, buffer_rows, batch_size):
    stores = [store_of(tmp_path / "x", 430, shard_rows=170), store_of(tmp_path / "y", 75, first=1000, shard_rows=9)]
    stream = stream_of(stores, buffer_rows=buffer_rows, batch_size=batch_size)
    assert stream.rows_per_epoch == 505
    assert stream.n_batches == 505 // batch_size
    assert stream.widths == WIDTHS
    found = [stream.batch(step) for step in range(-(-3 * 505 // batch_size))]
    orders = []
    for site in WIDTHS:
        rows = torch.cat([batch[site] for batch in found])
        assert rows.dtype == torch.float32
        for epoch in range(3):
            order = rows[epoch * 505 : (epoch + 1) * 505, 0].int().tolist()
            assert sorted(order) == [*range(430), *range(1000, 1075)]
            orders.append(order)
    assert orders[:3] == orders[3:], "the sites agree"
    assert orders[0] != orders[1] != orders[2]
    originals = {int(row[0]): row for path in stores for shard in shards(path) for row in shard}
    assert all(torch.equal(row, originals[int(row[0])]) for batch in found[:40] for row in batch["b"]), "the whole row"


def shards(path: Path) -> list[Tensor]:
    one = Store.open(path)
    return [one.read_shard("b", shard) for shard in range(len(one.shard_rows))]


def test_batches_are_a_pure_function_of_seed_and_step(store):
    stream = stream_of(store)
    forward = [stream.batch(step) for step in range(70)]
    again = stream_of(store)
    for step in [69, 0, 33, 7, 8, 8, 7, 40, 39, 38, 3]:
        for site in WIDTHS:
            assert torch.equal(again.batch(step)[site], forward[step][site])
    assert numbers(stream_of(store, seed=4), range(10)) != numbers(stream, range(10))


def test_the_order_depends_on_neither_sites_nor_shards_nor_codec_nor_threads(store, tmp_path):
    expected = numbers(stream_of(store), range(40))
    assert numbers(stream_of(store, ["b"]), range(40)) == expected
    assert numbers(stream_of(store, ["a"], readers=7), range(40), "a") == expected
    assert numbers(stream_of(store_of(tmp_path / "cut", shard_rows=33)), range(40)) == expected
    small = stream_of(store_of(tmp_path / "half", codec="int8"))
    assert np.abs(np.array(numbers(small, range(40))) - expected).max() <= 3, "half a step of 1000 / 250, cut down"


def test_a_batch_again_after_it_straddled_two_blocks(store):
    stream = stream_of(store, batch_size=100)
    for step in range(20):
        first = stream.batch(step)
        served = {site: x.clone() for site, x in first.items()}
        for x in first.values():
            x.zero_()  # what is served is the caller's
        read = stream.bytes_read
        assert all(torch.equal(x, served[site]) for site, x in stream.batch(step).items())
        assert stream.bytes_read - read <= 2 * 256 * 306 * 4, "no block is read again"


def test_rows_of_a_batch_come_from_all_over_the_store():
    """Distances between rows, chunks in a batch and blocks, against a uniform shuffle of the same size."""
    n, batch, shards = 2_000_000, 4096, [65_536] * 30 + [33_920]
    order = Order([shards], [768], [1.0], buffer_rows=131_072, seed=1)
    epoch = order.epoch(0)
    firsts = np.concatenate([[0], np.cumsum(shards)])
    tenths, per_chunk, neighbours = [], [], []
    for index in range(epoch.n_blocks):
        pieces = epoch.block(index)
        rows = np.concatenate(
            [firsts[s] + np.arange(b, b + k) for s, b, k in zip(pieces.shard, pieces.start, pieces.rows, strict=True)]
        )
        served = np.empty_like(rows)
        served[order.places(0, index, len(rows))] = rows
        for start in range(0, len(served) - batch, batch):
            one = served[start : start + batch]
            tenths.append(np.histogram(one, 10, (0, n))[0])
            per_chunk.append(np.bincount(one // 5120).max())
            neighbours.append(np.mean(np.abs(np.diff(one)) < 100))
    shares = np.array(tenths) / batch
    # Whole chunks of 5120 rows are drawn, about 25 in a block: a share of 0.1 deviates by sqrt(0.1 * 0.9 / 25).
    assert abs(shares.mean() - 0.1) < 0.005
    assert shares.std() < 1.5 * (0.09 / 25) ** 0.5
    assert max(per_chunk) < 4096 / 25 * 2, "no batch is full of one chunk"
    assert np.mean(neighbours) < 0.003, "rows one after another are as far apart as chance has it: 1 / 25 in one chunk"


def test_rows_of_a_block_are_in_random_order(store):
    """Correlation of place and row: none."""
    order = numbers(stream_of(store, buffer_rows=1000), range(31))
    assert abs(np.corrcoef(np.arange(len(order)), order)[0, 1]) < 0.1
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.1


def test_unshuffled_rows_come_in_the_order_of_the_text(tmp_path):
    stores = [store_of(tmp_path / "x", 430), store_of(tmp_path / "y", 70, first=430)]
    stream = stream_of(stores, shuffled=False, batch_size=50)
    assert numbers(stream, range(20)) == [*range(500), *range(500)]
    with pytest.raises(UserError, match="weights need shuffled rows"):
        stream_of(stores, shuffled=False, weights=[1, 2])


@pytest.mark.parametrize("weights", [[1, 2], [0.5, 1], [0.3, 1.7], [3, 0.25]])
def test_weights_say_how_often_rows_come(tmp_path, weights):
    sizes = [400, 600]
    stores = [store_of(tmp_path / "x", 400, shard_rows=90), store_of(tmp_path / "y", 600, first=400)]
    stream = stream_of(stores, weights=weights, batch_size=20, buffer_rows=200)
    share = [round(weight * size) for weight, size in zip(weights, sizes, strict=True)]
    assert stream.rows_per_epoch == sum(share)
    epochs = 8
    order = np.array(numbers(stream, range(epochs * sum(share) // 20)))
    counts = np.bincount(order, minlength=1000)
    for part, size, weight in zip((counts[:400], counts[400:]), sizes, weights, strict=True):
        assert part.sum() == pytest.approx(epochs * weight * size, abs=20)
        assert set(part) <= {int(epochs * weight), -int(-epochs * weight // 1)}, "none comes twice before all came once"
    for start in range(0, len(order) - 200, 200):
        found = (order[start : start + 200] < 400).mean()
        assert found == pytest.approx(share[0] / sum(share), abs=0.12), "each block has its share of each store"
    assert numbers(stream_of(stores, weights=weights, batch_size=20, buffer_rows=200), range(90, 95)) == (
        order[1800:1900].tolist()
    )


@pytest.mark.parametrize("codec", ["fp32", "bf16", "fp16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_the_codec_gives(tmp_path, codec, dtype):
    path = store_of(tmp_path / "store", 300, codec=codec)
    one = Store.open(path)
    expected = torch.cat([one.decode("b", one.read_shard("b", shard), dtype) for shard in range(2)])
    stream = stream_of(path, ["b"], shuffled=False, batch_size=100, dtype=dtype)
    found = torch.cat([stream.batch(step)["b"] for step in range(3)])
    assert found.dtype == dtype
    assert torch.equal(found, expected)


def test_stores_of_different_codecs_mix(tmp_path):
    codecs = ["fp32", "int8", "bf16"]
    stores = [store_of(tmp_path / codec, 100, codec=codec, first=100 * i) for i, codec in enumerate(codecs)]
    for kept in (stores, [stores[1], store_of(tmp_path / "other", 100, codec="int8", scale=3.0)]):
        stream = stream_of(kept, shuffled=False, batch_size=100)
        for step, path in enumerate(kept):
            one = Store.open(path)
            assert torch.equal(stream.batch(step)["a"], one.decode("a", one.read_rows("a", 0, 0, 100)))


# ---- beside live capture


def model_and_text() -> tuple[LanguageModel, Contexts]:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_layer=2, n_head=4, bos_token_id=0)
    tokens = np.random.default_rng(1).integers(1, 96, (20, 12)).astype(np.uint16)
    mask = np.random.default_rng(2).random(tokens.shape) > 0.2
    return LanguageModel.of(GPT2LMHeadModel(config)), Contexts(tokens, mask, 20, 0, 240, 0, 0, {}, Path())


def test_training_from_a_store_equals_training_from_live_capture(tmp_path):
    """At the same order, bit for bit in fp32, over more than one epoch."""
    sites = ["blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"]
    model, text = model_and_text()
    live = ActivationStream(model, text, sites, batch_size=16, buffer_rows=64, contexts_per_forward=3, shuffled=False)
    total = live.rows_per_epoch
    whole = ActivationStream(model, text, sites, batch_size=total, buffer_rows=total, shuffled=False).batch(0)
    with StoreWriter(tmp_path / "s", live.widths, Source("tiny"), codec="fp32", shard_rows=50) as writer:
        writer.append(ActivationStream(
            model, text, sites, batch_size=total, buffer_rows=total, contexts_per_forward=3, shuffled=False
        ).batch(0))  # fmt: skip
        writer.finish()
    torch.testing.assert_close(live.batch(0)[sites[0]], whole[sites[0]][:16])
    stored = StoreStream(tmp_path / "s", sites, batch_size=16, buffer_rows=100, shuffled=False)
    assert stored.rows_per_epoch == total
    trained = []
    for stream in (live, stored):
        members = [m for site in sites for m in grid(
            "relu", {site: live.widths[site]}, [2.0], varied={"l1_coefficient": [1e-3, 1e-2]}
        )]  # fmt: skip
        trainer = Trainer(members, stream, TrainingSettings(steps=2 * total // 16, precision="fp32"))
        trainer.fit()
        trained.append([trainer.dictionary(i).state_dict() for i in range(len(members))])
    for ours, theirs in zip(*trained, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_it_is_a_stream_that_can_be_normalised(store):
    stream: Stream = stream_of(store)
    normalised = NormalisedStream(stream, "layer-norm")
    raw = stream.batch(7)["b"]
    back = normalised.undo("b", 7)(normalised.batch(7)["b"])
    torch.testing.assert_close(back, raw, rtol=1e-4, atol=1e-3)


# ---- memory, threads


def test_memory_is_two_blocks(tmp_path, monkeypatch):
    made = []
    real = block_reader.BlockMemory
    monkeypatch.setattr(block_reader, "BlockMemory", lambda n, *given: made.append((n, *given)) or real(n, *given))
    path = store_of(tmp_path / "s", 2000, codec="bf16")
    for dtype in (torch.float32, torch.bfloat16):
        made.clear()
        stream = stream_of(path, dtype=dtype)
        for step in range(200):
            batch = stream.batch(step)  # the one before is held while it is made, as in a loop
            assert batch["a"].dtype == dtype
        assert len(made) == 2
        for n, shapes, _ in made:
            assert shapes == {site: (width, torch.bfloat16) for site, width in WIDTHS.items()}
            assert n <= 256 + 5, "a block and a chunk"
    made.clear()
    stream = stream_of(path)
    for step in [*range(20), 5, 100, 3, *range(20, 40)]:
        stream.batch(step)
    assert len(made) == 2


@pytest.mark.parametrize("batch_size", [32, 100])
def test_batches_are_views_and_stay_what_they_were(store, batch_size):
    """Whatever is kept: memory is used again only when no tensor refers to it."""
    stream = stream_of(store, batch_size=batch_size)
    kept = [stream.batch(step) for step in range(30)]
    copies = stream_of(store, batch_size=batch_size, readers=1)
    expected = [{site: x.clone() for site, x in copies.batch(step).items()} for step in range(30)]
    for ours, theirs in zip(kept, expected, strict=True):
        assert all(torch.equal(x, theirs[site]) for site, x in ours.items())
    storages = {batch["b"].untyped_storage().data_ptr() for batch in kept}
    assert len(storages) < 30, "batches share the memory of their block"


def test_what_is_written_to_a_batch_is_not_served_again(store):
    """With torch; a caller that writes gets copies from then on, so no block is read for every batch."""
    plain = stream_of(store)
    expected = [{site: x.clone() for site, x in plain.batch(step).items()} for step in range(40)]
    stream = stream_of(store)
    for step in [*range(40), 3, 2, 2, 20, 21, 20]:
        batch = stream.batch(step)
        assert all(torch.equal(x, expected[step][site]) for site, x in batch.items())
        with torch.no_grad():
            batch["b"].mul_(2)
        batch["a"][3, 2] = 7
    assert stream.bytes_read < 14 * 256 * 306 * 4


def test_batches_in_inference_mode(store):
    with torch.inference_mode():
        order = numbers(stream_of(store), range(60))
    assert order == numbers(stream_of(store), range(60))


def test_rows_that_fit_into_one_block_are_read_once(store):
    stream = stream_of(store, buffer_rows=2000)
    orders = [numbers(stream, range(epoch * 125, epoch * 125 + 125)) for epoch in range(3)]  # 4 epochs each
    assert sorted(orders[0]) == sorted(list(range(1000)) * 4)
    assert stream.bytes_read == 1000 * (6 + 300) * 4
    assert orders == [numbers(stream_of(store, buffer_rows=2000), range(n, n + 125)) for n in (0, 125, 250)]


def readers() -> int:
    return sum(thread.name == "store reader" for thread in threading.enumerate())


def eventually(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_threads_end_with_the_stream(store):
    gc.collect()
    assert eventually(lambda: readers() == 0)
    stream = stream_of(store, readers=3)
    stream.batch(0)
    assert readers() == 3
    del stream
    gc.collect()
    assert eventually(lambda: readers() == 0)
    with stream_of(store) as stream, pytest.raises(KeyError):
        raise KeyError(stream.batch(3))
    assert eventually(lambda: readers() == 0)
    with pytest.raises(RuntimeError, match="closed"):
        stream.batch(0)


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
from sparse_coding.stores import block_reader
from sparse_coding.stores.stream import StoreStream
stream = StoreStream(sys.argv[1], batch_size=32, buffer_rows=256)
stream.batch(0)
time.sleep(3)  # the next block is there, on a busy machine too
block_reader.FileRows.read = lambda *given: time.sleep(1000)
for step in range(1, 9):
    stream.batch(step)
END
"""


@pytest.mark.parametrize("end", ["", "raise ValueError", "import os, signal; os.kill(os.getpid(), signal.SIGINT)"])
def test_a_program_ends_while_rows_are_being_read(store, end):
    """Neither its end nor an exception waits for threads that hang."""
    command = [sys.executable, "-c", SCRIPT.replace("END", end), str(store)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, cwd=root, check=False)
    assert (done.returncode == 0) == (not end), done.stderr


def test_time_spent_waiting_is_counted(store, monkeypatch):
    read = ranges.FileRows.read
    monkeypatch.setattr(ranges.FileRows, "read", lambda *given: time.sleep(0.01) or read(*given))
    stream = stream_of(store)
    for step in range(10):
        stream.batch(step)
    assert stream.seconds_waiting > 0.02


def test_the_next_block_is_read_while_one_is_served(store, monkeypatch):
    stream = stream_of(store)
    stream.batch(0)
    assert eventually(lambda: stream.bytes_read > 256 * 306 * 4), "more than the block that was asked for"
    before = stream.seconds_waiting
    for step in range(1, 15):
        assert eventually(lambda: stream._reader._held[0].done.is_set())
        stream.batch(step)
    assert stream.seconds_waiting == before


# ---- damage and mistakes


def file_of(store: Path, shard: int, site: str = "b") -> Path:
    one = Store.open(store)
    return store / one.manifest.file_name(site, shard)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(data)


def spoil_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[40] = 0
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "word", "verify"),
    [
        (cut, "truncated", False),
        (Path.unlink, "missing", False),
        (spoil_header, "damaged", False),
        (flip, "rows 0 to 169 are not what was written", True),
    ],
)
def test_damaged_files_are_named_or_left_out(store, damage, word, verify):
    path = file_of(store, 2)
    damage(path)
    with pytest.raises(UserError, match=rf"{path}.*{word}.*--skip-damaged"):
        stream_of(store, verify=verify)
    stream = stream_of(store, skip_damaged=True)
    assert len(stream.skipped) == 1
    assert str(path) in stream.skipped[0]
    assert stream.rows_per_epoch == 830
    order = numbers(stream, range(26))[:830]
    assert sorted(order) == [*range(340), *range(510, 1000)]
    assert stream_of(store, ["a"]).rows_per_epoch == 1000, "the other site is whole"


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_damage_while_reading_is_an_error_that_names_the_file(store, damage):
    stream = stream_of(store)
    stream.batch(0)
    damage(file_of(store, 2))
    for _ in range(2):  # no hang and no silence when asked again
        with pytest.raises(UserError, match=r"00002.*(truncated|missing)"):
            numbers(stream, range(80))


@pytest.mark.parametrize("readers", [1, 3])
def test_a_flipped_bit_is_named_as_its_rows_are_read(store, readers):
    path = file_of(store, 2)
    flip(path)
    stream = stream_of(store, readers=readers)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"{path} is damaged: rows 0 to 169 .*--skip-damaged"):
            numbers(stream, range(40))
    assert len(numbers(stream_of(store, ["a"]), range(40), "a")) == 1280, "the other site is whole"


def test_a_store_of_which_a_part_is_to_be_read(store):
    """As training does that keeps the last rows apart: the files stay what they are."""
    one = Store.open(store)
    one.shard_rows[4:] = [7, 0]
    with StoreStream(one, batch_size=32, buffer_rows=256) as stream:
        assert stream.rows_per_epoch == 687
        assert sorted(numbers(stream, range(687))[:687]) == list(range(687))


def test_rows_are_checked_the_first_time_and_read_straight_to_their_places_afterwards(store, monkeypatch):
    checked, straight = [], []
    real_check, real_read = Store.check_rows, ranges.read_rows
    monkeypatch.setattr(Store, "check_rows", lambda self, *given: checked.append(1) or real_check(self, *given))
    monkeypatch.setattr(ranges, "read_rows", lambda *given: straight.append(1) or real_read(*given))
    stream = stream_of(store)
    first, begun = numbers(stream, range(31)), len(checked)
    assert begun >= 12, "two sites of six shards"
    orders = [numbers(stream, range(k * 125, k * 125 + 125)) for k in (1, 2)]
    assert len(straight) > 100
    assert len(checked) < 2 * begun + 60
    fresh = stream_of(store, readers=1)
    assert orders == [numbers(fresh, range(k * 125, k * 125 + 125)) for k in (1, 2)]
    assert first == numbers(stream_of(store), range(31))
    os.truncate(file_of(store, 3), file_of(store, 3).stat().st_size - 10)
    with pytest.raises(UserError, match=r"00003.*truncated"):
        numbers(stream, range(375, 500))


def test_files_that_were_exchanged_are_named(store):
    """Each is whole, but not the one the manifest means."""
    paths = file_of(store, 1), file_of(store, 2)
    first, second = (path.read_bytes() for path in paths)
    paths[0].write_bytes(second)
    paths[1].write_bytes(first)
    with pytest.raises(UserError, match=r"00001.*header is not the one that was written"):
        stream_of(store)


def as_format_1(store: Path) -> None:
    """The store as versions without sums wrote it."""
    manifest = json.loads((store / "manifest.json").read_text())
    manifest["format"] = 1
    for shard in manifest["shards"]:
        for file in shard["files"].values():
            del file["header"]
    (store / "manifest.json").write_text(json.dumps(manifest))


def test_a_store_of_format_1_is_read_and_verified_by_sha256(store):
    expected = numbers(stream_of(store), range(40))
    as_format_1(store)
    assert numbers(stream_of(store), range(40)) == expected
    flip(file_of(store, 2))
    assert stream_of(store).rows_per_epoch == 1000
    assert stream_of(store, skip_damaged=True).rows_per_epoch == 830


def test_not_a_number_in_a_store_of_format_1_is_found_with_its_file_and_row(store):
    as_format_1(store)
    path = file_of(store, 1)
    data = np.fromfile(path, np.uint8)
    rows = data[int.from_bytes(data[:8].tobytes(), "little") + 8 :].view(np.float32).reshape(-1, 300)
    rows[33, 7] = np.nan
    data.tofile(path)
    with pytest.raises(UserError, match=rf"{path} holds NaN or infinity, first in row 33 \(1 such"):
        numbers(stream_of(store), range(32))
    rows[33, 7], rows[34, :8] = 0, 3e38  # overflows a sum
    data.tofile(path)
    assert len(numbers(stream_of(store), range(31))) == 992


def test_all_shards_damaged(store):
    for shard in range(6):
        file_of(store, shard).unlink()
    with pytest.raises(UserError, match="all shards"):
        stream_of(store, skip_damaged=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 300}, "buffer_rows is 256, less than one batch of 300"),
        ({"batch_size": 1001, "buffer_rows": 1001}, "the stores give 1000 rows, fewer than one batch of 1001"),
        ({"sites": ["c"]}, "has no site 'c'"),
        ({"sites": []}, "at least one"),
        ({"sites": ["a", "a"]}, "each once"),
        ({"weights": [1, 2]}, "weights has 2 numbers for 1 stores"),
        ({"weights": [0.0]}, "greater than 0"),
        ({"stores": []}, "no store is given"),
        ({"stores": ["nowhere"]}, "nowhere is no store"),
    ],
)
def test_mistakes(store, changes, message):
    with pytest.raises(UserError, match=message):
        stream_of(**{"stores": store, **changes})


def test_widths_must_agree(store, tmp_path):
    with StoreWriter(tmp_path / "other", {"a": 5, "b": 300}, Source("none"), codec="fp32") as writer:
        writer.append({"a": torch.zeros(9, 5), "b": torch.zeros(9, 300)})
        writer.finish()
    with pytest.raises(UserError, match=r"different widths at a: \[5, 6\]"):
        stream_of([store, tmp_path / "other"])
    assert stream_of([store, tmp_path / "other"], ["b"]).rows_per_epoch == 1009


# ---- other places


def test_objects_that_are_no_files_of_this_machine(store, monkeypatch):
    """The way rows take from S3: whole ranges through `Objects`, scattered afterwards."""

    class Remote(FolderObjects):
        pass

    expected = numbers(stream_of(store), range(40))
    monkeypatch.setattr(ranges, "FolderObjects", str)
    stream = stream_of(Store.open(Remote(store)), readers=5)
    assert numbers(stream, range(40)) == expected
    file_of(store, 2).unlink()
    with pytest.raises(UserError, match="missing"):
        numbers(stream, range(40, 80))
