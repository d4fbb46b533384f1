"""What comes home of a job's log."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from vast_utils.clock import SafeClock
from vast_utils.ledger import Ledger
from vast_utils.results import Results
from vast_utils.tasks import Queue, Task


def test_a_log_longer_than_a_piece_comes_whole_once_its_job_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("VAST_UTILS_STATE", str(tmp_path))
    log = b"".join(b"line %d\n" % number for number in range(50)) + b"and no end"
    crew: Any = SimpleNamespace(log=lambda rental, task, offset: log[offset : offset + 40])
    task = Task("one", ("run.py",))
    queue, shown = Queue(Ledger("run"), (task,)), []
    results = Results(crew, queue, SafeClock(0.0), print, lambda task, line: shown.append(line))
    rental: Any = None
    results.log(rental, task)  # the job runs: one piece at each look
    assert shown == ["line 0", "line 1", "line 2", "line 3", "line 4"]
    results.log(rental, task, last=True)
    assert shown == [f"line {number}" for number in range(50)]
    assert queue["one"].log_bytes == log.rindex(b"\n") + 1
