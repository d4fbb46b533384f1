"""One contender of benchmarks/peers.py in a process and an environment of its own.

    python benchmarks/rivals/speed.py CONTENDER        saelens, sparsify, dictionary_learning or ours

Reads a job (JSON) as its first line, then one command a line, and answers each with a line of JSON:
    {"steps": n}      train n steps: how long they took
    {"l0": n}         L0 of the first member on n held-out rows
    {"measure": 1}    FVU and L0 of every member on the held-out rows, and the most memory held since the job came
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


class Contender(Protocol):
    """What speed_NAME.Contender(job) gives: a library's own trainer with its own optimiser."""

    def update(self, step: int, x: Any) -> None:
        """One step of every member on x [B d_in], float32."""

    def reconstruct(self, member: int, x: Any) -> tuple[Any, Any]:
        """(x_hat, codes) of held-out rows."""
        ...


def main(name: str) -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes elsewhere
    job = json.loads(sys.stdin.readline())
    module = importlib.import_module(f"speed_{name}")
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    before = forget_peak()
    contender, step = module.Contender(job), 0
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if n := command.get("steps"):
            began = time.perf_counter()
            for _ in range(n):
                contender.update(step, rows(job, torch, step))
                step += 1
            answer = {"seconds": time.perf_counter() - began}
        elif n := command.get("l0"):
            with torch.no_grad():
                f = contender.reconstruct(0, held_out(job, torch, n))[1]
            answer = {"l0": float((f != 0).sum()) / n}
        else:
            answer = {"peak_mib": (status("VmHWM") - before) / 2**20, **measure(contender, job, torch)}
        print(json.dumps(answer), file=answers, flush=True)


def rows(job: dict[str, Any], torch: Any, step: int) -> Any:
    """Batch `step`, read from the file: every contender sees the same rows in the same order."""
    batch, d_in = job["batch"], job["d_in"]
    start = step * batch % (job["rows"] // batch * batch)
    found = np.fromfile(job["data"], np.float32, batch * d_in, offset=start * d_in * 4)
    return torch.from_numpy(found.reshape(batch, d_in))


def held_out(job: dict[str, Any], torch: Any, rows: int = -1) -> Any:
    found = np.fromfile(job["held_out"], np.float32, max(rows * job["d_in"], -1))
    return torch.from_numpy(found.reshape(-1, job["d_in"]))


def measure(contender: Any, job: dict[str, Any], torch: Any) -> dict[str, Any]:
    x = held_out(job, torch)
    total = (x - x.mean(0)).square().sum()
    fvu, l0 = [], []
    with torch.no_grad():
        for member in range(job["members"]):
            parts = [contender.reconstruct(member, part) for part in x.split(job["batch"])]
            fvu.append(float((torch.cat([p[0] for p in parts]) - x).square().sum() / total))
            l0.append(sum(float((p[1] != 0).sum()) for p in parts) / len(x))
    return {"fvu": fvu, "l0": l0}


def forget_peak() -> int:
    """Let the system count peak memory anew; what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    for line in Path(f"/proc/{os.getpid()}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


if __name__ == "__main__":
    main(sys.argv[1])
