"""Sparse coding of neural networks: toy worlds with known truth and real language models on one trainer."""

import os

# A waiting thread of torch's CPU pool spins for long by default. Where anything else runs on the machine, that makes a
# training step 5 to 50 times slower; spinning for microseconds costs nothing. It must be said before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

__version__ = "0.1.0"
