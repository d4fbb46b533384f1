from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils import job as jobs
from vast_utils.on_machine import jobs as there

COUNT = "import time\nfor i in range(1000):\n    print('line', i, flush=True)\n    time.sleep(0.05)\n"
SAVES = (
    "import signal, sys, time\n"
    "def save(*_):\n    time.sleep(0.3)\n    open('saved', 'w').write('state')\n    sys.exit(130)\n"
    "signal.signal(signal.SIGTERM, save)\nprint('ready', flush=True)\ntime.sleep(600)\n"
)
STUBBORN = (
    "import os, signal, subprocess, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "subprocess.Popen(['sleep', '600'], start_new_session=True)\nprint('ready', flush=True)\ntime.sleep(600)\n"
)


@pytest.fixture
def project(host) -> Path:
    folder = host.home / "sparse_coding"
    folder.mkdir()
    for name, source in {
        "count.py": COUNT,
        "saves.py": SAVES,
        "stubborn.py": STUBBORN,
        "quick.py": "print('hi')",
    }.items():
        (folder / name).write_text(source)
    return folder


def until(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def folder(host, name: str) -> Path:
    return host.home / ".sparse_coding" / "jobs" / name


def log(host, name: str) -> str:
    path = folder(host, name) / "log"
    return path.read_text() if path.exists() else ""


def test_a_job_runs_and_its_end_is_known(machine, project):
    job, started = jobs.start(machine, ["quick.py"])
    assert started
    assert job.name.startswith("quick-")
    until(lambda: jobs.status(machine, job.name).state == "done")
    done = jobs.status(machine, job.name)
    assert (done.rc, done.argv, done.attempt) == (0, ("python", "quick.py"), 1)
    assert jobs.all_jobs(machine) == [done]


def test_the_same_command_is_the_same_job(machine, host, project):
    first, _ = jobs.start(machine, ["count.py"])
    again, started = jobs.start(machine, ["count.py"])
    assert not started
    assert (again.name, again.pid, again.state) == (first.name, first.pid, "running")
    other, started = jobs.start(machine, ["count.py", "--other"])
    assert started
    assert other.name != first.name


def test_many_starts_at_once_start_one(machine, host, project):
    machine.run(["true"])
    with ThreadPoolExecutor(6) as pool:
        done = list(pool.map(lambda _: jobs.start(machine, ["count.py"]), range(6)))
    assert sum(started for _, started in done) == 1
    assert len({job.pid for job, _ in done}) == 1


def test_a_name_belongs_to_one_command(machine, project):
    jobs.start(machine, ["quick.py"], name="mine")
    with pytest.raises(UserError, match=r"the job mine .* is another command"):
        jobs.start(machine, ["count.py"], name="mine")


def test_one_that_is_over_is_told_about_and_resumed_only_when_asked(machine, host, project):
    job, _ = jobs.start(machine, ["quick.py"])
    until(lambda: not jobs.status(machine, job.name).lives)
    again, started = jobs.start(machine, ["quick.py"])
    assert (started, again.state, again.attempt) == (False, "done", 1)
    again, started = jobs.start(machine, ["quick.py"], again=True)
    assert (started, again.attempt) == (True, 2)
    until(lambda: not jobs.status(machine, job.name).lives)
    assert log(host, job.name) == "hi\nhi\n"


def test_it_outlives_the_connection(machine, host, project):
    job, _ = jobs.start(machine, ["count.py"])
    host.drop_connections()
    before = log(host, job.name)
    until(lambda: len(log(host, job.name)) > len(before))
    assert jobs.status(machine, job.name).state == "running"


def test_a_failure_and_a_signal_are_told_as_a_shell_does(machine, project):
    job, _ = jobs.start(machine, ["sh", "-c", "exit 3"])
    until(lambda: not jobs.status(machine, job.name).lives)
    assert jobs.status(machine, job.name).rc == 3
    job, _ = jobs.start(machine, ["sh", "-c", "kill -9 $$"])
    until(lambda: not jobs.status(machine, job.name).lives)
    assert jobs.status(machine, job.name).rc == 137


def test_what_cannot_be_started_says_why_in_its_log(machine, host, project):
    job, _ = jobs.start(machine, ["no-such-program"])
    assert (job.state, job.rc) == ("done", 127)
    assert log(host, job.name) == "cannot start no-such-program: No such file or directory\n"


def test_stop_gives_time_to_save(machine, host, project):
    job, _ = jobs.start(machine, ["saves.py"])
    until(lambda: "ready" in log(host, job.name))
    stopped = jobs.stop(machine, job.name, grace_seconds=20)
    assert (stopped.state, stopped.rc) == ("done", 130)
    assert (project / "saved").read_text() == "state"


def test_stop_kills_what_does_not_listen_and_what_it_left(machine, host, project):
    job, _ = jobs.start(machine, ["stubborn.py"])
    until(lambda: "ready" in log(host, job.name))
    mark = f"{there.MARK}={folder(host, job.name)}".encode()

    def of_the_job() -> list[int]:
        return [pid for pid in host.processes() if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")]

    assert len(of_the_job()) == 2
    stopped = jobs.stop(machine, job.name, grace_seconds=0.5)
    assert (stopped.state, stopped.rc) == ("done", 137)
    assert of_the_job() == []


def test_one_that_ended_unseen_is_dead_and_can_be_resumed(machine, host, project):
    job, _ = jobs.start(machine, ["count.py"])
    for pid in host.processes():
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"supervisor.py" in command:
            os.kill(pid, signal.SIGKILL)
    assert jobs.status(machine, job.name).state == "running"  # the job itself lives
    assert job.pid
    os.kill(job.pid, signal.SIGKILL)
    until(lambda: jobs.status(machine, job.name).state == "dead")
    again, started = jobs.start(machine, ["count.py"], again=True)
    assert (started, again.state, again.attempt) == (True, "running", 2)


def test_what_an_earlier_start_left_is_ended_before_the_next(machine, host, project):
    """Its workers would hold the GPU's memory and write to the same files."""
    (project / "leaves.py").write_text(
        "import subprocess\nprint(subprocess.Popen(['sleep', '600'], start_new_session=True).pid, flush=True)\n"
    )
    job, _ = jobs.start(machine, ["leaves.py"])
    until(lambda: jobs.status(machine, job.name).state == "done")
    left = int(log(host, job.name))
    assert left in host.processes()
    jobs.start(machine, ["leaves.py"], again=True)
    assert left not in host.processes()


def test_a_machine_that_restarted_shows_its_jobs_as_dead(machine, host, project, identity):
    job, _ = jobs.start(machine, ["count.py"])
    machine.close()
    host.stop()
    host.start([identity[1]])
    machine.ready(10)
    assert jobs.status(machine, job.name).state == "dead"


def test_a_log_that_stands_still_is_wedged(machine, host, project):
    job, _ = jobs.start(machine, ["saves.py"])
    until(lambda: jobs.status(machine, job.name, quiet_seconds=1.0).state == "wedged")
    assert jobs.status(machine, job.name, quiet_seconds=600).state == "running"
    assert jobs.status(machine, job.name, quiet_seconds=1.0).lives


def test_a_supervisor_that_stands_still_is_wedged_by_the_monotonic_clock(tmp_path, monkeypatch):
    """Without a machine: the state is a function of the job's files and the monotonic clock, never of the date."""
    name = {"name": "j", "given": ["x"], "project": "p", "attempt": 1}
    beat = {"pid": os.getpid(), "ticks": there.start_ticks(os.getpid()), "attempt": 1, "began": 100.0, "now": 160.0}
    (tmp_path / "job.json").write_text(json.dumps(name))
    (tmp_path / "heartbeat.json").write_text(json.dumps({**beat, "log_bytes": 0, "log_grew": 150.0}))
    (tmp_path / "log").touch()
    monkeypatch.setattr(there, "is_locked", lambda _: True)
    monkeypatch.setattr(there.time, "time", lambda: 1e12)
    for now, quiet, state in ((200, 60, "running"), (215, 60, "wedged"), (215, 90, "running"), (221, 90, "wedged")):
        monkeypatch.setattr(there.time, "monotonic", lambda now=now: float(now))
        assert there.status(str(tmp_path), quiet)["state"] == state
    monkeypatch.setattr(there, "is_locked", lambda _: False)
    monkeypatch.setattr(there, "start_ticks", lambda _: None)
    monkeypatch.setattr(there.time, "monotonic", lambda: 5.0)  # the machine was restarted
    dead = there.status(str(tmp_path), 60)
    assert (dead["state"], dead["seconds"]) == ("dead", 60.0)


def test_absent_unknown_and_ambiguous_jobs(machine, project):
    assert jobs.status(machine, "nothing").state == "absent"
    with pytest.raises(UserError, match=r"which job.*have none"):
        jobs.choose(machine, "")
    first, _ = jobs.start(machine, ["count.py"])
    assert jobs.choose(machine, "").name == first.name
    jobs.start(machine, ["saves.py"])
    with pytest.raises(UserError, match="which job"):
        jobs.choose(machine, "")
    with pytest.raises(UserError, match="no job 'other'"):
        jobs.choose(machine, "other")


def test_mistakes_are_said(machine, host):
    with pytest.raises(UserError, match="push the project first"):
        jobs.start(machine, ["quick.py"])
    with pytest.raises(UserError, match="no command"):
        jobs.start(machine, [])
    with pytest.raises(UserError, match="not allowed"):
        jobs.start(machine, ["quick.py"], name="../up")


def test_every_contact_leaves_a_trace_for_the_watchdog(machine, host, project):
    contact = host.home / ".sparse_coding" / "contact"
    jobs.contact(machine)
    first = contact.read_text()
    jobs.all_jobs(machine)
    assert contact.read_text() != first
    jobs.release(machine)
    assert (host.home / ".sparse_coding" / "released").exists()
