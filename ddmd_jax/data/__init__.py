"""Prompts, images and how they reach a device: sets of prompts, embeddings, Grain loaders."""

from ddmd_jax.util.errors import UserError


class DataFileError(UserError):
    """A data file is absent or damaged; the message names it and the cure."""
