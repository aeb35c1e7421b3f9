"""What one field of a config may hold, and the words that say so."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import numbers
import operator
from collections.abc import Callable, Sequence
from typing import Any

MAX_TAU = 0.999


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of one value, and the words that follow 'must be' when it fails.

    `hint` adds what can only be said knowing the value; a field with a `default` may be absent,
    and `check` puts the default there if it is to be `filled`.
    """

    allowed: str
    ok: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ''
    default: Any = dataclasses.field(default_factory=lambda: dataclasses.MISSING)
    filled: bool = False


def _is_number(value: Any, kind: type = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


_BOUNDS = {'at_least': (operator.ge, 'at least'), 'above': (operator.gt, 'above'),
           'at_most': (operator.le, 'at most'), 'below': (operator.lt, 'below')}


def number(why: str = '', noun: str = 'a number', kind: type = numbers.Real,
           **bounds: float) -> Rule:
    """A finite number (an integer will do, a bool not) within `at_least`, `above`, ..."""
    words = ' and '.join(f'{_BOUNDS[name][1]} {bound}' for name, bound in bounds.items())
    ok = lambda value: _is_number(value, kind) and all(
        _BOUNDS[name][0](value, bound) for name, bound in bounds.items())
    return Rule(f'{noun} {words}'.strip() + (why and f': {why}'), ok)


whole = functools.partial(number, noun='a whole number', kind=numbers.Integral)


def choice(names: Sequence[str]) -> Rule:
    """One of `names`; a near miss is told which it resembles."""
    near = lambda value: difflib.get_close_matches(str(value), names, 1)
    words = ' or '.join(map(repr, names)) if len(names) < 3 else f'one of {", ".join(names)}'
    return Rule(words, lambda value: isinstance(value, str) and value in names,
                lambda value: f'; did you mean {near(value)[0]!r}?' if near(value) else '')


def or_none(rule: Rule) -> Rule:
    return Rule(f'None or {rule.allowed}', lambda value: value is None or rule.ok(value))


def or_empty(rule: Rule) -> Rule:
    """A sequence that `rule` accepts, or one of nothing: what it would say is then not asked."""
    empty = lambda value: isinstance(value, (tuple, list)) and not value
    return optional(Rule(f'empty, or {rule.allowed}',
                         lambda value: empty(value) or rule.ok(value)), ())


def optional(rule: Rule, default: Any) -> Rule:
    """A field that a config may leave out; `check` then puts `default` there."""
    return dataclasses.replace(rule, default=default, filled=True)


def several(count: int, noun: str, ok: Callable[..., bool]) -> Rule:
    """A tuple or list of `count` numbers that `ok` accepts together."""
    return Rule(noun, lambda value: isinstance(value, (tuple, list)) and len(value) == count
                and all(map(_is_number, value)) and ok(*value))


def _chain_fault(chain: Any) -> str:
    """Why the links do not build, '' if they do; building a transformation allocates nothing."""
    import optax

    try:
        for name, kwargs in chain:
            if not isinstance(getattr(optax, name)(**kwargs), optax.GradientTransformation):
                return f'; optax.{name} is not a gradient transformation'
    except Exception as e:  # whatever a transformation raises, its arguments are at fault
        return f'; {e}'
    return ''


COUNT = whole(at_least=1)
FLAG = Rule('True or False', lambda value: isinstance(value, bool))
TEXT = Rule('a string', lambda value: isinstance(value, str))
GUIDANCE_RANGE = several(2, 'two numbers with 1 <= low <= high, or empty',
                         lambda low, high: 1 <= low <= high)
TAU_RANGE = several(
    2, f'two numbers with 0 <= low < high <= {MAX_TAU}: the clean end (1) has no noise left to '
    'normalise by', lambda low, high: 0 <= low < high <= MAX_TAU)
CHAIN = Rule('a sequence of (name in optax, its keyword arguments)',
             lambda value: isinstance(value, (tuple, list)) and not _chain_fault(value),
             _chain_fault)
