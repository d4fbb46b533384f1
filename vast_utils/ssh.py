"""Commands on a machine that ssh reaches: bounded in time, its key pinned, every failure told apart.

Nothing of the user's ssh configuration is read, and nothing (agent, display, ports) is forwarded: the machine may
belong to a stranger.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from inspect import getsource
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from sparse_coding.errors import UserError
from vast_utils.said import ANSWER_BYTES, collected, plain, plain_throughout

CONNECT_SECONDS = 15
FIND_PYTHON = (
    "source=$1; shift; "
    "for python in python3 /venv/main/bin/python3 /opt/conda/bin/python3 /usr/local/bin/python3; "
    'do command -v "$python" >/dev/null 2>&1 && exec "$python" -IS -c "$source" "$@"; done; '
    'echo "there is no python3 on the machine" >&2; exit 127'
)
"""Images keep Python in many places, and an ssh command sees a shorter PATH than a login."""


class MachineError(UserError):
    """Something about a machine went wrong; the subclasses say what."""


class Unreachable(MachineError):
    """No answer, or the connection broke: the machine may be starting, gone, or behind a bad network."""


class Refused(MachineError):
    """The host answered, but nothing listens on that port (yet)."""


class AuthFailed(MachineError):
    """The machine does not take our ssh key (yet)."""


class HostKeyChanged(MachineError):
    """Another machine answers at this address than the one met first: never trusted."""


class TimedOut(MachineError):
    """The command did not end in time."""


class CommandFailed(MachineError):
    """The command itself failed; `rc` and `stderr` are its own."""

    def __init__(self, message: str, rc: int, stderr: str):
        super().__init__(message)
        self.rc, self.stderr = rc, stderr


_SAID: tuple[tuple[str, type[MachineError]], ...] = (
    (r"IDENTIFICATION HAS CHANGED|Host key verification failed|host key is known", HostKeyChanged),
    (r"Permission denied \(|Too many authentication failures", AuthFailed),
    (r"Connection refused", Refused),
)


@dataclass(frozen=True)
class Done:
    """A command that ended: `rc`, and what it wrote as bytes."""

    rc: int
    stdout: bytes
    stderr: bytes

    @property
    def text(self) -> str:
        return self.stdout.decode("utf-8", "replace")


@dataclass(frozen=True)
class Started:
    """A command that runs on a machine, and its three streams."""

    process: subprocess.Popen[bytes]
    stdin: IO[bytes]
    stdout: IO[bytes]
    stderr: IO[bytes]

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        for pipe in (self.stdin, self.stdout, self.stderr):
            with suppress(OSError):
                pipe.close()
        self.process.wait()


@dataclass(frozen=True)
class Machine:
    """One machine. `known_hosts` is its own: its key is recorded there at the first contact, then required."""

    host: str
    port: int
    user: str
    known_hosts: Path
    identity: Path | None = None
    """The private key; by default ssh's agent and usual files."""

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"

    def run(self, argv: Sequence[str], stdin: bytes = b"", timeout: float | None = 60.0, check: bool = True) -> Done:
        """Run a command to its end. Raises `TimedOut`, `CommandFailed` (if `check`) or how the connection failed.

        A command that exits 255 looks like a failed connection: ssh uses that code itself.
        """
        with self.start(argv) as command:
            try:
                out, err = collected(command.process, stdin, timeout)
            except subprocess.TimeoutExpired:
                raise TimedOut(f"{self}: {_short(argv)} did not end within {timeout:g} s") from None
        if max(len(out), len(err)) > ANSWER_BYTES:
            raise MachineError(f"{self} says more than we asked for")
        done = Done(command.process.returncode, out, err)
        if done.rc == 255:
            raise self.failure(err)
        if check and done.rc != 0:
            said = plain(err).strip()
            last = said.splitlines()[-1] if said else "it said nothing"
            raise CommandFailed(f"{self}: {_short(argv)} exited {done.rc}: {last}", done.rc, said)
        return done

    def ask(self, script: ModuleType, request: Mapping[str, Any], timeout: float = 60.0) -> dict[str, Any]:
        """The answer of a script of `on_machine` to a request: a line of JSON each way, over stdin and stdout.

        Its strings are safe to print. What is in it is to be looked at under `understood`.
        """
        done = self.run(python_command(script), json.dumps(request).encode() + b"\n", timeout)
        try:
            answer = plain_throughout(json.loads(done.stdout.splitlines()[-1]))
        except (ValueError, IndexError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise MachineError(f"{self} answered what we do not understand: {plain(done.stdout[:200])!r}")
        return answer

    @contextmanager
    def understood(self) -> Iterator[None]:
        """For looking at an answer: one that is not as our script makes it is the machine's failure, not ours."""
        try:
            yield
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
            raise MachineError(f"{self} answered what we do not understand ({type(error).__name__})") from None

    def start(self, argv: Sequence[str]) -> Started:
        """Start a command with pipes for its three streams, as a context: at its end nothing is left here."""
        try:
            self.known_hosts.parent.mkdir(parents=True, exist_ok=True)
            if not self.known_hosts.exists():
                self.known_hosts.touch()  # ssh that cannot keep the machine's key would take any other the next time
        except OSError as error:
            raise UserError(
                f"{self.known_hosts}, where the machine's key is to be kept, cannot be written ({error.strerror})"
            ) from None
        try:
            process = subprocess.Popen(
                [*self.ssh_command(), shlex.join(argv)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is ours to handle: there may be results to fetch first
            )
        except FileNotFoundError:
            raise UserError("there is no ssh client here; install OpenSSH (openssh-client)") from None
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        return Started(process, process.stdin, process.stdout, process.stderr)

    def failure(self, stderr: bytes) -> MachineError:
        """The error that ssh's own words (exit code 255) tell."""
        said = " ".join(plain(stderr).replace("@@", "").split()) or "the connection was lost"
        kind = next((kind for pattern, kind in _SAID if re.search(pattern, said)), Unreachable)
        if kind is HostKeyChanged:
            where = f"[{self.host}]:{self.port}" if self.port != 22 else self.host
            mend = f"ssh-keygen -R {shlex.quote(where)} -f {shlex.quote(str(self.known_hosts))}"
            return kind(f"{self}: its ssh key is not the one of the first contact; if that is right: {mend}")
        if kind is AuthFailed:
            key = f"{self.identity}" if self.identity else "a key of ssh's agent or a usual file (--identity names one)"
            said += f" Tried: {key}; one with a passphrase has to be in the agent (ssh-add)"
        return kind(f"{self}: {said[-400:]}")

    def ready(self, deadline_seconds: float, pause: float = 2.0) -> None:
        """Wait until the machine takes a command; raises the last failure. A changed host key is not waited for.

        A refused key is: keys attached through an account reach a machine some seconds after it starts.
        """
        until = time.monotonic() + deadline_seconds
        while True:
            try:
                self.run(["true"], timeout=max(5.0, min(CONNECT_SECONDS + 5.0, until - time.monotonic())))
                return
            except (Unreachable, Refused, AuthFailed, TimedOut):
                if time.monotonic() + pause >= until:
                    raise
            time.sleep(pause)

    def close(self) -> None:
        """End the shared connection, if there is one; it would end by itself a minute after its last use."""
        with suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run([*self.ssh_command("-O", "exit")], capture_output=True, timeout=10, check=False)

    def ssh_command(self, *extra: str) -> list[str]:
        """ssh with all options, up to and including the host."""
        met = self.known_hosts.is_file() and self.known_hosts.stat().st_size > 0
        options = {
            "BatchMode": "yes",
            "UserKnownHostsFile": _path(self.known_hosts),
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes" if met else "accept-new",
            "UpdateHostKeys": "no",
            "CheckHostIP": "no",
            "ConnectTimeout": str(CONNECT_SECONDS),
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": "3",
            "ForwardAgent": "no",
            "ClearAllForwardings": "yes",
            "LogLevel": "ERROR",
            "ControlMaster": "auto",
            "ControlPersist": "60",
            "ControlPath": _path(self._control_path()),
        }
        if self.identity is not None:
            options["IdentitiesOnly"] = "yes"
        flags = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        identity = ["-o", f"IdentityFile={_path(self.identity)}"] if self.identity is not None else []
        return ["ssh", "-F", "none", "-T", *flags, *identity, "-p", str(self.port), *extra, f"{self.user}@{self.host}"]

    def _control_path(self) -> Path:
        """One shared connection per machine and pinned key. The place is short: a socket's path may have 104 bytes."""
        folder = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp") / f"sc-ssh-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        if folder.is_symlink() or about.st_uid != os.getuid() or about.st_mode & 0o077:
            raise UserError(f"{folder} is not ours alone; remove it: connections to machines are kept there")
        what = "\0".join(map(str, (self.host, self.port, self.user, self.known_hosts.absolute(), self.identity)))
        return folder / hashlib.sha256(what.encode()).hexdigest()[:20]


def python_command(script: ModuleType) -> list[str]:
    """The command that runs a script of `on_machine` with a Python of the machine; nothing need be installed there."""
    return ["sh", "-c", FIND_PYTHON, "sh", getsource(script)]


def parse_address(text: str) -> tuple[str, str, int]:
    """User, host and port of `user@host:port`; the port is 22 and the user root where they are left out."""
    found = re.fullmatch(r"(?:([A-Za-z0-9_][\w.-]*)@)?([A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\])(?::(\d{1,5}))?", text)
    if not found or not 0 < int(found[3] or 22) < 65536:
        raise UserError(f"--ssh is {text!r}: it must be user@host:port, such as root@203.0.113.7:40022")
    return found[1] or "root", found[2].strip("[]"), int(found[3] or 22)


def _path(path: Path) -> str:
    """A path as a value of ssh's options, which read `%h` and the like in it."""
    return '"' + str(path).replace("%", "%%") + '"'


def _short(argv: Sequence[str]) -> str:
    """A command in an error message: its first words, on one line, without any source that went along."""
    if FIND_PYTHON in argv:
        return "what we run there"
    words = [word if len(word) < 60 and "\n" not in word else "..." for word in argv]
    return " ".join(words[:6])
