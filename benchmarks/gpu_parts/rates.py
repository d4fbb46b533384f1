"""What the pieces of a step run at, and the two ceilings that limits are made of: bytes and products a second."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_parts.measure import Meter, Sizes

BF16 = torch.bfloat16


def measure(meter: Meter, sizes: Sizes) -> None:
    copies(meter, sizes)
    products(meter, sizes)
    fp8(meter, sizes)
    top_k(meter, sizes)
    gather(meter, sizes)
    adam(meter, sizes)
    graph_node(meter)


def copies(meter: Meter, sizes: Sizes) -> None:
    source = torch.randint(-9, 9, (sizes.copied_bytes,), dtype=torch.int8, device=meter.device)
    target = torch.empty_like(source)
    meter.rates["copy"] = 2 * len(source) / meter.seconds(lambda: target.copy_(source), 1.0)
    meter.add("device copy, read and written", meter.rates["copy"], "B/s")


def products(meter: Meter, sizes: Sizes) -> None:
    n = sizes.square
    meter.rates["square"] = _product(meter, n, n, n)
    meter.add(f"bf16 product {n:,}^3", meter.rates["square"], "FLOP/s")
    for batch in sizes.batches:
        rate = _product(meter, batch, sizes.d_in, sizes.d_sae)
        meter.rates[f"encode {batch}"] = rate
        what = f"bf16 encode product {batch:,} x {sizes.d_in} x {sizes.d_sae:,}"
        meter.add(what, rate, "FLOP/s", meter.rates["square"])


def _product(meter: Meter, rows: int, inner: int, columns: int) -> float:
    a, b = (torch.randn(shape, device=meter.device, dtype=BF16) for shape in ((rows, inner), (inner, columns)))
    out = torch.empty(rows, columns, device=meter.device, dtype=BF16)
    return 2 * rows * inner * columns / meter.seconds(lambda: torch.mm(a, b, out=out), 1.0)


def fp8(meter: Meter, sizes: Sizes) -> None:
    what, rows = "fp8 encode product (torch._scaled_mm)", sizes.batches[0]
    if not meter.cuda:
        meter.add(what, None, note="a GPU's")
        return
    with meter.attempt(what):
        kind, one = torch.float8_e4m3fn, torch.ones((), device=meter.device)
        a = torch.randn(rows, sizes.d_in, device=meter.device).to(kind)
        b = torch.randn(sizes.d_sae, sizes.d_in, device=meter.device).to(kind)

        def call() -> Tensor:
            return torch._scaled_mm(a, b.mT, scale_a=one, scale_b=one, out_dtype=BF16)

        rate = 2 * rows * sizes.d_in * sizes.d_sae / meter.seconds(call, 1.0)
        meter.add(what, rate, "FLOP/s", 2 * meter.rates["square"])


def top_k(meter: Meter, sizes: Sizes) -> None:
    for dtype in (torch.float32, BF16):
        rows = sizes.batches[0]
        scores = torch.randn(rows, sizes.d_sae, device=meter.device).to(dtype)
        seconds = meter.seconds(lambda scores=scores: scores.topk(sizes.k, dim=-1), 1.0)
        read = scores.numel() * scores.element_size()
        what = f"torch.topk {sizes.k} of [{rows:,} {sizes.d_sae:,}] {str(dtype).removeprefix('torch.')}"
        meter.add(what, seconds * 1e3, "ms", read / (meter.rates["copy"] / 2) * 1e3)


def gather(meter: Meter, sizes: Sizes) -> None:
    for name, height in (("atoms, which the L2 cache holds", sizes.d_sae), ("rows of a ring in memory", sizes.rows)):
        table = torch.randn(height, sizes.d_in, device=meter.device, dtype=BF16)
        count = sizes.batches[0] * sizes.k
        index = torch.randint(height, (count,), device=meter.device)
        out = torch.empty(count, sizes.d_in, device=meter.device, dtype=BF16)
        seconds = meter.seconds(lambda t=table, i=index, o=out: torch.index_select(t, 0, i, out=o), 1.0)
        size = 2 * sizes.d_in * count
        what = f"{count:,} rows of {2 * sizes.d_in} bytes: {name}"
        meter.add(what, 2 * size / seconds, "B/s", meter.rates["copy"], note="read and written")


def adam(meter: Meter, sizes: Sizes) -> None:
    shape = 2 * sizes.d_in * sizes.d_sae
    values = [torch.randn(shape, device=meter.device) for _ in range(2)]
    parameter = torch.nn.Parameter(values[0])
    parameter.grad = values[1]
    optimizer = torch.optim.Adam([parameter], fused=True)
    seconds = meter.seconds(optimizer.step, 1.0)
    meter.add(f"torch's fused Adam, {shape:,} parameters", 28 * shape / seconds, "B/s", meter.rates["copy"])


def graph_node(meter: Meter) -> None:
    nodes, x = 200, torch.zeros(32, device=meter.device)

    def launches() -> None:
        for _ in range(nodes):
            x.add_(1.0)

    meter.add("one small kernel, launched by torch", meter.seconds(launches, 0.5) / nodes * 1e6, "us")
    if meter.cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        meter.add("one small kernel, a node of a CUDA graph", meter.seconds(graph.replay, 0.5) / nodes * 1e6, "us")
