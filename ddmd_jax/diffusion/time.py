"""Time maps: from uniform time, in which everything is drawn and scheduled, to the paper's t.

Noise levels are drawn uniformly, and the steps of a few-step student are equally far apart, in
*uniform* time u: 0 is noise, 1 is clean. A teacher's time map then says which t of the flow that
is (t = 0 noise, t = 1 clean). So the authors have it: with shift 3 the last of four steps stands at
u = .75, which is t = .5, and tau_CA is uniform on [.75, 1] *before* the shift.

A flow-matching teacher has a `Shift`. A teacher with a table of discrete steps brings a map of its
own: see docs/extending.md.
"""

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


class TimeMap:
    """A monotone map of [0, 1] onto [0, 1]; subclasses say `__call__`, and more where they differ.

    A map is a value: it is hashable and compares by its fields.
    """

    def __call__(self, u: Array | float) -> Array:
        """The paper's t, fp32, at uniform times `u` of any shape."""
        raise NotImplementedError

    def steps(self, n: int) -> Array:
        """Uniform times ``[n]`` of an n-step student, noise first: ``0, 1/n, ..., (n-1)/n``.

        Raises:
          ValueError: n < 1.
        """
        if n < 1:
            raise ValueError(f'a student has at least 1 step, not {n}')
        return jnp.arange(n, dtype=jnp.float32) / n

    def grid(self, n: int) -> Array:
        """Times t ``[n + 1]`` from 0 to 1 of an n-step solver of the teacher's ODE."""
        return self(jnp.linspace(0.0, 1.0, n + 1))

    def first_input(self, noise: Array) -> Array:
        """The input at the first step, made of unit noise ``[B, ...]``.

        The noise itself, where the first step is t = 0. A schedule whose first level still holds
        some signal (SDXL's step 999) is started from pure noise all the same: its map rescales.
        """
        return noise


@dataclasses.dataclass(frozen=True)
class Shift(TimeMap):
    """``t = u / (u + s (1 - u))``: a flow-matching teacher's time shift; s > 1 favours noise."""

    shift: float = 1.0

    def __call__(self, u: Array | float) -> Array:
        u = jnp.asarray(u, jnp.float32)
        return u / (u + self.shift * (1.0 - u))


def chosen(own: TimeMap, shift: float | None) -> TimeMap:
    """A teacher's `own` time map, or the shift that a config names in its place."""
    return own if shift is None else Shift(shift)


@dataclasses.dataclass(frozen=True)
class FewSteps:
    """The schedule of an n-step student under a time map."""

    time: TimeMap
    n: int

    @property
    def uniform(self) -> Array:
        """Uniform times ``[n]``, noise first."""
        return self.time.steps(self.n)

    @property
    def times(self) -> Array:
        """The paper's t ``[n]``, noise first."""
        return self.time(self.uniform)
