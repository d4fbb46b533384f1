from __future__ import annotations

import errno
import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sparse_coding.errors import UserError
from sparse_coding.stores import ranges
from sparse_coding.stores.codec import CODECS
from sparse_coding.stores.manifest import from_json, read_manifest
from sparse_coding.stores.objects import FolderObjects, open_objects
from sparse_coding.stores.store import Damaged, Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.stores.verbs import damages
from tests.stores.fake_s3 import KEY, SECRET, serving

WIDTHS = {"blocks.0.mlp": 6, "blocks.1": 4}
SOURCE = Source("tiny", None, {"sha256": "abc", "part": ("train", 1)}, "bpe", 8, True)
TOKENS = {"token": "U16", "context": "I64", "position": "I32"}
N = 50


def sample(n=N):
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, width, generator=generator) * 2 + 1 for name, width in WIDTHS.items()}
    index = np.arange(n)
    return rows, {"token": index * 7 % 600, "context": index // 8 + 2**40, "position": index % 8}


def write(url, rows, tokens, last=None, chunk=7, finish=True, columns=TOKENS, **options):
    options = {"codec": "fp32", "shard_rows": 16, **options}
    with StoreWriter(url, WIDTHS, SOURCE, tokens=columns, **options) as writer:
        for start in range(writer.rows, len(rows["blocks.1"]) if last is None else last, chunk):
            chosen = slice(start, start + chunk)
            writer.append({k: v[chosen] for k, v in rows.items()}, {k: v[chosen] for k, v in tokens.items()})
        if finish:
            writer.finish()
    return writer


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("codec", CODECS)
def test_rows_and_tokens_come_back(tmp_path, codec):
    rows, tokens = sample()
    write(tmp_path / "s", rows, tokens, codec=codec)
    store = Store.open(tmp_path / "s")
    assert (store.rows, store.shard_rows, store.widths) == (N, [16, 16, 16, 2], WIDTHS)
    tolerance = {"fp32": 0, "bf16": 0.03, "fp16": 0.004, "int8": 0.5}[codec]
    for name, x in rows.items():
        stored = torch.cat([store.read_rows(name, i, 0, n) for i, n in enumerate(store.shard_rows)])
        assert stored.dtype == store.dtype
        assert (store.decode(name, stored) - x).abs().max() <= tolerance
        assert torch.equal(store.read_shard(name, 1), stored[16:32])
        assert torch.equal(store.read_rows(name, 2, 3, 5), stored[35:40])
        out = torch.empty(5, WIDTHS[name], dtype=store.dtype)
        store.read_rows_into(name, 2, 3, out)
        assert torch.equal(out, stored[35:40])
        assert store.read_rows(name, 0, 16, 0).shape == (0, WIDTHS[name])
    found = [store.read_tokens(i, 0, n) for i, n in enumerate(store.shard_rows)]
    for column, values in tokens.items():
        assert (np.concatenate([one[column] for one in found]) == values).all()
    assert store.read_tokens(1, 4, 3)["context"].tolist() == tokens["context"][20:23].tolist()


def test_plain_safetensors_reads_the_files(tmp_path):
    """The example of docs/stores.md, on int8."""
    rows, tokens = sample()
    write(tmp_path, rows, tokens, codec="int8")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    site = manifest["sites"]["blocks.1"]
    parts = [load_file(tmp_path / f"{site['folder']}/{i:05d}.safetensors")["rows"] for i in range(4)]
    x = torch.cat(parts).float()
    x = x * torch.tensor(site["scale"]) + torch.tensor(site["mean"])
    store = Store.open(tmp_path)
    ours = torch.cat([store.decode("blocks.1", store.read_shard("blocks.1", i)) for i in range(4)])
    assert torch.allclose(x, ours, atol=1e-5)
    assert torch.equal(load_file(tmp_path / "tokens/00003.safetensors")["position"], torch.tensor([0, 1]).int())


def test_statistics_are_of_all_rows(tmp_path):
    rows, tokens = sample()
    write(tmp_path, rows, tokens, codec="int8")
    for name, one in Store.open(tmp_path).manifest.statistics.items():
        x = rows[name].double()
        torch.testing.assert_close(torch.tensor(one.mean, dtype=torch.float64), x.mean(0))
        torch.testing.assert_close(torch.tensor(one.variance, dtype=torch.float64), x.var(0, correction=0))


def test_how_rows_are_handed_in_does_not_matter(tmp_path):
    rows, tokens = sample()
    for chunk in (1, 16, 50):
        write(tmp_path / str(chunk), rows, tokens, chunk=chunk, codec="int8")
    first = files(tmp_path / "1")
    for chunk in (16, 50):
        other = files(tmp_path / str(chunk))
        assert {name: data for name, data in other.items() if name != "manifest.json"} == {
            name: data for name, data in first.items() if name != "manifest.json"
        }


def test_a_manifest_comes_back_as_it_was(tmp_path):
    rows, tokens = sample()
    manifest = write(tmp_path, rows, tokens, codec="int8", modules={"blocks.1": "h.1"}, run="r").manifest
    assert read_manifest(open_objects(tmp_path)) == manifest
    assert from_json(manifest.to_json()) == manifest


# ---- stopping and going on


@pytest.mark.parametrize("codec", ["fp32", "int8"])
@pytest.mark.parametrize("stop", [1, 15, 16, 17, 33, 49])
def test_a_stopped_store_goes_on_to_the_same_files(tmp_path, codec, stop):
    rows, tokens = sample()
    write(tmp_path / "whole", rows, tokens, chunk=1, codec=codec)
    writer = write(tmp_path / "s", rows, tokens, last=stop, chunk=1, codec=codec, finish=False)
    assert writer.rows == stop // 16 * 16
    with pytest.raises(UserError, match=f"not finished .{writer.rows} rows"):
        Store.open(tmp_path / "s")
    assert Store.open(tmp_path / "s", unfinished=True).rows == writer.rows
    write(tmp_path / "s", rows, tokens, chunk=1, codec=codec)
    assert files(tmp_path / "s") == files(tmp_path / "whole")


class Watched(FolderObjects):
    """A folder that notes what is put, slowly, and fails on request."""

    def __init__(self, folder, seconds=0.0, fail=lambda name: False):
        super().__init__(folder)
        self.seconds, self.fail, self.lock = seconds, fail, threading.Lock()
        self.log: list[str] = []
        self.in_flight = self.most = 0

    def put(self, name, data):
        counted = name != "manifest.json"
        with self.lock:
            self.in_flight += counted
            self.most = max(self.most, self.in_flight)
        time.sleep(self.seconds)
        with self.lock:
            self.in_flight -= counted
        if self.fail(name):
            raise UserError(f"cannot write {name}")
        super().put(name, data)
        self.log.append(name)


def test_the_manifest_counts_a_shard_only_when_its_files_are_there(tmp_path):
    rows, tokens = sample()
    objects = Watched(tmp_path, 0.01)
    seen = []
    put = objects.put

    def watched(name, data):
        if name == "manifest.json":
            shards = from_json(bytes(data)).shards
            missing = [file for shard in shards for file in shard.files if file not in objects.log]
            seen.append((len(shards), missing))
        put(name, data)

    objects.put = watched
    write(objects, rows, tokens)
    assert seen[0] == (0, [])
    assert seen[-1] == (4, [])
    assert len(seen) > 2
    assert not any(missing for _, missing in seen)


def test_a_shard_is_counted_when_it_is_durable_not_when_the_next_one_is_sent(tmp_path):
    rows, _ = sample()
    objects = Watched(tmp_path)
    writer = StoreWriter(objects, WIDTHS, SOURCE, shard_rows=16)
    writer.append({name: x[:16] for name, x in rows.items()})
    for row in range(16, 31):  # less than a second shard
        writer.append({name: x[row : row + 1] for name, x in rows.items()})
        time.sleep(0.05)
        if counted := read_manifest(objects).rows:
            break
    writer.close()
    assert counted == 16


def test_uploads_in_flight_are_bounded(tmp_path):
    rows, tokens = sample(200)
    for uploads in (1, 3):
        objects = Watched(tmp_path / str(uploads), 0.005)
        write(objects, rows, tokens, uploads=uploads)
        assert objects.most <= uploads
    assert objects.most > 1


def test_rows_wait_where_the_uploads_do(tmp_path):
    """So memory holds the shard being filled and `uploads` files, however slow the service is."""
    rows, _ = sample(200)
    objects, over = Watched(tmp_path), threading.Event()
    begun = StoreWriter(objects, WIDTHS, SOURCE, shard_rows=16, uploads=4)
    objects.fail = lambda name: not over.wait(10)
    thread = threading.Thread(target=begun.append, args=(rows,))
    thread.start()
    time.sleep(0.5)
    waiting, appended = thread.is_alive(), begun.appended
    over.set()
    thread.join(10)
    begun.finish()
    assert waiting
    assert appended <= 3 * 16  # two shards of two files in flight, and one that is full
    assert Store.open(tmp_path).rows == 200


def test_a_manifest_whose_numbers_do_not_fit_each_other_is_refused(tmp_path):
    rows, tokens = sample()
    data = json.loads(write(tmp_path, rows, tokens).manifest.to_json())
    data["shards"][0]["rows"] += 2**20
    data["rows"] += 2**20
    with pytest.raises(UserError, match="1048592 rows need"):
        from_json(json.dumps(data))


def test_a_failed_upload_stops_the_writer_and_keeps_what_is_durable(tmp_path):
    rows, tokens = sample()
    with pytest.raises(UserError, match="cannot write site-1/00001"):
        write(Watched(tmp_path, fail=lambda name: name == "site-1/00001.safetensors"), rows, tokens)
    assert Store.open(tmp_path, unfinished=True).rows == 16
    write(tmp_path, rows, tokens)
    Store.open(tmp_path).check("site-1/00001.safetensors", 1)


def test_an_error_of_the_caller_is_the_one_told(tmp_path):
    rows, _ = sample()
    over = threading.Event()
    objects = Watched(tmp_path, fail=lambda name: name == "site-0/00001.safetensors" and over.wait(10))

    def mistaken():
        with StoreWriter(objects, WIDTHS, SOURCE, shard_rows=16) as writer:
            writer.append({name: x[:40] for name, x in rows.items()})
            over.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        mistaken()
    assert Store.open(tmp_path, unfinished=True).rows == 16


# ---- mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"codec": "bf16"}, "codec is fp32 there and bf16 here"),
        ({"shard_rows": 8}, "shard_rows is 16 there and 8 here"),
        ({"columns": {**TOKENS, "token": "I32"}}, "tokens is .*U16.* there and .*I32.* here"),
    ],
)
def test_other_settings_are_named(tmp_path, options, words):
    rows, tokens = sample()
    write(tmp_path, rows, tokens, last=20, finish=False)
    with pytest.raises(UserError, match=words):
        write(tmp_path, rows, tokens, **options)


def test_another_source_and_other_sites_are_named(tmp_path):
    rows, tokens = sample()
    write(tmp_path, rows, tokens, last=20, finish=False)
    options = {"codec": "fp32", "shard_rows": 16, "tokens": TOKENS}
    with pytest.raises(UserError, match="revision is None there and main here"):
        StoreWriter(tmp_path, WIDTHS, replace(SOURCE, revision="main"), **options)
    with pytest.raises(UserError, match="sites is"):
        StoreWriter(tmp_path, {"blocks.1": 4}, SOURCE, **options)


def test_a_complete_store_and_a_folder_of_other_files_are_left_alone(tmp_path):
    rows, tokens = sample()
    write(tmp_path / "s", rows, tokens)
    before = files(tmp_path / "s")
    with pytest.raises(UserError, match="complete store of 50 rows"):
        write(tmp_path / "s", rows, tokens)
    assert files(tmp_path / "s") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match=r"holds other files .thesis.tex"):
        write(tmp_path / "other", rows, tokens)
    with pytest.raises(UserError, match="is no store"):
        Store.open(tmp_path / "other")
    assert "thesis.tex" in files(tmp_path / "other")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_named(tmp_path, bad):
    rows, tokens = sample()
    rows["blocks.1"][23, 2] = bad
    with pytest.raises(UserError, match=r"blocks.1 hold NaN or infinity, first in row 23"):
        write(tmp_path, rows, tokens)
    assert Store.open(tmp_path, unfinished=True).rows == 16


def test_an_empty_store_and_unknown_sites_are_refused(tmp_path):
    rows, tokens = sample()
    write(tmp_path / "empty", rows, tokens, last=0)
    with pytest.raises(UserError, match="has no rows"):
        Store.open(tmp_path / "empty")
    write(tmp_path / "s", rows, {}, columns={})
    store = Store.open(tmp_path / "s")
    with pytest.raises(UserError, match=r"did you mean 'blocks.1'"):
        store.need_sites(["block.1"])
    with pytest.raises(UserError, match="keeps no tokens"):
        store.read_tokens(0, 0, 1)


def test_settings_out_of_range_are_refused(tmp_path):
    for options in ({"shard_rows": 0}, {"uploads": 0}, {"codec": "bf17"}, {"tokens": {"tokens": "I32"}}):
        with pytest.raises(UserError, match=r"allowed|at least 1"):
            StoreWriter(tmp_path, WIDTHS, SOURCE, **options)
    assert files(tmp_path) == {}


# ---- damage


def damage(path, kind):
    data = bytearray(path.read_bytes())
    if kind == "missing":
        path.unlink()
        return
    if kind == "truncated":
        data = data[:-3]
    elif kind == "longer":
        data += b"\0"
    elif kind == "row":
        data[-1] ^= 1
    elif kind == "header":
        data[12] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", ["missing", "truncated", "longer", "row", "header"])
def test_damage_is_named(tmp_path, kind):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)
    name = "site-1/00001.safetensors"
    damage(tmp_path / name, kind)
    for action in (lambda store: store.read_shard("blocks.1", 1), lambda store: store.check(name, 1)):
        with pytest.raises(Damaged, match=name) as caught:
            action(Store.open(tmp_path))
        assert caught.value.name == name
    store = Store.open(tmp_path)
    with pytest.raises(Damaged, match=name):
        store.read_rows("blocks.1", 1, 0, 1)
    assert torch.equal(store.read_rows("blocks.1", 0, 0, 16), rows["blocks.1"][:16])


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)
    store = Store.open(tmp_path)
    store.read_rows("blocks.1", 1, 0, 1)
    damage(tmp_path / "site-1/00001.safetensors", "truncated")
    with pytest.raises(Damaged, match=r"site-1/00001.safetensors is truncated"):
        store.read_rows("blocks.1", 1, 0, 16)


def failing(monkeypatch, path, code):
    """Reading a file fails as a disk does."""
    real = type(path).open

    def open_(self, *arguments, **named):
        if self == path:
            raise OSError(code, os.strerror(code), str(self))
        return real(self, *arguments, **named)

    monkeypatch.setattr(type(path), "open", open_)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_file_that_the_system_cannot_read_is_damaged(tmp_path, monkeypatch, code):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)
    name = "site-1/00001.safetensors"
    opened = Store.open(tmp_path)
    opened.read_rows("blocks.1", 1, 0, 1)
    failing(monkeypatch, tmp_path / name, code)
    for store in (opened, Store.open(tmp_path)):
        for action in (
            lambda store: store.check(name, 1),
            lambda store: store.check_shard("blocks.1", 1),
            lambda store: store.read_rows("blocks.1", 1, 0, 16),
            lambda store: store.read_shard("blocks.1", 1),
        ):
            with pytest.raises(Damaged, match=f"{name} cannot be read: {os.strerror(code)}") as caught:
                action(store)
            assert caught.value.name == name
    assert [one.name for one in damages(Store.open(tmp_path))] == [name], "verify goes on and lists it"
    with StoreStream(tmp_path, ["blocks.1"], batch_size=4, buffer_rows=16, skip_damaged=True) as stream:
        assert stream.rows_per_epoch == N - 16
        assert name in stream.skipped[0]


def test_too_many_open_files_say_nothing_about_a_file(tmp_path, monkeypatch):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)
    failing(monkeypatch, tmp_path / "site-1" / "00001.safetensors", errno.EMFILE)
    with pytest.raises(UserError, match="Too many open files") as caught:
        Store.open(tmp_path).check("site-1/00001.safetensors", 1)
    assert not isinstance(caught.value, Damaged)


@pytest.mark.parametrize("call", ["open", "preadv"])
def test_a_read_that_fails_in_training_names_the_file_and_the_way_out(tmp_path, monkeypatch, call):
    rows, tokens = sample()
    write(tmp_path, rows, tokens)

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with StoreStream(tmp_path, ["blocks.1"], batch_size=4, buffer_rows=16) as stream:
        monkeypatch.setattr(ranges.os, call, fails)
        with pytest.raises(
            Damaged, match=r"site-1/0000\d.safetensors cannot be read: Input/output error; .*--skip-damaged"
        ):
            stream.batch(0)
        monkeypatch.undo()


# ---- on S3


def test_a_store_on_s3_is_the_same_whatever_the_service_answers(tmp_path, monkeypatch):
    rows, tokens = sample()
    write(tmp_path / "local", rows, tokens, codec="bf16")
    with serving(monkeypatch) as fake:
        kinds = [500, 503, "cut", "drop"]
        fake.fault = lambda method, key, n: kinds[n % 4] if n % 5 == 2 else None
        objects = open_objects("s3://bucket/run", seconds=30)
        write(objects, rows, tokens, codec="bf16", last=20, finish=False)
        write(objects, rows, tokens, codec="bf16")
        store = Store.open(objects)
        local = Store.open(tmp_path / "local")
        for name in WIDTHS:
            assert torch.equal(store.read_shard(name, 2), local.read_shard(name, 2))
            assert torch.equal(store.read_rows(name, 1, 3, 9), local.read_rows(name, 1, 3, 9))
        written = {key.removeprefix("bucket/run/"): data for key, data in fake.objects.items()}
        there = files(tmp_path / "local")
        assert {name: data for name, data in written.items() if name != "manifest.json"} == {
            name: data for name, data in there.items() if name != "manifest.json"
        }
        everything = b"".join(fake.objects.values())
        assert KEY.encode() not in everything
        assert SECRET.encode() not in everything
