"""SDXL."""

from ddmd_jax.families.family import Family
from ddmd_jax.families.sdxl import teacher, text
from ddmd_jax.families.sdxl.export import EXPORT
from ddmd_jax.models.attention import KINDS

FAMILY = Family(
    'sdxl', load=teacher.load, text=text.load, text_identity=text.identity, variants=True,
    images=teacher.images, abstract=teacher.abstract, distilled=teacher.distilled,
    class_names=(*text.PIPELINE.class_names, teacher.UNET), attention=KINDS,
    dtype='bfloat16', guidance=5.0, nulls=('encoded', 'zeros'), table_steps=teacher.TABLE.count,
    knows_moments=True, export=EXPORT)
