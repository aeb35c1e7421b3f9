"""Flax NNX networks, one file per architecture."""
