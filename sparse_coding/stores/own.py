"""A store of one writer alone: a locked file in a folder, a lease on S3; and what a killed writer left behind."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sparse_coding.errors import UserError
from sparse_coding.files import make_folder
from sparse_coding.stores.lease import only_writer
from sparse_coding.stores.manifest import LEASE
from sparse_coding.stores.objects import FolderObjects, Objects

HALF_WRITTEN = re.compile(
    r"((site-\d+|tokens)/\d+\.safetensors|(part-\d+-of-\d+/)?manifest\.json)\.(?!\d{8}$)[a-z0-9_]{8}"
)
"""Files of a store that have not taken their own names (`sparse_coding.files`). Eight digits are somebody's date."""


@contextlib.contextmanager
def own(objects: Objects) -> Iterator[None]:
    """Nobody else writes this store meanwhile. Raises `UserError` that names another writer.

    A folder is made where there is none, and taken away again if it stays empty: a mistake leaves nothing behind.
    """
    if not isinstance(objects, FolderObjects):
        with only_writer(objects):
            yield
        return
    folder, new = objects.folder, not objects.folder.exists()
    make_folder(folder, "the store")
    try:
        with _locked(folder / LEASE):
            yield
    finally:
        if new and not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The system's own lock, gone with the process that holds it; the file says who that is, for the message."""
    while True:
        try:
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        with file:
            _take(file, path)
            if not _is_there(file, path):  # its owner took it away while we opened it
                continue
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
            file.flush()
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _take(file: IO[str], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            told = f"{path.parent}: this file system has no locks ({error.strerror}); see that nobody else writes there"
            print(told, file=sys.stderr, flush=True)
            return
        file.seek(0)
        raise UserError(
            f"{path.parent} is being written by {_who(file.read())}: wait for it or name another store"
        ) from None


def _is_there(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _who(text: str) -> str:
    try:
        found = json.loads(text)
        return f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def remove_half_written(objects: Objects) -> None:
    """Remove what a writer that was killed left half written. Only of a store that is ours alone."""
    if isinstance(objects, FolderObjects):  # on S3 nothing is half written
        for name in [name for name in objects.names() if HALF_WRITTEN.fullmatch(name)]:
            objects.delete(name)
