"""What a store says about itself: manifest.json, read strictly.

Every number is checked against the others before anything is allocated or fetched by it; docs/stores.md has the format.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeAlias

import numpy as np

from sparse_coding.errors import UserError
from sparse_coding.stores.codec import CODECS, Codec
from sparse_coding.stores.objects import ObjectMissing, Objects, checked_name
from sparse_coding.stores.shard_file import LARGEST_HEADER, Damaged, Expected, tensor_bytes
from sparse_coding.stores.sums import DIGITS

MANIFEST = "manifest.json"
LEASE = "writer.json"
"""Beside the manifest while somebody writes: who that is (own.py; on S3 lease.py)."""
FORMAT = 2
"""Format 1 has no sums of headers and rows; it is read as well."""
LARGEST_MANIFEST = 256 << 20
TOKEN_DTYPES: dict[str, tuple[str, ...]] = {"token": ("I32", "U16"), "context": ("I64",), "position": ("I32",)}
"""Columns that can be kept beside the rows, and their safetensors dtypes."""
TOKEN_NUMPY = {"U16": np.dtype("<u2"), "I32": np.dtype("<i4"), "I64": np.dtype("<i8")}
SAFETENSORS: dict[Codec, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16", "int8": "I8"}
Numbers: TypeAlias = "tuple[float, ...]"


@dataclass(frozen=True)
class Source:
    """What the rows were made from; a resumed store must have the same."""

    model: str
    revision: str | None = None
    text: Any = None
    """Identity of the contexts: anything JSON can hold."""
    tokenizer: Any = None
    context: int | None = None
    """Tokens per context."""
    exclude_special: bool = False


@dataclass(frozen=True)
class SiteInfo:
    """One site of a store."""

    folder: str
    width: int
    module: str = ""
    """The module of the model that it is."""
    mean: Numbers | None = None
    """Of int8, with `scale`: x = q * scale + mean (see `Affine8`); None for other codecs, and until the first rows."""
    scale: Numbers | None = None


@dataclass(frozen=True)
class Statistics:
    """Per channel, of all rows before encoding."""

    mean: Numbers
    variance: Numbers


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str
    header: str | None = None
    """XXH3 of its first bytes up to the tensors, which hold the sums of the rows; None in format 1."""


@dataclass(frozen=True)
class ShardInfo:
    """Consecutive rows: one file per site, and one of tokens if they are kept."""

    rows: int
    files: Mapping[str, FileInfo]


@dataclass(frozen=True)
class Manifest:
    """A whole store but for its rows."""

    source: Source
    codec: Codec
    sites: Mapping[str, SiteInfo]
    shard_rows: int
    """Rows of every shard but the last (and those of merged stores)."""
    shards: tuple[ShardInfo, ...] = ()
    complete: bool = False
    tokens: Mapping[str, str] = field(default_factory=dict)
    """Columns kept beside the rows and their dtypes, empty for none."""
    statistics: Mapping[str, Statistics] = field(default_factory=dict)
    """By site; empty while there are no rows."""
    versions: Mapping[str, Any] = field(default_factory=dict)
    run: str | None = None

    @property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    def file_name(self, site: str | None, shard: int) -> str:
        """Of a site's rows, or with None of the tokens."""
        return file_name("tokens" if site is None else self.sites[site].folder, shard)

    @property
    def widest(self) -> int:
        return max(site.width for site in self.sites.values())

    def expected(self, site: str | None, rows: int) -> Expected:
        """The tensors of such a file with `rows` rows."""
        if site is None:
            return {name: (dtype, (rows,)) for name, dtype in self.tokens.items()}
        return {"rows": (SAFETENSORS[self.codec], (rows, self.sites[site].width))}

    def parts(self) -> tuple[str | None, ...]:
        """What each shard has a file of: the sites, and None for tokens if they are kept."""
        return (*self.sites, None) if self.tokens else tuple(self.sites)

    def to_json(self) -> str:
        """The text of manifest.json; floats come back bit for bit."""
        data = {"format": FORMAT, "complete": self.complete, "rows": self.rows, **asdict(self.source)}
        for one in fields(self):
            if one.name not in ("source", "complete", "shards"):
                value = getattr(self, one.name)
                data[one.name] = (
                    {key: _plain(part) for key, part in value.items()} if isinstance(value, Mapping) else value
                )
        data["shards"] = [asdict(shard) for shard in self.shards]
        return json.dumps(data, allow_nan=False) + "\n"


def file_name(folder: str, shard: int) -> str:
    return f"{folder}/{shard:05d}.safetensors"


def read_manifest(objects: Objects) -> Manifest:
    """The manifest of a store, all of it checked. Raises `UserError`: `ObjectMissing` where there is none."""
    size = objects.size(MANIFEST)
    if size > LARGEST_MANIFEST:
        raise Damaged(f"{objects.url}/{MANIFEST} has {size} bytes: it is no manifest of a store", MANIFEST)
    data = bytes(objects.get(MANIFEST))
    try:
        return from_json(data)
    except UserError as error:
        raise Damaged(f"{objects.url}/{MANIFEST} is damaged or no manifest of a store: {error}", MANIFEST) from None


def found_manifest(objects: Objects) -> Manifest | None:
    """As `read_manifest`, None where there is none."""
    try:
        return read_manifest(objects)
    except ObjectMissing:
        return None


def from_json(text: bytes | str) -> Manifest:
    """A manifest from its JSON. Raises `UserError` that names the first thing wrong."""
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise UserError("it is no JSON") from None
    top = _mapping(data, "it")
    if type(top.get("format")) is not int or not 1 <= top["format"] <= FORMAT:
        raise UserError(f"format is {str(top.get('format'))[:20]}, this version reads 1 to {FORMAT}")
    codec = top.get("codec")
    if codec not in CODECS:
        raise UserError(f"codec is {str(codec)[:20]!r}, allowed are {', '.join(CODECS)}")
    tokens = _mapping(top.get("tokens", {}), "tokens")
    if not all(dtype in TOKEN_DTYPES.get(name, ()) for name, dtype in tokens.items()):
        raise UserError(f"tokens may have the columns {', '.join(TOKEN_DTYPES)} with their dtypes")
    manifest = Manifest(
        source=_source(top),
        codec=codec,
        sites={name: _site(name, one, codec) for name, one in _mapping(top.get("sites"), "sites").items()},
        shard_rows=_whole(top.get("shard_rows"), "shard_rows"),
        complete=_of(top.get("complete"), bool, "complete"),
        tokens=tokens,
        versions=_mapping(top.get("versions", {}), "versions"),
        run=None if top.get("run") is None else _of(top["run"], str, "run"),
    )
    folders = [site.folder for site in manifest.sites.values()]
    if not folders or len({*folders, "tokens"}) != len(folders) + 1:
        raise UserError("it needs at least one site, each with a folder of its own")
    shards = tuple(_shard(manifest, index, one) for index, one in enumerate(_of(top.get("shards"), list, "shards")))
    manifest = replace(manifest, shards=shards)
    _check_whole(manifest, top)
    return replace(manifest, statistics=_statistics(manifest, _mapping(top.get("statistics", {}), "statistics")))


def _check_whole(manifest: Manifest, top: Mapping[str, Any]) -> None:
    if manifest.rows != _whole(top.get("rows"), "rows", least=0):
        raise UserError(f"rows is {top['rows']}, its shards have {manifest.rows}")
    if manifest.codec == "int8" and manifest.shards and any(site.mean is None for site in manifest.sites.values()):
        raise UserError("codec int8 needs mean and scale at every site")


def _source(top: Mapping[str, Any]) -> Source:
    return Source(
        model=_of(top.get("model"), str, "model"),
        revision=None if top.get("revision") is None else _of(top["revision"], str, "revision"),
        text=top.get("text"),
        tokenizer=top.get("tokenizer"),
        context=None if top.get("context") is None else _whole(top["context"], "context"),
        exclude_special=_of(top.get("exclude_special", False), bool, "exclude_special"),
    )


def _site(name: str, data: Any, codec: Codec) -> SiteInfo:
    if not 0 < len(name) <= 256 or not name.isprintable():
        raise UserError(f"a site has the name {name[:80]!r}: allowed are 1 to 256 printable characters")
    one = _mapping(data, f"site {name!r}")
    folder = checked_name(_of(one.get("folder"), str, f"{name}.folder"))
    width = _whole(one.get("width"), f"{name}.width", most=1 << 24)
    numbers = [
        None if one.get(key) is None else _numbers(one[key], width, f"{name}.{key}") for key in ("mean", "scale")
    ]
    mean, scale = numbers
    if (mean is None) != (scale is None) or (mean is not None and codec != "int8"):
        raise UserError(f"{name} needs both mean and scale for int8, and neither for {codec}")
    if scale is not None and min(scale) <= 0:
        raise UserError(f"{name}.scale must be above 0")
    return SiteInfo(folder, width, _of(one.get("module", ""), str, f"{name}.module"), mean, scale)


def _shard(manifest: Manifest, index: int, data: Any) -> ShardInfo:
    one = _mapping(data, f"shard {index}")
    rows = _whole(one.get("rows"), f"shard {index}: rows", most=1 << 40)
    given = _mapping(one.get("files"), f"shard {index}: files")
    wanted = {manifest.file_name(part, index): manifest.expected(part, rows) for part in manifest.parts()}
    if set(given) != set(wanted):
        raise UserError(f"shard {index} must have the files {', '.join(wanted)}"[:400])
    files = {}
    for name, expected in wanted.items():
        info = _mapping(given[name], name)
        size, sha256 = _whole(info.get("bytes"), f"{name}: bytes"), _of(info.get("sha256"), str, f"{name}: sha256")
        data_bytes = sum(tensor_bytes(*tensor) for tensor in expected.values())
        if not 8 <= size - data_bytes <= 8 + LARGEST_HEADER:
            raise UserError(f"{name}: bytes is {size}, {rows} rows need {data_bytes} and a header")
        if not re.fullmatch(r"[0-9a-f]{64}", sha256):
            raise UserError(f"{name}: sha256 must be 64 hexadecimal digits")
        head = info.get("header")
        if head is not None and not re.fullmatch(rf"[0-9a-f]{{{DIGITS}}}", _of(head, str, f"{name}: header")):
            raise UserError(f"{name}: header must be {DIGITS} hexadecimal digits")
        if unknown := set(info) - {"bytes", "sha256", "header"}:
            raise UserError(f"{name} has {min(unknown)[:40]!r}, which this version does not know")
        files[name] = FileInfo(size, sha256, head)
    return ShardInfo(rows, files)


def _statistics(manifest: Manifest, data: Mapping[str, Any]) -> dict[str, Statistics]:
    if set(data) != (set(manifest.sites) if manifest.shards else set()):
        raise UserError("statistics must hold every site once there are rows")
    found = {}
    for name, site in manifest.sites.items():
        if name in data:
            one = _mapping(data[name], f"statistics of {name}")
            mean, variance = (
                _numbers(one.get(key), site.width, f"statistics of {name}: {key}") for key in ("mean", "variance")
            )
            if min(variance) < 0:
                raise UserError(f"statistics of {name}: a variance is below 0")
            found[name] = Statistics(mean, variance)
    return found


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, SiteInfo | Statistics) else value


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _mapping(value: Any, what: str) -> dict[str, Any]:
    return _of(value, dict, what)


def _of(value: Any, kind: type, what: str) -> Any:
    if type(value) is not kind:
        words = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
        raise UserError(f"{what} must be {words[kind]}")
    return value


def _whole(value: Any, what: str, least: int = 1, most: int = 1 << 60) -> int:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{what} is {str(value)[:40]}: it must be a whole number from {least} to {most}")
    return value


def _numbers(value: Any, width: int, what: str) -> Numbers:
    if type(value) is not list or len(value) != width:
        raise UserError(f"{what} must be a list of {width} numbers")
    if not all(type(one) in (int, float) and abs(one) < 1e300 and math.isfinite(one) for one in value):
        raise UserError(f"{what} must hold finite numbers")
    return tuple(map(float, value))
