"""Toy worlds with known truth: true directions, sparse true codes, and activations made of them.

world = World(preset("quick"))
x, *_ = batch = world.batch(step=0, batch_size=256)     # batch.codes @ world.directions == x
"""

from sparse_coding.synthetic.settings import PRESETS, WorldSettings, preset
from sparse_coding.synthetic.stream import SITE, WorldStream
from sparse_coding.synthetic.theory import chance_mmcs, collapse_l1, expected_dead, mmcs_ceiling
from sparse_coding.synthetic.world import World, WorldBatch, covariance_matrix

__all__ = [
    "PRESETS",
    "SITE",
    "World",
    "WorldBatch",
    "WorldSettings",
    "WorldStream",
    "chance_mmcs",
    "collapse_l1",
    "covariance_matrix",
    "expected_dead",
    "mmcs_ceiling",
    "preset",
]
