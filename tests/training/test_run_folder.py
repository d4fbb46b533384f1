from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import time

import pytest

from sparse_coding.errors import UserError
from sparse_coding.training.run_folder import RunFolder, differences, read_lines


def test_the_same_settings_continue_and_others_are_named(tmp_path):
    with RunFolder(tmp_path / "run", {"lr": 1, "grid": {"l1": [1, 2]}}):
        pass
    with RunFolder(tmp_path / "run", {"lr": 1, "grid": {"l1": [1, 2]}}):
        pass
    with pytest.raises(UserError, match=r"grid\.l1: was \[1, 2\], is \[1, 3\].*--fresh"):
        RunFolder(tmp_path / "run", {"lr": 1, "grid": {"l1": [1, 3]}})


def test_fresh_empties_the_folder(tmp_path):
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder:
        folder.append("log.jsonl", {"step": 1})
        folder.write_json("sub.json", {})
    with RunFolder(tmp_path / "run", {"lr": 2}, fresh=True) as folder:
        assert not folder.finished
        folder.append("log.jsonl", {"step": 7})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "settings.json", "log.jsonl"}
    assert read_lines(tmp_path / "run" / "log.jsonl") == [{"step": 7}]


@pytest.mark.parametrize("what", [UserError("layer 999"), KeyboardInterrupt()])
def test_what_ends_before_the_new_run_begins_leaves_the_old_one_as_it_was(tmp_path, what):
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder:
        folder.append("log.jsonl", {"step": 1})
        folder.finish([{"name": "a"}])

    def start_over():
        with RunFolder(tmp_path / "run", {"lr": 2}, fresh=True):
            raise what

    with pytest.raises(type(what)):
        start_over()
    with RunFolder(tmp_path / "run", {"lr": 1}) as folder:
        assert folder.finished
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "lock",
        "settings.json",
        "log.jsonl",
        "results.jsonl",
    }


def test_a_folder_in_use_is_refused_with_its_owner(tmp_path):
    with RunFolder(tmp_path / "run", {}):
        code = (
            "from pathlib import Path; from sparse_coding.errors import reported\n"
            "from sparse_coding.training.run_folder import RunFolder\n"
            f"with reported(): RunFolder(Path({str(tmp_path / 'run')!r}), {{}})"
        )
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert f"in use by process {os.getpid()}" in other.stderr
    assert len(other.stderr.strip().splitlines()) == 1


def test_a_folder_of_other_files_is_left_alone_even_when_fresh(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for fresh in (False, True):
        with pytest.raises(UserError, match="no run of ours"):
            RunFolder(tmp_path, {}, fresh=fresh)
    assert (tmp_path / "thesis.tex").exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder(tmp_path / "out", {})


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_lines(tmp_path / "log.jsonl")] == [1, 2]


def test_the_log_is_rewound_to_the_checkpoint(tmp_path):
    with RunFolder(tmp_path / "run", {}) as folder:
        for step in (1, 2, 3):
            folder.append("log.jsonl", {"step": step})
        folder.rewind_log(2)
        assert [record["step"] for record in read_lines(folder.path / "log.jsonl")] == [1, 2]


def test_differences_name_the_key_and_both_values():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 4}) == [
        "a.c: was 2, is 3",
        "d: was null, is 4",
    ]


def fails_in(path, *done):
    with RunFolder(path, {}) as folder:
        for record in done:
            folder.append("log.jsonl", record)
        raise UserError("layer 999")


def test_a_mistake_before_anything_was_done_leaves_no_folder(tmp_path):
    (tmp_path / "there before").mkdir()
    for name, done in (("new", []), ("begun", [{"step": 1}]), ("there before", [])):
        with pytest.raises(UserError, match="layer 999"):
            fails_in(tmp_path / name, *done)
    assert {path.name for path in tmp_path.iterdir()} == {"begun", "there before"}


def test_a_kill_in_the_middle_of_starting_over_blocks_nothing(tmp_path):
    """Killed right after the old run was set aside: only the lock and what was set aside are there."""
    (tmp_path / "run" / ".replaced" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "lock").write_text("")
    for fresh in (True, False, True):
        with RunFolder(tmp_path / "run", {"lr": 2}, fresh=fresh) as folder:
            folder.append("log.jsonl", {"step": 1})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "settings.json", "log.jsonl"}


def test_the_name_of_a_process_that_died_is_no_obstacle(tmp_path):
    code = (
        "import os, signal; from pathlib import Path\n"
        "from sparse_coding.training.run_folder import RunFolder\n"
        f"folder = RunFolder(Path({str(tmp_path / 'run')!r}), {{}})\n"
        "folder.append('log.jsonl', {'step': 1}); print(os.getpid(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert dead.returncode == -9
    lock = tmp_path / "run" / "lock"
    assert f"process {dead.stdout.strip()} on " in lock.read_text()
    with RunFolder(tmp_path / "run", {}):
        assert f"process {os.getpid()} on {socket.gethostname()}" in lock.read_text()


def test_two_runs_started_at_once_never_share_a_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from sparse_coding.errors import reported\n"
        "from sparse_coding.training.run_folder import RunFolder\n"
        "sys.stdin.readline()\n"
        f"with reported(), RunFolder(Path({str(tmp_path / 'run')!r}), {{}}): time.sleep(2)"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    time.sleep(0.5)
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    errors = [process.communicate(timeout=60)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], errors
    assert any("in use by process" in told and socket.gethostname() in told for told in errors)


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("sparse_coding.training.run_folder.fcntl.flock", none)
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.append("log.jsonl", {"step": 1})
    assert "has no locks (No locks available)" in capsys.readouterr().err


def test_a_full_disk_names_the_log_and_keeps_its_lines(tmp_path):
    """A limit on the size of files stands in for the disk: the kernel refuses the write in the same way."""
    code = (
        "import resource; from pathlib import Path; from sparse_coding.errors import reported\n"
        "from sparse_coding.training.run_folder import RunFolder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"with reported(), RunFolder(Path({str(tmp_path / 'run')!r}), {{}}) as folder:\n"
        "    for step in range(1000): folder.append('log.jsonl', {'step': step, 'loss': [0.5] * 5})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "the disk is full while writing" in done.stderr
    assert "log.jsonl" in done.stderr
    assert "Traceback" not in done.stderr
    kept = read_lines(tmp_path / "run" / "log.jsonl")
    assert [record["step"] for record in kept] == list(range(len(kept)))
    assert len(kept) > 30
    with RunFolder(tmp_path / "run", {}) as folder:
        folder.rewind_log(20)
        folder.append("log.jsonl", {"step": 21})
        assert [record["step"] for record in read_lines(folder.path / "log.jsonl")] == list(range(22))
