"""The flags of `python -m sparse_coding harvest`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_coding.config import count, to_dict
from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.run_flags import SourceFlags, TextFlags
from sparse_coding.run_names import run_name
from sparse_coding.stores.codec import Codec


@dataclass(frozen=True)
class KeepFlags:
    """What is kept, and where."""

    tokens: str | None = None
    """Activations to keep, such as 500k, 300M; by default all that the text gives. Text held out for evaluation
    (--held-out) is never harvested."""
    store: str | None = None
    """A folder or s3://bucket/prefix. By default outputs/stores/ and a name of two words and a number that the same
    settings give again; s3://bucket alone gets such a name below it."""
    codec: Codec = "bf16"
    """How numbers are stored: fp32, bf16, fp16, or int8, centred and scaled per channel: half of bf16."""
    shard_rows: int | None = None
    """Rows of one shard: a harvest goes on at the last whole one. By default what makes 64 MiB of the widest
    site."""
    keep_tokens: bool = False
    """Keep token ids, contexts and positions beside the rows."""


@dataclass(frozen=True)
class HarvestFlags:
    """Run a model over a text once and keep its activations at some sites, to train from again and again."""

    model: SourceFlags = field(default_factory=SourceFlags)
    text: TextFlags = field(default_factory=TextFlags)
    keep: KeepFlags = field(default_factory=KeepFlags)

    def __post_init__(self) -> None:
        self.text.check()
        given = self.keep.tokens
        if given is not None and (given.startswith("-") or self.tokens < 1):  # type: ignore[operator]
            raise UserError(f"--tokens is {self.keep.tokens}: it must be at least 1")
        if self.keep.shard_rows is not None and self.keep.shard_rows < 1:
            raise UserError(f"--shard-rows is {self.keep.shard_rows}: it must be at least 1")

    @property
    def tokens(self) -> int | None:
        return None if self.keep.tokens is None else count(self.keep.tokens, "--tokens")

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is kept: a harvest can be continued with the same ones only."""
        known = to_dict(self)
        del known["keep"]["store"], known["model"]["device"]
        checkpoint = checkpoint_file(self.model.model)
        if checkpoint is not None and checkpoint.is_file():
            known["checkpoint_sha256"] = file_sha256(checkpoint)
        return known

    def store(self) -> str:
        """Where the store goes."""
        given = self.keep.store
        if given is None:
            return str(Path("outputs") / "stores" / run_name(self.identity()))
        if given.startswith("s3://") and "/" not in given.removeprefix("s3://").rstrip("/"):
            return f"{given.rstrip('/')}/{run_name(self.identity())}"
        return given
