"""The independent judge: a small convolutional network trained on real renders only.

It names the glyph and the background of a picture; its features are the space of the Fréchet
distance. It never saw a generated image, nor any held-out (glyph, colour) pair:
`families/emoji/make.py` trains it, with random backgrounds, shifts, noise, blur
and contrast, so that it judges what is drawn and not the last bit of how.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ddmd_jax.families.emoji import data as emoji
from ddmd_jax.weights import flat

Array = jax.Array

WEIGHTS = emoji.FILES / 'classifier.safetensors'
HIDDEN = 96


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
    params, meta = flat.load(path, emoji.RESTORE_HINT)
    names = emoji.load_pairs().names
    if int(meta.get('glyphs', -1)) != len(names):
        raise flat.WeightsError(f'{path} was trained on {meta.get("glyphs")} glyphs, the package '
                                f'has {len(names)}; {emoji.RESTORE_HINT}')
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
