"""Text in local files: which files there are, and the text of every row of one.

`.txt` is cut into pieces that make the file exactly, `.jsonl` and `.parquet` have one text per row, in a column.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from sparse_coding.errors import UserError, near
from sparse_coding.files import file_sha256

KINDS = (".txt", ".jsonl", ".parquet")
DOCUMENT = 2_000  # characters after which a document of a .txt file ends at the next blank line
LONGEST = 20_000  # characters after which it ends at the next end of line (a longer line is cut)
WAYS_OUT = "give a local file or folder (--text path) or the text that needs no network (--text python-docs)"


def local_path(source: str) -> Path | None:
    """The path that `source` names, None where it can only name a data set. Raises `UserError` for a missing file."""
    if not source:  # as a path it would be the current folder
        raise UserError(f"text '' names nothing; {WAYS_OUT}")
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = source.removesuffix(".gz")
    if source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1 or name.endswith(KINDS):
        known = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise UserError(f"text {source!r}: no such file or folder{near(path.name, known)}")
    return None


def kind_of(path: Path) -> str | None:
    """The ending that says how a file is read, whether or not it is gzipped; None for a file that is no text."""
    name = path.name.lower()
    if name.endswith((".txt.gz", ".jsonl.gz")):
        name = name.removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def files_of(path: Path) -> list[Path]:
    """The files of text at or below `path`, in order of name. Raises `UserError` where there are none."""
    allowed = ", ".join(KINDS)
    if path.is_file():
        if kind_of(path) is None:
            raise UserError(
                f"text {str(path)!r}: unknown kind of file; allowed are {allowed} (.txt and .jsonl also .gz)"
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and kind_of(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(
            f"text {str(path)!r}: a folder with no {allowed} file and nothing that `datasets` saved; point at the files"
        )
    return files


def fingerprint(path: Path) -> dict[str, str | int]:
    """Length and sha256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def rows_of(path: Path, column: str | None) -> Iterator[str | None]:
    """The text of every row of a file, lazily; None or empty where a row holds none."""
    kind = kind_of(path)
    if kind == ".parquet":
        return _from_parquet(path, column)
    return _from_jsonl(path, column) if kind == ".jsonl" else _from_txt(path)


@contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
    """The file as UTF-8 text, line ends untouched; what cannot be read is a `UserError`."""
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x}: {error.reason}"
        raise UserError(f"text {str(path)!r} is not UTF-8 ({byte}); convert it first") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"text {str(path)!r} is not a whole gzip file: {error}") from None
    except PermissionError:
        raise UserError(f"text {str(path)!r} may not be read by this user: permission denied") from None


def pieces(file: IO[str]) -> Iterator[str]:
    """Pieces of one long text, cut before the first line after a blank one; `"".join` of them is the text."""
    lines: list[str] = []
    length, after_blank = 0, False
    while line := file.readline(LONGEST):
        blank = not line.strip()
        if length >= LONGEST or (length >= DOCUMENT and after_blank and not blank):
            yield "".join(lines)
            lines, length = [], 0
        lines.append(line)
        length, after_blank = length + len(line), blank
    yield "".join(lines)


def _from_txt(path: Path) -> Iterator[str]:
    with _open_text(path) as file:
        yield from pieces(file)


def _from_jsonl(path: Path, column: str | None) -> Iterator[str | None]:
    with _open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{str(path)!r} line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"text {where} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise UserError(
                    f'text {where}: a line must be an object such as {{"text": "..."}}, got {type(row).__name__}'
                )
            column = column or column_of(None, {key: isinstance(value, str) for key, value in row.items()}, where)
            if column not in row:
                raise _no_column(column, row, where)
            value = text_of(row[column], column, where)
            yield _whole_characters(value) if value and "\\u" in line else value


def _whole_characters(text: str) -> str:
    """JSON may spell half of a surrogate pair, which UTF-8 cannot hold and no tokenizer takes: it becomes U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _from_parquet(path: Path, column: str | None) -> Iterator[str | None]:
    import pyarrow
    import pyarrow.parquet

    where = repr(str(path))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            is_text = {
                field.name: pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
                for field in file.schema_arrow
            }
            column = column_of(column, is_text, where)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    yield text_of(value.as_py(), column, where)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"text {where} cannot be read as parquet: {error}") from None


# ---- columns


def column_of(asked: str | None, is_text: dict[str, bool], where: str) -> str:
    """The column to read, given which columns hold strings. Raises `UserError` that lists the columns."""
    if asked is not None:
        if asked not in is_text:
            raise _no_column(asked, is_text, where)
        return asked
    strings = [name for name, holds in is_text.items() if holds]
    if "text" in is_text or len(strings) == 1:
        return "text" if "text" in is_text else strings[0]
    raise UserError(
        f"text {where}: which column holds the text? It has {', '.join(is_text) or 'none'}; give --text-column"
    )


def _no_column(column: str, columns: Iterable[str], where: str) -> UserError:
    columns = list(columns)
    return UserError(
        f"text {where}: no column {column!r}; it has {', '.join(columns) or 'none'}{near(column, columns)}"
    )


def text_of(value: object, column: str, where: str) -> str | None:
    """The value of the column, which must be text or nothing."""
    if value is None or isinstance(value, str):
        return value
    raise UserError(
        f"text {where}: column {column!r} holds {type(value).__name__}, not text; set the column (--text-column)"
    )
