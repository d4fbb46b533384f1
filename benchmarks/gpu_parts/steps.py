"""Whole steps on rows that lie in the device's memory: ours, kernel by kernel and as one CUDA graph, and the peers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts.measure import Meter, Sizes
from benchmarks.rivals import gpu_peers
from sparse_coding.kernels.picked import picked
from sparse_coding.training.settings import TrainingSettings
from sparse_coding.training.sweep import Member, grid
from sparse_coding.training.trainer import Trainer

ADAM_BYTES = 26
"""Read and written for each parameter, where Adam follows the gradient in the same kernel and leaves a bf16 copy."""
ACTIVE = 24


@dataclass(frozen=True)
class Case:
    """Members of one shape on one stream."""

    name: str
    kind: str
    d_in: int
    d_sae: int
    batch: int
    varied: dict[str, list[Any]]
    products: int = 1
    """Dense products of a step of the least work: the encoder's, or all five."""
    aim: float | None = None
    fixed: tuple[tuple[str, Any], ...] = ()
    """Settings of all members."""

    @property
    def members(self) -> int:
        return len(next(iter(self.varied.values())))

    def grid(self) -> list[Member]:
        return grid(
            self.kind, {"synthetic": self.d_in}, [self.d_sae / self.d_in], varied=self.varied, **dict(self.fixed)
        )

    def limit(self, meter: Meter) -> float:
        """Tokens a second where nothing but the products and Adam's reads and writes takes time."""
        size = self.d_in * self.d_sae * self.members
        rate = meter.rates.get(f"encode {self.batch}", meter.rates["square"])
        products = 2 * self.products * self.batch * size / rate
        return self.batch / (products + ADAM_BYTES * 2 * size / meter.rates["copy"])


def cases(sizes: Sizes) -> list[Case]:
    small, large = sizes.batches
    d_in, d_sae, k, count = sizes.d_in, sizes.d_sae, sizes.k, sizes.members
    ratio, l1 = sizes.small_d_in, [0.5 * 2 ** (i / 4) for i in range(count)]
    ks, plain = [k + i for i in range(count)], (("dead_latents", "none"),)
    return [
        Case(f"topk 32x, batch {small:,}", "topk", d_in, d_sae, small, {"k": [k]}, aim=5e6, fixed=plain),
        Case(f"topk 32x, batch {large:,}", "topk", d_in, d_sae, large, {"k": [k]}, aim=8e6, fixed=plain),
        Case(f"relu 32x, dense, batch {small:,}", "relu", d_in, d_sae, small, {"l1_coefficient": [1.0]}, 5),
        Case(f"topk 32x with AuxK, batch {small:,}", "topk", d_in, d_sae, small, {"k": [k]}),
        Case(f"{count} x topk 32x, batch {small:,}", "topk", d_in, d_sae, small, {"k": ks}, fixed=plain),
        Case(f"{count} x relu {ratio} to {sizes.small_d_sae:,}, batch {sizes.small_batch:,}", "relu", ratio,
             sizes.small_d_sae, sizes.small_batch, {"l1_coefficient": l1}, 5),
    ]  # fmt: skip


class Rows:
    """A stream of rows in the device's memory, picked by index as from a ring of activations."""

    def __init__(self, d_in: int, d_sae: int, batch: int, n_rows: int, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        features = torch.randn(d_sae, d_in, generator=generator, device=device)
        features /= features.norm(dim=1, keepdim=True)
        often = torch.arange(1, d_sae + 1, device=device).float().rsqrt()
        parts = []
        for start in range(0, n_rows, 4_096):
            rows = min(4_096, n_rows - start)
            which = torch.multinomial(often.expand(rows, -1), min(ACTIVE, d_sae // 4), generator=generator)
            values = torch.rand(which.shape, generator=generator, device=device) + 0.2
            codes = torch.zeros(rows, d_sae, device=device).scatter_(1, which, values)
            noise = torch.randn(rows, d_in, generator=generator, device=device)
            parts.append((codes @ features + 0.02 * noise).bfloat16())
        self.rows = torch.cat(parts)
        self.rows *= d_in**0.5 / self.rows.float().norm(dim=1).mean()
        self.order = torch.randperm(n_rows, generator=generator, device=device)
        self.batch_size, self.widths = batch, {"synthetic": d_in}

    def batch(self, step: int) -> dict[str, Tensor]:
        start = step * self.batch_size % (len(self.order) // self.batch_size * self.batch_size)
        return {"synthetic": picked(self.rows, self.order[start : start + self.batch_size], torch.float32)}


@lru_cache(maxsize=1)
def rows_of(d_in: int, d_sae: int, batch: int, n_rows: int, device: torch.device) -> Rows:
    """The same for ours and the peers of a case."""
    return Rows(d_in, d_sae, batch, max(n_rows, 4 * batch), device)


def measure(meter: Meter, sizes: Sizes) -> None:
    same_bits(meter, sizes)
    chosen = cases(sizes)
    for case in chosen:
        with meter.attempt(case.name):
            if meter.has_time(case.name, 5.0 if meter.cuda else 0.2):
                ours(meter, case, sizes, both=case is chosen[0])
    with meter.attempt("profile"):
        profile(meter, chosen[0], sizes)
    for case in (chosen[0], chosen[2]):
        peers(meter, case, sizes)
    for package in gpu_peers.PACKAGES:
        if not gpu_peers.installed(package):
            meter.add(package, None, note="not installed here")
    rows_of.cache_clear()


def trainer(meter: Meter, case: Case, rows: Rows, recorded: bool = True) -> Trainer:
    made = Trainer(case.grid(), rows, TrainingSettings(10**6), str(meter.device))
    made.graphs.refused = not recorded
    return made


def same_bits(meter: Meter, sizes: Sizes) -> None:
    """Whether replayed updates give what the same updates give when they are launched kernel by kernel."""
    what = "states that differ after 20 updates, graph against none"
    if not meter.cuda:
        meter.add(what, None, note="a GPU's")
        return
    with meter.attempt(what):
        case = Case("", "topk", sizes.small_d_in, sizes.small_d_sae, sizes.small_batch, {"k": [8, 16]})
        rows = Rows(case.d_in, case.d_sae, case.batch, 8 * case.batch, meter.device)
        states = []
        for recorded in (True, False):
            made = trainer(meter, case, rows, recorded)
            for _ in range(20):
                made.advance()
            states.append(made._tensors())
        differ = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
        meter.add(what, len(differ), "tensors", 0, note=", ".join(differ[:4]))


def ours(meter: Meter, case: Case, sizes: Sizes, both: bool) -> None:
    """As one graph, and where `both` kernel by kernel too."""
    rows = rows_of(case.d_in, case.d_sae, case.batch, sizes.rows, meter.device)
    limit = case.limit(meter)
    for recorded in ((False, True) if both else (True,)) if meter.cuda else (False,):
        made = trainer(meter, case, rows, recorded)
        for _ in range(0 if meter.quick else 30):  # beyond the rows after which a latent can be dead
            made.advance()
        if meter.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = meter.seconds(made.advance, 1.5)
        what = f"{case.name}: {'one graph' if recorded else 'kernel by kernel'}"
        note = f"{1e3 * seconds:.3f} ms a step"
        if not case.fixed and case.kind == "topk":
            note += f", {int(made.stacks[0].clocks.dead().sum()):,} latents dead"
        if meter.cuda:
            note += f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB, {meter.waits(made.advance):g} waits a step"
        if recorded and made.graphs.refused:
            note += ", NOT RECORDED"
        meter.add(what, case.batch / seconds, "tokens/s", limit, case.aim if recorded else None, note)
        meter.rates[case.name] = max(meter.rates.get(case.name, 0.0), case.batch / seconds)
        del made


def profile(meter: Meter, case: Case, sizes: Sizes) -> None:
    """Where the device's time goes in a step, kernel by kernel: gpu_profile.txt beside the results."""
    if not meter.cuda or meter.out is None:
        return
    rows = rows_of(case.d_in, case.d_sae, case.batch, sizes.rows, meter.device)
    made = trainer(meter, case, rows, recorded=False)
    for _ in range(3):
        made.advance()
    meter.wait()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as taken:
        for _ in range(10):
            made.advance()
        meter.wait()
    table = taken.key_averages().table(sort_by="self_device_time_total", row_limit=40, max_name_column_width=60)
    (meter.out / "gpu_profile.txt").write_text(f"10 steps of {case.name}\n{table}\n", encoding="utf-8")
    meter.add("profile of 10 steps", 10, "steps", note="gpu_profile.txt")


def peers(meter: Meter, case: Case, sizes: Sizes) -> None:
    for label, package, make in gpu_peers.contenders(case.kind):
        what = f"{case.name}: {label}"
        if not gpu_peers.installed(package):
            continue
        with meter.attempt(what):
            if meter.has_time(what, 6.0 if meter.cuda else 0.2):
                peer(meter, case, sizes, what, make)
        torch.set_float32_matmul_precision("highest")  # which sparsify changes for the whole process


def peer(meter: Meter, case: Case, sizes: Sizes, what: str, make: Callable[..., Callable[[int, Tensor], None]]) -> None:
    rows = rows_of(case.d_in, case.d_sae, case.batch, sizes.rows, meter.device)
    update, step = make(case.kind, case.d_in, case.d_sae, case.batch, sizes.k, str(meter.device)), iter(range(10**9))

    def advance() -> None:
        number = next(step)
        update(number, rows.batch(number)["synthetic"])

    seconds = meter.seconds(advance, 1.5)
    waits = meter.waits(advance)
    note = f"{1e3 * seconds:.3f} ms a step" + ("" if waits is None else f", {waits:g} waits a step")
    mine = meter.rates.get(case.name)
    if mine:
        note += f"; ours is {mine * seconds / case.batch:.1f}x"
    meter.add(what, case.batch / seconds, "tokens/s", note=note)
