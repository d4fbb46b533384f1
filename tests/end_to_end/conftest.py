"""A random GPT-2 in Hugging Face layout with a tokenizer of its own, and a text to read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


@pytest.fixture
def command(tmp_path: Path):
    """Run one of the project's commands as a user does; returns the finished process."""

    def run(*words: str, timeout: float = 120, **changes) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False, **changes
        )

    return run
