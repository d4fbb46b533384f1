"""Optimisers that train a stack as one: every member has its own learning rate and comes out as it would alone."""

from sparse_coding.training.optimizers.adam import Adam, AdamW
from sparse_coding.training.optimizers.base import StackedOptimizer
from sparse_coding.training.optimizers.momentum import SGD, Signum
from sparse_coding.training.optimizers.muon import Muon
from sparse_coding.training.optimizers.schedule_free import ScheduleFree

__all__ = ["SGD", "Adam", "AdamW", "Muon", "ScheduleFree", "Signum", "StackedOptimizer"]
