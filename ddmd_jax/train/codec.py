"""The task `codec`: trains a family's own latent codec, an `AutoencoderKL`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ddmd_jax import families
from ddmd_jax.data import loader
from ddmd_jax.data.order import Order, Planned
from ddmd_jax.evaluation import pictures
from ddmd_jax.families.codec import CodecTraining
from ddmd_jax.models import autoencoder_kl
from ddmd_jax.models.autoencoder_kl import AutoencoderKLConfig
from ddmd_jax.parallel import sharding
from ddmd_jax.train import optim, train, update
from ddmd_jax.train.feed import Feed
from ddmd_jax.train.startup import Startup
from ddmd_jax.train.state import StateSpec, TrainState, fresh
from ddmd_jax.train.train import NOTHING_ELSE, Options
from ddmd_jax.train.watch.logs import RunLog
from ddmd_jax.util import places
from ddmd_jax.util.places import Place
from ddmd_jax.weights import flat

Array = jax.Array
Params = dict[str, Any]

RULES: sharding.Rules = (('.*', ()),)  # a small network: whole on every device
SHOWN = 8  # unseen images of the grid that is logged
MEASURED = 1024  # rows whose latents' shift and scale are taken


def train_codec(config: Any, workdir: Place, options: Options = NOTHING_ELSE) -> None:
    """Trains to the end and writes the EMA weights as ``workdir/codec.safetensors``.

    Raises:
      see `train.fit`.
    """
    train.fit_and_write(prepare(config), config, workdir / 'codec.safetensors', options)


def prepare(config: Any) -> Codec:
    """Everything that `train.fit` needs."""
    mesh = sharding.make_mesh(config.mesh)
    sharding.check_batch(config.data.global_batch, mesh)
    family = families.get(config.teacher.name)
    assert family.codec, 'the config was checked'
    return Codec(config, family.codec(config), mesh)


def architecture(config: Any, side: int) -> AutoencoderKLConfig:
    """Of a config's section `codec`; scale and shift are not known yet."""
    c = config.codec
    return AutoencoderKLConfig(
        latent_channels=c.latent_channels, block_out_channels=tuple(c.widths),
        layers_per_block=c.layers_per_block, norm_num_groups=c.groups, scaling_factor=1.0,
        shift_factor=None, mid_block_add_attention=False, sample_size=side, dtype=c.dtype)


class Codec:
    """A codec's training as a `train.Task`; student and EMA hold encoder and decoder."""

    name = 'codec'

    def __init__(self, config: Any, own: CodecTraining, mesh: Mesh):
        self.config, self.own, self.startup = config, own, Startup()
        self.identities = {'teacher_identity': 'none', 'data_identity': own.identity}
        self.cfg = architecture(config, own.unseen.shape[1])
        # Teachers know a frozen encoder by its shift and scale too: measured on another device,
        # they would differ in their last digits.
        self._kept = (own.read(config.init_from)[0] if config.codec.frozen_encoder
                      and places.of(config.init_from).is_file() else None)
        self._graphdef, self._abstract = nnx.split(
            nnx.eval_shape(lambda: autoencoder_kl.AutoencoderKL(self.cfg, nnx.Rngs(0))))
        sides = tuple((side,) for side in config.codec.sides)
        self.order = Order(own.rows, config.data.global_batch, config.seed, shapes=sides)
        tx = optim.make_optimizer(config.optim.student, config.train.steps)
        self.spec = StateSpec(lambda: fresh(self._init(), tx), RULES, mesh)
        self._update = update.plain(self.loss, config)
        self._reconstruct = jax.jit(lambda params, images: to_uint8(
            self._bind(params).decode(self._bind(params).encode_moments(to_unit(images))[0])))

    def _init(self) -> Params:
        model = autoencoder_kl.AutoencoderKL(self.cfg, nnx.Rngs(self.config.seed))
        return flat.unflatten(flat.flatten(nnx.to_pure_dict(nnx.state(model, nnx.Param))))

    def _bind(self, params: Params) -> autoencoder_kl.AutoencoderKL:
        state = jax.tree.map(lambda x: x, self._abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graphdef, state)

    def feed(self, skip: frozenset[int]) -> Feed:
        def lookup(planned: Planned) -> dict[str, np.ndarray]:
            assert planned.shape, 'the order gives each batch one'
            return {'image': self.own.lookup(planned.rows, planned.shape[0])}

        mesh, rows = self.spec.mesh, self.config.data.global_batch
        read = loader.batches(self.order, lookup, sharding.rows_here(mesh, rows))
        return Feed(read, lambda batch: sharding.put_batch(batch, mesh, rows), skip)

    def step(self, state: TrainState, next_batch: Callable[[], Any],
             fresh: bool) -> tuple[TrainState, dict[str, Any]]:
        return self._update(state, next_batch(), self.config.train.steps)

    def loss(self, params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        """L1 of pixels and of their differences, and the latents' divergence; with its parts.

        Args:
          batch: ``image [B, H, W, 3]`` uint8.
          key: of the latents' noise.
        """
        c, x, model = self.config.codec, to_unit(batch['image']), self._bind(params)
        mean, logvar = model.encode_moments(x)
        if c.frozen_encoder:  # without a gradient it stays as it is
            mean, logvar = jax.lax.stop_gradient((mean, logvar))
        z = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, jnp.float32)
        error = model.decode(z) - x
        l1 = jnp.mean(jnp.abs(error))
        gradient = (jnp.mean(jnp.abs(jnp.diff(error, axis=1)))
                    + jnp.mean(jnp.abs(jnp.diff(error, axis=2))))
        kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
        return l1 + c.gradient * gradient + c.kl * kl, {'l1': l1, 'gradient': gradient, 'kl': kl}

    def measure(self, state: TrainState, history: list[dict[str, Any]],
                values: dict[str, Any]) -> tuple[dict[str, Any], str]:
        unseen = self.own.unseen[:self.config.codec.unseen]
        values = values | {'psnr': float(psnr(unseen, self.reconstruct(state.ema, unseen)).mean())}
        return values, f'loss {values["loss"]:.4f} PSNR {values["psnr"]:.2f} dB'

    def show(self, state: TrainState, step: int, log: RunLog) -> None:
        real = self.own.unseen[:SHOWN]
        log.image(step, 'samples/real_decoded', pictures.rows_of_images(
            [np.asarray(to_unit(x)) for x in (real, self.reconstruct(state.ema, real))]))

    def reconstruct(self, params: Params, images: np.ndarray, batch: int = 64) -> np.ndarray:
        """Images ``[N, H, W, 3]`` uint8, encoded (the mean) and decoded."""
        return np.concatenate([np.asarray(self._reconstruct(params, images[i:i + batch]))
                               for i in range(0, len(images), batch)])

    def read_weights(self, path: str) -> Params:
        return self.own.read(path)[1]

    def write(self, out: Path, params: Params, step: int) -> dict[str, Any]:
        """Measures what is about to be written, in bf16, and writes it; returns the figures."""
        kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(np.float32), params)
        encode = jax.jit(lambda images: self._bind(kept).encode_moments(to_unit(images))[0])
        side = self.own.unseen.shape[1]
        latents = np.concatenate([np.asarray(encode(self.own.lookup(rows, side)))
                                  for rows in self.own.rows[:MEASURED].reshape(-1, 64)])
        shift, std = float(latents.mean()), float(latents.std())
        cfg = self._kept or dataclasses.replace(
            self.cfg, scaling_factor=1.0 / std, shift_factor=shift)
        scaled = (latents - (cfg.shift_factor or 0.0)) * cfg.scaling_factor
        each_image = (1, 2, 3)
        moments = scaled.mean(each_image).mean(), scaled.var(each_image).mean()
        each = psnr(self.own.unseen, self.reconstruct(kept, self.own.unseen))
        measured = {'psnr': round(float(each.mean()), 2), 'psnr_worst': round(float(each.min()), 2),
                    'step': step, 'std': round(float(scaled.std(each_image).mean()), 4),
                    'moments': [round(float(moment), 4) for moment in moments]}
        self.own.save(out, cfg, kept, measured | {'written': time.strftime('%Y-%m-%d')})
        return measured


def to_unit(images: Any) -> Array:
    """uint8 to [-1, 1]."""
    return jnp.asarray(images, jnp.float32) / 127.5 - 1.0


def to_uint8(images: Array) -> Array:
    """[-1, 1], or a little beyond it, to uint8."""
    return jnp.round(jnp.clip(images * 127.5 + 127.5, 0, 255)).astype(jnp.uint8)


def psnr(real: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of each of two batches' images, ``[N, ...]`` uint8."""
    error = np.square(real.astype(np.float32) - found).mean(axis=tuple(range(1, real.ndim)))
    return 20 * np.log10(255) - 10 * np.log10(np.maximum(error, 1e-3))
