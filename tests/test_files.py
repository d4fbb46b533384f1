from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sparse_coding import files
from sparse_coding.errors import UserError
from sparse_coding.files import make_folder, write_tensors, write_text, written_whole


@pytest.mark.parametrize("mode", ["w", "wb"])
def test_a_file_takes_its_name_when_all_is_done(tmp_path: Path, mode) -> None:
    path = tmp_path / "new" / "a.txt"
    content = "é\r\n\n"
    with written_whole(path, mode) as file:
        file.write(content if mode == "w" else content.encode())
        assert not path.exists()
    assert path.read_bytes() == content.encode()
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert [entry.name for entry in path.parent.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_file_before_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "a.txt", "before")

    def half() -> str:
        (part,) = (path for path in tmp_path.iterdir() if path.name != "a.txt")
        part.write_text("half")
        raise error

    with pytest.raises(type(error)), written_whole(tmp_path / "a.txt") as file:
        file.write(half())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "before"}


def test_tensors_are_written_whole_and_a_full_disk_is_an_oserror(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.ones(2, 3).T}, {"step": "1"})
    torch.testing.assert_close(load_file(path)["a"], torch.ones(3, 2))
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    before = path.read_bytes()

    def full(tensors: object, name: str, metadata: object) -> None:
        Path(name).write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="os error 28") as raised:
        write_tensors(path, {"a": torch.zeros(1)})
    assert (raised.value.errno, raised.value.filename) == (28, str(path))
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == {"a.safetensors": before}


def test_a_folder_that_cannot_be_is_one_line_that_names_what_is_in_the_way(tmp_path: Path) -> None:
    file, gone = tmp_path / "a.txt", tmp_path / "gone"
    file.write_text("text")
    gone.symlink_to(tmp_path / "nowhere" / "at all")
    make_folder(tmp_path / "new" / "folder", "--out")
    make_folder(tmp_path / "new" / "folder", "--out")
    assert (tmp_path / "new" / "folder").is_dir()
    for path, blocking in ((file, file), (file / "x", file), (file / "x" / "y", file), (gone, gone)):
        with pytest.raises(UserError) as raised:
            make_folder(path, "--out")
        assert str(raised.value) == (
            f"--out: the folder {path} cannot be made ({blocking} is a file); name another place"
        )
    with pytest.raises(UserError, match=r"x/b\.txt: the folder .* cannot be made"):
        write_text(file / "x" / "b.txt", "")


def test_a_folder_that_may_not_be_written_is_refused_before_anything_is(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)  # permissions do not bind the superuser
    with pytest.raises(UserError, match=r"--out: the folder .* cannot be made \(Permission denied\)"):
        make_folder(tmp_path, "--out")
