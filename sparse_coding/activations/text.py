"""Where text comes from: documents, one by one, from files on disk, a data set by name, or Python's own manual.

| source | documents |
|---|---|
| `python-docs` | `python_docs.py`: needs no network |
| `x.txt` | paragraphs, grouped into pieces of 2,000 characters or more; joined again they are the file exactly |
| `x.jsonl` | one per line, from the column |
| `x.parquet` | one per row, from the column |
| a folder | nanoGPT's data (`train.bin`), what `datasets.save_to_disk` wrote, or every such file below it, by name |
| anything else | a data set of the Hugging Face hub by name, from its cache where the hub does not answer |

`.txt` and `.jsonl` may be gzipped (`x.jsonl.gz`). A row whose text is empty or null holds nothing and is passed over.
Each document falls into the training or the held-out part by a hash of its position: the parts are disjoint and
complete, the same in every run, and a larger `held_out` only ever adds to the held-out part.
A folder of nanoGPT's data that has a `val.bin` is split already: that file is the held-out part.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from sparse_coding.activations.python_docs import python_docs, python_docs_identity
from sparse_coding.activations.text_files import (
    WAYS_OUT,
    column_of,
    files_of,
    fingerprint,
    kind_of,
    local_path,
    rows_of,
    text_of,
)
from sparse_coding.activations.token_folder import files_read, token_documents
from sparse_coding.errors import UserError, near
from sparse_coding.formats.nanogpt_data import is_data_folder
from sparse_coding.hub import offline_if_unreachable

Part = Literal["train", "held_out", "all"]

PYTHON_DOCS = "python-docs"


@dataclass(frozen=True)
class TextSettings:
    """Which text, and which part of it is kept apart for evaluation."""

    source: str = PYTHON_DOCS  # `python-docs`, a file, a folder, or a Hugging Face data set by name
    config: str | None = None  # configuration of the data set, as `20220301.en`; for data sets by name only
    split: str = "train"  # split of the data set; plain files have only `train`
    column: str | None = None  # column that holds the text; None: `text`, or the only column of strings
    streaming: bool = False  # read a hub data set while it downloads, keeping nothing on disk
    max_documents: int | None = None  # read only this many, before any is held out; of a val.bin's folder, of each file
    held_out: float = 0.05  # share of the documents kept out of training, 0 <= held_out < 1


def documents(settings: TextSettings, part: Part = "train") -> Iterator[str]:
    """The documents of one part, lazily, in order. Raises `UserError` where text is missing, unreadable or empty."""
    return (text for _, text in _select(settings, part, _rows(settings, part)))


def documents_of_both(settings: TextSettings) -> Iterator[tuple[Part, str]]:
    """Every document with its part, `train` or `held_out`, in one pass: each part is what `documents` gives."""
    return _select(settings, "all", _rows(settings, "all"))


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
    path = local_path(settings.source)
    if path is None:
        return identity
    if is_data_folder(path):
        files = files_read(path)
    elif _saved(path):
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
    else:
        files = files_of(path)
    identity["files"] = [
        {"name": file.relative_to(path).as_posix() if file != path else file.name, **fingerprint(file)}
        for file in files
    ]
    return identity


# ---- parts


def _rows(settings: TextSettings, part: Part) -> Iterator[tuple[Part, str | None]]:
    """The text of every row with its part; of a source that is split already, the rows of `part` alone.

    The source is opened here, not at the first row: mistakes show at once.
    """
    _check(settings, part)
    path = None if settings.source == PYTHON_DOCS else local_path(settings.source)
    if path is None or not is_data_folder(path):
        return _split(settings, part, _from_source(settings, path))
    _plain(settings, [])
    files = token_documents(path)
    if "held_out" not in files:
        return _split(settings, part, files["train"])
    return (
        (name, text) for name in files if part in (name, "all") for text in islice(files[name], settings.max_documents)
    )


def _split(settings: TextSettings, part: Part, rows: Iterable[str | None]) -> Iterator[tuple[Part, str | None]]:
    if part == "held_out" and settings.held_out == 0:
        raise UserError("held_out is 0, so there is no held-out text to evaluate on: set it to a share such as 0.05")
    return (
        ("held_out" if is_held_out(index, settings.held_out) else "train", text)
        for index, text in enumerate(islice(rows, settings.max_documents))
    )


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


def _select(settings: TextSettings, part: Part, rows: Iterator[tuple[Part, str | None]]) -> Iterator[tuple[Part, str]]:
    """The rows of `part` that hold text."""
    seen = given = 0
    for name, text in rows:
        if not text:
            continue
        seen += 1
        if part in (name, "all"):
            given += 1
            yield name, text
    if not seen:
        raise UserError(f"text {settings.source!r} is empty: there is not one document with text in it")
    if not given:
        change = "raise held_out (--held-out)" if part == "held_out" else "lower held_out (--held-out)"
        raise UserError(
            f"text {settings.source!r}: none of its {seen} documents is in the {part} part "
            f"(held_out={settings.held_out}); {change} or give more text"
        )


# ---- sources


def _from_source(settings: TextSettings, path: Path | None) -> Iterator[str | None]:
    """The text of every row of the source, None or empty where a row holds none."""
    if settings.source == PYTHON_DOCS:
        _plain(settings, [])
        return (text for _, text in python_docs())
    if path is None:
        return _from_hub(settings)
    if settings.config is not None:
        raise UserError(
            f"config={settings.config!r} is for data sets by name; {settings.source!r} is a local path: leave it out"
        )
    if _saved(path):
        return _from_saved(path, settings)
    files = files_of(path)
    _plain(settings, files)
    return (row for file in files for row in rows_of(file, settings.column))


def _plain(settings: TextSettings, files: list[Path]) -> None:
    """Plain files have neither configurations nor splits, .txt no columns: asking for one is a mistake."""
    if settings.column is not None and all(kind_of(file) == ".txt" for file in files):
        raise UserError(f"text {settings.source!r} has no columns; got column={settings.column!r}: leave it out")
    if settings.split != "train" or settings.config is not None:
        raise UserError(
            f"text {settings.source!r} has no configurations and no splits but 'train'; "
            f"got config={settings.config!r}, split={settings.split!r}: leave them out"
        )


def _saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote this folder (one data set, or one per split)."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


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
    column = column_of(settings.column, is_text, where)
    batches = loaded.select_columns([column]).iter(batch_size=256)
    return (text_of(value, column, where) for batch in batches for value in batch[column])
