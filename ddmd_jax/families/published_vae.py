"""Codecs of published pipelines: diffusers' `AutoencoderKL`, from the pipeline's folder."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.families import published_config
from ddmd_jax.families.base import Decoder, ImageEncoder, LoadOptions
from ddmd_jax.models import autoencoder_kl, flops
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.weights import diffusers
from ddmd_jax.weights.flat import WeightsError
from ddmd_jax.weights.names import Entry

AUTOENCODER = 'AutoencoderKL'
WHOLE = 1024  # pixels: squares up to this are decoded in one piece, as pipelines do
RULES = ((r'.', ()),)  # 84 M parameters: whole on every device
# What diffusers takes where a config does not say: SDXL's is older than these fields.
ABSENT = {'use_quant_conv': True, 'use_post_quant_conv': True, 'mid_block_add_attention': True,
          'shift_factor': None, 'scaling_factor': 0.18215, 'norm_num_groups': 32}


def entry(path: str) -> Entry:
    """Published name of ours, spelt alike, e.g. ``decoder/mid_block/attentions/0/to_q/kernel``."""
    *modules, leaf = path.split('/')
    layout = 'same' if leaf != 'kernel' else 'linear' if modules[-1].startswith('to_') else 'conv'
    leaf = 'bias' if leaf == 'bias' else 'weight'
    return Entry('.'.join(['to_out.0' if m == 'to_out' else m for m in modules] + [leaf]), layout)


def open_folder(folder: Path, variant: str = '') -> diffusers.Checkpoint:
    """Opens a pipeline's ``vae``, in `variant` if it comes in it; see `diffusers.open_folder`."""
    return diffusers.open_folder(folder, AUTOENCODER,
                                 diffusers.variant_in(folder, diffusers.STEM, variant))


def vae_config(published: dict[str, Any], dtype: str) -> AutoencoderKLConfig:
    """Our architecture from a published ``vae/config.json``; raises `WeightsError`."""
    fields = {f.name for f in dataclasses.fields(AutoencoderKLConfig)} - {'dtype'}
    try:
        values = ABSENT | {name: published[name] for name in fields if name in published}
        for name in ('latents_mean', 'latents_std'):  # of each channel, where pipelines know them
            if published.get(name) is not None:
                raise ValueError(f'{name} is {str(published[name])[:40]}, supported is None')
        values['block_out_channels'] = tuple(values['block_out_channels'])
        cfg = AutoencoderKLConfig(
            **published_config.checked(AutoencoderKLConfig, values), dtype=dtype)
        # Some were saved by who trained them at 512; the network is the same at any size.
        return dataclasses.replace(cfg, sample_size=max(cfg.sample_size, WHOLE))
    except (KeyError, TypeError, ValueError) as e:
        raise WeightsError(f'vae/config.json is not one of {AUTOENCODER} ({e}); fetch the folder '
                           'again') from e


def decoder_program(cfg: AutoencoderKLConfig, mesh: Mesh, size: Sequence[int]) -> Decoder:
    """Decodes an image of `size` pixels, or a tile of it; every device does the same."""
    params = autoencoder_kl.abstract_params(cfg)
    run = jax.jit(autoencoder_kl.functional(cfg)[1], out_shardings=sharding.replicated(mesh))
    largest = cfg.sample_size // cfg.factor
    sides = [side // cfg.factor for side in size]
    if sides[0] * sides[1] > largest**2:
        sides = [min(side, largest) for side in sides]
    latents = jax.ShapeDtypeStruct((1, *sides, cfg.latent_channels), jnp.float32)
    return Decoder(run, params, sharding.shard_tree(params, RULES, mesh), latents,
                   flops.autoencoder_decode(cfg, (sides[0], sides[1])))


def encoder_identity(vae: diffusers.Checkpoint) -> str:
    """Names the encoder of a codec, with scale and shift; no weights are read but samples of them.

    A better decoder leaves latents, and this, as they are.
    """
    cfg = vae_config(vae.config, 'float32')
    tensors = {name: t for name, t in vae.tensors.items()
               if name.startswith(('encoder.', 'quant_conv.'))}
    names = diffusers.identity(dataclasses.replace(vae, tensors=tensors))
    return f'{names} x {cfg.scaling_factor:g} from {cfg.shift_factor or 0.0:g}'


def image_encoder(family: str, folder: Path, options: LoadOptions) -> ImageEncoder:
    """Of a pipeline's folder; in fp32, whole on every device.

    Raises:
      WeightsError: there is no codec in it, or it is damaged or of another architecture.
    """
    if not (folder / 'vae').is_dir():
        raise WeightsError(f'{folder} has no vae, which makes latents of images; give the folder '
                           'of a whole pipeline')
    vae, mesh = open_folder(folder / 'vae', options.variant), options.devices
    cfg = vae_config(vae.config, 'float32')
    shapes = autoencoder_kl.abstract_params(cfg)
    diffusers.check(vae, shapes, entry)
    half = {name: shapes[name] for name in ('encoder', 'quant_conv') if name in shapes}
    params = diffusers.import_tree(vae, half, sharding.shard_tree(half, RULES, mesh), entry)
    encode = autoencoder_kl.functional(cfg)[0]

    def run(params: Any, images: Any, numbers: Any, key: Any, mean: bool) -> Any:
        noise = None
        if not mean:
            shape = (*(side // cfg.factor for side in images.shape[1:3]), cfg.latent_channels)
            noise = jax.vmap(lambda number: jax.random.normal(
                jax.random.fold_in(key, number), shape, jnp.float32))(numbers)
        return encode(params, images.astype(jnp.float32) / 127.5 - 1.0, noise)

    program = jax.jit(run, static_argnames='mean', out_shardings=sharding.batch_sharding(mesh))
    return ImageEncoder(family, program, params, cfg.factor, cfg.latent_channels,
                        encoder_identity(vae))


def decoder(vae: diffusers.Checkpoint, mesh: Mesh) -> tuple[int, Callable[[Any], Any]]:
    """(pixels a latent, latents -> images; in tiles beyond the area the codec is meant for).

    In fp32, which codecs that overflow in fp16 ask for (``force_upcast``). Everything is checked
    before anything is read.
    """
    cfg = vae_config(vae.config, 'float32')
    program = decoder_program(cfg, mesh, (cfg.sample_size, cfg.sample_size))
    diffusers.check(vae, program.params, entry)
    params = diffusers.import_tree(vae, program.params, program.shardings, entry)
    decode = functools.partial(program.run, params)
    largest = (cfg.sample_size // cfg.factor) ** 2

    def one(z: np.ndarray) -> Any:
        whole = z.shape[1] * z.shape[2] <= largest
        return decode(z) if whole else autoencoder_kl.decode_tiled(decode, z, cfg)

    # An image at a time: the codec's attention alone takes 1 GiB at 1024 x 1024.
    return cfg.factor, lambda z: np.concatenate(
        [one(part) for part in np.split(np.asarray(z), len(z))])
