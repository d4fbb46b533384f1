"""nanoGPT's own train.py beside train-lm: the same loss curve step by step, and how long an update takes.

    git clone https://github.com/karpathy/nanoGPT FOLDER
    python benchmarks/rivals/nanogpt.py FOLDER                the curves; leaves the record that the tests use
    python benchmarks/rivals/nanogpt.py FOLDER --speed        seconds per update on the published recipe

The curves: our initial weights go to nanoGPT as a checkpoint that its train.py resumes, unmodified and in its own
process; which windows it draws and what it loses on them is written down, and our trainer is fed the same windows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch
from torch import Tensor

from sparse_coding.formats.nanogpt import write_checkpoint
from sparse_coding.language_models.config_file import TrainConfig
from sparse_coding.language_models.gpt import build
from sparse_coding.language_models.trainer import Trainer

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "tests" / "language_models" / "nanogpt_curves.json"
RESULTS = ROOT / "benchmarks" / "results"
UPDATES, VOCAB = 200, 64
SHAPE = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "dropout": 0.0}
TRAINING = {
    "batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_iters": UPDATES,
    "lr_decay_iters": 180,  # the last updates are made at min_lr
    "warmup_iters": 20,
    "learning_rate": 3e-3,
    "min_lr": 3e-4,
    "grad_clip": 0.5,  # it clips most updates
    "eval_interval": 10_000,
    "eval_iters": 1,
}
# run in nanoGPT's folder: what `get_batch` draws while training, and the loss of every forward pass
LISTENER = """
import json, runpy, sys, torch
starts, losses, randint, cross_entropy = [], [], torch.randint, torch.nn.functional.cross_entropy
def drawn(*args, **kwargs):
    found = randint(*args, **kwargs)
    if torch.is_grad_enabled():  # an evaluation draws too
        starts.append(found.tolist())
    return found
def lost(*args, **kwargs):
    found = cross_entropy(*args, **kwargs)
    if torch.is_grad_enabled():
        losses.append(found.item())
    return found
torch.randint, torch.nn.functional.cross_entropy = drawn, lost
runpy.run_path("train.py", run_name="__main__")
json.dump({"starts": starts, "losses": losses}, open("heard.json", "w"))
"""


def tokens() -> np.ndarray:
    """Three thousand tokens, each mostly a function of the one before."""
    generator, found = np.random.default_rng(0), [1]
    while len(found) < 3000:
        usual = (3 * found[-1] + 7) % VOCAB
        found.append(int(usual if generator.random() < 0.8 else generator.integers(VOCAB)))
    return np.array(found, np.uint16)


def settings(bias: bool) -> TrainConfig:
    return TrainConfig(**SHAPE, **TRAINING, bias=bias, device="cpu", dtype="float32")  # type: ignore[arg-type]


class Fed(Trainer):
    """A trainer that is given the places of its windows instead of drawing them."""

    def feed(self, starts: list[list[int]]) -> Fed:
        self.starts = starts
        return self

    def windows(self, iteration: int) -> Tensor:
        count, width = self.config.gradient_accumulation_steps, self.config.block_size + 1
        places = np.array(self.starts[iteration * count : (iteration + 1) * count]).reshape(-1, 1)
        return torch.from_numpy(self.tokens[places + np.arange(width)].astype(np.int64))


def our_curve(bias: bool, starts: list[list[int]]) -> list[float]:
    """The losses of `UPDATES` updates on the windows that begin at `starts`, one list for each forward pass."""
    config = settings(bias)
    trainer = Fed(config, build(config, VOCAB), tokens(), tokens(), torch.device("cpu"), torch.float32).feed(starts)
    return [trainer.update(iteration)[0].item() for iteration in range(UPDATES)]


def nanogpt_curve(nanogpt: Path, bias: bool) -> tuple[list[list[int]], list[float]]:
    """What nanoGPT draws and loses from our initial weights on."""
    config = settings(bias)
    with tempfile.TemporaryDirectory() as name:
        folder = checkout(nanogpt, Path(name), tokens())
        write_checkpoint(folder / "out" / "ckpt.pt", build(config, VOCAB), bias=bias, iter_num=0, best_val_loss=1e9)
        flags = {**SHAPE, **TRAINING, "max_iters": UPDATES - 1, "bias": bias}  # it makes one update more
        run(folder, ["-c", LISTENER], flags | {"init_from": "resume", "dtype": "float32"})
        heard = json.loads((folder / "heard.json").read_text())
    passes = config.gradient_accumulation_steps
    losses = np.array(heard["losses"]).reshape(UPDATES, passes).mean(1).tolist()
    return heard["starts"][: UPDATES * passes], losses


def checkout(nanogpt: Path, folder: Path, train: np.ndarray) -> Path:
    """nanoGPT's files with a data set of these tokens, where its train.py looks for it."""
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(nanogpt / name, folder / name)
    (folder / "data" / "rival").mkdir(parents=True)
    (folder / "out").mkdir()
    for name in ("train.bin", "val.bin"):
        train.tofile(folder / "data" / "rival" / name)
    return folder


def run(folder: Path, program: list[str], flags: dict[str, Any]) -> str:
    flags = {"dataset": "rival", "device": "cpu", "compile": False, **flags}
    words = [f"--{key}={value}" for key, value in flags.items()]
    done = subprocess.run([sys.executable, *program, *words], cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"nanoGPT failed:\n{done.stderr}")
    return done.stdout


def compare_curves(nanogpt: Path) -> None:
    record = {}
    for bias in (False, True):
        starts, theirs = nanogpt_curve(nanogpt, bias)
        ours = our_curve(bias, starts)
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        print(f"bias={bias}: {theirs[0]:.4f} -> {theirs[-1]:.4f} in {UPDATES} updates, at most {apart:.1e} apart")
        record[str(bias)] = {"starts": starts, "losses": theirs}
    RECORD.write_text(json.dumps(record) + "\n")


# ---- speed

SPEED = {"n_layer": 6, "n_head": 8, "n_embd": 16, "block_size": 256, "bias": False, "batch_size": 64}
SPEED |= {"gradient_accumulation_steps": 1}
WHOLE_VOCAB = 50304


def their_times(nanogpt: Path, train: np.ndarray, dropout: float, compiled: bool, updates: int) -> list[float]:
    """Seconds per update as nanoGPT's train.py prints them, without the first, which evaluates (and compiles)."""
    with tempfile.TemporaryDirectory() as name:
        folder = checkout(nanogpt, Path(name), train)
        more = {"max_iters": updates, "eval_iters": 1, "dropout": dropout, "compile": compiled, "log_interval": 1}
        said = run(folder, ["train.py"], SPEED | more)
    return [float(time) / 1000 for time in re.findall(r"iter \d+: .* time ([\d.]+)ms", said)][1:]


def our_times(dropout: float, dtype: str, updates: int) -> list[float]:
    """Seconds per update of our trainer, in a process of its own, without the first."""
    words = [sys.executable, __file__, "-", "--step", dtype, str(dropout), str(updates)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def step(dtype: str, dropout: float, updates: int) -> None:
    config = TrainConfig(**SPEED, dropout=dropout, device="cpu", dtype=dtype)  # type: ignore[arg-type]
    train = noise()
    trainer = Trainer(config, build(config, WHOLE_VOCAB), train, train, torch.device("cpu"), getattr(torch, dtype))
    times = []
    for iteration in range(updates + 1):
        begun = time.perf_counter()
        trainer.update(iteration)[0].item()
        times.append(time.perf_counter() - begun)
    print(json.dumps(times[1:]))


def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint16)


def compare_speed(nanogpt: Path, rounds: int = 3, updates: int = 2) -> None:
    """Interleaved rounds, medians; writes benchmarks/results/nanogpt_speed.{md,json}."""
    times: dict[str, dict[str, list[float]]] = {}
    for _ in range(rounds):
        for dropout in (0.2, 0.0):
            found = times.setdefault(f"dropout {dropout}", {})
            for name, measured in {
                "nanoGPT": lambda dropout=dropout: their_times(nanogpt, noise(), dropout, False, updates),
                "nanoGPT, compiled": lambda dropout=dropout: their_times(nanogpt, noise(), dropout, True, updates),
                "ours, float32": lambda dropout=dropout: our_times(dropout, "float32", updates),
                "ours, bfloat16": lambda dropout=dropout: our_times(dropout, "bfloat16", updates),
            }.items():
                found.setdefault(name, []).extend(measured())
    medians = {
        case: {name: statistics.median(values) for name, values in found.items()} for case, found in times.items()
    }
    today, threads = datetime.date.today().isoformat(), torch.get_num_threads()
    lines = [
        "Seconds per update of supertiny (6 layers, 16 wide, 8 heads, 50,304 tokens), batch 64 x 256.",
        "",
        f"`python benchmarks/rivals/nanogpt.py FOLDER --speed`, {today}, torch {torch.__version__}, {threads} CPU "
        f"threads, medians of {rounds * updates} updates in {rounds} interleaved rounds, each side in its own process.",
        "",
        "| dropout | side | seconds | tokens/s | nanoGPT's time / this |",
        "|---|---|---|---|---|",
    ]
    for case, found in medians.items():
        for name, seconds in found.items():
            ratio = found["nanoGPT"] / seconds
            lines.append(f"| {case[8:]} | {name} | {seconds:.2f} | {64 * 256 / seconds:,.0f} | {ratio:.2f} |")
    print("\n".join(lines))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "nanogpt_speed.md").write_text("\n".join(lines) + "\n")
    facts = {"date": today, "torch": torch.__version__, "threads": threads, "seconds": times}
    (RESULTS / "nanogpt_speed.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--speed", action="store_true", help="time updates instead of comparing curves")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)  # one side of --speed, in its own process
    asked = parser.parse_args()
    if asked.step:
        step(asked.step[0], float(asked.step[1]), int(asked.step[2]))
    elif asked.speed:
        compare_speed(asked.nanogpt)
    else:
        compare_curves(asked.nanogpt)


if __name__ == "__main__":
    main()
