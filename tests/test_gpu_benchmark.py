"""benchmarks/gpu.py runs from end to end, in little and on a CPU; what needs a GPU says so."""

from __future__ import annotations

import json

import pytest

from benchmarks import gpu
from benchmarks.gpu_parts.measure import Meter, quantity


def test_the_whole_script_runs_and_writes_what_it_found(tmp_path, capsys):
    assert gpu.main(["--device", "cpu", "--small", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {line["section"] for line in found["lines"]} == set(gpu.SECTIONS)
    measured = [line for line in found["lines"] if line["value"] is not None]
    assert len(measured) > 25
    assert found["facts"]["versions"]["torch"]
    (same,) = (line for line in measured if line["what"].startswith("batches that differ"))
    assert same["value"] == 0
    table = (tmp_path / "gpu.md").read_text()
    assert all(line["what"] in table for line in found["lines"])
    assert "the whole grid" in capsys.readouterr().out


def test_what_fails_is_a_line_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu.rates, "products", broken)
    assert gpu.main(["--device", "cpu", "--small", "--sections", "rates", "--out", str(tmp_path)]) == 1
    notes = [line["note"] for line in json.loads((tmp_path / "gpu.json").read_text())["lines"]]
    assert "failed: RuntimeError: no such kernel" in notes


def test_sections_share_the_time_that_others_leave(monkeypatch):
    shares = [0.1, 0.55, 0.85, 1.0]
    sections = {name: (part, share) for (name, (part, _)), share in zip(gpu.SECTIONS.items(), shares, strict=True)}
    monkeypatch.setattr(gpu, "SECTIONS", sections)
    assert gpu.shared_out(shares) == pytest.approx(shares)
    assert gpu.shared_out([0.55, 1.0]) == pytest.approx([0.75, 1.0])


def test_nothing_is_begun_when_the_time_is_over():
    meter = Meter("cpu", 0.0, None, {})
    assert not meter.has_time("a step")
    assert meter.lines[-1].note == "no time left for it"


def test_numbers_are_shown_in_thousands():
    assert [quantity(x) for x in (None, 0.5, 1234.0, 5.2e6, 7.9e14)] == ["", "0.5", "1.234 k", "5.2 M", "790 T"]
