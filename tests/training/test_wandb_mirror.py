"""The mirror in W&B: offline for real, online against a stand-in for `wandb.init`."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from sparse_coding.training.wandb_mirror import Mirror, WandbMirror


class FakeRun:
    """What the mirror uses of a W&B run; `step` is where a run that goes on stands."""

    def __init__(self, step=0, broken=False):
        self.step, self.broken, self.logged, self.finished = step, broken, [], False
        self.summary = {}

    def log(self, values, step=None):
        if self.broken:
            raise ConnectionError("key 0123456789abcdef was refused")
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def started(monkeypatch):
    """Every call of `wandb.init` as its arguments; the runs handed out are popped from `runs` while it has some."""
    calls, runs = [], []

    def init(**arguments):
        calls.append(arguments)
        return runs.pop(0) if runs else FakeRun()

    monkeypatch.setattr("wandb.init", init)
    return SimpleNamespace(calls=calls, runs=runs)


def test_an_offline_run_is_written_into_the_folder_without_a_secret(tmp_path, monkeypatch, capfd):
    secrets = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_very_secret_indeed"}
    for name, secret in secrets.items():
        monkeypatch.setenv(name, secret)
    mirror = Mirror("auto", "sparsecode", "supertiny", tmp_path, {"n_layer": 6})
    mirror.log({"loss_to_look_for": 3.5}, 1)
    mirror.log({"val_loss": 3.25}, 1)
    mirror.finish({"kept_iteration": 1}, [{"name": "a", "fvu": 0.5}])
    assert "switched off" not in capfd.readouterr().err
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    words = (b"supertiny", b"n_layer", b"loss_to_look_for", b"val_loss", b"kept_iteration")
    deadline = time.monotonic() + 20
    while missing := [word for word in words if word not in record.read_bytes()]:
        assert time.monotonic() < deadline, missing  # another process writes the last lines, moments after finish()
        time.sleep(0.02)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert not any(secret.encode() in written for secret in secrets.values())


def test_a_failing_start_is_said_in_one_line_and_stops_nothing(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise RuntimeError("no account for key 0123456789abcdef")

    monkeypatch.setattr("wandb.init", init)
    mirror = Mirror("online", "p", "n", tmp_path, {})
    for step in range(3):
        mirror.log({"loss": 1.0}, step)
    mirror.finish({"loss": 1.0})
    shown = capsys.readouterr()
    assert shown.err == "W&B is switched off for this run (RuntimeError); the run folder has everything\n"
    assert shown.out == ""


def test_a_failure_on_the_way_is_said_once_and_nothing_more_is_sent(tmp_path, started, capsys):
    run = FakeRun()
    started.runs.append(run)
    mirror = Mirror("online", "p", "n", tmp_path, {})
    mirror.log({"loss": 2.0}, 0)
    run.broken = True
    mirror.log({"loss": 1.0}, 1)
    run.broken = False
    mirror.log({"loss": 0.5}, 2)
    mirror.finish()
    assert run.logged == [(0, {"loss": 2.0})]
    assert not run.finished
    assert capsys.readouterr().err.count("\n") == 1


def test_ctrl_c_is_no_failure_of_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        Mirror("online", "p", "n", tmp_path, {})


def test_online_the_same_folder_continues_its_run_and_its_namesake_has_another(tmp_path, started):
    for folder in ("a/gpt", "a/gpt", "b/gpt"):
        Mirror("online", "p", "n", tmp_path / folder, {"lr": 1})
    first, again, other = started.calls
    assert first["id"] == again["id"] != other["id"]
    assert all(call["resume"] == "allow" and call["mode"] == "online" for call in started.calls)
    assert (first["project"], first["name"], first["config"]) == ("p", "n", {"lr": 1})
    assert first["dir"] == str(tmp_path / "a/gpt")


def test_a_run_that_goes_on_sends_only_what_it_has_not_sent(tmp_path, started):
    stopped_after_step_4 = FakeRun(step=5)
    started.runs.append(stopped_after_step_4)
    mirror = Mirror("online", "p", "n", tmp_path, {})
    for step in (3, 4, 5, 5, 6):
        mirror.log({"loss": float(step)}, step)
    assert [step for step, _ in stopped_after_step_4.logged] == [5, 5, 6]


@pytest.mark.parametrize(
    ("mode", "variable", "expected"),
    [
        ("auto", "offline", "offline"),
        ("auto", "disabled", "disabled"),
        ("auto", "online", "online"),
        ("auto", "", "online"),
        ("auto", None, "online"),
        ("online", "offline", "online"),
        ("offline", "online", "offline"),
    ],
)
def test_auto_is_what_the_environment_says_and_only_online_runs_have_an_id(
    tmp_path, started, monkeypatch, mode, variable, expected
):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if variable is not None:
        monkeypatch.setenv("WANDB_MODE", variable)
    Mirror(mode, "p", "n", tmp_path, {})
    (call,) = started.calls
    assert call["mode"] == expected
    assert (call["id"] is not None, call["resume"]) == ((True, "allow") if expected == "online" else (False, None))


def test_a_sweep_names_the_values_of_its_members_and_leaves_out_what_they_lack(tmp_path, started):
    started.runs.append(run := FakeRun())
    members = [SimpleNamespace(name="relu-8"), SimpleNamespace(name="relu-16")]
    mirror = WandbMirror("offline", "p", tmp_path / "swept", {}, members)  # type: ignore[arg-type]
    shared = {"tokens": 64, "seconds": 1.5, "lr_scale": 1.0}
    values = {key: [1.0, 2.0] for key in ("loss", "mse", "fvu", "l1", "l0")}
    mirror({"step": 7, **shared, **values, "dead": [None, 3]})
    named = {f"{name}/{key}": x for key in values for name, x in (("relu-8", 1.0), ("relu-16", 2.0))}
    assert run.logged == [(7, {**shared, **named, "relu-16/dead": 3})]
    assert started.calls[0]["name"] == "swept"


def test_a_sweep_ends_with_its_results_as_a_table_of_numbers(tmp_path, started):
    started.runs.append(run := FakeRun())
    mirror = WandbMirror("offline", "p", tmp_path, {}, [])
    mirror.finish([{"name": "a", "metrics": {"fvu": 0.5, "density": {"counts": [1]}}},
                   {"name": "b", "metrics": {"fvu": 0.25, "l0": 3.0}}])  # fmt: skip
    ((_, logged),) = run.logged
    assert logged["results"].columns == ["name", "fvu", "l0"]
    assert logged["results"].data == [["a", 0.5, None], ["b", 0.25, 3.0]]
    assert run.finished
