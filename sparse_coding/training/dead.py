"""Which latents are dead: clocks that count rows (tokens), not steps, so a window means the same at any batch size.

A latent is dead when it has not fired for `window` rows (dead_feature_window of mats_sae_training), or when it fired on
less than a share `threshold` of the rows of the last whole sampling window (dead_feature_threshold and
feature_sampling_window there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sparse_coding.errors import UserError


@dataclass(frozen=True)
class DeadSettings:
    """When a latent counts as dead, and whether dead ones are resampled."""

    window: int = 100_000
    """Rows without firing after which a latent is dead."""
    threshold: float = 0.0
    """Share of the rows of a sampling window below which a latent is dead too; 0 leaves this rule out."""
    sampling_window: int = 100_000
    """Rows over which that share is taken."""
    resample_every: int = 0
    """Updates between two resamplings of dead latents; 0: never."""
    resample_times: int = 4
    """Resamplings at most."""
    resample_rows: int = 819_200
    """Rows whose losses decide where resampled latents point."""

    def __post_init__(self) -> None:
        for name in ("window", "sampling_window", "resample_times", "resample_rows"):
            if getattr(self, name) < 1:
                shown = {"window": "dead_feature_window", "sampling_window": "feature_sampling_window"}.get(name, name)
                raise UserError(f"{shown} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.threshold < 1:
            raise UserError(f"dead_feature_threshold is {self.threshold}: it must be at least 0 and below 1")
        if self.resample_every < 0:
            raise UserError(f"resample_every is {self.resample_every}: it must be 0 (never) or more")

    def check(self, steps: int, batch_size: int, method: str = "") -> None:
        """Refuse a run in which resampling, or a `method` that was asked for by name, can find nothing dead."""
        rows = steps * batch_size
        if self.resample_every:
            if self.resample_every >= steps:
                raise UserError(
                    f"resample_every is {self.resample_every:,}, but the run has {steps:,} updates: "
                    "there would be no resampling; give a smaller number"
                )
            method, rows = method or "resample", min(rows, self.last_resampling * batch_size)
        if method and self.window > rows and not self.threshold:
            raise UserError(
                f"dead latents by {method}: there would be nothing to revive, as a latent counts as dead after "
                f"dead_feature_window = {self.window:,} rows without firing, and only {rows:,} rows come before; "
                "give a smaller window or a longer run"
            )

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are resampled when `step` updates are done."""
        return bool(self.resample_every) and step % self.resample_every == 0 and 0 < step <= self.last_resampling

    def since_resampling(self, step: int) -> int | None:
        """Updates done since the last resampling, when `step` are done in all; None before the first."""
        if not self.resample_every or step < self.resample_every:
            return None
        return step - min(step // self.resample_every, self.resample_times) * self.resample_every

    @property
    def last_resampling(self) -> int:
        return self.resample_every * self.resample_times


class Clocks:
    """When each latent of a stack fired last, and how often in the current sampling window."""

    def __init__(self, shape: tuple[int, int], settings: DeadSettings, device: str):
        self.settings = settings
        self.rows_since_fired = torch.zeros(shape, dtype=torch.int64, device=device)
        self.fired = torch.zeros(shape, dtype=torch.float32, device=device)
        self.below_threshold = torch.zeros(shape, dtype=torch.bool, device=device)

    def count(self, active: Float[Tensor, "M d_sae"], rows: int, step: int) -> None:
        """Add the firings of update number `step` (from 0), made on `rows` rows."""
        self.rows_since_fired.add_(rows).mul_(active == 0)
        if self.settings.threshold:
            self.fired += active
            if self.ends_window(step, rows):
                self.below_threshold.copy_(self.fired < self.settings.threshold * self._window_steps(rows) * rows)
                self.fired.zero_()

    def ends_window(self, step: int, rows: int) -> bool:
        """Whether a sampling window ends with update number `step`; there is none without a threshold."""
        return self.settings.threshold > 0 and (step + 1) % self._window_steps(rows) == 0

    def _window_steps(self, rows: int) -> int:
        return max(1, round(self.settings.sampling_window / rows))

    def dead(self) -> Bool[Tensor, "M d_sae"]:
        dead = self.rows_since_fired >= self.settings.window
        return dead | self.below_threshold if self.settings.threshold else dead

    def possible(self, step: int, rows: int) -> bool:
        """Whether a latent can be dead when `step` updates are done; known without asking the device."""
        return step * rows >= self.settings.window or bool(self.settings.threshold)

    def restart_(self, member: int, latents: Tensor) -> None:
        """Latents that have been given new directions live again."""
        self.rows_since_fired[member, latents] = 0
        self.fired[member, latents] = torch.inf  # not judged by a sampling window that began before
        self.below_threshold[member, latents] = False

    def state(self) -> dict[str, Tensor]:
        return {
            "rows_since_fired": self.rows_since_fired,
            "fired": self.fired,
            "below_threshold": self.below_threshold,
        }
