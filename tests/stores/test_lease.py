from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from sparse_coding.errors import UserError
from sparse_coding.stores import lease
from sparse_coding.stores.lease import leased, only_writer
from sparse_coding.stores.objects import open_objects
from sparse_coding.stores.store import Source, StoreWriter
from tests.stores.fake_s3 import KEY, serving

NAME = "bucket/run/writer.json"


@pytest.fixture(params=[True, False], ids=["conditional puts", "conditions ignored"])
def s3(request, monkeypatch):
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.5), ("SETTLE", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    with serving(monkeypatch) as fake:
        fake.conditional = request.param
        yield fake


def objects():
    return open_objects("s3://bucket/run", seconds=5)


def test_the_second_writer_is_refused_and_the_first_one_named(s3):
    with leased(objects()):
        time.sleep(0.2)
        if s3.conditional:
            with (
                pytest.raises(UserError, match=r"being written by process \d+ on .+: wait for it") as caught,
                leased(objects()),
            ):
                pass
            assert KEY not in str(caught.value)
    assert NAME not in s3.objects, "nothing is left behind"
    with leased(objects()):
        assert json.loads(s3.objects[NAME])["pid"] > 0
    assert NAME not in s3.objects


def test_a_writer_elsewhere_is_left_alone_while_it_beats(s3):
    with leased(objects()):
        real = objects()
        there = json.loads(s3.objects[NAME])
        # As seen from another machine: only the beats say whether it is there.
        if s3.conditional:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(lease, "_system", lambda: "elsewhere")
                with pytest.raises(UserError, match="is being written by process"), leased(real):
                    pass
        assert json.loads(s3.objects[NAME])["id"] == there["id"]


def left_by(pid: int, **said) -> bytes:
    """The lease of a writer that was killed."""
    return json.dumps(
        {"host": socket.gethostname(), "pid": pid, "system": lease._system(), "started": "12345", "id": "x"} | said
    ).encode()


def gone() -> int:
    done = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    ("pid", "said", "at_once"),
    [
        (gone, {}, True),
        (os.getpid, {}, True),  # of a container that was started again: the number is now ours
        (os.getppid, {}, True),
        (gone, {"system": "another boot"}, False),
        (os.getpid, {"system": "another container"}, False),
        (os.getpid, {"system": None, "started": None}, False),
        (lambda: 2**70, {}, False),
    ],
)
def test_the_lease_of_a_writer_that_is_gone_is_taken_over(s3, pid, said, at_once, capsys):
    s3.objects[NAME] = left_by(pid(), **said)
    began = time.monotonic()
    with leased(objects()):
        waited = time.monotonic() - began
        assert json.loads(s3.objects[NAME])["id"] != "x"
    if s3.conditional:
        assert (waited < 0.5) == at_once
        assert ("seeing whether it is there" not in capsys.readouterr().err) == at_once


def test_a_writer_in_another_container_of_the_same_name_is_left_alone_while_it_beats(s3):
    if not s3.conditional:
        pytest.skip("its beats would be over ours")
    over = threading.Event()

    def beat():
        for count in range(1000):
            s3.objects[NAME] = left_by(number, system="another container", beat=count)
            if over.wait(0.3):  # longer than it takes to find one's own lease settled
                return

    number = gone()
    s3.objects[NAME] = left_by(number, system="another container", beat=-1)
    other = threading.Thread(target=beat)
    other.start()
    try:
        with pytest.raises(UserError, match=f"being written by process {number}"), leased(objects()):
            pass
    finally:
        over.set()
        other.join()


@pytest.mark.parametrize("wait", [0.0, 0.3])
def test_a_lease_that_was_taken_away_is_lost(s3, wait):
    def robbed():
        with leased(objects()):
            del s3.objects[NAME]
            time.sleep(wait)

    with pytest.raises(UserError, match="taken over by another writer, which has ended"):
        robbed()
    assert NAME not in s3.objects


def test_a_lease_that_is_no_json_is_taken_over(s3):
    s3.objects[NAME] = b"\xff{"
    with leased(objects()):
        assert json.loads(s3.objects[NAME])["host"]


@pytest.mark.parametrize("wait", [0.0, 0.4])
def test_a_writer_that_was_replaced_says_so(s3, wait):
    def replaced():
        with leased(objects()):
            s3.objects[NAME] = json.dumps({"host": "other", "pid": 5, "id": "other"}).encode()
            time.sleep(wait)

    with pytest.raises(UserError, match="taken over by process 5 on other"):
        replaced()
    assert json.loads(s3.objects[NAME])["id"] == "other", "the other writer's lease stays"


def test_a_new_store_may_begin_beside_its_lease(s3, tmp_path):
    with only_writer(objects()), StoreWriter(objects(), {"a": 4}, Source("none")) as writer:
        writer.finish()
    with only_writer(open_objects(tmp_path)):
        assert not list(tmp_path.iterdir())
