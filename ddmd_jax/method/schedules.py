"""Re-noising schedules: the paper's four (its Table 1), and those of users.

A schedule is a value. It knows between which noise levels each term is drawn, given the
generator's step, and whether the two terms share level and noise. Everything here is in uniform
time; the teacher's time map is applied to the drawn levels, never before (the authors' answer to
users). Alpha and ranges that change over a run are functions of the number of student updates.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddmd_jax.diffusion.time import TimeMap

Array = jax.Array
Range = tuple[float | Array, float | Array]  # (low, high), both in uniform time


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Interval of tau as a function of the generator's uniform time t.

    `low` and `high` are plain arithmetic of t, on a number as on an array: a config is checked with
    them before any device is asked for. The configured range cuts off what lies beyond it.
    """

    low: Callable[[Any], Any] = lambda t: 0.0
    high: Callable[[Any], Any] = lambda t: 1.0

    def draw(self, key: Array, t: Array, span: Range) -> Array:
        """A level for each t ``[B]``, uniform between the bounds within `span`."""
        low = jnp.minimum(jnp.maximum(span[0], self.low(t)), span[1])
        high = jnp.maximum(jnp.minimum(span[1], self.high(t)), low)
        return draw_between(key, low, high, t.shape)


ANYWHERE = Bounds()
CLEANER = Bounds(low=lambda t: t)  # tau in [t, 1]: no noisier than the generator's input


class Levels(NamedTuple):
    """Noise levels of the two terms ``[B]``, the paper's t."""

    ca: Array
    dm: Array


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Where each term is re-noised to, and whether they share it.

    Attributes:
      ca, dm: bounds of tau_CA and tau_DM, such as `ANYWHERE` and `CLEANER`.
      shared: tau_DM is tau_CA, and its noise is the same (classic DMD).
    """

    ca: Bounds
    dm: Bounds
    shared: bool = False

    def levels(self, keys: tuple[Array, Array], t: Array, ranges: Ranges,
               time: TimeMap) -> Levels:
        """Levels for generator steps at uniform times `t` ``[B]``.

        Args:
          keys: of tau_CA and of tau_DM.
          t: uniform times of the generator's steps.
          ranges: the configured ranges.
          time: the teacher's time map.
        """
        t = time.after(t)  # in a table of steps, bounds by t are bounds by the next cleaner step
        ca = time(self.ca.draw(keys[0], t, ranges.ca))
        if self.shared:
            return Levels(ca, ca)
        return Levels(ca, time(self.dm.draw(keys[1], t, ranges.dm)))


SCHEDULES: dict[str, Schedule] = {
    'coupled_shared': Schedule(ANYWHERE, ANYWHERE, shared=True),  # classic DMD
    'decoupled_full': Schedule(ANYWHERE, ANYWHERE),
    'decoupled_constrained': Schedule(CLEANER, CLEANER),
    'decoupled_hybrid': Schedule(CLEANER, ANYWHERE),  # the paper's method
}


def get(name: str) -> Schedule:
    """One of `SCHEDULES`, or a user's: 'my_module.my_schedule' names a `Schedule` in a module.

    Raises:
      ValueError: unknown name, no such module or attribute, or no `Schedule`.
    """
    if name in SCHEDULES:
        return SCHEDULES[name]
    module, _, attribute = name.rpartition('.')
    if not module:
        raise ValueError(f'unknown schedule {name!r}; known: {", ".join(SCHEDULES)}, or '
                         "'my_module.my_schedule'")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f'schedule {name!r} cannot be imported ({e})') from e
    if not isinstance(found, Schedule):
        raise ValueError(f'{name} is a {type(found).__name__}, not a Schedule')
    return found


def draw_between(key: Array, low: float | Array, high: float | Array,
                 shape: tuple[int, ...]) -> Array:
    """Uniform on [low, high], of `shape`; the bounds are scalars or of that shape."""
    low = jnp.asarray(low, jnp.float32)  # and so their distance: a level does not move by an ulp
    return low + (high - low) * jax.random.uniform(key, shape, jnp.float32)


# --- What changes over a run ---


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges of tau_CA and tau_DM in uniform time.

    Each is on its way to its `*_end`, if there is one, for `relax` student updates at a constant
    pace (the idea is DynaRS's: where a term looks may change with what the student can do).
    """

    ca: Range
    dm: Range
    ca_end: Range | tuple[()] = ()
    dm_end: Range | tuple[()] = ()
    relax: int = 0

    def at(self, step: Array | int) -> Ranges:
        """The ranges at student update `step`, counted from 0."""
        if not self.relax:
            return self
        share = jnp.minimum(jnp.asarray(step, jnp.float32) / self.relax, 1.0)
        move = lambda a, b: tuple(x + (y - x) * share for x, y in zip(a, b or a, strict=True))
        return Ranges(move(self.ca, self.ca_end), move(self.dm, self.dm_end))


@dataclasses.dataclass(frozen=True)
class Alpha:
    """The guidance scale: one number, or one drawn for each example from a range.

    `ramp` student updates raise it from 1 (no guidance); the first of them has the first step.
    """

    scale: float | Array
    drawn: Range | tuple[()] = ()
    ramp: int = 0

    def at(self, step: Array | int, share: float | Array = 1.0) -> Alpha:
        """Alpha at student update `step`; of ``alpha - 1`` only `share` (`train.on_health`)."""
        if self.ramp:
            share = share * jnp.minimum((jnp.asarray(step, jnp.float32) + 1.0) / self.ramp, 1.0)
        less = lambda alpha: 1.0 + share * (alpha - 1.0)
        return Alpha(less(self.scale), tuple(map(less, self.drawn)))

    def draw(self, key: Array, rows: int) -> float | Array:
        """A scalar, or ``[rows]``."""
        return draw_between(key, *self.drawn, (rows,)) if self.drawn else self.scale
