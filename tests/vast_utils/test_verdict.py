"""Whose fault the end of a job was."""

from __future__ import annotations

import pytest

from vast_utils.verdict import last_words, verdict


@pytest.mark.parametrize(
    ("rc", "tail", "ruling"),
    [
        (0, "warning: CUDA error seen and mended", "done"),
        (2, "error: there is no model 'gpt3'", "failed"),
        (2, "error: the disk is full while writing x; free some space", "machine"),
        (1, "OSError: [Errno 28] No space left on device", "machine"),
        (1, "RuntimeError: CUDA error: an illegal memory access was encountered", "machine"),
        (1, "ValueError: a mistake of the program", "again"),
        (130, "stopped: the state is saved", "again"),
        (137, "", "machine"),
        (None, "", "again"),
    ],
)
def test_verdict(rc, tail, ruling):
    assert verdict(rc, tail) == ruling


def test_last_words():
    assert last_words("one\ntwo \n\n") == "two"
    assert last_words("") == "it said nothing"
