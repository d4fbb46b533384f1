"""The watchdog on a machine, against an API of the tests: when it destroys, when it does not, and that it insists."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils.watchdog import GUARDED, LONGEST, SCRIPT, onstart

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the machine's side needs Linux")
KEY = "instance-key-" + "7" * 20
PAUSE = "0.2"


class Api:
    """Answers DELETE: `answers` first, then 200; what was asked stands in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str | None]] = []
        self.answers: list[int] = []
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_DELETE(self) -> None:
                api.calls.append((self.path, self.headers.get("Authorization")))
                code = api.answers.pop(0) if api.answers else 200
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps({"success": code == 200}).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.server.shutdown()
    api.server.server_close()


class Dog:
    """Starts watchdogs whose home is one folder, which look five times a second."""

    def __init__(self, home: Path, url: str) -> None:
        self.home, self.url = home, url
        self.base = home / ".sparse_coding"
        self.started: list[subprocess.Popen[bytes]] = []
        self.base.mkdir(parents=True)

    def __call__(
        self,
        limit: int = 1000,
        stale: int = 1000,
        path: str = os.environ["PATH"],
        shell: str = "sh",
        key: str = KEY,
        through: tuple[str, ...] = (),
    ) -> Path:
        """Its state folder. through: a script that ends with starting it."""
        environment = {"HOME": str(self.home), "PATH": path, "WATCHDOG_PAUSE": PAUSE}
        environment |= {"CONTAINER_ID": "4711", "CONTAINER_API_KEY": key}
        argv = [shutil.which(shell) or shell, *through, str(SCRIPT), str(limit), str(stale), self.url]
        self.started.append(subprocess.Popen(argv, env=environment, start_new_session=True))
        return self.base

    def stop(self) -> None:
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def dog(tmp_path: Path, api: Api) -> Iterator[Dog]:
    dog = Dog(tmp_path / "home", api.url)
    yield dog
    dog.stop()


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def said(base: Path) -> str:
    path = base / "watchdog.log"
    return path.read_text() if path.exists() else ""


def test_at_its_limit_it_destroys_with_the_instances_own_key(dog, api):
    base = dog(limit=2)
    until(lambda: len(api.calls) >= 1)
    assert api.calls[0] == ("/api/v0/instances/4711/", f"Bearer {KEY}")
    assert "its time is up" in said(base)
    assert KEY not in said(base)


def test_it_insists_until_it_is_gone(dog, api):
    api.answers = [429, 500, 403]
    base = dog(limit=1)
    until(lambda: len(api.calls) >= 5)
    until(lambda: "HTTP 200" in said(base))
    assert [code for code in ("HTTP 429", "HTTP 500", "HTTP 403") if code not in said(base)] == []


def test_an_api_that_is_away_is_asked_again(dog, api, tmp_path):
    api.server.shutdown()
    port = api.server.server_address[1]
    api.server.server_close()
    base = dog(limit=1)
    until(lambda: said(base).count("\n") > 3)
    again = ThreadingHTTPServer(("127.0.0.1", port), api.server.RequestHandlerClass)
    threading.Thread(target=again.serve_forever, daemon=True).start()
    until(lambda: len(api.calls) >= 1)
    again.shutdown()
    again.server_close()


def test_once_all_is_fetched_it_destroys_at_once(dog, api):
    base = dog()
    until(lambda: (base / "watchdog.used").exists())
    assert api.calls == []
    (base / "released").touch()
    until(lambda: len(api.calls) >= 1)
    assert "everything is fetched" in said(base)


def test_a_machine_that_was_never_used_and_is_forgotten_is_destroyed(dog, api):
    base = dog(stale=2)
    for number in range(12):  # somebody is in touch
        (base / "contact").write_text(str(number))
        time.sleep(0.25)
    assert api.calls == []
    until(lambda: len(api.calls) >= 1)
    assert "nobody is in touch" in said(base)


@pytest.mark.parametrize("ended", [False, True])
def test_a_job_or_its_results_keep_the_machine_until_the_limit(dog, api, ended):
    base = dog(stale=1, limit=3)
    job = base / "jobs" / "run"
    job.mkdir(parents=True)
    if ended:
        (job / "exit.json").write_text('{"rc": 0}')
    until(lambda: (base / "watchdog.used").exists() and int((base / "watchdog.used").read_text().split()[0]) >= 2)
    assert api.calls == []
    until(lambda: len(api.calls) >= 1)
    assert "its time is up" in said(base)


def test_a_restart_does_not_start_the_time_anew_and_two_do_not_run(dog, api):
    base = dog(limit=1000)
    until(lambda: (base / "watchdog.used").exists())
    first = (base / "watchdog.pid").read_text()
    assert dog.started[0].poll() is None
    dog(limit=1)
    assert dog.started[1].wait(10) == 0
    assert (base / "watchdog.pid").read_text() == first
    assert api.calls == []
    os.killpg(int(first.split()[0]), 9)
    (base / "watchdog.used").write_text("999\n")
    dog(limit=1000)
    until(lambda: len(api.calls) >= 1)


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_after_a_restart_a_number_that_is_in_use_again_does_not_keep_it_from_its_work(dog, api, tmp_path, whose):
    """Numbers of processes begin anew in a container: its own may be that of the watchdog before it."""
    script = tmp_path / "watchdog.sh"
    if whose == "its own":
        script.write_text('echo "$$ 1" >"$HOME/.sparse_coding/watchdog.pid"; exec sh "$@"\n')
        dog(limit=1, through=(str(script),))
    else:
        script.write_text("sleep 60; true\n")
        dog.started.append(subprocess.Popen(["sh", str(script)], start_new_session=True))
        (dog.base / "watchdog.pid").write_text(f"{dog.started[0].pid} 1\n")
        dog(limit=1)
    until(lambda: len(api.calls) >= 1)


def test_time_for_which_the_machine_was_stopped_counts(dog, api):
    """It was outbid for a while: the time of what it runs on went on."""
    up = int(float(Path("/proc/uptime").read_text().split()[0]))
    (dog.base / "watchdog.used").write_text(f"10 {up - 800}\n")
    base = dog(limit=800)
    until(lambda: len(api.calls) >= 1)
    assert "its time is up" in said(base)


def guarded(tmp_path: Path) -> tuple[int, str]:
    """What a dispatcher asks over ssh."""
    done = subprocess.run(
        ["sh", "-c", GUARDED], env={**os.environ, "HOME": str(tmp_path / "home")}, capture_output=True
    )
    return done.returncode, done.stdout.decode()


def test_whether_it_can_destroy_is_known_beforehand(dog, tmp_path):
    assert guarded(tmp_path)[0] != 0
    base = dog()
    until(lambda: (base / "watchdog.used").exists())
    assert guarded(tmp_path) == (0, "")
    dog.stop()
    assert guarded(tmp_path)[0] != 0
    (base / "watchdog.used").unlink()
    dog(key="")
    until(lambda: (base / "watchdog.used").exists())
    assert guarded(tmp_path) == (1, "no CONTAINER_API_KEY in its environment")


def test_the_time_is_not_that_of_the_wall_clock(dog, api, tmp_path):
    """A `date` that has gone mad changes nothing: what counts is /proc/uptime."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "date").write_text("#!/bin/sh\necho 1970-01-01T00:00:00Z\n")
    (tools / "date").chmod(0o755)
    dog(limit=3, path=f"{tools}:{os.environ['PATH']}")
    began = time.monotonic()
    until(lambda: len(api.calls) >= 1)
    assert time.monotonic() - began > 1.5


def test_without_curl_it_uses_python(dog, api, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "mkdir", "cat", "tr", "grep", "sed", "head", "tail", "sleep", "date", "mv", "ls"):
        (tools / name).symlink_to(shutil.which(name) or name)
    (tools / "python3").symlink_to(sys.executable)
    api.answers = [500]
    base = dog(limit=1, path=str(tools))
    until(lambda: len(api.calls) >= 2)
    assert api.calls[1] == ("/api/v0/instances/4711/", f"Bearer {KEY}")
    assert "500" in said(base)


def test_where_curl_does_not_work_python_is_tried(dog, api, tmp_path):
    (tmp_path / "curl").write_text("#!/bin/sh\necho 'HTTP 000curl: (77) no certificates'; exit 77\n")
    (tmp_path / "curl").chmod(0o755)
    base = dog(limit=1, path=f"{tmp_path}:{os.environ['PATH']}")
    until(lambda: len(api.calls) >= 1)
    until(lambda: "no certificates" in said(base))


def test_the_key_reaches_no_command_line_and_no_file(dog, api):
    api.answers = [500] * 20
    base = dog(limit=1)
    end, seen = time.monotonic() + 2, 0
    while time.monotonic() < end:
        for pid in Path("/proc").glob("[0-9]*"):
            try:
                command = (pid / "cmdline").read_bytes()
            except OSError:
                continue
            seen += b"4711" in command
            assert KEY.encode() not in command
    assert seen or len(api.calls) > 1
    assert all(KEY.encode() not in path.read_bytes() for path in base.rglob("*") if path.is_file())


@pytest.mark.parametrize("shell", ["dash", "bash", "busybox"])
def test_any_posix_shell_will_do(dog, api, shell, tmp_path):
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    if shell == "busybox":
        (tmp_path / "sh").symlink_to(shutil.which("busybox") or "busybox")
        shell = str(tmp_path / "sh")
    dog(limit=1, shell=shell)
    until(lambda: len(api.calls) >= 1)


def test_onstart_places_and_starts_it_detached(api, tmp_path):
    command = onstart(2, 50, api.url + "/")
    assert len(command) < LONGEST
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "WATCHDOG_PAUSE": PAUSE}
    environment |= {"CONTAINER_ID": "4711", "CONTAINER_API_KEY": KEY}
    subprocess.run(["sh", "-c", command], env=environment, check=True, timeout=10)
    try:
        until(lambda: len(api.calls) >= 1)
    finally:
        os.killpg(int((tmp_path / ".sparse_coding" / "watchdog.pid").read_text().split()[0]), 9)
    with pytest.raises(UserError, match="time limit"):
        onstart(0)
