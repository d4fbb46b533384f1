"""The settings of a toy world, and the worlds that have a name.

One recipe covers the 2022/23 toy data and its readings: every choice that readers of the text made differently is an
option here. In words (G features, mean k active, decay rate λ):

1. directions: G rows of iid normals in d_in dimensions, each divided by its length;
2. z ~ N(0, C), u_i = Φ(z_i) with the *standard* normal's Φ; C is `covariance`, how often z is drawn `probability_draw`;
3. weights w_i = `decay`(u_i, i), for instance u_i·λ^i; probabilities p_i = s·w_i, with s such that Σ p_i = k;
4. feature i of a sample is active with probability p_i, independently of everything else given p;
5. an active feature's coefficient is U(0,1) (`magnitude`);
6. a sample without any active feature gets one, chosen uniformly, with coefficient 1 (`filler`);
7. x = codes @ directions + `noise`·N(0, I).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparse_coding.errors import UserError, near

DECAYS = ("geometric", "power", "zipf", "none")
COVARIANCES = ("shifted_uniform", "unit_diagonal", "wishart", "identity", "uncorrelated")
PROBABILITY_DRAWS = ("per_sample", "per_batch", "fixed")
MAGNITUDES = ("uniform", "double_uniform")


def _one_of(setting: str, word: str, known) -> None:
    if word not in known:
        raise UserError(f"{setting} {word!r} is unknown; known are {', '.join(known)}{near(str(word), known)}")


def _require(allowed: bool, setting: str, value: float, what: str) -> None:
    if not allowed:
        raise UserError(f"{setting} = {value} is out of range; it must be {what}")


@dataclass(frozen=True)
class WorldSettings:
    """What a toy world is; constructing one checks it and touches nothing else.

    Raises UserError for a word that is not on its list and for a number out of its range.
    """

    n_features: int = 512
    """G, the number of true features."""
    d_in: int = 256
    """Width of the activations."""
    mean_active: float = 5.0
    """k, the mean number of features active in a sample, before the filler. Probabilities are clamped at 1; what the
    clamp cuts off is given to the other features, so the target is met even then."""
    decay: str = "geometric"
    """How the weight of feature i (from 0) falls off: geometric u·λ^i, power u^(λ·i), zipf u/(i+1)^λ, none u."""
    decay_rate: float = 0.99
    """λ: in (0, 1] for geometric, above 0 for power, at least 0 for zipf; not read by none."""
    covariance: str = "shifted_uniform"
    """C. shifted_uniform: S = (R+Rᵀ)/2 with R uniform on (0,1), minus 1.001 × its (negative) smallest eigenvalue on the
    diagonal, as in 2023; its diagonal is far from 1 (9.6 at G = 512), so the u are mostly near 0 or near 1.
    unit_diagonal: the same matrix scaled to a correlation matrix, so the u are uniform. wishart: A·Aᵀ with A normal.
    identity: independent z. uncorrelated: no z at all, every u is 1 and p is a constant law."""
    probability_draw: str = "per_batch"
    """When z is drawn: per_sample, per_batch, or once for the world (fixed). The law of *one* sample is the same for
    the first two; fixed is another population, in which some features hardly ever fire."""
    magnitude: str = "uniform"
    """uniform: U(0,1). double_uniform: the product of two, as in the runs published in 2023 (by mistake); the codes a
    world returns hold that product, so codes @ directions is x, whereas the code of 2023 returned the first factor."""
    filler: bool = True
    """Give a sample with no active feature one feature, chosen uniformly, with coefficient 1 (under double_uniform
    it takes the second factor like the others, and is U(0,1))."""
    noise: float = 0.0
    """Standard deviation of the normal noise added to every activation."""
    seed: int = 0
    """Seed of the world: its directions, its covariance and all of its batches."""

    def __post_init__(self) -> None:
        _one_of("decay", self.decay, DECAYS)
        _one_of("covariance", self.covariance, COVARIANCES)
        _one_of("probability_draw", self.probability_draw, PROBABILITY_DRAWS)
        _one_of("magnitude", self.magnitude, MAGNITUDES)
        for size in ("n_features", "d_in"):
            given = getattr(self, size)
            _require(isinstance(given, int) and given >= 1, size, given, "a whole number, at least 1")
        _require(
            0 < self.mean_active <= self.n_features,
            "mean_active",
            self.mean_active,
            f"above 0 and at most n_features = {self.n_features}",
        )
        _require(0 <= self.noise < float("inf"), "noise", self.noise, "a finite number, 0 or more")
        seed = self.seed
        _require(isinstance(seed, int) and 0 <= seed < 2**64, "seed", seed, "a whole number, 0 to 2^64 - 1")
        rate, finite = self.decay_rate, self.decay_rate < float("inf")
        if self.decay == "geometric":
            _require(0 < rate <= 1, "decay_rate", rate, "above 0 and at most 1 when decay is 'geometric'")
        elif self.decay == "power":
            _require(rate > 0 and finite, "decay_rate", rate, "finite and above 0 when decay is 'power'")
        elif self.decay == "zipf":
            _require(rate >= 0 and finite, "decay_rate", rate, "finite and at least 0 when decay is 'zipf'")
        if self.decay == "power" and self.covariance == "uncorrelated":
            raise UserError(
                "decay 'power' raises the random u to a power, and covariance 'uncorrelated' has no random u "
                "(every u is 1): use decay 'geometric' or 'zipf', or covariance 'identity'"
            )


PRESETS: dict[str, WorldSettings] = {
    # The interim report of December 2022 as its text has it: one uniform, nothing said of a filler or of noise. The
    # text says "a single sample" of the probabilities and leaves open for what; most who re-implemented it draw one
    # per data point, and so do we: one for the whole data set would leave a third of the features practically unused,
    # which caps every recovery score for reasons unrelated to the dictionary. "A random covariance" is read as the
    # shifted uniform matrix, so that only the draw and the filler set this world apart from hoagy-2023-07.
    "post-2022": WorldSettings(probability_draw="per_sample", filler=False),
    # The replication as published (June 2023): probabilities per batch, and the second uniform factor by mistake.
    "hoagy-2023-06": WorldSettings(magnitude="double_uniform"),
    # The same after the second factor was taken out (29 and 30 June 2023).
    "hoagy-2023-07": WorldSettings(),
    # A small world for a study in minutes on a CPU: twice overcomplete like the others, about as sparse per direction.
    "quick": WorldSettings(n_features=128, d_in=64, mean_active=3.0, decay_rate=0.98),
}


def preset(name: str, **changes: object) -> WorldSettings:
    """The settings of the world called `name`, with `changes` applied: `preset("quick", seed=3)`.

    Raises UserError for an unknown name, an unknown setting or a value that is not allowed.
    """
    _one_of("world", name, PRESETS)
    for key in changes:
        _one_of("setting of a world", key, WorldSettings.__dataclass_fields__)
    return replace(PRESETS[name], **changes)  # type: ignore[arg-type]
