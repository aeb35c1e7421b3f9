"""Prompts, images and how they reach a device: sets of prompts, embeddings, Grain loaders."""


class DataFileError(RuntimeError):
    """A data file is absent or damaged; the message names it and the cure."""
