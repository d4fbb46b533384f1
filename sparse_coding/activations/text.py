"""Where text comes from: documents, one by one, from files on disk, a data set by name, or Python's own manual.

| source | documents |
|---|---|
| `python-docs` | `python_docs.py`: needs no network |
| `x.txt` | paragraphs, grouped into pieces of 2,000 characters or more; joined again they are the file exactly |
| `x.jsonl` | one per line, from the column |
| `x.parquet` | one per row, from the column |
| a folder | what `datasets.save_to_disk` wrote, or every such file below it, in order of name |
| anything else | a data set of the Hugging Face hub by name, from its cache where the hub does not answer |

`.txt` and `.jsonl` may be gzipped (`x.jsonl.gz`). A row whose text is empty or null holds nothing and is passed over.
Each document falls into the training or the held-out part by a hash of its position: the parts are disjoint and
complete, the same in every run, and a larger `held_out` only ever adds to the held-out part.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from sparse_coding.activations.python_docs import python_docs, python_docs_identity
from sparse_coding.errors import UserError, near
from sparse_coding.hub import offline_if_unreachable

Part = Literal["train", "held_out", "all"]

PYTHON_DOCS = "python-docs"
KINDS = (".txt", ".jsonl", ".parquet")
DOCUMENT = 2_000  # characters after which a document of a .txt file ends at the next blank line
LONGEST = 20_000  # characters after which it ends at the next end of line (a longer line is cut)
WAYS_OUT = "give a local file or folder (--text path) or the text that needs no network (--text python-docs)"


@dataclass(frozen=True)
class TextSettings:
    """Which text, and which part of it is kept apart for evaluation."""

    source: str = PYTHON_DOCS  # `python-docs`, a file, a folder, or a Hugging Face data set by name
    config: str | None = None  # configuration of the data set, as `20220301.en`; for data sets by name only
    split: str = "train"  # split of the data set; plain files have only `train`
    column: str | None = None  # column that holds the text; None: `text`, or the only column of strings
    streaming: bool = False  # read a hub data set while it downloads, keeping nothing on disk
    max_documents: int | None = None  # read only this many documents, before any is held out
    held_out: float = 0.05  # share of the documents kept out of training, 0 <= held_out < 1


def documents(settings: TextSettings, part: Part = "train") -> Iterator[str]:
    """The documents of one part, lazily, in order. Raises `UserError` where text is missing, unreadable or empty."""
    _check(settings, part)
    rows = _rows(settings)  # opened here, not at the first document: mistakes show at once
    return _select(settings, part, rows)


def is_held_out(index: int, share: float) -> bool:
    """Whether the document at this position is held out: a fixed hash of it, uniform in [0, 1), is below `share`."""
    digest = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def text_identity(settings: TextSettings) -> dict[str, Any]:
    """What the documents depend on, for cache keys and the record of a run; local text by content hash.

    A data set of the hub is known by its name alone: what changes there under the same name is not noticed.
    """
    names = ("source", "config", "split", "column", "max_documents")
    identity: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if settings.source == PYTHON_DOCS:
        return identity | python_docs_identity()
    path = _local(settings.source)
    if path is None:
        return identity
    files = [file for file in sorted(path.rglob("*")) if file.is_file()] if _saved(path) else _files(path)
    identity["files"] = [
        {"name": file.relative_to(path).as_posix() if file != path else file.name, **_fingerprint(file)}
        for file in files
    ]
    return identity


def _check(settings: TextSettings, part: str) -> None:
    if part not in ("train", "held_out", "all"):
        raise UserError(f"part {part!r} of a text: allowed are 'train', 'held_out' and 'all'")
    if not 0 <= settings.held_out < 1:
        raise UserError(
            f"held_out is the share of documents kept for evaluation, 0 <= held_out < 1; got {settings.held_out}"
        )
    if settings.max_documents is not None and settings.max_documents < 1:
        raise UserError(
            f"max_documents must be at least 1, or left out to read everything; got {settings.max_documents}"
        )
    if part == "held_out" and settings.held_out == 0:
        raise UserError("held_out is 0, so there is no held-out text to evaluate on: set it to a share such as 0.05")


def _select(settings: TextSettings, part: Part, rows: Iterable[str | None]) -> Iterator[str]:
    seen = given = 0
    for index, text in enumerate(islice(rows, settings.max_documents)):
        if not text:
            continue
        seen += 1
        if part == "all" or is_held_out(index, settings.held_out) == (part == "held_out"):
            given += 1
            yield text
    if not seen:
        raise UserError(f"text {settings.source!r} is empty: there is not one document with text in it")
    if not given:
        change = "raise held_out" if part == "held_out" else "lower held_out"
        raise UserError(
            f"text {settings.source!r}: none of its {seen} documents is in the {part} part "
            f"(held_out={settings.held_out}); {change} or give more text"
        )


def _rows(settings: TextSettings) -> Iterator[str | None]:
    """The text of every row of the source, None or empty where a row holds none."""
    if settings.source == PYTHON_DOCS:
        _plain(settings, [])
        return (text for _, text in python_docs())
    path = _local(settings.source)
    if path is None:
        return _from_hub(settings)
    if settings.config is not None:
        raise UserError(
            f"config={settings.config!r} is for data sets by name; {settings.source!r} is a local path: leave it out"
        )
    if _saved(path):
        return _from_saved(path, settings)
    files = _files(path)
    _plain(settings, files)
    return (row for file in files for row in _from_file(file, settings.column))


def _plain(settings: TextSettings, files: list[Path]) -> None:
    """Plain files have neither configurations nor splits, .txt no columns: asking for one is a mistake."""
    if settings.column is not None and all(_kind(file) == ".txt" for file in files):
        raise UserError(f"text {settings.source!r} has no columns; got column={settings.column!r}: leave it out")
    if settings.split != "train" or settings.config is not None:
        raise UserError(
            f"text {settings.source!r} has no configurations and no splits but 'train'; "
            f"got config={settings.config!r}, split={settings.split!r}: leave them out"
        )


# ---- local files


def _local(source: str) -> Path | None:
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


def _kind(path: Path) -> str | None:
    name = path.name.lower()
    if name.endswith((".txt.gz", ".jsonl.gz")):
        name = name.removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def _files(path: Path) -> list[Path]:
    """The files of text at or below `path`, in order of name. Raises `UserError` where there are none."""
    allowed = ", ".join(KINDS)
    if path.is_file():
        if _kind(path) is None:
            raise UserError(
                f"text {str(path)!r}: unknown kind of file; allowed are {allowed} (.txt and .jsonl also .gz)"
            )
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file()
        and _kind(file) is not None
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise UserError(
            f"text {str(path)!r}: a folder with no {allowed} file and nothing that `datasets` saved; point at the files"
        )
    return files


def _saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder (one data set, or one per split)."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _fingerprint(path: Path) -> dict[str, str | int]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _from_file(path: Path, column: str | None) -> Iterator[str | None]:
    kind = _kind(path)
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


def _from_txt(path: Path) -> Iterator[str]:
    """Pieces of a text file, cut before the first line after a blank one; `"".join` of them is the file."""
    lines: list[str] = []
    length, after_blank = 0, False
    with _open_text(path) as file:
        while line := file.readline(LONGEST):
            blank = not line.strip()
            if length >= LONGEST or (length >= DOCUMENT and after_blank and not blank):
                yield "".join(lines)
                lines, length = [], 0
            lines.append(line)
            length, after_blank = length + len(line), blank
    yield "".join(lines)


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
            column = column or _column(None, {key: isinstance(value, str) for key, value in row.items()}, where)
            if column not in row:
                raise _no_column(column, row, where)
            value = _text(row[column], column, where)
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
            column = _column(column, is_text, where)
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for value in batch.column(0):
                    yield _text(value.as_py(), column, where)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"text {where} cannot be read as parquet: {error}") from None


# ---- columns


def _column(asked: str | None, is_text: dict[str, bool], where: str) -> str:
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


def _text(value: object, column: str, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise UserError(
        f"text {where}: column {column!r} holds {type(value).__name__}, not text; set the column (--text-column)"
    )


# ---- data sets


def _from_saved(path: Path, settings: TextSettings) -> Iterator[str | None]:
    import datasets

    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if settings.split not in loaded:
            splits = [str(name) for name in loaded]
            known = f"it has {', '.join(splits)}{near(settings.split, splits)}"
            raise UserError(f"text {str(path)!r}: no split {settings.split!r}; {known}")
        loaded = loaded[settings.split]
    elif settings.split not in ("train", str(loaded.split)):
        raise UserError(
            f"text {str(path)!r} holds one split, {str(loaded.split)!r}; got split={settings.split!r}: leave it out"
        )
    return _from_dataset(loaded, settings)


def _from_hub(settings: TextSettings) -> Iterator[str | None]:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    what = f"text {settings.source!r}"
    try:
        with offline_if_unreachable():
            loaded = datasets.load_dataset(
                settings.source, settings.config, split=settings.split, streaming=settings.streaming
            )
    except ConnectionError:
        raise UserError(
            f"{what} is no local file, and the Hugging Face hub cannot be reached to look for a data set of that name; "
            f"{WAYS_OUT}{near(settings.source, [PYTHON_DOCS])}"
        ) from None
    except DatasetNotFoundError as error:
        raise UserError(
            f"{what} is neither a local file nor a data set that the hub lets you read: {error}; {WAYS_OUT}"
        ) from None
    except (ValueError, OSError, RuntimeError, DatasetsError) as error:  # an unknown split or config, and so on
        reason = " ".join(str(error).split())  # it names the splits or configurations there are, on several lines
        raise UserError(
            f"{what} with config={settings.config!r}, split={settings.split!r} cannot be loaded: {reason}"
        ) from None
    return _from_dataset(loaded, settings)


def _from_dataset(loaded: Any, settings: TextSettings) -> Iterator[str | None]:
    """The text of a `Dataset` or `IterableDataset`; only the column asked for is decoded."""
    where = repr(settings.source)
    features = loaded.features
    if features is None:  # a stream does not always know: look at its first row
        first = next(iter(loaded), {})
        is_text = {name: isinstance(value, str) for name, value in first.items()}
    else:
        is_text = {name: getattr(kind, "dtype", None) in ("string", "large_string") for name, kind in features.items()}
    if not is_text:
        return iter(())  # no row, no column
    column = _column(settings.column, is_text, where)
    batches = loaded.select_columns([column]).iter(batch_size=256)
    return (_text(value, column, where) for batch in batches for value in batch[column])
