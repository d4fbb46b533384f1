"""meta.pkl is a pickle from a stranger: whatever it holds, nothing is run, and what is no vocabulary is one line."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import struct
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sparse_coding.errors import UserError
from sparse_coding.formats import nanogpt_meta as module
from sparse_coding.formats.nanogpt_meta import META, Meta, read_meta

CHARACTERS = ["\n", " ", "!", "a", "é", "漢", "😀", "\x00"]


def vocabulary(characters: list[str] = CHARACTERS) -> dict[str, Any]:
    return {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: index for index, character in enumerate(characters)},
    }


def written(folder: Path, content: bytes) -> Path:
    (folder / META).write_bytes(content)
    return folder / META


def refused(path: Path, reason: str | None = None) -> None:
    with pytest.raises(UserError, match=reason) as error:
        read_meta(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_prepare_py_writes_is_read_in_every_protocol(protocol, tmp_path):
    extra = {"more": [1.5, None, True, False, -3, 1 << 70, (), (1, 2), ("a", 2, 3, 4)], "note": {"deep": [[]]}}
    path = written(tmp_path, pickle.dumps({**vocabulary(), **extra}, protocol))
    assert read_meta(path) == Meta(len(CHARACTERS), CHARACTERS)


def test_a_large_vocabulary_is_read_soon(tmp_path):
    characters = [chr(index + 0xE000) for index in range(60_000)]
    path = written(tmp_path, pickle.dumps(vocabulary(characters)))
    start = time.perf_counter()
    assert read_meta(path).tokens == characters
    assert time.perf_counter() - start < 5


def test_a_size_alone_gives_no_tokens(tmp_path):
    assert read_meta(written(tmp_path, pickle.dumps({"vocab_size": 50304}))) == Meta(50304, None)


# ---- code


class Evil:
    """Pickles as a call that makes the file `ran`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "ran"),)


def by_hand(folder: Path) -> dict[str, bytes]:
    """The ways of a pickle to get at a function or an object, written out."""
    target = str(folder / "ran").encode()
    text = b"X" + struct.pack("<I", len(target)) + target
    return {
        "GLOBAL": b"cos\nmkdir\n(" + text + b"tR.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + text + b"\x85R.",
        "INST": b"(" + text + b"ios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\n" + text + b"o.",
        "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "NEWOBJ_EX": b"\x80\x04\x8c\x08builtins\x8c\x06object\x93)}\x92.",
        "BUILD": b"}X\x01\0\0\0ab.",
        "EXT1": b"\x80\x02\x82\x01.",
        "PERSID": b"Psome\n.",
        "BINPERSID": b"X\x01\0\0\0aQ.",
        "NEXT_BUFFER": b"\x80\x05\x97.",
        "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 1) + b"a.",
        "REDUCE": b"NNR.",
    }


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("place", ["alone", "beside", "as size", "as token"])
def test_a_call_is_never_made(place, protocol, tmp_path):
    evil, data = Evil(tmp_path), vocabulary()
    whole: Any = {
        "alone": evil,
        "beside": {**data, "more": evil},
        "as size": {**data, "vocab_size": evil},
        "as token": {**data, "itos": {**data["itos"], 0: evil}},
    }[place]
    content = pickle.dumps(whole, protocol)
    refused(written(tmp_path, content), "it holds (GLOBAL|STACK_GLOBAL)")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)
    assert (tmp_path / "ran").exists(), "the pickle would have made it"


@pytest.mark.parametrize("name", list(by_hand(Path())))
def test_every_opcode_that_leads_to_an_object_is_refused(name, tmp_path, monkeypatch):
    path = written(tmp_path, by_hand(tmp_path)[name])
    refused(path, "it holds")
    # Were the list of opcodes ever too long, the unpickler itself still makes nothing.
    known = {code.name for code in module.pickletools.opcodes}
    monkeypatch.setattr(module, "PLAIN", known)
    refused(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [{1}, frozenset({1}), b"bytes", bytearray(b"b"), 1j, collections.OrderedDict(a=1)])
def test_objects_of_other_kinds_are_refused(value, tmp_path):
    refused(written(tmp_path, pickle.dumps({**vocabulary(), "more": value})), "it holds")


# ---- damage


def test_a_pickle_that_asks_for_much_memory_gets_none(tmp_path):
    import tracemalloc

    greedy = [
        b"\x80\x02}r" + struct.pack("<I", 10**7) + b".",  # memo number ten million
        b"}p10000000\n.",
        b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b"}.",  # a frame of a terabyte
        b"\x80\x04\x8d" + struct.pack("<Q", 1 << 40) + b"a.",  # a text of a terabyte
        b"X" + struct.pack("<I", 1 << 31) + b"a.",
        b"\x80\x02\x8b" + struct.pack("<i", (1 << 31) - 1) + b"\1.",  # an integer of two gigabytes
        pickle.dumps({"vocab_size": 10**6, "itos": {}}),
    ]
    for content in greedy:
        path = written(tmp_path, content)
        tracemalloc.start()
        refused(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 5e6, content


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    whole = pickle.dumps(vocabulary())
    for length in range(len(whole)):
        refused(written(tmp_path, whole[:length]))


def test_random_damage_gives_a_vocabulary_or_one_line(tmp_path):
    draw = random.Random(0)
    whole = {protocol: pickle.dumps(vocabulary(), protocol) for protocol in range(6)}
    survivors = 0
    for _ in range(1000):
        content = bytearray(whole[draw.randrange(6)])
        for _ in range(draw.randint(1, 4)):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path = written(tmp_path, bytes(content))
        with suppress(UserError):  # anything else fails the test
            found = read_meta(path)
            survivors += 1
            assert found.tokens is None or len(found.tokens) == found.vocab_size
    assert 0 < survivors < 950


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "names no vocab_size"),
        ({}, "names no vocab_size"),
        ({"vocab_size": "8"}, "names no vocab_size"),
        ({"vocab_size": True}, "names no vocab_size"),
        ({"vocab_size": 0}, "names no vocab_size"),
        ({"vocab_size": -1}, "names no vocab_size"),
        ({"vocab_size": 1 << 32}, "names no vocab_size"),
        ({"vocab_size": 2, "itos": ["a", "b"]}, "itos does not give a text for each id from 0 to 1"),
        ({"vocab_size": 2, "itos": {0: "a"}}, "each id from 0 to 1"),
        ({"vocab_size": 2, "itos": {0: "a", 2: "b"}}, "each id from 0 to 1"),
        ({"vocab_size": 2, "itos": {"0": "a", "1": "b"}}, "each id from 0 to 1"),
        ({"vocab_size": 2, "itos": {0: "a", 10**5000: "b"}}, "each id from 0 to 1"),
        ({"vocab_size": 1, "itos": {0: "a", 1: "b"}}, "each id from 0 to 0"),
        ({"vocab_size": 2, "itos": {0: "a", 1: 2}}, "something that is no text"),
    ],
)
def test_what_is_no_vocabulary_says_why(data, reason, tmp_path):
    refused(written(tmp_path, pickle.dumps(data)), reason)


def test_what_is_no_file_or_far_too_large_is_refused(tmp_path):
    refused(tmp_path / "nowhere.pkl", "is not read")
    refused(tmp_path, "is not read")
    with (tmp_path / META).open("wb") as file:
        file.truncate(module.LARGEST + 1)
    refused(tmp_path / META, "larger than 67,108,864 bytes")


def test_the_unpickler_finds_no_class_and_no_persistent_object():
    unpickler = module._PlainOnly(io.BytesIO(b""))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for builtins\.dict"):
        unpickler.find_class("builtins", "dict")
    with pytest.raises(pickle.UnpicklingError, match="outside itself"):
        unpickler.persistent_load(1)
