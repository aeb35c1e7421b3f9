"""Lumina-Image-2.0."""

import functools

from ddmd_jax.families import published_card
from ddmd_jax.families.family import Family
from ddmd_jax.families.lumina import teacher, text
from ddmd_jax.families.published_export import export_of
from ddmd_jax.models.attention import KINDS

FAMILY = Family(
    'lumina', load=teacher.load, text=text.load, text_identity=text.identity, variants=True,
    images=teacher.images, abstract=teacher.abstract,
    class_names=(*text.CLASSES, teacher.TRANSFORMER), attention=KINDS,
    dtype='bfloat16', distilled=functools.partial(published_card.few_step, called=()),
    export=export_of(teacher.FLOW, no_guidance=1.0))
