"""SDXL's text side, as diffusers has it (``stable_diffusion_xl/pipeline_stable_diffusion_xl.py``).

Last but one states of CLIP-L and OpenCLIP's bigG side by side, and bigG's projected state at the
end token as ``pooled``. Always 77 tokens, which the U-Net reads all, padding too: the mask is True
everywhere. Where ``model_index.json`` sets ``force_zeros_for_empty_prompt``, the pipeline guides
away from *zeros*; the null prompt here is the encoded empty text all the same, of which zeros are
made where they are wanted (`batch.NULLS`). `null_is_zeros` says which a folder's pipeline does.
"""

import functools
from collections.abc import Mapping
from typing import Any

from ddmd_jax.families import published_text
from ddmd_jax.families.base import LoadOptions, TextEncoder
from ddmd_jax.families.published_text import Component, Pipeline
from ddmd_jax.models import flops
from ddmd_jax.models.text import clip
from ddmd_jax.models.text.clip import ClipConfig, ClipText
from ddmd_jax.weights.clip import text_entry as entry
from ddmd_jax.weights.transformers import Published

UNUSED = (r'embeddings\.position_ids',)  # a buffer, 0 to 76, that early versions saved
PUBLISHED = Published(('CLIPTextModel',), 'text_model.', UNUSED)
PROJECTED = Published(('CLIPTextModelWithProjection',), 'text_model.', UNUSED)


def model_config(published: dict[str, Any], dtype: str = 'float32', *,
                 projected: bool) -> ClipConfig:
    """Our CLIP from a published ``text_encoder/config.json``; see `config_of`.

    Only where `projected` is the last layer of use, for pooling.
    """
    width = published['projection_dim'] if projected else None
    return published_text.config_of(ClipConfig, published, {}, dtype=dtype, projection_dim=width,
                                    penultimate=not projected)


PIPELINE = Pipeline(
    'sdxl', ('StableDiffusionXLPipeline', 'StableDiffusionXLImg2ImgPipeline',
             'StableDiffusionXLInpaintPipeline'),
    (Component('text_encoder', 'tokenizer', PUBLISHED,
               functools.partial(model_config, projected=False), ClipText, entry,
               flops.clip_forward),
     Component('text_encoder_2', 'tokenizer_2', PROJECTED,
               functools.partial(model_config, projected=True), ClipText, entry,
               flops.clip_forward)),
    length=77, rules=clip.RULES, cuts=False)


def load(options: LoadOptions) -> TextEncoder:
    """Both CLIPs of a pipeline's folder: embeds ``[B, 77, 2048]``, pooled ``[B, 1280]``.

    Raises:
      WeightsError, ShardingError: as `published_text.load`.
    """
    return published_text.load(PIPELINE, options)


def null_is_zeros(index: Mapping[str, Any]) -> bool:
    """Whether a pipeline, by its ``model_index.json``, guides away from zeros instead of the
    encoded empty text."""
    return bool(index.get('force_zeros_for_empty_prompt', True))  # the pipeline's own default


def identity(path: str, variant: str = '') -> str | None:
    """Raises `WeightsError`: see `published_text.identity`."""
    return published_text.identity(PIPELINE, path, variant)
