"""The largest batch that fits, and the levers for a program that does not.

Both compile with the least effort (`measure.quick_peak`), which takes a fifth of the time. Its
temporaries are not the real ones; they are scaled by the ratio of the two at the config's batch.
"""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

# Field, value, and what it costs: the cheapest first.
LEVERS = (
    ('teacher.remat', 'full', 'the gradient recomputes every block'),
    ('train.teacher_passes', 'apart', 'as many products, in smaller batches'),
    ('teacher.param_dtype', 'bfloat16', 'nothing where products are bf16 anyway'),
    ('optim.student.mu_dtype', 'bfloat16', "bits of AdamW's first moment"),
    ('optim.critic.mu_dtype', 'bfloat16', "bits of AdamW's first moment"),
    ('train.offload', 'ema+teacher', "transfers from and to the hosts' memory at every step"),
    ('train.accumulate', 2, "kernels are gathered twice; the batch must divide"),
)


def with_field(config: Any, field: str, value: Any) -> Any:
    """A copy of `config` with one dotted field changed."""
    new = copy.deepcopy(config)
    *path, last = field.split('.')
    section = new
    for name in path:
        section = section[name]
    section[last] = value
    return new


def unused(config: Any) -> Iterator[tuple[str, Any, str]]:
    """The levers that `config` does not pull yet; `train.accumulate` is doubled."""
    for field, value, price in LEVERS:
        section, name = config, field
        while '.' in name:
            first, name = name.split('.', 1)
            section = section[first]
        if field == 'train.accumulate':
            value = 2 * section[name]
        if section[name] != value:
            yield field, value, price


def largest_batch(peak: Callable[[int], float], start: int, unit: int, resident: float,
                  limit: float) -> int:
    """The largest multiple of `unit` whose peak is at most `limit`; 0 if none is.

    Args:
      peak: bytes of a batch, infinite if it cannot be compiled; it grows with the batch. Called
        as seldom as may be: each call is a compilation.
      start: a batch to begin with, a multiple of `unit`.
      unit: what batches are multiples of.
      resident: bytes that any batch needs.
      limit: bytes there are.
    """
    known: dict[int, float] = {0: resident}
    batch = start
    while True:
        known[batch] = peak(batch)
        fits = max(b for b, p in known.items() if p <= limit or b == 0)
        over = min((b for b, p in known.items() if p > limit and b), default=None)
        if over == fits + unit:
            return fits
        guess = _guess(known, limit) // unit * unit
        low, high = fits + unit, over - unit if over else 8 * max(fits, unit)
        # Where nothing is known to go by, halves.
        batch = min(max(guess, low), high) if guess else max(low, (fits + (over or 0)) // 2
                                                             // unit * unit)


def _guess(known: dict[int, float], limit: float) -> int:
    """Where a line through the two largest batches of known peak meets the limit."""
    finite = sorted(b for b, p in known.items() if math.isfinite(p))[-2:]
    if len(finite) < 2:
        return 0
    a, b = finite
    slope = (known[b] - known[a]) / (b - a)
    return int(b + (limit - known[b]) / slope) if slope > 0 else 0


def advice(config: Any, peak: Callable[[Any], float], limit: float) -> list[dict[str, Any]]:
    """Levers that would make a program fit: those that do alone; if none does, the first several.

    Args:
      config: whose program does not fit.
      peak: bytes of the program of a config; infinite if it cannot be compiled.
      limit: bytes there are.

    Returns:
      ``[{'fields': {field: value}, 'peak_bytes', 'costs': words}]``, empty if all of them together
      are not enough.
    """
    levers = list(unused(config))
    one = lambda levers, found: {'fields': {f: v for f, v, _ in levers}, 'peak_bytes': int(found),
                                 'costs': '; '.join(dict.fromkeys(p for _, _, p in levers))}
    tried = [([lever], peak(with_field(config, *lever[:2]))) for lever in levers]
    alone = [one(pulled, found) for pulled, found in tried if found <= limit]
    if alone:
        return alone
    for count in range(2, len(levers) + 1):
        changed = config
        for field, value, _ in levers[:count]:
            changed = with_field(changed, field, value)
        found = peak(changed)
        if found <= limit:
            return [one(levers[:count], found)]
    return []
