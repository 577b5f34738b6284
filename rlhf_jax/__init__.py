"""RLHF in JAX, built around the KL penalty and the reference model."""

__version__ = "0.1.0"
