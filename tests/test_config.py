from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from sparse_coding.config import count, from_dict, numbers, parse, to_dict
from sparse_coding.errors import UserError, reported


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    """A set of settings."""

    steps: int = 10
    """How many."""
    sizes: tuple[int, ...] = (1, 2)
    inner: Inner = field(default_factory=Inner)
    name: str | None = None


def test_settings_survive_json_unchanged():
    settings = Outer(3, (4, 5), Inner(0.5, "b"), "x")
    assert from_dict(Outer, json.loads(json.dumps(to_dict(settings)))) == settings


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stepz": 1}, "did you mean 'steps'"),
        ({"inner": {"lrr": 1.0}}, "did you mean 'lr'"),
        ({"steps": "3"}, "steps is '3': it must be a whole number"),
        ({"steps": True}, "steps is True"),
        ({"sizes": [1, "2"]}, r"sizes\[1\] is '2'"),
        ({"inner": {"kind": "c"}}, "allowed are a, b"),
    ],
)
def test_a_wrong_setting_is_named(data, message):
    with pytest.raises(UserError, match=message):
        from_dict(Outer, data)


def test_an_integer_is_taken_where_a_float_is_meant():
    assert from_dict(Inner, {"lr": 1}).lr == 1.0


def test_flags_are_flat_and_accept_underscores():
    assert parse(Outer, ["--steps", "3", "--lr", "0.5", "--sizes", "7", "8"], "prog", "") == Outer(
        3, (7, 8), Inner(0.5)
    )


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--steps", "many"], ["--kind", "c"]])
def test_a_wrong_flag_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop, reported():
        parse(Outer, arguments, "prog", "")
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert arguments[0] in lines[0]
    assert "╭" not in lines[0]


def test_the_near_flag_is_named():
    with pytest.raises(UserError, match="--steps"):
        parse(Outer, ["--stepz", "3"], "prog", "")


@pytest.mark.parametrize(
    ("text", "value"),
    [("250000", 250_000), ("250k", 250_000), ("2M", 2_000_000), ("1.5B", 1_500_000_000), ("1e3", 1000)],
)
def test_counts_are_read_as_people_write_them(text, value):
    assert count(text, "--tokens") == value


def test_a_count_that_is_none_is_refused():
    with pytest.raises(UserError, match="--tokens is 'lots'"):
        count("lots", "--tokens")


def test_logspace_includes_both_ends():
    assert numbers(["logspace:-2:0:3", "5"], "--l1") == pytest.approx((0.01, 0.1, 1.0, 5.0))


@pytest.mark.parametrize("word", ["x", "logspace:1:2", "logspace:a:b:3", "nan"])
def test_words_that_are_no_numbers_are_refused(word):
    with pytest.raises(UserError, match="--l1"):
        numbers([word], "--l1")


def test_a_full_disk_is_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop, reported():
        raise OSError(28, "No space left on device", "outputs/x/log.jsonl")
    assert stop.value.code == 2
    assert "disk is full while writing outputs/x/log.jsonl" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as stop, reported():
        raise KeyboardInterrupt
    assert stop.value.code == 130
    assert "the same command continues" in capsys.readouterr().err


def test_values_written_by_hand_become_what_the_setting_holds():
    from typing import Literal

    from sparse_coding.config import value_from_text

    assert value_from_text(float, "2", "x") == 2.0
    assert value_from_text(bool, "true", "x") is True
    assert value_from_text(int | None, "none", "x") is None
    assert value_from_text(Literal["none", "some"], "none", "x") == "none"
    assert value_from_text(tuple[float, ...], "0.5/0.25/0.25", "x") == (0.5, 0.25, 0.25)
    for hint, text in ((int, "2.5"), (bool, "1"), (Literal["a"], "b"), (tuple[float, ...], "a/b"), (int, "none")):
        with pytest.raises(UserError, match="x"):
            value_from_text(hint, text, "x")
