"""Time maps: from uniform time, in which everything is drawn and scheduled, to the paper's t.

Noise levels are drawn uniformly, and the steps of a few-step student are equally far apart, in
*uniform* time u: 0 is noise, 1 is clean. A teacher's time map then says which t of the flow that
is (t = 0 noise, t = 1 clean). So the authors have it: with shift 3 the last of four steps stands at
u = .75, which is t = .5, and tau_CA is uniform on [.75, 1] *before* the shift.

A flow-matching teacher has a `Shift`; a variance-preserving one with a table of discrete steps a
`StepTable`, onto whose steps alone it maps. A map of one's own: docs/extending.md.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddmd_jax.diffusion import process
from ddmd_jax.util.errors import UserError

Array = jax.Array


class TimeMap:
    """A monotone map of [0, 1] onto [0, 1]; subclasses say `__call__`, and more where they differ.

    A map is a value: it is hashable and compares by its fields.
    """

    def __call__(self, u: Array | float) -> Array:
        """The paper's t, fp32, at uniform times `u` of any shape."""
        raise NotImplementedError

    @property
    def identity(self) -> str:
        """Names the map: its class with its fields, if it is a dataclass."""
        return repr(self) if dataclasses.is_dataclass(self) else type(self).__name__

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

    def after(self, u: Any) -> Any:
        """The noisiest level, in uniform time, that a schedule takes for cleaner than `u`.

        `u` itself, where time is continuous.
        """
        return u

    def first_input(self, noise: Array) -> Array:
        """The input at the first step, made of unit noise ``[B, ...]``.

        The noise itself, where the first step is t = 0. A schedule whose first level still holds
        some signal (SDXL's step 999) is started from pure noise all the same: its map rescales.
        """
        return noise

    def grid_input(self, noise: Array, n: int) -> Array:
        """The input of an n-step solver at the first time of its `grid`, made of unit noise."""
        return self.first_input(noise)


@dataclasses.dataclass(frozen=True)
class Shift(TimeMap):
    """``t = u / (u + s (1 - u))``: a flow-matching teacher's time shift; s > 1 favours noise."""

    shift: float = 1.0

    def __call__(self, u: Array | float) -> Array:
        u = jnp.asarray(u, jnp.float32)
        return u / (u + self.shift * (1.0 - u))


SPACINGS = ('leading', 'trailing')


@dataclasses.dataclass(frozen=True)
class StepTable(TimeMap):
    """A variance-preserving table of discrete steps (DDPM), numbered from 0, the cleanest.

    At step k the network's samples are ``x_vp = a x + s noise``, a^2 = abar_k and s^2 = 1 - abar_k,
    which is the flow's at ``t = a / (a + s)`` but for a factor (`process.preserved`). Uniform time
    is whole steps, each `count`-th of [0, 1] one of them: uniform draws are uniform over the steps,
    and no level between two is ever asked of the network.

    Attributes:
      beta_start, beta_end: of the betas, whose abar is ``cumprod(1 - beta)``; SDXL's (diffusers'
        names, also of the rest).
      beta_schedule: 'scaled_linear', whose square roots are equally far apart, or 'linear'.
      count: of steps.
      first: the step at which students start; DMD2's have 999, and 399 where they have but one.
      spacing: of the teacher's own sampler, one of `SPACINGS`.
      offset: added to its steps where they are 'leading'.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = 'scaled_linear'
    count: int = 1000
    first: int = 999
    spacing: str = 'leading'
    offset: int = 1

    def __post_init__(self) -> None:
        if self.beta_schedule not in ('scaled_linear', 'linear') or self.spacing not in SPACINGS:
            raise ValueError(f'beta_schedule {self.beta_schedule!r} and spacing {self.spacing!r}: '
                             "known are 'scaled_linear', 'linear' and "
                             f'{", ".join(map(repr, SPACINGS))}')
        if not (0 < self.beta_start <= self.beta_end < 1 and 0 <= self.first < self.count):
            raise ValueError(f'a table of {self.count} steps needs betas between 0 and 1 that do '
                             f'not fall, and a first step in it, not {self.first}')

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """``[count]``, fp64."""
        root = 2 if self.beta_schedule == 'scaled_linear' else 1
        ends = self.beta_start ** (1 / root), self.beta_end ** (1 / root)
        return np.linspace(*ends, self.count) ** root

    @functools.cached_property
    def times(self) -> np.ndarray:
        """The paper's t ``[count]`` of every step, falling, fp32."""
        abar = np.cumprod(1 - self.betas)
        a, s = np.sqrt(abar), np.sqrt(1 - abar)
        return (a / (a + s)).astype(np.float32)

    def __call__(self, u: Array | float) -> Array:
        """t of a step of the table; 1, clean, at u = 1."""
        rising = jnp.asarray(np.append(self.times[::-1], np.float32(1)))
        # .29 * 100 is 28.999998 in fp32; draws are 6e-5 of a step apart where steps are 1000.
        whole = jnp.floor(jnp.asarray(u, jnp.float32) * self.count + 1e-4)
        return rising[jnp.clip(whole.astype(jnp.int32), 0, self.count)]

    def step_of(self, t: Array) -> Array:
        """The step nearest to the paper's `t`, int32."""
        rising = self.times[::-1].astype(np.float64)
        between = jnp.asarray((rising[1:] + rising[:-1]) / 2, jnp.float32)
        return self.count - 1 - jnp.searchsorted(between, t).astype(jnp.int32)

    def steps(self, n: int) -> Array:
        """Uniform times of steps equally far apart, from `first`: 999, 749, 499, 249 for n = 4."""
        if not 1 <= n <= self.first + 1:
            raise ValueError(f'a student has 1 to {self.first + 1} steps, not {n}')
        k = self.first - np.arange(n) * (self.first + 1) // n
        return jnp.asarray((self.count - 1 - k) / self.count, jnp.float32)

    def after(self, u: Any) -> Any:
        """The next cleaner step: a smaller number."""
        return u + 1.0 / self.count

    def first_input(self, noise: Array) -> Array:
        return noise * process.preserved(self.times[self.first], noise)

    def grid(self, n: int) -> Array:
        """As diffusers' `EulerDiscreteScheduler` spaces the steps, then 1."""
        return jnp.asarray(np.append(self.times[self._grid_steps(n)], np.float32(1)))

    def grid_input(self, noise: Array, n: int) -> Array:
        """As that scheduler scales its `init_noise_sigma`.

        Unit noise for the network where steps are 'leading', though some signal is left at that
        level; a sample of that level without signal where they are 'trailing'.
        """
        t = self.times[self._grid_steps(n)[0]]
        return noise * (1 - t if self.spacing == 'trailing' else process.preserved(t, noise))

    def _grid_steps(self, n: int) -> np.ndarray:
        if not 1 <= n <= self.count:
            raise ValueError(f'a solver takes 1 to {self.count} steps of this table, not {n}')
        if self.spacing == 'trailing':
            return np.round(np.arange(self.count, 0, -self.count / n)[:n]).astype(int) - 1
        k = np.arange(n)[::-1] * (self.count // n) + self.offset
        return np.minimum(k, self.count - 1)


def chosen(own: TimeMap, shift: float | None, first: int | None = None) -> TimeMap:
    """A teacher's `own` time map, or the shift that a config names in its place.

    `first` is the step of its table at which students start, None its own.

    Raises:
      UserError: there is a `first` and no such step.
    """
    time = own if shift is None else Shift(shift)
    if first is None:
        return time
    if not isinstance(time, StepTable) or first >= time.count:
        raise UserError(f'config.student.first_step={first} is no step of {time}; leave it out')
    return dataclasses.replace(time, first=first)


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
