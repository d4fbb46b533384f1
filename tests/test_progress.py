from __future__ import annotations

import pytest

from sparse_coding.device import pick_device
from sparse_coding.errors import UserError, near
from sparse_coding.progress import Progress, duration, quantity
from sparse_coding.provenance import provenance, short_hash


def test_lengths_of_time_and_counts_read_well():
    assert [duration(s) for s in (5, 89, 150, 7200)] == ["5 s", "89 s", "2.5 min", "2.0 h"]
    assert [quantity(v) for v in (12, 3400, 1.2e6, 5e9)] == ["12", "3.4k", "1.2M", "5B"]


def test_plain_lines_show_rate_and_time_left(capsys):
    with Progress("training", 100, start=50, every_seconds=0) as progress:
        progress.update(75, "loss 1")
    shown = capsys.readouterr().err
    assert shown.startswith("training: 75/100 steps")
    assert "left" in shown
    assert shown.rstrip().endswith("loss 1")


def test_lines_are_rare_but_the_last_one_always_comes(capsys):
    with Progress("measuring", 3, every_seconds=1000) as progress:
        for done in (1, 2, 3):
            progress.update(done)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_record_of_a_run_names_versions_and_no_secret(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    known = provenance()
    assert known["versions"]["torch"]
    assert known["date"].startswith("20")
    assert "very-secret" not in str(known)


def test_a_short_hash_follows_the_content_and_not_the_order():
    assert short_hash({"a": 1, "b": 2}) == short_hash({"b": 2, "a": 1}) != short_hash({"a": 1, "b": 3})


def test_devices_are_checked_by_name():
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto").split(":")[0] in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="allowed are"):
        pick_device("tpu")


def test_near_names_are_offered_only_when_they_are_near():
    assert "did you mean 'ratios'" in near("ratio", ["ratios", "layers"])
    assert near("zzz", ["ratios"]) == ""
