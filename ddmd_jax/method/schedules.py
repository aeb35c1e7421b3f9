"""Re-noising levels: the paper's four schedules (its Table 1), in pre-shift time.

Each draws tau_CA and tau_DM for a batch whose generator steps stand at pre-shift times t.
A term is *bounded* when its tau must be cleaner than t: uniform on [t, 1]; otherwise it is
uniform on [0, 1]. The time shift is applied after drawing, never before (the authors'
answer to users: t = .75, shift 3: tau_CA uniform on [.75, 1], then shifted into [.5, 1]).
What changes over a run, a range that relaxes or an alpha that rises, is a function of the number
of student updates.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ddmd_jax.diffusion.time import Shift

Array = jax.Array
Span = tuple[float | Array, float | Array]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which terms are bounded by the generator's step, and whether they share tau and noise."""

    ca_bounded: bool
    dm_bounded: bool
    shared: bool = False


SCHEDULES: dict[str, Schedule] = {
    'coupled_shared': Schedule(ca_bounded=False, dm_bounded=False, shared=True),
    'decoupled_full': Schedule(ca_bounded=False, dm_bounded=False),
    'decoupled_constrained': Schedule(ca_bounded=True, dm_bounded=True),
    'decoupled_hybrid': Schedule(ca_bounded=True, dm_bounded=False),
}


def draw_tau(key: Array, t: Array, bounded: bool, span: Span, shift: float) -> Array:
    """One re-noising level an example: uniform on `span`, from t upwards if `bounded`.

    Args:
      key: PRNG key.
      t: ``[B]`` pre-shift times of the generator's steps.
      bounded: whether the lower end is ``max(span[0], t)``.
      span: (low, high) in pre-shift time; high < 1 keeps the normaliser off the clean end.
      shift: time shift applied to the draw.

    Returns:
      ``[B]`` shifted levels, fp32.
    """
    low, high = span
    lower = jnp.maximum(low, t) if bounded else jnp.full_like(t, low)
    lower = jnp.minimum(lower, high)
    tau = lower + (high - lower) * jax.random.uniform(key, t.shape)
    return Shift(shift)(tau)


def draw_levels(key: Array, schedule: Schedule, t: Array, tau_ca: Span, tau_dm: Span,
                shift: float) -> tuple[Array, Array]:
    """``(tau_CA [B], tau_DM [B])``, shifted; if the schedule shares them, tau_CA twice
    (`tau_dm` then has no say)."""
    k_ca, k_dm = jax.random.split(key)
    ca = draw_tau(k_ca, t, schedule.ca_bounded, tau_ca, shift)
    if schedule.shared:
        return ca, ca
    return ca, draw_tau(k_dm, t, schedule.dm_bounded, tau_dm, shift)


def relaxed(span: Span, end: Span, updates: int, step: Array | int) -> Span:
    """`span` on its way to `end`: there after `updates` student updates, at a constant pace.

    The idea is DynaRS's: where a term looks may change with what the student can do already. At
    0 updates nothing moves and `span` is handed back as it is.
    """
    if not updates:
        return span
    share = jnp.minimum(jnp.asarray(step, jnp.float32) / updates, 1.0)
    return tuple(a + (b - a) * share for a, b in zip(span, end, strict=True))


def ramped(alpha: float, updates: int, step: Array | int) -> float | Array:
    """Guidance scale that rises from 1, no guidance, to `alpha` in `updates` student updates.

    The first of them (`step` 0) has the first step of the rise; at 0 updates it is `alpha`.
    """
    if not updates:
        return alpha
    share = jnp.minimum((jnp.asarray(step, jnp.float32) + 1.0) / updates, 1.0)
    return 1.0 + (alpha - 1.0) * share


def draw_alpha(key: Array, span: Span, batch: int) -> Array:
    """A guidance scale for each example ``[batch]``, uniform on `span`."""
    low, high = span
    return low + (high - low) * jax.random.uniform(key, (batch,))
