"""Z-Image: its text side."""

from ddmd_jax.families.family import Family
from ddmd_jax.families.zimage import text

FAMILY = Family('zimage', text=text.load, text_identity=text.identity,
                class_names=text.PIPELINE.class_names)
