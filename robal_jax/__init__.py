"""Adversarial robustness under long-tailed data, in JAX."""

__version__ = "0.1.0"
