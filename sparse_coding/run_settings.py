"""The flags of run.py: frozen dataclasses, grouped as --help shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import TextSettings
from sparse_coding.config import count, numbers, to_dict
from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256
from sparse_coding.formats.nanogpt_file import checkpoint_file

DEFAULT_MODEL = "python-gpt-large"


@dataclass(frozen=True)
class ModelFlags:
    """Which activations are studied."""

    model: str = DEFAULT_MODEL
    """A Hugging Face name (gpt2, EleutherAI/pythia-70m-deduped, bert-base-uncased), a local folder in Hugging Face
    layout, a checkpoint of nanoGPT (out/ckpt.pt), or a bundled model, which needs no network: python-gpt-large (the
    default) or python-gpt."""
    gelu: Literal["exact", "tanh"] | None = None
    """Form of GELU in a checkpoint of nanoGPT, which does not say it: tanh until June 2023 and for GPT-2's weights,
    exact since. By default what our exports say, else exact."""
    tokenizer: str | None = None
    """A tokenizer's Hugging Face name or folder; by default the model's own. That of a checkpoint of nanoGPT is looked
    for beside it and in data/DATASET, as nanoGPT has it, and is GPT-2's where the vocabulary has its size."""
    layer: tuple[int, ...] = (2,)
    """Layers, counted from 0; several train one sweep each from the same forward passes."""
    location: Literal["mlp", "mlp_out", "attn", "attn_out", "resid_pre", "resid_mid", "resid_post"] = "mlp"
    """Where in the layer: mlp is the hidden activation of the MLP, attn the mixed values of all heads."""
    sites: tuple[str, ...] = ()
    """Sites by name instead of --layer and --location: transformer-lens names (blocks.2.mlp.hook_post) or module names
    (transformer.h.2.mlp.act, with :in or :out). List them with `python -m sparse_coding sites --model ...`."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model: auto is bfloat16 on a GPU, float32 elsewhere."""
    device: str = "auto"
    """auto (cuda, mps, cpu), or one of them."""


@dataclass(frozen=True)
class TextFlags:
    """Which text the model reads."""

    text: str | None = None
    """python-docs (documentation and sources of the Python install), a local .txt, .jsonl or .parquet file or folder,
    a folder saved by datasets, or a Hugging Face data set by name. By default what a model of train-lm was
    trained on (the bundled ones: python-docs), and NeelNanda/pile-10k for others."""
    text_config: str | None = None
    """Configuration of a Hugging Face data set."""
    text_split: str = "train"
    """Split of a Hugging Face data set."""
    text_column: str | None = None
    """Column that holds the text."""
    streaming: bool = False
    """Read a Hugging Face data set while it downloads."""
    max_documents: int | None = None
    """Read no more documents than this."""
    held_out: float = 0.05
    """Share of the documents kept apart for evaluation."""
    context: int | None = None
    """Tokens per context; by default 256, or fewer where the model takes fewer."""
    exclude_special: bool = False
    """Leave out the activations of special tokens (separators, BOS, [CLS], [SEP])."""


@dataclass(frozen=True)
class SweepFlags:
    """Which dictionaries are trained: every combination, side by side on one stream."""

    architecture: str = "relu"
    """relu: a ReLU dictionary with an L1 penalty."""
    l1: tuple[str, ...] = ("0.5", "1", "2", "4", "8")
    """L1 coefficients: numbers, or logspace:FIRST:LAST:HOW_MANY in powers of ten."""
    ratios: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Dictionary sizes as multiples of the width of the activations."""
    lr: tuple[float, ...] = (2e-3,)
    """Learning rates of Adam. Short runs gain from high ones; 1e-3 is that of 2023."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the dictionaries' initial values."""
    tied: bool = False
    """The encoder is the transposed decoder."""
    decoder_bias: bool = True
    """Learn a bias of the decoder, subtracted before the encoder."""
    l1_scaling: Literal["sum", "mean", "toy-2023"] = "sum"
    """Convention of the L1 coefficient. sum: squared error summed over dims + l1 * ||f||_1. mean: averaged over dims
    instead. toy-2023: mean, and the penalty divided by the number of latents."""
    normalise: bool = True
    """Scale activations by one number per site to mean norm sqrt(d_in), so that L1 values carry over between models.
    The number is folded into the saved dictionaries."""


@dataclass(frozen=True)
class TrainingFlags:
    """How they are trained."""

    tokens: str = "auto"
    """Activations to train on, such as 500k, 2M, 1B; more than the text has means several passes over it. auto: 600k
    for a bundled model, 5M for others."""
    batch_size: int = 512
    """Activations per update."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises."""
    decay: Literal["none", "linear", "cosine"] = "linear"
    """How the learning rate falls to 0 at the end."""
    decay_fraction: float = 0.2
    """Share of the run over which it falls."""
    buffer_rows: int = 131_072
    """Activations shuffled together; more mix contexts better and need more memory."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the matrix products; auto is bf16 where the hardware has it."""
    data_seed: int = 0
    """Seed of the order of the activations."""
    dead_window: int = 100_000
    """Rows without firing after which a latent counts as dead in the training log."""


@dataclass(frozen=True)
class EvaluationFlags:
    """What is measured afterwards, on held-out text."""

    eval_rows: str = "50k"
    """Activations for FVU, L0, dead latents and densities."""
    splice_tokens: str = "8k"
    """Tokens on which reconstructions are spliced into the model for loss recovered."""
    latents: int = 40
    """Latents of the best dictionary to list with their top contexts."""


@dataclass(frozen=True)
class OutputFlags:
    """Where results go. None of these changes them."""

    out: Annotated[Path | None, arg(help_behavior_hint="(default: outputs/MODEL-SITE-...)")] = None
    """Run folder. The same command continues a run that was stopped."""
    fresh: bool = False
    """Start over, even if the folder holds a run."""
    checkpoint_seconds: float = 120.0
    """Seconds between two checkpoints."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Mirror the logs to Weights & Biases."""
    wandb_project: str = "sparse-coding"
    """Project of the mirror."""


@dataclass(frozen=True)
class RunSettings:
    """Capture activations of a language model, train a sweep of dictionaries on that one stream, evaluate, report."""

    model: ModelFlags = field(default_factory=ModelFlags)
    text: TextFlags = field(default_factory=TextFlags)
    sweep: SweepFlags = field(default_factory=SweepFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)
    evaluation: EvaluationFlags = field(default_factory=EvaluationFlags)
    output: OutputFlags = field(default_factory=OutputFlags)

    def __post_init__(self) -> None:
        training = self.training
        if training.batch_size < 1:
            raise UserError(f"--batch-size is {training.batch_size}: it must be at least 1")
        if self.steps < 1:
            raise UserError(
                f"--tokens {training.tokens} is less than one batch of {training.batch_size}: "
                "give more tokens or a smaller --batch-size"
            )
        for flag, value in (("--eval-rows", self.eval_rows), ("--splice-tokens", self.splice_tokens)):
            if value < 1:
                raise UserError(f"{flag} is {value}: it must be at least 1")
        if not 0 < self.text.held_out < 1:
            raise UserError(f"--held-out is {self.text.held_out}: it must lie between 0 and 1, such as 0.05")
        if self.text.context is not None and self.text.context < 2:
            raise UserError(f"--context is {self.text.context}: a context holds at least 2 tokens")
        if self.evaluation.latents < 0:
            raise UserError(f"--latents is {self.evaluation.latents}: it must be 0 or more")
        numbers(self.sweep.l1, "--l1")

    @property
    def bundled(self) -> bool:
        return self.model.model in bundled_models()

    @property
    def steps(self) -> int:
        wanted = self.training.tokens
        if wanted == "auto":
            wanted = "600k" if self.bundled else "5M"
        return count(wanted, "--tokens") // self.training.batch_size

    @property
    def eval_rows(self) -> int:
        return count(self.evaluation.eval_rows, "--eval-rows")

    @property
    def splice_tokens(self) -> int:
        return count(self.evaluation.splice_tokens, "--splice-tokens")

    def text_settings(self) -> TextSettings:
        flags = self.text
        return TextSettings(
            source=flags.text or default_text(self.model.model),
            config=flags.text_config,
            split=flags.text_split,
            column=flags.text_column,
            streaming=flags.streaming,
            max_documents=flags.max_documents,
            held_out=flags.held_out,
        )

    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out: a run can be continued with the same ones only."""
        known = to_dict(self)
        del known["output"]
        checkpoint = checkpoint_file(self.model.model)
        if checkpoint is not None and checkpoint.is_file():  # nanoGPT writes to the same file again and again
            known["checkpoint_sha256"] = file_sha256(checkpoint)
        return {"kind": "run", **known}


def default_text(model: str) -> str:
    """What is read when no text is named: the text that a model of train-lm was trained on, else Pile10k."""
    folder = bundled_models().get(model, Path(model))
    try:
        return json.loads((folder / "training.json").read_text(encoding="utf-8"))["text"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return "NeelNanda/pile-10k"
