"""Decoupled DMD (arXiv 2511.22677) in JAX."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddmd_jax.families import load_teacher

__version__ = "0.1.0"
__all__ = ['load_teacher']


def __getattr__(name: str):
    if name != 'load_teacher':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from ddmd_jax.families import load_teacher  # JAX is imported only where it is asked for

    return load_teacher
