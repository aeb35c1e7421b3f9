"""Z-Image from a diffusers folder; its conventions are `published_flow`'s, and these.

  * Time and sign. Its pipeline hands the network ``(1000 - timestep) / 1000``, the paper's t, and
    negates what comes back: as Lumina's, in other words.
  * Guidance. The pipeline's ``guidance_scale`` is ``w = alpha - 1``: it draws with
    ``v_cond + w (v_cond - v_uncond)``, w = 5 by default, and without guidance at 0. Everything here
    is alpha. It leaves the guided velocity as it is (``cfg_normalization`` is off).
  * Shift. 6 of the base model, 3 of Z-Image-Turbo, which was distilled from it.
"""

import functools
from typing import Any

from ddmd_jax.families import published_card, published_flow, published_text
from ddmd_jax.families.base import LoadOptions, Teacher
from ddmd_jax.families.published_flow import Flow
from ddmd_jax.families.zimage import names, text
from ddmd_jax.models import flops, zimage
from ddmd_jax.models.text.qwen3 import Qwen3Config
from ddmd_jax.models.zimage import ZImage, ZImageConfig
from ddmd_jax.weights import diffusers, fetch

TRANSFORMER = 'ZImageTransformer2DModel'
SHIFT, TURBO_SHIFT = 6.0, 3.0
SCHEDULER = 'scheduler/scheduler_config.json'
RULES = zimage.RULES
_READ = ('in_channels', 'dim', 'n_layers', 'n_refiner_layers', 'n_heads', 'norm_eps',
         'cap_feat_dim', 'rope_theta', 't_scale')
# What our network knows one value of; None is a field's absence.
_FIXED = {'all_patch_size': [2], 'all_f_patch_size': [1], 'qk_norm': True, 'siglip_feat_dim': None}


def _fields(published: dict[str, Any]) -> dict[str, Any]:
    for name, value in _FIXED.items():
        found = published.get(name, value)
        found = list(found) if isinstance(found, tuple) else found
        if found != value:
            raise ValueError(f'{name} is {found}, supported is {value}')
    return {name: published[name] for name in _READ} | {
        'axes_dims': tuple(published['axes_dims'])}


FLOW = Flow('zimage', 'Z-Image', text.PIPELINE.class_names, TRANSFORMER, ZImageConfig, _fields,
            ZImage, names.transformer, RULES, SHIFT, flops.zimage_forward, flops.zimage_features)

load = functools.partial(published_flow.load, FLOW)
images = functools.partial(published_flow.images, FLOW)


def abstract(options: LoadOptions, **network: Any) -> Teacher:
    """The published teacher with shapes in place of weights; see `published_flow.abstract`."""
    encoder = published_text.abstract(text.PIPELINE, [Qwen3Config()], options)
    return published_flow.abstract(FLOW, encoder, options, **network)


def distilled(path: str) -> str:
    """What says that the weights at `path` are Z-Image-Turbo or another few-step student; or ''.

    Beside what every folder may say, the scheduler's shift.

    Raises:
      WeightsError: there is no such folder, or its configs cannot be read.
    """
    if why := published_card.few_step(path, ('turbo',)):
        return why
    scheduler = published_card.pipeline(fetch.local_folder(path, (SCHEDULER,))) / SCHEDULER
    if scheduler.is_file() and diffusers.read_json(scheduler).get('shift') == TURBO_SHIFT:
        return f"its scheduler's shift is Z-Image-Turbo's {TURBO_SHIFT:g}, the base has {SHIFT:g}"
    return ''
