"""Compile every kernel for a Hopper card, without one: prints the names. Run by test_compiles.py, uninterpreted.

Launches compile and do nothing else, so what the steps give is meaningless; types and shapes are those of real ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3]))

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sparse_coding.dictionaries.base import Moment
from sparse_coding.kernels import triton
from sparse_coding.kernels.picked import picked
from sparse_coding.kernels.spread import spread
from sparse_coding.kernels.triton import encode
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.stack import Stack
from sparse_coding.training.sweep import grid

D_IN, RATIO, ROWS, SITE = 768, 3, 16, "synthetic"
METHODS: dict[str, dict[str, Any]] = {
    "topk": {"varied": {"k": [32, 48]}},
    "matryoshka": {"varied": {"k": [32]}, "dead_latents": "none"},
    "jumprelu": {"varied": {"l0_coefficient": [1.0]}},
    "relu-april": {"varied": {"l1_coefficient": [1.0]}},
    "gated": {"varied": {"l1_coefficient": [1.0]}},
}


class Card:
    """What Triton asks of a driver while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(Card())  # type: ignore[arg-type]
    run, names = JITFunction.run, set()

    def compile_(self: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        names.add(f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}")
        return run(self, *arguments, grid=grid, warmup=True, **more)

    JITFunction.run = compile_  # type: ignore[method-assign]
    triton.serves = lambda x: True  # type: ignore[assignment]
    for name, settings in METHODS.items():
        members = grid(name, {SITE: D_IN}, [RATIO], **settings)
        stack = Stack(members, OptimizerSettings(), "cpu", torch.bfloat16, DeadSettings(window=ROWS))
        stack.dictionary.density = 0.0
        for step in range(2):
            stack.step({SITE: torch.randn(ROWS, D_IN)}, 1.0, Moment(step, 2))
    encode.in_tiles = lambda *_: True
    for kept in (torch.bfloat16, torch.float32):
        weights = triton.latents_together(torch.randn(1, D_IN, D_IN * RATIO).bfloat16())
        inputs, bias = torch.randn(1, ROWS, D_IN).bfloat16(), torch.zeros(1, D_IN * RATIO)
        encode.encode(inputs, weights, bias, None, False, kept)
    spread(torch.randn(ROWS, D_IN))
    picked(torch.randn(ROWS, D_IN).bfloat16(), torch.arange(ROWS), torch.float32)
    print(*sorted(names))


if __name__ == "__main__":
    main()
