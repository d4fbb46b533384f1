"""Sparse coding of neural networks: toy worlds with known truth and real language models on one trainer."""

import os

# Waiting threads of torch's CPU pool spin by default. On a machine that does anything else besides, spinning makes a
# training step 5 to 8 times slower than sleeping does; it must be said before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__version__ = "0.1.0"
