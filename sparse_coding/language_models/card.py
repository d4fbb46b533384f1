"""What is written beside a trained model: the facts as JSON, and a README.md that says them in words."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int, Integer
from torch import Tensor

from sparse_coding.errors import UserError
from sparse_coding.files import sync_files
from sparse_coding.progress import duration

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

    from sparse_coding.language_models.corpus import Corpus

FACTS = "training.json"
CURVE = "loss_curve.png"


@dataclass(frozen=True)
class Facts:
    """Everything known about a finished training run; `training.json` holds these fields unrounded."""

    command: str  # starts the same training again
    config: dict[str, Any]  # every honoured setting, with the values used
    text: dict[str, Any]  # the text settings
    text_sha256: str  # of the train and held-out token ids and the vocabulary size
    tokenizer_asked: str | None  # bpe (also None), char, or a name; a data folder has its own
    vocab_size: int
    vocab_size_asked: int | None  # of bpe; little text supports fewer
    train_tokens: int
    held_out_tokens: int
    tokens_seen: int  # train tokens that went through the model, repeats counted
    seconds: float  # of training and evaluating, without reading and tokenizing the text
    hardware: str  # in words that name no machine
    dtype: str  # of the matrix products
    python: str
    torch: str
    parameters: int  # tied weights counted once, biases fixed at zero not counted
    iterations: int
    kept_iteration: int  # the update whose weights were kept
    validation_loss: float  # nats per token on the scored tokens, float32, no dropout
    scored_tokens: int  # of the held-out text: all of it up to a limit
    unigram: float  # the same loss for counting single tokens
    bigram: float  # for counting pairs
    bigram_weight: float
    trigram: float  # and triples
    trigram_weight: float
    counted_tokens: int  # of the training text: all of it up to a limit
    samples: list[list[str]]  # prompt, continuation

    @property
    def baselines(self) -> dict[str, float]:
        """What counting reaches, in nats per token."""
        return {"single-token counts": self.unigram, "pair counts": self.bigram, "triple counts": self.trigram}

    def result(self) -> str:
        """The losses in one line."""
        return (
            f"{self.validation_loss:.4f} nats per token on the held-out text "
            f"(triple counts {self.trigram:.4f}, pairs {self.bigram:.4f}, single tokens {self.unigram:.4f})"
        )


def read(folder: Path) -> Facts:
    """The facts that a finished run left in its folder. Raises `UserError` for a file that holds something else."""
    try:
        return Facts(**json.loads((folder / FACTS).read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(
            f"{folder / FACTS} is not what train-lm writes: name another --out, or delete the folder"
        ) from None


def publish(out: Path, aside: Path, model: GPT2LMHeadModel, corpus: Corpus, facts: Facts, log: Path) -> None:
    """Write a model folder in `aside`, on the same disk as `out`, then move its files to `out`, training.json last.

    So `out` holds training.json only when everything else is there. log: the run's train_log.jsonl.
    """
    from sparse_coding.report.loss_curve import write_loss_curve

    shutil.rmtree(aside, ignore_errors=True)
    save_model(model, aside)
    if corpus.files is not None:
        for path in corpus.files.iterdir():
            shutil.copy(path, aside / path.name)
    elif corpus.tokenizer is not None:
        corpus.tokenizer.save_pretrained(aside)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    write_loss_curve(aside / CURVE, lines, facts.baselines, facts.kept_iteration)
    (aside / FACTS).write_text(json.dumps(dataclasses.asdict(facts), indent=1) + "\n", encoding="utf-8")
    (aside / "README.md").write_text(render(facts, aside), encoding="utf-8")
    sync_files(aside)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == FACTS):
        os.replace(path, out / path.name)


def save_model(model: GPT2LMHeadModel, folder: Path) -> None:
    """config.json and model.safetensors, without the library's progress bar for one file; the model goes to the CPU."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.to("cpu").save_pretrained(folder)  # type: ignore[arg-type]
    finally:
        if bars:
            logging.enable_progress_bar()


def hardware(device: torch.device, processes: int = 1) -> str:
    """The kind of hardware in words that hold for any machine, such as `2 CPU threads`."""
    if device.type != "cpu":
        kind = "CUDA GPU" if device.type == "cuda" else f"{device.type} device"
        return f"one {kind}" if processes == 1 else f"{processes} {kind}s"
    count = torch.get_num_threads()
    threads = f"{count} CPU thread{'s' if count > 1 else ''}"
    return threads if processes == 1 else f"{processes} processes of {threads}"


def sample(
    model: GPT2LMHeadModel, prompt: Int[Tensor, "T"], new_tokens: int, seed: int, vocab_size: int | None = None
) -> Int[Tensor, "T+new"]:
    """Draw a continuation at temperature 0.8 among the 40 likeliest tokens, given the last `n_positions` tokens.

    vocab_size: ids from here on are padding of the model's vocabulary and are never drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    tokens = prompt.cpu()
    with torch.inference_mode():
        for _ in range(new_tokens):
            context = tokens[-model.config.n_positions :].to(model.device)
            logits = model(context[None]).logits[0, -1, :vocab_size].float().cpu() / 0.8
            best = logits.topk(min(40, len(logits)))
            drawn = torch.multinomial(best.values.softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, best.indices[drawn]])
    return tokens


def samples(
    model: GPT2LMHeadModel,
    tokenizer: PreTrainedTokenizerBase,
    held_out: Integer[np.ndarray, "N"],
    seed: int,
    count: int = 3,
) -> list[list[str]]:
    """At `count` places spread evenly over the held-out text: (eight tokens of it or all, what the model adds)."""
    found = []
    for i in range(count):
        start = max(0, len(held_out) - 8) * i // count
        prompt = torch.from_numpy(held_out[start : start + 8].astype(np.int64))
        tokens = sample(model, prompt, new_tokens=64, seed=seed + i, vocab_size=len(tokenizer))
        found.append([str(tokenizer.decode(part.tolist())) for part in tokens.tensor_split([len(prompt)])])
    return found


def render(facts: Facts, folder: Path) -> str:
    """The README.md of a model folder; `folder` holds the other files already, their sizes are listed."""
    config = facts.config
    sizes = sorted((path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file())
    layers, width, heads, context = (config[key] for key in ("n_layer", "n_embd", "n_head", "block_size"))
    activation = json.loads((folder / "config.json").read_text())["activation_function"]
    gelu = "exact" if activation == "gelu" else "tanh"
    rate = facts.tokens_seen / max(facts.seconds, 1e-9)
    seen = f"{facts.tokens_seen:,} tokens ({facts.tokens_seen / facts.train_tokens:.1f} times the text)"
    scored = "all" if facts.scored_tokens == facts.held_out_tokens else f"the first {facts.scored_tokens:,} tokens"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        "",
        f"# A small GPT: {layers} layers, {width} wide, {heads} heads, context {context}",
        "",
        f"A `GPT2LMHeadModel` with {gelu} GELU and tied embedding{'' if config['bias'] else ', all biases zero'},",
        "trained to be studied, not to be talked to.",
        "It opens with `transformers.AutoModelForCausalLM.from_pretrained(FOLDER)`.",
        "",
        "## How good it is",
        "",
        f"Cross entropy on {scored} of the held-out text, float32, no dropout; each predictor scores the same tokens.",
        "",
        "| predictor | nats per token | perplexity |",
        "|---|---|---|",
    ]
    rows = {**facts.baselines, "**this model**": facts.validation_loss}
    lines += [f"| {name} | {loss:.4f} | {math.exp(loss):.1f} |" for name, loss in rows.items()]
    lines += [
        "",
        f"(Counts of {facts.counted_tokens:,} training tokens. Pairs weigh {facts.bigram_weight:.3f} against single "
        f"tokens, triples {facts.trigram_weight:.3f} against that, as chosen on the training text.)",
        "",
        f"![Loss over the updates]({CURVE})",
        "",
        "## How it was made",
        "",
        f"    {facts.command}",
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {facts.parameters:,} |",
        f"| text | {', '.join(f'{key} = {value}' for key, value in facts.text.items())} |",
        f"| tokens | {facts.train_tokens:,} to train on, {facts.held_out_tokens:,} held out |",
        f"| tokenizer | {facts.tokenizer_asked or 'bpe'}, {facts.vocab_size:,} tokens |",
        f"| SHA-256 of the tokens | `{facts.text_sha256}` |",
        f"| seen in training | {seen} in {facts.iterations:,} updates |",
        f"| weights kept | after update {facts.kept_iteration:,} |",
        f"| time | {duration(facts.seconds)} on {facts.hardware}, {facts.dtype}: {rate:,.0f} tokens/s |",
        f"| Python, torch | {facts.python}, {facts.torch} |",
        "",
        "Every setting, in the words of nanoGPT's train.py:",
        "",
        *[f"    {key} = {value!r}" for key, value in config.items()],
        "",
        "| file | bytes |",
        "|---|---|",
        *[f"| {name} | {size:,} |" for name, size in sizes],
    ]
    if facts.samples:
        lines += [
            "",
            "## What it says",
            "",
            "A few tokens of held-out text, then 64 drawn from the model (temperature 0.8, the 40 likeliest tokens).",
        ]
    for prompt, continuation in facts.samples:
        text = f"{prompt}⟶{continuation}"
        lines += ["", *[f"    {line}".rstrip() for line in text.splitlines()]]
    return "\n".join(lines) + "\n"
