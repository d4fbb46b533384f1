"""How fast rows come out of stores, beside plain reads, SAELens's reader and raw range requests; and what int8 costs.

    python benchmarks/stores.py --rival-python PATH     about five minutes; writes benchmarks/results/stores.*

Everything on the local disk is read with a warm page cache: a first pass is made and not counted. What is compared
takes turns of a fraction of a second, and medians over the turns are shown, so a busy machine slows all sides; but a
stream reads in threads beside the one that serves, and a plain read needs one core alone. Processor time per gigabyte
is shown for that reason.

Plain reads are of three kinds: into memory for all of the files that is there already, which is what a stream is
measured against; into new memory, whose pages come zeroed; and through one small buffer, which never leave the cache.
A stream checks the sums of all rows the first time it reads them; "first pass" shows that, the other lines later ones.
It reads ahead, so its speed is that of the bytes it read from the files within a turn, not of the batches that
were served, and no other side has its turn before its threads are idle.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from sparse_coding.activations.models import bundled_models, load_model
from sparse_coding.activations.stream import ActivationStream
from sparse_coding.activations.text import Part, TextSettings
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.activations.tokens import contexts
from sparse_coding.metrics.reconstruction import Reconstruction
from sparse_coding.provenance import provenance
from sparse_coding.stores.codec import Codec
from sparse_coding.stores.store import Source, Store, StoreWriter
from sparse_coding.stores.stream import StoreStream
from sparse_coding.training.allocator import keep_freed_memory
from sparse_coding.training.sweep import grid
from sparse_coding.training.trainer import Trainer, TrainingSettings

WIDTH, BATCH = 768, 4096
RESULTS = Path(__file__).parent / "results"
RIVAL = Path(__file__).parent / "rivals" / "rival_activation_cache.py"
S3RVER = "s3rver@3.7.1"
MODEL, SITE = "python-gpt", "blocks.2.hook_resid_post"

Turn = Callable[[], tuple[float, float, float, float]]
"""One turn of a side: rows, bytes of the store that they are, seconds, processor seconds of this process."""


def write(url: str | Path, rows: int, codec: Codec) -> Store:
    generator = torch.Generator().manual_seed(0)
    with StoreWriter(url, {"site": WIDTH}, Source("noise"), codec=codec) as writer:
        for start in range(0, rows, 32_768):
            writer.append({"site": torch.randn(min(32_768, rows - start), WIDTH, generator=generator)})
        writer.finish()
    return Store.open(url)


def turns_of(sides: dict[str, Turn], turns: int) -> dict[str, dict[str, float]]:
    """Each side in turn, the first time uncounted; medians."""
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sides}
    for turn in range(turns + 1):
        for name, side in sides.items():
            rows, size, seconds, cpu = side()
            if turn:
                found[name].append((rows / seconds, size / seconds / 1e9, cpu / size * 1e9))
    result = {}
    for name, values in found.items():
        rows, speed, cpu = (list(one) for one in zip(*values, strict=True))
        result[name] = {"rows_per_s": median(rows), "GB_per_s": median(speed), "best_GB_per_s": max(speed),
                        "cpu_s_per_GB": median(cpu)}  # fmt: skip
        print(f"  {name:<44} {median(rows):>12,.0f} rows/s {median(speed):6.2f} GB/s", flush=True)
    return result


def plain(store: Store, folder: Path, into: str) -> Turn:
    """Every file from its beginning to its end, in their order.

    into: "memory" for all of them that is there already; "new memory" for each file, as `Path.read_bytes()` takes it;
    or "a small buffer" of 1 MiB, the same for every read.
    """
    files = [folder / store.manifest.file_name("site", shard) for shard in range(len(store.shard_rows))]
    sizes = [file.stat().st_size for file in files]
    n_bytes = {"memory": sum(sizes), "new memory": 1, "a small buffer": 2**20}[into]
    buffer = memoryview(np.ones(n_bytes, np.uint8)).cast("B")  # type: ignore[arg-type]

    def turn() -> tuple[float, float, float, float]:
        began, cpu, done = time.perf_counter(), time.process_time(), 0
        for file, size in zip(files, sizes, strict=True):
            with file.open("rb", buffering=0) as opened:
                if into == "memory":
                    assert opened.readinto(buffer[done : done + size]) == size
                elif into == "new memory":
                    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as new:
                        assert opened.readinto(new) == size
                else:
                    while opened.readinto(buffer):
                        pass
            done += size
        return store.rows, done, time.perf_counter() - began, time.process_time() - cpu

    return turn


def batches(stream: StoreStream, per_turn: int, first: bool = False) -> Turn:
    """Shuffled batches, turn after turn where the last one ended. first: as if no row had been checked before."""
    position = 0
    row_bytes = WIDTH * stream.stores[0].dtype.itemsize

    def turn() -> tuple[float, float, float, float]:
        nonlocal position
        for file in stream.stores[0]._files.values() if first else ():
            file.seen[:] = False
        before, began, cpu = stream.bytes_read, time.perf_counter(), time.process_time()
        for step in range(position, position + per_turn):
            stream.batch(step)
        seconds, size = time.perf_counter() - began, stream.bytes_read - before
        cpu = time.process_time() - cpu
        position += per_turn
        for block in stream._reader._held:  # what is read ahead is nobody else's load
            block.done.wait()
        return size / row_bytes, size, seconds, cpu

    return turn


class Rival:
    """SAELens's reader in a process of its own."""

    def __init__(self, python: str, store: Path, folder: Path, shards: int):
        command = [python, str(RIVAL), str(store), str(folder), "site-0", str(shards)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = json.loads(self._line())

    def turn(self, n_batches: int = 8) -> tuple[float, float, float, float]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{n_batches}\n")
        self.process.stdin.flush()
        rows = n_batches * BATCH
        return rows, rows * WIDTH * 4, float(json.loads(self._line())), 0.0

    def close(self) -> None:
        self.process.communicate()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the rival has ended; what it said stands above")
        return line


def local(folder: Path, rows: int, turns: int, rival_python: str | None) -> dict[str, Any]:
    stores = {codec: write(folder / codec, rows, codec) for codec in ("bf16", "int8")}
    found: dict[str, Any] = {}
    for threads in (1, torch.get_num_threads()):
        if str(threads) in found:
            continue
        torch.set_num_threads(threads)
        sides: dict[str, Turn] = {}
        streams = {}
        for codec, store in stores.items():
            for into in ("memory", "new memory", "a small buffer"):
                sides[f"plain reads into {into}, {codec}"] = plain(store, folder / codec, into)
            for dtype in (torch.float32, torch.bfloat16):
                name = f"StoreStream, {codec} to {str(dtype).removeprefix('torch.')}"
                streams[name] = StoreStream(store, batch_size=BATCH, dtype=dtype)
                sides[name] = batches(streams[name], rows // BATCH)
            name = f"StoreStream, {codec} to bfloat16, first pass"
            streams[name] = StoreStream(folder / codec, batch_size=BATCH, dtype=torch.bfloat16)
            sides[name] = batches(streams[name], rows // BATCH, first=True)
        rival = Rival(rival_python, folder / "bf16", folder / f"arrow-{threads}", 2) if rival_python else None
        if rival:
            sides["SAELens, cached activations, float32"] = rival.turn
        print(f"local, {threads} torch threads", flush=True)
        found[str(threads)] = turns_of(sides, turns)
        if rival:
            rival.close()
            found["rival"] = rival.facts
        for stream in streams.values():
            stream.close()
    return found


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """A bucket's URL on a server of our own. Raises `RuntimeError` with the reason where there can be none."""
    if not shutil.which("npm") or not shutil.which("node"):
        raise RuntimeError("node and npm are not there")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder / "npm"), S3RVER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"npm cannot install {S3RVER}: {done.stderr.strip()[-200:]}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = ["-d", str(folder / "s3"), "-a", "127.0.0.1", "-p", str(port), "--configure-bucket", "bucket", "--silent"]
    server = subprocess.Popen(["node", str(folder / "npm/node_modules/.bin/s3rver"), *given], stdout=subprocess.DEVNULL)
    key = {"AWS_ACCESS_KEY_ID": "S3RVER", "AWS_SECRET_ACCESS_KEY": "S3RVER", "AWS_REGION": "us-east-1"}
    os.environ.update(key, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()


def raw_ranges(store: Store, piece: int, threads: ThreadPoolExecutor) -> Turn:
    """All bytes of the store by range requests of `piece` bytes, 8 at a time, into one buffer that is there already."""
    import obstore

    jobs, total, client = [], 0, store.objects._store  # type: ignore[attr-defined]
    for shard in range(len(store.shard_rows)):
        name = store.manifest.file_name("site", shard)
        size = store.objects.size(name)
        jobs += [(name, start, min(piece, size - start), total + start) for start in range(0, size, piece)]
        total += size
    buffer = memoryview(np.zeros(total, np.uint8)).cast("B")  # type: ignore[arg-type]

    def get(job: tuple[str, int, int, int]) -> None:
        name, start, length, place = job
        buffer[place : place + length] = memoryview(obstore.get_range(client, name, start=start, length=length))

    def turn() -> tuple[float, float, float, float]:
        began, cpu = time.perf_counter(), time.process_time()
        list(threads.map(get, jobs))
        return store.rows, total, time.perf_counter() - began, time.process_time() - cpu

    return turn


def remote(folder: Path, rows: int, turns: int) -> dict[str, Any]:
    try:
        with s3_server(folder) as url, ThreadPoolExecutor(8) as threads:
            store = write(f"{url}/run", rows, "bf16")
            sides = {f"raw GETs of {n} MiB, 8 at a time": raw_ranges(store, n * 2**20, threads) for n in (1, 8)}
            with ExitStack() as streams:
                for dtype in (torch.bfloat16, torch.float32):
                    stream = streams.enter_context(StoreStream(store, batch_size=BATCH, dtype=dtype))
                    name = f"StoreStream, 16 readers, to {str(dtype).removeprefix('torch.')}"
                    sides[name] = batches(stream, rows // BATCH)
                print("S3 (s3rver on this machine)", flush=True)
                return turns_of(sides, turns)
    except (RuntimeError, subprocess.TimeoutExpired) as reason:
        print(f"S3: left out, {reason}")
        return {"left_out": str(reason)}


def captured(part: Part, tokens: int) -> Tensor:
    """Activations of the bundled model in the order of the text."""
    model = load_model(MODEL, device="cpu", dtype="float32")
    text = contexts(
        TextSettings(), load_tokenizer(bundled_models()[MODEL]), part=part, max_tokens=tokens, progress=False
    )  # type: ignore[arg-type]
    stream = ActivationStream(model, text, [SITE], batch_size=1024, buffer_rows=8192, shuffled=False)
    return torch.cat([stream.batch(step)[SITE] for step in range(stream.n_batches)])


def quality(folder: Path, rows: int, steps: int) -> list[dict[str, Any]]:
    """The same sweep, same seeds, same order of rows, from stores that differ in their codec alone."""
    x, held_out = captured("train", rows), captured("held_out", 20_000)
    members = grid("relu", {SITE: x.shape[1]}, [8.0], varied={"l1_coefficient": [0.03, 0.1, 0.3]})
    members += grid("topk", {SITE: x.shape[1]}, [8.0], varied={"k": [8, 32]})
    found: list[dict[str, Any]] = [{"member": f"{m.architecture} {_varied(m)}"} for m in members]
    for codec in ("fp32", "bf16", "int8"):
        with StoreWriter(folder / f"quality-{codec}", {SITE: x.shape[1]}, Source(MODEL), codec=codec) as writer:
            writer.append({SITE: x})
            writer.finish()
        with StoreStream(folder / f"quality-{codec}", batch_size=512, buffer_rows=65_536) as stream:
            trainer = Trainer(members, stream, TrainingSettings(steps=steps, precision="fp32", log_every=steps))
            trainer.fit()
        for index, row in enumerate(found):
            dictionary = trainer.dictionary(index).to_inference()
            sums = Reconstruction(x.shape[1], dictionary.d_sae)
            with torch.no_grad():
                for part in held_out.split(2048):
                    codes = dictionary.encode(part)
                    sums.update(part, codes, dictionary.decode(codes))
            measured = sums.result()
            row[codec] = {"fvu": measured["fvu"], "l0": measured["l0"]}
    return found


def _varied(member: Any) -> str:
    settings = member.settings
    return f"k {settings.k}" if hasattr(settings, "k") else f"L1 {settings.l1_coefficient}"


def report(record: dict[str, Any]) -> list[str]:
    facts, rows = record["provenance"], record["rows"]
    lines = [
        "Rows out of stores: `python benchmarks/stores.py`",
        "",
        f"{facts['date'][:10]}, torch {facts['versions']['torch']}, {os.cpu_count()} cores, load average before and "
        f"after {record['load'][0]:.1f} and {record['load'][1]:.1f}; {rows:,} rows of width {WIDTH}, batches of "
        f"{BATCH}, medians of {record['turns']} turns, page cache warm. GB are of the store's files; processor seconds "
        f"are of all threads of the process. {record['note']}".rstrip(),
    ]
    for threads, found in record["local"].items():
        if threads == "rival":
            continue
        rival = found.get("SAELens, cached activations, float32")
        lines += ["", f"## Local disk, {threads} torch thread{'s' * (threads != '1')}", ""]
        lines += ["| | rows/s | GB/s | best turn, GB/s | of plain reads | times SAELens | processor s per GB |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, one in found.items():
            codec = "int8" if "int8" in name else "bf16"
            base = found[f"plain reads into memory, {codec}"]
            share = "" if name.startswith("SAELens") else f"{one['GB_per_s'] / base['GB_per_s']:.0%}"
            times = f"{one['rows_per_s'] / rival['rows_per_s']:.1f}" if rival and "Store" in name else ""
            cpu = "" if name.startswith("SAELens") else f"{one['cpu_s_per_GB']:.3f}"
            lines.append(
                f"| {name} | {one['rows_per_s']:,.0f} | {one['GB_per_s']:.2f} | {one['best_GB_per_s']:.2f} | {share} | "
                f"{times} | {cpu} |"
            )
    if rival := record["local"].get("rival"):
        lines += ["", f"SAELens {rival['sae_lens']}, {rival['threads']} thread, {rival['rows']:,} of the same rows, "
                  "as its CacheActivationsRunner writes them, in a process of its own."]  # fmt: skip
    lines += ["", "## S3 (s3rver 3.7.1 on the same machine)", ""]
    if reason := record["s3"].get("left_out"):
        lines.append(f"Left out: {reason}.")
    else:
        lines += ["| | MB/s | best turn | of raw GETs of 1 MiB | of 8 MiB |", "|---|---|---|---|---|"]
        raw = [record["s3"][f"raw GETs of {n} MiB, 8 at a time"]["GB_per_s"] for n in (1, 8)]
        for name, one in record["s3"].items():
            shares = " | ".join(f"{one['GB_per_s'] / base:.0%}" if "Store" in name else "" for base in raw)
            lines.append(f"| {name} | {1e3 * one['GB_per_s']:.0f} | {1e3 * one['best_GB_per_s']:.0f} | {shares} |")
    lines += ["", "## What the codec does to dictionaries", ""]
    lines += [f"The same sweep on {MODEL}, {SITE}, {record['quality_steps']:,} steps of 512 rows in the same order, "
              "from stores that differ in their codec alone; FVU and L0 on held-out rows in float32.", ""]  # fmt: skip
    lines += ["| member | FVU fp32 | bf16 | int8 | int8 / bf16 | L0 bf16 | int8 |", "|---|---|---|---|---|---|---|"]
    for row in record["quality"]:
        fvu = [row[codec]["fvu"] for codec in ("fp32", "bf16", "int8")]
        lines.append(
            f"| {row['member']} | {fvu[0]:.5f} | {fvu[1]:.5f} | {fvu[2]:.5f} | {fvu[2] / fvu[1] - 1:+.2%} | "
            f"{row['bf16']['l0']:.2f} | {row['int8']['l0']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=700_000, help="in the local stores; 700,000 are 1.07 GB in bf16")
    parser.add_argument("--s3-rows", type=int, default=393_216, help="three blocks, so that each epoch is read")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--quality-steps", type=int, default=1000)
    parser.add_argument("--rival-python", help="a Python that has sae_lens; without it SAELens is left out")
    parser.add_argument("--note", default="", help="a sentence for the report: how the machine was kept quiet")
    flags = parser.parse_args()
    keep_freed_memory()  # as the trainer does
    record: dict[str, Any] = {"provenance": provenance(), "rows": flags.rows, "turns": flags.turns}
    record["note"] = flags.note
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="stores-") as name:
        folder = Path(name)
        record["local"] = local(folder, flags.rows, flags.turns, flags.rival_python)
        record["s3"] = remote(folder, flags.s3_rows, flags.turns)
        record["load"] = before, os.getloadavg()[0]
        record["quality_steps"] = flags.quality_steps
        record["quality"] = quality(folder, 400_000, flags.quality_steps)
    lines = report(record)
    print("\n".join(lines))
    (RESULTS / "stores.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (RESULTS / "stores.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
