"""SDXL: its text side."""

from ddmd_jax.families.family import Family
from ddmd_jax.families.sdxl import text

FAMILY = Family('sdxl', text=text.load, text_identity=text.identity,
                class_names=text.PIPELINE.class_names)
