"""A random GPT-2 in Hugging Face layout with a tokenizer of its own, and a text to read."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_coding.harvest import harvest
from sparse_coding.pipeline import run
from tests.end_to_end.harvesting import HIDDEN, flags, run_flags, settings
from tests.end_to_end.lives import Lives

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60,000 characters in 300 documents that repeat with variations."""
    path = tmp_path_factory.mktemp("text") / "small.jsonl"
    words = "the quick brown fox jumps over a lazy dog while seven wizards brew potions in cold rooms"
    words = words.split()
    lines = []
    for i in range(300):
        chosen = [words[(i * 7 + j * j) % len(words)] for j in range(35)]
        lines.append('{"text": "' + f"Document {i}: " + " ".join(chosen) + '."}')
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def small_gpt2(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    import transformers

    from sparse_coding.activations.text import TextSettings, documents
    from sparse_coding.activations.tokenizers import train_byte_bpe

    folder = tmp_path_factory.mktemp("small-gpt2")
    tokenizer = train_byte_bpe(documents(TextSettings(str(small_text)), "all"), 300, folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=3, n_embd=16, n_head=2, vocab_size=len(tokenizer), n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def harvested(small_gpt2, small_text, tmp_path_factory) -> Path:
    """Three sites in fp32, with tokens, in ten shards."""
    os.environ["SPARSE_CODING_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    store = tmp_path_factory.mktemp("stores") / "one"
    harvest(flags(small_gpt2, small_text, store, "--codec", "fp32", "--keep-tokens"))
    return store


@pytest.fixture(scope="session")
def trained(harvested, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "stored"
    run(settings(*run_flags(harvested, out, "--sites", HIDDEN)))
    return out


@pytest.fixture
def command(tmp_path: Path):
    """Run one of the project's commands as a user does; returns the finished process."""

    def run(*words: str, timeout: float = 120, **changes) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, **changes
        )

    return run


@pytest.fixture(scope="session")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lives]:
    """Processes of the project's commands that can be killed at any moment."""
    found = Lives(tmp_path_factory.mktemp("lives"))
    yield found
    found.close()
