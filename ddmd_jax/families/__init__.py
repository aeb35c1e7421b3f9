"""Registry of teacher families: how a checkpoint becomes a `Teacher`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from ddmd_jax.families.base import Cond, Teacher, TextEncoder
from ddmd_jax.parallel import sharding

FAMILIES = ('emoji', 'lumina')


def load(path_or_name: str, mesh: Mesh | None = None, dtype: str = 'float32',
         size: Sequence[int] | None = None, remat: str = 'none',
         attention: str = 'auto', param_dtype: str = 'float32') -> Teacher:
    """The shipped teacher ('emoji'), one trained like it (a ``.safetensors`` file), or Lumina's.

    Args:
      path_or_name: 'emoji'; a file; or a diffusers folder, ``gs://`` URL or hub id.
      mesh: where the weights go, in the family's layout; None is one device.
      dtype: of activations and matrix products.
      size: pixels, height first; None takes the family's own.
      remat: what the network's gradient recomputes, a key of `layers.REMAT_POLICIES` or 'none'.
      attention: one of `attention.KINDS`; 'auto' is the kernel where the mesh is of TPUs.
      param_dtype: of the stored kernels. A student of them starts as their fp32 copy.

    Raises:
      WeightsError: the weights are missing, damaged or of another family.
    """
    return load_family(*family_of(path_or_name), mesh, dtype, size, remat, attention, param_dtype)


def family_of(path_or_name: str) -> tuple[str, str]:
    """(family, path) of what `load` is given."""
    if path_or_name == 'emoji':
        return 'emoji', ''
    return 'emoji' if path_or_name.endswith('.safetensors') else 'lumina', path_or_name


def load_family(name: str, path: str, mesh: Mesh | None = None, dtype: str = 'float32',
                size: Sequence[int] | None = None, remat: str = 'none',
                attention: str = 'auto', param_dtype: str = 'float32') -> Teacher:
    """Loads a teacher of family `name` from `path` (empty: what the family ships); see `load`.

    Raises:
      ValueError: unknown family.
      WeightsError: as `load`.
    """
    if name == 'emoji':
        from ddmd_jax.families.emoji import teacher as emoji

        return emoji.load(path, dtype, remat, param_dtype)
    if name == 'lumina':
        from ddmd_jax.families.lumina import teacher as lumina

        mesh = sharding.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
        return lumina.load(path, mesh, dtype, size, remat, attention, param_dtype)
    raise ValueError(f'unknown teacher {name!r}; known: {", ".join(FAMILIES)}')


def load_text(name: str, path: str, mesh: Mesh | None = None,
              dtype: str = 'float32') -> TextEncoder:
    """The text side of family `name` from `path`, its weights in the mesh's layout.

    Raises:
      ValueError: unknown family.
      WeightsError: as `load`.
    """
    mesh = sharding.make_mesh({}, jax.devices()[:1]) if mesh is None else mesh
    if name == 'emoji':
        return load_family(name, path).text
    from ddmd_jax.families import text

    return text.load(name, path, mesh, dtype)


__all__ = ['Cond', 'FAMILIES', 'Teacher', 'TextEncoder', 'family_of', 'load', 'load_family',
           'load_text']
