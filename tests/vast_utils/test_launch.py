"""`launch` from the offer to the receipt, on machines that are real but for their being on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import time

from tests.vast_utils.rented import Rented, expected, until


def test_a_dry_run_says_what_would_be_and_rents_nothing(rented):
    words = [word for word in rented.launch_words() if word != "--yes"]
    (rented.project / ".env").write_text("WANDB_API_KEY=1")
    rc, out = rented.run("launch", *words, "--", "run.py", "5", "0.1")
    assert rc == 0, out
    assert "$0.400/h on demand: offer 100, the cheapest of 6 that fit" in out
    assert "at most   $5.00 in all, also where others replace it, up to $0.833/h; $2.5" in out
    assert "command   run.py 5 0.1" in out
    assert "sends     3 files" in out
    assert "left out  .env" in out
    assert "nothing was rented" in out
    assert set(rented.fake.calls) == {"search", "user"}
    assert not (rented.folder / "state").exists()


def test_results_come_here_the_machine_is_gone_and_the_cost_is_said(rented):
    rc, out = rented.run("launch", *rented.launch_words(), "--", "run.py", "5", "0.1")
    assert rc == 0, out
    assert json.loads(rented.result()) == {"sum": expected(5)}
    assert not rented.market.leases
    assert f"ends with {expected(5)}" in out
    said = float(re.search(r"cost at most \$([0-9.]+)", out)[1])
    assert rented.market.spent - 0.005 <= said < 0.5
    rc, out = rented.run("launch", *rented.launch_words(), "--", "run.py", "5", "0.1")
    assert (rc, rented.fake.calls.count("create")) == (0, 1)
    assert "is done" in out


def test_a_run_whose_machine_dies_goes_on_elsewhere(rented):
    process = rented.start("launch", *rented.launch_words(), "--", "run.py", "900", "0.1")
    until(lambda: state(rented).get("step", 0) > 5)
    with rented.market.lock:
        (lease,) = rented.market.leases.values()
        rented.market.end(lease)
    rented.hurry()
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert json.loads(rented.result()) == {"sum": expected(900)}
    begun = [int(step) for step in re.findall(r"begins at (\d+)", out)]
    assert len(begun) == 2
    assert begun[1] > 5
    assert "it is gone; destroying it" in out
    assert not rented.market.leases
    assert [machine.port for machine in rented.machines if machine.processes()] == []


def test_killed_at_every_step_it_is_taken_over_and_reap_brings_home_what_is_left(rented):
    words = [*rented.launch_words(), "--", "run.py", "900", "0.1"]
    steps = [
        lambda: "create" in rented.fake.calls,
        lambda: any((one.home / ".sparse_coding" / "venv").exists() for one in rented.machines),
        lambda: job_file(rented, "heartbeat.json"),
        lambda: state(rented).get("step", 0) > 3,
    ]
    for step in steps:
        process = rented.start("launch", *words)
        until(step)
        process.kill()
        process.communicate()
    rented.hurry()
    until(lambda: job_file(rented, "exit.json"))  # nobody looks
    assert len(rented.market.leases) == 1
    assert rented.result() is None
    rc, out = rented.run("reap")
    assert rc == 0, out
    assert not rented.market.leases
    assert json.loads(rented.result()) == {"sum": expected(900)}
    assert rented.fake.calls.count("create") == 3  # what was ready was taken over, not rented again
    rc, out = rented.run("launch", *words)
    assert rc == 2
    assert "ended by reap" in out


def test_ctrl_c_saves_fetches_and_destroys_and_the_same_command_goes_on(rented):
    words = [*rented.launch_words(), "--", "run.py", "900", "0.1"]
    process = rented.start("launch", *words)
    until(lambda: job_file(rented, "heartbeat.json") and saved(rented) > 2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130, out
    assert "the same command goes on" in out
    assert not rented.market.leases
    stopped_at = state(rented)["step"]
    assert stopped_at > 2
    rented.hurry()
    for path in (rented.project / "outputs" / "toy").glob("*.json"):
        os.utime(path, (time.time() + 3600,) * 2)  # the first machine's clock was an hour ahead
    rc, out = rented.run("launch", *words)
    assert rc == 0, out
    assert f"begins at {stopped_at}" in out
    assert state(rented)["step"] == 900
    assert json.loads(rented.result()) == {"sum": expected(900)}


def test_reap_beside_a_dispatcher_has_it_save_and_fetch_although_its_terminal_was_closed(rented):
    process = rented.start("launch", *rented.launch_words(), "--", "run.py", "5000", "0.05")
    until(lambda: job_file(rented, "heartbeat.json") and saved(rented) > 2)
    assert process.stdout
    process.stdout.close()  # from here on whatever it prints fails
    process.stdout = None
    rc, out = rented.run("reap")
    assert rc == 0, out
    assert f"(process {process.pid}) to stop" in out
    assert "nothing of ours is left" in out
    process.wait(60)
    assert state(rented)["step"] == saved(rented)  # what it made last is here
    assert not rented.market.leases


def test_left_alone_it_is_seen_fetched_and_stopped_from_anywhere(rented):
    words = [*rented.launch_words("--detach"), "--", "run.py", "500", "0.2"]
    rc, out = rented.run("launch", *words)
    assert rc == 0, out
    assert "goes on by itself on machine" in out
    assert len(rented.market.leases) == 1
    rc, out = rented.run("status")
    assert rc == 0, out
    assert "no dispatcher is at work; cost at most $0." in out
    assert "its job is running" in out
    rc, out = rented.run("fetch")
    assert rc == 0, out
    assert state(rented)["step"] > 0
    rc, out = rented.run("logs")
    assert "begins at 0" in out
    before = state(rented)["step"]
    rc, out = rented.run("stop")
    assert rc == 0, out
    assert "has no machine left; it cost at most $" in out
    assert state(rented)["step"] > before
    assert not rented.market.leases
    rc, out = rented.run("status")
    assert "waiting (stopped)" in out


def test_a_command_that_is_wrong_fails_once_and_its_words_are_kept(rented):
    rc, out = rented.run("launch", *rented.launch_words("--name", "bad"), "--", "run.py", "2", "0", "--break", "2")
    assert rc == 1, out
    assert "bad: failed: exit code 2: step 1" in out
    assert out.count("begins at") == 1
    assert not rented.market.leases
    rc, out = rented.run("logs", "bad")
    assert out.splitlines() == ["begins at 0", "step 0", "step 1"]


def test_a_forgotten_machine_destroys_itself(rented):
    rented.stale = 3
    process = rented.start("launch", *rented.launch_words(), "--", "run.py", "5", "0.1")
    until(lambda: rented.market.leases and rented.machines and rented.machines[0].processes())
    process.kill()
    process.communicate()
    assert len(rented.market.leases) == 1
    until(lambda: not rented.market.leases)
    assert "nobody is in touch" in (rented.machines[0].home / ".sparse_coding" / "watchdog.log").read_text()


def test_a_machine_that_refuses_to_end_is_said_loudly(rented):
    rented.clock.speed = 150.0  # it is tried for ten minutes, three times
    rented.market.hosts[0].fate.destroy_refusals = float("inf")
    rc, out = rented.run("launch", *rented.launch_words(), "--", "run.py", "2", "0", timeout=240)
    assert rc == 1, out
    assert "MAY STILL BE RUNNING AND COST MONEY" in out
    assert "https://cloud.vast.ai/instances/" in out
    assert json.loads(rented.result()) == {"sum": expected(2)}


def state(rented: Rented) -> dict[str, int]:
    """What was fetched of the job's state."""
    path = rented.project / "outputs" / "toy" / "state.json"
    return json.loads(path.read_text()) if path.exists() else {}


def saved(rented: Rented) -> int:
    """How far the job is on its machine."""
    paths = [one.home / "sparse_coding" / "outputs" / "toy" / "state.json" for one in rented.machines]
    return max((json.loads(path.read_text())["step"] for path in paths if path.exists()), default=0)


def job_file(rented: Rented, name: str) -> bool:
    return any(list((one.home / ".sparse_coding").glob(f"jobs/*/{name}")) for one in rented.machines)
