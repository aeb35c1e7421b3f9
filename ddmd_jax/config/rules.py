"""The values that a field of a config may hold, and the words that say so.

Nothing of the project is imported here nor in `fields`: regularisers and families bring fields of
their own, made of these rules.
"""

import dataclasses
import difflib
import functools
import numbers
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

MAX_TAU = 0.999


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of one value, and the words that follow 'must be' when it fails.

    `hint` adds what can only be said knowing the value.
    """

    allowed: str
    ok: Callable[[Any], bool]
    hint: Callable[[Any], str] = lambda value: ''


LARGEST, SMALLEST = 3.4028234e38, 1.1754944e-38  # of float32, in which a step is computed
LARGEST_WHOLE = 2**31 - 1  # of int32, in which steps are counted


def _is_number(value: Any, kind: Any = numbers.Real) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and _fits(value)


def _fits(value: Any) -> bool:
    """Whether float32 holds a number: neither NaN nor infinite there, nor 0 if it is none."""
    return abs(value) <= LARGEST and (value == 0 or abs(value) >= SMALLEST)


def _unfit(value: Any) -> str:
    """A hint on a number of the right kind that is too large or too small."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or value != value:
        return ''
    if isinstance(value, numbers.Integral):
        return f'; the largest is {LARGEST_WHOLE}' if int(value) > LARGEST_WHOLE else ''
    return '' if _fits(value) else '; float32 does not hold that number'


_BOUNDS = {'at_least': (operator.ge, 'at least'), 'above': (operator.gt, 'above'),
           'at_most': (operator.le, 'at most'), 'below': (operator.lt, 'below')}


def number(why: str = '', noun: str = 'a number', kind: type = numbers.Real,
           **bounds: float) -> Rule:
    """A finite number (an integer will do, a bool not) within `at_least`, `above`, ..."""
    words = ' and '.join(f'{_BOUNDS[name][1]} {bound}' for name, bound in bounds.items())
    most = bounds.get('at_most', LARGEST_WHOLE if kind is numbers.Integral else LARGEST)
    ok = lambda value: _is_number(value, kind) and value <= most and all(
        _BOUNDS[name][0](value, bound) for name, bound in bounds.items())
    return Rule(f'{noun} {words}'.strip() + (why and f': {why}'), ok, _unfit)


whole = functools.partial(number, noun='a whole number', kind=numbers.Integral)


def choice(*names: str) -> Rule:
    """One of `names`; the hint on a near miss is the name it resembles."""
    near = lambda value: difflib.get_close_matches(str(value), names, 1)
    words = ' or '.join(map(repr, names)) if len(names) < 3 else (
        f'one of {", ".join(name or repr(name) for name in names)}')
    return Rule(words, lambda value: isinstance(value, str) and value in names,
                lambda value: f'; did you mean {near(value)[0]!r}?' if near(value) else '')


def or_none(rule: Rule) -> Rule:
    return Rule(f'None or {rule.allowed}', lambda value: value is None or rule.ok(value),
                rule.hint)


def or_empty(rule: Rule) -> Rule:
    """A sequence that `rule` accepts, or one of nothing."""
    return Rule(f'empty, or {rule.allowed}',
                lambda value: (is_sequence(value) and not value) or rule.ok(value))


def is_sequence(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def several(count: int, noun: str, ok: Callable[..., bool]) -> Rule:
    """A tuple or list of `count` numbers that `ok` accepts together."""
    return Rule(noun, lambda value: is_sequence(value) and len(value) == count
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


def _pattern_fault(patterns: Any) -> str:
    """Which pattern is no regular expression, and why; '' if all are."""
    for pattern in patterns if is_sequence(patterns) else ():
        try:
            re.compile(pattern)
        except (re.error, TypeError) as e:
            return f'; {pattern!r}: {e}'
    return ''


def _is_size(value: Any) -> bool:
    return is_sequence(value) and len(value) == 2 and all(map(COUNT.ok, value))


def _ascends(values: Sequence[Any]) -> bool:
    return all(map(COUNT.ok, values)) and all(a < b for a, b in zip(values, values[1:]))


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ''


ANY = Rule('anything', lambda value: True)
COUNT = whole(at_least=1)
NATURAL = whole(at_least=0)
SEED = whole(at_least=0, at_most=2**32 - 1)  # an image's name holds it as uint32
UPDATES = whole('0 is off', at_least=0)
WEIGHT = number('0 is off', at_least=0)
POSITIVE = number(above=0)
DECAY = number(at_least=0, below=1)
FLAG = Rule('True or False', lambda value: isinstance(value, bool))
TEXT = Rule('a string', lambda value: isinstance(value, str))
VARIANT = Rule("'' or a part of a file's name, such as 'fp16'",
               lambda value: isinstance(value, str) and bool(re.fullmatch(r'(\w[\w-]*)?', value)))
DTYPE = choice('float32', 'bfloat16')
REMAT = choice('none', 'full', 'dots')
AXIS = Rule('a whole number at least 1, or -1 for whatever is left',
            lambda value: whole(at_least=-1).ok(value) and value != 0)
PATH = Rule('the name of a set of prompts, or of embeddings', _is_name)
SIZES = Rule("a sequence of (height, width) in pixels; empty: the teacher's own",
             lambda value: is_sequence(value) and all(map(_is_size, value)))
LENGTHS = Rule('an ascending sequence of token counts; empty: batches are not cut',
               lambda value: is_sequence(value) and _ascends(value))
WIDTHS = Rule('a sequence of one or more whole numbers, each at least 1',
              lambda value: is_sequence(value) and bool(value) and all(map(COUNT.ok, value)))
SIDES = WIDTHS
GUIDANCE_RANGE = several(2, 'two numbers with 1 <= low <= high',
                         lambda low, high: 1 <= low <= high)
TAU_RANGE = several(
    2, f'two numbers with 0 <= low < high <= {MAX_TAU}: the clean end (1) has no noise left to '
    'normalise by', lambda low, high: 0 <= low < high <= MAX_TAU)
CHAIN = Rule('a sequence of (name in optax, its keyword arguments)',
             lambda value: is_sequence(value) and not _chain_fault(value),
             _chain_fault)
NAMES = Rule('a sequence of names', lambda value: is_sequence(value) and all(map(_is_name, value)))
PATTERNS = Rule('a sequence of one or more regular expressions',
                lambda value: is_sequence(value) and bool(value) and all(map(_is_name, value))
                and not _pattern_fault(value), _pattern_fault)
