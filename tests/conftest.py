"""Shared by all tests: no network, no GPU, one thread pool, nothing outside the temporary folder."""

from __future__ import annotations

import os

os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", TOKENIZERS_PARALLELISM="false", WANDB_SILENT="true")

import pytest
import torch


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are cached below the test session's folder, never in the user's home."""
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
