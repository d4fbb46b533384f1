"""Our trainer's step beside those of SAELens, sparsify and dictionary_learning, on the same rows in one run.

    python benchmarks/peers.py                             every case; builds an environment for each peer at first
    python benchmarks/peers.py --cases topk relu           some of them
    python benchmarks/peers.py --python saelens=/path/to/python     an environment that is there already
    python benchmarks/peers.py --turns 3 --name try        quicker and noisier; results/try.*

Every contender is a process of its own with the library's own trainer and optimiser (rivals/speed_*.py): once at its
defaults, and with those of its switches that make it faster. They take turns, a few steps each, while the others
wait; the first turn is a warm-up. Tokens/s are the median over turns, and over the run. Where the cost changes as
training goes on, as with ReLU-L1, which starts dense, the run is long enough for it and nothing of it is left out; L0
after each turn tells how dense each contender is. FVU and L0 after the same number of steps on rows nobody trained on:
at their defaults the peers have other learning rates and warm-ups. Memory: the most held beyond what the imports took.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch

from sparse_coding.provenance import provenance

HERE = Path(__file__).parent
PACKAGES = {"saelens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}
DEFAULTS, FASTEST, AUTOCAST = "the fastest at its defaults", "the fastest", "saelens + autocast"
HELD_OUT = 8192
COUNTED = 256
"""Held-out rows on which L0 is counted after each turn."""


@dataclass(frozen=True)
class Case:
    """One workload: `members` dictionaries of one shape on one stream."""

    kind: str
    d_in: int
    d_sae: int
    batch: int
    k: int = 32
    l1: float = 1.0
    members: int = 1
    steps_per_turn: int = 4
    whole_turns: int = 0
    """Turns of a run that is timed as a whole, the first among them; 0: those of --turns, after a warm-up."""
    asked: tuple[tuple[str, float], ...] = ()
    """How many times as fast as whom (see `slower`) we ought to be."""


CASES = {
    "topk": Case("topk", 512, 8192, 2048, asked=((DEFAULTS, 4), (FASTEST, 3), ("saelens", 8))),
    "relu": Case("relu", 512, 8192, 2048, steps_per_turn=16, whole_turns=11, asked=(("saelens", 3), (AUTOCAST, 1.5))),
    "topk-32x": Case("topk", 768, 24576, 2048, steps_per_turn=2),
    "batchtopk": Case("batchtopk", 512, 8192, 2048),
    "sweep-16": Case("relu", 256, 1024, 1024, members=16, asked=(("saelens", 6), (AUTOCAST, 1.4))),
    "sweep-16-topk": Case("topk", 256, 1024, 1024, members=16, asked=((FASTEST, 2),)),
    "sweep-64-small": Case("relu", 64, 128, 256, members=64, steps_per_turn=20, asked=((FASTEST, 5),)),
    "sweep-64": Case("relu", 64, 256, 1024, members=64, steps_per_turn=8, asked=((FASTEST, 2.5),)),
}
CONTENDERS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "topk": (
        ("ours", ()),
        ("saelens", ()),
        ("saelens", ("autocast",)),
        ("dictionary_learning", ()),
        ("dictionary_learning", ("autocast",)),
        ("sparsify", ()),
        ("sparsify", ("adam", "fused")),
        ("sparsify", ("adam", "fused", "autocast")),
    ),
}
CONTENDERS["relu"] = CONTENDERS["batchtopk"] = CONTENDERS["topk"][:5]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--contenders", nargs="+", choices=["ours", *PACKAGES], default=["ours", *PACKAGES])
    parser.add_argument("--turns", type=int, default=11, help="timed turns of each contender")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--python", nargs="*", default=[], metavar="PEER=PATH", help="environments that are there")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "sparse-coding" / "peers")
    parser.add_argument("--name", default="peers", help="of the files in benchmarks/results")
    flags = parser.parse_args()
    pythons = dict(one.split("=", 1) for one in flags.python)
    for peer in flags.contenders:
        if peer != "ours" and peer not in pythons:
            pythons[peer] = environment(flags.environments / peer, PACKAGES[peer])
    pythons["ours"] = sys.executable
    versions = {PACKAGES[peer]: version(pythons[peer], PACKAGES[peer]) for peer in flags.contenders if peer != "ours"}
    results = []
    for name in flags.cases:
        results.append({"case": name, **vars(CASES[name]), "contenders": compare(name, CASES[name], flags, pythons)})
        own = [word for word in sys.argv[1:] if "=" not in word and word != "--python"]  # no paths of this machine
        command = " ".join(["peers.py", *own])
        facts = {**provenance(), "command": command, "threads": flags.threads, "turns": flags.turns, "peers": versions}
        write(flags.name, facts, results)


def environment(folder: Path, package: str) -> str:
    """The Python of a virtual environment with the newest release of a peer and this torch; made if it is not there."""
    python = folder / "bin" / "python"
    if not (folder / "done").exists():
        print(f"making an environment with {package} in {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        torch_version = torch.__version__.split("+")[0]
        subprocess.run([python, "-m", "pip", "install", "-q", f"torch=={torch_version}", package], check=True)
        (folder / "done").touch()
    return str(python)


def version(python: str, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}), 'torch', m.version('torch'))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def compare(name: str, case: Case, flags: argparse.Namespace, pythons: dict[str, str]) -> list[dict[str, Any]]:
    """Every contender on one case, in turns."""
    chosen = [one for one in CONTENDERS[case.kind] if one[0] in flags.contenders]
    turns, warm_ups = (case.whole_turns, 0) if case.whole_turns else (flags.turns, 1)
    with tempfile.TemporaryDirectory() as scratch:
        job = {**vars(case), **write_rows(case, Path(scratch))}
        job |= {"threads": flags.threads, "steps": case.steps_per_turn * (turns + warm_ups)}
        running = [Process(pythons[peer], peer, switches, job) for peer, switches in chosen]
        try:
            seconds: list[list[float]] = [[] for _ in running]
            l0: list[list[float]] = [[] for _ in running]
            for turn in range(turns + warm_ups):
                for index, process in enumerate(running):
                    taken = process.ask({"steps": case.steps_per_turn})["seconds"]
                    if turn >= warm_ups:
                        seconds[index].append(taken)
                    if case.whole_turns:
                        l0[index].append(process.ask({"l0": COUNTED})["l0"])
            measured = [process.ask({"measure": 1}) for process in running]
        finally:
            for process in running:
                process.close()
    tokens = case.batch * case.members * case.steps_per_turn
    found = []
    for (peer, switches), taken, counts, facts in zip(chosen, seconds, l0, measured, strict=True):
        rates = {
            "tokens_per_s": tokens / statistics.median(taken),
            "run_tokens_per_s": tokens * len(taken) / sum(taken),
        }
        found.append(
            {"peer": peer, "switches": list(switches), **rates, "seconds": taken, "l0_by_turn": counts, **facts}
        )
        told = f"{rates['tokens_per_s']:12,.0f} tokens/s {facts['peak_mib']:8.0f} MiB"
        print(f"{name:16s} {label(found[-1]):40s} {told}", flush=True)
    return found


def write_rows(case: Case, folder: Path) -> dict[str, Any]:
    """Rows with a truth: 24 of `d_sae` features in each, more often the first ones, scaled to mean norm sqrt(d_in)."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(case.d_sae, case.d_in, generator=generator), dim=1)
    often = torch.arange(1, case.d_sae + 1).float().rsqrt()
    count = 64 * case.batch

    def draw(n: int) -> torch.Tensor:
        parts = []
        for size in [min(4096, n - start) for start in range(0, n, 4096)]:
            which = torch.multinomial(often.expand(size, -1), min(24, case.d_sae // 4), generator=generator)
            values = torch.rand(which.shape, generator=generator) + 0.2
            x = torch.nn.functional.embedding_bag(which, features, per_sample_weights=values, mode="sum")
            parts.append(x + 0.02 * torch.randn(x.shape, generator=generator))
        return torch.cat(parts)

    held_out, x = draw(HELD_OUT), draw(count)
    scale = case.d_in**0.5 / held_out.norm(dim=1).mean()
    (held_out * scale).numpy().tofile(folder / "held_out.f32")
    (x * scale).numpy().tofile(folder / "rows.f32")
    return {"data": str(folder / "rows.f32"), "held_out": str(folder / "held_out.f32"), "rows": count}


class Process:
    """A contender in its own process."""

    def __init__(self, python: str, peer: str, switches: tuple[str, ...], job: dict[str, Any]):
        words = [python, str(HERE / "rivals" / "speed.py"), peer]
        self.label = " ".join([peer, *switches])
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ask({**job, "switches": switches})

    def ask(self, command: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.label} ended with code {self.process.wait()}: what it said stands above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def write(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    folder = HERE / "results"
    (folder / f"{name}.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    peers = ", ".join(f"{package} {found}" for package, found in facts["peers"].items())
    made = f"{facts['date'][:10]}, torch {facts['versions']['torch']}, {facts['threads']} threads"
    lines = ["Steps of training beside the peers: `python benchmarks/peers.py`", ""]
    lines += [f"{made}; {peers}. {facts['turns']} turns.", ""]
    lines += summary(results)
    for result in results:
        lines += table(result)
    (folder / f"{name}.md").write_text("\n".join(lines))


def label(one: dict[str, Any]) -> str:
    return " + ".join([one["peer"], *one["switches"]])


def ours_of(result: dict[str, Any]) -> dict[str, Any] | None:
    return next((one for one in result["contenders"] if label(one) == "ours"), None)


def slower(result: dict[str, Any], whom: str) -> list[dict[str, Any]]:
    """The contenders that `whom` speaks of: DEFAULTS, FASTEST (with any switches), or one by its label."""
    peers = [one for one in result["contenders"] if one["peer"] != "ours"]
    if whom == FASTEST:
        return peers
    return [one for one in peers if (not one["switches"] if whom == DEFAULTS else label(one) == whom)]


def summary(results: list[dict[str, Any]]) -> list[str]:
    """What is asked and what was measured: over the whole run where it is timed as one."""
    lines = ["| | faster than | asked | measured | peak MiB, ours | the leanest peer |", "|" + "---|" * 6]
    for result in results:
        ours, rate = ours_of(result), "run_tokens_per_s" if result["whole_turns"] else "tokens_per_s"
        if ours is None or not slower(result, FASTEST):
            continue
        leanest = min(one["peak_mib"] for one in slower(result, FASTEST))
        memory = f"{ours['peak_mib']:,.0f} | {leanest:,.0f}"
        for whom, times in result["asked"] or ((FASTEST, 0),):
            found = ours[rate] / max(one[rate] for one in slower(result, whom))
            lines.append(f"| {result['case']} | {whom} | {f'{times:g}x' if times else ''} | {found:.1f}x | {memory} |")
    return [*lines, ""]


def table(result: dict[str, Any]) -> list[str]:
    shape = f"{result['members']} x " if result["members"] > 1 else ""
    sparsity = f"L1 {result['l1']:g}" if result["kind"] == "relu" else f"k {result['k']}"
    head = (
        f"{shape}{result['kind']}, d_in {result['d_in']}, d_sae {result['d_sae']}, batch {result['batch']}, {sparsity}"
    )
    lines, ours = [f"## {result['case']}: {head}", ""], ours_of(result)
    lines += ["| | tokens/s | over the run | ours is | over the run | peak MiB | FVU | L0 |", "|" + "---|" * 8]
    for one in result["contenders"]:
        times = ["", ""]
        if ours and one is not ours:
            times = [f"{ours[rate] / one[rate]:.2f}x" for rate in ("tokens_per_s", "run_tokens_per_s")]
        cells = [label(one), f"{one['tokens_per_s']:,.0f}", f"{one['run_tokens_per_s']:,.0f}", *times]
        cells += [f"{one['peak_mib']:,.0f}", f"{statistics.mean(one['fvu']):.4f}", f"{statistics.mean(one['l0']):.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if result["whole_turns"]:
        lines += [f"L0 after each {result['steps_per_turn']} steps:", ""]
        for one in result["contenders"]:
            counts = ", ".join(f"{count:,.0f}" for count in one["l0_by_turn"])
            lines.append(f"* {label(one)}: {counts}")
        lines.append("")
    return lines


if __name__ == "__main__":
    main()
