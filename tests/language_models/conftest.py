from __future__ import annotations

import pytest
import torch

from sparse_coding.activations.text import TextSettings


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A file of repeating lines, cut into twenty-odd documents; caches go to the test's folder."""
    monkeypatch.setenv("SPARSE_CODING_CACHE", str(tmp_path / "cache"))
    lines = [f"the {animal} sat on the {place}.\n\n" for animal in ("cat", "dog", "owl") for place in ("mat", "roof")]
    (tmp_path / "text.txt").write_text("".join(lines) * 300)
    return TextSettings(source=str(tmp_path / "text.txt"), held_out=0.2)


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(
        "n_layer = 2\nn_head = 2\nn_embd = 16\nblock_size = 16\nbatch_size = 16\ngradient_accumulation_steps = 1\n"
        "max_iters = 60\nlearning_rate = 1e-2\nwarmup_iters = 5\neval_interval = 30\neval_iters = 2\nbias = True\n"
        "device = 'cpu'\n"
    )
    return path
