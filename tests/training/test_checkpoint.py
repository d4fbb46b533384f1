from __future__ import annotations

import errno
import os

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.training import checkpoint

TENSORS = {"a/W": torch.arange(6.0).reshape(2, 3), "a/clock": torch.tensor([1, 2])}


def test_the_newest_checkpoint_comes_back_and_old_ones_go(tmp_path):
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, {**TENSORS, "step": torch.tensor(step)}, {"seconds": 1.5})
    tensors, facts = checkpoint.newest(tmp_path)
    assert facts["step"] == 10
    assert facts["seconds"] == 1.5
    assert torch.equal(tensors["a/W"], TENSORS["a/W"])
    assert tensors["step"] == 10
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000000002", "step-000000010"]


def test_none_is_no_error(tmp_path):
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    checkpoint.save(tmp_path, 1, TENSORS, {})
    checkpoint.save(tmp_path, 2, TENSORS, {})
    file = tmp_path / "step-000000002" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


def test_a_folder_without_its_json_is_no_checkpoint(tmp_path):
    checkpoint.save(tmp_path, 1, TENSORS, {})
    checkpoint.save(tmp_path, 2, TENSORS, {})
    (tmp_path / "step-000000002" / "state.json").unlink()
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


def test_only_damaged_checkpoints_are_an_error_that_says_what_to_do(tmp_path):
    checkpoint.save(tmp_path, 1, TENSORS, {})
    (tmp_path / "step-000000001" / "state.json").write_text("{")
    with pytest.raises(UserError, match="--fresh"):
        checkpoint.newest(tmp_path)


def test_a_disk_that_fills_up_leaves_the_checkpoint_before_untouched(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, TENSORS, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, TENSORS, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    assert checkpoint.newest(tmp_path)[1]["step"] == 1


def flip_a_bit(path, place=-3):
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def saved(folder, *steps, **arguments):
    for step in steps:
        checkpoint.save(
            folder, step, {**TENSORS, "step": torch.tensor(step)}, {"seconds": 1.5, "fvu": 0.5}, **arguments
        )


def steps(folder):
    return [int(path.name[5:]) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("place", [-3, 30, "half"])
def test_a_flipped_bit_is_seen_said_and_gives_way_to_the_one_before(tmp_path, capsys, name, place):
    saved(tmp_path, 10, 20)
    file = tmp_path / "step-000000020" / name
    flip_a_bit(file, file.stat().st_size // 2 if place == "half" else place)
    tensors, facts = checkpoint.newest(tmp_path)
    assert facts["step"] == 10
    assert tensors["step"] == 10
    told = capsys.readouterr().err
    assert "step-000000020 is damaged" in told
    assert "from the one before it, step-000000010" in told


def test_every_bit_of_the_facts_is_covered(tmp_path):
    saved(tmp_path, 1)
    file = tmp_path / "step-000000001" / "state.json"
    good = file.read_bytes()
    for place in range(len(good)):
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises((checkpoint.DamagedCheckpoint, UserError)):
            checkpoint.read(file.parent)


def test_a_damaged_one_never_stands_before_what_is_saved_next(tmp_path):
    saved(tmp_path, 10, 20)
    flip_a_bit(tmp_path / "step-000000020" / "state.safetensors")
    checkpoint.newest(tmp_path)
    saved(tmp_path, 12, 14)
    assert steps(tmp_path) == [12, 14]


def test_missing_tensors_give_way_too(tmp_path):
    saved(tmp_path, 10, 20)
    (tmp_path / "step-000000020" / "state.safetensors").unlink()
    assert checkpoint.newest(tmp_path)[1]["step"] == 10


def failing(monkeypatch, *paths):
    """A disk that does not answer now."""
    for name in ("open", "read_text"):
        real = getattr(type(paths[0]), name)

        def fails(self, *arguments, real=real, **named):
            if self in paths:
                raise OSError(errno.EIO, os.strerror(errno.EIO), str(self))
            return real(self, *arguments, **named)

        monkeypatch.setattr(type(paths[0]), name, fails)


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_a_read_that_fails_in_passing_costs_no_checkpoint(tmp_path, monkeypatch, name):
    saved(tmp_path, 10)
    checkpoint.save(tmp_path, 20, TENSORS, {"fvu": 0.1})
    failing(monkeypatch, tmp_path / "step-000000020" / name)
    for read in (checkpoint.newest, checkpoint.best):
        with pytest.raises(UserError, match=r"step-000000020 cannot be read now .Input/output error.; it stays"):
            read(tmp_path)
    monkeypatch.undo()
    assert checkpoint.newest(tmp_path)[1]["step"] == 20


def test_tensors_that_are_whole_but_cannot_be_loaded_now_cost_no_checkpoint(tmp_path, monkeypatch):
    saved(tmp_path, 10, 20)

    def fails(*_, **__):
        raise FileNotFoundError("No such file or directory")  # what safetensors makes of any error of open

    monkeypatch.setattr(checkpoint, "load_file", fails)
    with pytest.raises(UserError, match="step-000000020 cannot be read now"):
        checkpoint.newest(tmp_path)
    assert steps(tmp_path) == [10, 20]


def test_the_best_one_stays_where_its_facts_cannot_be_read_now(tmp_path, monkeypatch):
    for step, fvu in ((1, 0.1), (2, 0.4)):
        checkpoint.save(tmp_path, step, TENSORS, {"fvu": fvu}, keep=1, keep_best=True)
    failing(monkeypatch, tmp_path / "step-000000001" / "state.json")
    checkpoint.save(tmp_path, 3, TENSORS, {"fvu": 0.3}, keep=1, keep_best=True)
    monkeypatch.undo()
    assert steps(tmp_path) == [1, 2, 3]
    checkpoint.save(tmp_path, 4, TENSORS, {"fvu": 0.2}, keep=1, keep_best=True)
    assert steps(tmp_path) == [1, 4]


def test_as_many_as_asked_for_are_kept_and_the_best(tmp_path):
    for step, fvu in ((1, 0.9), (2, 0.1), (3, 0.4), (4, float("nan")), (5, 0.3), (6, 0.3)):
        checkpoint.save(tmp_path, step, TENSORS, {"fvu": fvu}, keep=3, keep_best=True)
    assert steps(tmp_path) == [2, 4, 5, 6]
    assert checkpoint.best(tmp_path)[1]["step"] == 2
    assert checkpoint.newest(tmp_path)[1]["step"] == 6
    flip_a_bit(tmp_path / "step-000000002" / "state.safetensors")
    assert checkpoint.best(tmp_path)[1]["fvu"] == 0.3
    saved(tmp_path, 7, keep=1)
    assert steps(tmp_path) == [7]


def test_a_kill_while_a_checkpoint_is_replaced_loses_neither(tmp_path, monkeypatch):
    saved(tmp_path, 5, keep=1)
    moves = []

    def killed(a, b):
        moves.append(b)
        if len(moves) == 4:  # two files, the old one aside, and now the new one into place
            raise SystemExit
        replace(a, b)

    replace = checkpoint.os.replace
    monkeypatch.setattr(checkpoint.os, "replace", killed)
    with pytest.raises(SystemExit):
        saved(tmp_path, 5, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005.before"]
    assert checkpoint.newest(tmp_path)[1]["step"] == 5
    monkeypatch.undo()
    saved(tmp_path, 5, keep=1)
    assert steps(tmp_path) == [5]


def test_another_format_is_named(tmp_path):
    saved(tmp_path, 1)
    file = tmp_path / "step-000000001" / "state.json"
    file.write_text(file.read_text().replace('"format": 3', '"format": 2'))
    with pytest.raises(UserError, match="format 2, this version reads 3"):
        checkpoint.newest(tmp_path)


def test_a_checkpoint_holds_no_pickle(tmp_path):
    saved(tmp_path, 1)
    assert sorted(path.suffix for path in (tmp_path / "step-000000001").iterdir()) == [".json", ".safetensors"]
