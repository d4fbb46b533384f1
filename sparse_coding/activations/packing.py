"""Token ids to contexts of one length, written to a folder as they come."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparse_coding.activations.encoding import frame_of, separator_of
from sparse_coding.errors import UserError
from sparse_coding.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Packing:
    """How tokens become contexts."""

    context: int
    prefix: list[int]
    suffix: list[int]
    separator: int | None
    padding: int
    dtype: str  # little-endian on every machine

    @property
    def body(self) -> int:
        return self.context - len(self.prefix) - len(self.suffix)


def packing_of(
    tokenizer: PreTrainedTokenizerBase, around: list[int], context: int, prepend_bos: bool | None, special_tokens: bool
) -> Packing:
    """The frame, separator and padding of this tokenizer. Raises `UserError` where they leave no room for text."""
    prefix, suffix = frame_of(tokenizer, around)
    if prepend_bos is not None and not special_tokens:
        raise UserError(f"prepend_bos={prepend_bos} with special_tokens=False: a BOS is a special token; leave one out")
    if prepend_bos:
        if tokenizer.bos_token_id is None and not prefix:
            raise UserError("prepend_bos: this tokenizer has no BOS token; leave prepend_bos out")
        prefix = prefix or [int(tokenizer.bos_token_id)]  # type: ignore[arg-type]
    elif prepend_bos is False and prefix == [tokenizer.bos_token_id]:
        prefix = []
    separator = separator_of(tokenizer, around) if special_tokens else None
    known = (tokenizer.pad_token_id, separator, 0)
    padding = next(int(token) for token in known if token is not None)  # type: ignore[arg-type]
    smallest = len(prefix) + len(suffix) + 1
    if context < smallest:
        raise UserError(f"context={context} leaves no room for text: this tokenizer needs at least {smallest}")
    dtype = "<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4"
    return Packing(context, prefix, suffix, separator, padding, dtype)  # type: ignore[arg-type]


class Writer:
    """Packs token ids into contexts on disk and counts what goes in; memory holds one batch."""

    def __init__(self, folder: Path, packing: Packing, exclude_special: bool) -> None:
        self.folder, self.packing, self.exclude_special = folder, packing, exclude_special
        self.tokens, self.mask = (folder / "tokens.bin").open("wb"), (folder / "mask.bin").open("wb")
        self.digest = hashlib.sha256()
        self.rest = np.zeros(0, packing.dtype)  # not yet a whole context
        self.rest_mask = np.zeros(0, bool)
        self.n_documents = self.n_characters = self.n_tokens = self.n_contexts = self.n_padding = 0

    def add(self, texts: list[str], encoded: list[list[int]], left: int | None) -> None:
        """Append documents with their separators, `left` tokens at most."""
        end = [] if self.packing.separator is None else [self.packing.separator]
        ids, masks = [self.rest], [self.rest_mask]
        for document, tokens in zip(texts, encoded, strict=True):
            if left == 0:
                break
            stream = np.array(tokens + end, self.packing.dtype)[:left]
            mask = np.ones(len(stream), bool)
            mask[len(tokens) :] = not self.exclude_special
            ids.append(stream)
            masks.append(mask)
            left = None if left is None else left - len(stream)
            self.n_documents += 1
            self.n_characters += len(document)
            self.n_tokens += len(stream)
        stream, mask, body = np.concatenate(ids), np.concatenate(masks), self.packing.body
        whole = len(stream) // body * body
        self.rest, self.rest_mask = stream[whole:], mask[whole:]
        self._write(stream[:whole].reshape(-1, body), mask[:whole].reshape(-1, body), 0)

    def _write(self, body: np.ndarray, mask: np.ndarray, padding: int) -> None:
        """Frame rows of tokens, pad them by `padding` positions at the end, and write them."""

        def framed(rows: np.ndarray, prefix: Any, suffix: Any, pad: Any) -> np.ndarray:
            sides = [
                np.broadcast_to(np.array(side, rows.dtype), (len(rows), len(side))) for side in (prefix, suffix, pad)
            ]
            return np.concatenate([sides[0], rows, *sides[1:]], axis=1)

        packing, shown = self.packing, not self.exclude_special
        block = framed(body, packing.prefix, packing.suffix, [packing.padding] * padding).tobytes()
        self.tokens.write(block)
        self.digest.update(block)
        kept = framed(mask, [shown] * len(packing.prefix), [shown] * len(packing.suffix), [False] * padding)
        self.mask.write(kept.tobytes())
        self.n_contexts += len(body)
        self.n_padding += padding

    def counts(self) -> str:
        return (
            f"{self.n_documents:,} documents, {self.n_characters:,} characters, {self.n_contexts:,} contexts, "
            f"{self.n_padding} positions of padding"
        )

    def finish(self, identity: dict[str, Any]) -> None:
        """Pad the last context, check the sums, and write the facts; after this the folder is whole."""
        packing = self.packing
        if len(self.rest):
            self._write(self.rest[None], self.rest_mask[None], packing.body - len(self.rest))
        n_frame = self.n_contexts * (packing.context - packing.body)
        assert self.n_contexts * packing.context == self.n_tokens + n_frame + self.n_padding, "tokens in are tokens out"
        if not self.n_tokens:
            raise UserError("the tokenizer makes no token of this text: is it the right tokenizer for it?")
        for file in (self.tokens, self.mask):
            file.flush()
            os.fsync(file.fileno())
        self.close()  # before one is removed
        if not self.exclude_special and not self.n_padding:
            (self.folder / "mask.bin").unlink()  # all True
        facts = {name: getattr(self, name) for name in ("n_documents", "n_characters", "n_tokens", "n_padding")}
        facts |= {"n_contexts": self.n_contexts, "n_frame": n_frame, "dtype": packing.dtype}
        facts["identity"] = identity | {"sha256": self.digest.hexdigest()}
        write_text(self.folder / "contexts.json", json.dumps(facts, indent=1))

    def close(self) -> None:
        self.tokens.close()
        self.mask.close()
