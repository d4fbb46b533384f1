from __future__ import annotations

import time

import pytest

from sparse_coding.errors import UserError
from vast_utils import job as jobs
from vast_utils.logs import LONGEST, lines, read
from vast_utils.said import printable
from vast_utils.ssh import Refused, Unreachable

NUMBERS = """
import os, sys, time
for i in range(2000):
    sys.stdout.write(f"line {i} ")
    sys.stdout.flush()
    while i % 500 == 499 and not os.path.exists(f"go{i}"):
        time.sleep(0.02)
    sys.stdout.write("é€ \\n")
sys.stdout.write("no end of line")
"""
EXPECTED = [f"line {i} é€ " for i in range(2000)] + ["no end of line"]


@pytest.fixture
def project(host):
    folder = host.home / "sparse_coding"
    folder.mkdir()
    (folder / "numbers.py").write_text(NUMBERS)
    return folder


def test_following_gives_every_line_once_and_ends_with_the_job(machine, project):
    for i in range(499, 2000, 500):
        (project / f"go{i}").touch()
    job, _ = jobs.start(machine, ["numbers.py"])
    assert list(lines(machine, job.name, follow=True)) == EXPECTED
    assert jobs.status(machine, job.name).rc == 0
    assert list(lines(machine, job.name)) == EXPECTED
    assert list(lines(machine, job.name, offset=len("line 0 é€ \n".encode()))) == EXPECTED[1:]


def test_connections_that_break_lose_and_double_no_line(machine, host, project):
    """Four times, each in the middle of a line that is not finished before."""
    job, _ = jobs.start(machine, ["numbers.py"])
    seen = []
    for line in lines(machine, job.name, follow=True):
        seen.append(line)
        if len(seen) % 500 == 499:
            host.drop_connections()
            (project / f"go{len(seen)}").touch()
    assert seen == EXPECTED
    assert (host.folder / "sshd.log").read_text().count("Accepted publickey") == 5


def test_a_log_that_is_only_looked_at_stops_at_its_present_end(machine, project):
    (project / "numbers.py").write_text("import time\nprint('one', flush=True)\ntime.sleep(600)\n")
    job, _ = jobs.start(machine, ["numbers.py"])
    while not jobs.status(machine, job.name).log_bytes:
        time.sleep(0.05)
    assert list(lines(machine, job.name)) == ["one"]


def test_a_machine_that_stays_away_is_given_up(machine, host, project):
    (project / "numbers.py").write_text("import time\nprint('one', flush=True)\ntime.sleep(600)\n")
    job, _ = jobs.start(machine, ["numbers.py"])
    following = lines(machine, job.name, follow=True, patience_seconds=1.5)
    assert next(following) == "one"
    host.stop()
    with pytest.raises((Refused, Unreachable)):
        next(following)


def test_a_line_that_never_ends_comes_in_pieces(machine, project):
    """A progress bar of hours: the whole of it must neither be held nor read again at each look."""
    bar = "".join(f"\r{i:9d} rows" for i in range(20_000))
    (project / "numbers.py").write_text(f"print({bar!r}, end='', flush=True)\n")
    job, _ = jobs.start(machine, ["numbers.py"])
    pieces = list(lines(machine, job.name, follow=True))
    assert max(map(len, pieces)) <= LONGEST
    assert "\r".join(pieces) == bar
    kept = read(machine, job.name, 0)
    assert len(kept) == len(bar)
    assert [len(line) < LONGEST for line in kept.split(b"\n")] == [True] * 5
    assert [printable(line.decode()) for line in kept.split(b"\n")][-1] == "    19999 rows"


def test_there_is_no_such_job(machine):
    with pytest.raises(UserError, match="no job nothing"):
        list(lines(machine, "nothing"))
