from __future__ import annotations

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
