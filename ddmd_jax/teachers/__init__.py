"""Registry of teacher families: how a checkpoint becomes a `Teacher`."""

from __future__ import annotations

from ddmd_jax.teachers.base import Cond, Teacher

FAMILIES = ('emoji',)


def load(name: str, path: str = '', dtype: str = 'float32') -> Teacher:
    """Loads a teacher of family `name` from `path` (empty: what the family ships).

    `dtype` is that of activations and matrix products; parameters stay fp32.

    Raises:
      ValueError: unknown family.
      WeightsError: the weights are missing, damaged or of another family.
    """
    if name == 'emoji':
        from ddmd_jax.teachers import emoji

        return emoji.load(path, dtype)
    raise ValueError(f'unknown teacher {name!r}; known: {", ".join(FAMILIES)}')


__all__ = ['Cond', 'FAMILIES', 'Teacher', 'load']
