"""The examples: a coloured rectangle in one of four places, 8 x 8 pixels, 16 captions."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.evaluation.suites import Examples, Suite
from ddmd_jax.families import Teacher

SIZE = 8
COLOURS = {'red': (1, -1, -1), 'green': (-1, 1, -1), 'blue': (-1, -1, 1), 'white': (1, 1, 1)}
PLACES = {'left': np.s_[1:7, 0:4], 'right': np.s_[1:7, 4:8], 'top': np.s_[0:4, 1:7],
          'bottom': np.s_[4:8, 1:7]}
CAPTIONS = [f'{colour} {place}' for colour in COLOURS for place in PLACES]


def draw(caption: str) -> np.ndarray:
    """The image of a caption, ``[8, 8, 3]`` in [-1, 1]."""
    colour, place = caption.split()
    image = np.full((SIZE, SIZE, 3), -0.6, np.float32)
    image[PLACES[place]] = COLOURS[colour]
    return image


def load(config: Any, teacher: Teacher, mesh: Any) -> Prompts:
    """The data set `shapes` of a run: all captions, encoded at the start."""
    cond = teacher.encode(CAPTIONS)
    of = lambda rows: jax.tree.map(lambda x: x[rows], cond)
    return Prompts(np.arange(len(CAPTIONS)), lambda rows, length: of(rows), of,
                   null=teacher.encode(['']), caption=CAPTIONS.__getitem__, identity='shapes')


def examples(seen: int, held_out: int, seed: int) -> Examples:
    """Captions in their order, as often as they are asked for; nothing is held out of training."""
    captions = list(np.resize(CAPTIONS, seen + held_out))
    real = np.stack([draw(caption) for caption in captions])
    error = lambda images: {'error': float(np.sqrt(np.mean(np.square(images - real))))}
    return Examples(captions, error, real=real)


SUITE = Suite('shapes', {'error': '.3f'}, examples)
