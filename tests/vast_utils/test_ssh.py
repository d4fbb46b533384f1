from __future__ import annotations

import getpass
import json
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from tests.vast_utils.loopback_machine import LoopbackMachine, make_key
from vast_utils import job
from vast_utils.on_machine import exchange
from vast_utils.setup import Needs, check
from vast_utils.ssh import (
    AuthFailed,
    CommandFailed,
    HostKeyChanged,
    Machine,
    MachineError,
    Refused,
    TimedOut,
    Unreachable,
    parse_address,
)
from vast_utils.transfer import pull, remote_files


@pytest.mark.parametrize(
    "words",
    [["a b", "$HOME", "`id`"], ["it's", '"quoted"'], ["line\nbreak", "back\\slash"], ["", "*", ";true"], ["ä€😀"]],
)
def test_every_word_arrives_as_it_is(machine, words):
    done = machine.run(["printf", "%s\\0", *words])
    assert done.stdout.decode().split("\0")[:-1] == words


def test_stdin_and_both_outputs_are_bytes(machine):
    data = bytes(range(256)) * 1000
    done = machine.run(["sh", "-c", "tee /dev/stderr"], stdin=data)
    assert done.stdout == data
    assert done.stderr == data


def test_a_command_that_fails_tells_its_code_and_last_words(machine):
    with pytest.raises(CommandFailed, match=r"exited 7: second") as failure:
        machine.run(["sh", "-c", "echo first >&2; echo second >&2; exit 7"])
    assert failure.value.rc == 7
    assert machine.run(["false"], check=False).rc == 1


def test_a_command_that_takes_too_long_is_given_up(machine):
    began = time.monotonic()
    with pytest.raises(TimedOut, match=r"did not end within 0\.5 s"):
        machine.run(["sleep", "30"], timeout=0.5)
    assert time.monotonic() - began < 25


def test_home_is_the_machines_and_the_environment_is_not_ours(machine, host, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not for everybody")
    assert machine.run(["sh", "-c", "echo $HOME"]).text.strip() == str(host.home)
    assert "not for everybody" not in machine.run(["env"]).text


def test_a_script_runs_on_the_machine_and_answers(machine, host):
    (host.home / "some file").write_text("x")
    answer = machine.ask(exchange, {"verb": "look", "root": "~", "names": ["some file", "other"]})
    assert answer["files"] == {"some file": exchange.facts(host.home / "some file"), "other": None}


def says(host: LoopbackMachine, script: str) -> None:
    """The machine answers every command with this."""
    (host.folder / "command.sh").write_text(f"#!/bin/sh\n{script}\n")


def answers(host: LoopbackMachine, value: object) -> None:
    """The machine answers every request with this."""
    says(host, f"cat >/dev/null; printf '%s\\n' {shlex.quote(json.dumps(value))}")


def test_what_is_no_answer_is_an_error_that_steers_no_terminal(machine, host):
    says(host, "printf '\\033[2Jhello'")
    with pytest.raises(MachineError, match=r"do not understand: '\?\[2Jhello'"):
        machine.ask(exchange, {"verb": "walk"})
    says(host, "printf '\\033[2Jbad' >&2; exit 1")
    with pytest.raises(CommandFailed, match=r"exited 1: \?\[2Jbad"):
        machine.run(["true"])


SHAPES = [
    {},
    {"jobs": 5, "files": 5, "odd": []},
    {"jobs": [], "files": {"a": 5}, "odd": []},
    {"jobs": [{"name": 1, "state": "running"}], "files": {"a": [1]}, "odd": []},
    {"jobs": [{"name": "x", "state": "fine"}], "files": {"../a": [1, 1]}, "odd": []},
    {"jobs": [{"name": "x", "state": "done", "log_bytes": "1"}], "files": {"a": [1, 2**70]}, "odd": []},
]


def test_an_answer_of_another_shape_is_the_machines_failure(machine, host):
    for shape in SHAPES:
        answers(host, {"free": 10**12, "gpus": ["x"], **shape})
        with pytest.raises(MachineError, match="do not understand"):
            job.status(machine, "x")
        with pytest.raises(MachineError, match="do not understand"):
            remote_files(machine, "~")
    with pytest.raises(MachineError, match="do not understand"):
        check(machine, Needs())


def test_words_of_an_answer_steer_no_terminal(machine, host):
    answers(host, {"jobs": [{"name": "x\x1b[2J", "state": "running", "argv": ["\x9b1m", "new\nline"]}]})
    assert str(job.all_jobs(machine)[0]) == "x?[2J: running (?1m new\nline, start 0)"


def test_a_machine_that_never_stops_talking_is_cut(machine, host, monkeypatch):
    monkeypatch.setattr("vast_utils.said.ANSWER_BYTES", 1_000_000)
    monkeypatch.setattr("vast_utils.ssh.ANSWER_BYTES", 1_000_000)
    for stream in (1, 2):
        says(host, f"exec yes >&{stream}")
        with pytest.raises(MachineError, match="says more than we asked for"):
            machine.run(["true"], timeout=50)


def test_a_machine_that_sends_what_was_not_asked_for_is_not_asked_again(machine, host, tmp_path):
    frame = json.dumps({"name": "other", "size": 0, "mtime_ns": 0, "executable": False, "offset": 0})
    says(host, f"echo x >> '{host.folder}/asked'; echo '{frame}'; exec sleep 600")
    with pytest.raises(MachineError, match="not asked for: 'other'"):
        pull(machine, "~", tmp_path / "here", {"mine": (5, 5)})
    assert (host.folder / "asked").read_text() == "x\n"


def test_the_key_of_the_first_contact_is_required_ever_after(machine, host, identity):
    machine.run(["true"])
    first = machine.known_hosts.read_text()
    assert f"[127.0.0.1]:{host.port} ssh-ed25519" in first
    machine.close()
    host.stop()
    for name in ("host_key", "host_key.pub"):
        (host.folder / name).unlink()
    host.start([identity[1]])
    with pytest.raises(HostKeyChanged, match="not the one of the first contact") as error:
        machine.run(["true"])
    with pytest.raises(HostKeyChanged):
        machine.ready(5)
    assert machine.known_hosts.read_text() == first
    mend = str(error.value).rpartition("if that is right: ")[2]
    subprocess.run(shlex.split(mend), check=True, capture_output=True)
    machine.run(["true"])  # as the message said
    assert machine.known_hosts.read_text() != first


def test_the_key_is_kept_whatever_the_path(machine, tmp_path):
    """In ssh's options %h is the host: the key was kept elsewhere, and any other taken the next time."""
    odd = replace(machine, known_hosts=tmp_path / "100%h of it" / "pin")
    odd.run(["true"])
    assert "ssh-ed25519" in odd.known_hosts.read_text()
    odd.close()


def test_another_pin_at_the_same_address_does_not_get_the_open_connection(machine, tmp_path):
    machine.run(["true"])
    kind, key = make_key(tmp_path / "other_host").split()[:2]
    other = replace(machine, known_hosts=tmp_path / "other")
    other.known_hosts.write_text(f"[127.0.0.1]:{machine.port} {kind} {key}\n")
    with pytest.raises(HostKeyChanged):
        other.run(["true"])


def test_a_second_command_uses_the_first_ones_connection(machine, host):
    for _ in range(3):
        machine.run(["true"])
    assert (host.folder / "sshd.log").read_text().count("Accepted publickey") == 1
    machine.close()
    machine.run(["true"])
    assert (host.folder / "sshd.log").read_text().count("Accepted publickey") == 2


def test_the_failures_are_told_apart(machine, host, tmp_path, identity):
    stranger = tmp_path / "stranger"
    make_key(stranger)
    with pytest.raises(
        AuthFailed, match=r"Permission denied \(publickey\)\. Tried: .*/stranger; one with a passphrase"
    ):
        replace(machine, identity=stranger).run(["true"])
    host.stop()
    with pytest.raises(Refused, match="Connection refused"):
        machine.run(["true"])


def test_a_lost_connection_is_no_failure_of_the_command(machine, host):
    with machine.start(["sh", "-c", "echo here; sleep 60"]) as command:
        assert command.stdout.readline() == b"here\n"
        host.drop_connections()
        assert command.process.wait(20) == 255
        assert type(machine.failure(command.stderr.read())) is Unreachable


def test_ready_waits_for_the_machine_and_for_its_keys(new_host, identity, tmp_path):
    host = new_host("late")
    host.start([])
    machine = Machine("127.0.0.1", host.port, getpass.getuser(), tmp_path / "pin", identity[0])
    with pytest.raises(AuthFailed):
        machine.ready(0.5, pause=0.1)
    host.stop()
    with pytest.raises(Refused):
        machine.ready(0.5, pause=0.1)
    host.start([])
    host.authorize(identity[1])
    machine.ready(20, pause=0.1)
    machine.close()


def test_a_machine_that_hangs_is_given_up_in_time(machine, host):
    host.pause()
    try:
        with pytest.raises((TimedOut, Unreachable)):
            machine.run(["true"], timeout=1)
    finally:
        host.resume()
    machine.run(["true"])


def test_nothing_is_forwarded_and_no_configuration_is_read(machine):
    words = machine.ssh_command()
    assert words[:3] == ["ssh", "-F", "none"]
    assert {"ForwardAgent=no", "ClearAllForwardings=yes", "BatchMode=yes"} <= set(words)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("me@example.org:2222", ("me", "example.org", 2222)),
        ("203.0.113.7", ("root", "203.0.113.7", 22)),
        ("root@[2001:db8::7]:40022", ("root", "2001:db8::7", 40022)),
    ],
)
def test_addresses(text, expected):
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "-oProxyCommand=id", "me@-x", "a@b:0", "a@b:70000", "a b", "x@y:z", "-l@host", "a@b;id"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(UserError, match="user@host:port"):
        parse_address(text)


def test_stop_leaves_no_process_of_the_machine(machine, host: LoopbackMachine):
    machine.run(["sh", "-c", "setsid sleep 600 >/dev/null 2>&1 </dev/null &"])
    assert any("sleep" in Path(f"/proc/{pid}/cmdline").read_text() for pid in host.processes())
    host.stop()
    assert host.processes() == []
