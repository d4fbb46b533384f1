"""Two processes of torchrun, on the CPU with gloo: the run of one process with the same global batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparse_coding.errors import UserError
from sparse_coding.language_models.processes import Processes, processes
from sparse_coding.language_models.trainer import rows_per_pass
from tests.language_models.tiny import CPU, TINY

ROOT = Path(__file__).parents[2]


def start(words: list[str], count: int, stop_at: int | None = None) -> subprocess.CompletedProcess[str]:
    """train-lm in `count` processes, or in one without torchrun."""
    run = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *run, "-m", "sparse_coding", "train-lm", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)


def curve(folder: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [(line["iteration"], key, line[key]) for line in lines for key in ("loss", "val_loss") if key in line]


@pytest.mark.parametrize("accumulation", [2, 1], ids=["each its passes", "each its rows"])
def test_two_processes_make_the_curve_of_one(tmp_path, text, config_path, accumulation):
    def words(out: str) -> list[str]:
        settings = [f"gradient_accumulation_steps={accumulation}", "max_iters=12", "warmup_iters=2", "eval_interval=5"]
        settings += ["dropout=0.1"] if accumulation == 2 else []  # passes, and so their dropout, stay the same
        where = ["--text", text.source, "--held-out", "0.2", "--out", str(tmp_path / out), "--vocab-size", "300"]
        return [str(config_path), *where, "--set", *settings]

    curves = {}
    for count in (1, 2):
        done = start(words(str(count)), count)
        assert done.returncode == 0, done.stderr
        curves[count] = curve(tmp_path / str(count))
        assert done.stdout.count("nats per token on the held-out text") == 1, "only the first process speaks"
    assert [point[:2] for point in curves[1]] == [point[:2] for point in curves[2]]
    assert len(curves[1]) == 12 + 4
    assert [point[2] for point in curves[2]] == pytest.approx([point[2] for point in curves[1]], abs=2e-5)
    assert "2 processes of 1 CPU thread" in (tmp_path / "2" / "README.md").read_text()


def test_shares_that_are_not_even_are_refused():
    config = dataclasses.replace(TINY, batch_size=8, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"3 processes cannot share an update evenly: .*= 2 or batch_size = 8"):
        rows_per_pass(config, 3)
    assert [rows_per_pass(config, size) for size in (1, 2, 4, 8)] == [8, 8, 2, 1]


def test_a_mistake_is_said_once_and_ends_all(tmp_path, config_path):
    (tmp_path / "empty.txt").write_text("")
    done = start([str(config_path), "--text", str(tmp_path / "empty.txt"), "--out", str(tmp_path / "out")], 2)
    assert done.returncode != 0
    assert done.stderr.count("error: text") == 1
    assert done.stderr.count("Traceback") <= 1, "torchrun's own"
    assert "RuntimeError" not in done.stderr


def test_one_process_needs_no_torchrun_and_nccl_needs_a_gpu(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with processes(CPU) as (alone, device):
        assert (alone, device) == (Processes(), CPU)
        numbers = [torch.ones(2), torch.zeros(())]
        alone.sum_(numbers)
        assert [x.sum().item() for x in numbers] == [2.0, 0.0]
        assert [alone.any(flag) for flag in (True, False)] == [True, False]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError, match="nccl"), processes(CPU, "nccl"):
        pass
