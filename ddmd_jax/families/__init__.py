"""The registry of teacher families, and how a path or a name becomes a `Teacher`."""

import functools
import importlib
import os
from collections.abc import Sequence

from jax.sharding import Mesh

from ddmd_jax.families.base import Cond, Latents, LoadOptions, Teacher, TextEncoder
from ddmd_jax.families.family import DataSet, Export, Family
from ddmd_jax.util import buckets, places
from ddmd_jax.util.errors import UserError
from ddmd_jax.weights import diffusers, fetch, flat
from ddmd_jax.weights.flat import WeightsError

NAMES = ('emoji', 'lumina', 'sdxl', 'zimage')  # folders of this package


class UnknownFamily(UserError, ValueError):
    """No family goes by that name; one line says why."""


@functools.cache
def get(name: str) -> Family:
    """The family `name`: one of NAMES, or a module of the user's own that has a `FAMILY`.

    Raises:
      UnknownFamily: there is no such module, it cannot be imported, or it holds no such family.
    """
    module = f'{__name__}.{name}' if name in NAMES else name
    try:
        family = getattr(importlib.import_module(module), 'FAMILY', None)
    except ModuleNotFoundError as e:
        if not f'{module}.'.startswith(f'{e.name}.'):  # it is there, and imports what is not
            raise UnknownFamily(f'{name!r} cannot be imported ({e})') from e
        raise UnknownFamily(f'no teacher family {name!r}; known: {", ".join(NAMES)}, or the full '
                            'name of a module of yours on PYTHONPATH') from e
    except Exception as e:  # the user's code, which may raise anything
        raise UnknownFamily(f'{name!r} cannot be imported ({type(e).__name__}: {e})') from e
    if not isinstance(family, Family) or family.name != name:
        has = f'one that is called {family.name!r}' if isinstance(family, Family) else 'none'
        raise UnknownFamily(f'{name} must have a FAMILY of that name (families.Family); it has '
                            f'{has}')
    return family


def find(path_or_name: str) -> tuple[Family, str]:
    """(family, path) of a family's name, of NAME:PATH, or of weights at a path, URL or hub id.

    Raises:
      UnknownFamily: a name, and not of a family that ships its weights.
      WeightsError: no such weights, or of no family here.
    """
    name, colon, path = path_or_name.partition(':')
    if colon and not path.startswith('//') and name.replace('.', '').isidentifier():
        return get(name), path
    if path_or_name in NAMES or not _is_place(path_or_name):
        family = get(path_or_name)
        if not family.ships:
            raise UnknownFamily(f'{path_or_name} does not ship; give the path of its weights, as '
                                f'{path_or_name}:PATH')
        return family, ''
    kind = _class_name(path_or_name)
    for family in map(get, NAMES):
        if kind in family.class_names:
            return family, path_or_name
    raise WeightsError(f'{path_or_name} holds a {kind}, which no teacher family here reads; '
                       f'known: {", ".join(NAMES)}')


def _is_place(text: str) -> bool:
    return '/' in text or text.endswith('.safetensors') or os.path.exists(places.filled(text))


def _class_name(path: str) -> str | None:
    """The class that the weights at `path` name."""
    if path.endswith('.safetensors'):
        file = flat.open_file(buckets.local(places.of(path)), 'give another file')
        return (file.metadata() or {}).get('architecture')
    folder = fetch.local_folder(path, ('model_index.json', 'config.json'))
    index = folder / 'model_index.json'
    return diffusers.read_json(index if index.exists() else folder / 'config.json').get(
        '_class_name')


def load_teacher(path_or_name: str, mesh: Mesh | None = None, dtype: str = 'float32',
                 size: Sequence[int] | None = None, variant: str = '') -> Teacher:
    """A frozen teacher: ``teacher.predict_clean(teacher.params, x_t, t, cond)`` is x_hat.

    Args:
      path_or_name: a family that ships its weights ('emoji'), or a path: a diffusers folder of a
        pipeline or of its denoiser alone, a ``gs://`` URL, a hub id, a ``.safetensors`` file;
        or NAME:PATH, for a family of your own.
      mesh: where the weights go, in the family's layout; None is one device.
      dtype: of activations and matrix products.
      size: pixels, height first; None takes the family's own.
      variant: of its files, as diffusers has it: 'fp16' reads ``*.fp16.safetensors``.

    Raises:
      UnknownFamily: no family of that name ships its weights.
      WeightsError: the weights are missing, damaged, or of no family here.

    Examples:
      >>> teacher = load_teacher('emoji')
      >>> cond = teacher.encode(['a red apple on a teal background'])
      >>> x_hat = teacher.predict_clean(teacher.params, noise, jnp.zeros(1), cond)
    """
    family, path = find(path_or_name)
    return family.load_teacher(LoadOptions(path, mesh, dtype, size, variant=variant))


__all__ = ['Cond', 'DataSet', 'Export', 'Family', 'Latents', 'LoadOptions', 'NAMES', 'Teacher',
           'TextEncoder', 'UnknownFamily', 'find', 'get', 'load_teacher']
