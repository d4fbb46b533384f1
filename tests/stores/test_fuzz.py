"""Damaged manifests, headers and shards: a clear error or the right rows; never a crash, a hang, a large allocation."""

from __future__ import annotations

import copy
import json
import random
import tracemalloc

import numpy as np
import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.stores import store as store_module
from sparse_coding.stores.shard_file import Damaged
from sparse_coding.stores.store import Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.stores.sums import sum_of

WIDTHS = {"a": 5, "b": 3}
TOKENS = {"token": "I32", "position": "I32"}
LARGEST = 1 << 20
"""Bytes that reading this small store may take at its peak."""
STRANGE = [
    *(None, True, -1, 0, 1, 3, 2**40, 2**63, 10**400, 1.5, 1e308, "", "x", "../../etc/passwd", "/etc/passwd", "tokens"),
    *("int8", "fp32", "0" * 64, "\u0000", [], [1], {}, {"rows": 1}),
]


@pytest.fixture(params=["bf16", "int8"])
def folder(request, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(20, width, generator=generator) for name, width in WIDTHS.items()}
    tokens = {"token": np.arange(20), "position": np.arange(20) % 4}
    with StoreWriter(
        tmp_path, WIDTHS, Source("m", text={"a": [1]}), codec=request.param, shard_rows=8, tokens=TOKENS
    ) as writer:
        writer.append(rows, tokens)
        writer.finish()
    return tmp_path


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of the largest tensor that reading made; numpy's and Python's memory is seen by tracemalloc."""
    largest = [0]
    real = torch.empty

    def empty(*shape, **options):
        largest[0] = max(largest[0], int(np.prod(shape)) * 4)
        assert largest[0] < LARGEST, shape
        return real(*shape, **options)

    monkeypatch.setattr(store_module.torch, "empty", empty)
    tracemalloc.start()
    yield
    tracemalloc.stop()


def read_everything(folder) -> dict[str, list]:
    store = Store.open(folder)
    found: dict[str, list] = {}
    for shard, rows in enumerate(store.shard_rows):
        for site in store.widths:
            found.setdefault(site, []).append(store.decode(site, store.read_rows(site, shard, 0, rows)))
            store.read_shard(site, shard)
        if store.manifest.tokens:
            found.setdefault("tokens", []).append(store.read_tokens(shard, 0, rows))
        for name in store.manifest.shards[shard].files:
            store.check(name, shard)
    return found


def survives(folder) -> bool:
    """Whether reading went well; a `UserError` of one line is the only other end."""
    said, took = None, LARGEST
    for _ in range(2):  # once in a while Python's own table of names grows; not twice
        if took >= LARGEST:
            tracemalloc.reset_peak()
            before, said = tracemalloc.get_traced_memory()[0], None
            try:
                read_everything(folder)
            except UserError as error:
                said = str(error)
            took = tracemalloc.get_traced_memory()[1] - before
    assert took < LARGEST
    assert said is None or ("\n" not in said and len(said) < 2000)
    return said is None


def leaves(data, path=()):
    if isinstance(data, dict):
        for key, value in data.items():
            yield (*path, key)
            yield from leaves(value, (*path, key))
    elif isinstance(data, list):
        for key, value in enumerate(data[:2]):
            yield (*path, key)
            yield from leaves(value, (*path, key))


def replaced(data, path, value):
    changed = copy.deepcopy(data)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


def removed(data, path):
    changed = copy.deepcopy(data)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


@pytest.mark.parametrize("folder", ["int8"], indirect=True)
def test_every_value_of_a_manifest_replaced_by_every_strange_one(folder, allocated):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    ok = set()
    for leaf in leaves(manifest):
        there = value_at(manifest, leaf)
        for value in STRANGE:
            if value != there or type(value) is not type(there):
                path.write_text(json.dumps(replaced(manifest, leaf, value)))
                if survives(folder):
                    ok.add(tuple("*" if isinstance(key, int) else key for key in leaf))
    # What nothing can be checked against: facts for people, and numbers of the manifest, which no checksum covers.
    numbers = {("statistics", site, key, "*") for site in WIDTHS for key in ("mean", "variance")}
    numbers |= {("sites", site, key, "*") for site in WIDTHS for key in ("mean", "scale")}
    facts = {(name,) for name in ("model", "revision", "tokenizer", "text", "context", "exclude_special", "shard_rows")}
    people = {
        ("run",),
        ("versions",),
        ("text", "a"),
        ("text", "a", "*"),
        *(("sites", site, "module") for site in WIDTHS),
    }
    # A file of format 1 has no sum of its header; one with a sum that is wrong is refused.
    sums = {
        ("format",),
        *(("shards", "*", "files", name, "header") for shard in manifest["shards"] for name in shard["files"]),
    }
    assert ok <= numbers | facts | people | sums


def value_at(data, path):
    for key in path:
        data = data[key]
    return data


def test_a_manifest_that_lacks_something(folder, allocated):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for leaf in leaves(manifest):
        path.write_text(json.dumps(removed(manifest, leaf)))
        survives(folder)
    for name in ("format", "complete", "rows", "codec", "sites", "shards", "model", "shard_rows"):
        path.write_text(json.dumps(removed(manifest, (name,))))
        assert not survives(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "[" * 100_000, '{"a":' * 50_000, "\xff", "9" * 5000, "NaN", '{"format": 1.0}']
)
def test_manifests_that_are_none(folder, allocated, text):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    assert not survives(folder)


def test_random_bytes_of_a_manifest(folder, allocated):
    path, chance = folder / "manifest.json", random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3, 20])):
            data[chance.randrange(len(data))] = chance.randrange(256)
        path.write_bytes(data[: chance.choice([len(data), len(data), chance.randrange(len(data))])])
        survives(folder)


HEADERS = [
    {}, [], None, 1, {"rows": None}, {"rows": []}, {"rows": {}}, {"rows": {"dtype": "F64"}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": []}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": [0]}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": [-80, 0]}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": [2**62, 2**62 + 80]}},
    {"rows": {"dtype": "BF16", "shape": [2**40, 2**40], "data_offsets": [0, 2**81]}},
    {"rows": {"dtype": "BF16", "shape": [5, 8], "data_offsets": [0, 80]}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": [8, 88]}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": [0, 80]}, "more": {}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": {"0": 1}}},
    {"rows": {"dtype": "BF16", "shape": [8, 5], "data_offsets": ["0", "80"]}},
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: json.dumps(header)[:60])
def test_headers_that_say_something_else(folder, allocated, header):
    path = folder / "site-0/00000.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:8] + json.dumps(header).encode().ljust(start - 8) + data[start:])
    with pytest.raises(Damaged, match=r"site-0/00000.safetensors"):
        read_everything(folder)
    assert not survives(folder)


@pytest.mark.parametrize("length", [0, 1, 7, 1015, 1017, 2**20, 2**31, 2**63, 2**64 - 1])
def test_header_lengths_that_cannot_be(folder, allocated, length):
    path = folder / "site-0/00000.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(Damaged, match=r"site-0/00000.safetensors"):
        Store.open(folder).read_rows("a", 0, 0, 8)
    assert not survives(folder)


SUMS = [
    None, {}, [], {"group_rows": "8"}, {"group_rows": "0", "xxh3_64": ""}, {"group_rows": "8", "xxh3_64": "0" * 16},
    {"group_rows": str(2**62), "xxh3_64": "0" * 16}, {"group_rows": "1", "xxh3_64": "0" * 16},
    {"group_rows": "8", "xxh3_64": 5},
]  # fmt: skip


@pytest.mark.parametrize("metadata", SUMS, ids=lambda metadata: json.dumps(metadata)[:60])
def test_sums_that_say_something_else(folder, allocated, metadata):
    """Even where the manifest has the sum of such a header."""
    path = folder / "site-0/00000.safetensors"
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = {**json.loads(data[8:start]), "__metadata__": metadata}
    data = data[:8] + json.dumps(header).encode().ljust(start - 8) + data[start:]
    path.write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    info = manifest["shards"][0]["files"]["site-0/00000.safetensors"]
    info["header"] = f"{sum_of(data[:start]):016x}"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"site-0/00000.safetensors"):
        Store.open(folder).read_rows("a", 0, 0, 8)
    assert not survives(folder)


def test_random_bits_of_rows_are_seen_by_a_stream(folder):
    """Without SHA-256: by the sums, as rows are read."""
    chance = random.Random(2)
    path = folder / "site-0/00001.safetensors"
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(40):
        data = bytearray(whole)
        data[chance.randrange(start, len(data))] ^= 1 << chance.randrange(8)
        path.write_bytes(data)
        words = r"site-0/00001.safetensors is damaged: rows 0 to 7 are not"
        with StoreStream(folder, ["a"], batch_size=4, buffer_rows=20) as stream, pytest.raises(UserError, match=words):
            stream.batch(0)


def test_random_bytes_of_shards(folder, allocated):
    chance = random.Random(1)
    whole = read_everything(folder)
    for path in sorted(folder.glob("*/*.safetensors"))[:5]:
        data = path.read_bytes()
        for _ in range(60):
            changed = bytearray(data)
            place = chance.randrange(chance.choice([8, 150, len(data)]))
            changed[place] ^= 1 << chance.randrange(8)
            if chance.random() < 0.2:
                changed = changed[: chance.randrange(len(changed))]
            path.write_bytes(changed)
            assert not survives(folder)
        path.write_bytes(data)
    assert torch.equal(read_everything(folder)["a"][0], whole["a"][0])
