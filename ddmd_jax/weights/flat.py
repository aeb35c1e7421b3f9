"""Parameter trees as flat safetensors files: ``a/b/kernel`` names, atomic, no pickle."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddmd_jax.parallel import sharding
from ddmd_jax.util import errors, files
from ddmd_jax.util.errors import UserError

Tree = Any
CORNER = 8


class WeightsError(UserError):
    """A weights file is absent, damaged, or of another architecture."""


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dicts to ``{'a/b/c': leaf}``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator='/'): x for p, x in leaves}


def unflatten(flat: dict[str, Any]) -> Tree:
    """Inverse of `flatten` for nested dicts with string keys."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def save(path: Path, tree: Tree, metadata: dict[str, str], dtype: Any = None) -> None:
    """Writes `tree`, cast to `dtype` if given, through a temporary file and a rename.

    Raises:
      WeightsError: a value is not finite in that dtype.
    """
    import safetensors.flax

    cast = {k: jnp.asarray(v, dtype or v.dtype) for k, v in flatten(tree).items()}
    for name, leaf in cast.items():
        check_finite(path, name, leaf)
    with files.replacing(path) as scratch:
        safetensors.flax.save_file(cast, scratch, metadata)


def check_finite(path: Path, name: str, values: Any) -> None:
    """Raises `WeightsError` if weights that are about to be written to `path` are not finite."""
    if jnp.issubdtype(values.dtype, jnp.floating) and not bool(jnp.isfinite(values).all()):
        raise WeightsError(f'{path} was not written: {name} holds values that are not finite in '
                           f'{values.dtype}; another dtype may hold them, else they are spoilt')


def open_file(path: Path, cure: str) -> Any:
    """A safetensors file whose header was checked; what is in it is read when asked for.

    Raises:
      WeightsError: the file is missing or truncated; the message names it and the cure.
    """
    import safetensors

    try:
        return safetensors.safe_open(path, framework='numpy')
    except FileNotFoundError as e:
        raise WeightsError(f'weights missing: {path}; {cure}') from e
    except (safetensors.SafetensorError, OSError) as e:
        errors.raise_environment(e, path)
        raise WeightsError(f'weights damaged: {path} ({e}); {cure}') from e


def load(path: Path, cure: str) -> tuple[Tree, dict[str, str]]:
    """Reads ``(tree of fp32 numpy arrays, metadata)``.

    Raises:
      WeightsError: as `open_file`; or values are not finite, or a name is within another.
    """
    file = open_file(path, cure)
    names = file.keys()
    found = {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
    groups = {parent for name in found for parent in _parents(name)}
    for name, values in found.items():
        if name in groups or not np.isfinite(values).all():
            why = 'has others within it' if name in groups else 'holds values that are not finite'
            raise WeightsError(f'weights damaged: {path} ({name} {why}); {cure}')
    return unflatten(found), file.metadata() or {}


def _parents(name: str) -> list[str]:
    return [name[:i] for i, letter in enumerate(name) if letter == '/']


def check_shapes(tree: Tree, expected: Tree) -> None:
    """Raises `ValueError` unless `tree` has an architecture's names and shapes, `expected`."""
    found, wanted = ({name: x.shape for name, x in flatten(t).items()} for t in (tree, expected))
    if found != wanted:
        raise ValueError('its tensors are not those of the architecture it names')


def identity(tree: Tree) -> str:
    """Sixteen hex digits that name these weights: sha256 over names, shapes and bytes."""
    digest = hashlib.sha256()
    for name, leaf in sorted(flatten(tree).items()):
        array = np.asarray(leaf)
        digest.update(f'{name}{array.shape}{array.dtype}'.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def corner_identity(tree: Tree, mesh: Mesh) -> str:
    """`identity` of weights that lie over `mesh`, by the first `CORNER` places of every axis.

    Training moves all of them, and no more than a corner of a tensor comes to the host. All
    processes of the mesh ask together.
    """
    corner = lambda x: x[tuple(slice(CORNER) for _ in x.shape)]
    take = jax.jit(lambda t: jax.tree.map(corner, sharding.on_device(t)),
                   out_shardings=sharding.replicated(mesh))
    return identity(jax.device_get(take(tree)))
