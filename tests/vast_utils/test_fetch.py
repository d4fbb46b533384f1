from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from sparse_coding.errors import UserError
from vast_utils.fetch import fetch
from vast_utils.on_machine import exchange
from vast_utils.push import push_models
from vast_utils.ssh import MachineError


def put(folder: Path, name: str, data: bytes | str = b"x", age: float = 100.0) -> Path:
    """A file that was written `age` seconds ago."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    os.utime(path, (time.time() - age,) * 2)
    return path


@pytest.fixture
def there(host) -> Path:
    """The outputs folder of the machine, with two runs and a store."""
    outputs = host.home / "sparse_coding" / "outputs"
    put(outputs, "old-run/results.jsonl", '{"a": 1}\n', 200)
    put(outputs, "old-run/pictures/frontier.png", b"\x89PNG", 200)
    put(outputs, "new-run/settings.json", "{}", 50)
    put(outputs, "new-run/log.jsonl", "{}\n", 10)
    put(outputs, "new-run/log.jsonl.k3j_d8fa", "half").chmod(0o600)
    put(outputs, "new-run/checkpoints/step-000000010/state.safetensors", b"10" * 100)
    put(outputs, "new-run/checkpoints/step-000000010/state.json", "{}")
    put(outputs, "new-run/checkpoints/.step-000000020.99/state.safetensors", "half")
    put(outputs, "stores/docs/manifest.json", "{}", 1)
    return outputs


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OLD = {"old-run/results.jsonl", "old-run/pictures/frontier.png"}
STEP = "new-run/checkpoints/step-000000010"
NEW = {"new-run/settings.json", "new-run/log.jsonl", f"{STEP}/state.safetensors", f"{STEP}/state.json"}


def test_all_runs_come_but_stores_and_nothing_half_written(machine, there, tmp_path):
    done = fetch(machine, tmp_path / "outputs")
    assert names(tmp_path / "outputs") == OLD | NEW
    assert done.runs == ["new-run", "old-run"]
    for name in OLD | NEW:
        assert (tmp_path / "outputs" / name).read_bytes() == (there / name).read_bytes()
        assert exchange.facts(tmp_path / "outputs" / name) == exchange.facts(there / name)
    assert fetch(machine, tmp_path / "outputs").moved.placed == []


def test_one_run_the_latest_or_a_store_by_its_name(machine, there, tmp_path):
    assert fetch(machine, tmp_path / "a", "old-run").runs == ["old-run"]
    assert names(tmp_path / "a") == OLD
    assert fetch(machine, tmp_path / "b", latest=True).runs == ["new-run"]
    assert names(tmp_path / "b") == NEW
    fetch(machine, tmp_path / "c", "stores/docs")
    assert names(tmp_path / "c") == {"stores/docs/manifest.json"}
    fetch(machine, tmp_path / "d", checkpoints=False)
    assert names(tmp_path / "d") == OLD | {"new-run/settings.json", "new-run/log.jsonl"}


@pytest.mark.parametrize("run", ["new-rum", "../..", "/etc", "."])
def test_a_run_that_is_not_there_is_named_with_those_that_are(machine, there, tmp_path, run):
    with pytest.raises(UserError, match=r"no run .*: have new-run, old-run, stores"):
        fetch(machine, tmp_path / "outputs", run)


def test_no_results_is_no_error(machine, tmp_path):
    assert fetch(machine, tmp_path / "outputs").runs == []


def test_what_is_newer_here_stays_and_is_named(machine, there, tmp_path):
    fetch(machine, tmp_path / "outputs")
    put(tmp_path / "outputs", "old-run/results.jsonl", "mine", 1)
    put(there, "new-run/log.jsonl", "{}\n{}\n", 5)
    done = fetch(machine, tmp_path / "outputs")
    assert done.kept == ["old-run/results.jsonl"]
    assert done.moved.placed == ["new-run/log.jsonl"]
    assert (tmp_path / "outputs" / "old-run" / "results.jsonl").read_text() == "mine"


def test_checkpoints_that_the_run_dropped_go_here_too_once_newer_ones_are_here(machine, there, tmp_path):
    outputs = tmp_path / "outputs"
    fetch(machine, outputs)
    put(outputs, "new-run/checkpoints/step-000000099/state.json", "somebody's own")
    (there / STEP).rename(there / "new-run" / "checkpoints" / "step-000000030")
    done = fetch(machine, outputs)
    assert done.moved.gone == [STEP]
    steps = {path.name for path in (outputs / "new-run" / "checkpoints").iterdir()}
    assert steps == {"step-000000030", "step-000000099"}


def test_a_finished_run_leaves_no_checkpoint_here(machine, there, tmp_path):
    outputs = tmp_path / "outputs"
    fetch(machine, outputs)
    for path in (there / STEP).iterdir():
        path.unlink()
    put(there, "new-run/results.jsonl", "{}\n")
    assert fetch(machine, outputs).moved.gone == [STEP]
    assert not (outputs / STEP).exists()


def test_a_fetch_over_a_connection_that_breaks_is_continued(machine, host, there, tmp_path, monkeypatch):
    monkeypatch.setattr("vast_utils.transfer.PAUSE_SECONDS", 0.1)
    put(there, "old-run/large.bin", data := os.urandom(8_000_000))
    came, broken = [0], []

    def progress(count: int) -> None:
        came[0] += count
        if not broken and came[0] > 3_000_000:
            assert not (tmp_path / "outputs" / "old-run" / "large.bin").exists()
            broken.append(came[0])
            host.drop_connections()

    done = fetch(machine, tmp_path / "outputs", "old-run", progress=progress)
    assert (tmp_path / "outputs" / "old-run" / "large.bin").read_bytes() == data
    assert broken
    assert done.moved.sent_bytes < len(data) + 1_000_000
    assert names(tmp_path / "outputs") == OLD | {"old-run/large.bin"}


def test_links_of_the_machine_are_not_fetched(machine, host, there, tmp_path):
    (host.home / "private").write_text("of the machine")
    (there / "old-run" / "link").symlink_to(host.home / "private")
    (there / "linked").symlink_to(host.home)
    fetch(machine, tmp_path / "outputs")
    assert names(tmp_path / "outputs") == OLD | NEW


def test_a_file_with_an_odd_name_keeps_no_other_there(machine, there, tmp_path):
    put(there, "old-run/a\x1b[2Jb")
    put(there, "old-run/2026-11-26T12:30:00.txt")
    done = fetch(machine, tmp_path / "outputs")
    assert names(tmp_path / "outputs") == OLD | NEW | {"old-run/2026-11-26T12:30:00.txt"}
    assert done.odd == ["old-run/a?[2Jb"]


def test_a_run_that_goes_on_where_the_clock_is_behind_comes_back(machine, host, tmp_path):
    """The laptop's files are newer than the machine's present, and all the same older than what it makes of them."""
    outputs = tmp_path / "project" / "outputs"
    for name in ("old-run/log.jsonl", "old-run/settings.json"):
        put(outputs, name, "{}\n", age=-3600)
    push_models(machine, outputs / "old-run", tmp_path / "project")
    put(host.home / "sparse_coding" / "outputs", "old-run/log.jsonl", "{}\n{}\n", age=-2)
    done = fetch(machine, outputs)
    assert (done.moved.placed, done.kept) == (["old-run/log.jsonl"], [])


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(machine, there, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(UserError, match="outputs cannot be written here") as error:
        fetch(machine, tmp_path / "outputs")
    assert not isinstance(error.value, MachineError)


def test_a_disk_that_is_too_small_is_said_before_anything_comes(machine, there, tmp_path, monkeypatch):
    monkeypatch.setattr("vast_utils.transfer.SPARE_BYTES", 10**18)
    with pytest.raises(UserError, match="make room"):
        fetch(machine, tmp_path / "outputs")
    assert names(tmp_path / "outputs") == set()
