"""Files that appear whole or not at all: written beside their place, fsynced, renamed."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from sparse_coding.errors import DISK_FULL, UserError


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, read a piece at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_folder(path: Path, what: str) -> None:
    """Make a folder to write into, with those above it; one that is there is fine.

    what: the flag or the file that it is for. Raises `UserError` where a file is in the way or it may not be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = f"{next(place for place in (path, *path.parents) if os.path.lexists(place))} is a file"
        raise UserError(f"{what}: the folder {path} cannot be made ({reason}); name another place") from None


def sync_files(folder: Path) -> None:
    """After this the files in a folder survive a crash, and all may read them: safetensors writes for the owner."""
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        path.chmod(0o644)


@contextmanager
def written_whole(path: Path, mode: Literal["w", "wb"] = "w") -> Iterator[Any]:
    """A file to write into that takes its name when all is done, or vanishes; text is UTF-8, line ends as given.

    Until then it lies beside its place, as `file.name`. Raises `UserError` where there can be no such folder.
    """
    make_folder(path.parent, str(path))
    encoding, newline = ("utf-8", "") if mode == "w" else (None, None)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    os.close(handle)
    try:
        with open(name, mode, encoding=encoding, newline=newline) as file:
            yield file
        with open(name, "rb") as written:  # the caller may have put another file under the name
            os.fsync(written.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk does not say which file it was
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    with written_whole(path) as file:
        file.write(text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all; `metadata` goes into its header."""
    try:
        with written_whole(path, "wb") as file:
            save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file.name, metadata)
    except SafetensorError as error:
        raise _as_os_error(error, path) from error


def _as_os_error(error: SafetensorError, path: Path) -> Exception:
    """safetensors reports a failed write as its own error with the errno in the text."""
    found = re.search(r"os error (\d+)", str(error))
    return OSError(int(found[1]), str(error), str(path)) if found else error
