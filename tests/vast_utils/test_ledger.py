"""The ledger: on disk before anything is asked, one writer, the same caps after a restart; and the clock."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils.clock import SafeClock
from vast_utils.ledger import Caps, Ledger, Record, ledgers, run_of, state_folder

CAPS = Caps(0.5, 3.0, 6.0)
RECORD = Record("sparse-coding.toy.00ff", "intended", 1, 2, "RTX 4090", 0.6, 0.6, 0.1, 1.3, 40.0, intended=1000.0)


def test_a_rental_is_read_back_as_written(tmp_path):
    with Ledger("toy", tmp_path).held() as ledger:
        ledger.write(RECORD)
        changed = ledger.change(RECORD, state="rented", instance=7)
    assert Ledger("toy", tmp_path).records() == [changed]
    assert changed == dataclasses.replace(RECORD, state="rented", instance=7)
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == ["00ff.rental.json", "lock"]
    assert (tmp_path / "toy").stat().st_mode & 0o077 == 0


def test_only_who_holds_it_writes(tmp_path):
    ledger = Ledger("toy", tmp_path)
    with pytest.raises(AssertionError):
        ledger.write(RECORD)
    with ledger.held():
        assert ledger.busy
        with pytest.raises(UserError, match="another dispatcher"), Ledger("toy", tmp_path).held():
            pass
        with Ledger("other", tmp_path).held():
            pass
        assert ledger.holder() == os.getpid()
    assert ledger.holder() is None
    with (tmp_path / "toy" / "lock").open() as asks:  # whoever asks whether it is busy
        fcntl.flock(asks, fcntl.LOCK_EX)
        threading.Timer(0.1, lambda: fcntl.flock(asks, fcntl.LOCK_UN)).start()
        with Ledger("toy", tmp_path).held():
            pass
    assert not ledger.busy
    with Ledger("toy", tmp_path).held():
        pass


def test_a_killed_holder_leaves_the_record_and_no_lock(tmp_path):
    code = """
        import os, sys
        from pathlib import Path
        from tests.vast_utils.test_ledger import RECORD
        from vast_utils.ledger import Ledger
        with Ledger("toy", Path(sys.argv[1])).held() as ledger:
            ledger.write(RECORD)
            os.kill(os.getpid(), 9)
    """
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], cwd=root, timeout=60)
    assert done.returncode == -9
    with Ledger("toy", tmp_path).held() as ledger:
        assert ledger.records() == [RECORD]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    with Ledger("toy", tmp_path).held() as ledger:
        ledger.write(RECORD)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(UserError, match=r"00ff\.rental\.json cannot be written \(No space"):
            ledger.change(RECORD, state="rented")
        monkeypatch.undo()
        assert ledger.records() == [RECORD]
        assert not list((tmp_path / "toy").glob("*.part"))


def test_a_restart_keeps_the_start_and_may_raise_the_caps(tmp_path):
    with Ledger("toy", tmp_path).held() as ledger:
        assert ledger.begin(CAPS, 1000.0) == (CAPS, 1000.0)
        assert ledger.begin(CAPS, 9000.0) == (CAPS, 1000.0)
        for name, value in (("max_cost", 2.9), ("max_hours", 5.0)):
            with pytest.raises(UserError, match=f"begun with --{name.replace('_', '-')} [36], not"):
                ledger.begin(dataclasses.replace(CAPS, **{name: value}), 9000.0)
        more = Caps(0.4, 30.0, 7.0)
        assert ledger.begin(more, 9000.0) == (more, 1000.0)
        assert Ledger("toy", tmp_path).begun() == (more, 1000.0)
        ledger.end()
        with pytest.raises(UserError, match="ended by reap"):
            ledger.begin(CAPS, 9000.0)


def test_what_a_rental_costs_at_most():
    """60 cents an hour and 10 of traffic, for half an hour."""
    rented = dataclasses.replace(RECORD, state="rented", instance=7)
    assert rented.cost(1000.0 + 1800) == pytest.approx(0.4)
    assert dataclasses.replace(rented, state="destroyed", ended=1000.0 + 3600).cost(1e9) == pytest.approx(0.7)
    assert dataclasses.replace(RECORD, state="refused", ended=2000.0).cost(1e9) == 0
    assert rented.deadline() == pytest.approx(1000.0 + 2 * 3600)


def test_labels_name_their_run(tmp_path):
    ledger = Ledger("gpt2-layer-3", tmp_path)
    assert run_of(ledger.label()) == "gpt2-layer-3"
    assert len({ledger.label() for _ in range(1000)}) == 1000
    for label in ("", "sparse-coding", "sparse-coding.", "sparse-coding.toy", "sparse-coding.toy.", "x.toy.1", "toy"):
        assert run_of(label) is None
    for name in ("", "Toy", "a.b", "../x", "-a", "a" * 41):
        with pytest.raises(UserError, match="is named"):
            Ledger(name, tmp_path)


def test_where_ledgers_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.delenv("VAST_UTILS_STATE", raising=False)
    assert state_folder() == tmp_path / "sparse-coding" / "vast"
    monkeypatch.setenv("VAST_UTILS_STATE", str(tmp_path / "mine"))
    assert state_folder() == tmp_path / "mine"
    assert ledgers() == []
    for name in ("b", "a", "Not A Run"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    assert [ledger.run for ledger in ledgers()] == ["a", "b"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="VAST_UTILS_STATE"), Ledger("a", tmp_path / "file").held():
        pass


def test_a_damaged_file_is_named(tmp_path):
    with Ledger("toy", tmp_path).held() as ledger:
        ledger.write(RECORD)
        for damaged in ("{", "[]", '{"label": "x"}'):
            (tmp_path / "toy" / "00ff.rental.json").write_text(damaged)
            with pytest.raises(UserError, match=r"00ff\.rental\.json.*`reap` ends"):
                ledger.records()
        (tmp_path / "toy" / "run.json").write_text('{"caps": {}}')
        with pytest.raises(UserError, match=r"run\.json"):
            ledger.begun()


def test_fields_of_a_later_version_are_passed_over(tmp_path):
    with Ledger("toy", tmp_path).held() as ledger:
        ledger.write(RECORD)
        path = tmp_path / "toy" / "00ff.rental.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "red"}))
        assert ledger.records() == [RECORD]


def test_the_latest_time(tmp_path):
    with Ledger("toy", tmp_path).held() as ledger:
        assert ledger.latest() == 0
        ledger.begin(CAPS, 900.0)
        assert ledger.latest() == 900
        ledger.write(dataclasses.replace(RECORD, state="destroyed", ended=2000.0))
        assert ledger.latest() == 2000
        ledger.seen(3000.5)
        assert ledger.latest() == 3000.5


def test_time_never_runs_backwards(monkeypatch):
    wall, steady = [10_000.0], [50.0]
    monkeypatch.setattr(time, "time", lambda: wall[0])
    monkeypatch.setattr(time, "monotonic", lambda: steady[0])
    clock = SafeClock(floor=10_500.0)
    assert clock.now() == 10_500  # another process wrote a later time than the clock shows: it was set back
    steady[0] += 60
    assert clock.now() == 10_560
    wall[0] = 20_000.0  # the laptop slept: its monotonic clock did not see it
    assert clock.now() == 20_000
    wall[0] = 5.0
    assert clock.now() == 20_000
    steady[0] += 60
    assert clock.now() >= 20_000
