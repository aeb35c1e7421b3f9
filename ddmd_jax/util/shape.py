"""JSON that comes from a file, and whether it is what its reader takes it for.

    CARD = {'format': str, 'splits': {str: int}, 'inputs': [{'sha256': str}], 'note?': str}
    card = shape.load(path.read_bytes(), CARD)
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

NUMBER = (int, float)
VALUE = (int, float, str, bool, type(None))  # no list, no object
WORDS = {int: 'a whole number', float: 'a number', str: 'a text', bool: 'true or false',
         dict: 'an object', list: 'a list', type(None): 'null'}

DEPTH = 100  # of objects and lists in one another
Like = Any  # a type or a tuple of types; {key: Like}; [Like]; a function that says what is wrong


def load(raw: bytes, like: Like) -> Any:
    """The JSON value in `raw` (UTF-8, or UTF-16 and UTF-32 as JSON knows them).

    Raises:
      ValueError: it is no JSON, or not as `like` says; one line.
    """
    try:
        value = json.loads(raw)
    except RecursionError:
        value, deep = None, True
    else:
        deep = _deep(value)
    if deep:
        raise ValueError(f'it is nested more than {DEPTH} deep')
    if words := fault(value, like):
        raise ValueError(words)
    return value


def _deep(value: Any) -> bool:
    """Whether a value is nested deeper than whoever walks through it can go."""
    level = [value]
    for _ in range(DEPTH):
        level = [inner for one in level if isinstance(one, dict | list)
                 for inner in (one.values() if isinstance(one, dict) else one)]
    return bool(level)


def fault(value: Any, like: Like, name: str = '') -> str:
    """What is first found not to be as `like` says, by its place, or ''.

    An object has the keys of its description, but for those that end in '?'; it may have others,
    which the key `str` describes. A `bool` is no `int`, and an `int` will do for a `float`.
    """
    if isinstance(like, Mapping):
        return _object_fault(value, like, name)
    if isinstance(like, list):
        if not isinstance(value, list):
            return _is_not(value, (list,), name)
        found = (fault(one, like[0], f'{name}[{i}]') for i, one in enumerate(value))
        return next(filter(None, found), '')
    if not isinstance(like, type | tuple):
        words = like(value)
        return f'{name or "it"} is {_shown(value)}, {words}' if words else ''
    kinds = like if isinstance(like, tuple) else (like,)
    good = isinstance(value, kinds) or float in kinds and isinstance(value, int)
    if isinstance(value, bool):
        good = bool in kinds
    elif isinstance(value, int) and abs(value) >= 2**63:  # nothing here writes such a number
        good = False
    return '' if good else _is_not(value, kinds, name)


def _object_fault(value: Any, like: Mapping[Any, Like], name: str) -> str:
    if not isinstance(value, dict):
        return _is_not(value, (dict,), name)
    named = {key.rstrip('?'): (key.endswith('?'), of) for key, of in like.items() if key is not str}
    for key, (optional, _) in named.items():
        if not optional and key not in value:
            return f'{name + " " if name else ""}has no {key!r}'
    for key, one in value.items():
        of = named[key][1] if key in named else like.get(str)
        if of is not None and (words := fault(one, of, f'{name}.{key}'.lstrip('.'))):
            return words
    return ''


def _is_not(value: Any, kinds: tuple[type, ...], name: str) -> str:
    return f'{name or "it"} is {_shown(value)}, not {" or ".join(WORDS[kind] for kind in kinds)}'


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return 'a huge number'
    return text if len(text) <= 40 else f'{text[:37]}...'


def count(value: Any) -> str:
    """`Like` of how many there are of something."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return '' if whole and 0 <= value < 2**63 else 'not a count'


def finite(value: Any) -> str:
    """`Like` of a number that can be computed with."""
    number = isinstance(value, NUMBER) and not isinstance(value, bool)
    return '' if number and abs(value) < 1e300 and math.isfinite(value) else 'not a finite number'


def positive(value: Any) -> str:
    """`Like` of a number above 0."""
    return 'not a number above 0' if finite(value) or value <= 0 else ''


def one_of(*values: str) -> Callable[[Any], str]:
    """`Like` of a text that is one of a few."""
    return lambda value: '' if isinstance(value, str) and value in values else (
        f'not {" or ".join(map(repr, values))}')
