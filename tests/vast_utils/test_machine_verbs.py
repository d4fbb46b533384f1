"""The verbs as a user gives them, on a machine of the tests."""

from __future__ import annotations

import getpass
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils.__main__ import main
from vast_utils.ssh import AuthFailed

VERBS = ("push", "setup", "start", "resume", "status", "logs", "fetch", "stop")
ROOT = Path(__file__).parents[2]
RUN = """
import pathlib, signal, sys, time
run = pathlib.Path("outputs/toy-run")
run.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(130))
print("training", sys.argv[1:], flush=True)
while "--forever" in sys.argv:
    time.sleep(0.05)
(run / "results.jsonl").write_text('{"fvu": 0.5}\\n')
"""


@pytest.fixture
def where(host, identity, tmp_path, monkeypatch) -> list[str]:
    """A project of the user's, its folder being the present one, and the flags that name the machine."""
    monkeypatch.setenv("VAST_UTILS_STATE", str(tmp_path / "state"))
    for name in ("WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    project = tmp_path / "project"
    project.mkdir()
    (project / "run.py").write_text(RUN)
    (project / ".env").write_text("WANDB_API_KEY=1")
    (project / "requirements.txt").write_text("")
    subprocess.run(["git", "init", "-q"], cwd=project, check=True)
    monkeypatch.chdir(project)
    return ["--ssh", f"{getpass.getuser()}@127.0.0.1:{host.port}", "--identity", str(identity[0])]


def log(host, name: str) -> str:
    return (host.home / ".sparse_coding" / "jobs" / name / "log").read_text()


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_push_start_logs_fetch_stop(where, host, tmp_path, capsys):
    main(["push", *where, "--dry-run"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1:] == ["requirements.txt", "run.py"]
    assert shown.err == "left out: .env: its name is that of a file of keys\n"
    assert not (host.home / "sparse_coding").exists()
    main(["push", *where])
    assert "2 sent" in capsys.readouterr().out
    main(["start", *where, "--follow", "--", "run.py", "--layer", "2"])
    assert capsys.readouterr().out.splitlines()[1:] == ["training ['--layer', '2']"]
    main(["fetch", *where, "--latest"])
    assert "1 files (13 bytes) of toy-run" in capsys.readouterr().out
    assert Path("outputs/toy-run/results.jsonl").read_text() == '{"fvu": 0.5}\n'
    main(["start", *where, "--name", "long", "--", "run.py", "--forever"])
    assert "started: long: running" in capsys.readouterr().out
    until(lambda: log(host, "long") == "training ['--forever']\n")
    main(["status", *where])
    assert "long: running (python run.py --forever, start 1)" in capsys.readouterr().out
    main(["stop", *where, "long", "--grace", "20"])
    assert "long: ended with exit code 130" in capsys.readouterr().out
    main(["start", *where, "--name", "long", "--", "run.py", "--forever"])
    assert "not started again: long: ended with exit code 130" in capsys.readouterr().out
    main(["resume", *where, "--name", "long", "--", "run.py", "--forever"])
    assert "started: long: running (python run.py --forever, start 2)" in capsys.readouterr().out
    until(lambda: log(host, "long") == "training ['--forever']\n" * 2)
    main(["logs", *where, "long"])
    assert capsys.readouterr().out == "training ['--forever']\n" * 2
    assert (tmp_path / "state" / "known_hosts" / f"127.0.0.1_{host.port}").exists()


def test_models_are_pushed_and_named(where, host, capsys):
    Path("my-gpt").mkdir()
    Path("my-gpt/config.json").write_text("{}")
    main(["push", *where, "--models", "my-gpt"])
    assert "1 sent" in capsys.readouterr().out
    assert (host.home / "sparse_coding" / "my-gpt" / "config.json").exists()


def test_secrets_go_to_the_job_and_are_not_shown(where, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "v" * 40)
    monkeypatch.setenv("MINE", "also along")
    Path("run.py").write_text("import os\nprint('key', os.environ['WANDB_API_KEY'], os.environ['MINE'])")
    main(["push", *where])
    main(["start", *where, "--env", "MINE", "--follow", "--", "run.py"])
    assert capsys.readouterr().out.endswith("key [WANDB_API_KEY] also along\n")


def test_a_log_steers_no_terminal_and_a_failure_is_told(where, capsys):
    Path("run.py").write_text("import sys\nprint('\\x1b[2J\\x1b]0;mine\\x07 0%\\r 50%\\r100% \\x9b1m')\nsys.exit(3)")
    main(["push", *where])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["start", *where, "--name", "bad", "--follow", "--", "run.py"])
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1:] == ["100% ?1m"]
    assert "bad: ended with exit code 3" in shown.err
    assert ended.value.code == 1


def test_a_folder_with_nothing_to_send_is_a_mistake(where):
    Path("my-gpt").mkdir()
    Path("my-gpt/.hidden").write_text("{}")
    with pytest.raises(UserError, match="my-gpt has no file to send"):
        main(["push", *where, "--models", "my-gpt"])


def test_setup_says_what_it_finds(where, capsys):
    main(["push", *where])
    with pytest.raises(UserError, match=r"no Python 3\.10 or newer at /nowhere"):
        main(["setup", *where, "--no-gpu", "--min-mbps", "0", "--disk", "0.1", "--python", "/nowhere"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pusch"], "unknown verb 'pusch'.*did you mean 'push'"),
        (["push"], "--ssh"),
        (["push", "--ssh", "no port:x"], "must be user@host:port"),
        (["push", "--ssh", "me@127.0.0.1:1", "--identity", "/no/such/key"], "no such file"),
        (["status", "--ssh", "me@127.0.0.1:1", "--known-hosts", "/dev/null/pin"], "cannot be written"),
        (["stop", "--ssh", "me@127.0.0.1:1", "--grace", "-1"], "0 or more seconds"),
        (["fetch", "--ssh", "me@127.0.0.1:1", "run", "--latest"], "give one of them"),
        (["start", "--ssh", "me@127.0.0.1:1"], "no command"),
        (["start", "--ssh", "me@127.0.0.1:1", "--env", "A=b", "--", "run.py"], "give the name alone"),
    ],
)
def test_mistakes_are_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.setenv("VAST_UTILS_STATE", str(tmp_path / "state"))
    with pytest.raises(UserError, match=words):
        main(arguments)


def test_a_mistake_exits_2():
    done = subprocess.run(
        [sys.executable, "-m", "vast_utils", "status", "--ssh", "what:ever"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --ssh is 'what:ever'")


def test_a_machine_that_does_not_know_us_is_a_users_error(where, host):
    (host.folder / "authorized_keys").write_text("")
    with pytest.raises(AuthFailed, match="Permission denied"):
        main(["status", *where])


def test_help_lists_every_verb_and_each_explains_itself(capsys):
    main([])
    shown = capsys.readouterr().out
    assert all(f"  {verb} " in shown for verb in VERBS)
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--ssh", "me@there", "--help"])
        assert "--ssh" in capsys.readouterr().out


def test_it_starts_without_the_heavy_libraries():
    code = "import sys, vast_utils.__main__, vast_utils.job, vast_utils.fetch, vast_utils.setup\n" + (
        "print([name for name in ('torch', 'numpy', 'vastai', 'requests', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
