"""Prompts, images and how they reach a device: TFDS builders, composition, Grain loaders."""
