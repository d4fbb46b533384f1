"""All that run.py is told, checked as a whole, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sparse_coding.activations.models import bundled_models
from sparse_coding.activations.text import TextSettings
from sparse_coding.config import count, to_dict
from sparse_coding.errors import UserError
from sparse_coding.files import file_sha256
from sparse_coding.formats.nanogpt_file import checkpoint_file
from sparse_coding.run_flags import EvaluationFlags, ModelFlags, OutputFlags, StoreFlags, TextFlags, TrainingFlags
from sparse_coding.sweep_flags import END_TO_END, SweepFlags
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.safety import Safety
from sparse_coding.training.trainer import TrainingSettings


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
            name=flags.optimizer, beta1=flags.beta1, beta2=flags.beta2, moments=flags.moments,
            momentum=flags.momentum, weight_decay=flags.weight_decay, clip_norm=flags.clip_norm,
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
        for name in ("skip_damaged", "allow_incomplete"):  # which rows there are is checked by itself (stored.py)
            del known["stores"][name]
        if not self.stores.activations:
            del known["stores"]
        checkpoint = checkpoint_file(self.model.model)
        if checkpoint is not None and checkpoint.is_file():  # nanoGPT writes to the same file again and again
            known["checkpoint_sha256"] = file_sha256(checkpoint)
        return {"kind": "run", **known}
