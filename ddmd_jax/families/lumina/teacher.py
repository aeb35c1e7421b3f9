"""Lumina-Image-2.0 from a diffusers folder; its conventions are `published_flow`'s, and one more.

  * Guidance. The pipeline rescales a guided velocity to the norm of the conditional one, row by
    row of the latent (over its width). This is the sampler's habit: `rescale`, handed to
    `sample_teacher` alone. CA is made of plain predictions.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from ddmd_jax.families import published_flow, published_text
from ddmd_jax.families.base import Array, LoadOptions, Teacher
from ddmd_jax.families.lumina import names, text
from ddmd_jax.families.published_flow import Flow
from ddmd_jax.models import flops, nextdit
from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig
from ddmd_jax.models.text.gemma2 import Gemma2Config

TRANSFORMER = 'Lumina2Transformer2DModel'
SHIFT = 6.0
RULES = nextdit.RULES
_OWN = {'dtype', 'remat', 'attention', 'fold_tokens', 'unroll'}


def rescale(v: Array, v_cond: Array) -> Array:
    """The pipeline's ``cfg_normalization`` of velocities ``[B, H, W, C]``: norms over W."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=2, keepdims=True))
    return v * (norm(v_cond) / norm(v))


def _fields(published: dict[str, Any]) -> dict[str, Any]:
    values = {f.name: published[f.name] for f in dataclasses.fields(NextDiTConfig)
              if f.name not in _OWN}
    values['axes_dim_rope'] = tuple(values['axes_dim_rope'])
    if published.get('out_channels') not in (None, values['in_channels']):
        raise ValueError(f'out_channels {published["out_channels"]} differ from in_channels')
    return values


FLOW = Flow('lumina', 'Lumina-Image-2.0', text.CLASSES, TRANSFORMER, NextDiTConfig, _fields,
            NextDiT, names.transformer, RULES, SHIFT, flops.nextdit_forward,
            flops.nextdit_features, rescale)

# Of `published_flow`, for this family; the first two for others whose network is a NextDiT, too.
make_denoiser = functools.partial(published_flow.make_denoiser, NextDiT)
make_features = functools.partial(published_flow.make_features, NextDiT)
model_config = functools.partial(published_flow.model_config, FLOW)
load = functools.partial(published_flow.load, FLOW)
images = functools.partial(published_flow.images, FLOW)
export = functools.partial(published_flow.export, FLOW)


def abstract(options: LoadOptions, **network: Any) -> Teacher:
    """The published teacher with shapes in place of weights; see `published_flow.abstract`."""
    encoder = published_text.abstract(text.PIPELINE, [Gemma2Config()], options)
    return published_flow.abstract(FLOW, encoder, options, **network)
