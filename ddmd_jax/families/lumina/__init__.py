"""Lumina-Image-2.0."""

from ddmd_jax.families.family import Family
from ddmd_jax.families.lumina import teacher, text
from ddmd_jax.families.lumina.export import EXPORT

FAMILY = Family(
    'lumina', load=teacher.load, text=text.load, text_identity=text.identity,
    abstract=teacher.abstract, class_names=(*text.CLASSES, teacher.TRANSFORMER),
    attention=('auto', 'xla', 'splash'),
    dtype='bfloat16', export=EXPORT)
