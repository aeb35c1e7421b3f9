"""Decoupled DMD (arXiv 2511.22677) in JAX."""

__version__ = "0.1.0"
