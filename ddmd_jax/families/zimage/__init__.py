"""Z-Image."""

from ddmd_jax.families.family import Family
from ddmd_jax.families.published_export import export_of
from ddmd_jax.families.zimage import names, teacher, text
from ddmd_jax.models.attention import KINDS

FAMILY = Family(
    'zimage', load=teacher.load, text=text.load, text_identity=text.identity, variants=True,
    images=teacher.images, abstract=teacher.abstract, distilled=teacher.distilled,
    class_names=(*text.PIPELINE.class_names, teacher.TRANSFORMER),
    attention=KINDS, dtype='bfloat16', guidance=6.0,
    # Older versions of its pipeline end at 0 and would leave the last step out.
    export=export_of(teacher.FLOW, no_guidance=0.0, comfyui='diffusion_model.',
                     alias=names.of_others,
                     more=',\n             sigmas=[1 - i / {steps} for i in range({steps})]'))
