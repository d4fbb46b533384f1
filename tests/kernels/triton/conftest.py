"""Triton kernels in Triton's interpreter on the CPU; compiled where there is a GPU. Skipped where Triton is missing."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch

GPU = torch.cuda.is_available()


def prepare() -> str | None:
    """Have Triton imported as it has to be here; why it is not, if so."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if GPU:
        return None
    if "triton" in sys.modules:
        return "Triton was imported without its interpreter: see test_triton_apart.py"
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # each decorator looks at it, so it matters at import alone
    try:
        import triton.experimental.gluon  # the first launch would import it
        import triton.runtime.interpreter

        import sparse_coding.kernels.triton.dense
        import sparse_coding.kernels.triton.step  # noqa: F401
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
    patch_once(triton.runtime.interpreter)
    as_on_a_gpu(triton.runtime.interpreter)
    return None


def patch_once(interpreter: Any) -> None:
    """The interpreter patches triton.language again at every call of a function; once a launch does, 5 times faster."""
    patch, call, done = interpreter._patch_lang, interpreter.GridExecutor.__call__, set()

    def once(function: Any) -> Any:
        known = id(function.__globals__)
        if known not in done:
            done.add(known)
            return patch(function)

    def launch(*arguments: Any, **named: Any) -> Any:
        done.clear()
        return call(*arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch


def as_on_a_gpu(interpreter: Any) -> None:
    """bf16 as hardware has it: the interpreter cuts digits off where that rounds, and multiplies bits as integers."""
    from triton.language import bfloat16, float32

    builder = interpreter.InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar == float32 and target.scalar == bfloat16:
            bits = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
            return interpreter.TensorHandle(bits, bfloat16)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == bfloat16:
            a, b = (self.cast_impl(one, float32) for one in (a, b))
        return dot(self, a, b, *others)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl


REASON = prepare()


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are taken by Triton, whatever the device."""
    if REASON:
        pytest.skip(REASON)
    from sparse_coding.kernels import triton

    monkeypatch.setattr(triton, "serves", lambda x: True)


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
