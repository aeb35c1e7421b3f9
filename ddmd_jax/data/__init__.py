"""Prompts, images and how they reach a device: TFDS builders, composition, Grain loaders."""


class DataFileError(RuntimeError):
    """A data file is absent or damaged; the message names it and the cure."""
