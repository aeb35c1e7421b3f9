"""The data set `emoji`: captions of training scenes, with images where a batch wants them."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from ddmd_jax.data.batch import Cond
from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.families.base import Teacher
from ddmd_jax.families.emoji import codec, scenes


def load(config: Any, teacher: Teacher, mesh: Mesh) -> Prompts:
    """Training scenes by number, drawn by the run's seed; captions are encoded as they are needed.

    Raises:
      DataFileError, WeightsError: the drawings or the codec cannot be read.
    """
    del mesh  # encoded on one device
    world, seed = scenes.load(), config.seed
    caption = lambda row: world.caption(world.scene(scenes.rng_of(seed, row)))

    def cond(rows: np.ndarray) -> Cond:
        return teacher.encode([caption(row) for row in rows])

    def real(rows: np.ndarray) -> np.ndarray:
        return np.asarray(codec.load().encode(world.batch(seed, rows)[1]))

    return Prompts(
        np.arange(config.data.scenes), lambda rows, length: cond(rows), cond,
        teacher.encode(['']), caption, identity=f'emoji scenes {world.identity}', real=real)
