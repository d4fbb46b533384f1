from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils import job as jobs
from vast_utils.logs import lines
from vast_utils.secrets import Redactor, collect, refuse_in

VALUES = {"WANDB_API_KEY": "w4ndb" + "5" * 35, "HF_TOKEN": "hf_" + "T0ken" * 7, "MY_OWN": "a secret' \"with $(signs)"}


def test_what_goes_along():
    environ = {
        **VALUES,
        "AWS_REGION": "eu-west-1",
        "AWS_SKIP_SIGNATURE": "true",
        "VAST_API_KEY": "v" * 64,
        "HOME": "/home/me",
        "AWS_SESSION_TOKEN": "",
    }
    names = {"WANDB_API_KEY", "HF_TOKEN", "AWS_REGION", "AWS_SKIP_SIGNATURE"}
    assert set(collect(environ)) == names
    assert set(collect(environ, ["MY_OWN"])) == names | {"MY_OWN"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("VAST_API_KEY", "never goes to one"),
        ("NOT_SET", "no such variable here"),
        ("MY_OWN=value", "give the name alone"),
        ("A B", "no such variable"),
    ],
)
def test_names_that_cannot_go_along(name, words):
    with pytest.raises(UserError, match=words) as error:
        collect({**VALUES, "VAST_API_KEY": "v" * 64}, [name])
    assert "MY_OWN=value" not in str(error.value)


def test_a_line_shows_the_name_instead_of_the_value():
    hide = Redactor({**VALUES, "SHORT": "abc", "LONGER": VALUES["HF_TOKEN"] + "more", "AWS_REGION": "eu-west-1"})
    line = f"token={VALUES['HF_TOKEN']} {VALUES['HF_TOKEN']}more abc eu-west-1"
    assert hide(line) == "token=[HF_TOKEN] [LONGER] abc eu-west-1"


def test_a_command_with_a_secret_is_refused():
    with pytest.raises(UserError, match="the value of WANDB_API_KEY"):
        refuse_in(["run.py", f"--key={VALUES['WANDB_API_KEY']}"], VALUES)
    refuse_in(["run.py", "--key", "other"], VALUES)


USES = """
import os, time
print(sorted(name for name in ("WANDB_API_KEY", "HF_TOKEN", "MY_OWN") if os.environ.get(name)), flush=True)
print(len(os.environ["MY_OWN"]), flush=True)
while not os.path.exists("go on"):
    time.sleep(0.05)
"""


def test_values_are_in_the_jobs_environment_and_nowhere_else_on_the_machine(machine, host):
    """A whole run: start, status, log, resume, end; then every file and every command line is searched."""
    project = host.home / "sparse_coding"
    project.mkdir()
    (project / "uses.py").write_text(USES)
    seen_in_command_lines = set()

    def look_at_command_lines() -> None:
        for pid in Path("/proc").glob("[0-9]*"):
            try:
                command = (pid / "cmdline").read_bytes()
            except OSError:
                continue
            seen_in_command_lines.update(name for name, value in VALUES.items() if value.encode() in command)

    for again in (False, True):
        job, started = jobs.start(machine, ["uses.py"], VALUES, again=again)
        assert started
        look_at_command_lines()
        assert b"WANDB_API_KEY=" + VALUES["WANDB_API_KEY"].encode() in Path(f"/proc/{job.pid}/environ").read_bytes()
        assert os.stat(f"/proc/{job.pid}/environ").st_mode & 0o077 == 0
        until = time.monotonic() + 60
        while jobs.status(machine, job.name).log_bytes < 40 * (1 + again) and time.monotonic() < until:
            look_at_command_lines()
        (project / "go on").touch()
        list(lines(machine, job.name, follow=True))
        (project / "go on").unlink()
    assert list(lines(machine, job.name)) == ["['HF_TOKEN', 'MY_OWN', 'WANDB_API_KEY']", "24"] * 2
    assert jobs.status(machine, job.name).rc == 0
    assert seen_in_command_lines == set()
    files = [path for path in host.folder.rglob("*") if path.is_file()]
    assert any(path.name == "job.json" for path in files)
    for path in files:
        for name, value in VALUES.items():
            assert value.encode() not in path.read_bytes(), f"{name} stands in {path}"
    for path in (host.home / ".sparse_coding", host.home / ".sparse_coding" / "jobs" / job.name):
        assert path.stat().st_mode & 0o077 == 0
