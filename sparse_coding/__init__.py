"""Sparse coding of neural networks: toy worlds with known truth and real language models on one trainer."""

__version__ = "0.1.0"
