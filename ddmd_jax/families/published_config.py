"""Published ``config.json``: the one door by which its values become an architecture of ours."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ddmd_jax.util import shape

LARGEST = 2**20  # of a width or a vocabulary: the largest that are published are a quarter of it
DEEPEST = 200  # layers of a stack, likewise; more than fit into a module take all memory to say so


def checked(kind: Any, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`values` for the fields of the dataclass `kind`, each as its annotation says.

    Sizes are whole numbers from 1 on, all other numbers above 0 and such that float32 has them.

    Raises:
      ValueError: one is not; names it.
    """
    like = {f'{f.name}?': _rule(f.name, str(f.type)) for f in dataclasses.fields(kind)}
    if words := shape.fault(dict(values), like):
        raise ValueError(words)
    return values


def _rule(name: str, annotation: str) -> Any:
    """`shape.Like` of a field."""
    if annotation.endswith(' | None'):
        inner = _rule(name, annotation.removesuffix(' | None'))
        return lambda value: '' if value is None else shape.fault(value, inner) and _words(inner)
    if annotation.startswith('tuple['):
        item = _rule(name, annotation[6:].split(',')[0])
        return lambda value: '' if isinstance(value, tuple | list) and not any(
            shape.fault(one, item) for one in value) else f'not several, each {_words(item)[4:]}'
    if annotation == 'int':
        least = 0 if name.endswith('_id') or name == 'transformer_layers_per_block' else 1
        return _whole(least, DEEPEST if 'layers' in name else LARGEST)
    if annotation == 'float':
        if name == 'shift_factor':
            return shape.finite
        most = 1.0 if name.endswith('eps') else 1e30
        return lambda value: '' if not shape.positive(value) and 1e-30 < value <= most else (
            f'not a number above 0 and at most {most:g}')
    return {'bool': bool, 'str': str}[annotation]


def _whole(least: int, most: int) -> Any:
    good = lambda value: not shape.count(value) and least <= value <= most
    return lambda value: '' if good(value) else f'not a whole number from {least} to {most}'


def _words(rule: Any) -> str:
    """What `rule` says of a value that is nothing."""
    return f'not {shape.WORDS[rule]}' if isinstance(rule, type) else rule([])
