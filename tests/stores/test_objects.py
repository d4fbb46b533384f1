from __future__ import annotations

import errno
import os
import time
import traceback

import pytest

from sparse_coding.errors import UserError
from sparse_coding.stores.objects import PIECE, ObjectMissing, ObjectTruncated, open_objects
from tests.stores.fake_s3 import KEY, SECRET, serving

URL = "s3://bucket/some/prefix"


@pytest.fixture
def s3(monkeypatch):
    with serving(monkeypatch) as fake:
        yield fake


@pytest.fixture(params=["folder", "s3"])
def objects(request, tmp_path, monkeypatch):
    if request.param == "folder":
        yield open_objects(tmp_path / "store")
    else:
        with serving(monkeypatch):
            yield open_objects(URL, seconds=5)


def error_of(action) -> str:
    """What a user could see of a failure: the message and the whole traceback, neither of which holds a key."""
    with pytest.raises(UserError) as caught:
        action()
    shown = str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert KEY not in shown
    assert SECRET not in shown
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- both kinds


def test_what_was_put_comes_back_whole_and_in_ranges(objects):
    objects.put("a/b.bin", b"0123456789")
    assert bytes(objects.get("a/b.bin")) == b"0123456789"
    assert bytes(objects.get_range("a/b.bin", 3, 4)) == b"3456"
    assert objects.size("a/b.bin") == 10
    assert not objects.get("a/b.bin").readonly
    out = bytearray(2)
    objects.read_into("a/b.bin", 8, memoryview(out))
    assert out == b"89"


def test_a_later_put_replaces_and_listing_and_deleting_see_it(objects):
    assert list(objects.names()) == []
    objects.put("a/x", b"1")
    objects.put("a/x", memoryview(b"22"))
    objects.put("b/y", b"3")
    assert sorted(objects.names()) == ["a/x", "b/y"]
    assert list(objects.names("a")) == ["a/x"]
    assert bytes(objects.get("a/x")) == b"22"
    objects.delete("a/x")
    objects.delete("a/x")
    assert list(objects.names()) == ["b/y"]


def test_large_objects_and_files_go_in_pieces(objects, tmp_path):
    data = os.urandom(2 * PIECE + 12_345)
    (tmp_path / "file").write_bytes(data)
    objects.put("big", data)
    objects.put("from-file", tmp_path / "file")
    assert bytes(objects.get("big")) == data
    assert bytes(objects.get_range("from-file", PIECE - 5, PIECE + 10)) == data[PIECE - 5 : 2 * PIECE + 5]
    assert [len(piece) for piece in objects.pieces("big")] == [PIECE, PIECE, 12_345]
    assert objects.sha256("big") == objects.sha256("from-file")


def test_an_empty_object_is_one(objects):
    objects.put("empty", b"")
    assert (objects.size("empty"), bytes(objects.get("empty"))) == (0, b"")


def test_missing_and_short_objects_are_told_apart(objects):
    objects.put("a", b"0123")
    assert not objects.exists("nothing")
    for action in (lambda: objects.get("nothing"), lambda: objects.get_range("nothing", 0, 1)):
        with pytest.raises(ObjectMissing, match="nothing is missing"):
            action()
    for start in (2, 100):
        with pytest.raises(ObjectTruncated, match="truncated"):
            objects.get_range("a", start, 5)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/../b", ".hidden", "", "a\\b", "a b", "x" * 600])
def test_names_cannot_lead_out(objects, name):
    for action in (lambda: objects.put(name, b""), lambda: objects.get(name), lambda: objects.size(name)):
        assert "no name of an object" in error_of(action)


# ---- folders


def test_folders_that_a_delete_empties_go_with_it_and_no_others(tmp_path):
    root = tmp_path / "store"
    objects = open_objects(root)
    for name in ("a/b/c/1", "a/b/c/2", "a/3", "d"):
        objects.put(name, b"x")

    def folders():
        return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_dir())

    objects.delete("a/b/c/1")
    assert folders() == ["a", "a/b", "a/b/c"]
    objects.delete("a/b/c/2")
    assert folders() == ["a"]
    for name in ("a/3", "d", "d", "never/there"):
        objects.delete(name)
    assert root.is_dir()
    assert not list(root.iterdir())


def test_a_put_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    objects = open_objects(tmp_path)
    objects.put("a", b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        objects.put("a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.parametrize("url", ["gs://bucket/x", "https://host/x", "file:///tmp/x"])
def test_other_kinds_of_urls_are_refused(url):
    assert "s3://bucket/prefix" in error_of(lambda: open_objects(url))


# ---- S3 and its failures


@pytest.mark.parametrize("fault", [500, 503, "cut", "drop"])
def test_failures_that_pass_are_retried(s3, fault):
    objects = open_objects(URL, seconds=20)
    s3.fault = lambda method, key, n: fault if n in (0, 1, 4) else None
    objects.put("a", b"x" * 1000)
    assert bytes(objects.get("a")) == b"x" * 1000
    assert objects.size("a") == 1000
    assert len(s3.requests) > 3


def test_a_connection_that_drops_while_parts_are_sent_is_made_again(s3):
    data = os.urandom(3 * PIECE)
    s3.fault = lambda method, key, n: "drop" if method == "PUT" and n in (1, 2, 5) else None
    open_objects(URL, seconds=20).put("big", data)
    assert s3.objects["bucket/some/prefix/big"] == data


@pytest.mark.parametrize(("fault", "words"), [(500, "status 500"), (503, "SlowDown"), ("cut", "breaks off|truncated")])
def test_failures_that_stay_end_within_the_time_and_say_what_was_answered(s3, fault, words):
    objects = open_objects(URL, seconds=1)
    objects.put("a", b"x" * 1000)
    s3.fault = lambda method, key, n: fault
    start = time.monotonic()
    message = error_of(lambda: objects.get_range("a", 0, 1000))
    assert time.monotonic() - start < 4
    assert any(word in message for word in words.split("|"))
    assert f"{URL}/a" in message


def test_a_service_that_hangs_is_given_up(s3):
    objects = open_objects(URL, seconds=0.5)
    s3.fault = lambda method, key, n: "hang"
    start = time.monotonic()
    assert "too slowly" in error_of(lambda: objects.get("a"))
    assert time.monotonic() - start < 4


@pytest.mark.parametrize("action", ["get", "put", "size", "list", "delete"])
def test_denied_access_is_said_at_once_without_the_key(s3, action):
    objects = open_objects(URL)
    s3.fault = lambda method, key, n: 403
    actions = {
        "get": lambda: objects.get_range("a", 0, 1),
        "put": lambda: objects.put("a", b"1"),
        "size": lambda: objects.size("a"),
        "list": lambda: list(objects.names()),
        "delete": lambda: objects.delete("a"),
    }
    message = error_of(actions[action])
    assert "check the credentials" in message
    assert len(s3.requests) <= 2


def test_a_service_that_cannot_be_reached(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    assert "AWS_ENDPOINT_URL" in error_of(lambda: open_objects(URL, seconds=1).get("a"))


def test_no_credentials_are_missed_before_anything_is_asked(monkeypatch):
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "AWS_ACCESS_KEY_ID" in error_of(lambda: open_objects(URL))


@pytest.mark.parametrize("url", [f"s3://{KEY}:{SECRET}@bucket/x", f"s3://bucket/x?secret={SECRET}", "s3://", "s3:///x"])
def test_urls_hold_a_bucket_and_no_credentials(url):
    assert "s3://bucket/prefix" in error_of(lambda: open_objects(url))


def test_against_another_server():
    """Semantics of a server that is not ours: moto, where it is installed."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    boto = pytest.importorskip("boto3", reason="boto3 is not installed")
    moto = server.ThreadedMotoServer(port=0, verbose=False)
    moto.start()
    with pytest.MonkeyPatch.context() as patch:
        host, port = moto.get_host_and_port()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            patch.setenv(name, value)
        try:
            missing = error_of(lambda: open_objects("s3://no-such-bucket/x", seconds=2).put("a", b""))
            assert "bucket" in missing
            boto.client("s3").create_bucket(Bucket="bucket")
            objects = open_objects(URL, seconds=10)
            data = os.urandom(PIECE + 17)
            objects.put("a/b", data)
            objects.put("a/b", data)
            assert bytes(objects.get("a/b")) == data
            assert list(objects.names("a")) == ["a/b"]
            with pytest.raises(ObjectMissing):
                objects.get("c")
            with pytest.raises(ObjectTruncated, match="truncated"):
                objects.get_range("a/b", PIECE, 100)
            objects.delete("a/b")
            assert not objects.exists("a/b")
        finally:
            moto.stop()
