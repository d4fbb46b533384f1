"""What reading a batch costs beside the step that trains on it: the toy generator and the shuffled activations.

    python benchmarks/stream_share.py [--threads 2] [--repeats 7]

It writes benchmarks/results/stream_share.md. A batch and a step take turns; medians. The step is `Stack.step` of the
dictionaries named; a batch of activations is `ActivationStream.batch` without the time in the language model, over
blocks of --buffer-rows rows (131,072), with all that it does for the order of a block.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import torch
from torch import Tensor

from sparse_coding.activations.models import bundled_models, load_model
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.text import TextSettings
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.activations.tokens import contexts
from sparse_coding.provenance import provenance
from sparse_coding.synthetic import World, WorldStream, preset
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.stream import TensorStream
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
L1 = [10 ** (e / 4) for e in range(-8, 9)]
TOKENS = 400_000


def toy() -> Iterator[tuple[str, Callable[[int], float], Tensor, list[Member]]]:
    """(what, seconds of batch number i, rows to train on, members)."""
    world = World(preset("hoagy-2023-07"))
    stream = WorldStream(world, 256)
    for ratio in (0.5, 2, 8):
        members = grid("relu", {"synthetic": 256}, [ratio], varied={"l1_coefficient": L1}, l1_scaling="toy-2023")
        what = f"the world of 2023, batch 256: 17 ReLU of {members[0].settings.d_sae:,} latents"
        yield what, lambda step: seconds(lambda: stream.batch(step)), stream.batch(0)["synthetic"], members


def activations() -> Iterator[tuple[str, Callable[[int], float], Tensor, list[Member]]]:
    folder = bundled_models()["python-gpt-large"]
    model, tokenizer = load_model("python-gpt-large"), load_tokenizer(folder)
    text = contexts(TextSettings("python-docs"), tokenizer, context=128, max_tokens=TOKENS, progress=False)
    for site, ratio, kind in (
        ("blocks.2.hook_resid_post", 2, "topk"),
        ("blocks.2.hook_resid_post", 8, "topk"),
        ("blocks.2.mlp.hook_post", 2, "relu"),
        ("blocks.2.mlp.hook_post", 8, "topk"),
    ):
        stream = ActivationStream(model, text, [site], batch_size=512)
        width = stream.widths[site]
        varied: dict[str, Any] = {"k": [32]} if kind == "topk" else {"l1_coefficient": [1.0]}
        members = grid(kind, {"synthetic": width}, [ratio], varied=varied)

        def read(step: int, stream: ActivationStream = stream) -> float:
            before = stream.seconds_capturing
            taken = seconds(lambda: stream.batch(step))
            return taken - (stream.seconds_capturing - before)

        what = f"activations of width {width}, batch 512: one {kind} of {members[0].settings.d_sae:,} latents"
        yield what, read, stream.batch(0)[site], members


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7, help="turns of 64 batches and 8 steps")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    known = provenance()
    lines = [
        "What reading a batch costs beside the step that trains on it.", "",
        f"`python benchmarks/stream_share.py --threads {flags.threads}`, {known['date'][:10]}, "
        f"torch {known['versions']['torch']}; medians of {flags.repeats} turns.", "",
        "| | batch, ms | step, ms | share |", "|---|---|---|---|",
    ]  # fmt: skip
    for part in (toy, activations):
        for what, read, x, members in part():
            trainer = Trainer(members, TensorStream({"synthetic": x}, len(x)), TrainingSettings(10**6))
            batch = {"synthetic": x}
            for _ in range(20):
                trainer.update(batch, 1.0)
            reads, steps, number = [], [], 0
            for _ in range(flags.repeats):
                reads.append(sum(read(number + i) for i in range(64)) / 64)
                number += 64
                steps.append(seconds(lambda t=trainer, b=batch: [t.update(b, 1.0) for _ in range(8)]) / 8)
            ours, step = 1e3 * statistics.median(reads), 1e3 * statistics.median(steps)
            lines.append(f"| {what} | {ours:.3f} | {step:.2f} | {ours / (ours + step):.1%} |")
            print(lines[-1], flush=True)
    (RESULTS / "stream_share.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
