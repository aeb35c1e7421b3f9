"""``python -m own_teacher.train FILE.safetensors``: trains the teacher, in seconds on a CPU.

It predicts epsilon at uniformly drawn steps of the table; a tenth of the captions are left out, so
that there is guidance.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from ddmd_jax.weights import flat
from own_teacher import process, shapes, teacher


def train(updates: int = 4000, batch: int = 128):
    """Parameters ``{'denoiser', 'text'}``."""
    images = jnp.stack([shapes.draw(caption) for caption in shapes.CAPTIONS])
    ids = jnp.asarray(teacher.tokenize(shapes.CAPTIONS)['ids'])
    table = jax.random.normal(jax.random.key(1), (len(teacher.WORDS) + 1, teacher.WIDTH))
    params = {'denoiser': nnx.to_pure_dict(nnx.state(teacher.Denoiser(nnx.Rngs(0)), nnx.Param)),
              'text': {'table': table}}
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, updates))

    def loss_fn(params, key):
        k_row, k_null, k_step, k_noise = jax.random.split(key, 4)
        row = jax.random.randint(k_row, (batch,), 0, len(shapes.CAPTIONS))
        step = jax.random.randint(k_step, (batch,), 0, process.STEPS)
        noise = jax.random.normal(k_noise, (batch, *teacher.SHAPE))
        at = lambda table: jnp.asarray(table)[step][:, None, None, None]
        dropped = jax.random.bernoulli(k_null, 0.1, (batch, 1))
        cond = teacher.embed(params['text'], {'ids': jnp.where(dropped, 0, ids[row]), 'mask': None})
        x_vp = at(process.A) * images[row] + at(process.S) * noise
        epsilon = teacher.network(params['denoiser'], x_vp, step, cond['embeds'])
        return jnp.mean(jnp.square(epsilon - noise))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, state, key):
        grads = jax.grad(loss_fn)(params, key)
        changes, state = tx.update(grads, state)
        return optax.apply_updates(params, changes), state

    state = tx.init(params)
    for i in range(updates):
        params, state = update(params, state, jax.random.key(i))
    return jax.device_get(params)


if __name__ == '__main__':
    flat.save(Path(sys.argv[1]), train(), {'architecture': 'own_teacher'})
