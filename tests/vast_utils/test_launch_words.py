"""What the words of `launch` and `sweep` mean, before anything is rented."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from sparse_coding.errors import UserError
from vast_utils.__main__ import main
from vast_utils.clock import SafeClock
from vast_utils.launch import run_name
from vast_utils.ledger import Ledger
from vast_utils.session import printable, with_bucket
from vast_utils.signals import HaltingClock, Stopped, stopping
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


def test_a_signal_is_an_exception_until_machines_are_being_destroyed():
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
