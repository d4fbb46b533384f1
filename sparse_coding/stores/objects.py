"""Named blobs of bytes in a folder or under an S3 prefix, behind one small interface.

Everything a store, a synced run or a checkpoint needs: put whole or not at all, read all or a range, list, delete.
Names are relative, with `/` between folders. Failures are one-line errors that hold no credentials.
"""

from __future__ import annotations

import errno
import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from sparse_coding.errors import DISK_FULL, UserError
from sparse_coding.files import written_whole

Buffer: TypeAlias = "bytes | bytearray | memoryview"

PIECE = 8 << 20
"""Bytes read at once where a whole object is read: bounds memory and the time of one request."""


NOT_THE_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
"""Failures that say nothing about the file that was read."""


class ObjectDamaged(UserError):
    """One object cannot be read as it must be, whatever the others are."""


class ObjectMissing(ObjectDamaged):
    """There is no object of that name."""


class ObjectTruncated(ObjectDamaged):
    """An object ends before the bytes that were asked for."""


class Objects(Protocol):
    """A folder or an S3 prefix. Safe to use from several threads at once."""

    url: str
    """As given: a path or s3://bucket/prefix; holds no credentials, for messages."""

    def put(self, name: str, data: Buffer | Path) -> None:
        """Write an object whole or not at all, over one of that name; a `Path` is a file to copy from."""
        ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` (writable bytes) from byte `start` on. Raises `ObjectTruncated` where the object is shorter."""
        ...

    def size(self, name: str) -> int:
        """Bytes of an object. Raises `ObjectMissing`."""
        ...

    def names(self, under: str = "") -> Iterator[str]:
        """The names of all objects, or of those in the folder `under`; in no promised order."""
        ...

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is fine."""
        ...

    # ---- said once for all kinds

    def get_range(self, name: str, start: int, length: int) -> memoryview:
        """Bytes [start, start + length) of an object, maybe read-only; the caller has checked `length`."""
        out = np.empty(length, dtype=np.uint8).data
        self.read_into(name, start, out)
        return out

    def get(self, name: str) -> memoryview:
        """All bytes of an object, writable."""
        length = self.size(name)
        out = np.empty(length, dtype=np.uint8).data
        for start in range(0, length, PIECE):
            self.read_into(name, start, out[start : start + PIECE])
        return out

    def pieces(self, name: str) -> Iterator[memoryview]:
        """All bytes of an object, at most `PIECE` at a time; a piece is valid until the next one."""
        length = self.size(name)
        out = np.empty(min(length, PIECE), dtype=np.uint8).data
        for start in range(0, length, PIECE):
            piece = out[: min(PIECE, length - start)]
            self.read_into(name, start, piece)
            yield piece

    def sha256(self, name: str) -> str:
        """The SHA-256 of an object's bytes, in bounded memory."""
        digest = hashlib.sha256()
        for piece in self.pieces(name):
            digest.update(piece)
        return digest.hexdigest()

    def exists(self, name: str) -> bool:
        try:
            self.size(name)
        except ObjectMissing:
            return False
        return True


def open_objects(url: str | Path, *, seconds: float = 300.0) -> Objects:
    """The objects of a folder (made when something is put) or of s3://bucket/prefix.

    seconds: on S3, the time one operation may take with all its retries. Raises `UserError` for any other kind of URL.
    """
    text = str(url)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text)
    if not scheme:
        return FolderObjects(Path(text))
    if scheme[1].lower() != "s3":
        raise UserError(f"cannot open a {scheme[1]}: URL; a store is a folder or s3://bucket/prefix")
    from sparse_coding.stores.objects_s3 import S3Objects

    return S3Objects(text, seconds=seconds)


def checked_name(name: str) -> str:
    """`name`, or `UserError` where it could lead out of the folder or means different things on different systems."""
    parts = name.split("/")
    if len(name) > 512 or not all(re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._=+-]*", part) for part in parts):
        raise UserError(
            f"{name[:80]!r} is no name of an object: letters, digits and ._=+- in parts separated by /, "
            "none beginning with a dot"
        )
    return name


def unreadable(path: Path, error: OSError) -> UserError:
    """What to raise for a file that could not be read: `ObjectDamaged` unless the failure is not the file's."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ObjectMissing(f"{path} is missing")
    kind = UserError if error.errno in NOT_THE_FILES else ObjectDamaged
    return kind(f"{path} cannot be read: {error.strerror}")


class FolderObjects(Objects):
    """Files of a folder on this machine."""

    def __init__(self, folder: Path):
        self.folder, self.url = folder, str(folder)

    def put(self, name: str, data: Buffer | Path) -> None:
        """Written beside its place, fsynced, renamed. Raises `UserError` where it may not, `OSError` on a full disk."""
        try:
            with written_whole(self._path(name), "wb") as file:
                if isinstance(data, Path):
                    with data.open("rb") as source:
                        shutil.copyfileobj(source, file, PIECE)
                else:
                    file.write(data)
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise UserError(f"{self.folder / name} cannot be written: {error.strerror}") from None

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        done, total = 0, len(out)
        try:
            with self._path(name).open("rb", buffering=0) as file:
                file.seek(start)
                while done < total and (read := file.readinto(out[done:])):
                    done += read
        except OSError as error:
            raise unreadable(self.folder / name, error) from None
        if done < total:
            raise ObjectTruncated(
                f"{self.folder / name} is truncated: it ends {total - done} bytes before byte {start + total}"
            )

    def size(self, name: str) -> int:
        try:
            path = self._path(name)
            if not path.is_file():
                raise ObjectMissing(f"{path} is missing")
            return path.stat().st_size
        except OSError as error:
            raise unreadable(self.folder / name, error) from None

    def names(self, under: str = "") -> Iterator[str]:
        start = self._path(under) if under else self.folder
        for path in start.rglob("*"):
            if path.is_file():
                yield path.relative_to(self.folder).as_posix()

    def delete(self, name: str) -> None:
        """As said above; folders in it that are empty then go as well: S3 has none either."""
        path = self._path(name)
        path.unlink(missing_ok=True)
        with suppress(OSError):  # one that is not empty stays, and so do those above it
            for above in path.relative_to(self.folder).parents[:-1]:
                (self.folder / above).rmdir()

    def _path(self, name: str) -> Path:
        return self.folder / checked_name(name)
