"""The loss curve of nanoGPT's own train.py, recorded by benchmarks/rivals/nanogpt.py, is the curve of our trainer."""

from __future__ import annotations

import json

import pytest

from benchmarks.rivals import nanogpt


@pytest.mark.parametrize("bias", [False, True])
def test_two_hundred_updates_lose_what_nanogpt_loses(bias):
    record = json.loads(nanogpt.RECORD.read_text())[str(bias)]
    assert len(record["losses"]) == nanogpt.UPDATES
    assert record["losses"][0] > 4.1 > 1.6 > record["losses"][-1], "nothing was learnt that could differ"
    assert nanogpt.our_curve(bias, record["starts"]) == pytest.approx(record["losses"], abs=1e-5)
