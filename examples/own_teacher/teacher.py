"""Network and text side of the family, and how its weights become a `Teacher`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddmd_jax.data.batch import CondSpec
from ddmd_jax.families import Latents, LoadOptions, Teacher, TextEncoder
from ddmd_jax.models.layers import functional
from ddmd_jax.weights import flat
from own_teacher import process, shapes

WIDTH, TOKENS = 32, 2
WORDS = {word: i + 1 for i, word in enumerate((*shapes.COLOURS, *shapes.PLACES))}  # 0: no word
SHAPE = (shapes.SIZE, shapes.SIZE, 3)
RULES = ((r'.', ()),)  # every parameter whole on every device: they are few


class Denoiser(nnx.Module):
    """``(x_vp [B, 8, 8, 3], step [B], embeds [B, 2, D]) -> epsilon``."""

    def __init__(self, rngs: nnx.Rngs):
        self.steps = nnx.Embed(process.STEPS, WIDTH, rngs=rngs)
        self.first = nnx.Linear(np.prod(SHAPE) + (TOKENS + 1) * WIDTH, 256, rngs=rngs)
        self.second = nnx.Linear(256, 256, rngs=rngs)
        self.last = nnx.Linear(256, np.prod(SHAPE), rngs=rngs)

    def __call__(self, x, step, embeds):
        rows = len(x)
        parts = x.reshape(rows, -1), embeds.reshape(rows, -1), self.steps(step)
        h = jax.nn.silu(self.first(jnp.concatenate(parts, axis=-1)))
        h = h + jax.nn.silu(self.second(h))
        return x + self.last(h).reshape(x.shape)  # at the last steps epsilon is nearly x itself


network = functional(lambda: Denoiser(nnx.Rngs(0)))  # (params, x, step, embeds) -> epsilon


def predict_clean(params, x_t, t, cond):
    """See `Teacher`: the paper's t in, a clean prediction out, whatever the network is."""
    t = jnp.broadcast_to(jnp.asarray(t, jnp.float32), x_t.shape[:1])
    step = process.step_of(t)
    epsilon = network(params, process.network_input(x_t, step), step, cond['embeds'])
    return process.clean(x_t, step, epsilon)


def tokenize(prompts) -> dict[str, np.ndarray]:
    """Word numbers ``[n, 2]`` int32 and which of them are words; '' has none but keeps a place."""
    rows = [[WORDS.get(word, 0) for word in prompt.split()][:TOKENS] for prompt in prompts]
    ids = np.asarray([row + [0] * (TOKENS - len(row)) for row in rows], np.int32)
    return {'ids': ids, 'mask': (ids > 0) | (np.arange(TOKENS) == 0)}


def embed(params, tokens):
    """The text side: a table. The null prompt is a row of it, never zeros."""
    return {'embeds': params['table'][tokens['ids']], 'mask': tokens['mask']}


def load(options: LoadOptions) -> Teacher:
    """The teacher of a file that `train` wrote; an exported student has no text side.

    Raises:
      WeightsError: missing or damaged.
    """
    params, _ = flat.load(Path(options.path), 'train it with `python -m own_teacher.train FILE`')
    identity, text = flat.identity(params), None
    if 'text' in params:
        text = TextEncoder('own_teacher', params['text'], tokenize, embed, TOKENS, WIDTH, RULES,
                           identity)
    latents = Latents(SHAPE, decode=lambda x: x,
                      std=float(np.mean([shapes.draw(c).std() for c in shapes.CAPTIONS])))
    return Teacher('own_teacher', params.get('denoiser', params), predict_clean, latents,
                   CondSpec.text(WIDTH), process.Table(), identity, RULES, text)
