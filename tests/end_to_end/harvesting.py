"""A small harvest and a small run from it, as words of their commands."""

from __future__ import annotations

import json
from pathlib import Path

from sparse_coding.config import parse
from sparse_coding.harvest_flags import HarvestFlags
from sparse_coding.run_settings import RunSettings

HIDDEN, BEFORE, AFTER = "blocks.1.mlp.hook_post", "blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"
SMALL = (
    "--tokens 8k --batch-size 128 --buffer-rows 2048 --eval-rows 1k --splice-tokens 500 "
    "--ratios 0.5 1 --l1 0.5 4 --latents 5"
)


def words_of(model: Path, text: Path, store: Path | str, *more: str) -> list[str]:
    usual = ["--sites", HIDDEN, BEFORE, AFTER] if "--sites" not in more and "--layer" not in more else []
    shards = [] if "--shard-rows" in more else ["--shard-rows", "3000"]
    return ["--model", str(model), "--text", str(text), "--store", str(store), *usual, *shards, *more]


def flags(*given) -> HarvestFlags:
    return parse(HarvestFlags, words_of(*given), "harvest", "")


def settings(*words: str) -> RunSettings:
    return parse(RunSettings, words, "run.py", "")


def run_flags(store: Path | str, out: Path, *more: str) -> list[str]:
    return ["--activations", str(store), *SMALL.split(), "--out", str(out), *more]


def files(folder: Path, but: str = "") -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != but}


def manifest(store: Path) -> dict:
    return json.loads((store / "manifest.json").read_text())
