"""The flags of run.py: frozen dataclasses, grouped as --help shows them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import TextSettings
from sparse_coding.config import count, to_dict
from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.sweep_flags import END_TO_END, SweepFlags
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerName, OptimizerSettings, Schedule
from sparse_coding.training.precision import Precision
from sparse_coding.training.safety import Safety
from sparse_coding.training.trainer import TrainingSettings

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
    """Precision of the model: auto is bfloat16 on a GPU, float32 elsewhere."""
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


@dataclass(frozen=True)
class RunSettings:
    """Capture activations of a language model, train a sweep of dictionaries on that one stream, evaluate, report."""

    model: ModelFlags = field(default_factory=ModelFlags)
    text: TextFlags = field(default_factory=TextFlags)
    stores: StoreFlags = field(default_factory=StoreFlags)
    sweep: SweepFlags = field(default_factory=SweepFlags)
    training: TrainingFlags = field(default_factory=TrainingFlags)
    evaluation: EvaluationFlags = field(default_factory=EvaluationFlags)
    output: OutputFlags = field(default_factory=OutputFlags)
    safety: Safety = field(default_factory=Safety)

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
        self.text.check()
        if self.evaluation.latents < 0:
            raise UserError(f"--latents is {self.evaluation.latents}: it must be 0 or more")
        model, loss = self.model, self.sweep.loss
        self.stores.check(model, self.text, loss)
        if model.target_sites and (len(model.target_sites) != len(model.sites) or model.target_location):
            raise UserError(
                f"--target-sites names {len(model.target_sites)} sites and --sites {len(model.sites)}: give one target "
                "for each site by name, or use --location and --target-location"
            )
        if model.skip and not self.transcodes:
            raise UserError("--skip is for transcoders: give --target-location or --target-sites too")
        if model.crosscoder and self.transcodes:
            raise UserError("--crosscoder and transcoders (--target-location, --target-sites) exclude each other")
        if model.also_model and not model.crosscoder:
            raise UserError("--also-model is for crosscoders over several models: give --crosscoder too")
        if loss in END_TO_END and model.crosscoder:
            raise UserError(
                f"--loss {loss} puts one site's reconstruction into one model, a crosscoder has several: use mse"
            )
        if self.sweep.normalise in ("unit-norm", "layer-norm") and self.transcodes:
            raise UserError(
                f"--normalise {self.sweep.normalise} would need the target's own size to undo it, which a transcoder "
                "does not see: use mean-norm, whiten or none"
            )
        self._check_reads()
        if training.batch_size < 2 and (loss == "fvu" or "ghost" in self.sweep.revivals):
            raise UserError("--batch-size is 1: fvu and ghost gradients need the spread of a batch, at least 2 rows")
        dead = self.dead_settings()
        for method in sorted(self.sweep.revivals) or [""]:
            dead.check(self.steps, training.batch_size, method)

    def _check_reads(self) -> None:
        """Refuse flags that were given and would not be read."""
        flags, resampling = self.training, self.sweep.dead_latents == "resample"
        defaults = TrainingFlags()
        adam = flags.optimizer in ("adam", "adamw", "schedule-free", "muon")
        for name, read, needs in (
            ("resample_every", resampling, "--dead-latents resample"),
            ("resample_times", resampling, "--dead-latents resample"),
            ("resample_rows", resampling, "--dead-latents resample"),
            ("resample_warmup_steps", resampling, "--dead-latents resample"),
            ("feature_sampling_window", flags.dead_feature_threshold > 0, "--dead-feature-threshold"),
            ("beta1", adam, "an optimizer that has it (adam, adamw, muon, schedule-free)"),
            ("beta2", adam, "an optimizer that has it (adam, adamw, muon, schedule-free)"),
            ("restarts", flags.schedule == "restarts", "--schedule restarts"),
            ("decay_fraction", flags.schedule in ("linear", "cosine"), "--schedule linear or cosine"),
        ):
            if getattr(flags, name) != getattr(defaults, name) and not read:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} would not be read: it goes with {needs}; give that too, or leave {flag} out")
        if flags.resample_every is not None and flags.resample_every < 1:
            raise UserError(f"--resample-every is {flags.resample_every}: it must be at least 1")
        if flags.warmup_steps != defaults.warmup_steps and flags.warmup_steps >= self.steps:
            raise UserError(
                f"--warmup-steps is {flags.warmup_steps:,}, but the run has {self.steps:,} updates: the learning rate "
                "would never reach its height; give fewer, or more --tokens"
            )

    def check_grid(self) -> None:
        """Raise UserError for a grid that makes no sense at any width."""
        wide, model = 2**20, self.model
        if self.transcodes:
            self.sweep.members({"in": wide, "out": wide}, {"in": "out"}, skip=model.skip)
        else:
            self.sweep.members({"any": wide}, parts={"any": (wide // 2, wide // 2)} if model.crosscoder else None)

    @property
    def transcodes(self) -> bool:
        return bool(self.model.target_sites or self.model.target_location)

    def dead_settings(self) -> DeadSettings:
        flags, every = self.training, 0
        if self.sweep.dead_latents == "resample":
            every = max(1, self.steps // 8) if flags.resample_every is None else flags.resample_every
        rows = min(count(flags.resample_rows, "--resample-rows"), max(1, self.steps * flags.batch_size // 2))
        return DeadSettings(
            count(flags.dead_feature_window, "--dead-feature-window"), flags.dead_feature_threshold,
            count(flags.feature_sampling_window, "--feature-sampling-window"), every, flags.resample_times, rows,
        )  # fmt: skip

    def optimizer_settings(self) -> OptimizerSettings:
        flags = self.training
        return OptimizerSettings(
            name=flags.optimizer, beta1=flags.beta1, beta2=flags.beta2, momentum=flags.momentum,
            weight_decay=flags.weight_decay, clip_norm=flags.clip_norm,
            schedule=flags.schedule, warmup_steps=flags.warmup_steps, decay_fraction=flags.decay_fraction,
            restarts=flags.restarts, resample_warmup_steps=flags.resample_warmup_steps,
        )  # fmt: skip

    def training_settings(self) -> TrainingSettings:
        return TrainingSettings(
            self.steps,
            self.optimizer_settings(),
            self.training.precision,
            log_every=max(1, self.steps // 200),
            sparsity_warmup_steps=self.training.sparsity_warmup_steps,
            dead=self.dead_settings(),
        )

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
        return self.text.settings(self.model.model)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what comes out: a run can be continued with the same ones only."""
        known = to_dict(self)
        del known["output"], known["safety"]
        for name in ("skip_damaged", "allow_incomplete"):  # a run that meets damage goes on with what is left
            del known["stores"][name]
        if not self.stores.activations:
            del known["stores"]
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
