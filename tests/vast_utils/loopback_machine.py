"""A machine for tests: a real sshd on 127.0.0.1, whose home, files and processes all belong to one folder.

`LoopbackMachine(folder).start(keys, env)` gives (host, port). What runs there (over ssh, or as onstart) has its HOME in
`folder/home`; `env` is seen by onstart alone, as on a rented machine. `stop` kills all that it started,
detached or not. The programs are those of the system, or what TEST_SSHD (a path) names; see `missing`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

MARK = "LOOPBACK_MACHINE"


def sshd_path() -> str | None:
    """sshd by its full path, which it needs to start itself anew."""
    return os.environ.get("TEST_SSHD") or shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def missing() -> str | None:
    """Why there can be no loopback machine here; None if there can."""
    if sys.platform != "linux":
        return "the machine's side needs Linux"
    lacking = [name for name in ("ssh", "ssh-keygen", "setsid") if shutil.which(name) is None]
    if sshd_path() is None:
        lacking.append("sshd (or TEST_SSHD)")
    return f"not here: {', '.join(lacking)}" if lacking else None


def make_key(path: Path) -> str:
    """A new key pair without a passphrase at `path`; the public half as a line."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(path)], check=True)
    return path.with_name(path.name + ".pub").read_text().strip()


class LoopbackMachine:
    """One machine in one folder. It can be stopped and started again: its files stay, its port stays, its key stays."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self.home = self.folder / "home"
        self.port = 0
        self._sshd: subprocess.Popen[bytes] | None = None

    def start(
        self, authorized_keys: list[str], env: dict[str, str] | None = None, onstart: str = ""
    ) -> tuple[str, int]:
        """Start sshd, then the onstart command; (host, port) once it answers."""
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "authorized_keys").write_text("".join(key + "\n" for key in authorized_keys))
        if not (self.folder / "host_key").exists():
            make_key(self.folder / "host_key")
        self._write_wrapper()
        for _ in range(5):
            self.port = self.port or _free_port()
            self._start_sshd()
            if self._answers():
                break
            self._kill_all()
            self.port = 0
        else:
            raise RuntimeError(f"sshd does not start: {(self.folder / 'sshd.log').read_text()[-500:]}")
        if onstart:
            self.run(onstart, env)
        return "127.0.0.1", self.port

    def authorize(self, key: str) -> None:
        """Let one more key in, as attaching it through the account does."""
        with (self.folder / "authorized_keys").open("a") as file:
            file.write(key + "\n")

    def run(self, script: str, env: dict[str, str] | None = None) -> None:
        """Run a shell script on the machine, as its own start does, and do not wait for what it leaves running."""
        with (self.folder / "onstart.log").open("ab") as log:
            subprocess.run(
                ["sh", "-c", script],
                cwd=self.home,
                env={**self._environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
                timeout=60,
                start_new_session=True,
            )

    def pause(self) -> None:
        """The machine hangs: connections are taken and nothing answers."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        """The end of `pause`."""
        self._signal_all(signal.SIGCONT)

    def drop_connections(self) -> None:
        """Every connection breaks; sshd and what runs detached stay."""
        keep = self._sshd.pid if self._sshd else 0
        for pid in self.processes():
            if pid != keep and _command(pid).startswith("sshd"):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> None:
        """The machine is gone, with every process on it."""
        self._kill_all()

    def processes(self) -> list[int]:
        """All that runs on the machine: our mark stands in the environment, or the parent is one of them."""
        mark, found, parents = f"{MARK}={self.folder}".encode(), set(), {}
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            with suppress(OSError, IndexError, ValueError):
                stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if stat[0] != "Z":
                    parents[pid] = int(stat[1])
                    if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                        found.add(pid)
        if self._sshd and self._sshd.poll() is None:
            found.add(self._sshd.pid)
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return sorted(found)

    def _environment(self) -> dict[str, str]:
        return {
            "HOME": str(self.home),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "USER": "tester",
            "LANG": "C.UTF-8",
            MARK: str(self.folder),
        }

    def _write_wrapper(self) -> None:
        """What every ssh command runs through: nothing of the real user's environment or home is seen."""
        values = " ".join(f"{name}='{value}'" for name, value in self._environment().items())
        wrapper = self.folder / "command.sh"
        wrapper.write_text(f'#!/bin/sh\ncd "{self.home}" && exec env -i {values} sh -c "$SSH_ORIGINAL_COMMAND"\n')
        wrapper.chmod(0o755)

    def _start_sshd(self) -> None:
        config = self.folder / "sshd_config"
        settings = {
            "ListenAddress": "127.0.0.1",
            "Port": self.port,
            "HostKey": self.folder / "host_key",
            "AuthorizedKeysFile": self.folder / "authorized_keys",
            "PidFile": "none",
            "StrictModes": "no",
            "UsePAM": "no" if os.getuid() == 0 else "yes",  # without it, a user without a password counts as locked
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "MaxStartups": "100",
            "MaxSessions": "100",
            "PrintMotd": "no",
            "LogLevel": "INFO",
            "ForceCommand": self.folder / "command.sh",
            "SetEnv": f"HOME={self.home}",  # or the login shell would read what the real user's home has for it
        }
        config.write_text("".join(f"{name} {value}\n" for name, value in settings.items()))
        if os.getuid() == 0:  # sshd of Debian wants it, and only its service makes it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        sshd = sshd_path()
        assert sshd
        environment = {**os.environ, MARK: str(self.folder)}
        command = [sshd, "-D", "-e", "-f", str(config)]
        with (self.folder / "sshd.log").open("ab") as log:
            self._sshd = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def _answers(self) -> bool:
        assert self._sshd
        until = time.monotonic() + 10
        while time.monotonic() < until and self._sshd.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
                if connection.recv(4) == b"SSH-":
                    return True
            time.sleep(0.02)
        return False

    def _signal_all(self, number: int) -> None:
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def _kill_all(self) -> None:
        until = time.monotonic() + 10
        while self.processes() and time.monotonic() < until:
            self._signal_all(signal.SIGKILL)
            if self._sshd:
                self._sshd.wait()
            time.sleep(0.02)
        self._sshd = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    return ""
