"""Text in, dictionary out: `run.py` beside the runners of SAELens and sparsify, whole processes in turns.

    python benchmarks/end_to_end.py                          both models; about half an hour on 2 cores
    python benchmarks/end_to_end.py --models bundled --turns 1 --name try
    python benchmarks/end_to_end.py --python saelens=/path/to/python sparsify=/path/to/python

Two models: the bundled one, and one of GPT-2 small's shape with random weights (speed does not depend on them). The
residual stream after layer 1 goes into one TopK dictionary. All read the same contexts in the same batch size; ours
also tokenizes the text, evaluates what it trained and writes its report, the peers find the tokens in a data set.
Seconds are from the start of the process until its dictionary is saved (for ours also until the report is written).
FVU is on held-out text. Each peer at its defaults, SAELens once more with its autocast for dictionary and model.
"""

from __future__ import annotations

import argparse
import json
import os
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
import numpy as np
import peers
import torch

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


TASKS = {"bundled": Task("bundled", 32, 262_144), "gpt2-shaped": Task("gpt2-shaped", 16, 131_072)}
CONTENDERS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ours", ()),
    ("saelens", ()),
    ("saelens", ("autocast",)),
    ("sparsify", ()),
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
    facts = {**provenance(), "threads": flags.threads, "turns": flags.turns}
    facts["peers"] = {p: peers.version(pythons[p], peers.PACKAGES[p]) for p in ("saelens", "sparsify")}
    results = []
    for name in flags.models:
        with tempfile.TemporaryDirectory() as scratch:
            results.append(compare(TASKS[name], Path(scratch), flags, pythons))
        write(flags.name, facts, results)


def compare(task: Task, scratch: Path, flags: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    job = prepare(task, scratch) | {"threads": flags.threads}
    found: list[dict[str, Any]] = [{"peer": p, "switches": s, "seconds": [], "report": []} for p, s in CONTENDERS]
    for turn in range(flags.turns):
        for one in found:
            out = scratch / f"{one['peer']}-{'-'.join(one['switches'])}-{turn}"
            if one["peer"] == "ours":
                saved, done, fvu = run_ours(job, out)
                one["report"].append(done)
            else:
                saved, fvu = run_peer(pythons[one["peer"]], one["peer"], {**job, "switches": one["switches"]}, out)
            one["seconds"].append(saved)
            one["fvu"] = fvu
            print(
                f"{task.name:12s} {one['peer']} {' '.join(one['switches'])}: {saved:.1f} s, FVU {fvu:.4f}", flush=True
            )
    return {"task": vars(task), "d_in": job["d_in"], "d_sae": job["d_sae"], "contenders": found}


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
    hf = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    kept: list[torch.Tensor] = []
    hook = lambda _module, _inputs, output: kept.append(output[0] if isinstance(output, tuple) else output)  # noqa: E731
    hf.transformer.h[LAYER].register_forward_hook(hook)
    with torch.no_grad():
        for part in torch.from_numpy(held_out.tokens.astype("int64")).split(16):
            hf.transformer(part)
    x = torch.cat(kept).flatten(0, 1).float()
    x.numpy().tofile(scratch / "held_out.f32")
    d_in = x.shape[1]
    return {
        "model": str(model), "text": str(text), "data": str(scratch / "tokens"),
        "held_out": str(scratch / "held_out.f32"),
        "d_in": d_in, "d_sae": d_in * task.ratio, "k": K, "layer": LAYER, "context": CONTEXT, "batch": BATCH,
        "tokens": task.tokens, "ratio": task.ratio,
    }  # fmt: skip


def run_ours(job: dict[str, Any], out: Path) -> tuple[float, float, float]:
    """Seconds to the saved dictionary and to the end of the process, and FVU."""
    words = [sys.executable, str(ROOT / "run.py"), "--model", job["model"], "--text", job["text"]]
    words += ["--layer", str(job["layer"]), "--location", "resid_post", "--context", str(job["context"])]
    words += ["--architecture", "topk", "--k", str(job["k"]), "--ratios", str(job["ratio"])]
    words += ["--tokens", str(job["tokens"]), "--batch-size", str(job["batch"]), "--out", str(out), "--fresh"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "SPARSE_CODING_CACHE": str(out) + "-cache"}
    began = time.time()
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"run.py failed:\n{done.stderr[-2000:]}")
    (weights,) = out.rglob("sae_weights.safetensors")
    dictionary = load_dictionary(weights.parent)
    x = torch.from_numpy(np.fromfile(job["held_out"], np.float32).reshape(-1, job["d_in"]))
    with torch.no_grad():
        error = sum(float((dictionary(part) - part).square().sum()) for part in x.split(2048))
    return weights.stat().st_mtime - began, ended - began, error / float((x - x.mean(0)).square().sum())


def run_peer(python: str, peer: str, job: dict[str, Any], out: Path) -> tuple[float, float]:
    """Seconds to the saved dictionary, and FVU."""
    out.mkdir()
    (out / "job.json").write_text(json.dumps({**job, "out": str(out / "saved")}))
    script = Path(__file__).parent / "rivals" / f"run_{peer}.py"
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
        raise SystemExit(f"{peer} failed:\n{(out / 'said').read_text()[-3000:]}")
    return saved, json.loads(answer)["fvu"]


def write(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    (RESULTS / f"{name}.json").write_text(json.dumps({"facts": facts, "results": results}, indent=1) + "\n")
    made = f"{facts['date'][:10]}, torch {facts['versions']['torch']}, {facts['threads']} threads"
    known = ", ".join(f"{peer} {found}" for peer, found in facts["peers"].items())
    lines = ["Text in, dictionary out: `python benchmarks/end_to_end.py`", ""]
    lines += [f"{made}; {known}. Whole processes, medians of {facts['turns']} turns.", ""]
    for result in results:
        task = result["task"]
        what = f"{task['tokens']:,} tokens, TopK k {K}, d_in {result['d_in']}, d_sae {result['d_sae']:,}, batch {BATCH}"
        lines += [f"## {task['name']}: {what}", "", "| | seconds | tokens/s | ours is | FVU |", "|---|---|---|---|---|"]
        ours = statistics.median(result["contenders"][0]["seconds"])
        for one in result["contenders"]:
            seconds = statistics.median(one["seconds"])
            label = " + ".join([one["peer"], *one["switches"]])
            times = "" if one["peer"] == "ours" else f"{seconds / ours:.2f}x"
            lines.append(f"| {label} | {seconds:.1f} | {task['tokens'] / seconds:,.0f} | {times} | {one['fvu']:.4f} |")
        whole = statistics.median(result["contenders"][0]["report"])
        lines += ["", f"Ours with evaluation, pictures and report: {whole:.1f} s.", ""]
    (RESULTS / f"{name}.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
