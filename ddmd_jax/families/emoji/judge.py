"""The independent judge: a small convolutional network trained on real renders only.

It names the glyph and the background of a picture; its features are the space of the Fréchet
distance. It never saw a generated image, nor any held-out (glyph, colour) pair:
`python -m ddmd_jax.prepare classifier` trains it, with random backgrounds, shifts, noise, blur
and contrast, so that it judges what is drawn and not the last bit of how.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from ddmd_jax.families.emoji import data as emoji
from ddmd_jax.weights import flat

Array = jax.Array

WEIGHTS = emoji.FILES / 'classifier.safetensors'
RESTORE_HINT = 'reinstall the package, or train it with `python -m ddmd_jax.prepare classifier`'
HIDDEN = 96
BATCH = 128


class Classifier(nnx.Module):
    """``images [B, 24, 24, 3] -> (glyph logits, colour logits, features [B, 192])``."""

    def __init__(self, glyphs: int, colours: int, rngs: nnx.Rngs):
        conv = lambda din, dout, stride: nnx.Conv(
            din, dout, (3, 3), strides=(stride, stride), rngs=rngs)
        self.conv_1, self.conv_2, self.conv_3 = conv(3, 32, 2), conv(32, 64, 2), conv(64, 64, 1)
        self.dense = nnx.Linear(6 * 6 * 64, HIDDEN, rngs=rngs)
        self.glyph = nnx.Linear(HIDDEN, glyphs, rngs=rngs)
        self.colour = nnx.Linear(HIDDEN, colours, rngs=rngs)

    def __call__(self, images: Array) -> tuple[Array, Array, Array]:
        fine = jax.nn.gelu(self.conv_1(images))
        coarse = jax.nn.gelu(self.conv_2(fine))
        x = jax.nn.gelu(self.conv_3(coarse))
        dense = self.dense(x.reshape(x.shape[0], -1))
        hidden = jax.nn.gelu(dense)
        # What it is (the dense layer, trained to forgive blur) and how it is drawn (the
        # average answers of the early filters, which do not forgive it).
        texture = [jnp.mean(layer, axis=(1, 2)) for layer in (fine, coarse)]
        features = jnp.concatenate([dense, *texture], axis=-1)
        return self.glyph(hidden), self.colour(hidden), features


def build(glyphs: int, colours: int) -> Callable[[Any, Array], tuple[Array, Array, Array]]:
    """``(params, images) -> (glyph logits, colour logits, features)``."""
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Classifier(glyphs, colours, nnx.Rngs(0))))

    def apply(params: Any, images: Array) -> tuple[Array, Array, Array]:
        state = jax.tree.map(lambda x: x, abstract)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)(images)

    return apply


def load(path: Path = WEIGHTS) -> Any:
    """Jitted ``images -> (glyph index, colour index, features)`` of the shipped judge.

    Raises:
      WeightsError: the file is missing, damaged, or fits other glyphs than those shipped.
    """
    params, meta = flat.load(path, RESTORE_HINT)
    names = emoji.load_pairs().names
    if int(meta.get('glyphs', -1)) != len(names):
        raise flat.WeightsError(f'{path} was trained on {meta.get("glyphs")} glyphs, the package '
                                f'has {len(names)}; {RESTORE_HINT}')
    apply = build(len(names), len(emoji.COLOURS))

    @jax.jit
    def judge(images: Array) -> tuple[Array, Array, Array]:
        glyph, colour, features = apply(params, images)
        return jnp.argmax(glyph, -1), jnp.argmax(colour, -1), features

    return judge


def judge_all(judge: Any, images: np.ndarray, batch: int = 256) -> tuple[np.ndarray, ...]:
    """`judge` over many images with one compiled shape."""
    pad = -len(images) % batch
    padded = np.concatenate([images, np.repeat(images[:1], pad, 0)])
    parts = [jax.device_get(judge(padded[i:i + batch])) for i in range(0, len(padded), batch)]
    return tuple(np.concatenate(p)[:len(images)] for p in zip(*parts))


def training_batch(rng: np.random.Generator, pairs: emoji.Pairs) -> dict[str, np.ndarray]:
    """Roughed-up renders on named (three in four, never held-out pairs) or random colours."""
    seen = np.flatnonzero(~pairs.held_out)
    rows = rng.choice(seen, BATCH)
    palette = np.asarray(list(emoji.COLOURS.values()), np.float32)
    rgb = palette[pairs.colour[rows]]
    named = rng.random(BATCH) < 0.75
    rgb = np.where(named[:, None], rgb, rng.uniform(0, 255, rgb.shape).astype(np.float32))
    x = emoji.compose(pairs.glyphs[pairs.glyph[rows]], rgb)
    shifts = rng.integers(-1, 2, (BATCH, 2))
    # The shift rolls; margins are plain background, so nothing wraps around into view.
    x = np.stack([np.roll(im, s, (0, 1)) for im, s in zip(x, shifts)])
    blur = 0.25 * (np.roll(x, 1, 1) + np.roll(x, -1, 1) + np.roll(x, 1, 2) + np.roll(x, -1, 2))
    share = rng.uniform(0, 0.5, (BATCH, 1, 1, 1)) * (rng.random((BATCH, 1, 1, 1)) < 0.5)
    x = (1 - share) * x + share * blur
    x = x * rng.uniform(0.9, 1.1, (BATCH, 1, 1, 1))
    x = x + rng.uniform(0, 0.15, (BATCH, 1, 1, 1)) * rng.standard_normal(x.shape)
    return {'image': x.astype(np.float32), 'glyph': pairs.glyph[rows],
            'colour': pairs.colour[rows], 'named': named.astype(np.float32)}


def train(steps: int, seed: int, out: Path) -> dict[str, float]:
    """Trains and writes the judge; returns its accuracies on clean real renders."""
    pairs = emoji.load_pairs()
    counts = (len(pairs.names), len(emoji.COLOURS))
    apply = build(*counts)
    params = nnx.to_pure_dict(nnx.state(Classifier(*counts, nnx.Rngs(seed)), nnx.Param))
    tx = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-3)

    def loss_fn(params: Any, batch: Any) -> Array:
        glyph, colour, _ = apply(params, batch['image'])
        cross = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(cross(glyph, batch['glyph'])
                        + cross(colour, batch['colour']) * batch['named'])

    @jax.jit
    def step(params: Any, opt: Any, batch: Any):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt, loss

    opt, rng = tx.init(params), np.random.default_rng(seed)
    for _ in tqdm(range(steps), 'classifier', unit=' updates', file=sys.stderr, dynamic_ncols=True):
        params, opt, _ = step(params, opt, training_batch(rng, pairs))
    flat.save(out, params, {'glyphs': str(counts[0]), 'steps': str(steps)}, dtype=jnp.bfloat16)
    return accuracies(load(out), pairs)


def accuracies(judge: Any, pairs: emoji.Pairs) -> dict[str, float]:
    """Share of clean real renders judged right, on pairs seen in training and held out."""
    glyph, colour, _ = judge_all(judge, pairs.images(np.arange(len(pairs.glyph))))
    right, held = glyph == pairs.glyph, pairs.held_out
    return {'glyph': float(right[~held].mean()), 'glyph_held_out': float(right[held].mean()),
            'colour': float((colour == pairs.colour).mean())}
