"""The independent judge of pictures: a small convolutional network trained on real scenes only.

It reads layout, objects and size off a picture; its features are the space of the Fréchet distance
and of diversity. It saw neither a drawn picture nor a held-out pair. The background is measured: a
network would have to guess it where an object never stood on it in training.
`families/emoji/make_judge.py` trains it: with noise, blur, shifts and other contrasts, so that it
judges what is drawn and not the last bit of how; and with spoilt scenes (no object, three of them,
half-faded, torn or blended ones), all of which it calls `WRONG`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from skimage import color

from ddmd_jax.evaluation import measures
from ddmd_jax.families.emoji import scenes
from ddmd_jax.families.emoji.drawings import FILES, RESTORE_HINT
from ddmd_jax.models.layers import abstract_params, functional
from ddmd_jax.weights import flat

Array = jax.Array

WEIGHTS = FILES / 'judge.safetensors'
PARTS = ('layout', 'first', 'second', 'size')  # read by the network
# Layouts of a picture. Two objects of which one is both left of and above the other have a layout
# of their own, and are right for either caption; WRONG is a picture that is no scene at all.
ONE, BESIDE, STACKED, FALLING, RISING, WRONG = range(6)
RIGHT = {scenes.ONE: (ONE,), scenes.BESIDE: (BESIDE, FALLING, RISING),
         scenes.STACKED: (STACKED, FALLING, RISING)}  # by the layout that was asked for
HIDDEN = 128


def classes(world: scenes.World) -> dict[str, int]:
    """How many answers each of `PARTS` has; no second object and a pair's size are answers too."""
    objects = len(world.names)
    return {'layout': WRONG + 1, 'first': objects, 'second': objects + 1,
            'size': len(scenes.SIZES) + 1}


def matches(readings: np.ndarray, asked: Sequence[scenes.Scene]) -> dict[str, np.ndarray]:
    """Which pictures show the scene that was asked for, part by part, and in `all` parts.

    Args:
      readings: ``[N, 5]`` of `read`.
      asked: N scenes.

    Returns:
      ``[N]`` bool by 'layout', 'objects', 'size', 'colour' and 'all'.
    """
    found: dict[str, list[bool]] = {'layout': [], 'objects': [], 'size': [], 'colour': []}
    for (layout, first, second, size, colour), scene in zip(readings.tolist(), asked, strict=True):
        if scene.layout == scenes.STACKED and layout == RISING:  # read from the left: lower first
            first, second = second, first
        pair = scene.second is not None
        found['layout'].append(layout in RIGHT[scene.layout])
        found['objects'].append((first, second)[:1 + pair] == scene.places)
        found['size'].append(size == (len(scenes.SIZES) if pair else scene.size))
        found['colour'].append(colour == scene.colour)
    parts = {name: np.asarray(right) for name, right in found.items()}
    return {**parts, 'all': np.all(list(parts.values()), axis=0)}


class Judge(nnx.Module):
    """``images [B, 64, 64, 3] in [-1, 1] -> (logits [B, n] of each of PARTS, features [B, D])``."""

    def __init__(self, answers: dict[str, int], rngs: nnx.Rngs):
        conv = lambda din, dout, size, stride: nnx.Conv(
            din, dout, (size, size), strides=(stride, stride), rngs=rngs)
        self.stem = conv(3, 48, 7, 4)  # to 16 x 16: convolutions at full size cost most on CPU
        self.conv_1, self.conv_2, self.conv_3, self.conv_4 = (
            conv(48, 80, 3, 2), conv(80, 80, 3, 1), conv(80, 80, 3, 1), conv(80, 96, 3, 2))
        self.dense = nnx.Linear(4 * 4 * 96, HIDDEN, rngs=rngs)
        self.heads = nnx.Dict({part: nnx.Linear(HIDDEN, n, rngs=rngs)
                               for part, n in answers.items()})

    def __call__(self, images: Array) -> tuple[dict[str, Array], Array]:
        fine = jax.nn.gelu(self.stem(images))
        coarse = jax.nn.gelu(self.conv_1(fine))
        x = coarse + jax.nn.gelu(self.conv_2(coarse))
        x = x + jax.nn.gelu(self.conv_3(x))
        x = jax.nn.gelu(self.conv_4(x))
        dense = self.dense(x.reshape(x.shape[0], -1))
        hidden = jax.nn.gelu(dense)
        # What it is and where (the dense layer, trained to forgive blur), and how it is drawn (the
        # average answers of the early filters, which do not forgive it).
        texture = [jnp.mean(layer, axis=(1, 2)) for layer in (fine, coarse)]
        features = jnp.concatenate([dense, *texture], axis=-1)
        return {part: head(hidden) for part, head in self.heads.items()}, features


def load(world: scenes.World, path: Path = WEIGHTS) -> Callable[[Array], tuple[Array, Array]]:
    """Jitted ``images [B, 64, 64, 3] -> (answers [B, 4], features [B, D])`` of the shipped judge.

    The answers are the likeliest to each of `PARTS`.

    Raises:
      WeightsError: the file is missing, damaged, no judge, or was trained on another world.
    """
    params, meta = flat.load(path, RESTORE_HINT)
    if meta.get('world') != world.identity:
        raise flat.WeightsError(f'{path} was trained on scenes {meta.get("world")}, the package '
                                f'has {world.identity}; {RESTORE_HINT}')
    make = lambda: Judge(classes(world), nnx.Rngs(0))
    try:
        flat.check_shapes(params, abstract_params(make))
    except ValueError as e:
        raise flat.WeightsError(f'not a judge: {path} ({e}); {RESTORE_HINT}') from e
    apply = functional(make)

    @jax.jit
    def judge(images: Array) -> tuple[Array, Array]:
        logits, features = apply(params, images)
        return jnp.stack([jnp.argmax(logits[part], -1) for part in PARTS], -1), features

    return judge


def read(judge: Callable[[Array], tuple[Array, Array]], images: np.ndarray,
         batch: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """Readings ``[N, 5]`` and features ``[N, D]`` of images ``[N, 64, 64, 3]`` in [-1, 1].

    A reading is the network's answer to each of `PARTS`, and the background's number.
    """
    pad = -len(images) % batch
    padded = np.concatenate([images, np.repeat(images[:1], pad, 0)])
    parts = [jax.device_get(judge(jnp.asarray(padded[i:i + batch])))
             for i in range(0, len(padded), batch)]
    answers, features = (np.concatenate(p)[:len(images)] for p in zip(*parts))
    return np.concatenate([answers, nearest_colour(images)[:, None]], axis=1), features


def nearest_colour(images: np.ndarray) -> np.ndarray:
    """Number ``[N]`` of the colour of which some shade is nearest, in CIELAB, to the background."""
    factors = np.linspace(*scenes.SHADES, 5)
    shades = np.minimum(np.multiply.outer(factors, list(scenes.COLOURS.values())) / 255, 1)
    drawn = color.rgb2lab(measures.background(images))[:, None]
    apart = np.linalg.norm(drawn - color.rgb2lab(shades.reshape(-1, 3)), axis=-1)
    return apart.argmin(1) % len(scenes.COLOURS)


def to_unit(images: np.ndarray) -> np.ndarray:
    """uint8 -> fp32 in [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1
