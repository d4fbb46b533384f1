"""The protocol by itself: what hostile or broken ends can send."""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vast_utils.on_machine import exchange


def frame(name: str, data: bytes, **other) -> bytes:
    head = {"name": name, "size": len(data), "mtime_ns": 10**18, "executable": False, "offset": 0, **other}
    digest = json.dumps({"sha256": hashlib.sha256(data).hexdigest()}).encode()
    return json.dumps(head).encode() + b"\n" + data + digest + b"\n"


END = b'{"end": true}\n'


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name",
    [
        "../up",
        "a/../../up",
        "/absolute",
        "a//b",
        "./a",
        "a/.",
        "",
        "a\0b",
        "a\nb",
        "a\\b",
        "x" * 256,
        "a\udcff",
        ".incoming/x",
        "x" * 1024,
        "a\x1b[31m",
        "a\u202eb",
        "..",
        "a/..",
    ],
)
def test_a_hostile_name_is_refused_and_nothing_is_written(tmp_path, name):
    root = tmp_path / "root"
    with pytest.raises(exchange.Broken, match="not asked for"):
        exchange.receive(io.BytesIO(frame(name, b"x") + END), str(root))
    assert files(tmp_path) == {}


def test_a_file_that_was_not_asked_for_is_refused(tmp_path):
    with pytest.raises(exchange.Broken, match="not asked for: 'other'"):
        exchange.receive(io.BytesIO(frame("other", b"x") + END), str(tmp_path), {"this": 10})


def test_a_file_that_is_larger_than_said_is_refused_before_it_is_read(tmp_path):
    source = io.BytesIO(frame("this", b"x" * 100) + END)
    with pytest.raises(exchange.Broken, match="more of this than it said"):
        exchange.receive(source, str(tmp_path), {"this": 99})
    assert len(source.read()) > 100


def test_nothing_comes_twice(tmp_path):
    """Or a machine could send for ever."""
    with pytest.raises(exchange.Broken, match="not asked for: 'this'"):
        exchange.receive(io.BytesIO(frame("this", b"x") * 2 + END), str(tmp_path), {"this": 10})


def test_two_transfers_into_one_folder_come_one_after_the_other(tmp_path):
    reading, writing = os.pipe()
    with ThreadPoolExecutor(2) as pool, open(reading, "rb") as slow:
        first = pool.submit(exchange.receive, slow, str(tmp_path))
        os.write(writing, frame("one", b"1"))
        while not (tmp_path / "one").exists():
            time.sleep(0.01)
        second = pool.submit(exchange.receive, io.BytesIO(frame("two", b"2") + END), str(tmp_path))
        time.sleep(0.3)
        assert not second.done()
        os.write(writing, END)
        os.close(writing)
        assert [first.result(), second.result()] == [(["one"], {}), (["two"], {})]
    assert files(tmp_path) == {"one": b"1", "two": b"2"}


def test_links_on_the_way_are_not_followed(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / "run").symlink_to(outside)
    placed, failed = exchange.receive(io.BytesIO(frame("run/file", b"x") + END), str(root))
    assert placed == []
    assert "is a link" in failed["run/file"]
    assert files(outside) == {}


def test_a_link_under_the_files_own_name_is_replaced_not_written_through(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.write_bytes(b"mine")
    (root / "file").symlink_to(outside)
    assert exchange.receive(io.BytesIO(frame("file", b"new") + END), str(root)) == (["file"], {})
    assert outside.read_bytes() == b"mine"
    assert (root / "file").read_bytes() == b"new"


def test_bytes_that_changed_on_the_way_are_never_placed(tmp_path):
    whole = frame("file", b"0123456789").replace(b"0123456789", b"0123456780")
    assert exchange.receive(io.BytesIO(whole + END), str(tmp_path)) == ([], {"file": "its bytes changed on the way"})
    assert files(tmp_path) == {}


@pytest.mark.parametrize("cut", [0, 5, 100, 130, 1000, 1100, -1])
def test_a_stream_cut_anywhere_leaves_no_half_file_and_is_continued(tmp_path, cut):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    (there / "file").write_bytes(os.urandom(1000))
    size, mtime_ns, _ = exchange.facts(there / "file") or [0, 0, 0]
    out = io.BytesIO()
    exchange.send(str(there), [["file", size, mtime_ns, 0]], out)
    with pytest.raises(exchange.Broken, match=exchange.LOST):
        exchange.receive(io.BytesIO(out.getvalue()[: cut - len(END) if cut < 0 else cut]), str(here))
    assert not (here / "file").exists()
    offset = exchange.begun(str(here)).get(exchange.key("file", size, mtime_ns), 0)
    again = io.BytesIO()
    exchange.send(str(there), [["file", size, mtime_ns, offset]], again)
    assert len(again.getvalue()) == pytest.approx(len(out.getvalue()) - offset, abs=4)
    assert exchange.receive(io.BytesIO(again.getvalue()), str(here)) == (["file"], {})
    assert files(here) == files(there)
    assert exchange.facts(here / "file") == exchange.facts(there / "file")


def test_a_beginning_of_another_version_is_not_continued(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    (there / "file").write_bytes(b"new" * 100)
    out = io.BytesIO()
    exchange.send(str(there), [["file", 300, 1, 200]], out)
    assert exchange.receive(io.BytesIO(out.getvalue()), str(here)) == (["file"], {})
    assert (here / "file").read_bytes() == b"new" * 100


def test_a_file_that_is_dropped_while_others_travel_is_sent_all_the_same(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    for name in ("first", "second"):
        (there / name).write_bytes(name.encode() * 10)

    class Out(io.BytesIO):
        def write(self, data) -> int:
            (there / "second").unlink(missing_ok=True)
            return super().write(data)

    out = Out()
    exchange.send(str(there), [[name, *exchange.facts(there / name)[:2], 0] for name in ("first", "second")], out)
    assert exchange.receive(io.BytesIO(out.getvalue()), str(tmp_path / "here")) == (["first", "second"], {})


def test_a_log_of_lines_ends_with_a_whole_line(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "log.jsonl").write_bytes(b'{"a": 1}\n{"a": 2}\n{"a"')
    out = io.BytesIO()
    exchange.send(str(there), [["log.jsonl", 23, 0, 0]], out)
    exchange.receive(io.BytesIO(out.getvalue()), str(tmp_path / "here"))
    assert (tmp_path / "here" / "log.jsonl").read_bytes() == b'{"a": 1}\n{"a": 2}\n'


@pytest.mark.parametrize(
    "text", [b'{"a": 1}\n{"a": 2}', b'{"a": 1}', b"", b'{"a": 1}\n', b'{"a": "' + b"x" * 10**6 + b'"}']
)
def test_a_last_record_without_a_line_end_comes_too(tmp_path, text):
    there = tmp_path / "there"
    there.mkdir()
    (there / "log.jsonl").write_bytes(text)
    out = io.BytesIO()
    exchange.send(str(there), [["log.jsonl", len(text), 0, 0]], out)
    exchange.receive(io.BytesIO(out.getvalue()), str(tmp_path / "here"))
    assert (tmp_path / "here" / "log.jsonl").read_bytes() == text


def test_json_is_not_placed_beside_a_file_that_is_missing(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "state.json").write_text("{}")
    out = io.BytesIO()
    exchange.send(str(there), [["state.safetensors", 9, 0, 0], ["state.json", 2, 0, 0]], out)
    placed, failed = exchange.receive(io.BytesIO(out.getvalue()), str(tmp_path / "here"))
    assert placed == []
    assert failed == {"state.safetensors": "it is gone", "state.json": "a file beside it is missing"}


def test_unfinished_files_and_links_are_not_listed(tmp_path):
    for name in ("whole.json", "a.partial", ".hidden", ".step-1.77/state.json", "run/whole.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "results.jsonl.k3j_d8fa").touch(0o600)
    (tmp_path / "model.safetensors.original").touch(0o644)
    (tmp_path / "link").symlink_to("whole.json")
    (tmp_path / "run" / "a\nb").touch()
    (tmp_path / "run" / "12:30*?.txt").touch()
    found = exchange.walk(str(tmp_path), [])
    assert set(found["files"]) == {"whole.json", "run/whole.txt", "run/12:30*?.txt", "model.safetensors.original"}
    assert found["odd"] == ["run/a\nb"]
    assert set(exchange.walk(str(tmp_path), ["run", "nowhere"])["files"]) == {"run/whole.txt", "run/12:30*?.txt"}


@pytest.mark.parametrize(
    "line",
    [
        b"not json\n",
        b"[1]\n",
        b'{"name": "f", "size": -1, "offset": 0, "mtime_ns": 0}\n',
        frame("f", b"x", mtime_ns=2**70),
        frame("f", b"x", size=1.0),
    ],
)
def test_what_is_no_frame_is_an_error(tmp_path, line):
    with pytest.raises(exchange.Broken):
        exchange.receive(io.BytesIO(line), str(tmp_path))
