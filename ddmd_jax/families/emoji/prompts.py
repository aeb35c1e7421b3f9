"""The data set `emoji`: captions of all pairs that are not held out, with their images."""

from typing import Any

import jax
from jax.sharding import Mesh

from ddmd_jax.data.conditioning import Prompts
from ddmd_jax.families.base import Teacher
from ddmd_jax.families.emoji import data


def load(config: Any, teacher: Teacher, mesh: Mesh) -> Prompts:
    """Captions, all encoded at once: they are few; with their images.

    Raises:
      DataFileError: the data set is missing or cannot be read.
    """
    del mesh  # encoded on one device
    pairs = data.load_pairs()
    cond = teacher.encode([pairs.caption(i) for i in range(len(pairs.glyph))])
    of = lambda rows: jax.tree.map(lambda x: x[rows], cond)
    return Prompts(
        data.training_mixture(pairs, config.data.white_repeat), lambda rows, length: of(rows), of,
        teacher.encode(['']), pairs.caption, identity='emoji', real=pairs.images)
