"""What the words of `launch` and `sweep` mean, before anything is rented."""

from __future__ import annotations

import dataclasses
import io
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from sparse_coding.errors import Interrupted, UserError
from tests.vast_utils.test_ledger import RECORD
from vast_utils.__main__ import main
from vast_utils.clock import SafeClock
from vast_utils.launch import run_name
from vast_utils.ledger import Caps, Ledger
from vast_utils.said import printable
from vast_utils.session import say_line, with_bucket
from vast_utils.signals import HaltingClock, Stopped, stopping
from vast_utils.sweep import Board
from vast_utils.tasks import Queue, Task, read_tasks

LAUNCH = ["launch", "--max-cost", "5", "--max-hours", "6"]


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No account, no state, no secrets."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("VAST_UTILS_STATE", str(tmp_path / "state"))
    for name in ("VAST_API_KEY", "VAST_URL", "WANDB_API_KEY", "HF_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)


def test_the_same_command_in_the_same_folder_is_the_same_run(tmp_path):
    one = run_name(["run.py", "--l1", "1"], tmp_path)
    assert one == run_name(["run.py", "--l1", "1"], tmp_path)
    assert (
        len({one, run_name(["run.py", "--l1", "3"], tmp_path), run_name(["run.py", "--l1", "1"], tmp_path / "b")}) == 3
    )
    assert run_name(["python", "Replicate_toy.py"], tmp_path).startswith("replicate-toy-")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*LAUNCH], "there is no command"),
        (["launch", "--max-hours", "6", "--", "run.py"], "max-cost"),
        ([*LAUNCH, "--name", "My Run", "--", "run.py"], "is named 'My Run'"),
        ([*LAUNCH, "--bucket", "gs://b", "--", "run.py"], "must start with s3://"),
        ([*LAUNCH, "--bucket", "s3://b", "--", "other.py"], "only run.py"),
        ([*LAUNCH, "--region", "us-east-1", "--", "run.py"], "--region goes with --backend skypilot"),
        ([*LAUNCH, "--backend", "skypilot", "--", "run.py"], "add --print, or --to"),
        ([*LAUNCH, "--", "run.py", "--out", "/tmp/x"], "results are fetched from outputs/"),
        ([*LAUNCH, "--", "run.py", "--out=elsewhere/x"], "results are fetched from outputs/"),
        ([*LAUNCH, "--disk", "0", "--", "run.py"], "disk is 0"),
        ([*LAUNCH, "--", "run.py"], "no vast.ai key"),
        (["sweep", "none.yaml", "--max-cost", "5"], "there is no such file"),
        (["sweep", "none.yaml", "--max-cost", "5", "--machines", "0"], "--machines is 0"),
        (["stop"], "which run.*have none"),
        (["logs", "this"], "there is no run 'this': have none"),
        (["lunch"], "unknown verb 'lunch'.*did you mean 'launch'"),
    ],
)
def test_mistakes(words, said):
    with pytest.raises(UserError, match=said):
        main(words)


def test_every_verb_explains_itself(capsys):
    main([])
    shown = capsys.readouterr().out
    for verb in ("launch", "sweep", "status", "logs", "fetch", "stop", "reap", "offers", "push", "setup"):
        assert f"\n  {verb} " in shown
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert "usage" in capsys.readouterr().out.lower()


def test_status_of_nothing(capsys):
    main(["status"])
    assert capsys.readouterr().out == "no run has been launched from this computer\n"


def test_a_bucket_makes_run_py_continue_from_there():
    assert with_bucket(["run.py"], "s3://b/runs/", "toy") == ("run.py", "--sync", "s3://b/runs/toy")
    assert with_bucket(["run.py", "--sync=s3://mine"], "s3://b", "toy") == ("run.py", "--sync=s3://mine")
    assert with_bucket(["other.py"], "", "toy") == ("other.py",)


def test_the_same_job_as_a_task_file_of_skypilot(capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret" * 8)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    flags = ["--backend", "skypilot", "--print", "--gpu", "RTX 4090", "--cloud", "aws", "--region", "us-east-1"]
    main([*LAUNCH, *flags, "--name", "toy", "--bucket", "s3://b", "--", "run.py", "--model", "gpt2"])
    out = capsys.readouterr().out
    assert "secretsecret" not in out
    task = yaml.safe_load(out)
    assert task["name"] == "toy"
    assert task["resources"]["infra"] == "aws/us-east-1"
    assert task["resources"]["accelerators"] == "RTX4090:1"
    assert task["run"].endswith("21600 python run.py --model gpt2 --sync s3://b/toy")
    assert task["secrets"] == {"WANDB_API_KEY": None}
    assert task["envs"] == {"AWS_REGION": "us-east-1"}


def test_a_sweep_as_task_files_one_for_each_command(tmp_path, capsys):
    path = tmp_path / "toy.yaml"
    path.write_text("command: run.py\ngrid: {l1: [1, 3]}\n")
    main(["sweep", str(path), "--max-cost", "5", "--backend", "skypilot", "--to", str(tmp_path / "sky")])
    written = capsys.readouterr().out.split()
    texts = [yaml.safe_load(Path(one).read_text()) for one in written]
    assert len(texts) == 2
    assert ["--l1 1 " in text["run"] for text in texts] == [True, False]
    main(["sweep", str(path), "--max-cost", "5", "--backend", "skypilot", "--print"])
    assert len(list(yaml.safe_load_all(capsys.readouterr().out))) == 2


def test_lines_of_a_stranger_are_shown_without_what_moves_a_terminal():
    assert printable("10%\r20%\r100%\r") == "100%"
    assert printable("a\x1b[2Jb\tc\u202e") == "a?[2Jb\tc?"


def test_tasks_keep_what_they_have_reached(tmp_path):
    ledger = Ledger("toy", tmp_path)
    todo = [Task(name, ("run.py", name)) for name in ("a", "b", "c")]
    queue = Queue(ledger, todo)
    queue.begin(())
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert (first.name, second.name) == ("a", "b")
    queue.change(queue.place(first, "label-1"), phase="done")
    queue.change(queue.place(second, "label-2"), log_bytes=7, runs=("x",))
    again = Queue(Ledger("toy", tmp_path), todo)
    again.begin({"label-2"})
    assert [task.phase for task in again] == ["done", "running", "waiting"]
    on = again.on("label-2")
    assert on is not None
    assert (on.log_bytes, on.runs) == (7, ("x",))
    assert again.place(on, "label-2").log_bytes == 7
    assert again.place(on, "label-3").log_bytes == 0  # another machine, another log
    lost = Queue(Ledger("toy", tmp_path), todo)
    lost.begin(())
    assert [task.phase for task in lost] == ["done", "waiting", "waiting"]
    assert [task.name for task in read_tasks(ledger)] == ["a", "b", "c"]
    with pytest.raises(UserError, match="a of run 'toy' was another command"):
        Queue(Ledger("toy", tmp_path), [Task("a", ("run.py", "other"))])


@pytest.fixture
def hears_the_terminal():
    """As if these tests were not run under nohup, or in the background of a script, whose children ignore Ctrl-C."""
    own = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in own.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_is_an_exception_until_machines_are_being_destroyed(hears_the_terminal):
    said: list[str] = []
    with stopping(said.append) as ear:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            with pytest.raises(Stopped):
                signal.raise_signal(number)
        ear.deaf = True
        signal.raise_signal(signal.SIGTERM)
    assert len(said) == 1
    assert "please wait" in said[0]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_signal_before_anything_is_rented_is_said_in_a_line():
    with pytest.raises(Interrupted, match="nothing was rented"), stopping():
        signal.raise_signal(signal.SIGTERM)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_middle_of_a_line_does_not_end_the_end():
    def in_a_line(line: str) -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter>")

    with stopping(in_a_line) as ear:
        ear.deaf = True
        signal.raise_signal(signal.SIGINT)


class Terminal(io.StringIO):
    """A terminal that may be closed."""

    gone = False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        return super().write(text)


def on_a_terminal(monkeypatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("rich._console", None)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    return terminal


def test_a_closed_terminal_ends_no_run(monkeypatch, tmp_path):
    terminal = on_a_terminal(monkeypatch)
    with Board(Ledger("toy", tmp_path)) as board:
        terminal.gone = True
        board.say("what happened")
    say_line("what happened")


def test_the_table_of_a_sweep_on_a_terminal(monkeypatch, tmp_path):
    terminal = on_a_terminal(monkeypatch)
    with Ledger("toy", tmp_path).held() as ledger:
        ledger.begin(Caps(0.5, 3.0, 6.0), 1000.0)
        queue = Queue(ledger, [Task("a", ("run.py",), about="--l1 1"), Task("b", ("run.py", "b"), about="--l1 3")])
        queue.begin(())
        record = dataclasses.replace(RECORD, state="ready", instance=4711, hourly=0.6)
        ledger.write(record)
        with Board(ledger) as board:
            first = queue.take()
            assert first is not None
            queue.place(first, record.label)
            board.say("a: started on machine 4711 [not markup]")
    shown = terminal.getvalue()
    assert "a: started on machine 4711 [not markup]" in shown
    table = shown[shown.rindex("toy: 0 of 2 done") :]
    assert re.search(r"--l1 1\s+running\s+4711\s+0\.600", table)
    assert re.search(r"--l1 3\s+waiting", table)


def test_the_threads_of_a_dispatcher_are_stopped_in_their_waits():
    halt, ended = threading.Event(), []
    clock = HaltingClock(SafeClock(), halt)

    def wait() -> None:
        try:
            clock.sleep(100)
        except Stopped:
            ended.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    halt.set()
    began = time.monotonic()
    clock.sleep(0.05)  # the main thread waits in peace
    thread.join(10)
    assert ended == [True]
    assert time.monotonic() - began < 8
