"""The embedded world's codec: how it is trained, its file, and its folder in diffusers' format."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.families import published_config
from ddmd_jax.families.base import Decoder, Latents
from ddmd_jax.families.codec import CodecTraining
from ddmd_jax.families.emoji import scenes
from ddmd_jax.families.emoji.drawings import FILES
from ddmd_jax.families.lumina import names
from ddmd_jax.models import autoencoder_kl, flops
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.util import buckets, places, shape
from ddmd_jax.weights import diffusers, flat
from ddmd_jax.weights.flat import WeightsError

CODEC = FILES / 'codec.safetensors'
CURE, GIVEN_CURE = 'install the package again', 'correct the path'
ARCHITECTURE = 'EmojiCodec'
LIMIT = 4.0  # standard deviations of a latent from which it counts as saturated
EPOCH = 2**20  # scenes, by number
UNSEEN = 512  # half of them of captions that are held out, half new scenes
TRIES = 3  # places of a crop, of which the busiest is taken
SEED = 0  # of the scenes that are learned from; unseen ones have the next


def training(config: Any) -> CodecTraining:
    """By a config of the task `codec`; raises `DataFileError` if drawings cannot be read."""
    world, step = scenes.load(), 2 ** (len(config.codec.widths) - 1)
    return CodecTraining(
        identity=f'emoji scenes {world.identity}', rows=np.arange(EPOCH),
        lookup=lambda rows, side: crops(world.batch(SEED, rows.tolist())[1], rows, side, step),
        unseen=unseen(world), read=lambda path: read(path)[:2], save=save)


def crops(images: np.ndarray, rows: np.ndarray, side: int, step: int) -> np.ndarray:
    """``[B, side, side, 3]`` uint8 of scenes' `images`, where most is to be seen of `TRIES`.

    Where that is depends on the scenes' numbers, `rows`.

    A crop begins at a multiple of `step` pixels, so that objects lie on latents as they do in
    whole scenes. Background alone would teach little.
    """
    if side == scenes.SIDE:
        return images
    found = np.empty((len(rows), side, side, 3), np.uint8)
    for i, (row, image) in enumerate(zip(rows, images)):
        rng = np.random.default_rng((SEED, int(row), 1))
        corners = step * rng.integers(0, (scenes.SIDE - side) // step + 1, (TRIES, 2))
        tried = [image[y:y + side, x:x + side] for y, x in corners]
        found[i] = max(tried, key=_busy)
    return found


def _busy(image: np.ndarray) -> float:
    signed = image.astype(np.int16)
    return float(np.abs(np.diff(signed, axis=0)).sum() + np.abs(np.diff(signed, axis=1)).sum())


def unseen(world: scenes.World, count: int = UNSEEN) -> np.ndarray:
    """``[count, 64, 64, 3]`` uint8: new scenes, and held-out ones in every other place."""
    rng = np.random.default_rng(SEED + 1)
    return np.stack([world.image(world.scene(rng, held_out=bool(i % 2)), rng)
                     for i in range(count)])


def save(path: Path, cfg: AutoencoderKLConfig, params: Any, about: dict[str, Any]) -> None:
    """Writes both halves in bf16, the architecture and what is known of them as metadata."""
    flat.save(path, params, {
        'class': ARCHITECTURE, 'config': json.dumps(dataclasses.asdict(cfg)),
        'about': json.dumps(about)}, jnp.bfloat16)


def read(path: str | Path = CODEC) -> tuple[AutoencoderKLConfig, Any, dict[str, Any]]:
    """(config with shift and scale, fp32 parameters, figures measured when it was written).

    Raises:
      WeightsError: missing, damaged, or no codec of this family.
    """
    cure = CURE if path == CODEC else GIVEN_CURE
    params, metadata = flat.load(buckets.local(places.of(path)), cure)
    if metadata.get('class') != ARCHITECTURE:
        raise WeightsError(f'{path} is {metadata.get("class", "no file of this package")}, not '
                           f'{ARCHITECTURE}; {cure}')
    try:
        fields = shape.load(metadata['config'].encode(), {
            'block_out_channels': list, 'dtype': shape.one_of('float32', 'bfloat16')})
        fields['block_out_channels'] = tuple(fields['block_out_channels'])
        cfg = AutoencoderKLConfig(**published_config.checked(AutoencoderKLConfig, fields))
        about = shape.load(metadata['about'].encode(), {'std': shape.positive, 'moments': _two})
        flat.check_shapes(params, autoencoder_kl.abstract_params(cfg))
    except (KeyError, TypeError, ValueError, ArithmeticError) as e:
        raise WeightsError(f'{path} is no {ARCHITECTURE} ({e}); {cure}') from e
    return cfg, params, about


def _two(value: Any) -> str:
    two = isinstance(value, list) and len(value) == 2 and not any(map(shape.finite, value))
    return '' if two else 'not two finite numbers'


@dataclasses.dataclass(frozen=True)
class Codec:
    """The shipped codec, ready to use.

    Attributes:
      identity: names the encoder, scale and shift: teachers record whose latents they draw, which
        a better decoder leaves as they are.
      encode: ``images [B, 64, 64, 3] uint8 -> latents [B, 16, 16, C]`` fp32, jitted.
      latents: the space of those.
      config, params: of the network.
    """

    identity: str
    encode: Callable[[Any], Any]
    latents: Latents
    config: AutoencoderKLConfig
    params: Any

    def latents_over(self, mesh: Mesh) -> Latents:
        """`latents` with the decoder's program, all of its parameters on every device of `mesh`."""
        cfg, (height, width, _) = self.config, self.latents.shape
        abstract = autoencoder_kl.abstract_params(cfg)
        decoder = Decoder(
            jax.jit(autoencoder_kl.functional(cfg)[1]), abstract,
            sharding.shard_tree(abstract, ((r'.', ()),), mesh),
            jax.ShapeDtypeStruct((1, *self.latents.shape), jnp.float32),
            flops.autoencoder_decode(cfg, (height, width)))
        return dataclasses.replace(self.latents, decoder=decoder)


@functools.cache
def load(path: Path = CODEC) -> Codec:
    """Raises `WeightsError`: see `read`."""
    cfg, params, about = read(path)
    encode, decode = map(jax.jit, autoencoder_kl.functional(cfg))
    run = jax.jit(lambda images: encode(params, jnp.asarray(images, jnp.float32) / 127.5 - 1))
    side = scenes.SIDE // cfg.factor
    shape = (side, side, cfg.latent_channels)
    latents = Latents(shape, functools.partial(decode, params), LIMIT, None, about['std'],
                      tuple(about['moments']))
    identity = flat.identity({'encoder': params['encoder'],
                              'scale': np.asarray([cfg.scaling_factor, cfg.shift_factor or 0.0])})
    return Codec(identity, run, latents, cfg, params)


def export(cfg: AutoencoderKLConfig, params: Any, folder: Path, dtype: Any = jnp.float32) -> None:
    """Writes diffusers' folder of an `AutoencoderKL`; raises `WeightsError` if it is there."""
    levels = len(cfg.block_out_channels)
    fields = {k: v for k, v in dataclasses.asdict(cfg).items() if k != 'dtype'}
    config = {'_class_name': 'AutoencoderKL', 'act_fn': 'silu',
              'down_block_types': ['DownEncoderBlock2D'] * levels,
              'up_block_types': ['UpDecoderBlock2D'] * levels, **fields}
    diffusers.export_tree(params, names.autoencoder, folder, config, dtype)
