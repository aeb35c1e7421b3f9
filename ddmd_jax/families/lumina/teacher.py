"""Lumina-Image-2.0 from a diffusers folder: the published conventions, written once.

  * Time. The scheduler counts sigma = 1 (noise) to 0 (clean) and hands the network ``1 - sigma``:
    that is the paper's t, which the network therefore takes as it is.
  * Sign. The network predicts ``x - noise``, the paper's velocity; the pipeline negates it only
    because its scheduler steps along sigma. Nothing is negated here.
  * Shift. Static, ``t' = t / (t + s (1 - t))``, s from ``scheduler_config.json`` (published: 6).
    It is the teacher sampler's; a config may distil with another (`method.shift`).
  * Guidance. The pipeline rescales a guided velocity to the norm of the conditional one, row by
    row of the latent (over its width). This is the sampler's habit: `rescale`, handed to
    `sample_teacher` alone. CA is made of plain predictions.
  * Latents. FLUX's autoencoder, 8 x 8 pixels a latent, 2 x 2 latents a token.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.diffusion import process
from ddmd_jax.diffusion.sampling import Predict
from ddmd_jax.diffusion.time import Shift
from ddmd_jax.families import published_text
from ddmd_jax.families.base import (
    Array,
    Cond,
    Decoder,
    Latents,
    LoadOptions,
    Teacher,
    kernels_in,
)
from ddmd_jax.families.lumina import names, text
from ddmd_jax.models import autoencoder_kl, flops, nextdit
from ddmd_jax.models.attention import resolve
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.models.nextdit import NextDiT, NextDiTConfig
from ddmd_jax.models.text.gemma2 import Gemma2Config
from ddmd_jax.parallel import sharding
from ddmd_jax.weights import diffusers, fetch
from ddmd_jax.weights.flat import WeightsError

TRANSFORMER, AUTOENCODER = 'Lumina2Transformer2DModel', 'AutoencoderKL'
FILES = ('model_index.json', 'scheduler/*.json', 'transformer/*.json', 'transformer/*.safetensors',
         'vae/*.json', 'vae/*.safetensors')
SIZE = (1024, 1024)  # pixels, height first
FACTOR = 8  # pixels a latent, likewise
SHIFT = 6.0  # the published scheduler's, for a bare transformer, which comes without one
LIMIT = 4.0  # standard deviations: latents are scaled to about one
RULES = nextdit.RULES
VAE_RULES = ((r'.', ()),)  # 84 M parameters: whole on every device


def rescale(v: Array, v_cond: Array) -> Array:
    """The pipeline's ``cfg_normalization`` of velocities ``[B, H, W, C]``: norms over W."""
    norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=2, keepdims=True))
    return v * (norm(v_cond) / norm(v))


def model_config(published: dict[str, Any], dtype: str = 'float32', remat: str = 'none',
                 attention: str = 'xla') -> NextDiTConfig:
    """Our architecture from a published ``transformer/config.json``.

    Raises:
      WeightsError: a field is missing or not to be had here.
    """
    own = {'dtype', 'remat', 'attention', 'fold_tokens', 'unroll'}
    fields = [f.name for f in dataclasses.fields(NextDiTConfig) if f.name not in own]
    try:
        values = {name: published[name] for name in fields}
        values['axes_dim_rope'] = tuple(values['axes_dim_rope'])
        if published.get('out_channels') not in (None, values['in_channels']):
            raise ValueError(f'out_channels {published["out_channels"]} differ from in_channels')
        return NextDiTConfig(**values, dtype=dtype, remat=remat, attention=attention)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'transformer/config.json is not one of {TRANSFORMER} ({e}); fetch the '
                           'folder again') from e


def make_denoiser(cfg: NextDiTConfig, mesh: Mesh | None = None,
                  time_scale: float = 1.0) -> Predict:
    """`predict_clean(params, x_t, t, cond)` of a velocity network; see `Teacher`.

    The network is given ``time_scale * t``; the published one takes t as it is.
    """
    velocity = make_features(cfg, mesh, time_scale, '__call__')

    def predict_clean(params: Any, x_t: Array, t: Array, cond: Cond) -> Array:
        t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x_t.shape[:1])
        return process.to_clean(x_t, velocity(params, x_t, t, cond), t)

    return predict_clean


def make_features(cfg: NextDiTConfig, mesh: Mesh | None = None, time_scale: float = 1.0,
                  method: str = 'features') -> Predict:
    """``(params, x_t, t [B], cond)`` by a method of the transformer; `features` of a `Teacher`."""
    apply = functional(lambda: NextDiT(cfg, nnx.Rngs(0), mesh), method)
    return lambda params, x_t, t, cond: apply(
        params, x_t, time_scale * t, cond['embeds'], cond['mask'])


def _scheduler_shift(folder: Path) -> float:
    config = diffusers.read_json(folder / 'scheduler_config.json')
    if config.get('use_dynamic_shifting'):
        raise WeightsError(f'{folder} shifts time by resolution (use_dynamic_shifting), which '
                           'Lumina-Image-2.0 does not; give its own scheduler_config.json')
    return float(config.get('shift', 1.0))


def shift_of(folder: Path) -> float:
    """Of time: what the scheduler of a pipeline's folder says; SHIFT of a bare transformer's.

    Raises:
      WeightsError: its scheduler shifts by resolution.
    """
    return (_scheduler_shift(folder / 'scheduler') if (folder / 'scheduler').is_dir() else SHIFT)


def transformer_folder(folder: Path) -> Path:
    """Where the transformer lies in a pipeline's folder, or in its own."""
    return folder / 'transformer' if (folder / 'model_index.json').exists() else folder


def _open(folder: Path) -> tuple[diffusers.Checkpoint, diffusers.Checkpoint | None, float]:
    """(transformer, autoencoder, shift) of a pipeline's folder, or of a bare transformer's."""
    if not (folder / 'model_index.json').exists():
        return diffusers.open_folder(folder, TRANSFORMER), None, SHIFT
    found = diffusers.read_json(folder / 'model_index.json').get('_class_name')
    if found not in text.CLASSES:
        raise WeightsError(f'{folder} is a {found}, not {text.CLASSES[0]}; give a folder of '
                           'Lumina-Image-2.0')
    return (diffusers.open_folder(folder / 'transformer', TRANSFORMER),
            diffusers.open_folder(folder / 'vae', AUTOENCODER),
            _scheduler_shift(folder / 'scheduler'))


def _latent_shape(size: Sequence[int], cfg: NextDiTConfig, factor: int) -> tuple[int, int, int]:
    unit = factor * cfg.patch_size
    if any(side % unit or side <= 0 for side in size):
        raise WeightsError(f'size {tuple(size)} must be positive multiples of {unit} pixels '
                           '(config.data.sizes, height first)')
    return (size[0] // factor, size[1] // factor, cfg.in_channels)


def _abstract_params(cfg: NextDiTConfig, dtype: str) -> Any:
    params = abstract_params(lambda: NextDiT(cfg, nnx.Rngs(0)))
    return jax.eval_shape(functools.partial(kernels_in, dtype=dtype), params)


def load(options: LoadOptions) -> Teacher:
    """The teacher of a diffusers folder, its weights read straight into the mesh's layout.

    ``options.path`` is a folder, a ``gs://`` URL or a hub id, of the pipeline or of the transformer
    alone (then nothing can be decoded). Kernels are kept in `param_dtype`, the few other parameters
    in fp32.

    Raises:
      WeightsError: not Lumina-Image-2.0, or missing, damaged, misshapen or quantised.
      ShardingError: a parameter does not divide over the mesh.
    """
    mesh = options.devices
    transformer, vae, shift = _open(fetch.local_folder(options.path, FILES))
    kind = resolve(options.attention, mesh.devices.flat[0].platform)
    cfg = model_config(transformer.config, options.dtype, options.remat, kind)
    abstract = _abstract_params(cfg, options.param_dtype)
    layout = sharding.shard_tree(abstract, RULES, mesh)
    diffusers.check(transformer, abstract, names.transformer)
    # Everything is checked before the first byte of weights goes to a device.
    factor, decode = (FACTOR, None) if vae is None else _decoder(vae, mesh)
    latents = Latents(_latent_shape(options.size or SIZE, cfg, factor), decode, LIMIT,
                      functools.partial(_latent_shape, cfg=cfg, factor=factor))
    return Teacher(
        'lumina', diffusers.import_tree(transformer, abstract, layout, names.transformer),
        make_denoiser(cfg, mesh), latents, CondSpec.text(cfg.cap_feat_dim), Shift(shift),
        diffusers.identity(transformer), RULES, rescale=rescale,
        features=make_features(cfg, mesh))


def _vae_config(published: dict[str, Any], dtype: str) -> AutoencoderKLConfig:
    fields = {f.name for f in dataclasses.fields(AutoencoderKLConfig)} - {'dtype'}
    try:
        values = {name: published[name] for name in fields if name in published}
        values['block_out_channels'] = tuple(values['block_out_channels'])
        return AutoencoderKLConfig(**values, dtype=dtype)
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'vae/config.json is not one of {AUTOENCODER} ({e}); fetch the folder '
                           'again') from e


def abstract(options: LoadOptions) -> Teacher:
    """The published teacher with shapes in place of weights: to compile for, not to run."""
    mesh, size = options.devices, options.size or SIZE
    kind = resolve(options.attention, mesh.devices.flat[0].platform)
    cfg = NextDiTConfig(dtype=options.dtype, remat=options.remat, attention=kind)
    shape = _latent_shape(size, cfg, FACTOR)
    latents = Latents(shape, limit=LIMIT,
                      shape_of=functools.partial(_latent_shape, cfg=cfg, factor=FACTOR),
                      decoder=_decoder_program(AutoencoderKLConfig(), mesh, size))
    return Teacher(
        'lumina', _abstract_params(cfg, options.param_dtype), make_denoiser(cfg, mesh), latents,
        CondSpec.text(cfg.cap_feat_dim), Shift(SHIFT), 'abstract', RULES,
        published_text.abstract(text.PIPELINE, Gemma2Config(), options), rescale=rescale,
        features=make_features(cfg, mesh),
        flops=functools.partial(flops.nextdit_forward, cfg, shape[:2]))


def _decoder_program(cfg: AutoencoderKLConfig, mesh: Mesh, size: Sequence[int]) -> Decoder:
    """Decodes an image of `size` pixels, or a tile of it; every device does the same."""
    params = autoencoder_kl.abstract_params(cfg)
    run = jax.jit(autoencoder_kl.functional(cfg)[1], out_shardings=sharding.replicated(mesh))
    largest = cfg.sample_size // cfg.factor
    sides = [side // cfg.factor for side in size]
    if sides[0] * sides[1] > largest**2:
        sides = [min(side, largest) for side in sides]
    latents = jax.ShapeDtypeStruct((1, *sides, cfg.latent_channels), jnp.float32)
    return Decoder(run, params, sharding.shard_tree(params, VAE_RULES, mesh), latents,
                   flops.autoencoder_decode(cfg, (sides[0], sides[1])))


def _decoder(vae: diffusers.Checkpoint, mesh: Mesh) -> tuple[int, Callable[[Any], Any]]:
    """(pixels a latent, latents -> images; in tiles beyond the area the codec is meant for)."""
    cfg = _vae_config(vae.config, 'float32')
    program = _decoder_program(cfg, mesh, (cfg.sample_size, cfg.sample_size))
    diffusers.check(vae, program.params, names.autoencoder)
    params = diffusers.import_tree(vae, program.params, program.shardings, names.autoencoder)
    decode = functools.partial(program.run, params)
    largest = (cfg.sample_size // cfg.factor) ** 2

    def one(z: np.ndarray) -> Any:
        whole = z.shape[1] * z.shape[2] <= largest
        return decode(z) if whole else autoencoder_kl.decode_tiled(decode, z, cfg)

    # An image at a time: the codec's attention alone takes 1 GiB at 1024 x 1024.
    return cfg.factor, lambda z: np.concatenate(
        [one(part) for part in np.split(np.asarray(z), len(z))])


def export(params: Any, published: dict[str, Any], folder: Path, dtype: Any) -> None:
    """Writes `params` as a diffusers transformer's `folder`; see `diffusers.export_tree`.

    `published` is the teacher's own ``transformer/config.json``: a student has its shape.
    """
    diffusers.export_tree(params, names.transformer, folder, published, dtype)
