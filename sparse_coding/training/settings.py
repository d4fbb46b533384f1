"""How a sweep is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

from sparse_coding.errors import UserError
from sparse_coding.training.dead import DeadSettings
from sparse_coding.training.optimizer import OptimizerSettings
from sparse_coding.training.precision import Precision
from sparse_coding.training.settling import SettlingSettings


@dataclass(frozen=True)
class TrainingSettings:
    """How long and how exactly to train; the batch size belongs to the stream."""

    steps: int
    """Updates, one batch of the stream each."""
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    precision: Precision = "auto"
    """Of the matrix products: bf16 where the hardware has it (auto), bf16, fp16, fp32."""
    log_every: int = 100
    """Steps between two lines of log.jsonl."""
    sparsity_warmup_steps: int = 0
    """Updates over which L1 and L0 weights rise from 0, and k falls to its value."""
    dead: DeadSettings = field(default_factory=DeadSettings)
    """When a latent is dead, and whether dead ones are resampled."""
    settling: SettlingSettings = field(default_factory=SettlingSettings)
    """When a member has nothing left to learn and stops early."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.precision == "fp16" and self.optimizer.name == "schedule-free":
            raise UserError(
                "precision fp16 makes single dictionaries skip updates, which schedule-free, whose average counts the "
                "updates of all, cannot follow: use bf16, fp32 or another optimizer"
            )
        if self.settling.every and self.dead.resample_every:
            raise UserError("members cannot both stop when they settle and have dead latents resampled: choose one")
        if self.sparsity_warmup_steps < 0:
            raise UserError(f"sparsity_warmup_steps is {self.sparsity_warmup_steps}: it must be 0 or more")

    def sparsity(self, step: int) -> float:
        """How far sparsity has warmed up at this step, up to 1."""
        return min(1.0, (step + 1) / self.sparsity_warmup_steps) if self.sparsity_warmup_steps else 1.0
