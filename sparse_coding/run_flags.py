"""The flags of run.py in the groups that --help shows: frozen dataclasses, each checked by itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import TextSettings
from sparse_coding.errors import UserError
from sparse_coding.sweep_flags import END_TO_END
from sparse_coding.training.optimizer import Moments, OptimizerName, Schedule
from sparse_coding.training.precision import Precision

DEFAULT_MODEL = "python-gpt-large"


Location = Literal["mlp", "mlp_in", "mlp_out", "attn", "attn_out", "resid_pre", "resid_mid", "resid_post"]


@dataclass(frozen=True)
class SourceFlags:
    """Which activations are taken."""

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
    """Layers, counted from 0; several are read in the same forward passes."""
    location: Location = "mlp"
    """Where in the layer: mlp is the hidden activation of the MLP, mlp_in what the MLP reads, attn the mixed values of
    all heads."""
    sites: tuple[str, ...] = ()
    """Sites by name instead of --layer and --location: transformer-lens names (blocks.2.mlp.hook_post) or module names
    (transformer.h.2.mlp.act, with :in or :out). List them with `python -m sparse_coding sites --model ...`."""
    model_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model: auto is bfloat16 where the hardware multiplies it (on CPUs: from a width of 96 on), else
    float32. A CPU reads 2 to 4 times as many tokens a second in bfloat16, and activations move by less than 1e-4
    of their variance (measured on the bundled model)."""
    compile_model: bool = False
    """Run the model's blocks through torch.compile, which takes up to a minute first: about 10% faster capture of GPT-2
    small on a CPU, nothing for small models. Where it does not work the log says so, and the model runs as it is."""
    device: str = "auto"
    """auto (cuda, mps, cpu), or one of them."""


@dataclass(frozen=True)
class ModelFlags(SourceFlags):
    """Which activations are studied; at each site the whole sweep is trained."""

    target_location: Location | None = None
    """Train transcoders: from the activations at --location predict those here, such as mlp_in and mlp_out."""
    target_sites: tuple[str, ...] = ()
    """Train transcoders: sites to predict by name, one for each of --sites."""
    skip: bool = False
    """Skip transcoders: a linear map of the input is added to the prediction."""
    crosscoder: bool = False
    """Train crosscoders: one dictionary over all the sites side by side."""
    also_model: tuple[str, ...] = ()
    """With --crosscoder: further models with the same tokenizer, read on the same text, whose sites lie side by side
    with those of the first."""


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

    def check(self) -> None:
        """Raise UserError for values out of range."""
        if not 0 < self.held_out < 1:
            raise UserError(f"--held-out is {self.held_out}: it must lie between 0 and 1, such as 0.05")
        if self.context is not None and self.context < 2:
            raise UserError(f"--context is {self.context}: a context holds at least 2 tokens")

    def settings(self, model: str) -> TextSettings:
        """What `contexts` takes, with the text of the model where none is named."""
        return TextSettings(
            source=self.text or default_text(model),
            config=self.text_config,
            split=self.text_split,
            column=self.text_column,
            streaming=self.streaming,
            max_documents=self.max_documents,
            held_out=self.held_out,
        )


@dataclass(frozen=True)
class StoreFlags:
    """Train from stores of `python -m sparse_coding harvest` instead of running the model."""

    activations: tuple[str, ...] = ()
    """One or several stores: folders or s3://bucket/prefix. Model, text and sites are theirs: --sites chooses some of
    the sites (all by default), --model and --text say where those lie now if not where they were."""
    activation_weights: tuple[float, ...] = ()
    """How often the rows of each store come in one pass, such as 1 0.5; by default 1."""
    skip_damaged: bool = False
    """Leave out shards that are damaged or missing, and count them, instead of stopping."""
    allow_incomplete: bool = False
    """Train from what is there of a store whose harvest has not ended."""

    def check(self, model: ModelFlags, text: TextFlags, loss: str) -> None:
        """Raise UserError for flags that make no sense together, or would not be read."""
        if not self.activations:
            for name, value in vars(self).items():
                if value:
                    raise UserError(f"--{name.replace('_', '-')} is for training from stores: give --activations too")
            return
        if len(set(self.activations)) < len(self.activations):
            raise UserError("--activations names a store twice: give each once, and --activation-weights for its share")
        weights = self.activation_weights
        if weights and (len(weights) != len(self.activations) or not all(0 < w < float("inf") for w in weights)):
            given = " ".join(f"{weight:g}" for weight in weights)
            raise UserError(
                f"--activation-weights is {given}: give one positive number for each of {len(self.activations)} stores"
            )
        if loss in END_TO_END:
            raise UserError(
                f"--loss {loss} runs the model on whole contexts, which a store does not hold: leave --activations "
                "out, or use mse"
            )
        if model.also_model:
            raise UserError("--also-model reads the text in several models, a store holds one: leave --activations out")
        usual = ModelFlags()
        for flag in ("layer", "location", "target_location"):
            if getattr(model, flag) != getattr(usual, flag):
                other = "--target-sites" if flag == "target_location" else "--sites"
                raise UserError(f"--{flag.replace('_', '-')} with --activations: name the store's sites with {other}")
        if text.text is None:
            for flag, value in vars(text).items():
                if value != getattr(TextFlags(), flag):
                    raise UserError(
                        f"--{flag.replace('_', '-')} with --activations: the text is the store's, as it was harvested; "
                        "give --text too to evaluate on another"
                    )


@dataclass(frozen=True)
class TrainingFlags:
    """How they are trained."""

    tokens: str = "auto"
    """Activations to train on, such as 500k, 2M, 1B; more than the text has means several passes over it. auto: 600k
    for a bundled model, 5M for others, one pass over --activations."""
    batch_size: int = 512
    """Activations per update."""
    optimizer: OptimizerName = "adam"
    """adam, adamw, sgd, signum, muon, schedule-free (AdamW)."""
    beta1: float = 0.9
    """Of adam, adamw and schedule-free: decay of the mean of the gradient. 0 for JumpReLU and gated in their papers."""
    beta2: float = 0.999
    """Of adam, adamw and schedule-free: decay of the mean of its square."""
    moments: Moments = "fp32"
    """Of adam and adamw: what their means are kept in. bf16 takes half the memory, and is rounded at random."""
    momentum: float | None = None
    """Of sgd (default 0.9), signum (0.95) and muon (0.95)."""
    weight_decay: float = 0.0
    """Decoupled for adamw, signum, muon and schedule-free; added to the gradient for adam and sgd."""
    clip_norm: float | None = None
    """Largest norm of the gradient of one dictionary; longer ones are scaled down to it."""
    warmup_steps: int = 50
    """Updates over which the learning rate rises."""
    schedule: Schedule = "linear"
    """Of the learning rate after its warm-up: constant (also constantwithwarmup); linear or cosine, down to 0 over the
    last --decay-fraction of the run; restarts, falling like a cosine several times over."""
    decay_fraction: float = 0.2
    """Share of the run over which linear and cosine fall."""
    restarts: int = 4
    """Cycles of the schedule restarts."""
    sparsity_warmup_steps: int = 0
    """Updates over which L1 and L0 coefficients rise from 0, and k falls to its value (of topk, batchtopk and
    matryoshka)."""
    buffer_rows: int = 131_072
    """Activations shuffled together; more mix contexts better and need more memory."""
    precision: Precision = "auto"
    """Of the matrix products; auto is bf16 where the hardware has it. fp16 scales its losses."""
    data_seed: int = 0
    """Seed of the order of the activations."""
    dead_feature_window: str = "100k"
    """Rows (tokens) without firing after which a latent is dead."""
    dead_feature_threshold: float = 0.0
    """A latent is dead too when it fired on less than this share of the rows of a sampling window; 0: no such rule."""
    feature_sampling_window: str = "100k"
    """Rows (tokens) over which that share is taken."""
    resample_every: int | None = None
    """With --dead-latents resample: updates between resamplings; by default an eighth of the run."""
    resample_times: int = 4
    """Resamplings at most."""
    resample_rows: str = "819200"
    """Activations whose losses decide where resampled latents point; at most half of the run's."""
    resample_warmup_steps: int = 50
    """Updates over which the learning rate rises again after a resampling."""


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
    """Seconds between two checkpoints; see --checkpoint-share."""
    sync: str | None = None
    """Copy the run to s3://bucket/prefix or a folder in the background, after each checkpoint and at the end. The same
    command on another machine goes on from there."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Mirror the logs to Weights & Biases."""
    wandb_project: str = "sparse-coding"
    """Project of the mirror."""


def default_text(model: str) -> str:
    """What is read when no text is named: the text that a model of train-lm was trained on, else Pile10k."""
    folder = bundled_models().get(model, Path(model))
    try:
        return json.loads((folder / "training.json").read_text(encoding="utf-8"))["text"]["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return "NeelNanda/pile-10k"
