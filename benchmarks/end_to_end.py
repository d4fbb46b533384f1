"""Text in, dictionary out: `run.py` beside the runners of SAELens and sparsify, whole processes in turns.

    python benchmarks/end_to_end.py                          both models; about an hour on 2 cores
    python benchmarks/end_to_end.py --models bundled --turns 1 --name try
    python benchmarks/end_to_end.py --python saelens=/path/to/python sparsify=/path/to/python

Two models: the bundled one, and one of GPT-2 small's shape with random weights (speed does not depend on them). The
residual stream after layer 1 goes into one TopK dictionary. All read the same contexts in the same batch size; ours
also tokenizes the text, evaluates what it trained and writes its report, the peers find the tokens in a data set.
Seconds are from the start of the process until its dictionary is saved (for ours also until the report is written);
what is compiled once on a machine is there already. FVU is on held-out text, of activations in fp32, by one evaluator.
Memory is the most that the process held until then. Each contender at its
defaults, the peers once more with what makes them faster: SAELens with its autocast for dictionary and model, sparsify
with the model in bf16. Ours once more with the model in fp32, as the peers have it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sparse_coding  # noqa: F401 (before torch: it sets how threads wait)

# isort: split
import peers
import torch
from rivals.finish import fvu

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import TextSettings, documents
from sparse_coding.activations.tokenizers import load_tokenizer
from sparse_coding.activations.tokens import contexts
from sparse_coding.formats.saelens import load_dictionary
from sparse_coding.provenance import provenance

ROOT, RESULTS = Path(__file__).resolve().parents[1], Path(__file__).parent / "results"
LAYER, CONTEXT, BATCH, K, HELD_OUT_TOKENS = 1, 128, 2048, 32, 16384


@dataclass(frozen=True)
class Task:
    """A model, and how much is trained on it."""

    name: str
    ratio: int
    tokens: int


TASKS = {"bundled": Task("bundled", 32, 524_288), "gpt2-shaped": Task("gpt2-shaped", 16, 131_072)}
CONTENDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ours", ()),
    ("ours", ("float32",)),
    ("saelens", ()),
    ("saelens", ("autocast",)),
    ("sparsify", ()),
    ("sparsify", ("bfloat16",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--python", nargs="*", default=[], metavar="PEER=PATH", help="environments that are there")
    parser.add_argument("--environments", type=Path, default=Path.home() / ".cache" / "sparse-coding" / "peers")
    parser.add_argument("--name", default="end_to_end", help="of the files in benchmarks/results")
    flags = parser.parse_args()
    pythons = dict(one.split("=", 1) for one in flags.python) | {"ours": sys.executable}
    for peer in ("saelens", "sparsify"):
        pythons.setdefault(peer, "")
        pythons[peer] = pythons[peer] or peers.environment(flags.environments / peer, peers.PACKAGES[peer])
    own = [word for word in sys.argv[1:] if "=" not in word and word != "--python"]  # no paths of this machine
    command = " ".join(["end_to_end.py", *own])
    facts = {**provenance(), "command": command, "threads": flags.threads, "turns": flags.turns}
    facts["peers"] = {p: peers.version(pythons[p], peers.PACKAGES[p]) for p in ("saelens", "sparsify")}
    results = []
    for name in flags.models:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(compare(TASKS[name], Path(scratch), flags, pythons))
        write(flags.name, facts, results)


def compare(task: Task, scratch: Path, flags: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    job = prepare(task, scratch) | {"threads": flags.threads}
    run_ours({**job, "tokens": BATCH, "switches": ()}, scratch / "once")  # compiles what a machine compiles once
    found: list[dict[str, Any]] = [
        {"peer": peer, "switches": switches, "seconds": [], "report": [], "mib": []} for peer, switches in CONTENDERS
    ]
    for turn in range(flags.turns):
        for one in found:
            own, out = job | {"peer": one["peer"], "switches": one["switches"]}, scratch / f"{label(one)}-{turn}"
            told = run_ours(own, out) if one["peer"] == "ours" else run_peer(pythons[one["peer"]], own, out)
            one["fvu"] = told.pop("fvu")
            for name, value in told.items():
                one[name].append(value)
            print(f"{task.name:12s} {label(one)}: {told['seconds']:.1f} s, FVU {one['fvu']:.4f}", flush=True)
    known = {name: job[name] for name in ("d_in", "d_sae", "forward")}
    return {"task": vars(task), **known, "contenders": found}


def label(one: dict[str, Any]) -> str:
    return " + ".join([one["peer"], *one["switches"]])


def prepare(task: Task, scratch: Path) -> dict[str, Any]:
    """The model's folder, a text, the same contexts as a data set, and activations of held-out text."""
    import transformers
    from datasets import Dataset

    bundled = bundled_models()["python-gpt-large"]
    if task.name == "bundled":
        model = bundled
    else:
        model = scratch / "model"
        torch.manual_seed(0)
        gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(bos_token_id=0, eos_token_id=0))
        gpt2.save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((bundled / name).read_bytes())
    text = scratch / "text.jsonl"
    with text.open("w", encoding="utf-8") as file:
        for document in documents(TextSettings("python-docs"), "all"):
            file.write(json.dumps({"text": document}) + "\n")
    settings, tokenizer = TextSettings(str(text)), load_tokenizer(model)
    cache = scratch / "cache"
    train = contexts(settings, tokenizer, context=CONTEXT, max_tokens=task.tokens, cache=cache)
    Dataset.from_dict({"input_ids": train.tokens.tolist()}).save_to_disk(scratch / "tokens")
    held_out = contexts(
        settings, tokenizer, part="held_out", context=CONTEXT, max_tokens=HELD_OUT_TOKENS, cache=cache, progress=False
    )
    hf: Any = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    hf.transformer.h = hf.transformer.h[: LAYER + 1]
    kept: list[torch.Tensor] = []
    hook = lambda _module, _inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    hf.transformer.h[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        for part in torch.from_numpy(held_out.tokens.astype("int64")).split(16):
            hf.transformer(part)
    x = torch.cat(kept).flatten(0, 1).float()
    forward = {}
    for dtype in (torch.float32, torch.bfloat16):
        hf.to(dtype)
        forward[str(dtype).removeprefix("torch.")] = len(x) / forward_seconds(hf.transformer, held_out.tokens)
    x.numpy().tofile(scratch / "held_out.f32")
    d_in = x.shape[1]
    return {
        "model": str(model), "text": str(text), "data": str(scratch / "tokens"),
        "held_out": str(scratch / "held_out.f32"),
        "d_in": d_in, "d_sae": d_in * task.ratio, "k": K, "layer": LAYER, "context": CONTEXT, "batch": BATCH,
        "tokens": task.tokens, "ratio": task.ratio, "forward": forward,
    }  # fmt: skip


def forward_seconds(model: Any, tokens: Any) -> float:
    """The quicker of two forward passes over contexts, 4,096 tokens at once."""
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        with torch.no_grad():
            for part in torch.from_numpy(tokens.astype("int64")).split(4096 // CONTEXT):
                model(part, use_cache=False)
        taken.append(time.perf_counter() - began)
    return min(taken)


def run_ours(job: dict[str, Any], out: Path) -> dict[str, float]:
    """Seconds to the saved dictionary and to the end of the process, MiB, and FVU."""
    words = [sys.executable, str(ROOT / "run.py"), "--model", job["model"], "--text", job["text"]]
    words += ["--layer", str(job["layer"]), "--location", "resid_post", "--context", str(job["context"])]
    words += ["--architecture", "topk", "--k", str(job["k"]), "--ratios", str(job["ratio"])]
    words += ["--tokens", str(job["tokens"]), "--batch-size", str(job["batch"]), "--out", str(out), "--fresh"]
    words += ["--model-dtype", *job["switches"]] if job["switches"] else []
    cache = out.parent / "run-cache"
    shutil.rmtree(cache / "contexts", ignore_errors=True)  # the text is tokenized in every turn
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "SPARSE_CODING_CACHE": str(cache)}
    mib, saved = 0.0, False
    with tempfile.TemporaryFile("w+") as said:
        began = time.time()
        with subprocess.Popen(words, stdout=said, stderr=said, text=True, env=environment) as process:
            while process.poll() is None:
                if not saved:
                    mib, saved = max(mib, peak_mib(process.pid)), any(out.rglob("sae_weights.safetensors"))
                time.sleep(0.05)
        ended = time.time()
        if process.returncode:
            said.seek(0)
            raise SystemExit(f"run.py failed:\n{said.read()[-2000:]}")
    (weights,) = out.rglob("sae_weights.safetensors")
    return {
        "seconds": weights.stat().st_mtime - began,
        "report": ended - began,
        "mib": mib,
        "fvu": fvu(load_dictionary(weights.parent), job),
    }


def peak_mib(process: int) -> float:
    """The most memory that a process has held so far; 0 where the system does not say."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def run_peer(python: str, job: dict[str, Any], out: Path) -> dict[str, float]:
    """Seconds to the saved dictionary, MiB, and FVU."""
    out.mkdir()
    (out / "job.json").write_text(json.dumps({**job, "out": str(out / "saved")}))
    script = Path(__file__).parent / "rivals" / f"run_{job['peer']}.py"
    began, saved, answer, said = time.time(), 0.0, "", (out / "said").open("w+")
    words = [python, str(script), str(out / "job.json")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=said, text=True, cwd=out) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "SAVED":
                saved = time.time() - began
            elif saved and line.startswith("{"):
                answer = line
    if not answer:
        raise SystemExit(f"{label(job)} failed:\n{(out / 'said').read_text()[-3000:]}")
    return {"seconds": saved, **json.loads(answer)}


def write(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    made = f"{facts['date'][:10]}, torch {facts['versions']['torch']}, {facts['threads']} threads"
    known = ", ".join(f"{peer} {found}" for peer, found in facts["peers"].items())
    lines = ["Text in, dictionary out: `python benchmarks/end_to_end.py`", ""]
    turns = "one turn of each" if facts["turns"] == 1 else f"medians of {facts['turns']} turns"
    lines += [f"{made}; {known}. Whole processes, {turns}.", ""]
    for result in results:
        task, ours = result["task"], result["contenders"][0]
        what = f"{task['tokens']:,} tokens, TopK k {K}, d_in {result['d_in']}, d_sae {result['d_sae']:,}, batch {BATCH}"
        lines += [f"## {task['name']}: {what}", "", "| | seconds | tokens/s | ours is | MiB | FVU |"]
        lines += ["|---|---|---|---|---|---|"]
        middle = {name: statistics.median(ours[name]) for name in ("seconds", "report")}
        for one in result["contenders"]:
            seconds, mib = statistics.median(one["seconds"]), statistics.median(one["mib"])
            times = "" if one is ours else f"{seconds / middle['seconds']:.2f}x"
            rate = task["tokens"] / seconds
            lines.append(f"| {label(one)} | {seconds:.1f} | {rate:,.0f} | {times} | {mib:,.0f} | {one['fvu']:.4f} |")
        passes = [f"{task['tokens'] / rate:.1f} s in {dtype}" for dtype, rate in result["forward"].items()]
        lines += [
            "",
            f"Ours with evaluation, pictures and report: {middle['report']:.1f} s. The forward pass alone, to ",
        ]
        lines[-1] += f"layer {LAYER}, with nothing else: {', '.join(passes)}; sparsify runs every layer."
        lines += [""]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
