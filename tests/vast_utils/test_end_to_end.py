"""The real run.py on a rented machine that dies: what comes home is bit for bit what a run left in peace makes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from tests.vast_utils.rented import ROOT, until

RUN = "--tokens 30k --l1 1 --ratios 4 --eval-rows 2000 --splice-tokens 500 --latents 2 --checkpoint-seconds 0.3"
FLAGS = [*RUN.split(), "--checkpoint-share", "1", "--keep-checkpoints", "3"]


def test_a_run_that_loses_its_machine_has_the_bits_of_one_left_in_peace(rented, monkeypatch):
    for name in ("run.py", "requirements.txt"):
        shutil.copy(ROOT / name, rented.project / name)
    shutil.copytree(ROOT / "sparse_coding", rented.project / "sparse_coding", ignore=shutil.ignore_patterns("__pyc*"))
    rented.python, rented.clock.speed = sys.executable, 15.0
    same = {"OMP_NUM_THREADS": "1", "SPARSE_CODING_NATIVE": "0"}  # each machine would compile the C++ step for a while
    for name, value in same.items():
        monkeypatch.setenv(name, value)
    environment = {**rented.environment, "SPARSE_CODING_CACHE": str(rented.folder / "cache")}
    undisturbed = subprocess.Popen(
        [sys.executable, "run.py", *FLAGS, "--out", str(rented.folder / "alone")],
        cwd=rented.project,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    here = rented.project / "outputs" / "toy"
    words = rented.launch_words("--env", *same)
    process = rented.start("launch", *words, "--", "run.py", *FLAGS, "--out", "outputs/toy")
    there = until(lambda: rented.machines and rented.machines[0].home, 120)
    until(lambda: list(there.glob("sparse_coding/outputs/toy/checkpoints/step-*/*.json")), 300)
    beat = next(there.glob(".sparse_coding/jobs/*/heartbeat.json"))
    os.kill(json.loads(beat.read_text())["pid"], signal.SIGSTOP)  # so that there is time to fetch before it ends
    until(lambda: list(here.glob("checkpoints/step-*/*.json")), 60)
    with rented.market.lock:
        (lease,) = rented.market.leases.values()
        rented.market.end(lease)
    assert not (here / "results.jsonl").exists()  # else nothing was lost
    out, _ = process.communicate(timeout=200)
    assert process.returncode == 0, out
    _, said = undisturbed.communicate(timeout=100)
    assert undisturbed.returncode == 0, said
    assert len(rented.machines) == 2
    assert not rented.market.leases
    alone = rented.folder / "alone"
    assert bits(here) == bits(alone)
    assert measured(here) == measured(alone)
    assert (here / "report.html").exists()


def bits(run: Path) -> dict[str, bytes]:
    """Every file of the dictionaries."""
    found = {path.relative_to(run).as_posix(): path.read_bytes() for path in run.glob("dictionaries/*/*.safetensors")}
    assert found
    return found


def measured(run: Path) -> list[dict]:
    return [json.loads(line)["metrics"] for line in (run / "results.jsonl").read_text().splitlines()]
