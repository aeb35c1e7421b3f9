"""The embedded teacher: Lumina-Image-2.0's architecture at a tiny size, on a tiny codec's latents.

Conventions, all of them here and nowhere else:
  * the network is given `TIME_SCALE * t`. The published network takes t in [0, 1] as it is,
    where its sinusoids hardly turn; a small network trained for hours wants finer ones;
  * it predicts the velocity x - noise, as the published one does, without negation;
  * latents are the codec's means, scaled to a standard deviation of one; 4 x 4 pixels a latent,
    2 x 2 latents a token;
  * no time shift: at 64 x 64 there is no resolution to make up for;
  * the null prompt is the encoded empty caption, one [BOS] token, never zeros.
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.diffusion.sampling import Predict
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families import published_config
from ddmd_jax.families.base import (
    Array,
    Latents,
    LoadOptions,
    Teacher,
    TextEncoder,
    kernels_in,
)
from ddmd_jax.families.emoji import codec, words
from ddmd_jax.families.emoji.drawings import FILES
from ddmd_jax.families.lumina import teacher as lumina
from ddmd_jax.models import flops, nextdit
from ddmd_jax.models.layers import abstract_params, functional, maker
from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig
from ddmd_jax.models.text.caption import CaptionEncoder, CaptionEncoderConfig
from ddmd_jax.util import buckets, places, shape
from ddmd_jax.weights import flat

ARCHITECTURE = 'NextDiT'  # as its file names it
TIME_SCALE = 100.0
SHIFT = 1.0
WEIGHTS = FILES / 'teacher.safetensors'
RESTORE_HINT = ('reinstall the package, or train it again with '
                '`python -m ddmd_jax.main --config=emoji_teacher --workdir=DIR`')
GIVEN_HINT = "correct the path, or leave it out for the package's own teacher"
RULES = (*nextdit.RULES, (r'to_qkv/kernel$', ('fsdp', 'tensor')),
         (r'token/embedding$', ('fsdp', None)), (r'position$', ()))


def model_configs(model: dict[str, Any]) -> tuple[NextDiTConfig, CaptionEncoderConfig]:
    """Architecture of denoiser and text encoder from ``{'denoiser': {}, 'text': {}}``."""
    denoiser = dict(model['denoiser'])
    denoiser['axes_dim_rope'] = tuple(denoiser['axes_dim_rope'])
    return NextDiTConfig(**denoiser), CaptionEncoderConfig(**model['text'])


def init_params(model: dict[str, Any], key: Array) -> dict[str, Any]:
    """Fresh ``{'denoiser': ..., 'text': ...}`` parameters (nested dicts of fp32 arrays)."""
    denoiser_cfg, text_cfg = model_configs(model)
    k1, k2 = jax.random.split(key)
    pure = lambda m: nnx.to_pure_dict(nnx.state(m, nnx.Param))
    return {'denoiser': pure(NextDiT(denoiser_cfg, nnx.Rngs(k1))),
            'text': pure(CaptionEncoder(text_cfg, nnx.Rngs(k2)))}


def make_denoiser(model: dict[str, Any]) -> Predict:
    """`predict_clean(params, x_t, t, cond)` over denoiser parameters; see `Teacher`."""
    return lumina.make_denoiser(model_configs(model)[0], time_scale=TIME_SCALE)


def make_features(model: dict[str, Any]) -> Predict:
    """`features(params, x_t, t, cond)` over denoiser parameters; see `Teacher`."""
    return lumina.make_features(model_configs(model)[0], time_scale=TIME_SCALE)


def make_text_encoder(model: dict[str, Any]):
    """``(params, ids, mask) -> Cond`` over text parameters."""
    _, cfg = model_configs(model)
    network = functional(maker(CaptionEncoder, cfg))
    return lambda params, ids, mask: {'embeds': network(params, ids, mask), 'mask': mask}


def text_encoder(model: dict[str, Any], params: Any, identity: str) -> TextEncoder:
    """The text side over its own parameters; texts are cut at its `max_length`."""
    _, cfg = model_configs(model)
    run = make_text_encoder(model)

    def tokenize(prompts: Sequence[str]) -> dict[str, np.ndarray]:
        ids, mask = words.encode(prompts, cfg.max_length)
        return {'ids': ids, 'mask': mask}

    return TextEncoder('emoji', params, tokenize, lambda p, x: run(p, x['ids'], x['mask']),
                       cfg.max_length, cfg.dim, RULES, identity,
                       flops=functools.partial(flops.caption_forward, cfg),
                       cut=functools.partial(words.cut, length=cfg.max_length),
                       unknown=words.unknown)


def teacher_from(model: dict[str, Any], params: dict[str, Any], latents: Latents) -> Teacher:
    """Wraps ``{'denoiser', 'text'}`` parameters as a `Teacher` that draws `latents`."""
    denoiser_cfg, _ = model_configs(model)
    identity = flat.identity(params)
    text = text_encoder(model, params['text'], identity)
    return Teacher(
        'emoji', params['denoiser'], make_denoiser(model), latents, CondSpec.text(text.width),
        Shift(SHIFT), identity, RULES, text,
        make_features(model),
        flops=functools.partial(flops.nextdit_forward, denoiser_cfg, latents.shape[:2]),
        feature_flops=functools.partial(flops.nextdit_features, denoiser_cfg, latents.shape[:2]))


def save(path: Path, model: dict[str, Any], params: dict[str, Any], steps: int,
         dtype: Any = jnp.bfloat16) -> None:
    """Ships a trained teacher: safetensors, its architecture and its codec in the metadata."""
    meta = {'model': json.dumps(model), 'architecture': ARCHITECTURE, 'steps': str(steps),
            'codec': codec.load().identity, 'words': words.identity()}
    flat.save(path, params, meta, dtype=dtype)


def check_fits(model: dict[str, Any]) -> None:
    """Raises `ValueError` where an architecture is not of this package's words and latents."""
    denoiser, text = model_configs(model)
    (side, _, channels), known = codec.load().latents.shape, words.load().get_vocab_size()
    if denoiser.in_channels != channels or side % denoiser.patch_size:
        raise ValueError(f'it draws patches of {denoiser.patch_size} latents of '
                         f'{denoiser.in_channels} channels, and there are {side} of {channels}')
    if text.vocab_size < known:
        raise ValueError(f'it knows {text.vocab_size} words of {known}')


def read(path: str = '') -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture, ``{'denoiser', 'text'}`` parameters) of the shipped file or one like it.

    Raises:
      WeightsError: missing, damaged, not an emoji teacher, or trained on other words or another
        codec's latents.
    """
    file = buckets.local(places.of(path)) if path else WEIGHTS
    if file.is_dir():
        raise flat.WeightsError(f'{file} is a folder, and an emoji teacher or student one file; '
                                'give that, such as the student.safetensors that `export '
                                '--format=safetensors` writes')
    cure = GIVEN_HINT if path else RESTORE_HINT
    params, meta = flat.load(file, cure)
    try:
        model = shape.load(meta['model'].encode(), {'denoiser': dict, 'text': dict})
        published_config.checked(NextDiTConfig, model['denoiser'])
        published_config.checked(CaptionEncoderConfig, model['text'])
        denoiser, text = model_configs(model)
        flat.check_shapes(params, {'denoiser': abstract_params(maker(NextDiT, denoiser)),
                                   'text': abstract_params(maker(CaptionEncoder, text))})
        check_fits(model)
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise flat.WeightsError(f'not an emoji teacher: {file} ({e}); {cure}') from e
    if meta.get('codec') != codec.load().identity:
        raise flat.WeightsError(f'{file} was trained on latents of codec {meta.get("codec")}, the '
                                f'package has {codec.load().identity}; {cure}')
    if meta.get('words', words.identity()) != words.identity():  # those that ship do not say
        raise flat.WeightsError(f'{file} was trained on the words {meta["words"]}, the package has '
                                f'{words.identity()}; {cure}')
    return model, params


def load(options: LoadOptions) -> Teacher:
    """The shipped teacher, or one like it at ``options.path``; it has one size and no layout.

    Raises:
      WeightsError: see `read`.
    """
    model, params = read(options.path)
    # Distillation compiles six networks a step: scanned layers save minutes of compiling.
    model['denoiser'] |= {'dtype': options.dtype, 'remat': options.remat, 'unroll': False}
    teacher = teacher_from(model, params, codec.load().latents_over(options.devices))
    return dataclasses.replace(teacher, params=kernels_in(teacher.params, options.param_dtype))


def abstract(options: LoadOptions) -> Teacher:
    """As `load`, with shapes in place of the denoiser's weights: to compile for, not to run.

    Raises:
      WeightsError: see `read`.
    """
    teacher = load(options)
    return dataclasses.replace(teacher, params=jax.eval_shape(lambda: teacher.params))
